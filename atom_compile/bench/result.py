"""What a benchmark run found, as a table, JSON and a plot."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rich import box
from rich.console import Console
from rich.table import Table

_WIDTH = 100


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case: a time, or a `failure` that says why there is none.

    `error`: relative; None if there was nothing to compare or a NaN came out. `bytes`: each input
    read once, each output written once. `flops`: 0 where they are not counted. `copies`: sets of
    inputs that the timing rotated through.
    """

    op: str
    variant: str
    runs: str
    M: int  # tokens; of attention, the cache's length
    N: int | None  # of a linear
    K: int
    bytes: int
    flops: int
    copies: int
    error: float | None
    error_limit: float
    failure: str | None
    median_us: float | None
    iqr_us: float | None
    timing: str | None

    @property
    def gb_per_s(self) -> float | None:
        return self.bytes / self.median_us / 1e3 if self.median_us else None

    @property
    def tflop_per_s(self) -> float | None:
        return self.flops / self.median_us / 1e6 if self.flops and self.median_us else None


@dataclass(frozen=True)
class Result:
    """The rows of one run, and where and how it ran."""

    environment: dict[str, Any]
    rows: list[Row]

    @property
    def failures(self) -> list[str]:
        return [f"{r.op}, {r.M} tokens, {r.variant}: {r.failure}" for r in self.rows if r.failure]

    @property
    def ops(self) -> list[str]:
        return list(dict.fromkeys(row.op for row in self.rows))

    @property
    def axis(self) -> str:
        """What the rows' M counts."""
        return "length" if "length" in self.environment else "tokens"

    def counts(self, op: str) -> list[int]:
        return list(dict.fromkeys(row.M for row in self.rows if row.op == op))

    def variants(self, op: str, M: int) -> dict[str, Row]:
        return {row.variant: row for row in self.rows if (row.op, row.M) == (op, M)}

    def speedup(self, row: Row) -> float | None:
        """Over the baseline; over the unfused variant of an operator that 16 bits do not have."""
        variants = self.variants(row.op, row.M)
        against = variants.get("baseline") or variants["unfused"]
        if row is against or row.median_us is None or against.median_us is None:
            return None
        return against.median_us / row.median_us

    def summary(self) -> str:
        """Where this was measured, in two lines."""
        e = self.environment
        return (
            f"{e['model']}, {e['scheme_name']} against {e['baseline']} on {e['device']}\n"
            f"torch {e['torch']}, triton {e['triton']}, {e['date'][:10]}, "
            f"a copy moves {e['copy_gb_per_s']:.0f} GB/s"
        )

    def copy_share(self, row: Row) -> float | None:
        """Of the bandwidth of a copy, the share that the row's bytes are moved at."""
        return row.gb_per_s / self.environment["copy_gb_per_s"] if row.gb_per_s else None

    def table(self) -> Table:
        """One line for each operator and number of tokens, or length."""
        over_cache = self.axis == "length"
        of_fused = "bytes, their rate against a copy's," if over_cache else "GB/s"
        table = Table(
            box=box.SIMPLE_HEAD,
            title=self.summary(),
            caption="median ± interquartile range; "
            f"{of_fused} and relative error of the fused variant",
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        times = f"{self.axis}|{self.environment['baseline']} us|unfused us|x|fused us|x"
        for header in ("operator",) if over_cache else ("operator", "N x K"):
            table.add_column(header, no_wrap=True)
        times += "|MB|copy|TFLOP/s|error" if over_cache else "|GB/s|error"
        for header in times.split("|"):
            table.add_column(header, justify="right", no_wrap=True)
        for op in self.ops:
            for M in self.counts(op):
                table.add_row(*self._cells(op, M))
            table.add_section()
        return table

    def _cells(self, op: str, M: int) -> list[str]:
        variants = self.variants(op, M)
        first = self.counts(op)[0] == M
        fused = variants["fused"]
        cells = [op if first else ""]
        if self.axis == "tokens":
            size = f"{fused.N} x {fused.K}" if fused.N else str(fused.K)
            cells.append(size if first else "")
        cells.append(str(M))
        for name in ("baseline", "unfused", "fused"):
            row = variants.get(name)
            cells.append(_time_cell(row))
            if name != "baseline":
                cells.append(_number(self.speedup(row) if row else None, ".2f"))
        if self.axis == "tokens":
            cells.append(_number(fused.gb_per_s, ".0f"))
        else:
            cells.append(_number(fused.bytes / 1e6, ".3g"))
            cells.append(_number(self.copy_share(fused), ".0%"))
            cells.append(_number(fused.tflop_per_s, ".0f"))
        return [*cells, _number(fused.error, ".0e")]

    def print(self, console: Console) -> None:
        """The table, which attention was the baseline, and what failed."""
        console.print(self.table())
        if self.axis == "length":
            for runs, rows in self._baselines().items():
                console.print(f"baseline of {', '.join(rows)}: {runs}", highlight=False)
        by_events = sum(row.timing == "events" for row in self.rows)
        if by_events:
            console.print(
                f"{by_events} times include launch gaps: their graphs could not be captured"
            )
        for failure in self.failures:
            console.print(f"[red]failed[/red] {failure}", highlight=False)

    def _baselines(self) -> dict[str, list[str]]:
        """What ran, and for which operators and lengths."""
        rows: dict[str, list[str]] = {}
        for row in self.rows:
            if row.variant == "baseline":
                phase, _, batch = row.op.split()
                named = rows.setdefault(row.runs, [])
                if (name := f"{phase} {batch} {row.M}") not in named:
                    named.append(name)
        return rows

    def to_json(self) -> str:
        rows = [
            asdict(row)
            | {
                "gb_per_s": row.gb_per_s,
                "copy_share": self.copy_share(row),
                "tflop_per_s": row.tflop_per_s,
                "speedup": self.speedup(row),
            }
            for row in self.rows
        ]
        return json.dumps({"environment": self.environment, "rows": rows}, indent=1)

    def save(self, folder: Path | str) -> list[Path]:
        """Writes `<model>-<scheme>-<level>-<device>` as .json, .txt and .png, each whole or not."""
        from .plot import plot

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        e = self.environment
        name = "-".join([e["model"], e["scheme_name"], e["level"], e["device"]])
        stem = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")
        writers: dict[str, Callable[[Path], object]] = {
            "json": lambda path: path.write_text(self.to_json() + "\n"),
            "txt": self._write_table,
            "png": lambda path: plot(self, path),
        }
        paths = [folder / f"{stem}.{suffix}" for suffix in writers]
        for path, write in zip(paths, writers.values(), strict=True):
            _write_whole(path, write)
        return paths

    def _write_table(self, path: Path) -> None:
        with path.open("w") as file:
            self.print(Console(file=file, width=_WIDTH))


def _time_cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if row.median_us is None or row.iqr_us is None:
        return "[red]failed[/red]"
    digits = 1 if row.median_us < 1000 else 0
    return f"{row.median_us:.{digits}f}±{row.iqr_us:.{digits}f}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Through a temporary name beside it, so that a reader never sees half a file."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".atom-bench-") as folder:
        unfinished = Path(folder) / path.name
        write(unfinished)
        os.replace(unfinished, path)


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, command line, date and source revision: the record beside the numbers."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": _git_revision(),
    }


def _cpu_name() -> str:
    return f"cpu {platform.machine()} {torch.get_num_threads()} threads"


def _git_revision() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    folder = Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # installed without its repository
    return done.stdout.strip()
