"""GPTQ on layers small enough to know the answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atom_compile.gptq import fit_weight, round_float_weight, round_weight
from atom_compile.kernels.formats import (
    BLOCK_FORMATS,
    E2M1,
    E2M2,
    E2M3,
    E3M2,
    FORMATS,
    FloatFormat,
)
from atom_compile.kernels.packing import (
    GroupLayout,
    PackedWeight,
    dequantize_float_weight,
    dequantize_weight,
    pack_float_weight,
    pack_grouped,
    pack_weight,
    row_scales,
)


def correlated(tokens: int, width: int) -> Tensor:
    """Activations whose channels tell about each other, as those of models do."""
    hidden = torch.randn(tokens, width // 4) @ torch.randn(width // 4, width)
    return hidden + 0.3 * torch.randn(tokens, width)


def output_error(weight: Tensor, rounded: Tensor, x: Tensor) -> float:
    return float(((rounded - weight) @ x.t()).norm() / (weight @ x.t()).norm())


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    st.sampled_from(
        [
            GroupLayout(256, 64, 32),
            GroupLayout(344, 128, 48),
            GroupLayout(256, 128, 0),
            GroupLayout(344, 128, 48, per_token=True),
        ]
    ),
    st.sampled_from([3, 4]),
    st.integers(0, 2**32 - 1),
)
def test_output_error_is_smaller_than_of_rounding_to_nearest(
    layout: GroupLayout, bits: int, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, x = torch.randn(24, layout.width), correlated(1024, layout.width)
    bits = 4 if layout.per_token else bits
    packed, note = round_weight(weight, x.t() @ x / len(x), layout, bits)
    nearest = dequantize_weight(pack_weight(weight, layout, bits, 0.9), layout)
    error = output_error(weight, dequantize_weight(packed, layout), x)
    assert error < 0.8 * output_error(weight, nearest, x)
    assert note is None


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    st.sampled_from([E3M2, E2M3, E2M2, E2M1]),
    st.sampled_from(
        [
            GroupLayout(256, 64, 32),
            GroupLayout(344, 128, 0),
            GroupLayout(344, 128, 0, per_token=True),
            GroupLayout(344, 128, 48, per_token=True),
        ]
    ),
    st.integers(0, 2**32 - 1),
)
def test_output_error_of_floating_point_formats_is_smaller_than_of_rounding_to_nearest(
    format: FloatFormat, layout: GroupLayout, seed: int
) -> None:
    torch.manual_seed(seed)
    weight, x = torch.randn(24, layout.width), correlated(1024, layout.width)
    packed, note = round_float_weight(weight, x.t() @ x / len(x), layout, format)
    nearest = pack_float_weight(weight, layout, format)
    assert [one.shape for one in packed] == [one.shape for one in nearest]
    got, plain = (dequantize_float_weight(one, layout, format) for one in (packed, nearest))
    assert output_error(weight, got, x) < 0.8 * output_error(weight, plain, x)
    assert note is None


@pytest.mark.parametrize("per_token", [False, True])
def test_without_correlations_floating_point_codes_are_the_nearest(per_token: bool) -> None:
    torch.manual_seed(0)
    layout = GroupLayout(256, 64, 32, per_token)
    weight = torch.randn(8, 256)
    packed, _ = round_float_weight(weight, torch.eye(256), layout, E3M2)
    for got, want in zip(packed, pack_float_weight(weight, layout, E3M2), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("format", FORMATS)
def test_weights_alone_have_no_outliers(format: str) -> None:
    layout = GroupLayout(344, 128, 0)
    weight, x = torch.randn(8, 344), correlated(1024, 344)
    hessian = x.t() @ x / len(x)
    packed, _ = round_weight(weight, hessian, layout, 0, weight_only=True, format=format)
    want, _ = round_float_weight(weight, hessian, layout, FORMATS[format])
    got = dequantize_weight(packed, layout, format)
    assert torch.equal(got, dequantize_float_weight(want, layout, FORMATS[format]))


@pytest.mark.parametrize("width", [344, 335, 20])
@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_output_error_of_blocks_is_smaller_than_of_rounding_to_nearest(
    format: str, width: int
) -> None:
    layout = GroupLayout(width, 32, 0)
    weight, x = torch.randn(24, width), correlated(1024, width)
    row_scale = row_scales([weight[:8], weight[8:]], format)
    named: dict[str, Any] = {"format": format, "row_scale": row_scale}
    packed, note = round_weight(weight, x.t() @ x / len(x), layout, 4, weight_only=True, **named)
    nearest = pack_grouped(weight, layout, 4, 1.0, **named)
    for one, other in zip(packed, nearest, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or one.shape == other.shape
    got, plain = (dequantize_weight(one, layout, format) for one in (packed, nearest))
    assert output_error(weight, got, x) < 0.8 * output_error(weight, plain, x)
    assert note is None


@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_without_correlations_codes_of_blocks_are_the_nearest(format: str) -> None:
    """They belong to the scales that are stored, each rounded before its codes."""
    layout = GroupLayout(344, 32, 0)
    weight = torch.randn(8, 344)
    packed, _ = round_weight(weight, torch.eye(344), layout, 4, weight_only=True, format=format)
    for got, want in zip(packed, pack_grouped(weight, layout, 4, 1.0, format=format), strict=True):
        if got is None or want is None:
            assert got is want
        else:
            assert torch.equal(got, want)


def test_a_weight_of_e2m1_for_quantized_activations_keeps_its_outliers() -> None:
    layout = GroupLayout(344, 128, 48)
    weight, x = torch.randn(8, 344), correlated(1024, 344)
    hessian = x.t() @ x / len(x)
    packed, _ = round_weight(weight, hessian, layout, 4, format="e2m1")
    want, _ = round_float_weight(weight, hessian, layout, E2M1)
    assert isinstance(packed, PackedWeight)
    got = dequantize_weight(packed, layout, "e2m1")
    assert torch.equal(got, dequantize_float_weight(want, layout, E2M1))


def test_codes_belong_to_the_scales_that_are_stored() -> None:
    layout = GroupLayout(256, 64, 32)
    weight = torch.randn(8, 256)
    packed, _ = round_weight(weight, torch.eye(256), layout, 4, clips=(1.0,))
    # uncorrelated channels leave nothing to make up for: this is rounding to nearest
    for got, want in zip(packed, pack_weight(weight, layout, 4, 1.0), strict=True):
        torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_alone_are_rounded_to_nearest_where_channels_are_uncorrelated(
    symmetric: bool,
) -> None:
    layout = GroupLayout(250, 64, 0)
    weight = torch.randn(8, 250) + 0.3
    packed, _ = round_weight(
        weight, torch.eye(250), layout, 4, (0.9,), weight_only=True, symmetric=symmetric
    )
    want = pack_grouped(weight, layout, 4, 0.9, symmetric)
    assert packed._fields == want._fields and (packed[2] is None) == symmetric
    got, want_weight = (dequantize_weight(one, layout) for one in (packed, want))
    torch.testing.assert_close(got, want_weight, rtol=0.0, atol=0.0)


def test_the_clip_is_chosen_for_the_channels_that_matter() -> None:
    layout = GroupLayout(64, 64, 0)
    weight = torch.full((1, 64), 0.1)
    weight[0, 0] = 1.0
    few = torch.full((64,), 1.0)
    few[0] = 1e-6  # nothing ever comes through the one large weight
    packed, _ = round_weight(weight, few.diag(), layout, 4, clips=(1.0, 0.7))
    torch.testing.assert_close(
        dequantize_weight(packed, layout)[0, 1:], weight[0, 1:], rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_singular_hessians_are_damped_and_reported(tokens: int) -> None:
    layout = GroupLayout(256, 64, 32)
    weight, x = torch.randn(8, 256), torch.randn(tokens, 256)
    x[:, ::2] = 0.0
    packed, note = round_weight(weight, x.t() @ x, layout, 4)
    rounded = dequantize_weight(packed, layout)
    assert rounded.isfinite().all()
    assert note is not None and "dead input channels" in note
    assert (rounded - weight)[:, ::2].norm() < 0.2 * weight[:, ::2].norm()


def test_an_ill_conditioned_hessian_is_damped_more() -> None:
    x = torch.ones(4, 256)
    hessian = x.t() @ x - 20 * torch.eye(256)  # not even positive
    hessian.diagonal().fill_(1.0)
    packed, note = round_weight(torch.randn(8, 256), hessian, GroupLayout(256, 64, 32), 4)
    assert note is not None and "damped by" in note
    assert dequantize_weight(packed, GroupLayout(256, 64, 32)).isfinite().all()


def test_a_fitted_weight_makes_up_for_its_input() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 256), correlated(4096, 256)
    noisy = x + 4.0 * torch.randn_like(x)
    fitted = fit_weight(weight, noisy.t() @ noisy, x.t() @ noisy)
    wanted = x @ weight.t()
    assert (noisy @ fitted.t() - wanted).norm() < 0.9 * (noisy @ weight.t() - wanted).norm()


def test_an_exact_input_leaves_the_weight_as_it_is() -> None:
    weight, x = torch.randn(24, 256), correlated(64, 256)
    torch.testing.assert_close(fit_weight(weight, x.t() @ x, x.t() @ x), weight)
    nothing = torch.zeros(256, 256)
    torch.testing.assert_close(fit_weight(weight, nothing, nothing), weight)


def test_the_same_twice() -> None:
    weight, x = torch.randn(8, 256), correlated(300, 256)
    first, second = (
        round_weight(weight, x.t() @ x, GroupLayout(256, 64, 32), 4).packed for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)
