"""`atom::attention_quantize`: attention, then reorder and quantize for the linear that reads it.

    attended = attention(query, cache, ...)             (B, Q, num_heads * D), rounded to its dtype
    codes, scale = quantize(reorder(attended, order))   or quantize(rotate(reorder(...)))

Where several programs share a sequence, the one that adds up their sums quantizes the token too.
Formulas and layouts: attention.py, quantize.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import attention, quantize, quantize_rows
from .attention_decode import DecodeTiling, combine_rows, launch_combine
from .attention_prefill import PrefillTiling
from .attention_tiles import Arguments
from .kv_cache import CACHE
from .launching import Launch, plan
from .library import define
from .overlap import begin, overlap
from .packing import OUTLIER_BITS
from .quantize import NUMBERS
from .quantize_rows import Numbers, Quantizing, _quantize, _store_groups
from .rotate import outlier_block, rotated
from .sizes import next_power_of_2


def reference(
    query: Tensor,
    key_codes: Tensor,
    key_scale: Tensor | None,
    value_codes: Tensor,
    value_scale: Tensor | None,
    key_recent: Tensor | None,
    value_recent: Tensor | None,
    rope: Tensor | None,
    length: Tensor,
    position: Tensor | None,
    mask: Tensor | None,
    kv_bits: int,
    window: int,
    attention_scale: float,
    softcap: float,
    order: Tensor | None,
    *numbers: Any,
    format: str = "int",
) -> tuple[Tensor, Tensor]:
    """Arguments as in attention.py -> codes (B, Q, padded_width) int8, scale (num_scales, B, Q)."""
    cache = (key_codes, key_scale, value_codes, value_scale, key_recent, value_recent, rope, length)
    attended = attention.reference(
        query, *cache, position, mask, kv_bits, window, attention_scale, softcap
    )
    x = attended.transpose(1, 2).flatten(2)
    if order is None:
        return quantize.reference(x, *numbers, format=format)
    return quantize.reorder_reference(x, order, *numbers, format=format)


_ATTENDING = len(Arguments._fields)  # so many arguments are of attention.py


def fake(*arguments: Any, format: str = "int") -> tuple[Tensor, Tensor]:
    query, numbers = arguments[0], arguments[_ATTENDING + 1 :]
    B, num_heads, Q, D = query.shape
    return quantize.fake(query.new_empty(B, Q, num_heads * D), *numbers)


@triton.jit
def combine_quantize_kernel(
    partial_ptr,
    sums_ptr,
    order_ptr,
    codes_ptr,
    scale_ptr,
    M,
    splits,
    clip_over_largest,
    outlier_clip_over_largest,
    NUM_HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    AHEAD: tl.constexpr,
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
    ROTATION: tl.constexpr,
    OUTLIER_ROTATION: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    RESULT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One token: the sums of all its heads, then what `quantize_rows_kernel` does with a row."""
    if OVERLAP:
        begin()
    K: tl.constexpr = NUM_HEADS * HEAD_DIM
    m = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS_BLOCK)
    sums = combine_rows(
        partial_ptr,
        sums_ptr,
        m * NUM_HEADS + head,
        head < NUM_HEADS,
        tl.cast(M, tl.int64) * NUM_HEADS,
        splits,
        HEAD_DIM,
        HEAD_BLOCK,
        SPLITS,
        AHEAD,
    )
    row = tl.reshape(sums.to(RESULT), (HEADS_BLOCK * HEAD_BLOCK,))

    position = tl.arange(0, BLOCK)
    channel = position
    if HAS_ORDER:
        channel = tl.load(order_ptr + position, mask=position < K, other=0).to(tl.int32)
    y = _gather(row, channel, position < K - OUTLIERS, HEAD_DIM, HEAD_BLOCK)
    if ROTATION > 0:
        y = rotated(y, BLOCK // ROTATION, ROTATION)
    codes_row = codes_ptr + m * (NUM_GROUPS * GROUP_SIZE + OUTLIERS)
    _store_groups(
        y,
        codes_row,
        scale_ptr,
        m,
        M,
        0,
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
        lane = tl.arange(0, OUTLIER_BLOCK)
        live_lane = lane < OUTLIERS
        channel = tl.where(live_lane, K - OUTLIERS + lane, 0)
        if HAS_ORDER:
            channel = tl.load(order_ptr + channel).to(tl.int32)
        y = _gather(row, channel, live_lane, HEAD_DIM, HEAD_BLOCK)
        if ROTATION > 0:
            y = rotated(y, OUTLIER_BLOCK // OUTLIER_ROTATION, OUTLIER_ROTATION)
        codes, scale = _quantize(y, outlier_clip_over_largest, OUTLIER_LARGEST, 0, E2M1=False)
        tl.store(codes_row + NUM_GROUPS * GROUP_SIZE + lane, codes, mask=live_lane)
        tl.store(scale_ptr + tl.cast(1 if PER_TOKEN else NUM_GROUPS, tl.int64) * M + m, scale)


@triton.jit
def _gather(row, channel, live, HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr):
    """Channels of heads that lie HEAD_BLOCK apart, in float32; 0 where not live."""
    at = channel // HEAD_DIM * HEAD_BLOCK + channel % HEAD_DIM
    return tl.where(live, tl.gather(row, tl.where(live, at, 0), axis=0).to(tl.float32), 0.0)


_MOST_FUSED = 2**14
"""Partial sums of a token that one program adds up and quantizes as fast as two kernels do.

Measured on an H100 with 4096 channels: 105 instead of 107 us with 2 splits, the same with 4, and
16 instead of 15 us with 8.
"""


def launch(
    *arguments: Any, tiling: DecodeTiling | PrefillTiling | None = None, format: str = "int"
) -> tuple[Tensor, Tensor]:
    """The Triton kernels on the arguments of `reference`; `tiling` is for tuning."""
    order, numbers = arguments[_ATTENDING], arguments[_ATTENDING + 1 :]
    attended, partial = attention.launch_partial(Arguments(*arguments[:_ATTENDING]), tiling)
    num_heads, D = attended.shape[2:]
    if partial is not None and partial.sums.shape[0] * num_heads * D > _MOST_FUSED:
        launch_combine(partial, attended)
        partial = None
    if partial is None:
        return quantize_rows.launch(attended.flatten(2), order, numbers, format)
    planned = _plan(
        attended.shape, partial.sums.shape[0], attended.dtype, order is not None, numbers, format,
        attended.device,
    )  # fmt: skip
    codes, scale = planned.codes.beside(attended), planned.scale.beside(attended)
    planned.launch(*partial, order, codes, scale)
    return codes, scale


@plan
def _plan(
    shape: torch.Size,
    splits: int,
    dtype: torch.dtype,
    has_order: bool,
    numbers: tuple[Any, ...],
    format: str,
    device: torch.device,
) -> Quantizing:
    """For what is attended, of `shape` (B, Q, num_heads, D) and `dtype`."""
    B, Q, num_heads, D = shape
    of_all = Numbers(*numbers)
    _, group_size, outlier_channels, clip, int8_groups, rotation, per_token = of_all
    layout = of_all.layout(num_heads * D)
    heads_block, head_block = (next_power_of_2(size) for size in (num_heads, D))
    largest, outlier_largest = of_all.largest(format), 2 ** (OUTLIER_BITS - 1) - 1
    launch = Launch(
        combine_quantize_kernel,
        (B * Q,),
        (B * Q, splits, clip / largest, 1.0 / outlier_largest),
        NUM_HEADS=num_heads,
        HEADS_BLOCK=heads_block,
        HEAD_DIM=D,
        HEAD_BLOCK=head_block,
        SPLITS=next_power_of_2(splits),
        AHEAD=min(next_power_of_2(splits), 4),
        NUM_GROUPS=layout.num_groups,
        GROUP_SIZE=group_size,
        INT8_GROUPS=int8_groups,
        OUTLIERS=outlier_channels,
        OUTLIER_BLOCK=next_power_of_2(max(outlier_channels, 1)),
        LARGEST=largest,
        E2M1=format == "e2m1",
        OUTLIER_LARGEST=outlier_largest,
        BLOCK=max(group_size, next_power_of_2(layout.width)),
        PER_TOKEN=per_token,
        ROTATION=rotation,
        OUTLIER_ROTATION=outlier_block(outlier_channels, rotation),
        HAS_ORDER=has_order,
        RESULT=quantize_rows._TRITON_DTYPES[dtype],
        num_warps=min(max(4, heads_block * head_block // 512), 16),
        enable_fp_fusion=False,  # a fused multiply-add rounds once where the reference rounds twice
        **overlap(device),
    )
    return Quantizing.of(layout, (B, Q), launch)


attention_quantize = define(
    f"attention_quantize(Tensor query, {CACHE}, Tensor? position, Tensor? mask, int kv_bits, "
    "int window, float attention_scale, float softcap, Tensor? order, "
    f"{NUMBERS}) -> (Tensor, Tensor)",
    reference,
    fake,
    launch,
)
