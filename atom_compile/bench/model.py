"""A whole Llama with random weights: decode and prefill, memory, and what compiling it takes.

    variant    linears   keys and values   compiled by
    baseline   16 bits   StaticCache       Inductor, mode="max-autotune"
    inductor   16 bits   StaticCache       Inductor, mode="reduce-overhead"
    static     INT4      StaticCache       "atom", mode="reduce-overhead"
    kv4        INT4      KVCache           "atom", mode="reduce-overhead"

decode: one new token of each sequence, `length` cached at most. prefill: `length` tokens of one
sequence. Embeddings, the output head and the choice of the next token are included, quantization
too. On a CPU everything is float32 and compiled without a mode.

Every variant runs in a process of its own with empty caches on disk, so that the time of a first
call is that of a cold start; a second process then finds them filled.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from triton.errors import TritonError

from .. import compat
from ..backend import atom
from ..errors import OptionError, unknown
from ..kv_cache import KVCache
from ..scheme import Scheme
from .cases import INT4, Setting, name_scheme
from .layer import fill_randomly
from .model_result import ModelResult, ModelRow
from .result import describe_environment
from .shapes import DEFAULT_MODEL, Shape, find_device, find_shape, llama_config

VARIANTS = ("baseline", "inductor", "static", "kv4")
PHASES = ("decode", "prefill")
DEFAULT_VARIANTS = ("baseline", "static", "kv4")
DEFAULT_BATCHES = {"cuda": (1, 8, 32), "cpu": (1, 2)}
DEFAULT_LENGTH = {"cuda": 2048, "cpu": 128}
# of the logits, against the uncompiled 16-bit model; those of an unrelated model are 1.41 away
_LIMITS = {"baseline": 0.2, "inductor": 0.2, "static": INT4, "kv4": INT4}
_DECODE_STEPS, _QUICK_STEPS, _PREFILLS = 64, 8, 10
_WARM_UP_CALLS = 3  # the first compiles, the next two record and replay a CUDA graph
_ROW = "atom-bench-row "  # begins the lines that a process reports rows in
_PROGRAM = f"from {__name__} import report_rows; report_rows()"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one process measures."""

    shape: Shape
    scheme: Scheme
    variant: str
    phases: tuple[str, ...]
    batches: tuple[int, ...]
    length: int
    device: str
    steps: int = _DECODE_STEPS
    first_call_only: bool = False

    @property
    def cases(self) -> list[tuple[str, int]]:
        """(phase, batch) in order."""
        decode = [("decode", batch) for batch in self.batches] if "decode" in self.phases else []
        return decode + ([("prefill", 1)] if "prefill" in self.phases else [])

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        fields = json.loads(text)
        fields["shape"] = Shape(**fields["shape"])
        fields["scheme"] = Scheme(**fields["scheme"])
        for name in ("phases", "batches"):
            fields[name] = tuple(fields[name])
        return cls(**fields)


def run_model(
    model: str | Shape | None = None,
    *,
    layers: int | None = None,
    variants: Sequence[str] = (),
    phases: Sequence[str] = (),
    batch: Sequence[int] | None = None,
    length: Sequence[int] | None = None,
    scheme: str | Scheme = "w4a4",
    device: str | None = None,
    warm_cache: bool = False,
    quick: bool = False,
    console: Console | None = None,
    on_rows: Callable[[ModelResult], object] = lambda _: None,
) -> ModelResult:
    """Measures each variant in a process of its own; `on_rows` sees the result so far after each.

    layers: fewer than the model has, to save time and memory.
    length: one number, of the tokens that the cache holds and that prefill reads.
    warm_cache: a second process of each variant times its first calls over filled caches.
    """
    for kind, names, allowed in (("variant", variants, VARIANTS), ("phase", phases, PHASES)):
        for name in names:
            if name not in allowed:
                raise OptionError(unknown(kind, name, allowed))
    place = find_device(device)
    model = model or DEFAULT_MODEL[place.type]
    shape = model if isinstance(model, Shape) else find_shape(model)
    (tokens,) = length or (DEFAULT_LENGTH[place.type],)
    plan = Plan(
        shape=replace(shape, layers=layers or shape.layers),
        scheme=Scheme.of(scheme),
        variant="",
        phases=tuple(phases or PHASES),
        batches=tuple(batch or DEFAULT_BATCHES[place.type][: 1 if quick else None]),
        length=tokens,
        device=str(place),
        steps=_QUICK_STEPS if quick else _DECODE_STEPS,
    )
    if tokens <= plan.steps + _WARM_UP_CALLS:
        raise OptionError(f"length is {tokens}; it must be over {plan.steps + _WARM_UP_CALLS}")
    variants = variants or DEFAULT_VARIANTS
    result = ModelResult(_environment(plan), [])
    processes = [False, True] if warm_cache else [False]
    with Progress(console=console, disable=console is None) as progress:
        task = progress.add_task("", total=len(variants) * len(processes) * len(plan.cases))
        for variant in variants:
            with tempfile.TemporaryDirectory(prefix="atom-bench-") as caches:
                for warm in processes:
                    progress.update(task, description=f"{variant}, {'warm' if warm else 'cold'}")
                    mine = replace(plan, variant=variant, first_call_only=warm)
                    for row in rows_of_process(mine, Path(caches)):
                        result.add(row, warm)
                        progress.advance(task)
            on_rows(result)
    return result


