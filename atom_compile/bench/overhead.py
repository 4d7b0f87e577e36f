"""What a call costs the host: operators at one token, launched one after the other.

    operator   torch.ops.atom.x(...), as a graph without CUDA graphs calls it
    launcher   the function that PyTorch's dispatcher ends up in, called directly

The device is left to catch up between samples and nothing waits for it within one; its queue is
longer than a sample. On a CPU both are the references, and the time is that of computing.
"""

from __future__ import annotations

import functools
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch.nn import functional as F

from ..kernels import (
    attention_quantize,
    float8_linear,
    gated_quantize,
    linear,
    norm_quantize,
    quantize,
    quantize_e4m3,
    rope_append,
    weight_only_linear,
)
from ..kernels.packing import pack_grouped, pack_rows, pack_weight
from ..passes.derived import named_format
from ..scheme import Scheme
from .cases import Setting
from .result import describe_environment, save_files
from .shapes import Shape, find_device
from .tables import make_table, number

TARGET_US = 10.0
# the device must be done with a call before the host is with the next
_SHAPE = Shape(name="small", hidden=1024, intermediate=1024, heads=8, kv_heads=8, head_dim=128)
_SLOTS = 1024  # of a KV cache
_CALLS, _SAMPLES = 200, 30  # a device's queue holds about a thousand launches


@dataclass(frozen=True, kw_only=True)
class OverheadRow:
    """Microseconds of the host for one call."""

    op: str
    operator_us: float
    operator_iqr_us: float
    launcher_us: float | None


@dataclass(frozen=True)
class OverheadResult:
    environment: dict[str, Any]
    rows: list[OverheadRow]

    @property
    def failures(self) -> list[str]:
        return []

    def summary(self) -> str:
        e = self.environment
        return (
            f"host time of a call at one token, {e['device']}\n"
            f"torch {e['torch']}, triton {e['triton']}, {e['date'][:10]}"
        )

    def print(self, console: Console) -> None:
        table = make_table(
            ["operator"],
            ["call us", "launcher us", "dispatch us"],
            title=self.summary(),
            caption=f"median ± interquartile range; at most {TARGET_US:.0f} us is what we aim at",
        )
        for row in self.rows:
            spent = row.launcher_us
            dispatch = None if spent is None else row.operator_us - spent
            call = f"{row.operator_us:.1f}±{row.operator_iqr_us:.1f}"
            table.add_row(row.op, call, number(spent, ".1f"), number(dispatch, ".1f"))
        console.print(table)

    def to_json(self) -> str:
        rows = [asdict(row) for row in self.rows]
        return json.dumps({"environment": self.environment, "rows": rows}, indent=1)

    def save(self, folder: Path | str) -> list[Path]:
        """Writes `host-overhead-<device>`: see `save_files`."""
        return save_files(self, Path(folder), ["host-overhead", self.environment["device"]])


def run_overhead(
    *,
    scheme: str | Scheme = "w4a4",
    device: str | None = None,
    quick: bool = False,
    console: Console | None = None,
) -> OverheadResult:
    place = find_device(device)
    setting = Setting(
        shape=_SHAPE,
        scheme=Scheme.of(scheme),
        tokens=(1,),
        device=place,
        dtype=torch.bfloat16 if place.type == "cuda" else torch.float32,
    )
    samples = 3 if quick else _SAMPLES
    rows = []
    with torch.no_grad(), Progress(console=console, disable=console is None) as progress:
        calls = _calls(setting)
        task = progress.add_task("", total=len(calls))
        for op, operator, launcher, arguments, format in calls:
            progress.update(task, description=op)
            named = named_format(format)
            timed = functools.partial(operator, **named)
            low, median, high = _host_times(timed, arguments, place, samples)
            launched = None
            if launcher and place.type == "cuda":
                timed = functools.partial(launcher, **named)
                launched = _host_times(timed, arguments, place, samples)[1]
            rows.append(
                OverheadRow(
                    op=op,
                    operator_us=median,
                    operator_iqr_us=high - low,
                    launcher_us=launched,
                )
            )
            progress.advance(task)
    return OverheadResult(describe_environment(place) | {"level": "overhead"}, rows)


class _Call(NamedTuple):
    op: str
    operator: Callable[..., Any]
    launcher: Callable[..., Any] | None
    arguments: tuple[Any, ...]
    format: str = "int"


