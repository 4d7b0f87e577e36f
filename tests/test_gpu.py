"""The whole way on a GPU: kernels under Inductor, CUDA graphs, generate."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import atom_compile

from .capturing import reference_output, relative_error, token_batch
from .models import HandWritten, tiny_llama

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("scheme", ["w4a4", "w4a8"])
@pytest.mark.parametrize("make", [tiny_llama, HandWritten])
@pytest.mark.parametrize("length", [1, 12, 100])
@torch.no_grad()
def test_kernels_agree_with_the_references(make: Any, scheme: str, length: int) -> None:
    model, ids = make().eval(), token_batch(2, length)
    wanted = reference_output(model, ids, scheme=scheme)
    model = model.cuda()
    model.compile(backend="atom", options={"scheme": scheme, "strict": True})
    output = model(ids.cuda())
    got = output if isinstance(output, torch.Tensor) else output.logits
    assert relative_error(got.cpu(), wanted) < 1e-2


@torch.no_grad()
def test_cuda_graphs_follow_the_weights() -> None:
    model = tiny_llama().cuda()
    other = tiny_llama(seed=1).cuda()
    ids = token_batch(1, 8).cuda()
    results = {}
    for mode in (None, "reduce-overhead"):
        compiled = copy.deepcopy(model)
        compiled.compile(backend="atom", mode=mode)
        outputs = [compiled(ids, use_cache=False).logits.clone() for _ in range(4)]
        compiled.load_state_dict(other.state_dict())
        outputs += [compiled(ids, use_cache=False).logits.clone() for _ in range(4)]
        results[mode] = outputs
    for plain, graphed in zip(results[None], results["reduce-overhead"], strict=True):
        assert relative_error(graphed, plain) < 1e-3
    assert relative_error(results[None][0], results[None][-1]) > 0.1


@torch.no_grad()
def test_generate_with_a_compile_config() -> None:
    from transformers import CompileConfig

    model = tiny_llama().cuda()
    ids = token_batch(1, 8).cuda()
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    config = CompileConfig(backend="atom")
    got = model.generate(ids, cache_implementation="static", compile_config=config, **arguments)
    assert got.shape == (1, 20)
    model.compile(backend="atom")
    again = model.generate(ids, **arguments)
    assert again.shape == (1, 20)


@torch.no_grad()
def test_calibration_on_the_gpu() -> None:
    model = tiny_llama()
    wanted = atom_compile.calibrate(model, [token_batch()], progress=False)
    got = atom_compile.calibrate(model.cuda(), [token_batch().cuda()], progress=False)
    for name, diagonal in wanted.hessian_diagonal.items():
        assert relative_error(got.hessian_diagonal[name], diagonal) < 1e-3
