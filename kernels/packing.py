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

  Both are in two's complement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

TINY = 1e-30  # a scale of a group of zeros: small, but with a finite reciprocal
OUTLIER_BITS = 8


@dataclass(frozen=True)
class GroupLayout:
    """How `width` channels are cut into groups and outliers (see the picture above).

    per_token: a token has one scale for all of its groups, and a weight scales in two levels.
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
    def padded_width(self) -> int:
        return self.grouped_width + self.outlier_channels

    @property
    def num_scales(self) -> int:
        groups = 1 if self.per_token else self.num_groups
        return groups + int(self.outlier_channels > 0)  # SymPy adds no bool

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(*, width) -> groups (*, G, group_size), zero-padded, outliers (*, outlier_channels)."""
        grouped = self.width - self.outlier_channels
        padded = torch.nn.functional.pad(x[..., :grouped], (0, self.grouped_width - grouped))
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


class PackedWeight(NamedTuple):
    """A linear's weight as the operators read it; the module's docstring has shapes and layout."""

    weight: Tensor
    weight_scale: Tensor
    outlier_weight: Tensor
    outlier_scale: Tensor


def pack_weight(weight: Tensor, layout: GroupLayout, bits: int, clip: float) -> PackedWeight:
    """Quantizes a weight `(N, K)`, columns in order, rounding to nearest. `bits`: 2 to 4."""
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


def _round_outliers(outliers: Tensor) -> tuple[Tensor, Tensor]:
    """(N, outlier_channels) -> INT8 codes and (N,) scales, zeros where there are no outliers."""
    if not outliers.shape[1]:
        return outliers.to(torch.int8), outliers.new_zeros(outliers.shape[0], dtype=torch.float32)
    return round_to_codes(outliers, OUTLIER_BITS, 1.0)


Packed = TypeVar("Packed", bound=PackedWeight | TwoLevelWeight)
_LED_BY_GROUPS = ("weight", "weight_scale", "group_scale")  # the other tensors begin with the rows


def select_rows(packed: Packed, rows: Tensor) -> Packed:
    """The packed weight of `weight[rows]`; rows (N',) int64."""
    return type(packed)(
        *(one.index_select(dim, rows) for one, dim in zip(packed, _row_dims(packed), strict=True))
    )


def concatenate_rows(weights: Sequence[Packed]) -> Packed:
    """The packed weight of all the rows, one weight's after the other's."""
    dims = _row_dims(weights[0])
    tensors = zip(dims, *weights, strict=True)
    return type(weights[0])(*(torch.cat(parts, dim) for dim, *parts in tensors))


def narrow_rows(packed: Packed, start: int, count: int) -> Packed:
    """The packed weight of `weight[start : start + count]`, without a copy."""
    dims = _row_dims(packed)
    return type(packed)(
        *(torch.narrow(one, dim, start, count) for one, dim in zip(packed, dims, strict=True))
    )


def empty_rows(packed: Packed, count: int) -> Packed:
    """A packed weight of `count` rows without values, in dtypes, width and place like `packed`."""
    dims = _row_dims(packed)
    return type(packed)(
        *(
            one.new_empty(*one.shape[:dim], count, *one.shape[dim + 1 :])
            for one, dim in zip(packed, dims, strict=True)
        )
    )


def num_rows(packed: PackedWeight | TwoLevelWeight) -> int:
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


def dequantize_weight(packed: PackedWeight | TwoLevelWeight, layout: GroupLayout) -> Tensor:
    """The float32 weight `(N, K)`, in order, that the operators compute with. For inspection."""
    if isinstance(packed, TwoLevelWeight):
        scale = packed.group_scale * packed.row_scale
    else:
        scale = packed.weight_scale.float()
    groups = unpack_int4(packed.weight) * scale[..., None]
    grouped = groups.transpose(0, 1).flatten(1)[:, : layout.width - layout.outlier_channels]
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
