"""A graph as Graphviz DOT, or as an SVG drawn by matplotlib, which needs no Graphviz."""

from __future__ import annotations

import io
import json

import networkx as nx

_COLOURS = {
    "atom.linear": "#f4a261",
    "atom.reorder": "#e76f51",
    "atom.quantize": "#e9c46a",
    "atom": "#2a9d8f",
}


def colour(operator: str) -> str:
    """By kind: each plain operator has its own, the fused ones share one, anything else is grey."""
    return _COLOURS.get(operator, _COLOURS["atom"] if operator.startswith("atom.") else "#dddddd")


def label(name: str, attributes: dict[str, object]) -> str:
    shape = attributes.get("shape")
    suffix = f"\n{attributes['dtype']} {' x '.join(shape)}" if isinstance(shape, list) else ""
    return f"{name}\n{attributes['operator']}{suffix}"


def to_dot(graph: nx.DiGraph) -> str:
    lines = ["digraph atom {", "  node [shape=box, style=filled, fontname=monospace];"]
    for name, attributes in graph.nodes(data=True):
        text, fill = json.dumps(label(name, attributes)), colour(attributes["operator"])
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
        box = {
            "boxstyle": "round",
            "facecolor": colour(calls.nodes[name]["operator"]),
            "edgecolor": "#555555",
        }
        axes.text(
            x, y, label(name, calls.nodes[name]), ha="center", va="center", fontsize=6, bbox=box
        )
    axes.set_xlim(-1.7 * widest, 1.7 * widest)
    axes.set_ylim(-1.1 * len(layers), 1.1)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    return buffer.getvalue()
