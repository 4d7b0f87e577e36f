"""Packed codes of a weight -> the numbers that tensor cores multiply, in registers.

INT4 becomes 16-bit floats by their exponent, as in Kim et al., "Who Says Elephants Can't Run"
(arXiv 2211.10017); bits of a floating-point code are moved to where the wider format has them, as
in FP6-LLM (arXiv 2401.14112). What they mean is in formats.py, where they lie in packing.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .formats import BLOCK_FORMATS, element_format


@triton.constexpr_function
def unpacking(dtype, pack):
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
    lines = [".reg .b32 bytes, pair, one;"]
    lines += [f"{_taking(words)} bytes, ${packed};", f"mov.b32 one, {one};"]
    for word, to_halves in enumerate(("0x4140", "0x4342")[:words]):
        lines.append(f"prmt.b32 pair, bytes, 0, {to_halves};")
        for result in (word, words + word):
            lines.append(f"lop3.b32 ${result}, pair, 0x000F000F, {code_zero}, 0x6A;")  # (a & b) ^ c
            lines.append(f"fma.rn.{kind} ${result}, ${result}, one, ${summand + word};")
            if result == word:
                lines.append("shr.u32 pair, pair, 4;")
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def placing(dtype, pack, exponent_bits, mantissa_bits, part, scaled):
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
    lines = [".reg .b32 bytes, more, pair, field, unit, zero;"]
    take = _taking(words)
    lines += [f"{take} bytes, ${2 * words};", f"{take} more, ${2 * words + 1};"]
    if is_bfloat16:
        unit = 127 + 127 - ((1 << (exponent_bits - 1)) - 1) << 7  # 2^gap
        lines += [f"mov.b32 unit, {unit << 16 | unit:#x};", "mov.b32 zero, 0x80008000;"]  # -0
    if is_bfloat16 and (exponent_bits, mantissa_bits) == (2, 3):
        lines.append(_looking_up(words, part))
    else:
        lines.append(_shifting(words, width, magnitude_at, part))
    for result in range(2 * words):
        factor = f"${2 * words + 2 + result}" if scaled else "unit"
        if is_bfloat16:
            lines.append(f"fma.rn.bf16x2 ${result}, ${result}, {factor}, zero;")
        elif scaled:
            lines.append(f"mul.f16x2 ${result}, ${result}, {factor};")
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def _taking(words):
    """What takes an operand of two bytes for each word: two alone are loaded with zeros above, so
    that to widen them is no instruction, where to join two halves is one."""
    return "mov.b32" if words == 2 else "cvt.u32.u16"


@triton.constexpr_function
def _shifting(words, width, magnitude_at, part):
    """For `placing`, any format: field by field."""
    extra, lines = width - 3, []  # extra: bits of a code in high_bits
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
    return " ".join(lines)


@triton.constexpr_function
def _looking_up(words, part):
    """For `placing`, E2M3 in bfloat16, with half the instructions: a code is two bytes there.

    One has its last four bits, and of the other, sign and first exponent bit, there are but four,
    which `prmt` picks for four codes at once.
    """
    lines = [".reg .b32 lower, upper, firsts, picked;"]
    lines.append(f"shr.u32 firsts, more, {2 * part};")
    lines.append("and.b32 firsts, firsts, 0x33333333;")
    lines += ["shl.b32 lower, bytes, 4;", "and.b32 lower, lower, 0xF0F0F0F0;"]
    lines.append("and.b32 upper, bytes, 0xF0F0F0F0;")
    for word in range(words):
        of_lower, of_upper = ("0x6342", "0x7352") if word else ("0x6140", "0x7150")
        if word:
            lines.append("shr.u32 firsts, firsts, 16;")
        lines.append("prmt.b32 picked, 0x81800100, 0, firsts;")
        lines.append(f"prmt.b32 ${word}, lower, picked, {of_lower};")
        lines.append(f"prmt.b32 ${words + word}, upper, picked, {of_upper};")
    return " ".join(lines)


@triton.constexpr_function
def placing_in_e4m3(exponent_bits, mantissa_bits, part):
    """PTX that makes e4m3 of floating-point codes, four at a time, the value times 2^-gap.

    As `placing`, but every field stays in the byte that it comes from. Results are the lower codes
    of four bytes and the upper ones; operands the bytes of `weight` and those of `high_bits`.
    """
    width = exponent_bits + mantissa_bits
    extra = width - 3  # bits of a code in high_bits
    if (exponent_bits, mantissa_bits) == (2, 3):
        return _multiplied_apart(part)
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
def _multiplied_apart(part):
    """`placing_in_e4m3` of E2M3: the sign goes 2 bits further than the exponent bit beside it.

    A multiplication does both shifts at once, on the pipe that has less to do: of the bits that it
    makes of two, the first and the last are these, and no two fall on one.
    """
    lines = [".reg .b32 field, nibbles;"]
    for upper in (0, 1):
        at = 4 * upper + 2 * part  # where the exponent bit is, to go to 4
        beyond = max(at - 4, 0)
        source = "$3"
        if beyond:
            lines.append(f"shr.u32 field, $3, {beyond};")
            source, at = "field", 4
        lines.append(f"and.b32 field, {source}, {(3 << at) * 0x01010101:#x};")
        lines.append(f"mul.lo.u32 field, field, {0b101 << 4 - at};")
        lines.append("and.b32 field, field, 0x90909090;")
        source = "$2"
        if upper:
            lines.append("shr.u32 nibbles, $2, 4;")
            source = "nibbles"
        lines.append(f"lop3.b32 ${upper}, {source}, 0x0F0F0F0F, field, 0xEA;")  # (a & b) | c
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def registers(pack):
    return "=&r,=&r,=&r,=&r,r,r,r" if pack == 4 else "=&r,=&r,h,r"


@triton.constexpr_function
def registers_of_planes(pack, scaled):
    registers = "=&r,=&r,=&r,=&r,r,r" if pack == 4 else "=&r,=&r,h,h"
    return registers + ",r" * pack if scaled else registers


@triton.constexpr_function
def num_parts(exponent_bits, mantissa_bits):
    """How many bytes of `weight` share one of `high_bits`; 1 if there is none."""
    extra = exponent_bits + mantissa_bits - 3
    return 4 // extra if extra > 0 else 1


@triton.constexpr_function
def power_of_gap(exponent_bits, dtype):
    """2^gap: what a code's value is of the number in `dtype` in which its bits are placed."""
    if exponent_bits == 0:
        return 1.0
    bias = 15 if dtype == tl.float16 else 7 if dtype == tl.float8e4nv else 127
    return 2.0 ** (bias - ((1 << (exponent_bits - 1)) - 1))


