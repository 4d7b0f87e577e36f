"""Reorders that cost nothing: linears pack their rows in the order that the next one wants."""

from __future__ import annotations

import dataclasses
import operator

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from ..kernels.reorder import reorder
from .derived import PRODUCTS, ChannelOrder, PackedLinear
from .graphs import is_call, is_tensor, only_used_by, value
from .record import Record

_POINTWISE = (
    torch.mul,
    torch.add,
    torch.sub,
    torch.div,
    torch.pow,
    torch.sigmoid,
    torch.tanh,
    torch.relu,
    F.silu,
    F.gelu,
    torch._C._nn.gelu,
    "to",
)


def fold_reorders(gm: GraphModule, record: Record) -> GraphModule:
    """Needs sharing. Moves a reorder up into the rows of the linears that produce its input.

    Channel by channel operations in between commute with it.

    gate, up = atom.linear(x, [Wg; Wu])            gate, up = atom.linear(x, [Wg[order]; Wu[order]])
    y = reorder(silu(gate) * up, order)      ->    y = silu(gate) * up

    A rotation commutes with no activation, so one that follows the reorder stays where it is: the
    quantize after it takes it in.
    """
    for node in list(gm.graph.nodes):
        # a weight that the model holds packed stays as it is, and so does an order that it holds
        if is_call(node, reorder) and "atom_derived" in node.args[1].meta:
            producers = _producers(node)
            if producers:
                _fold(node, producers, record)
    return gm


def _producers(node: Node) -> list[tuple[Node, int]]:
    """The (linear, part) pairs whose rows can take the reorder; none if others read them."""
    K = value(node).shape[-1]
    inside: set[Node] = {node}
    leaves: list[Node] = []
    pending = [node.args[0]]
    while pending:
        current = pending.pop()
        assert isinstance(current, Node)
        if current in inside:
            continue
        inside.add(current)
        if _part(current) is not None:
            leaves.append(current)
        elif is_call(current, *_POINTWISE) and value(current).shape[-1] == K:
            operands = [argument for argument in current.all_input_nodes if is_tensor(argument)]
            pending += [operand for operand in operands if value(operand).numel() != 1]
        else:
            return []
    if not all(only_used_by(one, inside) for one in inside - {node}):
        return []
    return [part for leaf in leaves if (part := _part(leaf)) is not None]


def _part(node: Node) -> tuple[Node, int] | None:
    """A whole linear, or one that was merged with others."""
    if is_call(node, *PRODUCTS):
        packed = node.meta.get("atom_packed")
        if not isinstance(packed, PackedLinear):
            return None
        return (node, 0) if len(packed.parts) == 1 and node.args[-2] is None else None
    if is_call(node, operator.getitem) and "atom_part" in node.meta:
        product = node.args[0]
        assert isinstance(product, Node)
        merged = isinstance(product.meta["atom_packed"], PackedLinear)
        return (product, node.meta["atom_part"]) if merged else None
    return None


def _fold(node: Node, producers: list[tuple[Node, int]], record: Record) -> None:
    x, order_node = node.args
    assert isinstance(x, Node) and isinstance(order_node, Node)
    order: ChannelOrder = order_node.meta["atom_derived"][0]
    for product, index in producers:
        packed: PackedLinear = product.meta["atom_packed"]
        parts = list(packed.parts)
        parts[index] = dataclasses.replace(parts[index], row_order=order)
        _replace_packed(product, dataclasses.replace(packed, parts=tuple(parts)))
    node.replace_all_uses_with(x)
    node.graph.erase_node(node)
    into = [product.meta["atom_packed"].parts[index].weight.name for product, index in producers]
    record.remark(
        [weight.name for weight in order.weights],
        f"reorder folded into the rows of {', '.join(into)}",
    )


def _replace_packed(product: Node, packed: PackedLinear) -> None:
    product.meta["atom_packed"] = packed
    for argument in product.all_input_nodes:
        derived, field = argument.meta.get("atom_derived", (None, 0))
        if isinstance(derived, PackedLinear):
            argument.meta["atom_derived"] = packed, field
