"""MXFP4 and NVFP4 over every code and every scale."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from atom_compile.kernels.block_formats import (
    BlockWeight,
    dequantize_blocks,
    pack_mxfp4,
    pack_nvfp4,
    to_e4m3,
    to_grouped_weight,
    unpack_blocks,
)
from atom_compile.kernels.formats import E2M1
from atom_compile.kernels.packing import GroupLayout, dequantize_weight, pack_grouped

from .cases import few_examples, seeds

PACKS = {32: pack_mxfp4, 16: pack_nvfp4}
NAMES = {32: "mxfp4", 16: "nvfp4"}
SCALES = {32: torch.float8_e8m0fnu, 16: torch.float8_e4m3fn}
every_block = pytest.mark.parametrize("block", PACKS)


def every_scale(block: int, tensor_scale: float = 1.0) -> BlockWeight:
    """(256, block): every code under every scale."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(256, block // 16)
    low, high = codes.unflatten(1, (-1, 2)).unbind(-1)
    scale = torch.arange(256, dtype=torch.uint8)[:, None].view(SCALES[block])
    return BlockWeight(low | high << 4, scale, torch.tensor(tensor_scale))


def by_the_table(packed: BlockWeight) -> Tensor:
    """In double, which holds every product."""
    values = torch.tensor(E2M1.values()).double()[unpack_blocks(packed).long()]
    scale = packed.block_scale.float().double() * packed.tensor_scale.double()
    return (values * scale[..., None]).flatten(1)


def equal(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got, want.to(got), rtol=0.0, atol=0.0, equal_nan=True)


def test_scales_of_mxfp4_are_powers_of_two() -> None:
    scale = every_scale(32).block_scale.float().double()[:, 0]
    assert torch.equal(scale[:255], torch.exp2(torch.arange(-127, 128).double()))
    assert scale[255].isnan()


@every_block
def test_every_code_under_every_scale_is_its_product(block: int) -> None:
    packed = every_scale(block)
    assert torch.equal(unpack_blocks(packed)[:, 0, :16], torch.arange(16).expand(256, 16))
    assert equal(dequantize_blocks(packed), by_the_table(packed))


@pytest.mark.parametrize(("block", "tensor_scale"), [(32, 1.0), (16, 1.0), (16, 0.37)])
def test_a_group_of_one_block_is_exact_in_e4m3(block: int, tensor_scale: float) -> None:
    packed = every_scale(block, tensor_scale)
    codes, scale = to_e4m3(packed, block)
    assert codes.dtype == torch.float8_e4m3fn and scale.shape == (256, 1)
    assert equal(codes.float() * scale, dequantize_blocks(packed))


def test_sixteen_bits_hold_what_nvfp4_stands_for() -> None:
    packed = every_scale(16)
    exact = dequantize_blocks(packed)
    assert equal(exact.half().float(), exact) and equal(exact.bfloat16().float(), exact)


@pytest.mark.parametrize("step", [0, 1, 13, 14])
def test_blocks_of_mxfp4_share_a_scale_of_e4m3(step: int) -> None:
    packed = every_scale(32)
    low, high = packed.block_scale[: 255 - step], packed.block_scale[step:255]
    pairs = BlockWeight(
        packed.codes[: len(low)].repeat(1, 2),
        torch.cat([low.view(torch.uint8), high.view(torch.uint8)], 1).view(torch.float8_e8m0fnu),
        packed.tensor_scale,
    )
    codes, scale = to_e4m3(pairs, 64)
    assert scale.shape == (255 - step, 1)
    # in double: a scale of 2^-133 times a code is no normal float32
    assert equal(codes.double() * scale.double(), by_the_table(pairs))


def test_blocks_of_mxfp4_far_below_the_largest_are_off_by_little() -> None:
    scale = torch.tensor([[127, 127 - 17]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    packed = BlockWeight(every_scale(32).codes[:1].repeat(1, 2), scale, torch.tensor(1.0))
    codes, group_scale = to_e4m3(packed, 64)
    error = (codes.float() * group_scale - dequantize_blocks(packed)).abs()
    assert 0 < error.max() <= 2.0**-16


@every_block
def test_a_grouped_weight_of_blocks_is_exact(block: int) -> None:
    packed = every_scale(block, tensor_scale=1.0 if block == 32 else 0.37)
    grouped = to_grouped_weight(packed)
    stored = packed.block_scale.view(torch.uint8)[:, 0]
    if block == 16:  # two of them are packed together; there are no negative ones
        assert not grouped.weight_scale[1].any()
        stored = torch.where(stored == 255, 127, stored)
    assert torch.equal(grouped.weight_scale[0], stored)
    got = dequantize_weight(grouped, GroupLayout(block, 32, 0), NAMES[block])
    assert equal(got, dequantize_blocks(packed))


@every_block
@few_examples
@given(st.integers(1, 5), st.integers(1, 100), st.sampled_from([1e-10, 1.0, 1e10]), seeds)
def test_searched_scales_lose_less(
    block: int, rows: int, width: int, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(rows, width) * size
    layout = GroupLayout(width, 32, 0)
    packed = pack_grouped(weight, layout, 4, 1.0, format=NAMES[block])
    got = dequantize_weight(packed, layout, NAMES[block])
    padded = F.pad(weight, (0, -width % block))
    plain = dequantize_blocks(PACKS[block](padded))[:, :width]
    assert got.shape == weight.shape
    assert (got - weight).norm() <= (plain - weight).norm() * 1.001


@every_block
@few_examples
@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from([1e-20, 1.0, 1e20]), seeds)
def test_packed_values_are_the_nearest(
    block: int, rows: int, blocks: int, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(rows, blocks * block) * size
    packed = PACKS[block](weight)
    got = dequantize_blocks(packed)
    scale = (packed.block_scale.float() * packed.tensor_scale).repeat_interleave(block, 1)
    assert equal(got, E2M1.nearest(weight / scale) * scale)
    assert (got.double() - weight).norm() < 0.2 * weight.double().norm()
    again = PACKS[block](got)
    assert equal(dequantize_blocks(again), got) or block == 16


@every_block
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_block_is_nan_and_others_are_not(block: int, poison: float) -> None:
    weight = torch.randn(2, 2 * block)
    weight[0, 3] = poison
    packed = PACKS[block](weight)
    got = dequantize_blocks(packed)
    assert got[0, :block].isnan().all()
    assert got[0, block:].isfinite().all() and got[1].isfinite().all()
    codes, scale = to_e4m3(packed, block)
    assert equal(codes.float() * scale.repeat_interleave(block, 1), got)
    layout = GroupLayout(2 * block, 32, 0)
    searched = dequantize_weight(
        pack_grouped(weight, layout, 4, 1.0, format=NAMES[block]), layout, NAMES[block]
    )
    assert equal(searched.isnan().float(), got.isnan().float())


@every_block
def test_zeros_are_zeros(block: int) -> None:
    packed = PACKS[block](torch.zeros(2, 2 * block))
    assert not dequantize_blocks(packed).any()
    codes, scale = to_e4m3(packed, 2 * block)
    assert not (codes.float() * scale).any()


@every_block
def test_a_part_of_a_block_is_refused(block: int) -> None:
    with pytest.raises(ValueError, match="72 channels are not a multiple"):
        PACKS[block](torch.zeros(2, 72))


def test_transformers_reads_mxfp4_alike() -> None:
    packed = pack_mxfp4(torch.randn(8, 96))
    blocks = packed.codes.view(1, 8, 3, 16)
    scales = packed.block_scale.view(torch.uint8)[None]
    got = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(got[0].t(), dequantize_blocks(packed))
