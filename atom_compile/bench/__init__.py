"""`atom-compile bench`: fused operators against plain ones against 16 bits.

Every case is compared with its reference first, and one that fails has no time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch.utils import _pytree as pytree
from triton.errors import TritonError

from ..errors import OptionError, unknown
from ..scheme import Scheme
from . import attention
from .cases import Case, Setting
from .layer import layer_cases
from .operators import operator_cases
from .result import Result, Row, describe_environment
from .shapes import Shape, find_shape
from .timing import Timing, copies_past_cache, copy_bandwidth, measure

__all__ = ["Result", "Row", "Shape", "run"]

LEVELS = ("operators", "layer", "all", *attention.LEVELS)
DEFAULT_MODEL = {"cuda": "llama3-8b", "cpu": "prose-llama-5m"}
DEFAULT_TOKENS = {"cuda": (1, 4, 16, 64, 256, 1024, 4096), "cpu": (1, 16, 64)}
QUICK_TOKENS = (1, 16)
DEFAULT_BATCHES = {"cuda": (1, 32), "cpu": (1, 2)}
DEFAULT_LENGTHS = {"cuda": (2048, 8192), "cpu": (64, 256)}


def run(
    model: str | Shape | None = None,
    *,
    tokens: Sequence[int] | None = None,
    batch: Sequence[int] | None = None,
    length: Sequence[int] | None = None,
    scheme: str | Scheme = "w4a4",
    level: str = "all",
    device: str | None = None,
    quick: bool = False,
    console: Console | None = None,
) -> Result:
    """Times the operators and the decoder layer of `model`; `console` shows progress.

    level: "operators", "layer" or "all", these two, at each number of `tokens`. Or "attention", or
        one part of it, "decode", "prefill" or "append": over KV caches of 4, 8 and 16 bits, with
        each `batch` of sequences (prefill: with one) and each `length` that is cached.

    Resets `torch.compile` in this process, so that nothing compiled before has a say.
    """
    if level not in LEVELS:
        raise OptionError(unknown("level", level, LEVELS))
    setting = _setting(model, tokens, scheme, device, quick)
    setting = _with_lengths(setting, level, tokens, batch, length, quick)
    environment = describe_environment(setting.device) | {
        "model": setting.shape.name,
        **_measured(setting),
        "baseline": setting.baseline,
        "level": level,
        "copy_gb_per_s": round(copy_bandwidth(setting.device), 1),
    }
    rows: list[Row] = []
    with torch.no_grad(), Progress(console=console, disable=console is None) as progress:
        cases, total = _cases(setting, level)
        task = progress.add_task("", total=total)
        for case in cases:
            progress.update(task, description=f"{case.op}, {case.M} tokens, {case.variant}")
            rows.append(_run_case(case, setting, seconds=0.01 if quick else 0.1))
            progress.advance(task)
    return Result(environment, rows)


def _setting(
    model: str | Shape | None,
    tokens: Sequence[int] | None,
    scheme: str | Scheme,
    device_name: str | None,
    quick: bool,
) -> Setting:
    device_name = device_name or ("cuda" if torch.cuda.is_available() else "cpu")
    if device_name.partition(":")[0] not in DEFAULT_MODEL:
        raise OptionError(unknown("device", device_name, DEFAULT_MODEL))
    device = torch.device(device_name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError("device 'cuda': PyTorch sees no GPU here. Use device 'cpu'.")
    model = model or DEFAULT_MODEL[device.type]
    tokens = tokens or (QUICK_TOKENS if quick else DEFAULT_TOKENS[device.type])
    return Setting(
        shape=model if isinstance(model, Shape) else find_shape(model),
        scheme=Scheme.of(scheme),
        tokens=tuple(dict.fromkeys(tokens)),
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    )


def _with_lengths(
    setting: Setting,
    level: str,
    tokens: Sequence[int] | None,
    batch: Sequence[int] | None,
    length: Sequence[int] | None,
    quick: bool,
) -> Setting:
    """With what the levels of attention go through."""
    of_attention = level in attention.LEVELS
    taken = ("length",) if level == "prefill" else ("batch", "length")
    taken = taken if of_attention else ("tokens",)
    for name, given in (("tokens", tokens), ("batch", batch), ("length", length)):
        if given and name not in taken:
            raise OptionError(
                f"{name} is {list(given)}, and level {level!r} does not go by it; "
                f"give {' and '.join(taken)}"
            )
        if given and min(given) < 1:
            raise OptionError(f"{name} is {list(given)}; every number must be at least 1")
    if not of_attention:
        return setting
    kind, count = setting.device.type, 1 if quick else None
    return replace(
        setting,
        tokens=(),
        batches=(1,)
        if level == "prefill"
        else tuple(dict.fromkeys(batch or DEFAULT_BATCHES[kind][:count])),
        lengths=tuple(dict.fromkeys(length or DEFAULT_LENGTHS[kind][:count])),
    )


def _measured(setting: Setting) -> dict[str, Any]:
    if setting.lengths:
        return {
            "scheme_name": "-".join(f"kv{bits}" for bits in attention.BITS),
            "batch": list(setting.batches),
            "length": list(setting.lengths),
        }
    return {
        "scheme_name": f"w{setting.scheme.weight_bits}a{setting.scheme.activation_bits}",
        "scheme": asdict(setting.scheme),
        "tokens": list(setting.tokens),
    }


def _cases(setting: Setting, level: str) -> tuple[Iterator[Case], int]:
    """The cases of `level`, made one at a time, and how many there are."""
    torch.compiler.reset()
    if level in attention.LEVELS:
        plans = attention.attention_plans(setting, level)
        cases = (case for plan in plans for case in attention.attention_cases(setting, plan))
        return cases, 3 * len(plans)
    operators = operator_cases(setting) if level != "layer" else []
    layers = layer_cases(setting) if level != "operators" else iter(())
    layer_count = 3 * len(setting.tokens) if level != "operators" else 0
    return (case for part in (operators, layers) for case in part), len(operators) + layer_count


def _run_case(case: Case, setting: Setting, seconds: float) -> Row:
    """The correctness gate, then the time. What goes wrong is the row's `failure`."""
    bytes_moved, error, copies, timing, failure = 0, math.nan, 0, None, None
    try:
        bytes_moved, error = _check(case, setting)
        if error <= case.limit:  # not so for NaN
            copies, timing = _time(case, setting, bytes_moved, seconds)
        else:
            failure = f"its relative error of {error:.2g} is over {case.limit:g}"
    except (RuntimeError, TritonError) as raised:
        failure = f"{type(raised).__name__}: {' '.join(str(raised).split())[:200]}"
    return Row(
        op=case.op,
        variant=case.variant,
        runs=case.runs,
        M=case.M,
        N=case.N,
        K=case.K,
        bytes=bytes_moved,
        flops=case.flops,
        copies=copies,
        error=error if math.isfinite(error) else None,
        error_limit=case.limit,
        failure=failure,
        median_us=timing.median_us if timing else None,
        iqr_us=timing.iqr_us if timing else None,
        timing=timing.how if timing else None,
    )


