"""A folder with a causal language model, 16-bit or packed, as the command line reads it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import AtomError
from .evaluate import text_windows
from .int4_checkpoints import METHODS
from .saving import find_folder, load
from .transformers_config import METHOD


def load_model(folder: Path, *, dequantize: bool = False, **options: Any) -> Any:
    """In eval mode; in its own precision on a GPU, by default in float32 on a CPU.

    dequantize: load a model that others quantized in 16 bits. options: `from_pretrained`'s own.
    Raises AtomError for what transformers cannot load.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    require_model(folder)
    logging.disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    options = {"dtype": "auto" if on_gpu else torch.float32} | options
    if on_gpu and importlib.util.find_spec("accelerate"):
        options = {"device_map": {"": "cuda"}} | options  # no copy on the CPU
    method = quant_method(folder)
    try:
        if method in (METHOD, *METHODS):
            model = load(folder, dequantize=dequantize and method in METHODS, **options)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
    except AtomError:
        raise
    except (OSError, ValueError) as error:
        raise AtomError(f"transformers cannot load the model in {folder}: {error}") from error
    place = "cuda" if on_gpu else "cpu"
    if model.device.type != place:  # looking at every tensor takes a packed model 10 ms
        model = model.to(place)
    return model.eval()


def fetch_model(model: Path) -> Path:
    """The directory itself, or the one that the files of a repository of that name are fetched to.

    Raises AtomError if they cannot be.
    """
    is_name = re.fullmatch(r"[\w.-]+/[\w.-]+", model.as_posix())
    return find_folder(model.as_posix(), {}) if is_name else model


def require_model(folder: Path) -> None:
    if not folder.is_dir():
        raise AtomError(f"{folder} is no directory; give one that save_pretrained wrote")
    if not (folder / "config.json").is_file():
        raise AtomError(
            f"{folder} holds no config.json; give a directory that save_pretrained wrote"
        )


def is_packed(folder: Path) -> bool:
    """Whether its weights are packed already, by whatever method."""
    return quant_method(folder) is not None


def quant_method(folder: Path) -> str | None:
    """By which its weights are packed already: None for a 16-bit model."""
    require_model(folder)
    config = json.loads((folder / "config.json").read_text())
    method: str | None = (config.get("quantization_config") or {}).get("quant_method")
    return method


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def read_windows(folder: Path, text: Path, windows: int, length: int) -> Tensor:
    if not text.is_file():
        raise AtomError(f"{text} is no file; give the text to calibrate on")
    return text_windows(load_tokenizer(folder), text.read_text(encoding="utf-8"), windows, length)
