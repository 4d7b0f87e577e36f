"""Products whose tiles are shared by programs, and how those know who is the last of them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from .launching import Buffer, Launch, buffer


class Arrivals:
    """Where programs that share a tile count each other: zeros, which every launch leaves zeroed.

    Launches on one stream are in order and share their counters. A captured launch may be replayed
    on any stream, beside anything but its own graph: it gets counters that no other launch has.
    """

    MOST_TILES = 1056  # of two rounds of an H100, for four blocks of outputs each

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of_stream: dict[int, Tensor] = {}
        self._unused: list[Tensor] | None = None
        self.none = self._zeros(0).float(), self._zeros(0)
        """Partial sums and counters of a launch that shares no tiles."""

    def counters(self, tiles: int) -> Tensor:
        if self._device.type != "cuda" or tiles > self.MOST_TILES:
            return self._zeros(tiles)
        if torch._C._cuda_isCurrentStreamCapturing():
            # without a spare row the graph zeroes its own at every replay, for 1 us a launch
            return self._unused.pop() if self._unused else self._zeros(tiles)
        # torch.cuda.current_stream() would make an object, for several times as long
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        if stream not in self._of_stream:
            if self._unused is None:
                self._unused = self._rows_outside_of_pools()
            if not self._unused:
                return self._zeros(tiles)
            self._of_stream[stream] = self._unused.pop()
        return self._of_stream[stream]

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Takes back what was captured meanwhile, by graphs that are not replayed any more."""
        unused = None if self._unused is None else list(self._unused)
        yield
        if unused is not None:
            kept = {row.data_ptr() for row in self._of_stream.values()}
            self._unused = [row for row in unused if row.data_ptr() not in kept]

    def _rows_outside_of_pools(self) -> list[Tensor]:
        """Inductor's CUDA graphs, while they warm up, give what a thread allocates to a pool of
        their own, where nothing may stay: so another thread allocates."""

        def allocate() -> list[Tensor]:
            rows = self._zeros(4096, self.MOST_TILES)
            torch.cuda.synchronize(self._device)
            return list(rows)

        with ThreadPoolExecutor(max_workers=1) as elsewhere:
            return elsewhere.submit(allocate).result()

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self._device)


arrivals_of = functools.cache(Arrivals)


class Sharing(NamedTuple):
    """How the programs of one launch share tiles."""

    partial: Buffer  # their sums
    tiles: int

    def begin(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Partial sums and arrivals for a call whose tensors are where x is."""
        arrivals = arrivals_of(x.device)
        if self.tiles == 0:
            return arrivals.none
        return self.partial.beside(x), arrivals.counters(self.tiles)


ALONE = Sharing(buffer(0, dtype=torch.float32), 0)


class Product(NamedTuple):
    """A launch of a kernel that multiplies; its last pointers are those of `multiply`."""

    out: Buffer
    sharing: Sharing
    launch: Launch

    def multiply(
        self, x: Tensor, operands: Sequence[Tensor | None], bias: Tensor | None,
        residual: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """residual: of the output's shape, or expanded to it; operands: x among them."""
        out = self.out.beside(x)
        if residual is not None:
            if residual.shape != out.shape:  # to expand it takes the host 3 us
                residual = residual.expand(out.shape)
            residual = residual.contiguous()
        self.launch(*operands, bias, residual, out, *self.sharing.begin(x))
        return out
