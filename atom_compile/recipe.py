"""What calibration found for one model, keyed by parameter name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .errors import RecipeError, unknown
from .scheme import Scheme

_FORMAT_VERSION = 1
_FORMAT = "atom_compile recipe"


class Recipe:
    """The Hessian diagonal of each linear's input, and the scheme that it was gathered for.

    scheme: the default of a compilation with this recipe.
    hessian_diagonal: weight's parameter name -> (K,) float32, each input channel's mean square.
    shapes: weight's parameter name -> the weight's shape.

    Source: Atom (arXiv 2310.19102), section 4.1: channels are sorted by it once, the outliers last.
    """

    def __init__(
        self,
        scheme: Scheme,
        hessian_diagonal: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.scheme = scheme
        self.hessian_diagonal = dict(hessian_diagonal)
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        # parameter -> its name in the calibrated model
        self._names: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __repr__(self) -> str:
        return f"Recipe({len(self.hessian_diagonal)} linears, {self.scheme})"

    def bind(self, model: nn.Module) -> Recipe:
        """Ties this recipe to `model`'s parameters, so that parts of it can be compiled one by one.

        Raises RecipeError if the model lacks a weight of the recipe or has it in another shape.
        Returns the recipe.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name in self.shapes:
            if name not in parameters:
                missing = unknown("parameter", name, list(parameters)[:8])
                raise RecipeError(f"the recipe is of another model: {missing}")
            self._check_shape(name, tuple(parameters[name].shape))
        for name in self.shapes:
            self._names[parameters[name]] = name
        return self

    def name_of(self, weight: Tensor, name: str) -> str:
        """`weight`'s name when it was calibrated; `name` is what the compiled frame calls it."""
        known: str = self._names.get(weight, name)
        if known not in self.hessian_diagonal:
            raise RecipeError(
                f"the recipe has nothing on {name!r} {tuple(weight.shape)}. If it is of this "
                "model, but a part of the model is compiled by itself, call recipe.bind(model) "
                "first; else calibrate this model."
            )
        self._check_shape(known, tuple(weight.shape))
        return known

    def order(self, weight: Tensor, name: str) -> Tensor:
        """(K,) int64: the input channels of `weight`, ascending in magnitude."""
        return self.hessian_diagonal[self.name_of(weight, name)].argsort(stable=True)

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if self.shapes[name] != shape:
            raise RecipeError(
                f"the recipe is of another model: {name} was {self.shapes[name]} when it was "
                f"calibrated and is {shape}"
            )

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        path = Path(path)
        header = {"scheme": asdict(self.scheme), "shapes": self.shapes}
        metadata = {
            "format": _FORMAT,
            "version": str(_FORMAT_VERSION),
            "recipe": json.dumps(header),
        }
        tensors = {
            name: one.float().cpu().contiguous() for name, one in self.hessian_diagonal.items()
        }
        temporary = path.with_name(path.name + ".part")
        try:
            save_file(tensors, temporary, metadata=metadata)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Reads what `save` wrote. Raises RecipeError for anything else."""
        if not Path(path).is_file():
            raise RecipeError(f"{path} is no file")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise RecipeError(f"{path} is a safetensors file, but not a recipe")
                if int(metadata["version"]) > _FORMAT_VERSION:
                    raise RecipeError(
                        f"{path} is a recipe of format {metadata['version']}; this version of "
                        f"atom_compile reads up to {_FORMAT_VERSION}. Upgrade atom_compile."
                    )
                header = json.loads(metadata["recipe"])
                diagonals = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                recipe = cls(Scheme(**header["scheme"]), diagonals, header["shapes"])
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise RecipeError(f"{path} is damaged or no recipe: {error}") from error
        recipe._check(path)
        return recipe

    def _check(self, path: str | Path) -> None:
        for name, shape in self.shapes.items():
            diagonal = self.hessian_diagonal.get(name)
            if diagonal is None or diagonal.dim() != 1 or diagonal.numel() not in shape:
                raise RecipeError(
                    f"{path} is damaged: {name} {shape} has no matching Hessian diagonal"
                )
            if not bool(torch.isfinite(diagonal).all()):
                raise RecipeError(
                    f"{path} is damaged: the Hessian diagonal of {name} is not finite"
                )
        if extra := set(self.hessian_diagonal) - set(self.shapes):
            raise RecipeError(f"{path} is damaged: {sorted(extra)[0]} has no shape")
