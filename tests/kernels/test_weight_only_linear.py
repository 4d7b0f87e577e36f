from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from atom_compile.kernels import tuning, weight_only_hopper
from atom_compile.kernels import weight_only_linear as operator
from atom_compile.kernels.formats import BLOCK_FORMATS, E2M1, FORMATS
from atom_compile.kernels.linear import Tiling
from atom_compile.kernels.packing import (
    BLOCKS_GROUP,
    GroupedWeight,
    GroupLayout,
    block_codes,
    dequantize_weight,
    grouped_codes,
    narrow_rows,
    pack_float_codes,
    pack_grouped,
    without_outliers,
)

from .cases import DTYPES, dtypes, few_examples, kernel_device, poisoned_memory, seeds, tokens

MULTIPLY_DENSE: Callable[..., Tensor] = operator.multiply_dense
layouts = st.builds(
    GroupLayout,
    st.sampled_from([256, 344, 352, 700, 1376, 2817]),
    st.sampled_from([32, 64, 128, 256]),
    st.just(0),
)
formats = st.sampled_from(["int", *FORMATS, *BLOCK_FORMATS])


class Arguments(NamedTuple):
    """Those of `atom::weight_only_linear` but for the dtype, which is x's, and the format."""

    x: Tensor
    weight: Tensor
    weight_scale: Tensor
    zero_point: Tensor | None
    high_bits: Tensor | None
    row_scale: Tensor | None
    bias: Tensor | None
    residual: Tensor | None

    def to(self, device: torch.device) -> Arguments:
        return Arguments(*(None if one is None else one.to(device) for one in self))  # type: ignore[arg-type]

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype


def arguments(
    shape: tuple[int, ...],
    N: int,
    layout: GroupLayout,
    dtype: torch.dtype = torch.float32,
    *,
    symmetric: bool = True,
    extras: bool = False,
    scale_dtype: torch.dtype = torch.bfloat16,
    device: torch.device | None = None,
    format: str = "int",
) -> Arguments:
    device = device or torch.device("cpu")
    dense = torch.randn(N, layout.width, device=device)
    weight = pack_grouped(dense, layout, 4, 0.9, symmetric, format)
    if format not in BLOCK_FORMATS:
        weight = weight._replace(weight_scale=weight.weight_scale.to(scale_dtype))
    return Arguments(
        torch.randn(*shape, layout.width, device=device).to(dtype),
        *weight,
        torch.randn(N, dtype=dtype, device=device) if extras else None,
        torch.randn(*shape, N, dtype=dtype, device=device) if extras else None,
    )


def assert_alike(got: Tensor, want: Tensor, rounding: float = 0.0) -> None:
    """Up to the order of float32 sums, and each output's own rounding; `rounding`: of weights."""
    assert got.dtype == want.dtype and got.shape == want.shape
    if not want.numel():
        return
    eps = max(torch.finfo(want.dtype).eps, 1e-5)
    largest = float(want.float().abs().max())
    tolerance = max(eps, rounding) * largest
    torch.testing.assert_close(got.cpu().float(), want.float(), rtol=2 * eps, atol=tolerance)


def fitting(layout: GroupLayout, format: str) -> GroupLayout:
    """With groups that the kernels can multiply by."""
    least = operator.least_group_size(format)
    size = BLOCKS_GROUP if format in BLOCK_FORMATS else max(layout.group_size, least)
    return replace(layout, group_size=size)


def reference(args: Arguments, format: str = "int") -> Tensor:
    return operator.reference(*args, args.dtype, format=format)


