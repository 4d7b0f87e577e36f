"""Recognises what an attention mask says: causal, a sliding window, padding, or something else."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .graphs import argument, call, is_call, is_tensor, mutates, value

_AND = (
    operator.and_,
    torch.logical_and,
    torch.bitwise_and,
    "logical_and",
    "bitwise_and",
    "__and__",
)
_LE, _GE = (operator.le, torch.le, "le"), (operator.ge, torch.ge, "ge")
_GT, _LT = (operator.gt, torch.gt, "gt"), (operator.lt, torch.lt, "lt")
NOT = (operator.invert, torch.logical_not, torch.bitwise_not, "logical_not", "__invert__")
_SUB = (operator.sub, torch.sub, "sub")
_INDEXING = (operator.getitem, "view", "reshape", "unsqueeze", torch.unsqueeze, "expand")
_ONES = (torch.ones, torch.ones_like, "new_ones")


@dataclass(frozen=True, eq=False)
class FoundMask:
    """The arguments of `atom::attention` that say the same; `rest`: terms it takes as a mask."""

    position: Node | None = None
    window: int = 0
    rest: tuple[Node, ...] = ()


def match_mask(mask: Node | None) -> FoundMask:
    """Splits a mask `(*, Q, positions)` into its terms; those not known stay in `rest`.

    keys <= queries  &  keys > queries - window  &  padding[batch, keys]  &  ...

    A float mask that is 0 where a boolean one is true, and very negative elsewhere, is read as that
    one. They differ in rows that see nothing: those get zeros then, and no average over everything.
    """
    if mask is None:
        return FoundMask()
    whole = mask
    if value(mask).dtype != torch.bool:
        condition = _condition(mask)
        if condition is None:
            return FoundMask(rest=(whole,))
        whole = condition
    position: Node | None = None
    window, causal = 0, False
    rest: list[Node] = []
    for term in _terms(whole):
        if not is_tensor(term):
            return FoundMask(rest=(whole,))
        if last := _match_causal(term):
            if position is not None and position is not last:
                return FoundMask(rest=(whole,))
            position, causal = last, True
        elif found := _match_window(term):
            if position is not None and position is not found[0]:
                return FoundMask(rest=(whole,))
            position, window = found[0], min(window or found[1], found[1])
        elif not (is_call(term, *_ONES)):
            rest.append(term)
    if not causal:
        return FoundMask(rest=(whole,))
    return FoundMask(position, window, tuple(rest))


def joined(terms: tuple[Node, ...], like: Node) -> Node | None:
    """One mask of all terms, of four dimensions, at the insertion point."""
    if not terms:
        return None
    mask, *others = terms
    for other in others:
        mask = call(like.graph, torch.logical_and, (mask, other), like)
    while value(mask).dim() < 4:
        mask = call(like.graph, torch.unsqueeze, (mask, 0), like)
    return mask


def _condition(mask: Any) -> Node | None:
    """where(condition, 0, very negative) -> condition."""
    mask = _strip(mask)
    if is_call(mask, torch.where) and len(mask.args) == 3:
        condition, zero, low = (_strip(argument) for argument in mask.args)
        if _constant(zero) == 0 and (_constant(low) or 0.0) <= -1e4:
            return condition if is_tensor(condition) else None
    return None


def _constant(node: Any) -> float | None:
    if is_call(node, torch.tensor):
        node = node.args[0]
    return float(node) if isinstance(node, int | float) else None


def _terms(node: Any) -> list[Node]:
    node = _strip(node)
    if is_call(node, *_AND) and len(node.args) == 2:
        return [*_terms(node.args[0]), *_terms(node.args[1])]
    return [node]


def _strip(node: Any) -> Any:
    """Past what repeats a mask or casts it to bool, as long as it stays a mask."""
    while (
        is_call(node, "expand", "expand_as", "contiguous", "to", "bool")
        and is_tensor(node.args[0])
        and value(node.args[0]).dtype == value(node).dtype
    ):
        node = node.args[0]
    return node


def _match_causal(term: Node) -> Node | None:
    """keys <= queries, queries >= keys or not keys > queries -> the queries' positions (Q,)."""
    negated = is_call(term, *NOT)
    compared = term.args[0] if negated else term
    if not isinstance(compared, Node) or len(compared.args) != 2:
        return None
    if is_call(compared, *(_GT if negated else _LE)):
        keys, queries = compared.args
    elif is_call(compared, *(_LT if negated else _GE)):
        queries, keys = compared.args
    else:
        return None
    return _along_queries(queries) if _counts_keys(keys) else None


def _match_window(term: Node) -> tuple[Node, int] | None:
    """keys > queries - window, or queries - window < keys -> (the queries' positions, window)."""
    if len(term.args) != 2:
        return None
    if is_call(term, *_GT):
        keys, bound = term.args
    elif is_call(term, *_LT):
        bound, keys = term.args
    else:
        return None
    window = argument(bound, 1, "other") if is_call(bound, *_SUB) else None
    if not isinstance(window, int) or not _counts_keys(keys):
        return None
    queries = _along_queries(bound.args[0])
    return None if queries is None else (queries, window)


def _counts_keys(node: Any) -> bool:
    """0, 1, 2, ... along the last dimension, and one long in all others."""
    if not is_tensor(node) or _size(node) != value(node).shape[-1]:
        return False
    numbers = _vector(node)
    while is_call(numbers, operator.add, torch.add) and argument(numbers, 1, "other") == 0:
        numbers = numbers.args[0]
    return bool(
        is_call(numbers, torch.arange)
        and len(numbers.args) == 1
        and not {"start", "step", "end"} & set(numbers.kwargs)
        and value(numbers).shape[0] == value(node).shape[-1]
    )


def _along_queries(node: Any) -> Node | None:
    """Positions that change along the last dimension but one alone -> the vector of them."""
    if not is_tensor(node) or value(node).dim() < 2:
        return None
    if _size(node) != value(node).shape[-2]:
        return None
    vector = _vector(node)
    if vector is None or value(vector).shape[0] != value(node).shape[-2]:
        return None
    # a view of the cache's length would, by the time attention runs, have grown with it
    owned = is_call(vector, torch.add, torch.sub, torch.arange) or (
        vector.op == "placeholder" and not any(vector in mutates(user) for user in vector.users)
    )
    return vector if owned and value(vector).dtype == torch.int64 else None


def _size(node: Node) -> Any:
    """The number of elements, a symbol where a shape is one."""
    return math.prod(value(node).shape)


def _vector(node: Any) -> Any:
    """The vector that was given dimensions of one to become `node`, or None."""
    while is_tensor(node) and value(node).dim() > 1:
        if not is_call(node, *_INDEXING) or not is_tensor(node.args[0]):
            return None
        if is_call(node, operator.getitem):
            index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
            if not all(one is None or one == slice(None) for one in index):
                return None
        if _size(node.args[0]) != _size(node):
            return None
        node = node.args[0]
    return node if is_tensor(node) and value(node).dim() == 1 else None
