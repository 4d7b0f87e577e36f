"""A model in 16 bits and in each of several schemes, side by side: text, tasks, layers."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.fx import GraphModule

from .backend import atom, bind_inputs, refuse_training, rewrite
from .bench.result import describe_environment, file_stem, print_to
from .bench.tables import make_table, number
from .capture import captured
from .errors import EvaluationError, OptionError
from .evaluate import (
    TextLoss,
    Window,
    check_window,
    default_window,
    forward_of,
    sliding_windows,
    text_loss,
)
from .files import write_text, write_whole
from .kv_cache import KVCache
from .options import Options
from .scheme import KVScheme
from .signal_noise import LayerNoise, measure_layers
from .store import Dispatcher

_MOST_LAYERS_SHOWN = 32
_LAYER_WINDOWS = 4
_LAYER_NAME_WIDTH = 34
_SCHEMES_IN_A_TABLE = 2  # 80 columns


@dataclass(frozen=True)
class Text:
    """What perplexity is measured on: its tokens (tokens,) and the windows over them."""

    source: str
    ids: Tensor
    windows: list[Window]
    window: int
    stride: int

    @classmethod
    def of(
        cls,
        text: str,
        tokenizer: Any,
        config: Any,
        *,
        source: str = "text",
        window: int | None = None,
        stride: int | None = None,
        limit: int | None = None,
    ) -> Text:
        """window: the model's longest text by default, at most 2048. stride: the window by default.

        Raises OptionError for a window or stride that makes no sense, EvaluationError for a text of
        less than two tokens.
        """
        window = default_window(config) if window is None else window
        stride = window if stride is None else stride
        check_window(window, stride, config)
        ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
        windows = sliding_windows(len(ids), window, stride, limit)
        return cls(source, ids, windows, window, stride)

    def sample(self, count: int) -> list[Tensor]:
        """`count` of its windows, spread evenly, (1, window) each."""
        steps = max(1, -(-len(self.windows) // count))
        return [self.ids[one.start : one.end][None] for one in self.windows[::steps]]

    def to_dict(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "tokens": len(self.ids),
            "window": self.window,
            "stride": self.stride,
            "windows": len(self.windows),
            "predicted_tokens": sum(one.end - one.scored for one in self.windows),
        }


@dataclass(frozen=True)
class Tasks:
    """lm-eval's tasks by name; `folder` holds definitions beside its own."""

    names: Sequence[str]
    folder: Path | None = None
    limit: int | None = None


@dataclass
class Variant:
    """One form of the model, and what was measured of it."""

    name: str
    scheme: str | None = None
    kv_cache: str | None = None
    text: TextLoss | None = None
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    layers: list[LayerNoise] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """The variants, the 16-bit model first, and where and how they ran."""

    environment: dict[str, Any]
    variants: list[Variant]

    @property
    def quantized(self) -> list[Variant]:
        return self.variants[1:]

    def ratio(self, variant: Variant) -> tuple[float, float | None] | None:
        """Of perplexities, to the 16-bit model's, with its standard error."""
        exact = self.variants[0].text
        if variant.text is None or exact is None or variant is self.variants[0]:
            return None
        return variant.text.ratio(exact)

    @property
    def task_metrics(self) -> list[tuple[str, str]]:
        return [
            (task, metric)
            for task, found in self.variants[0].tasks.items()
            for metric in found
            if "_stderr" not in metric
        ]

    def to_json(self) -> str:
        record = {
            "environment": self.environment,
            "variants": [self._record(one) for one in self.variants],
        }
        return json.dumps(record, indent=1)

    def _record(self, variant: Variant) -> dict[str, Any]:
        record: dict[str, Any] = {
            "name": variant.name,
            "scheme": variant.scheme,
            "kv_cache": variant.kv_cache,
        }
        if variant.text is not None:
            record["perplexity"] = variant.text.perplexity
        if (ratio := self.ratio(variant)) is not None:
            record["ratio"], record["ratio_standard_error"] = ratio
        if variant.tasks:
            record["tasks"] = variant.tasks
        if variant.layers:
            record["layers"] = [
                {"name": one.name, "alone_db": one.alone_db, "in_all_db": one.in_all_db}
                for one in variant.layers
            ]
        return record

    def print(self, console: Console) -> None:
        """Tables of at most 80 columns; of a deep model the worst layers."""
        for table in _tables(self, _MOST_LAYERS_SHOWN):
            console.print(table)

    def print_whole(self, console: Console) -> None:
        for table in _tables(self, None):
            console.print(table)

    def save(self, folder: Path | str) -> list[Path]:
        """Writes `<model>-eval-<device>` as .json, .txt and .png, each whole or not at all."""
        from .comparison_plot import plot

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stem = file_stem(self.environment["model"], "eval", self.environment["device"])
        paths = [folder / f"{stem}.{suffix}" for suffix in ("json", "txt", "png")]
        write_text(paths[0], self.to_json() + "\n")
        write_whole(paths[1], lambda path: print_to(path, self.print_whole))
        write_whole(paths[2], lambda path: plot(self, path))
        return paths


