"""What the backend does to a model, pass by pass and layer by layer, in text and as data."""

from __future__ import annotations

import functools
import importlib.metadata
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import networkx as nx
import torch
from rich.console import Group
from torch import nn
from torch.fx import Graph, GraphModule, Node

from . import drawing
from .backend import refuse_training, rewrite
from .capture import captured
from .errors import AtomError, OptionError, unknown
from .files import write_text
from .kernels.formats import element_format
from .kernels.quantize_e4m3 import quantize_e4m3
from .options import Options
from .passes.derived import operands_of
from .passes.graphs import is_call, value
from .passes.linears import is_weight
from .passes.packed import HeldLinear
from .passes.pipeline import Rewrite
from .passes.plan import PlannedLinear
from .passes.record import operator_name
from .report import html, schema, tables
from .report.changes import changes
from .report.difference import Difference
from .report.nodes import give_reasons, node_records


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


def diff(a: Report | str | Path, b: Report | str | Path) -> Difference:
    """What differs between two reports, each given as it is or as the path of its JSON."""
    (a_name, a_data), (b_name, b_data) = (
        (label, one.to_dict()) if isinstance(one, Report) else (str(one), schema.load(one))
        for label, one in (("A", a), ("B", b))
    )
    return Difference(a_data, b_data, (a_name, b_name))


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One linear. `operator` is None where it was left as it was; the remarks then say why.

    Bits, formats (those of `Scheme`) and outlier channels are None there too. `quantized_by` and
    `activation_format` are also None where activations stay in 16 bits. The bytes are its weight's,
    scales included, and `error` is the noise over signal of its output, where calibration measured
    it.
    """

    name: str
    out_features: int
    in_features: int
    operator: str | None = None
    quantized_by: str | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None
    weight_format: str | None = None
    activation_format: str | None = None
    outlier_channels: int | None = None
    weight_bytes_before: int
    weight_bytes_after: int
    error: float | None = None
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
    """Printed, tables; `to_dict`, `to_networkx` and `save` give the same as data."""

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

    def to_networkx(self, stage: str = "verify") -> nx.DiGraph:
        """The graph as `stage` left it; attributes are strings and numbers.

        Nodes carry `operator`, `kind`, `module`, `dtype`, `shape`, `bytes` and `operations`.
        """
        combined = nx.DiGraph()
        position = self._position(stage)
        for number, graph in enumerate(self._graphs):
            prefix = f"{number}." if len(self._graphs) > 1 else ""
            records = [graph["nodes"][one] for one in graph["stages"][position]["nodes"]]
            drawing.add_records(combined, records, prefix)
        return combined

    def code(self, stage: str = "verify") -> str:
        """The graph as `stage` left it, as Python."""
        position = self._position(stage)
        graphs = (run.record.stages[position].graph for run in self._runs)
        return "\n".join(graph.python_code("self").src for graph in graphs if graph is not None)

    def _position(self, stage: str) -> int:
        if stage not in self.stages:
            raise OptionError(unknown("stage", stage, self.stages))
        return self.stages.index(stage)

    @functools.cached_property
    def _graphs(self) -> list[dict[str, Any]]:
        return [_graph_dict(run) for run in self._runs]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the graphs' code, ready for JSON; `atom_compile.report` documents it."""
        return {
            "format": schema.FORMAT,
            "version": schema.VERSION,
            "versions": {
                "atom_compile": _version("atom-compile"),
                "torch": str(torch.__version__),
            },
            "scheme": asdict(self._runs[0].scheme),
            "weight_bytes_before": self.weight_bytes_before,
            "weight_bytes_after": self.weight_bytes_after,
            "operators": dict(self.operators),
            "layers": [asdict(layer) for layer in self.layers],
            "attentions": [asdict(one) for one in self.attentions],
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "graphs": self._graphs,
        }

    def save(self, path: str | Path, stage: str = "verify") -> None:
        """Writes a file, whole or not at all.

        .json and .html hold the report; .dot, .svg and .graphml the graph as `stage` left it.
        """
        path = Path(path)
        writers: dict[str, Callable[[], str]] = {
            ".json": lambda: json.dumps(self.to_dict()),
            ".html": lambda: html.report_page(self.to_dict()),
            ".dot": lambda: drawing.to_dot(self.to_networkx(stage)),
            ".svg": lambda: drawing.to_svg(self.to_networkx(stage)),
            ".graphml": lambda: drawing.to_graphml(self.to_networkx(stage)),
        }
        if path.suffix not in writers:
            raise OptionError(unknown("file type", path.suffix, writers))
        write_text(path, writers[path.suffix]())

    def save_html(self, path: str | Path) -> None:
        """Writes one page that shows every stage's graph and the layers, and needs no network."""
        write_text(Path(path), html.report_page(self.to_dict()))

    def __str__(self) -> str:
        return tables.as_text(self)

    def __rich__(self) -> Group:
        return tables.report_tables(self.to_dict())


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path, never installed
        return None


