from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import atom_compile
from atom_compile import AtomError, KVCache, Report

from .capturing import token_batch
from .models import tiny_llama


@pytest.fixture(scope="module")
def report() -> Report:
    return atom_compile.explain(tiny_llama(), token_batch())


def test_layers_and_counts_agree(report: Report) -> None:
    rewritten = [layer for layer in report.layers if layer.operator]
    assert (len(report.layers), len(rewritten)) == (15, 14)
    assert report.operators["atom.linear"] == 8
    down = next(layer for layer in report.layers if "1.mlp.down_proj" in layer.name)
    assert (down.out_features, down.in_features) == (256, 352)
    assert (down.operator, down.quantized_by) == ("atom.linear + residual", "atom.gated_quantize")
    assert any("folded" in remark for remark in down.remarks)
    (head,) = (layer for layer in report.layers if not layer.operator)
    assert "output head" in head.remarks[0]


def test_bytes(report: Report) -> None:
    model = tiny_llama()
    wanted = sum(one.numel() * one.element_size() for one in model.parameters())
    assert report.weight_bytes_before == pytest.approx(wanted, rel=0.01)
    left = model.get_input_embeddings().weight.numel() * 4 * 2  # and the head, untied here
    assert report.weight_bytes_after - left < 0.25 * (wanted - left)


def test_printed(report: Report) -> None:
    text = str(report)
    assert "14 of 15 linears rewritten" in text
    assert "model.layers.*.mlp.down_proj" in text
    assert all(stage in text for stage in report.stages)


def test_graph_of_every_stage(report: Report) -> None:
    counts = {}
    for stage in report.stages:
        graph = report.graph(stage)
        operators = [data["operator"] for _, data in graph.nodes(data=True)]
        counts[stage] = operators.count("atom.reorder")
        assert "output" in operators
    assert counts["captured"] == 0
    assert counts["insert_quantization"] == 14
    assert counts["share_inputs"] == 8
    assert counts["fold_reorders"] == 6
    assert counts["verify"] == 0
    assert "atom.linear" in report.code("verify")
    with pytest.raises(AtomError, match="did you mean 'verify'"):
        report.graph("verfy")


def test_saved(report: Report, tmp_path: Path) -> None:
    for suffix in ("json", "dot", "svg"):
        report.save(tmp_path / f"report.{suffix}")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["operators"] == dict(report.operators)
    assert [stage["stage"] for stage in data["graphs"][0]] == report.stages
    assert (tmp_path / "report.dot").read_text().startswith("digraph")
    assert "norm_quantize" in (tmp_path / "report.svg").read_text()
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(AtomError, match="unknown file type"):
        report.save(tmp_path / "report.png")


def test_errors_are_typed_and_nothing_stays_compiled() -> None:
    model = tiny_llama(layers=1)
    with pytest.raises(AtomError, match=r"model\.eval"):
        atom_compile.explain(model.train(), token_batch())
    with pytest.raises(AtomError, match="did you mean 'recipe'"):
        atom_compile.explain(model.eval(), token_batch(), options={"recipee": None})
    with pytest.raises(AtomError, match="no graph"):
        atom_compile.explain(nn.Identity().eval(), torch.ones(2))
    wanted = model(token_batch()).logits
    torch.testing.assert_close(model(token_batch()).logits, wanted, rtol=0, atol=0)


def test_attentions_and_their_caches() -> None:
    model = tiny_llama()
    report = atom_compile.explain(
        model, token_batch(), past_key_values=KVCache(model.config, 2, 32, device="cpu")
    )
    for layer, attention in enumerate(report.attentions):
        assert attention.name == f"model.layers.{layer}.self_attn"
        assert (attention.heads, attention.cache) == ((4, 2, 64), "kv4")
        assert attention.operator == "atom.attention_quantize"
    assert report.cache_bytes_per_token == 2 * 2 * 2 * (32 + 4)  # layers, K and V, heads
    assert report.to_dict()["cache_bytes_per_token"] == report.cache_bytes_per_token
    text = str(report)
    assert "model.layers.*.self_attn (2)" in text and "KV cache: 288 bytes per token" in text
    without = atom_compile.explain(model, token_batch(), use_cache=False)
    assert [one.cache for one in without.attentions] == ["no cache"] * 2
    assert without.cache_bytes_per_token == 0 and "left to PyTorch" in str(without)
