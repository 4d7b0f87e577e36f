from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import atom_compile
from atom_compile import AtomError, Recipe, Scheme
from atom_compile.errors import RecipeError, TrainingModeError

from .capturing import token_batch
from .models import HandWritten, tiny_llama


def recipe_of(model: nn.Module) -> Recipe:
    """Statistics alone."""
    return atom_compile.calibrate(model, [token_batch()], progress=False, gptq=False)


def test_calibration_is_the_mean_square_of_every_input_channel() -> None:
    model = tiny_llama()
    seen: list[Tensor] = []
    down = model.model.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    batches = [token_batch(2, 12), token_batch(3, 7), token_batch(1, 30)]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    rows = torch.cat([one.flatten(0, 1) for one in seen]).double()
    recipe = atom_compile.calibrate(model, batches, scheme="w4a8", progress=False, gptq=False)
    got = recipe.hessian_diagonal["model.layers.1.mlp.down_proj.weight"]
    torch.testing.assert_close(got.double(), rows.square().mean(0))
    assert recipe.scheme == Scheme.preset("w4a8")
    assert len(recipe.shapes) == 2 * 7 + 1


def test_batches_of_every_kind() -> None:
    model, ids = tiny_llama(layers=1), token_batch()
    wanted = recipe_of(model).hessian_diagonal
    for batches in ([ids], ({"input_ids": one} for one in [ids]), iter([ids])):
        got = atom_compile.calibrate(model, batches, progress=False, gptq=False).hessian_diagonal
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_structure_and_not_classes() -> None:
    assert "towers.1.out" in recipe_of(HandWritten().eval()).shapes


def test_calibration_refuses() -> None:
    model = tiny_llama(layers=1)
    with pytest.raises(AtomError, match="batches is empty"):
        atom_compile.calibrate(model, [], progress=False)
    with pytest.raises(TrainingModeError, match=r"model\.eval"):
        atom_compile.calibrate(model.train(), [token_batch()], progress=False)
    with pytest.raises(AtomError, match="did you mean 'w4a4'"):
        atom_compile.calibrate(model.eval(), [token_batch()], scheme="w4a44", progress=False)
    with pytest.raises(AtomError, match="no linear"):
        atom_compile.calibrate(nn.Flatten().eval(), [torch.ones(2, 3, 4)], progress=False)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("inf"))
    with pytest.raises(AtomError, match="not finite"):
        atom_compile.calibrate(model, [token_batch()], progress=False)


def test_saves_and_loads(tmp_path: Path) -> None:
    recipe = recipe_of(tiny_llama(layers=1))
    path = tmp_path / "recipe.safetensors"
    recipe.save(path)
    loaded = Recipe.load(path)
    assert (loaded.scheme, loaded.shapes) == (recipe.scheme, recipe.shapes)
    for name, diagonal in recipe.hessian_diagonal.items():
        assert torch.equal(loaded.hessian_diagonal[name], diagonal)
    assert [one.name for one in tmp_path.iterdir()] == ["recipe.safetensors"]


def test_load_refuses_what_is_not_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.safetensors"
    with pytest.raises(RecipeError, match="is no file"):
        Recipe.load(path)
    recipe_of(tiny_llama(layers=1)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RecipeError, match="damaged"):
        Recipe.load(path)
    save_file({"x": torch.ones(2)}, path)
    with pytest.raises(RecipeError, match="not a recipe"):
        Recipe.load(path)
    newer = {"format": "atom_compile recipe", "version": "3", "recipe": "{}"}
    save_file({"x": torch.ones(2)}, path, metadata=newer)
    with pytest.raises(RecipeError, match="Upgrade"):
        Recipe.load(path)
    header = {"scheme": {}, "shapes": {"a": [4, 2], "b": [4, 2]}}
    metadata = {**newer, "version": "1", "recipe": json.dumps(header)}
    save_file({"a": torch.ones(2)}, path, metadata=metadata)
    with pytest.raises(RecipeError, match=r"b .* has no matching"):
        Recipe.load(path)
    save_file({"a": torch.full((2,), torch.nan), "b": torch.ones(2)}, path, metadata=metadata)
    with pytest.raises(RecipeError, match="not finite"):
        Recipe.load(path)


def test_bind_refuses_another_model() -> None:
    recipe = recipe_of(tiny_llama(layers=1))
    assert recipe.bind(tiny_llama(layers=1, seed=3)) is recipe
    with pytest.raises(RecipeError, match="another model"):
        recipe.bind(tiny_llama(layers=1, intermediate=384))
    with pytest.raises(RecipeError, match="unknown parameter"):
        recipe.bind(HandWritten())


def test_order_follows_the_parameter_once_bound() -> None:
    """Blocks that are compiled one by one share a graph, and so the name in its capture."""
    model = tiny_llama()
    recipe = recipe_of(model).bind(model)
    for layer, block in enumerate(model.model.layers):
        wanted = recipe.hessian_diagonal[f"model.layers.{layer}.mlp.up_proj.weight"].argsort()
        assert torch.equal(recipe.order(block.mlp.up_proj.weight, "mlp.up_proj.weight"), wanted)
    with pytest.raises(RecipeError, match=r"recipe\.bind\(model\)"):
        recipe.order(nn.Parameter(torch.ones(4, 4)), "mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"weight_bits": 8}, "weight_bits is 8"),
        ({"activation_bits": 1}, "activation_bits is 1"),
        ({"group_size": 100}, "group_size is 100"),
        ({"outlier_channels": 100}, "multiple of 16"),
        ({"activation_clip": 0.0}, "activation_clip is 0.0"),
        ({"int8_share": 1.5}, "int8_share is 1.5"),
    ],
)
def test_scheme_refuses(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(AtomError, match=message):
        Scheme(**numbers)


def test_narrow_layers_scale_the_outlier_count() -> None:
    scheme = Scheme()
    outliers = [scheme.layout(width).outlier_channels for width in (4096, 768, 344, 128)]
    assert outliers == [128, 128, 48, 16]
