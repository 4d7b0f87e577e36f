"""`atom::weight_only_linear`: 16-bit activations times a packed weight, of INT4 or few-bit floats.

    out[m, n] = sum_g weight_scale[g, n] * sum_k x[m, k] * (weight[n, k] - zero_point[g, n])
              + bias[n]                 rounded to the output's dtype, then + residual[m, n]

The sums run over k, the channels of group g. Codes are exact in 16 bits, so tensor cores multiply
them as they are and the scale goes to a group's sum: no weight is rounded, and all sums are of
float32. Only for many tokens, where unpacking for every tile of them would cost more than it saves,
the whole weight is dequantized first, to `dtype`, and PyTorch multiplies. Both kernels serve
`float8_linear` as well, whose activations are e4m3 and whose weight has one scale per row.

The bits of a floating-point code are moved to where the wider format has them (formats.py). Those
beyond four lie in `high_bits`, P bytes for a row of a group, each shared by bytes of `weight` that
are P apart (packing.py). So the kernels cut a row of a group into *parts* of P bytes: as tiles of
one shape they are spread over the threads alike, and each code meets its other bits.

Sources: GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978) for the numbers; for turning codes into
16-bit floats by their exponent Kim et al., "Who Says Elephants Can't Run" (arXiv 2211.10017); for
floating-point weights FP6-LLM (arXiv 2401.14112).
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
from .formats import FORMATS
from .library import define
from .linear import Tiling, split_buffers, store_tile, tile_in_band
from .packing import GroupedWeight, GroupLayout, dequantize_weight


def reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    high_bits: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    *,
    format: str = "int",
) -> Tensor:
    """x (*, K), rounded to `dtype`; the weight as `packing.GroupedWeight`, bias (N,), residual
    (*, N) -> (*, N) in `dtype`.

    format: "int", or the name of the weight's format in `formats.FORMATS`.
    """
    layout = GroupLayout(x.shape[-1], 2 * weight.shape[2], 0)
    packed = GroupedWeight(weight, weight_scale, zero_point, high_bits)
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
def _placing(dtype, pack, exponent_bits, mantissa_bits, part):
    """PTX that makes 16-bit floats of floating-point codes, two bytes of `weight` at a time.

    Each half of a register gets a byte of `weight` below its byte of `high_bits`, from where each
    field of a code is shifted to its place. Float16 is left there, the value times 2^-gap; bfloat16
    is multiplied by 2^gap, as sums of such small products would underflow.

    Results are the lower codes of `pack` bytes, then the upper ones; operands the bytes of `weight`
    and then those of `high_bits`, each a whole register or half a one.
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
            if is_bfloat16:
                lines.append(f"fma.rn.bf16x2 {result}, {result}, unit, zero;")
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def placing_in_e4m3(exponent_bits, mantissa_bits, part):
    """PTX that makes e4m3 of floating-point codes, four at a time, the value times 2^-gap.

    As `_placing`, but every field stays in the byte that it comes from. Results are the lower codes
    of four bytes and the upper ones; operands the bytes of `weight` and those of `high_bits`.
    """
    width = exponent_bits + mantissa_bits
    extra = width - 3  # bits of a code in high_bits
    lines = [".reg .b32 field;"]
    for upper in (0, 1):
        magnitude_at = 3 - mantissa_bits
        high_at = extra * part + 4 * upper
        # (of which operand, from which bit, how many, to which bit)
        fields = [("$2", 4 * upper, min(width, 4), magnitude_at)]
        if extra > 1:
            fields.append(("$3", high_at, extra - 1, magnitude_at + 4))
        sign = ("$3", high_at + extra - 1) if extra else ("$2", 4 * upper + 3)
        fields.append((*sign, 1, 7))
        lines.append(f"mov.b32 ${upper}, 0;")
        for operand, start, bits, to in fields:
            shift, by = ("shl.b32", to - start) if to > start else ("shr.u32", start - to)
            lines.append(f"{shift} field, {operand}, {by};")
            mask = (((1 << bits) - 1) << to) * 0x01010101
            lines.append(f"lop3.b32 ${upper}, field, {mask:#x}, ${upper}, 0xEA;")  # (a & b) | c
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def _registers(pack):
    return "=&r,=&r,=&r,=&r,r,r,r" if pack == 4 else "=&r,=&r,h,r"


@triton.constexpr_function
def _registers_of_planes(pack):
    return "=&r,=&r,=&r,=&r,r,r" if pack == 4 else "=&r,=&r,h,h"


