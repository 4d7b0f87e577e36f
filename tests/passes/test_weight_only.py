"""Schemes that leave activations in 16 bits: products, and reorders if asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from atom_compile import KVCache, Scheme, calibrate, explain
from atom_compile.errors import OptionError
from atom_compile.options import Options
from atom_compile.passes import derived
from atom_compile.passes.derived import PackedLinear
from atom_compile.signal_noise import measure_layers

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

W4A16 = Scheme.preset("w4a16")
ACT_ORDER = replace(W4A16, act_order=True)
ASYMMETRIC = replace(W4A16, symmetric=False, group_size=32)
FLOATING = [Scheme.preset(name) for name in ("w6a16", "w6a16-e3m2", "w5a16", "w4a16-fp4")]
BLOCKS = [Scheme.preset("mxfp4"), replace(Scheme.preset("nvfp4"), act_order=True)]
VARIANTS = [W4A16, ACT_ORDER, ASYMMETRIC, replace(FLOATING[0], act_order=True)]
VARIANTS += [*FLOATING[1:], *BLOCKS]


def test_nothing_but_products_is_left() -> None:
    model, ids = tiny_llama(), token_batch()
    plain = atom_operators(model, ids, scheme=W4A16, fuse=False)
    assert plain == {"atom.weight_only_linear": 14, "linear": 1}
    # q, k and v, and gate and up, are one product each
    fused = {"atom.weight_only_linear": 8, "linear": 1}
    assert atom_operators(model, ids, scheme=W4A16) == fused
    # down_proj's reorder is folded, the three others of a layer stay
    assert atom_operators(model, ids, scheme=ACT_ORDER) == fused | {"atom.reorder": 6}


@pytest.mark.parametrize("symmetric", [True, False])
def test_before_and_after(symmetric: bool) -> None:
    scheme = replace(W4A16, symmetric=symmetric)
    (run,) = rewrites(HandWritten(depth=1, bias=True).eval(), token_batch(), scheme=scheme)
    products = [node for node in run.gm.graph.nodes if "atom_packed" in node.meta]
    assert len(products) == 4
    for node in products:
        packed: PackedLinear = node.meta["atom_packed"]
        x, weight, scale, zero_point, *_ = (
            one.meta["example_value"] if isinstance(one, torch.fx.Node) else one
            for one in node.args
        )
        G, N = packed.layout.num_groups, packed.out_features
        assert x.shape[-1] == packed.layout.width and -(-x.shape[-1] // 128) == G
        assert weight.shape == (G, N, 64) and scale.shape == (G, N)
        assert (zero_point is None) if symmetric else zero_point.shape == (G, N)
    assert [node.args[-2] is not None for node in products] == [False, True, False, True]


@pytest.mark.parametrize("scheme", FLOATING)
def test_floating_point_weights_have_planes_and_a_name(scheme: Scheme) -> None:
    (run,) = rewrites(HandWritten(depth=1, bias=True).eval(), token_batch(), scheme=scheme)
    products = [node for node in run.gm.graph.nodes if "atom_packed" in node.meta]
    assert len(products) == 4
    for node in products:
        assert node.kwargs == {"format": scheme.weight_format}
        _, weight, scale, zero_point, high_bits, *_ = (
            one.meta["example_value"] if isinstance(one, torch.fx.Node) else one
            for one in node.args
        )
        G, N, _ = weight.shape
        assert scale.shape == (G, N) and zero_point is None
        extra = (scheme.weight_bits - 4) * 128 // 8
        assert (high_bits is None) if not extra else high_bits.shape == (G, N, extra)


@pytest.mark.parametrize("scheme", BLOCKS)
def test_scales_of_blocks_are_bytes(scheme: Scheme) -> None:
    (run,) = rewrites(HandWritten(depth=1, bias=True).eval(), token_batch(), scheme=scheme)
    products = [node for node in run.gm.graph.nodes if "atom_packed" in node.meta]
    assert len(products) == 4
    for node in products:
        assert node.kwargs == {"format": scheme.weight_format}
        x, weight, scale, zero_point, high_bits, row_scale, *_ = (
            one.meta["example_value"] if isinstance(one, torch.fx.Node) else one
            for one in node.args
        )
        G, N, half_group = weight.shape
        assert -(-x.shape[-1] // 32) == G and half_group == 16
        assert scale.shape == (G * 32 // scheme.group_size, N) and scale.dtype == torch.uint8
        assert zero_point is None and high_bits is None
        if scheme.weight_format == "nvfp4":
            assert row_scale.shape == (N,) and row_scale.dtype == torch.float32
        else:
            assert row_scale is None


def test_a_tensor_has_one_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is rounded piece by piece, and where several linears share a weight."""
    model, ids = HandWritten(depth=1).eval(), token_batch()
    options: dict[str, Any] = {"scheme": "nvfp4", "strict": True}
    whole = reference_output(model, ids, **options)
    monkeypatch.setattr(derived, "_MOST_AT_ONCE", 1000)
    assert torch.equal(reference_output(model, ids, **options), whole)


