"""What PTX makes of packed codes, instruction by instruction."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from atom_compile.kernels import e2m1
from atom_compile.kernels.formats import E2M1
from atom_compile.kernels.packing import pack_e2m1, unpack_e2m1

ALL_PAIRS = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)


def test_every_pair_of_codes_survives_packing() -> None:
    packed = pack_e2m1(ALL_PAIRS)
    assert packed.dtype == torch.uint8 and packed.shape == (256, 1)
    unpacked = unpack_e2m1(packed)
    assert torch.equal(E2M1.decode(unpacked), E2M1.decode(ALL_PAIRS))
    assert not (unpacked == 8).any() and packed.unique().numel() == 15 * 15


def test_the_low_half_of_a_group_is_in_the_low_half_of_the_bytes() -> None:
    codes = E2M1.round_to(torch.tensor([0.5, 6.0, -1.0, -0.0]))
    assert pack_e2m1(codes).tolist() == [0b0101_1000, 0b0000_1011]


def prmt(a: int, b: int, selector: int) -> int:
    """PTX ISA 9.7.9.7, the default mode."""
    table = (b << 32 | a).to_bytes(8, "little")
    nibbles = [selector >> shift & 0xF for shift in (0, 4, 8, 12)]
    chosen = [table[nibble & 7] for nibble in nibbles]
    sign = [0xFF if byte & 0x80 else 0 for byte in chosen]
    return int.from_bytes(
        bytes(s if n & 8 else byte for n, byte, s in zip(nibbles, chosen, sign, strict=True)),
        "little",
    )


def lop3(a: int, b: int, c: int, table: int) -> int:
    bits = ((a >> n & 1) << 2 | (b >> n & 1) << 1 | c >> n & 1 for n in range(32))
    return sum((table >> index & 1) << n for n, index in enumerate(bits))


INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, n: a >> n,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
}


def run_ptx(packed: int) -> tuple[int, int]:
    registers = {"$2": packed}
    for line in re.findall(r"^(?!\.reg)(\S+) (.+);$", e2m1.PTX.value, re.M):
        name, (result, *operands) = line[0], line[1].split(", ")
        values = (registers[one] if one in registers else int(one, 0) for one in operands)
        registers[result] = INSTRUCTIONS[name](*values)
    return registers["$0"], registers["$1"]


def test_ptx_gives_twice_the_values() -> None:
    packed = pack_e2m1(ALL_PAIRS).flatten()
    words = packed[torch.randperm(256)].view(-1, 4)
    for word in words:
        results = run_ptx(int.from_bytes(bytes(word.tolist()), "little"))
        got = [torch.tensor(list(one.to_bytes(4, "little"))).to(torch.int8) for one in results]
        values = E2M1.decode(unpack_e2m1(word[:, None]))
        assert torch.equal(torch.stack(got, dim=1).float(), 2 * values)
