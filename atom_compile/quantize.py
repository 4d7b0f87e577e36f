"""Packs a model's weights in place: the 16-bit ones are gone afterwards."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .errors import NothingRewrittenError, OptionError, TrainingModeError
from .experts import plan_with_experts
from .options import Options
from .packer import Places, pack_group, weight_of
from .progress import track
from .quantized_linear import QuantizedLinear
from .recipe import Recipe
from .scheme import PRESETS, Scheme


@dataclass(frozen=True)
class Quantized:
    """What became of a model's weights.

    groups: the names of the linears that were quantized, those that read one activation together.
    left: the parameters of two dimensions and more that were left as they were, and why.
    bytes_before, bytes_after: of the quantized linears' weights, scales and orders included.
    """

    groups: tuple[tuple[str, ...], ...]
    left: Mapping[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        count = sum(len(group) for group in self.groups)
        lines = [
            f"{count} linears quantized, their weights "
            f"{self.bytes_after / self.bytes_before:.3f} of what they were"
        ]
        lines += [f"{name} left as it was: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def quantize(
    model: nn.Module,
    recipe: Recipe | Scheme | str | Path = "w4a4",
    *,
    include_head: bool = False,
    skip: Sequence[str] = (),
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Quantized:
    """Replaces the weights of `model`'s linears by packed ones, in place and one after the other.

    The 16-bit weights are freed as they are replaced: the most that is held is the model as it was
    and what the linears of one activation take packed. Afterwards the model runs as it is, compiles
    with any backend, and `backend="atom"` fuses it as it does a 16-bit model. A model of
    transformers can be saved with `save_pretrained` and loaded with `from_pretrained`.

    Quantized are modules that are `nn.Linear` or transformers' `Conv1D`, and the experts of
    transformers' mixtures, which get linears of their own (experts.py).
    All others, weights that several modules share, and heads are left alone and reported.

    model: in eval mode, on any device.
    recipe: a `Recipe`, a `Scheme`, a preset's name, or the path of a recipe (`.safetensors`).
    include_head, skip: as among the backend's options.
    example_inputs: what to call the model with, once, to see which linears read one activation:
        arguments or a dict of keyword arguments, small and on a CPU. A recipe tells, and models of
        transformers have inputs of their own. With neither each linear orders its channels by
        itself, and quantizes its input by itself.

    Raises OptionError, RecipeError, TrainingModeError or NothingRewrittenError before anything is
    changed.
    """
    if model.training:
        raise TrainingModeError("the model is in training mode; call model.eval() first")
    options = parse_options(recipe, include_head, skip)
    plan, splits = plan_with_experts(model, options, example_inputs)
    if not plan.groups:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in list(plan.left.items())[:8])
        raise NothingRewrittenError(f"not one linear of the model can be quantized:\n{reasons}")
    for split in splits:
        split.release()
    places = Places(model)
    before = after = 0
    for group in track(plan.groups, "quantizing", shown=progress):
        linears = {name: model.get_submodule(name) for name in group}
        before += sum(weight_of(linear).nbytes for linear in linears.values())
        packed = pack_group(linears, plan.options_of(group, options))
        for name, linear in packed.items():
            places.replace(linears.pop(name), linear)
        after += sum(_bytes(linear) for linear in packed.values())
    for split in splits:
        split.settle()
    done = Quantized(plan.groups, plan.left, before, after)
    if "transformers" in sys.modules:
        from .transformers_quantizer import attach

        attach(model, options, plan.groups)
    return done


def parse_options(
    recipe: Recipe | Scheme | str | Path, include_head: bool, skip: Sequence[str]
) -> Options:
    given: dict[str, Any] = {"include_head": include_head, "skip": skip}
    if isinstance(recipe, Scheme) or (isinstance(recipe, str) and not _is_file(recipe)):
        given["scheme"] = recipe
    elif isinstance(recipe, Recipe | str | Path):
        given["recipe"] = recipe
    else:
        raise OptionError(
            f"quantize takes a Recipe, a Scheme, a preset ({', '.join(PRESETS)}) or the path of a "
            f"recipe, not a {type(recipe).__name__}"
        )
    return Options.parse(given)


def _is_file(recipe: str) -> bool:
    return recipe not in PRESETS and recipe.endswith(".safetensors")


def _bytes(linear: QuantizedLinear) -> int:
    return sum(one.nbytes for one in (*linear.packed, linear.order) if one is not None)
