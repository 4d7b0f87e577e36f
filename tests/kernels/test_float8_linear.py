from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.compile_fx import compile_fx, compile_fx_inner

from atom_compile.kernels import float8_hopper, tuning, weight_only_linear
from atom_compile.kernels import float8_linear as operator
from atom_compile.kernels.devices import is_hopper, multiplies_e4m3
from atom_compile.kernels.float_linear import float_linear
from atom_compile.kernels.formats import E4M3, FORMATS
from atom_compile.kernels.hopper_tiles import HopperTiling
from atom_compile.kernels.linear import Tiling
from atom_compile.kernels.packing import (
    FloatWeight,
    GroupLayout,
    RowWeight,
    dequantize_weight,
    narrow_rows,
    pack_float_codes,
    pack_float_weight,
    pack_rows,
    with_row_scale,
)
from atom_compile.kernels.quantize_e4m3 import quantize_e4m3

from .cases import DTYPES, dtypes, few_examples, kernel_device, poisoned_memory, seeds, tokens
from .test_weight_only_linear import assert_alike

widths = st.sampled_from([128, 256, 344, 700, 1376, 2817])
# tensor cores keep some 14 bits of a sum of e4m3 products
OF_A_SUM = 1e-3 if torch.cuda.is_available() else 0.0
fewer_examples = settings(few_examples, max_examples=8)
formats = st.sampled_from(operator.WEIGHT_FORMATS)


class Arguments(NamedTuple):
    """Those of `launch`'s products, but for the format."""

    codes: Tensor
    scale: Tensor
    packed: RowWeight
    bias: Tensor | None
    residual: Tensor | None
    dtype: torch.dtype

    def to(self, device: torch.device) -> Arguments:
        def move(one: Tensor | None) -> Tensor | None:
            return None if one is None else one.to(device)

        weight = RowWeight(*(one.to(device) for one in self.packed))
        codes, scale = self.codes.to(device), self.scale.to(device)
        return Arguments(codes, scale, weight, move(self.bias), move(self.residual), self.dtype)

    @property
    def flat(self) -> tuple[Any, ...]:
        """As the operator takes them."""
        return self.codes, self.scale, *self.packed, self.bias, self.residual, self.dtype


def layout_of(K: int) -> GroupLayout:
    return GroupLayout(K, operator.GROUP_SIZE, 0, per_token=True)


def arguments(
    shape: tuple[int, ...],
    N: int,
    K: int,
    dtype: torch.dtype = torch.float32,
    *,
    format: str = "e2m3",
    extras: bool = False,
    device: torch.device | None = None,
) -> Arguments:
    codes, scale = quantize_e4m3(torch.randn(*shape, K, device=device).to(dtype))
    return Arguments(
        codes,
        scale,
        pack_rows(torch.randn(N, K, device=device), layout_of(K), format),
        torch.randn(N, dtype=dtype, device=device) if extras else None,
        torch.randn(*shape, N, dtype=dtype, device=device) if extras else None,
        dtype,
    )


def reference(args: Arguments, format: str = "e2m3") -> Tensor:
    out: Tensor = operator.reference(*args.flat, format=format)
    return out


def launch(args: Arguments, format: str = "e2m3") -> Tensor:
    return operator.launch(*args.flat, format=format)


