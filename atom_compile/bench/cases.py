"""What a benchmark case is: an operator, its reference, and how its random inputs are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..scheme import PRESETS, Scheme
from .shapes import Shape

# Limits of relative errors. A code that rounds the other way is off by a whole step of its group,
# and Inductor, which keeps float32 between the operations that it fuses, turns about one code in a
# hundred. INT4 itself costs a layer of random weights about 0.3; a wrong layer is off by 1 or more.
SAME_ROUNDING, OTHER_ROUNDING, INT4 = 1e-2, 1e-1, 0.5


FIRST_WEIGHT = 1000  # the index of the draw behind the first of several copies of a weight


@dataclass(frozen=True, kw_only=True)
class Case:
    """One variant ("baseline", "unfused", "fused" or a peer's name) of one operator at M tokens.

    `function` is timed on what `inputs` draws. `observe(outputs, *inputs)` makes of its outputs
    what `reference(*inputs)` returns, and the two may be `limit` apart. `weight_bytes`: of what is
    moved and not among the inputs' tensors. `flops`: 0 where memory alone bounds the time, and
    `arithmetic` the tensor cores' rate that bounds them, "8-bit" or "16-bit". `path`: the kernel
    that the operator chooses. `missing`: why it cannot run here, if it cannot.
    """

    op: str
    variant: str
    runs: str
    M: int  # tokens; of attention, the cache's length
    N: int | None  # of a linear
    K: int
    inputs: Callable[[Draw], tuple[Any, ...]]
    function: Callable[..., Any]
    reference: Callable[..., Tensor]
    observe: Callable[..., Tensor]
    limit: float
    weight_bytes: int = 0
    flops: int = 0
    arithmetic: str = "16-bit"
    path: str = ""
    missing: str | None = None


class Draw:
    """Random tensors, the same for the same `index`."""

    def __init__(self, index: int, device: torch.device, dtype: torch.dtype) -> None:
        self.index, self._device, self._dtype = index, device, dtype
        self._generator = torch.Generator(device).manual_seed(index)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator, device=self._device, dtype=self._dtype)

    def norm_weight(self, width: int) -> Tensor:
        return 1 + 0.1 * self.normal(width)

    def integers(self, low: int, high: int, *size: int) -> Tensor:
        """int8, from `low` to `high` - 1."""
        return torch.randint(
            low, high, size, generator=self._generator, device=self._device, dtype=torch.int8
        )

    def scale(self, *size: int) -> Tensor:
        """float32 in 0.01 .. 0.02."""
        uniform = torch.rand(size, generator=self._generator, device=self._device)
        return 0.01 * (1 + uniform)

    def order(self, width: int) -> Tensor:
        return torch.randperm(width, generator=self._generator, device=self._device).int()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all cases of one run share."""

    shape: Shape
    scheme: Scheme
    tokens: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype
    batches: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    peers: bool = False
    only: tuple[str, ...] = ()  # operators; all if empty

    @property
    def baseline(self) -> str:
        return {torch.bfloat16: "bf16", torch.float32: "fp32"}[self.dtype]

    def draw(self, index: int) -> Draw:
        return Draw(index, self.device, self.dtype)

    def weight_draw(self, index: int) -> Draw:
        """Other numbers than an input's, for weights that several cases share."""
        return self.draw(FIRST_WEIGHT + index)


def name_scheme(scheme: Scheme) -> str:
    """The preset's name, else its bits."""
    bits = f"w{scheme.weight_bits}a{scheme.activation_bits}"
    return next((name for name, preset in PRESETS.items() if preset == scheme), bits)


_CHECKED_TOKENS = 64  # of a linear: its reference holds every group's sums at once


def checked_tokens(setting: Setting, M: int) -> Tensor:
    """The tokens of M, spread over all, that a linear's gate compares."""
    return torch.linspace(0, M - 1, min(M, _CHECKED_TOKENS), device=setting.device).long()
