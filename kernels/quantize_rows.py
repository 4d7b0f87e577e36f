"""The Triton kernel behind every quantize operator: norm or gate, reorder, rotation, codes out.

One program takes one token, or one after the other. It reads a row as it lies in memory and puts it
into channel order in shared memory: gathering from global memory would take one transaction a
channel. Where nothing needs the whole row it is cut into pieces, so that even a single token
occupies several multiprocessors.

K channels of a row, `GROUP_SIZE` channels a group, `OUTLIERS` channels after the last group (see
packing.py).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .devices import multiprocessors
from .launching import Buffer, Launch, as_rows, buffer, plan
from .overlap import begin, overlap
from .packing import LARGEST_E2M1, OUTLIER_BITS, TINY, GroupLayout
from .rotate import outlier_block, rotated
from .sizes import cdiv, next_power_of_2


class Norm(NamedTuple):
    """What `norm_quantize` adds: the dtypes are those that its steps round to."""

    eps: float
    center: bool
    normed_dtype: torch.dtype
    product_dtype: torch.dtype


class Numbers(NamedTuple):
    """The last arguments of every operator that quantizes; see quantize.py."""

    bits: int
    group_size: int
    outlier_channels: int
    clip: float
    int8_groups: int = 0
    rotation: int = 0
    per_token: bool = False

    def layout(self, width: int) -> GroupLayout:
        return GroupLayout(width, self.group_size, self.outlier_channels, self.per_token)

    def largest(self, format: str) -> int:
        """The largest code of a group that is not INT8."""
        return LARGEST_E2M1 if format == "e2m1" else 2 ** (self.bits - 1) - 1


# 1.5 * 2^23: adding it rounds a small float32 to the nearest even integer, in its last bits
_ROUNDER = tl.constexpr(12582912.0)
_TINY = tl.constexpr(TINY)
_LARGEST_E2M1 = tl.constexpr(LARGEST_E2M1)


@triton.jit
def _round(x, DTYPE: tl.constexpr):
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _sum_of_squares(x):
    """Of two neighbours by one fused multiply-add; Triton would multiply and add each."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0] // 2, 2)))
    return tl.sum(tl.fma(even, even, odd * odd), axis=0)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-2.0 * inner))  # 0.5 * (1 + tanh(y)) = sigmoid(2y)
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)  # a NaN stays one
    else:
        tl.static_assert(ACTIVATION == "sigmoid")
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _finish_channels(
    x,
    up_row,
    weight,
    bias,
    channel,
    live,
    mean,
    rstd,
    ACTIVATION: tl.constexpr,
    HAS_UP: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMED: tl.constexpr,
    PRODUCT: tl.constexpr,
    RESULT: tl.constexpr,
):
    """x at `channel` after norm and activation, each step rounded; 0 where not live."""
    y = x.to(tl.float32)
    if HAS_NORM:
        y = _round((y - mean) * rstd, NORMED)
        if HAS_WEIGHT:
            y = _round(y * weight.to(tl.float32), PRODUCT)
        if HAS_BIAS:
            y += bias.to(tl.float32)
        y = _round(y, RESULT)
    if ACTIVATION != "none":
        y = _round(_activate(y, ACTIVATION), RESULT)
    if HAS_UP:
        up = tl.load(up_row + channel, mask=live, other=0.0).to(tl.float32)
        y = _round(y * up, RESULT)
    return tl.where(live, y, 0.0)  # the norm or the activation of padding need not be zero


@triton.jit
def _larger(one, other):
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _to_e2m1(codes):
    """Rounds to the values of E2M1 in units of 0.5; mirrors FloatFormat.nearest.

    Up to 4 they are all integers, up to 8 the even ones, from there on the multiples of 4.
    """
    magnitude = tl.abs(codes)
    rounder = _ROUNDER * tl.where(magnitude < 4.0, 1.0, tl.where(magnitude < 8.0, 2.0, 4.0))
    return (codes + rounder) - rounder


