import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atom_compile.kernels import quantize
from atom_compile.kernels.formats import E2M1
from atom_compile.kernels.packing import GroupLayout, dequantize

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


@few_examples
@given(tokens, layouts, dtypes, four_bit_formats, seeds)
def test_kernel_gives_the_codes_of_the_reference(
    tokens: int, layout: GroupLayout, dtype: torch.dtype, format: str, seed: int
) -> None:
    torch.manual_seed(seed)
    merged = torch.randn(2, tokens, 3 * layout.width, dtype=dtype)
    x = merged[..., layout.width : 2 * layout.width]  # a slice, as of a merged linear's output
    order = random_order(layout.width)
    numbers = (4, layout.group_size, layout.outlier_channels, 0.9)
    on_device, order_on_device = merged.to(kernel_device()), order.to(kernel_device())
    x_on_device = on_device[..., layout.width : 2 * layout.width]
    with poisoned_memory():
        plain = quantize.launch(x_on_device, *numbers, format=format)
        reordered = quantize.reorder_launch(x_on_device, order_on_device, *numbers, format=format)
    assert_quantized_alike(plain, quantize.reference(x, *numbers, format=format))
    want = quantize.reorder_reference(x, order, *numbers, format=format)
    assert_quantized_alike(reordered, want)


@pytest.mark.parametrize(("bits", "tokens"), [(2, 2), (3, 2), (4, 300), (6, 2), (8, 2)])
def test_kernel_for_every_number_of_bits(bits: int, tokens: int) -> None:
    x = torch.randn(tokens, 320)
    got = quantize.launch(x.to(kernel_device()), bits, 64, 48, 0.9)
    assert_quantized_alike(got, quantize.reference(x, bits, 64, 48, 0.9))


