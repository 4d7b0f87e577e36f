"""The adapter to lm-eval: likelihoods by hand, and a task that local files define."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from .models import tiny_llama

pytest.importorskip("lm_eval", reason="lm-eval is an optional dependency")

from atom_compile.errors import EvaluationError
from atom_compile.kv_cache import KVCache
from atom_compile.lm_eval_adapter import AtomLM, find_tasks, run_tasks

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: "{data}"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
"""


class Letters:
    """A tokenizer: a character is its code, modulo the vocabulary."""

    eos_token_id, bos_token_id, name_or_path = 0, 1, "letters"

    def __call__(self, text: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(one) % 96 for one in text])

    def decode(self, tokens: list[int], **_: Any) -> str:
        return "".join(chr(one + (96 if one < 32 else 0)) for one in tokens)


def adapter(**options: Any) -> AtomLM:
    model = tiny_llama()
    return AtomLM(model, model.config, Letters(), **{"longest": 48, **options})


def request(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def by_hand(context: str, continuation: str) -> float:
    """The log-likelihood of `continuation`, from one call of the model."""
    ids = torch.tensor([Letters()(context + continuation).input_ids])
    with torch.no_grad():
        scores = tiny_llama()(ids).logits[0].log_softmax(-1)
    places = range(len(context), len(context + continuation))
    return float(sum(scores[at - 1, ids[0, at]].item() for at in places))


@pytest.mark.parametrize("batch", [1, 3])
def test_likelihoods_whatever_stands_beside_them(batch: int) -> None:
    pairs = [("the sea", " was calm"), ("a", "b"), ("the ship lay", " still"), ("one", " two")]
    found = adapter(batch=batch).loglikelihood([request(*pair) for pair in pairs], True)
    wanted = [by_hand(*pair) for pair in pairs]
    assert [likely for likely, _ in found] == pytest.approx(wanted, abs=1e-3)


def test_a_long_context_is_cut_at_the_left() -> None:
    context = ("once upon a time " * 6).strip()
    ((found, _),) = adapter().loglikelihood([request(context, "ab")], True)
    assert found == pytest.approx(by_hand(context[-47:], "ab"), abs=1e-3)


def test_a_whole_text_is_predicted_token_by_token() -> None:
    (found,) = adapter().loglikelihood_rolling([request("the sea was calm")])
    assert found == pytest.approx(by_hand("\x01", "the sea was calm"), abs=1e-3)


def test_generation_is_the_model_s_own_and_stops() -> None:
    lm = adapter()
    (text,) = lm.generate_until([request("the sea", {"until": [], "max_gen_toks": 6})])
    ids = torch.tensor([Letters()("the sea").input_ids])
    out = tiny_llama().generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=0)
    assert text == Letters().decode(out[0, 7:].tolist())
    stop = text[2]
    (stopped,) = lm.generate_until([request("the sea", {"until": stop, "max_gen_toks": 6})])
    assert stopped == text[: text.index(stop)]


def test_a_kv_cache_serves_likelihoods_and_generation() -> None:
    cache = KVCache(tiny_llama().config, 2, 48, "kv16", device="cpu")
    lm = adapter(cache=cache, batch=2)
    ((found, _),) = lm.loglikelihood([request("the sea", " was calm")], True)
    assert found == pytest.approx(by_hand("the sea", " was calm"), abs=1e-3)
    how = {"until": [], "max_gen_toks": 6}
    assert lm.generate_until([request("a", how)]) == adapter().generate_until([request("a", how)])


def test_sampling_is_refused() -> None:
    with pytest.raises(EvaluationError, match="only greedy generation is supported"):
        adapter().generate_until([request("a", {"until": ["b"], "do_sample": True})])


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """A task of three questions; the right answers are what the model finds likeliest, but one."""
    lines = []
    for question, wrong in (("the sea", False), ("a ship", False), ("one", True)):
        choices = [" was calm", " lay still"]
        likely = int(by_hand(question, choices[1]) > by_hand(question, choices[0]))
        label = 1 - likely if wrong else likely
        lines.append(json.dumps({"question": question, "choices": choices, "label": label}))
    data = tmp_path / "test.jsonl"
    data.write_text("\n".join(lines))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "sea.yaml").write_text(TASK.format(name="sea", data=data))
    (tasks / "lost.yaml").write_text(TASK.format(name="lost", data=tmp_path / "nowhere.jsonl"))
    return tasks


def test_a_task_defined_from_local_files(task_folder: Path) -> None:
    found = run_tasks(adapter(batch=2), ["sea"], find_tasks(["sea"], task_folder))
    assert found["sea"]["acc"] == pytest.approx(2 / 3)
    assert found["sea"]["acc_stderr"] > 0.0
    limited = run_tasks(adapter(), ["sea"], find_tasks(["sea"], task_folder), limit=2)
    assert limited["sea"]["acc"] == 1.0


def test_tasks_that_are_none(task_folder: Path) -> None:
    with pytest.raises(EvaluationError, match="nowhere is no folder; give one with"):
        find_tasks(["sea"], task_folder / "nowhere")
    with pytest.raises(EvaluationError, match="lm-eval cannot run lost: "):
        run_tasks(adapter(), ["lost"], find_tasks(["lost"], task_folder))


def test_an_unknown_task_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = SimpleNamespace(all_tasks=["arc_easy", "sea"], match_tasks=lambda names: [])
    monkeypatch.setattr("atom_compile.lm_eval_adapter.TaskManager", lambda **_: manager)
    with pytest.raises(EvaluationError, match="unknown task 'arc_esy'; did you mean 'arc_easy'"):
        find_tasks(["arc_esy"])
