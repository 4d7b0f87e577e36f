"""What calibration found for one model, keyed by parameter name."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .content import content_hash
from .errors import RecipeError, unknown
from .expert_names import shapes_of_experts
from .files import write_whole
from .kernels.packing import (
    AnyWeight,
    GroupedWeight,
    GroupLayout,
    PackedWeight,
    RowWeight,
    TwoLevelWeight,
    to_device,
)
from .passes.transforms import deal
from .scheme import Scheme

_FORMAT_VERSION = 2
_FORMAT = "atom_compile recipe"
# bfloat16 moves a row's checksum by less than this share of the row's norm, an update by more
_SAME_WEIGHT = 2**-7


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """What calibration chose for one linear; linears of one input share all but the error.

    activation_clip: the share of a group's largest magnitude that the scheme's grid spans.
    int8_groups: so many groups before the outliers have INT8 activations.
    keep: leave the linear in its own precision.
    error: noise over signal of its output on the calibration batches, both powers; without GPTQ
        that of its activations alone.
    reason: why it has more than the scheme's precision, if it has.
    note: what was unusual, such as dead input channels.
    """

    activation_clip: float
    int8_groups: int = 0
    keep: bool = False
    error: float | None = None
    reason: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class RoundedWeight:
    """A weight that GPTQ rounded: its rows as they were, its columns in the recipe's order and
    turned if the recipe's scheme has a rotation.

    checksum: (N,) float32, see `checksum`: tells whether the model still has that weight.
    """

    packed: AnyWeight
    checksum: Tensor

    def is_of(self, weight: Tensor) -> bool:
        """weight (N, K): unchanged, but for its precision."""
        wanted = self.checksum.to(weight.device)
        return bool((checksum(weight) - wanted).norm() <= _SAME_WEIGHT * wanted.norm())


def checksum(weight: Tensor) -> Tensor:
    """(N, K) -> (N,) float32: each row's sum under signs that are fixed once and for all."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (weight.shape[1],), generator=generator) * 2.0 - 1.0
    return weight.float() @ signs.to(weight.device)