def _layers(run: Rewrite) -> list[Layer]:
    products: dict[str, Node] = {}
    for node in run.gm.graph.nodes:
        if "atom_packed" in node.meta:
            products |= {part.weight.name: node for part in node.meta["atom_packed"].parts}
    held = [_held_layer(run, one, products[one.parts[0].weight.name]) for one in run.held]
    planned = [_layer(run, plan, products.get(plan.found.name)) for plan in run.planned]
    return held + planned + [_stack(run, name, node) for name, node in run.stacks.items()]


def _held_layer(run: Rewrite, held: HeldLinear, product: Node) -> Layer:
    """A linear that the model holds packed."""
    (part,) = held.parts
    operator, quantized_by = _operators(product)
    taken = _share_of_bytes(product, part.out_features)
    return Layer(
        name=part.weight.name,
        out_features=part.out_features,
        in_features=held.in_features,
        operator=operator,
        quantized_by=quantized_by,
        weight_bits=_weight_bits(product),
        activation_bits=_activation_bits(product),
        weight_format=_format(product),
        activation_format=_activation_format(product),
        outlier_channels=held.layout.outlier_channels,
        weight_bytes_before=taken,
        weight_bytes_after=taken,
        remarks=_remarks(run, part.weight.name),
    )


def _operators(product: Node) -> tuple[str, str | None]:
    """The product with what its epilogue adds, and what quantizes its input, if anything does."""
    extras = [name for name, at in (("bias", -3), ("residual", -2)) if product.args[at] is not None]
    activation, _ = operands_of(product)
    quantized_by = operator_name(activation[0].args[0]) if len(activation) > 1 else None
    return " + ".join([operator_name(product), *extras]), quantized_by


def _weight_bits(product: Node) -> int:
    """Integers of fewer bits lie in four as well."""
    format = _format(product)
    return 4 if format == "int" else element_format(format).bits


def _format(node: Node) -> str:
    """Of the numbers that a product or a quantize takes or makes."""
    return str(node.kwargs.get("format", "int"))


def _activation_format(product: Node) -> str | None:
    activation, _ = operands_of(product)
    if len(activation) == 1:
        return None
    quantized = activation[0].args[0]
    return "e4m3" if is_call(quantized, quantize_e4m3) else _format(quantized)


def _activation_bits(product: Node) -> int:
    """Every operator that quantizes takes a number `bits`, or gives floating-point codes."""
    activation, _ = operands_of(product)
    if len(activation) == 1:
        return 16
    quantize: Any = activation[0].args[0]
    names = [argument.name for argument in quantize.target._schema.arguments]
    if "bits" not in names:
        return 8 * int(value(activation[0]).dtype.itemsize)
    return int(quantize.args[names.index("bits")])


