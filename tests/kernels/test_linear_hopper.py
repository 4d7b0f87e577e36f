from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from atom_compile.kernels import linear, linear_hopper, quantize, two_level_linear
from atom_compile.kernels.hopper_tiles import HopperTiling, best_tiling, whole_tiles
from atom_compile.kernels.linear_hopper import STEP_US, tilings
from atom_compile.kernels.packing import GroupLayout, narrow_rows, pack_two_level, pack_weight

from .cases import poisoned_memory
from .test_linear import assert_alike

Product = Callable[..., Tensor]
LAUNCH: Product = linear.launch
MULTIPLY: Product = linear.multiply
REFERENCE: Product = linear.reference
TWO_LEVEL_REFERENCE: Product = two_level_linear.reference
LAYOUTS = [GroupLayout(700, 128, 48), GroupLayout(1000, 128, 256)]
SIZES = [(100, 512), (257, 1008), (513, 336)]
is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_hopper = pytest.mark.skipif(not is_hopper, reason="needs a GPU of compute capability 9.0")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tiling", tilings(two_level=False))
@pytest.mark.parametrize("format", ["int", "e2m1"])
def test_group_scales_agree_with_the_reference(
    layout: GroupLayout, tiling: HopperTiling, format: str
) -> None:
    for M, N in SIZES:
        numbers = layout.group_size, layout.outlier_channels
        x = torch.randn(M, layout.width)
        codes, scale = quantize.reference(x, 4, *numbers, 0.9, format=format)
        packed = pack_weight(torch.randn(N, layout.width), layout, 4, 0.85, format)
        extras = [None, None] if M % 2 else [torch.randn(N), torch.randn(M, N)]
        arguments: list[Any] = [codes, scale, *packed, *extras]
        moved: list[Any] = [None if one is None else one.cuda() for one in arguments]
        with poisoned_memory():
            got = LAUNCH(*moved, torch.float32, tiling, format=format)
        assert_alike(got, REFERENCE(*arguments, torch.float32, format=format))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tiling", tilings(two_level=True))
def test_two_levels_agree_with_the_reference(layout: GroupLayout, tiling: HopperTiling) -> None:
    for M, N in SIZES:
        group = 1 << (layout.grouped_width - 1).bit_length()
        x = torch.randn(M, layout.width)
        codes, scale = quantize.reference(x, 8, group, layout.outlier_channels, 1.0)
        packed = pack_two_level(torch.randn(N, layout.width), layout)
        extras = [None, None] if M % 2 else [torch.randn(N), torch.randn(M, N)]
        arguments: list[Any] = [codes, scale, *packed, *extras]
        moved: list[Any] = [None if one is None else one.cuda() for one in arguments]
        with poisoned_memory():
            got = MULTIPLY(*moved, torch.float32, tiling)
        want = TWO_LEVEL_REFERENCE(*arguments, torch.float32)
        assert_alike(got, want)


@pytest.mark.gpu
@on_hopper
def test_one_token_and_no_outliers() -> None:
    layout = GroupLayout(384, 128, 0)
    codes, scale = quantize.reference(torch.randn(1, layout.width), 4, 128, 0, 0.9)
    arguments: list[Any] = [codes, scale, *pack_weight(torch.randn(16, 384), layout, 4, 0.85)]
    moved = [one.cuda() for one in arguments]
    with poisoned_memory():
        got = LAUNCH(*moved, None, None, torch.bfloat16, HopperTiling(64, 1))
    assert_alike(got, REFERENCE(*arguments, None, None, torch.bfloat16))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("block_m", [16, 64, 128])
def test_shared_tiles_give_the_same_bits_every_time(block_m: int) -> None:
    tiling = HopperTiling(block_m, 1)
    # less than a round of tiles, and more, of which all is in the L2
    for M, N, K in [(block_m, 4096, 28672), (2 * block_m, 9008, 8192)]:
        layout = GroupLayout(K, 128, 128)
        assert whole_tiles(M, N, layout.num_groups, tiling, STEP_US[False][tiling], 132) == 0
        codes, scale = quantize.reference(torch.randn(M, K).cuda(), 4, 128, 128, 0.9)
        packed = pack_weight(torch.randn(N, K).cuda(), layout, 4, 0.85)
        arguments: list[Any] = [codes, scale, *packed, None, None, torch.float32]
        with poisoned_memory():
            got = LAUNCH(*arguments, tiling)
        assert_alike(got, REFERENCE(*arguments))
        for _ in range(5):
            assert torch.equal(LAUNCH(*arguments, tiling), got)


@pytest.mark.parametrize("tiles", [1, 131, 132, 133, 200, 263, 264, 265, 1000])
def test_what_is_shared_is_no_more_than_two_rounds(tiles: int) -> None:
    whole = whole_tiles(64, 128 * tiles, 223, HopperTiling(64, 1), 0.41, 132)
    assert whole == tiles or (whole % 132 == 0 and 0 < tiles - whole < 264)
    assert whole_tiles(128, 256 * tiles, 223, HopperTiling(128, 2), 0.83, 132) == tiles


def test_what_takes_longer_to_read_than_to_multiply_is_not_shared() -> None:
    M, N, tiling, tiles = 1024, 6400, HopperTiling(128, 1), 8 * 50
    assert whole_tiles(M, N, 224, tiling, 0.52, 132) == tiles
    assert whole_tiles(M, N, 224, tiling, 2.0, 132) < tiles
    assert whole_tiles(M, N, 64, tiling, 0.52, 132) < tiles  # all of it is in the L2
    assert whole_tiles(64, 8192, 223, HopperTiling(64, 1), 0.41, 132) == 0  # nothing is read again


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("start", [0, 64, 8])  # with 8 its scales are not aligned
def test_some_rows_of_a_larger_weight(start: int) -> None:
    layout, N = GroupLayout(700, 128, 48), 336
    codes, scale = quantize.reference(torch.randn(100, layout.width), 4, 128, 48, 0.9)
    packed = pack_weight(torch.randn(1008, layout.width), layout, 4, 0.85)
    rows = narrow_rows(type(packed)(*(one.cuda() for one in packed)), start, N)
    extras: list[Any] = [None, None, torch.float32]
    with poisoned_memory():
        got = LAUNCH(codes.cuda(), scale.cuda(), *rows, *extras, HopperTiling(64, 1))
    want = REFERENCE(codes, scale, *packed, *extras)[:, start : start + N]
    assert_alike(got, want.contiguous())


@pytest.mark.parametrize("two_level", [False, True])
def test_the_best_tiling_fills_the_device(two_level: bool) -> None:
    few, _ = best_tiling(40, 8192, 65, STEP_US[two_level], 132)
    many, _ = best_tiling(4096, 8192, 65, STEP_US[two_level], 132)
    assert few.block_m <= 64
    assert many.block_m == 128
    assert {few, many} <= set(tilings(two_level))


def test_other_devices_and_sizes_are_left_to_the_other_kernel() -> None:
    assert not linear_hopper.fits(torch.device("cpu"), 4096, 128, 128)
