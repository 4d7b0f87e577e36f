"""The product of `weight_only_linear` on Hopper: TMA, wgmma, warp roles.

As linear_hopper.py, whose roles these are, with 16-bit activations beside the packed weight in a
ring's stage: two warpgroups turn their rows of the weight into the 16-bit registers that wgmma
reads while one warp loads ahead.

Codes are exact in 16 bits, and a group's sum is scaled (SCALED_WEIGHT false), which takes registers
of its own. The largest tile has none left: there each weight is scaled before the product and
rounded to 16 bits, as dequantizing does, and all groups are added up by the tensor cores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
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
from .formats import BLOCK_FORMATS
from .hopper_tiles import (
    ROLE_REGISTERS,
    HopperTiling,
    blocks_of_rows,
    count_segments,
    finish,
    per_tiling,
    segment,
    share_out,
    tile_at,
)
from .launching import Blocks, Launch, buffer, plan
from .packing import rows_per_group
from .weight_values import (
    num_parts,
    placing,
    power_left,
    power_of_gap,
    registers,
    registers_of_planes,
    twice,
    unpacking,
)

# a scale times all of 2^gap might be too large for bfloat16
_PART_OF_GAP = gl.constexpr(2.0**100)


@gluon.jit
def _load_weight(
    inputs, rings, stage, group, n0, N, weight_rows, X_BYTES: gl.constexpr,
    HAS_HIGH_BITS: gl.constexpr, HAS_ZERO_POINT: gl.constexpr,
):  # fmt: skip
    """Begins a stage, which X_BYTES of activations are to follow."""
    _, weight_desc, high_bits_desc, weight_scale_ptr, zero_point_ptr = inputs
    _, weight_ring, high_bits_ring, scale_ring, zero_point_ring, full, _ = rings
    BLOCK_N: gl.constexpr = weight_ring.shape[1]
    HIGH_BYTES: gl.constexpr = high_bits_ring.shape[2] if HAS_HIGH_BITS else 0
    ready = full.index(stage)
    row = group * weight_rows + n0
    mbarrier.expect(ready, X_BYTES + BLOCK_N * (weight_ring.shape[2] + HIGH_BYTES))
    # past the last row TMA reads the next group's rows or zeros: neither is stored
    tma.async_copy_global_to_shared(weight_desc, [row, 0], ready, weight_ring.index(stage))
    if HAS_HIGH_BITS:
        tma.async_copy_global_to_shared(
            high_bits_desc, [row, 0], ready, high_bits_ring.index(stage)
        )
    # cp.async moves at least 4 bytes
    SCALES: gl.constexpr = 32 // weight_scale_ptr.dtype.element_ty.primitive_bitwidth
    scales_layout: gl.constexpr = gl.BlockedLayout([SCALES], [32], [1], [0])
    zero_points_layout: gl.constexpr = gl.BlockedLayout([4], [32], [1], [0])
    n = n0 + gl.arange(0, BLOCK_N, layout=scales_layout)
    scales = gl.cast(group, gl.int64) * weight_rows
    async_copy.async_copy_global_to_shared(
        scale_ring.index(stage), weight_scale_ptr + scales + n, mask=n < N
    )
    if HAS_ZERO_POINT:
        n = n0 + gl.arange(0, BLOCK_N, layout=zero_points_layout)
        async_copy.async_copy_global_to_shared(
            zero_point_ring.index(stage), zero_point_ptr + scales + n, mask=n < N
        )


@gluon.jit
def _load(
    inputs, rings, sizes, weight_rows, HAS_HIGH_BITS: gl.constexpr, HAS_ZERO_POINT: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: fills the ring with each segment's groups."""
    x_desc, _, _, _, _ = inputs
    x_ring, _, _, _, _, full, empty = rings
    M, N, num_groups, whole_tiles = sizes
    GROUP: gl.constexpr = x_ring.shape[2]
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    step = 0
    rounds, segments = count_segments(tiles, whole_tiles, num_groups)
    tile, first, end = segment(0, rounds, tiles, whole_tiles, num_groups)
    tile_m, tile_n = tile_at(tile, M, N, BLOCK_M, BLOCK_N)
    early = gl.minimum(end - first, STAGES)
    for stage in range(early):  # before the kernel ahead has ended: overlap.py
        _load_weight(
            inputs, rings, stage, first + stage, tile_n * BLOCK_N, N, weight_rows,
            2 * BLOCK_M * GROUP, HAS_HIGH_BITS, HAS_ZERO_POINT,
        )  # fmt: skip
    gdc_wait()
    for number in range(segments):
        tile, first, end = segment(number, rounds, tiles, whole_tiles, num_groups)
        tile_m, tile_n = tile_at(tile, M, N, BLOCK_M, BLOCK_N)
        for group in range(first, end):
            stage = step % STAGES
            ready = full.index(stage)
            if step >= early:
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                _load_weight(
                    inputs, rings, stage, group, tile_n * BLOCK_N, N, weight_rows,
                    2 * BLOCK_M * GROUP, HAS_HIGH_BITS, HAS_ZERO_POINT,
                )  # fmt: skip
            # past the last channel zeros
            at = [tile_m * BLOCK_M, group * GROUP]
            tma.async_copy_global_to_shared(x_desc, at, ready, x_ring.index(stage))
            async_copy.mbarrier_arrive(ready, increment_count=False)
            step += 1


