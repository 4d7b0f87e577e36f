"""GPTQ, clips and precisions of whole models: what calibration chooses, and that graphs use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import atom_compile
from atom_compile import AtomError, Recipe, Scheme, gptq, rounding
from atom_compile.errors import RecipeError
from atom_compile.replay import Call, Stream

from .capturing import reference_output, relative_error, token_batch
from .models import HandWritten, tiny_llama

BATCHES = [token_batch(4, 64), token_batch(4, 64), token_batch(2, 30)]
IDS = BATCHES[0]


def calibrated(model: nn.Module, **arguments: Any) -> Recipe:
    return atom_compile.calibrate(model, BATCHES, progress=False, **arguments)


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama(layers=1)


@pytest.fixture(scope="module")
def recipe(llama: Any) -> Recipe:
    return calibrated(llama)


def error_of(model: Any, recipe: Recipe, **options: Any) -> float:
    out = model(IDS)
    got = reference_output(model, IDS, recipe=recipe, strict=True, **options)
    return relative_error(got, getattr(out, "logits", out).detach())


def test_a_recipe_beats_rounding_to_nearest(llama: Any, recipe: Recipe) -> None:
    statistics = Recipe(recipe.scheme, recipe.hessian_diagonal, recipe.shapes)
    assert error_of(llama, recipe) < 0.85 * error_of(llama, statistics)
    assert len(recipe.rounded) == len(recipe.layers) == 7  # not the head
    assert all(0.0 < choice.error < 0.1 for choice in recipe.layers.values() if choice.error)


def test_any_architecture() -> None:
    """No module names, weights used as x @ W.T, biases, an ungated MLP."""
    model = HandWritten(bias=True, gated=False).eval()
    recipe = calibrated(model)
    statistics = Recipe(recipe.scheme, recipe.hessian_diagonal, recipe.shapes)
    assert "towers.1.out" in recipe.rounded
    assert error_of(model, recipe) < 0.85 * error_of(model, statistics)


@pytest.fixture(scope="module")
def rotated(llama: Any) -> Recipe:
    return calibrated(llama, scheme="w4a4-rotated")


def test_a_rotated_recipe_beats_rounding_to_nearest(llama: Any, rotated: Recipe) -> None:
    statistics = Recipe(rotated.scheme, rotated.hessian_diagonal, rotated.shapes)
    assert error_of(llama, rotated) < 0.85 * error_of(llama, statistics)
    assert len(rotated.rounded) == 7


@pytest.mark.parametrize("int8_share", [0.0, 0.6])
def test_the_graph_has_the_error_that_calibration_measured(int8_share: float) -> None:
    """One space for weights and activations, whatever the width: 344 is not whole groups."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(344, 256, bias=False)).eval()
    x = torch.randn(500, 86) @ torch.randn(86, 344)
    x[:, 3] *= 30.0
    for rotation in (None, 64):
        scheme = Scheme(rotation=rotation, int8_share=int8_share)
        recipe = atom_compile.calibrate(model, [x], scheme, progress=False)
        (choice,) = recipe.layers.values()
        assert choice.error is not None and (choice.int8_groups > 0) == (int8_share > 0)
        got = reference_output(model, x, recipe=recipe, strict=True)
        assert relative_error(got, model(x)) ** 2 == pytest.approx(choice.error, rel=1e-3)
        assert choice.error < 0.01


def test_weights_rounded_in_another_space_are_refused(llama: Any, rotated: Recipe) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    weight, cut = llama.get_parameter(name), rotated.scheme.layout(352)
    assert rotated.rounded_weight(weight, name, False, cut, 128) is not None
    with pytest.raises(AssertionError, match="another transform"):
        rotated.rounded_weight(weight, name, False, cut, 0)
    assert not rotated.for_scheme(Scheme()).rounded


def test_plain_and_fused_graphs_agree(llama: Any, recipe: Recipe) -> None:
    """Also with rows that pack in the order of the next linear."""
    fused, plain = (
        reference_output(llama, IDS, recipe=recipe, fuse=fuse, strict=True)
        for fuse in (True, False)
    )
    assert relative_error(fused, plain) < 1e-4


@pytest.mark.parametrize("which", ["recipe", "rotated"])
def test_saved_and_loaded_it_gives_the_same(
    llama: Any, which: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    recipe: Recipe = request.getfixturevalue(which)
    recipe.save(tmp_path / "recipe.safetensors")
    loaded = Recipe.load(tmp_path / "recipe.safetensors")
    assert loaded.layers == recipe.layers
    want = reference_output(llama, IDS, recipe=recipe)
    assert torch.equal(reference_output(llama, IDS, recipe=loaded), want)


def test_it_is_deterministic(llama: Any, recipe: Recipe) -> None:
    again = calibrated(llama)
    assert again.layers == recipe.layers
    for name, rounded in recipe.rounded.items():
        assert torch.equal(again.orders[name], recipe.orders[name])
        for got, want in zip(again.rounded[name].packed, rounded.packed, strict=True):
            torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)


