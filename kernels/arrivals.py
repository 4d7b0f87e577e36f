"""Counters by which the programs that share a tile of a product know who is the last of them."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


class Arrivals:
    """Where programs that share a tile count each other: zeros, which every launch leaves zeroed.

    Launches on one stream are in order and share their counters. A captured launch may be replayed
    on any stream, beside anything but its own graph: it gets counters that no other launch has.
    """

    MOST_TILES = 544  # those of nearly two rounds of an H100, for two warpgroups each

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._of_stream: dict[int, Tensor] = {}
        self._unused: list[Tensor] | None = None
        self._nothing = self._zeros(0)

    def counters(self, tiles: int) -> Tensor:
        if tiles == 0:
            return self._nothing
        if self._device.type != "cuda" or tiles > self.MOST_TILES:
            return self._zeros(tiles)
        if torch.cuda.is_current_stream_capturing():
            # without a spare row the graph zeroes its own at every replay, for 1 us a launch
            return self._unused.pop() if self._unused else self._zeros(tiles)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        if stream not in self._of_stream:
            if self._unused is None:
                self._unused = self._rows_outside_of_pools()
            if not self._unused:
                return self._zeros(tiles)
            self._of_stream[stream] = self._unused.pop()
        return self._of_stream[stream]

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
