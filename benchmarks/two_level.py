"""Measures what W4A8 with two-level weight scales costs on a real model; writes JSON.

    python benchmarks/two_level.py MODEL_DIR --calibration FILE --validation FILE --out FILE

Perplexity as in reference_model.py, weights rounded to nearest, for the schemes below; the
rewritten graphs run as they are, without Inductor. With --outliers as there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from reference_model import load_function, windows
from transformers import AutoModelForCausalLM, AutoTokenizer

import atom_compile
from atom_compile import Scheme, compat
from atom_compile.evaluate import perplexity


def two_level(outlier_channels: int, rotation: int | None = None) -> Scheme:
    return Scheme(
        activation_bits=8,
        outlier_channels=outlier_channels,
        activation_clip=1.0,
        rotation=rotation,
        two_level=True,
    )


SCHEMES = {
    "two levels, 128 outlier channels": two_level(128),
    "two levels, 128 outlier channels, rotated": two_level(128, 128),
    "two levels, 48 outlier channels": two_level(48),
    "a scale a group, 48 outlier channels": Scheme(
        activation_bits=8, outlier_channels=48, activation_clip=1.0
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--outliers", type=Path)
    parser.add_argument("--schemes", type=int, default=len(SCHEMES), help="only the first so many")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    calibration, validation = (
        windows(tokenizer, path) for path in (arguments.calibration, arguments.validation)
    )
    results: dict[str, Any] = {"torch": torch.__version__, "model": arguments.model.name}
    for name in ("plain", "outliers") if arguments.outliers else ("plain",):
        model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
        model.eval()
        if name == "outliers":
            load_function(arguments.outliers, "inject_outliers")(model, 60.0)
        recipe = atom_compile.calibrate(model, calibration, gptq=False, progress=False)
        full = perplexity(model, validation)
        results[name] = {"float32": full}
        for scheme in list(SCHEMES)[: arguments.schemes]:
            torch.compiler.reset()
            options = {"recipe": recipe, "scheme": SCHEMES[scheme], "strict": True}
            model.compile(backend="atom", options=options)
            with mock.patch.object(compat, "compile_graph", lambda gm, *_, **__: gm.forward):
                got = perplexity(model, validation)
            model._compiled_call_impl = None
            results[name][scheme] = {"perplexity": got, "ratio": got / full}
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
            print(name, scheme, results[name][scheme], flush=True)


if __name__ == "__main__":
    main()
