"""Measures on a real model what INT4 costs and whether CPU and GPU agree; writes JSON.

    python benchmarks/reference_model.py MODEL_DIR --calibration FILE --validation FILE --out FILE

Perplexity over windows spread evenly over the validation text, as a ratio to float32. With a GPU,
the relative difference of the logits between the references on the CPU and the kernels on the GPU,
over the first 32 tokens of each window and over all of it: where a value lies on the edge between
two codes the last bit of a float32 sum decides, and what follows that token then differs by a code.
Without one, the time of a compiled forward of 512 tokens beside eager float32. With --outliers, a
Python file with `inject_outliers(model, scale)`, all of it again on a model with outliers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import atom_compile
from atom_compile.evaluate import perplexity, text_windows

WINDOWS, LENGTH, BATCH = 24, 512, 6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--outliers", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    results = {
        "device": torch.cuda.get_device_name() if len(devices) > 1 else platform.machine(),
        "cpus": torch.get_num_threads(),
        "torch": torch.__version__,
        "windows": [WINDOWS, LENGTH],
        "runs": [
            measure(arguments, injected, devices)
            for injected in ([False, True] if arguments.outliers else [False])
        ],
    }
    arguments.out.write_text(json.dumps(results, indent=1))
    print(json.dumps(results, indent=1))


def measure(arguments: argparse.Namespace, injected: bool, devices: list[str]) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    if injected:
        load_function(arguments.outliers, "inject_outliers")(model, 60.0)
    validation = windows(tokenizer, arguments.validation)
    recipe = atom_compile.calibrate(model, windows(tokenizer, arguments.calibration), gptq=False)
    result: dict[str, Any] = {"model": arguments.model.name, "outliers": injected}
    logits: dict[str, dict[str, Tensor]] = {}
    for device in devices:
        model.to(device)
        batches = [batch.to(device) for batch in validation]
        full = perplexity(model, batches)
        result[device] = {"float32": full}
        for scheme in ("w4a4", "w4a8"):
            torch._dynamo.reset()
            model.compile(
                backend="atom", options={"recipe": recipe, "scheme": scheme, "strict": True}
            )
            got = perplexity(model, batches)
            result[device][scheme] = {"perplexity": got, "ratio": got / full}
            with torch.no_grad():
                out = [model(batch, use_cache=False).logits.cpu() for batch in batches]
            logits.setdefault(scheme, {})[device] = torch.cat(out)
            model._compiled_call_impl = None
    if len(devices) > 1:
        result["logits_cpu_against_gpu"] = {
            scheme: agreement(one["cuda"], one["cpu"]) for scheme, one in logits.items()
        }
    elif not injected:
        result["forward_of_512_tokens"] = time_forward(model, validation[0][:1], recipe)
    return result


def agreement(got: Tensor, wanted: Tensor) -> dict[str, float]:
    """Relative differences of logits (windows, length, vocabulary)."""
    difference, size = (got - wanted).double(), wanted.double()
    early = difference[:, :32].norm(dim=(1, 2)) / size[:, :32].norm(dim=(1, 2))
    return {
        "first_32_tokens_median": early.median().item(),
        "first_32_tokens_worst": early.max().item(),
        "all_tokens": (difference.norm() / size.norm()).item(),
    }


def load_function(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def windows(tokenizer: Any, path: Path) -> list[Tensor]:
    return list(text_windows(tokenizer, path.read_text(), WINDOWS, LENGTH).split(BATCH))


@torch.no_grad()
def time_forward(model: Any, ids: Tensor, recipe: atom_compile.Recipe) -> dict[str, float]:
    """Median milliseconds of eager float32 and of the compiled W4A4 model."""
    result = {}
    for name in ("eager_ms", "compiled_ms"):
        if name == "compiled_ms":
            torch._dynamo.reset()
            model.compile(backend="atom", options={"recipe": recipe})
        times = []
        for _ in range(12):
            started = time.perf_counter()
            model(ids, use_cache=False)
            times.append((time.perf_counter() - started) * 1e3)
        result[name] = statistics.median(times[2:])
    result["ratio"] = result["compiled_ms"] / result["eager_ms"]
    return result


if __name__ == "__main__":
    main()
