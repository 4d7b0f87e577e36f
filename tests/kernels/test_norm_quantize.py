from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atom_compile.kernels import norm_quantize, quantize_rows
from atom_compile.kernels.packing import GroupLayout

from .cases import (
    assert_quantized_alike,
    dtypes,
    few_examples,
    four_bit_formats,
    kernel_device,
    layouts,
    poisoned_memory,
    random_order,
    seeds,
    tokens,
)


class Arguments(NamedTuple):
    """Those of `norm_quantize.norm` after the input, with the order."""

    weight: Tensor | None
    bias: Tensor | None
    order: Tensor | None
    eps: float
    center: bool
    round_normed: bool
    dtype: torch.dtype

    def to(self, device: torch.device) -> Arguments:
        weight, bias, order = (None if tensor is None else tensor.to(device) for tensor in self[:3])
        return self._replace(weight=weight, bias=bias, order=order)


@st.composite
def norms(draw: st.DrawFn, width: int, dtype: torch.dtype) -> Arguments:
    """RMSNorm and LayerNorm in the variants that models have."""
    weight_dtype = draw(st.sampled_from([dtype, torch.float32]))
    weight = torch.randn(width, dtype=weight_dtype) if draw(st.booleans()) else None
    bias = torch.randn(width, dtype=weight_dtype) if draw(st.booleans()) else None
    order = random_order(width) if draw(st.booleans()) else None
    return Arguments(weight, bias, order, 1e-5, draw(st.booleans()), draw(st.booleans()), dtype)


def launch(
    x: Tensor,
    arguments: Arguments,
    layout: GroupLayout,
    int8_groups: int = 0,
    format: str = "int",
) -> tuple[Tensor, Tensor]:
    numbers = (4, layout.group_size, layout.outlier_channels, 0.9, int8_groups)
    device = kernel_device()
    with poisoned_memory():
        return norm_quantize.launch(x.to(device), *arguments.to(device), *numbers, format=format)


def reference(
    x: Tensor,
    arguments: Arguments,
    layout: GroupLayout,
    int8_groups: int = 0,
    format: str = "int",
) -> tuple[Tensor, Tensor]:
    numbers = (4, layout.group_size, layout.outlier_channels, 0.9, int8_groups)
    return norm_quantize.reference(x, *arguments, *numbers, format=format)


def test_int8_groups() -> None:
    layout = GroupLayout(344, 128, 16)
    half = torch.randint(-8, 9, (3, 172))  # sums of integers do not depend on their order
    x = torch.cat([half, -half], dim=-1).float()
    arguments = Arguments(None, None, random_order(344), 1e-5, False, False, torch.float32)
    assert_quantized_alike(launch(x, arguments, layout, 2), reference(x, arguments, layout, 2))


@pytest.mark.parametrize("outlier_channels", [16, 128])
def test_a_program_takes_many_rows(outlier_channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_rows, "_MANY_ROWS", 1)
    monkeypatch.setattr(quantize_rows, "multiprocessors", lambda device: 1)
    layout = GroupLayout(384, 128, outlier_channels)
    x = torch.randint(-8, 9, (11, 192)).repeat(1, 2).float()
    arguments = Arguments(None, None, random_order(384), 1e-5, False, False, torch.float32)
    assert_quantized_alike(launch(x, arguments, layout), reference(x, arguments, layout))


@few_examples
@given(st.data(), tokens, layouts, dtypes, four_bit_formats, seeds)
def test_kernel_gives_the_codes_of_the_reference_where_the_statistic_is_exact(
    data: st.DataObject,
    tokens: int,
    layout: GroupLayout,
    dtype: torch.dtype,
    format: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    arguments = data.draw(norms(layout.width, dtype))
    # sums of integers do not depend on their order
    half = torch.randint(-8, 9, (tokens, layout.width // 2))
    middle = torch.zeros(tokens, layout.width % 2)
    x = torch.cat([half, middle, -half], dim=-1).to(dtype)
    got = launch(x, arguments, layout, format=format)
    assert_quantized_alike(got, reference(x, arguments, layout, format=format))


@few_examples
@given(st.data(), layouts, dtypes, seeds)
def test_kernel_agrees_up_to_the_rounding_of_the_statistic(
    data: st.DataObject, layout: GroupLayout, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    arguments = data.draw(norms(layout.width, dtype))
    x = 3 * torch.randn(2, 2, layout.width, dtype=dtype) + 1
    # a statistic one float32 step off can move a value to the next number of its dtype
    got, want = launch(x, arguments, layout), reference(x, arguments, layout)
    assert_quantized_alike(got, want, rtol=2 * torch.finfo(dtype).eps + 1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_token_poisons_itself_in_every_group_and_no_other(
    poison: float, center: bool
) -> None:
    layout = GroupLayout(344, 128, 16)
    x = torch.randn(3, 344)
    arguments = Arguments(
        torch.ones(344), None, random_order(344), 1e-6, center, True, torch.float32
    )
    codes, scale = launch(x, arguments, layout)
    x[1, 5] = poison
    poisoned_codes, poisoned_scale = launch(x, arguments, layout)
    assert torch.equal(codes[::2], poisoned_codes[::2]) and torch.equal(
        scale[:, ::2], poisoned_scale[:, ::2]
    )
    assert_quantized_alike(
        (poisoned_codes, poisoned_scale), reference(x, arguments, layout), rtol=1e-6
    )
    assert poisoned_scale[:, 1].isnan().any()


@pytest.mark.parametrize("center", [False, True])
def test_operator_passes_opcheck(center: bool) -> None:
    x, weight, order = torch.randn(2, 3, 344), torch.randn(344), random_order(344)
    arguments = (x, weight, None, order, 1e-6, center, True, torch.float32, 4, 128, 16, 0.9)
    for named in ({}, {"format": "e2m1"}):
        torch.library.opcheck(torch.ops.atom.norm_quantize.default, arguments, named)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 300, 2048])
@pytest.mark.parametrize("width", [4096, 5120])
def test_kernel_on_real_shapes(tokens: int, width: int) -> None:
    layout = GroupLayout(width, 128, 128)
    x = torch.randn(tokens, width, dtype=torch.bfloat16)
    weight = torch.randn(width, dtype=torch.bfloat16)
    arguments = Arguments(weight, None, random_order(width), 1e-6, False, True, torch.bfloat16)
    rtol = (
        3 * torch.finfo(torch.bfloat16).eps
    )  # two roundings, after the statistic and after the weight
    assert_quantized_alike(launch(x, arguments, layout), reference(x, arguments, layout), rtol)
