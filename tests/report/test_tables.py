from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

import atom_compile
from atom_compile import KVCache
from atom_compile.report import tables

from ..capturing import token_batch
from ..models import tiny_llama


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    model = tiny_llama()
    cache = KVCache(model.config, 2, 32, device="cpu")
    return atom_compile.explain(model, token_batch(), past_key_values=cache).to_dict()


def printed(data: dict[str, Any], **options: Any) -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=options.pop("encoding", "utf-8"))
    Console(file=file, width=80, **options).print(tables.report_tables(data))
    file.seek(0)
    return file.read()


def test_tables_fit_80_columns_and_cut_nothing(data: dict[str, Any]) -> None:
    text = printed(data)
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    assert "…" not in text and "\x1b" not in text
    for told in (
        *("model.layers.*.self_attn.q_proj (2)", "512 rows", "attention_quantize", "w4a4"),
        *("4 on 2 x 64", "it is the output head", "+4 atom.norm_quantize"),
    ):
        assert told in text, told


@pytest.mark.parametrize(
    ("formats", "told"),
    [
        ({}, "w4a4, 32 outliers"),  # a report of an older version
        ({"weight_format": "int", "activation_format": "int"}, "w4a4, 32 outliers"),
        ({"weight_format": "e2m1", "activation_format": "e2m1"}, "w4a4 e2m1, 32 outliers"),
        ({"weight_format": "e2m1", "activation_format": None}, "w4a4, e2m1 weights, 32 outliers"),
        (
            {"weight_format": "int", "activation_format": "e2m1"},
            "w4a4, e2m1 activations, 32 outliers",
        ),
    ],
)
def test_formats_that_are_not_integers_are_told(formats: dict[str, Any], told: str) -> None:
    layer = {"weight_bits": 4, "activation_bits": 4, "outlier_channels": 32}
    assert tables.numbers_of(layer | formats) == told


def test_without_unicode_the_lines_are_ascii(data: dict[str, Any]) -> None:
    printed(data, encoding="ascii").encode("ascii")


def test_errors_show_where_the_recipe_knows_them(data: dict[str, Any]) -> None:
    assert "error" not in printed(data)
    layers = [{**data["layers"][0], "error": 0.0123}, *data["layers"][1:]]
    assert "0.012" in printed({**data, "layers": layers})


def test_notes_are_numbered_once(data: dict[str, Any]) -> None:
    text = printed(data)
    notes = [line for line in text.splitlines() if line.startswith("[")]
    assert [line.split()[0] for line in notes] == [f"[{i + 1}]" for i in range(len(notes))]
    assert sum("narrow: 32" in line for line in notes) == 1
