"""Kernels that are there when the one ahead of them ends: programmatic dependent launch, sm_90.

A kernel launched so may begin once every program of the one ahead has launched its dependents, or
has ended, and not a microsecond after that. Before it reads what others write, or writes, it waits
until all that is ahead of it has ended. A token's kernels are so short that this is several percent
of them. Fetching weights into the L2 while it waits was tried, and loses all of it again.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin():
    """For a short kernel; a longer one launches its dependents later."""
    gdc_wait()
    gdc_launch_dependents()


@functools.cache
def overlaps(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def overlap(device: torch.device, block_m: int = 0) -> dict[str, Any]:
    """What a launch of a kernel that waits is given. block_m: of a product's tiles.

    Tiles of more than 16 tokens do not overlap: what then comes early goes where there is room, not
    evenly over the device, and W4A16 products with K split took up to a fifth longer for 64 tokens.
    Hopper's own kernels, whose programs have a multiprocessor each, always do, and take 0.7 to 1.2
    us less on an H100.
    """
    return dict.fromkeys(("OVERLAP", "launch_pdl"), block_m <= 16 and overlaps(device))
