"""Progress bars. They are for people: what a program prints, another program may read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from rich import progress
from rich.console import Console

T = TypeVar("T")


def track(
    items: Iterable[T], description: str, *, shown: bool = True, total: float | None = None
) -> Iterable[T]:
    """The items, with a bar on stderr until the last one. total: where they do not tell it."""
    return progress.track(
        items,
        description,
        total=total,
        console=Console(stderr=True),
        transient=True,
        disable=not shown,
    )
