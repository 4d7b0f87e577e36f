from __future__ import annotations

from typing import Any

import pytest
import torch

import atom_compile
from atom_compile.report.nodes import KINDS

from ..capturing import token_batch
from ..models import tiny_llama


@pytest.fixture(scope="module")
def graph() -> dict[str, Any]:
    report = atom_compile.explain(
        tiny_llama(layers=1), token_batch(), options={"skip": ["*.o_proj.weight"]}
    )
    (graph,) = report.to_dict()["graphs"]
    return graph  # type: ignore[no-any-return]


def final(graph: dict[str, Any], **wanted: object) -> list[dict[str, Any]]:
    """The records of the last stage whose fields are as `wanted`."""
    records = [graph["nodes"][position] for position in graph["stages"][-1]["nodes"]]
    return [one for one in records if wanted.items() <= one.items()]


def test_kinds(graph: dict[str, Any]) -> None:
    assert {node["kind"] for node in graph["nodes"]} <= KINDS.keys()
    assert {one["operator"] for one in final(graph, kind="int4")} == {"atom.linear"}
    fused = {one["operator"] for one in final(graph, kind="fused")}
    assert fused == {"atom.norm_quantize", "atom.gated_quantize"}
    assert len(final(graph, kind="input")) == 1
    assert len(final(graph, kind="output")) == 1


def test_a_linear_says_what_it_is(graph: dict[str, Any]) -> None:
    (product,) = (one for one in final(graph, kind="int4") if len(one["linears"]) == 3)
    assert product["linears"][0] == "model.layers.0.self_attn.q_proj.weight"
    assert product["module"] == "model.layers.0.self_attn.q_proj"
    assert product["outputs"] == [{"dtype": "float32", "shape": ["2", "12", "512"]}]
    assert product["bytes"] == 2 * 12 * 512 * 4
    assert product["operations"] == 2 * 2 * 12 * 512 * 256
    assert product["source"]["file"] == "transformers/models/llama/modeling_llama.py"
    assert "q_proj(hidden_states)" in product["source"]["code"]
    assert "one product of 512 rows" in product["remarks"]


def test_a_pair_has_two_outputs(graph: dict[str, Any]) -> None:
    codes, scale = final(graph, operator="atom.norm_quantize")[0]["outputs"]
    assert (codes["dtype"], scale["dtype"]) == ("int8", "float32")


def test_whatever_is_left_has_a_reason(graph: dict[str, Any]) -> None:
    left = final(graph, kind="untouched")
    assert left and all(one["reason"] for one in left)
    reasons = {one["linears"][0]: one["reason"] for one in left if one["linears"]}
    assert "option skip='*.o_proj.weight'" in reasons["model.layers.0.self_attn.o_proj.weight"]
    assert "output head" in reasons["lm_head.weight"]
    assert "include_embeddings" in final(graph, operator="embedding")[0]["reason"]
    (sdpa,) = final(graph, operator="scaled_dot_product_attention")
    assert "left to PyTorch" in sdpa["reason"]
    assert sdpa["operations"] == 4 * 2 * 4 * 12 * 12 * 64
    assert not any(one["reason"] for one in final(graph, kind="int4"))


def test_symbolic_sizes_stay_symbolic() -> None:
    ids = token_batch()
    torch._dynamo.mark_dynamic(ids, 1)
    report = atom_compile.explain(tiny_llama(layers=1), ids)
    (graph,) = report.to_dict()["graphs"]
    product = final(graph, kind="int4")[0]
    assert product["outputs"][0]["shape"][1].startswith("s")
    assert product["bytes"] is None and product["operations"] is None
