"""Attention, RoPE and cache updates: found in models of many kinds, fused without a change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from atom_compile import KVCache, KVScheme
from atom_compile.backend import bind_inputs
from atom_compile.passes.masks import match_mask
from atom_compile.passes.pipeline import Rewrite
from atom_compile.store import Dispatcher

from ..capturing import arguments_of, relative_error, rewrites, token_batch

NUMBERS = {
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 384,
    "max_position_embeddings": 128,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 64}
SLIDING = GROUPED | {"sliding_window": 8}


def build(name: str, numbers: dict[str, Any], attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, name)(**NUMBERS | numbers)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation(attention)
    return model


def rewritten(model: Any, ids: Tensor, cache: Any, **options: Any) -> Rewrite:
    (run,) = rewrites(lambda ids: model(ids, past_key_values=cache), ids, **options)
    return run


def counts(run: Rewrite) -> dict[str, int]:
    wanted = ("rope_append", "kv_append", "kv_read", "attention", "attention_quantize")
    names = {f"atom.{name}": name for name in wanted} | {
        "scaled_dot_product_attention": "sdpa",
        "softmax": "softmax",
    }
    operators = run.record.stages[-1].operators
    return {short: operators[name] for name, short in names.items() if operators[name]}


FUSED = {"rope_append": 1, "attention_quantize": 1}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", [1, 11])
@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("LlamaConfig", GROUPED),
        ("Qwen2Config", {"num_key_value_heads": 1}),
        ("Qwen3Config", GROUPED),
        ("GPTNeoXConfig", {"rotary_pct": 0.25}),
        ("Phi3Config", {"num_key_value_heads": 2, "pad_token_id": 0}),
    ],
)
def test_architectures(name: str, numbers: dict[str, Any], tokens: int, attention: str) -> None:
    model = build(name, numbers, attention)
    run = rewritten(model, token_batch(2, tokens), KVCache(model.config, 2, 32))
    assert counts(run) == FUSED
    for found in run.attentions:
        remarks = run.record.remarks[found.name]
        assert remarks == ["reads kv4 codes; visible: causal", "RoPE, quantize and append in one"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sliding_windows_and_softcap(attention: str) -> None:
    # SDPA has no softcap: with it, Gemma 2 computes without the cap
    model = build("Gemma2Config", SLIDING | {"num_hidden_layers": 2}, attention)
    cache = KVCache(model.config, 2, 32)
    run = rewritten(model, token_batch(2, 11), cache)
    # a prompt longer than the window is stored twice: for itself, and for what comes later
    assert counts(run) == {"rope_append": 1, "kv_append": 2, "attention_quantize": 2}
    sliding, full = (run.record.remarks[found.name][0] for found in run.attentions)
    assert sliding == "reads kv4 codes; visible: causal, the last 8 tokens"
    assert full == "reads kv4 codes; visible: causal"
    caps = [node.args[14] for node in run.gm.graph.nodes if "atom_attention" in node.meta]
    assert caps == ([50.0, 50.0] if attention == "eager" else [0.0, 0.0])


def test_padding_stays_a_mask_of_its_own() -> None:
    model = build("LlamaConfig", GROUPED)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, :3] = 0
    cache = KVCache(model.config, 2, 32)
    (run,) = rewrites(
        lambda ids: model(ids, attention_mask=mask, past_key_values=cache), token_batch(2, 11)
    )
    assert "visible: causal, a mask" in run.record.remarks[run.attentions[0].name][0]
    (node, *_) = [node for node in run.gm.graph.nodes if "atom_attention" in node.meta]
    assert tuple(node.args[10].meta["example_value"].shape) == (2, 1, 1, 32)


@pytest.mark.parametrize(
    "cache",
    [
        lambda config: transformers.StaticCache(config, 32),
        lambda config: transformers.DynamicCache(config=config),
        lambda config: None,
    ],
)
def test_other_caches_are_left_and_reported(cache: Any) -> None:
    model, ids = build("LlamaConfig", GROUPED), token_batch(1, 4)
    made = cache(model.config)
    if made is not None:
        model(ids, past_key_values=made)
    run = rewritten(model, ids, made)
    assert counts(run) == {"sdpa": 1}
    assert all("left to PyTorch" in run.record.remarks[one.name][0] for one in run.attentions)
    assert run.record.stages[-1].operators["atom.linear"] == 4


@pytest.mark.usefixtures("graphs_run_eagerly")
@pytest.mark.parametrize(
    ("name", "numbers", "attention", "scheme"),
    [
        ("LlamaConfig", GROUPED, "eager", KVScheme(keys_before_rope=True)),
        ("GPTNeoXConfig", {}, "sdpa", KVScheme(bits=8, residual=4, group_size=32)),
        ("Gemma2Config", SLIDING | {"num_hidden_layers": 2}, "eager", "kv16"),
        ("Gemma2Config", SLIDING | {"num_hidden_layers": 2}, "sdpa", "kv4"),
    ],
)
@torch.no_grad()
def test_plain_and_fused_graphs_agree(
    name: str, numbers: dict[str, Any], attention: str, scheme: Any
) -> None:
    model, ids = build(name, numbers, attention), token_batch(2, 14)
    outputs, caches = {}, {}
    for fuse in (False, True):
        torch._dynamo.reset()
        options = {"fuse": fuse, "scheme": "w4a8", "strict": True}
        model.compile(backend="atom", options=options)
        cache = caches[fuse] = KVCache(model.config, 3, 32, scheme)
        pieces = ids.split((11, 1, 1, 1), dim=1)
        outputs[fuse] = [model(piece, past_key_values=cache).logits for piece in pieces]
    for plain, fused in zip(outputs[False], outputs[True], strict=True):
        assert relative_error(fused, plain) < 1e-3
    for plain, fused in zip(caches[False].layers, caches[True].layers, strict=True):
        assert int(plain.cumulative_length) == int(fused.cumulative_length) == 14
        for a, b in zip(plain.tensors, fused.tensors, strict=True):
            # a key on the edge between two codes goes either way
            if a is not None and b is not None:
                close = torch.isclose(a.float(), b.float(), rtol=1e-3, atol=1e-5)
                assert close.float().mean() > 0.99


class Own(nn.Module):
    """Attention with spellings and names of its own, over a cache that it is called with."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.mixing, self.out = nn.Linear(256, 384), nn.Linear(192, 256)
        self.spelling = spelling

    def forward(self, stream: Tensor, cache: Any) -> Tensor:
        batch, tokens, _ = stream.shape
        q, k, v = self.mixing(stream).view(batch, tokens, 2, 192).split((96, 48, 48), dim=-1)
        q = q.reshape(batch, tokens, 4, 48).transpose(1, 2)
        last = torch.arange(tokens) + cache.get_seq_length()
        keys, values = cache.update(k.transpose(1, 2), v.transpose(1, 2), 0)
        hidden = torch.arange(keys.shape[2])[None, :] > last[:, None]
        keys = keys.repeat_interleave(2, dim=1)
        values = values.repeat_interleave(2, dim=1)
        if self.spelling == "einsum":
            scores = torch.einsum("bhqd,bhkd->bhqk", q, keys) / 48**0.5
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            mixed = torch.einsum("bhqk,bhkd->bhqd", weights, values)
        elif self.spelling in ("keywords", "tensor fill"):
            scores = q @ keys.transpose(dim0=-1, dim1=-2) / 48**0.5
            low = -torch.inf if self.spelling == "keywords" else torch.tensor(-torch.inf)
            mixed = scores.masked_fill(mask=hidden, value=low).softmax(dim=-1) @ values
        elif self.spelling == "softmax":
            scores = (q @ keys.mT) / 48**0.5
            mixed = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1) @ values
        else:
            mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=~hidden)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, 192))  # type: ignore[no-any-return]


