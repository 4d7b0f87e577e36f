from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atom_compile.kernels import attention, kv_cache
from atom_compile.kernels.attention_decode import DecodeTiling, default_decode_tiling
from atom_compile.kernels.attention_prefill import PrefillTiling
from atom_compile.kernels.attention_tiles import Arguments

from .cases import dtypes, few_examples, kernel_device, poisoned_memory, seeds

NAN = float("nan")


def moved(args: Arguments, device: torch.device) -> Arguments:
    tensors: Any = (one.to(device) if isinstance(one, Tensor) else one for one in args)
    return Arguments(*tensors)


def arguments(
    lengths: list[int],
    Q: int = 1,
    heads: tuple[int, int] = (2, 1),
    D: int = 64,
    slots: int = 40,
    bits: int = 4,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    residual: int = 0,
    rotated: int = 0,
    window: int = 0,
    softcap: float = 0.0,
    position: str = "causal",
    mask: tuple[str, tuple[int, int, int]] | None = None,
    spare: int = 0,
    device: torch.device | None = None,
) -> Arguments:
    """A cache whose slots that hold nothing are full of NaN; the last Q tokens are the query's."""
    device = device or torch.device("cpu")
    B, (num_heads, num_kv_heads) = max(len(lengths), 1), heads
    batch = B + spare
    length = torch.tensor(lengths, device=device)
    each = length.expand(B)
    parts: list[list[Tensor | None]] = []
    for _ in range(2):
        x = torch.randn(batch, num_kv_heads, slots, D, device=device)
        x = x * torch.rand(batch, num_kv_heads, slots, 1, device=device) + 0.5
        codes, scale = x.to(dtype), None
        if bits < 16:
            codes, scale = kv_cache.quantize(x, bits, groups)
        recent = torch.randn(batch, num_kv_heads, max(residual, 1), D, device=device).to(dtype)
        for b in range(batch):
            (scale if scale is not None else codes)[b, :, int(each[b]) if b < B else 0 :] = NAN
            recent[b, :, int(each[b]) if b < B else 0 :] = NAN
        parts.append([codes, scale, recent if residual else None])
    table = None
    if rotated:
        angle = torch.rand(int(each.max()) + 1, rotated // 2, device=device) * 6
        table = torch.cat([angle.cos(), angle.sin()], dim=-1)
    at = torch.arange(Q, device=device)
    positions = {
        "none": None,
        "causal": each[:, None] - Q + at,
        "shared": int(each.max()) - Q + at,
        "shared row": int(each.max()) - Q + at[None],
        "scattered": (each[:, None] - 1 - 3 * at).clamp(min=0),
    }[position]
    chosen = None
    if mask is not None:
        kind, broadcast = mask
        shape = [1 if one else size for one, size in zip(broadcast, (B, num_heads, Q), strict=True)]
        chosen = torch.randn(*shape, int(each.max()) + 3, device=device)
        chosen = chosen > 0 if kind == "bool" else chosen.masked_fill(chosen > 1, -torch.inf)
        chosen = chosen.to(dtype) if kind == "float" else chosen
    query = torch.randn(B, Q, num_heads, D, device=device).to(dtype).transpose(1, 2)
    (key, key_scale, key_recent), (value, value_scale, value_recent) = parts
    assert key is not None and value is not None
    return Arguments(
        query, key, key_scale, value, value_scale, key_recent, value_recent, table, length,
        positions, chosen, bits, window, D**-0.5, softcap,
    )  # fmt: skip


def assert_alike(got: Tensor, want: Tensor) -> None:
    """Up to the rounding of weights, and of values unpacked one by one, to the dtype."""
    assert got.dtype == want.dtype and got.shape == want.shape and got.stride() == want.stride()
    eps = max(float(torch.finfo(want.dtype).eps), 3e-6)
    largest = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(
        got.cpu().float(), want.cpu().float(), rtol=2 * eps, atol=3 * eps * max(largest, 1.0)
    )


def check(args: Arguments, tiling: DecodeTiling | PrefillTiling | None = None) -> None:
    with poisoned_memory():
        got = attention.launch(*moved(args, kernel_device()), tiling=tiling)
    assert_alike(got, attention.reference(*args))


DECODE = DecodeTiling(16, 3, 1, 1)
PREFILL = PrefillTiling(16, 16, 1, 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@settings(few_examples, max_examples=60)
@given(st.data(), st.booleans(), dtypes, seeds)
def test_kernels_agree_with_the_reference(
    data: st.DataObject, decodes: bool, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    bits = data.draw(st.sampled_from([4, 4, 8, 16]))
    D, groups, rotated = data.draw(
        st.sampled_from(
            [(16, 1, 0), (64, 1, 0), (80, 1, 0), (96, 3, 0), (128, 1, 128), (24, 1, 8), (64, 4, 16)]
        )
    )
    slots = data.draw(st.sampled_from([1, 7, 48, 70]))
    B = data.draw(st.integers(1, 3))
    length = st.integers(0, 2 * slots) | st.sampled_from([0, 1, slots, slots + 1])
    broadcast = st.tuples(st.booleans(), st.booleans(), st.booleans())
    args = arguments(
        data.draw(st.lists(length, min_size=B, max_size=B)),
        Q=data.draw(st.sampled_from([0, 1, 1, 3, 19])),
        heads=data.draw(st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2), (6, 2)])),
        D=D,
        slots=slots,
        bits=bits,
        groups=groups,
        dtype=dtype,
        residual=data.draw(st.sampled_from([0, 0, 5, 20])),
        rotated=rotated,
        window=data.draw(st.sampled_from([0, 0, 1, 13])),
        softcap=data.draw(st.sampled_from([0.0, 0.0, 2.0])),
        position=data.draw(
            st.sampled_from(["none", "causal", "shared", "shared row", "scattered"])
        ),
        mask=data.draw(st.none() | st.tuples(st.sampled_from(["bool", "float"]), broadcast)),
        spare=data.draw(st.integers(0, 1)),
    )
    if args.length.unique().numel() == 1 and data.draw(st.booleans()):
        args = args._replace(length=args.length[:1])
    tiling = DECODE if decodes else PREFILL
    check(args, data.draw(st.sampled_from([None, tiling])))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("tiling", [DECODE, PREFILL])