@triton.constexpr_function
def _num_parts(exponent_bits, mantissa_bits):
    """How many bytes of `weight` share one of `high_bits`; 1 if there is none."""
    extra = exponent_bits + mantissa_bits - 3
    return 4 // extra if extra > 0 else 1


@triton.constexpr_function
def _power_of_gap(exponent_bits, dtype):
    """2^gap: what a code's value is of the number that `to_values` makes of it in `dtype`."""
    if exponent_bits == 0 or dtype not in (tl.float16, tl.float8e4nv):
        return 1.0
    bias = 15 if dtype == tl.float16 else 7
    return 2.0 ** (bias - ((1 << (exponent_bits - 1)) - 1))


@triton.constexpr_function
def _twice(dtype):
    return dtype, dtype


@triton.jit
def _place(codes, DTYPE: tl.constexpr, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr):
    """int32 codes -> as `_placing` makes them, or `placing_in_e4m3`."""
    WIDTH: tl.constexpr = EXPONENT_BITS + MANTISSA_BITS
    if DTYPE.is_fp8e4nv():
        magnitude = (codes & ((1 << WIDTH) - 1)) << (3 - MANTISSA_BITS)
        placed = ((codes >> WIDTH) << 7 | magnitude).to(tl.int8).to(DTYPE, bitcast=True)
    else:
        magnitude = (codes & ((1 << WIDTH) - 1)) << (10 - MANTISSA_BITS)
        placed = ((codes >> WIDTH) << 15 | magnitude).to(tl.int16).to(tl.float16, bitcast=True)
        if not DTYPE.is_fp16():
            placed = (placed.to(tl.float32) * _power_of_gap(EXPONENT_BITS, tl.float16)).to(DTYPE)
    return placed


@triton.jit
def _e4m3_as_float16(x):
    """Bytes of e4m3 -> float16, 2^-8 of the value: exact, and for GPUs that know no e4m3."""
    wide = x.to(tl.int16)
    return ((wide & 0x80) << 8 | (wide & 0x7F) << 7).to(tl.float16, bitcast=True)