@few_examples
@given(
    tokens,
    st.sampled_from([1, 40, 70, 130]),
    layouts,
    dtypes,
    formats,
    st.booleans(),
    st.booleans(),
    st.sampled_from([torch.bfloat16, torch.float16]),
    seeds,
)
def test_kernel_agrees_with_the_reference(
    tokens: int,
    N: int,
    layout: GroupLayout,
    dtype: torch.dtype,
    format: str,
    symmetric: bool,
    extras: bool,
    scale_dtype: torch.dtype,
    seed: int,
) -> None:
    layout = fitting(layout, format)
    torch.manual_seed(seed)
    named: dict[str, Any] = {"extras": extras, "scale_dtype": scale_dtype, "format": format}
    args = arguments((2, tokens), N, layout, dtype, symmetric=symmetric, **named)
    with poisoned_memory():
        got = operator.launch(*args.to(kernel_device()), dtype, format=format)
    assert_alike(got, reference(args, format))


@few_examples
@given(st.sampled_from([1, 70]), layouts, dtypes, formats, st.booleans(), seeds)
def test_many_tokens_read_the_weight_in_their_own_dtype(
    N: int, layout: GroupLayout, dtype: torch.dtype, format: str, symmetric: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layout = fitting(layout, format)
    args = arguments((3,), N, layout, dtype, symmetric=symmetric, extras=True, format=format)
    with poisoned_memory():
        got = MULTIPLY_DENSE(*args.to(kernel_device()), format=format)
    dense = dequantize_weight(GroupedWeight(*args[1:6]), layout, format).to(dtype)
    assert args.bias is not None and args.residual is not None
    want = F.linear(args.x.float(), dense.float(), args.bias.float()).to(dtype) + args.residual
    assert_alike(got, want)
    assert_alike(got, reference(args, format), rounding=torch.finfo(dtype).eps)


@pytest.mark.parametrize("tiling", [Tiling(64, 16, 2), Tiling(32, 32, 3), Tiling(128, 64, 1)])
@pytest.mark.parametrize(
    ("format", "group_size"),
    [
        *[("int", 32), ("int", 128), ("int", 512), ("e2m2", 512), ("e2m3", 64), ("e3m2", 512)],
        *[("mxfp4", 32), ("nvfp4", 32)],
    ],
)
def test_kernel_in_other_tilings(tiling: Tiling, format: str, group_size: int) -> None:
    layout = GroupLayout(2 * 512 + 100, group_size, 0)
    args = arguments((35,), 150, layout, symmetric=False, extras=True, format=format)
    with poisoned_memory():
        got = operator.multiply_packed(*args.to(kernel_device()), tiling, format=format)
    assert_alike(got, reference(args, format))


@pytest.mark.parametrize("format", ["int", "e2m3", "mxfp4", "nvfp4"])
def test_rows_of_a_larger_weight(format: str) -> None:
    """What several linears read of a weight that they share."""
    layout = fitting(GroupLayout(344, 64, 0), format)
    args = arguments((5,), 70, layout, symmetric=False, format=format)
    want = reference(args, format)[:, 20:50]
    assert_alike(reference(_rows_20_to_50(args), format), want)
    part = _rows_20_to_50(args.to(kernel_device()))
    for got in (
        operator.launch(*part, args.dtype, format=format),
        MULTIPLY_DENSE(*part, format=format),
    ):
        assert_alike(got, want)


def _rows_20_to_50(args: Arguments) -> Arguments:
    rows = narrow_rows(GroupedWeight(*args[1:6]), 20, 30)
    return args._replace(**rows._asdict())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_and_zero_point_is_exact(dtype: torch.dtype) -> None:
    """The identity times a weight is the weight; its rows have all the zero points there are."""
    codes = (torch.arange(17 * 64).reshape(17, 2, 32) % 16) - 8
    zero_point = torch.arange(-8, 9)[:, None].expand(17, 2)
    weight = grouped_codes(codes, torch.ones(17, 2), zero_point)
    want = (codes - zero_point[..., None]).flatten(1).t().to(dtype)
    given = torch.eye(64, dtype=dtype), *weight
    args = Arguments(*given, None, None).to(kernel_device())
    assert torch.equal(operator.launch(*args, dtype).cpu(), want)
    assert torch.equal(MULTIPLY_DENSE(*args).cpu(), want)
    assert torch.equal(operator.reference(*given, None, None, dtype), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("group_size", [128, 256])
def test_every_floating_point_code_is_exact(
    dtype: torch.dtype, format: str, group_size: int
) -> None:
    """In every place of a group there may be: row n begins with code n."""
    values = torch.tensor(FORMATS[format].values())
    codes = torch.arange(len(values))[:, None] + torch.arange(2 * group_size)
    codes = (codes % len(values)).to(torch.uint8).unflatten(1, (2, group_size))
    ones, no_outliers = torch.ones(len(codes), 2), torch.empty(len(codes), 0)
    packed = pack_float_codes(codes, ones, no_outliers, ones[:, 0], FORMATS[format])
    given = torch.eye(2 * group_size, dtype=dtype), *without_outliers(packed)
    want = values[codes.long()].flatten(1).t().to(dtype)
    args = Arguments(*given, None, None)
    assert torch.equal(reference(args, format), want)
    args = args.to(kernel_device())
    tiling = Tiling(64, 32, 1)
    assert torch.equal(operator.multiply_packed(*args, tiling, format=format).cpu(), want)
    assert torch.equal(MULTIPLY_DENSE(*args, format=format).cpu(), want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_every_code_under_every_scale_is_exact(dtype: torch.dtype, format: str) -> None:
    """Row n has the scale of byte n, in the second of two groups."""
    block, values = BLOCK_FORMATS[format], torch.tensor(E2M1.values())
    # what float16 and bfloat16 hold of products with powers of two
    powers = range(104, 141) if dtype == torch.float16 else range(2, 252)
    scales = powers if format == "mxfp4" else range(127)
    scale = torch.tensor(scales, dtype=torch.uint8).view(block.scale.dtype).float()
    codes = (torch.arange(64) % 16).to(torch.uint8).expand(len(scale), -1)
    row_scale = 2.0 ** (torch.arange(len(scale)) % 3 - 1) if block.tensor_scale else None
    packed = block_codes(
        codes.unflatten(1, (-1, block.size)),
        torch.stack([torch.ones_like(scale), scale], 1).repeat_interleave(32 // block.size, 1),
        row_scale,
        format,
    )
    want = values[codes.long()]
    want[:, 32:] *= scale[:, None]
    want = (want if row_scale is None else want * row_scale[:, None]).t().to(dtype)
    args = Arguments(torch.eye(64, dtype=dtype), *packed, None, None)
    assert torch.equal(reference(args, format), want)
    args = args.to(kernel_device())
    tiling = Tiling(64, 32, 1)
    assert torch.equal(operator.multiply_packed(*args, tiling, format=format).cpu(), want)
    assert torch.equal(MULTIPLY_DENSE(*args, format=format).cpu(), want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("format", "byte"), [("mxfp4", 255), ("nvfp4", 127)])
def test_a_scale_that_is_no_number_poisons_its_row(
    dtype: torch.dtype, format: str, byte: int
) -> None:
    args = arguments((3,), 20, GroupLayout(344, 32, 0), dtype, format=format)
    clean = reference(args, format)
    args.weight_scale[5, 7] = byte
    moved = args.to(kernel_device())
    for out in (
        reference(args, format),
        operator.launch(*moved, dtype, format=format).cpu(),
        MULTIPLY_DENSE(*moved, format=format).cpu(),
    ):
        assert out[:, 7].isnan().all()
        others = torch.arange(20) != 7
        torch.testing.assert_close(out[:, others], clean[:, others], rtol=1e-2, atol=1e-1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("channel", [0, 343])
@pytest.mark.parametrize("format", ["int", "e2m2", "mxfp4", "nvfp4"])
def test_a_poisoned_token_poisons_its_own_row(poison: float, channel: int, format: str) -> None:
    layout = fitting(GroupLayout(344, 128, 0), format)
    args = arguments((3,), 70, layout, symmetric=False, format=format)
    clean = reference(args, format)
    args.x[1, channel] = poison
    launched = operator.launch(*args.to(kernel_device()), args.dtype, format=format).cpu()
    for out in (reference(args, format), launched):
        assert not out[1].isfinite().any()
        torch.testing.assert_close(out[::2], clean[::2], rtol=1e-5, atol=1e-4)


def test_a_wider_input_is_rounded_to_the_dtype_first() -> None:
    """Under autocast activations arrive in float32, and the product is of 16 bits."""
    args = arguments((3,), 40, GroupLayout(344, 128, 0))
    rounded = args._replace(x=args.x.bfloat16())
    moved = args.to(kernel_device())
    assert_alike(operator.launch(*moved, torch.bfloat16), reference(rounded))
    assert torch.equal(operator.reference(*args, torch.bfloat16), reference(rounded))


@pytest.mark.parametrize("shape", [(15,), (2, 1, 15), (2, 3, 15)])
def test_residual_broadcasts_and_may_be_strided(shape: tuple[int, ...]) -> None:
    residual = torch.randn(shape)[..., 5:10]
    args = arguments((2, 3), 5, GroupLayout(344, 128, 0))._replace(residual=residual)
    args = args._replace(x=torch.randn(3, 2, 344).transpose(0, 1))
    assert_alike(operator.launch(*args.to(kernel_device()), torch.float32), reference(args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("format", "symmetric"),
    [("int", True), ("int", False), *((name, True) for name in ("e2m3", "mxfp4", "nvfp4"))],
)
def test_operator_passes_opcheck(dtype: torch.dtype, format: str, symmetric: bool) -> None:
    layout, named = fitting(GroupLayout(344, 128, 0), format), {"format": format}
    args = arguments((2, 3), 40, layout, dtype, symmetric=symmetric, extras=True, format=format)
    torch.library.opcheck(torch.ops.atom.weight_only_linear.default, (*args, dtype), named)


def test_paths_by_tokens() -> None:
    layout, gpu = GroupLayout(4096, 128, 0), torch.device("cuda")
    assert operator.describe(1, 64, layout, torch.bfloat16, torch.device("cpu")) == "reference"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "multiprocessors", lambda _: 132)
        patch.setattr(tuning, "find", lambda *_: None)
        for hopper in (False, True):
            patch.setattr(operator, "is_hopper", lambda _, hopper=hopper: hopper)
            operator.choose_tiling.cache_clear()
            many = weight_only_hopper.PATH if hopper else operator.PATH
            for format in ("int", "e2m3"):
                arguments = layout, torch.bfloat16, gpu, format
                assert operator.describe(1, 4096, *arguments) == operator.PATH
                assert operator.describe(128, 4096, *arguments) == many
            assert operator.describe(8192, 4096, *arguments) == operator.DEQUANTIZE
        operator.choose_tiling.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("format", "symmetric"),
    [("int", True), ("int", False), *((name, True) for name in (*FORMATS, *BLOCK_FORMATS))],
)
@pytest.mark.parametrize("M", [1, 16, 17, 64, 200, 300])
@pytest.mark.parametrize(("N", "K", "group_size"), [(4096, 14336, 128), (6144, 4100, 32)])
def test_kernel_on_real_shapes(
    M: int, N: int, K: int, group_size: int, dtype: torch.dtype, format: str, symmetric: bool
) -> None:
    device = torch.device("cuda")
    layout = fitting(GroupLayout(K, group_size, 0), format)
    named: dict[str, Any] = {"extras": True, "device": device, "format": format}
    args = arguments((M,), N, layout, dtype, symmetric=symmetric, **named)
    with poisoned_memory():
        got = operator.launch(*args, dtype, format=format)
    # many tokens read weights that were rounded to the dtype
    assert_alike(got, reference(args, format).cpu(), rounding=torch.finfo(dtype).eps)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 16, 300])
def test_graphs_replay(M: int) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    layout = GroupLayout(8192, 128, 0)
    args = arguments((M,), 1024, layout, torch.bfloat16, symmetric=False, device=device)
    want = operator.launch(*args, torch.bfloat16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = operator.launch(*args, torch.bfloat16)
    for _ in range(5):
        got.fill_(float("nan"))
        graph.replay()
        assert torch.equal(got, want)
