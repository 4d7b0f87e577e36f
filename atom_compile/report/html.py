"""Self-contained pages: the files beside this one and the data, in one file without network."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from .nodes import KINDS
from .tables import megabytes, stage_rows, summary

Cell = str | float | None
NOTHING = "\N{EN DASH}"  # sorted behind everything

_SCRIPTS = ("dagre.min.js", "tree.js", "graph.js", "page.js", "report.js")


def report_page(data: Mapping[str, Any]) -> str:
    """The page of a report's JSON. What it has in common with the text is worded here, once."""
    shown = {
        "summary": summary(data),
        "kinds": KINDS,
        "stages": [stage_rows(graph) for graph in data["graphs"]],
        "bytes": [megabytes(data[f"weight_bytes_{when}"]) for when in ("before", "after")],
    }
    scripts = [_file("dagre.LICENSE.txt", "/*! dagre\n", "*/"), *map(_file, _SCRIPTS)]
    return _filled(
        _file("report.html"),
        style=_file("report.css"),
        data=_embedded({**data, "shown": shown}),
        script="\n".join(scripts),
    )


def difference_page(
    names: Sequence[str], sections: Mapping[str, Sequence[tuple[str, str, str]]]
) -> str:
    """A table per section, each row (what, in A, in B)."""
    tables = []
    for title, rows in sections.items():
        tables.append(
            f'<section id="{title}"><h2>{title} ({len(rows)})</h2>'
            f"{table(('', *names), rows)}</section>"
        )
    return _filled(
        _file("difference.html"),
        style=_file("report.css"),
        names=" and ".join(map(html.escape, names)),
        sections="\n".join(tables) or "<p>no difference</p>",
    )


def bench_page(summary: str, contents: Sequence[Section]) -> str:
    """One section after the other, with a list of them in front."""
    links = "".join(
        f'<li><a href="#s{number}">{html.escape(one.title)}</a></li>'
        for number, one in enumerate(contents)
    )
    return _filled(
        _file("bench.html"),
        style=_file("report.css"),
        summary=html.escape(summary),
        links=links,
        sections="\n".join(one.markup(f"s{number}") for number, one in enumerate(contents)),
        script="\n".join(map(_file, ("page.js", "bench.js"))),
    )


@dataclass(frozen=True, kw_only=True)
class Section:
    """Figures by name, as SVG; facts; and a table of `rows` under `columns`, if there are any."""

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, str] = field(default_factory=dict)
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Cell]] = ()

    def markup(self, name: str) -> str:
        pictures = "".join(
            f'<figure aria-label="{html.escape(title)}">{svg}</figure>'
            for title, svg in self.figures.items()
        )
        facts = "".join(
            f"<dt>{html.escape(term)}</dt><dd>{html.escape(value)}</dd>"
            for term, value in self.facts.items()
        )
        listed = f"<details><summary>how it was measured</summary><dl>{facts}</dl></details>"
        rows = f'<div class="wide">{table(self.columns, self.rows)}</div>' if self.columns else ""
        title = html.escape(self.title)
        return (
            f'<section id="{name}"><h2>{title}</h2>{pictures}{listed if facts else ""}{rows}'
            "</section>"
        )


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """The first cell of a row names it; numbers keep their full value for sorting."""
    head = "".join(f'<th scope="col">{html.escape(one)}</th>' for one in columns)
    body = "".join(
        f'<tr><th scope="row">{html.escape(str(row[0]))}</th>{"".join(map(_cell, row[1:]))}</tr>'
        for row in rows
    )
    return f'<table class="rows"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _cell(value: Cell) -> str:
    if isinstance(value, int | float):
        return f'<td class="number" data-value="{value!r}">{short_number(value)}</td>'
    return f"<td>{html.escape(NOTHING if value is None else value)}</td>"


def short_number(value: float) -> str:
    """Whole numbers in full, others with four digits."""
    return f"{value:,}" if isinstance(value, int) or value >= 1e4 else f"{value:.4g}"


def _file(name: str, before: str = "", after: str = "") -> str:
    return before + resources.files(__package__).joinpath(name).read_text("utf-8") + after


def _filled(template: str, **parts: str) -> str:
    """`parts` in the places that the template names <!--so-->; what they hold is left alone."""
    pieces = template.split("<!--")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("-->")
        filled += [parts[name], rest]
    return "".join(filled)


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON that cannot end the element that it stands in."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
