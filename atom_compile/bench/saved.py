"""Results read back from their JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from ..errors import OptionError, ReportError
from ..report.schema import read_json
from .accuracy_result import AccuracyResult, read_accuracy
from .model_result import ModelResult, ModelRow
from .overhead import OverheadResult, OverheadRow
from .result import Measured, Result, Row

R = TypeVar("R", Row, ModelRow, OverheadRow)

_EVERYWHERE = ("level", "device", "torch", "triton", "date")
_COMPARED = ("model", "scheme_name", "baseline")
# rows that were written before these were measured
_UNKNOWN = {"path": "", "flops": 0, "arithmetic": ""}


def load_all(paths: Sequence[Path]) -> dict[str, Measured]:
    """By the files' names without .json, which must differ."""
    results: dict[str, Measured] = {}
    for path in paths:
        if path.stem in results:
            raise OptionError(f"two files are called {path.name}; rename one, or leave it out")
        results[path.stem] = load(path)
    return results


def load(path: Path) -> Measured:
    """What `bench` or a script in benchmarks/ wrote. Raises ReportError for anything else."""
    data = read_json(path)
    foreign = ReportError(
        f"{path} is no result of a benchmark; `atom-compile bench` and the scripts in benchmarks/ "
        "write some"
    )
    if not isinstance(data, dict):
        raise foreign
    try:
        if "environment" in data and "rows" in data:
            return _bench_result(data)
        accuracy = _accuracy_result(data)
    except (KeyError, TypeError, AttributeError) as error:
        lacks = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ReportError(f"{path} is damaged: {lacks}") from error
    if accuracy is None:
        raise foreign
    return accuracy


def _accuracy_result(data: dict[str, Any]) -> AccuracyResult | None:
    result = read_accuracy(data)
    for row in result.rows if result else ():
        _check_types(row)
    return result


def _bench_result(data: dict[str, Any]) -> Measured:
    environment, level = data["environment"], data["environment"]["level"]
    if level == "overhead":
        _require(environment, _EVERYWHERE)
        return OverheadResult(environment, _rows(OverheadRow, data["rows"]))
    if level == "model":
        _require(environment, (*_EVERYWHERE, *_COMPARED, "layers", "length"))
        return ModelResult(environment, _rows(ModelRow, data["rows"]))
    _require(environment, (*_EVERYWHERE, *_COMPARED, "copy_gb_per_s"))
    return Result(environment, _rows(Row, data["rows"], model=environment["model"], **_UNKNOWN))


def _require(environment: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        if name not in environment:
            raise KeyError(name)


def _rows(kind: type[R], rows: list[dict[str, Any]], **unknown: Any) -> list[R]:
    """Without what was only derived for the file."""
    names = [field.name for field in dataclasses.fields(kind)]
    read: list[R] = []
    for row in rows:
        given = {name: value for name, value in (unknown | row).items() if name in names}
        read.append(kind(**given))
        _check_types(read[-1])
    if not read:
        raise TypeError("it has no rows")
    return read


def _check_types(row: Any) -> None:
    for name, hint in get_type_hints(type(row)).items():
        value = getattr(row, name)
        # JSON may have a whole number where a float is due
        if not isinstance(value, hint if isinstance("", hint) else hint | int):
            raise TypeError(f"{name} is {value!r}")