def _calls(setting: Setting) -> list[_Call]:
    """Ours, and some of PyTorch's own to compare with."""
    scheme, K = setting.scheme, setting.shape.hidden
    layout, draw, dtype = scheme.layout(K), setting.draw(0), setting.dtype
    bits, clip = scheme.activation_bits, scheme.activation_clip
    numbers = bits, layout.group_size, layout.outlier_channels, clip
    x, up, weight = draw.normal(1, K), draw.normal(1, K), draw.normal(K, K)
    others = [
        _Call("F.linear", F.linear, None, (x, weight)),
        _Call("torch.add", torch.add, None, (x, up)),
        _Call("torch.empty_like", torch.empty_like, None, (x,)),  # all memory begins as that
    ]
    if bits == 16:
        format = scheme.weight_format
        weights = scheme.weight_bits, scheme.weight_clip, scheme.symmetric, format
        arguments = x, *pack_grouped(weight, layout, *weights), None, None, dtype
        ours = weight_only_linear.weight_only_linear, weight_only_linear.launch
        return [_Call("weight_only_linear", *ours, arguments, format), *others]
    if scheme.activation_format == "e4m3":
        format = scheme.weight_format
        rows = pack_rows(weight, layout, format)
        product = *quantize_e4m3.reference(x), *rows, None, None, dtype
        multiply = float8_linear.float8_linear, float8_linear.launch
        return [
            _Call("float8_linear", *multiply, product, format),
            _Call("quantize_e4m3", quantize_e4m3.quantize_e4m3, None, (x,)),
            *others,
        ]
    of_weight = scheme.weight_bits, scheme.weight_clip, scheme.weight_format
    format = scheme.activation_format
    codes, scale = quantize.reference(x, *numbers, format=format)
    operands = codes, scale, *pack_weight(weight, layout, *of_weight), None, None, dtype
    norm = draw.norm_weight(K), None, draw.order(K), 1e-5, False, True, dtype
    normed = norm_quantize.norm_quantize, norm_quantize.launch
    gated = gated_quantize.gated_quantize, gated_quantize.launch
    return [
        _Call("linear", linear.linear, linear.launch, operands, scheme.weight_format),
        _Call("norm_quantize", *normed, (x, *norm, *numbers), format),
        _Call("gated_quantize", *gated, (x, up, None, "silu", *numbers), format),
        _Call("quantize", quantize.quantize, quantize.launch, (x, *numbers), format),
        *_attention_calls(setting, numbers, format),
        *others,
    ]


def _attention_calls(setting: Setting, numbers: tuple[Any, ...], format: str) -> list[_Call]:
    """With a KV cache of INT4 that holds one token."""
    shape, draw, device = setting.shape, setting.draw(1), setting.device
    query, key, value, cos, sin = (draw.normal(1, shape.heads, 1, shape.head_dim) for _ in range(5))
    planes = 1, shape.kv_heads, _SLOTS
    codes = torch.zeros(*planes, shape.head_dim // 2, dtype=torch.uint8, device=device)
    scale = torch.ones(*planes, 1, 2, dtype=torch.float16, device=device)
    length = torch.ones(1, dtype=torch.int64, device=device)
    cache = codes, scale, codes, scale, None, None, None, length
    appended = query, key, value, cos[:, 0], sin[:, 0], *cache, 4
    attended = query, *cache, None, None, 4, 0, shape.head_dim**-0.5, 0.0
    append = rope_append.rope_append, rope_append.launch
    attend = attention_quantize.attention_quantize, attention_quantize.launch
    return [
        _Call("rope_append", *append, appended),
        _Call("attention_quantize", *attend, (*attended, None, *numbers), format),
    ]


def _host_times(
    call: Callable[..., Any], arguments: tuple[Any, ...], device: torch.device, samples: int
) -> tuple[float, ...]:
    """The quartiles of a call's microseconds."""
    for _ in range(3):
        call(*arguments)
    calls = _CALLS if device.type == "cuda" else 2
    times = []
    gc.disable()  # as little as a loop of our own calls would collect
    try:
        for _ in range(samples):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                call(*arguments)
            times.append(1e6 * (time.perf_counter() - start) / calls)
    finally:
        gc.enable()
    return tuple(statistics.quantiles(times, n=4))
