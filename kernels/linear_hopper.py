"""The product of `linear` and `two_level_linear` for many tokens on Hopper: TMA, wgmma, warp roles.

Written in Gluon, since Triton itself neither keeps a left operand's registers in flight beside the
tensor cores nor gives warps roles. One program holds three roles, which meet at mbarriers:

    one warp               TMA and cp.async fill a ring of stages, each a group of channels
    two warpgroups         unpack their rows of the weight into the registers that wgmma reads,
                           multiply, and rescale

Which tiles a program has, and how a tile ends, is in hopper_tiles.py. What scales take comes on top
of the product, whatever runs beside it: it helps neither to unpack the next weight nor to read and
multiply scales during a product, nor to let the warpgroups take turns, nor to have four of them.
FP8's products, whose sums need no conversion, take longer by the offset that codes without a sign
have (docs/measured.md).

What roles share goes from function to function in tuples: `inputs` that are loaded, `outputs` with
what a tile's end reads, `rings` of stages with the mbarriers of full and empty ones, and `sizes`.
"""

from __future__ import annotations

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

from . import e2m1
from .arrivals import Sharing
from .devices import is_hopper
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
from .launching import Launch
from .packing import rows_per_group
from .sizes import cdiv

_OUTLIER_STEP = 64  # outliers that fill a stage: as many bytes as a group's packed row


@gluon.jit
def _load_weight(
    inputs, rings, stage, group, n0, N, weight_rows, CODES_BYTES: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
):  # fmt: skip
    """Begins a stage, which CODES_BYTES of activations are to follow."""
    _, weight_desc, _, _, group_scale_ptr = inputs
    _, weight_ring, _, group_scale_ring, full, _ = rings
    ready = full.index(stage)
    BLOCK_N: gl.constexpr = weight_ring.shape[1]
    mbarrier.expect(ready, CODES_BYTES + BLOCK_N * weight_ring.shape[2])
    # past the last row TMA reads the next group's rows or zeros: neither is stored
    row = group * weight_rows + n0
    tma.async_copy_global_to_shared(weight_desc, [row, 0], ready, weight_ring.index(stage))
    # cp.async moves at least 4 bytes
    layout: gl.constexpr = gl.BlockedLayout([4 if TWO_LEVEL else 2], [32], [1], [0])
    n = n0 + gl.arange(0, BLOCK_N, layout=layout)
    async_copy.async_copy_global_to_shared(
        group_scale_ring.index(stage),
        group_scale_ptr + gl.cast(group, gl.int64) * weight_rows + n,
        mask=n < N,
    )


