import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atom_compile.kernels import gated_quantize
from atom_compile.kernels.packing import GroupLayout

from .cases import (
    assert_quantized_alike,
    dtypes,
    few_examples,
    kernel_device,
    layouts,
    poisoned_memory,
    random_order,
    seeds,
    tokens,
)


@few_examples
@given(
    tokens,
    layouts,
    dtypes,
    st.sampled_from(sorted(gated_quantize.ACTIVATIONS)),
    st.booleans(),
    st.booleans(),
    seeds,
)
def test_kernel_gives_the_codes_of_the_reference(
    tokens: int,
    layout: GroupLayout,
    dtype: torch.dtype,
    activation: str,
    gated: bool,
    reordered: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    merged = 2 * torch.randn(tokens, 2 * layout.width, dtype=dtype)
    order = random_order(layout.width) if reordered else None
    numbers = (activation, 4, layout.group_size, layout.outlier_channels, 0.9)
    gate, up = merged.chunk(2, dim=-1)
    want = gated_quantize.reference(gate, up if gated else None, order, *numbers)
    gate, up = merged.to(kernel_device()).chunk(2, dim=-1)
    order = None if order is None else order.to(kernel_device())
    with poisoned_memory():
        got = gated_quantize.launch(gate, up if gated else None, order, *numbers)
    # exponentials differ in their last bit between libraries: a step, once rounded to 16 bits
    assert_quantized_alike(
        got, want, rtol=0.0 if activation == "relu" else 2 * torch.finfo(dtype).eps + 1e-6
    )


@pytest.mark.parametrize("int8_groups", [1, 3])
def test_int8_groups(int8_groups: int) -> None:
    gate, up = torch.randn(3, 344), torch.randn(3, 344)
    numbers = (random_order(344), "relu", 4, 128, 16, 0.9, int8_groups)
    want = gated_quantize.reference(gate, up, *numbers)
    device = kernel_device()
    numbers = (numbers[0].to(device), *numbers[1:])
    got = gated_quantize.launch(gate.to(device), up.to(device), *numbers)
    assert_quantized_alike(got, want)


@few_examples
@given(tokens, layouts, dtypes, st.integers(0, 2), st.booleans(), seeds)
def test_codes_of_e2m1(
    tokens: int, layout: GroupLayout, dtype: torch.dtype, wide: int, reordered: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    gate, up = torch.randn(2, tokens, layout.width, dtype=dtype)
    order = random_order(layout.width) if reordered else None
    numbers = ("relu", 4, layout.group_size, layout.outlier_channels, 1.0, wide)
    want = gated_quantize.reference(gate, up, order, *numbers, format="e2m1")
    device = kernel_device()
    order = None if order is None else order.to(device)
    with poisoned_memory():
        got = gated_quantize.launch(gate.to(device), up.to(device), order, *numbers, format="e2m1")
    assert_quantized_alike(got, want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("activation", sorted(gated_quantize.ACTIVATIONS))
def test_a_poisoned_token_poisons_no_other(activation: str) -> None:
    gate, up = torch.randn(3, 256), torch.randn(3, 256)
    gate[1, 7] = float("nan")
    arguments = (activation, 4, 128, 16, 0.9)
    got = gated_quantize.launch(gate.to(kernel_device()), up.to(kernel_device()), None, *arguments)
    want = gated_quantize.reference(gate, up, None, *arguments)
    assert_quantized_alike(got, want, rtol=2e-6)
    assert got[1][0, 1].isnan() and got[1].isnan().sum() == 1


def test_operator_passes_opcheck() -> None:
    gate, up = torch.randn(2, 3, 688).chunk(2, dim=-1)
    operator = torch.ops.atom.gated_quantize.default
    torch.library.opcheck(operator, (gate, up, None, "silu", 4, 128, 16, 0.9))
    torch.library.opcheck(operator, (gate, up, None, "silu", 4, 128, 16, 0.9, 2))
    named = {"format": "e2m1"}
    torch.library.opcheck(operator, (gate, up, None, "silu", 4, 128, 16, 0.9), named)
    torch.library.opcheck(operator, (gate, None, random_order(344), "gelu", 4, 128, 16, 0.9))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 300, 2048])
def test_kernel_on_real_shapes(tokens: int) -> None:
    gate, up = torch.randn(tokens, 2 * 14336, dtype=torch.bfloat16, device="cuda").chunk(2, dim=-1)
    arguments = ("silu", 4, 128, 128, 0.9)
    got = gated_quantize.launch(gate, up, None, *arguments)
    want = gated_quantize.reference(gate, up, None, *arguments)
    assert_quantized_alike(got, want, rtol=3 * torch.finfo(torch.bfloat16).eps)
