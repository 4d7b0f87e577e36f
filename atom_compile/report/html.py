"""Self-contained pages: the files beside this one and the data, in one file without network."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from .nodes import KINDS
from .tables import megabytes, stage_rows, summary

_SCRIPTS = ("dagre.min.js", "tree.js", "graph.js", "report.js")


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
        head = "".join(f'<th scope="col">{html.escape(one)}</th>' for one in ("", *names))
        body = "".join(
            f'<tr><th scope="row">{html.escape(what)}</th>'
            f"<td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>"
            for what, a, b in rows
        )
        tables.append(
            f'<section id="{title}"><h2>{title} ({len(rows)})</h2><table class="rows">'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></section>"
        )
    return _filled(
        _file("difference.html"),
        style=_file("report.css"),
        names=" and ".join(map(html.escape, names)),
        sections="\n".join(tables) or "<p>no difference</p>",
    )


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