@gluon.jit
def _load(
    inputs, rings, sizes, weight_rows, outliers_at, OUTLIER_STEPS: gl.constexpr,
    TWO_LEVEL: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: fills the ring with each segment's groups, and with outliers at a tile's end."""
    codes_desc, _, outlier_desc, scale_ptr, _ = inputs
    codes_ring, weight_ring, scale_ring, _, full, empty = rings
    M, N, num_groups, whole_tiles = sizes
    GROUP: gl.constexpr = codes_ring.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    last_scale = 1 if TWO_LEVEL else num_groups
    step = 0
    rounds, segments = count_segments(tiles, whole_tiles, num_groups)
    tile, first, end = segment(0, rounds, tiles, whole_tiles, num_groups)
    tile_m, tile_n = tile_at(tile, M, N, BLOCK_M, BLOCK_N)
    early = gl.minimum(end - first, STAGES)
    for stage in range(early):  # before the kernel ahead has ended: overlap.py
        _load_weight(
            inputs, rings, stage, first + stage, tile_n * BLOCK_N, N, weight_rows, BLOCK_M * GROUP,
            TWO_LEVEL,
        )  # fmt: skip
    gdc_wait()
    for number in range(segments):
        tile, first, end = segment(number, rounds, tiles, whole_tiles, num_groups)
        tile_m, tile_n = tile_at(tile, M, N, BLOCK_M, BLOCK_N)
        m0 = tile_m * BLOCK_M
        n0 = tile_n * BLOCK_N
        m = gl.minimum(m0 + gl.arange(0, BLOCK_M, layout=layout), M - 1)
        for group in range(first, end):
            stage = step % STAGES
            ready = full.index(stage)
            if step >= early:
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                _load_weight(
                    inputs, rings, stage, group, n0, N, weight_rows, BLOCK_M * GROUP, TWO_LEVEL
                )
            tma.async_copy_global_to_shared(
                codes_desc, [m0, group * GROUP], ready, codes_ring.index(stage)
            )
            if not TWO_LEVEL:
                async_copy.async_copy_global_to_shared(
                    scale_ring.index(stage), scale_ptr + gl.cast(group, gl.int64) * M + m
                )
            async_copy.mbarrier_arrive(ready, increment_count=False)
            step += 1
        if OUTLIER_STEPS > 0:
            for part in range(OUTLIER_STEPS if end == num_groups else 0):
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                ready = full.index(stage)
                mbarrier.expect(ready, BLOCK_M * GROUP + BLOCK_N * GROUP // 2)
                channel = part * (GROUP // 2)
                tma.async_copy_global_to_shared(
                    outlier_desc, [n0, channel], ready, weight_ring.index(stage)
                )
                tma.async_copy_global_to_shared(
                    codes_desc, [m0, outliers_at + channel], ready, codes_ring.index(stage)
                )
                async_copy.async_copy_global_to_shared(
                    scale_ring.index(stage), scale_ptr + gl.cast(last_scale, gl.int64) * M + m
                )
                async_copy.mbarrier_arrive(ready, increment_count=False)
                step += 1


@gluon.jit
def _unpack(packed, layout: gl.constexpr):
    """Packed rows (64, group / 2) -> 16 times their codes, (64, group) int8: in upper halves.

    Both codes of a byte stay in the thread that the tensor cores want them in: nothing moves.
    """
    low = gl.inline_asm_elementwise(
        "{ .reg .b32 shifted; shl.b32 shifted, $1, 4; and.b32 $0, shifted, 0xF0F0F0F0; }",
        "=r,r", [packed], dtype=gl.int8, is_pure=True, pack=4,
    )  # fmt: skip
    high = gl.inline_asm_elementwise(
        "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=gl.int8, is_pure=True, pack=4
    )
    halves = gl.permute(gl.join(low, high), (0, 2, 1))
    return gl.convert_layout(gl.reshape(halves, (packed.shape[0], 2 * packed.shape[1])), layout)


@gluon.jit
def _unpack_e2m1(packed, layout: gl.constexpr):
    """Packed rows (64, group / 2) of E2M1 -> twice their values, (64, group) int8."""
    low, high = gl.inline_asm_elementwise(
        e2m1.PTX, e2m1.REGISTERS, [packed], dtype=e2m1.BOTH, is_pure=True, pack=4
    )
    halves = gl.permute(gl.join(low, high), (0, 2, 1))
    return gl.convert_layout(gl.reshape(halves, (packed.shape[0], 2 * packed.shape[1])), layout)


@gluon.jit
def _unpack_scaled(packed, factor, layout: gl.constexpr):
    """Packed rows (64, group / 2), factor (64,) of 1 to 16 -> codes times factor, (64, group) int8.

    One multiplication for four codes: code + 8 is 0 to 15, and (code + 8) * factor + 128 - 8 *
    factor stays within its byte. Source: LiquidGEMM (arXiv 2509.01229), section 4.
    """
    zeros = gl.full([packed.shape[0], packed.shape[1]], 0, gl.int32, layout=packed.type.layout)
    offset = ((128 - 8 * factor) * 0x01010101)[:, None] + zeros
    factor = factor[:, None] + zeros
    low = gl.inline_asm_elementwise(
        """{
        .reg .b32 code;
        lop3.b32 code, $1, 0x0F0F0F0F, 0x08080808, 0x6A;
        mad.lo.u32 code, code, $2, $6;
        xor.b32 $0, code, 0x80808080;
        }""",
        "=r,r,r,r,r,r,r,r,r,r", [packed, factor, offset], dtype=gl.int8, is_pure=True, pack=4,
    )  # fmt: skip
    high = gl.inline_asm_elementwise(
        """{
        .reg .b32 code;
        shr.u32 code, $1, 4;
        lop3.b32 code, code, 0x0F0F0F0F, 0x08080808, 0x6A;
        mad.lo.u32 code, code, $2, $6;
        xor.b32 $0, code, 0x80808080;
        }""",
        "=r,r,r,r,r,r,r,r,r,r", [packed, factor, offset], dtype=gl.int8, is_pure=True, pack=4,
    )  # fmt: skip
    halves = gl.permute(gl.join(low, high), (0, 2, 1))
    return gl.convert_layout(gl.reshape(halves, (packed.shape[0], 2 * packed.shape[1])), layout)


@gluon.jit
def _operand(weight_ring, group_scale_ring, stage, ROW: gl.constexpr, TWO_LEVEL: gl.constexpr,
             IS_E2M1: gl.constexpr, layout: gl.constexpr):  # fmt: skip
    """Rows ROW to ROW + 64 of a stage's weight, as the tensor cores take them."""
    packed = weight_ring.index(stage).slice(ROW, 64, dim=0).load(layout)
    if TWO_LEVEL:
        factor = group_scale_ring.index(stage).slice(ROW, 64, dim=0)
        factor = factor.load(gl.SliceLayout(1, layout)).to(gl.int32)
        return _unpack_scaled(packed, factor, layout)
    elif IS_E2M1:
        return _unpack_e2m1(packed, layout)
    else:
        return _unpack(packed, layout)


@gluon.jit
def _rescaled(acc, sums, row_scale, scale_stage):
    scale = scale_stage.load(gl.SliceLayout(0, acc.type.layout))
    return acc + sums.to(gl.float32) * (row_scale[:, None] * scale[None, :])


@gluon.jit
def _group_rescaled(acc, sums, group_scale_ring, scale_ring, stage, ROW: gl.constexpr):
    row_scale = group_scale_ring.index(stage).slice(ROW, 64, dim=0)
    row_scale = row_scale.load(gl.SliceLayout(1, acc.type.layout)).to(gl.float32)
    return _rescaled(acc, sums, row_scale, scale_ring.index(stage))


@gluon.jit
def _sum_groups(
    rings, step, groups, ROW: gl.constexpr, IS_E2M1: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Two groups at a time, each with its own scales, of the weight as it is unpacked: float32.

    (64, BLOCK_M) of 16 times the sum or, of E2M1, twice the sum.
    """
    codes_ring, weight_ring, scale_ring, group_scale_ring, full, empty = rings
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32])
    layout: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    acc = gl.zeros([64, BLOCK_M], gl.float32, layout=mma)
    nothing = gl.zeros([64, BLOCK_M], gl.int32, layout=mma)
    if groups % 2 == 1:
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        weight = _operand(weight_ring, group_scale_ring, stage, ROW, False, IS_E2M1, layout)
        codes = codes_ring.index(stage).permute((1, 0))
        sums = warpgroup_mma(weight, codes, nothing, use_acc=False, is_async=True)
        sums = warpgroup_mma_wait(0, deps=[sums])
        acc = _group_rescaled(acc, sums, group_scale_ring, scale_ring, stage, ROW)
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    for _ in range(groups // 2):
        first = step % STAGES
        second = (step + 1) % STAGES
        mbarrier.wait(full.index(first), (step // STAGES) & 1)
        weight = _operand(weight_ring, group_scale_ring, first, ROW, False, IS_E2M1, layout)
        codes = codes_ring.index(first).permute((1, 0))
        first_sums = warpgroup_mma(weight, codes, nothing, use_acc=False, is_async=True)
        mbarrier.wait(full.index(second), ((step + 1) // STAGES) & 1)
        weight = _operand(weight_ring, group_scale_ring, second, ROW, False, IS_E2M1, layout)
        codes = codes_ring.index(second).permute((1, 0))
        second_sums = warpgroup_mma(weight, codes, nothing, use_acc=False, is_async=True)
        sums = warpgroup_mma_wait(1, deps=[first_sums])
        acc = _group_rescaled(acc, sums, group_scale_ring, scale_ring, first, ROW)
        mbarrier.arrive(empty.index(first), count=1)
        sums = warpgroup_mma_wait(0, deps=[second_sums])
        acc = _group_rescaled(acc, sums, group_scale_ring, scale_ring, second, ROW)
        mbarrier.arrive(empty.index(second), count=1)
        step += 2
    return acc, step


@gluon.jit
def _sum_groups_of_blocks(
    rings, step, groups, ROW: gl.constexpr, IS_E2M1: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """As _sum_groups, of two blocks of rows and a group at a time."""
    codes_ring, weight_ring, scale_ring, group_scale_ring, full, empty = rings
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32])
    layout: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    upper = gl.zeros([64, BLOCK_M], gl.float32, layout=mma)
    lower = upper
    nothing = gl.zeros([64, BLOCK_M], gl.int32, layout=mma)
    for _ in range(groups):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        codes = codes_ring.index(stage).permute((1, 0))
        weight = _operand(weight_ring, group_scale_ring, stage, ROW, False, IS_E2M1, layout)
        upper_sums = warpgroup_mma(weight, codes, nothing, use_acc=False, is_async=True)
        weight = _operand(weight_ring, group_scale_ring, stage, ROW + 64, False, IS_E2M1, layout)
        lower_sums = warpgroup_mma(weight, codes, nothing, use_acc=False, is_async=True)
        sums = warpgroup_mma_wait(1, deps=[upper_sums])
        upper = _group_rescaled(upper, sums, group_scale_ring, scale_ring, stage, ROW)
        sums = warpgroup_mma_wait(0, deps=[lower_sums])
        lower = _group_rescaled(lower, sums, group_scale_ring, scale_ring, stage, ROW + 64)
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    return upper, lower, step


@gluon.jit
def _sum_rows(
    rings, step, groups, WARPGROUP: gl.constexpr, BLOCKS: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The INT32 sums over a segment's groups of one or two blocks of rows, (64, BLOCK_M) each."""
    codes_ring, weight_ring, _, group_scale_ring, full, empty = rings
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32])
    layout: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    ROW: gl.constexpr = 64 * BLOCKS * WARPGROUP
    upper = gl.zeros([64, BLOCK_M], gl.int32, layout=mma)
    lower = upper
    for _ in range(groups):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        codes = codes_ring.index(stage).permute((1, 0))
        weight = _operand(weight_ring, group_scale_ring, stage, ROW, True, False, layout)
        upper_sums = warpgroup_mma(weight, codes, upper, is_async=True)
        if BLOCKS == 2:
            weight = _operand(weight_ring, group_scale_ring, stage, ROW + 64, True, False, layout)
            lower_sums = warpgroup_mma(weight, codes, lower, is_async=True)
            upper, lower = warpgroup_mma_wait(0, deps=[upper_sums, lower_sums])
        else:
            upper = warpgroup_mma_wait(0, deps=[upper_sums])
        mbarrier.arrive(empty.index(stage), count=1)
        step += 1
    return upper, lower, step


