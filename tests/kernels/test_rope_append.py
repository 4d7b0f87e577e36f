from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atom_compile.kernels import rope_append

from .cases import few_examples, kernel_device, poisoned_memory, seeds
from .test_kv_cache import (
    Cache,
    assert_same_bytes,
    batches,
    cache_dtypes,
    draw_cache,
    empty_cache,
    merged_heads,
    rope_table,
    token_counts,
)


def cos_and_sin(batch: int, tokens: int, rotated: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As a model makes them, for positions that its sequences might have reached."""
    position = torch.randint(0, 50, (batch, 1)) + torch.arange(tokens)
    angle = position[..., None] * 10.0 ** -torch.arange(rotated // 2)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def run(inputs: Sequence[Tensor], cache: Cache, bits: int) -> tuple[Tensor, Cache, Tensor, Cache]:
    """Query and cache from the kernel, then from the reference."""
    device = kernel_device()
    got, want = cache.copy(device), cache.copy(torch.device("cpu"))
    arguments: list[Any] = [*(x.to(device) for x in inputs), *got, bits]
    with poisoned_memory():
        query = rope_append.launch(*arguments)
    arguments = [*inputs, *want, bits]
    return query, got, rope_append.reference(*arguments), want


@few_examples
@given(
    st.data(),
    batches,
    st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    token_counts,
    st.sampled_from([None, 8, 16]),
    cache_dtypes,
    seeds,
)
def test_kernel_gives_the_bytes_of_the_reference(
    data: st.DataObject,
    batch: int,
    heads: tuple[int, int],
    tokens: int,
    rotated: int | None,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    num_heads, num_kv_heads = heads
    cache, bits, head_dim = draw_cache(data, batch, num_kv_heads, dtype, rotated)
    query, key, value = merged_heads(
        batch, tokens, [num_heads, num_kv_heads, num_kv_heads], head_dim, dtype
    )
    rows = data.draw(st.sampled_from([1, batch]))
    table_dtype = data.draw(st.sampled_from([dtype, torch.float32]))
    cos, sin = cos_and_sin(rows, tokens, rotated or head_dim, table_dtype)
    if data.draw(st.booleans()):
        cos = cos.transpose(1, 2).contiguous().transpose(1, 2)  # other strides than sin's
    got, got_cache, want, want_cache = run((query, key, value, cos, sin), cache, bits)
    assert_same_bytes((got, *got_cache), (want, *want_cache))
    assert got.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("tokens", [1, 5])
def test_keys_are_stored_as_they_were_before_rope(tokens: int) -> None:
    """Up to the roundings there and back, if `rope` has the angles that the keys are turned by."""
    cache = empty_cache(1, 1, 8, 64, torch.tensor([2]), bits=16, rope=rope_table(16, 64))
    query, key = torch.randn(2, 1, 1, tokens, 64)
    position = torch.arange(2, 2 + tokens)
    assert cache.rope is not None
    half = cache.rope[position].chunk(2, dim=-1)
    cos, sin = (torch.cat([x, x], dim=-1)[None] for x in half)
    _, got, _, _ = run((query, key, key, cos, sin), cache, 16)
    torch.testing.assert_close(got.key_codes[:, :, position].cpu(), key)
    assert torch.equal(got.value_codes[:, :, position].cpu(), key)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_sequence_never_touches_another(poison: float) -> None:
    cache = empty_cache(3, 2, 8, 64, torch.tensor([3]), residual=2, rope=rope_table(16, 64))
    heads = merged_heads(3, 2, [4, 2, 2], 64, torch.float32)
    inputs = (*heads, *cos_and_sin(3, 2, 64, torch.half))
    clean_query, clean, _, _ = run(inputs, cache, 4)
    for x in heads:
        x[1, :, :, 5] = poison
    query, got, want_query, want = run(inputs, cache, 4)
    torch.testing.assert_close(query.cpu(), want_query, rtol=0, atol=0, equal_nan=True)
    assert query[1].isnan().any() or query[1].isinf().any()
    for a, b, c in zip(got[:6], want[:6], clean[:6], strict=True):
        assert a is not None and b is not None and c is not None
        assert_same_bytes([a[::2]], [c[::2]])
        if a.dtype == torch.uint8:
            assert torch.equal(a.cpu(), b)
    for scale in (got.key_scale, got.value_scale):
        assert scale is not None
        assert scale[1, :, 3:5, :, 0].isnan().all()
    assert_same_bytes([query[::2]], [clean_query[::2]])


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("residual", [0, 2])
def test_operator_passes_opcheck(bits: int, residual: int) -> None:
    rope = rope_table(20, 16) if residual else None
    length = torch.tensor([1])
    cache = empty_cache(2, 1, 8, 16, length, bits=bits, residual=residual, rope=rope)
    cache = cache.map(torch.zeros_like)._replace(rope=rope, length=length)
    query, key, value = torch.randn(2, 2, 3, 16), torch.randn(2, 1, 3, 16), torch.randn(2, 1, 3, 16)
    cos, sin = cos_and_sin(1, 3, 16, torch.float32)
    torch.library.opcheck(rope_append.rope_append, (query, key, value, cos, sin, *cache, bits))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("batch", "tokens"), [(32, 1), (1, 3000), (3, 130)])
@pytest.mark.parametrize("with_rope", [False, True])
def test_kernel_on_real_shapes(batch: int, tokens: int, bits: int, with_rope: bool) -> None:
    rope = rope_table(4096, 128) if with_rope else None
    length = torch.randint(0, 5000, (batch,))
    cache = empty_cache(
        batch, 8, 2048, 128, length, bits=bits, residual=64, rope=rope, dtype=torch.bfloat16
    )
    heads = merged_heads(batch, tokens, [32, 8, 8], 128, torch.bfloat16)
    inputs = (*heads, *cos_and_sin(batch, tokens, 128, torch.bfloat16))
    got, got_cache, want, want_cache = run(inputs, cache, bits)
    assert_same_bytes((got, *got_cache), (want, *want_cache))


@pytest.mark.gpu
def test_a_graph_stores_where_length_says_when_it_replays() -> None:
    device = torch.device("cuda")
    length = torch.zeros(1, dtype=torch.int64)
    cache = empty_cache(2, 8, 64, 128, length, dtype=torch.bfloat16).copy(device)
    want = cache.copy(device)
    heads = merged_heads(2, 1, [32, 8, 8], 128, torch.bfloat16)
    inputs = [x.to(device) for x in (*heads, *cos_and_sin(1, 1, 128, torch.bfloat16))]
    rope_append.rope_append(*inputs, *cache, 4)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rope_append.rope_append(*inputs, *cache, 4)
    for position in (0, 5, 70):
        cache.length.fill_(position)
        want.length.fill_(position)
        graph.replay()
        arguments: list[Any] = [*inputs, *want, 4]
        rope_append.reference(*arguments)
    torch.cuda.synchronize()
    assert_same_bytes(cache, want)