def compare(
    model: nn.Module,
    tokenizer: Any,
    schemes: Sequence[str | None] = ("w4a4",),
    *,
    recipe: Any = None,
    kv_cache: str | None = None,
    text: Text | None = None,
    tasks: Tasks | None = None,
    layers: bool = True,
    batch: int = 1,
    compiled: bool | None = None,
    name: str = "model",
    progress: bool = True,
) -> Comparison:
    """Runs the model as it is, in 16 bits or packed, and each scheme's rewritten graph, on the same
    tokens.

    model: a causal language model of transformers, in eval mode; it stays as it is.
    schemes: presets; None is the recipe's own. recipe: a `Recipe`, or the path of one.
    kv_cache: a KV scheme that the quantized models' keys and values go through; without schemes the
        model's own.
    layers: measure every linear's signal-to-noise ratio, on up to 4 of the text's windows.
    batch: windows, or requests of a task, at a time.
    compiled: the rewritten graphs go through Inductor; by default on a GPU. On a CPU that takes
        minutes for a graph, and running its references one by one computes the same.

    Raises OptionError for an unknown scheme, EvaluationError for nothing to measure, an unknown
    task or a missing package, each before anything is run.
    """
    if text is None and tasks is None:
        raise EvaluationError("nothing to evaluate on: give a text, a dataset or tasks")
    options = [_options(scheme, recipe) for scheme in schemes]
    if kv_cache is not None:
        KVScheme.of(kv_cache)
    config: Any = model.config
    runner = _Runner(model, config, tokenizer, text, tasks, batch, progress)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    compiled = runner.device.type == "cuda" if compiled is None else compiled
    packed = getattr(config, "quantization_config", None) is not None
    variants = [Variant(f"packed, {dtype}" if packed else dtype)]
    runner.measure(model, variants[0], None if schemes else kv_cache)
    for scheme, of_backend in zip(schemes, options, strict=True):
        variant = _variant(scheme, kv_cache)
        backend = atom if compiled else run_references
        quantized = captured(model, functools.partial(backend, options=of_backend))
        runner.measure(quantized, variant, kv_cache)
        if layers and text is not None:
            batches = [one.to(runner.device) for one in text.sample(_LAYER_WINDOWS)]
            bar = f"{variant.name}: layers" if progress else None
            variant.layers = measure_layers(model, batches, of_backend, bar)
        variants.append(variant)
    return Comparison(_environment(name, runner, dtype, recipe), variants)


def run_references(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any]
) -> Dispatcher:
    """A backend that runs the rewritten graph operator by operator."""
    refuse_training(gm)
    run = rewrite(gm, Options.parse(options))
    inputs = bind_inputs(run)
    return Dispatcher(run.gm.forward, run.arguments, inputs)


def _options(scheme: str | None, recipe: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"strict": True}
    options |= {key: one for key, one in (("scheme", scheme), ("recipe", recipe)) if one}
    Options.parse(options)
    return options


def _variant(scheme: str | None, kv_cache: str | None) -> Variant:
    name = scheme or "recipe"
    return Variant(f"{name} + {kv_cache}" if kv_cache else name, scheme, kv_cache)


def _environment(name: str, runner: _Runner, dtype: str, recipe: Any) -> dict[str, Any]:
    environment = describe_environment(runner.device) | {"model": name, "baseline": dtype}
    environment["recipe"] = str(recipe) if recipe is not None else None
    if runner.text is not None:
        environment["text"] = runner.text.to_dict()
    if runner.tasks is not None:
        environment["tasks"] = {"names": list(runner.tasks.names), "limit": runner.tasks.limit}
    return environment


class _Runner:
    """What every variant is measured by."""

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        tokenizer: Any,
        text: Text | None,
        tasks: Tasks | None,
        batch: int,
        progress: bool,
    ) -> None:
        if batch < 1:
            raise OptionError(f"the batch is {batch}; it must be at least 1")
        self.device = next(model.parameters()).device
        self.text, self.tasks = text, tasks
        self._config, self._tokenizer = config, tokenizer
        self._batch, self._progress = batch, progress
        self._manager = None
        if tasks is not None:
            self._manager = _adapter().find_tasks(tasks.names, tasks.folder)

    def measure(self, model: Any, variant: Variant, kv_cache: str | None) -> None:
        if self.text is not None:
            longest = max(one.end - one.start for one in self.text.windows)
            variant.text = text_loss(
                forward_of(model, self._cache(kv_cache, longest)),
                self.text.ids,
                self.text.windows,
                batch=self._batch,
                device=self.device,
                progress=f"{variant.name}: text" if self._progress else None,
            )
        if self.tasks is not None:
            longest = default_window(self._config)
            lm = _adapter().AtomLM(
                model,
                self._config,
                self._tokenizer,
                longest=longest,
                batch=self._batch,
                cache=self._cache(kv_cache, longest),
                device=self.device,
                progress=f"{variant.name}: tasks" if self._progress else None,
            )
            variant.tasks = _adapter().run_tasks(
                lm, self.tasks.names, self._manager, self.tasks.limit
            )

    def _cache(self, kv_cache: str | None, longest: int) -> KVCache | None:
        if kv_cache is None:
            return None
        return KVCache(self._config, self._batch, longest, kv_cache, device=self.device)


