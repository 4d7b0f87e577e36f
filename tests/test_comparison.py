"""Schemes beside 16 bits: what is measured, what is printed, what is written."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from atom_compile.comparison import Comparison, Text, Variant, compare, short_name
from atom_compile.errors import EvaluationError, OptionError
from atom_compile.evaluate import TextLoss
from atom_compile.signal_noise import LayerNoise

from .models import tiny_llama

TEXT = "the sea was calm, and the ship lay still. " * 4


def tokenizer(text: str, **_: Any) -> SimpleNamespace:
    return SimpleNamespace(input_ids=[ord(one) % 96 for one in text])


def text_of(model: Any, **options: Any) -> Text:
    return Text.of(TEXT, tokenizer, model.config, **options)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    model = tiny_llama()
    text = text_of(model, window=32, stride=16, limit=3)
    return compare(model, tokenizer, ["w4a8"], kv_cache="kv8", text=text, batch=2, progress=False)


def test_a_scheme_beside_16_bits(comparison: Comparison) -> None:
    exact, quantized = comparison.variants
    assert (exact.name, quantized.name) == ("float32", "w4a8 + kv8")
    assert exact.text is not None and quantized.text is not None
    assert exact.text.perplexity != quantized.text.perplexity
    ratio, error = comparison.ratio(quantized) or (0.0, None)
    assert ratio == pytest.approx(1.0, abs=0.1) and error is not None and error < 0.1
    assert len(quantized.layers) == 14


def test_it_is_written_as_data_tables_and_plot(comparison: Comparison, tmp_path: Path) -> None:
    paths = comparison.save(tmp_path / "new")
    assert [path.suffix for path in paths] == [".json", ".txt", ".png"]
    assert sorted(paths) == sorted((tmp_path / "new").iterdir())  # nothing unfinished beside them
    record = json.loads(paths[0].read_text())
    assert record["environment"]["text"]["window"] == 32
    assert record["environment"]["text"]["windows"] == 3
    assert record["variants"][1]["layers"][0]["alone_db"] > 5.0


def made_up(schemes: int, layers: int) -> Comparison:
    loss = TextLoss((30.0, 20.0), (10, 10))
    tasks = {"arc_challenge": {"acc": 0.25, "acc_stderr": 0.01, "exact_match,strict": 0.5}}
    noises = [
        LayerNoise(f"model.layers.{at}.self_attn.q_proj.weight", 100.0, 1.0 + at, 100.0, 2.0)
        for at in range(layers)
    ]
    variants = [Variant("bfloat16", text=loss, tasks=tasks)]
    variants += [
        Variant(f"w4a4-rotated + kv{at}", text=loss, tasks=tasks, layers=noises)
        for at in range(schemes)
    ]
    environment = {
        "model": "a-model", "device": "cpu", "torch": "2", "date": "2026-01-01", "baseline": "b",
        "text": {"source": "[a].txt", "windows": 2, "window": 8, "stride": 4,
                 "predicted_tokens": 20},
    }  # fmt: skip
    return Comparison(environment, variants)


@pytest.mark.parametrize("schemes", [1, 3, 4])
def test_tables_fit_80_columns(schemes: int, tmp_path: Path) -> None:
    console = Console(width=80, record=True, file=(tmp_path / "out").open("w"))
    made_up(schemes, layers=40).print(console)
    printed = console.export_text()
    assert max(map(len, printed.splitlines())) <= 80
    assert "a-model on [a].txt" in printed
    assert "the 32 worst of 40" in " ".join(printed.split())
    assert "39.self_attn.q_proj" in printed and "\n 7.self_attn" not in printed
    assert "0.250±0.010" in printed


def test_what_makes_no_sense_is_refused_before_anything_runs() -> None:
    model = tiny_llama()
    with pytest.raises(EvaluationError, match="nothing to evaluate on: give a text, a dataset"):
        compare(model, tokenizer, ["w4a4"])
    with pytest.raises(OptionError, match="unknown scheme 'w4'"):
        compare(model, tokenizer, ["w4"], text=text_of(model))
    with pytest.raises(OptionError, match="unknown KV scheme 'kv5'"):
        compare(model, tokenizer, ["w4a4"], kv_cache="kv5", text=text_of(model))
    with pytest.raises(OptionError, match="the batch is 0"):
        compare(model, tokenizer, ["w4a4"], text=text_of(model), batch=0)
    with pytest.raises(OptionError, match="the window is 129 tokens"):
        text_of(model, window=129)


def test_layers_have_short_names() -> None:
    assert short_name("model.layers.3.mlp.up_proj.weight") == "3.mlp.up_proj"
    assert short_name("towers.1.out") == "1.out"
    assert short_name("lm_head.weight") == "lm_head"
