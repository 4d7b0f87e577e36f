"""Perplexity on text: over pieces spread over it, or over all of it by a sliding window."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import AtomError, EvaluationError, OptionError, unknown
from .progress import track

Forward = Callable[[Tensor], Tensor]
"""input_ids (B, T) -> logits (B, T, vocabulary)."""

# name -> (repository, configuration, split, column); the text is the rows, a blank line between
DATASETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    "wikitext103": ("Salesforce/wikitext", "wikitext-103-raw-v1", "test", "text"),
    "lambada": ("EleutherAI/lambada_openai", "default", "test", "text"),
}
_FALLBACK_WINDOW = 2048  # of a model whose configuration states no longest text, and at most


def text_windows(tokenizer: Any, text: str, windows: int, length: int) -> Tensor:
    """Pieces of `text`, spread evenly over it: (windows, length) int64.

    tokenizer: a transformers tokenizer. A short text gives fewer windows, and an AtomError if it
        fills not even one.
    """
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    if len(ids) < length:
        raise AtomError(f"the text has {len(ids)} tokens, fewer than one window of {length}")
    starts = torch.linspace(0, len(ids) - length, min(windows, len(ids) // length)).long()
    return torch.stack([ids[start : start + length] for start in starts])


@torch.no_grad()
def perplexity(model: Any, batches: Iterable[Tensor], cache: Any = None) -> float:
    """exp of the mean loss per predicted token. batches: `input_ids` (batch, length) each.

    cache: a `KVCache` that keys and values go through, emptied for each batch.
    """
    forward = forward_of(model, cache)
    total, count = 0.0, 0
    for input_ids in batches:
        logits = forward(input_ids)[:, :-1].flatten(0, 1).float()
        targets = input_ids[:, 1:].flatten()
        total += F.cross_entropy(logits, targets, reduction="sum").item()
        count += targets.numel()
    return math.exp(total / count)


def forward_of(model: Any, cache: Any = None) -> Forward:
    """A transformers model, compiled or not, as a function from tokens to logits.

    cache: a `KVCache` that keys and values go through, emptied for each call.
    """

    def forward(input_ids: Tensor) -> Tensor:
        through: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            cache.reset()
            through = {"past_key_values": cache}
        logits: Tensor = model(input_ids, **through).logits
        return logits

    return forward


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `end` of a text, of which those from `scored` on are predicted."""

    start: int
    end: int
    scored: int


def sliding_windows(
    tokens: int, window: int, stride: int, limit: int | None = None
) -> list[Window]:
    """Windows of equal length that predict each token of a text once, all but the first.

        window 6, stride 2:   . 1 2 3 4 5
                                  . . . . 6 7
                                      . . . . 8 9        dots: context alone

    The last window ends with the text and has more context instead of fewer tokens. With stride =
    window nothing precedes a window's first token, and it is not predicted. A text shorter than the
    window is one window.

    limit: at most so many of them, spread evenly.
    """
    check_window(window, stride)
    if tokens < 2:
        raise EvaluationError(f"the text has {tokens} tokens; at least 2 are needed to predict one")
    window = min(window, tokens)
    windows: list[Window] = []
    done = 0
    while done < tokens:
        start = min(len(windows) * stride, tokens - window)
        windows.append(Window(start, start + window, max(done, start + 1)))
        done = start + window
    if limit is None or limit >= len(windows):
        return windows
    return [windows[round(at)] for at in torch.linspace(0, len(windows) - 1, limit).tolist()]


def check_window(window: int, stride: int, config: Any = None) -> None:
    """Raises OptionError if they make no sense, or are more than the model of `config` takes."""
    if window < 2:
        raise OptionError(f"the window is {window}; it must be at least 2 tokens")
    if not 1 <= stride <= window:
        raise OptionError(
            f"the stride is {stride}; it must be 1 to the window, which is {window}, "
            "or tokens between two windows are left out"
        )
    longest = longest_text(config)
    if longest is not None and window > longest:
        raise OptionError(
            f"the window is {window} tokens, and the model's positions end at {longest}: "
            f"give a window of at most {longest}"
        )


def longest_text(config: Any) -> int | None:
    """How many positions a model of this configuration has, if it says so."""
    if config is None:
        return None
    longest: int | None = getattr(
        config.get_text_config(decoder=True), "max_position_embeddings", None
    )
    return longest


