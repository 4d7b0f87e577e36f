"""Schemes with weights and activations in E2M1: what passes insert, pack, fuse and calibrate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from atom_compile import KVCache, Scheme, calibrate, explain
from atom_compile.errors import OptionError
from atom_compile.options import Options
from atom_compile.passes.derived import PackedLinear

from ..capturing import (
    atom_operators,
    error_of_fused,
    errors_of_rounding,
    reference_output,
    relative_error,
    rewrites,
    token_batch,
)
from ..models import HandWritten, tiny_llama

FP4 = Scheme.preset("w4a4-fp4")
VARIANTS = [
    FP4,
    replace(FP4, rotation=64),
    replace(FP4, int8_share=0.5),
    replace(FP4, weight_format="int"),
    replace(FP4, activation_format="int"),
    replace(FP4, activation_format="int", activation_bits=8),
]


def test_llama_is_rewritten_as_with_integers() -> None:
    model, ids = tiny_llama(), token_batch()
    for fuse in (False, True):
        of_integers = atom_operators(model, ids, scheme="w4a4", fuse=fuse)
        assert atom_operators(model, ids, scheme=FP4, fuse=fuse) == of_integers


@pytest.mark.parametrize("scheme", VARIANTS)
@pytest.mark.parametrize("fuse", [False, True])
def test_operators_say_which_format(scheme: Scheme, fuse: bool) -> None:
    model = HandWritten(depth=1, bias=True).eval()
    (run,) = rewrites(model, token_batch(), scheme=scheme, fuse=fuse)
    products = [node for node in run.gm.graph.nodes if "atom_packed" in node.meta]
    assert len(products) == (4 if fuse else 5)
    of_weights, of_activations = (
        {} if format == "int" else {"format": format}
        for format in (scheme.weight_format, scheme.activation_format)
    )
    for node in products:
        packed: PackedLinear = node.meta["atom_packed"]
        assert node.kwargs == of_weights
        assert node.args[0].args[0].kwargs == of_activations
        weight, scale = (one.meta["example_value"] for one in node.args[2:4])
        G, N = packed.layout.num_groups, packed.out_features
        assert weight.shape == (G, N, 64) and scale.shape == (G, N)


@torch.no_grad()
@pytest.mark.parametrize("scheme", VARIANTS)
def test_fusing_changes_nothing(scheme: Scheme) -> None:
    assert 1e-3 < error_of_fused(scheme) < 0.5


@torch.no_grad()
@pytest.mark.parametrize("scheme", VARIANTS[:4])
def test_gptq(scheme: Scheme, graphs_run_eagerly: list[Any], tmp_path: Any) -> None:
    nearest, by_gptq = errors_of_rounding(scheme, tmp_path)
    assert by_gptq < 0.95 * nearest


def test_a_layer_over_the_budget_gets_int8_activations() -> None:
    model, ids = tiny_llama(layers=1), token_batch(4, 64)
    recipe = calibrate(model, [ids], FP4, progress=False, error_budget=0.01)
    assert any(choice.int8_groups and not choice.keep for choice in recipe.layers.values())


def test_explain_names_formats_and_bytes() -> None:
    report = explain(tiny_llama(), token_batch(), options={"scheme": FP4})
    down = next(layer for layer in report.layers if "down_proj" in layer.name)
    of_integers = explain(tiny_llama(), token_batch(), options={"scheme": "w4a4"})
    assert (down.weight_format, down.activation_format) == ("e2m1", "e2m1")
    assert down.operator == "atom.linear + residual" and (
        down.weight_bits,
        down.activation_bits,
    ) == (4, 4)
    assert report.weight_bytes_after == of_integers.weight_bytes_after
    assert "w4a4 e2m1" in str(report) and "e2m1" not in str(of_integers)


@torch.no_grad()
def test_attention_over_a_quantized_cache_quantizes_to_it(graphs_run_eagerly: list[Any]) -> None:
    model, ids = tiny_llama(), token_batch(2, 12)
    cache = KVCache(model.config, 2, 16, "kv4", device="cpu")
    model.compile(backend="atom", options={"scheme": FP4, "strict": True})
    got = [model(piece, past_key_values=cache).logits for piece in ids.split((11, 1), dim=1)]
    nodes = [node for graph in graphs_run_eagerly for node in graph.graph.nodes]
    attended = [node for node in nodes if "attention_quantize" in str(node.target)]
    assert attended and all(node.kwargs == {"format": "e2m1"} for node in attended)
    assert relative_error(torch.cat(got, dim=1), model.forward(ids).logits) < 0.6


@torch.no_grad()
def test_inductor_compiles_it() -> None:
    torch._dynamo.reset()
    model, ids = HandWritten(depth=1).eval(), token_batch()
    options: dict[str, Any] = {"scheme": FP4, "strict": True}
    compiled = torch.compile(model, backend="atom", options=options)
    wanted = reference_output(model, ids, scheme=FP4)
    torch.testing.assert_close(compiled(ids), wanted, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("scheme", "field", "message"),
    [
        (FP4, {"activation_format": "e2m3"}, "activation_format.*e2m3.*e2m1"),
        (FP4, {"activation_format": None}, "activation_format.*None.*e2m1"),
        (FP4, {"activation_bits": 8}, "activation_bits is 8; with activation_format='e2m1'.*be 4"),
        (FP4, {"activation_bits": 16, "outlier_channels": 0}, "activation_bits is 16;.*be 4"),
        (FP4, {"weight_bits": 3}, "weight_bits is 3; with weight_format='e2m1' it must be 4"),
        (FP4, {"weight_format": "e2m2"}, "weight_format='e2m2' needs activation_bits=16"),
        (
            FP4,
            {"weight_format": "e2m3", "weight_bits": 6},
            "weight_format='e2m3' needs activation_bits=16 or activation_format='e4m3'; got "
            "activation_bits=4, activation_format='e2m1'",
        ),
        (FP4, {"weight_format": "mxfp4", "group_size": 32}, "'mxfp4' needs activation_bits=16;"),
        (FP4, {"two_level": True}, "two_level"),
        (
            Scheme.preset("w4a8-two-level"),
            {"weight_format": "e2m1"},
            "two_level needs weight_format='int'; it is 'e2m1'",
        ),
    ],
)
def test_what_it_does_not_go_with(scheme: Scheme, field: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        replace(scheme, **field)


def test_embeddings_are_of_integers_alone() -> None:
    with pytest.raises(OptionError, match=r"include_embeddings.*'e2m1'"):
        Options.parse({"scheme": FP4, "include_embeddings": True})
