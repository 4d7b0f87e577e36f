"""RoPE joins the operator that stores keys: one pass over queries and keys rotates both."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..kernels.attention import attention
from ..kernels.kv_cache import kv_append
from ..kernels.rope_append import rope_append
from .graphs import argument, call, erase_unused, is_call, is_tensor, value
from .record import Record

_NEG = (operator.neg, torch.neg, "neg")
_UNSQUEEZE = ("unsqueeze", torch.unsqueeze)


@dataclass(frozen=True, eq=False)
class FoundRope:
    """x (B, heads, tokens, head_dim) whose first channels are rotated by cos and sin.

    cos, sin: (B or 1, 1, tokens, rotated_channels), both halves alike.
    """

    x: Node
    cos: Node
    sin: Node


def fuse_rope(gm: GraphModule, record: Record) -> GraphModule:
    """Needs attention fused, which tells whose queries belong to a cache.

    query, key = rope(query), rope(key)         query = atom.rope_append(query, key, value, cos,
    atom.kv_append(key, value, cache)     ->                             sin, cache)
    """
    for node in gm.graph.find_nodes(op="call_function", target=kv_append):
        reader = _reader(node)
        if reader is not None:
            reason = _fuse(node, reader)
            name = reader.meta["atom_attention"].name
            record.remark([name], reason or "RoPE, quantize and append in one")
    return gm


def _reader(append: Node) -> Node | None:
    """The one attention over the cache that `append` writes."""
    readers = [user for user in append.args[2].users if is_call(user, attention)]
    return readers[0] if len(readers) == 1 else None


def _fuse(append: Node, reader: Node) -> str | None:
    """Returns why not, if not."""
    rotated_query: Any = reader.args[0]
    rotated_key, values, *cache = append.args
    query, key = match_rope(rotated_query), match_rope(rotated_key)
    if query is None or key is None:
        return "no RoPE of a form that is known: keys are stored by an operator of their own"
    if (query.cos, query.sin) != (key.cos, key.sin):
        return "queries and keys are rotated by different angles"
    if set(rotated_key.users) != {append}:
        return "the rotated keys are read by others as well"
    if not rotated_query < append or any(user < append for user in rotated_query.users):
        return "the queries are rotated after the keys are stored"
    graph = append.graph
    with graph.inserting_before(append):
        cos, sin = (_without_heads(one, append) for one in (query.cos, query.sin))
        rotated = call(graph, rope_append, (query.x, key.x, values, cos, sin, *cache), like=append)
    rotated_query.replace_all_uses_with(rotated)
    graph.erase_node(append)
    erase_unused(rotated_query)
    erase_unused(rotated_key)
    return None


def _without_heads(angles: Node, like: Node) -> Node:
    """(B or 1, 1, tokens, channels) -> (B or 1, tokens, channels)."""
    if is_call(angles, *_UNSQUEEZE) and argument(angles, 1, "dim") in (1, -3):
        return angles.args[0]
    return call(like.graph, torch.squeeze, (angles, 1), like)


def match_rope(node: Any) -> FoundRope | None:
    """x * cos + rotate_half(x) * sin, of all channels or of the first ones alone.

    rotate_half(x) = cat(-x[..., half:], x[..., :half]): Llama, Qwen, and GPT-NeoX, which leaves the
    later channels as they are.
    """
    parts = _cat_of_two(node)
    if parts is not None:
        turned, rest = parts
        found = _match_whole(turned)
        if found is None:
            return None
        rotated = value(found.x).shape[-1]
        first, last = _slice_of(found.x), _slice_of(rest)
        if first is None or last is None:
            return None
        (x, start, _), (other, rest_start, rest_end) = first, last
        if x is not other or start or rest_start != rotated or rest_end != value(x).shape[-1]:
            return None
        return FoundRope(x, found.cos, found.sin)
    return _match_whole(node)


def _match_whole(node: Any) -> FoundRope | None:
    if not is_call(node, torch.add) or len(node.args) != 2:
        return None
    for straight, crossed in (node.args, node.args[::-1]):
        if not (is_call(straight, torch.mul) and is_call(crossed, torch.mul)):
            continue
        for x, cos in (straight.args, straight.args[::-1]):
            for half, sin in (crossed.args, crossed.args[::-1]):
                if _is_rotated_half(half, x) and _are_angles(cos, x) and _are_angles(sin, x):
                    return FoundRope(x, cos, sin)
    return None


def _is_rotated_half(node: Any, x: Any) -> bool:
    parts = _cat_of_two(node)
    if parts is None or not is_tensor(x) or not is_call(parts[0], *_NEG):
        return False
    second, first = _slice_of(parts[0].args[0]), _slice_of(parts[1])
    width = value(x).shape[-1]
    return first == (x, 0, width // 2) and second == (x, width // 2, width)


def _cat_of_two(node: Any) -> tuple[Any, Any] | None:
    if not is_call(node, torch.cat, torch.concat):
        return None
    dim, parts = argument(node, 1, "dim", 0), argument(node, 0, "tensors")
    if dim not in (-1, value(node).dim() - 1) or len(parts) != 2:
        return None
    return parts[0], parts[1]


def _slice_of(node: Any) -> tuple[Node, int, int] | None:
    """x[..., start:end] or a part of x.chunk(...) along the last dimension -> x, start, end."""
    if not is_call(node, operator.getitem):
        return None
    source, index = node.args
    if is_call(source, "chunk", torch.chunk, "split", torch.split) and isinstance(index, int):
        x, dim = source.args[0], argument(source, 2, "dim", 0)
        if dim not in (-1, value(x).dim() - 1):
            return None
        widths = [int(part.shape[-1]) for part in value(source)]
        return x, sum(widths[:index]), sum(widths[: index + 1])
    if not is_tensor(source) or not isinstance(index, tuple) or index[:-1] != (Ellipsis,):
        return None
    piece = index[-1]
    if not isinstance(piece, slice) or piece.step not in (None, 1):
        return None
    width = int(value(source).shape[-1])
    if not all(one is None or isinstance(one, int) for one in (piece.start, piece.stop)):
        return None
    start, end, _ = piece.indices(width)
    return source, start, end


def _are_angles(node: Any, x: Node) -> bool:
    """(B or 1, 1, tokens, channels) in x's dtype, for x (B, heads, tokens, channels)."""
    if not is_tensor(node) or value(node).dim() != 4 or value(x).dim() != 4:
        return False
    angles, rotated = value(node), value(x)
    return bool(
        angles.dtype == rotated.dtype
        and angles.shape[1] == 1
        and angles.shape[2:] == rotated.shape[2:]
        and angles.shape[0] in (1, rotated.shape[0])
    )
