"""Tiles of the products on Hopper: which program has which of them, and how one ends.

A tile is out^T = weight x^T: BLOCK_N = 128 * BLOCKS outputs and BLOCK_M tokens, each of two
warpgroups with `BLOCKS` times 64 of the outputs. Programs are persistent and go over the tiles in
bands; what would be a last, half-empty round of tiles is shared out evenly along K instead
("stream-K", arXiv 2301.03598): each program leaves a partial sum, and the last to arrive at a tile
adds them up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from .arrivals import ALONE, Sharing
from .launching import Blocks, buffer
from .sizes import cdiv

BAND = gl.constexpr(8)  # blocks of tokens
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7, and before


@gluon.jit
def tile_at(index, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Tiles go down bands of a few blocks of tokens: weights and activations stay in the L2."""
    tiles_n = gl.cdiv(N, BLOCK_N)
    band = index // (BAND * tiles_n)
    height = gl.minimum(gl.cdiv(M, BLOCK_M) - band * BAND, BAND)
    inside = index % (BAND * tiles_n)
    return band * BAND + inside % height, inside // height


@gluon.jit
def count_segments(tiles, whole_tiles, num_groups):
    """How many segments this program has; see segment."""
    programs = gl.num_programs(0)
    rounds = gl.maximum(whole_tiles - gl.program_id(0) + programs - 1, 0) // programs
    shared = (tiles - whole_tiles) * num_groups
    start = gl.program_id(0) * shared // programs
    stop = (gl.program_id(0) + 1) * shared // programs
    parts = (stop + num_groups - 1) // num_groups - start // num_groups
    return rounds, rounds + (parts if stop > start else 0)


@gluon.jit
def segment(number, rounds, tiles, whole_tiles, num_groups):
    """The tile of this program's segment, and which of the tile's groups, from first to end.

    A program takes every so many-th of the whole tiles. The groups of all other tiles, one tile
    after the other, are cut into as many ranges as there are programs, and a range at tiles' ends.
    """
    programs = gl.num_programs(0)
    shared = (tiles - whole_tiles) * num_groups
    start = gl.program_id(0) * shared // programs
    stop = (gl.program_id(0) + 1) * shared // programs
    if number < rounds:
        tile = gl.program_id(0) + number * programs
        first = 0
        end = num_groups
    else:
        nth = start // num_groups + number - rounds
        tile = whole_tiles + nth
        first = gl.maximum(start - nth * num_groups, 0)
        end = gl.minimum(stop - nth * num_groups, num_groups)
    return tile, first, end


@gluon.jit
def _owner(step, shared):
    """The program in whose range a step of the shared tiles lies."""
    return ((step + 1) * gl.num_programs(0) - 1) // shared


@gluon.jit
def _gather_parts(
    acc, partial_ptr, arrivals_ptr, shared_tile, first, end, num_groups, shared_tiles,
    BLOCK: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """Leaves the sum of a part of a tile's groups; whether all are there, and then their sum.

    Of the 64 outputs that are the tile's BLOCK-th of BLOCKS.
    """
    SIZE: gl.constexpr = acc.shape[0] * acc.shape[1]
    rows = gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, acc.type.layout))
    columns = gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, acc.type.layout))
    parts = partial_ptr + BLOCK * SIZE + rows[:, None] * acc.shape[1] + columns[None, :]
    # a program has two parts at most: one that begins with its tile, and one that does not
    slot = 2 * gl.program_id(0) + (1 if first == 0 else 0)
    gl.store(parts + slot * (BLOCKS * SIZE), acc)
    _barrier()  # all threads' stores come before this warpgroup's arrival
    arrival = arrivals_ptr + BLOCKS * shared_tile + BLOCK
    arrived = gl.atomic_add(arrival, end - first, sem="acq_rel")
    complete = arrived + end - first == num_groups
    if complete:
        shared = shared_tiles * num_groups
        owner = _owner(shared_tile * num_groups, shared)
        last = _owner((shared_tile + 1) * num_groups - 1, shared)
        acc = gl.load(parts + (2 * owner + 1) * (BLOCKS * SIZE), cache_modifier=".cg")
        for other in range(owner + 1, last + 1):  # in order: the same bits every time
            acc += gl.load(parts + 2 * other * (BLOCKS * SIZE), cache_modifier=".cg")
        gl.store(arrival, 0)  # for the next launch
    return acc, complete


