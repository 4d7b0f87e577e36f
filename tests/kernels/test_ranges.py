from __future__ import annotations

import torch

from atom_compile.kernels.ranges import placed
from atom_compile.kernels.reorder import reorder

X, ORDER = torch.randn(3, 8), torch.arange(7, -1, -1, dtype=torch.int32)


def test_a_placed_operator_computes_the_same_inside_a_range_of_its_name() -> None:
    operator = placed(reorder, "model.layers.0.mlp")
    with torch.profiler.profile() as profile:
        result = operator(X, ORDER)
    torch.testing.assert_close(result, reorder(X, ORDER), rtol=0, atol=0)
    (outer,) = (one for one in profile.events() if one.name == "model.layers.0.mlp: atom.reorder")
    assert [one.name for one in outer.cpu_children] == ["atom::reorder"]


def test_one_place_is_one_operator() -> None:
    assert placed(reorder, "a.b") is placed(reorder, "a.b")
    assert placed(reorder, "a.b") is not placed(reorder, "a.c")
    assert placed(reorder, "")._schema.name == "atom_at::model__reorder"


def test_it_is_a_valid_operator() -> None:
    torch.library.opcheck(placed(reorder, "x"), (X, ORDER))