@triton.constexpr_function
def power_left(exponent_bits, dtype):
    """What the values that `to_values` gives are still to be multiplied by."""
    return power_of_gap(exponent_bits, dtype) if dtype in (tl.float16, tl.float8e4nv) else 1.0


@triton.constexpr_function
def twice(dtype):
    return dtype, dtype


@triton.constexpr_function
def power_of_e4m3(dtype):
    """By what a scale of NVFP4 is multiplied before it is made 16 bits wide.

    Float16 codes are 2^-14 of their values, and those times a scale multiples of 2^-24, so that all
    are float16 numbers. In bfloat16 the largest scale is still finite times 2^gap, 2^126.
    """
    return 2.0**-9 if dtype == tl.bfloat16 else 1.0


@triton.jit
def read_scale(scale, SCALE: tl.constexpr):
    """A scale as it is stored -> float32. SCALE: "e8m0", "e4m3" (no negative ones) or "16 bits"."""
    if SCALE == "e8m0":
        bits = tl.maximum(scale.to(tl.int32) << 23, 1 << 22)  # 2^-127 is a subnormal number
        return tl.where(scale == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    if SCALE == "e4m3":
        placed = (scale.to(tl.int32) << 20).to(tl.float32, bitcast=True)
        return tl.where(scale == 127, float("nan"), placed * 2.0**120)
    return scale.to(tl.float32)


@triton.jit
def load_scales(weight_scale_ptr, first_row, weight_rows, n, live_n, SCALE: tl.constexpr):
    """Of the lower and the upper codes of rows n of a group, which begins at `first_row`."""
    if SCALE == "e4m3":
        low = tl.load(weight_scale_ptr + 2 * first_row + n, mask=live_n, other=0)
        high = tl.load(weight_scale_ptr + 2 * first_row + weight_rows + n, mask=live_n, other=0)
    elif SCALE == "row":
        low = tl.zeros(n.shape, dtype=tl.float32)
        high = low
    else:
        low = tl.load(weight_scale_ptr + first_row + n, mask=live_n, other=0)
        high = low
    return low, high


@triton.jit
def _place(codes, DTYPE: tl.constexpr, EXPONENT_BITS: tl.constexpr, MANTISSA_BITS: tl.constexpr):
    """int32 codes -> as `placing` makes them, or `placing_in_e4m3`."""
    WIDTH: tl.constexpr = EXPONENT_BITS + MANTISSA_BITS
    if DTYPE.is_fp8e4nv():
        magnitude = (codes & ((1 << WIDTH) - 1)) << (3 - MANTISSA_BITS)
        placed = ((codes >> WIDTH) << 7 | magnitude).to(tl.int8).to(DTYPE, bitcast=True)
    else:
        magnitude = (codes & ((1 << WIDTH) - 1)) << (10 - MANTISSA_BITS)
        placed = ((codes >> WIDTH) << 15 | magnitude).to(tl.int16).to(tl.float16, bitcast=True)
        if not DTYPE.is_fp16():
            placed = (placed.to(tl.float32) * power_of_gap(EXPONENT_BITS, tl.float16)).to(DTYPE)
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
    int8, each read only by formats that have it. Two tiles (N, J) of DTYPE, exact, but float16 or
    e4m3 of a floating-point format is 2^-gap of it; nothing moves between threads. IS_SCALED: they
    are times `low_scale` and `high_scale`, (N,) float32, and `power_of_e4m3`. PACK: so many bytes
    of a row lie side by side in a thread, 2 for Hopper's `wgmma` in 16 bits and 4 for all other
    products; 0 for no PTX at all. EXPONENT_BITS: 0 for INT4. PART: which of the parts it is.
    """
    packed = packed.to(tl.int8, bitcast=True)
    high_bits = high_bits.to(tl.int8, bitcast=True)
    zero_point = zero_point.to(tl.int32)[:, None]
    if EXPONENT_BITS > 0:
        if PACK > 0 and DTYPE.primitive_bitwidth == 16:
            if IS_SCALED:
                GAP: tl.constexpr = power_of_gap(EXPONENT_BITS, DTYPE) if DTYPE.is_bf16() else 1.0
                UNIT: tl.constexpr = GAP * power_of_e4m3(DTYPE)
                low_unit = (low_scale * UNIT).to(DTYPE)[:, None]
                high_unit = (high_scale * UNIT).to(DTYPE)[:, None]
                low, high = tl.inline_asm_elementwise(
                    placing(DTYPE, PACK, EXPONENT_BITS, MANTISSA_BITS, PART, True),
                    registers_of_planes(PACK, True), [packed, high_bits, low_unit, high_unit],
                    dtype=twice(DTYPE), is_pure=True, pack=PACK,
                )  # fmt: skip
            else:
                low, high = tl.inline_asm_elementwise(
                    placing(DTYPE, PACK, EXPONENT_BITS, MANTISSA_BITS, PART, False),
                    registers_of_planes(PACK, False), [packed, high_bits],
                    dtype=twice(DTYPE), is_pure=True, pack=PACK,
                )  # fmt: skip
        elif PACK > 0 and DTYPE.is_fp8e4nv():
            low, high = tl.inline_asm_elementwise(
                placing_in_e4m3(EXPONENT_BITS, MANTISSA_BITS, PART), "=&r,=&r,r,r",
                [packed, high_bits], dtype=twice(tl.int8), is_pure=True, pack=4,
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
            if IS_SCALED:
                FACTOR: tl.constexpr = power_of_e4m3(DTYPE)
                low = (low.to(tl.float32) * (low_scale * FACTOR)[:, None]).to(DTYPE)
                high = (high.to(tl.float32) * (high_scale * FACTOR)[:, None]).to(DTYPE)
    elif PACK > 0 and DTYPE.primitive_bitwidth == 16:
        CODE_ZERO: tl.constexpr = 136 if DTYPE.is_bf16() else 1032
        summand = (-CODE_ZERO - zero_point).to(tl.float32).to(DTYPE)
        low, high = tl.inline_asm_elementwise(
            unpacking(DTYPE, PACK), registers(PACK), [packed, summand],
            dtype=twice(DTYPE), is_pure=True, pack=PACK,
        )  # fmt: skip
    else:
        low = (((packed << 4) >> 4).to(tl.int32) - zero_point).to(tl.float32).to(DTYPE)
        high = ((packed >> 4).to(tl.int32) - zero_point).to(tl.float32).to(DTYPE)
    return low, high


def bits_of(format: str) -> tuple[int, int]:
    """Of exponent and mantissa, as the kernels take them."""
    if format == "int":
        return 0, 0
    element = element_format(format)
    return element.exponent_bits, element.mantissa_bits


def scale_of(format: str) -> str:
    """As `read_scale` takes it."""
    if format not in BLOCK_FORMATS:
        return "16 bits"
    return "e4m3" if BLOCK_FORMATS[format].tensor_scale else "e8m0"
