"""The nodes of a graph as plain records: what each computes, how much, and where it comes from."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from ..passes.attentions import SDPA
from ..passes.graphs import is_call, module_path, value
from ..passes.linears import is_weight
from ..passes.record import operator_name

KINDS = {
    "untouched": "left as it was",
    "reorder": "reorder",
    "quantize": "quantize",
    "int4": "low-bit operator",
    "fused": "fused operator",
    "attention": "attention and cache",
    "weight": "weight",
    "input": "input",
    "output": "output",
}
"""Kind -> what a legend calls it."""

_OPERATOR_KINDS = {
    "atom.reorder": "reorder",
    "atom.quantize": "quantize",
    "atom.quantize_e4m3": "quantize",
    "atom.linear": "int4",
    "atom.two_level_linear": "int4",
    "atom.weight_only_linear": "int4",
    "atom.float8_linear": "int4",
    "atom.embedding": "int4",
    "atom.attention": "attention",
    "atom.attention_quantize": "attention",
    "atom.kv_append": "attention",
    "atom.kv_read": "attention",
}
_LEFT = "no pass rewrites this operator here: Inductor compiles it as it is"
_LEFT_TABLE = "embedding tables are left unless option include_embeddings=True asks for them"

_MOVES_DATA = frozenset(
    (
        *("chunk", "contiguous", "expand", "flatten", "getattr", "getitem", "permute", "reshape"),
        *("split", "squeeze", "to", "transpose", "unbind", "unflatten", "unsqueeze", "view"),
        *("repeat_interleave", "cat", "stack", "embedding", "reorder", "kv_read", "kv_append"),
    )
)


def node_records(
    graph: Graph, remarks: Mapping[str, Sequence[str]], linears: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """One record per node, in order.

    remarks: by the name of the node, the linear or the module that they are about.
    linears: node -> parameter names of the linears that it computes.

    The package's docstring lists the fields.
    """
    return [_record(node, remarks, linears) for node in graph.nodes]


def give_reasons(records: Sequence[dict[str, Any]]) -> None:
    """Says of each untouched node of a final graph why it is there; a linear's remarks say so."""
    for record in records:
        if record["kind"] == "untouched":
            default = _LEFT_TABLE if record["operator"] == "embedding" else _LEFT
            record["reason"] = "; ".join(record["remarks"]) or default


def _record(
    node: Node, remarks: Mapping[str, Sequence[str]], linears: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    tensors = [one for one in _results(node) if isinstance(one, Tensor)]
    packed = node.meta.get("atom_packed")
    computes = [part.weight.name for part in packed.parts] if packed else linears.get(node.name, ())
    attention = node.meta.get("atom_attention")
    about = [attention.node.name if attention else node.name, *computes]
    if operator_name(node).endswith("softmax"):  # known by its module where it is not recognised
        about.append(module_path(node))
    said = [remark for name in about for remark in remarks.get(name, ())]
    return {
        "name": node.name,
        "op": node.op,
        "operator": operator_name(node),
        "target": str(node.target),
        "kind": kind(node),
        "module": module_path(_place(node)),
        "outputs": [
            {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": [str(size) for size in tensor.shape],
            }
            for tensor in tensors
        ],
        "bytes": _sum(_known(tensor.shape, tensor.element_size()) for tensor in tensors),
        "operations": operations(node),
        "inputs": [operand.name for operand in node.all_input_nodes],
        "source": _source(node.meta.get("stack_trace")),
        "linears": list(computes),
        "remarks": list(dict.fromkeys(said)),
        "reason": None,
    }


def kind(node: Node) -> str:
    """A key of `KINDS`."""
    if node.op == "output":
        return "output"
    if node.op in ("placeholder", "get_attr"):
        return "weight" if "atom_derived" in node.meta or is_weight(node) else "input"
    operator = operator_name(node)
    fallback = "fused" if operator.startswith("atom.") else "untouched"
    return _OPERATOR_KINDS.get(operator, fallback)


def _place(node: Node) -> Node:
    """Packed weights lie where the weights lie that they are made of."""
    derived = node.meta.get("atom_derived")
    source: Node = derived[0].sources[0] if derived else node
    return source


def _results(node: Node) -> Sequence[Any]:
    computed = value(node)
    return computed if isinstance(computed, tuple | list) else (computed,)


def operations(node: Node) -> int | None:
    """Multiplications and additions of matrix products, else one per element of the result.

    0 where data only moves, None where sizes are not known.
    """
    if node.op not in ("call_function", "call_method"):
        return 0
    if operator_name(node).removeprefix("atom.").removeprefix(".") in _MOVES_DATA:
        return 0
    results = [one for one in _results(node) if isinstance(one, Tensor)]
    if not results:
        return 0
    attention = node.meta.get("atom_attention")
    if attention is not None or is_call(node, SDPA):
        query = value(attention.query if attention else node.args[0])
        positions = value(attention.key if attention else node.args[1]).shape[2]
        return _known(query.shape, positions, 4)  # QK^T, and the weights times V
    packed = node.meta.get("atom_packed")
    if packed is not None:
        return _known(results[0].shape, packed.layout.width, 2)
    if is_call(node, F.linear, torch.matmul, torch.bmm, torch._C._nn.linear):
        return _known(results[0].shape, value(node.args[0]).shape[-1], 2)
    return _sum(_known(tensor.shape) for tensor in results)


def _known(*factors: Any) -> int | None:
    """Their product, unless a size is symbolic: reading that would fix it."""
    flat = [size for one in factors for size in (one if isinstance(one, torch.Size) else (one,))]
    return math.prod(flat) if all(type(size) is int for size in flat) else None


def _sum(numbers: Any) -> int | None:
    listed = list(numbers)
    return None if None in listed else sum(listed)


_FRAME = re.compile(r'File "(.+?)", line (\d+), in (\S+)\n[ ]*(.*)')


def _source(stack_trace: str | None) -> dict[str, Any] | None:
    """The innermost line that is not PyTorch's own."""
    frames = _FRAME.findall(stack_trace or "")
    ours = [frame for frame in frames if "/torch/" not in frame[0]]
    if not frames:
        return None
    file, line, function, code = (ours or frames)[-1]
    return {"file": _short(file), "line": int(line), "function": function, "code": code.strip()}


def _short(file: str) -> str:
    """Without what is a matter of the machine: from the package or the working directory on."""
    path = Path(file.rpartition("site-packages/")[2])
    if path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return "/".join(path.parts[-3:]) if path.is_absolute() else path.as_posix()
