"""Products of tokens with the weights of their experts, taken apart: a linear for each expert.

transformers sorts tokens by expert and multiplies all by one operator, which is told where each
expert's end: (tokens, K), (experts, K, N), (experts,) -> (tokens, N). Calibration, which rounds
linears one by one, runs them one by one.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from .canonical import LINEAR
from .graphs import argument, is_call, value

_GROUPED = ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")


class ExpertWeight(NamedTuple):
    """A new placeholder for one expert's weight (N, K), the `number`-th of `stack`'s."""

    placeholder: Node
    name: str
    stack: Node
    number: int
    transposed: bool  # as it lies in the stack

    def of(self, stack: Tensor) -> Tensor:
        """A view."""
        return stack[self.number].t() if self.transposed else stack[self.number]


def take_apart(gm: GraphModule, names: Mapping[Node, Sequence[str]]) -> list[ExpertWeight]:
    """The graph calls a linear for each expert from now on.

    names: a weight of all experts -> the names of theirs. Returns the placeholders that come after
    those that there were, in order.
    """
    weights: list[ExpertWeight] = []
    last = gm.graph.find_nodes(op="placeholder")[-1]
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or getattr(node.target, "__name__", "") not in _GROUPED:
            continue
        x, factor, ends = node.args[0], node.args[1], argument(node, 2, "offs")
        is_transposed = is_call(factor, "transpose", torch.transpose)
        stack = factor.args[0] if is_transposed else factor
        if stack not in names:
            continue
        outs = []
        with gm.graph.inserting_before(node):
            parts = gm.graph.call_function(_rows_of_each, (x, ends))
            for number, name in enumerate(names[stack]):
                with gm.graph.inserting_after(last):
                    last = gm.graph.placeholder(f"{stack.name}_{number}")
                weights.append(ExpertWeight(last, name, stack, number, not is_transposed))
                last.meta = dict(stack.meta, example_value=weights[-1].of(value(stack)))
                last._dynamo_source = stack._dynamo_source
                rows = gm.graph.call_function(operator.getitem, (parts, number))
                rows.meta["example_value"] = value(x)
                outs.append(gm.graph.call_function(LINEAR, (rows, last)))
                outs[-1].meta["example_value"] = value(node)
            joined = gm.graph.call_function(_joined, (outs, x))
        joined.meta = dict(node.meta)
        node.replace_all_uses_with(joined)
        gm.graph.erase_node(node)
        if is_transposed and not factor.users:
            gm.graph.erase_node(factor)
    gm.recompile()
    return weights


def _rows_of_each(x: Tensor, ends: Tensor) -> Sequence[Tensor]:
    """What is beyond the last end belongs to experts that are elsewhere."""
    return x.tensor_split(ends.long().cpu())


def _joined(outs: Sequence[Tensor], x: Tensor) -> Tensor:
    together = torch.cat(list(outs))
    return F.pad(together, (0, 0, 0, len(x) - len(together)))
