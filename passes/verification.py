"""The door that every rewritten graph passes: well-formed, valid metadata, results as before."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .graphs import is_tensor, value


def verify(gm: GraphModule, original: Graph) -> GraphModule:
    """Needs every other pass. Raises AssertionError where one broke the graph; changes nothing."""
    gm.graph.lint()
    for node in gm.graph.nodes:
        ours = getattr(node.target, "namespace", None) == "atom"
        returns = ours and node.target._schema.returns
        assert not returns or "example_value" in node.meta, f"{node.name} has no metadata"
    before, after = (_returned(graph) for graph in (original, gm.graph))
    assert len(before) == len(after), (
        f"the graph returned {len(before)} values and now returns {len(after)}"
    )
    for old, new in zip(before, after, strict=True):
        if is_tensor(old):
            a, b = value(old), value(new)
            assert torch.Size(a.shape) == torch.Size(b.shape), (
                f"{new}: shape {b.shape}, was {a.shape}"
            )
            assert (a.dtype, a.device) == (b.dtype, b.device), (
                f"{new}: {b.dtype} on {b.device}, was {a.dtype}"
            )
    return gm


def _returned(graph: Graph) -> list[Any]:
    returned: list[Any] = []
    output = graph.output_node()
    torch.fx.node.map_arg(output.args, lambda node: returned.append(node))
    return [node for node in returned if isinstance(node, Node)]
