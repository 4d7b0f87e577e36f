"""Measures what each scheme costs a real model, with and without GPTQ; writes JSON.

    python benchmarks/accuracy.py MODEL_DIR --calibration FILE --validation FILE --out FILE

Perplexity over windows spread evenly over the validation text, as a ratio to float32, and the mean
Kullback-Leibler divergence of the next token's distribution from float32's: over so few windows
the ratio moves by some tenths of a percent with noise of any size, the divergence does not. The
rewritten graphs run uncompiled, through the references. With --outliers, a Python file with
`inject_outliers(model, scale)`, all of it on a model with outliers. With --statistics, a
safetensors file of per-channel maxima of a larger model's activations, the signal-to-noise ratio of
the outputs of linears with such inputs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import atom_compile
from atom_compile import Scheme, compat
from atom_compile.evaluate import text_windows
from atom_compile.gptq import fit_weight, round_weight
from atom_compile.kernels.packing import dequantize_weight, pack_weight
from atom_compile.precision import ACTIVATION_CLIPS, Noise, fake_quantize

WINDOWS, LENGTH, BATCH = 24, 512, 6
SCHEMES = {
    "w4a4": Scheme.preset("w4a4"),
    "w4ax": Scheme.preset("w4ax"),
    "w4a8": Scheme.preset("w4a8"),
    "w3a3": Scheme(weight_bits=3, activation_bits=3),
}
_MEASURED = ("self_attn.q_proj", "self_attn.out_proj", "fc1")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--outliers", type=Path)
    parser.add_argument("--statistics", type=Path)
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="separated by commas")
    parser.add_argument("--methods", default="nearest,gptq", help="nearest, gptq")
    parser.add_argument("--windows", type=int, default=32, help="of calibration text")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    # Inductor would take longer to compile a graph than its references take to run
    compat.compile_graph = lambda gm, example_inputs, **_: gm.forward  # type: ignore[assignment]
    result: dict[str, Any] = {
        "device": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model": arguments.model.name,
        "validation": [arguments.validation.name, WINDOWS, LENGTH],
        "calibration": [arguments.calibration.name, arguments.windows, LENGTH],
        "outliers": arguments.outliers is not None,
    }
    measure_model(arguments, result)
    if arguments.statistics:
        result["layer_output_snr_db"] = measure_statistics(arguments.statistics)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def measure_model(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Adds to `result` and writes it after every run."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    if arguments.outliers:
        load_function(arguments.outliers, "inject_outliers")(model, 60.0)
    validation = windows(tokenizer, arguments.validation, WINDOWS)
    calibration = windows(tokenizer, arguments.calibration, arguments.windows)
    wanted: list[Tensor] = []
    full = evaluate(model, validation, lambda number, logits: wanted.append(logits.half()))
    result |= {"float32": full, "runs": []}
    for name in arguments.schemes.split(","):
        for method in arguments.methods.split(","):
            started = time.perf_counter()
            recipe = atom_compile.calibrate(
                model, calibration, SCHEMES[name], progress=False, gptq=method == "gptq"
            )
            seconds = time.perf_counter() - started
            run = {"scheme": name, "method": method, "calibration_seconds": round(seconds)}
            run |= measure_recipe(model, recipe, validation, wanted, full)
            print({key: run[key] for key in ("scheme", "method", "ratio", "kl")}, flush=True)
            result["runs"].append(run)
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def measure_recipe(
    model: Any,
    recipe: atom_compile.Recipe,
    batches: list[Tensor],
    wanted: list[Tensor],
    full: float,
) -> dict[str, Any]:
    torch._dynamo.reset()
    model.compile(backend="atom", options={"recipe": recipe, "strict": True})
    divergences: list[float] = []

    def compare(number: int, logits: Tensor) -> None:
        divergences.append(
            F.kl_div(logits, wanted[number].float(), log_target=True, reduction="sum").item()
        )

    ratio = evaluate(model, batches, compare) / full
    model._compiled_call_impl = None
    tokens = sum(len(one) for one in wanted)
    result: dict[str, Any] = {"ratio": ratio, "kl": sum(divergences) / tokens}
    if recipe.layers:
        result["blocks_int8"], result["blocks"] = count_blocks(recipe)
        result["error"] = {name: one.error for name, one in recipe.layers.items()}
        result["int8_groups"] = {name: one.int8_groups for name, one in recipe.layers.items()}
        result["activation_clip"] = {
            name: one.activation_clip for name, one in recipe.layers.items()
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
        int8 = recipe.scheme.activation_bits == 8
        wide += layout.num_scales if int8 else choice.int8_groups + (layout.outlier_channels > 0)
        total += layout.num_scales
    return wide, total


@torch.no_grad()
def evaluate(model: Any, batches: list[Tensor], see: Callable[[int, Tensor], None]) -> float:
    """Perplexity; `see` gets each batch's log-probabilities (tokens, vocabulary)."""
    total, count = 0.0, 0
    for number, ids in enumerate(batches):
        logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
        see(number, logits)
        total += F.nll_loss(logits, ids[:, 1:].flatten(), reduction="sum").item()
        count += len(logits)
    return math.exp(total / count)


