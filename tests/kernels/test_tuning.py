"""Which tuned row serves which sizes, and what happens without one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from atom_compile.kernels import (
    float8_hopper,
    float8_linear,
    linear,
    tuning,
    weight_only_hopper,
    weight_only_linear,
)
from atom_compile.kernels.hopper_tiles import HopperTiling

GPU = torch.device("cuda", 0)


def row(M: int, **changed: Any) -> dict[str, Any]:
    tiling = linear.Tiling(64, 16, 2)._replace(num_warps=8)._asdict()
    size = {"N": 6144, "num_groups": 31, "group_size": 128}
    return {**size, "M": M, "path": linear.PATH, "tiling": tiling, **changed}


@pytest.fixture
def device_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Of a device that this machine need not have; nothing in it yet."""
    monkeypatch.setattr(tuning, "device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(tuning.path_for, "__defaults__", (tmp_path,))
    operators = linear, weight_only_linear, float8_linear
    for operator in operators:
        monkeypatch.setattr(operator, "multiprocessors", lambda _: 132)
        operator.forget_tilings()
    yield tuning.path_for(GPU)
    for operator in operators:
        operator.forget_tilings()


def _write(path: Path, *rows: dict[str, Any]) -> None:
    path.write_text(json.dumps({"linear": rows}))


def test_the_file_is_named_after_the_device(device_file: Path) -> None:
    assert device_file.name == "nvidia-h100-80gb-hbm3.json"


@pytest.mark.parametrize(
    ("tokens", "served_by"), [(1, 1), (9, 16), (16, 16), (17, None), (9999, 1024)]
)
def test_a_row_serves_down_to_half_its_tokens_and_the_last_all_above(
    device_file: Path, tokens: int, served_by: int | None
) -> None:
    _write(device_file, *(row(M, path=str(M)) for M in (1, 16, 1024)))
    found = tuning.find(GPU, tokens, 6144, 31, 128)
    assert (found and found.path) == (str(served_by) if served_by else None)


@pytest.mark.parametrize(
    ("measured", "tokens", "served_by"),
    [((1, 4, 16), 2, 4), ((1, 4, 16), 3, 4), ((1, 4, 16), 8, 4), ((16,), 8, None), ((8,), 1, 8)],
)
def test_up_to_eight_tokens_share_their_rows(
    device_file: Path, measured: tuple[int, ...], tokens: int, served_by: int | None
) -> None:
    _write(device_file, *(row(M, path=str(M)) for M in measured))
    found = tuning.find(GPU, tokens, 6144, 31, 128)
    assert (found and found.path) == (str(served_by) if served_by else None)


def test_few_tokens_serve_no_more_of_them(device_file: Path) -> None:
    _write(device_file, row(16))
    assert tuning.find(GPU, 4096, 6144, 31, 128) is None


@pytest.mark.parametrize("size", [(4096, 31, 128), (6144, 32, 128), (6144, 31, 64)])
def test_other_sizes_have_the_default(device_file: Path, size: tuple[int, int, int]) -> None:
    _write(device_file, row(16))
    assert tuning.find(GPU, 16, *size) is None
    N, num_groups, group_size = size
    chosen = linear.choose_tiling(16, N, num_groups, group_size, 128, GPU)
    assert chosen == linear.fastest_tiling(16, N, num_groups, group_size, 128, GPU)


def test_a_launch_takes_the_tuned_tiling(device_file: Path) -> None:
    _write(device_file, row(16))
    assert linear.choose_tiling(12, 6144, 31, 128, 128, GPU) == linear.Tiling(
        64, 16, 2, num_warps=8
    )


def test_a_tiling_of_other_fields_is_no_tiling_of_this_version(device_file: Path) -> None:
    _write(device_file, row(16, tiling={"block": 64}))
    chosen = linear.choose_tiling(16, 6144, 31, 128, 128, GPU)
    assert chosen == linear.fastest_tiling(16, 6144, 31, 128, 128, GPU)


def test_a_weight_only_launch_takes_the_tiling_that_was_tuned_for_its_format(
    device_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_only_linear, "is_hopper", lambda _: True)
    size = {"format": "e2m3", "N": 6144, "num_groups": 32, "group_size": 128}
    split = linear.Tiling(32, 16, 2, num_warps=1)
    kernels: list[tuple[int, str, Any]] = [
        (16, weight_only_linear.PATH, split),
        (64, weight_only_hopper.PATH, HopperTiling(64, 1)),
        (128, weight_only_linear.DEQUANTIZE, weight_only_linear.Dense()),
    ]
    rows = [{**size, "M": M, "path": path, "tiling": one._asdict()} for M, path, one in kernels]
    device_file.write_text(json.dumps({"weight_only_linear": rows}))

    def choose(M: int, dtype: torch.dtype, format: str) -> Any:
        return weight_only_linear.choose_tiling(M, 6144, 4096, 128, dtype, GPU, format)

    for M, path, tiling in kernels:
        assert choose(M, torch.bfloat16, "e2m3") == tiling
        assert weight_only_linear.path_of(tiling) == path
    assert choose(16, torch.bfloat16, "int") != split
    assert choose(16, torch.float32, "e2m3") != split


@pytest.fixture
def _in_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Hopper GPU that need not be there."""
    monkeypatch.setattr(float8_linear, "multiplies_e4m3", lambda _: True)
    monkeypatch.setattr(float8_hopper, "is_hopper", lambda _: True)


@pytest.mark.usefixtures("_in_float8")
def test_a_launch_in_float8_takes_the_tuned_tiling(device_file: Path) -> None:
    size = {"N": 6144, "num_groups": 32, "group_size": 128}
    split = linear.Tiling(32, 16, 2, num_warps=4)
    kernels: list[tuple[int, str, Any]] = [
        (16, float8_linear.PATH, split),
        (64, float8_linear.HOPPER, HopperTiling(16, 1)),
        (128, float8_linear.SCALED, weight_only_linear.Dense()),
    ]
    rows = [{**size, "M": M, "path": path, "tiling": one._asdict()} for M, path, one in kernels]
    device_file.write_text(json.dumps({"float8_linear": rows}))

    def choose(M: int, dtype: torch.dtype) -> Any:
        return float8_linear.choose_tiling(M, 6144, 4096, 32, dtype, GPU)

    for M, path, tiling in kernels:
        assert choose(M, torch.bfloat16) == tiling
        assert float8_linear.path_of(tiling, 6144, 4096, torch.bfloat16, GPU) == path
        default = float8_linear.fastest_tiling(M, 6144, 4096, 32, torch.float32, GPU)
        assert choose(M, torch.float32) == default != tiling


@pytest.mark.usefixtures("device_file")
def test_an_untuned_device_is_told_the_command_once() -> None:
    with pytest.warns(UserWarning, match="no tuned launches for NVIDIA H100.*atom-compile tune"):
        tuning.find(GPU, 1, 6144, 31, 128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.find(GPU, 2, 4096, 31, 128) is None
        assert tuning.find(torch.device("cpu"), 2, 4096, 31, 128) is None


@pytest.mark.usefixtures("_in_float8")
def test_candidates_differ_and_fit_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_only_linear, "is_hopper", lambda _: True)
    for M, format in ((1, "int"), (16, "mxfp4"), (300, "e2m3")):
        sizes = M, 4096, 4096, 128, torch.bfloat16, GPU, format
        weight_only = weight_only_linear.candidates(*sizes)
        assert len(weight_only) == len(set(weight_only)) > 8
    for M in (1, 16, 300):
        in_float8 = float8_linear.candidates(M, 4096, 4096, 32, torch.bfloat16, GPU)
        assert len(in_float8) == len(set(in_float8)) > 8
    for M in (1, 16, 300, 8192):
        found = linear.candidates(M, 4096, 31)
        assert len(found) == len(set(found)) > 8
        own = [tiling for tiling in found if isinstance(tiling, linear.Tiling)]
        assert own and all(tiling.split_k <= 15 for tiling in own)
