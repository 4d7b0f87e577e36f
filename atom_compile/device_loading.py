"""Our own checkpoints, onto one GPU: read in the background while transformers builds the model.

transformers takes the names of what it loads through regular expressions, a millisecond each, and
a packed model has four times as many as one in 16 bits. It is given the plain ones alone, as memory
that is still being filled; the quantizer puts the packed ones where they belong, waits for all, and
converts what transformers converted too soon.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import recorded_names
from .device_files import DeviceFiles


def find_device(kwargs: Mapping[str, Any]) -> torch.device | None:
    """The GPU that `from_pretrained(path, **kwargs)` would put all of a model on.

    None if that is no single GPU, or if kwargs ask for something else than a dtype beside it.
    """
    from transformers.integrations.accelerate import check_and_set_device_map

    if kwargs.keys() - {"device_map", "dtype", "torch_dtype"}:
        return None
    places = check_and_set_device_map(kwargs.get("device_map"))
    if not isinstance(places, dict) or places.keys() != {""}:
        return None
    place = places[""]
    place = f"cuda:{place}" if isinstance(place, int) else str(place)
    if not place.startswith("cuda") or not torch.cuda.is_available():
        return None
    device = torch.device(place)
    if device.index is None:
        current = torch.cuda.current_device() if torch.cuda.is_initialized() else 0
        device = torch.device("cuda", current)
    return device


def load_onto(
    device: torch.device, architecture: Any, config: Any, path: Path, **kwargs: Any
) -> Any:
    """What `architecture.from_pretrained(path, **kwargs)` loads; None if only that can.

    device: of the whole model. architecture, config: the class of transformers, and what
    config.json says. Raises CheckpointError, see docs/loading-errors.md.
    """
    from transformers import GenerationConfig

    files = _find_files(path, config)
    generates = architecture.can_generate()
    if not files or (generates and not (path / "generation_config.json").is_file()):
        return None
    with _uncollected(), DeviceFiles(files, device) as reading:
        if sorted(reading.names) != sorted(recorded_names(files[0])):
            return None  # from_pretrained knows other names of tensors, and says what is missing
        generation = GenerationConfig.from_pretrained(path) if generates else None
        written = config.quantization_config
        packed = {name for group in written.get("linears") or [] for name in group}
        plain = [name for name in reading.names if not _is_packed(name, packed)]
        config.quantization_config = written | {"reading": reading}
        model = architecture.from_pretrained(
            None, config=config, state_dict=_Arriving(reading, plain), **kwargs
        )
    if generation is not None:
        model.generation_config = generation
    model.name_or_path = model.config.name_or_path = str(path)
    return model


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is collected: that walks all that a process holds, for a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _find_files(path: Path, config: Any) -> list[Path]:
    """Those that `from_pretrained(path)` would read; none if it would do more than that."""
    from transformers.utils.hub import get_checkpoint_shard_files

    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    named_otherwise = getattr(config, "transformers_weights", None) is not None
    if named_otherwise or config.dtype is None or (path / "adapter_config.json").exists():
        return []
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    return [Path(file) for file in get_checkpoint_shard_files(str(path), str(index))[0]]


def _is_packed(name: str, packed: set[str]) -> bool:
    module, _, field = name.rpartition(".")
    return module in packed and field != "bias"


class _Arriving(Mapping[str, Tensor]):
    """Some of the tensors that are being read: to look at one takes memory for all."""

    def __init__(self, reading: DeviceFiles, names: Sequence[str]) -> None:
        self._reading, self._names = reading, names

    def __getitem__(self, name: str) -> Tensor:
        return self._reading.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
