"""Measures what each scheme costs a real model, rounded to nearest and by GPTQ; writes JSON.

    python benchmarks/accuracy.py MODEL_DIR --calibration FILE --validation FILE --out FILE

Perplexity over windows spread evenly over the validation text, as a ratio to float32, and the mean
Kullback-Leibler divergence of the next token's distribution from float32's: over so few windows
the ratio moves by some tenths of a percent with noise of any size, the divergence does not.
Calibration and all else run on --device; the rewritten graphs run without Inductor, through the
kernels on a GPU and through the references on a CPU. With --outliers, a Python file with
`inject_outliers(model, scale)`, all of it on a model with outliers. Rows that FILE has already are
kept, and measured on the same text and device or refused.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import atom_compile
from atom_compile import KVCache, Scheme, compat
from atom_compile.backend import atom
from atom_compile.evaluate import text_windows
from atom_compile.scheme import PRESETS

WINDOWS, LENGTH, BATCH = 24, 512, 6
SCHEMES = PRESETS | {
    "w4a16-asymmetric": replace(Scheme.preset("w4a16"), symmetric=False),
    "w3a3": Scheme(weight_bits=3, activation_bits=3),
    "w3a3-rotated": Scheme(weight_bits=3, activation_bits=3, rotation=128),
}


class Row(NamedTuple):
    """One measurement. `cache`: the scheme of keys and values, none for no cache at all."""

    scheme: str
    gptq: bool
    cache: str | None = None

    def __str__(self) -> str:
        numbers = self.scheme + (f" + {self.cache}" if self.cache else "")
        return numbers if self.gptq else f"{numbers}, nearest"


# those that share a recipe follow each other
ROWS = [
    Row("w4a4-rotated", True),
    Row("w4a4-rotated", True, "kv4-rotated"),
    Row("w4a4", True),
    Row("w4a4-fp4", True),
    Row("w4ax", True),
    Row("w4ax-rotated", True),
    Row("w4a8", True),
    Row("w4a8-two-level", True),
    Row("w4a16", True),
    Row("w4a16-asymmetric", True),
    Row("w4a16-fp4", True),
    Row("w5a16", True),
    Row("w6a16", True),
    Row("w6a16-e3m2", True),
    Row("w6a8", True),
    Row("w6a8-e3m2", True),
    Row("mxfp4", True),
    Row("nvfp4", True),
    Row("w3a3", True),
    Row("w3a3-rotated", True),
    Row("w4a4", False),
    Row("w4a4-fp4", False),
    Row("w4a4-rotated", False),
    Row("w4a8", False),
    Row("w4a8-two-level", False),
    Row("w4a16", False),
    Row("w4a16-fp4", False),
    Row("w5a16", False),
    Row("w6a16", False),
    Row("w6a16-e3m2", False),
    Row("w6a8", False),
    Row("w6a8-e3m2", False),
    Row("mxfp4", False),
    Row("nvfp4", False),
    Row("w3a3", False),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--outliers", type=Path)
    parser.add_argument("--rows", nargs="*", choices=[str(row) for row in ROWS])
    parser.add_argument("--windows", type=int, default=32, help="of calibration text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    # Inductor would take longer to compile a graph than it takes to run
    compat.compile_graph = lambda gm, example_inputs, **_: gm.forward  # type: ignore[assignment]
    result = measure_model(arguments)
    for name, row in result["rows"].items():
        print(f"{name:36} {row['ratio']:.4f}x  {row['kl']:.4f}")


def measure_model(arguments: argparse.Namespace) -> dict[str, Any]:
    """The contents of the file, which is written after every row."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    if arguments.outliers:
        load_function(arguments.outliers, "inject_outliers")(model, 60.0)
    model.to(arguments.device)
    validation, calibration = (
        windows(tokenizer, path, count, arguments.device)
        for path, count in (
            (arguments.validation, WINDOWS),
            (arguments.calibration, arguments.windows),
        )
    )
    wanted: list[Tensor] = []
    full = evaluate(model, validation, lambda number, logits: wanted.append(logits.half()))
    result = opened(arguments, full)
    recipe = made_for = None
    for row in ROWS:
        if str(row) in result["rows"] or (arguments.rows and str(row) not in arguments.rows):
            continue
        if recipe is None or made_for != row[:2]:
            recipe = atom_compile.calibrate(
                model, calibration, SCHEMES[row.scheme], progress=False, gptq=row.gptq
            )
            made_for = row[:2]
        measured = measure_recipe(model, recipe, row.cache, validation, wanted, full)
        result["rows"][str(row)] = measured
        print(f"{row}: {measured['ratio']:.4f}x  {measured['kl']:.4f}", flush=True)
        save(result, arguments.out)
    return result


