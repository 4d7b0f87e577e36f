"""Decides, for every linear that was found, what will be done with it and why not."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from ..kernels.packing import GroupLayout
from .derived import ChannelOrder, ChoiceLike, InputTransform, RecipeLike, WeightRef
from .graphs import value
from .linears import FoundLinear, is_weight

if TYPE_CHECKING:
    from ..scheme import Scheme

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class PlannedLinear:
    """The `transform` of its input, one for all that read it, or a `reason` to leave it alone.

    The last `int8_groups` groups of the activation are INT8, the others are clipped. `error` is
    what calibration measured of the output: noise over signal.
    """

    found: FoundLinear
    transform: InputTransform | None
    activation_clip: float = 1.0
    int8_groups: int = 0
    reason: str | None = None
    left_by_choice: bool = False
    note: str | None = None
    error: float | None = None


def plan_linears(
    found: Sequence[FoundLinear],
    scheme: Scheme,
    recipe: RecipeLike | None,
    include_head: bool,
    skip: Sequence[str],
) -> list[PlannedLinear]:
    """A pure function of what was found and the options; the graph is not changed."""
    choices = {linear: _chosen_to_leave(linear, recipe, include_head, skip) for linear in found}
    reasons = {linear: choices[linear] or _reason_to_leave(linear, scheme) for linear in found}
    readers: dict[Node, list[FoundLinear]] = defaultdict(list)
    for linear in found:
        if reasons[linear] is None:
            readers[linear.x].append(linear)
    transforms = {x: _transform(linears, scheme, recipe) for x, linears in readers.items()}
    planned = []
    for linear in found:
        layout = scheme.layout(linear.in_features)
        reason = reasons[linear]
        transform = transforms[linear.x] if reason is None else None
        chosen = choices[linear] is not None
        choice = _choice(linear, recipe)
        planned.append(
            PlannedLinear(
                linear,
                transform,
                scheme.activation_clip if choice is None else choice.activation_clip,
                scheme.int8_groups(layout) if choice is None else choice.int8_groups,
                reason,
                chosen,
                _note(layout, scheme, choice),
                None if choice is None else choice.error,
            )
        )
    return planned


def _choice(linear: FoundLinear, recipe: RecipeLike | None) -> ChoiceLike | None:
    """A part of a model that is compiled by itself has other names, and none of its own choices."""
    return None if recipe is None else recipe.layers.get(linear.name)


def _chosen_to_leave(
    linear: FoundLinear, recipe: RecipeLike | None, include_head: bool, skip: Sequence[str]
) -> str | None:
    for pattern in skip:
        if fnmatch(linear.name, pattern):
            return f"option skip={pattern!r}"
    if linear.is_head and not include_head:
        return "it is the output head (option include_head=True quantizes it)"
    if linear.is_router:
        return "it chooses experts, by the largest of its outputs"
    choice = _choice(linear, recipe)
    if choice is not None and choice.keep:
        return f"calibration keeps it: {choice.reason}"
    return None


def _reason_to_leave(linear: FoundLinear, scheme: Scheme) -> str | None:
    weight, x = value(linear.weight), value(linear.x)
    if not is_weight(linear.weight):
        return "its weight is computed or passed in at run time"
    if weight.dim() != 2 or (linear.bias is not None and not is_weight(linear.bias)):
        return "its weight is no matrix, or its bias is computed at run time"
    if weight.dtype not in _DTYPES or x.dtype not in _DTYPES:
        return (
            f"its dtypes are {weight.dtype} and {x.dtype}; only 16 and 32 bit floats are quantized"
        )
    if linear.out_features == 1:
        return "it has one output: a weight too small to gain by"
    if linear.in_features < scheme.group_size:
        return (
            f"its {linear.in_features} input channels are fewer than "
            f"one group of {scheme.group_size}"
        )
    if weight.device.type == "cuda" and torch.cuda.get_device_capability(weight.device) < (8, 0):
        return "the GPU is older than sm_80"
    return None


def _transform(
    linears: Sequence[FoundLinear], scheme: Scheme, recipe: RecipeLike | None
) -> InputTransform:
    weights = tuple(WeightRef(linear.weight, linear.name, linear.transposed) for linear in linears)
    layout = scheme.layout(linears[0].in_features)
    if not scheme.sorts_channels:
        kept, descending = not scheme.act_order, scheme.act_order
        order = ChannelOrder(weights, recipe, kept=kept, descending=descending)
        return InputTransform(order, layout)
    if not scheme.rotation:
        return InputTransform(ChannelOrder(weights, recipe), layout)
    dealt = (layout, scheme.int8_groups(layout)) if recipe is None else None
    return InputTransform(ChannelOrder(weights, recipe, dealt), layout, scheme.rotation)


def _note(layout: GroupLayout, scheme: Scheme, choice: ChoiceLike | None) -> str | None:
    notes = []
    if layout.outlier_channels < scheme.outlier_channels:
        notes.append(
            f"narrow: {layout.outlier_channels} outlier channels, not {scheme.outlier_channels}"
        )
    if choice is not None and choice.int8_groups:
        groups = f"{choice.int8_groups} of {layout.num_groups} activation groups are INT8"
        notes.append(f"{groups}: {choice.reason}" if choice.reason else groups)
    if choice is not None and choice.note:
        notes.append(choice.note)
    return "; ".join(notes) or None
