"""Measures how far rounding moves the outputs of linears that read what a large model's read.

    python benchmarks/layer_outputs.py STATISTICS --out FILE

STATISTICS is a safetensors file of the largest magnitude of each channel of a model's activations;
inputs are drawn so that they reach it, weights at random. Decibels of the output's signal over its
noise for every scheme of accuracy.py and for W4A4 without outlier channels, rounded to nearest and
by GPTQ; writes JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from pathlib import Path

import torch
from accuracy import SCHEMES
from safetensors.torch import load_file
from torch import Tensor

from atom_compile import Scheme
from atom_compile.gptq import fit_weight, round_weight
from atom_compile.kernels.packing import (
    GroupLayout,
    dequantize_weight,
    pack_two_level,
    pack_weight,
)
from atom_compile.precision import ACTIVATION_CLIPS, Noise, fake_quantize, transform_of
from atom_compile.progress import track

# of a block in the middle: q, k and v share their input, and the widest takes long
LINEARS = [
    f"model.decoder.layers.12.{name}" for name in ("self_attn.q_proj", "self_attn.out_proj", "fc1")
]
METHODS = "nearest", "gptq"
WITHOUT_OUTLIERS = {"w4a4, no outlier channels": Scheme(outlier_channels=0)}
ROWS, CALIBRATION, TESTED = 256, 4096, 1024  # output rows of each linear, tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("statistics", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    peaks = load_file(arguments.statistics)
    result = {
        "device": platform.machine(),
        "torch": torch.__version__,
        "statistics": arguments.statistics.name,
        "layer_output_snr_db": {
            name: measure(peaks[name].float().clamp(min=1e-6)) for name in LINEARS
        },
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


@torch.no_grad()
def measure(peaks: Tensor) -> dict[str, dict[str, float]]:
    """peaks (K,): the maxima that normal activations, correlated among channels, are to reach."""
    generator = torch.Generator().manual_seed(0)
    width = peaks.numel()
    mixing = torch.randn(64, width, generator=generator)
    weight = torch.randn(ROWS, width, generator=generator) / math.sqrt(width)
    hidden = torch.randn(CALIBRATION + TESTED, 64, generator=generator) @ mixing / 8
    noise = torch.randn(CALIBRATION + TESTED, width, generator=generator)
    tokens = (0.7 * hidden + 0.7 * noise) * (peaks / 4.0)  # maxima lie at four deviations
    x, tested = tokens.split([CALIBRATION, TESTED])
    return {
        name: {method: snr(scheme, method, weight, x, tested) for method in METHODS}
        for name, scheme in track((WITHOUT_OUTLIERS | SCHEMES).items(), "rounding")
    }


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
    elif scheme.two_level:
        packed = pack_two_level(weight, layout)
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


if __name__ == "__main__":
    main()
