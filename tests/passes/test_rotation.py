"""Rotations: in the graph, in the weights, and that they change no product."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from atom_compile import KVCache, KVScheme, Scheme
from atom_compile.backend import bind_inputs
from atom_compile.errors import OptionError
from atom_compile.kernels.packing import GroupLayout
from atom_compile.passes.derived import PackedLinear
from atom_compile.passes.transforms import deal
from atom_compile.store import Dispatcher

from ..capturing import (
    arguments_of,
    atom_operators,
    relative_error,
    rewrites,
    token_batch,
)
from ..models import tiny_llama

ROTATED = Scheme.preset("w4a4-rotated")


class Middle(nn.Module):
    """Two linears with an activation between them, all of which passes leave alone."""

    def __init__(self, width: int = 344) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(256, width), nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))  # type: ignore[no-any-return]


def calls(run: Any, name: str) -> list[tuple[Any, ...]]:
    """The arguments of each call of an operator, tensors left out."""
    nodes = [node for node in run.gm.graph.nodes if str(node.target) == f"atom.{name}.default"]
    return [tuple(one for one in node.args if not isinstance(one, torch.fx.Node)) for node in nodes]


def test_before_and_after() -> None:
    model, x = Middle().eval(), torch.randn(5, 256)
    (plain,) = rewrites(model, x, scheme=ROTATED, fuse=False)
    assert calls(plain, "rotate") == [(128, 32, 128), (128, 48, 128)]
    assert calls(plain, "quantize") == [
        (4, 128, 32, 0.8, 0, 0, False),
        (4, 128, 48, 0.8, 0, 0, False),
    ]
    assert len(calls(plain, "reorder")) == 2
    (fused,) = rewrites(model, x, scheme=ROTATED)
    assert calls(fused, "reorder_quantize") == [(4, 128, 32, 0.8, 0, 128, False)]
    # the reorder of the second went into the rows of the first; a tanh lets no rotation pass
    assert calls(fused, "quantize") == [(4, 128, 48, 0.8, 0, 128, False)]
    assert not calls(fused, "rotate") and not calls(fused, "reorder")


def test_llama_is_fused_as_without_a_rotation() -> None:
    model, ids = tiny_llama(), token_batch()
    assert atom_operators(model, ids, scheme=ROTATED) == atom_operators(model, ids)
    plain = atom_operators(model, ids, scheme=ROTATED, fuse=False)
    assert plain["atom.rotate"] == plain["atom.reorder"] == 14


@pytest.mark.parametrize("width", [256, 344, 1376])
@pytest.mark.parametrize("rotation", [None, 64])
def test_the_transform_of_a_weight_undoes_that_of_its_input(
    width: int, rotation: int | None
) -> None:
    model, x = Middle(width).eval(), torch.randn(5, 256)
    scheme = Scheme(rotation=rotation, group_size=64)
    (run,) = rewrites(model, x, scheme=scheme, fuse=False)
    nodes = [node for node in run.gm.graph.nodes if "atom_packed" in node.meta]
    values = dict(zip(run.arguments, arguments_of(model, x), strict=True))
    tensors = {node: value for node, value in values.items() if isinstance(value, Tensor)}
    for node in nodes:
        packed: PackedLinear = node.meta["atom_packed"]
        weight = packed.parts[0].weight.read(tensors)
        rows = torch.randn(3, weight.shape[1])
        transform = packed.transform.known(tensors)
        columns = transform.apply(weight)
        assert columns.shape[1] == packed.layout.width
        got = transform.apply(rows) @ columns.t()
        torch.testing.assert_close(got, rows @ weight.t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [344, 352, 1376])
def test_any_width(width: int) -> None:
    model, x = Middle(width).eval(), torch.randn(5, 256)
    for linear in (model.up, model.down):
        nn.init.normal_(linear.weight, std=0.05)
    scheme = replace(ROTATED, activation_bits=8, activation_clip=1.0)
    (run,) = rewrites(model, x, scheme=scheme)
    inputs = bind_inputs(run)
    got: Any = Dispatcher(run.gm.forward, run.arguments, inputs)(*arguments_of(model, x))
    assert relative_error(got[0], model(x)) < 0.2


def test_channels_are_dealt_out_there_and_back() -> None:
    order = deal(torch.arange(20), GroupLayout(20, 4, 4))
    assert order.view(5, 4).tolist() == [
        [0, 7, 8, 15],
        [1, 6, 9, 14],
        [2, 5, 10, 13],
        [3, 4, 11, 12],
        [16, 17, 18, 19],
    ]


@pytest.mark.parametrize("layout", [GroupLayout(344, 128, 48), GroupLayout(1376, 64, 16)])
def test_a_ragged_group_gets_its_share_of_all_sizes(layout: GroupLayout) -> None:
    order = deal(torch.arange(layout.width), layout)
    assert order.sort().values.tolist() == list(range(layout.width))
    grouped = layout.width - layout.outlier_channels
    assert order[grouped:].tolist() == list(range(grouped, layout.width))
    means = [group.float().mean() for group in order[:grouped].split(layout.group_size)]
    assert max(means) - min(means) < 0.05 * grouped


@pytest.mark.parametrize("rotation", [0, 1, 3, 48, 256])
def test_a_rotation_must_fit_its_group(rotation: int) -> None:
    with pytest.raises(OptionError, match="power of two that divides group_size, which is 128"):
        Scheme(rotation=rotation)


def test_a_rotated_cache_excludes_keys_before_rope_and_16_bits() -> None:
    with pytest.raises(OptionError, match="leave keys_before_rope off"):
        KVScheme(rotate=True, keys_before_rope=True)
    with pytest.raises(OptionError, match="with 16 bits nothing is quantized"):
        KVScheme(bits=16, rotate=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 11])
def test_attention_reads_a_rotated_cache(tokens: int, dtype: torch.dtype) -> None:
    model, ids = tiny_llama().to(dtype), token_batch(2, tokens)
    cache = KVCache(model.config, 2, 32, "kv4-rotated", dtype=dtype)

    def step(ids: Tensor) -> Any:
        return model(ids, past_key_values=cache).logits

    options = {"skip": ["*"], "allow_unchanged": True}
    (run,) = rewrites(step, ids, **options)
    operators = run.record.stages[-1].operators
    layers = len(cache.quantized_layers)
    assert operators["atom.attention"] == operators["atom.kv_append"] == layers
    assert operators["atom.rotate"] == 4 * layers  # keys, values, queries, results
    assert "atom.kv_read" not in operators
    assert run.attentions[0].cache == "kv4, rotated"
    cache.reset()
    wanted = step(ids)
    cache.reset()
    arguments = arguments_of(step, ids)
    cache.reset()
    inputs = bind_inputs(run)
    results: Any = Dispatcher(run.gm.forward, run.arguments, inputs)(*arguments)
    assert relative_error(results[-1], wanted) < (1e-4 if dtype == torch.float32 else 3e-2)


def test_a_rotated_cache_keeps_keys_with_large_channels_better() -> None:
    torch.manual_seed(0)
    key, value = torch.randn(1, 2, 20, 64), torch.randn(1, 2, 20, 64)
    key[..., 5] *= 12
    config = tiny_llama().config
    errors = {}
    for scheme in ("kv4", "kv4-rotated"):
        cache = KVCache(config, 1, 20, scheme, dtype=torch.float32)
        layer = cache.quantized_layers[0]
        if layer.k_head_dim != 64:
            layer.allocate(1, 2, 64, 64, torch.float32, torch.device("cpu"))
        keys, values = layer.update(key, value)
        errors[scheme] = relative_error(keys, key)
        assert relative_error(values, value) < 0.13
    assert errors["kv4-rotated"] < 0.7 * errors["kv4"]
