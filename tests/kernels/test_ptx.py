"""What inline PTX makes of packed codes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import triton.language as tl
from torch import Tensor

from atom_compile.kernels import e2m1, weight_values
from atom_compile.kernels.formats import E2M1, E4M3, FORMATS
from atom_compile.kernels.packing import pack_e2m1, unpack_e2m1

from .ptx import emulate, from_bytes, from_halves, to_halves

TRITON = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
both_packs = pytest.mark.parametrize("pack", [2, 4])


def run(
    ptx: str, dtype: torch.dtype, packed: Sequence[Tensor], by_value: Sequence[Tensor]
) -> Tensor:
    """packed: for each operand its bytes (pack, *) uint8. by_value: 16-bit floats (*), each the
    same for all bytes. Returns what the lower and the upper codes become, (2, pack, *)."""
    pack = len(packed[0])
    operands = [from_bytes(one) for one in packed]
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


@pytest.mark.parametrize("format", FORMATS)
def test_every_code_in_e4m3(format: str) -> None:
    """In all bytes of a register and in all parts, beside another code."""
    numbers = FORMATS[format]
    extra = numbers.bits - 4
    lower = torch.arange(2**numbers.bits).view(4, -1)
    upper = lower.flip(0, 1)
    placed = numbers.place(torch.arange(2**numbers.bits), torch.float8_e4m3fn).view(torch.uint8)
    for part in range(4 // extra if extra else 1):
        ptx = weight_values.placing_in_e4m3(numbers.exponent_bits, numbers.mantissa_bits, part)
        high_bits = lower >> 4 << extra * part | upper >> 4 << extra * part + 4
        packed = lower & 15 | (upper & 15) << 4
        got = emulate(ptx, [from_bytes(packed), from_bytes(high_bits)], 2)
        assert torch.equal(got[0], from_bytes(placed[lower]))
        assert torch.equal(got[1], from_bytes(placed[upper]))


def test_every_pair_of_e2m1_codes_in_integers() -> None:
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    packed = pack_e2m1(pairs)[torch.randperm(256)].view(4, 64)
    got = emulate(e2m1.PTX, [from_bytes(packed)], 2)
    integers = [
        torch.stack([(one >> 8 * at).to(torch.uint8).view(torch.int8) for at in range(4)])
        for one in got
    ]
    values = E2M1.decode(unpack_e2m1(packed[..., None]))
    for half, codes in enumerate(integers):
        assert torch.equal(codes.float(), 2 * values[..., half])
