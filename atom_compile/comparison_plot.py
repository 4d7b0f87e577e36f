"""The comparison's plot: what perplexity each scheme costs, tasks, and noise layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from .comparison import Comparison

_COLORS = ("#1d4ed8", "#d97706", "#059669", "#be123c", "#7c3aed", "#0891b2")
_EXACT = "#6b7280"
_MOST_TASKS = 8


def plot(comparison: Comparison, path: Path) -> None:
    panels: list[tuple[float, Callable[[Any, Comparison], None]]] = []
    if comparison.variants[0].text is not None:
        panels.append((1.0, _draw_text))
    if comparison.task_metrics:
        panels.append((1.5, _draw_tasks))
    if any(one.layers for one in comparison.quantized):
        panels.append((2.5, _draw_layers))
    widths = [width for width, _ in panels]
    figure = Figure(figsize=(2.6 * sum(widths) + 1.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)[0]
    for one, (_, draw) in zip(axes, panels, strict=True):
        draw(one, comparison)
        one.tick_params(labelsize="small")
        one.grid(alpha=0.25)
    e = comparison.environment
    figure.supxlabel(
        f"{e['model']} against {e['baseline']}, {e['device']}, torch {e['torch']}, "
        f"{e['date'][:10]}",
        fontsize="small",
    )
    figure.savefig(path, dpi=150)


def _draw_text(axes: Any, comparison: Comparison) -> None:
    for at, variant in enumerate(comparison.quantized):
        ratio, error = comparison.ratio(variant) or (1.0, None)
        axes.errorbar(at, ratio, yerr=error, fmt="o", capsize=4, color=_color(at))
        axes.annotate(f"{ratio:.3f}", (at, ratio), xytext=(7, 0), textcoords="offset points")
    axes.axhline(1.0, color=_EXACT, linestyle="--", linewidth=1.0)
    names = [one.name.replace(" + ", "\n+ ") for one in comparison.quantized]
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.2)
    axes.set_title("perplexity, ratio", fontsize="medium")


def _draw_tasks(axes: Any, comparison: Comparison) -> None:
    shown = comparison.task_metrics[:_MOST_TASKS]
    width = 0.8 / len(comparison.variants)
    for number, variant in enumerate(comparison.variants):
        heights = [variant.tasks.get(task, {}).get(metric, 0.0) for task, metric in shown]
        places = [at + number * width for at in range(len(shown))]
        color = _EXACT if number == 0 else _color(number - 1)
        axes.bar(places, heights, width, label=variant.name, color=color)
    labels = [f"{task}\n{metric}" for task, metric in shown]
    axes.set_xticks([at + 0.4 - width / 2 for at in range(len(shown))], labels)
    axes.legend(fontsize="small", frameon=False)
    axes.set_title("tasks", fontsize="medium")


def _draw_layers(axes: Any, comparison: Comparison) -> None:
    for number, variant in enumerate(comparison.quantized):
        for of_all, style in ((False, "-"), (True, ":")):
            noise = [one.in_all_db if of_all else one.alone_db for one in variant.layers]
            label = f"{variant.name}, {'all before it' if of_all else 'alone'}"
            axes.plot(
                [float("nan") if one is None else one for one in noise],
                style,
                color=_color(number),
                label=label,
                marker="." if not of_all and len(noise) <= 64 else None,
            )
    axes.set_xlabel("linear, in the order in which they are computed", fontsize="small")
    axes.set_ylabel("signal over noise (dB)", fontsize="small")
    axes.legend(fontsize="small", frameon=False)
    axes.set_title("the linears' outputs", fontsize="medium")


def _color(number: int) -> str:
    return _COLORS[number % len(_COLORS)]
