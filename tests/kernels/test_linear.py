from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atom_compile.kernels import linear, packing, quantize
from atom_compile.kernels.arrivals import arrivals_of
from atom_compile.kernels.linear import Tiling, default_tiling
from atom_compile.kernels.packing import GroupLayout, PackedWeight

from .cases import (
    DTYPES,
    dtypes,
    few_examples,
    four_bit_formats,
    kernel_device,
    layouts,
    poisoned_memory,
    seeds,
    tokens,
)


class Arguments(NamedTuple):
    """Those of `atom::linear`."""

    codes: Tensor
    scale: Tensor
    weight: Tensor
    weight_scale: Tensor
    outlier_weight: Tensor
    outlier_scale: Tensor
    bias: Tensor | None
    residual: Tensor | None
    dtype: torch.dtype

    def to(self, device: torch.device) -> Arguments:
        moved = (v.to(device) if isinstance(v, Tensor) else v for v in self)
        return Arguments(*moved)  # type: ignore[arg-type]


def arguments(
    shape: tuple[int, ...],
    N: int,
    layout: GroupLayout,
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    residual: bool = False,
    bits: int = 4,
    device: torch.device | None = None,
    format: str = "int",
) -> Arguments:
    device = device or torch.device("cpu")
    weight = packing.pack_weight(
        torch.randn(N, layout.width, device=device), layout, bits=4, clip=0.85, format=format
    )
    x = torch.randn(*shape, layout.width, device=device)
    numbers = bits, layout.group_size, layout.outlier_channels, 0.9
    codes, scale = quantize.reference(x, *numbers, format=format if bits == 4 else "int")
    return Arguments(
        codes,
        scale,
        *weight,
        torch.randn(N, dtype=dtype, device=device) if bias else None,
        torch.randn(*shape, N, dtype=dtype, device=device) if residual else None,
        dtype,
    )


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double().cpu() - want.double().cpu()).norm() / want.double().cpu().norm())


def assert_alike(got: Tensor, want: Tensor) -> None:
    """Up to the order of float32 sums, rounded once to the dtype (twice with a residual)."""
    assert got.dtype == want.dtype and got.shape == want.shape
    if want.dtype == torch.float32 and want.numel():
        assert relative_error(got, want) < 1e-5
    eps = max(torch.finfo(want.dtype).eps, 1e-5)
    largest = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(got.cpu(), want.cpu(), rtol=2 * eps, atol=eps * largest)