def opened(arguments: argparse.Namespace, full: float) -> dict[str, Any]:
    """What `out` holds so far, if it is of the same measurement."""
    header: dict[str, Any] = {
        "device": device_name(torch.device(arguments.device)),
        "torch": torch.__version__,
        "model": arguments.model.name,
        "validation": [arguments.validation.name, WINDOWS, LENGTH],
        "calibration": [arguments.calibration.name, arguments.windows, LENGTH],
        "outliers": arguments.outliers is not None,
        "float32": round(full, 4),
    }
    if not arguments.out.exists():
        return header | {"rows": {}}
    known: dict[str, Any] = json.loads(arguments.out.read_text())
    for key, value in header.items():
        if known.get(key) != value:
            raise SystemExit(f"{arguments.out} was measured with {key} {known.get(key)}: {value}")
    return known


def save(result: dict[str, Any], out: Path) -> None:
    out.write_text(json.dumps(result, indent=1) + "\n")


def measure_recipe(
    model: Any,
    recipe: atom_compile.Recipe,
    cache: str | None,
    batches: list[Tensor],
    wanted: list[Tensor],
    full: float,
) -> dict[str, Any]:
    torch._dynamo.reset()
    model.compile(backend=atom, options={"recipe": recipe, "strict": True})
    divergences: list[float] = []

    def compare(number: int, logits: Tensor) -> None:
        divergences.append(
            F.kl_div(logits, wanted[number].float(), log_target=True, reduction="sum").item()
        )

    device = model.device
    through = None if cache is None else KVCache(model.config, BATCH, LENGTH, cache, device=device)
    ratio = evaluate(model, batches, compare, through) / full
    model._compiled_call_impl = None
    tokens = sum(len(one) for one in wanted)
    result: dict[str, Any] = {"ratio": ratio, "kl": sum(divergences) / tokens}
    if recipe.layers:
        result["blocks_int8"], result["blocks"] = count_blocks(recipe)
        result["layers"] = {
            name: [choice.activation_clip, choice.int8_groups, choice.error]
            for name, choice in recipe.layers.items()
        }
    return result


def count_blocks(recipe: atom_compile.Recipe) -> tuple[int, int]:
    """Blocks of activation channels in INT8 and in all: an activation of several linears once."""
    wide = total = 0
    seen: list[Tensor] = []
    for name, choice in recipe.layers.items():
        diagonal = recipe.hessian_diagonal[name]
        if any(torch.equal(diagonal, one) for one in seen):
            continue
        seen.append(diagonal)
        layout = recipe.scheme.layout(diagonal.numel())
        int8 = recipe.scheme.activation_bits == 8 and recipe.scheme.activation_format == "int"
        wide += layout.num_scales if int8 else choice.int8_groups + (layout.outlier_channels > 0)
        total += layout.num_scales
    return wide, total


@torch.no_grad()
def evaluate(
    model: Any,
    batches: list[Tensor],
    see: Callable[[int, Tensor], None],
    cache: KVCache | None = None,
) -> float:
    """Perplexity; `see` gets each batch's log-probabilities (tokens, vocabulary)."""
    total, count = 0.0, 0
    for number, ids in enumerate(batches):
        through: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            cache.reset()
            through = {"past_key_values": cache}
        logits = model(ids, **through).logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
        see(number, logits)
        total += F.nll_loss(logits, ids[:, 1:].flatten(), reduction="sum").item()
        count += len(logits)
    return math.exp(total / count)


def load_function(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def windows(tokenizer: Any, path: Path, count: int, device: str) -> list[Tensor]:
    ids = text_windows(tokenizer, path.read_text(), count, LENGTH)
    return list(ids.to(device).split(BATCH))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


if __name__ == "__main__":
    main()
