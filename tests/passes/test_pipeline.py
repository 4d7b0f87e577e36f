"""The whole pipeline: what it finds in which model, and that fusing changes no result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node

from atom_compile.backend import bind_inputs
from atom_compile.passes.pipeline import Rewrite
from atom_compile.store import Dispatcher

from ..capturing import (
    arguments_of,
    atom_operators,
    reference_output,
    relative_error,
    rewrites,
    token_batch,
)
from ..models import HandWritten, Scaling, Standardize, tiny_llama

FUSED = {
    "atom.norm_quantize": 4,
    "atom.gated_quantize": 2,
    "atom.reorder_quantize": 2,
    "atom.linear": 8,
    "linear": 1,
}


class _Recording(Interpreter):
    """Keeps every INT8 tensor that the graph computes."""

    codes: list[Tensor]

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and isinstance(result, Tensor) and result.dtype == torch.int8:
            self.codes.append(result)
        return result


def kept_inputs(run: Rewrite) -> list[Node]:
    """The inputs that the rewritten graph still reads."""
    return [node for node in run.gm.graph.find_nodes(op="placeholder") if node.users]


def execute(run: Rewrite, arguments: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The rewritten graph's results and all codes in it."""
    inputs = bind_inputs(run)
    interpreter = _Recording(run.gm)
    interpreter.codes = []
    results = Dispatcher(interpreter.run, run.arguments, inputs)(*arguments)
    assert isinstance(results, tuple)
    return list(results), interpreter.codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama(dtype: torch.dtype) -> None:
    model, ids = tiny_llama().to(dtype), token_batch()
    assert atom_operators(model, ids) == FUSED
    plain = {"atom.reorder": 14, "atom.quantize": 14, "atom.linear": 14, "linear": 1}
    assert atom_operators(model, ids, fuse=False) == plain
    assert "linear" not in atom_operators(model, ids, include_head=True)
    embedded = rewrites(model, ids, include_head=True, include_embeddings=True)[0]
    assert embedded.record.stages[-1].operators["atom.embedding"] == 1
    assert not any("embed_tokens" in one.name for one in kept_inputs(embedded))
    assert atom_operators(model, ids, skip=["*.o_proj.weight"])["linear"] == 3


