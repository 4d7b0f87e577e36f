"""Calibration: runs a model on real text, decides each linear's precision, and rounds its weight.

    observe    one pass: how large each linear's input channels get
    measure    on a few batches: which channels must be INT8, and how many groups each layer needs
    round      all batches abreast, linear by linear: GPTQ on what the quantized layers before give

`observe` alone is enough for a recipe; weights are then rounded to nearest at compile time.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Container, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from .capture import captured
from .errors import AtomError, OptionError, TrainingModeError
from .expert_names import weights_of_experts
from .passes.canonical import canonicalize
from .passes.graphs import copy_graph_module
from .passes.linears import FoundLinear, find_linears, is_weight
from .passes.plan import plan_linears
from .passes.stacks import take_apart
from .precision import Noise, allocate, counts_to_try
from .progress import track
from .recipe import LayerChoice, Recipe, RoundedWeight
from .replay import Call, Stream, abreast
from .rounding import Rounder
from .scheme import Scheme

Batch = Tensor | Mapping[str, Any]
_MOST_MEASURED = 8


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    scheme: Scheme | str = "w4a4",
    progress: bool = True,
    *,
    gptq: bool = True,
    int8_budget: float | None = None,
    error_budget: float | None = None,
    include_head: bool = False,
    resume: str | Path | None = None,
) -> Recipe:
    """Finds channel orders, clips, precisions and rounded weights for a model.

    model: any module in eval mode; it is run as it is, in its own precision and on its own device.
    batches: `input_ids` tensors (batch, length), or dicts of keyword arguments for the model. 128
        windows of 2048 tokens of the kind of text that the model will see are Atom's choice; some
        ten thousand tokens already serve.
    scheme: what the recipe is for. A compilation may still choose another: it then gets the channel
        magnitudes alone.
    gptq: round weights by GPTQ, with clips searched for. False leaves them to round to nearest.
    int8_budget: the scheme's `int8_share`, if it is to be another one.
    error_budget: noise over signal that no linear's output may exceed, such as 0.02. Layers that
        do are lifted: more INT8 activation groups, all of them, then 16 bits.
    include_head: round the output head as well, for a compilation with that option.
    resume: a folder to keep finished layers in while GPTQ runs. A calibration that was interrupted
        goes on from there if called in the same way; in the end the folder is gone.

    Nothing is drawn at random: the same batches give the same recipe. Sources: Atom (arXiv
    2310.19102), section 4; GPTQ (arXiv 2210.17323); COMET (arXiv 2410.12168), section 4.

    Experts of transformers' mixtures are linears of their own, calibrated on the tokens that come
    to each; with a warning, those that no token reached are left out.

    Raises AtomError if the batches are empty, no linear was reached, or an activation is not
    finite; TrainingModeError for a model in training mode.
    """
    if model.training:
        raise TrainingModeError(
            "the model is in training mode; call model.eval() before calibrating"
        )
    if error_budget is not None and not error_budget > 0.0:
        raise OptionError(f"error_budget is {error_budget}; it must be over 0, such as 0.02")
    scheme = Scheme.of(scheme)
    if int8_budget is not None:
        scheme = dataclasses.replace(scheme, int8_share=int8_budget)
    statistics = _observe(model, batches, scheme, include_head, progress)
    diagonals, shapes = statistics.finish()
    calls = [[_reached(call, diagonals) for call in of_batch] for of_batch in statistics.calls]
    recipe = Recipe(scheme, diagonals, shapes)
    if not gptq and not scheme.int8_share and error_budget is None:
        return recipe
    together = abreast(calls)
    if not scheme.sorts_channels:
        orders, layers = _unsorted(together, recipe)
    else:
        measured = _measure(together, recipe, error_budget, progress)
        orders, layers = _choose(measured, scheme, error_budget)
    rounded: dict[str, RoundedWeight] = {}
    if gptq:
        rounder = Rounder(scheme, orders, layers, error_budget, resume)
        layers, rounded = rounder.run(together, progress)
    on_cpu = {name: order.cpu() for name, order in orders.items()}
    return Recipe(scheme, diagonals, shapes, on_cpu, layers, rounded)


def _observe(
    model: nn.Module, batches: Iterable[Batch], scheme: Scheme, include_head: bool, progress: bool
) -> _Statistics:
    statistics = _Statistics(model, scheme, include_head)
    run = captured(model, statistics.backend)
    total = len(batches) if isinstance(batches, Sized) else None
    with torch.no_grad():
        for batch in track(batches, "calibrating", shown=progress, total=total):
            statistics.calls.append([])
            run(**batch) if isinstance(batch, Mapping) else run(batch)
    if not statistics.calls:
        raise AtomError("batches is empty: calibration needs at least one batch of input_ids")
    return statistics


@torch.no_grad()
def _measure(
    together: Sequence[Sequence[Call]], recipe: Recipe, error_budget: float | None, progress: bool
) -> list[Noise]:
    """The noise of every activation's linears, unquantized ones before them."""
    noises: dict[str, Noise] = {}

    def see(found: FoundLinear, x: Tensor, weight: Tensor) -> Tensor:
        out = F.linear(x, weight)
        noise = noises[found.name]
        if found.name == noise.names[0]:
            noise.add(x)
        noise.add_output(out)
        return out

    calls = [call for some in together for call in _spread(some)]
    for call in track(calls, "measuring", shown=progress):
        for group in call.groups:
            if group[0].name not in noises:
                noise = _noise(call, group, recipe, error_budget)
                noises |= {found.name: noise for found in group}
        Stream(call, see).advance(None)
    return list({id(noise): noise for noise in noises.values()}.values())


