"""What the passes did to what, and why they left something alone: the text that `explain` shows."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch.fx import Graph, GraphModule, Node

log = logging.getLogger("atom_compile")


@dataclass
class Stage:
    """One pass: the operator counts it left, what it said, and its graph if graphs are kept."""

    name: str
    why: str
    milliseconds: float
    operators: Counter[str]
    messages: list[str] = field(default_factory=list)
    graph: Graph | None = None


class Record:
    """Filled by a run of the pipeline."""

    def __init__(self, keep_graphs: bool) -> None:
        self.keep_graphs = keep_graphs
        self.stages: list[Stage] = []
        self.remarks: dict[str, list[str]] = {}
        self._messages: list[str] = []

    def say(self, names: Iterable[str], message: str) -> None:
        """Notes `message` about the linears or attentions called `names`, if any."""
        names = list(names)
        if not names:
            return
        self._messages.append(f"{', '.join(names)}: {message}")

    def remark(self, names: Iterable[str], message: str) -> None:
        """Like `say`, for what operators alone do not show: the table of layers has it too."""
        names = list(names)
        for name in names:
            self.remarks.setdefault(name, []).append(message)
        self.say(names, message)

    def close_stage(self, name: str, why: str, milliseconds: float, gm: GraphModule) -> None:
        graph = _snapshot(gm.graph) if self.keep_graphs else None
        stage = Stage(name, why, milliseconds, operator_counts(gm.graph), self._messages, graph)
        self._messages = []
        self.stages.append(stage)
        log.debug(
            "%s: %.1f ms, %s", name, milliseconds, "; ".join(stage.messages) or "nothing to report"
        )


def _snapshot(graph: Graph) -> Graph:
    copy, copies = Graph(), dict[Node, Node]()
    for node in graph.nodes:
        copies[node] = copy.node_copy(node, copies.__getitem__)
        if hasattr(node, "_dynamo_source"):  # by which a weight is told from other inputs
            copies[node]._dynamo_source = node._dynamo_source
    return copy


def operator_name(node: Node) -> str:
    if node.op == "call_method":
        return f".{node.target}"
    if node.op != "call_function":
        return node.op
    schema = getattr(node.target, "_schema", None)
    name = (
        schema.name.replace("::", ".")
        if schema is not None
        else getattr(node.target, "__name__", str(node.target))
    )
    return str(name)


def operator_counts(graph: Graph) -> Counter[str]:
    """How often each operator is called."""
    return Counter(
        operator_name(node) for node in graph.nodes if node.op in ("call_function", "call_method")
    )
