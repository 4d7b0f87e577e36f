"""The benchmark of a whole model: rows, processes, files. Nothing is compiled, no time asserted."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from atom_compile.bench import Shape, model, run_model
from atom_compile.bench.model import Plan
from atom_compile.bench.model_result import ModelResult, ModelRow
from atom_compile.errors import OptionError
from atom_compile.scheme import Scheme

TINY = Shape(name="tiny", hidden=128, intermediate=256, heads=2, kv_heads=1, head_dim=64)
PLAN = Plan(
    shape=TINY,
    scheme=Scheme(),
    variant="baseline",
    phases=("decode", "prefill"),
    batches=(1, 2),
    length=16,
    device="cpu",
    steps=8,
)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without compiling: what atom's backend makes of a model is tested elsewhere."""
    monkeypatch.setattr(model, "rows_of_process", lambda plan, _: model.measure_variant(plan))
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("in_this_process")
def test_every_variant_has_a_row_for_every_phase_and_batch(tmp_path: Path) -> None:
    seen: list[int] = []
    result = run_model(
        TINY,
        layers=1,
        variants=["baseline", "kv4"],
        batch=[1, 2],
        length=[16],
        device="cpu",
        warm_cache=True,
        quick=True,
        on_rows=lambda so_far: seen.append(len(so_far.rows)),
    )
    assert result.failures == []
    assert seen == [3, 6]
    cases = [("decode", 1), ("decode", 2), ("prefill", 1)]
    assert [(r.variant, r.phase, r.batch) for r in result.rows] == [
        (variant, *case) for variant in ("baseline", "kv4") for case in cases
    ]
    for row in result.rows:
        assert row.median_ms is not None and row.warm_first_call_s is not None
        assert (result.speedup(row) is None) == (row.variant == "baseline")
        assert row.tokens == (16 if row.phase == "prefill" else row.batch)
    assert all(row.error is not None and row.error < 1 for row in result.rows)
    paths = result.save(tmp_path)
    assert [path.suffix for path in paths] == [".json", ".txt", ".png", ".svg"]
    data = json.loads(paths[0].read_text())
    assert data["environment"]["layers"] == 1
    assert {"tokens_per_s", "speedup", "peak_gb", "first_call_s"} <= set(data["rows"][0])
    assert max(map(len, _printed(result).splitlines())) <= 80


@pytest.mark.parametrize("variant", ["static", "kv4"])
def test_int4_variants_reach_the_backend(variant: str, graphs_run_eagerly: list[Any]) -> None:
    plan = Plan.from_json(
        Plan(**{**vars(PLAN), "variant": variant, "phases": ("decode",), "batches": (2,)}).to_json()
    )
    (row,) = model.measure_variant(plan)
    assert row.failure is None
    called = {str(node.target) for gm in graphs_run_eagerly for node in gm.graph.nodes}
    assert "atom.linear.default" in called
    assert ("atom.rope_append.default" in called) == (variant == "kv4")


def test_a_process_that_dies_leaves_rows_that_say_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = ModelRow(variant="baseline", phase="decode", batch=1, median_ms=1.0)
    program = (
        "import json, sys; print('a warning of some library');"
        f"print({model._ROW!r} + {json.dumps(vars(row))!r}); sys.exit('out of memory')"
    )
    monkeypatch.setattr(model, "_PROGRAM", program)
    rows = list(model.rows_of_process(PLAN, tmp_path))
    assert rows[0] == row
    assert [(r.phase, r.batch, r.failure) for r in rows[1:]] == [
        (*case, "its process ended with status 1: out of memory")
        for case in (("decode", 2), ("prefill", 1))
    ]


def test_a_wrong_model_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    true_call = model._Case._call

    def wrong(self: Any, called: Any, *rest: Any) -> torch.Tensor:
        return true_call(self, called, *rest) * (1 if called == self.model.forward else -1)

    monkeypatch.setattr(model._Case, "_call", wrong)
    with torch.compiler.set_stance("force_eager"):
        row = next(model.measure_variant(PLAN))
    assert row.failure == "its relative error of 2 is over 0.2"
    assert row.median_ms is None


def _printed(result: ModelResult) -> str:
    console = Console(width=80, file=io.StringIO(), record=True)
    result.print(console)
    return console.export_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variants": ["kv5"]}, "unknown variant 'kv5'; did you mean 'kv4'"),
        ({"phases": ["decoding"]}, "unknown phase 'decoding'"),
        ({"length": [8], "quick": True}, "length is 8; it must be over 11"),
        ({"model": "llama3-8"}, "unknown model 'llama3-8'"),
        ({"device": "cud"}, "unknown device 'cud'"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        run_model(**arguments)