def _environment(plan: Plan) -> dict[str, Any]:
    scheme, device = plan.scheme, torch.device(plan.device)
    return describe_environment(device) | {
        "model": plan.shape.name,
        "layers": plan.shape.layers,
        "scheme_name": name_scheme(scheme),
        "scheme": asdict(scheme),
        "length": plan.length,
        "baseline": "bf16" if device.type == "cuda" else "fp32",
        "level": "model",
    }


def rows_of_process(plan: Plan, caches: Path) -> Iterator[ModelRow]:
    """Runs `report_rows` in a new process over the caches in a folder; its rows as they come."""
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
    }
    missing = list(plan.cases)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, plan.to_json()],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        with process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(_ROW):
                    row = ModelRow(**json.loads(line.removeprefix(_ROW)))
                    missing.remove((row.phase, row.batch))
                    yield row
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1]
    for phase, batch in missing:
        failure = f"its process ended with status {process.returncode}: {last[:200]}"
        yield ModelRow(variant=plan.variant, phase=phase, batch=batch, failure=failure)


def report_rows() -> None:
    """What such a process does."""
    for row in measure_variant(Plan.from_json(sys.argv[1])):
        print(_ROW + json.dumps(asdict(row)), flush=True)


@torch.no_grad()
def measure_variant(plan: Plan) -> Iterator[ModelRow]:
    """The rows of one plan, in this process."""
    device = torch.device(plan.device)
    setting = Setting(
        shape=plan.shape,
        scheme=plan.scheme,
        tokens=(),
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    )
    model = random_model(setting)
    for phase, batch in plan.cases:
        case = _Case(plan, setting, model, phase, batch)
        try:
            yield case.measure()
        except (RuntimeError, TritonError) as raised:
            failure = f"{type(raised).__name__}: {' '.join(str(raised).split())[:200]}"
            yield ModelRow(variant=plan.variant, phase=phase, batch=batch, failure=failure)


