"""`atom::weight_only_linear`: 16-bit activations times a packed weight, of INT4 or few-bit floats.

    out[m, n] = sum_g weight_scale[g, n] * sum_k x[m, k] * (weight[n, k] - zero_point[g, n])
              + bias[n]                 rounded to the output's dtype, then + residual[m, n]

The sums run over k, the channels of group g. Codes are exact in 16 bits, so tensor cores multiply
them as they are and the scale goes to a group's sum: no weight is rounded, and all sums are of
float32. Only for many tokens, where unpacking for every tile of them would cost more than it saves,
the whole weight is dequantized first, to `dtype`, and PyTorch multiplies.

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

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import linear
from .devices import is_hopper, multiprocessors
from .formats import BLOCK_FORMATS, element_format
from .library import define
from .linear import Tiling, split_buffers, store_tile, tile_in_band
from .packing import GroupedWeight, GroupLayout, dequantize_weight


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


@triton.constexpr_function
def _unpacking(dtype, pack):
    """PTX that makes 16-bit floats of 4-bit codes, two bytes at a time.

    The bytes are spread over the halves of a register. The mantissa of 128 in bfloat16, of 1024 in
    float16, counts in ones: a code plus 8 in its last bits makes it 136 or 1032 plus the code. To
    add the summand, -136 or -1032 less the zero point, is exact.

    Results are the lower codes of `pack` bytes, then the upper ones; operands the bytes, a whole
    register or half a one, then the summand.
    """
    words = pack // 2  # of a result
    if dtype == tl.bfloat16:
        kind, one, code_zero = "bf16x2", "0x3F803F80", "0x43084308"
    else:
        kind, one, code_zero = "f16x2", "0x3C003C00", "0x64086408"
    packed, summand = 2 * words, 2 * words + 1
    operand = f"${packed}" if words == 2 else f"{{${packed}, none}}"
    lines = [".reg .b32 bytes, pair, one;", ".reg .b16 none;", "mov.b16 none, 0;"]
    lines += [f"mov.b32 bytes, {operand};", f"mov.b32 one, {one};"]
    for word, to_halves in enumerate(("0x4140", "0x4342")[:words]):
        lines.append(f"prmt.b32 pair, bytes, 0, {to_halves};")
        for result in (word, words + word):
            lines.append(f"lop3.b32 ${result}, pair, 0x000F000F, {code_zero}, 0x6A;")  # (a & b) ^ c
            lines.append(f"fma.rn.{kind} ${result}, ${result}, one, ${summand + word};")
            if result == word:
                lines.append("shr.u32 pair, pair, 4;")
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def _placing(dtype, pack, exponent_bits, mantissa_bits, part, scaled):
    """PTX that makes 16-bit floats of floating-point codes, two bytes of `weight` at a time.

    Each half of a register gets a byte of `weight` below its byte of `high_bits`, from where each
    field of a code is shifted to its place. Float16 is left there, the value times 2^-gap; bfloat16
    is multiplied by 2^gap, as sums of such small products would underflow. scaled: both are
    multiplied by the operand `scale` instead, which in bfloat16 has 2^gap in it.

    Results are the lower codes of `pack` bytes, then the upper ones; operands the bytes of `weight`
    and then those of `high_bits`, each a whole register or half a one; then, if scaled, the scales
    of the results.
    """
    words = pack // 2  # of a result
    is_bfloat16 = dtype == tl.bfloat16
    width, magnitude_at = exponent_bits + mantissa_bits, (7 if is_bfloat16 else 10) - mantissa_bits
    extra = width - 3  # bits of a code in high_bits
    operands = [f"${2 * words}", f"${2 * words + 1}"]
    if words == 1:
        operands = [f"{{{operand}, none}}" for operand in operands]
    lines = [".reg .b32 bytes, more, pair, field, unit, zero;", ".reg .b16 none;"]
    lines += ["mov.b16 none, 0;"]
    lines += [f"mov.b32 bytes, {operands[0]};", f"mov.b32 more, {operands[1]};"]
    if is_bfloat16:
        unit = 127 + 127 - ((1 << (exponent_bits - 1)) - 1) << 7  # 2^gap
        lines += [f"mov.b32 unit, {unit << 16 | unit:#x};", "mov.b32 zero, 0x80008000;"]  # -0
    scale_at = 2 * words + 2
    for word, beside in enumerate(("0x5140", "0x7362")[:words]):
        high = "0" if extra == 0 else "more"
        lines.append(f"prmt.b32 pair, bytes, {high}, {beside};")
        for upper in (0, 1):
            result = f"${upper * words + word}"
            high_at = 8 + extra * part + 4 * upper
            # (from which bit, how many, to which bit)
            fields = [(4 * upper, min(width, 4), magnitude_at)]
            if extra > 1:
                fields.append((high_at, extra - 1, magnitude_at + 4))
            fields.append((high_at + extra - 1 if extra else 4 * upper + 3, 1, 15))
            lines.append(f"mov.b32 {result}, 0;")
            for start, bits, to in fields:
                shift, by = ("shl.b32", to - start) if to > start else ("shr.u32", start - to)
                lines.append(f"{shift} field, pair, {by};")
                mask = ((1 << bits) - 1) << to
                mask = f"{mask << 16 | mask:#x}"
                lines.append(f"lop3.b32 {result}, field, {mask}, {result}, 0xEA;")  # (a & b) | c
            factor = f"${scale_at + upper * words + word}" if scaled else "unit"
            if is_bfloat16:
                lines.append(f"fma.rn.bf16x2 {result}, {result}, {factor}, zero;")
            elif scaled:
                lines.append(f"mul.f16x2 {result}, {result}, {factor};")
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def _registers(pack):
    return "=&r,=&r,=&r,=&r,r,r,r" if pack == 4 else "=&r,=&r,h,r"


@triton.constexpr_function
def _registers_of_planes(pack, scaled):
    registers = "=&r,=&r,=&r,=&r,r,r" if pack == 4 else "=&r,=&r,h,h"
    return registers + ",r" * pack if scaled else registers


@triton.constexpr_function
def _num_parts(exponent_bits, mantissa_bits):
    """How many bytes of `weight` share one of `high_bits`; 1 if there is none."""
    extra = exponent_bits + mantissa_bits - 3
    return 4 // extra if extra > 0 else 1


@triton.constexpr_function
def _power_of_gap(exponent_bits, bias):
    """2^gap: what a code's value is of a format with that bias in which its bits are placed."""
    return 2.0 ** (bias - ((1 << (exponent_bits - 1)) - 1)) if exponent_bits else 1.0


