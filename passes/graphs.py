"""Small tools of every pass: copy Dynamo's graph, add nodes with valid metadata, read it back."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch._dynamo.source import AttrSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from .derived import Derived


def copy_graph_module(gm: GraphModule) -> GraphModule:
    """A copy to rewrite: Dynamo reads its own graph again after the backend returns.

    Unlike `Graph.graph_copy` it keeps what AOT autograd reads off placeholders and the module.
    """
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        copy = graph.node_copy(node, copies.__getitem__)
        if hasattr(node, "_dynamo_source"):
            copy._dynamo_source = node._dynamo_source
        copy.meta.pop("grapharg", None)  # holds the real tensor, which must not outlive its model
        copies[node] = copy
    copied = GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        copied._param_name_to_source = gm._param_name_to_source
    return copied


def value(node: Any) -> Any:
    """What a node computes, as a fake tensor (or a plain value where Dynamo knows it)."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def is_tensor(node: Any) -> bool:
    return isinstance(value(node), torch.Tensor)


def fake_mode(graph: Graph) -> FakeTensorMode:
    for node in graph.nodes:
        mode = getattr(value(node), "fake_mode", None)
        if mode is not None:
            assert isinstance(mode, FakeTensorMode)
            return mode
    raise ValueError("the graph has no tensors")


def call(
    graph: Graph, target: Callable[..., Any], args: tuple[Any, ...], like: Node, **named: Any
) -> Node:
    """A new node at the insertion point, with its fake value and `like`'s place in the model.

    named: keyword arguments, constants all.
    """
    node = graph.call_function(target, args, named)
    for key in ("nn_module_stack", "source_fn_stack", "stack_trace"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    with fake_mode(graph), torch.no_grad():
        node.meta["example_value"] = target(*torch.fx.map_arg(args, value), **named)
    return node


def placeholder(graph: Graph, name: str, fake: torch.Tensor, derived: Derived, field: int) -> Node:
    """A new graph input, which the backend fills with field `field` of `derived` at each call."""
    last = list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.target = node.name  # the argument's name; of the two, only the node's was made unique
    # a source and a static input type make it a weight in AOT autograd's and the CUDA graphs' eyes
    node._dynamo_source = AttrSource(derived.sources[0]._dynamo_source, f"_atom_{node.name}")  # type: ignore[attr-defined]
    node.meta.update(
        example_value=fake,
        tensor_dict={"_dynamo_static_input_type": "unguarded"},
        atom_derived=(derived, field),
    )
    return node


def mutates(node: Node) -> set[Any]:
    """The operands that `node` writes to in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        written = [
            one.alias_info is not None and one.alias_info.is_write for one in schema.arguments
        ]
        return {argument for argument, wrote in zip(node.args, written, strict=False) if wrote}
    return set(node.args[:1]) if _named_in_place(node) else set()


def _named_in_place(node: Node) -> bool:
    """add_, operator.iadd, setitem; of names that only look alike, some too many."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
    inplace_operator = name.startswith("i") and hasattr(operator, name)
    return name.endswith("_") or inplace_operator or name == "setitem"


_FRAME_VARIABLE = re.compile(r"^L\['(self|model)'\]\.?")


def module_path(node: Node) -> str:
    """Where in the model `node` was computed: "model.layers.0.self_attn"."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0] if stack else ""
    return _FRAME_VARIABLE.sub("", str(path))


def only_used_by(node: Node, allowed: Iterable[Node]) -> bool:
    return set(node.users) <= set(allowed)


def is_call(node: Any, *targets: Any) -> bool:
    """A `call_function` of one of `targets`, or a `call_method` of one of the names among them."""
    return (
        isinstance(node, Node)
        and node.op in ("call_function", "call_method")
        and node.target in targets
    )


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, however it was passed."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def number(node: Any) -> float | None:
    """A constant. Where models differ in one, Dynamo makes it an input: reading it guards on it."""
    constant = value(node)
    return float(constant) if isinstance(constant, float | int | torch.SymFloat) else None


def swapped_dims(node: Any) -> set[int] | None:
    """The two dimensions that a transpose swaps, counted from the front; None of other nodes."""
    if is_call(node, getattr):
        return {value(node).dim() - 2, value(node).dim() - 1} if node.args[1] == "mT" else None
    if not is_call(node, "transpose", torch.transpose, "swapaxes"):
        return None
    dims = argument(node, 1, "dim0"), argument(node, 2, "dim1")
    if not all(isinstance(dim, int) for dim in dims):
        return None
    return {dim % value(node).dim() for dim in dims}


def erase_unused(node: Any) -> None:
    """Erases `node` and then what it alone read, as far as they are free of side effects."""
    if not isinstance(node, Node) or node.users or not _is_pure(node):
        return
    operands = node.all_input_nodes
    node.graph.erase_node(node)
    for operand in operands:
        erase_unused(operand)


_PURE_METHODS = (
    *("contiguous", "expand", "flatten", "masked_fill", "repeat_interleave", "reshape"),
    *("softmax", "to", "transpose", "unsqueeze", "view"),
)


def _is_pure(node: Node) -> bool:
    """Conservative: methods may write in place, so of those only a few are pure."""
    if node.op == "call_method":
        return node.target in _PURE_METHODS
    return (
        node.op == "call_function"
        and not _named_in_place(node)
        and "out" not in node.kwargs
        and not node.is_impure()
    )
