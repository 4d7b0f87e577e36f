"""Accuracy of each scheme, and against its speed where that was measured."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from .accuracy_result import AccuracyResult, AccuracyRow
from .bars import LAYER
from .model_result import ModelResult
from .result import Measured, Result
from .style import LOOKS, finish, label_axes, new_figure

_MARKERS = "osD^vP*X<>"
_MOST_PANELS = 6  # of speeds


class Speed(NamedTuple):
    """Of one scheme over 16 bits; `what` was timed, `where`."""

    scheme: str
    what: str
    where: str
    over: str
    speedup: float


def speeds(result: Measured) -> Iterator[Speed]:
    """Of a model, else of a decoder layer, else the mean over linears: at few and many tokens."""
    if isinstance(result, ModelResult):
        yield from _model_speeds(result)
    elif isinstance(result, Result):
        e = result.environment
        for what, speedup in _operator_speeds(result):
            if speedup is not None:
                yield Speed(e["scheme_name"], what, e["device"], e["baseline"], speedup)


def _operator_speeds(result: Result) -> Iterator[tuple[str, float | None]]:
    layers = [op for op in result.ops if op.endswith(LAYER)]
    ops, name = (layers, "decoder layer") if layers else (result.linears, "mean of linears")
    if not ops:
        return
    model, counts = result.environment["model"], result.counts(ops[0])
    for M in dict.fromkeys((counts[0], counts[-1])):
        what = f"{model} {name}, {M} token{'s' if M > 1 else ''}"
        yield what, result.mean_speedup("fused", M, ops)


def _model_speeds(result: ModelResult) -> Iterator[Speed]:
    e = result.environment
    caches = {"static": "", "kv4": " kv4"}
    for row in result.rows:
        speedup = result.speedup(row)
        if row.variant in caches and speedup is not None:
            what = f"{e['model']} {row.phase} x{row.batch}"
            scheme = e["scheme_name"] + caches[row.variant]
            yield Speed(scheme, what, e["device"], e["baseline"], speedup)


def accuracy_figure(results: Sequence[Measured]) -> Figure | None:
    """A panel of all schemes, then one for each speed that some have; None without an accuracy."""
    rows = [
        row
        for result in results
        if isinstance(result, AccuracyResult)
        for row in result.rows
        if row.cache_bytes is None  # a ratio to another number: its own figure
    ]
    if not rows:
        return None
    panels: dict[tuple[str, str], list[Speed]] = {}
    for result in results:
        for speed in speeds(result):
            if any(row.scheme == speed.scheme and not _is_simulated(row) for row in rows):
                panels.setdefault((speed.where, speed.what), []).append(speed)
    shown = dict(list(panels.items())[:_MOST_PANELS])
    figure, axes = new_figure(1 + len(shown), columns=3, width=4.2, tall_first=True)
    looks = _looks(rows)
    _draw_schemes(axes[0], rows, looks)
    for one, ((where, what), found) in zip(axes[1:], shown.items(), strict=True):
        _draw_speeds(one, rows, found, looks)
        label_axes(
            one, f"{textwrap.fill(what, 36)}\n{where}", f"speed-up over {found[0].over} (x)", _RATIO
        )
        one.set_ylim(axes[0].get_xlim())
    return finish(figure, _caption(results, rows, panels, len(shown)))


_RATIO = "perplexity, ratio to float32"


def _caption(
    results: Sequence[Measured],
    rows: Sequence[AccuracyRow],
    panels: dict[tuple[str, str], list[Speed]],
    shown: int,
) -> str:
    timed = {speed.scheme for found in panels.values() for speed in found}
    untimed = dict.fromkeys(row.scheme for row in rows if row.scheme not in timed)
    torches = dict.fromkeys(str(one.environment.get("torch", "?")) for one in results)
    triton = dict.fromkeys(
        one.environment["triton"] for one in results if "triton" in one.environment
    )
    dates = sorted(one.environment["date"][:10] for one in results if "date" in one.environment)
    parts = [f"torch {', '.join(one for one in torches if one != '?')}"]
    parts += [f"triton {', '.join(triton)}"] if triton else []
    parts += [" to ".join(dict.fromkeys((dates[0], dates[-1])))] if dates else []
    lines = ["hollow: weights rounded to nearest; filled: by GPTQ", "; ".join(parts)]
    if panels:
        lines.insert(0, "the titles say whose speed it is, the legend whose accuracy")
    if panels and untimed:
        lines.append(f"without a speed: {len(untimed)} of the schemes on the left")
    if len(panels) > shown:
        lines.append(f"{len(panels) - shown} more speeds are in the tables")
    return "\n".join(lines)


def _looks(rows: Sequence[AccuracyRow]) -> dict[tuple[Any, ...], tuple[str, str]]:
    """(model, outliers, simulated) -> its marker and label. Devices agree too well to tell."""
    keys = dict.fromkeys(map(_group, rows))
    return {
        key: (_MARKERS[number % len(_MARKERS)], _group_label(*key))
        for number, key in enumerate(keys)
    }


def _group(row: AccuracyRow) -> tuple[str, bool, bool]:
    return row.model, row.outliers, _is_simulated(row)


def _is_simulated(row: AccuracyRow) -> bool:
    return "simulated" in row.method


def _group_label(model: str, outliers: bool, simulated: bool) -> str:
    return f"{model}{' with outliers' if outliers else ''}{', simulated' if simulated else ''}"


def _draw_points(
    axes: Any,
    points: Sequence[tuple[float, AccuracyRow]],
    looks: dict[Any, tuple[str, str]],
    sideways: bool = False,
) -> None:
    """The ratio up or, `sideways`, to the right; the other number of `points` across."""
    for across, row in points:
        marker, label = looks[_group(row)]
        color = LOOKS["fused"].line if not row.outliers else LOOKS["unfused"].line
        axes.plot(
            *([row.ratio], [across]) if sideways else ([across], [row.ratio]),
            marker=marker,
            color=color,
            markerfacecolor=color if "gptq" in row.method else "none",
            markersize=6,
            linestyle="none",
            label=label,
        )
    draw_line = axes.axvline if sideways else axes.axhline
    draw_line(1.0, color=LOOKS["baseline"].line, linestyle="--", linewidth=1.0, label="float32")


def _draw_schemes(axes: Any, rows: Sequence[AccuracyRow], looks: dict[Any, Any]) -> None:
    schemes = list(dict.fromkeys(row.scheme for row in rows))
    groups = list(looks)
    aside = [(index - (len(groups) - 1) / 2) * 0.12 for index in range(len(groups))]
    points = [(schemes.index(row.scheme) + aside[groups.index(_group(row))], row) for row in rows]
    _draw_points(axes, points, looks, sideways=True)
    label_axes(axes, "every scheme", _RATIO, "scheme")
    axes.set_yticks(range(len(schemes)), schemes)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize="xx-small" if len(schemes) > 8 else "small")
    axes.margins(x=0.25, y=0.05)  # room for the schemes' names in the panels beside


def _draw_speeds(
    axes: Any, rows: Sequence[AccuracyRow], found: Sequence[Speed], looks: dict[Any, Any]
) -> None:
    for number, speed in enumerate({speed.scheme: speed for speed in found}.values()):
        matching = [row for row in rows if row.scheme == speed.scheme and not _is_simulated(row)]
        _draw_points(axes, [(speed.speedup, row) for row in matching], looks)
        # in turn above and below, so that schemes of about one speed stay readable
        highest = max(row.ratio for row in matching)
        axes.annotate(
            speed.scheme,
            (speed.speedup, highest),
            xytext=(0, 8 + 12 * (number % 2)),
            textcoords="offset points",
            ha="center",
            fontsize="small",
        )
    axes.plot(
        [1.0], [1.0], marker="_", markersize=14, color=LOOKS["baseline"].line, linestyle="none"
    )
    axes.annotate(
        found[0].over,
        (1.0, 1.0),
        xytext=(0, 5),
        textcoords="offset points",
        ha="center",
        fontsize="small",
    )
    axes.set_xlim(0.0, 1.25 * max(1.0, *(speed.speedup for speed in found)))
