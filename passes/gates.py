"""Recognises the middle of an MLP: activation(gate) * up, or an activation alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from .graphs import argument, is_call, is_tensor, value


@dataclass(frozen=True, eq=False)
class FoundGate:
    """The arguments of `atom::gated_quantize` that compute the same."""

    gate: Node
    up: Node | None
    activation: str


def match_gate(y: Node) -> FoundGate | None:
    """The gated activation that ends in `y`, or None."""
    alone = _match_activation(y)
    if alone is not None:
        return FoundGate(alone[0], None, alone[1])
    if is_call(y, torch.mul) and len(y.args) == 2:
        for activated, up in (y.args, y.args[::-1]):
            match = _match_activation(activated)
            if match is not None and is_tensor(up) and _alike(match[0], up, y):
                return FoundGate(match[0], up, match[1])
    return None


def _match_activation(node: Any) -> tuple[Node, str] | None:
    if is_call(node, F.silu) and not argument(node, 1, "inplace", False):
        return node.args[0], "silu"
    if is_call(node, F.gelu, torch._C._nn.gelu):
        approximate = node.kwargs.get("approximate", node.args[1] if len(node.args) > 1 else "none")
        return node.args[0], "gelu" if approximate == "none" else "gelu_tanh"
    if is_call(node, torch.relu):
        return node.args[0], "relu"
    if is_call(node, torch.sigmoid):
        return node.args[0], "sigmoid"
    # x * sigmoid(x), in float32 alone the same as silu
    if is_call(node, torch.mul) and len(node.args) == 2:
        for x, sigmoid in (node.args, node.args[::-1]):
            if (
                is_call(sigmoid, torch.sigmoid)
                and sigmoid.args[0] is x
                and value(x).dtype == torch.float32
            ):
                return x, "silu"
    return None


def _alike(*nodes: Any) -> bool:
    first = value(nodes[0])
    return all(
        value(node).shape == first.shape and value(node).dtype == first.dtype for node in nodes
    )
