from __future__ import annotations

import pytest
import torch

from atom_compile.kernels import weight_only_hopper
from atom_compile.kernels import weight_only_linear as operator
from atom_compile.kernels.formats import FORMATS
from atom_compile.kernels.hopper_tiles import HopperTiling
from atom_compile.kernels.packing import GroupedWeight, GroupLayout, narrow_rows

from .cases import poisoned_memory
from .test_linear_hopper import on_hopper
from .test_weight_only_linear import Arguments, arguments, assert_alike, reference

SIZES = [(5, 528, 1000), (300, 4096, 1408)]  # whole tiles, and tiles that programs share
TILINGS = list(weight_only_hopper.STEP_US["int"])
OF_FLOAT16 = weight_only_hopper.tilings(torch.float16, "int")


def agrees(args: Arguments, tiling: HopperTiling, format: str) -> None:
    moved = args.to(torch.device("cuda"))
    named = moved._asdict()
    assert named.pop("row_scale") is None
    with poisoned_memory():
        got = operator.multiply_on_hopper(**named, tiling=tiling, format=format)
    # the largest tile rounds what it scales
    rounding = 2**-8 if weight_only_hopper.scales_weight(*tiling) else 0.0
    assert_alike(got, reference(moved, format).cpu(), rounding)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize(
    ("format", "symmetric"), [("int", True), ("int", False), *((name, True) for name in FORMATS)]
)
def test_bfloat16_agrees_with_the_reference(
    tiling: HopperTiling, format: str, symmetric: bool
) -> None:
    for M, N, K in SIZES:
        layout = GroupLayout(K, 128, 0)
        args = arguments(
            (M,), N, layout, torch.bfloat16, symmetric=symmetric, extras=True, format=format
        )
        agrees(args, tiling, format)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("tiling", OF_FLOAT16)
@pytest.mark.parametrize("format", ["int", "e2m3", "e2m2"])
def test_float16_agrees_with_the_reference(tiling: HopperTiling, format: str) -> None:
    for M, N, K in SIZES:
        args = arguments((M,), N, GroupLayout(K, 128, 0), torch.float16, format=format)
        agrees(args, tiling, format)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**20])
def test_scales_far_from_one(scale: float) -> None:
    """Bits that are placed are 2^126 of their values: no scale may be lost on the way."""
    args = arguments((40,), 256, GroupLayout(512, 128, 0), torch.bfloat16, format="e2m3")
    args = args._replace(weight_scale=args.weight_scale * scale)
    for tiling in TILINGS:
        agrees(args, tiling, "e2m3")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("start", [0, 64, 8])  # 8 does not lie where TMA can begin
def test_some_rows_of_a_larger_weight(start: int) -> None:
    args = arguments((100,), 1008, GroupLayout(1000, 128, 0), torch.bfloat16, format="e2m3")
    packed = GroupedWeight(*args.to(torch.device("cuda"))[1:6])
    rows = narrow_rows(packed, start, 336)
    got = operator.launch(args.x.cuda(), *rows, None, None, torch.bfloat16, format="e2m3")
    want = reference(args, "e2m3")[:, start : start + 336]
    assert_alike(got, want, 2**-8)


def test_what_it_does_not_fit() -> None:
    for N, K, group_size, dtype, format in (
        (4096, 4096, 64, torch.bfloat16, "int"),
        (4090, 4096, 128, torch.bfloat16, "int"),
        (4096, 4090, 128, torch.bfloat16, "int"),
        (4096, 4096, 128, torch.float32, "int"),
        (4096, 4096, 128, torch.bfloat16, "nvfp4"),
    ):
        assert not weight_only_hopper.fits(N, K, group_size, dtype, format)
    assert weight_only_hopper.fits(4096, 4096, 128, torch.float16, "e2m2")


@pytest.mark.parametrize("kind", ["int", "other"])
def test_float16_weights_are_not_scaled(kind: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        best, _ = weight_only_hopper.best_tiling(8192, 28672, 32, dtype, kind, 132)
        assert weight_only_hopper.scales_weight(*best) == (dtype == torch.bfloat16)
