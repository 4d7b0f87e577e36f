"""The product of `float8_linear` for many tokens on Hopper: `linear_hopper`'s roles, with e4m3.

One warp loads a stage, a group of channels, by TMA alone: codes, and both planes of the weight. Two
warpgroups put their 64 rows into e4m3 in the registers that wgmma reads. wgmma keeps some 14 bits
of a sum, so those of every 512 channels are added up by themselves and then to the float32 ones;
but in tiles of 256 tokens, which leave no registers for that, all are, as by cuBLAS: what bfloat16
outputs are rounded by is more. All scaling is at a tile's end.

Shared memory moves 128 bytes a cycle, and bounds tiles of 128 tokens: at the tensor cores' rate
wgmma would read 64 of activations, and to load a stage and read its weight would take 80. For 256
tokens it is 64 and 55.
"""

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.jit import constexpr_function

from . import hopper_tiles
from .arrivals import Product
from .devices import is_hopper
from .formats import FORMATS
from .hopper_tiles import (
    ROLE_REGISTERS,
    HopperTiling,
    blocks_of_bytes,
    blocks_of_rows,
    count_segments,
    finish,
    per_tiling,
    segment,
    share_out,
    tile_at,
)
from .launching import Launch, buffer, plan
from .weight_values import placing_in_e4m3


@gluon.jit
def _load_weight(inputs, rings, stage, row, CODES_BYTES: gl.constexpr):
    """Begins a stage, which CODES_BYTES of activations are to follow."""
    _, weight_desc, high_bits_desc = inputs
    _, weight_ring, high_bits_ring, full, _ = rings
    ready = full.index(stage)
    ROW_BYTES: gl.constexpr = weight_ring.shape[2] + high_bits_ring.shape[2]
    mbarrier.expect(ready, CODES_BYTES + weight_ring.shape[1] * ROW_BYTES)
    # past the last row TMA reads the next group's rows or zeros, which are not stored
    tma.async_copy_global_to_shared(weight_desc, [row, 0], ready, weight_ring.index(stage))
    tma.async_copy_global_to_shared(high_bits_desc, [row, 0], ready, high_bits_ring.index(stage))


