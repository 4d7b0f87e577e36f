"""Other people's decoders, tiny and untrained: every linear but the head is rewritten."""

from __future__ import annotations

import pytest
import transformers

from ..capturing import atom_operators, token_batch

COMMON = {"num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96}
WIDTHS = {"hidden_size": 256, "intermediate_size": 384, "max_position_embeddings": 128}
GROUPED = {"num_key_value_heads": 2}
OPT = {"ffn_dim": 384, "word_embed_proj_dim": 256, "hidden_size": 256}
NORMS_FUSED = {
    "atom.norm_quantize": 2,
    "atom.gated_quantize": 1,
    "atom.reorder_quantize": 1,
    "atom.linear": 4,
    "linear": 1,
}


@pytest.mark.parametrize(
    ("name", "numbers", "wanted"),
    [
        ("Qwen3Config", WIDTHS | GROUPED | {"head_dim": 64}, NORMS_FUSED),
        ("Gemma3TextConfig", WIDTHS | GROUPED | {"head_dim": 64}, NORMS_FUSED),
        ("GPTNeoXConfig", WIDTHS, NORMS_FUSED),
        ("OPTConfig", OPT | {"max_position_embeddings": 128}, NORMS_FUSED),
        (
            "GPT2Config",
            {"n_embd": 256},
            {"atom.reorder_quantize": 4, "atom.linear": 4, "linear": 1},
        ),
    ],
)
def test_architecture(name: str, numbers: dict[str, int], wanted: dict[str, int]) -> None:
    config = getattr(transformers, name)(**COMMON, **numbers)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert atom_operators(model, token_batch()) == wanted
