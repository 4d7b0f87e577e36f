from __future__ import annotations

import json
from pathlib import Path

import pytest

import atom_compile
from atom_compile import AtomError, Report

from ..capturing import token_batch
from ..models import tiny_llama


@pytest.fixture(scope="module")
def reports() -> tuple[Report, Report]:
    model, ids = tiny_llama(layers=1), token_batch()
    skipping = {"scheme": "w4a8", "skip": ["*.o_proj.weight"]}
    return atom_compile.explain(model, ids), atom_compile.explain(model, ids, options=skipping)


def test_a_report_does_not_differ_from_itself(reports: tuple[Report, Report]) -> None:
    same = atom_compile.diff(reports[0], reports[0])
    assert not same
    assert "no difference" in str(same)


def test_two_schemes(reports: tuple[Report, Report]) -> None:
    found = atom_compile.diff(*reports)
    assert found
    assert ("activation_bits", 4, 8) in found.scheme
    assert ("atom.linear", 4, 3) in found.operators
    changed = {name: (a, b) for name, a, b in found.layers}
    a, b = changed["model.layers.0.self_attn.o_proj.weight"]
    assert (a["operator"], b["operator"]) == ("atom.linear + residual", None)
    assert "lm_head.weight" not in changed
    text = str(found)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "weight_bytes_after" in text and "skip='*.o_proj.weight'" in text


def test_the_same_change_of_every_block_shares_a_row() -> None:
    model, ids = tiny_llama(layers=2), token_batch()
    a, b = (atom_compile.explain(model, ids, options={"scheme": s}) for s in ("w4a4", "w4a8"))
    names = [what for what, _, _ in atom_compile.diff(a, b).rows()["layers"]]
    assert "model.layers.*.self_attn.q_proj.weight (2)" in names
    assert len(names) == 7


def test_saved_reports_compare_as_live_ones(reports: tuple[Report, Report], tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for report, path in zip(reports, paths, strict=True):
        report.save(path)
    found, live = atom_compile.diff(*paths), atom_compile.diff(*reports)
    assert found.names == (str(paths[0]), str(paths[1]))
    wanted = json.loads(json.dumps(live.to_dict() | {"names": list(found.names)}))
    assert json.loads(json.dumps(found.to_dict())) == wanted


def test_html_has_every_row_of_the_text(reports: tuple[Report, Report], tmp_path: Path) -> None:
    found = atom_compile.diff(*reports)
    found.save_html(tmp_path / "diff.html")
    page = (tmp_path / "diff.html").read_text()
    assert page.count('<th scope="row">') == sum(len(rows) for rows in found.rows().values())
    assert "http" not in page.replace("http-equiv", "")
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "is no report"),
        ('{"format": "atom_compile report", "version": 99}', "reads up to 1. Upgrade"),
        ('{"format": "atom_compile report", "version": 1}', "is damaged: it lacks attentions"),
    ],
)
def test_what_is_no_report(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(AtomError, match=message):
        atom_compile.diff(path, path)
    with pytest.raises(AtomError, match="is no file"):
        atom_compile.diff(tmp_path / "nowhere.json", path)
