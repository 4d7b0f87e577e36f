"""What a rewritten graph reads instead of its weights: tensors derived from them at each call.

A compiled graph serves every layer of the same shapes, so nothing computed from one layer's weights
may be part of it. Passes therefore only *describe* packed weights and the transforms of what they
are multiplied with, in terms of the graph's weight placeholders; the backend computes them from the
tensors that each call brings.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Node

from ..kernels.float8_linear import float8_linear
from ..kernels.linear import linear
from ..kernels.packing import (
    AnyWeight,
    GroupedWeight,
    GroupLayout,
    PackedWeight,
    RowWeight,
    TwoLevelWeight,
    concatenate_rows,
    pack_grouped,
    pack_rows,
    pack_two_level,
    pack_weight,
    row_scales,
    select_rows,
)
from ..kernels.two_level_linear import two_level_linear
from ..kernels.weight_only_linear import weight_only_linear
from .transforms import Transform, deal, transformed_layout


class ChoiceLike(Protocol):
    """The part of a `LayerChoice` that the plan needs."""

    @property
    def activation_clip(self) -> float: ...
    @property
    def int8_groups(self) -> int: ...
    @property
    def keep(self) -> bool: ...
    @property
    def reason(self) -> str | None: ...
    @property
    def error(self) -> float | None: ...
    @property
    def note(self) -> str | None: ...


class RecipeLike(Protocol):
    """The part of a `Recipe` that passes need."""

    def order(self, weight: Tensor, name: str) -> Tensor: ...

    def rounded_weight(
        self, weight: Tensor, name: str, transposed: bool, cut: GroupLayout, rotation: int
    ) -> AnyWeight | None: ...

    @property
    def layers(self) -> Mapping[str, ChoiceLike]: ...


class Derived(Protocol):
    """A tuple of tensors computed from weight placeholders."""

    @property
    def sources(self) -> tuple[Node, ...]: ...

    def signature(self) -> Hashable:
        """Equal where equal source tensors give equal results; speaks of sources by position."""
        ...

    def compute(self, tensors: Mapping[Node, Tensor]) -> tuple[Tensor | None, ...]: ...


@dataclass(frozen=True, eq=False)
class WeightRef:
    """A linear's weight: its placeholder, parameter name, and whether it is stored as (K, N)."""

    node: Node
    name: str
    transposed: bool

    def read(self, tensors: Mapping[Node, Tensor]) -> Tensor:
        weight = tensors[self.node].detach()
        return weight.t() if self.transposed else weight


@dataclass(frozen=True, eq=False)
class ChannelOrder:
    """One activation's channels, ascending in magnitude: for all `weights` that read it.

    With a recipe, they are in its order. Without one the weights tell: a channel that a trained
    model reads through small weights is, as a rule, a large one (measured: as good as the norm's
    own weight).

    dealt: without a recipe, whose orders are dealt already: how to `deal` them out, if at all.
    kept: the channels stay as they are, and nothing needs to reorder them.
    descending: the largest first, as GPTQ's act-order has it.
    """

    weights: tuple[WeightRef, ...]
    recipe: RecipeLike | None
    dealt: tuple[GroupLayout, int] | None = None
    kept: bool = False
    descending: bool = False

    @property
    def sources(self) -> tuple[Node, ...]:
        return tuple(weight.node for weight in self.weights)

    def signature(self) -> Hashable:
        names = tuple(weight.name for weight in self.weights) if self.recipe else None
        transposed = tuple(weight.transposed for weight in self.weights)
        return "order", names, transposed, self.recipe, self.dealt, self.kept, self.descending

    def compute(self, tensors: Mapping[Node, Tensor]) -> tuple[Tensor | None, ...]:
        return (self.indices(tensors).to(torch.int32),)

    def indices(self, tensors: Mapping[Node, Tensor]) -> Tensor:
        """(K,) int64."""
        first = self.weights[0]
        if self.recipe is not None:
            return self.recipe.order(tensors[first.node], first.name).to(tensors[first.node].device)
        # a norm is taken in float32 without a copy of the weight in it
        norms = [
            torch.linalg.vector_norm(weight.read(tensors), dim=0, dtype=torch.float32)
            for weight in self.weights
        ]
        power = torch.stack(norms).square().sum(0)
        if self.kept:
            return torch.arange(len(power), device=power.device)
        ascending = power.argsort(descending=not self.descending, stable=True)
        return ascending if self.dealt is None else deal(ascending, *self.dealt)


@dataclass(frozen=True, eq=False)
class InputTransform:
    """A `Transform` whose order is known only when a call brings the weights."""

    order: ChannelOrder
    cut: GroupLayout
    rotation: int = 0

    @property
    def sources(self) -> tuple[Node, ...]:
        return self.order.sources

    @property
    def layout(self) -> GroupLayout:
        """The cut of the transformed channels."""
        return transformed_layout(self.cut, self.rotation)

    def signature(self) -> Hashable:
        return self.order.signature(), self.cut, self.rotation

    def known(self, tensors: Mapping[Node, Tensor]) -> Transform:
        """With the order that these weights give."""
        return Transform(self.order.indices(tensors), self.cut, self.rotation)


@dataclass(frozen=True, eq=False)
class LinearPart:
    """One linear of a merged weight: its rows go into the order that the linear after it wants."""

    weight: WeightRef
    bias: Node | None
    out_features: int
    row_order: ChannelOrder | None = None

    @property
    def sources(self) -> tuple[Node, ...]:
        bias = () if self.bias is None else (self.bias,)
        return (self.weight.node, *bias, *(self.row_order.sources if self.row_order else ()))