@triton.constexpr_function
def _twice(dtype):
    return dtype, dtype


@triton.constexpr_function
def _power_of_e4m3(dtype):
    """By what a scale of NVFP4 is multiplied before it is made 16 bits wide.

    Float16 codes are 2^-14 of their values, and those times a scale multiples of 2^-24, so that all
    are float16 numbers. In bfloat16 the largest scale is still finite times 2^gap, 2^126.
    """
    return 2.0**-9 if dtype == tl.bfloat16 else 1.0


@triton.jit
def _read_scale(scale, SCALE: tl.constexpr):
    """A scale as it is stored -> float32. SCALE: "e8m0", "e4m3" (no negative ones) or "16 bits"."""
    if SCALE == "e8m0":
        bits = tl.maximum(scale.to(tl.int32) << 23, 1 << 22)  # 2^-127 is a subnormal number
        return tl.where(scale == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    if SCALE == "e4m3":
        placed = (scale.to(tl.int32) << 20).to(tl.float32, bitcast=True)
        return tl.where(scale == 127, float("nan"), placed * 2.0**120)
    return scale.to(tl.float32)


@triton.jit
def _place(codes, DTYPE: tl.constexpr, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr):
    """int32 codes -> as `_placing` makes them."""
    WIDTH: tl.constexpr = EXPONENT_BITS + MANTISSA_BITS
    magnitude = (codes & ((1 << WIDTH) - 1)) << (10 - MANTISSA_BITS)
    placed = ((codes >> WIDTH) << 15 | magnitude).to(tl.int16).to(tl.float16, bitcast=True)
    if not DTYPE.is_fp16():
        placed = (placed.to(tl.float32) * _power_of_gap(EXPONENT_BITS, 15)).to(DTYPE)
    return placed


@triton.jit
def to_values(
    packed,
    high_bits,
    zero_point,
    low_scale,
    high_scale,
    DTYPE: tl.constexpr,
    PACK: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    PART: tl.constexpr,
    IS_SCALED: tl.constexpr,
):
    """Packed rows (N, J) -> what their lower and upper codes stand for before they are scaled.

    The one place that knows the weight's format. packed, high_bits (N, J) uint8, zero_point (N,)
    int8, each read only by formats that have it. Two tiles (N, J) of DTYPE, exact, but float16 of a
    floating-point format is 2^-gap of it; nothing moves between threads. IS_SCALED: they are times
    `low_scale` and `high_scale`, (N,) float32, and `_power_of_e4m3`. PACK: so many bytes of a
    row lie side by side in a thread, 2 for Hopper's `wgmma` and 4 for all other products; 0
    for no PTX at all. EXPONENT_BITS: 0 for INT4. PART: which of the parts it is.
    """
    packed = packed.to(tl.int8, bitcast=True)
    high_bits = high_bits.to(tl.int8, bitcast=True)
    zero_point = zero_point.to(tl.int32)[:, None]
    if EXPONENT_BITS > 0:
        if PACK > 0 and DTYPE.primitive_bitwidth == 16:
            if IS_SCALED:
                GAP: tl.constexpr = _power_of_gap(EXPONENT_BITS, 127) if DTYPE.is_bf16() else 1.0
                UNIT: tl.constexpr = GAP * _power_of_e4m3(DTYPE)
                low_unit = (low_scale * UNIT).to(DTYPE)[:, None]
                high_unit = (high_scale * UNIT).to(DTYPE)[:, None]
                low, high = tl.inline_asm_elementwise(
                    _placing(DTYPE, PACK, EXPONENT_BITS, MANTISSA_BITS, PART, True),
                    _registers_of_planes(PACK, True), [packed, high_bits, low_unit, high_unit],
                    dtype=_twice(DTYPE), is_pure=True, pack=PACK,
                )  # fmt: skip
            else:
                low, high = tl.inline_asm_elementwise(
                    _placing(DTYPE, PACK, EXPONENT_BITS, MANTISSA_BITS, PART, False),
                    _registers_of_planes(PACK, False), [packed, high_bits],
                    dtype=_twice(DTYPE), is_pure=True, pack=PACK,
                )  # fmt: skip
        else:
            EXTRA: tl.constexpr = EXPONENT_BITS + MANTISSA_BITS - 3
            low_codes = packed.to(tl.int32) & 0xF
            high_codes = (packed.to(tl.int32) >> 4) & 0xF
            if EXTRA > 0:
                MASK: tl.constexpr = (1 << EXTRA) - 1
                extra = high_bits.to(tl.int32) >> (EXTRA * PART)
                low_codes |= (extra & MASK) << 4
                high_codes |= ((extra >> 4) & MASK) << 4
            low = _place(low_codes, DTYPE, EXPONENT_BITS, MANTISSA_BITS)
            high = _place(high_codes, DTYPE, EXPONENT_BITS, MANTISSA_BITS)
            if IS_SCALED:
                FACTOR: tl.constexpr = _power_of_e4m3(DTYPE)
                low = (low.to(tl.float32) * (low_scale * FACTOR)[:, None]).to(DTYPE)
                high = (high.to(tl.float32) * (high_scale * FACTOR)[:, None]).to(DTYPE)
    elif PACK > 0 and DTYPE.primitive_bitwidth == 16:
        CODE_ZERO: tl.constexpr = 136 if DTYPE.is_bf16() else 1032
        summand = (-CODE_ZERO - zero_point).to(tl.float32).to(DTYPE)
        low, high = tl.inline_asm_elementwise(
            _unpacking(DTYPE, PACK), _registers(PACK), [packed, summand],
            dtype=_twice(DTYPE), is_pure=True, pack=PACK,
        )  # fmt: skip
    else:
        low = (((packed << 4) >> 4).to(tl.int32) - zero_point).to(tl.float32).to(DTYPE)
        high = ((packed >> 4).to(tl.int32) - zero_point).to(tl.float32).to(DTYPE)
    return low, high


@triton.jit
def _load_scales(weight_scale_ptr, first_row, weight_rows, n, live_n, SCALE: tl.constexpr):
    """Of the lower and the upper codes of rows n of a group, which begins at `first_row`."""
    if SCALE == "e4m3":
        low = tl.load(weight_scale_ptr + 2 * first_row + n, mask=live_n, other=0)
        high = tl.load(weight_scale_ptr + 2 * first_row + weight_rows + n, mask=live_n, other=0)
    else:
        low = tl.load(weight_scale_ptr + first_row + n, mask=live_n, other=0)
        high = low
    return low, high


@triton.jit
def weight_only_kernel(
    x_ptr,
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
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    TILES_PER_BAND: tl.constexpr,
    PACK: tl.constexpr,
):
    """One tile of out^T = weight x^T: a weight on the left stays in registers, unpacked.

    A step is a group, or a piece of a large one: PART_STEP bytes of a row from each of its parts.
    Programs along the grid's second axis split K, as in `linear_kernel`. A group begins
    `weight_rows` rows after the one before: N, or more where the weight is part of a larger one.
    RAGGED: the last group is not full, and what lies behind a token's last channel is another
    token's. EXPONENT_BITS, MANTISSA_BITS: of the weight's format, or 0 for INT4. SCALE: as for
    `_read_scale`; with "e4m3" a group has two, and row_scale_ptr is read.
    """
    PARTS: tl.constexpr = _num_parts(EXPONENT_BITS, MANTISSA_BITS)
    HAS_HIGH_BITS: tl.constexpr = EXPONENT_BITS + MANTISSA_BITS > 3
    PART_BYTES: tl.constexpr = HALF_GROUP // PARTS  # bytes of a row of a group
    STEPS: tl.constexpr = PART_BYTES // PART_STEP  # a group's
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    UNPLACED: tl.constexpr = _power_of_gap(EXPONENT_BITS, 15) if DTYPE.is_fp16() else 1.0
    IS_SCALED: tl.constexpr = SCALE == "e4m3"
    tile = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1) if IS_SPLIT else 1
    tile_m, tile_n = tile_in_band(tile, M, N, BLOCK_M, BLOCK_N, TILES_PER_BAND)

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    live_n = n < N
    # tokens past the end: as in linear_kernel
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
    low_scale, high_scale = _load_scales(weight_scale_ptr, scale_at, weight_rows, n, live_n, SCALE)
    zero_point = tl.zeros((BLOCK_N,), dtype=tl.int8)
    if HAS_ZERO_POINT:
        zero_point = tl.load(zero_point_ptr + scale_at + n, mask=live_n, other=0)
    for step in range(first * STEPS, end * STEPS):
        group = step // STEPS
        byte = (step % STEPS) * PART_STEP
        following = tl.cast(tl.minimum((step + 1) // STEPS, num_groups - 1), tl.int64)
        following = following * weight_rows
        next_low_scale, next_high_scale = _load_scales(
            weight_scale_ptr, following, weight_rows, n, live_n, SCALE
        )
        if HAS_ZERO_POINT:
            next_zero_point = tl.load(zero_point_ptr + following + n, mask=live_n, other=0)
        first_row = tl.cast(group, tl.int64) * weight_rows
        if HAS_HIGH_BITS:
            high_bits = tl.load(high_bits_tile + first_row * PART_BYTES + byte)
        low_unit, high_unit = _read_scale(low_scale, SCALE), _read_scale(high_scale, SCALE)
        sums = acc if IS_SCALED else tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for part in tl.static_range(PARTS):
            at = part * PART_BYTES + byte
            packed = tl.load(weight_tile + first_row * HALF_GROUP + at)
            channel = group * 2 * HALF_GROUP + at
            if RAGGED:
                low_live = channel + lane[:, None] < K
                high_live = channel + HALF_GROUP + lane[:, None] < K
                x_low = tl.load(x_tile + channel, mask=low_live, other=0.0)
                x_high = tl.load(x_tile + channel + HALF_GROUP, mask=high_live, other=0.0)
            else:
                x_low = tl.load(x_tile + channel)
                x_high = tl.load(x_tile + channel + HALF_GROUP)
            low, high = to_values(
                packed, high_bits if HAS_HIGH_BITS else packed, zero_point, low_unit, high_unit,
                DTYPE, PACK, EXPONENT_BITS, MANTISSA_BITS, part, IS_SCALED,
            )  # fmt: skip
            sums = tl.dot(low, x_low, sums, input_precision="ieee")
            sums = tl.dot(high, x_high, sums, input_precision="ieee")
        acc = sums if IS_SCALED else acc + sums * low_unit[:, None]
        low_scale, high_scale = next_low_scale, next_high_scale
        if HAS_ZERO_POINT:
            zero_point = next_zero_point
    acc *= UNPLACED
    if IS_SCALED:
        row_scale = tl.load(row_scale_ptr + n, mask=live_n, other=0.0)
        acc *= (row_scale * (1.0 / _power_of_e4m3(DTYPE)))[:, None]

    store_tile(
        acc, m, n, M, N, bias_ptr, residual_ptr, out_ptr, partial_ptr, arrivals_ptr,
        tile, split, splits, HAS_BIAS, HAS_RESIDUAL, IS_SPLIT,
    )  # fmt: skip


@triton.jit
def dequantize_kernel(
    weight_ptr,
    weight_scale_ptr,
    zero_point_ptr,
    high_bits_ptr,
    row_scale_ptr,
    out_ptr,
    N,
    K,
    weight_rows,
    HALF_GROUP: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACK: tl.constexpr,
):
    """One group of BLOCK_N rows of the weight (N, K)."""
    PARTS: tl.constexpr = _num_parts(EXPONENT_BITS, MANTISSA_BITS)
    HAS_HIGH_BITS: tl.constexpr = EXPONENT_BITS + MANTISSA_BITS > 3
    PART_BYTES: tl.constexpr = HALF_GROUP // PARTS
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    UNPLACED: tl.constexpr = _power_of_gap(EXPONENT_BITS, 15) if DTYPE.is_fp16() else 1.0
    group = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_n = n < N
    first_row = tl.cast(group, tl.int64) * weight_rows
    at = first_row + n
    lane = tl.arange(0, PART_BYTES)
    live = live_n[:, None]
    low_scale, high_scale = _load_scales(weight_scale_ptr, first_row, weight_rows, n, live_n, SCALE)
    low_scale, high_scale = _read_scale(low_scale, SCALE), _read_scale(high_scale, SCALE)
    if SCALE == "e4m3":
        row_scale = tl.load(row_scale_ptr + n, mask=live_n, other=0.0)
        low_scale, high_scale = low_scale * row_scale, high_scale * row_scale
    zero_point = tl.zeros((BLOCK_N,), dtype=tl.int8)
    if HAS_ZERO_POINT:
        zero_point = tl.load(zero_point_ptr + at, mask=live_n, other=0)
    if HAS_HIGH_BITS:
        high_bits = tl.load(high_bits_ptr + at[:, None] * PART_BYTES + lane, mask=live, other=0)
    for part in tl.static_range(PARTS):
        byte = part * PART_BYTES + lane
        packed = tl.load(weight_ptr + at[:, None] * HALF_GROUP + byte, mask=live, other=0)
        low, high = to_values(
            packed, high_bits if HAS_HIGH_BITS else packed, zero_point, low_scale, high_scale,
            DTYPE, PACK, EXPONENT_BITS, MANTISSA_BITS, part, False,
        )  # fmt: skip
        low = low.to(tl.float32) * UNPLACED * low_scale[:, None]
        high = high.to(tl.float32) * UNPLACED * high_scale[:, None]
        channel = group * 2 * HALF_GROUP + byte[None, :]
        out = out_ptr + n.to(tl.int64)[:, None] * K + channel
        tl.store(out, low.to(DTYPE), mask=live & (channel < K))
        tl.store(out + HALF_GROUP, high.to(DTYPE), mask=live & (channel + HALF_GROUP < K))


PATH = "triton 16-bit"
DEQUANTIZE = "dequantize, cuBLAS"
_MOST_TOKENS = 256  # for more the weight is dequantized; an estimate, not yet measured
_MOST_CHANNELS = 128  # a step's
_LEAST_DEPTH = 16  # of a product of tiles


@functools.lru_cache(maxsize=4096)
def choose_tiling(
    M: int,
    N: int,
    num_groups: int,
    dtype: torch.dtype,
    device: torch.device,
    format: str = "int",
) -> Tiling | None:
    """How `weight_only_kernel` cuts the product; None where dequantizing should be faster."""
    if M > _MOST_TOKENS:
        return None
    tiling = linear.default_tiling(M, N, num_groups, multiprocessors(device))
    # two warps multiply by mma.sync, on Hopper too, which takes its weights by whole words: a third
    # fewer instructions than with wgmma at 8 tokens, as many at 32, a third more at 64
    few = tiling.block_m <= 16
    # but tiles as narrow as a quarter of a group Triton then unpacks in other threads; so it does
    # with a group of MXFP4: 344 instructions for each of two warps, 118 for each of four
    two_warps = few and _num_parts(*_bits(format)) < 4 and format != "mxfp4"
    # what the shared memory of every GPU since sm_80 holds
    block_m = min(tiling.block_m, 128 if dtype.itemsize == 2 else 32)
    stages = 4 if few else 3 if block_m <= 64 else 2
    return Tiling(64, block_m, tiling.split_k, 2 if two_warps else 4, stages)


def _pack(device: torch.device, tiling: Tiling) -> int:
    """See to_values."""
    if device.type != "cuda":
        return 0
    takes_wgmma = tiling.num_warps >= 4 and tiling.block_n >= 64 and tiling.block_m >= 16
    return 2 if is_hopper(device) and takes_wgmma else 4


def describe(M: int, N: int, layout: GroupLayout, dtype: torch.dtype, device: torch.device) -> str:
    """The path that a product of these sizes takes."""
    if device.type != "cuda":
        return "reference"
    return PATH if choose_tiling(M, N, layout.num_groups, dtype, device) else DEQUANTIZE


def least_group_size(format: str) -> int:
    """What the kernel can multiply by: a group's part is at least as deep as a product of tiles."""
    return 2 * _LEAST_DEPTH * int(_num_parts(*_bits(format)))


def _bits(format: str) -> tuple[int, int]:
    """Of exponent and mantissa, as the kernels take them."""
    if format == "int":
        return 0, 0
    element = element_format(format)
    return element.exponent_bits, element.mantissa_bits


def _scale_of(format: str) -> str:
    """As `_read_scale` takes it."""
    if format not in BLOCK_FORMATS:
        return "16 bits"
    return "e4m3" if BLOCK_FORMATS[format].tensor_scale else "e8m0"


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
    *,
    format: str = "int",
) -> Tensor:
    """The arguments of `reference`, on a GPU."""
    x = x.to(dtype)
    num_groups, N, _ = weight.shape
    M = x.numel() // x.shape[-1]
    if M == 0:
        return x.new_empty(*x.shape[:-1], N)
    tiling = choose_tiling(M, N, num_groups, dtype, x.device, format)
    arguments = (x, weight, weight_scale, zero_point, high_bits, row_scale, bias, residual)
    if tiling is None:
        return multiply_dense(*arguments, format=format)
    return multiply_packed(*arguments, tiling, format=format)


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
) -> Tensor:
    """`launch` by one kernel, in x's dtype, for at least one token."""
    num_groups, N, half_group = weight.shape
    K = x.shape[-1]
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], N)
    if residual is not None:
        residual = residual.expand(out.shape).contiguous()
    tiles, partial, arrivals = split_buffers(out, tiling)
    exponent_bits, mantissa_bits = _bits(format)
    parts = _num_parts(exponent_bits, mantissa_bits)
    weight_only_kernel[(tiles, tiling.split_k)](
        x,
        weight,
        weight_scale,
        out if zero_point is None else zero_point,
        out if high_bits is None else high_bits,
        out if row_scale is None else row_scale,
        out if bias is None else bias,
        out if residual is None else residual,
        out,
        partial,
        arrivals,
        x.numel() // K,
        N,
        K,
        weight.stride(0) // half_group,
        num_groups,
        HALF_GROUP=half_group,
        PART_STEP=min(half_group, _MOST_CHANNELS // 2) // parts,
        RAGGED=K % (2 * half_group) != 0,
        EXPONENT_BITS=exponent_bits,
        MANTISSA_BITS=mantissa_bits,
        SCALE=_scale_of(format),
        HAS_ZERO_POINT=zero_point is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        IS_SPLIT=tiling.split_k > 1,
        TILES_PER_BAND=8,
        PACK=_pack(x.device, tiling),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    return out


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
    num_groups, N, half_group = weight.shape
    dense = x.new_empty(N, x.shape[-1])
    exponent_bits, mantissa_bits = _bits(format)
    block_n = max(1, 4096 // half_group)
    dequantize_kernel[(triton.cdiv(N, block_n), num_groups)](
        weight,
        weight_scale,
        dense if zero_point is None else zero_point,
        dense if high_bits is None else high_bits,
        dense if row_scale is None else row_scale,
        dense,
        N,
        x.shape[-1],
        weight.stride(0) // half_group,
        HALF_GROUP=half_group,
        EXPONENT_BITS=exponent_bits,
        MANTISSA_BITS=mantissa_bits,
        SCALE=_scale_of(format),
        HAS_ZERO_POINT=zero_point is not None,
        BLOCK_N=block_n,
        PACK=4 if x.is_cuda else 0,
    )
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
