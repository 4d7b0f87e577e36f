"""What differs between two reports: two schemes, two versions, two models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Column
from rich.text import Text

from ..files import write_text
from . import html, tables

Data = Mapping[str, Any]
Change = tuple[str, Any, Any]

_TOTALS = ("weight_bytes_before", "weight_bytes_after", "cache_bytes_per_token")


class Difference:
    """Of two reports' JSON. Each change is (what, in A, in B), None where one has no such thing."""

    def __init__(self, a: Data, b: Data, names: tuple[str, str] = ("A", "B")) -> None:
        self.names = names
        self.totals = [(name, a[name], b[name]) for name in _TOTALS if a[name] != b[name]]
        self.versions = _changes(a["versions"], b["versions"])
        self.scheme = _changes(a["scheme"], b["scheme"])
        self.operators = _changes(a["operators"], b["operators"])
        self.layers = _changes(_by_name(a["layers"]), _by_name(b["layers"]))
        self.attentions = _changes(_by_name(a["attentions"]), _by_name(b["attentions"]))
        self.stages = _changes(_stage_operators(a), _stage_operators(b))

    def __bool__(self) -> bool:
        return any(self._sections().values())

    def _sections(self) -> dict[str, list[Change]]:
        return {
            "versions": self.versions,
            "scheme": self.scheme,
            "totals": self.totals,
            "operators": self.operators,
            "layers": self.layers,
            "attentions": self.attentions,
            "stages": self.stages,
        }

    def to_dict(self) -> dict[str, Any]:
        """The names of A and B, and each section's changes as {"what", "a", "b"}."""
        sections = {
            title: [{"what": what, "a": a, "b": b} for what, a, b in changes]
            for title, changes in self._sections().items()
        }
        return {"names": list(self.names), **sections}

    def rows(self) -> dict[str, list[tuple[str, str, str]]]:
        """Each section's changes in words; of an object that both have, only what differs.

        The same change of every block shares a row.
        """
        return {title: _rows(changes) for title, changes in self._sections().items() if changes}

    def save_html(self, path: str | Path) -> None:
        """Writes one page that needs no network, whole or not at all."""
        write_text(Path(path), html.difference_page(self.names, self.rows()))

    def __str__(self) -> str:
        return tables.as_text(self)

    def __rich__(self) -> Group:
        sections = []
        for title, rows in self.rows().items():
            table = tables.simple_table(
                title,
                Column("", overflow="fold"),
                *(Column(Text(name), overflow="fold") for name in self.names),
            )
            for row in rows:
                table.add_row(*map(Text, row))
            sections.append(table)
        return Group(*sections) if sections else Group(Text("no difference"))


def _changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Change]:
    names = dict.fromkeys((*a, *b))
    return [(name, a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)]


def _by_name(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {row["name"]: {**row, "remarks": list(row["remarks"])} for row in rows}


def _stage_operators(data: Data) -> dict[str, Any]:
    """Stage -> calls of each operator, summed over the report's graphs."""
    stages: dict[str, dict[str, int]] = {}
    for graph in data["graphs"]:
        for stage in graph["stages"]:
            counts = stages.setdefault(stage["stage"], {})
            for operator, count in stage["operators"].items():
                counts[operator] = counts.get(operator, 0) + count
    return stages


def _rows(changes: list[Change]) -> list[tuple[str, str, str]]:
    groups: dict[tuple[str, ...], list[tuple[str, str, str]]] = {}
    for what, a, b in changes:
        row = what, *_words(a, b)
        groups.setdefault(tuple(map(tables.starred, row)), []).append(row)
    return [
        (f"{starred[0]} ({len(rows)})", starred[1], starred[2]) if len(rows) > 1 else rows[0]
        for starred, rows in groups.items()
    ]


def _words(a: Any, b: Any) -> tuple[str, str]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        names = [name for name, _, _ in _changes(a, b)]
        a, b = ({name: one[name] for name in names if name in one} for one in (a, b))
    return _in_words(a), _in_words(b)


def _in_words(one: Any) -> str:
    if one is None:
        return "-"
    if isinstance(one, Mapping):
        return "\n".join(f"{name}: {_in_words(value)}" for name, value in one.items())
    if isinstance(one, list | tuple):
        return "; ".join(map(_in_words, one)) or "-"
    return f"{one:,}" if isinstance(one, int | float) and not isinstance(one, bool) else str(one)