@pytest.mark.parametrize("spelling", ["softmax", "keywords", "sdpa", "einsum", "tensor fill"])
@torch.no_grad()
def test_a_model_of_ones_own(spelling: str) -> None:
    config = transformers.LlamaConfig(**NUMBERS | {"num_key_value_heads": 2, "head_dim": 48})
    torch.manual_seed(0)
    model, x = Own(spelling).eval(), torch.randn(2, 5, 256)
    wanted = model(x, KVCache(config, 2, 16))
    cache = KVCache(config, 2, 16)
    (run,) = rewrites(lambda x: model(x, cache), x, skip=["*"], allow_unchanged=True)
    if spelling in ("einsum", "tensor fill"):
        assert counts(run) == {"kv_append": 1, "kv_read": 2}
        assert any("not recognised" in one[0] for one in run.record.remarks.values())
    else:
        assert counts(run) == {"kv_append": 1, "attention": 1}
        assert "visible: causal" in run.record.remarks[run.attentions[0].name][0]
    cache.reset()
    inputs = bind_inputs(run)
    arguments = arguments_of(lambda x: model(x, cache), x)
    cache.reset()
    results: Any = Dispatcher(run.gm.forward, run.arguments, inputs)(*arguments)
    assert relative_error(results[0], wanted) < 1e-5


def test_masks() -> None:
    """What each of these masks is read as: window, number of terms left, whether causal."""
    padding = torch.ones(2, 9, dtype=torch.bool)

    def positions(start: Tensor) -> tuple[Tensor, Tensor]:
        return (torch.arange(3) + start)[None, None, :, None], torch.arange(9)[None, None, None]

    def causal(start: Tensor) -> Tensor:
        q, k = positions(start)
        return k <= q

    def windowed(start: Tensor) -> Tensor:
        q, k = positions(start)
        return (q >= k) & (k > q - 4) & padding[:, None, None, :]

    def not_later(start: Tensor) -> Tensor:
        q, k = positions(start)
        return ~(k > q)

    def by_a_view(start: Tensor) -> Tensor:
        _, k = positions(start)
        return k <= start.view(1, 1, 1, 1)

    def backwards(start: Tensor) -> Tensor:
        q, k = positions(start)
        return k >= q

    def shifted(start: Tensor) -> Tensor:
        q, k = positions(start)
        return k + 1 <= q

    def additive(start: Tensor) -> Tensor:
        return torch.where(causal(start), 0.0, -1e30)

    def biased(start: Tensor) -> Tensor:
        return torch.where(causal(start), 0.5, -1e30)

    wanted = {
        causal: (0, 0, True),
        windowed: (4, 1, True),
        not_later: (0, 0, True),
        by_a_view: (0, 1, False),
        backwards: (0, 1, False),
        shifted: (0, 1, False),
        additive: (0, 0, True),
        biased: (0, 1, False),
    }
    for function, (window, rest, is_causal) in wanted.items():
        (run,) = rewrites(function, torch.tensor(2), allow_unchanged=True)
        returned: Any = run.gm.graph.output_node().args[0]
        found = match_mask(returned[0])
        assert (found.window, len(found.rest), found.position is not None) == (
            window,
            rest,
            is_causal,
        )
