"""`atom::rotate`: turns the channels of each group into one another, so that none stands out.

    turned[b * n + i] = sum_j H[i, j] * sign[j] * x[b * n + j] / sqrt(n)        n = block

H is Sylvester's Hadamard matrix: H[i, j] is -1 where i & j has an odd number of bits, else 1. An
orthogonal transform, so that a weight whose columns went through it gives the same products, and a
group's largest value comes close to three times its root mean square whatever the channels were:
INT4 then loses least. The outlier channels, behind the groups, are turned among themselves: a few
of them are far larger than the rest, which their common scale would leave few codes. Sources:
QuaRot (arXiv 2404.00456), section 3; block-wise, as in DuQuant (arXiv 2406.01721).

The signs are those of the Rudin-Shapiro sequence, the flattest against H that a formula gives:
without them what all channels of a block share, such as the mean of a ReLU, would land in one.
`inverse` turns back: H first, the signs last.

Everything is float32, in one order of additions: log2(n) times sums and differences of pairs, with
distances 1, 2, 4, ... The reference and the kernels agree to the last bit.

A plain operator: passes fuse it into the quantize that follows. `rotate_heads` is the same for the
keys and values of a cache.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Buffer, Launch, as_rows, buffer, plan
from .library import define
from .packing import GroupLayout
from .sizes import cdiv, next_power_of_2


def rotate_blocks(x: Tensor, inverse: bool = False) -> Tensor:
    """float32 (*, n) -> (*, n), n a power of two: signs, then the Hadamard matrix over sqrt(n)."""
    n = x.shape[-1]
    signs = _signs(n, x.device)
    if not inverse:
        x = x * signs
    distance = 1
    while distance < n:
        a, b = x.unflatten(-1, (-1, 2, distance)).unbind(-2)
        x = torch.stack([a + b, a - b], dim=-2).flatten(-3)
        distance *= 2
    x = x * n**-0.5
    return x * signs if inverse else x


def _signs(n: int, device: torch.device) -> Tensor:
    """float32 (n,): -1 where an odd number of pairs of neighbouring bits of the index are set."""
    index = torch.arange(n, device=device)
    odd = index & (index >> 1)
    for distance in (8, 4, 2, 1):
        odd = odd ^ (odd >> distance)
    return (1 - 2 * (odd & 1)).float()


def reference(
    x: Tensor, group_size: int, outlier_channels: int, block: int, inverse: bool = False
) -> Tensor:
    """x (*, K), in order -> (*, padded_width) float32, `block` channels at a time.

    padded_width: see packing.py; a ragged last group is padded with zeros before it is turned.
    `block`: a power of two up to 1024 that divides `group_size`; of the outliers, see
    `outlier_block`.
    """
    groups, outliers = GroupLayout(x.shape[-1], group_size, outlier_channels).split(x.float())
    turned = rotate_blocks(groups.flatten(-2).unflatten(-1, (-1, block)), inverse).flatten(-2)
    if outlier_channels:
        blocks = outliers.unflatten(-1, (-1, outlier_block(outlier_channels, block)))
        outliers = rotate_blocks(blocks, inverse).flatten(-2)
    return torch.cat([turned, outliers], dim=-1)


def outlier_block(outlier_channels: int, block: int) -> int:
    """How many outlier channels are turned at a time: the largest power of two that divides them.

    At most `block`, and 1 if there are none.
    """
    return min(block, outlier_channels & -outlier_channels) if outlier_channels else 1


def fake(
    x: Tensor, group_size: int, outlier_channels: int, block: int, inverse: bool = False
) -> Tensor:
    layout = GroupLayout(x.shape[-1], group_size, outlier_channels)
    return x.new_empty(*x.shape[:-1], layout.padded_width, dtype=torch.float32)


def rotate_heads(x: Tensor, inverse: bool = False) -> Tensor:
    """x (*, head_dim), turned, in its dtype; the largest power of two in head_dim is the block.

    Keys and queries turned alike give the scores that they gave, and what attention makes of turned
    values turns back.
    """
    head_dim = x.shape[-1]
    turned: Tensor = rotate(x, head_dim, 0, head_dim & -head_dim, inverse)
    return turned.to(x.dtype)


@triton.jit
def rotated(y, ROWS: tl.constexpr, BLOCK: tl.constexpr, INVERSE: tl.constexpr = False):
    """float32 (ROWS * BLOCK,) -> the same, each BLOCK turned; mirrors `rotate_blocks`."""
    index = tl.arange(0, ROWS * BLOCK) % BLOCK
    odd = index & (index >> 1)
    odd = odd ^ (odd >> 8)
    odd = odd ^ (odd >> 4)
    odd = odd ^ (odd >> 2)
    odd = odd ^ (odd >> 1)
    if not INVERSE:
        y = tl.where((odd & 1) == 1, -y, y)
    for bit in tl.static_range(10):
        if (1 << bit) < BLOCK:
            pairs = tl.reshape(y, (ROWS * BLOCK >> (bit + 1), 2, 1 << bit))
            a, b = tl.split(tl.permute(pairs, (0, 2, 1)))
            y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (ROWS * BLOCK,))
    y = y * (BLOCK**-0.5)
    if INVERSE:
        y = tl.where((odd & 1) == 1, -y, y)
    return y


@triton.jit
def rotate_kernel(
    x_ptr,
    out_ptr,
    K,
    x_stride,
    GROUPED: tl.constexpr,
    OUTLIERS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    OUTLIER_ROTATION: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """One token and ROWS blocks of it; the first program turns the outliers too."""
    m = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * ROWS * BLOCK + tl.arange(0, ROWS * BLOCK)
    x_row, out_row = x_ptr + m * x_stride, out_ptr + m * (GROUPED + OUTLIERS)
    y = tl.load(x_row + position, mask=position < K - OUTLIERS, other=0.0).to(tl.float32)
    tl.store(out_row + position, rotated(y, ROWS, BLOCK, INVERSE), mask=position < GROUPED)
    if OUTLIERS > 0:
        if tl.program_id(1) == 0:
            lane = tl.arange(0, LANES)
            live = lane < OUTLIERS
            outliers = tl.load(x_row + K - OUTLIERS + lane, mask=live, other=0.0).to(tl.float32)
            outliers = rotated(outliers, LANES // OUTLIER_ROTATION, OUTLIER_ROTATION, INVERSE)
            tl.store(out_row + GROUPED + lane, outliers, mask=live)


def launch(
    x: Tensor, group_size: int, outlier_channels: int, block: int, inverse: bool = False
) -> Tensor:
    rows, stride = as_rows(x)
    out, launch = _plan(x.shape, stride, group_size, outlier_channels, block, inverse)
    turned = out.beside(x)
    if turned.numel():
        launch(rows, turned)
    return turned


@plan
def _plan(
    shape: torch.Size, stride: int, group_size: int, outlier_channels: int, block: int,
    inverse: bool,
) -> tuple[Buffer, Launch]:  # fmt: skip
    """For x of `shape` (*, K), its rows `stride` apart."""
    layout = GroupLayout(shape[-1], group_size, outlier_channels)
    tile = max(block, min(1024, next_power_of_2(layout.grouped_width)))
    launch = Launch(
        rotate_kernel,
        (math.prod(shape[:-1]), cdiv(layout.grouped_width, tile)),
        (layout.width, stride),
        GROUPED=layout.grouped_width,
        OUTLIERS=outlier_channels,
        ROWS=tile // block,
        BLOCK=block,
        LANES=next_power_of_2(max(outlier_channels, 1)),
        OUTLIER_ROTATION=outlier_block(outlier_channels, block),
        INVERSE=inverse,
        num_warps=4,
    )
    return buffer(*shape[:-1], layout.padded_width, dtype=torch.float32), launch


rotate = define(
    "rotate(Tensor x, int group_size, int outlier_channels, int block, bool inverse=False) "
    "-> Tensor",
    reference,
    fake,
    launch,
    inlined=False,  # of seven nested sums and differences Inductor makes minutes of C++
)
