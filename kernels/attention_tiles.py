"""What the kernels of attention share: how a tile of the cache is read, masked and weighted."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def dot(a, b, acc, PTX: tl.constexpr):
    if not PTX:  # the interpreter multiplies the bits of bfloat16 numbers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def split_pair(pair):
    """A scale and a minimum, loaded as one 32-bit word."""
    scale = (pair & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    minimum = (pair >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return scale.to(tl.float32), minimum.to(tl.float32)


@triton.jit
def read_values(
    codes_ptr, scale_ptr, slot, channel, live,
    BITS: tl.constexpr, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """x in float32 at any slots and channels of one head's plane (tensors that broadcast)."""
    if GROUPS == 0:
        at = slot * HEAD_DIM + channel
        return tl.load(codes_ptr + at, mask=live, other=0.0).to(tl.float32)
    if BITS == 4:
        at = slot * (HEAD_DIM // 2) + channel % (HEAD_DIM // 2)
        codes = tl.load(codes_ptr + at, mask=live, other=0).to(tl.int32)
        codes = (codes >> tl.where(channel < HEAD_DIM // 2, 0, 4)) & 15
    else:
        codes = tl.load(codes_ptr + slot * HEAD_DIM + channel, mask=live, other=0).to(tl.int32)
    pair = slot
    if GROUPS > 1:
        pair = slot * GROUPS + tl.minimum(channel // (HEAD_DIM // GROUPS), GROUPS - 1)
    scale, minimum = split_pair(tl.load(scale_ptr.to(tl.pointer_type(tl.uint32)) + pair))
    return codes.to(tl.float32) * scale + minimum


@triton.jit
def read_keys(
    codes_ptr, scale_ptr, rope_ptr, slot, position, channel, live, rope_positions,
    BITS: tl.constexpr, GROUPS: tl.constexpr, ROTATED: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """`read_values`, rotated by their position if there is a `rope` table."""
    x = read_values(codes_ptr, scale_ptr, slot, channel, live, BITS, GROUPS, HEAD_DIM)
    if ROTATED > 0:
        HALF: tl.constexpr = ROTATED // 2
        turned = channel < ROTATED
        partner = tl.where(turned, tl.where(channel < HALF, channel + HALF, channel - HALF), 0)
        other = read_values(codes_ptr, scale_ptr, slot, partner, live, BITS, GROUPS, HEAD_DIM)
        table = rope_ptr + tl.minimum(position, rope_positions - 1) * ROTATED + channel % HALF
        cos = tl.load(table, mask=turned, other=1.0)
        sin = tl.load(table + HALF, mask=turned, other=0.0)
        x = x * cos + tl.where(channel < HALF, -sin, sin) * other
    return x


@triton.jit
def cap_scores(scores, cap, HAS_SOFTCAP: tl.constexpr):
    """cap * tanh(x) of scores that come as 2 * log2(e) * x."""
    if HAS_SOFTCAP:
        scores = cap - 2.0 * cap / (1.0 + tl.exp2(scores))
    return scores


@triton.jit
def hide(
    scores, position, first, end, last, window, mask_row, mask_width, mask_stride, live_row,
    BY_POSITION: tl.constexpr, HAS_WINDOW: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Scores (base 2) plus the mask, -inf where a row does not see a position."""
    visible = (position >= first) & (position < end)
    if MASK != "none":
        at = mask_row + tl.minimum(position, mask_width - 1).to(tl.int64) * mask_stride
        mask = tl.load(at, mask=visible & live_row, other=0)
        if MASK == "bool":
            visible = visible & (mask != 0)
        else:
            scores += mask.to(tl.float32) * LOG2_E
    if BY_POSITION:
        visible = visible & (position <= last)
        if HAS_WINDOW:
            visible = visible & (position > last - window)
    return tl.where(visible, scores, -float("inf"))


@triton.jit
def softmax_step(scores, factor, highest, total, AXIS: tl.constexpr):
    """Weights of new scores (base 2, over `factor`), and what the sums so far are multiplied by."""
    new_highest = tl.maximum(highest, tl.max(scores, axis=AXIS) * factor)
    # a row that has seen nothing yet: any finite number, for weights exp2(-inf) = 0
    shift = tl.where(new_highest == -float("inf"), 0.0, new_highest)
    weights = tl.exp2(scores * factor - tl.expand_dims(shift, AXIS))
    decay = tl.exp2(highest - shift)
    return weights, decay, new_highest, total * decay + tl.sum(weights, axis=AXIS)


_TENSORS = 11  # of the arguments, which come first
Described = tuple[Any, ...]
"""Of each of those tensors shape, strides and dtype, or None; then the other arguments."""


class Arguments(NamedTuple):
    """Those of `reference`, as the kernels read them."""

    query: Tensor
    key_codes: Tensor
    key_scale: Tensor | None
    value_codes: Tensor
    value_scale: Tensor | None
    key_recent: Tensor | None
    value_recent: Tensor | None
    rope: Tensor | None
    length: Tensor
    position: Tensor | None
    mask: Tensor | None
    bits: int
    window: int
    scale: float
    softcap: float

    def contiguous(self) -> Arguments:
        """The cache and its like with no gaps, the mask with all its dimensions."""
        unstrided = all(x is None or x.is_contiguous() for x in self.tensors[1:-1])
        if unstrided and self.mask is None and self.scale > 0.0 and self.query.stride(-1) == 1:
            return self
        B, num_heads, Q, _ = self.query.shape
        copies: dict[str, Any] = {
            name: tensor.contiguous()
            for name, tensor in self._asdict().items()
            if name not in ("query", "mask") and isinstance(tensor, Tensor)
        }
        mask = self.mask
        if mask is not None:
            mask = mask.expand(B, num_heads, Q, -1)
            mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        query, scale = self.query, self.scale
        if scale <= 0.0:  # the kernels take the highest score before they scale
            query, scale = query * (-1.0 if scale else 0.0), -scale or 1.0
        query = query if query.stride(-1) == 1 else query.contiguous()
        return self._replace(query=query, mask=mask, scale=scale, **copies)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        tensors: tuple[Any, ...] = self[:_TENSORS]
        return tensors

    def described(self) -> Described:
        """All that launches are planned by, without the tensors themselves."""
        layouts = [None if x is None else (x.shape, x.stride(), x.dtype) for x in self.tensors]
        return (*layouts, *self[_TENSORS:])

    @classmethod
    def like(cls, described: Described) -> Arguments:
        """Arguments whose tensors have a layout and no memory."""
        tensors: list[Any] = [
            None if x is None else torch.empty_strided(x[0], x[1], dtype=x[2], device="meta")
            for x in described[:_TENSORS]
        ]
        return cls(*tensors, *described[_TENSORS:])

    @property
    def heads(self) -> int:
        """Query heads on each KV head."""
        return self.query.shape[1] // self.key_codes.shape[1]

    @property
    def key_groups(self) -> int:
        return 0 if self.key_scale is None else self.key_scale.shape[-2]

    @property
    def value_groups(self) -> int:
        return 0 if self.value_scale is None else self.value_scale.shape[-2]

    def sizes(self) -> tuple[int, ...]:
        """Q, num_kv_heads, slots, residual, positions in the rope table and the mask, window."""
        lengths = [
            0 if one is None else one.shape[dim]
            for one, dim in ((self.key_recent, 2), (self.rope, 0), (self.mask, -1))
        ]
        return (self.query.shape[2], *self.key_codes.shape[1:3], *lengths, self.window)

    def strides(self) -> tuple[int, ...]:
        """Those of query, length, position and mask, 0 along dimensions that they do not have."""
        position, mask = self.position, self.mask
        return (
            *self.query.stride()[:3],
            int(self.length.numel() > 1),
            0 if position is None or position.numel() == position.shape[-1] else position.stride(0),
            0 if position is None else position.stride(-1),
            *((0, 0, 0, 0) if mask is None else mask.stride()),
        )

    def scores(self) -> tuple[float, float]:
        """The factor on products of query and key, and the cap; to base 2, see `cap_scores`."""
        if self.softcap:
            return 2.0 * LOG2_E.value * self.scale / self.softcap, self.softcap * LOG2_E.value
        return self.scale * LOG2_E.value, 0.0

    def constants(self, on_gpu: bool) -> dict[str, Any]:
        """What both kernels are compiled for."""
        mask = self.mask
        return {
            "HEAD_DIM": self.query.shape[-1],
            "HEADS": self.heads,
            "BITS": self.bits,
            "KEY_GROUPS": self.key_groups,
            "VALUE_GROUPS": self.value_groups,
            "ROTATED": 0 if self.rope is None else self.rope.shape[1],
            "HAS_RECENT": self.key_recent is not None,
            "HAS_POSITION": self.position is not None,
            "HAS_WINDOW": self.position is not None and self.window > 0,
            "MASK": "none" if mask is None else "bool" if mask.dtype == torch.uint8 else "float",
            "HAS_SOFTCAP": self.softcap != 0,
            "PTX": on_gpu,
        }
