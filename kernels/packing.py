"""The one place that knows how quantized numbers lie in memory, and how they are rounded.

The K channels of a linear's input are first put in *order* (ascending magnitude, outliers last),
then cut:

    channel position   0 ............................ K - outlier_channels .......... K
                       | group 0 | group 1 | ... | group G-1 (ragged: zero-padded) | outliers |
    code               |<----------- bits wide, one scale per group ------------->|  INT8    |

* Activations `(*, K)` become `codes (*, padded_width)` int8 and `scale (num_scales, *)` float32;
  the scales of the groups come first, that of the outliers last. Groups lead, so that a tile of
  tokens reads its scales contiguously. With a scale per token all groups share the first.
* Weights `(N, K)` become `weight (G, N, group_size / 2)` uint8, `weight_scale (G, N)` bfloat16,
  `outlier_weight (N, outlier_channels)` int8 and `outlier_scale (N,)` float32. A block of rows of
  one group is contiguous memory. Some rows of a larger weight (see `narrow_rows`) are a weight too:
  its groups then lie further apart, those of its scales just as far. Two codes share a byte so that
  unpacking needs no interleave:

    byte j of a row of a group:   bits 7..4 = channel j + group_size/2      bits 3..0 = channel j

  Both are in two's complement. `TwoLevelWeight` and `GroupedWeight` keep the codes alike and their
  scales otherwise. A `PackedWeight` may have codes of E2M1 there instead, as `pack_e2m1` has them.
* Weights in a floating-point format of 4 to 6 bits (see formats.py) have the low four bits of their
  codes there, and the others in `high_bits (G, N, group_size * (bits - 4) / 8)` uint8:

    6 bits:   7..6 = channel j + group_size * 3/4   5..4 = j + group_size * 2/4   ...   1..0 = j
    5 bits:   7    = channel j + group_size * 7/8   6    = j + group_size * 6/8   ...   0    = j

  Bytes of `weight` and of `high_bits` meet without moving anything between threads: with P bytes of
  `high_bits` in a row of a group, byte j of `weight` holds two codes whose other bits lie in byte
  j % P, those of the lower code from bit (bits - 4) * (j // P) on, of the upper one 4 bits further.
  A row may have one scale for all groups: `weight_scale` is then (1, N).
* Weights in the formats of blocks (see block_formats.py) are packed by 32 channels, one block of
  MXFP4 or two of NVFP4, the lower codes' before the upper ones'. Their scales stay in their 8 bits:
  `weight_scale` is (blocks, N) uint8, the bytes of float8_e8m0fnu or of float8_e4m3fn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import (
    BLOCK_FORMATS,
    E2M1,
    E4M3,
    FORMATS,
    Float8,
    FloatFormat,
    IntFormat,
    element_format,
)

TINY = 1e-30  # a scale of a group of zeros: small, but with a finite reciprocal
OUTLIER_BITS = 8
LARGEST_E2M1 = round(E2M1.largest / E2M1.least)
FLOAT_CLIPS = tuple(2.0 ** (step / 8) for step in range(-4, 8))
"""The shares of the largest magnitude that are tried as the end of a floating-point grid. One that
ends far past it loses a few codes at most: what changes is where among them the values lie."""
BLOCK_CLIPS = {"mxfp4": (0.75, 1.5, 3.0), "nvfp4": FLOAT_CLIPS}
"""The same for blocks. Of MXFP4 that is the power of two under which the peak becomes 4 to 8, as in
MX 1.0, section 6.3, and the ones below and above."""
BLOCKS_GROUP = 32
"""So many channels of a weight in blocks are packed as one group."""


@dataclass(frozen=True)
class GroupLayout:
    """How `width` channels are cut into groups and outliers (see the picture above).

    per_token: a token has one scale for all of its groups. A weight then scales in two levels, or
        with one scale per row if it is in a floating-point format.
    """

    width: int
    group_size: int
    outlier_channels: int
    per_token: bool = False

    @property
    def num_groups(self) -> int:
        return -(-(self.width - self.outlier_channels) // self.group_size)

    @property
    def grouped_width(self) -> int:
        """Channels in groups, the last group's padding included: where the outliers begin."""
        return self.num_groups * self.group_size

    @property
    def last_group(self) -> int:
        """Channels of the last group, without its padding."""
        return self.width - self.outlier_channels - (self.num_groups - 1) * self.group_size

    @property
    def padded_width(self) -> int:
        return self.grouped_width + self.outlier_channels

    @property
    def num_scales(self) -> int:
        groups = 1 if self.per_token else self.num_groups
        return groups + int(self.outlier_channels > 0)  # SymPy adds no bool

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(*, width) -> groups (*, G, group_size), zero-padded, outliers (*, outlier_channels)."""
        grouped = self.width - self.outlier_channels
        padded = F.pad(x[..., :grouped], (0, self.grouped_width - grouped))
        return padded.unflatten(-1, (self.num_groups, self.group_size)), x[..., grouped:]


def round_to_codes(x: Tensor, bits: int, clip: float, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Symmetric rounding to nearest even over `dim`: int8 codes and the float32 scale.

    scale = absmax * clip / (2^(bits-1) - 1)

    A group that holds a NaN or an Inf gets it as its scale and codes of zero, so that the whole row
    that reads it, and no other, comes out as NaN. Source: Atom (arXiv 2310.19102), section 4.2.
    """
    largest = 2 ** (bits - 1) - 1
    scale = (x.abs().amax(dim, keepdim=True).float() * (clip / largest)).clamp(min=TINY)
    return _codes(x, scale, largest), scale.squeeze(dim)


