"""`atom::two_level_linear`: INT8 activations, a scale a token; INT4 weights, scales in two levels.

    out[m, n] = scale[0, m] * row_scale[n] * sum_k codes[m, k] * group_scale[g(k), n] * weight[n, k]
              + scale[1, m] * outlier_scale[n] * sum_k codes[m, k] * outlier_weight[n, k]
              + bias[n]                 rounded to the output's dtype, then + residual[m, n]

A weight code times its group's scale is an INT8 number, so one INT32 sum runs over all of K and the
only floating-point scaling is at the end. Sources: QServe (arXiv 2405.04532), section 4.1; DGQ
(arXiv 2310.04836). Both sums are integers and exact in every implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import define
from .linear import multiply
from .packing import unpack_int4


def reference(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    group_scale: Tensor,
    row_scale: Tensor,
    outlier_weight: Tensor,
    outlier_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """codes (*, P + outlier_channels) int8, P >= G * group_size, scale (1 or 2, *) float32; the
    weight as `packing.TwoLevelWeight`, bias (N,), residual (*, N) -> (*, N) in `dtype`.

    Codes between the last group and the outliers, if there are any, are padding and not read.
    """
    num_groups, N, half_group = weight.shape
    outliers = outlier_weight.shape[1]
    codes_MK = codes.reshape(-1, codes.shape[-1]).double()  # holds every sum exactly
    scale_SM = scale.reshape(scale.shape[0], -1)
    weight_NK = (unpack_int4(weight) * group_scale[..., None]).transpose(0, 1).flatten(1)
    sums_MN = codes_MK[:, : num_groups * half_group * 2] @ weight_NK.double().t()
    out = sums_MN.float() * (scale_SM[0, :, None] * row_scale)
    if outliers:
        sums_MN = codes_MK[:, codes_MK.shape[1] - outliers :] @ outlier_weight.double().t()
        out = out + sums_MN.float() * (scale_SM[1, :, None] * outlier_scale)
    if bias is not None:
        out = out + bias.float()
    out = out.to(dtype).reshape(*codes.shape[:-1], N)
    return out if residual is None else out + residual


def fake(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    group_scale: Tensor,
    row_scale: Tensor,
    outlier_weight: Tensor,
    outlier_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], weight.shape[1], dtype=dtype)


two_level_linear = define(
    "two_level_linear(Tensor codes, Tensor scale, Tensor weight, Tensor group_scale, "
    "Tensor row_scale, Tensor outlier_weight, Tensor outlier_scale, Tensor? bias, "
    "Tensor? residual, ScalarType dtype) -> Tensor",
    reference,
    fake,
    multiply,
)
