"""Number formats of a few bits: the values of their codes, rounding to them, and reading them.

A code of a `FloatFormat` has 1 + exponent_bits + mantissa_bits bits, laid out as in IEEE 754, but
every exponent is a number: there is no infinity and no NaN.

    | sign | exponent E | mantissa M |      bias = 2^(exponent_bits - 1) - 1

    value = (-1)^sign * 2^(E - bias) * (1 + M / 2^mantissa_bits)     E > 0
            (-1)^sign * 2^(1 - bias) *      M / 2^mantissa_bits      E = 0, the subnormals

           bits   bias   largest   least normal   least of all
    E3M2     6      3       28         0.25          0.0625
    E2M3     6      1        7.5       1             0.125
    E2M2     5      1        7         1             0.25
    E2M1     4      1        6         1             0.5

A kernel reads a code without looking at it: shifted so that sign, exponent and mantissa lie where a
wider format has them, the bits *are* the value times a power of two, subnormals included, since the
wider format's subnormals are made the same way. The power of two goes into the scale; but that of
bfloat16 has to be multiplied away before a product, or the float32 sum of it underflows.

    E3M2   s eee mm   ->   float16    s 00eee mm00000000    value * 2^-12
                           bfloat16   s 00000eee mm00000    value * 2^-124
                           e4m3       s 0eee mm0            value * 2^-4

In units of the least of all, values of E2M1, E2M2 and E2M3 are integers up to 12, 28 and 60: INT8
tensor cores multiply them as exactly.

Sources: FP6-LLM (arXiv 2401.14112) for E3M2 and E2M2 and the shift; OCP Microscaling Formats (MX)
1.0, section 5.3, for E3M2, E2M3 and E2M1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_FLOAT32_EXPONENT, _FLOAT32_BIAS = 0x7F800000, 127


@dataclass(frozen=True)
class FloatFormat:
    """A format of 4 to 6 bits, each code the low bits of a byte; see the module's docstring."""

    exponent_bits: int
    mantissa_bits: int

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def least_normal(self) -> float:
        return 2.0 ** (1 - self.bias)

    @property
    def least(self) -> float:
        """The least magnitude but zero; every value is a whole multiple of it."""
        return self.least_normal * math.ldexp(1, -self.mantissa_bits)

    @property
    def largest(self) -> float:
        greatest_exponent = (1 << self.exponent_bits) - 1 - self.bias
        return 2.0**greatest_exponent * (2 - 2.0**-self.mantissa_bits)

    def values(self) -> list[float]:
        """The value of each code, from 0 to 2^bits - 1: the definition of the format."""
        values = []
        for code in range(2 ** (self.bits - 1)):
            exponent, mantissa = divmod(code, 2**self.mantissa_bits)
            significand = mantissa / 2**self.mantissa_bits + (exponent > 0)
            values.append(2.0 ** (max(exponent, 1) - self.bias) * significand)
        return [*values, *(-value for value in values)]

    def round_to(self, x: Tensor) -> Tensor:
        """x (*) -> uint8 codes (*): the nearest value, ties to the even code.

        What is larger than the largest becomes the largest, a NaN zero: see `packing` for what
        tells the reader of one.
        """
        x, steps, binade = self._steps(x)
        # a magnitude that rounds up to the next power of two carries into the exponent by itself
        exponent = (binade.view(torch.int32) >> 23) - _FLOAT32_BIAS
        codes = steps.int() + ((exponent + self.bias - 1) << self.mantissa_bits)
        return (codes + (x.signbit().int() << (self.bits - 1))).to(torch.uint8)

    def nearest(self, x: Tensor) -> Tensor:
        """x (*) -> float32 (*): the values of the codes that `round_to` gives."""
        x, steps, binade = self._steps(x)
        return (steps * binade * math.ldexp(1, -self.mantissa_bits)).copysign(x)

    def nearest_(self, x: Tensor) -> Tensor:
        """`nearest` in place, of float32."""
        return x.copy_(self.nearest(x))

    def _steps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x without NaN; how many whole steps of the codes around it its magnitude is; the binade.

        All float32 (*). The binade is the power of two at or below x, at least `least_normal`, and
        2^mantissa_bits steps.
        """
        x = torch.nan_to_num(x.float(), nan=0.0)
        magnitude = x.abs().clamp(max=self.largest)
        bits = magnitude.clamp(min=self.least_normal).view(torch.int32)
        binade = (bits & _FLOAT32_EXPONENT).view(torch.float32)
        return x, (magnitude / binade * 2**self.mantissa_bits).round(), binade

    def decode(self, codes: Tensor) -> Tensor:
        """uint8 codes (*) -> float32 values (*)."""
        return self.place(codes, torch.float16).float() * math.ldexp(1, self.gap(torch.float16))

    def place(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """uint8 codes (*) -> (*) of `dtype`, the bits where it has them: value * 2^-gap(dtype).

        dtype: float16, bfloat16 or float8_e4m3fn.
        """
        codes = codes.int()
        sign = codes >> (self.bits - 1) << (8 * dtype.itemsize - 1)
        magnitude = codes & ((1 << (self.bits - 1)) - 1)
        placed = sign | magnitude << (_mantissa_bits(dtype) - self.mantissa_bits)
        storage = torch.uint8 if dtype.itemsize == 1 else torch.int16
        return placed.to(storage).view(dtype)

    def gap(self, dtype: torch.dtype) -> int:
        """How many powers of two too small `place` makes a value: the difference of the biases."""
        return 1 - round(math.log2(torch.finfo(dtype).smallest_normal)) - self.bias


def _mantissa_bits(dtype: torch.dtype) -> int:
    return -round(math.log2(torch.finfo(dtype).eps))


E3M2 = FloatFormat(3, 2)
E2M3 = FloatFormat(2, 3)
E2M2 = FloatFormat(2, 2)
E2M1 = FloatFormat(2, 1)
FORMATS = {"e3m2": E3M2, "e2m3": E2M3, "e2m2": E2M2, "e2m1": E2M1}
"""The floating-point formats of weights, by name; "int" is the name of integers."""


@dataclass(frozen=True)
class Float8:
    """torch.float8_e4m3fn with the same methods; rounding saturates, as torch's cast need not."""

    dtype = torch.float8_e4m3fn
    largest = torch.finfo(torch.float8_e4m3fn).max

    def round_to(self, x: Tensor) -> Tensor:
        """x (*) -> float8_e4m3fn (*)."""
        x = torch.nan_to_num(x.float(), nan=0.0).clamp(-self.largest, self.largest)
        return x.to(torch.float8_e4m3fn)

    def decode(self, codes: Tensor) -> Tensor:
        return codes.float()

    def nearest(self, x: Tensor) -> Tensor:
        return self.decode(self.round_to(x))


