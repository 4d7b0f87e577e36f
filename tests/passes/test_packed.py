"""Packed models go through the passes as 16-bit ones do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from atom_compile import explain, quantize
from atom_compile.passes.packed import HeldLinear

from ..capturing import (
    SCHEMES_OF_EVERY_KIND,
    atom_operators,
    reference_output,
    relative_error,
    rewrites,
    token_batch,
)
from ..models import HandWritten, Standardize, tiny_llama


def qwen() -> Any:
    """Its q, k and v have biases."""
    config = Qwen2Config(
        hidden_size=256,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    return model


def hand_written() -> Any:
    torch.manual_seed(0)
    return HandWritten(norm=Standardize, bias=True).eval()


@pytest.mark.parametrize("scheme", SCHEMES_OF_EVERY_KIND)
@pytest.mark.parametrize("make", [tiny_llama, qwen, hand_written])
def test_the_same_operators_and_results(make: Any, scheme: str) -> None:
    model, ids = make(), token_batch()
    skip = ["towers.*.out"]  # a parameter without a module stays as it is
    wanted = atom_operators(model, ids, scheme=scheme, skip=skip)
    want = reference_output(model, ids, scheme=scheme, skip=skip)
    quantize(model, scheme, example_inputs=(ids,), progress=False)
    assert atom_operators(model, ids, skip=skip) == wanted
    got = reference_output(model, ids, skip=skip)
    assert relative_error(got, want) < 1e-6
    with torch.no_grad():
        out = model(ids)
    eager = out if isinstance(out, torch.Tensor) else out.logits
    assert relative_error(eager, want) < 1e-3


def test_one_weight_is_read_whole_and_nothing_is_derived() -> None:
    model = tiny_llama()
    quantize(model, progress=False)
    (run,) = rewrites(model, token_batch())
    assert not run.gm.graph.find_nodes(op="call_function", target=torch.narrow)
    assert not [node for node in run.gm.graph.nodes if "atom_derived" in node.meta]
    products = [
        node.meta["atom_packed"] for node in run.gm.graph.nodes if "atom_packed" in node.meta
    ]
    assert all(isinstance(one, HeldLinear) for one in products)
    assert [len(one.parts) for one in products] == [3, 1, 2, 1] * 2


def test_weights_that_are_held_apart_are_not_copied_together() -> None:
    model, ids = tiny_llama(), token_batch()
    quantize(model, progress=False)
    model.load_state_dict(model.state_dict(), assign=True)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    attention.k_proj.order = attention.v_proj.order = attention.q_proj.order
    mlp.gate_proj.order = mlp.up_proj.order
    (run,) = rewrites(model, ids)
    operators = run.record.stages[-1].operators
    assert (operators["atom.linear"], operators["atom.norm_quantize"]) == (14, 2)
    assert not [node for node in run.gm.graph.nodes if "atom_derived" in node.meta]
    _, remark = run.record.remarks["model.layers.0.mlp.up_proj.weight"]
    assert "does not hold their packed weights as one" in remark


def test_explain_lists_them() -> None:
    model = tiny_llama()
    quantize(model, "w4a4-rotated", progress=False)
    report = explain(model, token_batch())
    layers = {layer.name: layer for layer in report.layers}
    q = layers["model.layers.0.self_attn.q_proj.weight"]
    assert (q.out_features, q.in_features, q.activation_bits, q.outlier_channels) == (
        256,
        256,
        4,
        32,
    )
    assert (q.operator, q.quantized_by) == ("atom.linear", "atom.norm_quantize")
    assert q.remarks == ("the model holds it packed", "one product of 512 rows")
    down = layers["model.layers.1.mlp.down_proj.weight"]
    assert down.operator == "atom.linear + residual"
    assert layers["lm_head.weight"].operator is None
    assert report.weight_bytes_before == report.weight_bytes_after
    assert report.to_dict()["layers"]


@pytest.mark.parametrize(
    ("scheme", "bits", "formats"),
    [
        ("w6a16", (6, 16), ("e2m3", None)),
        ("w6a8", (6, 8), ("e2m3", "e4m3")),
        ("w4a4-fp4", (4, 4), ("e2m1", "e2m1")),
        ("nvfp4", (4, 16), ("nvfp4", None)),
    ],
)
def test_explain_knows_floating_point(
    scheme: str, bits: tuple[int, int], formats: tuple[str, str | None]
) -> None:
    model = tiny_llama()
    quantize(model, scheme, progress=False)
    down = next(one for one in explain(model, token_batch()).layers if "down_proj" in one.name)
    assert (down.weight_bits, down.activation_bits) == bits
    assert (down.weight_format, down.activation_format) == formats


def test_part_of_a_model_is_packed() -> None:
    model, ids = tiny_llama(), token_batch()
    want = reference_output(model, ids)
    quantize(model, skip=["*.mlp.*", "*.1.*"], progress=False)
    assert relative_error(reference_output(model, ids), want) < 1e-6


def test_it_compiles_with_any_backend() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 192), nn.ReLU(), nn.Linear(192, 128)).eval()
    quantize(model, "w4a8", progress=False)
    x = torch.randn(3, 256)
    with torch.no_grad():
        want = model(x)
        for backend in ("aot_eager", "inductor", "atom"):
            torch._dynamo.reset()
            got = torch.compile(model, backend=backend, fullgraph=True)(x)
            assert relative_error(got, want) < 1e-2, backend
