"""Reading a report's JSON back; the package's docstring says what is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ReportError

FORMAT = "atom_compile report"
VERSION = 1
_KEYS = frozenset(
    (
        *("weight_bytes_before", "weight_bytes_after", "cache_bytes_per_token", "scheme"),
        *("operators", "layers", "attentions", "graphs", "versions"),
    )
)


def load(path: str | Path) -> dict[str, Any]:
    """What `Report.save` wrote as JSON. Raises ReportError for anything else."""
    path = Path(path)
    data = read_json(path)
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ReportError(f"{path} is no report; `atom-compile explain --out x.json` writes one")
    if not isinstance(data.get("version"), int) or data["version"] > VERSION:
        raise ReportError(
            f"{path} is a report of format {data.get('version')}; this version of atom_compile "
            f"reads up to {VERSION}. Upgrade atom_compile."
        )
    if missing := sorted(_KEYS - data.keys()):
        raise ReportError(f"{path} is damaged: it lacks {', '.join(missing)}")
    return data


def read_json(path: Path) -> Any:
    """Raises ReportError for what is no file or, cut short for one, no JSON."""
    if not path.is_file():
        raise ReportError(f"{path} is no file; give a report that was saved as .json")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path} is no JSON: {error}") from error
