"""`atom::weight_only_linear`: 16-bit activations times a packed weight, of INT4 or few-bit floats.

    out[m, n] = sum_g weight_scale[g, n] * sum_k x[m, k] * (weight[n, k] - zero_point[g, n])
              + bias[n]                 rounded to the output's dtype, then + residual[m, n]

The sums run over k, the channels of group g. Codes are exact in 16 bits, so tensor cores multiply
them as they are and the scale goes to a group's sum: no weight is rounded, and all sums are of
float32. Only for many tokens each weight is scaled first and rounded to `dtype`: by Hopper's own
kernel (weight_only_hopper.py) in registers, or, where unpacking for every tile of tokens would cost
more than it saves, by dequantizing the whole weight, which PyTorch then multiplies. The kernels in
this file serve `float8_linear` as well, whose activations are e4m3 and whose weight has one scale
per row.

The bits of a floating-point code are moved to where the wider format has them (formats.py). Those
beyond four lie in `high_bits`, P bytes for a row of a group, each shared by bytes of `weight` that
are P apart (packing.py). So the kernels cut a row of a group into *parts* of P bytes: as tiles of
one shape they are spread over the threads alike, and each code meets its other bits.

Sources: GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978) for the numbers; for turning codes into
16-bit floats by their exponent Kim et al., "Who Says Elephants Can't Run" (arXiv 2211.10017); for
floating-point weights FP6-LLM (arXiv 2401.14112).

MXFP4 and NVFP4 (block_formats.py) keep their scales of 8 bits, which the kernels read as they are:

    MXFP4   a block is a group; its scale, of float32's range, goes to the group's sum
    NVFP4   the lower codes of a group are one block, the upper ones another: a code times its scale
            is exact in 16 bits, and the scale of the whole tensor goes to the output, as row_scale

To scale NVFP4's codes in registers takes fewer instructions than to scale the sums of blocks of 16.
In bfloat16, where a code has to be multiplied by a power of two anyhow, it costs none for a code:
compiled for sm_90 a warp has 257, 176 and 170 of them in a step with 1, 32 and 64 tokens, instead
of 397, 201 and 232.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from . import linear, tuning, weight_only_hopper
from .arrivals import Product
from .dequantize import dequantize
from .devices import is_hopper, multiprocessors
from .formats import element_format
from .hopper_tiles import HopperTiling
from .launching import Launch, buffer, plan
from .library import define
from .linear import Tiling, split_tiles, store_tile, tile_in_band, tuned_tiling
from .overlap import overlap, zero_when_ready
from .packing import GroupedWeight, GroupLayout, dequantize_weight, rows_per_group
from .sizes import cdiv
from .weight_values import (
    bits_of,
    load_scales,
    num_parts,
    power_left,
    power_of_e4m3,
    read_scale,
    scale_of,
    to_values,
)


def reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    high_bits: Tensor | None,
    row_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    *,
    format: str = "int",
) -> Tensor:
    """x (*, K), rounded to `dtype`; the weight as `packing.GroupedWeight`, bias (N,), residual
    (*, N) -> (*, N) in `dtype`.

    format: "int", or the name of the weight's format in `formats.FORMATS` or `BLOCK_FORMATS`.
    """
    layout = GroupLayout(x.shape[-1], 2 * weight.shape[2], 0)
    packed = GroupedWeight(weight, weight_scale, zero_point, high_bits, row_scale)
    dense = dequantize_weight(packed, layout, format)
    out = F.linear(x.to(dtype).float(), dense)
    if bias is not None:
        out = out + bias.float()
    out = out.to(dtype)
    return out if residual is None else out + residual


def fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    high_bits: Tensor | None,
    row_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    *,
    format: str = "int",
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1], dtype=dtype)


@triton.jit
def _e4m3_as_float16(x):
    """Bytes of e4m3 -> float16, 2^-8 of the value: exact, and for GPUs that know no e4m3."""
    wide = x.to(tl.int16)
    return ((wide & 0x80) << 8 | (wide & 0x7F) << 7).to(tl.float16, bitcast=True)


@triton.constexpr_function
def _exchanging(registers):
    """PTX that moves registers, of which the first half is a thread's first four channels: to where
    the last bit of their number and its first one are exchanged."""
    half = registers // 2
    moves = []
    for to in range(registers):
        source = (to & ~(1 | half)) + (to & 1) * half + to // half
        moves.append(f"mov.b32 ${to}, ${registers + source};")
    return "{" + " ".join(moves) + "}"


@triton.constexpr_function
def _operands(registers):
    return ",".join(["=&r"] * registers + ["r"] * registers)


@triton.jit
def _side_by_side(tile, REGISTERS: tl.constexpr):
    """An operand of `mma.sync` of 16 bits, its channels in another order, both operands' the same.

    Beside weights of a byte each a thread has four channels in a row, and then four of which each
    is 16 further on. One product takes the first two of both fours, the next one the last two; but
    it takes them in registers side by side, for which half of them would have to be moved, eight in
    a hundred instructions. In this order it is the first four that it takes. Nothing is moved: the
    assembler renames. REGISTERS: 4 of the right operand have those eight channels of a token, 8 of
    the left one those of two rows.

    The tile must be where tensor cores take it from, which is Triton's choice. Zero points of rows
    have it unpack some shapes of tiles elsewhere.
    """
    return tl.inline_asm_elementwise(
        _exchanging(REGISTERS), _operands(REGISTERS), [tile],
        dtype=tile.dtype, is_pure=True, pack=2 * REGISTERS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def weight_only_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    zero_point_ptr,
    high_bits_ptr,
    row_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    M,
    N,
    K,
    weight_rows,
    num_groups,
    HALF_GROUP: tl.constexpr,
    PART_STEP: tl.constexpr,
    RAGGED: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    HAS_X_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    TILES_PER_BAND: tl.constexpr,
    PACK: tl.constexpr,
    MMA_SYNC: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One tile of out^T = weight x^T: a weight on the left stays in registers, unpacked.

    A step is a group, or a piece of a large one: PART_STEP bytes of a row from each of its parts.
    Programs along the grid's second axis split K, as in `linear_kernel`. A group begins
    `weight_rows` rows after the one before: N, or more where the weight is part of a larger one.
    RAGGED: the last group is not full, and what lies behind a token's last channel is another
    token's. EXPONENT_BITS, MANTISSA_BITS: of the weight's format, or 0 for INT4. SCALE: as for
    `read_scale`; with "e4m3" a group has two, and row_scale_ptr is read. MMA_SYNC: whether
    Triton multiplies by `mma.sync`.
    """
    PARTS: tl.constexpr = num_parts(EXPONENT_BITS, MANTISSA_BITS)
    HAS_HIGH_BITS: tl.constexpr = EXPONENT_BITS + MANTISSA_BITS > 3
    PART_BYTES: tl.constexpr = HALF_GROUP // PARTS  # bytes of a row of a group
    STEPS: tl.constexpr = PART_BYTES // PART_STEP  # a group's
    OF_BYTES: tl.constexpr = x_ptr.dtype.element_ty == tl.uint8
    DTYPE: tl.constexpr = tl.float16 if OF_BYTES else x_ptr.dtype.element_ty
    UNPLACED: tl.constexpr = power_left(EXPONENT_BITS, DTYPE) * (256.0 if OF_BYTES else 1.0)
    IS_SCALED: tl.constexpr = SCALE == "e4m3"
    DEEP: tl.constexpr = PART_STEP >= 32  # two products of 16 bits
    SIDE_BY_SIDE: tl.constexpr = (
        MMA_SYNC and DEEP and DTYPE.primitive_bitwidth == 16 and not HAS_ZERO_POINT
    )
    tile = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1) if IS_SPLIT else 1
    tile_m, tile_n = tile_in_band(tile, M, N, BLOCK_M, BLOCK_N, TILES_PER_BAND)

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    live_m = (m < M)[None, :]
    live_n = n < N
    # tokens past the end: as in linear_kernel. One token, read 8 times over, took 37 us on an H200
    # where four, read twice, took 23 (INT4, 28672 x 4096)
    FEW: tl.constexpr = BLOCK_M <= 16
    m_row = tl.where(m < M, m, tl.minimum(m - M, M - 1)).to(tl.int64)
    n_row = tl.where(live_n, n, 0).to(tl.int64)
    lane = tl.arange(0, PART_STEP)
    x_tile = x_ptr + m_row[None, :] * K + lane[:, None]
    weight_tile = weight_ptr + n_row[:, None] * HALF_GROUP + lane[None, :]
    high_bits_tile = high_bits_ptr + n_row[:, None] * PART_BYTES + lane[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    first = split * num_groups // splits
    end = (split + 1) * num_groups // splits
    # Triton does not pipeline loads this small: they are fetched one step ahead
    scale_at = tl.cast(first, tl.int64) * weight_rows
    low_scale, high_scale = load_scales(weight_scale_ptr, scale_at, weight_rows, n, live_n, SCALE)
    zero_point = tl.zeros((BLOCK_N,), dtype=tl.int8)
    if HAS_ZERO_POINT:
        zero_point = tl.load(zero_point_ptr + scale_at + n, mask=live_n, other=0)
    for step in range(first * STEPS, end * STEPS):
        group = step // STEPS
        byte = (step % STEPS) * PART_STEP
        following = tl.cast(tl.minimum((step + 1) // STEPS, num_groups - 1), tl.int64)
        following = following * weight_rows
        next_low_scale, next_high_scale = load_scales(
            weight_scale_ptr, following, weight_rows, n, live_n, SCALE
        )
        if HAS_ZERO_POINT:
            next_zero_point = tl.load(zero_point_ptr + following + n, mask=live_n, other=0)
        first_row = tl.cast(group, tl.int64) * weight_rows
        if HAS_HIGH_BITS:
            high_bits = tl.load(high_bits_tile + first_row * PART_BYTES + byte)
        low_unit, high_unit = read_scale(low_scale, SCALE), read_scale(high_scale, SCALE)
        sums = acc if IS_SCALED else tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            at = part * PART_BYTES + byte
            packed = tl.load(weight_tile + first_row * HALF_GROUP + at)
            channel = group * 2 * HALF_GROUP + at
            if OVERLAP:
                channel += 2 * HALF_GROUP * zero_when_ready(step)  # no less aligned for it
            if RAGGED:
                low_live = (channel + lane[:, None] < K) & live_m
                high_live = (channel + HALF_GROUP + lane[:, None] < K) & live_m
                x_low = tl.load(x_tile + channel, mask=low_live, other=0.0)
                x_high = tl.load(x_tile + channel + HALF_GROUP, mask=high_live, other=0.0)
            elif FEW:
                x_low = tl.load(x_tile + channel, mask=live_m, other=0.0)
                x_high = tl.load(x_tile + channel + HALF_GROUP, mask=live_m, other=0.0)
            else:
                x_low = tl.load(x_tile + channel)
                x_high = tl.load(x_tile + channel + HALF_GROUP)
            if OF_BYTES:
                x_low = _e4m3_as_float16(x_low)
                x_high = _e4m3_as_float16(x_high)
            low, high = to_values(
                packed, high_bits if HAS_HIGH_BITS else packed, zero_point, low_unit, high_unit,
                DTYPE, PACK, EXPONENT_BITS, MANTISSA_BITS, part, IS_SCALED,
            )  # fmt: skip
            if SIDE_BY_SIDE:
                low, high = _side_by_side(low, 8), _side_by_side(high, 8)
                x_low, x_high = _side_by_side(x_low, 4), _side_by_side(x_high, 4)
            sums = tl.dot(low, x_low, sums, input_precision="ieee")
            sums = tl.dot(high, x_high, sums, input_precision="ieee")
        # tensor cores that multiply e4m3 keep some 14 bits: they add up a step and no more
        if SCALE == "row":
            acc += sums
        else:
            acc = sums if IS_SCALED else acc + sums * low_unit[:, None]
        low_scale, high_scale = next_low_scale, next_high_scale
        if HAS_ZERO_POINT:
            zero_point = next_zero_point
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    acc *= UNPLACED
    if IS_SCALED or SCALE == "row":
        row_scale = tl.load(row_scale_ptr + n, mask=live_n, other=0.0)
        if IS_SCALED:
            row_scale *= 1.0 / power_of_e4m3(DTYPE)
        acc *= row_scale[:, None]
    if HAS_X_SCALE:
        acc *= tl.load(x_scale_ptr + m, mask=m < M, other=0.0)[None, :]

    store_tile(
        acc, m, n, M, N, bias_ptr, residual_ptr, out_ptr, partial_ptr, arrivals_ptr,
        tile, split, splits, HAS_BIAS, HAS_RESIDUAL, IS_SPLIT,
    )  # fmt: skip


PATH = "triton 16-bit"
DEQUANTIZE = "dequantize, cuBLAS"
_FEW_TOKENS = 16  # whose tiles are so small that their shared-out sums cost more than they save
_MOST_TOKENS = 256  # for more the weight is dequantized, on a GPU that nobody measured
_MOST_CHANNELS = 128  # a step's
_LEAST_DEPTH = 16  # of a product of tiles
# of an H100, a microsecond
_BYTES = 2.3e6
_PRODUCTS = {"int": 180e6, "other": 110e6}  # of weight_only_kernel
_DENSE_PRODUCTS = 370e6


class Dense(NamedTuple):
    """In place of a tiling: the weight is dequantized, and PyTorch multiplies."""


@functools.lru_cache(maxsize=4096)
def choose_tiling(
    M: int,
    N: int,
    K: int,
    group_size: int,
    dtype: torch.dtype,
    device: torch.device,
    format: str = "int",
) -> Tiling | HopperTiling | Dense:
    """The tuned one, where there is one, and by that which kernel's."""
    size = M, N, cdiv(K, group_size), group_size
    known = dtype.itemsize == 2
    tuned = tuning.find(device, *size, "weight_only_linear", format) if known else None
    if tuned and tuned.path == DEQUANTIZE:
        return Dense()
    if tuned:
        hopper = _hopper_tilings(N, K, group_size, dtype, format, device)
        if tiling := tuned_tiling(tuned, PATH, weight_only_hopper.PATH, hopper):
            return tiling
    return fastest_tiling(M, N, K, group_size, dtype, device, format)


def fastest_tiling(
    M: int,
    N: int,
    K: int,
    group_size: int,
    dtype: torch.dtype,
    device: torch.device,
    format: str,
) -> Tiling | HopperTiling | Dense:
    """For sizes that nobody tuned: by a model of what each kernel takes."""
    num_groups = cdiv(K, group_size)
    tiling = packed_tiling(M, N, num_groups, dtype, device, format)
    if not is_hopper(device):
        return tiling if M <= _MOST_TOKENS else Dense()
    # by simple models of what each takes, with what was measured on an H100
    kind = _kind(format)
    weight_us = N * (K / _BYTES) * (_width(format) / 8)
    packed_us = 7 + max(weight_us, M * N * (K / _PRODUCTS[kind]))
    dense_us = 5 + weight_us + N * K * 2 / _BYTES + M * N * (K / _DENSE_PRODUCTS)
    choices: list[tuple[float, Tiling | HopperTiling | Dense]] = [
        (packed_us, tiling),
        (dense_us, Dense()),
    ]
    if M > _FEW_TOKENS and weight_only_hopper.fits(N, K, group_size, dtype, format):
        sizes = M, N, num_groups, dtype, kind, multiprocessors(device)
        on_hopper, us = weight_only_hopper.best_tiling(*sizes)
        choices.append((us, on_hopper))
    return min(choices, key=lambda choice: choice[0])[1]


def candidates(
    M: int, N: int, K: int, group_size: int, dtype: torch.dtype, device: torch.device, format: str
) -> list[Tiling | HopperTiling | Dense]:
    """What tuning measures, the likeliest first."""
    hopper = _hopper_tilings(N, K, group_size, dtype, format, device)
    found: list[Tiling | HopperTiling | Dense] = [one for one in hopper if one.block_m <= 4 * M]
    if M > _FEW_TOKENS:
        found.append(Dense())
    own = linear.split_candidates(M, cdiv(K, group_size), stages=(3, 4, 5, 2))
    return found + [one for one in own if _is_possible(one, dtype, format)]


def _hopper_tilings(
    N: int, K: int, group_size: int, dtype: torch.dtype, format: str, device: torch.device
) -> list[HopperTiling]:
    if not is_hopper(device) or not weight_only_hopper.fits(N, K, group_size, dtype, format):
        return []
    return weight_only_hopper.tilings(dtype, _kind(format))


def _is_possible(tiling: Tiling, dtype: torch.dtype, format: str) -> bool:
    """Tiles of fewer than four warps are for those whose codes are then unpacked in place."""
    if tiling.num_warps < 4 and not _stays_in_place(format):
        return False
    return tiling.block_m <= _most_block_m(dtype)


def _most_block_m(dtype: torch.dtype) -> int:
    """Tokens that the shared memory of every GPU since sm_80 holds."""
    return 128 if dtype.itemsize == 2 else 32


def _stays_in_place(format: str) -> bool:
    """Whether one or two warps unpack in the threads that multiply. Tiles as narrow as a quarter of
    a group Triton unpacks in others; so it does with a group of MXFP4: 344 instructions for each of
    two warps, 118 for each of four."""
    return _num_parts(format) < 4 and format != "mxfp4"


def packed_tiling(
    M: int, N: int, num_groups: int, dtype: torch.dtype, device: torch.device, format: str
) -> Tiling:
    """How `weight_only_kernel` cuts the product."""
    tiling = linear.default_tiling(M, N, num_groups, multiprocessors(device))
    if tiling.block_m <= 16 and _stays_in_place(format):
        # two warps multiply by mma.sync, on Hopper too, which takes its weights by whole words: a
        # third fewer instructions than with wgmma at 8 tokens, as many at 32, a third more at 64
        block_n = 32 if tiling.block_m == 8 else 64
        return Tiling(block_n, tiling.block_m, tiling.split_k, 2, 3)
    block_m = min(tiling.block_m, _most_block_m(dtype))
    return Tiling(64, block_m, tiling.split_k, 4, 3 if block_m <= 64 else 2)


def _pack(device: torch.device, tiling: Tiling) -> int:
    """See to_values."""
    if device.type != "cuda":
        return 0
    return 2 if is_hopper(device) and _fills_warpgroups(tiling) else 4


def _takes_mma_sync(device: torch.device, tiling: Tiling) -> bool:
    """Whether Triton is known to multiply tiles of 16 bits by it, as `_side_by_side` needs it."""
    if device.type != "cuda" or not triton.__version__.startswith(("3.6.", "3.7.")):
        return False
    has_tcgen05 = torch.cuda.get_device_capability(device)[0] in (10, 11)
    return not (is_hopper(device) or has_tcgen05) or not _fills_warpgroups(tiling)


def _fills_warpgroups(tiling: Tiling) -> bool:
    """Whether Triton multiplies by `wgmma` on Hopper."""
    return tiling.num_warps >= 4 and tiling.block_n >= 64 and tiling.block_m >= 16


def describe(
    M: int,
    N: int,
    layout: GroupLayout,
    dtype: torch.dtype,
    device: torch.device,
    format: str = "int",
) -> str:
    """The path that a product of these sizes takes."""
    if device.type != "cuda":
        return "reference"
    return path_of(choose_tiling(M, N, layout.width, layout.group_size, dtype, device, format))


def path_of(tiling: Tiling | HopperTiling | Dense) -> str:
    if isinstance(tiling, HopperTiling):
        return weight_only_hopper.PATH
    return PATH if isinstance(tiling, Tiling) else DEQUANTIZE


def forget_tilings() -> None:
    """Looks tuned launches up anew from now on."""
    tuning.forget()
    choose_tiling.cache_clear()


def least_group_size(format: str) -> int:
    """What the kernel can multiply by: a group's part is at least as deep as a product of tiles."""
    return 2 * _LEAST_DEPTH * _num_parts(format)


@functools.cache
def _num_parts(format: str) -> int:
    return int(num_parts(*bits_of(format)))


def _width(format: str) -> int:
    return 4 if format == "int" else element_format(format).bits


def _kind(format: str) -> str:
    """Of whose times the models of a kernel's speed know: `_PRODUCTS`, `STEP_US`."""
    return "int" if format == "int" else "other"


def launch(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    high_bits: Tensor | None,
    row_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    tiling: Tiling | HopperTiling | Dense | None = None,
    *,
    format: str = "int",
) -> Tensor:
    """The arguments of `reference`, on a GPU; `tiling` is for tuning."""
    x = x.to(dtype)
    num_groups, N, half_group = weight.shape
    M = x.numel() // x.shape[-1]
    if M == 0:
        return x.new_empty(*x.shape[:-1], N)
    if tiling is None:
        tiling = choose_tiling(M, N, x.shape[-1], 2 * half_group, dtype, x.device, format)
    if isinstance(tiling, HopperTiling):
        planes = weight, weight_scale, zero_point, high_bits
        if weight_only_hopper.is_aligned(*planes):
            return multiply_on_hopper(x, *planes, bias, residual, tiling, format=format)
        tiling = packed_tiling(M, N, num_groups, dtype, x.device, format)
    arguments = (x, weight, weight_scale, zero_point, high_bits, row_scale, bias, residual)
    if isinstance(tiling, Dense):
        return multiply_dense(*arguments, format=format)
    return multiply_packed(*arguments, tiling, format=format)


def multiply_on_hopper(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    high_bits: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    tiling: HopperTiling,
    *,
    format: str = "int",
) -> Tensor:
    """`launch` by Hopper's own kernel, in x's dtype, for sizes that it fits."""
    x = x.contiguous()
    product = weight_only_hopper.plan_product(
        x.shape, weight.shape, rows_per_group(weight),
        0 if high_bits is None else high_bits.shape[2], x.dtype, zero_point is not None,
        bias is not None, residual is not None, bits_of(format), tiling, multiprocessors(x.device),
    )  # fmt: skip
    high_rows = weight if high_bits is None else high_bits
    operands = x, weight, high_rows, weight_scale, zero_point
    return product.multiply(x, operands, bias, residual)


def multiply_packed(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    high_bits: Tensor | None,
    row_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    tiling: Tiling,
    *,
    format: str = "int",
    x_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`launch` by one kernel, in x's dtype, for at least one token.

    x_scale, dtype: of `float8_linear`, whose x is e4m3 or its bytes; weight_scale is not read then.
    """
    x = x.contiguous()
    product = _plan_product(
        x.shape, weight.shape, rows_per_group(weight), dtype or x.dtype, zero_point is not None,
        x_scale is not None, bias is not None, residual is not None, format, tiling,
        x.device,
    )  # fmt: skip
    x_scale = None if x_scale is None else x_scale.contiguous()
    operands = x, x_scale, weight, weight_scale, zero_point, high_bits, row_scale
    return product.multiply(x, operands, bias, residual)


@plan
def _plan_product(
    x_shape: torch.Size,
    weight_shape: torch.Size,
    rows_per_group: int,
    dtype: torch.dtype,
    has_zero_point: bool,
    has_x_scale: bool,
    has_bias: bool,
    has_residual: bool,
    format: str,
    tiling: Tiling,
    device: torch.device,
) -> Product:
    """dtype: of the output."""
    num_groups, N, half_group = weight_shape
    M, K = math.prod(x_shape[:-1]), x_shape[-1]
    tiles, sharing = split_tiles(M, N, tiling)
    exponent_bits, mantissa_bits = bits_of(format)
    launch = Launch(
        weight_only_kernel,
        (tiles, tiling.split_k),
        (M, N, K, rows_per_group, num_groups),
        HALF_GROUP=half_group,
        PART_STEP=min(half_group, _MOST_CHANNELS // 2) // _num_parts(format),
        RAGGED=K % (2 * half_group) != 0,
        EXPONENT_BITS=exponent_bits,
        MANTISSA_BITS=mantissa_bits,
        SCALE="row" if has_x_scale else scale_of(format),
        HAS_ZERO_POINT=has_zero_point,
        HAS_X_SCALE=has_x_scale,
        HAS_BIAS=has_bias,
        HAS_RESIDUAL=has_residual,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        IS_SPLIT=tiling.split_k > 1,
        TILES_PER_BAND=8,
        PACK=_pack(device, tiling),
        MMA_SYNC=_takes_mma_sync(device, tiling),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **overlap(device, tiling.block_m),
    )
    return Product(buffer(*x_shape[:-1], N, dtype=dtype), sharing, launch)


def multiply_dense(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    high_bits: Tensor | None,
    row_scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    format: str = "int",
) -> Tensor:
    """`launch` by way of the whole weight in x's dtype, for as long as the call takes."""
    packed = GroupedWeight(weight, weight_scale, zero_point, high_bits, row_scale)
    dense = dequantize(packed, x.shape[-1], x.dtype, format)
    out = F.linear(x, dense, None if bias is None else bias.to(x.dtype))
    return out if residual is None else out + residual


weight_only_linear = define(
    "weight_only_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? zero_point, "
    "Tensor? high_bits, Tensor? row_scale, Tensor? bias, Tensor? residual, ScalarType dtype, *, "
    'str format="int") -> Tensor',
    reference,
    fake,
    launch,
)
