"""Kernels that begin before the one ahead has ended read what it writes all the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from atom_compile.kernels.gated_quantize import gated_quantize
from atom_compile.kernels.linear import linear
from atom_compile.kernels.norm_quantize import norm_quantize
from atom_compile.kernels.overlap import overlap
from atom_compile.kernels.packing import GroupLayout, pack_weight, to_device

WIDTH = 1024
NUMBERS = 4, 128, 128, 0.9


def test_without_a_gpu_nothing_overlaps() -> None:
    assert overlap(torch.device("cpu")) == {"OVERLAP": False, "launch_pdl": False}


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_a_chain_of_kernels(tokens: int) -> None:
    """As a graph, where one follows the other at once, and with the device idle between them."""
    device, dtype = torch.device("cuda"), torch.bfloat16
    draw = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(dtype)

    layout = GroupLayout(WIDTH, 128, 128)
    up = to_device(pack_weight(normal(2 * WIDTH, WIDTH).float(), layout, 4, 0.85), device)
    down = to_device(pack_weight(normal(WIDTH, WIDTH).float(), layout, 4, 0.85), device)
    weight = normal(WIDTH).to(device)
    order = torch.randperm(WIDTH, generator=draw).to(device, torch.int32)
    x = normal(tokens, WIDTH).to(device)

    def run(after_each: Callable[[], object]) -> Tensor:
        out = x
        for _ in range(8):
            norm = weight, None, order, 1e-5, False, True, dtype
            codes = norm_quantize(out, *norm, *NUMBERS)
            after_each()
            gate = linear(*codes, *up, None, None, dtype)
            after_each()
            codes = gated_quantize(gate[:, :WIDTH], gate[:, WIDTH:], None, "silu", *NUMBERS)
            after_each()
            out = linear(*codes, *down, None, out, dtype)
            after_each()
        return out

    want = run(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(lambda: None)
    for _ in range(50):
        got.fill_(torch.nan)
        graph.replay()
        assert torch.equal(got, want)
