"""A residual addition rides in the epilogue of the product that it adds."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from .derived import PRODUCTS, PackedLinear
from .graphs import call, is_call, is_tensor, value
from .packed import HeldLinear
from .record import Record


def fuse_residual(gm: GraphModule, record: Record) -> GraphModule:
    """Needs insertion.

    h = x + atom.linear(codes, scale, *weight, bias, None, dtype)
      ->  h = atom.linear(codes, scale, *weight, bias, x, dtype)
    """
    for node in list(gm.graph.nodes):
        if is_call(node, torch.add) and len(node.args) == 2 and not node.kwargs:
            for product, residual in (node.args, node.args[::-1]):
                if _is_legal(node, product, residual):
                    _fuse(node, product, residual, record)
                    break
    return gm


def _is_legal(node: Node, product: object, residual: object) -> bool:
    if not (is_call(product, *PRODUCTS) and is_tensor(residual)):
        return False
    assert isinstance(product, Node)
    added = value(node)
    same = all(
        value(one).shape == added.shape and value(one).dtype == added.dtype
        for one in (product, residual)
    )
    return (
        same
        and product.args[-2] is None
        and set(product.users) == {node}
        and residual is not product
    )


def _fuse(node: Node, product: Node, residual: Node, record: Record) -> None:
    *operands, _, dtype = product.args
    with node.graph.inserting_before(node):
        packed: PackedLinear | HeldLinear = product.meta["atom_packed"]
        fused = call(
            node.graph,
            packed.operator,
            (*operands, residual, dtype),
            like=product,
            **packed.named,
        )
    fused.meta["atom_packed"] = packed
    node.replace_all_uses_with(fused)
    node.graph.erase_node(node)
    node.graph.erase_node(product)
    record.say(
        [part.weight.name for part in packed.parts],
        "residual addition joined the product",
    )
