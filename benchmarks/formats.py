"""Compares number formats of weights and activations on a real Llama, by perplexity; writes JSON.

    python benchmarks/formats.py MODEL_DIR --calibration FILE --validation FILE --out FILE
                                 [--outliers FILE] [--rows NAME ...]

Simulated in float32: every linear but the head gets the weight that its packed one stands for, and
a hook rounds its input as the quantize operators would. `ratio`: of the perplexity to float32's,
over windows spread evenly over the validation text. `divergence`: the mean Kullback-Leibler
divergence from float32's predictions, in nats per token, which tells formats apart better: over so
few windows half a percent of the ratio is chance. GPTQ takes the inputs that the unquantized model
gives, rounded. Rows that FILE has already are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from reference_model import LENGTH, WINDOWS, load_function, windows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from atom_compile.gptq import WEIGHT_CLIPS, round_float_weight, round_weight
from atom_compile.kernels.block_formats import (
    BlockWeight,
    dequantize_blocks,
    pack_mxfp4,
    pack_nvfp4,
)
from atom_compile.kernels.formats import (
    E2M1,
    E2M2,
    E2M3,
    E3M2,
    E4M3,
    Float8,
    FloatFormat,
    IntFormat,
)
from atom_compile.kernels.packing import (
    FLOAT_CLIPS,
    TINY,
    GroupLayout,
    best_scale,
    dequantize_float_weight,
    dequantize_weight,
)

INT4, INT8 = IntFormat(4), IntFormat(8)
Format = FloatFormat | Float8 | IntFormat


@dataclass(frozen=True, kw_only=True)
class Method:
    """How linears are rounded.

    group: channels that share a scale; None is all of a row, or of a token.
    clip: what the activations' grid spans of a group's largest magnitude.
    outliers: so many of the largest channels have scales of their own and are in `outlier_format`.
    blocks: packs the weight in blocks; what else is said of weights is then not read.
    """

    weights: FloatFormat | IntFormat = E2M1
    blocks: Callable[[Tensor], BlockWeight] | None = None
    group: int | None = 128
    gptq: bool = False
    clips: tuple[float, ...] | None = None
    activations: Format | None = None
    clip: float = 1.0
    outliers: int = 0
    outlier_format: Format = INT8

    def layout(self, width: int) -> GroupLayout:
        per_row = self.group is None
        return GroupLayout(width, self.group or 128, self.outliers, per_row)


W4A4_FP4 = Method(weights=E2M1, activations=E2M1, outliers=128)
W4A4 = Method(weights=INT4, activations=INT4, outliers=128, clip=0.85)
METHODS = {
    "w6a16 e3m2, row": Method(weights=E3M2, group=None),
    "w6a16 e3m2, row, scale of the largest": Method(weights=E3M2, group=None, clips=(1.0,)),
    "w6a16 e3m2, group 128": Method(weights=E3M2),
    "w6a16 e2m3, row": Method(weights=E2M3, group=None),
    "w6a16 e2m3, group 128": Method(weights=E2M3),
    "w5a16 e2m2, row": Method(weights=E2M2, group=None),
    "w5a16 e2m2, group 128": Method(weights=E2M2),
    "w4a16 fp4, group 128": Method(weights=E2M1),
    "w4a16 fp4, group 32": Method(weights=E2M1, group=32),
    "w4a16 mxfp4": Method(blocks=pack_mxfp4),
    "w4a16 nvfp4": Method(blocks=pack_nvfp4),
    "w4a16 int4, group 128": Method(weights=INT4),
    "w6a8 e3m2, row": Method(weights=E3M2, group=None, activations=E4M3),
    "w6a8 e2m3, row": Method(weights=E2M3, group=None, activations=E4M3),
    "w4a4 fp4": W4A4_FP4,
    "w4a4 fp4, clip 0.9": replace(W4A4_FP4, clip=0.9),
    "w4a4 fp4, clip 1.1": replace(W4A4_FP4, clip=1.1),
    "w4a4 fp4, e4m3 outliers": replace(W4A4_FP4, outlier_format=E4M3),
    "w4a4 int4": W4A4,
    "w4a4 int4, e4m3 outliers": replace(W4A4, outlier_format=E4M3),
}
METHODS |= {
    f"{name}, gptq": replace(METHODS[name], gptq=True)
    for name in (
        "w6a16 e3m2, row",
        "w6a16 e2m3, row",
        "w6a16 e3m2, group 128",
        "w6a16 e2m3, group 128",
        "w5a16 e2m2, row",
        "w5a16 e2m2, group 128",
        "w4a16 fp4, group 128",
        "w4a16 int4, group 128",
        "w6a8 e3m2, row",
        "w6a8 e2m3, row",
        "w4a4 fp4",
        "w4a4 int4",
    )
}


Rounding = Callable[[Tensor], Tensor]
Hook = Callable[[str, Tensor], Tensor]
Linears = dict[str, nn.Linear]


def on_grid(x: Tensor, format: Format, clip: float) -> Tensor:
    """x (*, channels that share a scale) -> the values of the grid nearest to it, float32."""
    scale = (x.abs().amax(-1, keepdim=True) * (clip / format.largest)).clamp(min=TINY)
    return format.nearest(x / scale) * scale


def on_best_grid(x: Tensor, format: FloatFormat | IntFormat, clips: Sequence[float]) -> Tensor:
    scale = best_scale(x, format, clips)
    return format.nearest(x / scale) * scale


def cut_and_round(x: Tensor, method: Method, rounding: Rounding) -> Tensor:
    """x (*, K), channels in order -> (*, K): groups by `rounding`, outliers in their own format."""
    layout = method.layout(x.shape[-1])
    groups, outliers = layout.split(x)
    if layout.per_token:
        groups = groups.flatten(-2)
    rounded = rounding(groups)
    if not layout.per_token:
        rounded = rounded.flatten(-2)
    if layout.outlier_channels:
        outliers = on_grid(outliers, method.outlier_format, 1.0)
    return torch.cat([rounded[..., : layout.width - layout.outlier_channels], outliers], -1)


def round_input(x: Tensor, method: Method) -> Tensor:
    format = method.activations
    if format is None:
        return x
    return cut_and_round(x, method, lambda groups: on_grid(groups, format, method.clip))


def round_linear(weight: Tensor, method: Method, hessian: Tensor | None) -> Tensor:
    """weight (N, K), columns in order. hessian: (K, K) of its rounded input, for GPTQ."""
    if method.blocks is not None:
        return dequantize_blocks(method.blocks(weight))
    format = method.weights
    is_float = isinstance(format, FloatFormat)
    clips = method.clips or (FLOAT_CLIPS if is_float else WEIGHT_CLIPS)
    if hessian is None:
        return cut_and_round(weight, method, lambda groups: on_best_grid(groups, format, clips))
    layout = method.layout(weight.shape[1])
    if isinstance(format, FloatFormat):
        in_float = round_float_weight(weight, hessian, layout, format, clips)
        return dequantize_float_weight(in_float.packed, layout, format)
    return dequantize_weight(
        round_weight(weight, hessian, layout, format.bits, clips).packed, layout
    )


@contextmanager
def hooked(linears: Linears, hook: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Each linear's input goes through `hook`."""
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: (hook(name, args[0]),))
        for name, linear in linears.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def moments(model: Any, linears: Linears, batches: list[Tensor], look: Hook) -> dict[str, Tensor]:
    """The second moment (K, K) of each linear's input as `look` makes it of (*, K)."""
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> Tensor:
        rows = look(name, x).flatten(0, -2)
        sums[name] = sums.get(name, torch.zeros(())) + rows.t() @ rows
        return x

    with hooked(linears, add):
        for batch in batches:
            model(batch, use_cache=False)
    return sums


