"""The options of `torch.compile(model, backend="atom", options={...})`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from . import compat
from .errors import OptionError, unknown
from .recipe import Recipe
from .scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `options` may hold.

    scheme: a preset's name or a `Scheme`; the recipe's own by default, `w4a4` without a recipe.
    recipe: a `Recipe`, or the path of a saved one; without it weights are rounded and ordered by
        what they tell.
    include_head: quantize the output head (lm_head) as well.
    include_embeddings: quantize embedding tables as well.
    skip: patterns (`fnmatch`) of weights' parameter names to leave in their own precision:
        ["*.o_proj.weight"].
    fuse: False leaves the plain operators: reorder, quantize and linear, one of each per layer, and
        a KV cache that is read back in 16 bits.
    allow_unchanged: compile a graph of which no linear can be quantized, instead of raising.
    profile: our operators appear in torch.profiler's traces and NVTX under the name of their place
        in the model: "model.layers.0.mlp.down_proj: atom.linear". A compiled graph that serves
        several layers has the first one's names, and replays of CUDA graphs show none.
    strict: raise whatever goes wrong in a rewrite instead of compiling the graph as it was, with a
        warning.
    mode: as `torch.compile(mode=...)`, which cannot be given beside options.
    inductor: options for Inductor, as in `torch.compile(options=...)`.
    """

    scheme: Scheme = field(default_factory=Scheme)
    recipe: Recipe | None = None
    include_head: bool = False
    include_embeddings: bool = False
    skip: tuple[str, ...] = ()
    fuse: bool = True
    allow_unchanged: bool = False
    profile: bool = False
    strict: bool = False
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> Options:
        """Raises OptionError, naming what was meant, for an unknown option or a wrong type."""
        given = dict(options or {})
        names = [one.name for one in fields(cls)]
        for name in given:
            if name not in names:
                raise OptionError(unknown("option", name, names))
        given["recipe"] = _recipe(given.get("recipe"))
        given["scheme"] = _scheme(given.get("scheme"), given["recipe"])
        if given["recipe"] is not None:
            given["recipe"] = given["recipe"].for_scheme(given["scheme"])
        if given.get("include_embeddings") and given["scheme"].weight_format != "int":
            raise OptionError(
                "option include_embeddings packs tables in INT4, and the scheme's weight_format is "
                f"{given['scheme'].weight_format!r}: leave one of them out"
            )
        given["skip"] = _patterns(given.get("skip", ()))
        for name, default in ((one.name, one.default) for one in fields(cls)):
            if isinstance(default, bool) and not isinstance(given.get(name, default), bool):
                raise OptionError(f"option {name} is {given[name]!r}; it must be True or False")
        if given.get("mode") is not None and given["mode"] not in compat.modes():
            raise OptionError(unknown("mode", str(given["mode"]), compat.modes()))
        for name in given.get("inductor", {}):
            if name not in compat.inductor_options():
                raise OptionError(unknown("Inductor option", name, compat.inductor_options()))
        return cls(**given)


def _recipe(recipe: object) -> Recipe | None:
    if recipe is None or isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str | Path):
        return Recipe.load(recipe)
    raise OptionError(
        f"option recipe is a {type(recipe).__name__}; it must be a Recipe or the path of one"
    )


def _scheme(scheme: object, recipe: Recipe | None) -> Scheme:
    if scheme is None:
        return recipe.scheme if recipe else Scheme()
    if isinstance(scheme, str | Scheme):
        return Scheme.of(scheme)
    raise OptionError(
        f"option scheme is a {type(scheme).__name__}; it must be a preset's name or a Scheme"
    )


def _patterns(skip: object) -> tuple[str, ...]:
    if (
        isinstance(skip, Sequence)
        and not isinstance(skip, str)
        and all(isinstance(one, str) for one in skip)
    ):
        return tuple(skip)
    raise OptionError(
        f"option skip is {skip!r}; it must be a list of patterns such as ['*.o_proj.weight']"
    )
