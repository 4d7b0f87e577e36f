"""Which figures a result has, which several have together, and their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from ..files import write_whole
from .accuracy_result import AccuracyResult
from .bars import cache_figure, layer_figure, memory_figure, model_figure, overhead_figure
from .model_result import ModelResult
from .overhead import OverheadResult
from .plot import speed_figure
from .result import Measured, Result
from .style import save_figure
from .tradeoff import accuracy_figure


def figures_of(result: Measured, name: str) -> dict[str, Figure]:
    """By the names of their files; a result's first figure is named as the result is."""
    figures: dict[str, Figure | None] = {}
    if isinstance(result, ModelResult):
        figures[name] = model_figure(result)
    elif isinstance(result, OverheadResult):
        figures[name] = overhead_figure(result)
    elif isinstance(result, AccuracyResult):
        figures[name] = cache_figure(result)
    elif isinstance(result, Result) and result.environment["level"] == "layer":
        figures[name] = layer_figure(result)
    elif isinstance(result, Result):
        figures = {name: speed_figure(result), f"{name}-layer": layer_figure(result)}
    return {name: figure for name, figure in figures.items() if figure is not None}


def shared_figures(results: Sequence[Measured]) -> dict[str, Figure]:
    """Accuracy over schemes and against speed; memory, of each model that was timed."""
    timed = [one for one in results if isinstance(one, Result | ModelResult)]
    figures = {"accuracy-against-speed": accuracy_figure(results)}
    for model in dict.fromkeys(one.environment["model"] for one in timed):
        of_model = [one for one in timed if one.environment["model"] == model]
        figures[f"memory-{model}"] = memory_figure(model, of_model)
    return {name: figure for name, figure in figures.items() if figure is not None}


def save_figures(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Each as .png and .svg, whole or not at all."""
    paths = [folder / f"{name}{suffix}" for name in figures for suffix in (".png", ".svg")]
    for path in paths:
        figure = figures[path.name.removesuffix(path.suffix)]
        write_whole(path, lambda unfinished, figure=figure: save_figure(figure, unfinished))  # type: ignore[misc]
    return paths
