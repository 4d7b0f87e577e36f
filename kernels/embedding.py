"""`atom::embedding`: looks rows up in a packed INT4 table.

out[i, k] = scale[g, ids[i]] * table[ids[i], k]        g the group of channel k
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import define
from .packing import unpack_int4


def reference(
    ids: Tensor, weight: Tensor, weight_scale: Tensor, width: int, dtype: torch.dtype
) -> Tensor:
    """ids (*,) integers, the table as packed by packing.py without outliers -> (*, width)."""
    flat = ids.reshape(-1)
    groups = unpack_int4(weight[:, flat]) * weight_scale[:, flat, None].float()
    rows = groups.transpose(0, 1).flatten(1)[:, :width]
    return rows.to(dtype).reshape(*ids.shape, width)


def fake(
    ids: Tensor, weight: Tensor, weight_scale: Tensor, width: int, dtype: torch.dtype
) -> Tensor:
    return weight.new_empty(*ids.shape, width, dtype=dtype)


embedding = define(
    "embedding(Tensor ids, Tensor weight, Tensor weight_scale, int width, ScalarType dtype) "
    "-> Tensor",
    reference,
    fake,
    cuda=reference,
)
