"""What the inline PTX computes, emulated: without a GPU nothing else runs it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
import triton.language as tl
from torch import Tensor

from atom_compile.kernels import weight_values
from atom_compile.kernels.formats import E2M1, E4M3, FORMATS

TRITON = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
LOWER_HALF = 0xFFFF
both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
both_packs = pytest.mark.parametrize("pack", [2, 4])


def emulate(ptx: str, operands: Sequence[Tensor], results: int) -> list[Tensor]:
    """Registers of 32 bits as int64 (*); the instructions that the kernels use, and no others."""
    registers = {f"${results + number}": one for number, one in enumerate(operands)}

    def read(name: str) -> Tensor:
        return registers[name] if name in registers else torch.tensor(int(name, 0))

    for line in ptx.strip("{}").split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        into, *given = re.sub(r"\{(\S+), none\}", r"\1", rest).replace(",", "").split()
        a, *more = (read(one) for one in given)
        if name in ("mov.b32", "mov.b16"):
            out = a
        elif name == "prmt.b32":
            both, selector = a | more[0] << 32, more[1]
            places = [8 * (selector >> 4 * byte & 7) for byte in range(4)]
            chosen = [(both >> place & 255) << 8 * byte for byte, place in enumerate(places)]
            out = torch.stack(chosen).sum(0)
        elif name == "shl.b32":
            out = a << more[0] & 0xFFFFFFFF
        elif name == "shr.u32":
            out = a >> more[0]
        elif name == "and.b32":
            out = a & more[0]
        elif name == "lop3.b32":
            out = {0xEA: (a & more[0]) | more[1], 0x6A: (a & more[0]) ^ more[1]}[int(more[2])]
        elif name == "fma.rn.bf16x2":
            out = on_halves(torch.bfloat16, a, *more)
        elif name == "fma.rn.f16x2":
            out = on_halves(torch.float16, a, *more)
        else:
            assert name == "mul.f16x2"
            out = on_halves(torch.float16, a, more[0], torch.tensor(0))
        registers[into] = out
    return [registers[f"${number}"] for number in range(results)]


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


def run(
    ptx: str, dtype: torch.dtype, packed: Sequence[Tensor], by_value: Sequence[Tensor]
) -> Tensor:
    """packed: for each operand its bytes (pack, *) uint8. by_value: 16-bit floats (*), each the
    same for all bytes. Returns what the lower and the upper codes become, (2, pack, *)."""
    pack = len(packed[0])
    operands = [sum(byte.long() << 8 * at for at, byte in enumerate(one)) for one in packed]
    operands += [from_halves([one, one]) for one in by_value for _ in range(pack // 2)]
    results = emulate(ptx, operands, pack)
    halves = torch.stack([half for one in results for half in to_halves(one, dtype)])
    return halves.double().view(2, pack, *halves.shape[1:])


def every_byte(pack: int) -> Tensor:
    """(pack, 256) uint8: in every place each."""
    return torch.stack([torch.arange(256).roll(-at) for at in range(pack)]).to(torch.uint8)


@both_dtypes
@both_packs
def test_every_integer_and_zero_point(dtype: torch.dtype, pack: int) -> None:
    packed = every_byte(pack)[..., None].expand(-1, -1, 17)
    zero_point = torch.arange(-8, 9).expand(256, 17)
    code_zero = 136 if dtype == torch.bfloat16 else 1032
    summand = (-code_zero - zero_point).to(dtype)
    got = run(weight_values.unpacking(TRITON[dtype], pack), dtype, [packed], [summand])
    signed = packed.view(torch.int8)
    codes = torch.stack([signed << 4 >> 4, signed >> 4])
    assert torch.equal(got, (codes - zero_point).double())


@both_dtypes
@both_packs
@pytest.mark.parametrize("format", FORMATS)
def test_every_floating_point_code(format: str, dtype: torch.dtype, pack: int) -> None:
    element = FORMATS[format]
    extra, values = element.bits - 4, torch.tensor(element.values()).double()
    packed = every_byte(pack)[..., None].expand(-1, -1, 256)
    high_bits = torch.arange(256).to(torch.uint8).expand(pack, 256, 256)
    fields = element.exponent_bits, element.mantissa_bits
    for part in range(weight_values.num_parts(*fields)):
        ptx = weight_values.placing(TRITON[dtype], pack, *fields, part, False)
        got = run(ptx, dtype, [packed, high_bits], [])
        above = high_bits >> extra * part & (1 << extra) - 1
        above_upper = high_bits >> extra * part + 4 & (1 << extra) - 1
        codes = torch.stack([packed & 15 | above << 4, packed >> 4 | above_upper << 4])
        gap = 0 if dtype == torch.bfloat16 else element.gap(dtype)
        assert torch.equal(got * 2.0**gap, values[codes.long()])


@both_dtypes
@both_packs
def test_every_code_under_every_scale_of_nvfp4(dtype: torch.dtype, pack: int) -> None:
    scale = torch.arange(127).to(torch.uint8).view(E4M3.dtype).double()
    packed = every_byte(pack)[..., None].expand(-1, -1, len(scale))
    power = weight_values.power_of_e4m3(TRITON[dtype])
    unit = 2.0 ** E2M1.gap(dtype) if dtype == torch.bfloat16 else 1.0
    scales = scale.expand(256, -1), scale.flip(0).expand(256, -1)
    ptx = weight_values.placing(TRITON[dtype], pack, 2, 1, 0, True)
    got = run(ptx, dtype, [packed, packed], [(one * power * unit).to(dtype) for one in scales])
    values = torch.tensor(E2M1.values()).double()
    low, high = values[(packed & 15).long()], values[(packed >> 4).long()]
    want = torch.stack([low * scales[0], high * scales[1]])
    gap = 0 if dtype == torch.bfloat16 else E2M1.gap(dtype)
    assert torch.equal(got * 2.0**gap, want * power)