def default_window(config: Any) -> int:
    return min(longest_text(config) or _FALLBACK_WINDOW, _FALLBACK_WINDOW)


@dataclass(frozen=True)
class TextLoss:
    """The summed loss (nats) of each window, and how many tokens it predicts."""

    losses: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    @property
    def perplexity(self) -> float:
        return math.exp(sum(self.losses) / self.tokens)

    def ratio(self, other: TextLoss) -> tuple[float, float | None]:
        """This perplexity over `other`'s on the same windows, and the ratio's standard error.

        The error is that of the mean difference in loss, window by window, so what makes a window
        hard for both does not count. None for a single window.
        """
        differences = torch.tensor(self.losses).double() - torch.tensor(other.losses).double()
        counts = torch.tensor(self.counts).double()
        mean = differences.sum() / counts.sum()
        ratio = mean.exp().item()
        number = len(self.losses)
        if number < 2:
            return ratio, None
        spread = (differences - mean * counts).square().sum() * number / (number - 1)
        return ratio, ratio * (spread.sqrt() / counts.sum()).item()


@torch.no_grad()
def text_loss(
    forward: Forward,
    ids: Tensor,
    windows: Sequence[Window],
    *,
    batch: int = 1,
    device: torch.device | str = "cpu",
    progress: str | None = None,
) -> TextLoss:
    """ids (tokens,) of a whole text -> what each window's scored tokens cost.

    batch: windows at a time; the last call is filled up, so that all have one shape.
    progress: what the progress bar says; None shows none.
    """
    losses: list[float] = []
    starts = range(0, len(windows), batch)
    for at in track(starts, progress or "", shown=progress is not None):
        some = windows[at : at + batch]
        filled = [*some, *[some[-1]] * (batch - len(some))]
        input_ids = torch.stack([ids[one.start : one.end] for one in filled]).to(device)
        logits = forward(input_ids)
        losses += [
            _scored_loss(row, tokens, one)
            for row, tokens, one in zip(logits, input_ids, some, strict=False)
        ]
    return TextLoss(tuple(losses), tuple(one.end - one.scored for one in windows))


def _scored_loss(logits: Tensor, ids: Tensor, window: Window) -> float:
    """logits (T, vocabulary), ids (T,) -> the loss of the scored tokens, each by the one before."""
    first = window.scored - window.start
    return F.cross_entropy(logits[first - 1 : -1].float(), ids[first:], reduction="sum").item()


def read_text(path: Path) -> str:
    """Raises EvaluationError for what is no text or is empty."""
    if not path.is_file():
        raise EvaluationError(f"{path} is no file; give a text to evaluate on")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path} is no UTF-8 text: {error}") from error
    return _not_empty(text, str(path))


def read_dataset(name: str) -> str:
    """A text of the `datasets` package, an optional dependency.

    name: one of `DATASETS`, a repository or folder with a column `text`, or
        "repository:configuration:split", where the last two may be left out.
    """
    try:
        import datasets
    except ImportError:
        raise EvaluationError(
            "--dataset needs the package datasets: pip install 'atom-compile[eval]', "
            "or give a file with --text"
        ) from None
    repository, configuration, split, column = _dataset(name)
    try:
        rows = datasets.load_dataset(repository, configuration, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise EvaluationError(f"the dataset {name!r} cannot be loaded: {error}") from error
    if column not in rows.column_names:
        raise EvaluationError(unknown(f"column of {name!r}", column, rows.column_names))
    return _not_empty("\n\n".join(rows[column]), name)


def _dataset(name: str) -> tuple[str, str | None, str, str]:
    if name in DATASETS:
        return DATASETS[name]
    repository, configuration, split, *more = [*name.split(":"), "", ""]
    if not repository or any(more):
        raise OptionError(
            f"the dataset is {name!r}; it must be one of {', '.join(DATASETS)}, or "
            "repository:configuration:split"
        )
    if "/" not in repository and not Path(repository).is_dir():
        raise OptionError(
            unknown("dataset", repository, DATASETS) + "; or give owner/name, or a folder"
        )
    return repository, configuration or None, split or "test", "text"


def _not_empty(text: str, source: str) -> str:
    if not text.strip():
        raise EvaluationError(f"{source} is empty: there is nothing to evaluate on")
    return text
