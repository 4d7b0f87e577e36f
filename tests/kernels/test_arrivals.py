"""Counters that captured launches were given come back when their graphs are gone."""

from __future__ import annotations

import pytest
import torch

from atom_compile.kernels.arrivals import Arrivals


def test_what_was_lent_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    arrivals = Arrivals(torch.device("cpu"))
    arrivals._device = torch.device("cuda", 0)  # with its counters on the CPU
    rows = list(torch.zeros(8, Arrivals.MOST_TILES, dtype=torch.int32))
    arrivals._unused = list(rows)
    capturing = False
    monkeypatch.setattr(
        torch._C, "_cuda_isCurrentStreamCapturing", lambda: capturing, raising=False
    )
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 7, raising=False)
    capturing = True
    kept = arrivals.counters(1)  # of a graph that stays
    with arrivals.lent():
        capturing = False
        eager = arrivals.counters(1)
        capturing = True
        for _ in range(3):
            arrivals.counters(1)
    left = {row.data_ptr() for row in arrivals._unused}
    assert left == {row.data_ptr() for row in rows} - {kept.data_ptr(), eager.data_ptr()}
    capturing = False
    assert arrivals.counters(1) is eager
