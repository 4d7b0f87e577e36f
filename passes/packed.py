"""Linears whose weights the model itself holds packed: the passes treat them like inserted ones."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..kernels.packing import GroupLayout
from ..kernels.quantize import quantize
from ..kernels.quantize_e4m3 import quantize_e4m3
from ..kernels.rotate import rotate
from .derived import PRODUCTS, LinearPart, WeightRef, operands_of
from .graphs import call, fake_mode, is_call, module_path, placeholder, value
from .linears import is_weight
from .record import Record


@dataclass(frozen=True, eq=False)
class HeldLinear:
    """The linears in one product; `PackedLinear` is the same of weights that the passes pack.

    layout: the cut of the packed columns. operator, named: what multiplies, and its keywords.
    weight: the inputs that hold the packed weight, None for
    a part that it does not have; its rows from `first_row` on are the parts'.
    """

    parts: tuple[LinearPart, ...]
    weight: tuple[Node | None, ...]
    first_row: int
    in_features: int
    layout: GroupLayout
    operator: torch._ops.OpOverload
    named: Mapping[str, Any]

    @property
    def has_bias(self) -> bool:
        return any(part.bias is not None for part in self.parts)

    @property
    def out_features(self) -> int:
        return sum(part.out_features for part in self.parts)


def find_packed(gm: GraphModule, record: Record) -> list[HeldLinear]:
    """Needs canonicalization. All, in graph order; their products are marked as inserted ones are.

    codes, scale = atom.quantize(atom.reorder(x, order), ...)
    y = atom.linear(codes, scale, *(narrow(one, ...) for one in weight), bias, None, dtype)

    narrow: only where several linears hold one weight.
    """
    found = []
    for node in gm.graph.nodes:
        if is_call(node, *PRODUCTS):
            held = _match(node)
            if held is not None:
                node.meta["atom_packed"] = held
                found.append(held)
                record.remark([held.parts[0].weight.name], "the model holds it packed")
    return found


def _match(node: Node) -> HeldLinear | None:
    (x, *scale), operands = operands_of(node)
    bias: Any = node.args[-3]
    rows = [_rows(operand) for operand in operands]
    starts = {first for held, first in rows if held is not None}
    if not all(held is None or is_weight(held) for held, _ in rows) or len(starts) > 1:
        return None
    if bias is not None and not is_weight(bias):
        return None
    outlier_channels, per_token = 0, False
    if scale:
        if not is_call(x, operator.getitem) or not is_call(x.args[0], quantize, quantize_e4m3):
            return None
        if is_call(x.args[0], quantize_e4m3):
            per_token = True
        else:
            outlier_channels = value(operands[-2]).shape[1]
            per_token = x.args[0].args[-1] is True
        x = x.args[0].args[0]
    ordered = x
    while is_call(ordered, rotate):
        ordered = ordered.args[0]
    _, out_features, half_group = value(operands[0]).shape
    layout = GroupLayout(value(x).shape[-1], 2 * half_group, outlier_channels, per_token)
    weight = tuple(held for held, _ in rows)
    name = f"{module_path(node)}.weight".removeprefix(".")
    part = LinearPart(WeightRef(weight[0], name, False), bias, out_features)
    in_features = value(ordered).shape[-1]
    called = node.target, node.kwargs
    return HeldLinear((part,), weight, starts.pop(), in_features, layout, *called)


def _rows(operand: Any) -> tuple[Any, int]:
    """What an operand is rows of, and the first of them."""
    return (operand.args[0], operand.args[2]) if is_call(operand, torch.narrow) else (operand, 0)


def merge_held(packed: Sequence[HeldLinear]) -> HeldLinear | None:
    """The product of all of them, if they are rows of one weight, one after the other."""
    first = packed[0]
    end = first.first_row
    for one in packed:
        if one.weight != first.weight or one.first_row != end:
            return None
        end += one.out_features
    parts = tuple(part for one in packed for part in one.parts)
    return replace(first, parts=parts)


def held_operands(graph: Graph, merged: HeldLinear, nodes: Sequence[Node]) -> list[Node | None]:
    """Packed weight and bias of `merged`, which replaces `nodes`, at the insertion point."""
    operands: list[Any] = []
    for held, operand in zip(merged.weight, operands_of(nodes[0])[1], strict=True):
        if held is None:
            operands.append(None)
            continue
        dim = operand.args[1] if is_call(operand, torch.narrow) else 0
        rows = merged.out_features
        whole = merged.first_row == 0 and value(held).shape[dim] == rows
        narrowed = (held, dim, merged.first_row, rows)
        operands.append(held if whole else call(graph, torch.narrow, narrowed, like=nodes[0]))
    return [*operands, _joined_bias(graph, merged)]


def _joined_bias(graph: Graph, merged: HeldLinear) -> Node | None:
    biases = [part.bias for part in merged.parts if part.bias is not None]
    if not biases:
        return None
    like = value(biases[0])
    with fake_mode(graph):
        fake = torch.empty(merged.out_features, dtype=like.dtype, device=like.device)
    return placeholder(graph, "bias", fake, JoinedBias(merged.parts), 0)


@dataclass(frozen=True, eq=False)
class JoinedBias:
    """The biases of several linears, zeros for one that has none."""

    parts: tuple[LinearPart, ...]

    @property
    def sources(self) -> tuple[Node, ...]:
        return tuple(part.bias for part in self.parts if part.bias is not None)

    def signature(self) -> Hashable:
        return "bias", tuple((part.bias is None, part.out_features) for part in self.parts)

    def compute(self, tensors: Mapping[Node, Tensor]) -> tuple[Tensor | None, ...]:
        like = tensors[self.sources[0]].detach()
        biases = [
            like.new_zeros(part.out_features) if part.bias is None else tensors[part.bias].detach()
            for part in self.parts
        ]
        return (torch.cat(biases),)
