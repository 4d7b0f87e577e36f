"""Perplexity on text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import AtomError


def text_windows(tokenizer: Any, text: str, windows: int, length: int) -> Tensor:
    """Pieces of `text`, spread evenly over it: (windows, length) int64.

    tokenizer: a transformers tokenizer. A short text gives fewer windows, and an AtomError if it
        fills not even one.
    """
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    if len(ids) < length:
        raise AtomError(f"the text has {len(ids)} tokens, fewer than one window of {length}")
    starts = torch.linspace(0, len(ids) - length, min(windows, len(ids) // length)).long()
    return torch.stack([ids[start : start + length] for start in starts])


@torch.no_grad()
def perplexity(model: Any, batches: Iterable[Tensor], cache: Any = None) -> float:
    """exp of the mean loss per predicted token. batches: `input_ids` (batch, length) each.

    cache: a `KVCache` that keys and values go through, emptied for each batch.
    """
    total, count = 0.0, 0
    for input_ids in batches:
        through: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            cache.reset()
            through = {"past_key_values": cache}
        logits = model(input_ids, **through).logits[:, :-1].flatten(0, 1).float()
        targets = input_ids[:, 1:].flatten()
        total += F.cross_entropy(logits, targets, reduction="sum").item()
        count += targets.numel()
    return math.exp(total / count)
