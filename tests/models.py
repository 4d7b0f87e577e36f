"""Small models: transformers' Llama, and decoders written by hand with names of their own."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM


def tiny_llama(
    layers: int = 2, hidden: int = 256, intermediate: int = 352, vocabulary: int = 96, seed: int = 0
) -> Any:
    """float32, eval mode, head_dim 64, four query heads on two KV heads."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=vocabulary,
        max_position_embeddings=128,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def tiny_mistral() -> Any:
    """Like `tiny_llama`, its attention over a window of 24 tokens."""
    config = tiny_llama().config.to_dict() | {"sliding_window": 24}
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**config)).eval()


class Scaling(nn.Module):
    """RMSNorm, in a spelling of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, stream: Tensor) -> Tensor:
        wide = stream.float()
        wide = wide / torch.sqrt((wide * wide).mean(dim=-1, keepdim=True) + 1e-5)
        return wide.type_as(stream) * self.gain


class Standardize(nn.Module):
    """LayerNorm, written out, with the biased variance."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)
        self.offset = nn.Parameter(torch.randn(width))

    def forward(self, stream: Tensor) -> Tensor:
        centred = stream - stream.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return self.gain * (centred * (variance + 1e-6).rsqrt()) + self.offset


class Tower(nn.Module):
    """A plain decoder block: one weight for q, k and v, attention by hand, raw parameters."""

    def __init__(self, width: int, norm: type[nn.Module], bias: bool, gated: bool) -> None:
        super().__init__()
        self.before, self.between = norm(width), norm(width)
        self.mixing = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Parameter(torch.randn(width, width) / math.sqrt(width))  # used as x @ W.T
        self.wide = nn.Linear(width, 344, bias=bias)
        self.second = nn.Linear(width, 344, bias=bias) if gated else None
        self.narrow = nn.Linear(344, width, bias=bias)

    def forward(self, stream: Tensor) -> Tensor:
        batch, length, width = stream.shape
        q, k, v = self.mixing(self.before(stream)).view(batch, length, 3, 4, -1).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(width // 4)
        causal = torch.ones(length, length, dtype=torch.bool, device=stream.device).tril()
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, width)
        stream = stream + mixed @ self.out.T
        hidden = self.between(stream)
        wide = self.wide(hidden)
        middle = F.silu(wide) * self.second(hidden) if self.second is not None else F.gelu(wide)
        stream = stream + self.narrow(middle)
        return stream


class HandWritten(nn.Module):
    """Token numbers -> logits through `depth` towers."""

    def __init__(
        self,
        width: int = 256,
        depth: int = 2,
        norm: type[nn.Module] = Scaling,
        bias: bool = False,
        gated: bool = True,
    ) -> None:
        super().__init__()
        self.letters = nn.Embedding(96, width)
        self.towers = nn.Sequential(*(Tower(width, norm, bias, gated) for _ in range(depth)))
        self.last = norm(width)
        self.reading = nn.Linear(width, 96, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.reading(self.last(self.towers(self.letters(ids))))  # type: ignore[no-any-return]
