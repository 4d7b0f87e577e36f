"""Mixtures of experts: transformers keeps a weight of all experts of a layer in one tensor.

Packed are linears, so each expert gets its own: views of that tensor, which is freed when the last
of them is packed. Checkpoints have them by the same names, `experts.3.gate_up` and
`experts.3.down`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .expert_names import first_of, is_experts, linears_of
from .options import Options
from .packer import Places, Plan, make_plan


class Expert(nn.Module):
    """x (tokens, hidden) -> (tokens, hidden). gate_up has no gate where the model's experts have
    none."""

    def __init__(self, gate_up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down


class ExpertLinears(nn.ModuleList):
    """What transformers' module of experts computes, expert by expert.

    hidden_states (tokens, hidden), top_k_index and top_k_weights (tokens, experts of a token) ->
    (tokens, hidden). Which experts are called depends on the numbers: a compiler leaves the loop
    over them as it is, and compiles what is before and after it.
    """

    def __init__(self, experts: Any) -> None:
        ups, downs = _linears(experts, first_of(experts)), _linears(experts, "down_proj")
        super().__init__(Expert(*both) for both in zip(ups, downs, strict=True))
        # of the module that this one replaces, which is left without weights; no module, which
        # would be one of the list
        self.activation = experts._apply_gate if experts.has_gate else experts.act_fn.__call__
        # in files it stops programs without atom_compile: a name of theirs, and another shape
        stack = getattr(experts, first_of(experts))
        marker = stack.detach().new_zeros(len(stack), 4 if experts.has_gate else 2, 2)
        self.register_buffer(first_of(experts), marker)
        self.train(experts.training)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        choices = top_k_index.flatten()
        counts = choices.bincount(minlength=len(self)).tolist()  # all that a GPU is waited for
        by_expert = choices.argsort(stable=True).split(counts)
        expert: Any
        # numbers beyond the last stand for experts that are elsewhere
        for expert, places in zip(self, by_expert, strict=False):
            if len(places) == 0:
                continue
            token = places // top_k_index.shape[1]
            inner = self.activation(expert.gate_up(hidden_states[token]))
            weighted = expert.down(inner) * top_k_weights.flatten()[places, None]
            out.index_add_(0, token, weighted.to(out.dtype))
        return out


@dataclass(frozen=True, eq=False)
class Split:
    """A module of experts by its name, and what takes its place."""

    name: str
    experts: Any
    linears: ExpertLinears

    @property
    def stacks(self) -> dict[str, list[str]]:
        """The names of the linears whose weights lie in one tensor, by its name."""
        return linears_of(self.name, self.experts, len(self.linears))

    def rows(self, stack: Iterable[Tensor]) -> list[Tensor]:
        """Of a tensor of all experts each one's, as a linear has it; or the reverse of it."""
        return [one.t() if self.experts.is_transposed else one for one in stack]

    @property
    def marker(self) -> dict[str, Tensor]:
        """By its name in files, what takes the place of a tensor of all experts there."""
        buffer = self.linears.get_buffer(first_of(self.experts))
        return {f"{self.name}.{first_of(self.experts)}": torch.zeros_like(buffer, device="cpu")}

    def stacked(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all experts, of those of each, which it takes out of `tensors`."""
        stacks = {}
        for stack, names in self.stacks.items():
            weights = [tensors.pop(f"{name}.weight") for name in names]
            stacks[stack] = torch.stack(self.rows(weights))
            if self.experts.has_bias:
                biases = [tensors.pop(f"{name}.bias") for name in names]
                stacks[f"{stack}_bias"] = torch.stack(biases)
        return stacks

    def load_biases(self) -> None:
        """Those that the module which was replaced has got by now."""
        for stack, names in self.stacks.items() if self.experts.has_bias else ():
            biases = self.experts.get_parameter(f"{stack.rpartition('.')[2]}_bias")
            for name, bias in zip(names, biases, strict=True):
                linear: Any = self.linears.get_submodule(name.removeprefix(f"{self.name}."))
                linear.bias = _owned(bias)

    def release(self) -> None:
        """The module that was replaced holds its weights no longer."""
        self.experts._parameters.clear()

    def settle(self) -> None:
        """Weights that were not packed get memory of their own: else all would be held."""
        (marker,) = self.marker.values()
        self.linears.register_buffer(first_of(self.experts), marker)
        for linear in self.linears.modules():
            if isinstance(linear, nn.Linear):
                linear.weight = _owned(linear.weight)


def split_experts(model: nn.Module, linears: Collection[str] | None = None) -> list[Split]:
    """Replaces modules of experts: all, or those that have some of `linears`. Nothing is copied."""
    splits = [
        Split(name, module, ExpertLinears(module))
        for name, module in model.named_modules()
        if is_experts(module) and (linears is None or _has_one_of(name, linears))
    ]
    put(model, splits, split=True)
    return splits


def put(model: nn.Module, splits: Sequence[Split], *, split: bool) -> None:
    """Has the linears in the model, or the modules that they were."""
    places = Places(model)
    for one in splits:
        old, new = (one.experts, one.linears) if split else (one.linears, one.experts)
        places.replace(old, new)


def plan_with_experts(
    model: nn.Module,
    options: Options,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
) -> tuple[Plan, list[Split]]:
    """`make_plan`, and the modules of experts that it packs something of, which are split then."""
    splits = split_experts(model)
    linears = {name for one in splits for stack in one.stacks.values() for name in stack}
    try:
        plan = make_plan(model, options, example_inputs, linears)
    except BaseException:
        put(model, splits, split=False)
        raise
    packed = [name for group in plan.groups for name in group]
    whole = [one for one in splits if not _has_one_of(one.name, packed)]
    if whole:
        put(model, whole, split=False)
        plan = make_plan(model, options, example_inputs, linears)
    return plan, [one for one in splits if one not in whole]


def _has_one_of(name: str, linears: Collection[str]) -> bool:
    return any(linear.startswith(f"{name}.") for linear in linears)


def _linears(experts: Any, name: str) -> list[nn.Linear]:
    """Of each expert, its rows of the tensor."""
    stack = getattr(experts, name)
    biases = getattr(experts, f"{name}_bias") if experts.has_bias else [None] * len(stack)
    made = []
    for weight, bias in zip(stack, biases, strict=True):
        weight = weight.t() if experts.is_transposed else weight
        out_features, in_features = weight.shape
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None:
            linear.bias = _owned(bias)
        made.append(linear)
    return made


def _owned(tensor: Tensor) -> nn.Parameter:
    copied = tensor.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(copied, requires_grad=False)
