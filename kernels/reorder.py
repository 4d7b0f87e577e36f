"""`atom::reorder`: puts an activation's channels into the order of its linear's packed weight.

A plain operator: passes fold it into a neighbour's weight or fuse it into the quantize that
follows, so that no gather runs on its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import define


def reference(x: Tensor, order: Tensor) -> Tensor:
    """x (*, K), order (K,) int32: channel `order[i]` of `x` becomes channel `i`."""
    return x.index_select(-1, order)


def fake(x: Tensor, order: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


reorder = define("reorder(Tensor x, Tensor order) -> Tensor", reference, fake, cuda=reference)
