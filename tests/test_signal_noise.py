"""The noise of each linear: against a hand-made comparison, and what must hold of any."""

from __future__ import annotations

import pytest
import torch

import atom_compile
from atom_compile.signal_noise import LayerNoise, decibels, measure_layers

from .models import tiny_llama

IDS = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(0))


def test_every_quantized_linear_is_measured_in_order() -> None:
    layers = measure_layers(tiny_llama(), [IDS])
    assert len(layers) == 14
    assert layers[0].name == "model.layers.0.self_attn.q_proj.weight"
    assert layers[-1].name == "model.layers.1.mlp.down_proj.weight"
    assert all(one.alone_db is not None and 5.0 < one.alone_db < 40.0 for one in layers)


def test_the_first_linear_has_no_noise_before_it() -> None:
    first, *rest = measure_layers(tiny_llama(), [IDS])
    assert first.alone_db == pytest.approx(first.in_all_db, rel=1e-4)
    assert rest[-1].in_all_db < rest[-1].alone_db  # type: ignore[operator]


def test_it_is_what_the_model_computes() -> None:
    """The noise of the very first linear, from the modules' own inputs and outputs."""
    model = tiny_llama()
    q_proj = model.model.layers[0].self_attn.q_proj
    seen = []
    hook = q_proj.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    with torch.no_grad():
        model(IDS, use_cache=False)
    hook.remove()
    (first, *_) = measure_layers(model, [IDS])
    signal = seen[0][1].double().square().sum().item()
    assert first.signal == pytest.approx(signal, rel=1e-5)
    assert first.alone_signal == pytest.approx(signal, rel=1e-5)


def test_more_bits_make_less_noise_and_rotation_is_followed() -> None:
    model = tiny_llama()
    four, eight = (measure_layers(model, [IDS], {"scheme": name}) for name in ("w4a4", "w4a8"))
    rotated = measure_layers(model, [IDS], {"scheme": "w4a4-rotated"})
    assert all(a.alone_db < b.alone_db for a, b in zip(four, eight, strict=True))  # type: ignore[operator]
    assert [one.name for one in rotated] == [one.name for one in four]


def test_linears_that_are_left_alone_are_not_listed() -> None:
    layers = measure_layers(tiny_llama(), [IDS], {"skip": ["*.mlp.*"]})
    assert len(layers) == 8
    assert not any("mlp" in one.name for one in layers)


def test_a_recipe_s_rounded_weights_are_measured() -> None:
    model = tiny_llama()
    recipe = atom_compile.calibrate(model, [IDS], progress=False)
    plain, rounded = measure_layers(model, [IDS]), measure_layers(model, [IDS], {"recipe": recipe})
    assert sum(one.noise for one in rounded) < sum(one.noise for one in plain)


def test_decibels() -> None:
    assert decibels(100.0, 1.0) == pytest.approx(20.0)
    assert decibels(0.0, 1.0) is None
    assert LayerNoise("w").alone_db is None
