"""Finds the linears of a graph: products of an activation with a weight that the model holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.fx import Graph, GraphModule, Node

from .canonical import LINEAR
from .graphs import is_call, is_tensor, value


@dataclass(frozen=True, eq=False)
class FoundLinear:
    """`node` computes x @ weight^T + bias; the weight is (N, K), or (K, N) if `transposed`."""

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    transposed: bool
    name: str
    is_head: bool

    @property
    def in_features(self) -> int:
        return int(value(self.weight).shape[0 if self.transposed else 1])

    @property
    def out_features(self) -> int:
        return int(value(self.weight).shape[1 if self.transposed else 0])


def find_linears(gm: GraphModule, names: Mapping[Node, str]) -> list[FoundLinear]:
    """All, in graph order, rewritable or not. `names`: weight placeholder -> parameter name."""
    tables = {
        tuple(value(node.args[1]).shape)
        for node in gm.graph.nodes
        if is_call(node, F.embedding, torch.embedding)
    }
    found = []
    for node in gm.graph.nodes:
        operands = _operands(node)
        if operands is None:
            continue
        x, weight, bias, transposed = operands
        name = names.get(weight, weight.name)
        found.append(
            FoundLinear(node, x, weight, bias, transposed, name, _is_head(node, weight, tables))
        )
    return found


def _operands(node: Node) -> tuple[Node, Node, Node | None, bool] | None:
    if is_call(node, LINEAR):
        arguments = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
        return arguments["input"], arguments["weight"], arguments.get("bias"), False
    if is_call(node, torch.matmul) and _is_weight_matrix(node.args[1]):
        return node.args[0], node.args[1], None, True
    if is_call(node, torch.addmm) and _is_weight_matrix(node.args[2]) and not node.kwargs:
        return node.args[1], node.args[2], node.args[0], True
    return None


def _is_weight_matrix(node: object) -> bool:
    return is_weight(node) and value(node).dim() == 2


def is_weight(node: object) -> bool:
    """A tensor that the model holds, as opposed to one that it was called with or computed."""
    if not isinstance(node, Node) or node.op != "placeholder" or not is_tensor(node):
        return False
    return bool(node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"))


def _is_head(node: Node, weight: Node, tables: set[tuple[int, ...]]) -> bool:
    """It has an embedding table's shape or, if there is no table, is wide and its output leaves."""
    N, K = value(weight).shape
    return (N, K) in tables or (not tables and N >= 8 * K and _leaves(node, node.graph))


def _leaves(node: Node, graph: Graph) -> bool:
    returned = set(graph.output_node().all_input_nodes)
    return node in returned or any(user in returned for user in node.users)
