"""How far each linear's output is from what 16 bits compute, in decibels.

Two graphs of one model run abreast on the same tokens: the captured one, and the one that the
passes left, unfused. At every linear that was quantized both stop and are compared:

    alone   the quantized product against the exact one, both of what the quantized model computed
            up to there: this linear's own noise
    in all  the quantized model's output against the 16-bit model's: what all linears up to there
            add up to

Linears are found by the graph. No more is kept than both runs need at that point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .backend import parameter_names, refuse_training, rewrite
from .capture import captured
from .kernels.reorder import reorder
from .kernels.rotate import rotate
from .options import Options
from .passes.canonical import canonicalize
from .passes.derived import operands_of
from .passes.graphs import copy_graph_module, is_call
from .passes.linears import FoundLinear, find_linears
from .passes.pipeline import Rewrite
from .passes.plan import PlannedLinear
from .progress import track
from .replay import Call, Stream
from .store import PackedStore


@dataclass
class LayerNoise:
    """Of one linear, summed over tokens: squares of outputs and of their differences."""

    name: str
    alone_signal: float = 0.0
    alone_noise: float = 0.0
    signal: float = 0.0
    noise: float = 0.0

    @property
    def alone_db(self) -> float | None:
        """None if there was no noise, or no signal."""
        return decibels(self.alone_signal, self.alone_noise)

    @property
    def in_all_db(self) -> float | None:
        return decibels(self.signal, self.noise)

    def add(self, exact: Tensor, alone: Tensor, got: Tensor) -> None:
        """(*, N) each: the 16-bit model's output, the exact product, the quantized one."""
        self.alone_signal += _power(alone)
        self.alone_noise += _power(got - alone)
        self.signal += _power(exact)
        self.noise += _power(got - exact)


def decibels(signal: float, noise: float) -> float | None:
    return 10.0 * math.log10(signal / noise) if signal > 0.0 and noise > 0.0 else None


def _power(x: Tensor) -> float:
    return x.double().square().sum().item()


@torch.no_grad()
def measure_layers(
    model: nn.Module,
    batches: Sequence[Tensor],
    options: Mapping[str, Any] | None = None,
    progress: str | None = None,
) -> list[LayerNoise]:
    """Every quantized linear, in the order in which the model computes them.

    batches: `input_ids` (batch, length). options: as for the backend. A KV cache has no part in it.
    Where the model's graph breaks, the 16-bit run goes on from what the quantized one computed.
    """
    found: dict[str, LayerNoise] = {}
    parsed = replace(Options.parse(options), fuse=False)

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> _Comparison:
        refuse_training(gm)
        return _Comparison(gm, rewrite(gm, parsed), found)

    run = captured(model, backend)
    for input_ids in track(batches, progress or "", shown=progress is not None):
        run(input_ids, use_cache=False)
    return list(found.values())


class _Comparison:
    """Stands in for a compiled graph: computes what the quantized one does, and compares."""

    def __init__(self, gm: GraphModule, run: Rewrite, found: dict[str, LayerNoise]) -> None:
        self._exact = canonicalize(copy_graph_module(gm))
        names = parameter_names(self._exact)
        self._linears = _paired(find_linears(self._exact, names), run)
        self._run = run
        self._store = PackedStore()  # dies with the comparison: unfused weights serve nothing else
        self._found = found

    def __call__(self, *args: Any) -> Any:
        exact = Stream(Call(self._exact, args, ()), _as_it_is, returns=True)
        values = dict(zip(self._run.arguments, args, strict=True))
        call = Call(self._run.gm, self._arguments(values), ())
        quantized = Stream(call, _as_it_is, returns=True)
        inputs: dict[Node, Tensor] = {}  # the last one: several linears may read it
        for linear, plan, x, product in self._linears:
            if x not in inputs:
                quantized.advance(x)
                inputs = {x: quantized.value(x)}
            quantized.advance(product)
            exact.advance(linear.node)
            noise = self._found.setdefault(plan.found.name, LayerNoise(plan.found.name))
            noise.add(
                exact.value(linear.node).float(),
                _exact_product(plan.found, inputs[x], values),
                quantized.value(product).float(),
            )
        (output,) = self._run.gm.graph.find_nodes(op="output")
        quantized.advance(None)
        return quantized.env[output]

    def _arguments(self, values: dict[Node, Any]) -> tuple[Any, ...]:
        """What each placeholder of the rewritten graph takes."""
        arguments = []
        for node in self._run.gm.graph.find_nodes(op="placeholder"):
            if node in values:
                arguments.append(values[node])
            else:
                derived, field = node.meta["atom_derived"]
                arguments.append(self._store.get(derived, values)[field])
        return tuple(arguments)


def _paired(
    exact: Sequence[FoundLinear], run: Rewrite
) -> list[tuple[FoundLinear, PlannedLinear, Node, Node]]:
    """(linear, its plan, what the quantized one reads, and its product) of each that is rewritten.

    Both graphs hold the same linears in the same order.
    """
    both = zip(exact, run.planned, strict=True)
    rewritten = [(linear, plan) for linear, plan in both if plan.transform is not None]
    products = [node for node in run.gm.graph.nodes if "atom_packed" in node.meta]
    return [
        (linear, plan, _read_by(product), product)
        for (linear, plan), product in zip(rewritten, products, strict=True)
    ]


def _read_by(product: Node) -> Node:
    """What the linear reads: up through its quantize, if it has one, rotate and reorder."""
    activation, _ = operands_of(product)
    node = activation[0] if len(activation) == 1 else activation[0].args[0].args[0]
    while is_call(node, reorder, rotate):
        node = node.args[0]
    assert isinstance(node, Node)
    return node


def _exact_product(found: FoundLinear, x: Tensor, values: Mapping[Node, Any]) -> Tensor:
    weight = values[found.weight].float()
    bias = None if found.bias is None else values[found.bias].float()
    return F.linear(x.float(), weight.t() if found.transposed else weight, bias)


def _as_it_is(found: FoundLinear, x: Tensor, weight: Tensor) -> None:
    return None