@torch.no_grad()
@pytest.mark.parametrize("scheme", VARIANTS)
@pytest.mark.parametrize("bias", [False, True])
def test_fusing_changes_nothing(scheme: Scheme, bias: bool) -> None:
    assert 1e-3 < error_of_fused(scheme, bias) < 0.3


@torch.no_grad()
def test_zero_points_serve(graphs_run_eagerly: list[Any]) -> None:
    model, ids = tiny_llama(), token_batch()
    errors = []
    for scheme in (replace(W4A16, weight_clip=1.0), replace(ASYMMETRIC, weight_clip=1.0)):
        torch._dynamo.reset()
        wanted = model.forward(ids).logits
        model.compile(backend="atom", options={"scheme": scheme, "strict": True})
        errors.append(relative_error(model(ids).logits, wanted))
    assert errors[1] < 0.9 * errors[0]


@torch.no_grad()
@pytest.mark.parametrize("scheme", VARIANTS)
def test_gptq(scheme: Scheme, graphs_run_eagerly: list[Any], tmp_path: Any) -> None:
    nearest, by_gptq = errors_of_rounding(scheme, tmp_path)
    assert by_gptq < 0.9 * nearest


def test_a_layer_over_the_budget_stays_as_it_is() -> None:
    model, ids = tiny_llama(layers=1), token_batch(4, 64)
    recipe = calibrate(model, [ids], W4A16, progress=False, error_budget=1e-6)
    assert all(choice.keep for choice in recipe.layers.values()) and not recipe.rounded
    reason = next(iter(recipe.layers.values())).reason
    assert reason is not None and "16-bit activations, budget 1e-06" in reason


@pytest.mark.parametrize("scheme", VARIANTS)
def test_explain_names_operator_and_bytes(scheme: Scheme) -> None:
    report = explain(tiny_llama(), token_batch(), options={"scheme": scheme})
    down = next(layer for layer in report.layers if "down_proj" in layer.name)
    assert down.operator == "atom.weight_only_linear + residual" and down.quantized_by is None
    bits = scheme.weight_bits
    assert (down.weight_bits, down.activation_bits, down.outlier_channels) == (bits, 16, 0)
    groups = -(-down.in_features // scheme.group_size)
    of_a_scale = 1 if scheme in BLOCKS else 2 if scheme.symmetric else 3
    of_a_row = 4 if scheme.weight_format == "nvfp4" else 0
    of_a_group = scheme.group_size * bits // 8 + of_a_scale
    assert down.weight_bytes_after == down.out_features * (groups * of_a_group + of_a_row)
    assert "weight_only_linear" in str(report)


@torch.no_grad()
@pytest.mark.parametrize(
    ("scheme", "least"),
    [
        *[(W4A16, 10.0), (ACT_ORDER, 10.0), (FLOATING[2], 20.0), (FLOATING[0], 25.0)],
        *[(BLOCKS[0], 15.0), (BLOCKS[1], 18.0)],
    ],
)
def test_noise_of_each_linear(scheme: Scheme, least: float) -> None:
    noises = measure_layers(tiny_llama(), [token_batch()], {"scheme": scheme})
    assert len(noises) == 14
    assert all(noise.alone_db is not None and least < noise.alone_db < 45.0 for noise in noises)


@pytest.mark.parametrize(
    "field",
    [{"outlier_channels": 16}, {"int8_share": 0.5}, {"rotation": 64}, {"two_level": True}],
)
def test_what_it_does_not_go_with(field: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(field))}.*activation"):
        replace(W4A16, **field)


