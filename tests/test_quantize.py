"""Packing in place: what is computed, what is left, and that the 16-bit weights are gone."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from atom_compile import AtomError, calibrate, quantize
from atom_compile.errors import (
    NothingRewrittenError,
    OptionError,
    RecipeError,
    TrainingModeError,
)
from atom_compile.packer import is_linear, pack_group
from atom_compile.quantized_linear import QuantizedLinear
from atom_compile.scheme import Scheme

from .capturing import reference_output, relative_error, token_batch
from .models import HandWritten, tiny_llama

SCHEMES = ["w4a4", "w4a4-fp4", "w4ax", "w4a8", "w4a4-rotated", "w4a8-two-level", "w4a16", "w6a16"]
SCHEMES += ["w6a8", "nvfp4"]


def hand_written(**options: Any) -> HandWritten:
    torch.manual_seed(0)
    return HandWritten(**options).eval()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    out = model(ids)
    return out if isinstance(out, Tensor) else out.logits


def packed_names(model: nn.Module) -> set[str]:
    return {name for name, one in model.named_modules() if isinstance(one, QuantizedLinear)}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_computes_what_the_backend_makes_of_the_16_bit_model(scheme: str) -> None:
    model, ids = tiny_llama(), token_batch()
    want = reference_output(model, ids, scheme=scheme, fuse=False)
    done = quantize(model, scheme, progress=False)
    assert sum(len(group) for group in done.groups) == 14
    assert torch.equal(logits(model, ids), want)
    assert done.bytes_after < done.bytes_before / 4  # float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_and_biases(dtype: torch.dtype) -> None:
    model, ids = hand_written(bias=True).to(dtype), token_batch()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) / 50)
    skip = ["towers.*.out"]  # a parameter that is no module
    want = reference_output(model, ids, fuse=False, skip=skip)
    quantize(model, "w4a4", example_inputs=(ids,), progress=False)
    assert logits(model, ids).dtype == dtype
    assert torch.equal(logits(model, ids), want)


def test_linears_of_one_activation_share_its_order_and_hold_one_weight() -> None:
    model = tiny_llama()
    done = quantize(model, progress=False)
    assert [len(group) for group in done.groups] == [3, 1, 2, 1] * 2
    attention = model.model.layers[0].self_attn
    q, k, v, o = (getattr(attention, f"{one}_proj") for one in "qkvo")
    assert q.order is k.order is v.order
    assert q.weight is k.weight is v.weight
    assert q.is_joined and not o.is_joined
    assert [one.first_row for one in (q, k, v)] == [0, 256, 384]
    held = {id(one): one.nbytes for one in model.parameters()}
    assert sum(held.values()) < 1.3 * (done.bytes_after + model.lm_head.weight.nbytes * 2)


def test_bars_stay_out_of_what_a_program_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as if both were terminals
    model = tiny_llama(layers=1)
    recipe = calibrate(model, [token_batch()], "w4a4")
    quantize(model, recipe)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert all(one in printed.err for one in ("calibrating", "measuring", "rounding", "quantizing"))


def test_without_example_inputs_each_stands_alone_and_computes() -> None:
    model, ids = hand_written(), token_batch()
    done = quantize(model, progress=False)
    assert all(len(group) == 1 for group in done.groups)
    assert logits(model, ids).isfinite().all()


def test_the_16_bit_weights_are_gone() -> None:
    model = tiny_llama()
    weights = {name: weakref.ref(one) for name, one in model.named_parameters() if "_proj" in name}
    gc.collect()
    gc.disable()  # nothing may wait for the garbage collector
    try:
        quantize(model, progress=False)
        assert [name for name, one in weights.items() if one() is not None] == []
    finally:
        gc.enable()


def test_it_holds_no_more_than_the_model_and_one_activations_linears(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_llama(layers=3)
    weights = [weakref.ref(one) for name, one in model.named_parameters() if "_proj" in name]
    alive: list[int] = []

    def counting(*arguments: Any) -> Any:
        alive.append(sum(one() is not None for one in weights))
        return pack_group(*arguments)

    # the package has a function of that name
    monkeypatch.setattr(sys.modules["atom_compile.quantize"], "pack_group", counting)
    gc.disable()
    try:
        quantize(model, progress=False)
    finally:
        gc.enable()
    assert alive == [21, 18, 17, 15, 14, 11, 10, 8, 7, 4, 3, 1]


def test_tied_shared_and_other_weights_are_left_and_reported() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(96, 256)
            self.first = nn.Linear(256, 256)
            self.again = nn.Linear(256, 256)
            self.again.weight = self.first.weight
            self.attention = nn.MultiheadAttention(256, 4, batch_first=True)
            self.twice = nn.Linear(256, 256)
            self.narrow = nn.Linear(256, 32)
            self.widen = nn.Linear(32, 256)
            self.head = nn.Linear(256, 96, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            x = self.again(self.first(self.table(ids)))
            x = x + self.attention(x, x, x, need_weights=False)[0]
            x = self.twice(torch.relu(self.twice(x)))
            return self.head(self.widen(self.narrow(x)))  # type: ignore[no-any-return]

    model = Model().eval()
    ids = token_batch()
    done = quantize(model, example_inputs=(ids,), progress=False)
    assert packed_names(model) == {"twice", "narrow"}
    assert done.left["first.weight"] == "its weight is again.weight as well"
    assert done.left["head.weight"] == "its weight is table.weight as well"
    assert "fewer than one group" in done.left["widen.weight"]
    assert "MultiheadAttention" in done.left["attention.in_proj_weight"]
    assert "attention.out_proj.weight" in done.left
    assert model.head.weight is model.table.weight
    assert model.again.weight is model.first.weight
    assert logits(model, ids).isfinite().all()
    assert "2 linears quantized" in str(done)


def test_a_module_in_two_places_stays_one() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU())
    model.append(model[0])
    model.eval()
    quantize(model, progress=False)
    assert isinstance(model[0], QuantizedLinear)
    assert model[2] is model[0]


def test_the_head_and_patterns() -> None:
    model = tiny_llama(vocabulary=320)
    done = quantize(model, skip=["*.0.*.q_proj.weight"], include_head=True, progress=False)
    names = packed_names(model)
    assert "lm_head" in names
    assert "model.layers.0.self_attn.q_proj" not in names
    assert "skip" in done.left["model.layers.0.self_attn.q_proj.weight"]
    assert done.groups[0] == ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj")
    assert "lm_head" not in packed_names_of(tiny_llama())


def test_a_linear_as_wide_as_the_vocabulary_is_no_head() -> None:
    names = packed_names_of(tiny_llama(layers=1, intermediate=352, vocabulary=352))
    assert {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")} <= names
    assert "lm_head" not in names


def packed_names_of(model: nn.Module) -> set[str]:
    quantize(model, progress=False)
    return packed_names(model)


def test_what_transformers_keeps_in_32_bits_is_left() -> None:
    sizes = {"d_model": 256, "d_ff": 384, "num_layers": 1, "num_heads": 4, "vocab_size": 96}
    torch.manual_seed(0)
    model, ids = T5ForConditionalGeneration(T5Config(**sizes)).eval(), token_batch()
    want = model(input_ids=ids, decoder_input_ids=ids).logits
    done = quantize(model, "w4a8", progress=False)
    kept = [name for name, reason in done.left.items() if "32 bits" in reason]
    assert len(kept) == 2 and all(name.endswith(".wo.weight") for name in kept)
    got = model(input_ids=ids, decoder_input_ids=ids).logits
    assert relative_error(got, want) < 0.3


def test_activations_cast_to_the_dtype_of_a_packed_weight_are_refused() -> None:
    linear = nn.Sequential(nn.Linear(256, 256)).eval()
    quantize(linear, include_head=True, progress=False)
    with pytest.raises(AtomError, match=r"called with torch.uint8: .*Leave it as it is"):
        linear(torch.zeros(2, 256, dtype=torch.uint8))


class InItsOwnWords(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


class Clipped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-100, 100)


class Twice(nn.Linear):
    def forward(self, x: Tensor, factor: float) -> Tensor:  # type: ignore[override]
        return super().forward(factor * x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_linear_in_other_words_is_one(device: str) -> None:
    kinds = nn.Linear, InItsOwnWords, Clipped, Twice
    assert [is_linear(kind(8, 8, device=device)) for kind in kinds] == [True, True, False, False]
    without_bias = InItsOwnWords(8, 8, bias=False, device=device)
    assert not is_linear(without_bias)  # it would fail


def test_gpt2_stores_its_weights_the_other_way_round() -> None:
    config = GPT2Config(n_embd=256, n_layer=1, n_head=4, vocab_size=96, n_positions=64)
    torch.manual_seed(0)
    model, ids = GPT2LMHeadModel(config).eval(), token_batch()
    want = reference_output(model, ids, fuse=False)
    quantize(model, progress=False)
    assert len(packed_names(model)) == 4
    assert torch.equal(logits(model, ids), want)


def test_a_recipe_brings_its_rounded_weights_and_choices() -> None:
    model, ids = tiny_llama(layers=1), token_batch()
    scheme = Scheme(int8_share=0.5)
    recipe = calibrate(model, [token_batch(2, 40)], scheme, progress=False)
    want = reference_output(model, ids, recipe=recipe, fuse=False)
    done = quantize(model, recipe, progress=False)
    assert [len(group) for group in done.groups] == [3, 1, 2, 1]
    assert torch.equal(logits(model, ids), want)


def test_moves_casts_and_copies_keep_what_is_packed() -> None:
    model, ids = tiny_llama(), token_batch()
    quantize(model, progress=False)
    want = logits(model, ids)
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied, ids), want)
    q, k = copied.model.layers[0].self_attn.q_proj, copied.model.layers[0].self_attn.k_proj
    assert q.weight is k.weight and q.order is k.order
    half = copied.to(torch.float16)
    q = half.model.layers[0].self_attn.q_proj
    assert (q.weight_scale.dtype, q.outlier_scale.dtype) == (torch.bfloat16, torch.float32)
    assert half.model.norm.weight.dtype == torch.float16


@pytest.mark.parametrize("assign", [False, True])
def test_the_state_dict_has_each_linears_own_rows(assign: bool) -> None:
    model, other, ids = tiny_llama(seed=1), tiny_llama(seed=2), token_batch()
    quantize(model, progress=False)
    quantize(other, progress=False)
    state_dict = model.state_dict()
    attention = "model.layers.0.self_attn"
    assert state_dict[f"{attention}.k_proj.weight"].shape[1] == 128
    assert state_dict[f"{attention}.k_proj.outlier_weight"].shape[0] == 128
    assert not torch.equal(logits(other, ids), logits(model, ids))
    other.load_state_dict(state_dict, assign=assign)
    assert torch.equal(logits(other, ids), logits(model, ids))
    assert other.model.layers[0].self_attn.k_proj.is_joined is not assign


def test_the_wrong_arguments_change_nothing() -> None:
    model = tiny_llama(layers=1)
    recipe = calibrate(tiny_llama(layers=2), [token_batch()], gptq=False, progress=False)
    narrow = calibrate(tiny_llama(layers=1, intermediate=384), [token_batch()], progress=False)
    before = list(model.named_parameters())
    with pytest.raises(OptionError, match="unknown scheme 'w4a5'"):
        quantize(model, "w4a5")
    with pytest.raises(OptionError, match=r"not a dict"):
        quantize(model, {"scheme": "w4a4"})  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"absent.safetensors is no file"):
        quantize(model, "absent.safetensors")
    with pytest.raises(RecipeError, match="of another model"):
        quantize(model, narrow)
    with pytest.raises(AtomError, match="does not run on its example inputs"):
        quantize(model, example_inputs=(torch.zeros(3),))
    with pytest.raises(NothingRewrittenError, match="not one linear"):
        quantize(model, skip=["*"])
    with pytest.raises(NothingRewrittenError, match="the model is this linear"):
        quantize(nn.Linear(256, 256).eval())
    with pytest.raises(TrainingModeError, match=r"model.eval\(\)"):
        quantize(tiny_llama().train())
    assert [(name, id(one)) for name, one in model.named_parameters()] == [
        (name, id(one)) for name, one in before
    ]
    assert recipe.shapes  # of a deeper model, whose first layer has the same names and shapes
    quantize(model, recipe, progress=False)
    with pytest.raises(NothingRewrittenError, match="not one linear"):
        quantize(model)
