"""What the tests of passes and of the backend share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from atom_compile import Recipe, Scheme, calibrate
from atom_compile.backend import bind_inputs, rewrite
from atom_compile.capture import captured
from atom_compile.options import Options
from atom_compile.passes.pipeline import Rewrite
from atom_compile.store import Dispatcher

from .models import HandWritten, tiny_llama


def rewrites(model: Callable[..., Any], *inputs: Any, **options: Any) -> list[Rewrite]:
    """The rewritten graphs of one call of `model`."""
    runs: list[Rewrite] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        runs.append(rewrite(gm, Options.parse(options), keep_graphs=True))
        return gm.forward

    with torch.no_grad():
        captured(model, backend)(*inputs)
    return runs


def arguments_of(model: Callable[..., Any], *inputs: Any) -> list[Any]:
    """What Dynamo would call a compiled graph of `model` with."""
    seen: list[Any] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        seen.extend(example_inputs)
        return gm.forward

    with torch.no_grad():
        captured(model, backend)(*inputs)
    return seen


def reference_output(model: Callable[..., Any], ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """The last result of the rewritten graph, run on the CPU through the references."""
    (run,) = rewrites(model, ids, **options)
    inputs = bind_inputs(run)
    dispatcher = Dispatcher(run.gm.forward, run.arguments, inputs)
    results: Any = dispatcher(*arguments_of(model, ids))
    return results[-1]  # type: ignore[no-any-return]


def error_of_fused(scheme: Scheme, bias: bool = True) -> float:
    """Of a hand-written model's output, after a check that fusing passes change nothing in it."""
    model, ids = HandWritten(bias=bias).eval(), token_batch()
    plain = reference_output(model, ids, scheme=scheme, fuse=False)
    fused = reference_output(model, ids, scheme=scheme)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    return relative_error(fused, model(ids))


def atom_operators(model: Callable[..., Any], *inputs: Any, **options: Any) -> dict[str, int]:
    """How often each of our operators is in the rewritten graph, and how many linears were left."""
    total: Counter[str] = Counter()
    for run in rewrites(model, *inputs, **options):
        total += run.record.stages[-1].operators
    return {name: count for name, count in total.items() if "atom." in name or name == "linear"}


SCHEMES_OF_EVERY_KIND = (
    "w4a4",
    "w4a4-fp4",
    "w4a4-rotated",
    "w4a8-two-level",
    "w4a16",
    "w6a16",
    "w6a8",
    "mxfp4",
    "nvfp4",
)


def token_batch(batch: int = 2, length: int = 12, vocabulary: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, vocabulary, (batch, length), generator=generator)


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).double().norm() / wanted.double().norm())


@torch.no_grad()
def errors_of_rounding(scheme: Scheme, folder: Path) -> tuple[float, float]:
    """Of a tiny model's logits: rounded to nearest, and by a recipe's GPTQ, saved and loaded."""
    model, ids = tiny_llama(layers=1), token_batch(4, 64)
    wanted = model(ids).logits
    recipe = calibrate(model, [ids], scheme, progress=False)
    recipe.save(folder / "recipe.safetensors")
    loaded = Recipe.load(folder / "recipe.safetensors")
    assert loaded.scheme == scheme and loaded.rounded.keys() == recipe.rounded.keys()
    errors = []
    for options in ({"scheme": scheme}, {"recipe": loaded}):
        torch._dynamo.reset()
        model.compile(backend="atom", options={**options, "strict": True})
        errors.append(relative_error(model(ids).logits, wanted))
    return errors[0], errors[1]
