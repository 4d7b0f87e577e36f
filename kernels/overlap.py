"""Kernels that are there when the one ahead of them ends: programmatic dependent launch, sm_90.

A kernel launched so may begin once every program of the one ahead has launched its dependents, or
has ended, and not a microsecond after that. Before it reads what others write, or writes, it waits
until all that is ahead of it has ended. A token's kernels are so short that this is several percent
of them.

Products do not wait for their weights, of which they fetch the first ones meanwhile: only kernels
that launch no dependents write weights.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def begin():
    """For a short kernel; a longer one launches its dependents later."""
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
def zero_when_ready(step):
    """0, in a step of a loop, once all that is ahead has ended.

    Added to the address of what others write, and to no other: Triton then fetches the weights of a
    loop's first step before it waits, as one that comes before the loop would not let it.
    """
    return tl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.b32 $0, 0; // $1", "=r,r", [step],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.constexpr_function
def _by_one_thread(size):
    fetch = f"@first cp.async.bulk.prefetch.L2.global [$1], {size};"
    first = "mov.u32 $0, %tid.x; setp.eq.u32 first, $0, 0;"
    return f"{{ .reg .pred first; {first} {fetch} }}"


@triton.jit
def fetch_into_l2(address, SIZE: tl.constexpr):
    """SIZE bytes, a multiple of 16, or where they begin between such multiples the ones before."""
    tl.inline_asm_elementwise(
        _by_one_thread(SIZE), "=r,l", [address.to(tl.int64) & -16],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


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