def _unsorted(
    together: Sequence[Sequence[Call]], recipe: Recipe
) -> tuple[dict[str, Tensor], dict[str, LayerChoice]]:
    """Where no order and no number of INT8 groups is to be chosen, no noise need be measured."""
    groups = [group for calls in together for group in calls[0].names]
    orders = {name: recipe.default_order(group[0]) for group in groups for name in group}
    return orders, {name: LayerChoice(activation_clip=1.0) for name in orders}


def _reached(call: Call, names: Container[str]) -> Call:
    """Without the linears of experts that no token of any batch reached."""
    return dataclasses.replace(
        call, linears=tuple(found for found in call.linears if found.name in names)
    )


def _spread(calls: Sequence[Call]) -> Sequence[Call]:
    return calls[:: max(1, -(-len(calls) // _MOST_MEASURED))]


def _noise(
    call: Call, group: Sequence[FoundLinear], recipe: Recipe, error_budget: float | None
) -> Noise:
    scheme, first = recipe.scheme, group[0]
    layout = scheme.layout(first.in_features)
    weights = dict(zip(call.gm.graph.find_nodes(op="placeholder"), call.args, strict=True))
    power: Any = sum(
        weights[found.weight].float().square().sum(1 if found.transposed else 0) for found in group
    )
    magnitude = recipe.hessian_diagonal[first.name].to(power.device)
    choosing = scheme.activation_bits < 8 and (error_budget is not None or scheme.int8_share > 0)
    names = tuple(found.name for found in group)
    counts = counts_to_try(layout) if choosing else ()
    return Noise(layout, scheme, magnitude, power, names, counts)


def _choose(
    measured: Sequence[Noise], scheme: Scheme, error_budget: float | None
) -> tuple[dict[str, Tensor], dict[str, LayerChoice]]:
    """Each linear's channel order, and what it gets before rounding showed its whole error."""
    curves = [noise.curve for noise in measured]
    layouts = [noise.layout for noise in measured]
    chosen = allocate(curves, layouts, scheme.int8_share, error_budget)
    orders, layers = {}, {}
    for noise, curve, count in zip(measured, curves, chosen, strict=True):
        error, order = noise.best(count)
        reason = None
        if count:
            reason = f"activations' noise {curve[min(curve)]:.4f} of the signal, now {error:.4f}"
        choice = LayerChoice(
            activation_clip=scheme.activation_clip, int8_groups=count, error=error, reason=reason
        )
        for name in noise.names:
            orders[name], layers[name] = order, choice
    return orders, layers


class _Statistics:
    """Sums of squares per channel, by the parameter name of the weight that reads them."""

    def __init__(self, model: nn.Module, scheme: Scheme, include_head: bool) -> None:
        self.calls: list[list[Call]] = []
        """For each batch, the calls of captured graphs that it took."""
        self._scheme = scheme
        self._include_head = include_head
        self._of_experts = weights_of_experts(model)
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
        stacks = {
            node: self._of_experts[name] for node, name in names.items() if name in self._of_experts
        }
        position = {node: number for number, node in enumerate(placeholders)}
        expert_weights = take_apart(gm, stacks)
        names |= {weight.placeholder: weight.name for weight in expert_weights}
        observed: dict[Node, list[str]] = {}
        linears = [found for found in find_linears(gm, names) if found.weight in names]
        for found in linears:
            observed.setdefault(found.x, []).append(found.name)
            self._shapes[found.name] = tuple(found.weight.meta["example_value"].shape)
        planned = plan_linears(linears, self._scheme, None, self._include_head, ())
        wanted = tuple(plan.found for plan in planned if plan.transform is not None)

        def run(*given: Any) -> Any:
            of_each = (weight.of(given[position[weight.stack]]) for weight in expert_weights)
            args = *given, *of_each
            self.calls[-1].append(Call(gm, args, wanted))
            return _Observer(gm, observed, self._add).run(*args)

        return run

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
        unread = {
            name
            for names in self._of_experts.values()
            for name in names
            if self._tokens.get(name) == 0
        }
        if unread:
            warnings.warn(
                f"no token of the batches reached {len(unread)} linears of experts, such as "
                f"{min(unread)}: nothing is known of them, and they will be rounded to nearest; "
                "more text, or text of more kinds, helps",
                stacklevel=3,
            )
        means = {
            name: (sums / max(self._tokens[name], 1)).float().cpu()
            for name, sums in self._sums.items()
            if name not in unread
        }
        for name, mean in means.items():
            if not bool(torch.isfinite(mean).all()):
                raise AtomError(
                    f"the input of {name} is not finite on the calibration batches; "
                    "check model and data"
                )
        return means, {name: self._shapes[name] for name in means}


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
