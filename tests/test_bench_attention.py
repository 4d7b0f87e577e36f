"""The benchmark's levels of attention. Nothing here asserts a time, and nothing is compiled."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from atom_compile import bench
from atom_compile.bench import Result, Shape
from atom_compile.cli import app
from atom_compile.errors import OptionError
from atom_compile.kernels import attention, rope_append

TINY = Shape(name="tiny", hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16)


@pytest.fixture(autouse=True, scope="module")
def _eager_on_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(threads)


def run(level: str, batch: list[int] | None, length: list[int]) -> Result:
    return bench.run(TINY, level=level, batch=batch, length=length, device="cpu", quick=True)


@pytest.fixture(scope="module")
def result() -> Result:
    return run("attention", [1, 2], [5, 70])


def test_every_case_has_every_variant_a_time_and_passes_its_gate(result: Result) -> None:
    rows = {(row.op, row.M, row.variant) for row in result.rows}
    lengths = {("decode", 1): [5, 70], ("decode", 2): [5, 70], ("prefill", 1): [5, 70]}
    lengths |= {("append", 1): [1, 5, 70], ("append", 2): [1]}
    assert rows == {
        (f"{phase} kv{bits} x{batch}", length, variant)
        for (phase, batch), counts in lengths.items()
        for length in counts
        for bits in (4, 8, 16)
        for variant in ("baseline", "unfused", "fused")
    }
    assert result.failures == []
    assert all(row.median_us and row.error is not None for row in result.rows)


def test_bytes_are_those_of_the_codes(result: Result) -> None:
    codes_and_scale = 2 * 2 * 2 * 70 * (16 // 2 + 4)  # k and v, sequences, KV heads, tokens
    query_and_output = 2 * 2 * 4 * 16 * 4
    length_and_position = 16
    fused = result.variants("decode kv4 x2", 70)["fused"]
    assert fused.bytes == codes_and_scale + query_and_output + length_and_position
    appended = result.variants("append kv4 x2", 1)["fused"]
    new = 2 * (4 + 2 + 2) * 16 * 4 + query_and_output // 2
    assert appended.bytes == new + 2 * 16 * 4 + codes_and_scale // 70


def test_rates_are_of_bytes_and_flops(result: Result) -> None:
    row = result.variants("prefill kv8 x1", 70)["fused"]
    assert row.flops == 4 * 4 * 16 * sum(range(1, 71))
    assert row.median_us is not None
    assert row.tflop_per_s == pytest.approx(row.flops / row.median_us / 1e6)
    copied = result.environment["copy_gb_per_s"]
    assert result.copy_share(row) == pytest.approx(row.bytes / row.median_us / 1e3 / copied)
    assert result.variants("decode kv8 x1", 70)["fused"].tflop_per_s is None


def test_the_table_names_the_baseline_that_ran(result: Result) -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    result.print(console)
    printed = console.export_text()
    assert all(op.rpartition(" ")[0] in printed for op in result.ops)
    assert "TFLOP" in printed
    assert "scaled_dot_product_attention by " in printed


def test_files_hold_the_record(result: Result, tmp_path: Path) -> None:
    paths = result.save(tmp_path)
    assert [path.suffix for path in paths] == [".json", ".txt", ".png", ".svg"]
    environment = json.loads(paths[0].read_text())["environment"]
    assert (environment["batch"], environment["length"]) == ([1, 2], [5, 70])
    assert "tiny-kv4-kv8-kv16-attention" in paths[0].name


def _wrong(true_operator: Callable[..., Any], *inputs: Any) -> Any:
    return true_operator(*inputs) * 1.5


def _storing_nothing(true_operator: Callable[..., Any], *inputs: Any) -> Any:
    query, *_ = inputs
    cache = (x.clone() if isinstance(x, torch.Tensor) else x for x in inputs[5:])
    return true_operator(query, *inputs[1:5], *cache)


@pytest.mark.parametrize(
    ("level", "module", "name", "fault"),
    [
        ("decode", attention, "attention", _wrong),
        ("prefill", attention, "attention", _wrong),
        ("append", rope_append, "rope_append", _wrong),
        ("append", rope_append, "rope_append", _storing_nothing),
    ],
)
def test_a_wrong_operator_has_no_time(
    monkeypatch: pytest.MonkeyPatch,
    level: str,
    module: Any,
    name: str,
    fault: Callable[..., Any],
) -> None:
    true_operator = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *inputs: fault(true_operator, *inputs))
    result = run(level, None if level == "prefill" else [2], [3])
    for row in result.rows:
        assert (row.failure is not None) == (row.median_us is None) == (row.variant == "fused")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": [4]}, "level 'decode' does not go by it; give batch and length"),
        ({"level": "prefill", "batch": [2]}, "level 'prefill' does not go by it; give length"),
        ({"length": [4, 0]}, r"length is \[4, 0\]; every number must be at least 1"),
        ({"level": "decod"}, "unknown level 'decod'; did you mean 'decode'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        bench.run(TINY, device="cpu", **{"level": "decode", **arguments})


def test_the_command_takes_batch_and_length(tmp_path: Path) -> None:
    options = ["--level", "decode", "--batch", "2", "--length", "8", "--quick", "--device", "cpu"]
    done = CliRunner().invoke(app, ["bench", *options, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "decode kv4" in done.output


@pytest.mark.gpu
def test_on_a_gpu_every_case_passes_its_gate() -> None:
    with torch.compiler.set_stance("default"):
        result = bench.run("llama3-8b", level="attention", batch=[1, 3], length=[300], quick=True)
    assert result.failures == []
    assert {row.timing for row in result.rows} == {"graph replay"}