def _check(case: Case, setting: Setting) -> tuple[int, float]:
    """The bytes that the case must move, and its relative error."""
    inputs = case.inputs(setting.draw(0))
    expected = case.reference(*inputs).float()
    outputs = case.function(*inputs)
    tensors = [x for x in pytree.tree_leaves((inputs, outputs)) if isinstance(x, torch.Tensor)]
    bytes_moved = case.weight_bytes + sum(tensor.nbytes for tensor in tensors)
    for output in pytree.tree_leaves(outputs):
        # the second call is handed this memory again: what it leaves unwritten shows
        output.fill_(math.nan if output.is_floating_point() else 85)
    del outputs, output, tensors
    off = case.observe(case.function(*inputs), *inputs).float() - expected
    norm = torch.linalg.vector_norm
    return bytes_moved, float(norm(off, dtype=torch.float64) / norm(expected, dtype=torch.float64))


def _time(case: Case, setting: Setting, bytes_moved: int, seconds: float) -> tuple[int, Timing]:
    """The number of copies that were rotated through, and the time of one."""
    copies = copies_past_cache(bytes_moved, setting.device)
    inputs = [case.inputs(setting.draw(index)) for index in range(copies)]
    calls = [functools.partial(case.function, *given) for given in inputs]
    return copies, measure(calls, setting.device, seconds)
