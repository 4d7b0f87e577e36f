"""Runs the graphs that calibration captured again, one piece after the other, all batches abreast.

    for each activation that linears read:      x of batch 1, x of batch 2, ...
        every batch runs up to it               -> statistics over all batches
        its linears are quantized               -> every batch goes on through the quantized ones

So each linear sees what the quantized linears before it compute, every operator runs once for each
batch, and nothing is kept but what is live between two such points: for a decoder the residual
stream and one activation. The graph's order decides: no decoder block has to be recognised.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from .passes.linears import FoundLinear

Linear = Callable[[FoundLinear, Tensor, Tensor], Tensor | None]
"""(linear, x, weight (N, K)) -> what it computes without its bias; None leaves it as it is."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a captured graph: what it was called with, and the linears to quantize."""

    gm: GraphModule
    args: tuple[Any, ...]
    linears: tuple[FoundLinear, ...]

    @property
    def groups(self) -> list[tuple[FoundLinear, ...]]:
        """The linears by the activation that they read, in the graph's order."""
        readers: dict[Node, list[FoundLinear]] = defaultdict(list)
        for found in self.linears:
            readers[found.x].append(found)
        return [tuple(group) for group in readers.values()]

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(found.name for found in group) for group in self.groups)


class Stream(Interpreter):
    """One call under way.

    returns: whether the graph's result is wanted, for which all that it returns must be kept. A
        model returns the keys and values of every layer: of all batches that is more than the rest.
    """

    def __init__(self, call: Call, linear: Linear, returns: bool = False) -> None:
        super().__init__(call.gm, garbage_collect_values=False)
        self.call = call
        self._found = {found.node: found for found in call.linears}
        self._linear = linear
        nodes = [node for node in call.gm.graph.nodes if returns or node.op != "output"]
        last_use = {one: node for node in nodes for one in (node, *node.all_input_nodes)}
        self._done_after: dict[Node, list[Node]] = defaultdict(list)
        for node, user in last_use.items():
            if node.op != "output":
                self._done_after[user].append(node)
        self._pending = nodes[::-1]
        self.args_iter = iter(call.args)

    def advance(self, until: Node | None) -> None:
        """Runs on until `until` was computed; to the end for None."""
        while self._pending and (until is None or until not in self.env):
            node = self._pending.pop()
            self.env[node] = self.run_node(node)
            for done in self._done_after[node]:
                del self.env[done]

    def value(self, node: Node) -> Tensor:
        value: Tensor = self.env[node]
        return value

    def run_node(self, n: Node) -> Any:
        found = self._found.get(n)
        if found is not None:
            x, weight = self.env[found.x], self.env[found.weight]
            out = self._linear(found, x, weight.t() if found.transposed else weight)
            if out is not None:
                out = out if found.bias is None else out + self.env[found.bias]
                return out.to(x.dtype)
        return super().run_node(n)


def abreast(calls: Sequence[Sequence[Call]]) -> list[list[Call]]:
    """Calls that can be run side by side, in the order in which the model makes them.

    calls: for each batch, its calls. A model whose graph breaks makes several for a batch, and a
    batch may take another way than the others; what follows a break starts from what the model
    computed unquantized.
    """
    together: dict[tuple[int, tuple[tuple[str, ...], ...]], list[Call]] = {}
    for of_batch in calls:
        for position, call in enumerate(of_batch):
            if call.linears:
                together.setdefault((position, call.names), []).append(call)
    return [together[key] for key in sorted(together, key=lambda key: key[0])]
