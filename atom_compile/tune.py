"""`atom-compile tune`: measures which launch of `atom.linear` is fastest for which sizes.

Results go to `kernels/tuned/<device>.json` (kernels/tuning.py says what is in it) after every size,
so that tuning may be interrupted and goes on where it was. Every candidate is compared with the
reference before it is timed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
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
from .kernels import linear, linear_hopper, quantize, tuning
from .kernels.packing import pack_weight
from .scheme import Scheme

DEFAULT_MODELS = ("llama3-8b", "llama3-70b")
DEFAULT_TOKENS = tuple(1 << power for power in range(14))
_QUICK_CANDIDATES = 24
_FINALISTS = 4  # measured again, for longer
_SECONDS, _FINAL_SECONDS = 0.005, 0.05
_WORTH_IT = 0.98  # of the default's time: less gain than this is noise


class Size(NamedTuple):
    """One row of the file; M tokens."""

    M: int
    N: int
    K: int


Candidate = linear.Tiling | linear_hopper.HopperTiling


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
    if not scheme.sorts_channels:
        activations = "16-bit" if scheme.activation_bits == 16 else "FP8"
        raise OptionError(
            f"with {activations} activations there is no launch to tune: atom.linear is what is "
            "tuned, and scheme must be one that quantizes them to integers, such as 'w4a4'"
        )
    if scheme.weight_format != "int":
        raise OptionError(
            f"launches are tuned for INT4 weights and serve {scheme.weight_format} as well: scheme "
            "must be one of integers, such as 'w4a4'"
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
    rows = {_key(row): row for row in tuning.read_rows(path)}
    sizes = [Size(M, N, K) for M in setting.tokens for N, K in weights]
    wanted = {_key_of(setting, size): size for size in sizes}
    due = [size for key, size in wanted.items() if again or key not in rows]
    with torch.no_grad(), Progress(console=console, disable=console is None) as progress:
        task = progress.add_task("", total=len(due))
        for size in due:
            describe = functools.partial(_describe, progress, task, size)
            outcome = _tune_size(setting, size, quick, describe)
            rows[_key_of(setting, size)] = outcome.row
            _write(path, list(rows.values()), setting)
            progress.advance(task)
            yield outcome
    linear.forget_tilings()


def _describe(progress: Progress, task: Any, size: Size, done: int, candidates: int) -> None:
    name = f"{size.N} x {size.K}, {size.M} tokens"
    progress.update(task, description=f"{name}, candidate {done} of {candidates}")


def _key(row: dict[str, Any]) -> tuple[int, ...]:
    return row["N"], row["num_groups"], row["group_size"], row["M"]


def _key_of(setting: Setting, size: Size) -> tuple[int, ...]:
    layout = setting.scheme.layout(size.K)
    return size.N, layout.num_groups, layout.group_size, size.M


def _tune_size(
    setting: Setting, size: Size, quick: bool, describe: Callable[[int, int], None]
) -> Outcome:
    N, num_groups, group_size, M = _key_of(setting, size)
    outliers = setting.scheme.layout(size.K).outlier_channels
    default = linear.fastest_tiling(M, N, num_groups, group_size, outliers, setting.device)
    others = linear.candidates(M, N, num_groups)[: _QUICK_CANDIDATES if quick else None]
    candidates = list(dict.fromkeys([default, *others]))
    contest = _Contest(setting, size)
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
        "N": N,
        "num_groups": num_groups,
        "group_size": group_size,
        "M": M,
        "path": linear.path_of(best),
        "tiling": best._asdict(),
        "us": round(final[best], 2),
        "default_us": round(final[default], 2),
    }
    return Outcome(size, row, len(candidates), len(candidates) - len(times))


class _Contest:
    """The inputs of one size, in as many copies as exceed the L2, and what must come out."""

    def __init__(self, setting: Setting, size: Size) -> None:
        self._setting = setting
        self._checked = checked_tokens(setting, size.M)
        inputs = _inputs(setting, size, 0)
        codes, scale, *packed = inputs
        arguments: list[Any] = [codes[self._checked], scale[:, self._checked], *packed]
        arguments += [None, None, setting.dtype]
        self._expected = linear.reference(*arguments).float()
        copies = copies_past_cache(sum(x.nbytes for x in inputs), setting.device)
        self._inputs = [inputs, *(_inputs(setting, size, index) for index in range(1, copies))]

    def time(self, candidate: Candidate, seconds: float) -> float | None:
        """Microseconds; None if it does not run on this device or is wrong."""
        launch: Callable[..., Tensor] = linear.launch
        last = None, None, self._setting.dtype, candidate
        calls = [functools.partial(launch, *given, *last) for given in self._inputs]
        try:
            off = calls[0]()[self._checked].float() - self._expected
            if not off.norm() <= SAME_ROUNDING * self._expected.norm():
                return None
            return measure(calls, self._setting.device, seconds).median_us
        except (RuntimeError, TritonError):
            return None


def _inputs(setting: Setting, size: Size, index: int) -> tuple[Tensor, ...]:
    M, N, K = size
    scheme, layout = setting.scheme, setting.scheme.layout(K)
    x = setting.draw(index).normal(M, K)
    numbers = scheme.activation_bits, layout.group_size, layout.outlier_channels
    codes, scale = quantize.reference(x, *numbers, scheme.activation_clip)
    weight = setting.weight_draw(index).normal(N, K)
    packed = pack_weight(weight, layout, scheme.weight_bits, scheme.weight_clip)
    return codes, scale, *packed


def _write(path: Path, rows: list[dict[str, Any]], setting: Setting) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(setting.device)
    record = {name: environment[name] for name in ("device", "torch", "cuda", "triton", "date")}
    lines = ",\n".join(f"  {json.dumps(row)}" for row in sorted(rows, key=_key))
    text = f'{{\n "environment": {json.dumps(record)},\n "linear": [\n{lines}\n ]\n}}\n'
    write_text(path, text)