def test_a_poisoned_sequence_is_nan_and_no_other_is(tiling: DecodeTiling | PrefillTiling) -> None:
    args = arguments([20, 33, 40], Q=2, heads=(4, 2))
    clean = attention.reference(*args)
    assert args.key_scale is not None and args.value_scale is not None
    args.key_scale[1, 0, 7] = NAN
    args.value_scale[1, 1, 3, 0, 1] = NAN
    args.query[2, 3, 1] = float("inf")
    out = attention.launch(*moved(args, kernel_device()), tiling=tiling).cpu()
    assert out[1].isnan().all() and out[2, 3, 1].isnan().all()
    clean[1] = out[1] = clean[2, 3, 1] = out[2, 3, 1] = 0.0
    assert_alike(out, clean)


@pytest.mark.parametrize("tiling", [DECODE, PREFILL])
def test_query_may_be_strided_and_the_scale_of_any_sign(
    tiling: DecodeTiling | PrefillTiling,
) -> None:
    args = arguments([40], Q=3, heads=(4, 2))
    merged = torch.randn(1, 3, 8, 64)
    for query in (merged[:, :, 2:6].transpose(1, 2), torch.randn(1, 4, 64, 3).transpose(2, 3)):
        check(args._replace(query=query), tiling)
    for scale in (-0.1, 0.0):
        check(args._replace(scale=scale), tiling)


@pytest.mark.parametrize("tiling", [DECODE, PREFILL])
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_sizes_at_the_ends_of_float16(size: float, tiling: DecodeTiling | PrefillTiling) -> None:
    args = arguments([40], heads=(4, 1), dtype=torch.bfloat16, D=80)
    value = torch.randn(1, 1, 40, 80) * torch.logspace(-4, 0, 40)[:, None] * size
    codes, scale = kv_cache.quantize(value, 4, 1)
    query = args.query * 1e30 if size > 1 else args.query
    args = args._replace(query=query, scale=1e-31, value_codes=codes, value_scale=scale)
    got = attention.launch(*moved(args, kernel_device()), tiling=tiling)
    want = attention.reference(*args)
    assert (got.cpu().float() - want.float()).norm() <= 0.01 * want.float().norm()


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("Q", [1, 3])
def test_operator_passes_opcheck(Q: int, bits: int) -> None:
    mask = ("bool", (True, True, False))
    for args in (
        arguments([9, 40], Q, bits=bits, residual=4, window=3, mask=mask),
        arguments([9, 40], Q, bits=bits, dtype=torch.bfloat16, position="none"),
    ):
        torch.library.opcheck(torch.ops.atom.attention.default, args)


@given(st.integers(1, 4096), st.integers(1, 2**20), st.integers(3, 6), st.booleans())
def test_default_decode_tiling_is_possible(planes: int, slots: int, rows: int, plain: bool) -> None:
    tiling = default_decode_tiling(planes, slots, 2**rows, 4, plain, 132)
    assert 1 <= tiling.splits <= max(1, slots // (2 * tiling.block))
    assert tiling.block >= 16 and tiling.block & (tiling.block - 1) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("Q", [1, 4, 200])
@pytest.mark.parametrize(
    ("D", "dtype"),
    [
        (16, torch.bfloat16),
        (64, torch.float32),
        (64, torch.float16),
        (80, torch.bfloat16),
        (96, torch.float16),
        (128, torch.bfloat16),
        (256, torch.bfloat16),
        (256, torch.float32),
    ],
)
def test_kernels_on_real_shapes(Q: int, D: int, bits: int, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    args = arguments([3001, 1777], Q, (8, 2), D, 4096, bits, dtype=dtype, device=device)
    want = attention.reference(*args._replace(query=args.query.float()))
    with poisoned_memory():
        got = attention.launch(*args)
    error = float((got.float() - want).norm() / want.norm())
    assert error < {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]


@pytest.mark.gpu
def test_one_graph_serves_every_length() -> None:
    device = torch.device("cuda")
    full = arguments([500], heads=(8, 2), slots=4096, device=device, dtype=torch.bfloat16)
    length = torch.zeros(1, dtype=torch.int64, device=device)
    position = torch.zeros(1, 1, dtype=torch.int64, device=device)
    args = full._replace(length=length, position=position)
    attention.launch(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attention.launch(*args)
    for tokens in (500, 1, 0, 257):
        length.fill_(tokens)
        position.fill_(tokens - 1)
        graph.replay()
        assert_alike(got, attention.reference(*args))
