"""Attention over a quantized cache reads codes: no 16-bit copy of keys and values is made."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from ..kernels.attention import attention
from ..kernels.kv_cache import kv_read
from ..kernels.rotate import rotate
from .attentions import FoundAttention, find_attentions, read_of
from .graphs import call, erase_unused, is_call, module_path, mutates, value
from .masks import joined, match_mask
from .record import Record


def fuse_attention(gm: GraphModule, record: Record) -> GraphModule:
    """Needs canonical spellings. Reports on every attention, fused or not.

    key = atom.kv_read(key_codes, ...)             out = atom.attention(query, key_codes, ...,
    value = atom.kv_read(value_codes, ...)    ->                        position, padding, ...)
    out = softmax(query @ key^T + mask) @ value

    Where keys and values are turned back after they were read, the queries are turned instead, and
    what attention gives is turned back: some tokens, not the whole cache.
    """
    for found in find_attentions(gm.graph):
        reason = _reason_to_leave(found)
        if reason is None:
            _fuse(found, record)
        else:
            record.remark([found.name], reason)
    for read in gm.graph.find_nodes(op="call_function", target=kv_read):
        record.remark([module_path(read) or read.name], "its cache is read back in 16 bits")
    return gm


def _reason_to_leave(found: FoundAttention) -> str | None:
    (key, key_turned), (values, values_turned) = read_of(found.key), read_of(found.value)
    if not (is_call(key, kv_read) and is_call(values, kv_read)):
        return f"{found.cache}: left to PyTorch"
    if (key_turned is None) != (values_turned is None):
        return "of keys and values, only one is rotated: left to PyTorch"
    if key.args[4:] != values.args[4:]:
        return "keys and values are read at different lengths: left to PyTorch"
    if found.is_causal:
        return "is_causal=True on a whole cache aligns the first token with the first key"
    if value(found.node).dtype != value(found.query).dtype:
        return f"it returns {value(found.node).dtype} for queries in {value(found.query).dtype}"
    for read in (key, values):
        for later in _between(read, found.node):
            written = mutates(later)
            if any(operand in written for operand in read.all_input_nodes):
                return f"{later.name} writes to the cache after it was read"
    return None


def _between(first: Node, last: Node) -> Iterator[Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _fuse(found: FoundAttention, record: Record) -> None:
    (key, turned), (values, _) = read_of(found.key), read_of(found.value)
    key_codes, key_scale, key_recent, rope, length, *_, bits, _ = key.args
    value_codes, value_scale, value_recent, *_ = values.args
    graph = found.node.graph
    with graph.inserting_before(found.node):
        visible = found.mask
        if found.hidden is not None:
            visible = call(graph, torch.logical_not, (found.hidden,), found.node)
        mask = match_mask(visible)
        query = found.query if turned is None else _turned(found.query, found.query, turned)
        fused = call(
            graph,
            attention,
            (
                query,
                *(key_codes, key_scale, value_codes, value_scale, key_recent, value_recent),
                *(rope, length, mask.position, joined(mask.rest, found.node)),
                *(bits, mask.window, found.scale, found.softcap),
            ),
            like=found.node,
        )
        out = fused if turned is None else _turned(fused, found.node, turned, inverse=True)
    fused.meta["atom_attention"] = found
    if visible is not None:
        erase_unused(visible)
    found.node.replace_all_uses_with(out)
    erase_unused(found.node)
    seen = ["causal"] if mask.position is not None else []
    seen += [f"the last {mask.window} tokens"] if mask.window else []
    seen += ["a mask"] if mask.rest else []
    record.remark([found.name], f"reads kv{bits} codes; visible: {', '.join(seen) or 'all'}")
    if turned is not None:
        record.remark([found.name], "queries and results are rotated, by operators of their own")


def _turned(x: Node, like: Node, rotation: Node, inverse: bool = False) -> Node:
    """x through `rotation`, a rotate, forwards or back, in its own dtype."""
    _, *blocks, _ = rotation.args
    turned = call(x.graph, rotate, (x, *blocks, inverse), like)
    dtype = value(x).dtype
    if value(turned).dtype == dtype:
        return turned
    return call(x.graph, torch.Tensor.to, (turned, dtype), like)