@pytest.mark.parametrize("field", [{"symmetric": False}, {"act_order": True}])
def test_what_only_it_goes_with(field: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(field))}.*activation_bits=16; it is 4"):
        Scheme(**field)
    with pytest.raises(OptionError, match="group_size is 32"):
        Scheme(group_size=32)


@pytest.mark.parametrize(
    ("scheme", "field", "message"),
    [
        (Scheme(), {"weight_format": "e2m3"}, "weight_format='e2m3' needs activation_bits=16"),
        (W4A16, {"weight_format": "e2m4"}, "weight_format.*e2m4.*e2m1"),
        (W4A16, {"weight_format": "e2m3"}, "weight_bits is 4; with weight_format='e2m3'.*be 6"),
        (FLOATING[0], {"weight_format": "int"}, "weight_bits is 6; INT4 storage"),
        (FLOATING[0], {"group_size": 32}, "group_size is 32.*at least 64"),
        (FLOATING[2], {"group_size": 64}, "group_size is 64.*at least 128"),
        (FLOATING[0], {"symmetric": False}, "symmetric=False.*e2m3.*no zero points"),
        (BLOCKS[0], {"group_size": 64}, "group_size is 64.*'mxfp4' it must be 32"),
        (BLOCKS[1], {"group_size": 32}, "group_size is 32.*'nvfp4' it must be 16"),
        (BLOCKS[1], {"weight_bits": 3}, "weight_bits is 3; with weight_format='nvfp4'.*be 4"),
        (BLOCKS[1], {"activation_bits": 8}, "act_order=True needs activation_bits=16"),
        (BLOCKS[0], {"activation_bits": 8}, "weight_format='mxfp4' needs activation_bits=16"),
        (W4A16, {"group_size": 16}, "group_size is 16"),
    ],
)
def test_what_weight_formats_do_not_go_with(
    scheme: Scheme, field: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        replace(scheme, **field)


def test_embeddings_are_of_integers_alone() -> None:
    with pytest.raises(OptionError, match=r"include_embeddings.*'e2m3'"):
        Options.parse({"scheme": "w6a16", "include_embeddings": True})


@torch.no_grad()
def test_a_quantized_cache_goes_with_it(graphs_run_eagerly: list[Any]) -> None:
    model, ids = tiny_llama(), token_batch(2, 12)
    cache = KVCache(model.config, 2, 16, "kv4", device="cpu")
    model.compile(backend="atom", options={"scheme": W4A16, "strict": True})
    got = [model(piece, past_key_values=cache).logits for piece in ids.split((11, 1), dim=1)]
    operators = {str(node.target) for graph in graphs_run_eagerly for node in graph.graph.nodes}
    assert {"atom.weight_only_linear.default", "atom.attention.default"} <= operators
    assert not any("quantize" in name for name in operators)
    wanted = model.forward(ids).logits
    assert relative_error(torch.cat(got, dim=1), wanted) < 0.4


@torch.no_grad()
@pytest.mark.parametrize("scheme", [ASYMMETRIC, FLOATING[0], *BLOCKS])
def test_inductor_compiles_it(scheme: Scheme) -> None:
    torch._dynamo.reset()
    model, ids = HandWritten(depth=1).eval(), token_batch()
    options: dict[str, Any] = {"scheme": scheme, "strict": True}
    compiled = torch.compile(model, backend="atom", options=options)
    for length in (12, 7, 1):
        piece = ids[:, :length]
        wanted = reference_output(model, piece, scheme=scheme)
        torch.testing.assert_close(compiled(piece), wanted, rtol=1e-3, atol=1e-3)
    torch._dynamo.reset()
