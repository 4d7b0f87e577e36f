"""What the benchmark of a whole model found, as a table and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from .result import save_files
from .tables import make_table, number


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """One phase of one variant at one batch size: a time, or a `failure` that says why not.

    `first_call_s`: of a process with empty caches on disk, compiling included; `warm_first_call_s`:
    of a second one. `tokens`: that go in by a call. `peak_gb`: allocated from the first call on.
    `without_graphs`: compiled graphs that are no CUDA graph. `error`: relative, of the logits.
    """

    variant: str
    phase: str
    batch: int
    tokens: int = 0
    median_ms: float | None = None
    iqr_ms: float | None = None
    first_call_s: float | None = None
    warm_first_call_s: float | None = None
    peak_gb: float | None = None
    without_graphs: int = 0
    error: float | None = None
    failure: str | None = None

    @property
    def tokens_per_s(self) -> float | None:
        return 1e3 * self.tokens / self.median_ms if self.median_ms else None


@dataclass(frozen=True)
class ModelResult:
    """The rows of one run, and where and how it ran."""

    environment: dict[str, Any]
    rows: list[ModelRow]

    def add(self, row: ModelRow, warm: bool) -> None:
        """A warm process only adds the time of its first call to the row of the cold one."""
        if not warm:
            self.rows.append(row)
            return
        key = row.variant, row.phase, row.batch
        for at, cold in enumerate(self.rows):
            if (cold.variant, cold.phase, cold.batch) == key:
                self.rows[at] = replace(
                    cold,
                    warm_first_call_s=row.first_call_s,
                    failure=cold.failure or row.failure,
                )

    @property
    def failures(self) -> list[str]:
        return [f"{r.phase} x{r.batch}, {r.variant}: {r.failure}" for r in self.rows if r.failure]

    def speedup(self, row: ModelRow) -> float | None:
        for other in self.rows:
            if other.variant == "baseline" and (other.phase, other.batch) == (row.phase, row.batch):
                known = row.median_ms and other.median_ms
                return other.median_ms / row.median_ms if known and other is not row else None  # type: ignore[operator]
        return None

    def summary(self) -> str:
        e = self.environment
        return (
            f"{e['model']}, {e['layers']} layers of random weights, {e['scheme_name']} against "
            f"{e['baseline']}, {e['length']} tokens\n{e['device']}, torch {e['torch']}, "
            f"triton {e['triton']}, {e['date'][:10]}"
        )

    def print(self, console: Console) -> None:
        table = make_table(
            ["phase", "variant"],
            ["batch", "ms", "x", "tokens/s", "first\ns", "warm\ns", "GB", "error"],
            title=self.summary(),
            caption="median ± interquartile range of one call; first: of a process with empty "
            "caches, compiling included; warm: of the next process; GB: most allocated",
        )
        by_case = sorted(self.rows, key=lambda row: (row.phase, row.batch))
        for row in by_case:
            table.add_row(row.phase, row.variant, *self._cells(row))
        console.print(table)
        for row in by_case:
            if row.without_graphs:
                console.print(
                    f"{row.phase} x{row.batch}, {row.variant}: {row.without_graphs} graphs ran "
                    "without CUDA graphs"
                )
        for failure in self.failures:
            console.print(f"[red]failed[/red] {failure}", highlight=False)

    def _cells(self, row: ModelRow) -> list[str]:
        time = "[red]failed[/red]"
        if row.median_ms is not None and row.iqr_ms is not None:
            time = f"{row.median_ms:.2f}±{row.iqr_ms:.2f}"
        return [
            str(row.batch),
            time,
            number(self.speedup(row), ".2f"),
            number(row.tokens_per_s, ".0f"),
            number(row.first_call_s, ".1f"),
            number(row.warm_first_call_s, ".1f"),
            number(row.peak_gb, ".1f"),
            number(row.error, ".0e"),
        ]

    def to_json(self) -> str:
        rows = [
            asdict(row) | {"tokens_per_s": row.tokens_per_s, "speedup": self.speedup(row)}
            for row in self.rows
        ]
        return json.dumps({"environment": self.environment, "rows": rows}, indent=1)

    def save(self, folder: Path | str) -> list[Path]:
        """Writes `<model>-<scheme>-model-<device>`: see `save_files`."""
        e = self.environment
        return save_files(
            self, Path(folder), [e["model"], e["scheme_name"], e["level"], e["device"]]
        )
