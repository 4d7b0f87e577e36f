from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atom_compile.content import content_hash, named_hashes

DTYPES = [torch.uint8, torch.int8, torch.int32, torch.bfloat16, torch.float32, torch.bool]


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.integers(1, 40000), st.integers(0, 2**32 - 1), st.data())
def test_any_flipped_bit_shows(size: int, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randint(256, (size,), dtype=torch.uint8, generator=generator)
    before = content_hash(stored)
    at, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7))
    stored[at] ^= 1 << bit
    assert content_hash(stored) != before


@pytest.mark.parametrize("distance", [1, 8, 1024, 8192, 8193])
def test_swapped_bytes_show(distance: int) -> None:
    stored = torch.arange(40000).mul(7919).remainder(251).to(torch.uint8)
    swapped = stored.clone()
    swapped[100], swapped[100 + distance] = stored[100 + distance], stored[100]
    assert content_hash(swapped) != content_hash(stored)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_of_the_bytes_alone(dtype: torch.dtype) -> None:
    tensor = torch.randn(7, 33).mul(100).to(dtype)
    digest = content_hash(tensor)
    assert len(digest) == 32 and int(digest, 16) >= 0
    assert content_hash(tensor.t().contiguous().t()) == digest
    assert content_hash(torch.cat([tensor, tensor])[7:]) == digest
    assert content_hash(torch.nn.Parameter(tensor, requires_grad=False)) == digest
    assert content_hash(tensor[:0]) != digest


def test_nothing_and_zeros_have_one() -> None:
    assert content_hash(torch.zeros(0)) == "0" * 32
    assert content_hash(torch.tensor(1.0)) != content_hash(torch.tensor(2.0))


def test_files_carry_it() -> None:
    stored = torch.arange(40003).mul(7919).remainder(251).to(torch.uint8)
    assert content_hash(stored) == "27806cce5594e7b49c61de07d5072ed0"
    assert content_hash(stored[:5]) == "c35415ffa3f05200c35415ffa3f05200"


def test_many_at_once_have_their_own() -> None:
    sizes = [0, 1, 7, 8, 8192, 8192, 8191, 8193, 40000, 8, 40000, 1, 5_000_000, 5_000_000]
    tensors = [torch.randint(256, (size,), dtype=torch.uint8) for size in sizes]
    together = dict(enumerate(tensors))
    assert named_hashes([together]) == {name: content_hash(one) for name, one in together.items()}
    assert named_hashes([{}]) == {}
    batches = [{0: tensors[0], 1: tensors[12]}, {}, {2: tensors[3], 3: tensors[13]}]
    hashes = named_hashes(batches)
    assert hashes == {name: content_hash(one) for some in batches for name, one in some.items()}
    assert named_hashes([]) == {}
