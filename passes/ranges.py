"""Gives each of our operators the name of its place in the model, for whoever profiles."""

from __future__ import annotations

from torch._ops import OpOverload
from torch.fx import GraphModule

from ..kernels.quantize_e4m3 import quantize_e4m3
from ..kernels.ranges import placed
from .graphs import module_path


def name_ranges(gm: GraphModule) -> GraphModule:
    """Needs every other pass: none of them knows the operators by their new names.

    y = atom.linear(...)   ->   y = atom_at.model_layers_0_mlp_down_proj__linear(...)

    But for what a compiler takes apart and joins with its neighbours: that has no call to name.
    """
    for node in gm.graph.nodes:
        target = node.target
        ours = isinstance(target, OpOverload) and target.namespace == "atom"
        if ours and target is not quantize_e4m3:
            node.target = placed(target, module_path(node))
    gm.recompile()
    return gm
