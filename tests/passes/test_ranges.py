from __future__ import annotations

import torch

from atom_compile.passes.ranges import name_ranges

from ..capturing import rewrites, token_batch
from ..models import tiny_llama


def test_every_operator_of_ours_gets_its_place() -> None:
    (run,) = rewrites(tiny_llama(layers=1), token_batch())
    before = {
        node.name: (node.target, node.args)
        for node in run.gm.graph.nodes
        if getattr(node.target, "namespace", None) == "atom"
    }
    name_ranges(run.gm)
    after = {node.name: node for node in run.gm.graph.nodes if node.name in before}
    names = {str(node.target) for node in after.values()}
    assert "atom_at.model_layers_0_mlp_down_proj__linear.default" in names
    assert len(names) == len(before) == 8
    for name, (target, args) in before.items():
        assert str(target).split(".")[1] in str(after[name].target)
        assert after[name].args == args
    assert not [node for node in run.gm.graph.nodes if "atom.linear" in str(node.target)]
    torch.fx.Graph.lint(run.gm.graph)
