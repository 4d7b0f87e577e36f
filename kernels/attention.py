"""`atom::attention`: attention over a quantized KV cache, which is read as it lies in memory.

    weights = softmax(cap(query @ key^T * scale) + mask)        cap(s) = softcap * tanh(s / softcap)
    output  = weights @ value

Legend: B sequences, H query heads on KV heads, Q tokens, S slots of the cache, D head_dim.
The tokens' own keys and values are in the cache already. Source of the layout: kv_cache.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kv_cache
from .attention_decode import (
    MOST_ROWS,
    DecodePlan,
    DecodeTiling,
    Partial,
    launch_combine,
    plan_decode,
)
from .attention_prefill import PrefillTiling, plan_prefill
from .attention_tiles import Arguments, Described
from .kv_cache import CACHE
from .launching import Buffer, Launch, buffer, plan
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
    bits: int,
    window: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """query (B, num_heads, Q, D) -> (B, num_heads, Q, D), in memory (B, Q, num_heads, D).

    length: tokens in the cache, those of the query included.
    position: int64 (Q,) or (B, Q): a token sees the cache's positions up to and with this one, and
        if `window` > 0 no more than the last `window` of them. None: it sees all that are held.
    mask: bool (True: visible) or float (added), broadcastable to (B, num_heads, Q, positions).
    softcap: 0 for none.
    A token that sees nothing gets zeros. Invisible keys of other sequences never matter, whatever
    they hold.
    """
    B, num_heads, _, _ = query.shape
    num_kv_heads, slots = key_codes.shape[1:3]
    held = _positions_held(kv_cache.per_sequence(length, B), slots)
    key = _by_slot(key_codes, key_scale, key_recent, rope, held, length, bits)
    value = _by_slot(value_codes, value_scale, value_recent, None, held, length, bits)
    grouped = query.float().unflatten(1, (num_kv_heads, num_heads // num_kv_heads))
    scores = torch.einsum("bhgqd,bhsd->bhgqs", grouped, key).flatten(1, 2) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    at = held[:, None, None, :]
    visible = at >= 0
    if position is not None:
        last = (position if position.dim() == 2 else position[None])[:, None, :, None]
        visible = visible & (at <= last)
        if window:
            visible = visible & (at > last - window)
    if mask is not None:
        index = at.clamp(0, mask.shape[-1] - 1).expand(B, *mask.shape[1:3], slots)
        chosen = mask.expand(B, -1, -1, -1).gather(-1, index)
        if mask.dtype == torch.bool:
            visible = visible & chosen
        else:
            scores = scores + chosen.float()
    scores = scores.masked_fill(~visible, -torch.inf)
    highest = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - torch.where(highest == -torch.inf, 0.0, highest))
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    grouped = weights.unflatten(1, (num_kv_heads, num_heads // num_kv_heads))
    output = torch.einsum("bhgqs,bhsd->bqhgd", grouped, value)
    return output.flatten(2, 3).to(query.dtype).contiguous().transpose(1, 2)


def _positions_held(length: Tensor, slots: int) -> Tensor:
    """(B, S): the position of the token in each slot, negative where there is none."""
    newest = length[:, None] - 1
    return newest - (newest - torch.arange(slots, device=length.device)) % slots


def _by_slot(
    codes: Tensor,
    scale: Tensor | None,
    recent: Tensor | None,
    rope: Tensor | None,
    held: Tensor,
    length: Tensor,
    bits: int,
) -> Tensor:
    """Keys or values (B, num_kv_heads, S, D) in float32, 0 in slots that hold none."""
    B = held.shape[0]
    x = codes[:B].float() if scale is None else kv_cache.dequantize(codes[:B], scale[:B], bits)
    at = held.clamp(min=0)
    if rope is not None:
        cos, sin = rope[at.clamp(max=rope.shape[0] - 1)][:, None].chunk(2, dim=-1)
        x = kv_cache.rotate(x, cos, sin)
    if recent is not None:
        residual = recent.shape[2]
        index = (at % residual)[:, None, :, None].expand(*x.shape)
        late = recent[:B].float().gather(2, index)
        first = kv_cache.per_sequence(length, B)[:, None] - residual
        x = torch.where((held >= first)[:, None, :, None], late, x)
    return torch.where((held >= 0)[:, None, :, None], x, 0.0)


def fake(
    query: Tensor, key_codes: Tensor, key_scale: Tensor | None, value_codes: Tensor, *rest: object
) -> Tensor:
    B, num_heads, Q, D = query.shape
    return query.new_empty(B, Q, num_heads, D).transpose(1, 2)


def is_decode(query: Tensor, key_codes: Tensor) -> bool:
    """Whether the positions are split among programs, or the query's rows alone."""
    _, num_heads, Q, _ = query.shape
    return Q == 1 or Q * (num_heads // key_codes.shape[1]) <= MOST_ROWS


def launch(*arguments: Any, tiling: DecodeTiling | PrefillTiling | None = None) -> Tensor:
    """The Triton kernels on the arguments of `reference`; `tiling` is for tuning."""
    out, partial = launch_partial(Arguments(*arguments), tiling)
    if partial is not None:
        launch_combine(partial, out)
    return out.transpose(1, 2)


def launch_partial(
    arguments: Arguments, tiling: DecodeTiling | PrefillTiling | None
) -> tuple[Tensor, Partial | None]:
    """(B, Q, num_heads, D), and what it is to be filled from if it is not filled yet."""
    query = arguments.query
    B, num_heads, Q, D = query.shape
    if query.numel() == 0:
        return query.new_empty(B, Q, num_heads, D), None
    arguments = arguments.contiguous()
    planned = _plan(arguments.described(), tiling, query.device)
    out = planned.out.beside(query)
    if isinstance(planned.launch, DecodePlan):
        return out, planned.launch.start(arguments, out)
    planned.launch(*arguments.tensors, out)
    return out, None


class _Plan(NamedTuple):
    out: Buffer
    launch: DecodePlan | Launch


@plan
def _plan(
    described: Described, tiling: DecodeTiling | PrefillTiling | None, device: torch.device
) -> _Plan:
    a = Arguments.like(described)
    B, num_heads, Q, D = a.query.shape
    out = buffer(B, Q, num_heads, D, dtype=a.query.dtype)
    if isinstance(tiling, PrefillTiling) or not (tiling or is_decode(a.query, a.key_codes)):
        return _Plan(out, plan_prefill(a, tiling, device))
    return _Plan(out, plan_decode(a, tiling, device))


attention = define(
    f"attention(Tensor query, {CACHE}, Tensor? position, Tensor? mask, int bits, int window, "
    "float scale, float softcap) -> Tensor",
    reference,
    fake,
    launch,
)
