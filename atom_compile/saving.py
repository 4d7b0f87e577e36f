"""Packed models of transformers on disk: `save` and `load`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .device_loading import find_device, load_onto
from .errors import CheckpointError, OptionError
from .files import write_folder
from .int4_checkpoints import METHODS
from .int4_models import load_int4
from .transformers_config import METHOD
from .transformers_quantizer import AtomQuantizer

# those of from_pretrained's options that say where a repository's files come from
_OF_THE_SOURCE = "cache_dir", "force_download", "local_files_only", "revision", "token"
# a model's and its tokenizer's; never a pickle
_KINDS_OF_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


def load(path: str | Path, *, dequantize: bool = False, **kwargs: Any) -> Any:
    """A packed model that `save`, or `save_pretrained`, wrote: as `from_pretrained` loads it.

    Or one that GPTQ, AWQ, compressed-tensors or ModelOpt quantized to 4 bits, to integers by groups
    of 32 to 1024 channels, to NVFP4 or MXFP4: it becomes a packed model of weights alone, with the
    very codes, scales and zero points. Activations stay in 16 bits, whatever theirs were.

    Onto one GPU our own are read by device_files.py, sooner than transformers reads them.

    path: a directory, or a repository's name. dequantize: load another's model in 16 bits instead,
    to calibrate it and quantize it anew. kwargs: `from_pretrained`'s own, such as device_map.

    Raises CheckpointError for anything else, by name; see docs/loading-errors.md.
    """
    import transformers  # of which the package's own import needs only some modules

    source = {name: kwargs[name] for name in _OF_THE_SOURCE if name in kwargs}
    others = {name: kwargs[name] for name in kwargs.keys() - source.keys()}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **source)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} holds no model of transformers: {error}") from error
    quantized = getattr(config, "quantization_config", None) or {}
    method = quantized.get("quant_method")
    if method not in (METHOD, *METHODS):
        raise CheckpointError(
            f"{path} is no packed model: its config.json names no quantization by {METHOD}, "
            f"{', '.join(METHODS[:-1])} or {METHODS[-1]}"
        )
    if method == METHOD and dequantize:
        raise OptionError(
            f"dequantize is for models that others quantized, and {path} was packed by {METHOD}"
        )
    architecture = getattr(transformers, (config.architectures or ["none"])[0], None)
    if architecture is None:
        raise CheckpointError(f"{path} is a {config.architectures}, which transformers lacks")
    if method in METHODS:
        folder = find_folder(path, source)
        return load_int4(architecture, config, folder, dequantize=dequantize, **others)
    if (device := find_device(others)) is not None:
        others["device_map"] = {"": device}  # by its number: each thread has a current one
        folder = find_folder(path, source)
        if (model := load_onto(device, architecture, config, folder, **others)) is not None:
            return model
    return architecture.from_pretrained(path, **source, **others)


def find_folder(path: str | Path, source: Mapping[str, Any]) -> Path:
    """The directory itself, or the one that a repository's files are fetched to.

    source: `from_pretrained`'s own options of where from. Raises CheckpointError.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        fetched = snapshot_download(
            str(path), allow_patterns=_KINDS_OF_FILES, ignore_patterns=["*/*"], **source
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no directory, and no repository that can be fetched: {error}"
        ) from error
    return Path(fetched)


def save(model: Any, path: str | Path, *, tokenizer: Any = None, **kwargs: Any) -> None:
    """`model.save_pretrained(path)`, whole or not at all: what was there before stays until then.

    path: a new or an empty directory, or one with a packed model, which is replaced as a whole.
    tokenizer: saved beside it. kwargs: `save_pretrained`'s own, such as max_shard_size.

    Raises CheckpointError for a directory with anything else in it, and for a model that `quantize`
    or `from_pretrained` did not pack.
    """
    require_replaceable(Path(path))
    if not isinstance(getattr(model, "hf_quantizer", None), AtomQuantizer):
        raise CheckpointError(
            "the model is no packed model of transformers: call atom_compile.quantize(model) first"
        )

    def write(folder: Path) -> None:
        model.save_pretrained(folder, **kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    write_folder(Path(path), write)


def require_replaceable(path: Path) -> None:
    """Raises CheckpointError unless `path` is new, empty, or holds a packed model."""
    if path.is_dir() and any(path.iterdir()):
        config = path / "config.json"
        known = json.loads(config.read_text()) if config.is_file() else {}
        if known.get("quantization_config", {}).get("quant_method") != METHOD:
            raise CheckpointError(
                f"{path} holds other files than a packed model's: give a new directory"
            )
    elif path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file: give a new directory")
