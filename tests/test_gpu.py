"""The whole way on a GPU: kernels under Inductor, CUDA graphs, generate."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from torch._dynamo.utils import counters

import atom_compile
from atom_compile import KVCache
from atom_compile.device_files import DeviceFiles
from atom_compile.device_loading import load_onto
from atom_compile.kernels.arrivals import arrivals_of

from .capturing import reference_output, relative_error, token_batch
from .models import HandWritten, tiny_llama, tiny_mistral
from .test_experts import mixture
from .test_int4_models import BLOCKS, PACKERS, write, write_blocks

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "scheme", ["w4a4", "w4a4-fp4", "w4a8", "w4a16", "w6a16", "w6a8", "mxfp4", "nvfp4"]
)
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
    # sums of e4m3 products have some 14 bits, and later codes fall on the other side of a boundary:
    # as much as that changes an embedding by makes 4e-2 on a CPU
    assert relative_error(got.cpu(), wanted) < (1e-1 if scheme == "w6a8" else 1e-2)


@pytest.mark.parametrize("scheme", ["w4a4", "w4a4-fp4", "w4a4-rotated", "w4ax", "w4a8-two-level"])
def test_calibration_agrees_with_the_cpu_and_repeats(scheme: str) -> None:
    model, batches = tiny_llama(layers=1), [token_batch(4, 64), token_batch(4, 64)]
    wanted = atom_compile.calibrate(model, batches, scheme, progress=False)
    model, batches = model.cuda(), [batch.cuda() for batch in batches]
    first, second = (
        atom_compile.calibrate(model, batches, scheme, progress=False) for _ in range(2)
    )
    assert first.layers == second.layers and first.rounded.keys() == wanted.rounded.keys()
    for name, rounded in first.rounded.items():
        for one, other in zip(rounded.packed, second.rounded[name].packed, strict=True):
            assert one is not None and other is not None and torch.equal(one, other)
        # a last bit decides between two codes, and later channels make up for either
        assert first.layers[name].error == pytest.approx(wanted.layers[name].error, rel=0.1)


@torch.no_grad()
def test_cuda_graphs_follow_the_weights() -> None:
    model = tiny_llama().cuda()
    other = tiny_llama(seed=1).cuda()
    ids = token_batch(1, 8).cuda()
    results = {}
    arrivals_of.cache_clear()  # what graphs keep must not be allocated while they warm up
    for mode in ("reduce-overhead", None):
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


@pytest.mark.parametrize("scheme", ["kv4", "kv8", "kv16"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral])
@torch.no_grad()
def test_a_quantized_cache(make: Any, scheme: str) -> None:
    """Prefill, prefill on a cache and decode, against the uncompiled model on the CPU."""
    model, ids = make(), token_batch(2, 70)
    pieces = ids.split((37, 30, 1, 1, 1), dim=1)
    # weights unquantized: what the operators do to attention alone
    options = {"skip": ["*"], "allow_unchanged": True, "strict": True}
    wanted, got = [], []
    cache = KVCache(model.config, 3, 128, scheme, device="cpu")
    wanted = [model(piece, past_key_values=cache).logits for piece in pieces]
    model = model.cuda()
    model.compile(backend="atom", options=options)
    cache = KVCache(model.config, 3, 128, scheme)
    got = [model(piece.cuda(), past_key_values=cache).logits.cpu() for piece in pieces]
    for a, b in zip(got, wanted, strict=True):
        assert relative_error(a, b) < 2e-2


@torch.no_grad()
def test_decode_under_cuda_graphs() -> None:
    """No recompilation as the sequence grows, one graph replayed, the cache never copied."""
    model, ids = tiny_llama().bfloat16().cuda(), token_batch(2, 40).cuda()
    results = {}
    for mode in (None, "reduce-overhead"):
        torch._dynamo.reset()
        counters.clear()
        compiled = copy.deepcopy(model)
        compiled.compile(backend="atom", mode=mode, dynamic=False)
        cache = KVCache(model.config, 2, 64)
        outputs = [compiled(ids[:, :8], past_key_values=cache).logits[:, -1].clone()]
        for token in range(8, 40):
            torch.compiler.cudagraph_mark_step_begin()
            logits = compiled(ids[:, token : token + 1], past_key_values=cache).logits
            outputs.append(logits[:, -1].clone())
        results[mode] = torch.stack(outputs)
        assert counters["stats"]["unique_graphs"] == 2
        assert counters["inductor"]["cudagraph_skips"] == 0
        assert int(cache.get_seq_length()) == 40
    assert relative_error(results["reduce-overhead"], results[None]) < 1e-3


@torch.no_grad()
def test_generate_with_a_quantized_cache() -> None:
    model = tiny_llama().cuda()
    ids = token_batch(1, 8).cuda()
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.generate(ids, **arguments)
    cache = KVCache(model.config, 1, 32, "kv16")
    assert torch.equal(model.generate(ids, past_key_values=cache, **arguments), wanted)
    model.compile(backend="atom")
    for scheme in ("kv4", "kv8"):
        cache = KVCache(model.config, 1, 32, scheme)
        assert model.generate(ids, past_key_values=cache, **arguments).shape == (1, 20)


def test_allocated_bytes_of_a_cache() -> None:
    config = tiny_llama().config
    config.head_dim = 128
    allocated = {}
    for scheme in ("kv4", "kv16"):
        before = torch.cuda.memory_allocated()
        cache = KVCache(config, 8, 4096, scheme, dtype=torch.bfloat16)
        allocated[scheme] = torch.cuda.memory_allocated() - before
        assert allocated[scheme] == pytest.approx(cache.nbytes, rel=1e-3)
        del cache
    assert allocated["kv4"] <= 0.29 * allocated["kv16"]


@torch.no_grad()
def test_calibration_on_the_gpu() -> None:
    model = tiny_llama()
    wanted = atom_compile.calibrate(model, [token_batch()], progress=False, gptq=False)
    got = atom_compile.calibrate(model.cuda(), [token_batch().cuda()], progress=False, gptq=False)
    for name, diagonal in wanted.hessian_diagonal.items():
        assert relative_error(got.hessian_diagonal[name], diagonal) < 1e-3


def test_gptq_on_the_gpu() -> None:
    batches = [token_batch(4, 64)]
    wanted = atom_compile.calibrate(tiny_llama(), batches, progress=False)
    on_gpu = [batch.cuda() for batch in batches]
    got = atom_compile.calibrate(tiny_llama().cuda(), on_gpu, progress=False)
    assert got.rounded.keys() == wanted.rounded.keys()
    for name, choice in wanted.layers.items():
        assert got.layers[name].error == pytest.approx(choice.error, rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_a_mixture_is_calibrated_and_generates(family: str) -> None:
    model, ids = mixture(family).to("cuda", torch.bfloat16), token_batch(4, 64).cuda()
    wanted = model(ids).logits
    recipe = atom_compile.calibrate(model, [ids], "w4a8", progress=False)
    assert sum("experts" in name for name in recipe.rounded) == 2 * 4
    atom_compile.quantize(model, recipe, progress=False)
    assert relative_error(model(ids).logits, wanted) < 0.2
    model.compile(backend="atom")
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (4, 68)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_a_packed_model_loads_onto_it(tmp_path: Path, dtype: torch.dtype | str) -> None:
    pytest.importorskip("accelerate")
    model = tiny_llama().to(torch.bfloat16)
    atom_compile.quantize(model, progress=False)
    atom_compile.save(model, tmp_path, max_shard_size="200KB")
    wanted = atom_compile.load(tmp_path, dtype=dtype).cuda()
    with mock.patch("atom_compile.saving.load_onto", side_effect=load_onto) as past_transformers:
        got = atom_compile.load(tmp_path, device_map="cuda", dtype=dtype)
    assert past_transformers.called
    state = got.state_dict()
    assert all(torch.equal(state[name], one) for name, one in wanted.state_dict().items())
    assert all(one.is_cuda for one in (*got.parameters(), *got.buffers()))
    ids = token_batch().cuda()
    assert torch.equal(got(ids).logits, wanted(ids).logits)


@pytest.mark.parametrize("kind", [*PACKERS, *BLOCKS])
@torch.no_grad()
def test_models_that_others_quantized(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    if kind in BLOCKS:
        original = write_blocks(tmp_path, kind)
    else:
        original = write(tmp_path, kind, 64, act_order=kind != "awq")
    ids = token_batch()
    wanted = original(ids).logits
    model = atom_compile.load(tmp_path, device_map="cuda")
    assert relative_error(model(ids.cuda()).logits.cpu(), wanted) < 1e-2
    model.compile(backend="atom", options={"strict": True})
    assert relative_error(model(ids.cuda()).logits.cpu(), wanted) < 1e-2
    written = model.generate(ids.cuda(), max_new_tokens=4, do_sample=False)
    assert written.shape[1] == ids.shape[1] + 4


def test_files_are_read_onto_it(tmp_path: Path) -> None:
    wanted = {
        "large": torch.randint(256, (100_000_001,), dtype=torch.uint8),
        **{str(number): torch.randn(number) for number in range(300)},
    }
    save_file(wanted, tmp_path / "file")
    busy = [torch.zeros(10_000_000, device="cuda") for _ in range(20)]
    before = torch.cuda.current_stream()
    with DeviceFiles([tmp_path / "file"], torch.device("cuda:0")) as reading:
        del busy  # its memory is taken, kernels that fill it may still run
        read = reading.wait()
    assert torch.cuda.current_stream() == before
    assert all(torch.equal(read[name].cpu(), one) for name, one in wanted.items())
