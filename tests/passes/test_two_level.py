"""Schemes with two-level scales: the product that passes insert, and what it is packed from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from atom_compile import Scheme, calibrate, explain
from atom_compile.errors import OptionError
from atom_compile.passes.derived import PackedLinear

from ..capturing import atom_operators, relative_error, rewrites, token_batch
from ..models import HandWritten, tiny_llama

TWO_LEVEL = Scheme.preset("w4a8-two-level")


@pytest.mark.parametrize("rotation", [None, 128])
def test_llama_is_fused_as_with_a_scale_a_group(rotation: int | None) -> None:
    model, ids = tiny_llama(), token_batch()
    scheme = replace(TWO_LEVEL, rotation=rotation)
    got = atom_operators(model, ids, scheme=scheme)
    assert got.pop("atom.two_level_linear") == 8
    wanted = atom_operators(model, ids, scheme="w4a8")
    assert wanted.pop("atom.linear") == 8 and got == wanted


def test_before_and_after() -> None:
    (run,) = rewrites(HandWritten(depth=1, bias=True).eval(), token_batch(), scheme=TWO_LEVEL)
    products = [node for node in run.gm.graph.nodes if "atom_packed" in node.meta]
    assert len(products) == 4
    for node in products:
        packed: PackedLinear = node.meta["atom_packed"]
        codes, scale, *weight = (
            one.meta["example_value"] if isinstance(one, torch.fx.Node) else one
            for one in node.args
        )
        # codes are as wide as with a scale a group, but have two scales
        assert codes.shape[-1] == packed.layout.padded_width and scale.shape[0] == 2
        shapes = [tuple(one.shape) for one in weight[:5]]
        G, N, outliers = packed.layout.num_groups, packed.out_features, weight[3].shape[1]
        assert shapes == [(G, N, 64), (G, N), (N,), (N, outliers), (N,)]
        assert weight[1].dtype == torch.int8
    assert [node.args[-2] is not None for node in products] == [False, True, False, True]


@torch.no_grad()
@pytest.mark.parametrize("rotation", [None, 128])
def test_a_compiled_model(rotation: int | None, graphs_run_eagerly: list[Any]) -> None:
    model, ids = tiny_llama(), token_batch()
    wanted = model(ids).logits
    errors = {}
    for name, scheme in {"groups": "w4a8", "two": replace(TWO_LEVEL, rotation=rotation)}.items():
        torch._dynamo.reset()
        model.compile(backend="atom", options={"scheme": scheme, "strict": True})
        errors[name] = relative_error(model(ids).logits, wanted)
    assert errors["two"] < 1.2 * errors["groups"]


@torch.no_grad()
def test_gptq_rounds_to_two_levels(graphs_run_eagerly: list[Any], tmp_path: Any) -> None:
    model, ids = tiny_llama(layers=1), token_batch(4, 64)
    wanted = model(ids).logits
    recipe = calibrate(model, [ids], TWO_LEVEL, progress=False)
    recipe.save(tmp_path / "recipe.safetensors")
    errors = []
    for options in ({"scheme": TWO_LEVEL}, {"recipe": tmp_path / "recipe.safetensors"}):
        torch._dynamo.reset()
        model.compile(backend="atom", options={**options, "strict": True})
        errors.append(relative_error(model(ids).logits, wanted))
    assert errors[1] < 0.95 * errors[0]


def test_explain_names_operator_and_bytes() -> None:
    report = explain(tiny_llama(), token_batch(), options={"scheme": TWO_LEVEL})
    down = next(layer for layer in report.layers if "down_proj" in layer.name)
    assert down.operator == "atom.two_level_linear + residual"
    N, K, outliers = down.out_features, down.in_features, down.outlier_channels or 0
    groups = -(-(K - outliers) // 128)
    assert down.weight_bytes_after == N * (groups * 65 + 4 + outliers + 4)


@pytest.mark.parametrize("field", [{"activation_bits": 4}, {"weight_bits": 3}, {"int8_share": 0.5}])
def test_what_it_does_not_go_with(field: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="two_level"):
        replace(TWO_LEVEL, **field)