@gluon.jit
def _with_outliers(
    acc, rings, step, outlier_scale_ptr, n0, N, ROW: gl.constexpr, OUTLIER_STEPS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Adds the outliers' product to 64 outputs from n0 on."""
    codes_ring, weight_ring, scale_ring, _, full, _ = rings
    mma: gl.constexpr = acc.type.layout
    n = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    nothing = gl.zeros(acc.shape, gl.int32, layout=mma)
    outlier_scale = gl.load(outlier_scale_ptr + n, mask=n < N, other=0.0)
    for part in gl.static_range(OUTLIER_STEPS):
        stage = (step + part) % STAGES
        mbarrier.wait(full.index(stage), ((step + part) // STAGES) & 1)
        weight = weight_ring.index(stage).slice(ROW, 64, dim=0)
        weight = weight.load(gl.DotOperandLayout(0, mma, 4))
        codes = codes_ring.index(stage).slice(0, weight.shape[1], dim=1).permute((1, 0))
        sums = warpgroup_mma(weight, codes, nothing, use_acc=False, is_async=True)
        sums = warpgroup_mma_wait(0, deps=[sums])
        acc = _rescaled(acc, sums, outlier_scale, scale_ring.index(stage))
    return acc


@gluon.jit
def _multiply(
    scales, outputs, rings, sizes, WARPGROUP: gl.constexpr, OUTLIER_STEPS: gl.constexpr,
    TWO_LEVEL: gl.constexpr, IS_E2M1: gl.constexpr, BLOCK_M: gl.constexpr, BLOCKS: gl.constexpr,
    STAGES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
):  # fmt: skip
    """One warpgroup: its rows of every segment's tile."""
    scale_ptr, row_scale_ptr, outlier_scale_ptr = scales
    M, N, num_groups, whole_tiles = sizes
    _, _, _, _, _, empty = rings
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 32])
    BLOCK_N: gl.constexpr = 128 * BLOCKS
    ROW: gl.constexpr = 64 * BLOCKS * WARPGROUP
    tiles = gl.cdiv(M, BLOCK_M) * gl.cdiv(N, BLOCK_N)
    step = 0
    gdc_wait()
    rounds, segments = count_segments(tiles, whole_tiles, num_groups)
    for number in range(segments):
        tile, first, end = segment(number, rounds, tiles, whole_tiles, num_groups)
        tile_m, tile_n = tile_at(tile, M, N, BLOCK_M, BLOCK_N)
        m0 = tile_m * BLOCK_M
        n0 = tile_n * BLOCK_N + ROW
        if TWO_LEVEL:
            upper, lower, step = _sum_rows(
                rings, step, end - first, WARPGROUP, BLOCKS, BLOCK_M, STAGES
            )
            n = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
            m = m0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, mma))
            scale = gl.load(scale_ptr + m, mask=m < M, other=0.0)[None, :]
            row_scale = gl.load(row_scale_ptr + n, mask=n < N, other=0.0)[:, None]
            acc = upper.to(gl.float32) * (row_scale * scale)
            if BLOCKS == 2:
                row_scale = gl.load(row_scale_ptr + n + 64, mask=n + 64 < N, other=0.0)[:, None]
                lower_acc = lower.to(gl.float32) * (row_scale * scale)
        else:
            UNPACKED: gl.constexpr = 0.5 if IS_E2M1 else 0.0625  # as unpacking multiplied
            if BLOCKS == 2:
                acc, lower_acc, step = _sum_groups_of_blocks(
                    rings, step, end - first, ROW, IS_E2M1, BLOCK_M, STAGES
                )
                lower_acc *= UNPACKED
            else:
                acc, step = _sum_groups(rings, step, end - first, ROW, IS_E2M1, BLOCK_M, STAGES)
            acc *= UNPACKED
        if OUTLIER_STEPS > 0:
            if end == num_groups:
                acc = _with_outliers(
                    acc, rings, step, outlier_scale_ptr, n0, N, ROW, OUTLIER_STEPS, STAGES
                )
                if BLOCKS == 2:
                    lower_acc = _with_outliers(
                        lower_acc, rings, step, outlier_scale_ptr, n0 + 64, N, ROW + 64,
                        OUTLIER_STEPS, STAGES,
                    )  # fmt: skip
                for part in gl.static_range(OUTLIER_STEPS):
                    mbarrier.arrive(empty.index((step + part) % STAGES), count=1)
                step += OUTLIER_STEPS
        finish(
            acc, lower_acc if BLOCKS == 2 else acc, outputs, sizes, tile, first, end, m0, n0,
            WARPGROUP, BLOCKS, HAS_BIAS, HAS_RESIDUAL,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["M", "whole_tiles"])