@torch.no_grad()
def measure_statistics(path: Path) -> dict[str, Any]:
    """Linears of 256 rows on normal activations whose channels reach the maxima in `path`."""
    generator = torch.Generator().manual_seed(0)
    result: dict[str, Any] = {}
    for name, peaks in pick(load_file(path)):
        width = peaks.numel()
        low_rank = torch.randn(64, width, generator=generator)

        def draw(tokens: int, peaks: Tensor = peaks, mixing: Tensor = low_rank) -> Tensor:
            hidden = torch.randn(tokens, 64, generator=generator) @ mixing / 8
            noise = torch.randn(tokens, mixing.shape[1], generator=generator)
            return (0.7 * hidden + 0.7 * noise) * (peaks / 4.0)  # maxima lie at four deviations

        weight = torch.randn(256, width, generator=generator) / math.sqrt(width)
        x, tested = draw(4096), draw(1024)
        result[name] = {
            f"{scheme} {method}": snr(SCHEMES[scheme], method, weight, x, tested)
            for scheme in SCHEMES
            for method in ("nearest", "gptq")
        }
    return result


def pick(statistics: dict[str, Tensor]) -> Sequence[tuple[str, Tensor]]:
    """The inputs of a block in the middle: q, k and v share theirs, and the widest takes long."""
    names = [f"model.decoder.layers.12.{name}" for name in _MEASURED]
    return [(name, statistics[name].float().clamp(min=1e-6)) for name in names]


def snr(scheme: Scheme, method: str, weight: Tensor, x: Tensor, tested: Tensor) -> float:
    """Decibels of the output, of rounding to nearest or of what calibration does."""
    layout = scheme.layout(weight.shape[1])
    count = scheme.int8_groups(layout)
    noise = Noise(layout, scheme, x.square().mean(0), weight.square().sum(0), ("",), (count,))
    noise.add(x)
    order = noise.best(count)[1] if method == "gptq" else x.square().mean(0).argsort()
    weight, x, tested = weight[:, order], x[:, order], tested[:, order]
    clip = scheme.activation_clip
    if method == "gptq":
        if scheme.activation_bits < 8:
            clip = min(
                ACTIVATION_CLIPS, key=lambda clip: error(scheme, weight, x[:1024], clip, count)
            )
        rounded_x = fake_quantize(x, scheme, layout, clip, count)
        hessian = rounded_x.t() @ rounded_x
        fitted = fit_weight(weight, hessian, x.t() @ rounded_x)
        packed, _ = round_weight(fitted, hessian, layout, scheme.weight_bits)
    else:
        packed = pack_weight(weight, layout, scheme.weight_bits, scheme.weight_clip)
    got = fake_quantize(tested, scheme, layout, clip, count) @ dequantize_weight(packed, layout).t()
    wanted = tested @ weight.t()
    return round(10 * math.log10(wanted.square().sum() / (got - wanted).square().sum()), 2)


def error(scheme: Scheme, weight: Tensor, x: Tensor, clip: float, count: int) -> float:
    wrong = fake_quantize(x, scheme, scheme.layout(x.shape[1]), clip, count) - x
    return float((wrong @ weight.t()).square().sum())


def load_function(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def windows(tokenizer: Any, path: Path, count: int) -> list[Tensor]:
    return list(text_windows(tokenizer, path.read_text(), count, LENGTH).split(BATCH))


if __name__ == "__main__":
    main()
