"""What the scripts in benchmarks/ measured of accuracy, in one form; see benchmarks/README.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

Data = Mapping[str, Any]

# what rotations.py calls the presets
_SIMULATED = {"atom": "w4a4", "rotated": "w4a4-rotated"}


@dataclass(frozen=True, kw_only=True)
class AccuracyRow:
    """The perplexity of one scheme, as a ratio to that of `against`.

    `method`: how weights were rounded. `device`: what computed it. `outliers`: whether activation
    outliers were injected. `cache_bytes`: of the KV cache, per token.
    """

    model: str
    outliers: bool
    scheme: str
    method: str
    device: str
    against: str
    ratio: float
    perplexity: float | None = None
    cache_bytes: float | None = None


@dataclass(frozen=True)
class AccuracyResult:
    environment: dict[str, Any]
    rows: list[AccuracyRow]

    @property
    def failures(self) -> list[str]:
        return []

    def summary(self) -> str:
        e = self.environment
        where = ", ".join(f"{e[name]}" for name in ("model", "device") if name in e)
        windows = " x ".join(map(str, e["windows"])) if "windows" in e else "windows"
        torch = f", torch {e['torch']}" if "torch" in e else ""
        return f"perplexity, {where}{torch}\n{windows} tokens of held-out text"

    def to_json(self) -> str:
        rows = [asdict(row) for row in self.rows]
        return json.dumps({"environment": self.environment, "rows": rows}, indent=1)


def read_accuracy(data: Data) -> AccuracyResult | None:
    """What accuracy.py, reference_model.py, kv_cache.py or rotations.py wrote; None if none did.

    Raises KeyError, TypeError or AttributeError if it is theirs and damaged.
    """
    rows: Iterator[AccuracyRow]
    if "calibration" in data and ("runs" in data or "rows" in data):
        rows = _calibrated_rows(data)
    elif "cpus" in data and "runs" in data:
        rows = _reference_rows(data)
    elif "model" in data and "plain" in data:
        rows = _simulated_rows(data)
    elif "windows" in data and "w4a4" in data:
        rows = _cache_rows(data)
    else:
        return None
    kept = ("device", "torch", "model", "windows")
    environment = {name: data[name] for name in kept if name in data}
    if "windows" not in environment:
        environment["windows"] = data["validation"][1:]
    return AccuracyResult(environment | {"level": "accuracy"}, list(rows))


def _calibrated_rows(data: Data) -> Iterator[AccuracyRow]:
    named = [_name_run(name, run) for name, run in data.get("rows", {}).items()]
    for run in [*data.get("runs", ()), *named]:
        yield AccuracyRow(
            model=data["model"],
            outliers=data["outliers"],
            scheme=run["scheme"],
            method=run["method"],
            device=data["device"],
            against="float32",
            ratio=run["ratio"],
            perplexity=data["float32"] * run["ratio"],
        )


def _name_run(name: str, run: Data) -> Data:
    """Of "w4a4 + kv4, nearest"; without the last word weights were rounded by GPTQ."""
    numbers, nearest, _ = name.partition(", nearest")
    scheme = numbers.replace(" + ", " ")
    return {**run, "scheme": scheme, "method": "nearest" if nearest else "gptq"}


def _reference_rows(data: Data) -> Iterator[AccuracyRow]:
    for run in data["runs"]:
        for device in ("cpu", "cuda"):
            for scheme, found in run.get(device, {}).items():
                if scheme != "float32":
                    yield AccuracyRow(
                        model=run["model"],
                        outliers=run["outliers"],
                        scheme=scheme,
                        method="nearest",
                        device=data["device"] if device == "cuda" else "cpu",
                        against="float32",
                        ratio=found["ratio"],
                        perplexity=found["perplexity"],
                    )


def _simulated_rows(data: Data) -> Iterator[AccuracyRow]:
    for name in ("plain", "outliers"):
        for scheme, found in data.get(name, {}).items():
            yield AccuracyRow(
                model=data["model"],
                outliers=name == "outliers",
                scheme=_SIMULATED.get(scheme, scheme),
                method="nearest, simulated",
                device="cpu",
                against="float32",
                ratio=found["ratio"],
            )


def _cache_rows(data: Data) -> Iterator[AccuracyRow]:
    for cache, found in data["w4a4"].items():
        yield AccuracyRow(
            model=data["model"],
            outliers=False,
            scheme=f"w4a4 {cache}",
            method="nearest",
            device=data["device"],
            against="w4a4 kv16",
            ratio=found["ratio"],
            perplexity=found["perplexity"],
            cache_bytes=found["bytes_per_token"],
        )
