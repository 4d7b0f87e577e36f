"""How a linear's packed weight and channel order lie in files: as in memory, but for the padding.

In memory (packing.py) the last group of a row takes as many bytes as the others, though it may have
only w < group_size channels. In files the codes of such rows are dense:

    weight (N, bytes of a row) uint8      | group 0 | group 1 | ... | last group: w / 2 bytes |
        byte j of the last group:   bits 7..4 = channel j + w/2      bits 3..0 = channel j

and `high_bits` likewise: a group of w channels, w rounded up to whole bytes, is laid out as one of
group_size channels is. Rows without padding, and all other tensors, are as in memory. The number of
dimensions tells which it is. Orders are of the narrowest integers that hold them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import FORMATS
from .packing import AnyWeight, GroupLayout, pack_bits, unpack_bits
from .sizes import cdiv


def store(packed: AnyWeight, layout: GroupLayout, format: str = "int") -> AnyWeight:
    """The same weight as it lies in a file; one that is stored already is returned as it is.

    layout: the cut of the packed columns. format: as in `GroupedWeight`.
    """
    if is_stored(packed) or layout.last_group == layout.group_size:
        return packed
    planes = {
        field: _trim(getattr(packed, field), bits, layout.last_group)
        for field, bits in _planes(packed, format).items()
    }
    return packed._replace(**planes)


def restore(stored: AnyWeight, layout: GroupLayout, format: str = "int") -> AnyWeight:
    """The inverse of `store`, to the last bit: padding has codes of 0."""
    if not is_stored(stored):
        return stored
    planes = {
        field: _pad(getattr(stored, field), bits, layout)
        for field, bits in _planes(stored, format).items()
    }
    return stored._replace(**planes)


def is_stored(packed: AnyWeight) -> bool:
    """Whether its rows have been trimmed for a file."""
    return packed.weight.dim() == 2


def store_order(order: Tensor) -> Tensor:
    """order (K,) of any integers -> uint8, int16 or int32."""
    for dtype in (torch.uint8, torch.int16):
        if len(order) <= torch.iinfo(dtype).max + 1:
            return order.to(dtype)
    return order.to(torch.int32)


def _planes(packed: AnyWeight, format: str) -> dict[str, int]:
    """The fields that hold codes, and how many bits of each."""
    if getattr(packed, "high_bits", None) is None:
        return {"weight": 4}
    return {"weight": 4, "high_bits": FORMATS[format].bits - 4}


def _trim(plane: Tensor, bits: int, channels: int) -> Tensor:
    """(G, N, group_size * bits / 8) -> (N, bytes of a row)."""
    if plane.is_meta:  # as all of a model that is about to be loaded: codes would take a second
        num_groups, N, group_bytes = plane.shape
        last_bytes = _in_whole_bytes(channels, bits) * bits // 8
        return plane.new_empty(N, (num_groups - 1) * group_bytes + last_bytes)
    last = unpack_bits(plane[-1], bits)[:, : _in_whole_bytes(channels, bits)]
    return torch.cat([plane[:-1].transpose(0, 1).flatten(1), pack_bits(last, bits)], dim=1)


def _pad(rows: Tensor, bits: int, layout: GroupLayout) -> Tensor:
    """The inverse of `_trim`."""
    N, whole, group_bytes = len(rows), layout.num_groups - 1, layout.group_size * bits // 8
    codes = unpack_bits(rows[:, whole * group_bytes :], bits)
    last = pack_bits(F.pad(codes, (0, layout.group_size - codes.shape[1])), bits)
    groups = rows[:, : whole * group_bytes].reshape(N, whole, group_bytes).transpose(0, 1)
    return torch.cat([groups, last[None]])


def _in_whole_bytes(channels: int, bits: int) -> int:
    per_byte = 8 // bits
    return cdiv(channels, per_byte) * per_byte
