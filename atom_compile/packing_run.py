"""A folder with a 16-bit model becomes one with a packed model; interrupted, it goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from .calibrate import calibrate
from .errors import AtomError
from .files import write_text
from .int4_checkpoints import METHODS
from .model_folder import load_model, load_tokenizer, quant_method, read_windows
from .recipe import Recipe
from .saving import require_replaceable, save
from .scheme import Scheme
from .transformers_config import AtomConfig


def pack_folder(
    source: Path,
    target: Path,
    scheme: str | None,
    *,
    recipe: Path | None = None,
    calibration: Path | None = None,
    windows: int = 64,
    length: int = 512,
    include_head: bool = False,
    skip: tuple[str, ...] = (),
    max_shard_size: str = "5GB",
) -> Any:
    """Quantizes the model in `source` and writes it, its tokenizer too, to `target`.

    source: of 16 bits, or one that `load` can dequantize: it is rounded once more.
    calibration: a text to calibrate on, with GPTQ; what is finished is kept in `<target>.partial`
    until `target` is written. recipe: one that there is already. With neither, weights are rounded
    to nearest. Returns the packed model.

    Raises AtomError for a model that is packed already or a `.partial` of another run, OptionError
    for an unknown scheme, before anything is read.
    """
    if scheme is not None:
        Scheme.preset(scheme)
    require_replaceable(target)
    if quant_method(source) not in (None, *METHODS):
        raise AtomError(f"{source} holds a quantized model already; give one in 16 bits")
    partial = target.with_name(f"{target.name}.partial")
    found: Recipe | Path | None = recipe
    if calibration is not None:
        request = _request(source, calibration, scheme, windows, length, include_head)
        found = _calibrate(source, calibration, partial, request)
    config = AtomConfig(scheme, found, include_head, skip)
    model = load_model(source, dequantize=True, dtype="auto", quantization_config=config)
    save(model, target, tokenizer=load_tokenizer(source), max_shard_size=max_shard_size)
    shutil.rmtree(partial, ignore_errors=True)
    return model


def _request(source: Path, calibration: Path, *numbers: Any) -> dict[str, Any]:
    if not calibration.is_file():
        raise AtomError(f"{calibration} is no file; give the text to calibrate on")
    text = hashlib.sha256(calibration.read_bytes()).hexdigest()
    names = ("scheme", "windows", "length", "include_head")
    return {"model": str(source.resolve()), "text": text, **dict(zip(names, numbers, strict=True))}


def _calibrate(source: Path, text: Path, partial: Path, request: dict[str, Any]) -> Recipe:
    """The recipe, from `partial` if it is there."""
    asked, made = partial / "request.json", partial / "recipe.safetensors"
    if asked.is_file() and json.loads(asked.read_text()) != request:
        raise AtomError(
            f"{partial} is of another quantization, of other text, model or options; remove it, or "
            "write to another place"
        )
    if made.is_file():
        return Recipe.load(made)
    partial.mkdir(parents=True, exist_ok=True)
    write_text(asked, json.dumps(request))
    model = load_model(source, dequantize=True)
    input_ids = read_windows(source, text, request["windows"], request["length"])
    batches = [
        {"input_ids": window[None].to(model.device), "use_cache": False} for window in input_ids
    ]
    recipe = calibrate(
        model,
        batches,
        scheme=request["scheme"] or "w4a4",
        include_head=request["include_head"],
        resume=partial,
    )
    recipe.save(made)
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # for the packed one, which transformers plans by what is free
    return recipe