def _codes(x: Tensor, scale: Tensor, largest: int) -> Tensor:
    # times the reciprocal, not a division, as in the kernels: codes agree to the last bit
    codes = torch.nan_to_num((x.float() * (1.0 / scale)).round(), nan=0.0)
    return codes.clamp(-largest - 1, largest).to(torch.int8)


def round_to_format(
    x: Tensor, format: FloatFormat | Float8, clip: float, dim: int = -1
) -> tuple[Tensor, Tensor]:
    """As `round_to_codes`, to a floating-point format: its codes and the float32 scale."""
    scale = (x.abs().amax(dim, keepdim=True).float() * (clip / format.largest)).clamp(min=TINY)
    return format.round_to(x.float() * (1.0 / scale)), scale.squeeze(dim)


def round_to_e2m1(x: Tensor, clip: float, dim: int = -1) -> tuple[Tensor, Tensor]:
    """As `round_to_codes`, to the values of E2M1 in units of the least: -12 to 12, all integers.

    INT8 tensor cores then add up their products exactly.
    """
    scale = (x.abs().amax(dim, keepdim=True).float() * (clip / LARGEST_E2M1)).clamp(min=TINY)
    values = E2M1.nearest(x.float() * (1.0 / scale) * E2M1.least)
    return (values / E2M1.least).to(torch.int8), scale.squeeze(dim)


class PackedWeight(NamedTuple):
    """A linear's weight as the operators read it; the module's docstring has shapes and layout.

    What a code stands for, itself or in E2M1 its value, times `weight_scale` is the weight.
    """

    weight: Tensor
    weight_scale: Tensor
    outlier_weight: Tensor
    outlier_scale: Tensor


def pack_weight(
    weight: Tensor, layout: GroupLayout, bits: int, clip: float, format: str = "int"
) -> PackedWeight:
    """Quantizes a weight `(N, K)`, columns in order, rounding to nearest.

    bits (2 to 4), clip: of integers. format: "int" or "e2m1", whose clips are searched for.
    """
    if format != "int":
        return four_bit_codes(pack_float_weight(weight, layout, FORMATS[format]))
    groups, outliers = layout.split(weight.float())
    largest = 2 ** (bits - 1) - 1
    scale = groups.abs().amax(-1, keepdim=True) * (clip / largest)
    # rounded first: codes belong to the scale that is stored
    scale = scale.clamp(min=TINY).to(torch.bfloat16)
    codes = _codes(groups, scale.float(), largest)
    return pack_codes(codes, scale.squeeze(-1), *_round_outliers(outliers))


def pack_codes(
    codes: Tensor, scale: Tensor, outliers: Tensor, outlier_scale: Tensor
) -> PackedWeight:
    """codes (N, G, group_size), scale (N, G), outliers (N, outlier_channels), outlier_scale (N,).

    Codes may be of any dtype, but are integers of the range that their storage holds.
    """
    return PackedWeight(
        pack_int4(codes.to(torch.int8).transpose(0, 1)),
        scale.to(torch.bfloat16).t().contiguous(),
        outliers.to(torch.int8).contiguous(),
        outlier_scale.float(),
    )