@dataclass
class _Case:
    """One phase of one variant at one batch size."""

    plan: Plan
    setting: Setting
    model: Any
    phase: str
    batch: int
    input_ids: Tensor = field(init=False)
    held: int = field(init=False)  # tokens in the cache before a call

    def __post_init__(self) -> None:
        decodes = self.phase == "decode"
        tokens = 1 if decodes else self.plan.length
        self.held = self.plan.length - self.plan.steps - _WARM_UP_CALLS if decodes else 0
        draw = torch.Generator(self.setting.device).manual_seed(0)
        self.input_ids = torch.randint(
            self.plan.shape.vocabulary,
            (self.batch, tokens),
            generator=draw,
            device=self.setting.device,
        )

    def measure(self) -> ModelRow:
        torch.compiler.reset()
        wanted = self._reference() if not self.plan.first_call_only else None
        cache = self._cache(self.plan.variant)
        _compile(self.model, self.plan)
        self._reset_memory()
        skips = compat.cudagraph_skips()
        start = time.perf_counter()
        logits = self._call(self.model, cache, self.input_ids).float()
        self._synchronize()
        row = ModelRow(
            variant=self.plan.variant,
            phase=self.phase,
            batch=self.batch,
            first_call_s=time.perf_counter() - start,
        )
        if wanted is None:
            return row
        error = float(torch.linalg.vector_norm(logits - wanted) / torch.linalg.vector_norm(wanted))
        row = replace(row, error=error)
        limit = _LIMITS[self.plan.variant]
        if not error <= limit:
            return replace(row, failure=f"its relative error of {error:.2g} is over {limit:g}")
        low, median, high = statistics.quantiles(self._times(cache), n=4)
        on_gpu = self.setting.device.type == "cuda"
        return replace(
            row,
            median_ms=median,
            iqr_ms=high - low,
            tokens=self.input_ids.numel(),
            peak_gb=torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
            without_graphs=compat.cudagraph_skips() - skips,
        )

    def _reference(self) -> Tensor:
        """The logits of the uncompiled 16-bit model over a 16-bit cache."""
        cache = self._cache("baseline")
        return self._call(self.model.forward, cache, self.input_ids).float()

    def _cache(self, variant: str) -> Any:
        """Of `length` tokens, `held` of them filled at random, the same for every variant."""
        from transformers import StaticCache

        shape, setting, length = self.plan.shape, self.setting, self.plan.length
        config = self.model.config
        cache: Any
        if variant == "kv4":
            cache = KVCache(
                config, self.batch, length, "kv4", device=setting.device, dtype=setting.dtype
            )
        else:
            cache = StaticCache(config=config, max_cache_len=length)
            sizes = self.batch, shape.kv_heads, shape.head_dim
            cache.early_initialization(*sizes, setting.dtype, setting.device)
        draw = setting.draw(0)
        for layer in cache.layers if self.held else ():
            size = self.batch, shape.kv_heads, self.held, shape.head_dim
            layer.update(draw.normal(*size), draw.normal(*size))
        return cache

    def _call(self, model: Any, cache: Any, input_ids: Tensor) -> Tensor:
        """The logits of each sequence's last token."""
        torch.compiler.cudagraph_mark_step_begin()
        logits: Tensor = model(
            input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        return logits[:, -1]

    def _times(self, cache: Any) -> list[float]:
        """Milliseconds of each of many calls, one after the other as generating does."""
        for _ in range(_WARM_UP_CALLS - 1):
            self._rewind(cache)
            self._call(self.model, cache, self.input_ids)
        self._rewind(cache)
        clock = _Clock(self.setting.device)
        if self.phase == "decode":
            input_ids = self.input_ids
            clock.tick()
            for _ in range(self.plan.steps):
                input_ids = self._call(self.model, cache, input_ids).argmax(-1, keepdim=True)
                clock.tick()
            return clock.intervals()
        for _ in range(min(self.plan.steps, _PREFILLS)):
            self._rewind(cache)
            clock.tick()
            self._call(self.model, cache, self.input_ids).argmax(-1)
            clock.tick()
        return clock.intervals()[::2]

    def _rewind(self, cache: Any) -> None:
        """Forgets the tokens of earlier calls."""
        for layer in cache.layers:
            layer.cumulative_length.fill_(self.held)

    def _reset_memory(self) -> None:
        if self.setting.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _synchronize(self) -> None:
        if self.setting.device.type == "cuda":
            torch.cuda.synchronize()


class _Clock:
    """Times between ticks, by events on a GPU: nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._ticks: list[Any] = []

    def tick(self) -> None:
        if not self._on_gpu:
            self._ticks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._ticks.append(event)

    def intervals(self) -> list[float]:
        """In milliseconds."""
        pairs = list(zip(self._ticks[:-1], self._ticks[1:], strict=True))
        if not self._on_gpu:
            return [1e3 * (b - a) for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairs]


def random_model(setting: Setting) -> Any:
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = llama_config(setting.shape)
    config.dtype = setting.dtype
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(setting.dtype).to_empty(device=setting.device).eval()
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(setting.device)
    fill_randomly(model, setting.weight_draw(0))
    model.model.embed_tokens.weight.mul_(setting.shape.hidden**0.5)  # of size 1, as after a norm
    for layer in model.model.layers:  # else what one layer rounds, the next ones magnify
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.weight.mul_((2 * setting.shape.layers) ** -0.5)
    return model


def _compile(model: Any, plan: Plan) -> None:
    on_gpu = torch.device(plan.device).type == "cuda"
    mode = "max-autotune" if plan.variant == "baseline" else "reduce-overhead"
    if plan.variant in ("baseline", "inductor"):
        model.compile(dynamic=False, mode=mode if on_gpu else None)
        return
    options = {"scheme": plan.scheme, "strict": True} | ({"mode": mode} if on_gpu else {})
    model.compile(backend=atom, dynamic=False, options=options)
