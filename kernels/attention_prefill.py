"""Attention of many query tokens over a quantized cache; see attention.py.

Codes become 16-bit keys and values tile by tile, in registers: memory holds nothing but codes.
Source: FlashAttention-2 (arXiv 2307.08691), algorithm 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .attention_tiles import Arguments, cap_scores, dot, hide, read_keys, softmax_step
from .launching import Launch
from .sizes import cdiv, next_power_of_2


@triton.jit
def _unpack(packed, BITS: tl.constexpr, PTX: tl.constexpr):
    """Bytes -> the exact float16 values of their low and of their high codes; with 8 bits of one.

    A code's bits under those of 1024 are the float16 1024 + code: no conversion is needed.
    """
    if not PTX:
        low = (packed & 0xF if BITS == 4 else packed).to(tl.float16)
        return low, (packed >> 4).to(tl.float16)
    if BITS == 4:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 l, h, c;
            mov.b32 c, 0x64006400;
            and.b32 l, $4, 0x0F0F0F0F;
            shr.u32 h, $4, 4;
            and.b32 h, h, 0x0F0F0F0F;
            prmt.b32 $0, l, 0x64646464, 0x5140;
            prmt.b32 $1, l, 0x64646464, 0x7362;
            prmt.b32 $2, h, 0x64646464, 0x5140;
            prmt.b32 $3, h, 0x64646464, 0x7362;
            sub.f16x2 $0, $0, c;
            sub.f16x2 $1, $1, c;
            sub.f16x2 $2, $2, c;
            sub.f16x2 $3, $3, c; }""",
            "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip
    one = tl.inline_asm_elementwise(
        """{ .reg .b32 c;
        mov.b32 c, 0x64006400;
        prmt.b32 $0, $2, 0x64646464, 0x5140;
        prmt.b32 $1, $2, 0x64646464, 0x7362;
        sub.f16x2 $0, $0, c;
        sub.f16x2 $1, $1, c; }""",
        "=&r,=&r,r", [packed], dtype=tl.float16, is_pure=True, pack=4,
    )  # fmt: skip
    return one, one


