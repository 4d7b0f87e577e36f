"""`atom::gated_quantize`: the middle of an MLP, reordered and quantized, in one pass.

    codes, scale = quantize((activation(gate) * up)[order])

Without `up` it is an ungated MLP's activation. The reorder is usually folded into the rows of gate
and up already.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import quantize, quantize_rows
from .library import define

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
}


def reference(
    gate: Tensor,
    up: Tensor | None,
    order: Tensor | None,
    activation: str,
    *numbers: Any,
    format: str = "int",
) -> tuple[Tensor, Tensor]:
    """gate and up (*, K), `activation`: a key of ACTIVATIONS, order (K,) int32."""
    y = ACTIVATIONS[activation](gate)
    if up is not None:
        y = y * up
    if order is not None:
        y = y.index_select(-1, order)
    return quantize.reference(y, *numbers, format=format)


def fake(
    gate: Tensor,
    up: Tensor | None,
    order: Tensor | None,
    activation: str,
    *numbers: Any,
    format: str = "int",
) -> tuple[Tensor, Tensor]:
    return quantize.fake(gate, *numbers)


def launch(
    gate: Tensor,
    up: Tensor | None,
    order: Tensor | None,
    activation: str,
    *numbers: Any,
    format: str = "int",
) -> tuple[Tensor, Tensor]:
    return quantize_rows.launch(gate, order, numbers, format, up=up, activation=activation)


gated_quantize = define(
    f"gated_quantize(Tensor gate, Tensor? up, Tensor? order, str activation, "
    f"{quantize.NUMBERS}) -> (Tensor, Tensor)",
    reference,
    fake,
    launch,
)