@few_examples
@given(tokens, layouts, dtypes, st.sampled_from([1, 2, 99]), four_bit_formats, seeds)
def test_kernel_with_groups_of_two_precisions(
    tokens: int, layout: GroupLayout, dtype: torch.dtype, wide: int, format: str, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(tokens, layout.width, dtype=dtype)
    order = random_order(layout.width)
    wide = min(wide, layout.num_groups)
    numbers = (4, layout.group_size, layout.outlier_channels, 0.9, wide)
    x_on_device, order_on_device = x.to(kernel_device()), order.to(kernel_device())
    with poisoned_memory():
        plain = quantize.launch(x_on_device, *numbers, format=format)
        reordered = quantize.reorder_launch(x_on_device, order_on_device, *numbers, format=format)
    assert_quantized_alike(plain, quantize.reference(x, *numbers, format=format))
    want = quantize.reorder_reference(x, order, *numbers, format=format)
    assert_quantized_alike(reordered, want)


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


@few_examples
@given(tokens, layouts, seeds)
def test_codes_of_e2m1_are_the_nearest(tokens: int, layout: GroupLayout, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randn(tokens, layout.width)
    numbers = 4, layout.group_size, layout.outlier_channels, 1.0
    codes, scale = quantize.reference(x, *numbers, format="e2m1")
    grouped = codes[:, : layout.grouped_width]
    assert set(grouped.abs().flatten().tolist()) <= {0, 1, 2, 3, 4, 6, 8, 12}
    groups, outliers = layout.split(x)
    got_groups, got_outliers = layout.split(dequantize(codes, scale, layout))
    of_one = 2 * scale[: layout.num_groups].t()[..., None]
    torch.testing.assert_close(got_groups, E2M1.nearest(groups / of_one) * of_one)
    if layout.outlier_channels:
        assert ((got_outliers - outliers).abs() <= 0.5001 * scale[-1][:, None]).all()


def test_codes_of_e2m1_at_and_beside_every_boundary() -> None:
    """Halfway between two values the one with the even mantissa wins."""
    middles = torch.tensor([0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0])
    beside = [torch.nextafter(middles, torch.tensor(end)) for end in (0.0, 99.0)]
    x = torch.cat([middles, *beside, -middles, torch.tensor([12.0])])
    x = torch.nn.functional.pad(x, (0, 64 - len(x)))[None].to(kernel_device())
    got = quantize.launch(x, 4, 64, 0, 1.0, format="e2m1")
    even = [0, 2, 2, 4, 4, 8, 8]
    below, above = [0, 1, 2, 3, 4, 6, 8], [1, 2, 3, 4, 6, 8, 12]
    wanted = [*even, *below, *above, *(-code for code in even), 12]
    assert got[0][0, : len(wanted)].tolist() == wanted and got[1].tolist() == [[1.0]]
    assert_quantized_alike(got, quantize.reference(x.cpu(), 4, 64, 0, 1.0, format="e2m1"))


@pytest.mark.parametrize("format", ["int", "e2m1"])
def test_int8_groups_are_the_last_ones_before_the_outliers(format: str) -> None:
    x = torch.randn(5, 344)
    narrow = quantize.reference(x, 4, 128, 16, 0.9, format=format)
    wide = quantize.reference(x, 8, 128, 16, 1.0)
    for count in range(4):
        codes, scale = quantize.reference(x, 4, 128, 16, 0.9, count, format=format)
        cut = 3 - count
        assert torch.equal(codes[:, : 128 * cut], narrow[0][:, : 128 * cut])
        assert torch.equal(codes[:, 128 * cut :], wide[0][:, 128 * cut :])
        assert torch.equal(scale, torch.cat([narrow[1][:cut], wide[1][cut:]]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("int8_groups", [0, 2])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("channel", [0, 343])
@pytest.mark.parametrize("format", ["int", "e2m1"])
def test_a_poisoned_token_poisons_no_other(
    poison: float, channel: int, int8_groups: int, format: str
) -> None:
    x = torch.randn(3, 344)
    numbers = (4, 128, 16, 0.9, int8_groups)
    clean_codes, clean_scale = quantize.reference(x, *numbers, format=format)
    x[1, channel] = poison
    codes, scale = quantize.launch(x.to(kernel_device()), *numbers, format=format)
    assert_quantized_alike((codes, scale), quantize.reference(x, *numbers, format=format))
    assert (~scale[:, 1].isfinite()).sum() == 1
    assert torch.equal(codes[::2].cpu(), clean_codes[::2])
    assert torch.equal(scale[:, ::2].cpu(), clean_scale[:, ::2])


@pytest.mark.parametrize("format", ["int", "e2m1"])
def test_zeros_come_back_as_zeros(format: str) -> None:
    layout = GroupLayout(344, 128, 16)
    x = torch.zeros(2, 344, device=kernel_device())
    codes, scale = quantize.launch(x, 4, 128, 16, 0.9, format=format)
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
    torch.library.opcheck(torch.ops.atom.quantize.default, (x, 4, 128, 16, 1.0), {"format": "e2m1"})
    for named in ({}, {"format": "e2m1"}):
        arguments = x, random_order(344), 4, 128, 16, 0.9
        torch.library.opcheck(torch.ops.atom.reorder_quantize.default, arguments, named)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 17, 300, 2048])
@pytest.mark.parametrize("width", [4096, 14336])
def test_kernel_on_real_shapes(tokens: int, width: int) -> None:
    x = torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda")
    order = random_order(width).cuda()
    got = quantize.reorder_launch(x, order, 4, 128, 128, 0.9)
    assert_quantized_alike(got, quantize.reorder_reference(x, order, 4, 128, 128, 0.9))
    for int8_groups in (0, 3):
        narrow = (4, 128, 128, 1.0, int8_groups)
        got = quantize.reorder_launch(x, order, *narrow, format="e2m1")
        assert_quantized_alike(got, quantize.reorder_reference(x, order, *narrow, format="e2m1"))
    for rotation in (0, 128):
        numbers = (8, 128, 128, 1.0, 0, rotation, True)
        got = quantize.reorder_launch(x, order, *numbers)
        assert_quantized_alike(got, quantize.reorder_reference(x, order, *numbers))
