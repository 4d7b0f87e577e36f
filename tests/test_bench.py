"""The benchmark's rows, gate and files. Nothing here asserts a time, and nothing is compiled."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from atom_compile import bench
from atom_compile.bench import Result, Row, Shape, layer, operators, timing
from atom_compile.bench.cases import Setting
from atom_compile.errors import OptionError
from atom_compile.kernels import quantize
from atom_compile.kernels.packing import pack_grouped, pack_rows, pack_weight
from atom_compile.options import Options
from atom_compile.scheme import Scheme

TINY = Shape(name="tiny", hidden=192, intermediate=352, heads=3, kv_heads=1, head_dim=64)
WEIGHT_ONLY = Scheme(activation_bits=16, outlier_channels=0, group_size=32, symmetric=False)
OPS = [
    "qkv_proj",
    "o_proj",
    "gate_up_proj",
    "down_proj",
    "norm",
    "silu_mul",
    "o_proj_input",
    "decoder_layer",
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """A busy machine takes milliseconds to wake a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def result() -> Result:
    with torch.compiler.set_stance("force_eager"):
        return bench.run(TINY, tokens=[1, 5], device="cpu", quick=True)


def test_every_operator_has_every_variant_at_every_token_count(result: Result) -> None:
    assert result.ops == OPS
    for op in OPS:
        variants = {"baseline", "unfused", "fused"} - (
            {"baseline"} if op == "o_proj_input" else set()
        )
        for M in (1, 5):
            assert set(result.variants(op, M)) == variants


def test_every_row_passes_its_gate_and_has_a_time(result: Result) -> None:
    assert result.failures == []
    for row in result.rows:
        assert row.error is not None
        assert row.error <= row.error_limit
        assert row.median_us is not None
        assert row.median_us > 0
        assert row.timing == "wall clock"


def test_bytes_are_those_of_the_packed_weight() -> None:
    N, K = TINY.linears["down_proj"]
    weight, scheme = torch.randn(N, K), Scheme()
    packed = pack_weight(weight, scheme.layout(K), 4, 0.85)
    assert layer._packed_bytes(N, K, scheme) == sum(tensor.nbytes for tensor in packed)
    of_e2m1 = pack_weight(weight, scheme.layout(K), 4, 1.0, "e2m1")
    of_both = [layer._packed_bytes(N, K, Scheme.preset(name)) for name in ("w4a4", "w4a4-fp4")]
    assert of_both == 2 * [sum(tensor.nbytes for tensor in of_e2m1)]
    presets = [Scheme.preset(name) for name in ("w4a16", "w6a16", "mxfp4", "nvfp4")]
    for scheme in (*presets, WEIGHT_ONLY):
        numbers = scheme.symmetric, scheme.weight_format
        grouped = pack_grouped(weight, scheme.layout(K), 4, 1.0, *numbers)
        tensors = [one for one in grouped if one is not None]
        assert layer._packed_bytes(N, K, scheme) == sum(tensor.nbytes for tensor in tensors)
    scheme = Scheme.preset("w6a8")
    rows = pack_rows(weight, scheme.layout(K), scheme.weight_format)
    assert layer._packed_bytes(N, K, scheme) == sum(tensor.nbytes for tensor in rows)


def test_linears_in_float8() -> None:
    result = bench.run(
        TINY, tokens=[1, 5], scheme="w6a8", device="cpu", only=["down_proj"],
        quick=True,
    )  # fmt: skip
    assert result.failures == []
    assert {row.variant for row in result.rows} == {"baseline", "unfused", "fused"}
    for row in result.rows:
        assert row.error is not None and row.error <= row.error_limit
        assert row.arithmetic == ("16-bit" if row.variant == "baseline" else "8-bit")
    with pytest.raises(OptionError, match="only linears are timed"):
        bench.run(TINY, scheme="w6a8", device="cpu", level="operators", only=["norm"])


def test_operators_of_e2m1_pass_their_gates() -> None:
    with torch.compiler.set_stance("force_eager"):
        result = bench.run(
            TINY, tokens=[5], scheme="w4a4-fp4", device="cpu", level="operators", quick=True
        )
    assert result.failures == [] and result.ops == OPS[:-1]
    assert all(row.error is not None and row.error <= row.error_limit for row in result.rows)


@pytest.mark.parametrize("scheme", [WEIGHT_ONLY, "w5a16", "nvfp4"])
def test_weight_only_linears_have_no_unfused_variant(scheme: Scheme | str) -> None:
    result = bench.run(
        TINY, tokens=[1, 5], scheme=scheme, device="cpu", level="operators", quick=True
    )
    assert result.failures == [] and result.ops == OPS[:4]
    for row in result.rows:
        assert (row.variant, row.path) in {("baseline", ""), ("fused", "reference")}
        assert row.error is not None and row.error <= row.error_limit
        assert row.arithmetic == "16-bit"
    with pytest.raises(OptionError, match="only linears are timed"):
        bench.run(TINY, scheme=WEIGHT_ONLY, device="cpu", level="operators", only=["norm"])


@pytest.mark.parametrize(("variant", "fuse"), [("unfused", False), ("fused", True)])
def test_the_layer_is_compiled_with_options_that_the_backend_takes(
    monkeypatch: pytest.MonkeyPatch, variant: str, fuse: bool
) -> None:
    compile_calls: list[dict[str, Any]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda _, **given: compile_calls.append(given))
    scheme = Scheme.preset("w4a8")
    cpu = torch.device("cpu")
    setting = Setting(shape=TINY, scheme=scheme, tokens=(1,), device=cpu, dtype=torch.float32)
    with torch.no_grad():
        layer._compiled_layer(setting, variant, 0)
    (given,) = compile_calls
    options = Options.parse(given["options"])
    assert (options.scheme, options.fuse, options.strict) == (scheme, fuse, True)


