"""The quantized KV cache: how keys and values lie in memory; `atom::kv_append`, `atom::kv_read`.

A layer's cache holds keys and values of up to `slots` tokens for each sequence and KV head. The
token at position p (0 is a sequence's first) lies in slot p % slots, so that a layer whose
attention slides over a window keeps just that window.

    codes   (batch, num_kv_heads, slots, head_dim * bits / 8)   uint8
    scale   (batch, num_kv_heads, slots, groups, 2)             float16: scale, minimum
    x = code * scale + minimum                                  code in 0 .. 2^bits - 1

One group spans the head unless asked otherwise: Atom's scale and zero point per token and head
(arXiv 2310.19102, section 4.3; the zero point is kept in units of x). With 4 bits two codes share a
byte, the pair that RoPE rotates together:

    byte j of a token:   bits 7..4 = channel j + head_dim/2      bits 3..0 = channel j

With 16 bits `codes` are the values themselves, in the model's dtype, and there is no scale.

Two optional parts:
* `recent (batch, num_kv_heads, residual, head_dim)`: the last `residual` tokens once more, as they
  came, the token at position p in slot p % residual. They are read from here.
* `rope (positions, rotated_channels)` float32, [cos | sin]: keys are quantized as they were before
  RoPE: rotated back by their position when stored, and forth when read.

`length`, an int64 tensor with one element or one for each sequence, is how many tokens were stored:
on the device, so that neither a graph nor a capture of one ever depends on it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Buffer, Launch, buffer, plan
from .library import define
from .overlap import begin, overlap
from .sizes import cdiv, next_power_of_2

_LEAST_SCALE = 2.0**-24  # float16's smallest
_LARGEST = 30000.0  # what is larger saturates: float16 holds all values, and code * scale


def quantize(x: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor]:
    """(*, head_dim) -> codes (*, head_dim * bits / 8) uint8, scale (*, groups, 2) float16.

    A group that holds a NaN or an Inf gets NaN as its scale.
    """
    grouped = x.float().unflatten(-1, (groups, -1))
    low, high = grouped.amin(-1), grouped.amax(-1)
    minimum = low.clamp(-_LARGEST, _LARGEST).half() + 0.0  # no -0, which devices find differently
    scale = (high.clamp(-_LARGEST, _LARGEST) - minimum.float()) * (1.0 / (2**bits - 1))
    scale = scale.clamp(min=_LEAST_SCALE).half()
    scale = torch.where((low - low == 0) & (high - high == 0), scale, torch.nan)
    inverse = (1.0 / scale.float())[..., None]
    codes = ((grouped - minimum.float()[..., None]) * inverse).round()
    codes = torch.nan_to_num(codes, nan=0.0).clamp(0, 2**bits - 1).to(torch.uint8).flatten(-2)
    if bits == 4:
        first, second = codes.chunk(2, dim=-1)
        codes = first | (second << 4)
    return codes, torch.stack([scale, minimum], dim=-1)


def dequantize(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The inverse of `quantize`: (*, head_dim) float32."""
    if bits == 4:
        codes = torch.cat([codes & 0xF, codes >> 4], dim=-1)
    grouped: Tensor = codes.float().unflatten(-1, (scale.shape[-2], -1))
    return (grouped * scale[..., 0:1].float() + scale[..., 1:2].float()).flatten(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of the first 2 * cos.shape[-1] channels, which pair up as halves; float32."""
    x = x.float()
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def per_sequence(length: Tensor, batch: int) -> Tensor:
    """(batch,) from a length with one element or one for each sequence."""
    return length.reshape(-1).expand(batch)


def append_reference(
    key: Tensor,
    value: Tensor,
    key_codes: Tensor,
    key_scale: Tensor | None,
    value_codes: Tensor,
    value_scale: Tensor | None,
    key_recent: Tensor | None,
    value_recent: Tensor | None,
    rope: Tensor | None,
    length: Tensor,
    bits: int,
) -> None:
    """Stores key and value (batch, num_kv_heads, tokens, head_dim) after the first `length` tokens.

    `batch` may be smaller than the cache's. Of more tokens than there are slots the last stay.
    """
    batch, _, tokens, _ = key.shape
    start = per_sequence(length, batch)
    rotated_back = key
    if rope is not None:
        positions = start[:, None] + torch.arange(tokens, device=key.device)
        cos, sin = rope[positions.clamp(max=rope.shape[0] - 1)][:, None].chunk(2, dim=-1)
        rotated_back = rotate(key, cos, -sin)
    for x, codes, scale in (
        (rotated_back, key_codes, key_scale),
        (value, value_codes, value_scale),
    ):
        if scale is None:
            _store(codes, x.to(codes.dtype), start)
        else:
            new_codes, new_scale = quantize(x, bits, scale.shape[-2])
            _store(codes, new_codes, start)
            _store(scale, new_scale, start)
    for x, recent in ((key, key_recent), (value, value_recent)):
        if recent is not None:
            _store(recent, x.to(recent.dtype), start)


def _store(ring: Tensor, new: Tensor, start: Tensor) -> None:
    """Writes tokens (batch, heads, tokens, ...) into slots (start + i) % slots of the ring."""
    batch, _, tokens = new.shape[:3]
    slots = ring.shape[2]
    kept = min(tokens, slots)
    positions = start[:, None] + torch.arange(tokens - kept, tokens, device=new.device)
    sequences = torch.arange(batch, device=new.device)[:, None]
    ring[sequences, :, positions % slots] = new[:, :, tokens - kept :].transpose(1, 2)


def read_reference(
    codes: Tensor,
    scale: Tensor | None,
    recent: Tensor | None,
    rope: Tensor | None,
    length: Tensor,
    batch: int,
    positions: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """The first `batch` sequences, (batch, num_kv_heads, positions, head_dim); 0 where not held."""
    slots = codes.shape[2]
    x = _values(codes[:batch], scale if scale is None else scale[:batch], bits)
    position = torch.arange(positions, device=codes.device)
    if positions != slots:
        x = x.index_select(2, position % slots)
    if rope is not None:
        cos, sin = rope[position.clamp(max=rope.shape[0] - 1)].chunk(2, dim=-1)
        x = rotate(x, cos, sin)
    length = per_sequence(length, batch)[:, None, None, None]
    position = position[:, None]
    if recent is not None:
        residual = recent.shape[2]
        late = recent[:batch].float().index_select(2, position[:, 0] % residual)
        x = torch.where(position >= length - residual, late, x)
    held = (position < length) & (position >= length - slots)
    return torch.where(held, x, 0.0).to(dtype)


def _values(codes: Tensor, scale: Tensor | None, bits: int) -> Tensor:
    return codes.float() if scale is None else dequantize(codes, scale, bits)


def read_fake(
    codes: Tensor,
    scale: Tensor | None,
    recent: Tensor | None,
    rope: Tensor | None,
    length: Tensor,
    batch: int,
    positions: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    head_dim = codes.shape[-1] if scale is None else codes.shape[-1] * 8 // bits
    return codes.new_empty(batch, codes.shape[1], positions, head_dim, dtype=dtype)


def append_fake(*_: object) -> None:
    return None


_SMALLEST_SCALE = tl.constexpr(_LEAST_SCALE)
_SATURATED = tl.constexpr(_LARGEST)
# 1.5 * 2^23: adding and taking it away rounds a small float32 to the nearest even integer
_ROUNDER = tl.constexpr(12582912.0)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _round(x, DTYPE: tl.constexpr):
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _rope_partner(channel, ROTATED: tl.constexpr):
    return tl.where(channel < ROTATED // 2, channel + ROTATED // 2, channel - ROTATED // 2)


@triton.jit
def _load_turned(x_row, cos_row, sin_row, channel, live, stride, cos_stride, ROTATED: tl.constexpr):
    """Channels after RoPE of the first `ROTATED`, each step rounded as `apply_rope` rounds it."""
    DTYPE: tl.constexpr = x_row.dtype.element_ty
    x = tl.load(x_row + channel * stride, mask=live, other=0.0).to(tl.float32)
    if ROTATED > 0:
        turns = live & (channel < ROTATED)
        partner = _rope_partner(channel, ROTATED) * stride
        other = tl.load(x_row + partner, mask=turns, other=0.0).to(tl.float32)
        cos = tl.load(cos_row + channel * cos_stride, mask=turns, other=0.0).to(tl.float32)
        sin = tl.load(sin_row + channel * cos_stride, mask=turns, other=0.0).to(tl.float32)
        along = _round(x * _round(cos, DTYPE), DTYPE)
        across = _round(other * _round(sin, DTYPE), DTYPE)
        turned = tl.where(channel < ROTATED // 2, along - across, along + across)
        x = tl.where(turns, _round(turned, DTYPE), x)
    return x


@triton.jit
def _rotate(x, other, rope_row, channel, turns, ROTATED: tl.constexpr, BACK: tl.constexpr):
    """Mirrors `rotate` at a position of the `rope` table; `other`: the channels' partners."""
    pair = channel % (ROTATED // 2)
    cos = tl.load(rope_row + pair, mask=turns, other=1.0)
    sin = tl.load(rope_row + ROTATED // 2 + pair, mask=turns, other=0.0)
    along = x * cos
    across = other * sin
    turned = tl.where((channel < ROTATED // 2) == BACK, along + across, along - across)
    return tl.where(turns, turned, x)


@triton.jit
def _turn_back(
    x, x_row, cos_row, sin_row, rope_row, channel, live, stride, cos_stride,
    ROTATED: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """x, what `_load_turned` gave, as `rotate` with the table's cos and -sin makes it."""
    if TABLE > 0:
        turns = live & (channel < TABLE)
        partner = _rope_partner(channel, TABLE)
        other = _load_turned(x_row, cos_row, sin_row, partner, turns, stride, cos_stride, ROTATED)
        x = _rotate(x, other, rope_row, channel, turns, TABLE, BACK=True)
    return x


@triton.jit
def _store_head(ptr, row, kept, first, second, HEAD_DIM: tl.constexpr):
    """The halves of the channels of a token's head, into row `row` of HEAD_DIM elements each."""
    HALF: tl.constexpr = HEAD_DIM - HEAD_DIM // 2
    channel = tl.arange(0, first.shape[1])[None, :]
    at = ptr + row[:, None] * HEAD_DIM + channel
    tl.store(at, first.to(ptr.dtype.element_ty), mask=kept[:, None] & (channel < HALF))
    live = channel < HEAD_DIM - HALF
    tl.store(at + HALF, second.to(ptr.dtype.element_ty), mask=kept[:, None] & live)


@triton.jit
def _round_to_codes(x, minimum, inverse, LARGEST: tl.constexpr):
    codes = (x - minimum[:, None]) * inverse[:, None]
    codes = tl.where(codes == codes, codes, 0.0)
    codes = tl.minimum(tl.maximum(codes, 0.0), LARGEST)
    return ((codes + _ROUNDER) - _ROUNDER).to(tl.int32)


@triton.jit
def _quantize_and_store(
    codes_ptr, scale_ptr, row, kept, first, second,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Mirrors `quantize`. A group may lie in both halves, so each is reduced under a mask."""
    HALF: tl.constexpr = HEAD_DIM - HEAD_DIM // 2
    SIZE: tl.constexpr = HEAD_DIM // GROUPS
    LARGEST: tl.constexpr = (1 << BITS) - 1
    channel = tl.arange(0, first.shape[1])[None, :]
    first_codes = tl.zeros(first.shape, tl.int32)
    second_codes = tl.zeros(first.shape, tl.int32)
    for group in range(GROUPS):
        in_first = (channel < HALF) & (channel // SIZE == group)
        in_second = (channel < HEAD_DIM - HALF) & ((channel + HALF) // SIZE == group)
        low = tl.minimum(
            tl.min(tl.where(in_first, first, _INFINITY), axis=1),
            tl.min(tl.where(in_second, second, _INFINITY), axis=1),
        )
        high = tl.maximum(
            tl.max(tl.where(in_first, first, -_INFINITY), axis=1),
            tl.max(tl.where(in_second, second, -_INFINITY), axis=1),
        )
        nans = (in_first & (first != first)).to(tl.int32)
        nans += (in_second & (second != second)).to(tl.int32)
        has_nan = tl.sum(nans, axis=1) > 0  # tl.min and tl.max drop NaNs
        minimum = tl.minimum(tl.maximum(low, -_SATURATED), _SATURATED)
        minimum = tl.where(has_nan, float("nan"), minimum + 0.0).to(tl.float16)
        top = tl.minimum(tl.maximum(high, -_SATURATED), _SATURATED)
        scale = tl.maximum((top - minimum.to(tl.float32)) * (1.0 / LARGEST), _SMALLEST_SCALE)
        finite = (tl.abs(low) < _INFINITY) & (tl.abs(high) < _INFINITY) & (has_nan == 0)
        scale = tl.where(finite, scale, float("nan")).to(tl.float16)
        inverse = tl.div_rn(1.0, scale.to(tl.float32))
        codes = _round_to_codes(first, minimum.to(tl.float32), inverse, LARGEST)
        first_codes = tl.where(in_first, codes, first_codes)
        codes = _round_to_codes(second, minimum.to(tl.float32), inverse, LARGEST)
        second_codes = tl.where(in_second, codes, second_codes)
        tl.store(scale_ptr + (row * GROUPS + group) * 2, scale, mask=kept)
        tl.store(scale_ptr + (row * GROUPS + group) * 2 + 1, minimum, mask=kept)
    if BITS == 4:
        packed = (first_codes | (second_codes << 4)).to(tl.uint8)
        at = codes_ptr + row[:, None] * HALF + channel
        tl.store(at, packed, mask=kept[:, None] & (channel < HALF))
    else:
        _store_head(codes_ptr, row, kept, first_codes, second_codes, HEAD_DIM)


@triton.jit
def append_kernel(
    query_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, rope_ptr, length_ptr, out_ptr,
    key_codes_ptr, key_scale_ptr, key_recent_ptr,
    value_codes_ptr, value_scale_ptr, value_recent_ptr,
    tokens, slots, table_length, length_stride, num_heads, num_kv_heads,
    query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key_stride_b, key_stride_h, key_stride_t, key_stride_d,
    value_stride_b, value_stride_h, value_stride_t, value_stride_d,
    cos_stride_b, cos_stride_t, cos_stride_d,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    VALUE_GROUPS: tl.constexpr,
    KEY_RESIDUAL: tl.constexpr,
    VALUE_RESIDUAL: tl.constexpr,
    ROTATED: tl.constexpr,
    TABLE: tl.constexpr,
    ROWS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """`ROWS` tokens of one head of one sequence: a query head's, a key head's or a value head's.

    ROTATED: channels that RoPE turns now, 0 in `kv_append`. TABLE: those of the `rope` table, or 0.
    GROUPS and RESIDUAL: 0 where there is no scale and no `recent`.
    """
    HALF: tl.constexpr = HEAD_DIM - HEAD_DIM // 2
    if OVERLAP:
        begin()
    b = tl.program_id(1).to(tl.int64)
    heads = num_heads + 2 * num_kv_heads
    head = tl.program_id(0) % heads
    token = tl.program_id(0) // heads * ROWS + tl.arange(0, ROWS)
    exists = token < tokens
    row = token.to(tl.int64)[:, None]
    position = tl.load(length_ptr + b * length_stride).to(tl.int64) + token
    channel = tl.arange(0, HALF_BLOCK)[None, :]
    upper = channel + HALF
    live = exists[:, None] & (channel < HALF)
    upper_live = exists[:, None] & (upper < HEAD_DIM)
    cos_row = cos_ptr + b * cos_stride_b + row * cos_stride_t
    sin_row = sin_ptr + b * cos_stride_b + row * cos_stride_t
    if head < num_heads:
        if ROTATED > 0:
            x_row = query_ptr + b * query_stride_b + head.to(tl.int64) * query_stride_h
            x_row += row * query_stride_t
            first = _load_turned(
                x_row, cos_row, sin_row, channel, live, query_stride_d, cos_stride_d, ROTATED
            )
            second = _load_turned(
                x_row, cos_row, sin_row, upper, upper_live, query_stride_d, cos_stride_d, ROTATED
            )
            out_row = (b * tokens + token) * num_heads + head
            _store_head(out_ptr, out_row, exists, first, second, HEAD_DIM)
    elif head < num_heads + num_kv_heads:
        kv_head = (head - num_heads).to(tl.int64)
        x_row = key_ptr + b * key_stride_b + kv_head * key_stride_h + row * key_stride_t
        first = _load_turned(
            x_row, cos_row, sin_row, channel, live, key_stride_d, cos_stride_d, ROTATED
        )
        second = _load_turned(
            x_row, cos_row, sin_row, upper, upper_live, key_stride_d, cos_stride_d, ROTATED
        )
        if KEY_RESIDUAL > 0:
            ring = (b * num_kv_heads + kv_head) * KEY_RESIDUAL + position % KEY_RESIDUAL
            late = exists & (token >= tokens - KEY_RESIDUAL)
            _store_head(key_recent_ptr, ring, late, first, second, HEAD_DIM)
        rope_row = rope_ptr + tl.minimum(position, table_length - 1)[:, None] * TABLE
        first = _turn_back(
            first, x_row, cos_row, sin_row, rope_row, channel, live, key_stride_d, cos_stride_d,
            ROTATED, TABLE,
        )  # fmt: skip
        second = _turn_back(
            second, x_row, cos_row, sin_row, rope_row, upper, upper_live, key_stride_d,
            cos_stride_d, ROTATED, TABLE,
        )  # fmt: skip
        slot = (b * num_kv_heads + kv_head) * slots + position % slots
        kept = exists & (token >= tokens - slots)
        if KEY_GROUPS > 0:
            _quantize_and_store(
                key_codes_ptr, key_scale_ptr, slot, kept, first, second, HEAD_DIM, BITS, KEY_GROUPS
            )
        else:
            _store_head(key_codes_ptr, slot, kept, first, second, HEAD_DIM)
    else:
        kv_head = (head - num_heads - num_kv_heads).to(tl.int64)
        x_row = value_ptr + b * value_stride_b + kv_head * value_stride_h + row * value_stride_t
        first = tl.load(x_row + channel * value_stride_d, mask=live, other=0.0).to(tl.float32)
        second = tl.load(x_row + upper * value_stride_d, mask=upper_live, other=0.0).to(tl.float32)
        if VALUE_RESIDUAL > 0:
            ring = (b * num_kv_heads + kv_head) * VALUE_RESIDUAL + position % VALUE_RESIDUAL
            late = exists & (token >= tokens - VALUE_RESIDUAL)
            _store_head(value_recent_ptr, ring, late, first, second, HEAD_DIM)
        slot = (b * num_kv_heads + kv_head) * slots + position % slots
        kept = exists & (token >= tokens - slots)
        if VALUE_GROUPS > 0:
            _quantize_and_store(
                value_codes_ptr, value_scale_ptr, slot, kept, first, second, HEAD_DIM, BITS,
                VALUE_GROUPS,
            )  # fmt: skip
        else:
            _store_head(value_codes_ptr, slot, kept, first, second, HEAD_DIM)


class Rotation(NamedTuple):
    """What `rope_append` adds: cos and sin (batch or 1, tokens, rotated_channels)."""

    query: Tensor
    cos: Tensor
    sin: Tensor


def launch_append(
    key: Tensor,
    value: Tensor,
    key_codes: Tensor,
    key_scale: Tensor | None,
    value_codes: Tensor,
    value_scale: Tensor | None,
    key_recent: Tensor | None,
    value_recent: Tensor | None,
    rope: Tensor | None,
    length: Tensor,
    bits: int,
    rotation: Rotation | None = None,
) -> Tensor | None:
    """With a rotation, of the key too, the rotated query (B, num_heads, T, D) as (B, T, H, D)."""
    caches = (key_codes, key_scale, value_codes, value_scale, key_recent, value_recent, rope)
    _require_contiguous(*caches)
    query, cos, sin = rotation or (None, None, None)
    if cos is not None and sin is not None and _layout(cos) != _layout(sin):
        cos, sin = (table.expand(key.shape[0], -1, -1).contiguous() for table in (cos, sin))
    launch, rotated = _plan_append(
        _layout(query), _layout(key), _layout(value), _layout(cos), key_codes.shape,
        _shape(key_scale), _shape(value_scale), _shape(key_recent), _shape(value_recent),
        _shape(rope), _stride(length), bits, (key if query is None else query).dtype, key.device,
    )  # fmt: skip
    out = None if rotated is None else rotated.beside(key)
    if key.numel():
        codes_and_scales = key_codes, key_scale, key_recent, value_codes, value_scale, value_recent
        launch(query, key, value, cos, sin, rope, length, out, *codes_and_scales)
    return out


Shape = tuple[int, ...]
Layout = tuple[Shape, Shape]


def _shape(x: Tensor | None) -> Shape | None:
    return None if x is None else x.shape


def _layout(x: Tensor | None) -> Layout | None:
    """Shape and strides."""
    return None if x is None else (x.shape, x.stride())


@plan
def _plan_append(
    query: Layout | None,
    key: Layout,
    value: Layout,
    cos: Layout | None,
    codes: Shape,
    key_scale: Shape | None,
    value_scale: Shape | None,
    key_recent: Shape | None,
    value_recent: Shape | None,
    rope: Shape | None,
    length_stride: int,
    bits: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Launch, Buffer | None]:
    """And the rotated query, of `dtype`, if there is one. codes: as many of keys as of values."""
    (batch, num_kv_heads, tokens, head_dim), _ = key
    num_heads = 0 if query is None else query[0][1]
    no_strides = 0, 0, 0
    cos_strides: Shape = no_strides
    if cos is not None:
        table = torch.empty_strided(*cos, device="meta")
        cos_strides = table.expand(batch, -1, -1).stride()
    rows = min(16, next_power_of_2(tokens))
    half_block = next_power_of_2((head_dim + 1) // 2)
    launch = Launch(
        append_kernel,
        (cdiv(tokens, rows) * (num_heads + 2 * num_kv_heads), batch),
        (
            tokens,
            codes[2],
            1 if rope is None else rope[0],
            length_stride,
            num_heads,
            num_kv_heads,
            *((*no_strides, 0) if query is None else query[1]),
            *key[1],
            *value[1],
            *cos_strides,
        ),
        HEAD_DIM=head_dim,
        BITS=bits,
        KEY_GROUPS=0 if key_scale is None else key_scale[3],
        VALUE_GROUPS=0 if value_scale is None else value_scale[3],
        KEY_RESIDUAL=0 if key_recent is None else key_recent[2],
        VALUE_RESIDUAL=0 if value_recent is None else value_recent[2],
        ROTATED=0 if cos is None else cos[0][-1],
        TABLE=0 if rope is None else rope[1],
        ROWS=rows,
        HALF_BLOCK=half_block,
        num_warps=min(max(1, rows * half_block // 256), 8),
        enable_fp_fusion=False,  # a fused multiply-add rounds once where the reference rounds twice
        **overlap(device),
    )
    if query is None:
        return launch, None
    return launch, buffer(batch, tokens, num_heads, head_dim, dtype=dtype)


@triton.jit
def _read_channels(
    codes_ptr, scale_ptr, row, channel, live,
    HEAD_DIM: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """What the codes of rows `row` stand for, at any channels; see `dequantize`."""
    if GROUPS > 0 and BITS == 4:
        HALF: tl.constexpr = HEAD_DIM // 2
        pair = tl.load(codes_ptr + row[:, None] * HALF + channel % HALF, mask=live, other=0)
        x = tl.where(channel < HALF, pair & 0xF, pair >> 4).to(tl.float32)
    else:
        at = codes_ptr + row[:, None] * HEAD_DIM + channel
        x = tl.load(at, mask=live, other=0).to(tl.float32)
    if GROUPS > 0:
        if GROUPS == 1:  # one load for the whole row; every slot can be read, held or not
            scale = tl.load(scale_ptr + row * 2)[:, None]
            minimum = tl.load(scale_ptr + row * 2 + 1)[:, None]
        else:
            at = scale_ptr + (row[:, None] * GROUPS + channel // (HEAD_DIM // GROUPS)) * 2
            scale = tl.load(at, mask=live, other=0.0)
            minimum = tl.load(at + 1, mask=live, other=0.0)
        x = x * scale.to(tl.float32) + minimum.to(tl.float32)
    return x


@triton.jit
def read_kernel(
    codes_ptr, scale_ptr, recent_ptr, rope_ptr, length_ptr, out_ptr,
    positions, slots, table_length, length_stride, num_kv_heads,
    HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr,
    GROUPS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    TABLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`ROWS` positions of one head of one sequence; constants as in `append_kernel`."""
    b = tl.program_id(1).to(tl.int64)
    ring = b * num_kv_heads + tl.program_id(0) % num_kv_heads
    position = tl.program_id(0) // num_kv_heads * ROWS + tl.arange(0, ROWS)
    length = tl.load(length_ptr + b * length_stride).to(tl.int64)
    exists = position < positions
    held = exists & (position < length) & (position >= length - slots)
    late = held & (position >= length - RESIDUAL)
    channel = tl.arange(0, BLOCK)[None, :]
    live = (held & (late == 0))[:, None] & (channel < HEAD_DIM)
    slot = ring * slots + position % slots
    x = _read_channels(codes_ptr, scale_ptr, slot, channel, live, HEAD_DIM, BITS, GROUPS)
    if TABLE > 0:
        turns = live & (channel < TABLE)
        partner = _rope_partner(channel, TABLE)
        other = _read_channels(codes_ptr, scale_ptr, slot, partner, turns, HEAD_DIM, BITS, GROUPS)
        row = tl.minimum(position, table_length - 1).to(tl.int64)[:, None]
        x = _rotate(x, other, rope_ptr + row * TABLE, channel, turns, TABLE, BACK=False)
    if RESIDUAL > 0:
        at = recent_ptr + (ring * RESIDUAL + position % RESIDUAL)[:, None] * HEAD_DIM + channel
        recent = tl.load(at, mask=late[:, None] & (channel < HEAD_DIM), other=0.0).to(tl.float32)
        x = tl.where(late[:, None], recent, x)
    at = out_ptr + (ring * positions + position)[:, None] * HEAD_DIM + channel
    x = tl.where(held[:, None], x, 0.0).to(out_ptr.dtype.element_ty)
    tl.store(at, x, mask=exists[:, None] & (channel < HEAD_DIM))


def launch_read(
    codes: Tensor,
    scale: Tensor | None,
    recent: Tensor | None,
    rope: Tensor | None,
    length: Tensor,
    batch: int,
    positions: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    _require_contiguous(codes, scale, recent, rope)
    out = read_fake(codes, scale, recent, rope, length, batch, positions, bits, dtype)
    launch = _plan_read(
        out.shape, codes.shape[2], _shape(scale), _shape(recent), _shape(rope), _stride(length),
        bits,
    )  # fmt: skip
    if out.numel():
        launch(codes, scale, recent, rope, length, out)
    return out


@plan
def _plan_read(
    out: Shape,
    slots: int,
    scale: Shape | None,
    recent: Shape | None,
    rope: Shape | None,
    length_stride: int,
    bits: int,
) -> Launch:
    batch, num_kv_heads, positions, head_dim = out
    rows = min(16, next_power_of_2(positions))
    block = next_power_of_2(head_dim)
    return Launch(
        read_kernel,
        (cdiv(positions, rows) * num_kv_heads, batch),
        (positions, slots, 1 if rope is None else rope[0], length_stride, num_kv_heads),
        HEAD_DIM=head_dim,
        BITS=bits,
        GROUPS=0 if scale is None else scale[3],
        RESIDUAL=0 if recent is None else recent[2],
        TABLE=0 if rope is None else rope[1],
        ROWS=rows,
        BLOCK=block,
        num_warps=min(max(1, rows * block // 512), 8),
        enable_fp_fusion=False,
    )


def _require_contiguous(*caches: Tensor | None) -> None:
    for cache in caches:
        if cache is not None and not cache.is_contiguous():
            raise ValueError(
                f"a KV cache's tensor of shape {tuple(cache.shape)} has strides {cache.stride()}; "
                "the kernels read and write contiguous ones"
            )


def _stride(length: Tensor) -> int:
    """From one sequence's length to the next's."""
    return length.reshape(-1).stride(0) if length.numel() > 1 else 0


def _append_on_gpu(*arguments: Any) -> None:
    launch_append(*arguments)


CACHE = (
    "Tensor key_codes, Tensor? key_scale, Tensor value_codes, Tensor? value_scale, "
    "Tensor? key_recent, Tensor? value_recent, Tensor? rope, Tensor length"
)
WRITTEN_CACHE = (
    "Tensor(a!) key_codes, Tensor(b!)? key_scale, Tensor(c!) value_codes, "
    "Tensor(d!)? value_scale, Tensor(e!)? key_recent, Tensor(f!)? value_recent, "
    "Tensor? rope, Tensor length"
)
kv_append = define(
    f"kv_append(Tensor key, Tensor value, {WRITTEN_CACHE}, int bits) -> ()",
    append_reference,
    append_fake,
    _append_on_gpu,
)
kv_read = define(
    "kv_read(Tensor codes, Tensor? scale, Tensor? recent, Tensor? rope, Tensor length, "
    "SymInt batch, int positions, int bits, ScalarType dtype) -> Tensor",
    read_reference,
    read_fake,
    launch_read,
)