def test_a_changed_weight_is_rounded_to_nearest_with_a_warning(recipe: Recipe) -> None:
    other = tiny_llama(layers=1, seed=1)
    with pytest.warns(UserWarning, match="changed since it was calibrated"):
        error = error_of(other, recipe)
    assert error < 0.5


def test_another_scheme_gets_the_statistics_alone(recipe: Recipe) -> None:
    view = recipe.for_scheme(Scheme.preset("w4a8"))
    assert view is recipe.for_scheme(Scheme.preset("w4a8"))
    assert not view.rounded and not view.layers and view.shapes == recipe.shapes
    assert recipe.for_scheme(recipe.scheme) is recipe


def test_int8_groups_stay_within_the_budget_and_help(llama: Any, recipe: Recipe) -> None:
    mixed = calibrated(llama, int8_budget=0.6)
    assert mixed.scheme == Scheme(int8_share=0.6)
    activations = ("q_proj", "o_proj", "up_proj", "down_proj")
    names = [name for name in mixed.layers if any(one in name for one in activations)]
    layouts = [mixed.scheme.layout(mixed.shapes[name][1]) for name in names]
    wide = sum(mixed.layers[name].int8_groups + 1 for name in names)
    assert 4 < wide <= 0.6 * sum(layout.num_scales for layout in layouts)
    assert error_of(llama, mixed) < error_of(llama, recipe)
    report = atom_compile.explain(llama, IDS, options={"recipe": mixed})
    assert any("activation groups are INT8" in " ".join(one.remarks) for one in report.layers)


def test_an_error_budget_lifts_layers_up_to_16_bits(llama: Any) -> None:
    recipe = calibrated(llama, error_budget=0.0012)
    assert all(choice.error <= 0.0012 for choice in recipe.layers.values() if choice.error)
    kept = [name for name, choice in recipe.layers.items() if choice.keep]
    assert 0 < len(kept) < 7 and not set(kept) & set(recipe.rounded)
    report = atom_compile.explain(llama, IDS, options={"recipe": recipe})
    remarks = {layer.name: " ".join(layer.remarks) for layer in report.layers}
    assert all("budget 0.0012" in remarks[name] for name in kept)
    assert error_of(llama, recipe) < 0.1


def test_an_interrupted_calibration_goes_on(
    llama: Any, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "partial"
    real, rounds = gptq.round_weight, []

    def interrupted(*arguments: Any, **named: Any) -> Any:
        rounds.append(arguments)
        if len(rounds) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(rounding, "round_weight", interrupted)
    with pytest.raises(KeyboardInterrupt):
        calibrated(llama, resume=folder)
    assert {file.suffix for file in folder.iterdir()} == {".safetensors"}
    with pytest.raises(RecipeError, match="another model, text or scheme"):
        atom_compile.calibrate(llama, BATCHES[:1], progress=False, resume=folder)
    got = calibrated(llama, resume=folder)
    assert len(rounds) == 3 + 4 - 2  # q, k and v together and o were done
    assert not folder.exists()
    assert got.layers == recipe.layers
    for name, rounded in recipe.rounded.items():
        assert torch.equal(got.rounded[name].packed.weight, rounded.packed.weight)


def test_a_damaged_partial_state_is_refused(llama: Any, tmp_path: Path) -> None:
    (tmp_path / "linears-0.safetensors").write_bytes(b"no")
    with pytest.raises(RecipeError, match="is damaged"):
        calibrated(llama, resume=tmp_path)


def test_dead_channels_are_reported() -> None:
    model = tiny_llama(layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:7] = 0.0
    recipe = calibrated(model)
    note = recipe.layers["model.layers.0.mlp.down_proj.weight"].note
    assert note == "7 dead input channels"
    assert error_of(model, recipe) < 0.5


def test_a_graph_break_is_no_obstacle() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(128, 128), nn.Linear(128, 128)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(self.first(x))
            torch._dynamo.graph_break()
            return self.second(x)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    batches = [torch.randn(64, 128) for _ in range(2)]
    recipe = atom_compile.calibrate(
        Broken().eval(), batches, scheme=Scheme(group_size=64), progress=False
    )
    assert sorted(recipe.rounded) == ["first.weight", "second.weight"]


def test_a_replay_keeps_nothing_for_what_the_graph_returns() -> None:
    class Remembering(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            keys = x * 2.0
            return torch.tanh(keys), keys

    x = torch.randn(8, 128)
    call = Call(torch.fx.symbolic_trace(Remembering()), (x,), ())
    kept = {}
    for returns in (False, True):
        stream = Stream(call, lambda found, x, weight: None, returns=returns)
        stream.advance(None)
        kept[returns] = [node.op for node in stream.env]
    assert kept == {False: [], True: ["output"]}


def test_refuses_budgets_that_make_no_sense(llama: Any) -> None:
    with pytest.raises(AtomError, match="error_budget is 0"):
        calibrated(llama, error_budget=0.0)
    with pytest.raises(AtomError, match="int8_share is 2"):
        calibrated(llama, int8_budget=2.0)
