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
from .cases import Case, Setting, name_scheme
from .layer import layer_cases
from .model import run_model
from .operators import GROUPS, operator_cases
from .overhead import run_overhead
from .result import OURS, Result, Row, describe_environment
from .shapes import DEFAULT_MODEL, Shape, find_device, find_shape
from .timing import Timing, copies_past_cache, measure, measure_ceilings

__all__ = ["Result", "Row", "Shape", "run", "run_model", "run_overhead"]

LEVELS = ("operators", "layer", "all", *attention.LEVELS)
DEFAULT_TOKENS = {"cuda": (1, 4, 16, 64, 256, 1024, 4096), "cpu": (1, 16, 64)}
QUICK_TOKENS = (1, 16)
DEFAULT_BATCHES = {"cuda": (1, 32), "cpu": (1, 2)}
# what a kernel that cannot run raises; a library that is not ours raises whatever it likes
_ERRORS = (RuntimeError, TritonError)
_PEER_ERRORS = (
    *_ERRORS,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    TypeError,
    ValueError,
)
DEFAULT_LENGTHS = {"cuda": (2048, 8192), "cpu": (64, 256)}


def run(
    model: str | Shape | Sequence[str | Shape] | None = None,
    *,
    tokens: Sequence[int] | None = None,
    batch: Sequence[int] | None = None,
    length: Sequence[int] | None = None,
    scheme: str | Scheme = "w4a4",
    level: str = "all",
    only: Sequence[str] = (),
    peers: bool | None = None,
    device: str | None = None,
    quick: bool = False,
    console: Console | None = None,
) -> Result:
    """Times the operators and the decoder layer of one or more models; `console` shows progress.

    level: "operators", "layer" or "all", these two, at each number of `tokens`. Or "attention", or
        one part of it, "decode", "prefill" or "append": over KV caches of 4, 8 and 16 bits, with
        each `batch` of sequences (prefill: with one) and each `length` that is cached.
    only: of the operators, these, and no layer; "linears" are the four of them.
    peers: time other INT4, INT8 and FP8 products beside the linears; by default on a GPU.

    Ctrl-C ends it with what has been measured by then, and the result's environment says so. Resets
    `torch.compile` in this process, so that nothing compiled before has a say.
    """
    if level not in LEVELS:
        raise OptionError(unknown("level", level, (*LEVELS, "model", "overhead")))
    for name in only:
        if name not in GROUPS:
            raise OptionError(unknown("operator", name, GROUPS))
    if only and level == "all":
        level = "operators"
    setting = _setting(tokens, scheme, device, quick)
    setting = replace(
        setting,
        only=tuple(only),
        peers=setting.device.type == "cuda" if peers is None else peers,
    )
    setting = _with_lengths(setting, level, tokens, batch, length, quick)
    settings = [replace(setting, shape=shape) for shape in _shapes(model, setting.device)]
    ceilings = measure_ceilings(setting.device, setting.dtype)
    environment = describe_environment(setting.device) | {
        "model": "-".join(one.shape.name for one in settings),
        **_measured(setting),
        "baseline": setting.baseline,
        "level": level,
        **asdict(ceilings),
    }
    rows: list[Row] = []
    with torch.no_grad(), Progress(console=console, disable=console is None) as progress:
        task = progress.add_task("", total=sum(_count(one, level) for one in settings))
        try:
            for one in settings:
                for case in _cases(one, level):
                    progress.update(task, description=f"{case.op}, {case.M} tokens, {case.variant}")
                    rows.append(_run_case(case, one, seconds=0.01 if quick else 0.1))
                    progress.advance(task)
        except KeyboardInterrupt:
            # variants are compared: those of the last operator and count may not all be there
            last = rows[-1] if rows else None
            rows = [row for row in rows if last and _group(row) != _group(last)]
            if not rows:
                raise
            environment["interrupted"] = True
            if console is not None:
                console.print("interrupted: this is what has been measured by then")
    return Result(environment, rows)


def _group(row: Row) -> tuple[str, str, int]:
    return row.model, row.op, row.M


def _shapes(model: str | Shape | Sequence[str | Shape] | None, device: torch.device) -> list[Shape]:
    model = model or DEFAULT_MODEL[device.type]
    models = [model] if isinstance(model, str | Shape) else model
    return [one if isinstance(one, Shape) else find_shape(one) for one in dict.fromkeys(models)]


def _setting(
    tokens: Sequence[int] | None,
    scheme: str | Scheme,
    device_name: str | None,
    quick: bool,
) -> Setting:
    device = find_device(device_name)
    tokens = tokens or (QUICK_TOKENS if quick else DEFAULT_TOKENS[device.type])
    return Setting(
        shape=find_shape(DEFAULT_MODEL[device.type]),
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
        "scheme_name": name_scheme(setting.scheme),
        "scheme": asdict(setting.scheme),
        "tokens": list(setting.tokens),
    }


def _cases(setting: Setting, level: str) -> Iterator[Case]:
    """The cases of `level`, made one at a time."""
    torch.compiler.reset()
    if level in attention.LEVELS:
        for plan in attention.attention_plans(setting, level):
            yield from attention.attention_cases(setting, plan)
        return
    if level != "layer":
        yield from operator_cases(setting)
    if level != "operators":
        yield from layer_cases(setting)


def _count(setting: Setting, level: str) -> int:
    if level in attention.LEVELS:
        return 3 * len(attention.attention_plans(setting, level))
    operators = sum(1 for _ in operator_cases(setting)) if level != "layer" else 0
    return operators + (3 * len(setting.tokens) if level != "operators" else 0)


def _run_case(case: Case, setting: Setting, seconds: float) -> Row:
    """The correctness gate, then the time. What goes wrong is the row's `failure`."""
    bytes_moved, error, copies, timing, failure = 0, math.nan, 0, None, case.missing
    errors: tuple[type[Exception], ...] = _ERRORS if case.variant in OURS else _PEER_ERRORS
    try:
        if not failure:
            bytes_moved, error = _check(case, setting)
            if error <= case.limit:  # not so for NaN
                copies, timing = _time(case, setting, bytes_moved, seconds)
            else:
                failure = f"its relative error of {error:.2g} is over {case.limit:g}"
    except errors as raised:
        failure = f"{type(raised).__name__}: {' '.join(str(raised).split())[:200]}"
    return Row(
        model=setting.shape.name,
        op=case.op,
        variant=case.variant,
        runs=case.runs,
        path=case.path,
        M=case.M,
        N=case.N,
        K=case.K,
        bytes=bytes_moved,
        flops=case.flops,
        arithmetic=case.arithmetic,
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
