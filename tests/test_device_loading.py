"""What is read past transformers is the model that `from_pretrained` loads, in everything."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from atom_compile import device_files, load, quantize, save
from atom_compile.device_files import DeviceFiles
from atom_compile.device_loading import find_device, load_onto
from atom_compile.errors import CheckpointError
from atom_compile.model_folder import load_model

from .capturing import token_batch
from .models import tiny_llama
from .test_device_files import CPU, same_bits

SMALL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 352,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}


def load_fast(path: Path, **kwargs: Any) -> Any:
    """Onto the CPU, as onto a GPU; None if that is left to `from_pretrained`."""
    config = AutoConfig.from_pretrained(path)
    return load_onto(CPU, getattr(transformers, config.architectures[0]), config, path, **kwargs)


def load_as_onto_a_gpu(path: Path) -> Any:
    """What `load` does where all of the model goes to one GPU, which the CPU stands for."""
    model = load_fast(path)
    return AutoModelForCausalLM.from_pretrained(path) if model is None else model


def tiny_qwen() -> Any:
    """Tied embeddings, biases of q, k and v."""
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=True))


def tiny_gemma() -> Any:
    return Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=64))


def tiny_gpt2() -> Any:
    """Its own filling of weights asks a linear for its weight by name."""
    return GPT2LMHeadModel(
        GPT2Config(n_embd=256, n_layer=1, n_head=4, vocab_size=96, n_positions=64)
    )


def tiny_opt() -> Any:
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=256,
            word_embed_proj_dim=256,
            ffn_dim=352,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=96,
        )
    )


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "w4a4": (tiny_llama, "w4a4"),
    "w4a8": (tiny_llama, "w4a8"),
    "w4a16": (tiny_llama, "w4a16"),
    "w6a16": (tiny_llama, "w6a16"),
    "tied": (tiny_qwen, "w4a4"),
    "gemma": (tiny_gemma, "w4a4"),
    "gpt2": (tiny_gpt2, "w4a4"),
    "opt": (tiny_opt, "w4a4"),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_it_is_the_same_model(name: str, tmp_path: Path) -> None:
    make, scheme = CASES[name]
    torch.manual_seed(0)
    model = make().eval().to(torch.bfloat16)
    quantize(model, scheme, progress=False)
    save(model, tmp_path, max_shard_size="200KB")
    wanted = load(tmp_path)
    with mock.patch.multiple("atom_compile.device_files", _PIECE=20000, _SMALL=5000):
        got = load_fast(tmp_path)
    state, want = got.state_dict(), wanted.state_dict()
    assert list(state) == list(want)
    assert all(same_bits(state[one], tensor) for one, tensor in want.items())
    assert same_bits(got(token_batch()).logits, wanted(token_batch()).logits)
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = (
            {one: (t.requires_grad, t.dtype) for one, t in getattr(some, kind)()}
            for some in (got, wanted)
        )
        assert ours == theirs
    ours, theirs = (
        {one: (type(module), module.training) for one, module in some.named_modules()}
        for some in (got, wanted)
    )
    assert ours == theirs
    assert got.config.to_dict() == wanted.config.to_dict()
    assert vars(got.generation_config) == vars(wanted.generation_config)
    assert got.name_or_path == wanted.name_or_path == str(tmp_path)
    assert vars(got).keys() == vars(wanted).keys()
    assert vars(got.hf_quantizer).keys() == vars(wanted.hf_quantizer).keys()
    assert got.hf_quantizer.quantization_config.reading is None


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed")
    model = tiny_llama(layers=1).to(torch.bfloat16)
    quantize(model, progress=False)
    save(model, path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_tensors_may_come_after_the_model(
    packed: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    """Also where transformers converts them before they are there."""
    waited_for = threading.Event()
    read, arrive = device_files._read_bytes, DeviceFiles.arrive

    def read_late(*piece: Any) -> None:
        assert waited_for.wait(60)
        read(*piece)

    def wait_for_them(self: DeviceFiles) -> Any:
        waited_for.set()
        return arrive(self)

    monkeypatch.setattr(device_files, "_read_bytes", read_late)
    monkeypatch.setattr(DeviceFiles, "arrive", wait_for_them)
    wanted, got = load(packed, dtype=dtype), load_fast(packed, dtype=dtype)
    assert waited_for.is_set()
    assert got.dtype == wanted.dtype
    assert got.model.layers[0].self_attn.q_proj.weight_scale.dtype == torch.bfloat16
    assert same_bits(got(token_batch()).logits, wanted(token_batch()).logits)


def test_joined_linears_are_one_weight_and_no_tensor_keeps_others(packed: Path) -> None:
    model = load_fast(packed)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight is attention.k_proj.weight
    assert attention.q_proj.order is attention.v_proj.order
    assert all(one.untyped_storage().nbytes() == one.nbytes for one in model.parameters())


@pytest.mark.parametrize(
    "file", ["generation_config.json", "adapter_config.json", "model.safetensors"]
)
def test_what_is_left_to_from_pretrained(packed: Path, tmp_path: Path, file: str) -> None:
    for one in packed.iterdir():
        (tmp_path / one.name).write_bytes(one.read_bytes())
    assert load_fast(tmp_path) is not None
    if file == "adapter_config.json":
        (tmp_path / file).write_text("{}")
    else:
        (tmp_path / file).unlink()
    assert load_fast(tmp_path) is None


def test_garbage_is_collected_again(packed: Path, tmp_path: Path) -> None:
    assert gc.isenabled()
    load_fast(packed)
    assert gc.isenabled()
    for one in packed.iterdir():
        (tmp_path / one.name).write_bytes(one.read_bytes())
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not what was saved"):
        load_fast(tmp_path)
    assert gc.isenabled()


ONE_GPU: list[Any] = ["cuda:1", 1, torch.device("cuda:1"), {"": "cuda:1"}, {"": 1}]
OTHER_PLACES: list[Any] = [None, "cpu", "auto", {"": "cpu"}, {"": "disk"}, {"model": 0, "head": 1}]


def test_one_gpu_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    assert [find_device({"device_map": one}) for one in ONE_GPU] == [None] * len(ONE_GPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for places in ONE_GPU:
        assert find_device({"device_map": places, "dtype": "auto"}) == torch.device("cuda:1")
    for places in OTHER_PLACES:
        assert find_device({"device_map": places}) is None
    assert find_device({"device_map": "cuda:0", "attn_implementation": "eager"}) is None
    assert find_device({}) is None


def test_load_takes_it_onto_one_gpu(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with mock.patch("atom_compile.saving.load_onto", return_value="model") as onto:
        assert load(packed, device_map={"": 1}, dtype="auto") == "model"
    device = torch.device("cuda:1")
    assert onto.call_args.args[0] == device
    assert onto.call_args.kwargs == {"device_map": {"": device}, "dtype": "auto"}


def test_the_command_line_loads_with_load(packed: Path) -> None:
    with mock.patch("atom_compile.model_folder.load", side_effect=load) as loading:
        assert load_model(packed).is_quantized
    assert loading.called
