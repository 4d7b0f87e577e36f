"""The passes in the order in which they run, and the runner that knows none of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch.fx import GraphModule, Node

from .attention_fusion import fuse_attention
from .attentions import FoundAttention, find_attentions, find_unknown
from .canonical import canonicalize
from .derived import RecipeLike
from .embeddings import quantize_embeddings
from .folding import fold_reorders
from .graphs import copy_graph_module
from .insertion import insert_quantization
from .linears import find_linears, find_stacks
from .packed import HeldLinear, find_packed
from .plan import PlannedLinear, plan_linears
from .quantize_fusion import fuse_quantize
from .record import Record
from .residual_fusion import fuse_residual
from .rope_fusion import fuse_rope
from .sharing import share_inputs
from .verification import verify

if TYPE_CHECKING:
    from ..scheme import Scheme


@dataclass
class Rewrite:
    """One run: what it was asked for, and what it made."""

    gm: GraphModule
    original: GraphModule
    names: Mapping[Node, str]
    scheme: Scheme
    recipe: RecipeLike | None
    include_head: bool
    include_embeddings: bool
    skip: Sequence[str]
    record: Record
    planned: list[PlannedLinear] = field(default_factory=list)
    held: list[HeldLinear] = field(default_factory=list)
    """The linears whose weights the model holds packed."""
    attentions: list[FoundAttention] = field(default_factory=list)
    unknown_attentions: list[str] = field(default_factory=list)
    stacks: dict[str, Node] = field(default_factory=dict)
    """By their names, weights of all experts of a layer, which stay as they are."""
    arguments: tuple[Node, ...] = ()
    """The copies of the captured graph's placeholders, in the order of its arguments."""


def _plan(run: Rewrite) -> GraphModule:
    run.attentions = find_attentions(run.gm.graph)
    run.unknown_attentions = find_unknown(run.gm.graph, run.attentions)
    run.record.remark(run.unknown_attentions, "a softmax that is not recognised as attention")
    run.held = find_packed(run.gm, run.record)
    found = find_linears(run.gm, run.names)
    run.stacks = {run.names.get(node, node.name): node for node in find_stacks(run.gm.graph)}
    run.record.remark(list(run.stacks), "a weight of all experts; atom_compile.quantize packs them")
    run.planned = plan_linears(found, run.scheme, run.recipe, run.include_head, run.skip)
    for plan in run.planned:
        if plan.reason or plan.note:
            run.record.remark([plan.found.name], str(plan.reason or plan.note))
    return run.gm


def _embeddings(run: Rewrite) -> GraphModule:
    if not run.include_embeddings:
        return run.gm
    scheme = run.scheme
    return quantize_embeddings(
        run.gm, scheme.group_size, scheme.weight_bits, scheme.weight_clip, run.record
    )


Pass = tuple[str, str, Callable[[Rewrite], GraphModule]]

PLAIN: tuple[Pass, ...] = (
    ("canonicalize", "the finders know one spelling", lambda run: canonicalize(run.gm)),
    ("plan", "every linear gets a layout and an order, or a reason", _plan),
    (
        "insert_quantization",
        "each linear becomes reorder, quantize, linear",
        lambda run: insert_quantization(run.gm, run.planned, run.scheme),
    ),
    ("quantize_embeddings", "only if asked for", _embeddings),
)
FUSED: tuple[Pass, ...] = (
    (
        "share_inputs",
        "q/k/v and gate/up quantize once, multiply once",
        lambda run: share_inputs(run.gm, run.record),
    ),
    (
        "fuse_attention",
        "a quantized cache is read as it lies",
        lambda run: fuse_attention(run.gm, run.record),
    ),
    ("fuse_rope", "one pass over queries and keys", lambda run: fuse_rope(run.gm, run.record)),
    (
        "fold_reorders",
        "a reorder in a neighbour's rows is free",
        lambda run: fold_reorders(run.gm, run.record),
    ),
    (
        "fuse_quantize",
        "one pass over each activation",
        lambda run: fuse_quantize(run.gm, run.record),
    ),
    ("fuse_residual", "the epilogue adds for free", lambda run: fuse_residual(run.gm, run.record)),
)
LAST: tuple[Pass, ...] = (
    ("verify", "no pass broke the graph", lambda run: verify(run.gm, run.original.graph)),
)


def rewrite(
    gm: GraphModule,
    names: Mapping[Node, str],
    *,
    scheme: Scheme,
    recipe: RecipeLike | None = None,
    include_head: bool = False,
    include_embeddings: bool = False,
    skip: Sequence[str] = (),
    fuse: bool = True,
    keep_graphs: bool = False,
) -> Rewrite:
    """Runs the pipeline on a copy of `gm`. `names`: its weight placeholders -> parameter names."""
    copied = copy_graph_module(gm)
    copies = dict(
        zip(
            gm.graph.find_nodes(op="placeholder"),
            copied.graph.find_nodes(op="placeholder"),
            strict=True,
        )
    )
    renamed = {copies[node]: name for node, name in names.items()}
    record = Record(keep_graphs)
    run = Rewrite(
        copied,
        gm,
        renamed,
        scheme,
        recipe,
        include_head,
        include_embeddings,
        tuple(skip),
        record,
        arguments=tuple(copies.values()),
    )
    run.record.close_stage("captured", "as Dynamo traced it", 0.0, gm)
    for name, why, one_pass in PLAIN + (FUSED if fuse else ()) + LAST:
        started = time.perf_counter()
        run.gm = one_pass(run)
        run.record.close_stage(name, why, (time.perf_counter() - started) * 1e3, run.gm)
    run.gm.recompile()
    return run
