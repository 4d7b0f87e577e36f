"""The operators under names that say where in the model they are, for profilers.

A range around a call would be a node without data that orders it: compilers move or drop those. A
name of its own cannot come apart from the call, so each place gets an operator

    atom_at::<place>__<operator>, with the schema of atom::<operator>

that opens the range and calls it. Inductor leaves it whole, on a CPU as well.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch

_LIBRARY = torch.library.Library("atom_at", "DEF")


def placed(operator: torch._ops.OpOverload, place: str) -> torch._ops.OpOverload:
    """`operator` in a range called "<place>: <operator>"."""
    _, _, plain = operator._schema.name.partition("::")
    title = f"{place or 'model'}: atom.{plain}"
    name = re.sub(r"\W+", "_", f"{place or 'model'}__{plain}")
    if not hasattr(torch.ops.atom_at, name):
        _define(name, operator, title)
    found: torch._ops.OpOverload = getattr(torch.ops.atom_at, name).default
    return found


def _define(name: str, operator: torch._ops.OpOverload, title: str) -> None:
    def call(*args: Any, **kwargs: Any) -> Any:
        with _range(title):
            return operator(*args, **kwargs)

    _LIBRARY.define(str(operator._schema).replace(operator._schema.name, name, 1))
    _LIBRARY.impl(name, call, "CompositeExplicitAutograd")
    torch.library.register_fake(f"atom_at::{name}", operator, lib=_LIBRARY)


@contextlib.contextmanager
def _range(title: str) -> Iterator[None]:
    """In torch.profiler's traces, and in NVTX for Nsight where there is a GPU."""
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    nvtx = torch.cuda.nvtx.range(title) if on_gpu else contextlib.nullcontext()
    with torch.profiler.record_function(title), nvtx:
        yield