@triton.jit
def to_values(
    packed,
    high_bits,
    zero_point,
    DTYPE: tl.constexpr,
    PACK: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    PART: tl.constexpr,
):
    """Packed rows (N, J) -> what their lower and upper codes stand for before they are scaled.

    The one place that knows the weight's format. packed, high_bits (N, J) uint8, zero_point (N,)
    int8, each read only by formats that have it. Two tiles (N, J) of DTYPE, exact, but float16 or
    e4m3 of a floating-point format is 2^-gap of it; nothing moves between threads. PACK: so many
    bytes of a row lie side by side in a thread, 2 for Hopper's products of four warps in 16 bits
    and 4 for all others; 0 for no PTX at all. EXPONENT_BITS: 0 for INT4. PART: which of the parts
    it is.
    """
    packed = packed.to(tl.int8, bitcast=True)
    high_bits = high_bits.to(tl.int8, bitcast=True)
    zero_point = zero_point.to(tl.int32)[:, None]
    if EXPONENT_BITS > 0:
        if PACK > 0 and DTYPE.primitive_bitwidth == 16:
            low, high = tl.inline_asm_elementwise(
                _placing(DTYPE, PACK, EXPONENT_BITS, MANTISSA_BITS, PART),
                _registers_of_planes(PACK), [packed, high_bits],
                dtype=_twice(DTYPE), is_pure=True, pack=PACK,
            )  # fmt: skip
        elif PACK > 0 and DTYPE.is_fp8e4nv():
            low, high = tl.inline_asm_elementwise(
                placing_in_e4m3(EXPONENT_BITS, MANTISSA_BITS, PART), "=&r,=&r,r,r",
                [packed, high_bits], dtype=_twice(tl.int8), is_pure=True, pack=4,
            )  # fmt: skip
            low = low.to(DTYPE, bitcast=True)
            high = high.to(DTYPE, bitcast=True)
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
def weight_only_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    zero_point_ptr,
    high_bits_ptr,
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
    HAS_ZERO_POINT: tl.constexpr,
    PER_ROW: tl.constexpr,
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
    token's. EXPONENT_BITS, MANTISSA_BITS: of the weight's format, or 0 for INT4.
    """
    PARTS: tl.constexpr = _num_parts(EXPONENT_BITS, MANTISSA_BITS)
    HAS_HIGH_BITS: tl.constexpr = EXPONENT_BITS + MANTISSA_BITS > 3
    PART_BYTES: tl.constexpr = HALF_GROUP // PARTS  # bytes of a row of a group
    STEPS: tl.constexpr = PART_BYTES // PART_STEP  # a group's
    OF_BYTES: tl.constexpr = x_ptr.dtype.element_ty == tl.uint8
    DTYPE: tl.constexpr = tl.float16 if OF_BYTES else x_ptr.dtype.element_ty
    UNPLACED: tl.constexpr = _power_of_gap(EXPONENT_BITS, DTYPE)
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
    scale_at = tl.cast(0 if PER_ROW else first, tl.int64) * weight_rows + n
    scale = tl.load(weight_scale_ptr + scale_at, mask=live_n, other=0.0)
    zero_point = tl.zeros((BLOCK_N,), dtype=tl.int8)
    if HAS_ZERO_POINT:
        zero_point = tl.load(zero_point_ptr + scale_at, mask=live_n, other=0)
    for step in range(first * STEPS, end * STEPS):
        group = step // STEPS
        byte = (step % STEPS) * PART_STEP
        following = tl.cast(tl.minimum((step + 1) // STEPS, num_groups - 1), tl.int64)
        following = following * weight_rows + n
        if not PER_ROW:
            next_scale = tl.load(weight_scale_ptr + following, mask=live_n, other=0.0)
        if HAS_ZERO_POINT:
            next_zero_point = tl.load(zero_point_ptr + following, mask=live_n, other=0)
        first_row = tl.cast(group, tl.int64) * weight_rows
        if HAS_HIGH_BITS:
            high_bits = tl.load(high_bits_tile + first_row * PART_BYTES + byte)
        sums = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
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
            if OF_BYTES:
                x_low = _e4m3_as_float16(x_low)
                x_high = _e4m3_as_float16(x_high)
            low, high = to_values(
                packed, high_bits if HAS_HIGH_BITS else packed, zero_point,
                DTYPE, PACK, EXPONENT_BITS, MANTISSA_BITS, part,
            )  # fmt: skip
            sums = tl.dot(low, x_low, sums, input_precision="ieee")
            sums = tl.dot(high, x_high, sums, input_precision="ieee")
        if PER_ROW:
            acc += sums
        else:
            acc += sums * (scale.to(tl.float32) * UNPLACED)[:, None]
            scale = next_scale
        if HAS_ZERO_POINT:
            zero_point = next_zero_point
    if PER_ROW:
        x_scale = tl.load(x_scale_ptr + m, mask=m < M, other=0.0)
        acc = acc * (UNPLACED * (256.0 if OF_BYTES else 1.0)) * (scale[:, None] * x_scale[None, :])

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
    out_ptr,
    N,
    K,
    weight_rows,
    HALF_GROUP: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACK: tl.constexpr,
):
    """One group of BLOCK_N rows of the weight (N, K).

    PER_ROW: weight_scale is (N,). In e4m3 `out` is not scaled: it has the codes as they are placed.
    """
    PARTS: tl.constexpr = _num_parts(EXPONENT_BITS, MANTISSA_BITS)
    HAS_HIGH_BITS: tl.constexpr = EXPONENT_BITS + MANTISSA_BITS > 3
    PART_BYTES: tl.constexpr = HALF_GROUP // PARTS
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    UNPLACED: tl.constexpr = _power_of_gap(EXPONENT_BITS, DTYPE)
    group = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_n = n < N
    at = tl.cast(group, tl.int64) * weight_rows + n
    lane = tl.arange(0, PART_BYTES)
    live = live_n[:, None]
    scale = tl.load(weight_scale_ptr + (n if PER_ROW else at), mask=live_n, other=0.0)
    scale = (scale.to(tl.float32) * UNPLACED)[:, None]
    zero_point = tl.zeros((BLOCK_N,), dtype=tl.int8)
    if HAS_ZERO_POINT:
        zero_point = tl.load(zero_point_ptr + at, mask=live_n, other=0)
    if HAS_HIGH_BITS:
        high_bits = tl.load(high_bits_ptr + at[:, None] * PART_BYTES + lane, mask=live, other=0)
    for part in tl.static_range(PARTS):
        byte = part * PART_BYTES + lane
        packed = tl.load(weight_ptr + at[:, None] * HALF_GROUP + byte, mask=live, other=0)
        low, high = to_values(
            packed, high_bits if HAS_HIGH_BITS else packed, zero_point,
            DTYPE, PACK, EXPONENT_BITS, MANTISSA_BITS, part,
        )  # fmt: skip
        channel = group * 2 * HALF_GROUP + byte[None, :]
        out = out_ptr + n.to(tl.int64)[:, None] * K + channel
        if not DTYPE.is_fp8e4nv():
            low = (low.to(tl.float32) * scale).to(DTYPE)
            high = (high.to(tl.float32) * scale).to(DTYPE)
        tl.store(out, low, mask=live & (channel < K))
        tl.store(out + HALF_GROUP, high, mask=live & (channel + HALF_GROUP < K))


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
    # but tiles as narrow as a quarter of a group Triton then unpacks in other threads
    two_warps = few and _num_parts(*_bits(format)) < 4
    # what the shared memory of every GPU since sm_80 holds
    block_m = min(tiling.block_m, 128 if dtype.itemsize == 2 else 32)
    stages = 4 if few else 3 if block_m <= 64 else 2
    return Tiling(64, block_m, tiling.split_k, 2 if two_warps else 4, stages)


def _pack(device: torch.device, tiling: Tiling) -> int:
    """See to_values."""
    if device.type != "cuda":
        return 0
    return 2 if is_hopper(device) and tiling.num_warps >= 4 and tiling.block_n >= 64 else 4


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
    return FORMATS[format].exponent_bits, FORMATS[format].mantissa_bits


def launch(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    high_bits: Tensor | None,
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
    arguments = (x, weight, weight_scale, zero_point, high_bits, bias, residual)
    if tiling is None:
        return multiply_dense(*arguments, format=format)
    return multiply_packed(*arguments, tiling, format=format)


def multiply_packed(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    high_bits: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    tiling: Tiling,
    *,
    format: str = "int",
    x_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`launch` by one kernel, in x's dtype, for at least one token.

    x_scale, dtype: of `float8_linear`, whose x is e4m3 or its bytes, and weight_scale (N,).
    """
    num_groups, N, half_group = weight.shape
    K = x.shape[-1]
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], N, dtype=dtype or x.dtype)
    if residual is not None:
        residual = residual.expand(out.shape).contiguous()
    tiles, partial, arrivals = split_buffers(out, tiling)
    exponent_bits, mantissa_bits = _bits(format)
    parts = _num_parts(exponent_bits, mantissa_bits)
    weight_only_kernel[(tiles, tiling.split_k)](
        x,
        out if x_scale is None else x_scale.contiguous(),
        weight,
        weight_scale,
        out if zero_point is None else zero_point,
        out if high_bits is None else high_bits,
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
        HAS_ZERO_POINT=zero_point is not None,
        PER_ROW=x_scale is not None,
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
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    format: str = "int",
) -> Tensor:
    """`launch` by way of the whole weight in x's dtype, for as long as the call takes."""
    packed = GroupedWeight(weight, weight_scale, zero_point, high_bits)
    dense = dequantize(packed, x.shape[-1], x.dtype, format)
    out = F.linear(x, dense, None if bias is None else bias.to(x.dtype))
    return out if residual is None else out + residual


