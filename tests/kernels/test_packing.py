import pytest
import torch
from hypothesis import given

from atom_compile.kernels import packing
from atom_compile.kernels.packing import GroupLayout

from .cases import few_examples, layouts, seeds


def test_every_pair_of_codes_survives_packing() -> None:
    low, high = torch.meshgrid(torch.arange(-8, 8), torch.arange(-8, 8), indexing="ij")
    codes = torch.stack([low.flatten(), high.flatten()], dim=-1).to(torch.int8)
    packed = packing.pack_int4(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (256, 1)
    assert packed.unique().numel() == 256
    assert torch.equal(packing.unpack_int4(packed), codes)


def test_the_low_half_of_a_group_is_in_the_low_half_of_the_bytes() -> None:
    assert packing.pack_int4(torch.tensor([1, 2, -1, -8], dtype=torch.int8)).tolist() == [
        0xF1,
        0x82,
    ]


@few_examples
@given(layouts, seeds)
def test_weight_error_is_half_a_step_inside_the_clip_range(layout: GroupLayout, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(6, layout.width)
    packed = packing.pack_weight(weight, layout, bits=4, clip=0.85)
    error_groups, error_outliers = layout.split(
        (packing.dequantize_weight(packed, layout) - weight).abs()
    )
    groups, _ = layout.split(weight)
    step = packed.weight_scale.float().t()[..., None]
    inside = groups.abs() <= 7 * step
    assert inside.float().mean() > 0.9
    assert (error_groups <= 0.5001 * step)[inside].all()
    assert (error_outliers <= 0.5001 * packed.outlier_scale[:, None]).all()


@few_examples
@given(layouts)
def test_shapes_of_a_packed_weight(layout: GroupLayout) -> None:
    packed = packing.pack_weight(torch.randn(6, layout.width), layout, bits=4, clip=0.85)
    assert packed.weight.shape == (layout.num_groups, 6, layout.group_size // 2)
    assert packed.weight_scale.shape == (layout.num_groups, 6)
    assert packed.outlier_weight.shape == (6, layout.outlier_channels)
    assert packed.outlier_scale.shape == (6,)
    assert all(tensor.is_contiguous() for tensor in packed)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_group_has_a_poisoned_scale_and_no_codes(poison: float) -> None:
    x = torch.ones(2, 4)
    x[0, 1] = poison
    codes, scale = packing.round_to_codes(x, bits=4, clip=1.0)
    assert codes[0].tolist() == [0, 0, 0, 0]
    assert not scale[0].isfinite() and codes[1].tolist() == [7, 7, 7, 7]


def test_a_group_of_zeros_is_zeros() -> None:
    codes, scale = packing.round_to_codes(torch.zeros(2, 4), bits=4, clip=0.9)
    assert codes.count_nonzero() == 0 and scale.isfinite().all() and (1 / scale).isfinite().all()
