"""Bars: a layer fused and unfused, a whole model, the host's time, memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from matplotlib.figure import Figure

from ..errors import ReportError
from ..scheme import Scheme
from .accuracy_result import AccuracyResult
from .attention import BITS
from .cases import name_scheme
from .layer import linear_bytes
from .model_result import ModelResult, ModelRow
from .overhead import TARGET_US, OverheadResult
from .result import OURS, Measured, Result, Row
from .shapes import SHAPES, Shape
from .style import LOOKS, Look, draw_bars, finish, label_axes, new_figure

LAYER = "decoder_layer"
_SCALE_AND_MINIMUM = 4  # bytes, of a token and head
_PLAIN = {"bytes": Look("", "", "", "#93c5fd", "..")}
_HOST = {
    "call": LOOKS["fused"]._replace(label="operator, as a graph calls it"),
    "launcher": LOOKS["unfused"]._replace(label="its launcher alone"),
}


def layer_figure(result: Result) -> Figure | None:
    """Speed-ups of the layer over 16 bits, with its times; None if no layer was timed."""
    ops = [op for op in result.ops if op.endswith(LAYER)]
    if not ops:
        return None
    figure, panels = new_figure(len(ops), columns=1, width=8.0)
    baseline = result.environment["baseline"]
    for axes, op in zip(panels, ops, strict=True):
        counts = result.counts(op)
        heights: dict[str, list[float | None]] = {}
        times: dict[str, list[str]] = {}
        for variant in OURS:
            rows = [result.variants(op, M).get(variant) for M in counts]
            heights[variant] = [_height(result, row) for row in rows]
            times[variant] = [_microseconds(row) for row in rows]
        looks = LOOKS | {"baseline": LOOKS["baseline"]._replace(label=baseline)}
        draw_bars(axes, [str(M) for M in counts], heights, looks=looks, notes=times)
        label_axes(axes, op.replace("_", " "), "tokens M", f"speed-up over {baseline} (x)")
    return finish(figure, result.summary())


def _height(result: Result, row: Row | None) -> float | None:
    if row is None or row.median_us is None:
        return None
    return 1.0 if row.variant == "baseline" else result.speedup(row)


def _microseconds(row: Row | None) -> str:
    return "" if row is None or row.median_us is None else f"{row.median_us:,.0f} us"


# title, unit, value of a row
_MODEL_PANELS: tuple[tuple[str, str, Callable[[ModelRow], float | None]], ...] = (
    ("speed", "tokens / s", lambda row: row.tokens_per_s),
    ("first call, compiling included", "s", lambda row: row.first_call_s),
    ("most memory allocated", "GB", lambda row: row.peak_gb),
)


def model_figure(result: ModelResult) -> Figure:
    """A panel for each phase's speed, then one each for first calls and memory."""
    cases = sorted({(row.phase, row.batch) for row in result.rows})
    phases = list(dict.fromkeys(phase for phase, _ in cases))
    wanted = [
        (f"{phase}: {title}" if title == "speed" else title, unit, value, among)
        for title, unit, value in _MODEL_PANELS
        if any(value(row) is not None for row in result.rows)
        for phase, among in (
            [(phase, [case for case in cases if case[0] == phase]) for phase in phases]
            if title == "speed"
            else [("", cases)]
        )
    ]
    figure, panels = new_figure(max(1, len(wanted)), columns=2, width=4.6)
    for axes, (title, unit, value, among) in zip(panels, wanted, strict=False):
        series = {
            variant: [_of_model(result, variant, *case, value) for case in among]
            for variant in dict.fromkeys(row.variant for row in result.rows)
        }
        draw_bars(axes, [f"{phase}\nx{batch}" for phase, batch in among], series)
        label_axes(axes, title, "phase, sequences", unit)
    return finish(figure, result.summary())


def _of_model(
    result: ModelResult,
    variant: str,
    phase: str,
    batch: int,
    value: Callable[[ModelRow], float | None],
) -> float | None:
    for row in result.rows:
        if (row.variant, row.phase, row.batch) == (variant, phase, batch):
            return value(row)
    return None


def overhead_figure(result: OverheadResult) -> Figure:
    figure, (axes,) = new_figure(1, width=8.0)
    series: dict[str, list[float | None]] = {"call": [row.operator_us for row in result.rows]}
    if any(row.launcher_us is not None for row in result.rows):
        series["launcher"] = [row.launcher_us for row in result.rows]
    draw_bars(axes, [row.op for row in result.rows], series, looks=_HOST)
    axes.axhline(TARGET_US, color=LOOKS["baseline"].line, linestyle="--", label="what we aim at")
    label_axes(axes, "", "operator", "host time of a call (us)")
    return finish(figure, result.summary())


def memory_figure(model: str, results: Sequence[Measured]) -> Figure | None:
    """What a model's linears and cache take by scheme, computed; None if its sizes are not known.

    results: whose schemes are shown.
    """
    if model not in SHAPES:
        return None
    shape = SHAPES[model]
    weights: dict[str, float | None] = {"bf16": linear_bytes(shape, torch.bfloat16)}
    for scheme in _schemes(results):
        weights.setdefault(name_scheme(scheme), linear_bytes(shape, scheme))
    cache = {f"kv{bits}": _cache_bytes(shape, bits) for bits in sorted(BITS, reverse=True)}
    figure, panels = new_figure(2, width=4.6)
    for axes, title, unit, size, found in (
        (panels[0], "weights of all linears", "GB", 1e9, weights),
        (panels[1], "KV cache", "kB / token", 1e3, cache),
    ):
        bars = {"bytes": [one and shape.layers * one / size for one in found.values()]}
        draw_bars(axes, list(found), bars, looks=_PLAIN)
        label_axes(axes, title, "numbers", unit)
    return finish(
        figure,
        f"{model}, {shape.layers} layers, computed from its sizes: codes, scales and outliers\n"
        "without embeddings and output head, which stay in 16 bits",
    )


def _schemes(results: Sequence[Measured]) -> Iterator[Scheme]:
    for result in results:
        if fields := result.environment.get("scheme"):
            try:
                yield Scheme(**fields)
            except TypeError as error:
                raise ReportError(f"a scheme of another version of atom_compile: {error}") from None


def _cache_bytes(shape: Shape, bits: int) -> float | None:
    """Of one layer and token."""
    head = 2 * shape.head_dim if bits == 16 else shape.head_dim * bits // 8 + _SCALE_AND_MINIMUM
    return 2 * shape.kv_heads * head


def cache_figure(result: AccuracyResult) -> Figure | None:
    """Bytes of measured caches with what they cost; None if no cache was measured."""
    rows = [row for row in result.rows if row.cache_bytes is not None]
    if not rows:
        return None
    figure, (axes,) = new_figure(1, width=8.0)
    notes = {"bytes": [f"perplexity {row.ratio:.3f}x" for row in rows]}
    groups = [row.scheme.replace(" kv", "\nkv").replace(", ", ",\n") for row in rows]
    draw_bars(axes, groups, {"bytes": [row.cache_bytes for row in rows]}, looks=_PLAIN, notes=notes)
    label_axes(axes, "KV cache", f"numbers (ratio to {rows[0].against})", "bytes / token")
    return finish(figure, result.summary())