def dequantize(packed: GroupedWeight, K: int, dtype: torch.dtype, format: str) -> Tensor:
    """The weight (N, K) in `dtype`, on a GPU.

    In e4m3 its codes as they are placed, not scaled: 2^-gap of their values. weight_scale may be
    (N,), one for a row.
    """
    weight, weight_scale, zero_point, high_bits = packed
    num_groups, N, half_group = weight.shape
    dense = weight.new_empty(N, K, dtype=dtype)
    exponent_bits, mantissa_bits = _bits(format)
    block_n = max(1, 4096 // half_group)
    dequantize_kernel[(triton.cdiv(N, block_n), num_groups)](
        weight,
        weight_scale,
        weight if zero_point is None else zero_point,
        weight if high_bits is None else high_bits,
        dense,
        N,
        K,
        weight.stride(0) // half_group,
        HALF_GROUP=half_group,
        EXPONENT_BITS=exponent_bits,
        MANTISSA_BITS=mantissa_bits,
        HAS_ZERO_POINT=zero_point is not None,
        PER_ROW=weight_scale.dim() == 1,
        BLOCK_N=block_n,
        PACK=4 if weight.is_cuda else 0,
    )
    return dense


weight_only_linear = define(
    "weight_only_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? zero_point, "
    "Tensor? high_bits, Tensor? bias, Tensor? residual, ScalarType dtype, *, "
    'str format="int") -> Tensor',
    reference,
    fake,
    launch,
)