@gluon.jit
def _store_rows(
    acc, outputs, m0, n0, M, N, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """Adds bias and residual to 64 outputs from n0 on, and stores them."""
    bias_ptr, residual_ptr, out_ptr, _, _ = outputs
    BLOCK_M: gl.constexpr = acc.shape[1]
    mma: gl.constexpr = acc.type.layout
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    n = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    if HAS_BIAS:
        acc += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    layout: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])  # 16 bytes a thread
    out = gl.convert_layout(acc.to(dtype), layout)
    n = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    m = m0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, layout))
    live = (n < N)[:, None] & (m < M)[None, :]
    at = m.to(gl.int64)[None, :] * N + n[:, None]
    if HAS_RESIDUAL:
        residual = gl.load(residual_ptr + at, mask=live, other=0.0)
        out = (out.to(gl.float32) + residual.to(gl.float32)).to(dtype)
    gl.store(out_ptr + at, out, mask=live)


@gluon.jit
def finish(
    upper, lower, outputs, sizes, tile, first, end, m0, n0, WARPGROUP: gl.constexpr,
    BLOCKS: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """Stores a warpgroup's outputs, from n0 on, once the sums of all groups are there.

    `lower` is read if BLOCKS, of 64 outputs, is 2.
    """
    BLOCK: gl.constexpr = BLOCKS * WARPGROUP
    _finish_block(
        upper, outputs, sizes, tile, first, end, m0, n0, BLOCK, 2 * BLOCKS, HAS_BIAS, HAS_RESIDUAL
    )
    if BLOCKS == 2:
        _finish_block(
            lower, outputs, sizes, tile, first, end, m0, n0 + 64, BLOCK + 1, 2 * BLOCKS, HAS_BIAS,
            HAS_RESIDUAL,
        )  # fmt: skip


@gluon.jit
def _finish_block(
    acc, outputs, sizes, tile, first, end, m0, n0, BLOCK: gl.constexpr, BLOCKS: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """64 outputs from n0 on, the BLOCK-th of their tile's BLOCKS."""
    _, _, _, partial_ptr, arrivals_ptr = outputs
    M, N, num_groups, whole_tiles = sizes
    complete = end - first == num_groups
    if is_shared(acc.shape[1], BLOCKS // 2):
        if not complete:
            tiles = gl.cdiv(M, acc.shape[1]) * gl.cdiv(N, 64 * BLOCKS)
            acc, complete = _gather_parts(
                acc, partial_ptr, arrivals_ptr, tile - whole_tiles, first, end, num_groups,
                tiles - whole_tiles, BLOCK, BLOCKS,
            )  # fmt: skip
    if complete:
        _store_rows(acc, outputs, m0, n0, M, N, HAS_BIAS, HAS_RESIDUAL)


class HopperTiling(NamedTuple):
    """How one launch cuts the product: BLOCK_M tokens by 128 * `blocks` outputs."""

    block_m: int
    blocks: int


def per_tiling(values: Mapping[tuple[int, int], float]) -> dict[HopperTiling, float]:
    return {HopperTiling(*sizes): value for sizes, value in values.items()}


ROLE_REGISTERS = 240  # of a thread that multiplies; one that loads needs no more than 24
_GROUP = 128  # channels
_TILE_US = 3.0  # first loads and last stores
_L2_BYTES = 40e6  # of an H100's 50 MB
_BYTES = 2.3e6  # of its memory, a microsecond


def best_tiling(
    M: int, N: int, steps: int, step_us: Mapping[HopperTiling, float], multiprocessors: int
) -> tuple[HopperTiling, float]:
    """The fastest one by a simple model, and the microseconds that it should take.

    steps: of a tile, each taking `step_us`, whose keys are the tilings.
    """

    def cost(tiling: HopperTiling) -> float:
        tiles = _tiles(M, N, tiling)
        tile_us = steps * step_us[tiling] + _TILE_US
        whole = whole_tiles(M, N, steps, tiling, step_us[tiling], multiprocessors)
        if whole == tiles:
            rounds = cdiv(tiles, multiprocessors)
            return rounds * tile_us
        return tiles / multiprocessors * tile_us + _share_us(tiling)

    best = min(step_us, key=cost)
    return best, cost(best)


def _tiles(M: int, N: int, tiling: HopperTiling) -> int:
    return cdiv(M, tiling.block_m) * cdiv(N, 128 * tiling.blocks)


def whole_tiles(
    M: int, N: int, num_groups: int, tiling: HopperTiling, step_us: float, multiprocessors: int
) -> int:
    """How many tiles are computed by one program each; the programs share out the others.

    Those of the last two rounds, one of them half-empty, if that saves more than it costs; never
    the largest tiles, whose partial sums would be so as well.
    """
    tiles = _tiles(M, N, tiling)
    rounds, rest = divmod(tiles, multiprocessors)
    whole = max(rounds - 1, 0) * multiprocessors
    if rest == 0 or not is_shared(*tiling):
        return tiles
    all_us = (tiles - whole) / multiprocessors * num_groups * step_us
    if _read_again_us(M, tiles - whole, num_groups, tiling) > all_us:
        return tiles
    idle = (1 - rest / multiprocessors) * num_groups * step_us
    return tiles if idle < _share_us(tiling) else whole


@constexpr_function
def is_shared(block_m, blocks):
    """Whether tiles of this size may be shared by programs."""
    return block_m * blocks <= 128


def _read_again_us(M: int, shared_tiles: int, num_groups: int, tiling: HopperTiling) -> float:
    """How long it takes to read from memory what shared tiles read more than once.

    Programs that share tiles are each at other channels, so that one finds in the L2 what another
    has read only if all of it stays there: W6A8 took 565 us instead of 513 on 8192 x 28672 and 1024
    tokens (an H200).
    """
    with_one_weight: int = min(cdiv(M, tiling.block_m), BAND.value)
    rows = shared_tiles / with_one_weight * 128 * tiling.blocks
    size = num_groups * _GROUP * (rows / 2 + with_one_weight * tiling.block_m)
    return 0.0 if with_one_weight == 1 or size <= _L2_BYTES else with_one_weight * size / _BYTES


def _share_us(tiling: HopperTiling) -> float:
    """What partial sums of tiles take, measured on an H100."""
    return 2 + 0.1 * tiling.block_m * tiling.blocks


def share_out(
    M: int, N: int, num_groups: int, tiling: HopperTiling, step_us: float, multiprocessors: int
) -> tuple[int, int, Sharing]:
    """How many programs are launched, how many tiles are one program's alone, and how the others
    are shared."""
    tiles = _tiles(M, N, tiling)
    whole = whole_tiles(M, N, num_groups, tiling, step_us, multiprocessors)
    if whole == tiles:
        return min(tiles, multiprocessors), whole, ALONE
    programs = min(multiprocessors, (tiles - whole) * num_groups)
    blocks = 2 * tiling.blocks
    partial = buffer(2 * programs, 64 * blocks, tiling.block_m, dtype=torch.float32)
    return programs, whole, Sharing(partial, blocks * (tiles - whole))


def blocks_of_rows(plane: Sequence[int], rows_per_group: int, rows: int) -> Blocks:
    """Blocks of whole rows of a plane (G, N, bytes) of a packed weight, which may be rows of a
    larger one: all groups' rows are one matrix, those between two groups' own included."""
    num_groups, N, width = plane
    all_rows = (num_groups - 1) * rows_per_group + N
    return blocks_of_bytes((all_rows, width), rows, width)


def blocks_of_bytes(
    shape: tuple[int, int], rows: int, columns: int, dtype: torch.dtype = torch.int8
) -> Blocks:
    """Blocks of (rows, columns) bytes, swizzled as wgmma and ldmatrix want them."""
    swizzle = columns if columns >= 32 else 0  # the least that there is
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8, rank=2)
    return Blocks(shape, dtype, (rows, columns), layout)
