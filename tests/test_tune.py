"""Tuning by Triton's interpreter: the file, going on, candidates that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from atom_compile import tune as tuning
from atom_compile.bench import Shape
from atom_compile.bench.timing import Timing
from atom_compile.cli import app
from atom_compile.errors import OptionError
from atom_compile.kernels import float8_linear, linear, weight_only_linear

TINY = Shape(name="tiny", hidden=128, intermediate=64, heads=1, kv_heads=1, head_dim=64)
SIZES = 2 * 2  # three of the four linears have 128 rows and one group


@pytest.fixture(autouse=True)
def _nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has more warps is said to be faster."""

    def measure(calls: list[Any], *_: Any) -> Timing:
        tiling = calls[0].args[0]
        return Timing(100.0 / tiling.num_warps, 0.0, "made up")

    monkeypatch.setattr(tuning, "measure", measure)
    monkeypatch.setattr(tuning, "copies_past_cache", lambda *_: 1)
    few = [linear.Tiling(32, 16, 1, num_warps=warps) for warps in (2, 8)]
    for operator in (linear, weight_only_linear, float8_linear):
        monkeypatch.setattr(operator, "candidates", lambda *_: few)


def run(folder: Path, **options: Any) -> list[tuning.Outcome]:
    return list(tuning.tune([TINY], tokens=[1, 2], device="cpu", folder=folder, **options))


def test_the_fastest_is_written_for_every_size(tmp_path: Path) -> None:
    outcomes = run(tmp_path)
    assert len(outcomes) == SIZES
    assert all(outcome.rejected == 0 and outcome.candidates == 3 for outcome in outcomes)
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert {"device", "torch", "triton", "date"} <= set(record["environment"])
    assert [row["tiling"]["num_warps"] for row in record["linear"]] == [8] * SIZES
    assert record["linear"][0]["us"] < record["linear"][0]["default_us"]


def test_tuning_goes_on_where_it_was(tmp_path: Path) -> None:
    interrupted = tuning.tune([TINY], tokens=[1, 2], device="cpu", folder=tmp_path)
    first = next(interrupted)
    interrupted.close()  # type: ignore[attr-defined]
    rest = run(tmp_path)
    assert len(rest) == SIZES - 1
    assert first.size not in [outcome.size for outcome in rest]
    assert run(tmp_path) == []
    assert len(run(tmp_path, again=True)) == SIZES


def test_a_wrong_candidate_is_never_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    true_launch = linear.launch

    def launch(*arguments: Any) -> torch.Tensor:
        out = true_launch(*arguments)
        return out * 2 if arguments[-1].num_warps == 8 else out

    monkeypatch.setattr(linear, "launch", launch)
    outcomes = run(tmp_path)
    assert {outcome.rejected for outcome in outcomes} == {1}
    assert {outcome.row["tiling"]["num_warps"] for outcome in outcomes} == {2}  # the next best


def test_tokens_are_powers_of_two(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"\[1, 3\]; every number must be a power of two"):
        next(tuning.tune([TINY], tokens=[1, 3], device="cpu", folder=tmp_path))


def test_each_format_of_weights_beside_16_bit_activations_has_rows_of_its_own(
    tmp_path: Path,
) -> None:
    run(tmp_path)
    for scheme in ("w4a16", "w6a16"):
        outcomes = run(tmp_path, scheme=scheme)
        assert len(outcomes) == SIZES
        assert all(outcome.rejected == 0 and outcome.candidates == 3 for outcome in outcomes)
        assert run(tmp_path, scheme=scheme) == []
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert len(record["linear"]) == SIZES
    formats = [row["format"] for row in record["weight_only_linear"]]
    assert formats == ["e2m3"] * SIZES + ["int"] * SIZES
    assert {row["tiling"]["num_warps"] for row in record["weight_only_linear"]} == {8}


def test_fp8_activations_have_rows_of_their_own(tmp_path: Path) -> None:
    outcomes = run(tmp_path, scheme="w6a8")
    assert len(outcomes) == SIZES
    assert all(outcome.rejected == 0 and outcome.candidates == 3 for outcome in outcomes)
    assert run(tmp_path, scheme="w6a8") == []
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    assert set(record) == {"environment", "float8_linear"}
    assert {row["path"] for row in record["float8_linear"]} == {float8_linear.IN_16_BITS}


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("w4a4-fp4", "INT4 and serve e2m1 as well: scheme must be one of integers, such as 'w4a4'"),
        ("w6a8-e3m2", "E2M3 and serve e3m2 as well: scheme must be 'w6a8'"),
        ("w4a8-two-level", "scales in two levels have no launches to tune"),
    ],
)
def test_schemes_without_launches_of_their_own(tmp_path: Path, scheme: str, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        next(tuning.tune([TINY], scheme=scheme, device="cpu", folder=tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_command_says_that_it_needs_a_gpu() -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["tune"])
    assert result.exit_code == 2
    assert "there is nothing to tune without a GPU" in result.output
