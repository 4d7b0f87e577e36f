"""A graph in standard formats: Graphviz DOT, GraphML, and SVG drawn by matplotlib."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx

COLOURS = {
    "reorder": "#e76f51",
    "quantize": "#e9c46a",
    "int4": "#f4a261",
    "fused": "#2a9d8f",
    "attention": "#8ab6e8",
    "weight": "#f4f4f4",
}


def add_records(graph: nx.DiGraph, records: Sequence[Mapping[str, Any]], prefix: str) -> None:
    """Adds a report's nodes; their attributes are strings and numbers, as GraphML wants them."""
    for record in records:
        outputs = record["outputs"]
        graph.add_node(
            prefix + record["name"],
            operator=record["operator"],
            kind=record["kind"],
            module=record["module"],
            dtype=", ".join(one["dtype"] for one in outputs),
            shape=", ".join(" x ".join(one["shape"]) for one in outputs),
            bytes=record["bytes"] or 0,
            operations=record["operations"] or 0,
        )
        for operand in record["inputs"]:
            graph.add_edge(prefix + operand, prefix + record["name"])


def label(name: str, attributes: Mapping[str, Any]) -> str:
    result = f"\n{attributes['dtype']} {attributes['shape']}" if attributes["dtype"] else ""
    return f"{name}\n{attributes['operator']}{result}"


def colour(attributes: Mapping[str, Any]) -> str:
    return COLOURS.get(attributes["kind"], "#dddddd")


def to_graphml(graph: nx.DiGraph) -> str:
    return "\n".join(nx.generate_graphml(graph)) + "\n"


def to_dot(graph: nx.DiGraph) -> str:
    lines = ["digraph atom {", "  node [shape=box, style=filled, fontname=monospace];"]
    for name, attributes in graph.nodes(data=True):
        text, fill = json.dumps(label(name, attributes)), colour(attributes)
        lines.append(f'  {json.dumps(name)} [label={text}, fillcolor="{fill}"];')
    lines += [f"  {json.dumps(a)} -> {json.dumps(b)};" for a, b in graph.edges()]
    return "\n".join([*lines, "}"]) + "\n"


def to_svg(graph: nx.DiGraph) -> str:
    """Top to bottom in topological layers; weights and other inputs are left out."""
    from matplotlib.figure import Figure

    calls = graph.subgraph(
        name for name, data in graph.nodes(data=True) if data["operator"] != "placeholder"
    )
    layers = list(nx.topological_generations(calls))
    positions = {
        name: (3.2 * (column - (len(layer) - 1) / 2), -1.1 * row)
        for row, layer in enumerate(layers)
        for column, name in enumerate(sorted(layer))
    }
    widest = max((len(layer) for layer in layers), default=1)
    figure = Figure(figsize=(2.4 * widest + 1, 0.8 * len(layers) + 1))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    for a, b in calls.edges():
        axes.annotate(
            "",
            positions[b],
            positions[a],
            arrowprops={"arrowstyle": "->", "color": "#888888", "lw": 0.6},
        )
    for name, (x, y) in positions.items():
        attributes = calls.nodes[name]
        box = {"boxstyle": "round", "facecolor": colour(attributes), "edgecolor": "#555555"}
        axes.text(x, y, label(name, attributes), ha="center", va="center", fontsize=6, bbox=box)
    axes.set_xlim(-1.7 * widest, 1.7 * widest)
    axes.set_ylim(-1.1 * len(layers), 1.1)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()
