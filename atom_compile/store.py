"""Packed weights, made once for a model, shared by its graphs, kept while the weights live."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils.weak import WeakIdKeyDictionary

from .passes.derived import Derived

Fingerprint = tuple[int, int, int]


def fingerprint(tensor: Tensor) -> Fingerprint:
    """Changes with the weight: another tensor, in-place updates, new storage (`.data`, `.to()`)."""
    version = 0 if tensor.is_inference() else tensor._version  # inference tensors count no versions
    return id(tensor), version, tensor.data_ptr()


class _Entry(NamedTuple):
    fingerprints: tuple[Fingerprint, ...]
    # all sources but the first; kept so that an id that was reused is not mistaken for the tensor
    others: tuple[weakref.ref[Tensor], ...]
    tensors: tuple[Tensor | None, ...]


class PackedStore:
    """Maps (weights, what is derived from them) to tensors; an entry dies with its first weight."""

    def __init__(self) -> None:
        self._entries: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self.computed = 0
        """How many results were computed so far, as opposed to found."""

    def __len__(self) -> int:
        """The number of weights that something was derived from."""
        return len(self._entries)

    def get(self, derived: Derived, tensors: Mapping[Node, Tensor]) -> tuple[Tensor | None, ...]:
        sources = [tensors[node] for node in derived.sources]
        prints = tuple(fingerprint(source) for source in sources)
        entries: dict[Hashable, _Entry] = self._entries.setdefault(sources[0], {})
        key = derived.signature(), tuple(id(source) for source in sources)
        entry = entries.get(key)
        if (
            entry is None
            or entry.fingerprints != prints
            or any(other() is None for other in entry.others)
        ):
            with torch.no_grad():
                computed = derived.compute(tensors)
            entry = _Entry(prints, tuple(weakref.ref(source) for source in sources[1:]), computed)
            entries[key] = entry
            self.computed += 1
        return entry.tensors


STORE = PackedStore()
"""One for the process, since several compilations of a model share what was packed."""


class Dispatcher:
    """The function that Dynamo calls: it brings the packed form of the very weights it is given."""

    def __init__(
        self,
        compiled: Callable[..., object],
        arguments: Sequence[Node],
        inputs: Sequence[int | tuple[Derived, int]],
    ) -> None:
        """Ties a compiled graph to where its inputs come from.

        arguments: the placeholders that a call fills, in order.
        inputs: what the compiled graph takes, in order: an argument, by number, or a field of
            something derived from arguments.
        """
        wanted = {node for one in inputs if not isinstance(one, int) for node in one[0].sources}
        self._sources = [(node, number) for number, node in enumerate(arguments) if node in wanted]
        self._compiled = compiled
        self._inputs = tuple(inputs)
        # by the id of the first weight: 32 equal blocks share one compiled graph
        self._memo: dict[int, tuple[list[Fingerprint], list[Tensor | None]]] = {}

    def __call__(self, *args: object) -> object:
        weights: list[Tensor] = [args[number] for _, number in self._sources]  # type: ignore[misc]
        derived = iter(self._derive(weights))
        inputs = [args[one] if isinstance(one, int) else next(derived) for one in self._inputs]
        with torch.no_grad():
            return self._compiled(*inputs)

    def _derive(self, weights: list[Tensor]) -> list[Tensor | None]:
        if not weights:
            return []
        prints = [fingerprint(weight) for weight in weights]
        key = id(weights[0])
        known = self._memo.get(key)
        if known is not None and known[0] == prints:
            return known[1]
        tensors = {node: weight for (node, _), weight in zip(self._sources, weights, strict=True)}
        wanted = [one for one in self._inputs if not isinstance(one, int)]
        computed = {derived: STORE.get(derived, tensors) for derived, _ in wanted}
        results = [computed[derived][field] for derived, field in wanted]
        self._memo[key] = prints, results
        # an id is reused after its tensor's death, and packed weights must not outlive theirs
        for weight in weights:
            weakref.finalize(weight, self._memo.pop, key, None)
        return results