@pytest.mark.gpu
def test_a_gpu_is_timed_by_graph_replay_or_else_by_events() -> None:
    cuda = torch.device("cuda")
    x = torch.randn(64, device=cuda)
    assert timing.measure([lambda: x + 1] * 2, cuda, 0.01).how == "graph replay"
    assert timing.measure([lambda: x.sum().item()], cuda, 0.01).how == "events"
    assert timing.measure([lambda: x + 1], cuda, 0.01).how == "graph replay"  # it left no trace


def test_speedup_is_over_the_baseline_or_else_over_unfused(result: Result) -> None:
    for op, against in (("norm", "baseline"), ("o_proj_input", "unfused")):
        rows = result.variants(op, 1)
        assert result.speedup(rows[against]) is None
        expected = rows[against].median_us / rows["fused"].median_us  # type: ignore[operator]
        assert result.speedup(rows["fused"]) == pytest.approx(expected)


def _wrong(outputs: Any) -> Any:
    codes, scale = outputs
    return codes, scale * 1.5


def _unwritten(outputs: Any) -> Any:
    codes, scale = outputs
    return codes, torch.full_like(scale, math.nan)


def _raising(outputs: Any) -> Any:
    raise RuntimeError("out of\n shared memory")


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        (_wrong, "its relative error of 0.5 is over 0.01"),
        (_unwritten, "its relative error of nan is over 0.01"),
        (_raising, "RuntimeError: out of shared memory"),
    ],
)
def test_a_row_that_fails_has_a_reason_and_no_time(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], Any], failure: str
) -> None:
    true_operator = quantize.reorder_quantize

    def faulty(*inputs: Any, **named: Any) -> Any:
        return fault(true_operator(*inputs, **named))

    monkeypatch.setattr(quantize, "reorder_quantize", faulty)
    monkeypatch.setattr(
        bench, "operator_cases", lambda setting: operators._o_proj_input_cases(setting, 3)
    )
    result = bench.run(TINY, tokens=[3], level="operators", device="cpu", quick=True)
    row = result.variants("o_proj_input", 3)["fused"]
    assert row.failure == failure
    assert row.median_us is None
    assert result.speedup(row) is None
    assert result.failures == [f"o_proj_input, 3 tokens, fused: {failure}"]
    assert "failed" in _printed(result)


def test_files_are_written_whole_and_hold_the_record(result: Result, tmp_path: Path) -> None:
    paths = result.save(tmp_path / "new")
    suffixes = [path.name.removeprefix(paths[0].stem) for path in paths]
    assert suffixes == [".json", ".txt", ".png", ".svg", "-layer.png", "-layer.svg"]
    assert sorted(paths) == sorted((tmp_path / "new").iterdir())  # nothing temporary is left
    data = json.loads(paths[0].read_text())
    record = {
        "device",
        "torch",
        "triton",
        "command",
        "date",
        "revision",
        "model",
        "scheme",
        "tokens",
    }
    record |= {"copy_gb_per_s", "read_gb_per_s", "tera_ops_per_s", "python", "level"}
    assert record <= set(data["environment"])
    names = {field.name for field in dataclasses.fields(Row)}
    names |= {"gb_per_s", "copy_share", "tflop_per_s", "floor_us", "floor_share", "speedup"}
    assert all(set(row) == names for row in data["rows"])
    assert len(data["rows"]) == len(result.rows)
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_write_leaves_nothing(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        result.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_table_names_every_operator_within_80_columns(result: Result) -> None:
    printed = _printed(result)
    assert all(op in printed for op in OPS)
    assert max(map(len, printed.splitlines())) <= 80


def _printed(result: Result) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    result.print(console)
    return console.export_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "llama3-8"}, "unknown model 'llama3-8'; did you mean 'llama3-8b'"),
        ({"batch": [4]}, r"batch is \[4\], and level 'all' does not go by it; give tokens"),
        ({"tokens": [4, 0]}, r"tokens is \[4, 0\]; every number must be at least 1"),
        ({"level": "layers"}, "unknown level 'layers'; did you mean 'layer'"),
        ({"only": ["norms"]}, "unknown operator 'norms'; did you mean 'norm'"),
        ({"scheme": "w4a5"}, "unknown scheme 'w4a5'"),
        ({"device": "cud"}, "unknown device 'cud'; did you mean 'cuda'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        bench.run(**arguments)


def test_an_interrupted_benchmark_keeps_what_it_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    run_case, done = bench._run_case, 0

    def interrupted(*arguments: Any, **named: Any) -> Row:
        nonlocal done
        if done == 10:
            raise KeyboardInterrupt
        done += 1
        return run_case(*arguments, **named)

    monkeypatch.setattr(bench, "_run_case", interrupted)
    given: dict[str, Any] = {"tokens": [1, 2], "only": ["linears"], "device": "cpu", "quick": True}
    printed = io.StringIO()
    console = Console(file=printed, width=100)
    result = bench.run(TINY, **given, console=console)
    assert [row.variant for row in result.rows] == 3 * ["baseline", "unfused", "fused"]
    assert [row.M for row in result.rows[::3]] == [1, 2, 1]  # of one linear and of the next
    assert result.environment["interrupted"] is True
    assert json.loads(result.to_json())["rows"]
    assert "interrupted" in printed.getvalue()
    result.print(console)
    done = 8
    with pytest.raises(KeyboardInterrupt):  # there is nothing whole to keep
        bench.run(TINY, **given)
