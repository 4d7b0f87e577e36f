"""Codes of E2M1, as packing.pack_e2m1 lays them out, to integers for INT8 tensor cores.

`prmt` looks up four bytes at once, in a table of eight, by four nibbles: a nibble's lower three
bits choose the byte; if its first bit is set, the result is eight copies of that byte's first bit.
With the mantissa's bit first, one table serves the codes whose bit is 0 and, with that bit flipped,
a second one the others. Codes that share a place in the tables share their sign, so that what comes
from the wrong table is that sign all over:

    mantissa      0         1          the sign's bit is that of either
    first table   a value   the sign   the others are of first ^ second, which a negative number has
    second table  the sign  a value    inverted in the tables

A word's eight codes take 11 instructions: two shifts and a flip, four look-ups, two merges, and two
more that put the lower codes of its bytes together, and the upper ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 0 2 4 8, and -2 -4 -8; then 1 3 6 12, -1 -3 -6 -12
_FIRST, _SECOND = "0x08040200, 0x878381FF", "0x0C060301, 0x8B858280"
_MERGE = "0x80808080, 0xBC"  # where the mask is set a | b, elsewhere a ^ b

PTX = tl.constexpr(f"""{{
.reg .b32 codes, flipped, first, second, even, odd;
xor.b32 flipped, $2, 0x88888888;
prmt.b32 first, {_FIRST}, $2;
prmt.b32 second, {_SECOND}, flipped;
lop3.b32 even, first, second, {_MERGE};
shr.u32 codes, $2, 16;
shr.u32 flipped, flipped, 16;
prmt.b32 first, {_FIRST}, codes;
prmt.b32 second, {_SECOND}, flipped;
lop3.b32 odd, first, second, {_MERGE};
prmt.b32 $0, even, odd, 0x6420;
prmt.b32 $1, even, odd, 0x7531;
}}""")
"""Four packed bytes, $2, to twice the values of their lower codes, $0, and of their upper, $1."""

REGISTERS = tl.constexpr("=&r,=&r,r")
BOTH = tl.constexpr((tl.int8, tl.int8))


@triton.jit
def twice_the_values(nibbles):
    """int32 nibbles -> int8: what the PTX computes, in plain arithmetic."""
    mantissa = nibbles >> 3
    exponent = nibbles & 3
    magnitude = tl.where(exponent == 0, mantissa, (2 + mantissa) << tl.maximum(exponent - 1, 0))
    return tl.where((nibbles & 4) != 0, -magnitude, magnitude).to(tl.int8)
