from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atom_compile.kernels import attention, attention_quantize, quantize
from atom_compile.kernels.attention_decode import DecodeTiling
from atom_compile.kernels.attention_tiles import Arguments

from .cases import (
    DTYPES,
    assert_quantized_alike,
    dtypes,
    few_examples,
    kernel_device,
    poisoned_memory,
    random_order,
    seeds,
)
from .test_attention import arguments, moved

NUMBERS = (4, 64, 16, 0.9)


def launch(
    args: Arguments,
    order: Tensor | None,
    splits: int | None = None,
    numbers: tuple[Any, ...] = NUMBERS,
    format: str = "int",
) -> tuple[Tensor, Tensor]:
    device = kernel_device()
    tiling = None if splits is None else DecodeTiling(16, splits, 1, 1)
    order = order if order is None else order.to(device)
    with poisoned_memory():
        return attention_quantize.launch(
            *moved(args, device), order, *numbers, tiling=tiling, format=format
        )


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@settings(few_examples, max_examples=12)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=2),
    st.sampled_from([0, 1, 2, 9]),
    st.sampled_from([(2, 16), (4, 64), (6, 24), (5, 40)]),
    dtypes,
    st.booleans(),
    st.sampled_from([None, 1, 3, 9]),
    seeds,
)
def test_codes_are_those_of_the_attention(
    lengths: list[int],
    Q: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    ordered: bool,
    splits: int | None,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    num_heads, D = shape
    args = arguments(lengths, Q, (num_heads, 1), D, slots=50, dtype=dtype)
    order = random_order(num_heads * D) if ordered else None
    got = launch(args, order, splits)
    device = kernel_device()
    tiling = None if splits is None else DecodeTiling(16, splits, 1, 1)
    attended = (
        attention.launch(*moved(args, device), tiling=tiling).cpu().transpose(1, 2).flatten(2)
    )
    if order is not None:
        attended = attended.index_select(-1, order)
    assert_quantized_alike(got, quantize.reference(attended, *NUMBERS))
    if dtype == torch.float32:
        want = attention_quantize.reference(*args, order, *NUMBERS)
        assert_quantized_alike(got, want, rtol=1e-3)


def test_many_splits_are_combined_before(monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments([40], heads=(4, 2))
    order = random_order(256)
    fused = launch(args, order, splits=3)
    monkeypatch.setattr(attention_quantize, "_MOST_FUSED", 0)
    assert_quantized_alike(launch(args, order, splits=3), fused)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("numbers", [(*NUMBERS, 2), (8, 64, 16, 1.0, 0, 0, True)])
def test_int8_groups_and_a_scale_per_token(splits: int, numbers: tuple[Any, ...]) -> None:
    args = arguments([40], heads=(4, 2))
    order = random_order(256)
    want = attention_quantize.reference(*args, order, *numbers)
    assert_quantized_alike(launch(args, order, splits, numbers), want, rtol=1e-3)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("int8_groups", [0, 2])
def test_codes_of_e2m1(splits: int, int8_groups: int) -> None:
    args, order, device = arguments([40], heads=(4, 2)), random_order(256), kernel_device()
    got = launch(args, order, splits, (*NUMBERS, int8_groups), "e2m1")
    tiling = DecodeTiling(16, splits, 1, 1)
    attended = attention.launch(*moved(args, device), tiling=tiling).cpu()
    attended = attended.transpose(1, 2).flatten(2)
    numbers = (*NUMBERS, int8_groups)
    want = quantize.reorder_reference(attended, order, *numbers, format="e2m1")
    assert_quantized_alike(got, want)
    close = attention_quantize.reference(*args, order, *numbers, format="e2m1")
    torch.testing.assert_close(close[1], want[1], rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ordered", [False, True])
def test_operator_passes_opcheck(dtype: torch.dtype, ordered: bool) -> None:
    args = arguments([9, 40], 2, (4, 2), dtype=dtype)
    order = random_order(256) if ordered else None
    operator = torch.ops.atom.attention_quantize.default
    torch.library.opcheck(operator, (*args, order, *NUMBERS))
    torch.library.opcheck(operator, (*args, order, *NUMBERS, 2))
    torch.library.opcheck(operator, (*args, order, *NUMBERS), {"format": "e2m1"})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "Q"), [(1, 1), (32, 1), (2, 3), (2, 100)])
def test_kernel_on_real_shapes(B: int, Q: int, dtype: torch.dtype) -> None:
    args = arguments(
        [2000] * B, Q, (32, 8), 128, slots=2048, dtype=dtype, device=torch.device("cuda")
    )
    order = random_order(4096).cuda()
    numbers = (4, 128, 128, 0.9)
    with poisoned_memory():
        got = attention_quantize.launch(*args, order, *numbers)
    attended = attention.launch(*args).transpose(1, 2).flatten(2)
    assert_quantized_alike(got, quantize.reorder_reference(attended, order, *numbers))
