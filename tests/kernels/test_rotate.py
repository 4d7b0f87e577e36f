from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atom_compile.kernels import (
    attention,
    attention_quantize,
    gated_quantize,
    norm_quantize,
    quantize,
    rotate,
)
from atom_compile.kernels.attention_decode import DecodeTiling
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
from .test_attention import arguments, moved

blocks = st.sampled_from([2, 16, 32, 64])


def matrix(n: int) -> Tensor:
    """The formula of kernels/rotate.py, element by element: x @ matrix is the rotation of x."""
    rows = []
    for j in range(n):
        sign = (-1) ** (j & (j >> 1)).bit_count()
        rows.append([sign * (-1) ** (i & j).bit_count() * n**-0.5 for i in range(n)])
    return torch.tensor(rows)


@pytest.mark.parametrize("n", [1, 2, 8, 128, 1024])
def test_the_butterflies_are_the_matrix(n: int) -> None:
    torch.testing.assert_close(rotate.rotate_blocks(torch.eye(n)), matrix(n))
    torch.testing.assert_close(rotate.rotate_blocks(torch.eye(n), inverse=True), matrix(n).t())


@few_examples
@given(tokens, layouts, dtypes, blocks, st.booleans(), seeds)
def test_kernel_agrees_with_the_reference_to_the_last_bit(
    tokens: int, layout: GroupLayout, dtype: torch.dtype, block: int, inverse: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    merged = torch.randn(2, tokens, 3 * layout.width, dtype=dtype)
    cut = (layout.group_size, layout.outlier_channels, block, inverse)
    on_device = merged.to(kernel_device())
    x = merged[..., layout.width : 2 * layout.width]  # a slice, as of a merged linear's output
    with poisoned_memory():
        got = rotate.launch(on_device[..., layout.width : 2 * layout.width], *cut)
    assert got.shape == (2, tokens, layout.padded_width) and got.dtype == torch.float32
    assert torch.equal(got.cpu(), rotate.reference(x, *cut))


@pytest.mark.parametrize("head_dim", [2, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_turn_there_and_back(head_dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 5, head_dim, dtype=dtype).transpose(1, 2)
    turned = rotate.rotate_heads(x)
    assert turned.dtype == dtype and not torch.allclose(turned, x, atol=0.1)
    back = rotate.rotate_heads(turned, inverse=True)
    torch.testing.assert_close(back, x, rtol=0.0, atol=8 * torch.finfo(dtype).eps * 4)


def test_one_large_channel_or_a_common_mean_lands_in_many() -> None:
    alone, common = torch.zeros(1, 128), torch.ones(1, 128)
    alone[0, 3] = 128**0.5
    assert rotate.rotate_blocks(alone).abs().max() < 1.01
    assert rotate.rotate_blocks(common).abs().max() < 1.5


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("channel", [0, 343])
def test_a_poisoned_token_poisons_one_group_of_its_own(poison: float, channel: int) -> None:
    x = torch.randn(3, 344)
    numbers = (4, 128, 16, 0.9, 0, 128)
    clean_codes, clean_scale = quantize.reference(x, *numbers)
    x[1, channel] = poison
    codes, scale = quantize.launch(x.to(kernel_device()), *numbers)
    assert (~scale[:, 1].isfinite()).sum() == 1
    assert torch.equal(codes[::2].cpu(), clean_codes[::2])
    assert torch.equal(scale[:, ::2].cpu(), clean_scale[:, ::2])


@few_examples
@given(tokens, layouts, dtypes, blocks, st.booleans(), seeds)
def test_fused_with_quantize_and_gate(
    tokens: int, layout: GroupLayout, dtype: torch.dtype, block: int, ordered: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(tokens, layout.width, dtype=dtype)
    order = random_order(layout.width) if ordered else None
    numbers = (4, layout.group_size, layout.outlier_channels, 0.8)
    on_device = x.to(kernel_device())
    order_on_device = None if order is None else order.to(kernel_device())

    def in_steps(y: Tensor) -> tuple[Tensor, Tensor]:
        y = y if order is None else y.index_select(-1, order)
        return quantize.reference(rotate.reference(y, *numbers[1:3], block), *numbers)

    with poisoned_memory():
        got = quantize.reorder_launch(on_device, order_on_device, *numbers, 0, block)
        gated = gated_quantize.launch(
            on_device, on_device, order_on_device, "relu", *numbers, 0, block
        )
    assert_quantized_alike(got, in_steps(x))
    assert_quantized_alike(gated, in_steps(torch.relu(x) * x))


@few_examples
@given(layouts, dtypes, blocks, st.booleans(), seeds)
def test_fused_with_norm(
    layout: GroupLayout, dtype: torch.dtype, block: int, ordered: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    # sums of integers do not depend on their order
    x = torch.randint(-8, 9, (3, layout.width)).to(dtype)
    weight = torch.randn(layout.width, dtype=dtype)
    order = random_order(layout.width) if ordered else None
    numbers = (4, layout.group_size, layout.outlier_channels, 0.8, 0, block)
    shape = (1e-5, False, True, dtype, *numbers)
    device = kernel_device()
    with poisoned_memory():
        got = norm_quantize.launch(
            x.to(device),
            weight.to(device),
            None,
            None if order is None else order.to(device),
            *shape,
        )
    assert_quantized_alike(got, norm_quantize.reference(x, weight, None, order, *shape))


@pytest.mark.parametrize("splits", [None, 3])
@pytest.mark.parametrize("ordered", [False, True])
def test_fused_with_attention(splits: int | None, ordered: bool) -> None:
    args = arguments([40, 17], heads=(4, 2))
    device = kernel_device()
    order = random_order(256).to(device) if ordered else None
    tiling = None if splits is None else DecodeTiling(16, splits, 1, 1)
    numbers = (4, 64, 16, 0.8, 0, 32)
    with poisoned_memory():
        got = attention_quantize.launch(*moved(args, device), order, *numbers, tiling=tiling)
    attended = attention.launch(*moved(args, device), tiling=tiling).transpose(1, 2).flatten(2)
    if order is not None:
        attended = attended.index_select(-1, order)
    assert_quantized_alike(got, quantize.reference(attended.cpu(), *numbers))


def test_operators_pass_opcheck() -> None:
    x, order = torch.randn(2, 3, 400)[..., 8:352], random_order(344)
    torch.library.opcheck(torch.ops.atom.rotate.default, (x, 128, 16, 64))
    torch.library.opcheck(torch.ops.atom.rotate.default, (x, 344, 0, 8, True))
    numbers = (4, 128, 16, 0.9, 0, 128)
    torch.library.opcheck(torch.ops.atom.reorder_quantize.default, (x, order, *numbers))
    torch.library.opcheck(torch.ops.atom.gated_quantize.default, (x, x, None, "silu", *numbers))
    attending = (*arguments([9, 40], 2, (4, 2)), None, 4, 64, 16, 0.9, 64)
    torch.library.opcheck(torch.ops.atom.attention_quantize.default, attending)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 17, 2048])
@pytest.mark.parametrize("width", [4096, 5120, 14336])
def test_kernel_on_real_shapes(tokens: int, width: int) -> None:
    x = torch.randn(tokens, width, dtype=torch.bfloat16)
    order, numbers = random_order(width), (4, 128, 128, 0.8, 0, 128)
    with poisoned_memory():
        turned = rotate.launch(x.cuda(), 128, 128, 128)
        got = quantize.reorder_launch(x.cuda(), order.cuda(), *numbers)
    assert torch.equal(turned.cpu(), rotate.reference(x, 128, 128, 128))
    assert_quantized_alike(got, quantize.reorder_reference(x, order, *numbers))
