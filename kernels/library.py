"""Puts an operator into the `atom::` namespace: schema, fake, reference and GPU kernel at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("atom", "DEF")
REFERENCES: dict[torch._ops.OpOverload, Callable[..., Any]] = {}
"""Operator -> reference. On a CPU, Inductor compiles these in place of the operators."""


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cuda: Callable[..., Any],
    inlined: bool = True,
) -> torch._ops.OpOverload:
    """Registers `atom::<schema>`. `custom_op` would do so too, but costs 30 us more per call.

    cuda: the launcher; its first argument is a tensor, and the kernels run where that one lies.
    inlined: on a CPU, whether Inductor compiles the reference or calls it as it is.
    """
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, _where_its_tensors_are(cuda), "CUDA")
    torch.library.register_fake(f"atom::{name}", fake, lib=_LIBRARY)
    operator: torch._ops.OpOverload = getattr(torch.ops.atom, name).default
    # Inductor calls those that write in place as they are
    if inlined and not operator._schema.is_mutable:
        REFERENCES[operator] = reference
    return operator


def _where_its_tensors_are(launch: Callable[..., Any]) -> Callable[..., Any]:
    """`launch` with the GPU of its first argument as the current one.

    Triton launches on the current device, whichever its arguments are on: a model over several GPUs
    has the first one as the current one all along.
    """

    @functools.wraps(launch)
    def guarded(first: Tensor, *rest: Any, **named: Any) -> Any:
        index = first.get_device()
        # the tensor tells that CUDA is initialized; current_device() would ask about that first and
        # take several times as long, at every call of every operator
        if index == torch._C._cuda_getDevice():
            return launch(first, *rest, **named)
        with torch.cuda.device(index):
            return launch(first, *rest, **named)

    return guarded


def define_composite(schema: str, function: Callable[..., Any]) -> torch._ops.OpOverload:
    """Registers `atom::<schema>` as a name for other operators: whatever compiles it sees those."""
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    operator: torch._ops.OpOverload = getattr(torch.ops.atom, name).default
    return operator
