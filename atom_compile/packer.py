"""Which linears of a model are to be packed, and packs those that read one activation."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .errors import AtomError
from .kernels.packing import empty_rows
from .options import Options
from .passes.derived import LinearPart, PackedLinear, WeightRef
from .passes.linears import FoundLinear
from .passes.plan import PlannedLinear, plan_linears
from .quantized_linear import InputFormat, QuantizedLinear, join_rows
from .readers import group_by_recipe, group_readers, is_conv1d
from .recipe import Recipe
from .scheme import Scheme

Linears = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Plan:
    """See `Quantized`. uncalibrated: names of linears that a recipe need not know."""

    groups: tuple[tuple[str, ...], ...]
    left: dict[str, str] = field(default_factory=dict)
    uncalibrated: frozenset[str] = frozenset()

    def options_of(self, group: Sequence[str], options: Options) -> Options:
        """For `pack_group`."""
        return _without_recipe(options) if self.uncalibrated.issuperset(group) else options


def _without_recipe(options: Options) -> Options:
    return dataclasses.replace(options, recipe=None)


def make_plan(
    model: nn.Module,
    options: Options,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None = None,
    of_experts: Collection[str] = (),
) -> Plan:
    """What `quantize` will do; nothing is changed, and no weight is read: it may be on meta.

    of_experts: names of linears that read tokens of their own, and that a recipe need not know.
    """
    known = {} if options.recipe is None else options.recipe.shapes
    uncalibrated = frozenset(name for name in of_experts if f"{name}.weight" not in known)
    left: dict[str, str] = {}
    linears: dict[str, nn.Module] = {}
    shared = _shared_parameters(model)
    for name, module in model.named_modules():
        if is_linear(module):
            reason = _reason_to_leave(name, module, shared) or _reason_of_place(model, name)
            if reason:
                left[f"{name}.weight"] = reason
            else:
                linears[name] = module
    head_modules = _heads(model)
    groups: list[tuple[str, ...]] = []
    for readers in find_readers(model, linears, options.recipe, example_inputs, of_experts):
        calibrated = options if readers[0] not in uncalibrated else _without_recipe(options)
        plans = _plan_readers({name: linears[name] for name in readers}, calibrated, head_modules)
        alike: dict[Any, list[str]] = defaultdict(list)
        for name, plan in plans.items():
            if plan.transform is None:
                left[f"{name}.weight"] = str(plan.reason)
            else:
                if calibrated.recipe is not None:
                    calibrated.recipe.name_of(weight_of(linears[name]), f"{name}.weight")
                alike[plan.activation_clip, plan.int8_groups].append(name)
        groups += [tuple(names) for names in alike.values()]
    quantized = {f"{name}.weight" for group in groups for name in group}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and name not in quantized:
            owner = model.get_submodule(name.rpartition(".")[0])
            left.setdefault(name, f"it belongs to a {type(owner).__name__}, not to a linear")
    return Plan(tuple(groups), left, uncalibrated)


def pack_group(linears: Linears, options: Options) -> dict[str, QuantizedLinear]:
    """The linears of one activation, packed and joined; they must be those of a plan's group."""
    plans = _plan_readers(linears, options, ())
    transform = next(iter(plans.values())).transform
    assert transform is not None
    tensors = {plan.found.weight: weight_of(linears[name]) for name, plan in plans.items()}
    order = None if transform.order.kept else transform.order.compute(tensors)[0]
    scheme = options.scheme
    packed: dict[str, QuantizedLinear] = {}
    for name, plan in plans.items():
        found, linear = plan.found, linears[name]
        part = LinearPart(
            WeightRef(found.weight, found.name, found.transposed), None, found.out_features
        )
        weight_only = scheme.activation_bits == 16
        numbers = scheme.weight_bits, scheme.weight_clip, weight_only, scheme.symmetric
        derived = PackedLinear((part,), transform, *numbers, scheme.weight_format)
        *fields, _ = derived.compute(tensors)
        kind: Any = derived.kind
        made = QuantizedLinear(
            kind(*fields),
            order,
            linear.bias,  # type: ignore[arg-type]
            input_format(scheme, found.in_features, plan.activation_clip, plan.int8_groups),
            derived.named,
        )
        packed[name] = made.train(linear.training)
    if len(packed) > 1:
        join_rows(list(packed.values()))
    return packed


