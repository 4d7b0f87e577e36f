"""The benchmark's plot: speed-up against tokens or length, one panel for each operator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from .result import Result

_COLUMNS = 4
_STYLE: dict[str, dict[str, Any]] = {
    "unfused": {"color": "#d97706", "marker": "s", "label": "plain operators"},
    "fused": {"color": "#1d4ed8", "marker": "o", "label": "fused operators"},
}
_BASELINE_STYLE = {"color": "#6b7280", "linewidth": 1.0, "linestyle": "--"}


def plot(result: Result, path: Path) -> None:
    lines = -(-len(result.ops) // _COLUMNS)
    columns = min(_COLUMNS, len(result.ops))
    figure = Figure(figsize=(max(3.0 * columns, 6.0), 2.6 * lines + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, op in zip(panels, result.ops, strict=False):
        _draw_panel(axes, result, op)
    for axes in panels[len(result.ops) :]:
        axes.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel(result.summary(), fontsize="small")
    figure.savefig(path, dpi=150)


def _draw_panel(axes: Any, result: Result, op: str) -> None:
    counts = result.counts(op)
    has_baseline = "baseline" in result.variants(op, counts[0])
    numbers = "INT4" if result.axis == "tokens" else "KV cache"
    baseline = result.environment["baseline"] if has_baseline else "plain operators"
    axes.axhline(1.0, label=result.environment["baseline"], **_BASELINE_STYLE)
    for variant, style in _STYLE.items():
        rows = [result.variants(op, M)[variant] for M in counts]
        points = [(row.M, result.speedup(row)) for row in rows]
        points = [(M, speedup) for M, speedup in points if speedup is not None]
        style = style | {"label": f"{numbers}, {style['label']}"}
        axes.plot(*zip(*points, strict=True) if points else ((), ()), markersize=4, **style)
    axes.set_title(op, fontsize="medium")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(M) for M in counts], minor=False)
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel("tokens M" if result.axis == "tokens" else "length", fontsize="small")
    axes.set_ylabel(f"speed-up over {baseline} (x)", fontsize="small")
    axes.tick_params(labelsize="small")
    axes.grid(alpha=0.25)