@gluon.jit
def _load(
    inputs, rings, sizes, weight_rows, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: fills the ring with each segment's groups."""
    codes_desc, _, _ = inputs
    codes_ring, _, _, full, empty = rings
    M, N, num_groups, whole_tiles = sizes
    GROUP: gl.constexpr = codes_ring.shape[2]
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    step = 0
    rounds, segments = count_segments(tiles, whole_tiles, num_groups)
    tile, first, end = segment(0, rounds, tiles, whole_tiles, num_groups)
    tile_m, tile_n = tile_at(tile, M, N, BLOCK_M, BLOCK_N)
    early = gl.minimum(end - first, STAGES)
    for stage in range(early):  # before the kernel ahead has ended: overlap.py
        row = (first + stage) * weight_rows + tile_n * BLOCK_N
        _load_weight(inputs, rings, stage, row, BLOCK_M * GROUP)
    gdc_wait()
    for number in range(segments):
        tile, first, end = segment(number, rounds, tiles, whole_tiles, num_groups)
        tile_m, tile_n = tile_at(tile, M, N, BLOCK_M, BLOCK_N)
        for group in range(first, end):
            stage = step % STAGES
            if step >= early:
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                row = group * weight_rows + tile_n * BLOCK_N
                _load_weight(inputs, rings, stage, row, BLOCK_M * GROUP)
            # past the last channel or token zeros
            at = [tile_m * BLOCK_M, group * GROUP]
            tma.async_copy_global_to_shared(
                codes_desc, at, full.index(stage), codes_ring.index(stage)
            )
            step += 1


@gluon.jit
def _operand(
    weight_ring, high_bits_ring, stage, ROW: gl.constexpr, EXPONENT_BITS: gl.constexpr,
    MANTISSA_BITS: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Rows ROW to ROW + 64 of a stage's weight in e4m3, (64, group); see `packing`.

    A byte of `high_bits` is for two bytes of `weight`, P apart: for the second of them it is
    shifted, and then both are read alike. Nothing moves between threads.
    """
    packed = weight_ring.index(stage).slice(ROW, 64, dim=0).load(layout)
    high_bits = high_bits_ring.index(stage).slice(ROW, 64, dim=0).load(layout)
    # what crosses from byte to byte is not read
    shifted = gl.inline_asm_elementwise(
        "shr.u32 $0, $1, 2;", "=r,r", [high_bits], dtype=gl.int8, is_pure=True, pack=4
    )
    both = gl.permute(gl.join(high_bits, shifted), (0, 2, 1))
    both = gl.convert_layout(gl.reshape(both, packed.shape), layout)
    low, high = gl.inline_asm_elementwise(
        placing_in_e4m3(EXPONENT_BITS, MANTISSA_BITS, 0), "=&r,=&r,r,r", [packed, both],
        dtype=(gl.int8, gl.int8), is_pure=True, pack=4,
    )  # fmt: skip
    halves = gl.permute(gl.join(low, high), (0, 2, 1))
    placed = gl.reshape(halves, (packed.shape[0], 2 * packed.shape[1]))
    return gl.convert_layout(placed, layout).to(gl.float8e4nv, bitcast=True)


_AT_ONCE = gl.constexpr(4)  # groups whose sum the tensor cores keep


@constexpr_function
def _sums_all(block_m):
    """Whether tensor cores add up all channels of tiles of so many tokens."""
    return block_m > 128


@gluon.jit
def _sum_groups(
    rings, step, groups, ROW: gl.constexpr, EXPONENT_BITS: gl.constexpr,
    MANTISSA_BITS: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The sum over a segment's groups, (64, BLOCK_M) float32."""
    codes_ring, weight_ring, high_bits_ring, full, empty = rings
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32])
    layout: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    acc = gl.zeros([64, BLOCK_M], gl.float32, layout=mma)
    nothing = gl.zeros([64, BLOCK_M], gl.float32, layout=mma)
    SUMS_ALL: gl.constexpr = _sums_all(BLOCK_M)
    for _ in range(groups % _AT_ONCE):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        weight = _operand(
            weight_ring, high_bits_ring, stage, ROW, EXPONENT_BITS, MANTISSA_BITS, layout
        )
        codes = codes_ring.index(stage).permute((1, 0))
        if SUMS_ALL:
            acc = warpgroup_mma_wait(0, deps=[warpgroup_mma(weight, codes, acc, is_async=True)])
        else:
            sums = warpgroup_mma(weight, codes, nothing, use_acc=False, is_async=True)
            acc += warpgroup_mma_wait(0, deps=[sums])
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    for _ in range(groups // _AT_ONCE):
        sums = acc if SUMS_ALL else nothing
        for part in gl.static_range(_AT_ONCE):
            stage = (step + part) % STAGES
            mbarrier.wait(full.index(stage), ((step + part) // STAGES) & 1)
            weight = _operand(
                weight_ring, high_bits_ring, stage, ROW, EXPONENT_BITS, MANTISSA_BITS, layout
            )
            codes = codes_ring.index(stage).permute((1, 0))
            sums = warpgroup_mma(weight, codes, sums, use_acc=SUMS_ALL or part > 0, is_async=True)
            if part > 0:  # the product before has been read
                sums = warpgroup_mma_wait(1, deps=[sums])
                mbarrier.arrive(empty.index((step + part - 1) % STAGES), count=1)
        sums = warpgroup_mma_wait(0, deps=[sums])
        acc = sums if SUMS_ALL else acc + sums
        step += _AT_ONCE
        mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
    return acc, step


@gluon.jit
def _multiply(
    scales, outputs, rings, sizes, WARPGROUP: gl.constexpr, EXPONENT_BITS: gl.constexpr,
    MANTISSA_BITS: gl.constexpr, GAP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its 64 rows of every segment's tile."""
    scale_ptr, row_scale_ptr = scales
    M, N, num_groups, whole_tiles = sizes
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32])
    ROW: gl.constexpr = 64 * WARPGROUP
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    step = 0
    gdc_wait()
    rounds, segments = count_segments(tiles, whole_tiles, num_groups)
    for number in range(segments):
        tile, first, end = segment(number, rounds, tiles, whole_tiles, num_groups)
        tile_m, tile_n = tile_at(tile, M, N, BLOCK_M, BLOCK_N)
        m0 = tile_m * BLOCK_M
        n0 = tile_n * BLOCK_N + ROW
        acc, step = _sum_groups(
            rings, step, end - first, ROW, EXPONENT_BITS, MANTISSA_BITS, BLOCK_M, STAGES
        )
        n = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
        m = m0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, mma))
        scale = gl.load(scale_ptr + m, mask=m < M, other=0.0)[None, :]
        row_scale = gl.load(row_scale_ptr + n, mask=n < N, other=0.0)[:, None]
        acc = acc * GAP * (row_scale * scale)
        finish(
            acc, acc, outputs, sizes, tile, first, end, m0, n0, WARPGROUP, 1, HAS_BIAS,
            HAS_RESIDUAL,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "whole_tiles"])
