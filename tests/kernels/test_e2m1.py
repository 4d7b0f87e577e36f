from __future__ import annotations

import torch

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
