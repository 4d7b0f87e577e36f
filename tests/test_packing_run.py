"""`atom-compile quantize`, `generate`, `doctor`, and the other commands on a packed model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from atom_compile import AtomError, load
from atom_compile.doctor import Finding, examine
from atom_compile.kernels import linear, two_level_linear
from atom_compile.packing_run import pack_folder

from .capturing import token_batch
from .test_cli import MODEL, run

TEXT = MODEL.parent / "text" / "calibration.txt"
SHORT = ["--windows", 2, "--length", 32]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "model"
    status, output = run("quantize", MODEL, path, "--scheme", "w4a8", "--max-shard-size", "2MB")
    assert (status, output.startswith("wrote")) == (0, True), output
    assert "28 linears packed" in output
    return path


def test_the_files_are_those_that_transformers_writes(packed: Path) -> None:
    names = {file.name for file in packed.iterdir()}
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json"} <= names
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    config = json.loads((packed / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "atom_compile"
    assert config["dtype"] == "bfloat16"
    assert not packed.with_name("model.partial").exists()


def test_generate(packed: Path) -> None:
    for options in ([], ["--kv-cache", "kv8"]):
        status, output = run("generate", packed, "--prompt", "The sea", "--tokens", 3, *options)
        assert status == 0, output
        assert output.startswith("The sea")


def test_eval_measures_it_as_it_is(packed: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT.read_text()[:2000])
    arguments = ["--text", text, "--window", 64, "--limit", 2, "--json"]
    status, output = run("eval", packed, *arguments)
    assert status == 0, output
    (variant,) = json.loads(output[output.index("{") :])["variants"]
    assert variant["name"].startswith("packed") and variant["perplexity"] > 1
    status, output = run("eval", packed, *arguments, "--scheme", "w4a4")
    assert status == 2
    assert "the model is packed already" in output


def test_explain_shows_it(packed: Path) -> None:
    status, output = run("explain", packed, "--json")
    assert status == 0, output
    layers = json.loads(output[output.index("{") :])["layers"]
    assert sum(layer["operator"] is not None for layer in layers) == 28


def test_calibration_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, calls = tmp_path / "out", list[Any]()

    def full_disk(*arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        raise AtomError("no space left on the device")

    quantizing = ["quantize", MODEL, out, "--calibration", TEXT, *SHORT]
    with monkeypatch.context() as patch:
        patch.setattr("atom_compile.packing_run.save", full_disk)
        status, output = run(*quantizing)
    assert (status, len(calls)) == (2, 1), output
    assert "no space left" in output
    assert {file.name for file in tmp_path.iterdir()} == {"out.partial"}
    status, output = run(*quantizing[:-1], 48)
    assert status == 2
    assert "is of another quantization" in output

    def again(*arguments: Any, **options: Any) -> None:
        raise AssertionError("it was calibrated a second time")

    with monkeypatch.context() as patch:
        patch.setattr("atom_compile.packing_run.calibrate", again)
        status, output = run(*quantizing)
    assert status == 0, output
    assert {file.name for file in tmp_path.iterdir()} == {"out"}
    model = load(out)
    assert model.config.quantization_config.recipe
    with torch.no_grad():
        assert model(token_batch(1, 8)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "w4a5"], "unknown scheme 'w4a5'"),
        (["--calibration", "absent.txt"], "absent.txt is no file"),
        (["--recipe", "absent.safetensors"], "is no file"),
        (["--recipe", "a", "--calibration", "b"], "--recipe or --calibration, not both"),
    ],
)
def test_wrong_options_write_nothing(options: list[Any], message: str, tmp_path: Path) -> None:
    status, output = run("quantize", MODEL, tmp_path / "out", *options)
    assert status == 2
    assert message in output
    assert not list(tmp_path.iterdir())


def test_a_packed_model_is_not_packed_again(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(AtomError, match="holds other files than a packed model's"):
        pack_folder(MODEL, MODEL, "w4a4")
    with pytest.raises(AtomError, match="quantized model already"):
        pack_folder(packed, tmp_path / "out", "w4a4")


def test_the_packed_model_is_the_one_that_quantize_makes(packed: Path) -> None:
    from atom_compile import quantize

    model, ids = AutoModelForCausalLM.from_pretrained(MODEL), token_batch()
    quantize(model, "w4a8", progress=False)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load(packed)(ids).logits)


def test_doctor_says_what_there_is() -> None:
    status, output = run("doctor")
    findings = examine()
    assert status == int(any(one.status == "error" for one in findings))
    by_name = {one.about: one for one in findings}
    assert by_name["torch"].status == "ok"
    assert "agrees with its definition" in by_name["atom::linear"].found
    assert all(one.about in output for one in findings)


def test_doctor_tells_a_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **named: Any) -> torch.Tensor:
        return torch.zeros(64, 256)

    def broken(*arguments: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(linear, "linear", wrong)
    monkeypatch.setattr(two_level_linear, "two_level_linear", broken)
    found = {one.about: one for one in examine()}
    assert found["atom::linear"] == Finding(
        "atom::linear", "relative error 1.0e+00", "error", "the kernel is wrong here"
    )
    assert found["atom::two_level_linear"].found == "RuntimeError: no kernel image"
    status, _ = run("doctor")
    assert status == 1
