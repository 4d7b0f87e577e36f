"""Linears that read one activation quantize it once and, if users allow, become one product."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..kernels.quantize import quantize
from ..kernels.quantize_e4m3 import quantize_e4m3
from ..kernels.reorder import reorder
from ..kernels.rotate import rotate
from .derived import PRODUCTS, PackedLinear, operands_of
from .graphs import call, erase_unused, is_call, value
from .insertion import weight_placeholders
from .packed import HeldLinear, held_operands, merge_held
from .record import Record

_QUANTIZE = (quantize, quantize_e4m3)


def share_inputs(gm: GraphModule, record: Record) -> GraphModule:
    """Needs insertion. Inductor does not deduplicate custom operators, so this does.

    q = atom.linear(*quantize(transform(x)), Wq)       transform: reorder, and rotate if asked for
    k = atom.linear(*quantize(transform(x)), Wk)
    v = atom.linear(*quantize(transform(x)), Wv)
      ->  c = quantize(transform(x))
          qkv = atom.linear(*c, [Wq; Wk; Wv])
          q, k, v = qkv[..., :a], qkv[..., a:b], qkv[..., b:]

    Linears on 16-bit activations are merged likewise.
    """
    _deduplicate(gm.graph)
    readers: dict[Any, list[Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        if is_call(node, *PRODUCTS):
            readers[node.args[0], node.args[-1]].append(node)
    for nodes in readers.values():
        if len(nodes) > 1:
            _merge(gm.graph, nodes, record)
    return gm


def _deduplicate(graph: Graph) -> None:
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        quantized = is_call(node, operator.getitem) and is_call(node.args[0], *_QUANTIZE)
        if not quantized and not is_call(node, reorder, rotate, *_QUANTIZE):
            continue
        named = tuple(sorted(node.kwargs.items()))
        first = seen.setdefault((node.target, node.args, named), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _merge(graph: Graph, nodes: list[Node], record: Record) -> None:
    at = nodes[0]
    nodes = sorted(nodes, key=lambda node: getattr(node.meta["atom_packed"], "first_row", 0))
    packed: list[Any] = [node.meta["atom_packed"] for node in nodes]
    names = [part.weight.name for one in packed for part in one.parts]
    biases = {
        value(part.bias).dtype for one in packed for part in one.parts if part.bias is not None
    }
    merged = _merged(packed)
    refused = "their biases differ in dtype" if len(biases) > 1 else _refused(nodes)
    if merged is None:
        refused = "the model does not hold their packed weights as one"
    if refused or merged is None:
        record.remark(names, f"not merged into one product: {refused}")
        return
    activation, _ = operands_of(nodes[0])
    *_, residual, dtype = nodes[0].args
    with graph.inserting_before(at):
        if isinstance(merged, HeldLinear):
            weight_nodes = held_operands(graph, merged, nodes)
        else:
            weight_nodes = weight_placeholders(graph, merged)
        operands = (*activation, *weight_nodes, residual, dtype)
        product = call(graph, merged.operator, operands, like=nodes[0], **merged.named)
        product.meta["atom_packed"] = merged
        start = 0
        for index, (node, part) in enumerate(zip(nodes, merged.parts, strict=True)):
            rows = (..., slice(start, start + part.out_features))
            piece = call(graph, operator.getitem, (product, rows), like=node)
            piece.meta["atom_part"] = index
            start += part.out_features
            node.replace_all_uses_with(piece)
    for node in nodes:
        operands = node.args
        graph.erase_node(node)
        for operand in operands:
            if is_call(operand, torch.narrow):
                erase_unused(operand)
    record.remark(names, f"one product of {merged.out_features} rows")


def _merged(packed: list[Any]) -> PackedLinear | HeldLinear | None:
    if all(isinstance(one, HeldLinear) for one in packed):
        return merge_held(packed)
    parts = tuple(part for one in packed for part in one.parts)
    merged: PackedLinear = replace(packed[0], parts=parts)
    return merged


def _refused(nodes: list[Node]) -> str | None:
    """A slice of a product is not contiguous: a user that needs a flat view forbids the merge."""
    width = sum(value(node).shape[-1] for node in nodes)
    for node in nodes:
        fake = value(node)
        with fake.fake_mode:
            piece = fake.new_empty(*fake.shape[:-1], width)[..., : fake.shape[-1]]
            for user in node.users:
                if user.op != "call_method" or user.target != "view" or user.args[0] is not node:
                    continue
                try:
                    piece.view(*torch.fx.map_arg(user.args[1:], value))
                except (RuntimeError, ValueError):
                    return f"{user.name} views one of them as if it were contiguous"
    return None
