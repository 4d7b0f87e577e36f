"""Puts an operator into the `atom::` namespace: schema, fake, reference and GPU kernel at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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

    inlined: on a CPU, whether Inductor compiles the reference or calls it as it is.
    """
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    _LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"atom::{name}", fake, lib=_LIBRARY)
    operator: torch._ops.OpOverload = getattr(torch.ops.atom, name).default
    # Inductor calls those that write in place as they are
    if inlined and not operator._schema.is_mutable:
        REFERENCES[operator] = reference
    return operator


def define_composite(schema: str, function: Callable[..., Any]) -> torch._ops.OpOverload:
    """Registers `atom::<schema>` as a name for other operators: whatever compiles it sees those."""
    _LIBRARY.define(schema)
    name = schema.partition("(")[0]
    _LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    operator: torch._ops.OpOverload = getattr(torch.ops.atom, name).default
    return operator
