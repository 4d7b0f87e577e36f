"""Measures what each scheme costs a real model, rounded to nearest and by GPTQ; writes JSON.

    python benchmarks/accuracy.py MODEL_DIR --calibration FILE --validation FILE --out FILE

Perplexity over windows spread evenly over the validation text, as a ratio to float32, and the mean
Kullback-Leibler divergence of the next token's distribution from float32's: over so few windows
the ratio moves by some tenths of a percent with noise of any size, the divergence does not. The
rewritten graphs run uncompiled, through the references. With --outliers, a Python file with
`inject_outliers(model, scale)`, all of it on a model with outliers. With --statistics, a
safetensors file of per-channel maxima of a larger model's activations, the signal-to-noise ratio of
the outputs of linears with such inputs. Rows that FILE has already are kept, and measured on the
same text or refused.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import atom_compile
from atom_compile import KVCache, Scheme, compat
from atom_compile.evaluate import text_windows
from atom_compile.gptq import fit_weight, round_weight
from atom_compile.kernels.packing import GroupLayout, dequantize_weight, pack_weight
from atom_compile.precision import ACTIVATION_CLIPS, Noise, fake_quantize, transform_of

WINDOWS, LENGTH, BATCH = 24, 512, 6
SCHEMES = {
    "w4a4": Scheme.preset("w4a4"),
    "w4a4-rotated": Scheme.preset("w4a4-rotated"),
    "w4ax": Scheme.preset("w4ax"),
    "w4a8": Scheme.preset("w4a8"),
    "w4a16": Scheme.preset("w4a16"),
    "w4a16-asymmetric": replace(Scheme.preset("w4a16"), symmetric=False),
    "w3a3": Scheme(weight_bits=3, activation_bits=3),
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
    Row("w4ax", True),
    Row("w4a8", True),
    Row("w4a16", True),
    Row("w4a16-asymmetric", True),
    Row("w4a4", False),
    Row("w4a4-rotated", False),
    Row("w4a8", False),
    Row("w4a16", False),
    Row("w3a3", True),
    Row("w3a3", False),
]
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
    parser.add_argument("--rows", nargs="*", choices=[str(row) for row in ROWS])
    parser.add_argument("--windows", type=int, default=32, help="of calibration text")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    # Inductor would take longer to compile a graph than its references take to run
    compat.compile_graph = lambda gm, example_inputs, **_: gm.forward  # type: ignore[assignment]
    result = measure_model(arguments)
    if arguments.statistics:
        result["layer_output_snr_db"] = measure_statistics(arguments.statistics)
        save(result, arguments.out)
    for name, row in result["rows"].items():
        print(f"{name:36} {row['ratio']:.4f}x  {row['kl']:.4f}")


def measure_model(arguments: argparse.Namespace) -> dict[str, Any]:
    """The contents of the file, which is written after every row."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    if arguments.outliers:
        load_function(arguments.outliers, "inject_outliers")(model, 60.0)
    validation = windows(tokenizer, arguments.validation, WINDOWS)
    calibration = windows(tokenizer, arguments.calibration, arguments.windows)
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
        "device": platform.machine(),
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
    model.compile(backend="atom", options={"recipe": recipe, "strict": True})
    divergences: list[float] = []

    def compare(number: int, logits: Tensor) -> None:
        divergences.append(
            F.kl_div(logits, wanted[number].float(), log_target=True, reduction="sum").item()
        )

    through = None if cache is None else KVCache(model.config, BATCH, LENGTH, cache)
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
        int8 = recipe.scheme.activation_bits == 8
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
    cut = scheme.layout(weight.shape[1])
    count = scheme.int8_groups(cut)
    noise = Noise(cut, scheme, x.square().mean(0), weight.square().sum(0), ("",), (count,))
    noise.add(x)
    transform = transform_of(scheme, noise.best(count)[1])
    layout = transform.layout
    weight, x, tested = (transform.apply(one) for one in (weight, x, tested))
    clip = scheme.activation_clip
    if method == "gptq":
        if scheme.activation_bits < 8:
            clip = min(
                ACTIVATION_CLIPS,
                key=lambda clip: error(scheme, layout, weight, x[:1024], clip, count),
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


def error(
    scheme: Scheme, layout: GroupLayout, weight: Tensor, x: Tensor, clip: float, count: int
) -> float:
    wrong = fake_quantize(x, scheme, layout, clip, count) - x
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