class TwoLevelWeight(NamedTuple):
    """A weight whose group scales are INT8 numbers of a float32 scale per row.

    weight (G, N, group_size / 2) uint8 as in `PackedWeight`, group_scale (G, N) int8 in 1 to 16,
    row_scale (N,) float32; code * group_scale is an INT8 number. The outliers as in `PackedWeight`.
    Sources: QServe (arXiv 2405.04532), section 4.1; DGQ (arXiv 2310.04836).
    """

    weight: Tensor
    group_scale: Tensor
    row_scale: Tensor
    outlier_weight: Tensor
    outlier_scale: Tensor


LARGEST_GROUP_SCALE = 16  # -8 times it is the least INT8 number there is, -128


def pack_two_level(weight: Tensor, layout: GroupLayout) -> TwoLevelWeight:
    """Quantizes a weight `(N, K)`, columns in order, rounding to nearest, to 4 bits.

    Clipping the row's peak as well takes away 0.7 % of the noise, measured, and weighting channels
    by what they are multiplied by nothing: neither is worth its time.
    """
    groups, outliers = layout.split(weight.float())
    row_scale = two_level_row_scale(groups)
    group_scale = best_group_scales(groups, row_scale)
    codes = _codes(groups, (row_scale[:, None] * group_scale)[..., None], 7)
    return two_level_codes(codes, group_scale, row_scale, *_round_outliers(outliers))


def two_level_row_scale(groups: Tensor) -> Tensor:
    """groups (N, G, group_size) -> (N,): the largest group scale then reaches the row's peak."""
    return groups.abs().amax((1, 2)).clamp(min=TINY) / (7 * LARGEST_GROUP_SCALE)


def best_group_scales(groups: Tensor, row_scale: Tensor) -> Tensor:
    """groups (N, G, group_size), row_scale (N,) -> (N, G): 1 to 16, what leaves the least error."""
    best = torch.ones_like(groups[..., 0])
    least = torch.full_like(best, torch.inf)
    for step in range(1, LARGEST_GROUP_SCALE + 1):
        scale = row_scale[:, None, None] * step
        error = (_codes(groups, scale, 7) * scale - groups).square().sum(-1)
        best = torch.where(error < least, step, best)
        least = torch.minimum(error, least)
    return best


def two_level_codes(
    codes: Tensor, group_scale: Tensor, row_scale: Tensor, outliers: Tensor, outlier_scale: Tensor
) -> TwoLevelWeight:
    """As `pack_codes`: group_scale (N, G) of 1 to 16, row_scale (N,)."""
    weight, _, outlier_weight, outlier_scale = pack_codes(
        codes, group_scale, outliers, outlier_scale
    )
    group_scale = group_scale.to(torch.int8).t().contiguous()
    return TwoLevelWeight(weight, group_scale, row_scale.float(), outlier_weight, outlier_scale)


class FloatWeight(NamedTuple):
    """A weight in a floating-point format; the module's docstring has the layout.

    weight (G, N, group_size / 2) uint8, high_bits (G, N, group_size * (bits - 4) / 8) uint8,
    weight_scale (G, N) or (1, N) bfloat16. The outliers as in `PackedWeight`.
    """

    weight: Tensor
    high_bits: Tensor
    weight_scale: Tensor
    outlier_weight: Tensor
    outlier_scale: Tensor


def pack_float_weight(
    weight: Tensor,
    layout: GroupLayout,
    format: FloatFormat,
    clips: Sequence[float] = FLOAT_CLIPS,
) -> FloatWeight:
    """Quantizes a weight `(N, K)`, columns in order, rounding to nearest.

    clips: of each group, or row, the one with the least squared error is taken.
    """
    groups, outliers = layout.split(weight.float())
    sharing = groups.flatten(1)[:, None] if layout.per_token else groups
    scale = best_scale(sharing, format, clips)
    codes = format.round_to(groups / scale)
    return pack_float_codes(codes, scale.squeeze(-1), *_round_outliers(outliers), format)


def pack_float_codes(
    codes: Tensor, scale: Tensor, outliers: Tensor, outlier_scale: Tensor, format: FloatFormat
) -> FloatWeight:
    """As `pack_codes`: uint8 codes (N, G, group_size), scale (N, G) or (N, 1)."""
    low, high = pack_planes(codes.transpose(0, 1), format.bits)
    return FloatWeight(
        low,
        high,
        scale.to(torch.bfloat16).t().contiguous(),
        outliers.to(torch.int8).contiguous(),
        outlier_scale.float(),
    )


