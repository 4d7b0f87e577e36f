"""Calibration: runs a model on real text and records how large each linear's input channels get."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from .capture import captured
from .errors import AtomError, TrainingModeError
from .passes.canonical import canonicalize
from .passes.graphs import copy_graph_module
from .passes.linears import find_linears, is_weight
from .recipe import Recipe
from .scheme import Scheme

Batch = Tensor | Mapping[str, Any]


def calibrate(
    model: nn.Module, batches: Iterable[Batch], scheme: Scheme | str = "w4a4", progress: bool = True
) -> Recipe:
    """Gathers each linear input's Hessian diagonal: every channel's mean square over all tokens.

    model: any module in eval mode; it is run as it is, in its own precision and on its own device.
    batches: `input_ids` tensors (batch, length), or dicts of keyword arguments for the model. 128
        windows of 2048 tokens of the kind of text that the model will see are Atom's choice; a few
        thousand tokens already serve.
    scheme: what the recipe is for; a compilation may still choose another.

    Source: Atom (arXiv 2310.19102), section 4.1. Raises AtomError if the batches are empty, no
    linear was reached, or an activation is not finite; TrainingModeError for a model in training
    mode.
    """
    if model.training:
        raise TrainingModeError(
            "the model is in training mode; call model.eval() before calibrating"
        )
    scheme = Scheme.of(scheme)
    statistics = _Statistics(model)
    run = captured(model, statistics.backend)
    total = len(batches) if isinstance(batches, Sized) else None
    seen = False
    with torch.no_grad():
        for batch in track(
            batches, "calibrating", total=total, disable=not progress, transient=True
        ):
            seen = True
            run(**batch) if isinstance(batch, Mapping) else run(batch)
    if not seen:
        raise AtomError("batches is empty: calibration needs at least one batch of input_ids")
    return Recipe(scheme, *statistics.finish())


class _Statistics:
    """Sums of squares per channel, by the parameter name of the weight that reads them."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._names |= {id(buffer): name for name, buffer in model.named_buffers()}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def backend(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Any:
        gm = canonicalize(copy_graph_module(gm))
        placeholders = gm.graph.find_nodes(op="placeholder")
        names = {
            node: self._names[id(example)]
            for node, example in zip(placeholders, example_inputs, strict=True)
            if is_weight(node) and id(example) in self._names
        }
        observed: dict[Node, list[str]] = {}
        for found in find_linears(gm, names):
            if found.weight in names:
                observed.setdefault(found.x, []).append(found.name)
                self._shapes[found.name] = tuple(found.weight.meta["example_value"].shape)
        return _Observer(gm, observed, self._add).run

    def _add(self, names: Sequence[str], x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        sums = rows.square().sum(0, dtype=torch.float64)
        for name in names:
            self._sums[name] = self._sums[name] + sums if name in self._sums else sums
            self._tokens[name] = self._tokens.get(name, 0) + rows.shape[0]

    def finish(self) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
        if not self._sums:
            raise AtomError(
                "calibration reached no linear with a weight of the model's own: "
                "nothing to quantize"
            )
        means = {
            name: (sums / max(self._tokens[name], 1)).float().cpu()
            for name, sums in self._sums.items()
        }
        for name, mean in means.items():
            if not bool(torch.isfinite(mean).all()):
                raise AtomError(
                    f"the input of {name} is not finite on the calibration batches; "
                    "check model and data"
                )
        return means, self._shapes


class _Observer(Interpreter):
    """Runs a graph node by node and shows the linears' inputs to `see`."""

    def __init__(self, gm: GraphModule, observed: Mapping[Node, Sequence[str]], see: Any) -> None:
        super().__init__(gm)
        self._observed = observed
        self._see = see

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self._observed:
            self._see(self._observed[n], result)
        return result
