"""Finds attention: one call of scaled_dot_product_attention, or softmax(QK^T)V written out."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from ..kernels.kv_cache import kv_read
from ..kernels.rotate import rotate
from .graphs import argument, is_call, is_tensor, module_path, number, swapped_dims, value
from .masks import NOT

SDPA = torch._C._nn.scaled_dot_product_attention
_SOFTMAX = (F.softmax, torch.softmax, "softmax")
_MASK_FILL = ("masked_fill", torch.masked_fill)


NO_CACHE = "no cache"


@dataclass(frozen=True, eq=False)
class FoundAttention:
    """`node` = softmax(cap(query @ key^T * scale) + mask) @ value, for heads of one size.

    query (B, num_heads, Q, D); key, value (B, num_kv_heads, positions, D), before GQA repeats them.
    `hidden`: a boolean mask of what is not visible, in place of `mask`. `cache`: what keys and
    values come from, in words; its bytes count scales as well. `softmax`: of what is written out.
    """

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    hidden: Node | None
    scale: float
    softcap: float
    is_causal: bool
    softmax: Node | None
    cache: str
    cache_bytes_per_token: float | None

    @property
    def name(self) -> str:
        return module_path(self.node) or self.node.name

    @property
    def heads(self) -> tuple[int, int, int]:
        """num_heads, num_kv_heads, head_dim."""
        query, key = value(self.query), value(self.key)
        return int(query.shape[1]), int(key.shape[1]), int(query.shape[3])


def read_of(operand: Node) -> tuple[Node, Node | None]:
    """What keys or values were read by, and the rotation that turned them back after it, if any."""
    turned = _strip_casts(operand)
    if is_call(turned, rotate) and is_call(turned.args[0], kv_read) and turned.args[-1] is True:
        return turned.args[0], turned
    return operand, None


def _cache(key: Node) -> str:
    read, turned = read_of(key)
    if is_call(read, kv_read):
        return f"kv{read.args[-2]}" + (", rotated" if turned else "")
    if is_call(key, torch.cat):
        return "a cache that grows, in its own precision"
    if key.op == "placeholder":
        return "a static cache, in its own precision"
    return NO_CACHE


def _bytes_per_token(*reads: Node) -> float:
    held = [value(tensor) for read in reads for tensor in _storage(read)]
    return float(
        sum(fake.shape[1] * math.prod(fake.shape[3:]) * fake.element_size() for fake in held)
    )


def _storage(read: Node) -> list[Node]:
    """Where keys or values lie in memory."""
    read, _ = read_of(read)
    if is_call(read, kv_read):
        return [one for one in read.args[:2] if isinstance(one, Node)]
    return [read]


def find_attentions(graph: Graph) -> list[FoundAttention]:
    """Those of four dimensions, in graph order."""
    return [found for node in graph.nodes if (found := match_attention(node))]


def find_unknown(graph: Graph, found: Sequence[FoundAttention]) -> list[str]:
    """Where something that looks like attention is none of `found`: names of modules or nodes."""
    known = {one.softmax for one in found}
    unknown = [
        node
        for node in graph.nodes
        if is_call(node, *_SOFTMAX) and value(node).dim() == 4 and node not in known
    ]
    return list(dict.fromkeys(module_path(node) or node.name for node in unknown))


def match_attention(node: Node) -> FoundAttention | None:
    if not is_tensor(node) or value(node).dim() != 4:
        return None
    if is_call(node, SDPA):
        return _match_call(node)
    if is_call(node, torch.matmul) and len(node.args) == 2:
        return _match_written_out(node)
    return None


def _match_call(node: Node) -> FoundAttention | None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    arguments: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
    query = arguments["query"]
    if arguments.get("dropout_p", 0.0):
        return None
    scale = number(arguments.get("scale"))
    if scale is None:
        scale = 1.0 / math.sqrt(value(query).shape[-1])
    return _found(
        node,
        query,
        arguments["key"],
        arguments["value"],
        mask=arguments.get("attn_mask"),
        scale=scale,
        is_causal=bool(arguments.get("is_causal", False)),
    )


def _match_written_out(node: Node) -> FoundAttention | None:
    """softmax([mask](cap(query @ key^T * scale))) @ value; scale, cap and mask may be missing."""
    weights, values = node.args
    softmax = _strip_casts(weights)
    if not is_call(softmax, *_SOFTMAX) or not _over_last(softmax):
        return None
    scores: Any = _strip_casts(softmax.args[0])
    mask: Any = None
    hidden: Any = None
    if is_call(scores, torch.add) and [is_tensor(one) for one in scores.args] == [True, True]:
        scores, mask = scores.args
    elif is_call(scores, *_MASK_FILL) and (number(argument(scores, 2, "value")) or 0.0) <= -1e4:
        scores, hidden = scores.args[0], argument(scores, 1, "mask")
    scores, softcap = _strip_softcap(_strip_casts(scores))
    scores, scale = _strip_scale(_strip_casts(scores))
    if not is_call(scores, torch.matmul) or len(scores.args) != 2:
        return None
    query, transposed = scores.args
    if swapped_dims(transposed) != {2, 3}:
        return None
    return _found(
        node,
        query,
        transposed.args[0],
        values,
        mask=mask,
        hidden=hidden,
        scale=scale,
        softcap=softcap,
        softmax=softmax,
    )


def _found(
    node: Node,
    query: Any,
    key: Any,
    values: Any,
    *,
    mask: Any = None,
    hidden: Any = None,
    scale: float,
    softcap: float = 0.0,
    is_causal: bool = False,
    softmax: Node | None = None,
) -> FoundAttention | None:
    operands = query, _before_repeat(key), _before_repeat(values)
    if not all(is_tensor(one) and value(one).dim() == 4 for one in operands):
        return None
    query, key, values = operands
    if value(query).shape[1] % value(key).shape[1] or value(key).shape[1] != value(values).shape[1]:
        return None
    if hidden is not None and is_call(hidden, *NOT):
        mask, hidden = hidden.args[0], None
    cache = _cache(key)
    held = None if cache == NO_CACHE else _bytes_per_token(key, values)
    return FoundAttention(
        node, query, key, values, mask, hidden, scale, softcap, is_causal, softmax, cache, held
    )


def _before_repeat(node: Any) -> Any:
    """Past what GQA leaves behind: kv[:, :, None].expand(...).reshape(...), repeat_interleave."""
    while is_call(node, "contiguous"):
        node = node.args[0]
    if is_call(node, "repeat_interleave", torch.repeat_interleave):
        repeats, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
        return node.args[0] if dim in (1, -3) and not is_tensor(repeats) else node
    if not is_call(node, "reshape", "flatten", torch.reshape, torch.flatten):
        return node
    expanded = node.args[0]
    if not is_call(expanded, "expand") or value(expanded).dim() != 5:
        return node
    added = expanded.args[0]
    if is_call(added, operator.getitem) and isinstance(added.args[1], tuple):
        full, index = slice(None), added.args[1]
        inserts = index[:3] == (full, full, None) and all(one == full for one in index[3:])
    else:
        inserts = is_call(added, "unsqueeze", torch.unsqueeze) and argument(added, 1, "dim") == 2
    base = added.args[0] if inserts else None
    if base is None or value(base).dim() != 4 or value(node).dim() != 4:
        return node
    same = value(base).shape[2:] == value(node).shape[2:]
    heads = value(base).shape[1] * value(expanded).shape[2] == value(node).shape[1]
    return base if same and heads else node


def _strip_casts(node: Any) -> Any:
    while is_call(node, "to") and is_tensor(node.args[0]):
        node = node.args[0]
    return node


def _over_last(softmax: Node) -> bool:
    return argument(softmax, 1, "dim") in (-1, 3)


def _strip_softcap(node: Any) -> tuple[Any, float]:
    """tanh(s / cap) * cap -> s, cap."""
    inner, cap = _strip_scale(node)
    inner = _strip_casts(inner)
    if is_call(inner, torch.tanh):
        scores, scale = _strip_scale(_strip_casts(inner.args[0]))
        if math.isclose(scale * cap, 1.0, rel_tol=1e-6):
            return scores, cap
    return node, 0.0


def _strip_scale(node: Any) -> tuple[Any, float]:
    """scores * number or scores / number -> scores, the factor."""
    if is_call(node, torch.mul, torch.div) and len(node.args) == 2:
        scores, constant = node.args
        factor = number(constant)
        if factor and is_tensor(scores):
            return scores, factor if node.target is torch.mul else 1.0 / factor
    return node, 1.0
