"""Where transformers keeps the weights of experts, and what we call the linears of each of them."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_experts(module: Any) -> bool:
    """As transformers' `use_experts_implementation` marks them."""
    if not hasattr(module, "is_transposed") or "forward" in module.__dict__:
        return False
    stacks = (getattr(module, name, None) for name in ("gate_up_proj", "up_proj", "down_proj"))
    held = [one for one in stacks if isinstance(one, nn.Parameter) and one.dim() == 3]
    return len(held) == 2


def first_of(experts: Any) -> str:
    """What the tensor is called that reads a layer's input."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def linears_of(name: str, experts: Any, number: int) -> dict[str, list[str]]:
    """A tensor of all experts by its name -> the names of their linears. name: of `experts`."""
    return {
        f"{name}.{stack}": [f"{name}.{one}.{linear}" for one in range(number)]
        for stack, linear in ((first_of(experts), "gate_up"), ("down_proj", "down"))
    }


def weights_of_experts(model: nn.Module) -> dict[str, list[str]]:
    """A tensor of all experts by its name -> the names of their linears' weights."""
    return {
        stack: [f"{name}.weight" for name in names]
        for owner, module in model.named_modules()
        if is_experts(module)
        for stack, names in linears_of(owner, module, len(module.down_proj)).items()
    }


def shapes_of_experts(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The names of the linears' weights -> their shapes (N, K)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for stack, names in weights_of_experts(model).items():
        experts: Any = model.get_submodule(stack.rpartition(".")[0])
        shape = tuple(model.get_parameter(stack).shape[1:])
        shapes |= dict.fromkeys(names, shape[::-1] if experts.is_transposed else shape)
    return shapes
