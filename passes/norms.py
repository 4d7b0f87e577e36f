"""Recognises RMSNorm and LayerNorm, as one call or written out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from .graphs import is_call, is_tensor, number, value


@dataclass(frozen=True, eq=False)
class FoundNorm:
    """The arguments of `atom::norm_quantize` that compute the same; `round_normed` as there."""

    x: Node
    weight: Node | None
    bias: Node | None
    eps: float
    center: bool
    round_normed: bool


def match_norm(y: Node) -> FoundNorm | None:
    """The norm that ends in `y`, or None."""
    if is_call(y, F.rms_norm, F.layer_norm):
        return _match_call(y)
    return _match_written_out(y)


def _match_call(y: Node) -> FoundNorm | None:
    center = y.target is F.layer_norm
    parameters = ("input", "normalized_shape", "weight", "bias", "eps") if center else (
        "input", "normalized_shape", "weight", "eps")  # fmt: skip
    arguments: dict[str, Any] = dict(zip(parameters, y.args, strict=False)) | y.kwargs
    x = arguments["input"]
    if len(arguments["normalized_shape"]) != 1:
        return None
    eps = arguments.get("eps", 1e-5 if center else None)
    if eps is None:  # torch.rms_norm's default
        eps = torch.finfo(torch.float32).eps
    eps = number(eps)
    if eps is None:
        return None
    return FoundNorm(
        x, arguments.get("weight"), arguments.get("bias"), eps, center, round_normed=False
    )


def _match_written_out(y: Node) -> FoundNorm | None:
    """[cast] ([bias +] [weight *] [cast] (h * rsqrt(mean(h^2) + eps))), in float32.

    h = [cast] x or x - mean(x)
    """
    K = value(y).shape[-1]
    node, _ = _strip_cast(y)
    node, bias = _strip_vector(node, torch.add, K)
    node, weight = _strip_vector(node, torch.mul, K)
    if bias is None and weight is None:
        node = y
    node, normed_dtype = _strip_cast(node)
    scaled = _match_scaled(node)
    if scaled is None:
        return None
    h, eps = scaled
    if value(h).dtype != torch.float32 or value(h).shape[-1] != K:
        return None
    x, center = _match_centered(h)
    x = _strip_cast(x)[0]
    rounds_to = normed_dtype or torch.float32
    if rounds_to not in (torch.float32, value(x).dtype) or not isinstance(x, Node):
        return None
    return FoundNorm(x, weight, bias, eps, center, round_normed=rounds_to == value(x).dtype)


def _strip_cast(node: Any) -> tuple[Any, torch.dtype | None]:
    if is_call(node, "to") and len(node.args) == 2 and isinstance(node.args[1], torch.dtype):
        return node.args[0], node.args[1]
    return node, None


def _strip_vector(node: Any, target: Any, K: int) -> tuple[Any, Node | None]:
    """target(vector, rest) in either order -> rest, vector of shape (K,)."""
    if is_call(node, target) and len(node.args) == 2 and not node.kwargs:
        for vector, rest in (node.args, node.args[::-1]):
            if is_tensor(vector) and tuple(value(vector).shape) == (K,) and is_tensor(rest):
                return rest, vector
    return node, None


def _match_scaled(node: Any) -> tuple[Node, float] | None:
    """h * rsqrt(mean(h^2) + eps) in any spelling -> h, eps."""
    if not is_call(node, torch.mul, torch.div) or len(node.args) != 2:
        return None
    pairs = (node.args, node.args[::-1]) if node.target is torch.mul else (node.args,)
    for h, factor in pairs:
        if not (is_tensor(h) and is_tensor(factor)):
            continue
        radicand = (
            _square_root(factor) if node.target is torch.div else _inverse_square_root(factor)
        )
        eps = _match_mean_square(radicand, h)
        if eps is not None:
            return h, eps
    return None


def _square_root(node: Any) -> Any:
    if is_call(node, torch.sqrt):
        return node.args[0]
    return node.args[0] if is_call(node, torch.pow) and node.args[1] == 0.5 else None


def _inverse_square_root(node: Any) -> Any:
    if is_call(node, torch.rsqrt):
        return node.args[0]
    if is_call(node, torch.pow) and node.args[1] == -0.5:
        return node.args[0]
    if is_call(node, torch.reciprocal):
        return _square_root(node.args[0])
    if is_call(node, torch.div) and node.args[0] in (1, 1.0):
        return _square_root(node.args[1])
    return None


def _match_mean_square(node: Any, h: Node) -> float | None:
    """mean(h^2, -1, keepdim) + eps, or var(x, biased) + eps where h = x - mean(x) -> eps."""
    eps = 0.0
    if is_call(node, torch.add) and len(node.args) == 2:
        constants = [argument for argument in node.args if not is_tensor(argument)]
        tensors = [argument for argument in node.args if is_tensor(argument)]
        constant = number(constants[0]) if len(constants) == 1 else None
        if constant is None:
            return None
        eps, node = constant, tensors[0]
    if is_call(node, torch.mean) and _over_last(node):
        square = node.args[0]
        if is_call(square, torch.pow) and square.args[1] == 2 and square.args[0] is h:
            return eps
    if is_call(node, torch.var) and _over_last(node) and _is_biased(node):
        x, center = _match_centered(h)
        if center and node.args[0] is x:
            return eps
    return None


def _over_last(node: Node) -> bool:
    source = value(node.args[0])
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    dims = (dim,) if isinstance(dim, int) else tuple(dim) if isinstance(dim, list | tuple) else ()
    return dims in ((-1,), (source.dim() - 1,)) and value(node).dim() == source.dim()


def _is_biased(variance: Node) -> bool:
    unbiased = variance.kwargs.get("unbiased", variance.args[2] if len(variance.args) > 2 else None)
    correction = variance.kwargs.get("correction")
    return unbiased is False or (correction is not None and math.isclose(float(correction), 0.0))


def _match_centered(h: Any) -> tuple[Any, bool]:
    """x - mean(x, -1, keepdim) -> x, True; anything else -> itself, False."""
    if is_call(h, torch.sub) and len(h.args) == 2:
        x, mean = h.args
        if is_call(mean, torch.mean) and mean.args[0] is x and _over_last(mean):
            return x, True
    return h, False
