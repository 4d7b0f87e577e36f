"""`atom::linear`: quantized activations times a packed weight of 4 bits, exact group by group.

    out[m, n] = sum_g scale[g, m] * weight_scale[g, n] * sum_k codes[m, k] * weight[n, k]
              + scale[G, m] * outlier_scale[n] * sum_k codes[m, k] * outlier_weight[n, k]
              + bias[n]                 rounded to the output's dtype, then + residual[m, n]

The sums over k, the channels of group g or the outliers, are integers, or with a weight of E2M1
halves of integers, and exact in every implementation. INT8 tensor cores multiply both: unpacked in
registers, an INT4 code becomes 16 times itself, a code of E2M1 twice its value. Source: Atom (arXiv
2310.19102), sections 4.1 and 4.4.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import e2m1, hopper_tiles, linear_hopper, tuning
from .arrivals import ALONE, Product, Sharing
from .devices import multiprocessors
from .formats import E2M1
from .hopper_tiles import HopperTiling
from .launching import Launch, buffer, plan
from .library import define
from .overlap import fetch_into_l2, overlap
from .packing import GroupLayout, rows_per_group, unpack_e2m1, unpack_int4
from .sizes import cdiv, next_power_of_2


def reference(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    outlier_weight: Tensor,
    outlier_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    *,
    format: str = "int",
) -> Tensor:
    """codes (*, padded_width), scale (num_scales, *), the weight as in packing.py, bias (N,),
    residual (*, N) -> (*, N) in `dtype`.

    format: of the weight, "int" or "e2m1".

    Float32 holds every sum over a group exactly: with up to 1024 channels it stays below 2^24.
    """
    num_groups, N, half_group = weight.shape
    codes_MK = codes.reshape(-1, codes.shape[-1]).float()
    scale_GM = scale.reshape(scale.shape[0], -1)
    groups_GMK = (
        codes_MK[:, : num_groups * half_group * 2]
        .unflatten(1, (num_groups, half_group * 2))
        .transpose(0, 1)
    )
    weight_GNK = unpack_int4(weight) if format == "int" else E2M1.decode(unpack_e2m1(weight))
    sums_GMN = torch.bmm(groups_GMK, weight_GNK.float().transpose(1, 2))
    out = (sums_GMN * (scale_GM[:num_groups, :, None] * weight_scale.float()[:, None, :])).sum(0)
    if outlier_weight.shape[1]:
        outliers = codes_MK[:, num_groups * half_group * 2 :] @ outlier_weight.float().t()
        out = out + outliers * (scale_GM[num_groups, :, None] * outlier_scale)
    if bias is not None:
        out = out + bias.float()
    out = out.to(dtype).reshape(*codes.shape[:-1], N)
    return out if residual is None else out + residual


def fake(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    outlier_weight: Tensor,
    outlier_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    *,
    format: str = "int",
) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], weight.shape[1], dtype=dtype)


@triton.jit
def _unpack(packed, IS_E2M1: tl.constexpr, PTX: tl.constexpr):
    """Packed rows (N, group / 2) -> 16 times their codes, (N, group) int8: codes in upper halves.

    Of E2M1 twice the values. Both codes of a byte stay in the thread that the tensor cores want
    them in: nothing moves.
    """
    if IS_E2M1 and PTX:
        low, high = tl.inline_asm_elementwise(
            e2m1.PTX, e2m1.REGISTERS, [packed], dtype=e2m1.BOTH, is_pure=True, pack=4
        )
    elif IS_E2M1:
        low = e2m1.twice_the_values(packed.to(tl.int32) & 0xF)
        high = e2m1.twice_the_values((packed.to(tl.int32) >> 4) & 0xF)
    elif PTX:  # four bytes at a time, where LLVM would shift them one by one
        low = tl.inline_asm_elementwise(
            "{ .reg .b32 shifted; shl.b32 shifted, $1, 4; and.b32 $0, shifted, 0xF0F0F0F0; }",
            "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
        high = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        low = packed << 4
        high = packed & -16
    halves = tl.permute(tl.join(low, high), (0, 2, 1))
    return tl.reshape(halves, (packed.shape[0], 2 * packed.shape[1]))


@triton.jit
def tile_in_band(
    tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES_PER_BAND: tl.constexpr
):
    """Tiles go down bands of a few blocks of tokens, so that weights and activations stay in L2."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_m = tl.cdiv(M, BLOCK_M)
    band = tile // (TILES_PER_BAND * tiles_n)
    band_tiles = tl.minimum(tiles_m - band * TILES_PER_BAND, TILES_PER_BAND)
    tile_m = band * TILES_PER_BAND + (tile % (TILES_PER_BAND * tiles_n)) % band_tiles
    tile_n = (tile % (TILES_PER_BAND * tiles_n)) // band_tiles
    return tile_m, tile_n


