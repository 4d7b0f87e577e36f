from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import networkx as nx
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


def test_numbers_and_bytes_of_layers(report: Report) -> None:
    down = next(layer for layer in report.layers if "1.mlp.down_proj" in layer.name)
    assert (down.weight_bits, down.activation_bits, down.outlier_channels) == (4, 4, 48)
    groups = 3  # of 128 channels, of the 304 that are no outliers
    packed = groups * (128 // 2 + 2) + 48 + 4  # codes and scales of a row
    assert (down.weight_bytes_before, down.weight_bytes_after) == (256 * 352 * 4, 256 * packed)
    head = report.layers[-1]
    assert (head.weight_bits, head.outlier_channels) == (None, None)
    assert head.weight_bytes_after == head.weight_bytes_before
    others = report.weight_bytes_after - sum(layer.weight_bytes_after for layer in report.layers)
    assert 0 < others < report.weight_bytes_before


def test_errors_that_the_recipe_knows() -> None:
    model = tiny_llama(layers=1)
    recipe = atom_compile.calibrate(model, [token_batch()], progress=False)
    report = atom_compile.explain(model, token_batch(), options={"recipe": recipe})
    told = {layer.name: layer.error for layer in report.layers if layer.error is not None}
    measured = {name: choice.error for name, choice in recipe.layers.items()}
    assert told == measured and "model.layers.0.mlp.down_proj.weight" in told


def test_every_format_tells_the_same_counts(report: Report) -> None:
    data = report.to_dict()
    (graph,) = data["graphs"]
    for stage in graph["stages"]:
        records = [graph["nodes"][position] for position in stage["nodes"]]
        calls = [one for one in records if one["op"].startswith("call_")]
        assert Counter(one["operator"] for one in calls) == stage["operators"]
        drawn = report.to_networkx(stage["stage"])
        assert set(drawn) == {one["name"] for one in records}
        assert f" {len(calls)} " in str(report)
    assert data["operators"] == graph["stages"][-1]["operators"]
    assert sum(layer["operator"] is not None for layer in data["layers"]) == 14


def test_stages_say_what_they_changed(report: Report) -> None:
    (graph,) = report.to_dict()["graphs"]
    before: set[str] = set()
    for stage in graph["stages"]:
        names = {graph["nodes"][position]["name"] for position in stage["nodes"]}
        if before:
            assert names == before - set(stage["removed"]) | set(stage["added"])
            assert set(stage["changed"]) <= before & names
        before = names
    merged = {stage["stage"]: stage["merged"] for stage in graph["stages"] if stage["merged"]}
    assert merged.keys() == {"share_inputs", "fuse_quantize", "fuse_residual"}
    assert len(merged["share_inputs"]) == 4  # q/k/v and gate/up of two layers


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
        graph = report.to_networkx(stage)
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
        report.to_networkx("verfy")


def test_saved(report: Report, tmp_path: Path) -> None:
    for suffix in ("json", "dot", "svg", "graphml", "html"):
        report.save(tmp_path / f"report.{suffix}")
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["operators"] == dict(report.operators)
    assert [stage["stage"] for stage in data["graphs"][0]["stages"]] == report.stages
    assert (tmp_path / "report.dot").read_text().startswith("digraph")
    assert "norm_quantize" in (tmp_path / "report.svg").read_text()
    read = nx.read_graphml(tmp_path / "report.graphml")
    assert read.nodes == report.to_networkx().nodes and read.edges == report.to_networkx().edges
    assert len(list(tmp_path.iterdir())) == 5
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
