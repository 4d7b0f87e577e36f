"""Measures on a real model what a quantized KV cache costs beside INT4 linears; writes JSON.

    python benchmarks/kv_cache.py MODEL_DIR --calibration FILE --validation FILE --out FILE

Perplexity of W4A4, keys and values through caches of several schemes, as a ratio to 16 bits. W4A4
turns the smallest change into some other codes: noise of no more than 8 bits moves the perplexity
of 24 windows by up to 0.3 %, either way. Hence the larger number of windows.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import atom_compile
from atom_compile import KVCache, KVScheme
from atom_compile.evaluate import perplexity, text_windows

LENGTH, BATCH = 512, 6
SCHEMES = {
    "kv16": KVScheme(bits=16),
    "kv8": KVScheme(bits=8),
    "kv4": KVScheme(bits=4),
    "kv4, groups of 64": KVScheme(bits=4, group_size=64),
    "kv4, keys before RoPE": KVScheme(bits=4, keys_before_rope=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model = model.to(device).eval()

    def windows(path: Path, count: int) -> list[Tensor]:
        ids = text_windows(tokenizer, path.read_text(), count, LENGTH)
        return list(ids.to(device).split(BATCH))

    recipe = atom_compile.calibrate(model, windows(arguments.calibration, 24), gptq=False)
    batches = windows(arguments.validation, arguments.windows)
    rows: dict[str, dict[str, float]] = {}
    for name, scheme in SCHEMES.items():
        torch._dynamo.reset()
        model.compile(backend="atom", options={"recipe": recipe, "strict": True})
        cache = KVCache(model.config, BATCH, LENGTH, scheme, device=device, dtype=torch.bfloat16)
        got = perplexity(model, batches, cache)
        rows[name] = {
            "perplexity": got,
            "ratio": got / (rows["kv16"]["perplexity"] if rows else got),
            "bytes_per_token": cache.bytes_per_token,
        }
        print(name, rows[name], flush=True)
    results = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "model": arguments.model.name,
        "windows": [sum(len(batch) for batch in batches), LENGTH],
        "w4a4": rows,
    }
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
