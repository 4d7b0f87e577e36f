"""Operators run where their tensors are, whichever GPU is the current one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from atom_compile.kernels import library
from atom_compile.kernels.kv_cache import kv_append, kv_read
from atom_compile.kernels.linear import linear
from atom_compile.kernels.packing import GroupLayout, pack_weight, to_device
from atom_compile.kernels.quantize import quantize
from atom_compile.kernels.reorder import reorder

from .test_kv_cache import empty_cache


class Gpus:
    """Stands in for CUDA's notion of the current device; all tensors are on `of_tensors`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, of_tensors: int) -> None:
        self.current = 0
        self.entered: list[int] = []
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: self.current, raising=False)
        monkeypatch.setattr(torch.cuda, "device", self._enter)
        monkeypatch.setattr(Tensor, "get_device", lambda _: of_tensors)

    @contextmanager
    def _enter(self, index: int) -> Iterator[None]:
        self.entered.append(index)
        before, self.current = self.current, index
        try:
            yield
        finally:
            self.current = before


@pytest.mark.parametrize(("of_tensors", "entered"), [(0, []), (1, [1])])
def test_a_launch_enters_the_device_of_its_tensors(
    of_tensors: int, entered: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = Gpus(monkeypatch, of_tensors)

    def launch(x: Tensor, number: int, *, name: str) -> tuple[int, int, str]:
        return gpus.current, number, name

    guarded = library._where_its_tensors_are(launch)
    assert guarded(torch.zeros(2), 3, name="a") == (of_tensors, 3, "a")
    assert (gpus.current, gpus.entered) == (0, entered)


def test_it_leaves_the_device_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, of_tensors=1)

    def launch(x: Tensor) -> None:
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        library._where_its_tensors_are(launch)(torch.zeros(2))
    assert (gpus.current, gpus.entered) == (0, [1])


def test_operators_are_registered_so(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, of_tensors=1)
    order = torch.tensor([3, 2, 1, 0], dtype=torch.int32)
    # a launcher that a CPU can run
    got = reorder.redispatch(DispatchKeySet(DispatchKey.CUDA), torch.arange(4.0), order)
    assert got.tolist() == [3, 2, 1, 0]
    assert gpus.entered == [1]


def test_operators_take_a_tensor_first() -> None:
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("atom::"):
            operator = getattr(torch.ops.atom, name.removeprefix("atom::")).default
            assert str(operator._schema.arguments[0].type) == "Tensor", name


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("tokens", [3, 300])
def test_operators_run_on_a_second_gpu(tokens: int) -> None:
    layout = GroupLayout(352, 128, 48)
    weight = pack_weight(torch.randn(256, 352), layout, bits=4, clip=0.85)
    x, key, value = torch.randn(tokens, 352), *torch.randn(2, 1, 2, tokens, 64)
    cache = empty_cache(1, 2, 512, 64, torch.tensor(5))

    def run(device: torch.device) -> list[Tensor]:
        codes, scale = quantize(x.to(device), 4, 128, 48, 0.85, 0, 0, False)
        out = linear(codes, scale, *to_device(weight, device), None, None, torch.float32)
        held = cache.copy(device)
        kv_append(key.to(device), value.to(device), *held, 4)
        length = held.length + tokens
        read = kv_read(held.key_codes, held.key_scale, None, None, length, 1, 512, 4, torch.float32)
        return [codes, scale, out, read[:, :, 5 : 5 + tokens]]

    with torch.cuda.device(0):
        got = run(torch.device("cuda", 1))
        assert torch.cuda.current_device() == 0
        torch.cuda.synchronize(1)
    for one, want in zip(got, run(torch.device("cpu")), strict=True):
        assert one.get_device() == 1
        torch.testing.assert_close(one.cpu(), want, rtol=1e-4, atol=1e-4)