@few_examples
@given(
    tokens,
    st.sampled_from([1, 40, 70, 130]),
    layouts,
    dtypes,
    st.booleans(),
    st.booleans(),
    st.sampled_from([4, 8]),
    four_bit_formats,
    seeds,
)
def test_kernel_agrees_with_the_reference(
    tokens: int,
    N: int,
    layout: GroupLayout,
    dtype: torch.dtype,
    bias: bool,
    residual: bool,
    bits: int,
    format: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    args = arguments((2, tokens), N, layout, dtype, bias, residual, bits, format=format)
    with poisoned_memory():
        got = linear.launch(*args.to(kernel_device()), format=format)
    assert_alike(got, linear.reference(*args, format=format))


@pytest.mark.parametrize("format", ["int", "e2m1"])
def test_one_group_of_one_scale_is_exact(format: str) -> None:
    args = arguments((3,), 40, GroupLayout(128, 128, 0), format=format)
    ones = (torch.ones_like(args.scale), torch.ones_like(args.weight_scale))
    args = args._replace(scale=ones[0], weight_scale=ones[1])
    got = linear.launch(*args.to(kernel_device()), format=format)
    assert torch.equal(got.cpu(), linear.reference(*args, format=format))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tiling", [Tiling(64, 16, 2), Tiling(32, 32, 3), Tiling(128, 64, 1)])
@pytest.mark.parametrize("format", ["int", "e2m1"])
def test_kernel_in_other_tilings(format: str, tiling: Tiling, bias: bool) -> None:
    layout = GroupLayout(700, 128, 48)
    args = arguments((35,), 150, layout, bias=bias, residual=bias, format=format)
    with poisoned_memory():
        got = linear.launch(*args.to(kernel_device()), tiling=tiling, format=format)
    assert_alike(got, linear.reference(*args, format=format))


@few_examples
@given(layouts, st.integers(0, 60), st.integers(1, 70), st.integers(0, 40), dtypes, seeds)
def test_some_rows_of_a_larger_weight(
    layout: GroupLayout, before: int, N: int, after: int, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    args = arguments((5,), before + N + after, layout, dtype, bias=True).to(kernel_device())
    rows = packing.narrow_rows(PackedWeight(*args[2:6]), before, N)
    assert packing.num_rows(rows) == N
    assert rows.weight.data_ptr() - args.weight.data_ptr() == before * layout.group_size // 2
    bias = args.bias[before : before + N] if args.bias is not None else None
    narrow = Arguments(args.codes, args.scale, *rows, bias, None, dtype)
    whole = linear.reference(*args)[:, before : before + N]
    torch.testing.assert_close(linear.reference(*narrow), whole)
    with poisoned_memory():
        got = linear.launch(*narrow, tiling=Tiling(64, 16, 2 if args.weight.shape[0] > 1 else 1))
    assert_alike(got, whole.contiguous())


@given(st.integers(1, 5000), st.integers(1, 60000), st.integers(1, 300), st.integers(1, 200))
def test_default_tiling_is_possible(M: int, N: int, num_groups: int, multiprocessors: int) -> None:
    tiling = default_tiling(M, N, num_groups, multiprocessors)
    assert tiling.block_m & (tiling.block_m - 1) == 0
    assert 1 <= tiling.split_k <= max(1, num_groups // 3)
    assert tiling.block_m >= min(M, 128)


@pytest.mark.parametrize("shape", [(15,), (2, 1, 15), (2, 3, 15)])
def test_residual_broadcasts_and_may_be_strided(shape: tuple[int, ...]) -> None:
    residual = torch.randn(shape)[..., 5:10]
    args = arguments((2, 3), 5, GroupLayout(344, 128, 16))._replace(residual=residual)
    assert_alike(linear.launch(*args.to(kernel_device())), linear.reference(*args))


@pytest.mark.parametrize(
    "layout", [GroupLayout(352, 128, 16), GroupLayout(1376, 64, 0), GroupLayout(2817, 128, 128)]
)
@pytest.mark.parametrize("format", ["int", "e2m1"])
def test_reference_is_the_product_of_the_dequantized(layout: GroupLayout, format: str) -> None:
    args = arguments((7,), 33, layout, bias=True, residual=True, format=format)
    x = packing.dequantize(args.codes, args.scale, layout).double()
    weight = packing.dequantize_weight(PackedWeight(*args[2:6]), layout, format).double()
    assert args.bias is not None and args.residual is not None
    want = x @ weight.t() + args.bias + args.residual
    assert relative_error(linear.reference(*args, format=format), want) < 1e-6


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("channel", [0, 343])
@pytest.mark.parametrize("format", ["int", "e2m1"])
def test_a_poisoned_token_is_nan_and_no_other_is(format: str, poison: float, channel: int) -> None:
    layout = GroupLayout(344, 128, 16)
    args = arguments((3,), 70, layout, bias=True, format=format)
    x = torch.randn(3, layout.width)
    clean = linear.reference(*on_input(args, x, format), format=format)
    x[1, channel] = poison
    args = on_input(args, x, format)
    launched = linear.launch(*args.to(kernel_device()), format=format)
    for out in (linear.reference(*args, format=format), launched.cpu()):
        assert out[1].isnan().all()
        torch.testing.assert_close(out[::2], clean[::2], rtol=1e-5, atol=1e-4)


def on_input(args: Arguments, x: Tensor, format: str) -> Arguments:
    codes, scale = quantize.reference(x, 4, 128, 16, 0.9, format=format)
    return args._replace(codes=codes, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outlier_channels", [0, 16])
def test_operator_passes_opcheck(dtype: torch.dtype, outlier_channels: int) -> None:
    args = arguments(
        (2, 3), 40, GroupLayout(344, 128, outlier_channels), dtype, bias=True, residual=True
    )
    torch.library.opcheck(torch.ops.atom.linear.default, args)
    torch.library.opcheck(torch.ops.atom.linear.default, args, {"format": "e2m1"})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [1, 16, 17, 64, 300])
@pytest.mark.parametrize(("N", "K"), [(4096, 14336), (6144, 4096)])
@pytest.mark.parametrize("format", ["int", "e2m1"])
def test_kernel_on_real_shapes(M: int, N: int, K: int, dtype: torch.dtype, format: str) -> None:
    layout, device = GroupLayout(K, 128, 128), torch.device("cuda")
    args = arguments((M,), N, layout, dtype, True, True, device=device, format=format)
    with poisoned_memory():
        got = linear.launch(*args, format=format)
    assert_alike(got, linear.reference(*args, format=format))


@pytest.mark.gpu
@pytest.mark.parametrize("spare_counters", [True, False])
def test_graphs_replay_beside_each_other(
    spare_counters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    calls = [arguments((16,), 1024, GroupLayout(8192, 128, 128), device=device) for _ in range(8)]
    assert default_tiling(16, 1024, 63, 132).split_k > 1
    want = [linear.launch(*call) for call in calls]
    if not spare_counters:
        monkeypatch.setattr(arrivals_of(device), "_unused", [])
    graphs, results = [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append([linear.launch(*call) for call in calls])
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = [linear.launch(*call) for call in calls]
        torch.cuda.synchronize()
        for got in (eager, *results):  # sums are added up in order: the same bits every time
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            for out in got:
                out.fill_(float("nan"))
        torch.cuda.synchronize()  # the graphs' streams do not wait for the fills