def _share_of_bytes(product: Node, out_features: int) -> int:
    """Each packed tensor has a row per output: a merged product's rows are its linears'."""
    _, weight = operands_of(product)
    rows = product.meta["atom_packed"].out_features
    return sum(_bytes(one) for one in weight if one is not None) * out_features // int(rows)


def _layer(run: Rewrite, plan: PlannedLinear, product: Node | None) -> Layer:
    found = plan.found
    rewritten = product is not None and plan.transform is not None
    operator = quantized_by = weight_format = activation_format = None
    before = after = _bytes(found.weight)
    if rewritten:
        assert product is not None
        operator, quantized_by = _operators(product)
        weight_format, activation_format = _format(product), _activation_format(product)
        packed = product.meta["atom_packed"]
        after = _share_of_bytes(product, found.out_features)
    return Layer(
        name=found.name,
        out_features=found.out_features,
        in_features=found.in_features,
        operator=operator,
        quantized_by=quantized_by,
        weight_bits=run.scheme.weight_bits if rewritten else None,
        activation_bits=run.scheme.activation_bits if rewritten else None,
        weight_format=weight_format,
        activation_format=activation_format,
        outlier_channels=packed.layout.outlier_channels if rewritten else None,
        weight_bytes_before=before,
        weight_bytes_after=after,
        error=plan.error,
        remarks=_remarks(run, found.name),
    )


def _stack(run: Rewrite, name: str, node: Node) -> Layer:
    """A weight of all experts, as if it were one linear of their outputs together."""
    experts, *features = value(node).shape
    return Layer(
        name=name,
        out_features=int(experts * features[0]),
        in_features=int(features[1]),
        weight_bytes_before=_bytes(node),
        weight_bytes_after=_bytes(node),
        remarks=_remarks(run, name),
    )


def _remarks(run: Rewrite, name: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(run.record.remarks.get(name, ())))


def _attentions(run: Rewrite) -> list[Attention]:
    fused = {
        node.meta["atom_attention"].name: operator_name(node)
        for node in run.gm.graph.nodes
        if "atom_attention" in node.meta
    }
    return [
        Attention(
            found.name,
            found.heads,
            found.cache,
            found.cache_bytes_per_token,
            fused.get(found.name),
            _remarks(run, found.name),
        )
        for found in run.attentions
    ] + [
        Attention(name, None, None, None, None, _remarks(run, name))
        for name in run.unknown_attentions
    ]


def _weight_bytes(graph: Graph) -> int:
    placeholders = graph.find_nodes(op="placeholder")
    return sum(_bytes(node) for node in placeholders if is_weight(node) and node.users)


def _bytes(node: Any) -> int:
    return int(value(node).numel() * value(node).element_size())


def _graph_dict(run: Rewrite) -> dict[str, Any]:
    """A run's stages; a node that several of them have is kept once."""
    remarks = dict(run.record.remarks)
    remarks |= {found.node.name: list(_remarks(run, found.name)) for found in run.attentions}
    linears = {plan.found.node.name: [plan.found.name] for plan in run.planned}
    stages = []
    for stage in run.record.stages:
        assert stage.graph is not None
        stages.append({one["name"]: one for one in node_records(stage.graph, remarks, linears)})
    kept = stages[-1].keys()
    for records in stages:
        give_reasons([record for name, record in records.items() if name in kept])
    nodes: dict[str, int] = {}
    described = []
    for stage, before, after in zip(run.record.stages, [stages[0], *stages], stages, strict=False):
        described.append(
            {
                "stage": stage.name,
                "why": stage.why,
                "milliseconds": round(stage.milliseconds, 3),
                "operators": dict(stage.operators),
                "messages": stage.messages,
                "nodes": [nodes.setdefault(json.dumps(one), len(nodes)) for one in after.values()],
                **changes(before, after),
            }
        )
    return {"nodes": [json.loads(node) for node in nodes], "stages": described}
