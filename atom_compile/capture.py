"""Runs a model once through Dynamo with a backend of ours, and leaves nothing compiled behind."""

from __future__ import annotations

import types
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

Backend = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


def captured(model: Callable[..., Any], backend: Backend) -> Callable[..., Any]:
    """`model` as a function whose graphs go through `backend`.

    Dynamo keeps what it compiles with the code object that was called: this one is new, and dies
    with the function. What it learns about changing shapes it keeps by the code's name: likewise.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    code = call.__code__.replace(co_name=f"call_{uuid.uuid4().hex}")
    fresh = types.FunctionType(code, globals(), "call", None, call.__closure__)
    compiled: Callable[..., Any] = torch.compile(fresh, backend=backend)
    return compiled
