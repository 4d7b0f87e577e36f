"""What the backend does to a model, pass by pass and layer by layer, in text and as data."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from rich.console import Console, Group
from rich.table import Column, Table
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from . import drawing
from .backend import refuse_training, rewrite
from .capture import captured
from .errors import AtomError, OptionError, unknown
from .options import Options
from .passes.graphs import module_path, value
from .passes.linears import is_weight
from .passes.pipeline import Rewrite
from .passes.record import Stage, operator_name


def explain(
    model: nn.Module, *inputs: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Runs `model(*inputs, **kwargs)` once, uncompiled; reports how the backend would rewrite it.

    options: as for `torch.compile`. Nothing stays compiled. Raises what the backend would raise.
    """
    parsed = Options.parse(options)
    runs: list[Rewrite] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        refuse_training(gm)
        runs.append(rewrite(gm, parsed, keep_graphs=True))
        forward: Callable[..., Any] = gm.forward
        return forward

    try:
        with torch.no_grad():
            captured(model, backend)(*inputs, **kwargs)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise error.inner_exception from None
    if not runs:
        raise AtomError("Dynamo captured no graph of this model: nothing to explain")
    return Report(runs)


@dataclass(frozen=True)
class Layer:
    """One linear. `operator` is None where it was left as it was; the remarks then say why."""

    name: str
    out_features: int
    in_features: int
    operator: str | None
    quantized_by: str | None
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Attention:
    """One attention and its cache; `operator` is None where it was left to PyTorch.

    What only looks like attention has no `heads` (query heads, KV heads, channels) and no `cache`.
    """

    name: str
    heads: tuple[int, int, int] | None
    cache: str | None
    cache_bytes_per_token: float | None
    operator: str | None
    remarks: tuple[str, ...]


