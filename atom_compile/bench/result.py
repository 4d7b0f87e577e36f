"""What a benchmark run found; tables.py prints it, figures.py draws it."""

from __future__ import annotations

import datetime
import functools
import json
import math
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import triton
from rich.console import Console

from ..files import write_text, write_whole

_WIDTH = 80
OURS = ("baseline", "unfused", "fused")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One case: a time, or a `failure` that says why there is none.

    `error`: relative; None if there was nothing to compare or a NaN came out. `bytes`: each input
    read once, each output written once. `flops`: 0 where they are not counted; `arithmetic`: the
    rate that bounds them. `path`: the kernel that was chosen. `copies`: sets of inputs that the
    timing rotated through.
    """

    model: str
    op: str
    variant: str
    runs: str
    path: str
    M: int  # tokens; of attention, the cache's length
    N: int | None  # of a linear
    K: int
    bytes: int
    flops: int
    arithmetic: str
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

    @property
    def is_peer(self) -> bool:
        return self.variant not in OURS


@dataclass(frozen=True)
class Result:
    """The rows of one run, and where and how it ran.

    An operator goes by its label: its name, after the model's if there are several.
    """

    environment: dict[str, Any]
    rows: list[Row]

    @property
    def failures(self) -> list[str]:
        """Ours; a peer that cannot run is no failure of the run."""
        return [
            f"{self.label(r)}, {r.M} tokens, {r.variant}: {r.failure}"
            for r in self.rows
            if r.failure and not r.is_peer
        ]

    @property
    def absent_peers(self) -> dict[tuple[str, str], list[Row]]:
        """(peer, reason) -> the rows without a time."""
        absent: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            if row.is_peer and row.failure:
                absent.setdefault((row.variant, row.failure), []).append(row)
        return absent

    @functools.cached_property
    def _by_label(self) -> dict[str, dict[int, dict[str, Row]]]:
        found: dict[str, dict[int, dict[str, Row]]] = {}
        for row in self.rows:
            by_count = found.setdefault(self.label(row), {})
            by_count.setdefault(row.M, {})[row.variant] = row
        return found

    def label(self, row: Row) -> str:
        several = len({row.model for row in self.rows}) > 1
        return f"{row.model} {row.op}" if several else row.op

    @property
    def ops(self) -> list[str]:
        return list(self._by_label)

    @property
    def linears(self) -> list[str]:
        return [op for op in self.ops if self.variants(op, self.counts(op)[0])["fused"].N]

    @property
    def peers(self) -> list[str]:
        return list(dict.fromkeys(row.variant for row in self.rows if row.is_peer))

    @property
    def axis(self) -> str:
        """What the rows' M counts."""
        return "length" if "length" in self.environment else "tokens"

    def counts(self, op: str) -> list[int]:
        return list(self._by_label[op])

    def variants(self, op: str, M: int) -> dict[str, Row]:
        return self._by_label[op].get(M, {})

    def speedup(self, row: Row) -> float | None:
        """Over the baseline; over the unfused variant of an operator that 16 bits do not have."""
        against = self._against(row)
        if row is against or row.median_us is None or against.median_us is None:
            return None
        return against.median_us / row.median_us

    def speedup_at_floor(self, row: Row) -> float | None:
        """What `speedup` would be if the row took no longer than its floor."""
        against = self._against(row)
        floor = self.floor_us(row)
        return against.median_us / floor if against.median_us and floor else None

    def _against(self, row: Row) -> Row:
        variants = self.variants(self.label(row), row.M)
        return variants.get("baseline") or variants["unfused"]

    def mean_speedup(self, variant: str, M: int, ops: Sequence[str]) -> float | None:
        """The geometric mean over `ops`; None if one of them has no time."""
        rows = [self.variants(op, M).get(variant) for op in ops]
        speedups = [self.speedup(row) if row else None for row in rows]
        known = [speedup for speedup in speedups if speedup is not None]
        return statistics.geometric_mean(known) if known and len(known) == len(ops) else None

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

    def floor_us(self, row: Row) -> float | None:
        """The roofline: no less than moving the bytes takes, or the arithmetic.

        Bytes at the faster of a copy's and a read's rate. None where the run did not measure both.
        """
        e = self.environment
        if "read_gb_per_s" not in e or not row.bytes:
            return None
        gb_per_s: float = max(e["copy_gb_per_s"], e["read_gb_per_s"])
        tera_ops: float = e["tera_ops_per_s"].get(row.arithmetic, math.inf)
        return max(row.bytes / gb_per_s / 1e3, row.flops / tera_ops / 1e6)

    def floor_share(self, row: Row) -> float | None:
        """How much of the row's time its floor is: 1 is as fast as the device can."""
        floor = self.floor_us(row)
        return floor / row.median_us if floor and row.median_us else None

    def to_json(self) -> str:
        rows = [
            asdict(row)
            | {
                "gb_per_s": row.gb_per_s,
                "copy_share": self.copy_share(row),
                "tflop_per_s": row.tflop_per_s,
                "floor_us": self.floor_us(row),
                "floor_share": self.floor_share(row),
                "speedup": self.speedup(row),
            }
            for row in self.rows
        ]
        means = {
            M: {
                variant: self.mean_speedup(variant, M, self.linears)
                for variant in ("unfused", "fused", *self.peers)
            }
            for M in (self.counts(self.linears[0]) if self.linears else ())
        }
        record = {
            "environment": self.environment,
            "mean_speedups_of_linears": means,
            "rows": rows,
        }
        return json.dumps(record, indent=1)

    def print(self, console: Console) -> None:
        from .tables import print_result

        print_result(self, console)

    def save(self, folder: Path | str) -> list[Path]:
        """Writes `<model>-<scheme>-<level>-<device>`: see `save_files`."""
        e = self.environment
        return save_files(
            self, Path(folder), [e["model"], e["scheme_name"], e["level"], e["device"]]
        )


class Measured(Protocol):
    """What each level's result can do."""

    @property
    def environment(self) -> dict[str, Any]: ...

    @property
    def rows(self) -> Sequence[Any]: ...

    @property
    def failures(self) -> list[str]: ...

    def to_json(self) -> str: ...


class Printed(Measured, Protocol):
    def print(self, console: Console) -> None: ...


def save_files(result: Printed, folder: Path, name: Sequence[str]) -> list[Path]:
    """The result as .json and .txt, its figures as .png and .svg, each file whole or not at all."""
    from .figures import figures_of, save_figures

    folder.mkdir(parents=True, exist_ok=True)
    stem = file_stem(*name)
    paths = [folder / f"{stem}.json", folder / f"{stem}.txt"]
    write_text(paths[0], result.to_json() + "\n")
    write_whole(paths[1], lambda path: print_to(path, result.print))
    return paths + save_figures(figures_of(result, stem), folder)


def file_stem(*names: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(names).lower()).strip("-.")


def print_to(path: Path, print_on: Callable[[Console], None]) -> None:
    with path.open("w") as file:
        print_on(Console(file=file, width=_WIDTH))


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