@triton.jit
def _quantize(y, clip_over_largest, largest, AXIS: tl.constexpr, E2M1: tl.constexpr):
    """Codes and scale of each group along AXIS; mirrors packing.round_to_codes and round_to_e2m1.

    `largest` is one value, or one for each group. E2M1: a group whose codes may be larger than that
    format's is INT8 all the same.
    """
    scale = _larger(tl.reduce(tl.abs(y), AXIS, _larger) * clip_over_largest, _TINY)
    codes = y * tl.expand_dims(tl.div_rn(1.0, scale), AXIS)
    # all codes of a group with a NaN or an Inf are 0
    highest = tl.expand_dims(tl.where(scale < float("inf"), largest, 0.0), AXIS)
    lowest = tl.expand_dims(tl.where(scale < float("inf"), -largest - 1.0, 0.0), AXIS)
    codes = tl.minimum(tl.maximum(codes, lowest), highest)
    if E2M1:
        codes = tl.where(highest > _LARGEST_E2M1, codes, _to_e2m1(codes))
    # the sum's last byte is the code; a conversion to integers would take eight times as long
    return (codes + _ROUNDER).to(tl.int32, bitcast=True).to(tl.int8), scale


@triton.jit
def _quantize_groups(
    y,
    wide,
    clip_over_largest,
    wide_clip_over_largest,
    LARGEST: tl.constexpr,
    E2M1: tl.constexpr,
    WIDE_LARGEST: tl.constexpr,
    INT8_GROUPS: tl.constexpr,
):
    """y (groups, channels): groups that are `wide` (groups,) are INT8; mirrors quantize.py."""
    if INT8_GROUPS == 0:
        codes, scale = _quantize(y, clip_over_largest, LARGEST, 1, E2M1)
    else:
        factor = tl.where(wide, wide_clip_over_largest, clip_over_largest)
        largest = tl.where(wide, WIDE_LARGEST * 1.0, LARGEST * 1.0)
        codes, scale = _quantize(y, factor, largest, 1, E2M1)
    return codes, scale


