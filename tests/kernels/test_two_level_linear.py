from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atom_compile.kernels import linear, quantize, two_level_linear
from atom_compile.kernels.packing import GroupLayout, dequantize_weight, narrow_rows, pack_two_level

from .cases import dtypes, few_examples, kernel_device, layouts, poisoned_memory, seeds, tokens

MULTIPLY: Callable[..., Tensor] = linear.multiply


def per_token(x: Tensor, layout: GroupLayout) -> tuple[Tensor, Tensor]:
    """INT8 codes with one scale for all channels in groups and one for the outliers."""
    return quantize.reference(x, 8, layout.group_size, layout.outlier_channels, 1.0, per_token=True)


@few_examples
@given(tokens, layouts, dtypes, st.booleans(), seeds)
def test_kernel_computes_what_the_reference_does(
    tokens: int, layout: GroupLayout, dtype: torch.dtype, extras: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    N = 70
    codes, scale = per_token(torch.randn(tokens, layout.width), layout)
    weight = pack_two_level(torch.randn(N, layout.width), layout)
    bias = torch.randn(N, dtype=dtype) if extras else None
    residual = torch.randn(tokens, N, dtype=dtype) if extras else None
    want = two_level_linear.reference(codes, scale, *weight, bias, residual, dtype)
    device = kernel_device()
    arguments: list[Any] = [
        None if one is None else one.to(device) for one in (codes, scale, *weight, bias, residual)
    ]
    with poisoned_memory():
        got = MULTIPLY(*arguments, dtype)
    eps = torch.finfo(dtype).eps
    # the sums are exact, their scaling and adding is not
    tolerance = max(4 * eps, 1e-5)
    torch.testing.assert_close(got.cpu(), want, rtol=tolerance, atol=10 * tolerance)


@few_examples
@given(layouts, st.integers(0, 60), st.integers(1, 70), st.integers(0, 40), seeds)
def test_some_rows_of_a_larger_weight(
    layout: GroupLayout, before: int, N: int, after: int, seed: int
) -> None:
    torch.manual_seed(seed)
    codes, scale = per_token(torch.randn(3, layout.width), layout)
    weight = pack_two_level(torch.randn(before + N + after, layout.width), layout)
    weight = type(weight)(*(one.to(kernel_device()) for one in weight))
    rows = narrow_rows(weight, before, N)
    arguments = codes.to(kernel_device()), scale.to(kernel_device())
    want = MULTIPLY(*arguments, *weight, None, None, torch.float32)[:, before : before + N]
    with poisoned_memory():
        got = MULTIPLY(*arguments, *rows, None, None, torch.float32)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_reference_multiplies_what_the_numbers_stand_for() -> None:
    layout = GroupLayout(344, 128, 16)
    x, weight = torch.randn(5, 344), torch.randn(9, 344)
    codes, scale = per_token(x, layout)
    packed = pack_two_level(weight, layout)
    rounded = torch.cat([codes[:, :328] * scale[0, :, None], codes[:, -16:] * scale[1, :, None]], 1)
    want = rounded @ dequantize_weight(packed, layout).t()
    got = two_level_linear.reference(codes, scale, *packed, None, None, torch.float32)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)


def test_a_code_times_its_group_scale_is_an_int8_number() -> None:
    packed = pack_two_level(torch.randn(9, 344) * torch.rand(344), GroupLayout(344, 128, 16))
    assert packed.group_scale.min() >= 1 and packed.group_scale.max() <= 16


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
def test_a_poisoned_token_poisons_its_own_row() -> None:
    layout = GroupLayout(256, 64, 16)
    x = torch.randn(3, 256)
    x[1, 5] = torch.nan
    device = kernel_device()
    codes, scale = per_token(x, layout)
    weight = pack_two_level(torch.randn(8, 256), layout)
    arguments: list[Any] = [one.to(device) for one in (codes, scale, *weight)]
    out = MULTIPLY(*arguments, None, None, torch.float32)
    assert out[1].isnan().all() and out[::2].isfinite().all()


def test_operator_passes_opcheck() -> None:
    layout = GroupLayout(256, 64, 16)
    codes, scale = per_token(torch.randn(2, 3, 256), layout)
    weight = pack_two_level(torch.randn(8, 256), layout)
    operator = torch.ops.atom.two_level_linear.default
    torch.library.opcheck(operator, (codes, scale, *weight, None, None, torch.bfloat16))
