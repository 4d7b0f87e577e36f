"""Linears with weights in a floating-point format, in plain PyTorch: their definition, no operator.

    activations                                       weights
    of 16 bits, as they are                           any format: W6A16, W5A16, W4A16 with E2M1
    e4m3, a scale per token (quantize_e4m3.py)        the same with a scale per row: W6A8

W4A4 with E2M1 is what `atom::quantize` and `atom::linear` compute with that format. Source: FP6-LLM
(arXiv 2401.14112).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .formats import FloatFormat
from .packing import FloatWeight, GroupLayout, dequantize_float_weight


def float_linear(
    x: Tensor, packed: FloatWeight, layout: GroupLayout, format: FloatFormat
) -> Tensor:
    """x (*, K), in order, what the activations stand for -> (*, N) float32."""
    return F.linear(x.float(), dequantize_float_weight(packed, layout, format))
