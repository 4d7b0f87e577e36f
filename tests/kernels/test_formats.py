"""Formats over all of their codes, and weights packed in them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atom_compile.kernels import packing
from atom_compile.kernels.formats import E2M1, E2M2, E2M3, E3M2, E4M3, Float8, FloatFormat
from atom_compile.kernels.packing import FLOAT_CLIPS, GroupLayout

from .cases import few_examples, seeds

FORMATS = (E3M2, E2M3, E2M2, E2M1)
every_format = pytest.mark.parametrize("format", FORMATS, ids=str)
float_layouts = st.builds(
    GroupLayout,
    st.sampled_from([256, 344, 352, 1376, 2817]),
    st.sampled_from([32, 64, 128]),
    st.sampled_from([0, 16, 48]),
    st.booleans(),
)


def all_codes(format: FloatFormat) -> Tensor:
    return torch.arange(2**format.bits, dtype=torch.uint8)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal, and zeros of the same sign."""
    return torch.equal(left, right) and torch.equal(left.signbit(), right.signbit())


@pytest.mark.parametrize(
    ("format", "bits", "bias", "least", "largest"),
    [
        (E3M2, 6, 3, 0.0625, 28.0),
        (E2M3, 6, 1, 0.125, 7.5),
        (E2M2, 5, 1, 0.25, 7.0),
        (E2M1, 4, 1, 0.5, 6.0),
    ],
)
def test_the_formats_are_those_of_their_papers(
    format: FloatFormat, bits: int, bias: int, least: float, largest: float
) -> None:
    assert (format.bits, format.bias, format.largest) == (bits, bias, largest)
    values = format.values()
    positive = values[: len(values) // 2]
    assert positive[:2] == [0.0, least] and positive[-1] == largest
    assert positive == sorted(set(positive))
    assert E2M1.values()[:8] == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@every_format
def test_every_code_survives(format: FloatFormat) -> None:
    values = format.decode(all_codes(format))
    assert same_bits(values, torch.tensor(format.values()))
    assert torch.equal(format.round_to(values), all_codes(format))


@every_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_shifted_bits_are_the_value_times_a_power_of_two(
    format: FloatFormat, dtype: torch.dtype
) -> None:
    placed = format.place(all_codes(format), dtype)
    assert placed.dtype == dtype
    # in double, as bfloat16's subnormals are float32's
    assert same_bits(
        placed.double() * 2.0 ** format.gap(dtype), torch.tensor(format.values()).double()
    )


@every_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_multiply_the_power_of_two_away(
    format: FloatFormat, dtype: torch.dtype
) -> None:
    multiplied = format.place(all_codes(format), dtype) * 2.0 ** format.gap(dtype)
    assert multiplied.dtype == dtype
    assert same_bits(multiplied.float(), torch.tensor(format.values()))


@every_format
def test_values_of_every_format_are_exact_in_e4m3(format: FloatFormat) -> None:
    values = torch.tensor(format.values())
    assert same_bits(E4M3.nearest(values), values)


@every_format
def test_rounding_is_to_the_nearest_and_ties_go_to_the_even_code(format: FloatFormat) -> None:
    values = torch.tensor(format.values()[: 2 ** (format.bits - 1)])
    low, high = values[:-1], values[1:]
    middle, codes = (low + high) / 2, all_codes(format)[: len(values)]
    even = torch.where(codes[:-1] % 2 == 0, codes[:-1], codes[1:])
    inf = torch.tensor(torch.inf)
    for sign, bit in ((1.0, 0), (-1.0, 2 ** (format.bits - 1))):
        assert torch.equal(format.round_to(sign * middle), even + bit)
        below, above = torch.nextafter(middle, -inf), torch.nextafter(middle, inf)
        assert torch.equal(format.round_to(sign * below), codes[:-1] + bit)
        assert torch.equal(format.round_to(sign * above), codes[1:] + bit)


@few_examples
@given(st.sampled_from(FORMATS), st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_what_is_rounded_is_the_nearest_of_the_table(format: FloatFormat, xs: list[float]) -> None:
    x = torch.tensor(xs)
    codes = format.round_to(x)
    got = format.decode(codes).double()
    assert same_bits(format.nearest(x).double(), got)
    finite = torch.nan_to_num(x, nan=0.0).double()
    distances = (torch.tensor(format.values()).double() - finite[:, None]).abs()
    assert torch.equal((got - finite).abs(), distances.amin(1))
    assert torch.equal(codes >> (format.bits - 1) == 1, torch.nan_to_num(x).signbit())


@pytest.mark.parametrize("format", [*FORMATS, E4M3], ids=str)
def test_the_infinite_saturates_and_a_nan_is_zero(format: FloatFormat | Float8) -> None:
    x = torch.tensor([math.inf, -math.inf, 1e30, math.nan])
    largest = format.largest
    assert format.nearest(x).tolist() == [largest, -largest, largest, 0.0]


def test_e4m3_rounds_as_torch_does_and_saturates() -> None:
    x = torch.linspace(-464, 464, 9999)
    assert torch.equal(E4M3.round_to(x).float(), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("format", [*FORMATS, E4M3], ids=str)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_group_has_a_poisoned_scale(format: FloatFormat | Float8, poison: float) -> None:
    x = torch.ones(2, 4)
    x[0, 1] = poison
    codes, scale = packing.round_to_format(x, format, clip=1.0)
    values = format.decode(codes) * scale[:, None]
    assert values[0].isnan().all() and values[1].tolist() == [1.0] * 4


@pytest.mark.parametrize("format", [*FORMATS, E4M3], ids=str)
def test_a_group_of_zeros_is_zeros(format: FloatFormat | Float8) -> None:
    codes, scale = packing.round_to_format(torch.zeros(2, 4), format, clip=1.0)
    assert not format.decode(codes).any() and scale.isfinite().all()
    assert packing.round_to_format(torch.zeros(0, 4), format, clip=1.0)[1].shape == (0,)


@every_format
def test_every_code_survives_the_planes_at_every_place(format: FloatFormat) -> None:
    codes = torch.stack([all_codes(format).roll(shift) for shift in range(2**format.bits)])
    codes = codes.repeat(1, 64 // min(64, 2**format.bits))
    low, high = packing.pack_planes(codes, format.bits)
    width = codes.shape[1]
    assert low.shape == (len(codes), width // 2)
    assert high.shape == (len(codes), width * (format.bits - 4) // 8)
    assert torch.equal(packing.unpack_planes(low, high, format.bits), codes)


def test_planes_lie_as_the_picture_says() -> None:
    codes = torch.arange(0, 8, dtype=torch.uint8) * 8 + 1
    low, high = packing.pack_planes(codes, 6)
    assert low.tolist() == [0x11, 0x99, 0x11, 0x99]
    #   channels 0, 2, 4, 6 and 1, 3, 5, 7: 1 17 33 49 and 9 25 41 57, the bits above the low four
    assert high.tolist() == [0b11_10_01_00, 0b11_10_01_00]
    _, high = packing.pack_planes(codes % 32, 5)
    assert high.tolist() == [0b1100_1100]


@pytest.mark.parametrize("format", [E3M2, E2M3, E2M2], ids=str)
def test_a_byte_of_a_weight_finds_the_other_bits_of_both_codes_in_one_byte(
    format: FloatFormat,
) -> None:
    codes = torch.randint(0, 2**format.bits, (5, 64), dtype=torch.uint8)
    low, high = packing.pack_planes(codes, format.bits)
    high_bits, width = format.bits - 4, high.shape[1]
    byte = torch.arange(32)
    shift, mask = high_bits * (byte // width), 2**high_bits - 1
    others = high[:, byte % width]
    assert torch.equal(low & 0xF | (others >> shift & mask) << 4, codes[:, :32])
    assert torch.equal(low >> 4 | (others >> (shift + 4) & mask) << 4, codes[:, 32:])


@few_examples
@given(st.sampled_from(FORMATS), float_layouts)
def test_no_bit_is_wasted(format: FloatFormat, layout: GroupLayout) -> None:
    packed = packing.pack_float_weight(torch.randn(6, layout.width), layout, format, (1.0,))
    assert all(tensor.is_contiguous() for tensor in packed)
    stored = 8 * (packed.weight.nbytes + packed.high_bits.nbytes)
    assert stored == format.bits * 6 * layout.grouped_width
    scales = 1 if layout.per_token else layout.num_groups
    assert packed.weight_scale.shape == (scales, 6)
    assert packed.weight_scale.dtype == torch.bfloat16


@few_examples
@given(st.sampled_from(FORMATS), float_layouts, seeds)
def test_a_packed_weight_is_the_nearest_to_the_weight(
    format: FloatFormat, layout: GroupLayout, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(6, layout.width)
    packed = packing.pack_float_weight(weight, layout, format)
    got, _ = layout.split(packing.dequantize_float_weight(packed, layout, format))
    groups, _ = layout.split(weight)
    scale = packed.weight_scale.float().t()[..., None]
    assert torch.equal(got, format.nearest(groups / scale) * scale)
    # the best scale is at least as good as each that was tried
    plain = packing.pack_float_weight(weight, layout, format, FLOAT_CLIPS[4:5])
    plain_groups, _ = layout.split(packing.dequantize_float_weight(plain, layout, format))
    assert (got - groups).norm() <= (plain_groups - groups).norm()


@every_format
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("per_token", [False, True])
def test_a_poisoned_weight_poisons_its_row_and_no_other(
    format: FloatFormat, poison: float, per_token: bool
) -> None:
    layout = GroupLayout(192, 64, 0, per_token)
    weight = torch.randn(2, 192)
    weight[0, 70] = poison
    packed = packing.pack_float_weight(weight, layout, format)
    got = packing.dequantize_float_weight(packed, layout, format)
    assert got[0, 64:128].isnan().all() and got[1].isfinite().all()


@every_format
def test_rows_of_a_packed_weight_are_selected_and_joined(format: FloatFormat) -> None:
    for per_token in (False, True):
        layout = GroupLayout(192, 64, 16, per_token)
        weight = torch.randn(6, 192)
        packed = packing.pack_float_weight(weight, layout, format)
        rows = torch.tensor([4, 0, 5])
        parts = [packing.select_rows(packed, rows), packing.select_rows(packed, rows[:1])]
        joined = packing.concatenate_rows(parts)
        want = packing.pack_float_weight(weight[[4, 0, 5, 4]], layout, format)
        assert all(map(torch.equal, joined, want))