@gluon.jit
def _beside(first, second):
    """Two tiles (64, J) -> (64, 2 J), one after the other; nothing moves between threads."""
    joined = gl.permute(gl.join(first, second), (0, 2, 1))
    return gl.reshape(joined, (first.shape[0], 2 * first.shape[1]))


@constexpr_function
def _shift(by):
    return f"shr.u16 $0, $1, {by};"


@gluon.jit
def _and_shifted(tile, BY: gl.constexpr):
    """A tile of bytes (64, J), and beside it the same shifted right; what crosses from byte to byte
    is not to be read."""
    shifted = gl.inline_asm_elementwise(
        _shift(BY), "=h,h", [tile], dtype=gl.int8, is_pure=True, pack=2
    )
    return _beside(tile, shifted)


@gluon.jit
def _operand(
    rings, stage, ROW: gl.constexpr, layout: gl.constexpr, DTYPE: gl.constexpr,
    EXPONENT_BITS: gl.constexpr, MANTISSA_BITS: gl.constexpr, HAS_ZERO_POINT: gl.constexpr,
    SCALED_WEIGHT: gl.constexpr,
):  # fmt: skip
    """Rows ROW to ROW + 64 of a stage's weight, (64, group) as the tensor cores take them."""
    _, weight_ring, high_bits_ring, scale_ring, zero_point_ring, _, _ = rings
    PARTS: gl.constexpr = num_parts(EXPONENT_BITS, MANTISSA_BITS)
    packed = weight_ring.index(stage).slice(ROW, 64, dim=0).load(layout)
    if SCALED_WEIGHT:
        scale = scale_ring.index(stage).slice(ROW, 64, dim=0)
        scale = scale.load(gl.SliceLayout(1, layout)).to(gl.float32)
        if EXPONENT_BITS > 0:  # what is placed is 2^-gap of its value, and stays so but for this
            scale *= _PART_OF_GAP
        scale = scale.to(DTYPE)[:, None]
    if EXPONENT_BITS == 0:
        CODE_ZERO: gl.constexpr = 136 if DTYPE.is_bf16() else 1032
        summand = gl.full([64], -CODE_ZERO, gl.int32, layout=gl.SliceLayout(1, layout))
        if HAS_ZERO_POINT:
            zero_point = zero_point_ring.index(stage).slice(ROW, 64, dim=0)
            summand -= zero_point.load(gl.SliceLayout(1, layout)).to(gl.int32)
        summand = summand.to(gl.float32).to(DTYPE)[:, None]
        low, high = gl.inline_asm_elementwise(
            unpacking(DTYPE, 2), registers(2), [packed, summand],
            dtype=twice(DTYPE), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        high_bits = packed
        if PARTS > 1:  # a byte of them is for that many bytes of the weight, which then read alike
            high_bits = high_bits_ring.index(stage).slice(ROW, 64, dim=0).load(layout)
            if PARTS == 4:
                high_bits = _and_shifted(high_bits, 1)
            high_bits = gl.convert_layout(_and_shifted(high_bits, 2), layout)
        PTX: gl.constexpr = placing(DTYPE, 2, EXPONENT_BITS, MANTISSA_BITS, 0, SCALED_WEIGHT)
        REGISTERS: gl.constexpr = registers_of_planes(2, SCALED_WEIGHT)
        if SCALED_WEIGHT:
            low, high = gl.inline_asm_elementwise(
                PTX, REGISTERS, [packed, high_bits, scale, scale],
                dtype=twice(DTYPE), is_pure=True, pack=2,
            )  # fmt: skip
        else:
            low, high = gl.inline_asm_elementwise(
                PTX, REGISTERS, [packed, high_bits], dtype=twice(DTYPE), is_pure=True, pack=2
            )
    weight = gl.convert_layout(_beside(low, high), layout)
    if SCALED_WEIGHT and EXPONENT_BITS == 0:
        weight = gl.inline_asm_elementwise(
            "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [weight, scale],
            dtype=weight.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    return weight


@gluon.jit
def _rescaled(acc, sums, scale_ring, stage, ROW: gl.constexpr):
    scale = scale_ring.index(stage).slice(ROW, 64, dim=0)
    scale = scale.load(gl.SliceLayout(1, acc.type.layout)).to(gl.float32)
    return acc + sums * scale[:, None]


@gluon.jit
def _sum_groups(
    rings, step, groups, WARPGROUP: gl.constexpr, BLOCK_M: gl.constexpr, BLOCKS: gl.constexpr,
    EXPONENT_BITS: gl.constexpr, MANTISSA_BITS: gl.constexpr, HAS_ZERO_POINT: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The sums over a segment's groups, each scaled, of one or two blocks of rows.

    (64, BLOCK_M) float32 each.
    """
    x_ring, _, _, scale_ring, _, full, empty = rings
    DTYPE: gl.constexpr = x_ring.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    ROW: gl.constexpr = 64 * BLOCKS * WARPGROUP
    upper = gl.zeros([64, BLOCK_M], gl.float32, layout=mma)
    lower = upper
    nothing = gl.zeros([64, BLOCK_M], gl.float32, layout=mma)
    for _ in range(groups):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        x = x_ring.index(stage).permute((1, 0))
        weight = _operand(
            rings, stage, ROW, layout, DTYPE, EXPONENT_BITS, MANTISSA_BITS, HAS_ZERO_POINT, False
        )
        upper_sums = warpgroup_mma(weight, x, nothing, use_acc=False, is_async=True)
        if BLOCKS == 2:
            weight = _operand(
                rings, stage, ROW + 64, layout, DTYPE, EXPONENT_BITS, MANTISSA_BITS, HAS_ZERO_POINT,
                False,
            )  # fmt: skip
            lower_sums = warpgroup_mma(weight, x, nothing, use_acc=False, is_async=True)
            sums = warpgroup_mma_wait(1, deps=[upper_sums])
            upper = _rescaled(upper, sums, scale_ring, stage, ROW)
            sums = warpgroup_mma_wait(0, deps=[lower_sums])
            lower = _rescaled(lower, sums, scale_ring, stage, ROW + 64)
        else:
            sums = warpgroup_mma_wait(0, deps=[upper_sums])
            upper = _rescaled(upper, sums, scale_ring, stage, ROW)
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    return upper, lower, step


@gluon.jit
def _sum_scaled(
    rings, step, groups, WARPGROUP: gl.constexpr, BLOCK_M: gl.constexpr,
    EXPONENT_BITS: gl.constexpr, MANTISSA_BITS: gl.constexpr, HAS_ZERO_POINT: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The sums over a segment's groups of two blocks of rows, (64, BLOCK_M) float32 each."""
    x_ring, _, _, _, _, full, empty = rings
    DTYPE: gl.constexpr = x_ring.dtype
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    ROW: gl.constexpr = 128 * WARPGROUP
    upper = gl.zeros([64, BLOCK_M], gl.float32, layout=mma)
    lower = upper
    for _ in range(groups):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        x = x_ring.index(stage).permute((1, 0))
        weight = _operand(
            rings, stage, ROW, layout, DTYPE, EXPONENT_BITS, MANTISSA_BITS, HAS_ZERO_POINT, True
        )
        upper_sums = warpgroup_mma(weight, x, upper, is_async=True)
        weight = _operand(
            rings, stage, ROW + 64, layout, DTYPE, EXPONENT_BITS, MANTISSA_BITS, HAS_ZERO_POINT,
            True,
        )  # fmt: skip
        lower_sums = warpgroup_mma(weight, x, lower, is_async=True)
        upper, lower = warpgroup_mma_wait(0, deps=[upper_sums, lower_sums])
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    return upper, lower, step


@constexpr_function
def scales_weight(block_m, blocks):
    """Whether tiles of this size leave no registers to scale sums."""
    return block_m * blocks > 128


@gluon.jit
def _multiply(
    outputs, rings, sizes, WARPGROUP: gl.constexpr, EXPONENT_BITS: gl.constexpr,
    MANTISSA_BITS: gl.constexpr, HAS_ZERO_POINT: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCKS: gl.constexpr, STAGES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its rows of every segment's tile."""
    _, _, out_ptr, _, _ = outputs
    M, N, num_groups, whole_tiles = sizes
    BLOCK_N: gl.constexpr = 128 * BLOCKS
    DTYPE: gl.constexpr = out_ptr.dtype.element_ty
    # float16 of a floating-point format is 2^-gap of its value
    UNPLACED: gl.constexpr = power_left(EXPONENT_BITS, DTYPE)
    REST_OF_GAP: gl.constexpr = power_of_gap(EXPONENT_BITS, DTYPE) / _PART_OF_GAP
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    step = 0
    gdc_wait()
    rounds, segments = count_segments(tiles, whole_tiles, num_groups)
    for number in range(segments):
        tile, first, end = segment(number, rounds, tiles, whole_tiles, num_groups)
        tile_m, tile_n = tile_at(tile, M, N, BLOCK_M, BLOCK_N)
        m0 = tile_m * BLOCK_M
        n0 = tile_n * BLOCK_N + 64 * BLOCKS * WARPGROUP
        if scales_weight(BLOCK_M, BLOCKS):
            acc, lower, step = _sum_scaled(
                rings, step, end - first, WARPGROUP, BLOCK_M, EXPONENT_BITS, MANTISSA_BITS,
                HAS_ZERO_POINT, STAGES,
            )  # fmt: skip
            if EXPONENT_BITS > 0:
                acc *= REST_OF_GAP
                lower *= REST_OF_GAP
        else:
            acc, lower, step = _sum_groups(
                rings, step, end - first, WARPGROUP, BLOCK_M, BLOCKS, EXPONENT_BITS, MANTISSA_BITS,
                HAS_ZERO_POINT, STAGES,
            )  # fmt: skip
            acc *= UNPLACED
            if BLOCKS == 2:
                lower *= UNPLACED
        finish(
            acc, lower, outputs, sizes, tile, first, end, m0, n0, WARPGROUP, BLOCKS, HAS_BIAS,
            HAS_RESIDUAL,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "whole_tiles"])
def weight_only_hopper_kernel(
    x_desc,
    weight_desc,
    high_bits_desc,
    weight_scale_ptr,
    zero_point_ptr,
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
    HIGH_BYTES: gl.constexpr,
    EXPONENT_BITS: gl.constexpr,
    MANTISSA_BITS: gl.constexpr,
    HAS_ZERO_POINT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    gdc_launch_dependents()  # overlap.py
    BLOCK_N: gl.constexpr = 128 * BLOCKS
    HAS_HIGH_BITS: gl.constexpr = HIGH_BYTES > 0
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, GROUP], x_desc.layout)
    weight_ring = gl.allocate_shared_memory(
        gl.int8, [STAGES, BLOCK_N, GROUP // 2], weight_desc.layout
    )
    if HAS_HIGH_BITS:
        high_bits_ring = gl.allocate_shared_memory(
            gl.int8, [STAGES, BLOCK_N, HIGH_BYTES], high_bits_desc.layout
        )
    else:
        high_bits_ring = weight_ring
    scale_ring = gl.allocate_shared_memory(
        weight_scale_ptr.dtype.element_ty, [STAGES, BLOCK_N], flat
    )
    if HAS_ZERO_POINT:
        zero_point_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N], flat)
    else:
        zero_point_ring = scale_ring
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=33)  # the TMA's bytes, and 32 threads' cp.async
        mbarrier.init(empty.index(stage), count=2)
    inputs = x_desc, weight_desc, high_bits_desc, weight_scale_ptr, zero_point_ptr
    outputs = bias_ptr, residual_ptr, out_ptr, partial_ptr, arrivals_ptr
    rings = x_ring, weight_ring, high_bits_ring, scale_ring, zero_point_ring, full, empty
    sizes = M, N, num_groups, whole_tiles
    gl.warp_specialize(
        [
            (_multiply, (
                outputs, rings, sizes, gl.constexpr(0), EXPONENT_BITS, MANTISSA_BITS,
                HAS_ZERO_POINT, BLOCK_M, BLOCKS, STAGES, HAS_BIAS, HAS_RESIDUAL,
            )),
            (_multiply, (
                outputs, rings, sizes, gl.constexpr(1), EXPONENT_BITS, MANTISSA_BITS,
                HAS_ZERO_POINT, BLOCK_M, BLOCKS, STAGES, HAS_BIAS, HAS_RESIDUAL,
            )),
            (_load, (
                inputs, rings, sizes, weight_rows, HAS_HIGH_BITS, HAS_ZERO_POINT, BLOCK_M, BLOCK_N,
                STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


PATH = "hopper 16-bit"
_RING_BYTES = 205 * 1024  # of shared memory, beside what a store takes
_MOST_STAGES = 10
# microseconds that a tile's step of one group takes, measured on an H100
STEP_US = {
    "int": per_tiling({
        (32, 1): 0.47, (32, 2): 0.85, (64, 1): 0.58, (64, 2): 1.05, (128, 1): 0.87, (128, 2): 1.5,
    }),
    "other": per_tiling({
        (32, 1): 0.63, (32, 2): 1.2, (64, 1): 0.75, (64, 2): 1.3, (128, 1): 0.95, (128, 2): 1.6,
    }),
}  # fmt: skip


def fits(N: int, K: int, group_size: int, dtype: torch.dtype, format: str) -> bool:
    """Whether this kernel can compute a product of these sizes: TMA reads whole 16 bytes."""
    aligned = N % 16 == 0 and K % 8 == 0 and group_size == 128
    return aligned and dtype.itemsize == 2 and format not in BLOCK_FORMATS


def is_aligned(
    weight: Tensor, weight_scale: Tensor, zero_point: Tensor | None, high_bits: Tensor | None
) -> bool:
    """Whether rows that are part of a larger weight begin where TMA and cp.async can read them."""
    planes = weight, weight_scale, zero_point, high_bits
    starts = (one.data_ptr() % 16 == 0 for one in planes if one is not None)
    return rows_per_group(weight) % 16 == 0 and all(starts)


def tilings(dtype: torch.dtype, kind: str) -> list[HopperTiling]:
    """kind: as in STEP_US."""
    wide_enough = dtype == torch.bfloat16  # for a weight that is scaled
    return [one for one in STEP_US[kind] if wide_enough or not scales_weight(*one)]


def best_tiling(
    M: int, N: int, num_groups: int, dtype: torch.dtype, kind: str, multiprocessors: int
) -> tuple[HopperTiling, float]:
    """The fastest one, and the microseconds that it should take; kind: as in STEP_US."""
    step_us = {tiling: STEP_US[kind][tiling] for tiling in tilings(dtype, kind)}
    return hopper_tiles.best_tiling(M, N, num_groups, step_us, multiprocessors)


@plan
def plan_product(
    x_shape: torch.Size,
    weight_shape: torch.Size,
    rows_per_group: int,
    high_bytes: int,
    dtype: torch.dtype,
    has_zero_point: bool,
    has_bias: bool,
    has_residual: bool,
    bits: tuple[int, int],
    tiling: HopperTiling,
    multiprocessors: int,
) -> Product:
    """Its operands: x, in the output's dtype, weight and its high bits, or the weight again;
    weight_scale, and zero_point. high_bytes: of a row of a group; bits: of exponent and mantissa.
    """
    num_groups, N, half_group = weight_shape
    M, K = math.prod(x_shape[:-1]), x_shape[-1]
    block_m, blocks = tiling
    step_us = STEP_US["other" if bits[0] else "int"][tiling]
    programs, whole, sharing = share_out(M, N, num_groups, tiling, step_us, multiprocessors)
    stage_bytes = 4 * half_group * block_m + 128 * blocks * (half_group + high_bytes + 4)
    high_plane = num_groups, N, high_bytes or half_group
    launch = Launch(
        weight_only_hopper_kernel,
        (programs,),
        (M, N, rows_per_group, num_groups, whole),
        (
            Blocks((M, K), dtype, (block_m, 2 * half_group), gl.NVMMASharedLayout(128, 16, 2)),
            blocks_of_rows(weight_shape, rows_per_group, 128 * blocks),
            blocks_of_rows(high_plane, rows_per_group, 128 * blocks),
        ),
        GROUP=2 * half_group,
        HIGH_BYTES=high_bytes,
        EXPONENT_BITS=bits[0],
        MANTISSA_BITS=bits[1],
        HAS_ZERO_POINT=has_zero_point,
        HAS_BIAS=has_bias,
        HAS_RESIDUAL=has_residual,
        BLOCK_M=block_m,
        BLOCKS=blocks,
        STAGES=min(_RING_BYTES // stage_bytes, _MOST_STAGES),
        REGISTERS=ROLE_REGISTERS,
        num_warps=4,
        launch_pdl=True,
    )
    return Product(buffer(*x_shape[:-1], N, dtype=dtype), sharing, launch)
