from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atom_compile.kernels import packing
from atom_compile.kernels.formats import FORMATS
from atom_compile.kernels.packing import AnyWeight, GroupLayout
from atom_compile.kernels.storing import is_stored, restore, store, store_order

from .cases import few_examples, seeds

KINDS = ("w4a4", "w4a4-fp4", "w4a8-two-level", "symmetric", "affine", *FORMATS)
# any number of channels in the last group, one and all of them too
widths = st.integers(1, 400)


def pack(kind: str, weight: torch.Tensor, layout: GroupLayout) -> AnyWeight:
    if kind == "w4a4":
        return packing.pack_weight(weight, layout, bits=4, clip=0.85)
    if kind == "w4a4-fp4":
        return packing.pack_weight(weight, layout, 4, 1.0, "e2m1")
    if kind == "w4a8-two-level":
        return packing.pack_two_level(weight, layout)
    format = kind if kind in FORMATS else "int"
    return packing.pack_grouped(weight, layout, 4, 0.85, kind != "affine", format)


@pytest.mark.parametrize("kind", KINDS)
@few_examples
@given(st.data(), seeds)
def test_what_is_stored_is_restored_to_the_last_bit(kind: str, data: Any, seed: int) -> None:
    torch.manual_seed(seed)
    grouped, rows = data.draw(widths), data.draw(st.sampled_from([0, 1, 5]))
    outliers = data.draw(st.sampled_from([0, 16])) if kind in KINDS[:3] else 0
    layout = GroupLayout(grouped + outliers, 128, outliers)
    weight = torch.randn(rows, layout.width)
    weight[:1, :1] = data.draw(st.sampled_from([0.0, float("nan"), float("inf")]))
    packed, format = pack(kind, weight, layout), kind if kind in FORMATS else "int"
    stored = store(packed, layout, format)
    assert is_stored(stored) is (grouped % 128 > 0)
    assert store(stored, layout, format) is stored
    back = restore(stored, layout, format)
    for field, want in packed._asdict().items():
        got = getattr(back, field)
        assert (got is None) is (want is None)
        if want is not None:
            assert got.is_contiguous() and got.dtype == want.dtype
            assert torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize(("channels", "row_bytes"), [(128, 64), (96, 48), (33, 17), (1, 1)])
def test_a_last_group_takes_half_a_byte_a_channel(channels: int, row_bytes: int) -> None:
    layout = GroupLayout(256 + channels + 32, 128, 32)
    packed = packing.pack_weight(torch.randn(3, layout.width), layout, bits=4, clip=0.85)
    stored = store(packed, layout)
    assert stored.weight.nbytes == 3 * (128 + row_bytes)
    assert stored[1:] == packed[1:]  # all the rest is the same


def test_codes_of_a_last_group_lie_like_those_of_a_whole_one() -> None:
    layout = GroupLayout(70, 64, 0)
    codes = torch.zeros(1, 2, 64, dtype=torch.int8)
    codes[0, 1, :6] = torch.tensor([1, 2, 3, -1, -2, -3])
    packed = packing.grouped_codes(codes, torch.ones(1, 2), None)
    assert store(packed, layout).weight[0, 32:].tolist() == [0xF1, 0xE2, 0xD3]


def test_orders_take_the_narrowest_integers() -> None:
    for width, dtype in (
        (256, torch.uint8),
        (257, torch.int16),
        (32768, torch.int16),
        (32769, torch.int32),
    ):
        order = torch.randperm(width).to(torch.int32)
        assert store_order(order).dtype == dtype
        assert torch.equal(store_order(order).to(torch.int32), order)
