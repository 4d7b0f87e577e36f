"""Times the calibration of a model with random weights, and measures its memory; writes JSON.

    python benchmarks/calibration_time.py --model llama3-8b --out FILE

The model has the shape of the one named, in bfloat16 on a GPU and float32 on a CPU, and reads
random tokens: time and memory hardly depend on the numbers. Seconds in all and of each step,
`fit_weight` and `round_weight` being parts of `round`; gigabytes of the model, of one of its
decoder layers, and of the most that the GPU held, or on a CPU the process.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import atom_compile
from atom_compile import Scheme, rounding
from atom_compile.bench.cases import Setting
from atom_compile.bench.model import random_model
from atom_compile.bench.result import describe_environment
from atom_compile.bench.shapes import find_device, find_shape

calibration = sys.modules["atom_compile.calibrate"]  # the function has the module's name
STEPS = {
    "observe": (calibration, "_observe"),
    "measure": (calibration, "_measure"),
    "round": (rounding.Rounder, "run"),
    "fit_weight": (rounding, "fit_weight"),
    "round_weight": (rounding, "round_weight"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="llama3-8b")
    parser.add_argument("--layers", type=int, help="the model's by default")
    parser.add_argument("--scheme", default="w4a4")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4, help="windows")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    device = find_device(arguments.device)
    shape = find_shape(arguments.model)
    shape = dataclasses.replace(shape, layers=arguments.layers or shape.layers)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    scheme = Scheme.preset(arguments.scheme)
    setting = Setting(shape=shape, scheme=scheme, tokens=(), device=device, dtype=dtype)
    with torch.no_grad():
        model = random_model(setting)
    generator = torch.Generator().manual_seed(0)
    sizes = arguments.windows, arguments.length
    ids = torch.randint(shape.vocabulary, sizes, generator=generator).to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with timed(device) as seconds:
        started = time.perf_counter()
        recipe = atom_compile.calibrate(model, list(ids.split(arguments.batch)), scheme)
        seconds["all"] = time.perf_counter() - started
    result = describe_environment(device) | {
        "model": shape.name,
        "layers": shape.layers,
        "scheme": arguments.scheme,
        "calibration": sizes,
        "linears": len(recipe.rounded),
        "seconds": {name: round(spent, 2) for name, spent in seconds.items()},
        "gigabytes": {
            "model": gigabytes(model),
            "decoder_layer": gigabytes(model.model.layers[0]),
            "peak": round(peak_bytes(device) / 1e9, 3),
        },
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


@contextlib.contextmanager
def timed(device: torch.device) -> Iterator[dict[str, float]]:
    """What each step took so far."""
    seconds: dict[str, float] = defaultdict(float)

    def timing(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = function(*args, **kwargs)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name] += time.perf_counter() - started
            return result

        return run

    with contextlib.ExitStack() as patches:
        for name, (place, function) in STEPS.items():
            step = timing(name, getattr(place, function))
            patches.enter_context(mock.patch.object(place, function, step))
        yield seconds


def gigabytes(module: torch.nn.Module) -> float:
    return round(sum(one.nbytes for one in module.parameters()) / 1e9, 3)


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
