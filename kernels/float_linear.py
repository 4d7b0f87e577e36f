"""Linears with weights in a floating-point format, in plain PyTorch: their definition, no operator.

    activations                                       weights
    of 16 bits, as they are                           any format: W6A16, W5A16, W4A16 with E2M1
    e4m3, a scale per token (quantize_e4m3.py)       the same with a scale per row: W6A8
    E2M1, a scale per token and group, outliers       E2M1 with a scale per row and group, outliers
        in INT8 (`quantize_e2m1`)                         in INT8: W4A4 with E2M1

Sources: FP6-LLM (arXiv 2401.14112); Atom (arXiv 2310.19102) for W4A4 in FP4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import E2M1, FloatFormat
from .packing import (
    OUTLIER_BITS,
    FloatWeight,
    GroupLayout,
    dequantize_float_weight,
    round_to_codes,
    round_to_format,
)


def float_linear(
    x: Tensor, packed: FloatWeight, layout: GroupLayout, format: FloatFormat
) -> Tensor:
    """x (*, K), in order, what the activations stand for -> (*, N) float32."""
    return F.linear(x.float(), dequantize_float_weight(packed, layout, format))


def quantize_e2m1(x: Tensor, layout: GroupLayout, clip: float) -> tuple[Tensor, Tensor]:
    """x (*, K), in order -> codes (*, padded_width) int8, scale (num_scales, *) float32.

    As `quantize` gives them, for `packing.dequantize` to read: an E2M1 value is half an integer of
    -12 to 12, and that is its code. INT8 tensor cores add up their products exactly.
    """
    groups, outliers = layout.split(x)
    codes, scale = round_to_format(groups, E2M1, clip)
    codes = (E2M1.decode(codes) / E2M1.least).to(torch.int8).flatten(-2)
    scale = scale.movedim(-1, 0) * E2M1.least
    if layout.outlier_channels:
        outlier_codes, outlier_scale = round_to_codes(outliers, OUTLIER_BITS, 1.0)
        codes = torch.cat([codes, outlier_codes], dim=-1)
        scale = torch.cat([scale, outlier_scale[None]])
    return codes, scale
