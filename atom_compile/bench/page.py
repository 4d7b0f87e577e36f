"""Results as one page of HTML: figures, tables that sort, how each was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..files import write_text
from ..report.html import Cell, Section, bench_page
from .figures import figures_of, shared_figures
from .result import Measured
from .style import inline_svg

# what the columns of a file's rows are called; others go by their own name
_TITLES = {
    "op": "operator",
    "M": "tokens",
    "median_us": "us",
    "iqr_us": "± us",
    "median_ms": "ms",
    "iqr_ms": "± ms",
    "gb_per_s": "GB/s",
    "tflop_per_s": "TFLOP/s",
    "copy_share": "of a copy",
    "floor_share": "floor, of it",
    "peak_gb": "GB",
}
_FIRST = ("op", "variant", "phase", "batch", "scheme", "model", "M", "N", "K")


def save_page(results: Mapping[str, Measured], path: Path) -> None:
    """Writes one file that needs no network, whole or not at all. `results` by their names."""
    failures = sum(len(result.failures) for result in results.values())
    summary = f"{len(results)} results, {sum(len(one.rows) for one in results.values())} rows"
    if failures:
        summary += f", {failures} of them failed"
    together = shared_figures(list(results.values()))
    sections = [Section(title="Together", figures=_inline(together))] if together else []
    sections += [_section(name, result) for name, result in results.items()]
    write_text(path, bench_page(summary, sections))


def _section(name: str, result: Measured) -> Section:
    rows: list[dict[str, Any]] = json.loads(result.to_json())["rows"]
    columns = _columns(rows)
    return Section(
        title=name,
        facts={key: _in_words(value) for key, value in result.environment.items()},
        figures=_inline(figures_of(result, name)),
        columns=[_TITLES.get(column, column.replace("_", " ")) for column in columns],
        rows=[[_cell(row[column]) for column in columns] for row in rows],
    )


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    """What names a row first; nothing that is the same for all of them and says nothing."""
    told = [name for name in rows[0] if any(row[name] not in (None, "") for row in rows)]
    return sorted(told, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))


def _cell(value: Any) -> Cell:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value or None if isinstance(value, str) else value


def _inline(figures: Mapping[str, Figure]) -> dict[str, str]:
    return {name: inline_svg(figure, name) for name, figure in figures.items()}


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_in_words(one)}" for name, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_in_words, value))
    return "not known" if value is None else str(value)