@triton.jit
def _pairs(scale_ptr, slot, channel, HEAD_DIM: tl.constexpr, GROUPS: tl.constexpr):
    """Scales and minima in float16: one for each slot, or for each slot and channel."""
    if GROUPS == 1:
        pair = tl.load(scale_ptr + slot)[:, None]
    else:
        group = tl.minimum(channel // (HEAD_DIM // GROUPS), GROUPS - 1)
        pair = tl.load(scale_ptr + slot[:, None] * GROUPS + group[None, :])
    scale = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    minimum = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return scale, minimum


@triton.jit
def _load_halves(
    codes_ptr, scale_ptr, recent_ptr, rope_ptr, slot, position, first_recent, residual,
    rope_positions, column, live,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr, ROTATED: tl.constexpr,
    HAS_RECENT: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Channels below and from HEAD_DIM / 2 on, of keys or values in slots, each (slots, half)."""
    HALF: tl.constexpr = HEAD_DIM // 2
    if ROTATED > 0 and ROTATED < HEAD_DIM:  # the halves do not hold the pairs that are rotated
        low = read_keys(
            codes_ptr, scale_ptr, rope_ptr, slot[:, None], position[:, None], column[None, :], live,
            rope_positions, BITS, GROUPS, ROTATED, HEAD_DIM,
        ).to(DTYPE)  # fmt: skip
        high = read_keys(
            codes_ptr, scale_ptr, rope_ptr, slot[:, None], position[:, None],
            HALF + column[None, :], live, rope_positions, BITS, GROUPS, ROTATED, HEAD_DIM,
        ).to(DTYPE)  # fmt: skip
    elif GROUPS == 0:
        at = codes_ptr + slot[:, None] * HEAD_DIM + column[None, :]
        low = tl.load(at, mask=live, other=0.0).to(DTYPE)
        high = tl.load(at + HALF, mask=live, other=0.0).to(DTYPE)
    else:
        if BITS == 4:
            packed = tl.load(codes_ptr + slot[:, None] * HALF + column[None, :], mask=live, other=0)
            low, high = _unpack(packed, BITS, PTX)
        else:
            at = codes_ptr + slot[:, None] * HEAD_DIM + column[None, :]
            low, _ = _unpack(tl.load(at, mask=live, other=0), BITS, PTX)
            high, _ = _unpack(tl.load(at + HALF, mask=live, other=0), BITS, PTX)
        scale, minimum = _pairs(scale_ptr, slot, column, HEAD_DIM, GROUPS)
        low = low.to(DTYPE) * scale.to(DTYPE) + minimum.to(DTYPE)
        if GROUPS > 1:
            scale, minimum = _pairs(scale_ptr, slot, column + HALF, HEAD_DIM, GROUPS)
        high = high.to(DTYPE) * scale.to(DTYPE) + minimum.to(DTYPE)
    if ROTATED == HEAD_DIM:
        at = tl.minimum(position, rope_positions - 1)[:, None] * HEAD_DIM + column[None, :]
        cos = tl.load(rope_ptr + at, mask=live, other=1.0)
        sin = tl.load(rope_ptr + at + HALF, mask=live, other=0.0)
        straight = low.to(tl.float32)
        crossed = high.to(tl.float32)
        low = (straight * cos - crossed * sin).to(DTYPE)
        high = (crossed * cos + straight * sin).to(DTYPE)
    if HAS_RECENT:
        late = (position >= first_recent)[:, None]
        at = recent_ptr + (position % residual)[:, None] * HEAD_DIM + column[None, :]
        low = tl.where(late, tl.load(at, mask=late & live, other=0.0).to(DTYPE), low)
        high = tl.where(late, tl.load(at + HALF, mask=late & live, other=0.0).to(DTYPE), high)
    return low, high


@triton.jit
def _attend(
    query_low, query_high, highest, total, sums_low, sums_high,
    key_ptr, key_scale_ptr, value_ptr, value_scale_ptr, key_recent_ptr, value_recent_ptr, rope_ptr,
    steps, turn, begin, resume, first, end, first_recent,
    slots, residual, rope_positions, last, window, mask_row, mask_width, mask_stride_p, live_row,
    score_scale, cap,
    HEAD_DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    ROTATED: tl.constexpr,
    HAS_RECENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGNED: tl.constexpr,
    IS_MASKED: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """`prefill_kernel`'s loop: `turn` steps from position `begin` on, others from `resume`."""
    DTYPE: tl.constexpr = query_low.dtype
    HALF: tl.constexpr = HEAD_DIM // 2
    column = tl.arange(0, HALF_BLOCK)
    offset = tl.arange(0, BLOCK_N)
    live = (offset >= 0)[:, None] & (column < HALF)[None, :]
    for step in range(0, steps):
        start = tl.where(step < turn, begin, resume - turn * BLOCK_N) + step * BLOCK_N
        position = start + offset
        tile = start % slots
        if ALIGNED and not IS_MASKED:
            slot = tl.multiple_of(tile, BLOCK_N) + offset
        else:  # past the end, the last token once more: what lies beyond it is never read
            position = tl.minimum(position, end - 1)
            slot = tile + (position - start)
            slot = tl.where(slot >= slots, slot - slots, slot)
        low, high = _load_halves(
            key_ptr, key_scale_ptr, key_recent_ptr, rope_ptr, slot, position, first_recent,
            residual, rope_positions, column, live,
            HEAD_DIM, BITS, KEY_GROUPS, ROTATED, HAS_RECENT, DTYPE, PTX,
        )  # fmt: skip
        scores = tl.zeros((query_low.shape[0], BLOCK_N), tl.float32)
        scores = dot(query_low, tl.trans(low), scores, PTX)
        scores = dot(query_high, tl.trans(high), scores, PTX)
        factor = score_scale
        if HAS_SOFTCAP or MASK != "none":
            scores = cap_scores(scores * score_scale, cap, HAS_SOFTCAP)
            factor = 1.0
        if IS_MASKED:
            scores = hide(
                scores, (start + offset)[None, :], first, end, last[:, None], window,
                mask_row[:, None], mask_width, mask_stride_p, live_row[:, None], HAS_POSITION,
                HAS_WINDOW, MASK,
            )  # fmt: skip
        weights, decay, highest, total = softmax_step(scores, factor, highest, total, AXIS=1)
        low, high = _load_halves(
            value_ptr, value_scale_ptr, value_recent_ptr, rope_ptr, slot, position, first_recent,
            residual, rope_positions, column, live,
            HEAD_DIM, BITS, VALUE_GROUPS, 0, HAS_RECENT, DTYPE, PTX,
        )  # fmt: skip
        weights = weights.to(DTYPE)
        sums_low = dot(weights, low, sums_low * decay[:, None], PTX)
        sums_high = dot(weights, high, sums_high * decay[:, None], PTX)
    return highest, total, sums_low, sums_high


@triton.jit
def prefill_kernel(
    query_ptr, key_ptr, key_scale_ptr, value_ptr, value_scale_ptr, key_recent_ptr,
    value_recent_ptr, rope_ptr, length_ptr, position_ptr, mask_ptr, out_ptr,
    Q, num_kv_heads, slots, residual, rope_positions, mask_width, window,
    query_stride_b, query_stride_h, query_stride_q, length_stride,
    position_stride_b, position_stride_q,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_p,
    score_scale, cap,
    HEAD_DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    BITS: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    ROTATED: tl.constexpr,
    HAS_RECENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows, each a token and one of the HEADS query heads of a KV head."""
    HALF: tl.constexpr = HEAD_DIM // 2
    INPUT: tl.constexpr = query_ptr.dtype.element_ty
    DTYPE: tl.constexpr = INPUT if INPUT.is_fp32() else tl.float16
    # the last tokens first: they have the most to see
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live_row = row < Q * HEADS
    token = tl.minimum(row // HEADS, Q - 1).to(tl.int64)
    head = kv_head * HEADS + row % HEADS

    # positions that any row sees, and among them those that every row sees
    length = tl.load(length_ptr + b * length_stride).to(tl.int32)
    first = tl.maximum(length - slots, 0)
    end = length
    all_first = first
    all_end = end
    last = tl.zeros((BLOCK_M,), tl.int32) + length - 1
    if HAS_POSITION:
        last = tl.load(position_ptr + b * position_stride_b + token * position_stride_q)
        last = last.to(tl.int32)
        earliest = tl.min(last, axis=0)
        latest = tl.max(last, axis=0)
        end = tl.minimum(end, latest + 1)
        all_end = tl.minimum(end, earliest + 1)
        if HAS_WINDOW:
            first = tl.maximum(first, earliest - window + 1)
            all_first = tl.maximum(first, latest - window + 1)
    # in whole tiles: masked, unmasked, masked; aligned tiles do not go past the ring's end
    low = first // BLOCK_N * BLOCK_N if ALIGNED else first
    unmasked = low + tl.cdiv(all_first - low, BLOCK_N) * BLOCK_N
    masked = unmasked + tl.maximum(all_end - unmasked, 0) // BLOCK_N * BLOCK_N
    if MASK != "none":
        unmasked = low
        masked = low
    turn = tl.cdiv(tl.maximum(tl.minimum(unmasked, end) - low, 0), BLOCK_N)
    steps = turn + tl.cdiv(tl.maximum(end - masked, 0), BLOCK_N)

    column = tl.arange(0, HALF_BLOCK)
    live = live_row[:, None] & (column < HALF)[None, :]
    query_row = query_ptr + b * query_stride_b + head.to(tl.int64) * query_stride_h
    at = (query_row + token * query_stride_q)[:, None] + column[None, :]
    query_low = tl.load(at, mask=live, other=0.0).to(tl.float32)
    query_high = tl.load(at + HALF, mask=live, other=0.0).to(tl.float32)
    if INPUT.is_bf16():  # times the power of two that brings all below 2^15: they fit into float16
        largest = tl.maximum(tl.abs(query_low), tl.abs(query_high))
        largest = tl.max(tl.where(largest < float("inf"), largest, 0.0))
        exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 20)
        to_half = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
        score_scale *= ((exponent - 14) << 23).to(tl.float32, bitcast=True)
        query_low *= to_half
        query_high *= to_half
    query_low = query_low.to(DTYPE)
    query_high = query_high.to(DTYPE)
    mask_row = mask_ptr + b * mask_stride_b + head.to(tl.int64) * mask_stride_h
    mask_row += token * mask_stride_q

    plane = (b * num_kv_heads + kv_head) * slots
    key_ptr += plane * (HEAD_DIM * BITS // 8 if KEY_GROUPS > 0 else HEAD_DIM)
    value_ptr += plane * (HEAD_DIM * BITS // 8 if VALUE_GROUPS > 0 else HEAD_DIM)
    if KEY_GROUPS > 0:
        key_scale_ptr = key_scale_ptr.to(tl.pointer_type(tl.uint32)) + plane * KEY_GROUPS
    if VALUE_GROUPS > 0:
        value_scale_ptr = value_scale_ptr.to(tl.pointer_type(tl.uint32)) + plane * VALUE_GROUPS
    first_recent = length - residual
    if HAS_RECENT:
        key_recent_ptr += (b * num_kv_heads + kv_head) * residual * HEAD_DIM
        value_recent_ptr += (b * num_kv_heads + kv_head) * residual * HEAD_DIM

    highest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums_low = tl.zeros((BLOCK_M, HALF_BLOCK), tl.float32)
    sums_high = tl.zeros((BLOCK_M, HALF_BLOCK), tl.float32)
    if MASK == "none":
        whole = (masked - unmasked) // BLOCK_N
        highest, total, sums_low, sums_high = _attend(
            query_low, query_high, highest, total, sums_low, sums_high,
            key_ptr, key_scale_ptr, value_ptr, value_scale_ptr, key_recent_ptr, value_recent_ptr,
            rope_ptr, whole, whole, unmasked, unmasked, first, end, first_recent,
            slots, residual, rope_positions, last, window, mask_row, mask_width, mask_stride_p,
            live_row, score_scale, cap, HEAD_DIM, HALF_BLOCK, BITS, KEY_GROUPS, VALUE_GROUPS,
            ROTATED, HAS_RECENT, BLOCK_N, ALIGNED, False, HAS_POSITION, HAS_WINDOW, MASK,
            HAS_SOFTCAP, PTX,
        )  # fmt: skip
    highest, total, sums_low, sums_high = _attend(
        query_low, query_high, highest, total, sums_low, sums_high,
        key_ptr, key_scale_ptr, value_ptr, value_scale_ptr, key_recent_ptr, value_recent_ptr,
        rope_ptr, steps, turn, low, masked, first, end, first_recent,
        slots, residual, rope_positions, last, window, mask_row, mask_width, mask_stride_p,
        live_row, score_scale, cap, HEAD_DIM, HALF_BLOCK, BITS, KEY_GROUPS, VALUE_GROUPS,
        ROTATED, HAS_RECENT, BLOCK_N, ALIGNED, True, HAS_POSITION, HAS_WINDOW, MASK,
        HAS_SOFTCAP, PTX,
    )  # fmt: skip
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)[:, None]
    at = ((b * Q + token) * (num_kv_heads * HEADS) + head)[:, None] * HEAD_DIM + column[None, :]
    tl.store(out_ptr + at, (sums_low * inverse).to(INPUT), mask=live)
    tl.store(out_ptr + at + HALF, (sums_high * inverse).to(INPUT), mask=live)


class PrefillTiling(NamedTuple):
    """How `prefill_kernel` cuts a launch: rows of the query, and positions a step."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 3


def default_prefill_tiling(
    rows: int, half_block: int, element_size: int, plain: bool
) -> PrefillTiling:
    """`plain`: a scale for the whole head and nothing else to load, so that stages cost little.

    Measured on an H100, 8192 tokens of 32 heads on 8 of 128 channels in bfloat16: of 64 to 256
    rows, 32 to 128 positions and 4 to 16 warps, 128 x 64 with 4 warps and 3 stages was the fastest.
    """
    if element_size == 4:
        return PrefillTiling(32, 32, 4, 1)
    if half_block > 64:
        return PrefillTiling(64, 32, 4, 2 if plain else 1)
    return PrefillTiling(128 if plain and rows > 64 else 64, 64, 4, 3 if plain else 1)


def plan_prefill(a: Arguments, tiling: PrefillTiling | None, device: torch.device) -> Launch:
    """Of the tensors of Arguments, and the output (B, Q, num_heads, D)."""
    B, _, Q, D = a.query.shape
    num_kv_heads, slots = a.key_codes.shape[1:3]
    rows = Q * a.heads
    half_block = max(16, next_power_of_2(D // 2))
    plain = max(a.key_groups, a.value_groups) <= 1 and a.rope is None and a.key_recent is None
    tiling = tiling or default_prefill_tiling(rows, half_block, a.query.element_size(), plain)
    return Launch(
        prefill_kernel,
        (cdiv(rows, tiling.block_m), num_kv_heads, B),
        (*a.sizes(), *a.strides(), *a.scores()),
        HALF_BLOCK=half_block,
        ALIGNED=slots % tiling.block_n == 0,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **a.constants(device.type == "cuda"),
    )
