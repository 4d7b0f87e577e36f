"""What produces an activation joins its quantize: norm, gate, attention, reorder, rotation."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..kernels.attention import attention
from ..kernels.attention_quantize import attention_quantize
from ..kernels.gated_quantize import gated_quantize
from ..kernels.norm_quantize import norm_quantize
from ..kernels.quantize import quantize, reorder_quantize
from ..kernels.reorder import reorder
from ..kernels.rotate import rotate
from .derived import PackedLinear
from .gates import match_gate
from .graphs import erase_unused, is_call, swapped_dims, value
from .insertion import quantized_pair
from .norms import match_norm
from .packed import HeldLinear
from .record import Record


def fuse_quantize(gm: GraphModule, record: Record) -> GraphModule:
    """Needs folding. No gather and no rounding pass is left on its own:

    quantize(reorder(norm(x), order))         ->  atom.norm_quantize(x, weight, bias, order, ...)
    quantize([reorder](act(gate) * up))       ->  atom.gated_quantize(gate, up, order, ...)
    quantize([reorder](atom.attention(...)))  ->  atom.attention_quantize(..., order, ...)
    quantize(reorder(x, order))               ->  atom.reorder_quantize(x, order, ...)

    A rotate between them becomes a number of any of these, or of quantize itself.
    """
    for node in list(gm.graph.nodes):
        if is_call(node, quantize):
            _fuse(node, record)
    return gm


_ROTATION = 5  # where it is among the numbers of a quantize


def _fuse(node: Node, record: Record) -> None:
    y: Any
    y, *numbers = node.args
    order, reader = None, node
    if is_call(y, rotate) and set(y.users) == {reader}:
        reader = y
        y, *_, block = y.args
        numbers[_ROTATION] = block
    if is_call(y, reorder) and set(y.users) == {reader}:
        reader = y
        y, order = y.args
    graph = node.graph
    # what others read must be computed anyway, and a norm or activation computed twice is no gain
    alone = set(y.users) == {reader}
    norm = match_norm(y) if alone else None
    gate = match_gate(y) if alone else None
    attended = _match_attention(y) if alone else None
    args: tuple[Any, ...]
    with graph.inserting_before(node):
        if norm is not None:
            target, name = norm_quantize, "norm"
            shape = (norm.weight, norm.bias, order, norm.eps, norm.center, norm.round_normed)
            args = (norm.x, *shape, value(y).dtype, *numbers)
        elif gate is not None:
            target, name = gated_quantize, f"{gate.activation} gate" if gate.up else gate.activation
            args = (gate.gate, gate.up, order, gate.activation, *numbers)
        elif attended is not None:
            target, name = attention_quantize, "attention"
            args = (*attended.args, order, *numbers)
        elif order is not None:
            target, name = reorder_quantize, "reorder"
            args = (y, order, *numbers)
        elif reader is not node:
            target, name = quantize, "rotation"
            args = (y, *numbers)
        else:
            return
        pair = quantized_pair(graph, target, args, node, node.kwargs)
        if attended is not None and target is attention_quantize:
            pair[0].args[0].meta["atom_attention"] = attended.meta["atom_attention"]
    quantized = node.args[0]
    readers = _replace_pair(node, pair)
    erase_unused(quantized)
    record.say(readers, f"{name} and quantize fused into {target}")


_FLATTEN = ("contiguous", "reshape", "view", "flatten", torch.reshape, torch.flatten)


def _match_attention(y: Node) -> Node | None:
    """Attention whose heads were put side by side: (B, heads, Q, D) -> y (B, Q, heads * D)."""
    node: Any = y
    while is_call(node, *_FLATTEN) and len(node.args[0].users) == 1:
        node = node.args[0]
    if swapped_dims(node) != {1, 2}:
        return None
    source = node.args[0]
    if not is_call(source, attention) or len(source.users) > 1:
        return None
    B, heads, Q, D = value(source).shape
    return source if tuple(value(y).shape) == (B, Q, heads * D) else None


def _replace_pair(node: Node, pair: tuple[Node, Node]) -> list[str]:
    """Redirects the users of a quantize; returns the names of the linears that read it."""
    names = []
    for item in list(node.users):
        assert is_call(item, operator.getitem)
        for reader in item.users:
            if item.args[1] == 0:
                packed: PackedLinear | HeldLinear = reader.meta["atom_packed"]
                names += [part.weight.name for part in packed.parts]
        item.replace_all_uses_with(pair[item.args[1]])  # type: ignore[index]
        node.graph.erase_node(item)
    node.graph.erase_node(node)
    return names
