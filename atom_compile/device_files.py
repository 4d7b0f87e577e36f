"""Tensors of safetensors files, read onto a GPU in the background.

safetensors copies a tensor to a GPU out of a mapping of its file, at 5 to 7 GB/s on an H200's host,
and 17 to 22 GB/s if 16 threads do. They let go of the interpreter's lock meanwhile, so that a model
can be built.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import open_file
from .progress import track

_THREADS = 16
_PATIENCE = 2.0  # seconds without a progress bar


class DeviceFiles:
    """All tensors of safetensors files, read onto a device in the background.

    Reading begins where the context is entered; when it is left the threads have ended, whether or
    not all was read. Raises CheckpointError for a file that is missing, damaged or cut short, by
    its name.
    """

    def __init__(self, files: Sequence[Path], device: torch.device) -> None:
        self.files = list(files)
        self._opened = [open_file(file, str(device)) for file in files]
        self._tensors: dict[str, Tensor] | None = None

    @property
    def names(self) -> list[str]:
        return [name for opened in self._opened for name in opened.keys()]  # noqa: SIM118

    def wait(self) -> dict[str, Tensor]:
        """All tensors by name, once they are there.

        It is the same dictionary at each call: who takes a tensor out of it is its only holder.
        """
        if self._tensors is None:
            slow = bool(wait(self._read, _PATIENCE, FIRST_EXCEPTION).not_done)
            read = track(as_completed(self._read), "reading", shown=slow, total=len(self._read))
            self._tensors = {name: one for some in read for name, one in some.result().items()}
            self._read.clear()
        return self._tensors

    def __enter__(self) -> DeviceFiles:
        self._pool = ThreadPoolExecutor(_THREADS, "atom-read")
        self._read = []
        for opened in self._opened:
            names = list(opened.keys())
            shares = [names[first::_THREADS] for first in range(_THREADS)]
            self._read += [self._pool.submit(_read_tensors, opened, share) for share in shares]
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._opened.clear()

    def __deepcopy__(self, memo: object) -> DeviceFiles:
        """There is one: transformers copies the configurations that it is handed over in."""
        return self


def _read_tensors(opened: Any, names: Sequence[str]) -> dict[str, Tensor]:
    return {name: opened.get_tensor(name) for name in names}
