"""Perplexity by a sliding window, and where texts come from."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from atom_compile import AtomError
from atom_compile.errors import EvaluationError, OptionError
from atom_compile.evaluate import (
    TextLoss,
    check_window,
    read_dataset,
    read_text,
    sliding_windows,
    text_loss,
)

VOCABULARY = 7


def bigram(ids: Tensor) -> Tensor:
    """A model that goes by the token before, so that a window's start changes nothing."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(VOCABULARY, VOCABULARY, generator=generator)[ids]


@pytest.mark.parametrize("tokens", [2, 5, 6, 7, 20, 23])
@pytest.mark.parametrize("stride", [1, 2, 5])
def test_windows_score_every_token_but_the_first_once(tokens: int, stride: int) -> None:
    windows = sliding_windows(tokens, 6, stride)
    scored = [at for one in windows for at in range(one.scored, one.end)]
    assert scored == list(range(1, tokens))
    assert {one.end - one.start for one in windows} == {min(6, tokens)}
    assert windows[-1].end == tokens


def test_only_tokens_past_the_stride_are_scored() -> None:
    first, *rest = sliding_windows(18, 6, 2)
    assert first.scored == 1
    assert all(one.scored == one.start + 4 for one in rest)


def test_windows_side_by_side_leave_out_their_first_token() -> None:
    windows = sliding_windows(12, 6, 6)
    assert [(one.start, one.scored, one.end) for one in windows] == [(0, 1, 6), (6, 7, 12)]


def test_a_limit_spreads_the_windows() -> None:
    windows = sliding_windows(60, 6, 6, limit=3)
    assert [one.start for one in windows] == [0, 24, 54]
    assert sliding_windows(12, 6, 6, limit=5) == sliding_windows(12, 6, 6)


@pytest.mark.parametrize("batch", [1, 4])
def test_the_loss_is_that_of_the_whole_text(batch: int) -> None:
    ids = torch.randint(VOCABULARY, (23,), generator=torch.Generator().manual_seed(1))
    found = text_loss(bigram, ids, sliding_windows(23, 6, 2), batch=batch)
    wanted = F.cross_entropy(bigram(ids)[:-1], ids[1:]).exp().item()
    assert found.tokens == 22
    assert found.perplexity == pytest.approx(wanted, rel=1e-6)


def test_every_call_has_one_shape() -> None:
    shapes = set()

    def forward(ids: Tensor) -> Tensor:
        shapes.add(tuple(ids.shape))
        return bigram(ids)

    text_loss(forward, torch.arange(23) % VOCABULARY, sliding_windows(23, 6, 2), batch=4)
    assert shapes == {(4, 6)}


def test_the_ratio_has_an_error_of_its_own() -> None:
    exact = TextLoss((10.0, 30.0, 20.0), (10, 10, 10))
    worse = TextLoss((11.0, 31.0, 21.0), (10, 10, 10))
    ratio, error = worse.ratio(exact)
    assert ratio == pytest.approx(math.exp(0.1))
    assert error == pytest.approx(0.0, abs=1e-9)  # windows are hard in different degrees, not this
    assert TextLoss((10.0,), (10,)).ratio(TextLoss((9.0,), (10,)))[1] is None


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [
        (1, 1, "the window is 1; it must be at least 2 tokens"),
        (8, 9, "the stride is 9; it must be 1 to the window, which is 8"),
        (8, 0, "the stride is 0"),
        (129, 8, "positions end at 128: give a window of at most 128"),
    ],
)
def test_windows_that_make_no_sense(window: int, stride: int, message: str) -> None:
    config = SimpleNamespace(max_position_embeddings=128)
    config.get_text_config = lambda decoder: config
    with pytest.raises(OptionError, match=message):
        check_window(window, stride, config)


def test_a_text_of_one_token() -> None:
    with pytest.raises(EvaluationError, match="the text has 1 tokens; at least 2"):
        sliding_windows(1, 6, 2)


def test_texts_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="is no file; give a text to evaluate on"):
        read_text(tmp_path / "nowhere.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(EvaluationError, match="is empty: there is nothing to evaluate on"):
        read_text(tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(EvaluationError, match="is no UTF-8 text"):
        read_text(tmp_path / "binary.txt")


class Rows(dict[str, list[str]]):
    """What `datasets.load_dataset` gives, as far as it is read."""

    column_names = ("text",)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A stand-in for the package `datasets`; the calls that it got."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, configuration: str | None, *, split: str) -> Rows:
        calls.append((name, configuration, split))
        return Rows(text=["one", "two"] if split == "test" else [""])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_datasets_by_their_short_names(loaded: list[tuple[Any, ...]]) -> None:
    assert read_dataset("wikitext2") == "one\n\ntwo"
    assert read_dataset("owner/name:part") == "one\n\ntwo"
    assert loaded == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"),
        ("owner/name", "part", "test"),
    ]


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wikitext", "unknown dataset 'wikitext'; did you mean 'wikitext2'"),
        ("a/b:c:d:e", "must be one of wikitext2, .*, or repository:configuration:split"),
        ("a/b:c:train", "a/b:c:train is empty"),
    ],
)
def test_datasets_that_are_none(name: str, message: str) -> None:
    with pytest.raises(AtomError, match=message):
        read_dataset(name)


def test_datasets_is_an_optional_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EvaluationError, match="needs the package datasets: pip install"):
        read_dataset("wikitext2")


def test_a_dataset_from_local_files(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "test.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_dataset(str(tmp_path)) == "one\n\ntwo"
