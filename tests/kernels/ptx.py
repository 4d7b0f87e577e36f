"""Inline PTX, emulated: without a GPU nothing else runs it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LOWER_HALF, WORD = 0xFFFF, 0xFFFFFFFF


def emulate(ptx: Any, operands: Sequence[Tensor], results: int) -> list[Tensor]:
    """Registers of 32 bits as int64 (*); the instructions that the kernels use, and no others."""
    registers = {f"${results + number}": one for number, one in enumerate(operands)}

    def read(name: str) -> Tensor:
        return registers[name] if name in registers else torch.tensor(int(name, 0))

    for line in str(getattr(ptx, "value", ptx)).strip().strip("{}").split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        into, *given = re.sub(r"\{(\S+), none\}", r"\1", rest).replace(",", "").split()
        registers[into] = _run(name, [read(one) for one in given])
    return [registers[f"${number}"] for number in range(results)]


def _run(name: str, operands: list[Tensor]) -> Tensor:
    a, *more = operands
    if name in ("mov.b32", "mov.b16"):
        return a
    if name == "cvt.u32.u16":
        return a & LOWER_HALF
    if name == "mul.lo.u32":
        return a * more[0] & WORD
    if name == "shl.b32":
        return a << more[0] & WORD
    if name == "shr.u32":
        return a >> more[0]
    if name == "and.b32":
        return a & more[0]
    if name == "xor.b32":
        return a ^ more[0]
    if name == "lop3.b32":
        b, c, table = more[0], more[1], int(more[2])
        minterms = (
            (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
            for index in range(8)
            if table >> index & 1
        )
        return sum(minterms, torch.tensor(0)) & WORD
    if name == "prmt.b32":
        return _permute(a | more[0] << 32, more[1])
    if name == "mul.f16x2":
        return on_halves(torch.float16, a, more[0], torch.tensor(0))
    dtype = {"fma.rn.bf16x2": torch.bfloat16, "fma.rn.f16x2": torch.float16}[name]
    return on_halves(dtype, a, *more)


def _permute(eight_bytes: Tensor, selector: Tensor) -> Tensor:
    """PTX ISA 9.7.9.7, the default mode: a nibble's upper bit takes the byte's sign instead."""
    out = torch.tensor(0)
    for byte in range(4):
        nibble = selector >> 4 * byte & 15
        chosen = eight_bytes >> 8 * (nibble & 7) & 255
        sign = torch.where(chosen >= 128, 255, 0)
        out = out | torch.where(nibble >= 8, sign, chosen) << 8 * byte
    return out


def on_halves(dtype: torch.dtype, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c of both halves; in double the sum is exact, so that it is rounded once."""
    return from_halves(
        [
            (x.double() * y.double() + z.double()).to(dtype)
            for x, y, z in zip(*(to_halves(one, dtype) for one in (a, b, c)), strict=True)
        ]
    )


def to_halves(register: Tensor, dtype: torch.dtype) -> list[Tensor]:
    halves = (register & LOWER_HALF, register >> 16)
    return [half.to(torch.int32).to(torch.int16).view(dtype) for half in halves]


def from_halves(halves: Sequence[Tensor]) -> Tensor:
    low, high = (half.view(torch.int16).long() & LOWER_HALF for half in halves)
    return low | high << 16


def from_bytes(some_bytes: Tensor) -> Tensor:
    """(pack, *) uint8, the lowest first -> registers (*)."""
    out = torch.tensor(0)
    for at, byte in enumerate(some_bytes):
        out = out | byte.long() << 8 * at
    return out
