"""Zero-shot tasks of EleutherAI's lm-evaluation-harness, an optional dependency.

Importing this module imports lm_eval. The adapter runs whatever maps tokens to logits, so the
16-bit model and its compiled forms go through the same code, and pads batches to few shapes, so
that a compiled model is not compiled again for each length.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from .errors import AtomError, EvaluationError, unknown
from .evaluate import Forward, forward_of
from .kv_cache import KVCache
from .progress import track

Pair = tuple[list[int], list[int]]
"""Tokens of a context, and of the continuation whose likelihood is asked for."""

_STEP = 64  # lengths are filled up to a multiple
_MOST_NEW = 256  # tokens of a generation whose task does not say
_BOOTSTRAPS = 1000


class AtomLM(TemplateLM):  # type: ignore[misc]
    """A causal language model, compiled or not, as lm-eval wants one.

    model: a transformers model, or a function of the same arguments that was compiled from it.
    config: the model's configuration. tokenizer: its tokenizer.
    cache: a `KVCache` for `batch` sequences of `longest` tokens that keys and values go through.
    longest: tokens of context and continuation together; what is over is cut off at the left.

    Generation is greedy, one text at a time. It goes through the cache; without one, through one
    in 16 bits.
    """

    def __init__(
        self,
        model: Any,
        config: Any,
        tokenizer: Any,
        *,
        longest: int,
        batch: int = 1,
        cache: KVCache | None = None,
        device: torch.device | str = "cpu",
        progress: str | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._model = model
        self._config = config
        self._cache = cache
        self._forward: Forward = forward_of(model, cache)
        self._longest = longest
        self._batch = batch
        self._device = torch.device(device)
        self._progress = progress

    @property
    def eot_token_id(self) -> int:
        return int(self._first_known("eos_token_id", "bos_token_id"))

    @property
    def prefix_token_id(self) -> int:
        return int(self._first_known("bos_token_id", "eos_token_id"))

    def _first_known(self, *names: str) -> int:
        known = [getattr(self.tokenizer, name, None) for name in names]
        return next((one for one in known if one is not None), 0)

    @property
    def max_length(self) -> int:
        return self._longest

    @property
    def tokenizer_name(self) -> str:
        return str(getattr(self.tokenizer, "name_or_path", "")).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer(string, verbose=False, **special).input_ids
        return ids

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives it) of each continuation.

        The longest ones run first: what does not fit into memory fails at once.
        """
        pairs = [(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(pairs)), key=lambda at: -sum(map(len, pairs[at])))
        results: dict[int, tuple[float, bool]] = {}
        starts = range(0, len(order), self._batch)
        for at in track(starts, self._progress or "", shown=self._progress is not None):
            numbers = order[at : at + self._batch]
            scored = self._score([pairs[number] for number in numbers])
            results.update(zip(numbers, scored, strict=True))
        found = [results[number] for number in range(len(pairs))]
        for request, one in zip(requests, found, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], one)
        return found

    def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """At most a batch of them, filled up to a whole one."""
        texts = [
            (context + continuation)[-(self._longest + 1) :] for context, continuation in pairs
        ]
        longest = max(len(text) - 1 for text in texts)
        length = min(-(-longest // _STEP) * _STEP, self._longest)
        input_ids = torch.zeros(self._batch, length, dtype=torch.int64)
        for row, text in enumerate(texts):  # what stands to the right changes nothing before it
            input_ids[row, : len(text) - 1] = torch.tensor(text[:-1])
        logits = self._forward(input_ids.to(self._device))
        return [
            _likelihood(row[: len(text) - 1], continuation)
            for row, text, (_, continuation) in zip(logits, texts, pairs, strict=False)
        ]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Of each whole text, cut into windows that predict each token once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            pieces = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self._longest, 1
            )
            pairs = [make_disjoint_window(piece) for piece in pieces]
            windows += [(None, context, continuation) for context, continuation in pairs]
            counts.append(len(pairs))
        scored = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scored)[0] for _ in range(count)) for count in counts]

    @torch.no_grad()
    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        return [
            self._generate(*request.args)
            for request in track(requests, self._progress or "", shown=self._progress is not None)
        ]

    def _generate(self, context: str, how: dict[str, Any]) -> str:
        if how.get("do_sample") or how.get("temperature", 0.0):
            raise EvaluationError(
                "the task asks for sampling; only greedy generation is supported: "
                "leave do_sample and temperature out of its generation_kwargs"
            )
        until = how.get("until", [])
        stops = [until] if isinstance(until, str) else list(until)
        most = min(int(how.get("max_gen_toks", _MOST_NEW)), self._longest - 1)
        prompt = self.tok_encode(context)[-(self._longest - most) :] or [self.prefix_token_id]
        text = ""
        tokens: list[int] = []
        for token in self._greedy(prompt, most):
            if token == self.eot_token_id:
                break
            tokens.append(token)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if any(stop and stop in text for stop in stops):
                break
        ends = [text.find(stop) for stop in stops if stop and stop in text]
        return text[: min(ends)] if ends else text

    def _greedy(self, prompt: list[int], most: int) -> Any:
        """The most likely token after the prompt, the one after that, and so on."""
        cache = self._cache
        if cache is None:
            cache = KVCache(self._config, 1, self._longest, "kv16", device=self._device)
        cache.reset()
        step = torch.tensor([prompt], device=self._device)
        for _ in range(most):
            logits = self._model(step, past_key_values=cache).logits
            step = logits[:1, -1:].argmax(-1)
            yield int(step)


def _likelihood(logits: Tensor, continuation: Sequence[int]) -> tuple[float, bool]:
    """logits (T, vocabulary), the last of which predicts the continuation's last token."""
    targets = torch.tensor(continuation[-len(logits) :], device=logits.device)
    scored = logits[len(logits) - len(targets) :].float().log_softmax(-1)
    likely = scored.gather(-1, targets[:, None]).sum().item()
    return likely, bool((scored.argmax(-1) == targets).all())


def find_tasks(names: Sequence[str], folder: Path | None = None) -> TaskManager:
    """Raises EvaluationError for a task that is neither lm-eval's nor defined in `folder`.

    folder: of .yaml files. lm-eval's own thousands are read only if a name is not among them.
    """
    if folder is not None and not folder.is_dir():
        raise EvaluationError(f"{folder} is no folder; give one with the .yaml files of tasks")
    if folder is not None:
        local = TaskManager(include_path=str(folder), include_defaults=False)
        if all(local.match_tasks([name]) for name in names):
            return local
    manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in names:
        if not manager.match_tasks([name]):
            raise EvaluationError(
                unknown("task", name, manager.all_tasks) + " `lm-eval ls tasks` lists them"
            )
    return manager


def run_tasks(
    lm: AtomLM, names: Sequence[str], manager: TaskManager, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value; a metric's standard error goes by its name and "_stderr".

    limit: at most so many documents of each task.
    """
    try:
        results = simple_evaluate(
            lm,
            tasks=[task for name in names for task in manager.match_tasks([name])],
            task_manager=manager,
            limit=limit,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
        )
    except AtomError:
        raise
    except (OSError, ValueError) as error:  # a dataset out of reach, a task that is wrongly defined
        raise EvaluationError(f"lm-eval cannot run {', '.join(names)}: {error}") from error
    return {task: _numbers(found) for task, found in results["results"].items()}


def _numbers(found: dict[str, Any]) -> dict[str, float]:
    """lm-eval's keys are "metric,filter"; of its filters, "none" goes without saying."""
    return {
        key.removesuffix(",none"): float(one)
        for key, one in found.items()
        if "," in key and isinstance(one, int | float)
    }
