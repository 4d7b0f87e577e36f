"""A packed weight, dequantized as a whole: for products of so many tokens that cuBLAS is faster."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Buffer, Launch, buffer, plan
from .packing import GroupedWeight, RowWeight, rows_per_group
from .sizes import cdiv
from .weight_values import (
    bits_of,
    load_scales,
    num_parts,
    power_left,
    read_scale,
    scale_of,
    to_values,
)


@triton.jit
def dequantize_kernel(
    weight_ptr,
    weight_scale_ptr,
    zero_point_ptr,
    high_bits_ptr,
    row_scale_ptr,
    out_ptr,
    N,
    K,
    weight_rows,
    HALF_GROUP: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACK: tl.constexpr,
):
    """One group of BLOCK_N rows of the weight (N, K).

    In e4m3 `out` is not scaled: it has the codes as they are placed.
    """
    PARTS: tl.constexpr = num_parts(EXPONENT_BITS, MANTISSA_BITS)
    HAS_HIGH_BITS: tl.constexpr = EXPONENT_BITS + MANTISSA_BITS > 3
    PART_BYTES: tl.constexpr = HALF_GROUP // PARTS
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    UNPLACED: tl.constexpr = power_left(EXPONENT_BITS, DTYPE)
    group = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_n = n < N
    first_row = tl.cast(group, tl.int64) * weight_rows
    at = first_row + n
    lane = tl.arange(0, PART_BYTES)
    live = live_n[:, None]
    low_scale, high_scale = load_scales(weight_scale_ptr, first_row, weight_rows, n, live_n, SCALE)
    low_scale, high_scale = read_scale(low_scale, SCALE), read_scale(high_scale, SCALE)
    if SCALE == "row":
        low_scale = tl.load(row_scale_ptr + n, mask=live_n, other=0.0)
        high_scale = low_scale
    if SCALE == "e4m3":
        row_scale = tl.load(row_scale_ptr + n, mask=live_n, other=0.0)
        low_scale, high_scale = low_scale * row_scale, high_scale * row_scale
    zero_point = tl.zeros((BLOCK_N,), dtype=tl.int8)
    if HAS_ZERO_POINT:
        zero_point = tl.load(zero_point_ptr + at, mask=live_n, other=0)
    if HAS_HIGH_BITS:
        high_bits = tl.load(high_bits_ptr + at[:, None] * PART_BYTES + lane, mask=live, other=0)
    for part in tl.static_range(PARTS):
        byte = part * PART_BYTES + lane
        packed = tl.load(weight_ptr + at[:, None] * HALF_GROUP + byte, mask=live, other=0)
        low, high = to_values(
            packed, high_bits if HAS_HIGH_BITS else packed, zero_point, low_scale, high_scale,
            DTYPE, PACK, EXPONENT_BITS, MANTISSA_BITS, part, False,
        )  # fmt: skip
        if not DTYPE.is_fp8e4nv():
            low = (low.to(tl.float32) * UNPLACED * low_scale[:, None]).to(DTYPE)
            high = (high.to(tl.float32) * UNPLACED * high_scale[:, None]).to(DTYPE)
        channel = group * 2 * HALF_GROUP + byte[None, :]
        out = out_ptr + n.to(tl.int64)[:, None] * K + channel
        tl.store(out, low, mask=live & (channel < K))
        tl.store(out + HALF_GROUP, high, mask=live & (channel + HALF_GROUP < K))


def dequantize(
    packed: GroupedWeight | RowWeight, K: int, dtype: torch.dtype, format: str
) -> Tensor:
    """The weight (N, K) in `dtype`, on a GPU; in e4m3 its codes as they are placed, not scaled:
    2^-gap of their values."""
    weight, high_bits, row_scale = packed.weight, packed.high_bits, packed.row_scale
    weight_scale, zero_point, scale = None, None, "row"
    if isinstance(packed, GroupedWeight):
        weight_scale, zero_point = packed.weight_scale, packed.zero_point
        scale = scale_of(format)
    planned, launch = _plan_dequantize(
        weight.shape, rows_per_group(weight), K, dtype, scale, zero_point is not None, format,
        weight.is_cuda,
    )  # fmt: skip
    dense = planned.beside(weight)
    launch(weight, weight_scale, zero_point, high_bits, row_scale, dense)
    return dense


@plan
def _plan_dequantize(
    weight_shape: torch.Size,
    rows_per_group: int,
    K: int,
    dtype: torch.dtype,
    scale: str,
    has_zero_point: bool,
    format: str,
    on_gpu: bool,
) -> tuple[Buffer, Launch]:
    """dtype: of the dense weight; scale: as `read_scale` takes it."""
    num_groups, N, half_group = weight_shape
    exponent_bits, mantissa_bits = bits_of(format)
    block_n = max(1, 4096 // half_group)
    launch = Launch(
        dequantize_kernel,
        (cdiv(N, block_n), num_groups),
        (N, K, rows_per_group),
        HALF_GROUP=half_group,
        EXPONENT_BITS=exponent_bits,
        MANTISSA_BITS=mantissa_bits,
        SCALE=scale,
        HAS_ZERO_POINT=has_zero_point,
        BLOCK_N=block_n,
        PACK=4 if on_gpu else 0,
    )
    return buffer(N, K, dtype=dtype), launch
