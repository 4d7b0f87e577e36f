"""The model shapes and devices that the benchmark knows by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..errors import OptionError, unknown


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of one decoder layer, how many of them make the model, and its vocabulary."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int = 2
    vocabulary: int = 512

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (N, K), with q/k/v and gate/up merged as the backend merges them."""
        attention = self.heads * self.head_dim
        return {
            "qkv_proj": (attention + 2 * self.kv_heads * self.head_dim, self.hidden),
            "o_proj": (self.hidden, attention),
            "gate_up_proj": (2 * self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="prose-llama-5m",
            hidden=256,
            intermediate=768,
            heads=4,
            kv_heads=2,
            head_dim=64,
            layers=4,
            vocabulary=8192,
        ),
        Shape(
            name="llama3-8b",
            hidden=4096,
            intermediate=14336,
            heads=32,
            kv_heads=8,
            head_dim=128,
            layers=32,
            vocabulary=128256,
        ),
        Shape(
            name="llama3-70b",
            hidden=8192,
            intermediate=28672,
            heads=64,
            kv_heads=8,
            head_dim=128,
            layers=80,
            vocabulary=128256,
        ),
    )
}


DEFAULT_MODEL = {"cuda": "llama3-8b", "cpu": "prose-llama-5m"}


def find_device(name: str | None) -> torch.device:
    """The GPU by default, where there is one."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in DEFAULT_MODEL:
        raise OptionError(unknown("device", name, DEFAULT_MODEL))
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError("device 'cuda': PyTorch sees no GPU here. Use device 'cpu'.")
    return device


def find_shape(name: str) -> Shape:
    if name not in SHAPES:
        raise OptionError(unknown("model", name, SHAPES))
    return SHAPES[name]


def llama_config(shape: Shape) -> Any:
    """transformers' configuration of a Llama of this shape."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_hidden_layers=shape.layers,
        vocab_size=shape.vocabulary,
        max_position_embeddings=1 << 17,
    )
    config._attn_implementation = "sdpa"
    return config
