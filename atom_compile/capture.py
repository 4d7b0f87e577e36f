"""Runs a model once through Dynamo with a backend of ours, and leaves nothing compiled behind."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

Backend = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


def captured(model: Callable[..., Any], backend: Backend) -> Callable[..., Any]:
    """`model` as a function whose graphs go through `backend`.

    Dynamo keeps what it compiles with the code object that was called: this one is new, and dies
    with the function.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    fresh = types.FunctionType(call.__code__.replace(), globals(), "call", None, call.__closure__)
    compiled: Callable[..., Any] = torch.compile(fresh, backend=backend)
    return compiled
