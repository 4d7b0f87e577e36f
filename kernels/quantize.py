"""`atom::quantize`, `atom::reorder_quantize`: dynamic quantization per token and channel group.

    scale[g, m] = absmax over group g of x[m] * clip / (2^(bits-1) - 1)
    codes[m, k] = round(x[m, k] / scale[group of k, m])

The last `outlier_channels` are INT8 with one scale per token and no clip. The last `int8_groups`
groups before them are INT8 without clip too, each with its own scale. Source: Atom (arXiv
2310.19102), section 4; for groups of two precisions COMET (arXiv 2410.12168), section 4. With
`rotation` the channels are turned first, so many at a time: see rotate.py; 0 leaves them as they
are. With `per_token` the groups share one scale, the first, and the outliers have the second, as
`two_level_linear` wants it.

With format "e2m1", of 4 bits, groups that are not INT8 take the values of E2M1, in units of 0.5:

    scale[g, m] = absmax over group g of x[m] * clip / 12
    codes[m, k] = 0, 1, 2, 3, 4, 6, 8, 12 or the negative of one, the nearest to x[m, k] / scale

Every operator that quantizes takes the same numbers, and the format.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import quantize_rows
from .library import define
from .packing import OUTLIER_BITS, GroupLayout, round_to_codes, round_to_e2m1
from .quantize_rows import Numbers
from .rotate import rotate


def reference(
    x: Tensor,
    bits: int,
    group_size: int,
    outlier_channels: int,
    clip: float,
    int8_groups: int = 0,
    rotation: int = 0,
    per_token: bool = False,
    *,
    format: str = "int",
) -> tuple[Tensor, Tensor]:
    """x (*, K), in order -> codes (*, padded_width) int8, scale (num_scales, *) float32."""
    if rotation:
        x = rotate(x, group_size, outlier_channels, rotation)
    layout = GroupLayout(x.shape[-1], group_size, outlier_channels, per_token)
    groups, outliers = layout.split(x)
    if per_token:
        groups, int8_groups = groups.flatten(-2).unsqueeze(-2), 0
    codes, scale = _round_groups(groups, bits, clip, int8_groups, format)
    codes, scale = codes.flatten(-2), scale.movedim(-1, 0)
    if outlier_channels:
        outlier_codes, outlier_scale = round_to_codes(outliers, OUTLIER_BITS, 1.0)
        codes = torch.cat([codes, outlier_codes], dim=-1)
        scale = torch.cat([scale, outlier_scale[None]])
    return codes, scale.contiguous()


def _round_groups(
    groups: Tensor, bits: int, clip: float, int8_groups: int, format: str
) -> tuple[Tensor, Tensor]:
    """groups (*, G, group_size) -> codes of that shape, scale (*, G)."""
    narrow, wide = groups.tensor_split([groups.shape[-2] - int8_groups], dim=-2)
    if format == "int":
        narrow_codes, narrow_scale = round_to_codes(narrow, bits, clip)
    else:
        narrow_codes, narrow_scale = round_to_e2m1(narrow, clip)
    if not int8_groups:
        return narrow_codes, narrow_scale
    wide_codes, wide_scale = round_to_codes(wide, OUTLIER_BITS, 1.0)
    return torch.cat([narrow_codes, wide_codes], -2), torch.cat([narrow_scale, wide_scale], -1)


def fake(x: Tensor, *numbers: Any, format: str = "int") -> tuple[Tensor, Tensor]:
    layout = Numbers(*numbers).layout(x.shape[-1])
    codes = x.new_empty(*x.shape[:-1], layout.padded_width, dtype=torch.int8)
    return codes, x.new_empty(layout.num_scales, *x.shape[:-1], dtype=torch.float32)


def launch(x: Tensor, *numbers: Any, format: str = "int") -> tuple[Tensor, Tensor]:
    return quantize_rows.launch(x, None, numbers, format)


def reorder_reference(
    x: Tensor, order: Tensor, *numbers: Any, format: str = "int"
) -> tuple[Tensor, Tensor]:
    """`quantize(reorder(x, order))` in one pass over memory."""
    return reference(x.index_select(-1, order), *numbers, format=format)


def reorder_fake(
    x: Tensor, order: Tensor, *numbers: Any, format: str = "int"
) -> tuple[Tensor, Tensor]:
    return fake(x, *numbers)


def reorder_launch(
    x: Tensor, order: Tensor | None, *numbers: Any, format: str = "int"
) -> tuple[Tensor, Tensor]:
    return quantize_rows.launch(x, order, numbers, format)


NUMBERS = (
    "int bits, int group_size, int outlier_channels, float clip, int int8_groups=0, "
    "int rotation=0, bool per_token=False, *, str format='int'"
)
quantize = define(f"quantize(Tensor x, {NUMBERS}) -> (Tensor, Tensor)", reference, fake, launch)
reorder_quantize = define(
    f"reorder_quantize(Tensor x, Tensor order, {NUMBERS}) -> (Tensor, Tensor)",
    reorder_reference,
    reorder_fake,
    reorder_launch,
)