class PowerOfTwo:
    """torch.float8_e8m0fnu, for scales: 2^(byte - 127), or NaN for 255."""

    dtype = torch.float8_e8m0fnu

    def nearest(self, x: Tensor) -> Tensor:
        """x (*), none negative -> float32 (*): the power of two at or below, at least 2^-126."""
        smallest = torch.finfo(torch.float32).smallest_normal
        bits = x.float().clamp(min=smallest).view(torch.int32)
        return (bits & _FLOAT32_EXPONENT).view(torch.float32)


E4M3 = Float8()
E8M0 = PowerOfTwo()


@dataclass(frozen=True)
class BlockFormat:
    """E2M1 codes in blocks of so many channels that share a scale of 8 bits.

    tensor_scale: whether the whole weight has a float32 scale as well.
    """

    size: int
    scale: Float8 | PowerOfTwo
    tensor_scale: bool


BLOCK_FORMATS = {"mxfp4": BlockFormat(32, E8M0, False), "nvfp4": BlockFormat(16, E4M3, True)}
"""Formats of weights, by name, whose scales are of 8 bits; block_formats.py describes them."""


def element_format(name: str) -> FloatFormat:
    """Of the codes of a weight's format but "int"."""
    return E2M1 if name in BLOCK_FORMATS else FORMATS[name]


@dataclass(frozen=True)
class IntFormat:
    """Integers of so many bits in two's complement, as a grid that weights are rounded to."""

    bits: int

    @property
    def largest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def nearest(self, x: Tensor) -> Tensor:
        return self.nearest_(x.clone())

    def nearest_(self, x: Tensor) -> Tensor:
        return x.round_().clamp_(-self.largest - 1, self.largest)