PRODUCTS = {linear: 2, two_level_linear: 2, float8_linear: 2, weight_only_linear: 1}
"""Operators on (codes, scale, *packed weight, bias, residual, dtype), or on x instead of the first
two, and how many of the operands are the activation's."""
_MOST_AT_ONCE = 2**22  # numbers of a weight that are rounded at a time: 16 MiB for each in float32


def named_format(format: str) -> dict[str, str]:
    """The keywords of an operator on numbers of that format; integers need none."""
    return {} if format == "int" else {"format": format}


def operands_of(product: Node) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The activation's operands of a product and its packed weight's, without the bias."""
    count = PRODUCTS[product.target]  # type: ignore[index]
    return product.args[:count], product.args[count:-3]


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """Packed weight (up to five tensors, see packing.py) and bias of the linears in one product.

    Its `operator` is the one of PRODUCTS that multiplies by it, with the keywords `named` beside
    the operands. weight_only: activations stay in 16 bits. symmetric: as `pack_grouped` has it, for
    such a weight alone. format: of the weight.
    """

    parts: tuple[LinearPart, ...]
    transform: InputTransform
    bits: int
    clip: float
    weight_only: bool = False
    symmetric: bool = True
    format: str = "int"

    @property
    def sources(self) -> tuple[Node, ...]:
        parts = (node for part in self.parts for node in part.sources)
        return (*parts, *self.transform.sources)

    @property
    def layout(self) -> GroupLayout:
        """The cut of the packed columns."""
        return self.transform.layout

    @property
    def scales_rows(self) -> bool:
        """Whether the weight has one scale per row and nothing else: for activations in e4m3."""
        return self.layout.per_token and self.format != "int"

    @property
    def operator(self) -> torch._ops.OpOverload:
        if self.weight_only:
            return weight_only_linear
        if self.scales_rows:
            return float8_linear
        return two_level_linear if self.layout.per_token else linear

    @property
    def named(self) -> dict[str, str]:
        return named_format(self.format)

    @property
    def kind(self) -> type[AnyWeight]:
        """Of the packed weight, the first tensors that `compute` gives; the last is the bias."""
        if self.weight_only:
            return GroupedWeight
        if self.scales_rows:
            return RowWeight
        return TwoLevelWeight if self.layout.per_token else PackedWeight

    @property
    def has_bias(self) -> bool:
        return any(part.bias is not None for part in self.parts)

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)

    def signature(self) -> Hashable:
        parts = tuple(
            (
                part.weight.transposed,
                part.bias is None,
                part.row_order.signature() if part.row_order else None,
            )
            for part in self.parts
        )
        numbers = self.bits, self.clip, self.weight_only, self.symmetric, self.format
        return "linear", parts, self.transform.signature(), numbers

    def compute(self, tensors: Mapping[Node, Tensor]) -> tuple[Tensor | None, ...]:
        packed, biases = [], []
        for part in self.parts:
            weight = part.weight.read(tensors)
            bias = (
                weight.new_zeros(part.out_features)
                if part.bias is None
                else tensors[part.bias].detach()
            )
            # one linear at a time, so that no more than one is ever held in float32
            one = self._rounded(part.weight, tensors) or self._round(weight, tensors)
            if part.row_order is not None:
                rows = part.row_order.indices(tensors)
                one, bias = select_rows(one, rows), bias[rows]
            packed.append(one)
            biases.append(bias)
        return *concatenate_rows(packed), torch.cat(biases) if self.has_bias else None

    def _round(self, weight: Tensor, tensors: Mapping[Node, Tensor]) -> AnyWeight:
        transform = self.transform.known(tensors)
        at_once = max(1, _MOST_AT_ONCE // weight.shape[1])
        row_scale = row_scales([weight], self.format)  # the same number for all rows
        return concatenate_rows(
            [
                self._round_rows(
                    transform.apply(rows), None if row_scale is None else row_scale[: len(rows)]
                )
                for rows in weight.split(at_once)
            ]
        )

    def _round_rows(self, columns: Tensor, row_scale: Tensor | None) -> AnyWeight:
        if self.weight_only:
            numbers = self.bits, self.clip, self.symmetric, self.format
            return pack_grouped(columns, self.layout, *numbers, row_scale)
        if self.scales_rows:
            return pack_rows(columns, self.layout, self.format)
        if self.layout.per_token:
            return pack_two_level(columns, self.layout)
        return pack_weight(columns, self.layout, self.bits, self.clip, self.format)

    def _rounded(self, weight: WeightRef, tensors: Mapping[Node, Tensor]) -> AnyWeight | None:
        """What calibration made of this very weight, under this transform."""
        recipe = self.transform.order.recipe
        if recipe is None:
            return None
        tensor = tensors[weight.node]
        cut, rotation = self.transform.cut, self.transform.rotation
        return recipe.rounded_weight(tensor, weight.name, weight.transposed, cut, rotation)


@dataclass(frozen=True, eq=False)
class PackedTable:
    """An embedding table's packed weight and scale; its channels stay in their order."""

    table: WeightRef
    layout: GroupLayout
    bits: int
    clip: float

    @property
    def sources(self) -> tuple[Node, ...]:
        return (self.table.node,)

    def signature(self) -> Hashable:
        return "table", self.layout, self.bits, self.clip

    def compute(self, tensors: Mapping[Node, Tensor]) -> tuple[Tensor | None, ...]:
        packed = pack_weight(self.table.read(tensors), self.layout, self.bits, self.clip)
        return packed.weight, packed.weight_scale
