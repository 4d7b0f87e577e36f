"""`atom::rope_append`: RoPE of queries and keys, and `kv_append`, in one pass over memory.

    query, key = rotate(query), rotate(key)        x * cos + rotate_half(x) * sin
    kv_append(key, value, ...)

Source: RoFormer (arXiv 2104.09864), section 3.2.2, with the channels paired as halves, as Llama,
GPT-NeoX and Qwen pair them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import kv_cache
from .kv_cache import WRITTEN_CACHE, Rotation
from .library import define


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (batch, heads, tokens, head_dim), cos and sin (batch or 1, tokens, rotated_channels).

    Products and sum are each rounded to x's dtype, as a model in that dtype rounds them.
    """
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned, rest], dim=-1)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_codes: Tensor,
    key_scale: Tensor | None,
    value_codes: Tensor,
    value_scale: Tensor | None,
    key_recent: Tensor | None,
    value_recent: Tensor | None,
    rope: Tensor | None,
    length: Tensor,
    bits: int,
) -> Tensor:
    """query (batch, num_heads, tokens, head_dim), key and value (batch, num_kv_heads, ...).

    Returns the rotated query; in memory it is (batch, tokens, num_heads, head_dim).
    """
    cache = (key_codes, key_scale, value_codes, value_scale, key_recent, value_recent, rope, length)
    kv_cache.append_reference(apply_rope(key, cos, sin), value, *cache, bits)
    return apply_rope(query, cos, sin).transpose(1, 2).contiguous().transpose(1, 2)


def launch(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, *cache_and_bits: Any
) -> Tensor:
    arguments: Any = (key, value, *cache_and_bits, Rotation(query, cos, sin))
    out = kv_cache.launch_append(*arguments)
    assert out is not None
    return out.transpose(1, 2)


def fake(query: Tensor, *_: object) -> Tensor:
    batch, heads, tokens, head_dim = query.shape
    return query.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


rope_append = define(
    "rope_append(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, "
    f"{WRITTEN_CACHE}, int bits) -> Tensor",
    reference,
    fake,
    launch,
)
