"""`atom-compile tune`: measures which launch of a linear's product is fastest for which sizes.

It is that of `atom.linear`, with 16-bit activations of `atom.weight_only_linear`, or with FP8 ones
of `atom.float8_linear`.

Results go to `kernels/tuned/<device>.json` (kernels/tuning.py says what is in it) after every size,
so that tuning may be interrupted and goes on where it was. Every candidate is compared with the
reference before it is timed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from triton.errors import TritonError

from .bench.cases import SAME_ROUNDING, Setting, checked_tokens
from .bench.result import describe_environment
from .bench.shapes import Shape, find_device, find_shape
from .bench.timing import copies_past_cache, measure
from .errors import AtomError, OptionError
from .files import write_text
from .kernels import (
    float8_linear,
    linear,
    quantize,
    quantize_e4m3,
    tuning,
    weight_only_linear,
)
from .kernels.hopper_tiles import HopperTiling
from .kernels.packing import pack_grouped, pack_rows, pack_weight
from .scheme import Scheme

DEFAULT_MODELS = ("llama3-8b", "llama3-70b")
DEFAULT_TOKENS = tuple(1 << power for power in range(14))
_QUICK_CANDIDATES = 56
_FINALISTS = 4  # measured again, for longer
_SECONDS, _FINAL_SECONDS = 0.005, 0.05
_NAMES = {"int": "INT4", "e2m3": "E2M3"}  # of weights whose launches serve other formats
_SCHEMES = {"int": "one of integers, such as 'w4a4'", "e2m3": "'w6a8'"}
_WORTH_IT = 0.98  # of the default's time: less gain than this is noise


class Size(NamedTuple):
    """One row of the file; M tokens."""

    M: int
    N: int
    K: int


Candidate = linear.Tiling | HopperTiling | weight_only_linear.Dense


@dataclass(frozen=True)
class Outcome:
    """The row that was written for a size, and how many of its candidates did not run or agree."""

    size: Size
    row: dict[str, Any]
    candidates: int
    rejected: int


def tune(
    models: Sequence[str | Shape] = DEFAULT_MODELS,
    *,
    tokens: Sequence[int] = DEFAULT_TOKENS,
    scheme: str | Scheme = "w4a4",
    device: str | None = None,
    folder: Path = tuning.FOLDER,
    quick: bool = False,
    again: bool = False,
    console: Console | None = None,
) -> Iterator[Outcome]:
    """Tunes the linears of `models` for each of `tokens`, and yields what it finds.

    Sizes that the file has are left out, unless `again`. quick: fewer candidates.
    """
    for count in tokens:
        if count < 1 or count & (count - 1):
            raise OptionError(f"tokens is {list(tokens)}; every number must be a power of two")
    scheme = Scheme.of(scheme)
    if scheme.two_level:
        raise OptionError(
            "products with scales in two levels have no launches to tune: scheme must be one with "
            "a scale for each group, such as 'w4a4' or 'w4a8'"
        )
    tuned = "e2m3" if scheme.activation_format == "e4m3" else "int"
    if (scheme.sorts_channels or tuned == "e2m3") and scheme.weight_format != tuned:
        raise OptionError(
            f"launches are tuned for weights of {_NAMES[tuned]} and serve {scheme.weight_format} "
            f"as well: scheme must be {_SCHEMES[tuned]}"
        )
    place = find_device(device)
    setting = Setting(
        shape=find_shape(DEFAULT_MODELS[0]),
        scheme=scheme,
        tokens=tuple(tokens),
        device=place,
        dtype=torch.bfloat16 if place.type == "cuda" else torch.float32,
    )
    shapes = [one if isinstance(one, Shape) else find_shape(one) for one in models]
    weights = [size for shape in shapes for size in shape.linears.values()]
    path = tuning.path_for(place, folder)
    operator = _operator(setting)
    rows_of = tuning.read_rows(path)
    rows = {_key(row): row for row in rows_of[operator.name]}
    sizes = [Size(M, N, K) for M in setting.tokens for N, K in weights]
    wanted = {_key(operator.describe(size)): size for size in sizes}
    due = [size for key, size in wanted.items() if again or key not in rows]
    with torch.no_grad(), Progress(console=console, disable=console is None) as progress:
        task = progress.add_task("", total=len(due))
        for size in due:
            describe = functools.partial(_describe, progress, task, size)
            outcome = _tune_size(operator, size, quick, describe)
            rows[_key(outcome.row)] = outcome.row
            _write(path, rows_of | {operator.name: list(rows.values())}, setting)
            progress.advance(task)
            yield outcome
    for kernel in (linear, weight_only_linear, float8_linear):
        kernel.forget_tilings()


def _describe(progress: Progress, task: Any, size: Size, done: int, candidates: int) -> None:
    name = f"{size.N} x {size.K}, {size.M} tokens"
    progress.update(task, description=f"{name}, candidate {done} of {candidates}")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuning.format_of(row), row["N"], row["num_groups"], row["group_size"], row["M"]


class _Linear:
    """`atom.linear`, as it is tuned."""

    name = "linear"

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def describe(self, size: Size) -> dict[str, Any]:
        """What a row is found by."""
        layout = self.setting.scheme.layout(size.K)
        sizes = {"num_groups": layout.num_groups, "group_size": layout.group_size}
        return {"N": size.N, **sizes, "M": size.M}

    def default(self, size: Size) -> Candidate:
        M, N, K = size
        layout, device = self.setting.scheme.layout(K), self.setting.device
        sizes = layout.num_groups, layout.group_size, layout.outlier_channels
        return linear.fastest_tiling(M, N, *sizes, device)

    def candidates(self, size: Size) -> Sequence[Candidate]:
        M, N, K = size
        return linear.candidates(M, N, self.setting.scheme.layout(K).num_groups)

    def path_of(self, tiling: Any, size: Size) -> str:
        return linear.path_of(tiling)

    def inputs(self, size: Size, index: int) -> tuple[Any, ...]:
        M, N, K = size
        scheme, layout = self.setting.scheme, self.setting.scheme.layout(K)
        x = self.setting.draw(index).normal(M, K)
        numbers = scheme.activation_bits, layout.group_size, layout.outlier_channels
        codes, scale = quantize.reference(x, *numbers, scheme.activation_clip)
        weight = self.setting.weight_draw(index).normal(N, K)
        packed = pack_weight(weight, layout, scheme.weight_bits, scheme.weight_clip)
        return codes, scale, *packed, None, None, self.setting.dtype

    def reference(self, tokens: Tensor, codes: Tensor, scale: Tensor, *rest: Any) -> Tensor:
        """Of those tokens alone."""
        return linear.reference(codes[tokens], scale[:, tokens], *rest)

    def launch(self, tiling: Any, *inputs: Any) -> Tensor:
        launch: Callable[..., Tensor] = linear.launch
        return launch(*inputs, tiling)


class _WeightOnlyLinear(_Linear):
    """`atom.weight_only_linear`, as it is tuned."""

    name = "weight_only_linear"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._format = setting.scheme.weight_format

    def describe(self, size: Size) -> dict[str, Any]:
        return {"format": self._format, **super().describe(size)}

    def _sizes(self, size: Size) -> tuple[Any, ...]:
        group_size = self.setting.scheme.layout(size.K).group_size
        return *size, group_size, self.setting.dtype, self.setting.device, self._format

    def default(self, size: Size) -> Candidate:
        return weight_only_linear.fastest_tiling(*self._sizes(size))

    def candidates(self, size: Size) -> Sequence[Candidate]:
        return weight_only_linear.candidates(*self._sizes(size))

    def path_of(self, tiling: Any, size: Size) -> str:
        return weight_only_linear.path_of(tiling)

    def inputs(self, size: Size, index: int) -> tuple[Any, ...]:
        M, N, K = size
        x = self.setting.draw(index).normal(M, K)
        weight = self.setting.weight_draw(index).normal(N, K)
        scheme, layout = self.setting.scheme, self.setting.scheme.layout(K)
        numbers = scheme.weight_bits, scheme.weight_clip, scheme.symmetric
        packed = pack_grouped(weight, layout, *numbers, scheme.weight_format)
        return x, *packed, None, None, self.setting.dtype

    def reference(self, tokens: Tensor, x: Tensor, *rest: Any) -> Tensor:
        return weight_only_linear.reference(x[tokens], *rest, format=self._format)

    def launch(self, tiling: Any, *inputs: Any) -> Tensor:
        launch: Callable[..., Tensor] = weight_only_linear.launch
        return launch(*inputs, tiling, format=self._format)


class _Float8Linear(_Linear):
    """`atom.float8_linear`, as it is tuned."""

    name = "float8_linear"

    def default(self, size: Size) -> Candidate:
        M, N, K = size
        num_groups = self.setting.scheme.layout(K).num_groups
        setting = self.setting
        return float8_linear.fastest_tiling(M, N, K, num_groups, setting.dtype, setting.device)

    def candidates(self, size: Size) -> Sequence[Candidate]:
        M, N, K = size
        num_groups = self.setting.scheme.layout(K).num_groups
        setting = self.setting
        return float8_linear.candidates(M, N, K, num_groups, setting.dtype, setting.device)

    def path_of(self, tiling: Any, size: Size) -> str:
        setting = self.setting
        return float8_linear.path_of(tiling, size.N, size.K, setting.dtype, setting.device)

    def inputs(self, size: Size, index: int) -> tuple[Any, ...]:
        M, N, K = size
        codes, scale = quantize_e4m3.reference(self.setting.draw(index).normal(M, K))
        weight = self.setting.weight_draw(index).normal(N, K)
        packed = pack_rows(weight, self.setting.scheme.layout(K), self.setting.scheme.weight_format)
        return codes, scale, *packed, None, None, self.setting.dtype

    def reference(self, tokens: Tensor, codes: Tensor, scale: Tensor, *rest: Any) -> Tensor:
        format = self.setting.scheme.weight_format
        return float8_linear.reference(codes[tokens], scale[tokens], *rest, format=format)

    def launch(self, tiling: Any, *inputs: Any) -> Tensor:
        launch: Callable[..., Tensor] = float8_linear.launch
        return launch(*inputs, tiling, format=self.setting.scheme.weight_format)


def _operator(setting: Setting) -> _Linear:
    if setting.scheme.sorts_channels:
        return _Linear(setting)
    in_float8 = setting.scheme.activation_format == "e4m3"
    return (_Float8Linear if in_float8 else _WeightOnlyLinear)(setting)


def _tune_size(
    operator: _Linear,
    size: Size,
    quick: bool,
    describe: Callable[[int, int], None],
) -> Outcome:
    default = operator.default(size)
    others = operator.candidates(size)[: _QUICK_CANDIDATES if quick else None]
    candidates = list(dict.fromkeys([default, *others]))
    contest = _Contest(operator, size)
    times: dict[Candidate, float] = {}
    for done, candidate in enumerate(candidates, start=1):
        describe(done, len(candidates))
        if (us := contest.time(candidate, _SECONDS)) is not None:
            times[candidate] = us
    if default not in times:
        raise AtomError(f"the default launch of {size} fails on this device: {default}")
    finalists = dict.fromkeys([default, *sorted(times, key=lambda one: times[one])[:_FINALISTS]])
    final = {one: contest.time(one, _FINAL_SECONDS) or times[one] for one in finalists}
    best = min(final, key=lambda one: final[one])
    if final[best] > _WORTH_IT * final[default]:
        best = default
    row = {
        **operator.describe(size),
        "path": operator.path_of(best, size),
        "tiling": best._asdict(),
        "us": round(final[best], 2),
        "default_us": round(final[default], 2),
    }
    return Outcome(size, row, len(candidates), len(candidates) - len(times))


class _Contest:
    """The inputs of one size, in as many copies as exceed the L2, and what must come out."""

    def __init__(self, operator: _Linear, size: Size) -> None:
        self._operator, device = operator, operator.setting.device
        self._checked = checked_tokens(operator.setting, size.M)
        inputs = operator.inputs(size, 0)
        self._expected = operator.reference(self._checked, *inputs).float()
        held = sum(x.nbytes for x in inputs if isinstance(x, Tensor))
        copies = copies_past_cache(held, device)
        self._inputs = [inputs, *(operator.inputs(size, index) for index in range(1, copies))]

    def time(self, candidate: Candidate, seconds: float) -> float | None:
        """Microseconds; None if it does not run on this device or is wrong."""
        launch = self._operator.launch
        calls = [functools.partial(launch, candidate, *given) for given in self._inputs]
        try:
            off = calls[0]()[self._checked].float() - self._expected
            if not off.norm() <= SAME_ROUNDING * self._expected.norm():
                return None
            return measure(calls, self._operator.setting.device, seconds).median_us
        except (RuntimeError, TritonError):
            return None


def _write(path: Path, rows_of: Mapping[str, Sequence[dict[str, Any]]], setting: Setting) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(setting.device)
    record = {name: environment[name] for name in ("device", "torch", "cuda", "triton", "date")}
    parts = [f' "environment": {json.dumps(record)}']
    for operator, rows in rows_of.items():
        if rows:
            lines = ",\n".join(f"  {json.dumps(row)}" for row in sorted(rows, key=_key))
            parts.append(f' "{operator}": [\n{lines}\n ]')
    write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")
