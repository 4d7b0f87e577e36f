"""The benchmark's plot: speed-up against tokens or length, one panel for each operator."""

from __future__ import annotations

import itertools
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
_FLOOR_STYLE = {"color": "#111827", "linewidth": 1.0, "linestyle": ":"}
_PEER_COLORS = ("#059669", "#10b981", "#be123c", "#7c3aed", "#a855f7", "#0891b2")
_HEADROOM = 1.1
_FARTHEST_FLOOR = 2.5  # over the fastest that was measured: that of a tiny operator is far above


def plot(result: Result, path: Path) -> None:
    lines = -(-len(result.ops) // _COLUMNS)
    columns = min(_COLUMNS, len(result.ops))
    figure = Figure(figsize=(max(3.0 * columns, 6.0), 2.6 * lines + 1.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axes, op in zip(panels, result.ops, strict=False):
        _draw_panel(axes, result, op)
    for axes in panels[len(result.ops) :]:
        axes.set_visible(False)
    handles = {
        label: handle
        for axes in panels[: len(result.ops)]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper center", ncols=5, frameon=False
    )
    figure.supxlabel(result.summary(), fontsize="small")
    figure.savefig(path, dpi=150)


def _draw_panel(axes: Any, result: Result, op: str) -> None:
    counts = result.counts(op)
    has_baseline = "baseline" in result.variants(op, counts[0])
    numbers = "INT4" if result.axis == "tokens" else "KV cache"
    baseline = result.environment["baseline"] if has_baseline else "plain operators"
    axes.axhline(1.0, label=result.environment["baseline"], **_BASELINE_STYLE)
    tops = [1.0]
    for variant, style in _styles(result, numbers).items():
        points = _speedups(result, op, variant)
        if not points and variant in result.peers:
            continue
        tops += [speedup for _, speedup in points]
        axes.plot(*zip(*points, strict=True) if points else ((), ()), markersize=4, **style)
    floors = [(M, result.speedup_at_floor(result.variants(op, M)["fused"])) for M in counts]
    known = [(M, floor) for M, floor in floors if floor is not None]
    tops += [floor for _, floor in known if floor < _FARTHEST_FLOOR * max(tops)]
    if known:
        axes.plot(*zip(*known, strict=True), label="floor: bytes and operations", **_FLOOR_STYLE)
    axes.set_title(op, fontsize="medium")
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(M) for M in counts], minor=False)
    axes.set_ylim(0.0, _HEADROOM * max(tops))
    axes.set_xlabel("tokens M" if result.axis == "tokens" else "length", fontsize="small")
    axes.set_ylabel(f"speed-up over {baseline} (x)", fontsize="small")
    axes.tick_params(labelsize="small")
    if len(counts) > 7:
        axes.tick_params(axis="x", labelsize="x-small", labelrotation=60)
    axes.grid(alpha=0.25)


def _styles(result: Result, numbers: str) -> dict[str, dict[str, Any]]:
    """Peers thin and without markers, under ours."""
    peers = {
        peer: {"color": color, "linewidth": 0.9, "label": peer}
        for peer, color in zip(result.peers, itertools.cycle(_PEER_COLORS), strict=False)
    }
    ours = {
        variant: style | {"label": f"{numbers}, {style['label']}"}
        for variant, style in _STYLE.items()
    }
    return peers | ours


def _speedups(result: Result, op: str, variant: str) -> list[tuple[int, float]]:
    points = []
    for M in result.counts(op):
        row = result.variants(op, M).get(variant)
        speedup = result.speedup(row) if row else None
        if speedup is not None:
            points.append((M, speedup))
    return points
