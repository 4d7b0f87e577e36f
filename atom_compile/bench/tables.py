"""The benchmark's tables: every operator, the peers beside ours, means over the linears."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .result import Result, Row

_LEFT_WIDTH = 13  # else a narrow terminal cuts the operators' names first
_LARGEST = 4  # linears that have a mean of their own


def print_result(result: Result, console: Console) -> None:
    """The tables, which attention was the baseline, and what failed."""
    console.print(_operator_table(result))
    if result.peers:
        console.print(_peer_table(result))
    if len(result.linears) > 1:
        console.print(_mean_table(result))
    if result.axis == "length":
        for runs, rows in _baselines(result).items():
            console.print(f"baseline of {', '.join(rows)}: {runs}", highlight=False)
    for path, rows in _kernels(result).items():
        console.print(f"kernel {path}: {'; '.join(rows)}", highlight=False)
    for (peer, reason), absent in result.absent_peers.items():
        places = ", ".join(map(str, sorted({row.M for row in absent})))
        console.print(f"no time of {peer} at {places} tokens: {reason}", highlight=False)
    by_events = sum(row.timing == "events" for row in result.rows)
    if by_events:
        console.print(f"{by_events} times include launch gaps: their graphs could not be captured")
    for failure in result.failures:
        console.print(f"[red]failed[/red] {failure}", highlight=False)


def _operator_table(result: Result) -> Table:
    """One line for each operator and number of tokens, or length."""
    over_cache = result.axis == "length"
    of_fused = (
        "bytes, their rate against a copy's,"
        if over_cache
        else "floor by bytes and operations, its share of the time"
    )
    times = f"{result.axis}|{result.environment['baseline']}\nus|unfused\nus|x|fused\nus|x"
    times += "|MB|copy|TFLOP\n/s|error" if over_cache else "|floor\nus|of it|error"
    table = make_table(
        ["operator"],
        times.split("|"),
        title=result.summary(),
        caption=f"median ± interquartile range; {of_fused} and relative error of the fused variant",
    )
    for op in result.ops:
        counts = result.counts(op)
        lines = _operator_lines(result, op, len(counts))
        for M, line in zip(counts, lines, strict=True):
            table.add_row(line, *_operator_cells(result, op, M))
        table.add_section()
    return table


def _operator_lines(result: Result, op: str, rows: int) -> list[str]:
    """What names the operator, spread over its rows: one word each, then its size."""
    row = next(iter(result.variants(op, result.counts(op)[0]).values()))
    if result.axis == "length":
        lines = op.rsplit(maxsplit=1)
    else:
        lines = [*op.split(), f"{row.N} x {row.K}" if row.N else str(row.K)]
    if len(lines) > rows:
        return [*lines[: rows - 1], "\n".join(lines[rows - 1 :])]
    return lines + [""] * (rows - len(lines))


def _operator_cells(result: Result, op: str, M: int) -> list[str]:
    variants = result.variants(op, M)
    fused = variants["fused"]
    cells = [str(M)]
    for name in ("baseline", "unfused", "fused"):
        row = variants.get(name)
        cells.append(_time_cell(row, spread=name != "unfused"))
        if name != "baseline":
            cells.append(number(result.speedup(row) if row else None, ".2f"))
    if result.axis == "tokens":
        floor = result.floor_us(fused)
        cells.append(number(floor, ".0f" if floor and floor >= 100 else ".1f"))
        cells.append(number(result.floor_share(fused), ".0%"))
        return [*cells, number(fused.error, ".0e")]
    cells.append(number(fused.bytes / 1e6, ".3g" if fused.bytes < 1e8 else ".0f"))
    cells.append(number(result.copy_share(fused), ".0%"))
    cells.append(number(fused.tflop_per_s, ".0f"))
    return [*cells, number(fused.error, ".0e")]


def _peer_table(result: Result) -> Table:
    """Speed-ups of ours and of every peer over the baseline."""
    baseline = result.environment["baseline"]
    table = make_table(
        ["linear"],
        ["tokens", f"{baseline}\nus", "ours", *(peer.replace(" ", "\n") for peer in result.peers)],
        title=f"speed-up over {baseline}, ours and peers",
        caption="floor: what ours would be if it took no longer than its bytes and operations do",
    )
    table.add_column("floor", justify="right", no_wrap=True)
    for op in result.linears:
        counts = result.counts(op)
        for M, line in zip(counts, _operator_lines(result, op, len(counts)), strict=True):
            variants = result.variants(op, M)
            rows = [variants.get(name) for name in ("fused", *result.peers)]
            speedups = [number(result.speedup(row) if row else None, ".2f") for row in rows]
            floor = result.speedup_at_floor(variants["fused"])
            cells = [*speedups, number(floor, ".3g")]
            time = _time_cell(variants.get("baseline"), spread=False)
            table.add_row(line, str(M), time, *cells)
        table.add_section()
    return table


def _mean_table(result: Result) -> Table:
    """Geometric means over the linears, for each number of tokens."""
    linears = result.linears
    largest = sorted(linears, key=lambda op: _weight_size(result, op))[-_LARGEST:]
    table = make_table(
        [],
        [
            *("tokens", "ours", f"largest\n{_LARGEST}", "least"),
            *(peer.replace(" ", "\n") for peer in result.peers),
        ],
        title=f"geometric mean of the speed-ups over {len(linears)} linears",
        caption="a peer that has no time for one of them has no mean",
    )
    for M in result.counts(linears[0]):
        # the last linear of an interrupted run lacks some
        rows = [result.variants(op, M).get("fused") for op in linears]
        least = min((result.speedup(row) or math.nan for row in rows if row), default=math.nan)
        means: Sequence[float | None] = [
            result.mean_speedup("fused", M, linears),
            result.mean_speedup("fused", M, largest),
            least,
            *(result.mean_speedup(peer, M, linears) for peer in result.peers),
        ]
        table.add_row(str(M), *(number(mean, ".2f") for mean in means))
    return table


def _weight_size(result: Result, op: str) -> int:
    row = result.variants(op, result.counts(op)[0])["fused"]
    return (row.N or 0) * row.K


def _baselines(result: Result) -> dict[str, list[str]]:
    """What ran, and for which operators and lengths."""
    rows: dict[str, list[str]] = {}
    for row in result.rows:
        if row.variant == "baseline":
            phase, _, batch = row.op.split()
            named = rows.setdefault(row.runs, [])
            if (name := f"{phase} {batch} {row.M}") not in named:
                named.append(name)
    return rows


def _kernels(result: Result) -> dict[str, list[str]]:
    """What the fused variants chose, and for which operators and numbers of tokens."""
    chosen: dict[str, dict[str, list[int]]] = {}
    for row in result.rows:
        if row.variant == "fused" and row.path:
            chosen.setdefault(row.path, {}).setdefault(result.label(row), []).append(row.M)
    return {
        path: [f"{op} at {', '.join(map(str, counts))}" for op, counts in by_op.items()]
        for path, by_op in chosen.items()
    }


def make_table(left: Sequence[str], right: Sequence[str], *, title: str, caption: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, caption=caption, pad_edge=False, padding=0)
    for header in left:
        table.add_column(header, no_wrap=True, min_width=_LEFT_WIDTH if len(left) == 1 else None)
    for header in right:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def _time_cell(row: Row | None, spread: bool = True) -> str:
    if row is None:
        return "-"
    if row.median_us is None or row.iqr_us is None:
        return "[red]failed[/red]"
    digits = 1 if row.median_us < 100 else 0
    median = f"{row.median_us:.{digits}f}"
    return f"{median}±{row.iqr_us:.{digits}f}" if spread else median


def number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"
