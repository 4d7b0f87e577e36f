"""A report as tables that fit a terminal of 80 columns, with or without colour."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RichCast
from rich.table import Column, Table
from rich.text import Text

Data = Mapping[str, Any]


def report_tables(data: Data) -> Group:
    """Of a report's JSON: linears, attentions, passes, totals."""
    notes: dict[str, int] = {}
    tables = [_layer_table(data["layers"], notes)]
    if data["attentions"]:
        tables.append(_attention_table(data["attentions"], notes))
    listed = [f"[{number}] {note}" for note, number in notes.items()]
    return Group(*tables, *map(Text, listed), _stage_table(data["graphs"]), Text(summary(data)))


def summary(data: Data) -> str:
    """The totals in words; the page of HTML shows the same."""
    counts = ", ".join(
        f"{count} {name}" for name, count in sorted(data["operators"].items()) if "atom." in name
    )
    rewritten = sum(layer["operator"] is not None for layer in data["layers"])
    before, after = data["weight_bytes_before"], data["weight_bytes_after"]
    lines = [
        f"{rewritten} of {len(data['layers'])} linears rewritten; "
        f"weights {before / 1e6:.1f} MB -> {after / 1e6:.1f} MB",
        f"operators: {counts or 'none of ours'}",
    ]
    if data["cache_bytes_per_token"]:
        lines.append(f"KV cache: {data['cache_bytes_per_token']:,.0f} bytes per token")
    return "\n".join(lines)


def as_text(shown: RichCast, width: int = 80) -> str:
    """What a console without colour prints."""
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()


def simple_table(title: str, *columns: Column | str) -> Table:
    """Without vertical lines, which would cost a fifth of 80 columns."""
    return Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def numbers_of(layer: Data) -> str:
    """ "w4a4, 32 outliers", "w4a4 e2m1, 32 outliers" or "w6a16, e2m3 weights" """
    if layer["weight_bits"] is None:
        return "-"
    bits = f"w{layer['weight_bits']}a{layer['activation_bits']}"
    # reports of older versions have no formats
    formats = {what: layer.get(f"{what}_format") or "int" for what in ("weight", "activation")}
    named = {what: format for what, format in formats.items() if format != "int"}
    if len(named) == 2 and len(set(named.values())) == 1:
        parts = [f"{bits} {named['weight']}"]
    else:
        parts = [bits, *(f"{format} {what}s" for what, format in named.items())]
    if layer["outlier_channels"]:
        parts.append(f"{layer['outlier_channels']} outliers")
    return ", ".join(parts)


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count < 1e8 else f"{count / 1e6:,.0f} MB"


def _grouped(rows: Sequence[Data]) -> list[tuple[str, list[Data]]]:
    """The same linear or attention of every block shares a row: (name with stars, members)."""
    groups: dict[str, tuple[str, list[Data]]] = {}
    for row in rows:
        name = re.sub(r"\d+", "*", row["name"])
        told = {name: one for name, one in row.items() if name not in ("name", "error")}
        told["remarks"] = [starred(remark) for remark in row["remarks"]]
        groups.setdefault(f"{name} {told}", (name, []))[1].append(row)
    return [
        (f"{name} ({len(members)})" if len(members) > 1 else members[0]["name"], members)
        for name, members in groups.values()
    ]


def starred(text: str) -> str:
    """Without the numbers of blocks: "model.layers.*.mlp"."""
    return re.sub(r"\.\d+(?=\.)", ".*", text)


def _note_numbers(remarks: Iterable[str], notes: dict[str, int]) -> str:
    numbers = [notes.setdefault(starred(remark), len(notes) + 1) for remark in remarks]
    return " ".join(f"[{number}]" for number in numbers)


def _layer_table(layers: Sequence[Data], notes: dict[str, int]) -> Table:
    groups = [(name.replace(".weight", ""), members) for name, members in _grouped(layers)]
    knows_errors = any(layer["error"] is not None for layer in layers)
    table = simple_table(
        "Linears",
        Column("linear\n  N x K", min_width=_name_width(groups), overflow="fold"),
        "numbers",
        Column("becomes", overflow="fold"),
        *(["error"] if knows_errors else []),
        Column("notes", min_width=5),
    )
    for name, members in groups:
        first = members[0]
        becomes = "left as it was"
        if first["operator"]:
            steps = (first["quantized_by"], first["operator"])
            becomes = "\n".join(step.removeprefix("atom.") for step in steps if step)
        errors = [one["error"] for one in members if one["error"] is not None]
        table.add_row(
            Text(f"{name}\n  {first['out_features']} x {first['in_features']}"),
            numbers_of(first).replace(", ", "\n"),
            becomes,
            *([f"{sum(errors) / len(errors):.2g}" if errors else "-"] if knows_errors else []),
            Text(_note_numbers(first["remarks"], notes)),
        )
    return table


def _attention_table(attentions: Sequence[Data], notes: dict[str, int]) -> Table:
    groups = _grouped(attentions)
    table = simple_table(
        "Attentions",
        Column(
            "attention\n  heads on KV heads x channels",
            min_width=_name_width(groups),
            overflow="fold",
        ),
        "cache",
        "bytes\n/ token",
        Column("becomes", overflow="fold"),
        Column("notes", min_width=5),
    )
    for name, members in groups:
        one = members[0]
        held = one["cache_bytes_per_token"]
        table.add_row(
            Text(name + ("\n  {} on {} x {}".format(*one["heads"]) if one["heads"] else "")),
            one["cache"] or "-",
            "-" if held is None else f"{held:g}",
            (one["operator"] or "left to PyTorch").removeprefix("atom."),
            Text(_note_numbers(one["remarks"], notes)),
        )
    return table


def _name_width(groups: Sequence[tuple[str, Any]]) -> int:
    return min(max((len(name) for name, _ in groups), default=0), 38)


def _stage_table(graphs: Sequence[Data]) -> Table:
    table = simple_table("Passes", "stage", "ms", "calls", "why; change of calls")
    for graph in graphs:
        for row in stage_rows(graph):
            why = Text(row["why"])
            if row["change"]:
                why.append(f"\n{row['change']}", style="cyan")
            table.add_row(row["stage"], f"{row['milliseconds']:.0f}", str(row["calls"]), why)
    return table


def stage_rows(graph: Data) -> list[dict[str, Any]]:
    """A graph's stages with the number of calls and the six largest changes in words."""
    rows = []
    before: Counter[str] = Counter()
    for number, stage in enumerate(graph["stages"]):
        change = Counter(stage["operators"])
        change.subtract(before)
        changes = [f"{count:+d} {name}" for name, count in change.most_common() if count and number]
        rows.append(
            {
                "stage": stage["stage"],
                "why": stage["why"],
                "milliseconds": stage["milliseconds"],
                "calls": sum(stage["operators"].values()),
                "change": ", ".join(changes[:6]),
            }
        )
        before = Counter(stage["operators"])
    return rows
