"""The quantized KV cache: how keys and values lie in memory; `atom::kv_append`, `atom::kv_read`.

A layer's cache holds keys and values of up to `slots` tokens for each sequence and KV head. The
token at position p (0 is a sequence's first) lies in slot p % slots, so that a layer whose attention
slides over a window keeps just that window.

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

import torch
from torch import Tensor

from .library import define

_LEAST_SCALE = 2.0**-24  # float16's smallest
_LARGEST = 65504.0  # float16's largest


def quantize(x: Tensor, bits: int, groups: int) -> tuple[Tensor, Tensor]:
    """(*, head_dim) -> codes (*, head_dim * bits / 8) uint8, scale (*, groups, 2) float16.

    A group that holds a NaN or an Inf gets NaN as its scale.
    """
    grouped = x.float().unflatten(-1, (groups, -1))
    low, high = grouped.amin(-1), grouped.amax(-1)
    minimum = low.clamp(-_LARGEST, _LARGEST).half()
    scale = (high - minimum.float()) * (1.0 / (2**bits - 1))
    scale = scale.clamp(_LEAST_SCALE, _LARGEST).half()
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
    grouped = codes.float().unflatten(-1, (scale.shape[-2], -1))
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
    """The first `batch` sequences as (batch, num_kv_heads, positions, head_dim); 0 where not held."""
    slots = codes.shape[2]
    x = _values(codes[:batch], scale if scale is None else scale[:batch], bits)
    position = torch.arange(positions, device=codes.device)
    if positions != slots:
        x = x.index_select(2, position % slots)
    if rope is not None:
        cos, sin = rope[position].chunk(2, dim=-1)
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
    append_reference,
)
kv_read = define(
    "kv_read(Tensor codes, Tensor? scale, Tensor? recent, Tensor? rope, Tensor length, "
    "SymInt batch, int positions, int bits, ScalarType dtype) -> Tensor",
    read_reference,
    read_fake,
    read_reference,
)
