"""Turns every planned linear into the plain operators."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..kernels.formats import BLOCK_FORMATS
from ..kernels.packing import GroupLayout, RowWeight, high_bytes
from ..kernels.quantize import quantize
from ..kernels.quantize_e4m3 import quantize_e4m3
from ..kernels.reorder import reorder
from ..kernels.rotate import rotate
from .derived import (
    ChannelOrder,
    InputTransform,
    LinearPart,
    PackedLinear,
    WeightRef,
    named_format,
)
from .graphs import call, fake_mode, placeholder, value
from .plan import PlannedLinear

if TYPE_CHECKING:
    from ..scheme import Scheme


def insert_quantization(
    gm: GraphModule, planned: Sequence[PlannedLinear], scheme: Scheme
) -> GraphModule:
    """Needs the plan. One linear at a time, nothing shared yet:

    y = linear(x, weight, bias)
      ->  r = atom.reorder(x, order)
          r = atom.rotate(r, ...)                   if the scheme has a rotation
          codes, scale = atom.quantize(r, ...)
          y = atom.linear(codes, scale, *packed_weight, bias, None, dtype)

    or atom.two_level_linear, if the scheme says so; with format=... of weights and activations that
    are no integers. If its activations are in e4m3:

      ->  codes, scale = atom.quantize_e4m3(x)
          y = atom.float8_linear(codes, scale, *packed_weight, bias, None, dtype, format=...)

    If it leaves activations in 16 bits:

      ->  r = atom.reorder(x, order)                only for GPTQ's act-order
          y = atom.weight_only_linear(r, *packed_weight, bias, None, dtype, format=...)
    """
    replaced: dict[Node, Node] = {}  # a linear may read another one directly
    for plan in planned:
        if plan.transform is not None:
            x = replaced.get(plan.found.x, plan.found.x)
            replaced[plan.found.node] = _insert(gm.graph, plan, x, plan.transform, scheme)
    return gm


def _insert(
    graph: Graph, plan: PlannedLinear, x: Node, transform: InputTransform, scheme: Scheme
) -> Node:
    found = plan.found
    weight = WeightRef(found.weight, found.name, found.transposed)
    part = LinearPart(weight, found.bias, found.out_features)
    weight_only = scheme.activation_bits == 16
    packed = PackedLinear(
        (part,),
        transform,
        scheme.weight_bits,
        scheme.weight_clip,
        weight_only,
        scheme.symmetric,
        scheme.weight_format,
    )
    order_node = None if transform.order.kept else order_placeholder(graph, transform.order)
    weight_nodes = weight_placeholders(graph, packed)
    with graph.inserting_before(found.node):
        activation: tuple[Node, ...] = (x,)
        if order_node is not None:
            activation = (call(graph, reorder, (x, order_node), like=found.node),)
        if not weight_only:
            activation = _quantized(graph, plan, activation[0], transform, scheme)
        operands = (*activation, *weight_nodes, None, value(found.node).dtype)
        product = call(graph, packed.operator, operands, like=found.node, **packed.named)
    found.node.replace_all_uses_with(product)
    graph.erase_node(found.node)
    product.meta["atom_packed"] = packed
    return product


def _quantized(
    graph: Graph, plan: PlannedLinear, x: Node, transform: InputTransform, scheme: Scheme
) -> tuple[Node, Node]:
    """Codes and scale of x, whose channels are in order."""
    like = plan.found.node
    if scheme.activation_format == "e4m3":
        return quantized_pair(graph, quantize_e4m3, (x,), like, {})
    cut = (transform.cut.group_size, transform.cut.outlier_channels)
    if transform.rotation:
        x = call(graph, rotate, (x, *cut, transform.rotation), like=like)
    clip, eights, per_token = plan.activation_clip, plan.int8_groups, transform.cut.per_token
    numbers = (scheme.activation_bits, *cut, clip, eights, 0, per_token)
    named = named_format(scheme.activation_format)
    return quantized_pair(graph, quantize, (x, *numbers), like, named)


def quantized_pair(
    graph: Graph,
    target: torch._ops.OpOverload,
    args: tuple[object, ...],
    like: Node,
    named: Mapping[str, Any],
) -> tuple[Node, Node]:
    """A quantize operator and its two results, codes and scale."""
    pair = call(graph, target, args, like, **named)
    codes = call(graph, operator.getitem, (pair, 0), like)
    scale = call(graph, operator.getitem, (pair, 1), like)
    return codes, scale


def order_placeholder(graph: Graph, order: ChannelOrder) -> Node:
    """The graph input that carries `order`: one, however many ask."""
    node: Node
    for node in graph.find_nodes(op="placeholder"):
        if node.meta.get("atom_derived", (None,))[0] is order:
            return node
    K = value(order.weights[0].node).shape[0 if order.weights[0].transposed else 1]
    with fake_mode(graph):
        fake = torch.empty(K, dtype=torch.int32, device=value(order.weights[0].node).device)
    return placeholder(graph, "order", fake, order, 0)


def weight_placeholders(graph: Graph, packed: PackedLinear) -> list[Node | None]:
    """The graph inputs of a packed linear: its packed weight's tensors, and bias or None."""
    layout: GroupLayout = packed.layout
    N, G = packed.out_features, layout.num_groups
    first = value(packed.parts[0].weight.node)
    empty = functools.partial(torch.empty, device=first.device)
    with fake_mode(graph):
        fakes: dict[str, torch.Tensor | None] = {
            "weight": empty(G, N, layout.group_size // 2, dtype=torch.uint8)
        }
        P = high_bytes(layout.group_size, packed.format)
        high_bits = empty(G, N, P, dtype=torch.uint8) if P else None
        if packed.kind is RowWeight:
            fakes |= {"high_bits": high_bits, "row_scale": empty(N, dtype=torch.float32)}
        elif layout.per_token:
            fakes["group_scale"] = empty(G, N, dtype=torch.int8)
            fakes["row_scale"] = empty(N, dtype=torch.float32)
        else:
            fakes["weight_scale"] = empty(G, N, dtype=torch.bfloat16)
        block = BLOCK_FORMATS.get(packed.format)
        if block is not None:
            blocks = G * layout.group_size // block.size
            fakes["weight_scale"] = empty(blocks, N, dtype=torch.uint8)
        if packed.weight_only:
            has_zero_point = not packed.symmetric
            fakes["zero_point"] = empty(G, N, dtype=torch.int8) if has_zero_point else None
            fakes["high_bits"] = high_bits
            has_row_scale = block is not None and block.tensor_scale
            fakes["row_scale"] = empty(N, dtype=torch.float32) if has_row_scale else None
        elif packed.kind is not RowWeight:
            fakes["outlier_weight"] = empty(N, layout.outlier_channels, dtype=torch.int8)
            fakes["outlier_scale"] = empty(N, dtype=torch.float32)
        biases = [value(part.bias) for part in packed.parts if part.bias is not None]
        fakes["bias"] = empty(N, dtype=biases[0].dtype) if biases else None
    return [
        None if fake is None else placeholder(graph, name, fake, packed, field)
        for field, (name, fake) in enumerate(fakes.items())
    ]