class Recipe:
    """What calibration found about each linear, and the scheme that it was found for.

    An expert's weight has the name that it has once the model is packed (expert_names.py).

    scheme: the default of a compilation with this recipe.
    hessian_diagonal: weight's parameter name -> (K,) float32, each input channel's mean square.
    shapes: weight's parameter name -> the weight's shape.
    orders: weight's parameter name -> (K,), its input channels in order, dealt out over the groups
        if `scheme` has a rotation. They, `layers` and `rounded` hold for `scheme` alone; where one
        is missing, it follows from the channels' magnitudes.
    layers: weight's parameter name -> what was chosen for it.
    rounded: weight's parameter name -> the weight as GPTQ rounded it to `scheme`.

    Source: Atom (arXiv 2310.19102), section 4.1: channels are sorted by it once, the outliers last.
    """

    def __init__(
        self,
        scheme: Scheme,
        hessian_diagonal: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        orders: Mapping[str, Tensor] | None = None,
        layers: Mapping[str, LayerChoice] | None = None,
        rounded: Mapping[str, RoundedWeight] | None = None,
    ) -> None:
        self.scheme = scheme
        self.hessian_diagonal = dict(hessian_diagonal)
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.orders = dict(orders or {})
        self.layers = dict(layers or {})
        self.rounded = dict(rounded or {})
        # parameter -> its name in the calibrated model
        self._names: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._views: dict[Scheme, Recipe] = {}

    def __repr__(self) -> str:
        return f"Recipe({len(self.hessian_diagonal)} linears, {self.scheme})"

    def bind(self, model: nn.Module) -> Recipe:
        """Ties this recipe to `model`'s parameters, so that parts of it can be compiled one by one.

        Raises RecipeError if the model lacks a weight of the recipe or has it in another shape.
        Returns the recipe.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        shapes = {name: tuple(one.shape) for name, one in parameters.items()}
        shapes |= shapes_of_experts(model)
        for name in self.shapes:
            if name not in shapes:
                missing = unknown("parameter", name, list(parameters)[:8])
                raise RecipeError(f"the recipe is of another model: {missing}")
            self._check_shape(name, shapes[name])
        for name in self.shapes.keys() & parameters.keys():
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
        """(K,) int64: the input channels of `weight` in the scheme's order, outliers last."""
        known = self.name_of(weight, name)
        return self.orders[known].long() if known in self.orders else self.default_order(known)

    def default_order(self, name: str) -> Tensor:
        """(K,) int64: that of a calibrated weight's channels, by their magnitude alone."""
        diagonal = self.hessian_diagonal[name]
        if not self.scheme.sorts_channels:
            by_magnitude = diagonal.argsort(descending=True, stable=True)
            return by_magnitude if self.scheme.act_order else torch.arange(len(diagonal))
        ascending = diagonal.argsort(stable=True)
        if not self.scheme.rotation:
            return ascending
        layout = self.scheme.layout(len(ascending))
        return deal(ascending, layout, self.scheme.int8_groups(layout))

    def rounded_weight(
        self, weight: Tensor, name: str, transposed: bool, cut: GroupLayout, rotation: int
    ) -> AnyWeight | None:
        """The weight as GPTQ rounded it, rows as they are, columns in order and turned.

        cut, rotation: those of the linear that will read it; they must be the scheme's.

        None if it was not rounded or, with a warning, has changed since.
        """
        known_name = self.name_of(weight, name)
        known = self.rounded.get(known_name)
        if known is None:
            return None
        its_own = self.scheme.layout(cut.width), self.scheme.rotation or 0
        assert (cut, rotation) == its_own, "another transform's columns are no columns of this one"
        if not known.is_of(weight.detach().t() if transposed else weight.detach()):
            warnings.warn(
                f"{known_name} has changed since it was calibrated and is rounded to nearest; "
                "calibrate again for GPTQ's weights",
                stacklevel=2,
            )
            return None
        return to_device(known.packed, weight.device)

    def for_scheme(self, scheme: Scheme) -> Recipe:
        """Itself for its own scheme; for another one, what holds for any: the statistics.

        Always the same object for the same scheme, since packed weights are kept by recipe.
        """
        if scheme == self.scheme:
            return self
        if scheme not in self._views:
            view = Recipe(scheme, self.hessian_diagonal, self.shapes)
            view._names = self._names
            self._views[scheme] = view
        return self._views[scheme]

    @property
    def lifted(self) -> int:
        """How many linears have more INT8 groups than the scheme gives, or stay in 16 bits."""
        return sum(choice.reason is not None for choice in self.layers.values())

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if self.shapes[name] != shape:
            raise RecipeError(
                f"the recipe is of another model: {name} was {self.shapes[name]} when it was "
                f"calibrated and is {shape}"
            )

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        metadata = {
            "format": _FORMAT,
            "version": str(_FORMAT_VERSION),
            "recipe": self._header(),
        }
        save_whole(self._tensors(), metadata, path)

    @property
    def digest(self) -> str:
        """Of all that a file of it holds: what was quantized with this recipe remembers it."""
        digest = hashlib.sha256(self._header().encode())
        for name, tensor in sorted(self._tensors().items()):
            digest.update(f"{name} {content_hash(tensor)}".encode())
        return digest.hexdigest()

    def _header(self) -> str:
        layers = {name: asdict(choice) for name, choice in self.layers.items()}
        header = {"scheme": asdict(self.scheme), "shapes": self.shapes, "layers": layers}
        return json.dumps(header)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {
            name: one.float().cpu().contiguous() for name, one in self.hessian_diagonal.items()
        }
        for name, order in self.orders.items():
            tensors[f"{name}{_SEPARATOR}order"] = order.to(torch.int32).cpu().contiguous()
        for name, rounded in self.rounded.items():
            tensors |= rounded_to_tensors(name, rounded)
        return tensors

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
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            diagonals = {name: one for name, one in tensors.items() if _SEPARATOR not in name}
            layers = {
                name: LayerChoice(**choice) for name, choice in header.get("layers", {}).items()
            }
            suffix = f"{_SEPARATOR}order"
            orders = {
                name.removesuffix(suffix): one
                for name, one in tensors.items()
                if name.endswith(suffix)
            }
            recipe = cls(
                Scheme(**header["scheme"]),
                diagonals,
                header["shapes"],
                orders,
                layers,
                rounded_from_tensors(tensors),
            )
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
        for name, order in self.orders.items():
            channels = torch.arange(order.numel(), dtype=order.dtype)
            if name not in self.shapes or not torch.equal(order.sort().values, channels):
                raise RecipeError(f"{path} is damaged: the order of {name} is no permutation")
        if extra := (set(self.layers) | set(self.rounded)) - set(self.shapes):
            raise RecipeError(f"{path} is damaged: {sorted(extra)[0]} has no shape")


_SEPARATOR = "#"  # no parameter's name has one


def rounded_to_tensors(name: str, rounded: RoundedWeight) -> dict[str, Tensor]:
    """What a file holds of one rounded weight: "name#weight", "name#weight_scale" and so on."""
    tensors = rounded.packed._asdict() | {"checksum": rounded.checksum}
    return {
        f"{name}{_SEPARATOR}{field}": one.cpu().contiguous()
        for field, one in tensors.items()
        if one is not None
    }


def rounded_from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, RoundedWeight]:
    """Name -> rounded weight. Raises KeyError if a part of one is missing."""
    names = {name.rpartition(_SEPARATOR)[0] for name in tensors if name.endswith("checksum")}
    result = {}
    for name in sorted(names):
        prefix = f"{name}{_SEPARATOR}"
        fields = {key.removeprefix(prefix) for key in tensors if key.startswith(prefix)}
        kind: Any = PackedWeight
        if "group_scale" in fields:
            kind = TwoLevelWeight
        elif "weight_scale" not in fields:
            kind = RowWeight
        elif "outlier_weight" not in fields:
            kind = GroupedWeight
        wanted = fields | set(kind._fields) - set(kind._field_defaults)
        packed = kind(**{one: tensors[f"{prefix}{one}"] for one in kind._fields if one in wanted})
        result[name] = RoundedWeight(packed, tensors[f"{name}{_SEPARATOR}checksum"])
    return result


def save_whole(tensors: dict[str, Tensor], metadata: dict[str, str], path: str | Path) -> None:
    """Writes a safetensors file, whole or not at all."""
    write_whole(Path(path), lambda unfinished: save_file(tensors, unfinished, metadata=metadata))