def _adapter() -> Any:
    try:
        from . import lm_eval_adapter
    except ImportError as error:
        if (error.name or "").partition(".")[0] == __package__:
            raise
        raise EvaluationError(
            f"--tasks needs the package lm-eval ({error}): pip install 'atom-compile[eval]', "
            "or evaluate on a text alone"
        ) from None
    return lm_eval_adapter


def _tables(comparison: Comparison, most_layers: int | None) -> list[Table]:
    tables = []
    if comparison.variants[0].text is not None:
        tables.append(_text_table(comparison))
    if comparison.task_metrics:
        tables += [_task_table(comparison, some) for some in _chunks(comparison.quantized)]
    with_layers = [one for one in comparison.quantized if one.layers]
    tables += [_layer_table(some, most_layers) for some in _chunks(with_layers)]
    return tables


def _chunks(variants: list[Variant]) -> list[list[Variant]]:
    step = _SCHEMES_IN_A_TABLE
    return [variants[at : at + step] for at in range(0, len(variants), step)]


def _text_table(comparison: Comparison) -> Table:
    text = comparison.environment["text"]
    table = make_table(
        ["variant"],
        ["perplexity", "ratio", "± standard error"],
        title=escape(f"{comparison.environment['model']} on {text['source']}"),
        caption=f"{text['windows']} windows of at most {text['window']} tokens, stride "
        f"{text['stride']}, {text['predicted_tokens']} tokens predicted",
    )
    for variant in comparison.variants:
        assert variant.text is not None
        ratio, error = comparison.ratio(variant) or (1.0, None)
        cells = (f"{variant.text.perplexity:.3f}", f"{ratio:.4f}", number(error, ".4f"))
        table.add_row(variant.name, *cells)
    return table


def _task_table(comparison: Comparison, variants: list[Variant]) -> Table:
    shown = [comparison.variants[0], *variants]
    table = make_table(["task", "metric"], [one.name for one in shown], title="", caption="")
    for task, metric in comparison.task_metrics:
        cells = []
        for variant in shown:
            found = variant.tasks.get(task, {})
            error = found.get(_error_name(metric))
            spread = "" if error is None else f"±{error:.3f}"
            cells.append(number(found.get(metric), ".3f") + spread)
        table.add_row(task, metric, *cells)
    return table


def _error_name(metric: str) -> str:
    """ "acc" -> "acc_stderr", "exact_match,strict" -> "exact_match_stderr,strict"."""
    name, comma, filtered = metric.partition(",")
    return f"{name}_stderr{comma}{filtered}"


def _layer_table(variants: list[Variant], most: int | None) -> Table:
    measured = [{one.name: one for one in variant.layers} for variant in variants]
    names = list(dict.fromkeys(name for layers in measured for name in layers))
    caption = "alone: of what the quantized model computed before it; all: against the 16-bit model"
    if most is not None and len(names) > most:
        caption = f"the {most} worst of {len(names)}; {caption}"
        worst = sorted(names, key=functools.partial(_worst, measured))[:most]
        names = [name for name in names if name in worst]
    headers = [
        "\n".join([*variant.name.replace(" + ", " \n+ ").split(" \n"), what])
        for variant in variants
        for what in ("alone", "all")
    ]
    title = "signal over noise of the linears' outputs, dB"
    table = make_table(["linear"], headers, title=title, caption=caption)
    for name in names:
        of_each = [layers.get(name) for layers in measured]
        cells = [
            number(value, ".1f")
            for one in of_each
            for value in ((one.alone_db, one.in_all_db) if one else (None, None))
        ]
        table.add_row(short_name(name), *cells)
    return table


def _worst(measured: Sequence[Mapping[str, LayerNoise]], name: str) -> float:
    found = [layers[name].alone_db for layers in measured if name in layers]
    return min((one for one in found if one is not None), default=float("inf"))


def short_name(name: str) -> str:
    """ "model.layers.3.mlp.up_proj.weight" -> "3.mlp.up_proj"."""
    short = re.sub(r"^[a-z_.]*?\.(?=\d)|\.weight$", "", name)
    return short if len(short) <= _LAYER_NAME_WIDTH else "…" + short[1 - _LAYER_NAME_WIDTH :]