@few_examples
@given(tokens, widths, formats, seeds)
def test_reference_is_the_product_of_what_the_numbers_stand_for(
    M: int, K: int, format: str, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(5, K)
    codes, scale = quantize_e4m3(torch.randn(2, M, K))
    packed = pack_float_weight(weight, layout_of(K), FORMATS[format])
    want = float_linear(codes.float() * scale[..., None], packed, layout_of(K), FORMATS[format])
    args = Arguments(codes, scale, with_row_scale(packed), None, None, torch.float32)
    torch.testing.assert_close(reference(args, format), want, rtol=1e-4, atol=1e-4)


@few_examples
@given(
    tokens,
    st.sampled_from([1, 40, 70, 130]),
    widths,
    dtypes,
    formats,
    st.booleans(),
    seeds,
)
def test_kernel_agrees_with_the_reference(
    M: int, N: int, K: int, dtype: torch.dtype, format: str, extras: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    args = arguments((2, M), N, K, dtype, format=format, extras=extras)
    with poisoned_memory():
        got = launch(args.to(kernel_device()), format)
    assert_alike(got, reference(args, format), OF_A_SUM)


@pytest.mark.parametrize("in_e4m3", [False, True])
@pytest.mark.parametrize("tiling", [Tiling(64, 16, 2), Tiling(32, 32, 3)])
@pytest.mark.parametrize("format", operator.WEIGHT_FORMATS)
def test_kernel_in_other_tilings(tiling: Tiling, format: str, in_e4m3: bool) -> None:
    """Both in e4m3 and, for GPUs that do not multiply it, in float16."""
    device = kernel_device()
    if in_e4m3 and device.type == "cuda" and not multiplies_e4m3(device):
        pytest.skip("this GPU does not multiply e4m3")
    args = arguments((35,), 70, 612, format=format, extras=True)
    with poisoned_memory():
        got = operator.multiply_packed(*args.to(device), tiling, format=format, in_e4m3=in_e4m3)
    assert_alike(got, reference(args, format), OF_A_SUM)


@fewer_examples
@given(
    st.sampled_from([1, 3, 20]), st.sampled_from([16, 48, 80]), st.sampled_from([128, 336, 1376]),
    formats, st.booleans(), seeds,
)  # fmt: skip
def test_many_tokens_read_the_weight_in_e4m3(
    M: int, N: int, K: int, format: str, extras: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    args = arguments((2, M), N, K, torch.bfloat16, format=format, extras=extras)
    moved = args.to(kernel_device())
    if moved.codes.is_cuda and not multiplies_e4m3(moved.codes.device):
        pytest.skip("this GPU does not multiply e4m3")
    with poisoned_memory():
        got = operator.multiply_scaled(*moved, format=format)
    assert_alike(got, reference(args, format), OF_A_SUM)


@fewer_examples
@given(st.sampled_from([1, 70]), widths, dtypes, formats, seeds)
def test_many_tokens_elsewhere_read_it_in_their_own_dtype(
    N: int, K: int, dtype: torch.dtype, format: str, seed: int
) -> None:
    torch.manual_seed(seed)
    args = arguments((3,), N, K, dtype, format=format, extras=True)
    with poisoned_memory():
        got = operator.multiply_dense(*args.to(kernel_device()), format=format)
    assert_alike(got, reference(args, format), rounding=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("format", operator.WEIGHT_FORMATS)
def test_rows_of_a_larger_weight(format: str) -> None:
    """What several linears read of a weight that they share."""
    args = arguments((5,), 80, 352, torch.bfloat16, format=format)
    want = reference(args, format)[:, 16:48]
    part = args._replace(packed=narrow_rows(args.packed, 16, 32))
    assert_alike(reference(part, format), want)
    moved = args.to(kernel_device())
    part = moved._replace(packed=narrow_rows(moved.packed, 16, 32))
    for multiply in (operator.multiply_scaled, operator.multiply_dense):
        assert_alike(multiply(*part, format=format), want, OF_A_SUM)
    assert_alike(launch(part, format), want)


@pytest.mark.parametrize("in_e4m3", [False, True])
@pytest.mark.parametrize("format", operator.WEIGHT_FORMATS)
def test_every_code_is_exact(format: str, in_e4m3: bool) -> None:
    """The weight's in every place of a group: row n begins with code n. All of e4m3's, too."""
    values = torch.tensor(FORMATS[format].values())
    codes = torch.arange(64)[:, None] + torch.arange(256)
    codes = (codes % 64).to(torch.uint8).unflatten(1, (2, 128))
    ones, no_outliers = torch.ones(64, 2), torch.empty(64, 0)
    packed = with_row_scale(pack_float_codes(codes, ones, no_outliers, ones[:, 0], FORMATS[format]))
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    every = torch.where(every.float().isnan(), 0.0, every.float()).to(torch.float8_e4m3fn)
    x = torch.eye(256).to(torch.float8_e4m3fn)
    rotated = (torch.eye(256).roll(1, 0) * every.float()).to(torch.float8_e4m3fn)
    weight = values[codes.long()].flatten(1)
    for one in (x, rotated):
        args = Arguments(one, torch.ones(256), packed, None, None, torch.float32)
        want = one.float() @ weight.t()
        assert torch.equal(reference(args, format), want)
        moved = args.to(kernel_device())
        if not in_e4m3 or not moved.codes.is_cuda or multiplies_e4m3(moved.codes.device):
            got = operator.multiply_packed(
                *moved, Tiling(64, 32, 1), format=format, in_e4m3=in_e4m3
            )
            assert torch.equal(got.cpu(), want)
        assert torch.equal(operator.multiply_dense(*moved, format=format).cpu(), want)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("channel", [0, 351])
def test_a_poisoned_token_poisons_its_own_row(poison: float, channel: int) -> None:
    x = torch.randn(3, 352).bfloat16()
    args = arguments((3,), 80, 352, torch.bfloat16)
    clean = reference(args._replace(codes=quantize_e4m3(x)[0], scale=quantize_e4m3(x)[1]))
    x[1, channel] = poison
    codes, scale = quantize_e4m3(x)
    args = args._replace(codes=codes, scale=scale)
    moved = args.to(kernel_device())
    found = [reference(args), launch(moved), operator.multiply_dense(*moved, format="e2m3")]
    if not moved.codes.is_cuda or multiplies_e4m3(moved.codes.device):
        found.append(operator.multiply_scaled(*moved, format="e2m3"))
    for out in found:
        assert not out[1].isfinite().any()
        torch.testing.assert_close(out[::2].cpu(), clean[::2], rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("shape", [(15,), (2, 1, 15), (2, 3, 15)])
def test_residual_broadcasts_and_codes_may_be_strided(shape: tuple[int, ...]) -> None:
    args = arguments((3, 2), 5, 344)
    args = args._replace(
        codes=args.codes.transpose(0, 1),
        scale=args.scale.transpose(0, 1),
        residual=torch.randn(shape)[..., 5:10],
    )
    assert_alike(launch(args.to(kernel_device())), reference(args), OF_A_SUM)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", operator.WEIGHT_FORMATS)
def test_operator_passes_opcheck(dtype: torch.dtype, format: str) -> None:
    args = arguments((2, 3), 40, 344, dtype, format=format, extras=True)
    # but for its check of what is written to, which does arithmetic in e4m3
    checks = ("test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.atom.float8_linear.default, args.flat, {"format": format}, test_utils=checks
    )


def test_paths_by_tokens_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, gpu = layout_of(4096), torch.device("cuda")
    cpu = operator.describe(1, 64, layout, torch.bfloat16, torch.device("cpu"))
    assert cpu == "reference"
    for module in (operator, weight_only_linear):
        monkeypatch.setattr(module, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(tuning, "find", lambda *_: None)
    operator.choose_tiling.cache_clear()
    monkeypatch.setattr(operator, "multiplies_e4m3", lambda _: True)
    monkeypatch.setattr(float8_hopper, "is_hopper", lambda _: True)
    assert operator.describe(1, 4096, layout, torch.bfloat16, gpu) == operator.PATH
    assert operator.describe(4096, 4096, layout, torch.bfloat16, gpu) == operator.HOPPER
    assert operator.describe(8192, 4096, layout, torch.bfloat16, gpu) == operator.SCALED
    assert operator.describe(8192, 4096, layout, torch.float16, gpu) == operator.HOPPER
    assert operator.describe(4096, 4090, layout, torch.float16, gpu) == operator.DEQUANTIZE
    operator.choose_tiling.cache_clear()
    monkeypatch.setattr(float8_hopper, "is_hopper", lambda _: False)
    assert operator.describe(4096, 4096, layout, torch.bfloat16, gpu) == operator.SCALED
    assert operator.describe(4096, 4096, layout, torch.float16, gpu) == operator.DEQUANTIZE
    assert operator.describe(4096, 4090, layout, torch.bfloat16, gpu) == operator.DEQUANTIZE
    operator.choose_tiling.cache_clear()
    monkeypatch.setattr(operator, "multiplies_e4m3", lambda _: False)
    assert operator.describe(64, 4096, layout, torch.bfloat16, gpu) == operator.IN_16_BITS
    assert operator.describe(4096, 4096, layout, torch.bfloat16, gpu) == operator.DEQUANTIZE
    operator.choose_tiling.cache_clear()


def test_packed_rows_are_those_of_the_float_weight() -> None:
    weight, layout = torch.randn(7, 344), layout_of(344)
    packed = pack_rows(weight, layout, "e2m3")
    as_float: FloatWeight = pack_float_weight(weight, layout, FORMATS["e2m3"])
    assert packed.row_scale.dtype == torch.float32 and packed.row_scale.shape == (7,)
    assert torch.equal(packed.row_scale, as_float.weight_scale[0].float())
    dense = dequantize_weight(packed, layout, "e2m3")
    assert float((dense - weight).norm() / weight.norm()) < 0.04


@few_examples
@given(tokens, widths, dtypes, seeds)
def test_activations_take_the_nearest_number(M: int, K: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    x = (torch.randn(2, M, K) * torch.logspace(-4, 4, K)).to(dtype)
    codes, scale = quantize_e4m3(x)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == x.shape
    assert scale.dtype == torch.float32 and scale.shape == (2, M)
    if M:
        torch.testing.assert_close(scale, x.float().abs().amax(-1) / E4M3.largest)
        assert (codes.float().abs().amax(-1) == E4M3.largest).all()
    # half a step: 1/16 of a binade's start, or of the least number
    off = (codes.float() * scale[..., None] - x.float()).abs()
    allowed = torch.maximum(x.float().abs() / 16, scale[..., None] * 2.0**-10)
    assert (off <= 1.001 * allowed).all()


def test_a_token_of_zeros_and_a_poisoned_one() -> None:
    x = torch.zeros(4, 128)
    x[1, 3], x[2, 3], x[3, 3] = torch.nan, -torch.inf, 2.0
    codes, scale = quantize_e4m3(x)
    assert not codes[:3].float().any() and scale[0] == 1e-30
    assert scale[1].isnan() and scale[2] == torch.inf and codes[3, 3] == 448.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_compiles_the_quantization_sees_its_operations(dtype: torch.dtype) -> None:
    """So that they join their neighbours, and to the same bits."""
    targets: set[str] = set()

    def inner(gm: torch.fx.GraphModule, *rest: Any, **named: Any) -> Any:
        targets.update(str(node.target) for node in gm.graph.nodes)
        return compile_fx_inner(gm, *rest, **named)

    def activation(x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = quantize_e4m3(torch.relu(x))
        return codes, scale

    x = torch.randn(4, 344).to(dtype)
    x[1, 5], x[2], x[3, 7] = torch.nan, 0.0, torch.inf
    backend = functools.partial(compile_fx, inner_compile=inner)
    # a cached graph would not be compiled
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        got = torch.compile(activation, backend=backend)(x)
    assert targets and not any("quantize_e4m3" in target for target in targets)
    for one, want in zip(got, activation(x), strict=True):
        torch.testing.assert_close(one.float(), want.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", operator.WEIGHT_FORMATS)
@pytest.mark.parametrize("M", [1, 16, 17, 64, 200, 300, 2100])
@pytest.mark.parametrize(("N", "K"), [(4096, 14336), (6144, 4112), (28672, 4096), (6150, 4100)])
def test_kernel_on_real_shapes(M: int, N: int, K: int, dtype: torch.dtype, format: str) -> None:
    device = torch.device("cuda")
    args = arguments((M,), N, K, dtype, format=format, extras=True, device=device)
    with poisoned_memory():
        got = launch(args, format)
    # where many tokens read weights rounded to the dtype, so are activations
    rounding = max(OF_A_SUM, 2 * torch.finfo(dtype).eps)
    assert_alike(got, reference(args, format).cpu(), rounding=rounding)


@pytest.fixture
def hopper() -> torch.device:
    device = torch.device("cuda", torch.cuda.current_device())
    if not is_hopper(device):
        pytest.skip("needs a Hopper GPU")
    return device


@pytest.mark.gpu
@pytest.mark.parametrize("format", operator.WEIGHT_FORMATS)
@pytest.mark.parametrize("tiling", list(float8_hopper.STEP_US))
@pytest.mark.parametrize(("M", "N", "K"), [(1, 64, 128), (70, 528, 2832), (300, 4096, 4096)])
def test_hoppers_own_kernel(
    M: int, N: int, K: int, tiling: HopperTiling, format: str, hopper: torch.device
) -> None:
    named: dict[str, Any] = {"format": format, "extras": True, "device": hopper}
    args = arguments((M,), N, K, torch.bfloat16, **named)
    with poisoned_memory():
        got = operator.multiply_on_hopper(*args, tiling, format=format)
    assert_alike(got, reference(args, format).cpu())


def test_tensor_cores_add_up_all_channels_for_bfloat16_alone() -> None:
    sizes = 4096, 28672, 32
    assert float8_hopper.best_tiling(*sizes, torch.bfloat16, 132) == HopperTiling(256, 1)
    assert float8_hopper.best_tiling(*sizes, torch.float16, 132) == HopperTiling(128, 1)


@pytest.mark.gpu
def test_hoppers_own_kernel_on_rows_of_a_larger_weight(hopper: torch.device) -> None:
    args = arguments((100,), 1024, 2048, torch.bfloat16, device=hopper)
    part = args._replace(packed=narrow_rows(args.packed, 208, 512))
    got = operator.multiply_on_hopper(*part, HopperTiling(64, 1), format="e2m3")
    assert_alike(got, reference(args).cpu()[:, 208:720])


@pytest.mark.gpu
@pytest.mark.parametrize("format", operator.WEIGHT_FORMATS)
def test_every_code_is_exact_on_hopper(format: str, hopper: torch.device) -> None:
    """The identity times a weight is the weight: row n begins with code n."""
    values = torch.tensor(FORMATS[format].values())
    codes = ((torch.arange(64)[:, None] + torch.arange(256)) % 64).to(torch.uint8)
    ones, no_outliers = torch.ones(64, 2), torch.empty(64, 0)
    in_groups = codes.unflatten(1, (2, 128))
    packed = pack_float_codes(in_groups, ones, no_outliers, ones[:, 0], FORMATS[format])
    x, scale = torch.eye(256).to(torch.float8_e4m3fn), torch.ones(256)
    args = Arguments(x, scale, with_row_scale(packed), None, None, torch.float32).to(hopper)
    got = operator.multiply_on_hopper(*args, HopperTiling(32, 1), format=format)
    assert torch.equal(got.cpu(), values[codes.long()].t())


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 16, 100, 300])
def test_graphs_replay(M: int) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    args = arguments((M,), 1024, 8192, torch.bfloat16, device=device)
    want = launch(args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = launch(args)
    for _ in range(5):
        got.fill_(float("nan"))
        graph.replay()
        assert torch.equal(got, want)
