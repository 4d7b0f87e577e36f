"""Products with weights in floating-point formats, against the arithmetic that kernels can do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atom_compile.kernels.float_linear import float_linear
from atom_compile.kernels.formats import E2M1, E2M2, E2M3, E3M2, E4M3, FloatFormat
from atom_compile.kernels.packing import (
    GroupLayout,
    dequantize_float_weight,
    pack_float_weight,
    unpack_planes,
)
from atom_compile.kernels.quantize_e4m3 import quantize_e4m3

from .cases import dtypes, few_examples, seeds, tokens

widths = st.sampled_from([256, 344, 1376])
formats = st.sampled_from([E3M2, E2M3, E2M2, E2M1])


@few_examples
@given(tokens, widths, formats, dtypes, seeds)
def test_with_a_scale_per_row_all_scaling_is_at_the_end(
    M: int, K: int, format: FloatFormat, dtype: torch.dtype, seed: int
) -> None:
    """Codes shifted into float16 or e4m3, as activations are, are multiplied as they are."""
    torch.manual_seed(seed)
    layout = GroupLayout(K, 128, 0, per_token=True)
    packed = pack_float_weight(torch.randn(5, K), layout, format)
    codes_NK = unpack_planes(packed.weight, packed.high_bits, format.bits).transpose(0, 1)
    codes_NK = codes_NK.flatten(1)[:, :K]
    row_scale = packed.weight_scale[0].double()
    x = torch.randn(M, K).to(dtype)

    placed = format.place(codes_NK, torch.float16).double()
    sums = x.double() @ placed.t() * row_scale * 2.0 ** format.gap(torch.float16)
    got = float_linear(x, packed, layout, format)
    torch.testing.assert_close(got, sums.float(), rtol=1e-4, atol=1e-4)

    x_codes, x_scale = quantize_e4m3(x)
    placed = format.place(codes_NK, torch.float8_e4m3fn).double()
    sums = x_codes.double() @ placed.t() * x_scale[:, None].double() * row_scale
    sums = sums * 2.0 ** format.gap(torch.float8_e4m3fn)
    got = float_linear(x_codes.float() * x_scale[:, None], packed, layout, format)
    torch.testing.assert_close(got, sums.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("format", [E2M1, E2M2, E2M3], ids=str)
def test_values_are_small_integers_of_the_least(format: FloatFormat) -> None:
    units = torch.tensor(format.values()) / format.least
    assert torch.equal(units, units.to(torch.int8).float())


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [3, 130, 255])
def test_a_poisoned_token_is_nan_and_no_other(poison: float, where: int) -> None:
    layout = GroupLayout(256, 64, 16)
    x = torch.randn(3, 256)
    x[1, where] = poison
    packed = pack_float_weight(torch.randn(5, 256), layout, E2M1)
    codes, scale = quantize_e4m3(x)
    got = float_linear(codes.float() * scale[:, None], packed, layout, E2M1)
    assert got[1].isnan().all() and got[[0, 2]].isfinite().all()


def test_e4m3_activations_reach_the_largest_number() -> None:
    codes, scale = quantize_e4m3(torch.tensor([[0.0, -3.0, 1.5]]))
    assert codes.float().tolist() == [[0.0, -E4M3.largest, E4M3.largest / 2]]
    torch.testing.assert_close(scale, torch.tensor([3.0 / E4M3.largest]))


def test_the_product_is_that_of_the_dequantized_weight() -> None:
    layout = GroupLayout(344, 128, 48)
    packed = pack_float_weight(torch.randn(5, 344), layout, E3M2)
    x = torch.randn(2, 3, 344).bfloat16()
    want = x.float() @ dequantize_float_weight(packed, layout, E3M2).t()
    got = float_linear(x, packed, layout, E3M2)
    assert got.shape == (2, 3, 5)
    torch.testing.assert_close(got, want)