@triton.jit
def store_tile(
    acc,
    m,
    n,
    M,
    N,
    bias_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    tile,
    split,
    splits,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    """The epilogue: acc (n, m) of a tile, float32, summed over the splits of K."""
    live_n = n < N
    live = (m < M)[None, :] & live_n[:, None]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    last = True
    if IS_SPLIT:
        partial_sums = partial_ptr + at
        tl.store(partial_sums + tl.cast(split, tl.int64) * M * N, acc, mask=live)
        tl.debug_barrier()  # all threads' stores come before this program's arrival
        last = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == splits - 1
        if last:
            acc = tl.zeros(acc.shape, dtype=tl.float32)
            for other in range(splits):
                acc += tl.load(
                    partial_sums + tl.cast(other, tl.int64) * M * N,
                    mask=live,
                    other=0.0,
                    cache_modifier=".cg",
                )
            tl.store(arrivals_ptr + tile, 0)  # for the next launch
    if last:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n, mask=live_n, other=0.0).to(tl.float32)[:, None]
        out = acc.to(out_ptr.dtype.element_ty)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + at, mask=live, other=0.0)
            out = (out.to(tl.float32) + residual.to(tl.float32)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, out, mask=live)


@triton.jit
def linear_kernel(
    codes_ptr,
    scale_ptr,
    weight_ptr,
    group_scale_ptr,
    row_scale_ptr,
    outlier_weight_ptr,
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
    codes_stride,
    HALF_GROUP: tl.constexpr,
    OUTLIERS: tl.constexpr,
    OUTLIER_BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    TWO_LEVEL: tl.constexpr,
    IS_E2M1: tl.constexpr,
    TILES_PER_BAND: tl.constexpr,
    PTX: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One tile of out^T = weight codes^T: a weight on the left stays in registers, unpacked.

    Programs along the grid's second axis split K: each leaves a float32 partial sum, and the last
    to arrive adds them up in order. A group begins `weight_rows` rows after the one before: N, or
    more where the weight is part of a larger one. TWO_LEVEL: group scales are INT8 factors of a
    row's scale, and a token has one scale (two_level_linear.py).
    """
    GROUP: tl.constexpr = 2 * HALF_GROUP
    TIMES: tl.constexpr = 2.0 if IS_E2M1 else 16.0  # what `_unpack` multiplies by
    OUTLIERS_FIRST: tl.constexpr = BLOCK_M >= 64 and not TWO_LEVEL
    tile = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1) if IS_SPLIT else 1
    tile_m, tile_n = tile_in_band(tile, M, N, BLOCK_M, BLOCK_N, TILES_PER_BAND)

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    live_m = m < M
    live_n = n < N
    # past the last token a small tile reads nothing, and a larger one, for which masks would cost
    # more, starts over at the first token: one place in memory that all programs read again and
    # again would be the bottleneck
    FEW: tl.constexpr = BLOCK_M <= 16
    m_row = tl.where(live_m, m, tl.minimum(m - M, M - 1)).to(tl.int64)
    n_row = tl.where(live_n, n, 0).to(tl.int64)
    codes_rows = codes_ptr + m_row[None, :] * codes_stride
    codes_tile = codes_rows + tl.arange(0, GROUP)[:, None]
    weight_tile = weight_ptr + n_row[:, None] * HALF_GROUP + tl.arange(0, HALF_GROUP)[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32 if TWO_LEVEL else tl.float32)
    first = split * num_groups // splits
    end = (split + 1) * num_groups // splits
    if OVERLAP:  # fetching more of it takes longer than it saves
        for ahead in tl.static_range(2):
            row = tl.cast(first + ahead, tl.int64) * weight_rows + tile_n * BLOCK_N
            if (first + ahead < end) & (tile_n * BLOCK_N + BLOCK_N <= N):
                fetch_into_l2(weight_ptr + row * HALF_GROUP, BLOCK_N * HALF_GROUP)
    group_scale = tl.load(
        group_scale_ptr + tl.cast(first, tl.int64) * weight_rows + n, mask=live_n, other=0
    )
    has_outliers = split == splits - 1
    if OUTLIERS > 0:
        lane = tl.arange(0, OUTLIER_BLOCK)
        live = (lane < OUTLIERS) & has_outliers
        outlier_weight = tl.load(
            outlier_weight_ptr + n_row[:, None] * OUTLIERS + lane[None, :],
            mask=live[None, :],
            other=0,
        )
        outlier_weight_scale = tl.load(
            outlier_scale_ptr + n, mask=live_n & has_outliers, other=0.0
        ) * (1.0 if TWO_LEVEL else TIMES)
    if OVERLAP:
        gdc_wait()
    if OUTLIERS > 0:
        outlier_codes = tl.load(
            codes_rows + codes_stride - OUTLIERS + lane[:, None], mask=live[:, None], other=0
        )
        last_scale = 1 if TWO_LEVEL else num_groups
        outlier_scale = tl.load(
            scale_ptr + tl.cast(last_scale, tl.int64) * M + m, mask=live_m & has_outliers, other=0.0
        )
        # a large tile needs these registers in its loop, a small one would wait for the loads
        if OUTLIERS_FIRST:
            if has_outliers:
                sums = tl.dot(outlier_weight, outlier_codes, out_dtype=tl.int32)
                acc += sums.to(tl.float32) * (
                    outlier_weight_scale[:, None] * outlier_scale[None, :]
                )

    scale = tl.load(
        scale_ptr + tl.cast(0 if TWO_LEVEL else first, tl.int64) * M + m, mask=live_m, other=0.0
    )
    for group in range(first, end):
        # Triton does not pipeline loads this small: they are fetched one step ahead
        following = tl.cast(tl.minimum(group + 1, num_groups - 1), tl.int64)
        next_group_scale = tl.load(
            group_scale_ptr + following * weight_rows + n, mask=live_n, other=0
        )
        if not TWO_LEVEL:
            next_scale = tl.load(scale_ptr + following * M + m, mask=live_m, other=0.0)
        packed = tl.load(weight_tile + tl.cast(group, tl.int64) * weight_rows * HALF_GROUP).to(
            tl.int8, bitcast=True
        )
        if FEW:
            codes = tl.load(codes_tile + group * GROUP, mask=live_m[None, :], other=0)
        else:
            codes = tl.load(codes_tile + group * GROUP)
        sums = tl.dot(_unpack(packed, IS_E2M1, PTX), codes, out_dtype=tl.int32)
        if TWO_LEVEL:
            acc += (sums >> 4) * group_scale.to(tl.int32)[:, None]
        else:
            acc += sums.to(tl.float32) * (group_scale.to(tl.float32)[:, None] * scale[None, :])
            scale = next_scale
        group_scale = next_group_scale
    if OVERLAP:
        gdc_launch_dependents()
    if TWO_LEVEL:
        row_scale = tl.load(row_scale_ptr + n, mask=live_n, other=0.0)
        acc = acc.to(tl.float32) * (row_scale[:, None] * scale[None, :])
    if OUTLIERS > 0:
        if not OUTLIERS_FIRST:
            if has_outliers:
                sums = tl.dot(outlier_weight, outlier_codes, out_dtype=tl.int32)
                acc += sums.to(tl.float32) * (
                    outlier_weight_scale[:, None] * outlier_scale[None, :]
                )
    if not TWO_LEVEL:
        acc *= 1.0 / TIMES

    store_tile(
        acc, m, n, M, N, bias_ptr, residual_ptr, out_ptr, partial_ptr, arrivals_ptr,
        tile, split, splits, HAS_BIAS, HAS_RESIDUAL, IS_SPLIT,
    )  # fmt: skip


PATH = "triton int8"  # what tables and tuned launches call this kernel


class Tiling(NamedTuple):
    """How one launch cuts the product; see linear_kernel."""

    block_n: int
    block_m: int
    split_k: int
    num_warps: int = 4
    num_stages: int = 3


def default_tiling(M: int, N: int, num_groups: int, multiprocessors: int) -> Tiling:
    """A sound choice for any shape: few tokens are split along K until the device is full.

    The numbers were measured on an H100, those of the finest splits on an H200.
    """
    block_m = min(max(8, next_power_of_2(M)), 128)
    block_n = 128 if 16 <= block_m <= 64 and 128 * multiprocessors <= N else 64
    tiles = cdiv(M, block_m) * cdiv(N, 64)
    resident = multiprocessors * (4 if block_m <= 32 else 3 if block_m == 64 else 2)  # registers
    fewest_groups = 3 if block_m <= 16 else 7  # worth a partial sum of their own
    lightest = 9 * num_groups // M  # else the partial sums outweigh the weights
    most = 8 if block_m <= 32 else 4
    most = min(num_groups // fewest_groups, lightest, most)
    split_k = max(1, min(resident // tiles, most))
    split_k = 1 << (split_k.bit_length() - 1)
    if block_m <= 16 and 2 * split_k <= most:
        # programs that a multiprocessor gets at most, in whole tiles
        load = cdiv(split_k * tiles, multiprocessors) / split_k
        if cdiv(2 * split_k * tiles, multiprocessors) / (2 * split_k) < 0.85 * load:
            split_k *= 2
        elif split_k > 1 and num_groups >= 48 * split_k:
            split_k += split_k // 2
    return Tiling(block_n, block_m, split_k)


def candidates(M: int, N: int, num_groups: int) -> list[Tiling | HopperTiling]:
    """What tuning measures, the likeliest first: around what serves such sizes."""
    tilings = linear_hopper.tilings(two_level=False)
    hopper = [one for one in tilings if one.block_m <= max(16, 4 * M)]
    return [*hopper, *split_candidates(M, num_groups)]


def split_candidates(M: int, num_groups: int, stages: Sequence[int] = (3, 4, 2, 5)) -> list[Tiling]:
    """Those of the kernels that split K, the likeliest first."""
    block_m = min(max(8, next_power_of_2(M)), 128)
    few = block_m <= 16
    if few:
        # (block_n, num_warps): a warp that has more rows has fewer instructions for each of them
        cuts = [(64, 2), (32, 2), (64, 4), (32, 1), (128, 4), (64, 1), (128, 2)]
        cuts += [(128, 8), (32, 4), (256, 8)]
        splits = [1, 2, 3, 4, 6, 8, 12, 16]
    else:
        cuts = [(64, 4), (128, 4), (32, 4), (256, 4), (128, 8), (64, 8), (256, 8), (32, 8)]
        splits = [1, 2, 4, 8, 16]
    splits = [split for split in splits if split <= num_groups // 2 and split * M <= 2048]
    return [
        Tiling(block_n, height, split_k, num_warps, num_stages)
        for num_stages in stages
        for height in ([block_m] if block_m < 128 else [128, 64])
        for block_n, num_warps in cuts
        if block_n * height <= 128 * 128
        for split_k in splits or [1]
    ]


_MOST_NARROW_ROWS = 16384
_FEW_TOKENS = 32  # up to so many the weights' bytes are all that matters


def fastest_tiling(
    M: int, N: int, num_groups: int, group_size: int, outliers: int, device: torch.device,
    two_level: bool = False,
) -> Tiling | HopperTiling:  # fmt: skip
    """For sizes that nobody tuned: by a model of what each kernel takes."""
    processors = multiprocessors(device)
    if M > _FEW_TOKENS and linear_hopper.fits(device, N, group_size, outliers):
        steps = linear_hopper.steps_of_tile(num_groups, outliers)
        step_us = linear_hopper.STEP_US[two_level]
        tiling, microseconds = hopper_tiles.best_tiling(M, N, steps, step_us, processors)
        # measured of linear_kernel: 7 us, and 280 T multiplications a second
        if microseconds < 7 + M * N * num_groups * group_size / 280e6:
            return tiling
    split = default_tiling(M, N, num_groups, processors)
    return split if two_level else _with_fewer_warps(split, N)  # measured with group scales


def _with_fewer_warps(tiling: Tiling, N: int) -> Tiling:
    """As many rows for half or a quarter of the warps: 198 instructions for each of two where four
    have 145. On an H200 all of Llama-3's linears for 1 to 16 tokens are 3 to 8 % faster so, but for
    those with the most outputs.
    """
    if tiling.block_m == 8 and N <= _MOST_NARROW_ROWS:
        return tiling._replace(block_n=32, num_warps=1)
    if tiling.block_m <= 16 and N <= 2 * _MOST_NARROW_ROWS:
        return tiling._replace(block_n=64, num_warps=2)
    return tiling


def tuned_tiling(
    tuned: tuning.Tuned, path: str, hopper_path: str, hopper: Sequence[HopperTiling]
) -> Tiling | HopperTiling | None:
    """What a row says, of the kernel of either path; None if this version cannot launch that."""
    if tuned.path == path and set(tuned.tiling) == set(Tiling._fields):
        return Tiling(**tuned.tiling)
    if tuned.path == hopper_path:
        return next((one for one in hopper if one._asdict() == tuned.tiling), None)
    return None


@functools.lru_cache(maxsize=4096)
def choose_tiling(
    M: int, N: int, num_groups: int, group_size: int, outliers: int, device: torch.device,
    two_level: bool = False,
) -> Tiling | HopperTiling:  # fmt: skip
    """The tuned one, where there is one; for a weight of E2M1, what INT4 was tuned for."""
    tuned = None if two_level else tuning.find(device, M, N, num_groups, group_size)
    if tuned:
        hopper = linear_hopper.tilings(two_level)
        tiling = tuned_tiling(tuned, PATH, linear_hopper.PATH, hopper)
        own = isinstance(tiling, Tiling)
        if tiling and (own or linear_hopper.fits(device, N, group_size, outliers)):
            return tiling
    return fastest_tiling(M, N, num_groups, group_size, outliers, device, two_level)


def describe(M: int, N: int, layout: GroupLayout, device: torch.device) -> str:
    """The path that a product of these sizes takes."""
    if device.type != "cuda":
        return "reference"
    sizes = layout.num_groups, layout.group_size, layout.outlier_channels
    return path_of(choose_tiling(M, N, *sizes, device, layout.per_token))


def path_of(tiling: Tiling | HopperTiling) -> str:
    return PATH if isinstance(tiling, Tiling) else linear_hopper.PATH


def multiply(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    group_scale: Tensor,
    row_scale: Tensor | None,
    outlier_weight: Tensor,
    outlier_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    tiling: Tiling | HopperTiling | None = None,
    format: str = "int",
) -> Tensor:
    """`linear` on a GPU, `group_scale` being its weight_scale; with `row_scale`, two_level_linear.

    tiling: for tuning; it names the kernel as well. format: `linear`'s.
    """
    if codes.numel() == 0:
        return codes.new_empty(*codes.shape[:-1], weight.shape[1], dtype=dtype)
    codes, scale = codes.contiguous(), scale.contiguous()
    sizes = codes.shape, weight.shape, rows_per_group(weight), outlier_weight.shape[1]
    options = bias is not None, residual is not None, row_scale is not None, dtype, format
    product, tiling = plan_product(*sizes, *options, tiling, codes.device)
    if isinstance(tiling, Tiling):
        operands: tuple[Tensor | None, ...] = (
            codes, scale, weight, group_scale, row_scale, outlier_weight, outlier_scale
        )  # fmt: skip
    elif linear_hopper.is_aligned(weight, group_scale):
        operands = (
            codes, weight, outlier_weight if outlier_weight.shape[1] else weight, scale,
            group_scale, row_scale, outlier_scale,
        )  # fmt: skip
    else:
        M, (num_groups, N, _) = codes.numel() // codes.shape[-1], weight.shape
        tiling = default_tiling(M, N, num_groups, multiprocessors(codes.device))
        return multiply(
            codes, scale, weight, group_scale, row_scale, outlier_weight, outlier_scale, bias,
            residual, dtype, tiling, format,
        )  # fmt: skip
    return product.multiply(codes, operands, bias, residual)


@plan
def plan_product(
    codes_shape: torch.Size,
    weight_shape: torch.Size,
    rows_per_group: int,
    outliers: int,
    has_bias: bool,
    has_residual: bool,
    is_two_level: bool,
    dtype: torch.dtype,
    format: str,
    tiling: Tiling | HopperTiling | None,
    device: torch.device,
) -> tuple[Product, Tiling | HopperTiling]:
    """Its operands are the tensors of `multiply`, in the order of the tiling's kernel."""
    num_groups, N, half_group = weight_shape
    M, width = math.prod(codes_shape[:-1]), codes_shape[-1]
    tiling = tiling or choose_tiling(
        M, N, num_groups, 2 * half_group, outliers, device, is_two_level
    )
    out = buffer(*codes_shape[:-1], N, dtype=dtype)
    if isinstance(tiling, HopperTiling):
        sharing, launch = linear_hopper.plan_launch(
            (M, width), weight_shape, rows_per_group, outliers, has_bias, has_residual,
            is_two_level, format == "e2m1", tiling, multiprocessors(device),
        )  # fmt: skip
        return Product(out, sharing, launch), tiling
    tiles, sharing = split_tiles(M, N, tiling)
    launch = Launch(
        linear_kernel,
        (tiles, tiling.split_k),
        (M, N, rows_per_group, num_groups, width),
        HALF_GROUP=half_group,
        OUTLIERS=outliers,
        OUTLIER_BLOCK=max(32, next_power_of_2(max(outliers, 1))),
        HAS_BIAS=has_bias,
        HAS_RESIDUAL=has_residual,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        IS_SPLIT=tiling.split_k > 1,
        TWO_LEVEL=is_two_level,
        IS_E2M1=format == "e2m1",
        TILES_PER_BAND=8,
        PTX=device.type == "cuda",
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **overlap(device, tiling.block_m),
    )
    return Product(out, sharing, launch), tiling


def forget_tilings() -> None:
    """Looks tuned launches up anew from now on."""
    tuning.forget()
    choose_tiling.cache_clear()
    plan_product.cache_clear()


def split_tiles(M: int, N: int, tiling: Tiling) -> tuple[int, Sharing]:
    """How many tiles a product has, and how programs share them."""
    tiles = cdiv(M, tiling.block_m) * cdiv(N, tiling.block_n)
    if tiling.split_k == 1:
        return tiles, ALONE
    return tiles, Sharing(buffer(tiling.split_k, M, N, dtype=torch.float32), tiles)


def launch(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    outlier_weight: Tensor,
    outlier_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    tiling: Tiling | HopperTiling | None = None,
    *,
    format: str = "int",
) -> Tensor:
    """The kernels on the arguments of `reference`; `tiling` is for tuning."""
    return multiply(
        codes, scale, weight, weight_scale, None, outlier_weight, outlier_scale, bias, residual,
        dtype, tiling, format,
    )  # fmt: skip


linear = define(
    "linear(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, Tensor outlier_weight, "
    "Tensor outlier_scale, Tensor? bias, Tensor? residual, ScalarType dtype, *, "
    "str format='int') -> Tensor",
    reference,
    fake,
    launch,
)
