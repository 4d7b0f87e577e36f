"""Attention of few query tokens over a quantized cache, split over positions; see attention.py.

Source of the split over positions: Flash-Decoding (pytorch.org/blog/flash-decoding).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tiles import (
    Arguments,
    cap_scores,
    dot,
    hide,
    read_keys,
    read_values,
    softmax_step,
    split_pair,
)
from .devices import multiprocessors
from .launching import Buffer, Launch, buffer, plan
from .overlap import begin, overlap
from .sizes import cdiv, next_power_of_2


@triton.jit
def _channel(column, PART: tl.constexpr, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The channel that part PART of a 16-bit word of codes holds, see `_part`."""
    if PARTS == 4:
        return 2 * column + PART // 2 + (PART % 2) * (HEAD_DIM // 2)
    elif PARTS == 2:
        return 2 * column + PART
    else:
        return column


@triton.jit
def _part(words, PART: tl.constexpr, PARTS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """2^-24 times one code of each 16-bit word, and 16 times that where PART of 4 is odd.

    A small integer's bits, read as a float16, are that subnormal: a mask takes the place of a
    conversion, and the tensor cores multiply it exactly.
    """
    SHIFT: tl.constexpr = 8 * (PART // 2) if PARTS == 4 else 8 * PART
    MASK: tl.constexpr = 0xFF if PARTS == 2 else 0xF0 if PART % 2 else 0xF
    if PTX:  # two words at a time, where LLVM would mask them one by one
        ASM: tl.constexpr = (
            f"and.b32 $0, $1, {MASK * 0x10001};"
            if SHIFT == 0
            else f"{{ .reg .b32 w; shr.b32 w, $1, {SHIFT}; and.b32 $0, w, {MASK * 0x10001}; }}"
        )
        codes = tl.inline_asm_elementwise(
            ASM, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        codes = ((words >> SHIFT) & MASK).to(tl.float16, bitcast=True)
    return codes.to(DTYPE)


@triton.jit
def _load_query(query_row, column, live, PART: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr):
    """Channels of one part (columns, rows)."""
    WIDTH: tl.constexpr = D // PARTS
    at = query_row[None, :] + _channel(column, PART, PARTS, D)[:, None]
    return tl.load(at, mask=(column < WIDTH)[:, None] & live[None, :], other=0.0)


@triton.jit
def _size(x):
    return tl.abs(x.to(tl.float32))


@triton.jit
def _scale_query(query, factor, PART: tl.constexpr, PARTS: tl.constexpr, DTYPE: tl.constexpr):
    scaled = query.to(tl.float32) * factor[None, :]
    if PARTS == 4 and PART % 2:
        scaled = scaled * 0.0625
    return scaled.to(DTYPE)


@triton.jit
def _load_recent(ptr, slot, column, PAIR: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr):
    """(slots, columns) of two neighbouring channels: parts 0 and 2 or 1 and 3, or all there is."""
    at = slot[:, None] * (D // 2) + PAIR * (D // 4) + column[None, :]
    live = (column < D // PARTS)[None, :]
    DTYPE: tl.constexpr = ptr.dtype.element_ty
    if DTYPE.is_fp32():
        first = tl.load(ptr + 2 * at, mask=live, other=0.0)
        second = tl.load(ptr + 2 * at + 1, mask=live, other=0.0)
    else:
        words = tl.load(ptr.to(tl.pointer_type(tl.uint32)) + at, mask=live, other=0)
        first = (words & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
        second = (words >> 16).to(tl.uint16).to(DTYPE, bitcast=True)
    return first, second


@triton.jit
def _store_part(
    ptr, row, sums, column, live_row, PART: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr
):
    """Sums (columns, rows) into their channels of rows of D."""
    at = ptr + row[None, :] * D + _channel(column, PART, PARTS, D)[:, None]
    live = (column < D // PARTS)[:, None] & live_row[None, :]
    tl.store(at, sums.to(ptr.dtype.element_ty), mask=live)


@triton.jit
def decode_kernel(
    query_ptr, key_ptr, key_scale_ptr, value_ptr, value_scale_ptr, key_recent_ptr,
    value_recent_ptr, rope_ptr, length_ptr, position_ptr, mask_ptr,
    out_ptr, partial_ptr, sums_ptr,
    Q, num_kv_heads, slots, residual, rope_positions, mask_width, window,
    query_stride_b, query_stride_h, query_stride_q, length_stride,
    position_stride_b, position_stride_q,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_p,
    score_scale, cap,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    BITS: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    KEY_PARTS: tl.constexpr,
    VALUE_PARTS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    ROTATED: tl.constexpr,
    HAS_RECENT: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    OVERLAP: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """A few query rows, those of the HEADS heads on one KV head, on one share of the positions.

    Scores are held as (slots, rows) and sums as (channels, rows): codes on the left of a product
    stay in the registers in which they were unpacked. With one group, and no RoPE, they enter the
    products as they are; with t a token, u its codes, s and z its scale and minimum,

        query . key_t = s_t (query . u_t) + z_t sum(query)
        sum_t weight_t value_t = sum_t (weight_t s_t) u_t + sum_t weight_t z_t

    PARTS: 16-bit words of codes hold so many each, see `_part`; 1: dequantized one by one.
    Offsets inside one head's plane are taken to fit into 32 bits.
    """
    DTYPE: tl.constexpr = query_ptr.dtype.element_ty
    CODE_DTYPE: tl.constexpr = DTYPE if DTYPE.is_fp32() else tl.float16
    KEY_WIDTH: tl.constexpr = HEAD_DIM // KEY_PARTS
    VALUE_WIDTH: tl.constexpr = HEAD_DIM // VALUE_PARTS
    if OVERLAP:
        begin()
    b = tl.program_id(2).to(tl.int64)
    row_tiles = tl.cdiv(Q * HEADS, ROWS)
    kv_head = tl.program_id(1) // row_tiles
    row = tl.program_id(1) % row_tiles * ROWS + tl.arange(0, ROWS)
    live_row = row < Q * HEADS
    token = tl.where(live_row, row // HEADS, Q - 1)
    head = kv_head * HEADS + row % HEADS

    query_row = query_ptr + b * query_stride_b + head.to(tl.int64) * query_stride_h
    query_row += token.to(tl.int64) * query_stride_q
    mask_row = mask_ptr + b * mask_stride_b + head.to(tl.int64) * mask_stride_h
    mask_row += token.to(tl.int64) * mask_stride_q
    key_column = tl.arange(0, KEY_COLUMNS)
    value_column = tl.arange(0, VALUE_COLUMNS)

    query_0 = _load_query(query_row, key_column, live_row, 0, KEY_PARTS, HEAD_DIM)
    if KEY_PARTS > 1:
        query_1 = _load_query(query_row, key_column, live_row, 1, KEY_PARTS, HEAD_DIM)
    if KEY_PARTS == 4:
        query_2 = _load_query(query_row, key_column, live_row, 2, KEY_PARTS, HEAD_DIM)
        query_3 = _load_query(query_row, key_column, live_row, 3, KEY_PARTS, HEAD_DIM)
    # asked for before anything waits
    length = tl.load(length_ptr + b * length_stride).to(tl.int32)
    last = tl.zeros((ROWS,), tl.int32) + length - 1
    earliest = length - 1
    latest = length - 1
    if HAS_POSITION and ONE_TOKEN:
        earliest = tl.load(position_ptr + b * position_stride_b).to(tl.int32)
        latest = earliest
    elif HAS_POSITION:
        last = tl.load(position_ptr + b * position_stride_b + token * position_stride_q)
        last = last.to(tl.int32)
        earliest = tl.min(last, axis=0)
        latest = tl.max(last, axis=0)

    query_factor = score_scale
    query_sum = score_scale
    if KEY_PARTS > 1:
        largest = tl.maximum(_size(query_0), _size(query_1))
        query_sum = query_0.to(tl.float32) + query_1.to(tl.float32)
        if KEY_PARTS == 4:
            largest = tl.maximum(largest, tl.maximum(_size(query_2), _size(query_3)))
            query_sum += query_2.to(tl.float32) + query_3.to(tl.float32)
        query_sum = tl.sum(query_sum, axis=0) * score_scale
        # each row times the power of two that brings it below 2^15: a bfloat16 fits into a float16
        exponent = tl.max(largest, axis=0).to(tl.int32, bitcast=True) >> 23
        exponent = tl.maximum(exponent, 20)
        to_half = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
        query_factor = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
        query_factor *= score_scale * 16777216.0
        query_0 = _scale_query(query_0, to_half, 0, KEY_PARTS, CODE_DTYPE)
        query_1 = _scale_query(query_1, to_half, 1, KEY_PARTS, CODE_DTYPE)
    if KEY_PARTS == 4:
        query_2 = _scale_query(query_2, to_half, 2, KEY_PARTS, CODE_DTYPE)
        query_3 = _scale_query(query_3, to_half, 3, KEY_PARTS, CODE_DTYPE)

    # the positions that any of the rows sees, and this program's share of them
    seen = tl.maximum(length - slots, 0)
    end = tl.minimum(length, latest + 1)
    if HAS_WINDOW:
        seen = tl.maximum(seen, earliest - window + 1)
    first = seen // BLOCK * BLOCK if ALIGNED else seen
    if IS_SPLIT:
        share = tl.cdiv(tl.cdiv(tl.maximum(end - first, 0), tl.num_programs(0)), BLOCK) * BLOCK
        first = first + tl.program_id(0) * share
        end = tl.minimum(end, first + share)
    coded_end = end
    if HAS_RECENT:
        coded_end = tl.minimum(end, tl.maximum(first, length - residual))
    first_slot = first % slots
    offset = tl.arange(0, BLOCK)

    plane = b * num_kv_heads + kv_head
    key_codes = key_ptr + plane * slots * (HEAD_DIM * BITS // 8 if KEY_GROUPS > 0 else HEAD_DIM)
    value_codes = value_ptr + plane * slots * (
        HEAD_DIM * BITS // 8 if VALUE_GROUPS > 0 else HEAD_DIM
    )
    key_scales = key_scale_ptr
    value_scales = value_scale_ptr
    if KEY_GROUPS > 0:
        key_scales = key_scale_ptr.to(tl.pointer_type(tl.uint32)) + plane * slots * KEY_GROUPS
    if VALUE_GROUPS > 0:
        value_scales = value_scale_ptr.to(tl.pointer_type(tl.uint32)) + plane * slots * VALUE_GROUPS
    if KEY_PARTS > 1:
        key_codes = key_codes.to(tl.pointer_type(tl.uint16))
    if VALUE_PARTS > 1:
        value_codes = value_codes.to(tl.pointer_type(tl.uint16))

    highest = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    minima = tl.zeros((ROWS,), tl.float32)
    sums_0 = tl.zeros((VALUE_COLUMNS, ROWS), tl.float32)
    if VALUE_PARTS > 1:
        sums_1 = sums_0
        largest_scale = 5.9604644775390625e-08  # float16's smallest number
    if VALUE_PARTS == 4:
        sums_2 = sums_0
        sums_3 = sums_0

    for start in range(first, coded_end, BLOCK):
        position = start + offset
        tile = first_slot + (start - first)
        tile = tl.where(tile >= slots, tile - slots, tile)
        if ALIGNED:  # no tile goes past the ring's end
            slot = tl.multiple_of(tile, BLOCK) + offset
            held = position < coded_end
        else:  # past the end, the last token once more: what lies beyond it is never read
            position = tl.minimum(position, coded_end - 1)
            slot = tile + (position - start)
            slot = tl.where(slot >= slots, slot - slots, slot)
            held = offset >= 0
        if KEY_PARTS > 1:
            key_words = key_codes + slot[:, None] * KEY_WIDTH + key_column[None, :]
            if KEY_COLUMNS == KEY_WIDTH:
                words = tl.load(key_words)
            else:
                words = tl.load(key_words, mask=(key_column < KEY_WIDTH)[None, :], other=0)
            scale, minimum = split_pair(tl.load(key_scales + slot, mask=held, other=0))
            scores = tl.zeros((BLOCK, ROWS), tl.float32)
            codes = _part(words, 0, KEY_PARTS, CODE_DTYPE, PTX)
            scores = dot(codes, query_0, scores, PTX)
            codes = _part(words, 1, KEY_PARTS, CODE_DTYPE, PTX)
            scores = dot(codes, query_1, scores, PTX)
            if KEY_PARTS == 4:
                codes = _part(words, 2, KEY_PARTS, CODE_DTYPE, PTX)
                scores = dot(codes, query_2, scores, PTX)
                codes = _part(words, 3, KEY_PARTS, CODE_DTYPE, PTX)
                scores = dot(codes, query_3, scores, PTX)
            scores = scores * query_factor[None, :] * scale[:, None]
            scores += minimum[:, None] * query_sum[None, :]
        else:
            key = read_keys(
                key_codes, key_scales, rope_ptr, slot[:, None], position[:, None],
                key_column[None, :], (key_column < HEAD_DIM)[None, :], rope_positions,
                BITS, KEY_GROUPS, ROTATED, HEAD_DIM,
            )  # fmt: skip
            scores = tl.zeros((BLOCK, ROWS), tl.float32)
            scores = dot(key.to(DTYPE), query_0, scores, PTX) * score_scale
        scores = cap_scores(scores, cap, HAS_SOFTCAP)
        scores = hide(
            scores, (start + offset)[:, None], seen, coded_end, last[None, :], window,
            mask_row[None, :], mask_width, mask_stride_p, live_row[None, :],
            HAS_POSITION and not ONE_TOKEN, HAS_WINDOW, MASK,
        )  # fmt: skip
        weights, decay, highest, total = softmax_step(scores, 1.0, highest, total, AXIS=0)

        if VALUE_PARTS > 1:
            value_words = value_codes + slot[None, :] * VALUE_WIDTH + value_column[:, None]
            if VALUE_COLUMNS == VALUE_WIDTH:
                words = tl.load(value_words)
            else:
                words = tl.load(value_words, mask=(value_column < VALUE_WIDTH)[:, None], other=0)
            scale, minimum = split_pair(tl.load(value_scales + slot, mask=held, other=0))
            minima = minima * decay + tl.sum(weights * minimum[:, None], axis=0)
            # weight times scale, relative to the largest scale so far, fits into a float16
            new_largest = tl.maximum(largest_scale, tl.max(scale, axis=0))
            decay *= largest_scale / new_largest
            largest_scale = new_largest
            weights = (weights * (scale * (32768.0 / new_largest))[:, None]).to(CODE_DTYPE)
            codes = _part(words, 0, VALUE_PARTS, CODE_DTYPE, PTX)
            sums_0 = dot(codes, weights, sums_0 * decay[None, :], PTX)
            codes = _part(words, 1, VALUE_PARTS, CODE_DTYPE, PTX)
            sums_1 = dot(codes, weights, sums_1 * decay[None, :], PTX)
            if VALUE_PARTS == 4:
                codes = _part(words, 2, VALUE_PARTS, CODE_DTYPE, PTX)
                sums_2 = dot(codes, weights, sums_2 * decay[None, :], PTX)
                codes = _part(words, 3, VALUE_PARTS, CODE_DTYPE, PTX)
                sums_3 = dot(codes, weights, sums_3 * decay[None, :], PTX)
        else:
            value = read_values(
                value_codes, value_scales, slot[None, :], value_column[:, None],
                (value_column < HEAD_DIM)[:, None], BITS, VALUE_GROUPS, HEAD_DIM,
            )  # fmt: skip
            sums_0 = dot(value.to(DTYPE), weights.to(DTYPE), sums_0 * decay[None, :], PTX)

    if VALUE_PARTS > 1:
        factor = largest_scale * 512.0  # 2^24 / 2^15
        odd_factor = factor * 0.0625 if VALUE_PARTS == 4 else factor
        sums_0 = sums_0 * factor + minima[None, :]
        sums_1 = sums_1 * odd_factor + minima[None, :]
        if VALUE_PARTS == 4:
            sums_2 = sums_2 * factor + minima[None, :]
            sums_3 = sums_3 * odd_factor + minima[None, :]

    if HAS_RECENT:
        query_0 = _load_query(query_row, key_column, live_row, 0, KEY_PARTS, HEAD_DIM)
        if KEY_PARTS > 1:
            query_1 = _load_query(query_row, key_column, live_row, 1, KEY_PARTS, HEAD_DIM)
        if KEY_PARTS == 4:
            query_2 = _load_query(query_row, key_column, live_row, 2, KEY_PARTS, HEAD_DIM)
            query_3 = _load_query(query_row, key_column, live_row, 3, KEY_PARTS, HEAD_DIM)
        keys = key_recent_ptr + plane * residual * HEAD_DIM
        values = value_recent_ptr + plane * residual * HEAD_DIM
        # not pipelined: the shared memory that this would take is worth more to the other programs
        for start in tl.range(tl.maximum(first, length - residual), end, BLOCK, num_stages=1):
            position = start + offset
            slot = start % residual + tl.minimum(offset, end - 1 - start)
            slot = tl.where(slot >= residual, slot - residual, slot)
            scores = tl.zeros((BLOCK, ROWS), tl.float32)
            if KEY_PARTS == 1:
                at = keys + slot[:, None] * HEAD_DIM + key_column[None, :]
                key = tl.load(at, mask=(key_column < HEAD_DIM)[None, :], other=0.0)
                scores = dot(key.to(DTYPE), query_0, scores, PTX)
            else:
                key, other = _load_recent(keys, slot, key_column, 0, KEY_PARTS, HEAD_DIM)
                scores = dot(key.to(DTYPE), query_0, scores, PTX)
                next_query = query_1 if KEY_PARTS == 2 else query_2
                scores = dot(other.to(DTYPE), next_query, scores, PTX)
            if KEY_PARTS == 4:
                key, other = _load_recent(keys, slot, key_column, 1, KEY_PARTS, HEAD_DIM)
                scores = dot(key.to(DTYPE), query_1, scores, PTX)
                scores = dot(other.to(DTYPE), query_3, scores, PTX)
            scores = cap_scores(scores * score_scale, cap, HAS_SOFTCAP)
            scores = hide(
                scores, position[:, None], seen, end, last[None, :], window,
                mask_row[None, :], mask_width, mask_stride_p, live_row[None, :],
                HAS_POSITION and not ONE_TOKEN, HAS_WINDOW, MASK,
            )  # fmt: skip
            weights, decay, highest, total = softmax_step(scores, 1.0, highest, total, AXIS=0)
            weights = weights.to(DTYPE)
            if VALUE_PARTS == 1:
                at = values + slot[:, None] * HEAD_DIM + value_column[None, :]
                value = tl.load(at, mask=(value_column < HEAD_DIM)[None, :], other=0.0)
                sums_0 = dot(tl.trans(value.to(DTYPE)), weights, sums_0 * decay[None, :], PTX)
            else:
                value, other = _load_recent(values, slot, value_column, 0, VALUE_PARTS, HEAD_DIM)
                sums_0 = dot(tl.trans(value.to(DTYPE)), weights, sums_0 * decay[None, :], PTX)
                other = tl.trans(other.to(DTYPE))
                if VALUE_PARTS == 2:
                    sums_1 = dot(other, weights, sums_1 * decay[None, :], PTX)
                else:
                    sums_2 = dot(other, weights, sums_2 * decay[None, :], PTX)
            if VALUE_PARTS == 4:
                value, other = _load_recent(values, slot, value_column, 1, VALUE_PARTS, HEAD_DIM)
                sums_1 = dot(tl.trans(value.to(DTYPE)), weights, sums_1 * decay[None, :], PTX)
                sums_3 = dot(tl.trans(other.to(DTYPE)), weights, sums_3 * decay[None, :], PTX)

    num_heads = num_kv_heads * HEADS
    out_row = (b * Q + token) * num_heads + head
    if IS_SPLIT:
        rows = tl.num_programs(2).to(tl.int64) * Q * num_heads
        split = tl.program_id(0)
        at = sums_ptr + 2 * split * rows + out_row
        tl.store(at, highest, mask=live_row)
        tl.store(at + rows, total, mask=live_row)
        out_row += split * rows
        out = partial_ptr
    else:
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
        out = out_ptr
        sums_0 *= inverse[None, :]
        if VALUE_PARTS > 1:
            sums_1 *= inverse[None, :]
        if VALUE_PARTS == 4:
            sums_2 *= inverse[None, :]
            sums_3 *= inverse[None, :]
    _store_part(out, out_row, sums_0, value_column, live_row, 0, VALUE_PARTS, HEAD_DIM)
    if VALUE_PARTS > 1:
        _store_part(out, out_row, sums_1, value_column, live_row, 1, VALUE_PARTS, HEAD_DIM)
    if VALUE_PARTS == 4:
        _store_part(out, out_row, sums_2, value_column, live_row, 2, VALUE_PARTS, HEAD_DIM)
        _store_part(out, out_row, sums_3, value_column, live_row, 3, VALUE_PARTS, HEAD_DIM)


@triton.jit
def combine_rows(
    partial_ptr, sums_ptr, row, live_row, rows, splits,
    HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, SPLITS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """What `decode_kernel` left of each of the rows, added up in the order of the splits."""
    channel = tl.arange(0, HEAD_BLOCK)
    split = tl.arange(0, SPLITS)
    highest = tl.load(
        sums_ptr + 2 * split[:, None] * rows + row[None, :],
        mask=(split < splits)[:, None] & live_row[None, :],
        other=-float("inf"),
    )
    highest = tl.max(highest, axis=0)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    total = tl.zeros(row.shape, tl.float32)
    sums = tl.zeros((row.shape[0], HEAD_BLOCK), tl.float32)
    for start in range(0, splits, AHEAD):
        for ahead in tl.static_range(AHEAD):  # loads that do not wait for one another
            number = tl.cast(start + ahead, tl.int64)
            live = live_row & (number < splits)
            at = sums_ptr + 2 * number * rows + row
            weight = tl.exp2(tl.load(at, mask=live, other=-float("inf")) - highest)
            total += weight * tl.load(at + rows, mask=live, other=0.0)
            at = partial_ptr + (number * rows + row)[:, None] * HEAD_DIM + channel[None, :]
            x = tl.load(at, mask=live[:, None] & (channel < HEAD_DIM)[None, :], other=0.0)
            sums += weight[:, None] * x
    return sums * tl.div_rn(1.0, tl.where(total == 0.0, 1.0, total))[:, None]


@triton.jit
def combine_kernel(
    partial_ptr, sums_ptr, out_ptr, rows, splits,
    HEAD_DIM: tl.constexpr, HEAD_BLOCK: tl.constexpr, SPLITS: tl.constexpr, AHEAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row of `combine_rows`, to the bit, in numbers and vectors: those need no exchange."""
    if OVERLAP:
        begin()
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, HEAD_BLOCK)
    live_channel = channel < HEAD_DIM
    split = tl.arange(0, SPLITS)
    highest = tl.load(
        sums_ptr + 2 * split.to(tl.int64) * rows + row, mask=split < splits, other=-float("inf")
    )
    highest = tl.max(highest, axis=0)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    total = 0.0
    sums = tl.zeros((HEAD_BLOCK,), tl.float32)
    for start in range(0, splits, AHEAD):
        for ahead in tl.static_range(AHEAD):  # loads that do not wait for one another
            number = tl.cast(start + ahead, tl.int64)
            live = number < splits
            at = sums_ptr + 2 * number * rows + row
            weight = tl.exp2(tl.load(at, mask=live, other=-float("inf")) - highest)
            total += weight * tl.load(at + rows, mask=live, other=0.0)
            at = partial_ptr + (number * rows + row) * HEAD_DIM + channel
            sums += weight * tl.load(at, mask=live & live_channel, other=0.0)
    out = sums * tl.div_rn(1.0, tl.where(total == 0.0, 1.0, total))
    at = out_ptr + row * HEAD_DIM + channel
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=live_channel)


MOST_ROWS = 64  # of a KV head in one program


class DecodeTiling(NamedTuple):
    """How `decode_kernel` cuts a launch: positions a step, and programs that share a sequence."""

    block: int
    splits: int
    num_warps: int = 2
    num_stages: int = 3


def default_decode_tiling(
    planes: int, slots: int, rows: int, bits: int, plain: bool, multiprocessors: int
) -> DecodeTiling:
    """`planes`: sequences times KV heads (times tiles of rows), each of `rows` query rows.

    Splits depend on the cache's capacity alone: how much of it is filled, only the device knows.
    Measured on an H100, 32 heads on 8 of 128 channels: of 32 to 128 positions a step, 1 to 4 warps,
    2 to 5 stages and 2 to 16 programs a multiprocessor, one warp, 64 positions (32 where a code
    takes a byte) and four programs were the fastest, or within 5 % of it, from 1 x 1024 to
    32 x 8192 tokens. One more split costs `combine_kernel` 0.06 us, and from about sqrt(slots) / 2
    on saves less.
    """
    block = 64 if plain and bits == 4 and rows <= 32 else 32
    num_warps = 4 if rows > 32 else 1 if plain and rows <= 16 else 2
    programs = (4 if plain else 8) * multiprocessors
    splits = max(1, min(programs // planes, math.isqrt(slots) // 2, slots // (2 * block)))
    return DecodeTiling(block, splits, num_warps, 3 if plain else 1)


class Partial(NamedTuple):
    """What the splits of `decode_kernel` leave for `combine_rows`."""

    sums: Tensor  # (splits, B, Q, num_heads, D)
    scales: Tensor  # (splits, 2, B, Q, num_heads): the highest score, and the weights' sum


class DecodePlan(NamedTuple):
    """`launch`: of the tensors of Arguments, the output and a Partial's or None in place of them.

    sums, scales: of the Partial, if several programs share a sequence.
    """

    launch: Launch
    sums: Buffer | None
    scales: Buffer | None

    def start(self, a: Arguments, out: Tensor) -> Partial | None:
        """Fills `out` (B, Q, num_heads, D), or if several programs share a sequence a Partial."""
        if self.sums is None or self.scales is None:
            self.launch(*a.tensors, out, None, None)
            return None
        partial = Partial(self.sums.beside(out), self.scales.beside(out))
        self.launch(*a.tensors, out, *partial)
        return partial


def plan_decode(a: Arguments, tiling: DecodeTiling | None, device: torch.device) -> DecodePlan:
    B, num_heads, Q, D = a.query.shape
    num_kv_heads, slots = a.key_codes.shape[1:3]
    in_a_word = 16 // a.bits  # codes
    key_parts = in_a_word if a.key_groups == 1 and a.rope is None and D % in_a_word == 0 else 1
    value_parts = in_a_word if a.value_groups == 1 and D % in_a_word == 0 else 1
    rows = min(max(8, next_power_of_2(Q * a.heads)), MOST_ROWS)
    planes = B * num_kv_heads * cdiv(Q * a.heads, rows)
    plain = min(key_parts, value_parts) > 1
    processors = multiprocessors(device)
    tiling = tiling or default_decode_tiling(planes, slots, rows, a.bits, plain, processors)
    is_split = tiling.splits > 1
    launch = Launch(
        decode_kernel,
        (tiling.splits, planes // B, B),
        (*a.sizes(), *a.strides(), *a.scores()),
        KEY_PARTS=key_parts,
        VALUE_PARTS=value_parts,
        KEY_COLUMNS=max(16, next_power_of_2(D // key_parts)),
        VALUE_COLUMNS=max(16, next_power_of_2(D // value_parts)),
        ALIGNED=plain and slots % tiling.block == 0,
        ONE_TOKEN=Q == 1,
        ROWS=rows,
        BLOCK=tiling.block,
        IS_SPLIT=is_split,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **a.constants(device.type == "cuda"),
        **overlap(device),
    )
    if not is_split:
        return DecodePlan(launch, None, None)
    sums = buffer(tiling.splits, B, Q, num_heads, D, dtype=torch.float32)
    return DecodePlan(launch, sums, buffer(*sums.shape[:1], 2, *sums.shape[1:4], dtype=sums.dtype))


def launch_combine(partial: Partial, out: Tensor) -> None:
    """Fills `out` (B, Q, num_heads, D)."""
    launch = _plan_combine(out.shape, partial.sums.shape[0], out.device)
    launch(*partial, out)


@plan
def _plan_combine(shape: torch.Size, splits: int, device: torch.device) -> Launch:
    rows, D = math.prod(shape[:-1]), shape[-1]
    return Launch(
        combine_kernel,
        (rows,),
        (rows, splits),
        HEAD_DIM=D,
        HEAD_BLOCK=next_power_of_2(D),
        SPLITS=next_power_of_2(splits),
        AHEAD=min(next_power_of_2(splits), 32),
        num_warps=1,
        enable_fp_fusion=False,  # the same sums, to the bit, as in attention_quantize.py
        **overlap(device),
    )
