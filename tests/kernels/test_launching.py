from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.experimental.gluon import language as gl
from triton.runtime.jit import JITFunction

from atom_compile.kernels import (
    attention,
    attention_quantize,
    float8_linear,
    gated_quantize,
    kv_cache,
    linear,
    norm_quantize,
    quantize,
    quantize_e4m3,
    rope_append,
    rotate,
    two_level_linear,
    weight_only_linear,
)
from atom_compile.kernels.launching import Blocks, Launch, as_rows, buffer
from atom_compile.kernels.packing import (
    GroupLayout,
    pack_grouped,
    pack_rows,
    pack_two_level,
    pack_weight,
)

from .cases import kernel_device, random_order
from .test_kv_cache import Cache, empty_cache


@triton.jit
def scale_kernel(
    x_ptr: Any, bias_ptr: Any, out_ptr: Any, N: Any, factor: Any,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """out = x * factor + bias"""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x_ptr + n, mask=n < N).to(tl.float32) * factor
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N).to(tl.float32)
    tl.store(out_ptr + n, y, mask=n < N)


@pytest.mark.parametrize("N", [1, 15, 16, 17, 100])
@pytest.mark.parametrize("offset", [0, 1])
def test_every_call_is_of_its_own_tensors(N: int, offset: int) -> None:
    device = kernel_device()
    plain, with_bias = (
        Launch(scale_kernel, (-(-N // 16),), (N, 3.0), HAS_BIAS=has_bias, BLOCK=16)
        for has_bias in (False, True)
    )
    for dtype in (torch.float32, torch.float32, torch.float16, torch.float32):
        x, bias = torch.randn(2, N + offset, device=device).to(dtype)[:, offset:].unbind()
        out = torch.full((N,), torch.nan, device=device)
        plain(x, None, out)
        torch.testing.assert_close(out, x.float() * 3.0, rtol=1e-5, atol=1e-5)
        with_bias(x, bias, out)
        torch.testing.assert_close(out, x.float() * 3.0 + bias.float(), rtol=1e-5, atol=1e-5)


class Compiled(CompiledKernel):  # type: ignore[misc]
    """What Triton returns from a launch; its launcher takes arguments as Triton 3.6's does."""

    function, packed_metadata = 11, (4, 1, 0)

    def __init__(self, calls: list[tuple[Any, ...]], launcher: Any) -> None:
        self._launcher = launcher(calls)

    @property
    def run(self) -> Any:
        return self._launcher


class Launcher:
    global_scratch_size = profile_scratch_size = 0

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        self.launch: Callable[..., None] = lambda *arguments: calls.append(arguments)

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        self.launch(x, y, z, stream, function, False, None, None, *rest)


class PackingLauncher(Launcher):
    """As Triton 3.7's."""

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: int, packed: Any, *rest: Any
    ) -> None:
        self.launch(x, y, z, stream, function, False, packed, *rest[:3], rest[3:])


class ScratchLauncher(Launcher):
    """Of a kernel that needs memory to work in."""

    global_scratch_size = 128

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
        self.launch(x, y, z, stream, function, "scratch", *rest)


class Kernel(JITFunction):  # type: ignore[misc]
    """Launches nothing, and keeps what was launched by Triton's own way."""

    def __init__(self, launcher: Any) -> None:
        super().__init__(scale_kernel.fn)
        self.by_triton: list[tuple[Any, ...]] = []
        self.prepared: list[tuple[Any, ...]] = []
        self._launcher = launcher

    def run(self, *args: Any, **named: Any) -> Compiled:
        self.by_triton.append(args)
        return Compiled(self.prepared, self._launcher)


class Gpu:
    stream, device = 7, 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """CPU tensors count as a GPU's, and PyTorch asks this for the current device and stream."""
    it = Gpu()
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: it.device, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: it.stream, raising=False)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    return it


def launch_of(kernel: Kernel) -> Launch:
    return Launch(kernel, (5, 2), (64, 3.0), HAS_BIAS=False, BLOCK=16, num_warps=4)


def tensors(offset: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, None, Tensor]:
    x, out = (torch.zeros(64 + offset, dtype=dtype)[offset:] for _ in range(2))
    return x, None, out


@pytest.mark.parametrize("launcher", [Launcher, PackingLauncher, ScratchLauncher])
def test_after_the_first_launch_addresses_go_to_what_triton_compiled(
    launcher: type[Launcher], gpu: Gpu
) -> None:
    kernel = Kernel(launcher)
    launch = launch_of(kernel)
    first, second, third = tensors(), tensors(), tensors()
    launch(*first)
    assert kernel.by_triton == [(first[0], first[0], first[2], 64, 3.0)]
    launch(*second)
    gpu.stream = 8
    launch(*third)
    assert len(kernel.by_triton) == 1 and len(kernel.prepared) == 2
    for stream, (x, _, out), call in zip((7, 8), (second, third), kernel.prepared, strict=True):
        assert call[:5] == (5, 2, 1, stream, 11)
        arguments = (x.data_ptr(), 0, out.data_ptr(), 64, 3.0, False, 16)
        packed = launcher is PackingLauncher
        assert (call[-1] if packed else call[-len(arguments) :]) == arguments
        assert ("scratch" in call) == (launcher is ScratchLauncher)


class DescribingLauncher(Launcher):
    """Of a kernel whose first parameter is a descriptor, which Triton makes at every launch."""

    def __init__(self, calls: list[tuple[Any, ...]]) -> None:
        super().__init__(calls)
        launcher = self.launch

        def inner(*arguments: Any) -> None:
            launcher("described by Triton", *arguments)

        self.launch = inner


def test_descriptors_are_made_once_for_an_address(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def describe(descriptor: Any, metadata: str) -> list[Any]:
        assert (metadata, descriptor.base.dtype) == ("metadata", torch.int8)
        made.append(descriptor.base.data_ptr())
        return [("map", made[-1]), *descriptor.shape, *descriptor.strides]

    monkeypatch.setattr("triton.backends.nvidia.driver.make_tensordesc_arg", describe)
    monkeypatch.setattr(
        Compiled, "metadata", SimpleNamespace(tensordesc_meta=["metadata"]), raising=False
    )
    kernel = Kernel(DescribingLauncher)
    blocks = Blocks((4, 64), torch.int8, (2, 32), gl.NVMMASharedLayout(32, 8, 2))
    launch = Launch(kernel, (1,), (64, 3.0), (blocks,), HAS_BIAS=False, BLOCK=16)
    first, second = torch.zeros(2, 4, 64, dtype=torch.uint8)
    out = torch.zeros(64)
    for x in (first, second, first, second, second):
        launch(x, None, out)
    (by_triton,) = kernel.by_triton
    assert by_triton[0].base.data_ptr() == first.data_ptr()
    at = [second.data_ptr(), first.data_ptr()]
    assert made == at
    for place, call in zip((0, 1, 0, 0), kernel.prepared, strict=True):
        described = ("map", at[place]), 4, 64, 64, 1
        assert call[-11:] == (*described, 0, out.data_ptr(), 64, 3.0, False, 16)


def test_what_a_kernel_is_compiled_for_is_told_apart(gpu: Gpu) -> None:
    kernel = Kernel(Launcher)
    launch = launch_of(kernel)
    launch(*tensors())
    changes: list[Callable[[], Any]] = [
        lambda: tensors(dtype=torch.float16),
        lambda: (tensors()[0], tensors()[0], tensors()[2]),  # a bias where there was none
        lambda: (tensors(dtype=torch.float16)[0], None, tensors()[2]),
    ]
    for number, change in enumerate(changes, 2):
        launch(*change())
        assert len(kernel.by_triton) == number
        launch(*change())
        assert len(kernel.by_triton) == number
    gpu.device = 1  # where the kernel is not loaded yet
    launch(*tensors())
    assert len(kernel.by_triton) == len(changes) + 2
    gpu.device = 0
    launch(*tensors())
    assert len(kernel.by_triton) == len(changes) + 2


def test_misaligned_tensors_are_launched_by_triton(gpu: Gpu) -> None:
    kernel = Kernel(Launcher)
    launch = launch_of(kernel)
    for _ in range(3):
        launch(*tensors(offset=1))
    assert len(kernel.by_triton) == 3
    for _ in range(3):
        launch(*tensors())
        launch(tensors()[0], None, tensors(offset=2)[2])
    assert len(kernel.by_triton) == 3 + 1 + 3


def test_tensors_that_are_on_no_gpu_are_left_to_triton_to_refuse(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Kernel(Launcher)
    launch = launch_of(kernel)
    launch(*tensors())
    monkeypatch.setattr(Tensor, "is_cuda", False)
    launch(*tensors())
    assert len(kernel.by_triton) == 2


@pytest.fixture
def hooks() -> Iterator[list[Any]]:
    """The launches that a profiler is told of."""
    told: list[Any] = []
    knobs.runtime.launch_enter_hook.add(told.append)
    yield told
    knobs.runtime.launch_enter_hook.remove(told.append)


def test_hooks_are_told_of_launches(gpu: Gpu, request: pytest.FixtureRequest) -> None:
    kernel = Kernel(Launcher)
    launch = launch_of(kernel)
    launch(*tensors())
    launch(*tensors())
    assert len(kernel.by_triton) == 1
    request.getfixturevalue("hooks")
    launch(*tensors())
    assert len(kernel.by_triton) == 2
    kernel.pre_run_hooks.append(print)
    knobs.runtime.launch_enter_hook.calls.clear()
    launch(*tensors())
    assert len(kernel.by_triton) == 3


def test_what_is_not_as_expected_is_left_to_triton(gpu: Gpu) -> None:
    class Unknown(Kernel):
        def run(self, *args: Any, **named: Any) -> Any:
            super().run(*args, **named)
            return object()

    kernel = Unknown(Launcher)
    launch = launch_of(kernel)
    for number in range(1, 4):
        launch(*tensors())
        assert len(kernel.by_triton) == number


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (4, 1, 5), (0, 0)])
def test_buffers_are_contiguous(shape: tuple[int, ...]) -> None:
    want = torch.empty(shape, dtype=torch.int8)
    planned = buffer(*shape, dtype=torch.int8)
    assert (planned.shape, planned.stride) == (tuple(want.shape), want.stride())
    made = planned.beside(torch.zeros(1, device=kernel_device()))
    assert made.shape == want.shape and made.dtype == torch.int8 and made.is_contiguous()


def test_rows_of_a_slice_are_a_view() -> None:
    x = torch.randn(2, 3, 40)
    for part in (x, x[..., 8:24], x[0], x[0, 0], x.transpose(0, 1), x[..., ::2], x[:0]):
        rows, stride = as_rows(part)
        got = rows.as_strided((part.numel() // part.shape[-1], part.shape[-1]), (stride, 1))
        assert torch.equal(got, part.reshape(got.shape))
    assert as_rows(x[..., 8:24])[0].data_ptr() == x[..., 8:].data_ptr()


K, N, NUMBERS = 352, 272, (4, 128, 48, 0.9)
LAYOUT = GroupLayout(K, 128, 48)
ODD = 17  # outputs


def quantized(M: int, *numbers: Any) -> tuple[Tensor, Tensor]:
    return quantize.reference(torch.randn(M, K), *numbers)


def multiplied(M: int, width: int = N) -> tuple[Any, ...]:
    packed = pack_weight(torch.randn(width, K), LAYOUT, bits=4, clip=0.85)
    return (*quantized(M, *NUMBERS), *packed)


def normed(M: int) -> tuple[Any, ...]:
    norm = torch.randn(K), None, random_order(K), 1e-5, False, True, torch.float32
    return (torch.randn(M, K), *norm, *NUMBERS)


def blank_cache(length: int) -> Cache:
    cache = empty_cache(1, 2, 300, 64, torch.tensor([length]))
    return cache.map(torch.zeros_like)._replace(length=cache.length)


def cached(M: int) -> tuple[Any, ...]:
    """A query of 4 heads, and a cache of 300 slots that has its tokens, and some before them."""
    cache = blank_cache(0)
    key, value = torch.randn(2, 1, 2, M + 200, 64)
    kv_cache.append_reference(key, value, *cache, 4)
    filled = cache._replace(length=torch.tensor([M + 200]))
    position = torch.arange(200, M + 200)
    return (torch.randn(1, 4, M, 64), *filled, position, None, 4, 0, 0.125, 0.0)


def appended(M: int) -> tuple[Any, ...]:
    key, value = torch.randn(2, 1, 2, M, 64)
    return (key, value, *blank_cache(9), 4)


def turned_and_appended(M: int) -> tuple[Any, ...]:
    cos, sin = torch.randn(2, 1, M, 64)
    key, value, *cache = appended(M)
    return (torch.randn(1, 4, M, 64), key, value, cos, sin, *cache)


def read(M: int) -> tuple[Any, ...]:
    _, codes, scale, *_, length = cached(M)[:9]
    return (codes, scale, None, None, length, 1, M + 200, 4, torch.float32)


def weight_only(M: int) -> tuple[Any, ...]:
    packed = pack_grouped(torch.randn(N, K), GroupLayout(K, 32, 0), 4, 1.0, False, "int")
    return (torch.randn(M, K).bfloat16(), *packed, None, None, torch.bfloat16)


def float8(M: int) -> tuple[Any, ...]:
    layout = GroupLayout(K, float8_linear.GROUP_SIZE, 0, per_token=True)
    rows = pack_rows(torch.randn(N, K), layout, "e3m2")
    return (*quantize_e4m3.reference(torch.randn(M, K)), *rows, None, None, torch.bfloat16)


def two_level(M: int) -> tuple[Any, ...]:
    layout = GroupLayout(K, 128, 48, per_token=True)
    codes, scale = quantized(M, 8, 128, 48, 1.0, 0, 0, True)
    return (codes, scale, *pack_two_level(torch.randn(N, K), layout), None, None, torch.float32)


OPERATORS: dict[str, tuple[Any, Callable[[int], tuple[Any, ...]]]] = {
    "linear": (linear.linear, lambda M: (*multiplied(M), None, None, torch.float32)),
    "linear, 17 outputs": (
        linear.linear, lambda M: (*multiplied(M, ODD), torch.randn(ODD), None, torch.float32)
    ),
    "linear, 1 output": (linear.linear, lambda M: (*multiplied(M, 1), None, None, torch.float32)),
    "linear, residual": (
        linear.linear,
        lambda M: (*multiplied(M), torch.randn(N), torch.randn(M, N), torch.float32),
    ),
    "two_level_linear": (two_level_linear.two_level_linear, two_level),
    "weight_only_linear": (weight_only_linear.weight_only_linear, weight_only),
    "float8_linear": (float8_linear.float8_linear, float8),
    "norm_quantize": (norm_quantize.norm_quantize, normed),
    "gated_quantize": (
        gated_quantize.gated_quantize,
        lambda M: (*torch.randn(2, M, K), None, "silu", *NUMBERS),
    ),
    "quantize": (quantize.quantize, lambda M: (torch.randn(M, K), *NUMBERS)),
    "reorder_quantize": (
        quantize.reorder_quantize, lambda M: (torch.randn(M, K), random_order(K), *NUMBERS)
    ),
    "rotate": (rotate.rotate, lambda M: (torch.randn(M, K), 128, 48, 128)),
    "attention": (attention.attention, cached),
    "attention_quantize": (
        attention_quantize.attention_quantize, lambda M: (*cached(M), None, 4, 128, 0, 0.9)
    ),
    "kv_append": (kv_cache.kv_append, appended),
    "kv_read": (kv_cache.kv_read, read),
    "rope_append": (rope_append.rope_append, turned_and_appended),
}  # fmt: skip


def on_gpu(arguments: tuple[Any, ...], *, aligned: bool) -> list[Any]:
    """Copies, 8 bytes behind an address that is a multiple of 16 if they are not to be aligned."""

    def moved(x: Tensor) -> Tensor:
        gap = 0 if aligned else 8 // x.element_size()
        memory = torch.empty(x.numel() + gap, dtype=x.dtype, device="cuda")
        return memory[gap:].view(x.shape).copy_(x)

    return [moved(x) if isinstance(x, Tensor) else x for x in arguments]


def assert_alike(got: Any, want: Any) -> None:
    for one, wanted in zip(flat(got), flat(want), strict=True):
        assert one.shape == wanted.shape and one.dtype == wanted.dtype
        if one.dtype in (torch.int8, torch.uint8):  # a last bit decides between two codes
            assert (one.cpu() != wanted).float().mean() < 0.05
        else:
            error = (one.cpu().float() - wanted.float()).norm()
            assert error <= 2e-2 * wanted.float().norm()


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if x is not None]


def run(operator: Any, arguments: Any) -> list[Tensor]:
    """Its results, and the tensors that it may have written to."""
    named = {"format": "e3m2"} if operator is float8_linear.float8_linear else {}
    result = operator(*arguments, **named)
    return [
        *([] if result is None else flat(result)),
        *(x for x in arguments if isinstance(x, Tensor)),
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATORS)
def test_later_calls_of_an_operator_agree_with_the_reference(name: str) -> None:
    operator, make = OPERATORS[name]
    kept = []  # so that addresses differ
    for M in (1, 1, 3, 1, 100, 3):
        for aligned in (True, False, True):
            arguments = make(M)
            moved = on_gpu(arguments, aligned=aligned or M > 64)  # TMA reads aligned memory alone
            kept.append(moved)
            got = run(operator, moved)
            assert_alike(got, run(operator, arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("M", [1, 100])
def test_launches_after_the_first_are_captured_and_replayed(name: str, M: int) -> None:
    operator, make = OPERATORS[name]
    static = on_gpu(make(M), aligned=True)
    for _ in range(3):
        run(operator, static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # on a stream of its own
        got = run(operator, static)
    for _ in range(2):
        arguments = make(M)
        for place, x in zip(static, arguments, strict=True):
            if isinstance(x, Tensor):
                place.copy_(x)
        graph.replay()
        assert_alike(got, run(operator, arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATORS)
def test_a_profiler_is_told_of_every_launch(name: str, hooks: list[Any]) -> None:
    operator, make = OPERATORS[name]
    knobs.runtime.launch_enter_hook.calls.clear()
    arguments = on_gpu(make(1), aligned=True)
    for _ in range(3):
        run(operator, arguments)
    assert not hooks
    knobs.runtime.launch_enter_hook.add(hooks.append)
    run(operator, arguments)
    first = len(hooks)
    run(operator, arguments)
    assert first > 0 and len(hooks) == 2 * first
