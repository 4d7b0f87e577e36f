"""Arithmetic of launches. Triton's own functions go through wrappers for its compiler, at 3 us."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is no less than n, which is at least 1."""
    return 1 << (n - 1).bit_length()