@functools.lru_cache(maxsize=64)
def packed_on_meta(shape: tuple[int, int], scheme: Scheme) -> QuantizedLinear:
    """What a linear of that shape (N, K) becomes, without values and without its bias."""
    two = _two_rows_on_meta(shape[1], scheme)
    rows = empty_rows(two.packed, shape[0])
    return QuantizedLinear(rows, two.order, None, two.input_format, two.named)


@functools.lru_cache(maxsize=64)
def _two_rows_on_meta(in_features: int, scheme: Scheme) -> QuantizedLinear:
    """A model has few widths, and packing takes milliseconds: without values ten times as many.
    One row alone would be left as it is."""
    linear = nn.Linear(in_features, 2, bias=False, device="meta")
    linear.weight = nn.Parameter(
        torch.ones(linear.weight.shape, dtype=linear.weight.dtype, device="cpu")
    )
    return pack_group({"linear": linear}, Options(scheme=scheme))["linear"].to("meta")


def input_format(scheme: Scheme, width: int, clip: float, int8_groups: int) -> InputFormat:
    return InputFormat(
        cut=scheme.layout(width),
        bits=scheme.activation_bits,
        clip=clip,
        int8_groups=int8_groups,
        rotation=scheme.rotation or 0,
        format=scheme.activation_format,
    )


class Places:
    """Where each module is in a model: one may be in several places."""

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
        for parent in model.modules():
            for name, child in parent._modules.items():
                self._places[id(child)].append((parent, name))

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        for parent, name in self._places.pop(id(old)):
            parent._modules[name] = new


def is_linear(module: nn.Module) -> bool:
    """A subclass that computes something else, or is not called at all, is no linear."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    if type(module).forward is nn.Linear.forward or is_conv1d(module):
        return True
    return isinstance(module, nn.Linear) and _computes_the_same(module)


def _computes_the_same(module: nn.Linear) -> bool:
    """A forward of its own, such as Falcon's; tried on other numbers, as its own may be on meta."""
    numbers = torch.arange(23.0, device="cpu").sin()
    weight, bias, x = numbers[:12].view(3, 4), numbers[12:15], numbers[15:].view(2, 4)
    x = torch.stack([x[0], 1e6 * x[1]])
    parameters = {"weight": weight, "bias": None if module.bias is None else bias}
    probe = copy.copy(module)
    probe.__dict__["_parameters"] = parameters
    try:
        got = type(module).forward(probe, x)
    # it takes something else, or needs more than a linear has
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return False
    return isinstance(got, Tensor) and torch.allclose(got, F.linear(x, **parameters))


def weight_of(linear: nn.Module) -> Tensor:
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight


def _shared_parameters(model: nn.Module) -> dict[str, str]:
    """Parameter name -> another name that it has in another module."""
    names: dict[int, list[str]] = defaultdict(list)
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                names[id(parameter)].append(f"{module_name}.{name}".removeprefix("."))
    shared = {
        one: next(other for other in some if other != one)
        for some in names.values()
        if len(some) > 1
        for one in some
    }
    # transformers ties what is still on meta later
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    for name, source in tied.items():
        shared |= {name: source, source: name}
    return shared


def _reason_to_leave(name: str, module: nn.Module, shared: Mapping[str, str]) -> str | None:
    if not name:
        return "the model is this linear: nothing holds it that could hold another"
    if "weight" not in module._parameters:
        return "its weight is computed from others"
    if f"{name}.weight" in shared:
        return f"its weight is {shared[f'{name}.weight']} as well"
    if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks, or a forward of its own"
    return None


