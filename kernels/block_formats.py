"""MXFP4 and NVFP4: E2M1 codes in short blocks with 8-bit scales, as checkpoints store them.

             block   a block's scale             and of the whole tensor
    MXFP4     32     e8m0: 2^(byte - 127)        -
    NVFP4     16     e4m3                        float32

    byte j of a row:   bits 7..4 = channel 2 j + 1      bits 3..0 = channel 2 j

    value = code * (block scale * tensor scale)

Hopper has no tensor cores for them, and those of Blackwell want activations of 8 bits or fewer too.
What can be computed with instead is exact: an E2M1 value is one of e4m3, and so are blocks of MXFP4
under one common scale (`to_e4m3`); a code times a block's scale of NVFP4 has six significant bits,
two too many for e4m3, and is one of float16 and of bfloat16. weight_only_linear.py multiplies by
them (`to_grouped_weight`).
Sources: OCP Microscaling Formats (MX) 1.0, sections 5 and 6; NVIDIA (arXiv 2509.25149)
for NVFP4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .formats import E2M1, E4M3
from .packing import GroupedWeight, block_codes, tensor_scale

_MXFP4_BLOCK, _NVFP4_BLOCK = 32, 16
_LARGEST_RATIO = 64.0  # 6 * 64 is the largest multiple of an E2M1 value by a power of two in e4m3


class BlockWeight(NamedTuple):
    """A weight (N, K) as stored.

    codes (N, K / 2) uint8, block_scale (N, K / block) float8_e8m0fnu (MXFP4) or float8_e4m3fn
    (NVFP4), tensor_scale () float32, which is 1 for MXFP4.
    """

    codes: Tensor
    block_scale: Tensor
    tensor_scale: Tensor


def pack_mxfp4(weight: Tensor) -> BlockWeight:
    """Rounds a weight (N, K) to nearest, K a multiple of 32: MX 1.0, section 6.3.

    A block's scale is the power of two that puts its largest magnitude between 4 and 8; what is
    over 6 then saturates.
    """
    blocks = _cut(weight, _MXFP4_BLOCK)
    peak = blocks.abs().amax(-1)
    exponent = (peak.view(torch.int32) >> 23) - 2  # biased as float32's, which is e8m0's bias too
    byte = torch.where(peak.isfinite(), exponent.clamp(min=0), 255).to(torch.uint8)
    return _pack(blocks, byte.view(torch.float8_e8m0fnu), weight.new_ones((), dtype=torch.float32))


def pack_nvfp4(weight: Tensor) -> BlockWeight:
    """Rounds a weight (N, K) to nearest, K a multiple of 16; its largest magnitude is 6 * 448."""
    blocks = _cut(weight, _NVFP4_BLOCK)
    peak = blocks.abs().amax(-1)
    whole_scale = tensor_scale(blocks)
    scale = E4M3.nearest(peak / (E2M1.largest * whole_scale))
    block_scale = torch.where(peak.isfinite(), scale, torch.nan).to(torch.float8_e4m3fn)
    return _pack(blocks, block_scale, whole_scale)


def _cut(weight: Tensor, block: int) -> Tensor:
    if weight.shape[1] % block:
        raise ValueError(f"{weight.shape[1]} channels are not a multiple of a block's {block}")
    return weight.float().reshape(len(weight), weight.shape[1] // block, block)


def _pack(blocks: Tensor, block_scale: Tensor, tensor_scale: Tensor) -> BlockWeight:
    scale = block_scale.float() * tensor_scale
    low, high = E2M1.round_to(blocks / scale[..., None]).flatten(1).unflatten(1, (-1, 2)).unbind(-1)
    return BlockWeight(low | high << 4, block_scale, tensor_scale)


def unpack_blocks(packed: BlockWeight) -> Tensor:
    """The E2M1 codes (N, K / block, block) uint8."""
    codes = torch.stack([packed.codes & 0xF, packed.codes >> 4], dim=-1)
    return codes.view(*packed.block_scale.shape, -1)


def dequantize_blocks(packed: BlockWeight) -> Tensor:
    """The float32 weight (N, K)."""
    scale = packed.block_scale.float() * packed.tensor_scale
    return (E2M1.decode(unpack_blocks(packed)) * scale[..., None]).flatten(1)


def to_grouped_weight(packed: BlockWeight) -> GroupedWeight:
    """The same codes and scales as `atom::weight_only_linear` reads them."""
    is_mxfp4 = packed.block_scale.dtype == torch.float8_e8m0fnu
    row_scale = None if is_mxfp4 else packed.tensor_scale.repeat(len(packed.codes))
    format = "mxfp4" if is_mxfp4 else "nvfp4"
    return block_codes(unpack_blocks(packed), packed.block_scale.float(), row_scale, format)


def to_e4m3(packed: BlockWeight, group_size: int) -> tuple[Tensor, Tensor]:
    """(N, K) float8_e4m3fn and its scale (N, K / group_size) float32; group_size: whole blocks.

    Exact if a group is a block, and for MXFP4 if a group's scales lie within a factor of 2^14. The
    values of blocks further down are off by at most 2^-16 of the group's largest scale. For NVFP4 a
    group of several blocks is rounded to e4m3.
    """
    scales = packed.block_scale.float().unflatten(1, (-1, group_size // _block(packed)))
    group_scale = scales.amax(-1, keepdim=True) / _LARGEST_RATIO
    ratio = (scales / group_scale).flatten(1)
    values = E2M1.decode(unpack_blocks(packed)) * ratio[..., None]
    return E4M3.round_to(values.flatten(1)), group_scale.squeeze(-1) * packed.tensor_scale


def _block(packed: BlockWeight) -> int:
    return 2 * packed.codes.shape[1] // packed.block_scale.shape[1]