def float8_hopper_kernel(
    codes_desc,
    weight_desc,
    high_bits_desc,
    scale_ptr,
    row_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    M,
    N,
    weight_rows,
    num_groups,
    whole_tiles,
    GROUP: gl.constexpr,
    EXPONENT_BITS: gl.constexpr,
    MANTISSA_BITS: gl.constexpr,
    GAP: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    """GAP: what the products' sums of placed codes are to be multiplied by."""
    gdc_launch_dependents()  # overlap.py
    codes_ring = gl.allocate_shared_memory(
        gl.float8e4nv, [STAGES, BLOCK_M, GROUP], codes_desc.layout
    )
    weight_ring = gl.allocate_shared_memory(
        gl.int8, [STAGES, BLOCK_N, GROUP // 2], weight_desc.layout
    )
    high_bits_ring = gl.allocate_shared_memory(
        gl.int8, [STAGES, BLOCK_N, GROUP // 4], high_bits_desc.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    inputs = codes_desc, weight_desc, high_bits_desc
    scales = scale_ptr, row_scale_ptr
    outputs = bias_ptr, residual_ptr, out_ptr, partial_ptr, arrivals_ptr
    rings = codes_ring, weight_ring, high_bits_ring, full, empty
    sizes = M, N, num_groups, whole_tiles
    gl.warp_specialize(
        [
            (_multiply, (
                scales, outputs, rings, sizes, gl.constexpr(0), EXPONENT_BITS, MANTISSA_BITS, GAP,
                BLOCK_M, BLOCK_N, STAGES, HAS_BIAS, HAS_RESIDUAL,
            )),
            (_multiply, (
                scales, outputs, rings, sizes, gl.constexpr(1), EXPONENT_BITS, MANTISSA_BITS, GAP,
                BLOCK_M, BLOCK_N, STAGES, HAS_BIAS, HAS_RESIDUAL,
            )),
            (_load, (inputs, rings, sizes, weight_rows, BLOCK_M, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


PATH = "hopper e4m3"
_BLOCK_N = 128
_STAGES = {16: 8, 32: 8, 64: 8, 128: 6, 256: 5}  # by BLOCK_M, as many as shared memory holds
# microseconds that a tile's step of one group takes, measured on an H200; few tokens' as `linear`'s
STEP_US = per_tiling({(16, 1): 0.25, (32, 1): 0.29, (64, 1): 0.38, (128, 1): 0.52, (256, 1): 0.82})


def fits(device: torch.device, N: int, K: int) -> bool:
    """Whether this kernel can compute a product of these sizes: TMA reads whole 16 bytes."""
    return is_hopper(device) and N % 16 == 0 and K % 16 == 0


def tilings(dtype: torch.dtype) -> list[HopperTiling]:
    """Those for outputs of this dtype."""
    return [one for one in STEP_US if dtype == torch.bfloat16 or not _sums_all(one.block_m)]


def best_tiling(
    M: int, N: int, num_groups: int, dtype: torch.dtype, multiprocessors: int
) -> HopperTiling:
    step_us = {tiling: STEP_US[tiling] for tiling in tilings(dtype)}
    return hopper_tiles.best_tiling(M, N, num_groups, step_us, multiprocessors)[0]


@plan
def plan_product(
    codes_shape: torch.Size,
    weight_shape: torch.Size,
    rows_per_group: int,
    dtype: torch.dtype,
    has_bias: bool,
    has_residual: bool,
    format: str,
    tiling: HopperTiling,
    multiprocessors: int,
) -> Product:
    """Its operands: codes, weight and high_bits; scale and row_scale. dtype: of the output."""
    num_groups, N, half_group = weight_shape
    M, K = math.prod(codes_shape[:-1]), codes_shape[-1]
    block_m, step_us = tiling.block_m, STEP_US[tiling]
    programs, whole, sharing = share_out(M, N, num_groups, tiling, step_us, multiprocessors)
    float_format = FORMATS[format]
    launch = Launch(
        float8_hopper_kernel,
        (programs,),
        (M, N, rows_per_group, num_groups, whole),
        (
            blocks_of_bytes((M, K), block_m, 2 * half_group, torch.float8_e4m3fn),
            blocks_of_rows(weight_shape, rows_per_group, _BLOCK_N),
            blocks_of_rows((num_groups, N, half_group // 2), rows_per_group, _BLOCK_N),
        ),
        GROUP=2 * half_group,
        EXPONENT_BITS=float_format.exponent_bits,
        MANTISSA_BITS=float_format.mantissa_bits,
        GAP=2.0 ** float_format.gap(torch.float8_e4m3fn),
        HAS_BIAS=has_bias,
        HAS_RESIDUAL=has_residual,
        BLOCK_M=block_m,
        BLOCK_N=_BLOCK_N,
        STAGES=_STAGES[block_m],
        REGISTERS=ROLE_REGISTERS,
        num_warps=4,
        launch_pdl=True,
    )
    return Product(buffer(*codes_shape[:-1], N, dtype=dtype), sharing, launch)