@triton.jit
def _store_groups(
    y,
    codes_row,
    scale_ptr,
    m,
    M,
    piece,
    clip_over_largest,
    wide_clip_over_largest,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    INT8_GROUPS: tl.constexpr,
    LARGEST: tl.constexpr,
    E2M1: tl.constexpr,
    WIDE_LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    """Quantizes piece number `piece` of token m's channels in groups, y (BLOCK,); 0 is padding."""
    if PER_TOKEN:  # the piece is all there is
        codes, scale = _quantize(y, clip_over_largest, LARGEST, 0, E2M1)
        tl.store(scale_ptr + m, scale)
    else:
        group = piece * (BLOCK // GROUP_SIZE) + tl.arange(0, BLOCK // GROUP_SIZE)
        codes, scale = _quantize_groups(
            tl.reshape(y, (BLOCK // GROUP_SIZE, GROUP_SIZE)),
            group >= NUM_GROUPS - INT8_GROUPS,
            clip_over_largest,
            wide_clip_over_largest,
            LARGEST,
            E2M1,
            WIDE_LARGEST,
            INT8_GROUPS,
        )
        tl.store(scale_ptr + group.to(tl.int64) * M + m, scale, mask=group < NUM_GROUPS)
        codes = tl.reshape(codes, (BLOCK,))
    position = piece * BLOCK + tl.arange(0, BLOCK)
    tl.store(codes_row + position, codes, mask=position < NUM_GROUPS * GROUP_SIZE)


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    up_ptr,
    weight_ptr,
    bias_ptr,
    order_ptr,
    codes_ptr,
    scale_ptr,
    M,
    K,
    x_stride,
    up_stride,
    eps,
    clip_over_largest,
    outlier_clip_over_largest,
    NUM_GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    INT8_GROUPS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    OUTLIER_BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    E2M1: tl.constexpr,
    OUTLIER_LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    RAGGED: tl.constexpr,
    EVEN: tl.constexpr,
    ROTATION: tl.constexpr,
    OUTLIER_ROTATION: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
    STAGES: tl.constexpr,
    CENTER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_UP: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NORMED: tl.constexpr,
    PRODUCT: tl.constexpr,
    RESULT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        begin()
    piece = tl.program_id(1)
    position = piece * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, OUTLIER_BLOCK)
    live_lane = lane < OUTLIERS
    outlier = K - OUTLIERS + lane
    channel = position
    live = position < K
    if EVEN:
        live = tl.full((BLOCK,), True, tl.int1)
    if HAS_ORDER:
        order = tl.load(order_ptr + position, mask=live, other=0)
        outlier = tl.load(order_ptr + outlier, mask=live_lane, other=0)
        if not WHOLE_ROW:
            channel = order
    weight = 1.0
    bias = 0.0
    outlier_weight = 1.0
    outlier_bias = 0.0
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + channel, mask=live, other=0.0)
        outlier_weight = tl.load(weight_ptr + outlier, mask=live_lane, other=0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=live, other=0.0)
        outlier_bias = tl.load(bias_ptr + outlier, mask=live_lane, other=0.0)

    x_rows = x_ptr + channel
    for row in tl.range(tl.program_id(0), M, tl.num_programs(0), num_stages=STAGES):
        m = tl.cast(row, tl.int64)
        up_row = up_ptr + m * up_stride
        codes_row = codes_ptr + m * (NUM_GROUPS * GROUP_SIZE + OUTLIERS)
        mean = 0.0
        rstd = 1.0
        x = tl.load(x_rows + m * x_stride, mask=live, other=0.0)
        if HAS_NORM:
            width = tl.cast(K, tl.float32)
            centered = x.to(tl.float32)
            if CENTER:
                mean = tl.div_rn(tl.sum(centered, axis=0), width)
                centered = tl.where(live, centered - mean, 0.0)
            variance = tl.div_rn(_sum_of_squares(centered), width)
            rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))

        y = _finish_channels(
            x, up_row, weight, bias, channel, live, mean, rstd,
            ACTIVATION, HAS_UP, HAS_NORM, HAS_WEIGHT, HAS_BIAS, NORMED, PRODUCT, RESULT,
        )  # fmt: skip
        if HAS_ORDER and WHOLE_ROW:
            y = tl.gather(y.to(RESULT), order, axis=0).to(tl.float32)
        if RAGGED:  # else what comes after the last group has codes of its own, or none
            y = tl.where(position < K - OUTLIERS, y, 0.0)
        if ROTATION > 0:
            y = rotated(y, BLOCK // ROTATION, ROTATION)
        _store_groups(
            y,
            codes_row,
            scale_ptr,
            m,
            M,
            piece,
            clip_over_largest,
            outlier_clip_over_largest,
            NUM_GROUPS,
            GROUP_SIZE,
            INT8_GROUPS,
            LARGEST,
            E2M1,
            OUTLIER_LARGEST,
            BLOCK,
            PER_TOKEN,
        )

        if OUTLIERS > 0:
            if piece == 0:
                outlier_x = tl.load(x_ptr + m * x_stride + outlier, mask=live_lane, other=0.0)
                outliers = _finish_channels(
                    outlier_x, up_row, outlier_weight, outlier_bias, outlier, live_lane, mean, rstd,
                    ACTIVATION, HAS_UP, HAS_NORM, HAS_WEIGHT, HAS_BIAS, NORMED, PRODUCT, RESULT,
                )  # fmt: skip
                if ROTATION > 0:
                    outliers = rotated(
                        outliers, OUTLIER_BLOCK // OUTLIER_ROTATION, OUTLIER_ROTATION
                    )
                outlier_codes, outlier_scale = _quantize(
                    outliers, outlier_clip_over_largest, OUTLIER_LARGEST, 0, E2M1=False
                )
                tl.store(codes_row + NUM_GROUPS * GROUP_SIZE + lane, outlier_codes, mask=live_lane)
                outlier_row = tl.cast(1 if PER_TOKEN else NUM_GROUPS, tl.int64)
                tl.store(scale_ptr + outlier_row * M + m, outlier_scale)


_TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


_MANY_ROWS = 1024


class Quantizing(NamedTuple):
    """A launch whose last pointers are codes (*, padded_width) and scale (num_scales, *)."""

    codes: Buffer
    scale: Buffer
    launch: Launch

    @classmethod
    def of(cls, layout: GroupLayout, tokens: tuple[int, ...], launch: Launch) -> Quantizing:
        """For tokens (*)."""
        codes = buffer(*tokens, layout.padded_width, dtype=torch.int8)
        return cls(codes, buffer(layout.num_scales, *tokens, dtype=torch.float32), launch)


@plan
def plan_rows(
    shape: torch.Size,
    x_stride: int,
    up_stride: int,
    device: torch.device,
    dtype: torch.dtype,
    has_up: bool,
    has_weight: bool,
    has_bias: bool,
    has_order: bool,
    activation: str,
    norm: Norm | None,
    numbers: tuple[Any, ...],
    format: str,
) -> Quantizing:
    """For x of `shape` (*, K). dtype: of what is quantized."""
    of_all = Numbers(*numbers)
    _, group_size, outlier_channels, clip, int8_groups, rotation, per_token = of_all
    layout = of_all.layout(shape[-1])
    M = math.prod(shape[:-1])
    # gathered in memory, a few wide rows are cut as well
    gathers = has_order and (layout.width <= 8192 or M > 64)
    whole_row = norm is not None or per_token or gathers
    block = max(group_size, next_power_of_2(layout.width))
    if not whole_row:
        block = min(block, max(group_size, 2048))
    largest, outlier_largest = of_all.largest(format), 2 ** (OUTLIER_BITS - 1) - 1
    num_groups, outlier_rotation = layout.num_groups, outlier_block(outlier_channels, rotation)
    ragged = layout.padded_width != layout.width
    if (
        not ragged
        and not per_token
        and (outlier_channels, outlier_rotation) == (group_size, rotation)
    ):
        # the outliers are one more INT8 group
        num_groups, int8_groups, outlier_channels = num_groups + 1, int8_groups + 1, 0
    # many rows: each program takes several, and reads the next one ahead
    num_warps = min(max(4, block // 512), 16)
    rows_at_once = M
    if norm is not None and M >= _MANY_ROWS:
        num_warps = min(max(4, block // 1024), 16)
        rows_at_once = min(M, max(1, 16 // num_warps) * multiprocessors(device))
    launch = Launch(
        quantize_rows_kernel,
        (rows_at_once, cdiv(num_groups * group_size, block)),
        (
            M,
            layout.width,
            x_stride,
            up_stride,
            0.0 if norm is None else norm.eps,
            clip / largest,
            1.0 / outlier_largest,
        ),
        NUM_GROUPS=num_groups,
        GROUP_SIZE=group_size,
        INT8_GROUPS=int8_groups,
        OUTLIERS=outlier_channels,
        OUTLIER_BLOCK=next_power_of_2(max(outlier_channels, 1)),
        LARGEST=largest,
        E2M1=format == "e2m1",
        OUTLIER_LARGEST=outlier_largest,
        BLOCK=block,
        PER_TOKEN=per_token,
        RAGGED=per_token or ragged,
        EVEN=layout.width % block == 0,
        ROTATION=rotation,
        OUTLIER_ROTATION=outlier_rotation,
        WHOLE_ROW=whole_row,
        STAGES=3 if rows_at_once < M else 1,
        CENTER=norm is not None and norm.center,
        ACTIVATION=activation,
        HAS_UP=has_up,
        HAS_ORDER=has_order,
        HAS_NORM=norm is not None,
        HAS_WEIGHT=has_weight,
        HAS_BIAS=has_bias,
        NORMED=_TRITON_DTYPES[norm.normed_dtype if norm else dtype],
        PRODUCT=_TRITON_DTYPES[norm.product_dtype if norm else dtype],
        RESULT=_TRITON_DTYPES[dtype],
        num_warps=num_warps,
        enable_fp_fusion=False,  # a fused multiply-add rounds once where the reference rounds twice
        **overlap(device),
    )
    return Quantizing.of(layout, shape[:-1], launch)


def launch(
    x: Tensor,
    order: Tensor | None,
    numbers: tuple[Any, ...],
    format: str,
    *,
    up: Tensor | None = None,
    activation: str = "none",
    norm: Norm | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x and `up` (*, K) -> codes (*, padded_width) int8, scale (num_scales, *) float32.

    numbers: as Numbers; weight, bias: of the norm.
    """
    rows, x_stride = as_rows(x)
    up_rows, up_stride = (None, 0) if up is None else as_rows(up)
    planned = plan_rows(
        x.shape, x_stride, up_stride, x.device, dtype or x.dtype, up is not None,
        weight is not None, bias is not None, order is not None, activation, norm, numbers, format,
    )  # fmt: skip
    codes, scale = planned.codes.beside(x), planned.scale.beside(x)
    if codes.numel():
        planned.launch(rows, up_rows, weight, bias, order, codes, scale)
    return codes, scale
