"""One spelling for what models write in many ways, so that the finders need know only one."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from .graphs import argument, is_call, is_tensor, value

LINEAR = torch._C._nn.linear

# method name or function -> the function that the finders look for, which takes the same arguments
_SPELLINGS: dict[Any, Any] = {
    operator.mul: torch.mul,
    operator.add: torch.add,
    operator.sub: torch.sub,
    operator.truediv: torch.div,
    torch.true_divide: torch.div,
    operator.pow: torch.pow,
    operator.matmul: torch.matmul,
    torch.mm: torch.matmul,
    torch.layer_norm: F.layer_norm,
    torch.rms_norm: F.rms_norm,
    torch.nn.functional.sigmoid: torch.sigmoid,
    F.tanh: torch.tanh,
    **{
        name: getattr(torch, name)
        for name in (
            *("mul", "add", "sub", "div", "pow", "matmul", "mean", "var", "square"),
            *("rsqrt", "sqrt", "reciprocal", "sigmoid", "relu", "tanh"),
        )
    },
    "true_divide": torch.div,
    "mm": torch.matmul,
}
_IN_PLACE = {
    operator.iadd: torch.add,
    operator.imul: torch.mul,
    operator.isub: torch.sub,
    operator.itruediv: torch.div,
    "add_": torch.add,
    "mul_": torch.mul,
}
# by itself or in place, told by an argument; gates.py
_ACTIVATIONS = {F.relu: torch.relu, F.silu: F.silu}
_CASTS = ("to", "float", "half", "bfloat16", "double", "type", "type_as")
_TRANSPOSES = ("t", "T", "mT", "transpose", torch.t, torch.transpose)


def canonicalize(gm: GraphModule) -> GraphModule:
    """Rewrites spellings, never results. Must run first.

    x.pow(2), x ** 2, x * x, torch.square(x)         ->  torch.pow(x, 2)
    x.float(), x.to(torch.float32), x.type_as(y)     ->  x.to(dtype), or x if it has that dtype
    x @ w.T, torch.mm(x, w.t()), addmm(b, x, w.t())  ->  linear(x, w, b)
    x += y, where nothing else can see x             ->  torch.add(x, y)
    relu(x, inplace=True), likewise                  ->  torch.relu(x)
    dropout in eval mode                             ->  its input
    """
    for node in list(gm.graph.nodes):
        if node.op in ("call_function", "call_method") and is_tensor(node):
            _respell(node)
    for node in list(gm.graph.nodes):
        if is_call(node, torch.matmul, torch.addmm):
            _as_linear(node)
    return gm


def _respell(node: Node) -> None:
    if node.op == "call_method" and node.target in _CASTS:
        _respell_cast(node)
    elif is_call(node, F.dropout, torch.dropout) and _is_off(node):
        node.replace_all_uses_with(node.args[0])
        node.graph.erase_node(node)
    elif node.target in _ACTIVATIONS:
        if not argument(node, 1, "inplace", False) or _owns_input(node):
            node.target = _ACTIVATIONS[node.target]
            node.args, node.kwargs = node.args[:1], {}
    elif node.target in _IN_PLACE and _owns_input(node):
        _retarget(node, _IN_PLACE[node.target])
    elif node.target in _SPELLINGS:
        _retarget(node, _SPELLINGS[node.target])
    if is_call(node, torch.square) or (
        is_call(node, torch.mul) and len(node.args) == 2 and node.args[0] is node.args[1]
    ):
        node.args = (node.args[0], 2)
        node.target = torch.pow


def _retarget(node: Node, target: Any) -> None:
    node.op = "call_function"
    node.target = target
    kwargs = dict(node.kwargs)
    if "other" in kwargs and len(node.args) == 1:
        node.args = (node.args[0], kwargs.pop("other"))
    if target is F.layer_norm:  # torch's own is told whether cuDNN may compute it, too
        node.args = node.args[:5]
        kwargs.pop("cudnn_enable", None)
    node.kwargs = kwargs


def _respell_cast(node: Node) -> None:
    source = node.args[0]
    before, after = value(source), value(node)
    if before.device != after.device or node.kwargs.get("memory_format") is not None:
        return
    if before.dtype == after.dtype and not node.kwargs.get("copy"):
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)
        return
    node.target = "to"
    node.args, node.kwargs = (source, after.dtype), {}


def _is_off(dropout: Node) -> bool:
    training = dropout.kwargs.get("training", dropout.args[2] if len(dropout.args) > 2 else True)
    probability = dropout.kwargs.get("p", dropout.args[1] if len(dropout.args) > 1 else 0.5)
    return training is False or probability == 0.0


_FRESH = (LINEAR, F.embedding, torch.add, torch.mul, torch.sub, torch.div, torch.matmul)


def _owns_input(node: Node) -> bool:
    """Whether an in-place operation may make a new tensor: its input is new and not read later."""
    target = node.args[0]
    if not is_call(target, *_FRESH) or value(target).dtype != value(node).dtype:
        return False
    later = False
    for other in node.graph.nodes:
        if other is node:
            later = True
        elif later and other in target.users:
            return False
    # an earlier reader may have made a view of it
    return all(
        user is node or value(user)._base is None for user in target.users if is_tensor(user)
    )


def _as_linear(node: Node) -> None:
    bias, x, matrix = (None, *node.args) if is_call(node, torch.matmul) else node.args
    if node.kwargs or not _is_transpose(matrix) or value(x).dim() < 2:
        return
    weight = matrix.args[0]
    if value(weight).dim() == 2:
        node.target = LINEAR
        node.args = (x, weight, bias)
        if not matrix.users:
            node.graph.erase_node(matrix)


def _is_transpose(node: Any) -> bool:
    if is_call(node, getattr):
        return node.args[1] in ("T", "mT")
    return is_call(node, *_TRANSPOSES) and value(node).dim() == 2
