"""A small Llama before and after INT4: its text, its perplexity, the bytes of its weights.

    python examples/quickstart.py [MODEL_DIR]

MODEL_DIR is a transformers checkpoint; by default the one that ships with this repository.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import atom_compile
from atom_compile.evaluate import perplexity

HERE = Path(__file__).parent
PROMPT = "Once upon a time, there was a little girl"
WINDOW = 512


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(width=None if sys.stdout.isatty() else 120)
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "prose-llama-5m"
    device = "cuda" if torch.cuda.is_available() else "cpu"

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()

    def token_ids(text: str) -> Tensor:
        ids: Tensor = tokenizer(text, return_tensors="pt").input_ids
        return ids.to(device)

    def windows(name: str) -> list[Tensor]:
        ids = token_ids((HERE / "text" / name).read_text())
        return [window for window in ids.split(WINDOW, dim=1) if window.shape[1] == WINDOW]

    prompt, evaluation = token_ids(PROMPT), windows("evaluation.txt")

    console.rule("before: float32")
    console.print(tokenizer.decode(continuation(model, prompt)), style="italic")
    perplexity_before = perplexity(model, evaluation)

    console.rule("calibrate and compile")
    recipe = atom_compile.calibrate(model, windows("calibration.txt"), scheme="w4a4")
    options = {"recipe": recipe}
    report = atom_compile.explain(model, evaluation[0], options=options)
    console.print(report)
    model.compile(backend="atom", options=options)
    with console.status("compiling: the first call takes a minute"):
        perplexity_after = perplexity(model, evaluation)

    console.rule("after: INT4 weights and activations")
    console.print(tokenizer.decode(continuation(model, prompt)), style="italic")

    table = Table("", "float32", "W4A4")
    table.add_row("perplexity", f"{perplexity_before:.2f}", f"{perplexity_after:.2f}")
    before, after = report.weight_bytes_before, report.weight_bytes_after
    table.add_row("bytes of weights", f"{before:,}", f"{after:,}")
    console.print(table)
    console.print("The output head, which is also the embedding, stays in its own precision.")


@torch.no_grad()
def continuation(model: PreTrainedModel, prompt: Tensor, tokens: int = 40) -> list[int]:
    """`prompt` and the `tokens` most likely tokens after it, one by one.

    `model.generate` works as well, but compiles graphs of its own for the prompt and for one token.
    What stands to the right of a token does not change it, so the window that perplexity is read on
    serves here too: the demo compiles once.
    """
    ids = F.pad(prompt, (0, WINDOW - prompt.shape[1]))
    for end in range(prompt.shape[1], prompt.shape[1] + tokens):
        ids[0, end] = model(ids, use_cache=False).logits[0, end - 1].argmax()
    return ids[0, : end + 1].tolist()


if __name__ == "__main__":
    main()
