"""Tuned launches: data in `tuned/<device>.json`, one row for each operator size and token count.

    "linear": [{"N": 6144, "num_groups": 31, "group_size": 128, "M": 16, "path": "triton int8",
                "tiling": {"block_n": 64, ...}, "us": 9.1, "default_us": 10.3}, ...],
    "weight_only_linear": [{"format": "e2m3", "N": 6144, "num_groups": 32, ...}, ...],
    "float8_linear": [{"N": 6144, "num_groups": 32, ...}, ...]

A row serves M/2 + 1 .. M tokens; `M` is a power of two. Up to 8 tokens, for which a product takes
tiles of 8 and reads its weight once, numbers that were not measured are served by the next that
was. `atom-compile tune` writes the file. What is not in it gets the operator's default, at once.
"""

from __future__ import annotations

import functools
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).parent / "tuned"
OPERATORS = "linear", "weight_only_linear", "float8_linear"
_FEW_TOKENS = 8
_ENOUGH_TOKENS = 1024  # to fill a device: more of them are launched as these are

Row = dict[str, Any]


class Tuned(NamedTuple):
    """A kernel, by the name of its path, and the fields of its tiling."""

    path: str
    tiling: Mapping[str, int]


def find(
    device: torch.device,
    M: int,
    N: int,
    num_groups: int,
    group_size: int,
    operator: str = "linear",
    format: str = "int",
) -> Tuned | None:
    """What was measured fastest on this device for these sizes, if it was measured."""
    by_tokens = _rows_by_size(device).get((operator, format, N, num_groups, group_size))
    if not by_tokens:
        return None
    most = max(by_tokens)
    tokens = 1 << (M - 1).bit_length()
    if tokens > most >= _ENOUGH_TOKENS:
        tokens = most
    if M <= _FEW_TOKENS and tokens not in by_tokens:
        few = sorted(count for count in by_tokens if count <= _FEW_TOKENS)
        tokens = next((count for count in few if count > tokens), few[-1] if few else tokens)
    row = by_tokens.get(tokens)
    return Tuned(row["path"], row["tiling"]) if row else None


@functools.cache
def _rows_by_size(device: torch.device) -> dict[tuple[str, str, int, int, int], dict[int, Row]]:
    if device.type != "cuda":
        return {}
    rows_of = read_rows(path_for(device))
    if not any(rows_of.values()):
        warnings.warn(
            f"atom: no tuned launches for {device_name(device)}; default ones are used. "
            "`atom-compile tune` measures them.",
            stacklevel=2,
        )
    by_size: dict[tuple[str, str, int, int, int], dict[int, Row]] = {}
    for operator, rows in rows_of.items():
        for row in rows:
            size = row["N"], row["num_groups"], row["group_size"]
            by_size.setdefault((operator, format_of(row), *size), {})[row["M"]] = row
    return by_size


forget = _rows_by_size.cache_clear
"""Reads the files anew at the next look-up."""


def format_of(row: Row) -> str:
    """Of the weight, as the operators call it, where each has its own: what was tuned for INT4
    serves E2M1 in `linear`, and E2M3 E3M2 in `float8_linear`."""
    return str(row.get("format", "int"))


def read_rows(path: Path) -> dict[str, list[Row]]:
    """By operator."""
    record = json.loads(path.read_text()) if path.is_file() else {}
    return {operator: record.get(operator, []) for operator in OPERATORS}


def path_for(device: torch.device, folder: Path = FOLDER) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return folder / f"{slug}.json"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