class Report:
    """Printed, a table; `graph`, `save` and `to_dict` give the same as data."""

    def __init__(self, runs: Sequence[Rewrite]) -> None:
        self._runs = runs
        self.layers = [layer for run in runs for layer in _layers(run)]
        self.attentions = [one for run in runs for one in _attentions(run)]
        self.weight_bytes_before = sum(_weight_bytes(run.original.graph) for run in runs)
        self.weight_bytes_after = sum(_weight_bytes(run.gm.graph) for run in runs)

    @property
    def stages(self) -> list[str]:
        """The names of the pipeline's stages, in order."""
        return [stage.name for stage in self._runs[0].record.stages]

    @property
    def cache_bytes_per_token(self) -> float:
        """What one token occupies in the KV caches of all layers that have one."""
        return sum(one.cache_bytes_per_token or 0.0 for one in self.attentions)

    @property
    def operators(self) -> Counter[str]:
        """How often each operator is called in the final graph."""
        return sum((run.record.stages[-1].operators for run in self._runs), Counter())

    def graph(self, stage: str = "verify") -> nx.DiGraph:
        """The graph as `stage` left it; nodes carry `operator`, `shape`, `dtype` and `module`."""
        combined = nx.DiGraph()
        for number, run in enumerate(self._runs):
            prefix = f"{number}." if len(self._runs) > 1 else ""
            graph = self._stage(run, stage).graph
            assert graph is not None
            _add_graph(combined, graph, prefix)
        return combined

    def code(self, stage: str = "verify") -> str:
        """The graph as `stage` left it, as Python."""
        graphs = (self._stage(run, stage).graph for run in self._runs)
        return "\n".join(graph.python_code("self").src for graph in graphs if graph is not None)

    def _stage(self, run: Rewrite, name: str) -> Stage:
        for stage in run.record.stages:
            if stage.name == name:
                return stage
        raise OptionError(unknown("stage", name, self.stages))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the graphs' code, ready for JSON."""
        return {
            "weight_bytes_before": self.weight_bytes_before,
            "weight_bytes_after": self.weight_bytes_after,
            "operators": dict(self.operators),
            "layers": [asdict(layer) for layer in self.layers],
            "attentions": [asdict(one) for one in self.attentions],
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "graphs": [[_stage_dict(stage) for stage in run.record.stages] for run in self._runs],
        }

    def save(self, path: str | Path, stage: str = "verify") -> None:
        """Writes the report (.json) or a stage's graph (.dot, .svg), whole or not at all."""
        path = Path(path)
        writers: dict[str, Callable[[], str]] = {
            ".json": lambda: json.dumps(self.to_dict(), indent=1),
            ".dot": lambda: drawing.to_dot(self.graph(stage)),
            ".svg": lambda: drawing.to_svg(self.graph(stage)),
        }
        if path.suffix not in writers:
            raise OptionError(unknown("file type", path.suffix, writers))
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(writers[path.suffix]())
        os.replace(temporary, path)

    def __str__(self) -> str:
        console = Console(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        console.print(self)
        return console.export_text()

    def __rich__(self) -> Group:
        before, after = self.weight_bytes_before, self.weight_bytes_after
        counts = ", ".join(
            f"{count} {name}" for name, count in sorted(self.operators.items()) if "atom." in name
        )
        rewritten = sum(layer.operator is not None for layer in self.layers)
        summary = (
            f"{rewritten} of {len(self.layers)} linears rewritten; "
            f"weights {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB\n"
            f"operators: {counts or 'none of ours'}"
        )
        tables = [_layer_table(self.layers)]
        if self.attentions:
            tables.append(_attention_table(self.attentions))
        if self.cache_bytes_per_token:
            summary += f"\nKV cache: {self.cache_bytes_per_token:,.0f} bytes per token"
        return Group(*tables, _stage_table(self._runs), summary)


def _layers(run: Rewrite) -> list[Layer]:
    products: dict[str, Node] = {}
    for node in run.gm.graph.nodes:
        if "atom_packed" in node.meta:
            products |= {part.weight.name: node for part in node.meta["atom_packed"].parts}
    layers = []
    for plan in run.planned:
        found, product = plan.found, products.get(plan.found.name)
        operator = quantized_by = None
        if plan.transform is not None and product is not None:
            extras = [
                name
                for name, at in (("bias", -3), ("residual", -2))
                if product.args[at] is not None
            ]
            operator = " + ".join([operator_name(product), *extras])
            quantized_by = operator_name(product.args[0].args[0])  # type: ignore[union-attr,arg-type]
        remarks = tuple(dict.fromkeys(run.record.remarks.get(found.name, ())))
        layers.append(
            Layer(
                found.name, found.out_features, found.in_features, operator, quantized_by, remarks
            )
        )
    return layers


def _attentions(run: Rewrite) -> list[Attention]:
    fused = {
        node.meta["atom_attention"].name: operator_name(node)
        for node in run.gm.graph.nodes
        if "atom_attention" in node.meta
    }
    remarks = {name: tuple(dict.fromkeys(said)) for name, said in run.record.remarks.items()}
    return [
        Attention(
            found.name,
            found.heads,
            found.cache,
            found.cache_bytes_per_token,
            fused.get(found.name),
            remarks.get(found.name, ()),
        )
        for found in run.attentions
    ] + [Attention(name, None, None, None, None, remarks[name]) for name in run.unknown_attentions]


def _weight_bytes(graph: Graph) -> int:
    weights = [
        node for node in graph.find_nodes(op="placeholder") if is_weight(node) and node.users
    ]
    return sum(value(node).numel() * value(node).element_size() for node in weights)


def _stage_dict(stage: Stage) -> dict[str, Any]:
    assert stage.graph is not None
    graph = nx.DiGraph()
    _add_graph(graph, stage.graph, "")
    return {
        "stage": stage.name,
        "why": stage.why,
        "milliseconds": round(stage.milliseconds, 3),
        "operators": dict(stage.operators),
        "messages": stage.messages,
        "nodes": [{"name": name, **attributes} for name, attributes in graph.nodes(data=True)],
        "edges": list(graph.edges()),
    }


def _add_graph(combined: nx.DiGraph, graph: Graph, prefix: str) -> None:
    for node in graph.nodes:
        fake = value(node)
        attributes: dict[str, Any] = {"operator": operator_name(node), "module": module_path(node)}
        if isinstance(fake, Tensor):
            attributes |= {
                "shape": [str(size) for size in fake.shape],
                "dtype": str(fake.dtype).removeprefix("torch."),
            }
        combined.add_node(prefix + node.name, **attributes)
        for operand in node.all_input_nodes:
            combined.add_edge(prefix + operand.name, prefix + node.name)


def _layer_table(layers: Sequence[Layer]) -> Table:
    longest = max((len(layer.name) for layer in layers), default=0)
    first = Column("linear", min_width=min(longest + 3, 44), overflow="fold")
    table = Table(first, "N x K", "quantized by", "operator", "remarks", title="Linears")
    grouped: dict[tuple[Any, ...], list[Layer]] = {}
    for layer in layers:  # the same layer of every block shares a row
        blind = re.sub(r"\d+", "*", layer.name)
        remarks = tuple(re.sub(r"\.\d+\.", ".*.", remark) for remark in layer.remarks)
        key = blind, layer.out_features, layer.in_features, layer.operator, remarks
        grouped.setdefault(key, []).append(layer)
    for (blind, N, K, operator, remarks), members in grouped.items():
        name = f"{blind} ({len(members)})" if len(members) > 1 else members[0].name
        quantized_by = members[0].quantized_by or "-"
        table.add_row(
            name, f"{N} x {K}", quantized_by, operator or "left as it was", "\n".join(remarks)
        )
    return table


def _attention_table(attentions: Sequence[Attention]) -> Table:
    longest = max(len(one.name) for one in attentions)
    first = Column("attention", min_width=min(longest + 3, 44), overflow="fold")
    table = Table(
        first, "heads", "cache", "bytes / token", "operator", "remarks", title="Attentions"
    )
    grouped: dict[tuple[Any, ...], list[Attention]] = {}
    for one in attentions:
        key = re.sub(r"\d+", "*", one.name), replace(one, name="")
        grouped.setdefault(key, []).append(one)
    for (blind, _), members in grouped.items():
        one = members[0]
        table.add_row(
            f"{blind} ({len(members)})" if len(members) > 1 else one.name,
            "{} on {} x {}".format(*one.heads) if one.heads else "-",
            one.cache or "-",
            "-" if one.cache_bytes_per_token is None else f"{one.cache_bytes_per_token:g}",
            one.operator or "left to PyTorch",
            "\n".join(one.remarks),
        )
    return table


def _stage_table(runs: Sequence[Rewrite]) -> Table:
    table = Table("stage", "why", "ms", "calls", "change of operators", title="Passes")
    for run in runs:
        before: Counter[str] = Counter()
        for number, stage in enumerate(run.record.stages):
            change = Counter(stage.operators)
            change.subtract(before)
            changes = [
                f"{count:+d} {name}" for name, count in change.most_common() if count and number
            ]
            total = sum(stage.operators.values())
            table.add_row(
                stage.name,
                stage.why,
                f"{stage.milliseconds:.0f}",
                str(total),
                ", ".join(changes[:6]),
            )
            before = stage.operators
    return table
