"""`atom::quantize_e4m3`: activations in 8-bit floating point (e4m3), one dynamic scale per token.

    scale[m] = max_k |x[m, k]| / 448        codes[m, k] = e4m3(x[m, k] / scale[m])

There is no kernel of our own: whatever compiles a graph sees the few operations below and joins
them with the norm, activation or addition before them. Source: Micikevicius et al., "FP8 Formats
for Deep Learning" (arXiv 2209.05433).
"""

from __future__ import annotations

from torch import Tensor

from .formats import E4M3
from .library import define_composite
from .packing import round_to_format


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (*, K) -> codes (*, K) float8_e4m3fn, scale (*) float32.

    A token that holds a NaN or an Inf gets it as its scale and codes of zero; one of zeros, a scale
    of `packing.TINY`.
    """
    return round_to_format(x, E4M3, 1.0)


quantize_e4m3 = define_composite("quantize_e4m3(Tensor x) -> (Tensor, Tensor)", reference)