def _kept_in_32_bits(model: nn.Module, name: str) -> bool:
    """Whether transformers' other quantizers leave this linear, too: T5's `wo`."""
    lists = (getattr(model, f"_keep_in_fp32_modules{kind}", None) for kind in ("", "_strict"))
    kept = [one for some in lists for one in some or ()]
    return any(re.search(rf"(^|\.){one}($|\.)", f"{name}.weight") for one in kept)


def _reason_of_place(model: nn.Module, name: str) -> str | None:
    """For what transformers names, and for what lies beside experts, or in a module that is called
    as what chooses among them is."""
    if _kept_in_32_bits(model, name):
        return "transformers keeps it in 32 bits, and may cast activations to its dtype"
    owner, _, _ = name.rpartition(".")
    above, _, called = owner.rpartition(".")
    beside = [owner, above] if called in ("gate", "router") else [owner]
    if any("experts" in model.get_submodule(one)._modules for one in beside):
        return "it is beside experts, and chooses among them"
    return None


def _heads(model: nn.Module) -> tuple[nn.Module, ...]:
    """The output head that the model names, or the linears that look like one; see
    `passes/linears.py`, which knows what is read on as well."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is not None:
        return (head,)
    tables = {one.weight.shape for one in model.modules() if isinstance(one, nn.Embedding)}
    linears = [one for one in model.modules() if is_linear(one)]
    of_tables = [one for one in linears if shape_of(one) in tables]
    last = [one for one in linears[-1:] if not tables and shape_of(one)[0] >= 8 * shape_of(one)[1]]
    return (*of_tables, *last)


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(N, K)."""
    rows, columns = weight_of(linear).shape
    return (columns, rows) if is_conv1d(linear) else (rows, columns)


def find_readers(
    model: nn.Module,
    linears: Linears,
    recipe: Recipe | None,
    example_inputs: Sequence[Any] | Mapping[str, Any] | None,
    of_experts: Collection[str] = (),
) -> list[list[str]]:
    """The names of `linears`, those that read one activation together; see `make_plan`."""
    if recipe is not None:
        return group_by_recipe(list(linears), recipe, alone=of_experts)
    with torch.device("cpu"):
        inputs = example_inputs or getattr(model, "dummy_inputs", None)
    if inputs is None:
        return [[name] for name in linears]
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    try:
        return group_readers(model, linears, args, kwargs)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if example_inputs:
            raise AtomError(f"the model does not run on its example inputs ({said})") from error
        warnings.warn(
            f"atom: the model does not run on the inputs that it has of its own ({said}), so that "
            "each linear quantizes its input by itself; quantize(..., example_inputs=...) helps",
            stacklevel=3,
        )
        return [[name] for name in linears]


def _plan_readers(
    linears: Linears, options: Options, head_modules: Sequence[nn.Module]
) -> dict[str, PlannedLinear]:
    """What the backend would do with linears that read one activation."""
    graph = Graph()
    x = graph.placeholder("x")
    found = []
    for name, linear in linears.items():
        weight = weight_of(linear)
        x.meta["example_value"] = weight.new_empty(0)  # it has a dtype
        source = _weight_node(graph, weight)
        bias = None if linear.bias is None else _weight_node(graph, linear.bias)  # type: ignore[arg-type]
        is_head = any(linear is one for one in head_modules)
        transposed = is_conv1d(linear)
        found.append(FoundLinear(source, x, source, bias, transposed, f"{name}.weight", is_head))
    planned = plan_linears(
        found, options.scheme, options.recipe, options.include_head, options.skip
    )
    for node in graph.nodes:  # a graph lives until it is collected as garbage, weights must not
        node.meta["example_value"] = node.meta["example_value"].detach().to("meta")
    return dict(zip(linears, planned, strict=True))


def _weight_node(graph: Graph, weight: Tensor) -> Node:
    """As Dynamo marks a placeholder that is a parameter."""
    node = graph.placeholder("weight")
    node.meta.update(example_value=weight, tensor_dict={"_dynamo_static_input_type": "unguarded"})
    node._dynamo_source = SimpleNamespace(member="_parameters")
    return node
