"""The command line: help, errors without tracebacks, each command on the embedded model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from atom_compile import Recipe
from atom_compile.cli import app

MODEL = Path(__file__).parents[1] / "examples" / "prose-llama-5m"
WIDE = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}


def run(*arguments: object) -> tuple[int, str]:
    """The exit status and all that was printed."""
    result = CliRunner(env=WIDE).invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("explain", ["--scheme", "--recipe", "--tokens", "--kv-cache", "--stage", "--out"]),
        ("explain", ["--html", "--json", "--diff"]),
        ("calibrate", ["--text", "--out", "--scheme", "--windows", "--length", "--no-gptq"]),
        ("calibrate", ["--int8-budget", "--error-budget", "--include-head", "--resume"]),
        ("bench", ["--model", "--tokens", "--scheme", "--level", "--device", "--out", "--quick"]),
        ("bench", ["--batch", "--length", "--only", "--peers", "--no-peers"]),
        ("bench", ["--layers", "--phases", "--variants", "--warm-cache", "--html", "--json"]),
        ("plot", ["--out", "--html"]),
        ("eval", ["--text", "--dataset", "--tasks", "--task-dir", "--scheme", "--recipe", "--out"]),
        ("eval", ["--kv-cache", "--window", "--stride", "--limit", "--batch", "--no-layers"]),
        ("eval", ["--compile", "--no-compile", "--json"]),
        ("quantize", ["--scheme", "--calibration", "--recipe", "--windows", "--length", "--skip"]),
        ("quantize", ["--include-head", "--max-shard-size"]),
        ("generate", ["--prompt", "--tokens", "--kv-cache", "--sample", "--no-compile"]),
        ("tune", ["--model", "--tokens", "--scheme", "--out", "--quick", "--again"]),
    ],
)
def test_help_describes_every_option(command: str, options: list[str]) -> None:
    status, output = run(command, "--help")
    assert status == 0
    assert all(option in output for option in options)


def test_help_lists_the_commands() -> None:
    status, output = run("--help")
    assert status == 0
    commands = ("explain", "calibrate", "quantize", "generate", "bench", "plot", "eval", "tune")
    assert all(command in output for command in (*commands, "doctor"))


def test_a_missing_model_directory_is_one_line(tmp_path: Path) -> None:
    status, output = run("explain", tmp_path / "nowhere")
    assert status == 2
    assert output.endswith("nowhere is no directory; give one that save_pretrained wrote\n")
    assert output.count("\n") == 1


def test_a_repository_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def fetch(name: str, **_: Any) -> str:
        fetched.append(name)
        return str(MODEL)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    status, output = run(
        "generate", "some/model", "--prompt", "Once", "--tokens", 2, "--no-compile"
    )
    assert (status, fetched) == (0, ["some/model"]), output


def test_a_repository_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, **_: Any) -> str:
        raise FileNotFoundError("there is no such thing")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    status, output = run("explain", "some/model")
    assert status == 2
    assert "is no directory, and no repository that can be fetched: there is no such" in output


def test_a_directory_without_a_model(tmp_path: Path) -> None:
    status, output = run("explain", tmp_path)
    assert status == 2
    assert "holds no config.json; give a directory that save_pretrained wrote" in output


def test_a_directory_that_transformers_cannot_load(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    status, output = run("explain", tmp_path)
    assert status == 2
    assert "transformers cannot load the model in" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1,x"], "--tokens is '1,x'; it must be whole numbers such as 1,16,64"),
        (["--tokens", "0"], "every number must be at least 1"),
        (["--level", "decode", "--length", "x"], "--length is 'x'; it must be whole numbers"),
        (["--model", "llama3-8"], "did you mean 'llama3-8b'"),
        (["--only", "linear"], "unknown operator 'linear'; did you mean 'linears'"),
        (["--level", "everything"], "unknown level 'everything'"),
        (["--scheme", "w4"], "unknown scheme 'w4'"),
    ],
)
def test_bench_refuses_what_makes_no_sense(arguments: list[str], message: str) -> None:
    status, output = run("bench", *arguments)
    assert status == 2
    assert message in output
    assert "Traceback" not in output


@pytest.fixture
def _eager_on_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_eager_on_one_thread")
def test_bench_writes_table_numbers_and_plot(tmp_path: Path) -> None:
    status, output = run("bench", "--device", "cpu", "--quick", "--tokens", "2", "--out", tmp_path)
    assert status == 0, output
    assert "gate_up_proj" in output
    suffixes = {path.suffix for path in tmp_path.iterdir()}
    assert suffixes == {".json", ".png", ".svg", ".txt"}


@pytest.mark.usefixtures("_eager_on_one_thread")
def test_bench_exits_with_1_if_a_check_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("atom_compile.bench.operators.SAME_ROUNDING", -1.0)
    status, output = run(
        "bench", "--device", "cpu", "--tokens", "2", "--level", "operators", "--out", tmp_path
    )
    assert status == 1
    assert "is over -1" in output


def test_explain_prints_the_report_and_writes_it(tmp_path: Path) -> None:
    out = tmp_path / "new" / "report.json"
    status, output = run("explain", MODEL, "--tokens", 8, "--kv-cache", "kv4", "--out", out)
    assert status == 0, output
    assert "KV cache: 576 bytes per token" in output
    assert "28 of 29 linears rewritten" in output
    report = json.loads(out.read_text())
    assert report["operators"]["atom.linear"] == 16


def test_explain_prints_json_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "new" / "report.html"
    result = CliRunner(env=WIDE).invoke(app, ["explain", str(MODEL), "--json", "--html", str(page)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["operators"]["atom.linear"] == 16
    assert "report.html" in result.stderr
    assert page.read_text().startswith("<!doctype html>")


def test_explain_compares_two_reports(tmp_path: Path) -> None:
    paths = []
    for scheme in ("w4a4", "w4a8"):
        paths.append(tmp_path / f"{scheme}.json")
        run("explain", MODEL, "--scheme", scheme, "--tokens", 4, "--out", paths[-1])
    page = tmp_path / "difference.html"
    status, output = run("explain", "--diff", *paths, "--html", page)
    assert status == 0, output
    assert "activation_bits" in output and "w4a8.json" in output.replace("\n", "")
    assert "activation_bits" in page.read_text()
    status, output = run("explain", "--diff", *paths, "--json")
    assert {"what": "activation_bits", "a": 4, "b": 8} in json.loads(output)["scheme"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "takes either a model's directory or --diff"),
        ([MODEL, "--diff", "a.json", "b.json"], "takes either a model's directory or --diff"),
        (["--diff", "a.json", "b.json"], "a.json is no file; give a report"),
    ],
)
def test_explain_takes_a_model_or_two_reports(arguments: list[object], message: str) -> None:
    status, output = run("explain", *arguments)
    assert status == 2
    assert message in output


def test_explain_prints_a_stage_and_draws_it(tmp_path: Path) -> None:
    status, output = run(
        "explain", MODEL, "--stage", "insert_quantization", "--out", tmp_path / "graph.dot"
    )
    assert status == 0, output
    assert output.count("torch.ops.atom.linear") == 28
    assert "digraph" in (tmp_path / "graph.dot").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "verifi"], "unknown stage 'verifi'; did you mean 'verify'"),
        (["--scheme", "w4"], "unknown scheme 'w4'"),
        (["--kv-cache", "kv5"], "unknown KV scheme 'kv5'"),
        (["--recipe", "nowhere.safetensors"], "nowhere.safetensors is no file"),
    ],
)
def test_explain_refuses_what_makes_no_sense(arguments: list[str], message: str) -> None:
    status, output = run("explain", MODEL, *arguments)
    assert status == 2
    assert message in output


def test_calibrate_writes_a_recipe_that_explain_reads(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "new" / "recipe.safetensors"
    text.write_text("The sea was calm, and the ship lay still.\n" * 40)
    status, output = run(
        "calibrate", MODEL, "--text", text, "--out", out,
        "--windows", 3, "--length", 64, "--scheme", "w4a8", "--error-budget", 0.5,
        "--resume", tmp_path / "partial",
    )  # fmt: skip
    assert status == 0, output
    assert "29 linears, 3 windows, 28 rounded, 0 with more than the scheme's bits" in output
    assert Recipe.load(out).scheme.activation_bits == 8
    assert not (tmp_path / "partial").exists()
    status, output = run("explain", MODEL, "--tokens", 4, "--recipe", out)
    assert status == 0, output


def test_calibrate_without_gptq(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "recipe.safetensors"
    text.write_text("The sea was calm, and the ship lay still.\n" * 40)
    arguments = ("--windows", 1, "--length", 64, "--no-gptq", "--out", out)
    status, output = run("calibrate", MODEL, "--text", text, *arguments)
    assert status == 0, output
    assert "29 linears, 1 windows\n" in output
    assert not Recipe.load(out).rounded


def test_calibrate_refuses_a_short_or_missing_text(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    arguments = ("calibrate", MODEL, "--text", text, "--out", tmp_path / "recipe.safetensors")
    status, output = run(*arguments)
    assert status == 2
    assert "text.txt is no file; give the text to calibrate on" in output
    text.write_text("Too short.")
    status, output = run(*arguments)
    assert status == 2
    assert "4 tokens, fewer than one window of 512" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "eval takes --text FILE or --dataset NAME, or --tasks NAMES"),
        (["--text", "a.txt", "--dataset", "b"], "--text or --dataset, not both"),
        (["--text", "a.txt", "--task-dir", "b"], "--task-dir goes with --tasks"),
        (["--text", "a.txt", "--scheme", "w4a4,w4"], "unknown scheme 'w4'"),
        (["--text", "nowhere.txt"], "nowhere.txt is no file; give a text to evaluate on"),
        (["--text", __file__, "--window", 4096], "positions end at 2048"),
        (["--text", __file__, "--window", 64, "--stride", 65], "the stride is 65"),
        (["--text", __file__, "--kv-cache", "kv5"], "unknown KV scheme 'kv5'"),
    ],
)
def test_eval_refuses_what_makes_no_sense(arguments: list[object], message: str) -> None:
    status, output = run("eval", MODEL, *arguments)
    assert status == 2
    assert message in output
    assert "Traceback" not in output


def test_eval_without_lm_eval_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "atom_compile.lm_eval_adapter", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    status, output = run("eval", MODEL, "--tasks", "arc_easy")
    assert status == 2
    assert "--tasks needs the package lm-eval" in output


def test_eval_prints_json_and_writes_files(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The sea was calm, and the ship lay still.\n" * 20)
    result = CliRunner(env=WIDE).invoke(
        app,
        [
            "eval", str(MODEL), "--text", str(text), "--scheme", "w4a8", "--window", "32",
            "--limit", "2", "--no-layers", "--json", "--out", str(tmp_path / "out"),
        ],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    exact, quantized = json.loads(result.stdout)["variants"]
    assert exact["perplexity"] > 1.0 and quantized["name"] == "w4a8"
    written = sorted(path.suffix for path in (tmp_path / "out").iterdir())
    assert written == [".json", ".png", ".txt"]
