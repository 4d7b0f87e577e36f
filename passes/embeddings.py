"""Embedding tables in INT4, for those who ask for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from ..kernels.embedding import embedding
from ..kernels.packing import GroupLayout
from .derived import PackedTable, WeightRef
from .graphs import call, fake_mode, is_call, placeholder, value
from .linears import is_weight
from .record import Record


def quantize_embeddings(
    gm: GraphModule, group_size: int, bits: int, clip: float, record: Record
) -> GraphModule:
    """Needs canonicalization.

    embedding(ids, table)   ->   atom.embedding(ids, packed_table, scale, width, dtype)
    """
    for node in list(gm.graph.nodes):
        if is_call(node, F.embedding, torch.embedding):
            reason = _reason_to_leave(node, group_size)
            if reason:
                record.remark([node.name], f"embedding left as it was: {reason}")
            else:
                _replace(node, group_size, bits, clip, record)
    return gm


def _reason_to_leave(node: Node, group_size: int) -> str | None:
    table = node.args[1]
    if not is_weight(table):
        return "its table is computed or passed in at run time"
    if any(argument is not None for argument in node.args[3:4]) or node.kwargs.get("max_norm"):
        return "it renormalizes its table (max_norm)"
    if value(table).shape[1] < group_size:
        return f"it is narrower than one group of {group_size}"
    return None


def _replace(node: Node, group_size: int, bits: int, clip: float, record: Record) -> None:
    ids, table = node.args[:2]
    assert isinstance(table, Node)
    rows, width = value(table).shape
    layout = GroupLayout(width, group_size, 0)
    packed = PackedTable(WeightRef(table, table.name, False), layout, bits, clip)
    with fake_mode(node.graph):
        device = value(table).device
        shape = (layout.num_groups, rows)
        weight = torch.empty(*shape, group_size // 2, dtype=torch.uint8, device=device)
        scale = torch.empty(*shape, dtype=torch.bfloat16, device=device)
    inputs = (
        placeholder(node.graph, "table", weight, packed, 0),
        placeholder(node.graph, "table_scale", scale, packed, 1),
    )
    with node.graph.inserting_before(node):
        arguments = (ids, *inputs, width, value(node).dtype)
        looked_up = call(node.graph, embedding, arguments, like=node)
    node.replace_all_uses_with(looked_up)
    node.graph.erase_node(node)
    record.say([table.name], f"embedding table packed to {bits} bits")
