"""`atom::norm_quantize`: RMSNorm or LayerNorm, reorder and quantize, in one pass over memory.

centered = x - mean(x)   (LayerNorm only)
y = centered / sqrt(mean(centered^2) + eps) * weight + bias
codes, scale = quantize(y[order])
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import quantize, quantize_rows
from .launching import plan
from .library import define
from .quantize_rows import Norm


def norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    round_normed: bool,
    dtype: torch.dtype,
) -> Tensor:
    """In float32; `round_normed` rounds to x's dtype before the weight too, as Llama does."""
    normed = x.float()
    if center:
        normed = normed - normed.mean(-1, keepdim=True)
    normed = normed * torch.rsqrt(normed.square().mean(-1, keepdim=True) + eps)
    if round_normed:
        normed = normed.to(x.dtype)
    if weight is not None:
        normed = normed * weight
    if bias is not None:
        normed = normed + bias
    return normed.to(dtype)


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    order: Tensor | None,
    eps: float,
    center: bool,
    round_normed: bool,
    dtype: torch.dtype,
    *numbers: Any,
    format: str = "int",
) -> tuple[Tensor, Tensor]:
    """x (*, K), weight and bias (K,), order (K,) int32; `dtype`: what the norm would return."""
    y = norm(x, weight, bias, eps, center, round_normed, dtype)
    if order is not None:
        y = y.index_select(-1, order)
    return quantize.reference(y, *numbers, format=format)


def fake(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    order: Tensor | None,
    eps: float,
    center: bool,
    round_normed: bool,
    dtype: torch.dtype,
    *numbers: Any,
    format: str = "int",
) -> tuple[Tensor, Tensor]:
    return quantize.fake(x, *numbers)


def launch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    order: Tensor | None,
    eps: float,
    center: bool,
    round_normed: bool,
    dtype: torch.dtype,
    *numbers: Any,
    format: str = "int",
) -> tuple[Tensor, Tensor]:
    rounding = _rounding(
        eps,
        center,
        x.dtype if round_normed else torch.float32,
        None if weight is None else weight.dtype,
    )
    return quantize_rows.launch(
        x, order, numbers, format, norm=rounding, weight=weight, bias=bias, dtype=dtype
    )


@plan
def _rounding(
    eps: float, center: bool, normed_dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> Norm:
    product_dtype = torch.promote_types(normed_dtype, weight_dtype or normed_dtype)
    return Norm(eps, center, normed_dtype, product_dtype)


norm_quantize = define(
    "norm_quantize(Tensor x, Tensor? weight, Tensor? bias, Tensor? order, float eps, bool center, "
    f"bool round_normed, ScalarType dtype, {quantize.NUMBERS}) -> (Tensor, Tensor)",
    reference,
    fake,
    launch,
)
