"""Speed-up against tokens or length, one panel for each operator, with the roofline and peers."""

from __future__ import annotations

import itertools
from typing import Any

from matplotlib.figure import Figure

from .result import Result
from .style import FLOOR, LOOKS, PEERS, finish, label_axes, new_figure

_BASELINE_STYLE = {"color": LOOKS["baseline"].line, "linewidth": 1.0, "linestyle": "--"}
_FLOOR_STYLE = {"color": FLOOR, "linewidth": 1.0, "linestyle": ":"}
_HEADROOM = 1.1
_FARTHEST_FLOOR = 2.5  # over the fastest that was measured: that of a tiny operator is far above
_MOST_TICKS = 7  # that stand side by side


def speed_figure(result: Result) -> Figure:
    figure, panels = new_figure(len(result.ops))
    for axes, op in zip(panels, result.ops, strict=True):
        _draw_panel(axes, result, op)
    return finish(figure, result.summary())


def _draw_panel(axes: Any, result: Result, op: str) -> None:
    counts = result.counts(op)
    has_baseline = "baseline" in result.variants(op, counts[0])
    baseline = result.environment["baseline"]
    axes.axhline(1.0, label=baseline, **_BASELINE_STYLE)
    tops = [1.0]
    for variant, style in _styles(result).items():
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
    label_axes(
        axes,
        op,
        "tokens M" if result.axis == "tokens" else "length (tokens)",
        f"speed-up over {baseline if has_baseline else 'plain operators'} (x)",
    )
    axes.grid(axis="x", alpha=0.25)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(M) for M in counts], minor=False)
    axes.set_ylim(0.0, _HEADROOM * max(tops))
    if len(counts) > _MOST_TICKS:
        axes.tick_params(axis="x", labelsize="x-small", labelrotation=60)


def _styles(result: Result) -> dict[str, dict[str, Any]]:
    """Peers thin and under ours."""
    peers = {
        peer: {
            "color": color,
            "marker": marker,
            "linestyle": dashes,
            "linewidth": 0.9,
            "label": peer,
        }
        for peer, (color, marker, dashes) in zip(result.peers, itertools.cycle(PEERS), strict=False)
    }
    numbers = "INT4" if result.axis == "tokens" else "KV cache"
    ours = {
        variant: {
            "color": LOOKS[variant].line,
            "marker": LOOKS[variant].marker,
            "label": f"{numbers}, {LOOKS[variant].label}",
        }
        for variant in ("unfused", "fused")
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
