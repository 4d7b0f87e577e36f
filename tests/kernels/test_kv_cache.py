from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atom_compile.kernels import kv_cache

from .cases import few_examples, kernel_device, poisoned_memory, seeds

HEAD_DIMS = ((16, 1), (64, 1), (64, 4), (80, 1), (80, 5), (96, 3), (128, 1), (256, 2))  # and groups


class Cache(NamedTuple):
    """The arguments of the operators from `key_codes` to `length`."""

    key_codes: Tensor
    key_scale: Tensor | None
    value_codes: Tensor
    value_scale: Tensor | None
    key_recent: Tensor | None
    value_recent: Tensor | None
    rope: Tensor | None
    length: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> Cache:
        mapped: Any = (x if x is None else function(x) for x in self)
        return Cache(*mapped)

    def copy(self, device: torch.device) -> Cache:
        return self.map(lambda x: x.to(device, copy=True))


def random_bytes(*size: int, dtype: torch.dtype) -> Tensor:
    """What lay in memory before: NaNs and Infs among it."""
    width = size[-1] * dtype.itemsize
    return torch.randint(0, 256, (*size[:-1], width), dtype=torch.uint8).view(dtype)


def rope_table(positions: int, rotated: int) -> Tensor:
    angle = torch.arange(positions)[:, None] * 10.0 ** -torch.arange(rotated // 2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def empty_cache(
    batch: int,
    num_kv_heads: int,
    slots: int,
    head_dim: int,
    length: Tensor,
    *,
    bits: int = 4,
    groups: int = 1,
    residual: int = 0,
    rope: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Cache:
    """One that holds random bytes."""
    codes, scale, recent = [], [], []
    for _ in range(2):
        size = (batch, num_kv_heads, slots)
        width, codes_dtype = (head_dim, dtype) if bits == 16 else (head_dim * bits // 8, None)
        codes.append(random_bytes(*size, width, dtype=codes_dtype or torch.uint8))
        scale.append(None if bits == 16 else random_bytes(*size, groups, 2, dtype=torch.float16))
        late = random_bytes(batch, num_kv_heads, max(residual, 1), head_dim, dtype=dtype)
        recent.append(late if residual else None)
    return Cache(codes[0], scale[0], codes[1], scale[1], recent[0], recent[1], rope, length)


def draw_cache(
    data: st.DataObject, batch: int, num_kv_heads: int, dtype: torch.dtype, rotated: int | None
) -> tuple[Cache, int, int]:
    """Any cache that serves `batch` sequences, its bits, its head_dim."""
    head_dim, groups = data.draw(st.sampled_from(HEAD_DIMS))
    slots = data.draw(st.sampled_from([1, 3, 8, 17]))
    lengths = st.integers(0, 3 * slots)
    count = data.draw(st.sampled_from([1, batch]))
    bits = data.draw(st.sampled_from([4, 8, 16]))
    table = None
    if data.draw(st.booleans()):  # shorter than some positions
        table = rope_table(data.draw(st.integers(1, 40)), rotated or head_dim)
    cache = empty_cache(
        batch + data.draw(st.integers(0, 1)),
        num_kv_heads,
        slots,
        head_dim,
        torch.tensor(data.draw(st.lists(lengths, min_size=count, max_size=count))),
        bits=bits,
        groups=groups,
        residual=data.draw(st.sampled_from([0, 1, 4])),
        rope=table,
        dtype=dtype,
    )
    return cache, bits, head_dim


def merged_heads(
    batch: int, tokens: int, heads: Sequence[int], head_dim: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Slices of one merged linear's output, each (batch, heads, tokens, head_dim)."""
    merged = torch.randn(batch, tokens, sum(heads) * head_dim)
    # groups of one value, of values past float16's, of values under it
    sizes = torch.tensor([0.0, 1e-7, 1.0, 1.0, 30.0, 1e3 if dtype == torch.float16 else 1e6])
    merged *= sizes[torch.randint(6, (batch, tokens, 1))]
    parts = (merged + 0.0).to(dtype).split([head_dim * count for count in heads], dim=-1)
    return tuple(part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in parts)


def assert_same_bytes(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.dtype == b.dtype and a.shape == b.shape
            assert torch.equal(_bytes(a), _bytes(b))


def _bytes(x: Tensor) -> Tensor:
    return x.detach().cpu().contiguous().view(torch.uint8)


batches = st.sampled_from([1, 1, 2, 3])
token_counts = st.sampled_from([0, 1, 1, 2, 5, 19])
cache_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@few_examples
@given(st.data(), batches, st.integers(1, 2), token_counts, cache_dtypes, seeds)
def test_append_leaves_the_bytes_that_the_reference_leaves(
    data: st.DataObject,
    batch: int,
    num_kv_heads: int,
    tokens: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    rotated = data.draw(st.sampled_from([None, 8]))
    cache, bits, head_dim = draw_cache(data, batch, num_kv_heads, dtype, rotated)
    key, value = merged_heads(batch, tokens, [num_kv_heads] * 2, head_dim, dtype)
    got, want = cache.copy(kernel_device()), cache.copy(torch.device("cpu"))
    kv_cache.launch_append(key.to(kernel_device()), value.to(kernel_device()), *got, bits)
    kv_cache.append_reference(key, value, *want, bits)
    assert_same_bytes(got, want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy: 1e6 is past float16
@few_examples
@given(st.data(), batches, st.integers(1, 2), st.sampled_from([0, 1, 8, 35]), cache_dtypes, seeds)
def test_read_gives_the_bytes_of_the_reference(
    data: st.DataObject,
    batch: int,
    num_kv_heads: int,
    positions: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    rotated = data.draw(st.sampled_from([None, 8]))
    cache, bits, head_dim = draw_cache(data, batch, num_kv_heads, dtype, rotated)
    filled = cache._replace(length=torch.zeros_like(cache.length))  # no NaN among what is held
    most = int(cache.length.max())
    key, value = merged_heads(batch, most, [num_kv_heads] * 2, head_dim, dtype)
    kv_cache.append_reference(key, value, *filled, bits)
    out_dtype = data.draw(cache_dtypes)
    device = kernel_device()
    for part in (0, 1):
        rope = cache.rope if part == 0 else None
        codes, scale, recent = cache[2 * part], cache[2 * part + 1], cache[4 + part]
        assert codes is not None
        arguments = (codes, scale, recent, rope, cache.length, batch, positions, bits, out_dtype)
        moved: Any = [x.to(device) if isinstance(x, Tensor) else x for x in arguments]
        with poisoned_memory():
            got = kv_cache.launch_read(*moved)
        want = kv_cache.read_reference(*arguments)
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_value_comes_back_within_half_a_step(bits: int, groups: int) -> None:
    x = torch.randn(50, 64) * torch.logspace(-2, 3, 50)[:, None] + torch.randn(50, 1)
    codes, scale = kv_cache.quantize(x, bits, groups)
    off = (kv_cache.dequantize(codes, scale, bits) - x).abs().unflatten(-1, (groups, -1))
    step, minimum = scale.float().unbind(-1)
    # scale and minimum are themselves rounded, to float16's 11 bits
    bound = step * (0.5 + 2**bits * 2.0**-11) + 1.01 * minimum.abs() * 2.0**-11
    assert (off <= bound[..., None]).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_poisoned_token_poisons_its_own_groups_and_no_other(poison: float, bits: int) -> None:
    device, cpu = kernel_device(), torch.device("cpu")
    cache = empty_cache(2, 2, 8, 64, torch.tensor([3, 7]), bits=bits, groups=2)
    key, value = torch.randn(2, 2, 2, 3, 64).unbind(0)
    clean, got, want = cache.copy(device), cache.copy(device), cache.copy(cpu)
    kv_cache.launch_append(key.to(device), value.to(device), *clean, bits)
    key[1, 0, 2, 40], value[1, 0, 2, 40] = poison, poison  # slot (7 + 2) % 8
    kv_cache.launch_append(key.to(device), value.to(device), *got, bits)
    kv_cache.append_reference(key, value, *want, bits)
    for part in (0, 2):
        (codes, scale), (want_codes, want_scale) = got[part : part + 2], want[part : part + 2]
        assert codes is not None and scale is not None
        assert torch.equal(codes.cpu(), want_codes)  # type: ignore[arg-type]
        torch.testing.assert_close(scale.cpu(), want_scale, rtol=0, atol=0, equal_nan=True)
        assert scale[1, 0, 1, 1, 0].isnan() and not scale[1, 0, 1, 0].isnan().any()
        scale[1, 0, 1, 1], clean_scale = clean[part + 1][1, 0, 1, 1], clean[part + 1]  # type: ignore[index]
        codes[1, 0, 1] = clean[part][1, 0, 1]  # type: ignore[index]
        assert_same_bytes((codes, scale), (clean[part], clean_scale))


def test_a_cache_with_gaps_is_refused() -> None:
    cache = empty_cache(2, 2, 8, 64, torch.tensor([0]))
    cache = cache._replace(key_codes=cache.key_codes[:, :, ::2])
    key = torch.randn(2, 2, 1, 64)
    with pytest.raises(ValueError, match=r"has strides .* the kernels read and write contiguous"):
        kv_cache.launch_append(key, key, *cache, 4)


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("residual", [0, 2])
def test_operators_pass_opcheck(bits: int, residual: int) -> None:
    rope = rope_table(20, 16) if residual else None
    length = torch.tensor([1, 5])
    cache = empty_cache(2, 1, 8, 16, length, bits=bits, residual=residual, rope=rope)
    cache = cache.map(torch.zeros_like)._replace(rope=rope, length=length)
    key = torch.randn(2, 1, 3, 16)
    torch.library.opcheck(kv_cache.kv_append, (key, key + 1, *cache, bits))
    arguments = (cache.key_codes, cache.key_scale, cache.key_recent, rope, length)
    torch.library.opcheck(kv_cache.kv_read, (*arguments, 2, 8, bits, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("batch", "tokens"), [(32, 1), (1, 3000), (3, 130)])
@pytest.mark.parametrize("with_rope", [False, True])
def test_kernels_on_real_shapes(batch: int, tokens: int, bits: int, with_rope: bool) -> None:
    device = torch.device("cuda")
    rope = rope_table(4096, 128) if with_rope else None
    length = torch.randint(0, 5000, (batch,))
    cache = empty_cache(
        batch, 8, 2048, 128, length, bits=bits, residual=64, rope=rope, dtype=torch.bfloat16
    )
    key, value = merged_heads(batch, tokens, [8, 8], 128, torch.bfloat16)
    got, want = cache.copy(device), cache.copy(torch.device("cpu"))
    kv_cache.kv_append(key.to(device), value.to(device), *got, bits)
    kv_cache.append_reference(key, value, *want, bits)
    assert_same_bytes(got, want)
    late = got.length + tokens
    arguments = (got.value_codes, got.value_scale, got.value_recent, None, late)
    numbers = (batch, 4096, bits, torch.bfloat16)
    read = kv_cache.kv_read(*arguments, *numbers)
    expected = kv_cache.read_reference(*arguments, *numbers)
    torch.testing.assert_close(read, expected, rtol=0, atol=0, equal_nan=True)