def four_bit_codes(packed: FloatWeight) -> PackedWeight:
    """The same weight, of E2M1, for quantized activations."""
    assert not packed.high_bits.numel()
    weight = pack_e2m1(unpack_planes(packed.weight, None, E2M1.bits))
    return PackedWeight(weight, packed.weight_scale, packed.outlier_weight, packed.outlier_scale)


def to_bfloat16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def best_scale(
    x: Tensor,
    format: FloatFormat | IntFormat,
    clips: Sequence[float],
    importance: Tensor | None = None,
    dim: int = -1,
    round_scale: Callable[[Tensor], Tensor] = to_bfloat16,
) -> Tensor:
    """The scale over `dim`, which stays as 1, that leaves the least squared error: float32.

    It is rounded by `round_scale`, as it is stored, before anything is rounded to it. clips: the
    shares of the largest magnitude that are tried as the end of the grid. importance: what an error
    counts, of a shape that spreads over x.
    """
    peak = x.abs().amax(dim, keepdim=True)
    # of a NaN or an Inf no error is less than infinite: it stays the scale
    best, least = peak, torch.full_like(peak, torch.inf)
    for clip in clips:
        scale = round_scale((peak * (clip / format.largest)).clamp(min=TINY))
        errors = (format.nearest(x / scale) * scale - x).square()
        error = (errors if importance is None else errors * importance).sum(dim, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


class GroupedWeight(NamedTuple):
    """A weight all of whose channels are in groups, for activations of 16 bits.

    weight (G, N, group_size / 2) uint8 as in `PackedWeight`, weight_scale (G, N) of 16 bits. Of
    integers zero_point (G, N) int8: the code of zero, -8 to 8, or None for 0 everywhere. Of a
    floating-point format high_bits as in `FloatWeight`, or None if it has no more than four. Of
    MXFP4 weight_scale (G, N), of NVFP4 (2 G, N) uint8, and for the latter row_scale (N,) float32:
    the scale of the whole tensor, one for each row since several linears may be one weight.

        w = (code - zero_point) * weight_scale        w = value of the code * weight_scale
        w = value of the code * weight_scale * row_scale
    """

    weight: Tensor
    weight_scale: Tensor
    zero_point: Tensor | None = None
    high_bits: Tensor | None = None
    row_scale: Tensor | None = None


def pack_grouped(
    weight: Tensor,
    layout: GroupLayout,
    bits: int,
    clip: float,
    symmetric: bool = True,
    format: str = "int",
    row_scale: Tensor | None = None,
) -> GroupedWeight:
    """Quantizes a weight `(N, K)`, columns in order, rounding to nearest.

    bits (2 to 4), clip, symmetric: of integers. Another format, by its name in `FORMATS` or
    `BLOCK_FORMATS`, has its own bits, and its clips are searched for. row_scale: what `row_scales`
    gives, if these are rows of a larger weight.
    """
    if format in BLOCK_FORMATS:
        return _pack_blocks(weight, layout, format, row_scale)
    if format != "int":
        return without_outliers(pack_float_weight(weight, layout, FORMATS[format]))
    if symmetric:
        packed = pack_weight(weight, layout, bits, clip)
        return GroupedWeight(packed.weight, packed.weight_scale)
    groups, _ = layout.split(weight.float())
    scale, zero_point = affine_grid(groups, bits, clip)
    codes = affine_codes(groups, scale[..., None], zero_point[..., None], bits)
    # padding has codes of 0 like everywhere, not those of zero weights
    codes, _ = layout.split(codes.flatten(1)[:, : layout.width])
    return grouped_codes(codes, scale, zero_point)


def affine_grid(groups: Tensor, bits: int, clip: float, dim: int = -1) -> tuple[Tensor, Tensor]:
    """The grid from a group's least to its largest weight, both times `clip`, that holds 0.

    Returns scale, float32 but rounded to bfloat16, and zero_point as floats; both lack `dim`.
    """
    lowest, codes = -(2 ** (bits - 1)), 2**bits - 1
    least, largest = groups.amin(dim).clamp(max=0.0), groups.amax(dim).clamp(min=0.0)
    scale = ((largest - least) * (clip / codes)).clamp(min=TINY).to(torch.bfloat16).float()
    zero_point = (lowest - clip * least / scale).round().clamp(lowest, lowest + codes)
    return scale, zero_point


def affine_codes(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Codes as floating-point integers, of the shape that the arguments broadcast to."""
    lowest = -(2 ** (bits - 1))
    return (x / scale + zero_point).round().clamp(lowest, -lowest - 1)


def grouped_codes(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> GroupedWeight:
    """codes (N, G, group_size), scale (N, G) of 16 bits or to be rounded to bfloat16, zero_point
    (N, G); codes and zero points of any dtype."""
    scale = scale if scale.dtype.itemsize == 2 else scale.to(torch.bfloat16)
    return GroupedWeight(
        pack_int4(codes.to(torch.int8).transpose(0, 1)),
        scale.t().contiguous(),
        None if zero_point is None else zero_point.to(torch.int8).t().contiguous(),
    )


def without_outliers(packed: FloatWeight) -> GroupedWeight:
    """The same weight, which has no outliers and a scale per group."""
    high_bits = packed.high_bits if packed.high_bits.numel() else None
    return GroupedWeight(packed.weight, packed.weight_scale, None, high_bits)


class RowWeight(NamedTuple):
    """A weight of 6 bits in floating point with one scale per row, for activations in e4m3.

    weight (G, N, group_size / 2) and high_bits (G, N, group_size / 4) uint8 as in `FloatWeight`,
    row_scale (N,) float32. Its groups only say where the codes lie.
    """

    weight: Tensor
    high_bits: Tensor
    row_scale: Tensor


def pack_rows(weight: Tensor, layout: GroupLayout, format: str) -> RowWeight:
    """Quantizes a weight `(N, K)`, rounding to nearest; layout.per_token, format of 6 bits."""
    return with_row_scale(pack_float_weight(weight, layout, FORMATS[format]))


def with_row_scale(packed: FloatWeight) -> RowWeight:
    """The same weight, which has no outliers and a scale per row."""
    return RowWeight(packed.weight, packed.high_bits, packed.weight_scale[0].float())


def row_scales(weights: Sequence[Tensor], format: str) -> Tensor | None:
    """The tensor's scale of each weight (N, K) for all of its rows: (sum of N,) float32.

    It puts the largest block's scale at e4m3's largest. None for formats that have none.
    """
    if format not in BLOCK_FORMATS or not BLOCK_FORMATS[format].tensor_scale:
        return None
    return torch.cat([tensor_scale(weight).expand(len(weight)) for weight in weights])


def tensor_scale(weight: Tensor) -> Tensor:
    """() float32, of NVFP4. What is not finite is left out: it spoils its own block alone."""
    peak = torch.nan_to_num(weight.abs(), 0.0, 0.0, 0.0).amax().float()
    return (peak / (E2M1.largest * E4M3.largest)).clamp(min=TINY)


def _pack_blocks(
    weight: Tensor, layout: GroupLayout, format: str, row_scale: Tensor | None
) -> GroupedWeight:
    block = BLOCK_FORMATS[format]
    weight = weight.float()
    if row_scale is None:
        row_scale = row_scales([weight], format)
    if row_scale is not None:
        weight = weight / row_scale[:, None]
    blocks = layout.split(weight)[0].flatten(1).unflatten(1, (-1, block.size))
    scale = best_scale(blocks, E2M1, BLOCK_CLIPS[format], round_scale=block.scale.nearest)
    return block_codes(E2M1.round_to(blocks / scale), scale.squeeze(-1), row_scale, format)


def block_codes(
    codes: Tensor, scale: Tensor, row_scale: Tensor | None, format: str
) -> GroupedWeight:
    """uint8 codes (N, blocks, size), scale (N, blocks) exact in the format's 8 bits, or not finite.

    The last group's missing block is added.
    """
    block = BLOCK_FORMATS[format]
    missing = -scale.shape[1] % (BLOCKS_GROUP // block.size)
    groups = F.pad(codes, (0, 0, 0, missing)).flatten(1).unflatten(1, (-1, BLOCKS_GROUP))
    scale = F.pad(torch.where(scale.isfinite(), scale, torch.nan), (0, missing))
    scale = scale.t().contiguous().to(block.scale.dtype).view(torch.uint8)
    return GroupedWeight(pack_planes(groups.transpose(0, 1), 4)[0], scale, row_scale=row_scale)


def high_bytes(group_size: int, format: str) -> int:
    """How many bytes of `high_bits` a row of a group has."""
    return 0 if format == "int" else group_size * (element_format(format).bits - 4) // 8


def _round_outliers(outliers: Tensor) -> tuple[Tensor, Tensor]:
    """(N, outlier_channels) -> INT8 codes and (N,) scales, zeros where there are no outliers."""
    if not outliers.shape[1]:
        return outliers.to(torch.int8), outliers.new_zeros(outliers.shape[0], dtype=torch.float32)
    return round_to_codes(outliers, OUTLIER_BITS, 1.0)


AnyWeight = PackedWeight | TwoLevelWeight | GroupedWeight | RowWeight
Packed = TypeVar("Packed", bound=AnyWeight | FloatWeight)
# the other tensors begin with the rows
_LED_BY_GROUPS = ("weight", "high_bits", "weight_scale", "group_scale", "zero_point")


def select_rows(packed: Packed, rows: Tensor) -> Packed:
    """The packed weight of `weight[rows]`; rows (N',) int64."""
    selected: Any = (
        None if one is None else one.index_select(dim, rows)
        for one, dim in zip(packed, _row_dims(packed), strict=True)
    )
    return type(packed)(*selected)


def to_device(packed: Packed, device: torch.device | str) -> Packed:
    moved: Any = (None if one is None else one.to(device) for one in packed)
    return type(packed)(*moved)


def concatenate_rows(weights: Sequence[Packed]) -> Packed:
    """The packed weight of all the rows, one weight's after the other's."""
    tensors = zip(_row_dims(weights[0]), *weights, strict=True)
    joined: Any = (None if parts[0] is None else torch.cat(parts, dim) for dim, *parts in tensors)
    return type(weights[0])(*joined)


def narrow_rows(packed: Packed, start: int, count: int) -> Packed:
    """The packed weight of `weight[start : start + count]`, without a copy."""
    narrowed: Any = (
        None if one is None else torch.narrow(one, dim, start, count)
        for one, dim in zip(packed, _row_dims(packed), strict=True)
    )
    return type(packed)(*narrowed)


def empty_rows(packed: Packed, count: int) -> Packed:
    """A packed weight of `count` rows without values, in dtypes, width and place like `packed`."""
    empty: Any = (
        None if one is None else one.new_empty(*one.shape[:dim], count, *one.shape[dim + 1 :])
        for one, dim in zip(packed, _row_dims(packed), strict=True)
    )
    return type(packed)(*empty)


def num_rows(packed: AnyWeight | FloatWeight) -> int:
    """N."""
    return packed[0].shape[_row_dims(packed)[0]]


def rows_per_group(weight: Tensor) -> int:
    """How many rows after its beginning the next group of a packed `weight` begins."""
    return weight.stride(0) // weight.shape[2]


def _row_dims(packed: Packed) -> list[int]:
    return [int(field in _LED_BY_GROUPS) for field in packed._fields]


def pack_int4(codes: Tensor) -> Tensor:
    """int8 codes in -8..7, (*, group_size) -> uint8 (*, group_size / 2)."""
    low, high = codes.chunk(2, dim=-1)
    return ((low & 0xF) | (high << 4)).contiguous().view(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 (*, group_size / 2) -> int8 codes in -8..7, (*, group_size)."""
    signed = packed.view(torch.int8)
    return torch.cat([(signed << 4) >> 4, signed >> 4], dim=-1)


def pack_e2m1(codes: Tensor) -> Tensor:
    """uint8 codes of E2M1, (*, group_size) -> uint8 (*, group_size / 2), for INT8 products.

    The mantissa's bit comes first, and there is no negative zero:

        s e e m  ->  m s e e

    Codes that differ in their first bit alone then have the same sign: that is what lets a GPU look
    four of them up at once (see e2m1.py).
    """
    codes = torch.where(codes == 1 << (E2M1.bits - 1), 0, codes)
    return pack_bits((codes & 1) << 3 | codes >> 1, E2M1.bits)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """The inverse of `pack_e2m1`."""
    nibbles = unpack_bits(packed, E2M1.bits)
    return (nibbles << 1 | nibbles >> 3) & 0xF


def pack_planes(codes: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """uint8 codes (*, group_size) -> the low four bits and the rest, as `FloatWeight` has them."""
    return pack_bits(codes & 0xF, 4), pack_bits(codes >> 4, bits - 4)


def unpack_planes(low: Tensor, high: Tensor | None, bits: int) -> Tensor:
    """The inverse of `pack_planes`. high: may be None if bits is 4."""
    codes = unpack_bits(low, 4)
    return codes if high is None or bits == 4 else codes | unpack_bits(high, bits - 4) << 4


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes below 2^bits, (*, width) -> uint8 (*, width * bits / 8).

    Neighbours in a byte are width * bits / 8 channels apart.
    """
    packed = codes.new_zeros(*codes.shape[:-1], codes.shape[-1] * bits // 8)
    if not bits:
        return packed
    for part, shift in zip(codes.chunk(8 // bits, dim=-1), range(0, 8, bits), strict=True):
        packed |= part << shift
    return packed


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_bits`."""
    mask = 2**bits - 1
    return torch.cat([packed >> shift & mask for shift in range(0, 8, bits)], dim=-1)


def dequantize_weight(packed: AnyWeight, layout: GroupLayout, format: str = "int") -> Tensor:
    """The float32 weight `(N, K)`, in order, that the operators compute with. For inspection.

    format: a `GroupedWeight` may have another one, a `PackedWeight` "e2m1", a `RowWeight` must.
    """
    if format == "int":
        codes = unpack_int4(packed.weight).float()
    elif isinstance(packed, PackedWeight):
        codes = E2M1.decode(unpack_e2m1(packed.weight))
    else:
        assert isinstance(packed, GroupedWeight | RowWeight)
        codes = _decode(packed, element_format(format))
        if format in BLOCK_FORMATS:
            assert isinstance(packed, GroupedWeight)
            return _in_order(_scale_blocks(codes, packed, format), packed, layout)
    if isinstance(packed, TwoLevelWeight):
        scale = packed.group_scale * packed.row_scale
    elif isinstance(packed, RowWeight):
        scale = packed.row_scale
    else:
        scale = packed.weight_scale.float()
    if isinstance(packed, GroupedWeight) and packed.zero_point is not None:
        codes = codes - packed.zero_point[..., None]
    return _in_order(codes * scale[..., None], packed, layout)


def _scale_blocks(values: Tensor, packed: GroupedWeight, format: str) -> Tensor:
    """values (G, N, group_size) of the codes."""
    block = BLOCK_FORMATS[format]
    scale = packed.weight_scale.view(block.scale.dtype).float()
    if packed.row_scale is not None:
        scale = scale * packed.row_scale
    scale_GNB = scale.unflatten(0, (len(values), -1)).transpose(1, 2)
    blocks: Tensor = values.unflatten(-1, (-1, block.size)) * scale_GNB[..., None]
    return blocks.flatten(-2)


def dequantize_float_weight(
    packed: FloatWeight, layout: GroupLayout, format: FloatFormat
) -> Tensor:
    """As `dequantize_weight`; the planes do not tell the format."""
    groups = _decode(packed, format) * packed.weight_scale.float()[..., None]
    return _in_order(groups, packed, layout)


def _decode(packed: FloatWeight | GroupedWeight | RowWeight, format: FloatFormat) -> Tensor:
    """The float32 values (G, N, group_size)."""
    return format.decode(unpack_planes(packed.weight, packed.high_bits, format.bits))


def _in_order(groups: Tensor, packed: AnyWeight | FloatWeight, layout: GroupLayout) -> Tensor:
    """groups (G, N, group_size) and the outliers -> (N, K)."""
    grouped = groups.transpose(0, 1).flatten(1)[:, : layout.width - layout.outlier_channels]
    if isinstance(packed, GroupedWeight | RowWeight):
        return grouped
    return torch.cat([grouped, packed.outlier_weight * packed.outlier_scale[:, None]], dim=1)


def dequantize(codes: Tensor, scale: Tensor, layout: GroupLayout) -> Tensor:
    """The float32 activations `(*, K)`, in order, that `codes` stand for. For inspection."""
    sizes = [layout.group_size] * layout.num_groups
    if layout.per_token:
        sizes = [layout.grouped_width]
    if layout.outlier_channels:
        sizes = [*sizes, layout.outlier_channels]
    spread = scale.movedim(0, -1).repeat_interleave(
        torch.tensor(sizes, device=scale.device), dim=-1
    )
    x = codes * spread
    grouped = layout.width - layout.outlier_channels
    return torch.cat([x[..., :grouped], x[..., layout.grouped_width :]], dim=-1)
