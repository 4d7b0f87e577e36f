"""Finds the linears of a graph: products of an activation with a weight that the model holds."""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping
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
    is_router: bool = False  # its outputs are scores of experts, of which the largest are chosen

    @property
    def in_features(self) -> int:
        return int(value(self.weight).shape[0 if self.transposed else 1])

    @property
    def out_features(self) -> int:
        return int(value(self.weight).shape[1 if self.transposed else 0])


def find_linears(gm: GraphModule, names: Mapping[Node, str]) -> list[FoundLinear]:
    """All, in graph order, rewritable or not. `names`: weight placeholder -> parameter name."""
    operands = {node: found for node in gm.graph.nodes if (found := _operands(node))}
    read_on = _read_by_one_of(gm.graph, operands)
    ranked = _ranked(gm.graph, operands)
    tables = {
        tuple(value(node.args[1]).shape)
        for node in gm.graph.nodes
        if is_call(node, F.embedding, torch.embedding)
    }
    linears = []
    for node, (x, weight, bias, transposed) in operands.items():
        name = names.get(weight, weight.name)
        shape = tuple(value(weight).shape)
        is_head = node not in read_on and _looks_like_a_head(
            shape[::-1] if transposed else shape, name, tables
        )
        is_router = node in ranked
        linears.append(FoundLinear(node, x, weight, bias, transposed, name, is_head, is_router))
    return linears


def find_stacks(graph: Graph) -> list[Node]:
    """Weights of all experts of a layer in one tensor, which no linear reads."""
    return [
        node
        for node in graph.find_nodes(op="placeholder")
        if is_weight(node) and node.users and _is_stack(value(node))
    ]


def _is_stack(weight: torch.Tensor) -> bool:
    """No convolution's, which reaches over a few places, and nothing packed."""
    return weight.dim() == 3 and min(weight.shape[1:]) >= 16 and weight.is_floating_point()


def _read_by_one_of(graph: Graph, linears: Container[Node]) -> set[Node]:
    """The nodes whose value reaches one of `linears`."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        if any(user in linears or user in found for user in node.users):
            found.add(node)
    return found


def _ranked(graph: Graph, linears: Container[Node]) -> set[Node]:
    """The nodes of whose values the largest are looked for, without one of `linears` in between."""
    found: set[Node] = set()
    for node in reversed(graph.nodes):
        readers = (user for user in node.users if user not in linears)
        if any(_ranks(user) or user in found for user in readers):
            found.add(node)
    return found


def _ranks(node: Node) -> bool:
    """It tells where the largest values are, and not only how large."""
    if is_call(node, torch.max, "max"):
        return any(is_call(user, operator.getitem) and user.args[1] == 1 for user in node.users)
    return is_call(node, *_RANKS)


_RANKS = torch.topk, "topk", torch.argmax, "argmax", torch.sort, "sort", torch.argsort, "argsort"


def _looks_like_a_head(shape: tuple[int, ...], name: str, tables: set[tuple[int, ...]]) -> bool:
    """It has the shape of an embedding table or as many outputs as the largest has rows, or is wide
    where the graph has no table, or is called as transformers calls it."""
    N, K = shape
    if f".{name}".endswith(".lm_head.weight"):
        return True
    if tables:
        return shape in tables or max(rows for rows, _ in tables) == N
    return N >= 8 * K


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
    """A tensor that the model holds, as opposed to one that it was called with or computed.

    A KV cache is static for Dynamo as well, but no parameter or buffer of a module.
    """
    if not isinstance(node, Node) or node.op != "placeholder" or not is_tensor(node):
        return False
    if not node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"):
        return False
    source = getattr(node, "_dynamo_source", None)
    while source is not None:
        if getattr(source, "member", None) in ("_parameters", "_buffers"):
            return True
        source = getattr(source, "base", None)
    return False
