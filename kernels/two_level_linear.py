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
import triton
import triton.language as tl
from torch import Tensor

from .library import define
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


@triton.jit
def _unpack(packed):
    """Packed rows (N, group / 2) int8 -> their codes (N, group) int8."""
    halves = tl.permute(tl.join((packed << 4) >> 4, packed >> 4), (0, 2, 1))
    return tl.reshape(halves, (packed.shape[0], 2 * packed.shape[1]))


@triton.jit
def two_level_linear_kernel(
    codes_ptr,
    scale_ptr,
    weight_ptr,
    group_scale_ptr,
    row_scale_ptr,
    outlier_weight_ptr,
    outlier_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    num_groups,
    codes_stride,
    HALF_GROUP: tl.constexpr,
    OUTLIERS: tl.constexpr,
    OUTLIER_BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of out^T = weight codes^T."""
    GROUP: tl.constexpr = 2 * HALF_GROUP
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_m = m < M
    live_n = n < N
    codes_rows = codes_ptr + tl.where(live_m, m, 0).to(tl.int64)[None, :] * codes_stride
    n_row = tl.where(live_n, n, 0).to(tl.int64)
    weight_rows = weight_ptr + n_row[:, None] * HALF_GROUP + tl.arange(0, HALF_GROUP)[None, :]

    sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for group in range(0, num_groups):
        row = tl.cast(group, tl.int64) * N
        packed = tl.load(weight_rows + row * HALF_GROUP).to(tl.int8, bitcast=True)
        group_scale = tl.load(group_scale_ptr + row + n, mask=live_n, other=0)
        codes = tl.load(codes_rows + group * GROUP + tl.arange(0, GROUP)[:, None])
        weight = (_unpack(packed) * group_scale[:, None]).to(tl.int8)
        sums = tl.dot(weight, codes, acc=sums, out_dtype=tl.int32)
    row_scale = tl.load(row_scale_ptr + n, mask=live_n, other=0.0)
    scale = tl.load(scale_ptr + m, mask=live_m, other=0.0)
    acc = sums.to(tl.float32) * (row_scale[:, None] * scale[None, :])

    if OUTLIERS > 0:
        lane = tl.arange(0, OUTLIER_BLOCK)
        live = lane < OUTLIERS
        codes = tl.load(
            codes_rows + codes_stride - OUTLIERS + lane[:, None], mask=live[:, None], other=0
        )
        weight = tl.load(
            outlier_weight_ptr + n_row[:, None] * OUTLIERS + lane[None, :],
            mask=live[None, :],
            other=0,
        )
        outlier_scale = tl.load(outlier_scale_ptr + n, mask=live_n, other=0.0)
        scale = tl.load(scale_ptr + M + m, mask=live_m, other=0.0)
        sums = tl.dot(weight, codes, out_dtype=tl.int32)
        acc += sums.to(tl.float32) * (outlier_scale[:, None] * scale[None, :])
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=live_n, other=0.0).to(tl.float32)[:, None]
    live = live_m[None, :] & live_n[:, None]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    out = acc.to(out_ptr.dtype.element_ty)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + at, mask=live, other=0.0)
        out = (out.to(tl.float32) + residual.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, out, mask=live)


def launch(
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
    """The Triton kernel on the arguments of `reference`."""
    num_groups, N, half_group = weight.shape
    outliers = outlier_weight.shape[1]
    codes, scale = codes.contiguous(), scale.contiguous()
    M = codes.numel() // codes.shape[-1]
    out = codes.new_empty(*codes.shape[:-1], N, dtype=dtype)
    if M == 0:
        return out
    if residual is not None:
        residual = residual.expand(out.shape).contiguous()
    block_m = min(max(16, triton.next_power_of_2(M)), 128)
    two_level_linear_kernel[(triton.cdiv(M, block_m), triton.cdiv(N, 64))](
        codes,
        scale,
        weight,
        group_scale,
        row_scale,
        outlier_weight,
        outlier_scale,
        out if bias is None else bias,
        out if residual is None else residual,
        out,
        M,
        N,
        num_groups,
        codes.shape[-1],
        HALF_GROUP=half_group,
        OUTLIERS=outliers,
        OUTLIER_BLOCK=max(32, triton.next_power_of_2(max(outliers, 1))),
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_M=block_m,
        BLOCK_N=64,
        enable_fp_fusion=False,  # a fused multiply-add rounds once where the reference rounds twice
    )
    return out


two_level_linear = define(
    "two_level_linear(Tensor codes, Tensor scale, Tensor weight, Tensor group_scale, "
    "Tensor row_scale, Tensor outlier_weight, Tensor outlier_scale, Tensor? bias, "
    "Tensor? residual, ScalarType dtype) -> Tensor",
    reference,
    fake,
    launch,
)
