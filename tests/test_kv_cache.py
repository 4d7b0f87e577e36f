"""The KV cache under transformers: generate, uncompiled and compiled, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from atom_compile import AtomError, KVCache, KVScheme
from atom_compile.errors import CacheError, OptionError

from .capturing import token_batch
from .models import tiny_llama

NUMBERS = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 384,
    "max_position_embeddings": 128,
}
SLIDING = {"sliding_window": 8}
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
UNQUANTIZED = {"skip": ["*"], "allow_unchanged": True, "strict": True}


def build(name: str, numbers: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    given = NUMBERS | numbers
    given = {key: value for key, value in given.items() if value is not ...}
    config = getattr(transformers, name)(**given)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def padded_batch() -> dict[str, Tensor]:
    """Two prompts of 11 tokens, the first with three of padding."""
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": token_batch(2, 11), "attention_mask": mask}


@pytest.fixture(
    params=[("LlamaConfig", {}), ("MistralConfig", SLIDING), ("Gemma2Config", SLIDING)],
    ids=["llama", "mistral", "gemma2"],
)
def model(request: pytest.FixtureRequest) -> Any:
    return build(*request.param)


def test_generate_in_16_bits_is_what_transformers_gives(model: Any) -> None:
    inputs = padded_batch()
    wanted = model.generate(**inputs, **GREEDY)
    cache = KVCache(model.config, 4, 32, "kv16")
    assert torch.equal(model.generate(**inputs, **GREEDY, past_key_values=cache), wanted)
    for layer in cache.layers:
        assert int(layer.cumulative_length) == 22
    cache.reset()
    chunked = model.generate(**inputs, **GREEDY, past_key_values=cache, prefill_chunk_size=4)
    assert torch.equal(chunked, wanted)
    cache.reset()
    beams = {**GREEDY, "num_beams": 2}
    wanted = model.generate(**inputs, **beams)
    assert torch.equal(model.generate(**inputs, **beams, past_key_values=cache), wanted)


DERIVED = {"head_dim": ...}  # by the configuration
LATENT = {
    **DERIVED,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "q_lora_rank": None,
}


@pytest.mark.parametrize("scheme", ["kv16", "kv8"])
@pytest.mark.parametrize(
    ("name", "numbers", "sizes"),
    [
        ("FalconConfig", {**DERIVED}, [(1, 64, 64)] * 2),
        ("FalconConfig", {**DERIVED, "new_decoder_architecture": True}, [(4, 64, 64)] * 2),
        ("GPTBigCodeConfig", {}, [(1, 64, 64)] * 2),
        ("DeepseekV3Config", {**LATENT, "first_k_dense_replace": 2}, [(1, 64, 16)] * 2),
        (
            "Gemma4UnifiedTextConfig",
            {
                **SLIDING,
                "layer_types": ["sliding_attention", "full_attention"],
                "global_head_dim": 128,
            },
            [(2, 64, 64), (2, 128, 128)],
        ),
    ],
    ids=["one head", "repeated heads", "one head of two names", "latent", "two sizes"],
)
def test_heads_and_channels_are_as_the_model_caches_them(
    name: str, numbers: dict[str, Any], sizes: list[tuple[int, int, int]], scheme: str
) -> None:
    model, ids = build(name, numbers), token_batch(2, 11)
    cache = KVCache(model.config, 2, 32, scheme)
    held = [(one.num_heads, one.k_head_dim, one.v_head_dim) for one in cache.quantized_layers]
    assert held == sizes
    with torch.no_grad():
        wanted, got = model(ids).logits, model(ids, past_key_values=cache).logits
    assert (got - wanted).norm() < (1e-5 if scheme == "kv16" else 0.03) * wanted.norm()


@pytest.mark.parametrize("scheme", ["kv8", KVScheme(bits=8, residual=4, keys_before_rope=True)])
def test_generate_in_8_bits(model: Any, scheme: Any) -> None:
    inputs = padded_batch()
    with torch.no_grad():
        wanted = model(**inputs).logits
        got = model(**inputs, past_key_values=KVCache(model.config, 2, 32, scheme)).logits
    seen = inputs["attention_mask"].bool()
    assert (got - wanted)[seen].norm() < 0.02 * wanted[seen].norm()


def test_compiled_generate_in_16_bits(model: Any, graphs_run_eagerly: list[Any]) -> None:
    """The fused operators, weights unquantized: the same tokens, one graph each for both phases."""
    inputs = padded_batch()
    wanted = model.generate(**inputs, **GREEDY)
    model.compile(backend="atom", options=UNQUANTIZED)
    got = model.generate(**inputs, **GREEDY, past_key_values=KVCache(model.config, 4, 32, "kv16"))
    assert torch.equal(got, wanted)
    assert len(graphs_run_eagerly) == 2
    for gm in graphs_run_eagerly:
        names = [str(node.target) for node in gm.graph.nodes]
        assert names.count("atom.attention.default") == 2
        assert not any("kv_read" in name or "scaled_dot" in name for name in names)


@pytest.mark.usefixtures("graphs_run_eagerly")
def test_generate_with_a_compile_config() -> None:
    model, ids = tiny_llama(), token_batch(1, 8)
    wanted = model.generate(ids, **GREEDY)
    config = transformers.CompileConfig(backend="atom", mode=None, options=dict(UNQUANTIZED))
    config._compile_all_devices = True
    cache = KVCache(model.config, 1, 32, "kv16")
    got = model.generate(ids, **GREEDY, past_key_values=cache, compile_config=config)
    assert torch.equal(got, wanted)


@torch.no_grad()
def test_no_recompilation_as_the_sequence_grows(graphs_run_eagerly: list[Any]) -> None:
    model = build("MistralConfig", SLIDING)  # past the window as well
    model.compile(backend="atom", options={"strict": True})
    cache = KVCache(model.config, 1, 64)
    ids = token_batch(1, 24)
    model(ids[:, :4], past_key_values=cache)
    for token in range(4, 24):
        model(ids[:, token : token + 1], past_key_values=cache)
    assert len(graphs_run_eagerly) == 2


@torch.no_grad()
def test_prompts_of_changing_lengths(model: Any, graphs_run_eagerly: list[Any]) -> None:
    """From the second length on the number of tokens is a symbol in the graph."""
    ids = token_batch(2, 26)
    wanted = model(ids).logits
    model.compile(backend="atom", options=UNQUANTIZED)
    cache = KVCache(model.config, 2, 32, "kv16")
    got = [model(piece, past_key_values=cache).logits for piece in ids.split((5, 7, 11, 3), dim=1)]
    assert (torch.cat(got, dim=1) - wanted).abs().max() < 1e-4
    assert len(graphs_run_eagerly) == 2


def test_layers_move_to_where_the_model_has_them() -> None:
    config = transformers.LlamaConfig(**NUMBERS)
    cache = KVCache(config, 1, 12, KVScheme(keys_before_rope=True))
    layers = cache.quantized_layers
    keys = torch.zeros(1, 2, 3, 64)
    layers[0].update(keys, keys)
    for layer in layers:
        layer._follow(torch.device("meta"))
    held = [[one for one in (*layer.tensors, layer.rope) if one is not None] for layer in layers]
    places = [{one.device.type for one in tensors} for tensors in held]
    assert places == [{"cpu"}, {"meta"}]  # what the first one holds stays where it is
    with pytest.raises(CacheError, match=r"on meta, .* on cpu: make KVCache"):
        layers[0].update(keys.to("meta"), keys.to("meta"))


@pytest.mark.gpu
@torch.no_grad()
def test_a_cache_made_on_another_device() -> None:
    model, ids = tiny_llama().cuda(), token_batch(1, 8).cuda()
    want = model(ids, past_key_values=KVCache(model.config, 1, 12)).logits
    got = model(ids, past_key_values=KVCache(model.config, 1, 12, device="cpu")).logits
    assert torch.equal(got, want)


def test_bytes() -> None:
    config = transformers.LlamaConfig(**NUMBERS | {"head_dim": 128})
    caches = {name: KVCache(config, 2, 64, name, dtype=torch.bfloat16) for name in PRESETS}
    allocated = {
        name: sum(tensor.untyped_storage().nbytes() for layer in cache.layers
                  for tensor in layer.tensors if tensor is not None)
        for name, cache in caches.items()
    }  # fmt: skip
    for name, cache in caches.items():
        assert cache.nbytes == allocated[name] == cache.bytes_per_token * 2 * 64
    assert allocated["kv4"] < 0.27 * allocated["kv16"]
    assert allocated["kv8"] < 0.52 * allocated["kv16"]
    sliding = KVCache(transformers.MistralConfig(**NUMBERS | SLIDING), 2, 64)
    assert sliding.nbytes == sliding.bytes_per_token * 2 * 8  # the window's tokens and no more


PRESETS = ("kv4", "kv4-rotated", "kv8", "kv16")


def test_what_it_refuses() -> None:
    model, ids = tiny_llama(), token_batch(2, 8)
    cache = KVCache(model.config, 2, 12)
    model(ids, past_key_values=cache)
    with pytest.raises(CacheError, match="8 tokens after 8, and the cache has room for 12"):
        model(ids, past_key_values=cache)
    with pytest.raises(CacheError, match="2 sequences, and the cache has room for 1"):
        model(ids, past_key_values=KVCache(model.config, 1, 12))
    other = transformers.LlamaConfig(**NUMBERS | {"head_dim": 32})
    with pytest.raises(CacheError, match="the cache was made for 2 heads of 32"):
        model(ids, past_key_values=KVCache(other, 2, 12))
    for scheme, message in (
        ("kv5", "unknown KV scheme 'kv5'; did you mean"),
        (KVScheme(group_size=48), "heads of 64 channels cannot be cut into groups of 48"),
    ):
        with pytest.raises(OptionError, match=message):
            KVCache(model.config, 1, 12, scheme)
    lists = transformers.LlamaConfig(**NUMBERS, layer_types=["full_attention", "window_attention"])
    with pytest.raises(OptionError, match="llama has layers of window_attention, for which"):
        KVCache(lists, 1, 12)
    with pytest.raises(OptionError, match="mamba has no attention whose keys"):
        KVCache(transformers.MambaConfig(num_hidden_layers=1), 1, 12)
    gpt2 = transformers.GPT2Config(n_embd=64, n_head=2, n_layer=1)
    with pytest.raises(OptionError, match="names no RoPE"):
        KVCache(gpt2, 1, 12, KVScheme(keys_before_rope=True))
    for bits, residual in ((3, 0), (4, -1), (16, 4)):
        with pytest.raises(OptionError):
            KVScheme(bits=bits, residual=residual)
    with pytest.raises(AtomError, match="max_len 0"):
        KVCache(model.config, 1, 0)
