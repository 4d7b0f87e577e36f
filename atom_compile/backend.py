"""`torch.compile(model, backend="atom")`: compiles Dynamo's graph over INT4 operators."""

from __future__ import annotations

import functools
import hashlib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import GraphModule, Node

from . import compat
from .errors import AtomError, NothingRewrittenError, TrainingModeError
from .kernels import library
from .kernels.quantize_e4m3 import quantize_e4m3
from .options import Options
from .passes import pipeline
from .passes.graphs import is_call, value
from .passes.linears import is_weight
from .passes.pipeline import Rewrite
from .passes.ranges import name_ranges
from .passes.record import log
from .store import Dispatcher


def atom(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The Dynamo backend. `mode`: as in torch.compile; `options`: see `options.Options`."""
    parsed = Options.parse(options)
    refuse_training(gm)
    compile_graph = functools.partial(
        compat.compile_graph,
        config_patches={**compat.mode_options(mode or parsed.mode), **parsed.inductor},
    )
    try:
        run = rewrite(gm, parsed)
        refuse_float8(run.gm)
        if parsed.profile:
            name_ranges(run.gm)
        inputs = bind_inputs(run)
    except AtomError:
        raise
    except Exception as error:  # any failure of a rewrite falls back to the untouched graph
        if parsed.strict:
            raise
        warnings.warn(
            f"atom: the rewrite failed ({type(error).__name__}: {str(error)[:200]}); "
            "this graph is compiled unquantized. Option strict=True raises instead.",
            stacklevel=2,
        )
        return compile_graph(gm, example_inputs, references={}, cache_key="")
    nodes = list(run.gm.graph.find_nodes(op="placeholder"))
    on_gpu = any(isinstance(value(node), torch.Tensor) and value(node).is_cuda for node in nodes)
    compiled = compile_graph(
        run.gm,
        [
            example_inputs[one] if isinstance(one, int) else value(node)
            for node, one in zip(nodes, inputs, strict=True)
        ],
        references={} if on_gpu else library.REFERENCES,
        cache_key=cache_key(parsed),
    )
    return Dispatcher(compiled, run.arguments, inputs)


def rewrite(gm: GraphModule, options: Options, keep_graphs: bool = False) -> Rewrite:
    """Runs the passes on a copy of Dynamo's graph.

    Raises NothingRewrittenError if no linear could be rewritten.
    """
    run = pipeline.rewrite(
        gm,
        parameter_names(gm),
        scheme=options.scheme,
        recipe=options.recipe,
        include_head=options.include_head,
        include_embeddings=options.include_embeddings,
        skip=options.skip,
        fuse=options.fuse,
        keep_graphs=keep_graphs,
    )
    left = [plan for plan in run.planned if plan.transform is None]
    log.info(
        "%d of %d linears rewritten in %.0f ms; %d packed already",
        len(run.planned) - len(left),
        len(run.planned),
        sum(stage.milliseconds for stage in run.record.stages),
        len(run.held),
    )
    unwanted = [plan for plan in left if not plan.left_by_choice]
    nothing = len(left) == len(run.planned) and not run.held
    if unwanted and nothing and not options.allow_unchanged:
        reasons = "\n".join(f"  {plan.found.name}: {plan.reason}" for plan in unwanted[:8])
        raise NothingRewrittenError(
            f"not one of {len(left)} linears can be quantized:\n{reasons}\n"
            "Option allow_unchanged=True compiles the graph as it is."
        )
    return run


def refuse_training(gm: GraphModule) -> None:
    """Raises TrainingModeError for a graph of a model in training mode."""
    training = [name for name, module in compat.modules_being_compiled().items() if module.training]
    dropouts = [
        node for node in gm.graph.nodes if is_call(node, F.dropout) and node.kwargs.get("training")
    ]
    if training or dropouts:
        raise TrainingModeError(
            "the model is in training mode, and the quantized operators have no gradients. "
            "Call model.eval() before its first compiled call."
        )


def refuse_float8(gm: GraphModule) -> None:
    """Raises AtomError for activations in FP8 that Inductor would fail to compile."""
    for node in gm.graph.find_nodes(op="call_function", target=quantize_e4m3):
        if not compat.compiles_e4m3(value(node.args[0]).device):
            raise AtomError(
                "on a GPU older than sm_89 activations in FP8 need torch 2.13 or newer to be "
                "compiled. Take a scheme without them, such as 'w6a16'."
            )


_STEPS = re.compile(r"\['(\w+)'\]|\[(\d+)\]|\.(\w+)")


def parameter_names(gm: GraphModule) -> dict[Node, str]:
    """Weight placeholder -> the parameter's name in the module whose forward is being compiled."""
    names = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        if is_weight(node):
            _, *steps = ("".join(step) for step in _STEPS.findall(compat.source_name(node)))
            names[node] = ".".join(
                step for step in steps if step not in ("_modules", "_parameters", "_buffers")
            )
    return names


def bind_inputs(run: Rewrite) -> list[int | tuple[Any, int]]:
    """Drops weights that are no longer read; says what each remaining input is.

    Either an argument, by number, or a field of something derived from arguments.
    """
    graph = run.gm.graph
    placeholders = list(graph.find_nodes(op="placeholder"))
    numbers = {node: number for number, node in enumerate(run.arguments)}
    inputs: list[int | tuple[Any, int]] = []
    for node in placeholders:
        if not node.users and (node not in numbers or is_weight(node)):
            graph.erase_node(node)
        else:
            inputs.append(numbers[node] if node in numbers else node.meta["atom_derived"])
    run.gm.recompile()
    return inputs


def cache_key(options: Options) -> str:
    """Tells Inductor's caches apart what they cannot see: our sources and the options."""
    return f"atom-{_sources_hash()}-{options.scheme}-{options.fuse}"


@functools.cache
def _sources_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    for folder in ("kernels", "passes"):  # links in a checkout, which rglob does not follow
        for path in sorted((Path(__file__).parent / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