@pytest.mark.parametrize("norm", [Scaling, Standardize, nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize(("bias", "gated"), [(True, True), (False, False)])
def test_hand_written_models(norm: type[nn.Module], bias: bool, gated: bool) -> None:
    model = HandWritten(norm=norm, bias=bias, gated=gated).eval()
    assert atom_operators(model, token_batch()) == FUSED


def test_names_and_reasons() -> None:
    (run,) = rewrites(HandWritten(depth=1).eval(), token_batch())
    planned = {plan.found.name: plan.reason for plan in run.planned}
    assert set(planned) == {
        "towers.0.mixing.weight",
        "towers.0.out",
        "towers.0.wide.weight",
        "towers.0.second.weight",
        "towers.0.narrow.weight",
        "reading.weight",
    }
    assert "output head" in str(planned["reading.weight"])
    assert all(run.record.remarks[name] for name in planned)  # narrow layers, and the head


class Ending(nn.Module):
    """The end of a model, compiled apart from its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.lm_head = nn.Linear(256, 256), nn.Linear(256, 96)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.lm_head(self.up(x))
        return scores


class OtherWidth(nn.Module):
    """Embeddings, and a head that is wider than they are or has other rows."""

    def __init__(self, head: str, rows: int, width: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(96, 128), nn.Embedding(64, 128)
        self.up, self.down = nn.Linear(128, width), nn.Linear(width, width)
        self.head = head
        self.add_module(head, nn.Linear(width, rows))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.positions(ids % 64)
        scores: Tensor = getattr(self, self.head)(self.down(self.up(x)))
        return scores


@pytest.mark.parametrize(
    ("head", "rows", "is_head"), [("out", 96, True), ("lm_head", 90, True), ("out", 64, False)]
)
def test_a_head_of_another_shape_than_the_table(head: str, rows: int, is_head: bool) -> None:
    (run,) = rewrites(OtherWidth(head, rows, 256).eval(), token_batch())
    assert [plan.found.is_head for plan in run.planned] == [False, False, is_head]


def test_a_head_without_a_table_is_told_by_its_name() -> None:
    (run,) = rewrites(Ending().eval(), torch.randn(3, 256))
    assert [plan.found.is_head for plan in run.planned] == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["w4a4", "w4a8", "w4a8-two-level", "w4a4-rotated"])
def test_plain_and_fused_graphs_agree(scheme: str, dtype: torch.dtype) -> None:
    for model in (tiny_llama(), HandWritten(norm=nn.LayerNorm, bias=True, gated=False).eval()):
        model, ids = model.to(dtype), token_batch()
        arguments = arguments_of(model, ids)
        (plain,) = rewrites(model, ids, scheme=scheme, fuse=False)
        (fused,) = rewrites(model, ids, scheme=scheme)
        plain_results, plain_codes = execute(plain, arguments)
        fused_results, fused_codes = execute(fused, arguments)
        for a, b in zip(plain_results, fused_results, strict=True):
            assert relative_error(b, a) < 1e-3
        assert fused_codes
        for codes in fused_codes:
            assert any(torch.equal(codes, one) for one in plain_codes if one.shape == codes.shape)


def test_every_node_has_metadata_after_every_pass() -> None:
    (run,) = rewrites(tiny_llama(), token_batch())
    for stage in run.record.stages:
        assert stage.graph is not None
        stage.graph.lint()
        for node in stage.graph.nodes:
            if getattr(node.target, "namespace", "") == "atom":
                assert "example_value" in node.meta


@pytest.mark.parametrize("width", [2817, 1376, 352, 344])
def test_any_width(width: int) -> None:
    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(256, width), nn.Linear(width, 256)
            # bell-shaped, as trained weights are: clips suit those
            for linear in (self.up, self.down):
                nn.init.normal_(linear.weight, std=0.05)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(x)))  # type: ignore[no-any-return]

    model, x = Middle().eval(), torch.randn(5, 256)
    (run,) = rewrites(model, x, scheme="w4a8")
    (got,), _ = execute(run, arguments_of(model, x))
    assert relative_error(got, model(x)) < 0.25


class TorchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.down = nn.LayerNorm(256), nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        scale, bias = self.norm.weight, self.norm.bias
        x = torch.layer_norm(x, (256,), scale, bias, 1e-5, True)
        x = torch.layer_norm(x, (256,), weight=scale, bias=bias, cudnn_enable=False)
        down: Tensor = self.down(x)
        return down


def test_torchs_own_layer_norm_takes_more() -> None:
    model, x = TorchNorm().eval(), torch.randn(3, 256)
    plain = reference_output(model, x, skip=["*"], allow_unchanged=True)
    torch.testing.assert_close(plain, model(x))


class Activated(nn.Module):
    """Activations that no linear reads, and one that does, beside other readers of their input."""

    def __init__(self, kind: type[nn.ReLU] | type[nn.SiLU], inplace: bool, apart: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 256), nn.Linear(256, 256)
        self.activation, self.apart = kind(inplace), apart

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(x)
        active: Tensor = self.activation(up)
        again: Tensor = self.activation(active - 0.5) * 2
        down: Tensor = self.down(active)
        return down + again + (up if self.apart else 0)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", [nn.ReLU, nn.SiLU])
def test_activations_in_place_and_alone(
    kind: type[nn.ReLU] | type[nn.SiLU], inplace: bool, apart: bool
) -> None:
    torch.manual_seed(0)
    model, x = Activated(kind, inplace, apart).eval(), torch.randn(3, 256)
    unquantized: dict[str, Any] = {"skip": ["*"], "allow_unchanged": True}
    for options in (unquantized, {"scheme": "w4a8"}):
        plain = reference_output(model, x, fuse=False, **options)
        torch.testing.assert_close(reference_output(model, x, **options), plain)
        if options is unquantized:
            torch.testing.assert_close(plain, model(x))
