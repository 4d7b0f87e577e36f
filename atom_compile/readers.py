"""Which linears read one activation, without a compiler and without their weights."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .recipe import Recipe


def group_readers(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> list[list[str]]:
    """The names of `linears`, those that read the same activation together, in the model's order.

    Runs `model(*args, **kwargs)` once on a CPU, with zeros that take no memory for weights and with
    nothing computed in the linears: a model of any size, on any device, meta included. Raises
    whatever the model raises. Linears that were not reached, or read several activations not all of
    which they share, stand alone.
    """
    seen: list[tuple[str, Tensor]] = []
    parameters = _zeros(dict(model.named_parameters()))
    buffers = {name: _buffer(one) for name, one in model.named_buffers()}
    with torch.no_grad(), torch.device("cpu"), contextlib.ExitStack() as stack:
        for name, linear in linears.items():
            stack.enter_context(_observed(linear, name, seen))
        torch.func.functional_call(
            model, parameters | buffers, tuple(args), dict(kwargs), strict=False
        )
    reads: dict[str, set[Any]] = defaultdict(set)
    for name, x in seen:  # which holds every x, so that no place in memory was used twice
        reads[name].add((x.data_ptr(), x.shape, x.stride(), x.dtype, x._version))
    together: dict[Any, list[str]] = defaultdict(list)
    for name in linears:
        together[frozenset(reads[name]) or name].append(name)
    return list(together.values())


def group_by_recipe(
    names: Sequence[str], recipe: Recipe, alone: Collection[str] = ()
) -> list[list[str]]:
    """As `group_readers`, of what calibration saw: one activation has one Hessian diagonal.

    alone: those that share none, even where they saw the same.
    """
    together: dict[bytes, list[str]] = defaultdict(list)
    for name in names:
        known = {} if name in alone else recipe.hessian_diagonal
        diagonal = known.get(f"{name}.weight")
        key = name.encode() if diagonal is None else diagonal.numpy().tobytes()
        together[key].append(name)
    return list(together.values())


def _zeros(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In place of each parameter: one number, or where products want true strides one buffer."""
    stacks = [one for one in parameters.values() if one.dim() > 2]
    largest = max((one.numel() for one in stacks), default=0)
    shared = {one.dtype: torch.zeros(largest, dtype=one.dtype, device="cpu") for one in stacks}
    return {
        name: shared[one.dtype][: one.numel()].view(one.shape)
        if one.dim() > 2
        else torch.zeros((), dtype=one.dtype, device="cpu").expand(one.shape)
        for name, one in parameters.items()
    }


def _buffer(buffer: Tensor) -> Tensor:
    on_meta = buffer.is_meta
    return torch.zeros_like(buffer, device="cpu") if on_meta else buffer.detach().cpu().clone()


@contextlib.contextmanager
def _observed(linear: nn.Module, name: str, seen: list[tuple[str, Tensor]]) -> Iterator[None]:
    """Its calls are noted, and give zeros."""
    weight: Any = linear.weight
    out_features = weight.shape[1] if is_conv1d(linear) else weight.shape[0]

    def forward(x: Tensor) -> Tensor:
        seen.append((name, x))
        return x.new_zeros(*x.shape[:-1], out_features)

    own = linear.__dict__.get("forward")
    linear.forward = forward
    try:
        yield
    finally:
        del linear.forward
        if own is not None:
            linear.forward = own


def is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear, which stores its weight as (K, N)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
