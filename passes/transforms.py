"""What a linear's input goes through before it is quantized: a reorder, a rotation in blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels.packing import GroupLayout
from ..kernels.rotate import rotate


@dataclass(frozen=True, eq=False)
class Transform:
    """x -> rotate(x[order]), for a linear's input and the columns of its weight (N, K) alike.

    A reorder, a rotation in blocks, or both: orthogonal either way, so that the product stays what
    it was, and the inverse that belongs into the weight is the transform of its columns.

    order: (K,) int64. cut: of the K channels in order. rotation: channels per block, 0 for none
    (see rotate.py).
    """

    order: Tensor
    cut: GroupLayout
    rotation: int = 0

    @property
    def layout(self) -> GroupLayout:
        """The cut of the transformed channels."""
        return transformed_layout(self.cut, self.rotation)

    def apply(self, rows: Tensor) -> Tensor:
        """Activations or a weight (*, K) -> (*, layout.width), float32 if there is a rotation."""
        ordered = rows[..., self.order]
        return self._turn(ordered) if self.rotation else ordered

    def undo(self, rows: Tensor) -> Tensor:
        """(*, layout.width) -> (*, K)."""
        if self.rotation:
            grouped = self.cut.width - self.cut.outlier_channels
            turned = self._turn(rows, inverse=True)
            rows = torch.cat([turned[..., :grouped], turned[..., self.cut.grouped_width :]], dim=-1)
        original = torch.empty_like(rows)
        original[..., self.order] = rows
        return original

    def _turn(self, rows: Tensor, inverse: bool = False) -> Tensor:
        cut = self.cut
        turned: Tensor = rotate(
            rows, cut.group_size, cut.outlier_channels, self.rotation, inverse=inverse
        )
        return turned


def transformed_layout(cut: GroupLayout, rotation: int) -> GroupLayout:
    """A turned group has no padding: all of it is used."""
    return replace(cut, width=cut.padded_width if rotation else cut.width)


def deal(ascending: Tensor, cut: GroupLayout, int8_groups: int = 0) -> Tensor:
    """Channels (K,) in ascending order -> the same, dealt out over the groups; the outliers stay.

    What is rotated within a group wants each to hold as many large channels as any other: no group
    then needs a much larger scale than its neighbours, and none wastes its small one. The last
    `int8_groups`, which hold what is loudest, are dealt to by themselves.
    """
    grouped = cut.width - cut.outlier_channels
    narrow = min((cut.num_groups - int8_groups) * cut.group_size, grouped)
    parts = ascending.tensor_split([narrow, grouped])
    return torch.cat([*(_deal(part, cut.group_size) for part in parts[:2]), parts[2]])


def _deal(ascending: Tensor, group_size: int) -> Tensor:
    """There and back, as cards in a draft."""
    place = torch.arange(len(ascending), device=ascending.device)
    group, rank = place // group_size, place % group_size
    in_group = (len(ascending) - group * group_size).clamp(max=group_size)
    # a ragged last group takes its share from all along the order
    turn = (2 * rank + 1).double() / (2 * in_group)
    back = torch.where(rank % 2 == 0, group, -group)
    by_seat = back.argsort(stable=True)
    places = by_seat[turn[by_seat].argsort(stable=True)]
    order = torch.empty_like(ascending)
    order[places] = ascending
    return order
