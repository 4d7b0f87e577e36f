"""Text from a small Llama with its keys and values in 16, 8 and 4 bits, and what they occupy.

    python examples/kv_cache.py [MODEL_DIR]

MODEL_DIR is a transformers checkpoint; by default the one that ships with this repository.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from atom_compile import KVCache, KVScheme

PROMPT = "Once upon a time, there was a little girl"
SCHEMES = {
    "kv16": KVScheme(bits=16),
    "kv8": KVScheme(bits=8),
    "kv4": KVScheme(bits=4),
    "kv4, the last 32 tokens in 16 bits": KVScheme(bits=4, residual=32),
}


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(width=None if sys.stdout.isatty() else 120)
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "prose-llama-5m"
    device = "cuda" if torch.cuda.is_available() else "cpu"

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(device).eval()
    prompt = tokenizer(PROMPT, return_tensors="pt").to(device)

    table = Table("keys and values", "bytes per token", "text", title=path.name)
    for name, scheme in SCHEMES.items():
        cache = KVCache(model.config, max_batch=1, max_len=128, scheme=scheme, device=device)
        ids = model.generate(
            prompt.input_ids,
            attention_mask=prompt.attention_mask,
            past_key_values=cache,
            max_new_tokens=48,
            do_sample=False,
            pad_token_id=0,
        )
        table.add_row(name, f"{cache.bytes_per_token:,.0f}", tokenizer.decode(ids[0]))
    console.print(table)


if __name__ == "__main__":
    main()
