"""`atom::attention_quantize`: attention, reorder and quantize, for the o_proj that reads it.

codes, scale = quantize(attention(query, ...)[order])      heads side by side: K = num_heads * D
"""

from __future__ import annotations

from torch import Tensor

from . import attention, quantize
from .kv_cache import CACHE
from .library import define


def reference(
    query: Tensor,
    key_codes: Tensor,
    key_scale: Tensor | None,
    value_codes: Tensor,
    value_scale: Tensor | None,
    key_recent: Tensor | None,
    value_recent: Tensor | None,
    rope: Tensor | None,
    length: Tensor,
    position: Tensor | None,
    mask: Tensor | None,
    kv_bits: int,
    window: int,
    attention_scale: float,
    softcap: float,
    order: Tensor | None,
    bits: int,
    group_size: int,
    outlier_channels: int,
    clip: float,
) -> tuple[Tensor, Tensor]:
    """Arguments as `attention`'s and `reorder_quantize`'s; the codes are (B, Q, padded_width)."""
    cache = (key_codes, key_scale, value_codes, value_scale, key_recent, value_recent, rope, length)
    numbers = kv_bits, window, attention_scale, softcap
    x = attention.reference(query, *cache, position, mask, *numbers).transpose(1, 2).flatten(2)
    if order is not None:
        x = x.index_select(-1, order)
    return quantize.reference(x, bits, group_size, outlier_channels, clip)


def fake(query: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    B, num_heads, Q, D = query.shape
    numbers = arguments[-4:]
    return quantize.fake(query.new_empty(B, Q, num_heads * D), *numbers)  # type: ignore[arg-type]


attention_quantize = define(
    f"attention_quantize(Tensor query, {CACHE}, Tensor? position, Tensor? mask, int kv_bits, "
    "int window, float attention_scale, float softcap, Tensor? order, "
    f"{quantize.NUMBERS}) -> (Tensor, Tensor)",
    reference,
    fake,
    reference,
)
