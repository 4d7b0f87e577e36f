"""What a tensor holds, in 128 bits: tells a damaged file or another model's from the one that was
saved. No protection against forgery.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_Name = TypeVar("_Name")
_COLUMNS = 1024
_SMALL = 2**19  # words: up to 4 MiB are worth a copy for fewer launches
_TOGETHER = 2**23  # words: 64 MiB, the copies at one time


def content_hash(tensor: Tensor) -> str:
    """32 hexadecimal digits of a tensor's bytes, whatever its shape, dtype and device.

    Its 8-byte words, as rows of 1024, are added up by column and by row, and both sums weighted by
    odd numbers, all modulo 2^64: a word that changes, moves or swaps its place changes one of them.
    It runs where the tensor is, as fast as that reads memory; a CRC takes a CPU several times as
    long, and a GPU's memory would have to be copied to it first.
    """
    return named_hashes([{"": tensor}])[""]


def named_hashes(batches: Iterable[Mapping[_Name, Tensor]]) -> dict[_Name, str]:
    """`content_hash` of each tensor, by its name.

    A batch is hashed when it comes, and a GPU waited for after the last one. Small tensors of one
    size in a batch are hashed together: of a packed model's, four of five.
    """
    odd: dict[torch.device, Tensor] = {}
    names: dict[torch.device, list[_Name]] = defaultdict(list)
    digests: dict[torch.device, list[Tensor]] = defaultdict(list)
    for batch in batches:
        alike: dict[tuple[torch.device, int], list[_Name]] = defaultdict(list)
        for name, tensor in batch.items():
            alike[tensor.device, _num_words(tensor)].append(name)
        for (device, size), some in alike.items():
            count = _TOGETHER // max(size, 1) if size <= _SMALL else 1
            factors = max(_COLUMNS, size // _COLUMNS + 1)
            if device not in odd or len(odd[device]) < factors:
                odd[device] = _odd_numbers(factors, device)
            for first in range(0, len(some), count):
                together = some[first : first + count]
                words = [_words(batch[one]) for one in together]
                names[device] += together
                digests[device].append(_digests(words, odd[device]))
    hashes = {}
    for device, of_device in names.items():
        pairs = torch.cat(digests[device]).tolist()
        for name, pair in zip(of_device, pairs, strict=True):
            hashes[name] = "".join(f"{digest % 2**64:016x}" for digest in pair)
    return hashes


def _num_words(tensor: Tensor) -> int:
    return -(-tensor.nbytes // 8)


def _words(tensor: Tensor) -> Tensor:
    """Its bytes, zeros behind them, as int64."""
    stored = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if stored.numel() % 8:
        stored = F.pad(stored, (0, -stored.numel() % 8))
    elif stored.data_ptr() % 8:
        stored = stored.clone()
    return stored.view(torch.int64)


def _digests(words: Sequence[Tensor], odd: Tensor) -> Tensor:
    """Of tensors of one size: (tensors, 2) int64."""
    stacked = torch.stack(list(words)) if len(words) > 1 else words[0][None]
    count = stacked.shape[1] // _COLUMNS
    rows = stacked[:, : count * _COLUMNS].unflatten(1, (count, _COLUMNS))
    rest = stacked[:, count * _COLUMNS :]
    by_column = rows.sum(1) + F.pad(rest, (0, _COLUMNS - rest.shape[1]))
    by_row = torch.cat([rows.sum(2), rest.sum(1, keepdim=True)], dim=1)
    return torch.stack([(one * odd[: one.shape[1]]).sum(1) for one in (by_column, by_row)], dim=1)


def _odd_numbers(count: int, device: torch.device) -> Tensor:
    """Of 64 bits, as far apart as the golden ratio puts them."""
    return (2 * torch.arange(count, device=device) + 1) * (0x9E3779B97F4A7C15 - 2**64)
