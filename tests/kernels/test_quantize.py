import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atom_compile.kernels import quantize
from atom_compile.kernels.packing import GroupLayout, dequantize

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
@given(tokens, layouts, dtypes, seeds)
def test_kernel_gives_the_codes_of_the_reference(
    tokens: int, layout: GroupLayout, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    merged = torch.randn(2, tokens, 3 * layout.width, dtype=dtype)
    x = merged[..., layout.width : 2 * layout.width]  # a slice, as of a merged linear's output
    order = random_order(layout.width)
    numbers = (4, layout.group_size, layout.outlier_channels, 0.9)
    on_device, order_on_device = merged.to(kernel_device()), order.to(kernel_device())
    x_on_device = on_device[..., layout.width : 2 * layout.width]
    with poisoned_memory():
        plain = quantize.launch(x_on_device, *numbers)
        reordered = quantize.reorder_launch(x_on_device, order_on_device, *numbers)
    assert_quantized_alike(plain, quantize.reference(x, *numbers))
    assert_quantized_alike(reordered, quantize.reorder_reference(x, order, *numbers))


@pytest.mark.parametrize(("bits", "tokens"), [(2, 2), (3, 2), (4, 300), (6, 2), (8, 2)])
def test_kernel_for_every_number_of_bits(bits: int, tokens: int) -> None:
    x = torch.randn(tokens, 320)
    got = quantize.launch(x.to(kernel_device()), bits, 64, 48, 0.9)
    assert_quantized_alike(got, quantize.reference(x, bits, 64, 48, 0.9))


@few_examples
@given(tokens, layouts, dtypes, st.sampled_from([1, 2, 99]), seeds)
def test_kernel_with_groups_of_two_precisions(
    tokens: int, layout: GroupLayout, dtype: torch.dtype, wide: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(tokens, layout.width, dtype=dtype)
    order = random_order(layout.width)
    wide = min(wide, layout.num_groups)
    numbers = (4, layout.group_size, layout.outlier_channels, 0.9, wide)
    x_on_device, order_on_device = x.to(kernel_device()), order.to(kernel_device())
    with poisoned_memory():
        plain = quantize.launch(x_on_device, *numbers)
        reordered = quantize.reorder_launch(x_on_device, order_on_device, *numbers)
    assert_quantized_alike(plain, quantize.reference(x, *numbers))
    assert_quantized_alike(reordered, quantize.reorder_reference(x, order, *numbers))


@few_examples
@given(tokens, layouts, dtypes, st.sampled_from([0, 64]), seeds)
def test_kernel_with_a_scale_per_token(
    tokens: int, layout: GroupLayout, dtype: torch.dtype, rotation: int, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(tokens, layout.width, dtype=dtype)
    order = random_order(layout.width)
    numbers = (8, layout.group_size, layout.outlier_channels, 1.0, 0, rotation, True)
    x_on_device, order_on_device = x.to(kernel_device()), order.to(kernel_device())
    with poisoned_memory():
        plain = quantize.launch(x_on_device, *numbers)
        reordered = quantize.reorder_launch(x_on_device, order_on_device, *numbers)
    assert_quantized_alike(plain, quantize.reference(x, *numbers))
    assert_quantized_alike(reordered, quantize.reorder_reference(x, order, *numbers))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize(("channel", "row"), [(0, 0), (343, 1)])
def test_a_scale_per_token(channel: int, row: int) -> None:
    x = torch.randn(3, 344)
    numbers = (8, 128, 16, 1.0, 0, 0, True)
    x[1, channel] = torch.nan
    codes, scale = quantize.launch(x.to(kernel_device()), *numbers)
    assert_quantized_alike((codes, scale), quantize.reference(x, *numbers))
    assert codes.shape == (3, 400) and scale.shape == (2, 3)
    assert scale.isnan().nonzero().tolist() == [[row, 1]]
    back = dequantize(codes.cpu(), scale.cpu(), GroupLayout(344, 128, 16, per_token=True))
    largest = x[::2].abs().amax(1, keepdim=True)
    assert ((back[::2] - x[::2]).abs() <= 0.51 / 127 * largest).all()


def test_int8_groups_are_the_last_ones_before_the_outliers() -> None:
    x = torch.randn(5, 344)
    narrow = quantize.reference(x, 4, 128, 16, 0.9)
    wide = quantize.reference(x, 8, 128, 16, 1.0)
    for count in range(4):
        codes, scale = quantize.reference(x, 4, 128, 16, 0.9, count)
        cut = 3 - count
        assert torch.equal(codes[:, : 128 * cut], narrow[0][:, : 128 * cut])
        assert torch.equal(codes[:, 128 * cut :], wide[0][:, 128 * cut :])
        assert torch.equal(scale, torch.cat([narrow[1][:cut], wide[1][cut:]]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("int8_groups", [0, 2])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channel", [0, 343])
def test_a_poisoned_token_poisons_no_other(poison: float, channel: int, int8_groups: int) -> None:
    x = torch.randn(3, 344)
    numbers = (4, 128, 16, 0.9, int8_groups)
    clean_codes, clean_scale = quantize.reference(x, *numbers)
    x[1, channel] = poison
    codes, scale = quantize.launch(x.to(kernel_device()), *numbers)
    assert_quantized_alike((codes, scale), quantize.reference(x, *numbers))
    assert (~scale[:, 1].isfinite()).sum() == 1
    assert torch.equal(codes[::2].cpu(), clean_codes[::2])
    assert torch.equal(scale[:, ::2].cpu(), clean_scale[:, ::2])


def test_zeros_come_back_as_zeros() -> None:
    layout = GroupLayout(344, 128, 16)
    codes, scale = quantize.launch(torch.zeros(2, 344, device=kernel_device()), 4, 128, 16, 0.9)
    assert dequantize(codes, scale, layout).count_nonzero() == 0


def test_channels_inside_the_clip_range_are_half_a_step_off_at_most() -> None:
    layout = GroupLayout(344, 128, 16)
    x = torch.randn(5, 344)
    codes, scale = quantize.reference(x, 4, 128, 16, 0.9)
    error, _ = layout.split((dequantize(codes, scale, layout) - x).abs())
    step = scale[: layout.num_groups].t()[..., None]
    inside = layout.split(x)[0].abs() <= 7 * step
    assert (error <= 0.5001 * step)[inside].all()


def test_operators_pass_opcheck() -> None:
    x = torch.randn(2, 3, 344)
    torch.library.opcheck(torch.ops.atom.quantize.default, (x, 4, 128, 16, 0.9))
    torch.library.opcheck(torch.ops.atom.quantize.default, (x, 4, 128, 16, 0.9, 2))
    torch.library.opcheck(torch.ops.atom.quantize.default, (x, 8, 128, 16, 1.0, 0, 0, True))
    torch.library.opcheck(
        torch.ops.atom.reorder_quantize.default, (x, random_order(344), 4, 128, 16, 0.9)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 17, 300, 2048])
@pytest.mark.parametrize("width", [4096, 14336])
def test_kernel_on_real_shapes(tokens: int, width: int) -> None:
    x = torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda")
    order = random_order(width).cuda()
    got = quantize.reorder_launch(x, order, 4, 128, 128, 0.9)
    assert_quantized_alike(got, quantize.reorder_reference(x, order, 4, 128, 128, 0.9))
    for rotation in (0, 128):
        numbers = (8, 128, 128, 1.0, 0, rotation, True)
        got = quantize.reorder_launch(x, order, *numbers)
        assert_quantized_alike(got, quantize.reorder_reference(x, order, *numbers))
