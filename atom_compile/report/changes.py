"""What a stage did to the nodes of the stage before."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import networkx as nx

Records = Mapping[str, Mapping[str, Any]]
"""A stage's nodes, by name."""

_BLOCK = re.compile(r".*?\b\d+(?=\.|$)")


def changes(before: Records, after: Records) -> dict[str, Any]:
    """The names of nodes `added`, `removed` and `changed`; `merged`: which replaced which."""
    return {
        "added": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
        "changed": [name for name in after if name in before and before[name] != after[name]],
        "merged": _merged(before, after),
    }


def _merged(before: Records, after: Records) -> list[dict[str, list[str]]]:
    """Regions of calls that were removed, each with the fewer calls in their place.

    A region replaces another if a node that both stages have reads both; of what nobody reads,
    such as a cache's update, if both read the same nodes.
    """
    replaced = nx.Graph()
    come = defaultdict(list)
    users = _users(after)
    for new in _regions(after, [name for name in after if name not in before]):
        for anchor in _anchors(after, users, new):
            come[anchor].append(new)
    users = _users(before)
    for old in _regions(before, [name for name in before if name not in after]):
        for anchor in _anchors(before, users, old):
            replaced.add_edges_from((("from", old), ("into", new)) for new in come[anchor])
    merged = []
    for group in nx.connected_components(replaced):
        sides: dict[str, list[str]] = {"from": [], "into": []}
        for side, names in sorted(group):
            sides[side] += names
        if len(sides["from"]) > len(sides["into"]):
            merged.append(sides)
    return merged


def _regions(records: Records, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Calls among `names` that read each other, together; never across decoder layers."""
    calls = [name for name in names if records[name]["op"] != "placeholder"]
    graph = nx.Graph()
    graph.add_nodes_from(calls)
    for name in calls:
        block = _block(records[name])
        near = [one for one in records[name]["inputs"] if one in graph]
        graph.add_edges_from((name, one) for one in near if _block(records[one]) == block)
    return [tuple(sorted(region)) for region in nx.connected_components(graph)]


def _block(record: Mapping[str, Any]) -> str:
    """ "model.layers.0" of "model.layers.0.mlp.gate_proj"; else the whole path."""
    module = str(record["module"])
    block = _BLOCK.match(module)
    return block[0] if block else module


def _users(records: Records) -> dict[str, list[str]]:
    users: dict[str, list[str]] = {name: [] for name in records}
    for name, record in records.items():
        for operand in record["inputs"]:
            users[operand].append(name)
    return users


def _anchors(
    records: Records, users: Mapping[str, Sequence[str]], region: tuple[str, ...]
) -> set[tuple[str, str]]:
    """The nodes around a region by which its successor is known."""
    inside = set(region)
    readers = {user for name in region for user in users[name]} - inside
    read = {operand for name in region for operand in records[name]["inputs"]} - inside
    return {("reader", one) for one in readers} or {("operand", one) for one in read}