def predictions(model: Any, batches: list[Tensor]) -> Iterator[Tensor]:
    """Logarithms of probabilities (batch, tokens, vocabulary)."""
    for batch in batches:
        yield model(batch, use_cache=False).logits.log_softmax(-1)


def compare(got: Iterator[Tensor], full: list[Tensor], batches: list[Tensor]) -> dict[str, float]:
    loss = full_loss = divergence = 0.0
    for one, wanted, batch in zip(got, full, batches, strict=True):
        targets = batch[:, 1:, None]
        loss -= one[:, :-1].gather(2, targets).sum().item()
        full_loss -= wanted[:, :-1].gather(2, targets).sum().item()
        divergence += F.kl_div(one, wanted, reduction="sum", log_target=True).item()
    predicted = sum(batch[:, 1:].numel() for batch in batches)
    ratio = math.exp((loss - full_loss) / predicted)
    tokens = sum(batch.numel() for batch in batches)
    return {"ratio": round(ratio, 4), "divergence": round(divergence / tokens, 5)}


def measure(
    model: Any,
    method: Method,
    second: dict[str, Tensor],
    calibration: list[Tensor],
    validation: list[Tensor],
    full: list[Tensor],
) -> dict[str, float]:
    """second: the moments of the inputs as they are. The model's weights are kept."""
    linears = linears_of(model)
    weights = {name: linear.weight.data for name, linear in linears.items()}
    orders = {
        name: moment.diagonal().argsort() if method.outliers else torch.arange(len(moment))
        for name, moment in second.items()
    }

    def as_read(name: str, x: Tensor) -> Tensor:
        return round_input(x[..., orders[name]], method)

    hessians = {}
    if method.gptq:
        weight_only = method.activations is None
        hessians = second if weight_only else moments(model, linears, calibration, as_read)
    for name, linear in linears.items():
        ordered = weights[name][:, orders[name]]
        linear.weight.data = round_linear(ordered, method, hessians.get(name))
    with hooked(linears, as_read):
        result = compare(predictions(model, validation), full, validation)
    for name, linear in linears.items():
        linear.weight.data = weights[name]
    return result


def linears_of(model: Any) -> Linears:
    """All but the head."""
    return {
        name: module
        for name, module in model.model.named_modules()
        if isinstance(module, nn.Linear)
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--outliers", type=Path)
    parser.add_argument("--rows", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    name = "plain"
    if arguments.outliers:
        load_function(arguments.outliers, "inject_outliers")(model, 60.0)
        name = "outliers"
    calibration, validation = (
        windows(tokenizer, path) for path in (arguments.calibration, arguments.validation)
    )
    result: dict[str, Any] = {
        "device": platform.machine(),
        "torch": torch.__version__,
        "model": arguments.model.name,
        "windows": [WINDOWS, LENGTH],
    }
    if arguments.out.exists():
        result = json.loads(arguments.out.read_text())
    rows = result.setdefault(name, {})
    full = list(predictions(model, validation))
    second = moments(model, linears_of(model), calibration, lambda _, x: x)
    for title in arguments.rows:
        if title in rows:
            continue
        rows[title] = measure(model, METHODS[title], second, calibration, validation, full)
        print(f"{name}, {title}: {rows[title]}", flush=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