def linear_hopper_kernel(
    codes_desc,
    weight_desc,
    outlier_desc,
    scale_ptr,
    group_scale_ptr,
    row_scale_ptr,
    outlier_scale_ptr,
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
    outliers_at,
    GROUP: gl.constexpr,
    OUTLIER_STEPS: gl.constexpr,
    TWO_LEVEL: gl.constexpr,
    IS_E2M1: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    gdc_launch_dependents()  # overlap.py
    BLOCK_N: gl.constexpr = 128 * BLOCKS
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    codes_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, GROUP], codes_desc.layout)
    weight_ring = gl.allocate_shared_memory(
        gl.int8, [STAGES, BLOCK_N, GROUP // 2], weight_desc.layout
    )
    scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], flat)
    group_scale_ring = gl.allocate_shared_memory(
        group_scale_ptr.dtype.element_ty, [STAGES, BLOCK_N], flat
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=33)  # the TMA's bytes, and 32 threads' cp.async
        mbarrier.init(empty.index(stage), count=2)
    inputs = codes_desc, weight_desc, outlier_desc, scale_ptr, group_scale_ptr
    scales = scale_ptr, row_scale_ptr, outlier_scale_ptr
    outputs = bias_ptr, residual_ptr, out_ptr, partial_ptr, arrivals_ptr
    rings = codes_ring, weight_ring, scale_ring, group_scale_ring, full, empty
    sizes = M, N, num_groups, whole_tiles
    gl.warp_specialize(
        [
            (_multiply, (
                scales, outputs, rings, sizes, gl.constexpr(0), OUTLIER_STEPS, TWO_LEVEL, IS_E2M1,
                BLOCK_M, BLOCKS, STAGES, HAS_BIAS, HAS_RESIDUAL,
            )),
            (_multiply, (
                scales, outputs, rings, sizes, gl.constexpr(1), OUTLIER_STEPS, TWO_LEVEL, IS_E2M1,
                BLOCK_M, BLOCKS, STAGES, HAS_BIAS, HAS_RESIDUAL,
            )),
            (_load, (
                inputs, rings, sizes, weight_rows, outliers_at, OUTLIER_STEPS, TWO_LEVEL, BLOCK_M,
                BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


PATH = "hopper"  # what tables and tuned launches call this kernel


# as many as shared memory holds
_STAGES = {
    (16, 1): 8, (16, 2): 8, (32, 1): 8, (32, 2): 8, (64, 1): 8, (64, 2): 6, (128, 1): 6,
    (128, 2): 5,
}  # fmt: skip


# microseconds that a tile's step of one group takes, measured on an H100
STEP_US = {
    False: per_tiling({
        (16, 1): 0.25, (16, 2): 0.6, (32, 1): 0.29, (32, 2): 0.65, (64, 1): 0.41, (64, 2): 0.75,
        (128, 1): 0.65,
    }),
    True: per_tiling({
        (16, 1): 0.29, (32, 1): 0.31, (64, 1): 0.35, (64, 2): 0.57, (128, 1): 0.49, (128, 2): 0.83,
    }),
}  # fmt: skip


def fits(device: torch.device, N: int, group_size: int, outliers: int) -> bool:
    """Whether this kernel can compute a product of these sizes."""
    aligned = N % 16 == 0 and group_size == 2 * _OUTLIER_STEP
    return is_hopper(device) and aligned and outliers <= 4 * _OUTLIER_STEP


def is_aligned(weight: Tensor, group_scale: Tensor) -> bool:
    """Whether rows that are part of a larger weight begin where cp.async can read their scales."""
    return rows_per_group(weight) % 16 == 0 and group_scale.data_ptr() % 16 == 0


def tilings(two_level: bool) -> list[HopperTiling]:
    return list(STEP_US[two_level])


def steps_of_tile(num_groups: int, outliers: int) -> int:
    return num_groups + cdiv(outliers, _OUTLIER_STEP)


def plan_launch(
    codes_shape: tuple[int, int],
    weight_shape: torch.Size,
    rows_per_group: int,
    outliers: int,
    has_bias: bool,
    has_residual: bool,
    is_two_level: bool,
    is_e2m1: bool,
    tiling: HopperTiling,
    multiprocessors: int,
) -> tuple[Sharing, Launch]:
    """Its operands: codes, weight and its outliers, or the weight again; scale, group_scale,
    row_scale and outlier_scale. With two levels of scales they are those of `two_level_linear`,
    else `linear`'s, and group_scale its weight_scale.
    """
    (M, width), (num_groups, N, half_group) = codes_shape, weight_shape
    block_m, blocks = tiling
    step_us = STEP_US[is_two_level][tiling]
    programs, whole, sharing = share_out(M, N, num_groups, tiling, step_us, multiprocessors)
    weight_blocks = blocks_of_rows(weight_shape, rows_per_group, 128 * blocks)
    outlier_blocks = blocks_of_bytes((N, outliers), 128 * blocks, _OUTLIER_STEP)
    launch = Launch(
        linear_hopper_kernel,
        (programs,),
        (M, N, rows_per_group, num_groups, whole, width - outliers),
        (
            blocks_of_bytes(codes_shape, block_m, 2 * half_group),
            weight_blocks,
            outlier_blocks if outliers else weight_blocks,
        ),
        GROUP=2 * half_group,
        OUTLIER_STEPS=cdiv(outliers, _OUTLIER_STEP),
        TWO_LEVEL=is_two_level,
        IS_E2M1=is_e2m1,
        HAS_BIAS=has_bias,
        HAS_RESIDUAL=has_residual,
        BLOCK_M=block_m,
        BLOCKS=blocks,
        STAGES=_STAGES[tiling],
        REGISTERS=ROLE_REGISTERS,
        num_warps=4,
        launch_pdl=True,
    )
    return sharing, launch
