"""The benchmark of the host's time: its rows and files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from atom_compile.cli import app

TORCH = ["F.linear", "torch.add", "torch.empty_like"]


def test_every_operator_has_a_row(tmp_path: Path) -> None:
    arguments = ["bench", "--level", "overhead", "--device", "cpu", "--quick", "--out", tmp_path]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("host-overhead-*.json")
    rows = json.loads(path.read_text())["rows"]
    ours = ["linear", "norm_quantize", "gated_quantize", "quantize"]
    of_attention = ["rope_append", "attention_quantize"]
    assert [row["op"] for row in rows] == [*ours, *of_attention, *TORCH]
    assert all(row["operator_us"] > 0 and row["launcher_us"] is None for row in rows)


@pytest.mark.parametrize("scheme", ["w4a16", "w6a16", "nvfp4"])
def test_weight_only_linears_quantize_nothing(scheme: str, tmp_path: Path) -> None:
    arguments = ["bench", "--level", "overhead", "--device", "cpu", "--quick", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--scheme", scheme, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    operators = [row["op"] for row in json.loads(result.stdout)["rows"]]
    assert operators == ["weight_only_linear", *TORCH]


def test_linears_in_float8_and_what_quantizes_for_them(tmp_path: Path) -> None:
    arguments = ["bench", "--level", "overhead", "--device", "cpu", "--quick", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--scheme", "w6a8", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    operators = [row["op"] for row in json.loads(result.stdout)["rows"]]
    assert operators == ["float8_linear", "quantize_e4m3", *TORCH]


def test_json_is_all_that_stdout_gets_and_the_page_is_written(tmp_path: Path) -> None:
    page = tmp_path / "new" / "report.html"
    arguments = ["bench", "--level", "overhead", "--device", "cpu", "--quick", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path), "--html", str(page)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == json.loads(next(tmp_path.glob("*.json")).read_text())
    assert "report.html" in result.stderr
    assert page.read_text().count('<th scope="row">') == len(json.loads(result.stdout)["rows"])


def test_options_of_other_levels_are_refused() -> None:
    for level, option in (("overhead", "--tokens=1"), ("model", "--only=norm")):
        result = CliRunner().invoke(app, ["bench", "--level", level, option])
        assert result.exit_code == 2
        assert "leave it out" in result.output
    result = CliRunner().invoke(app, ["bench", "--level", "operators", "--layers", "2"])
    assert result.exit_code == 2
    assert "does not go by --layers" in result.output
