"""Tensors of safetensors files, read onto a GPU in the background.

safetensors itself copies one tensor after the other out of a mapping of the file: some 5 GB/s, a
tenth of what the bus takes. Here each thread reads pieces of files into a pinned buffer of its own
and copies what a piece has of each tensor to where that lies on the device. Reading and copying
release the interpreter's lock: a model can be built meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import damaged_file, open_file
from .errors import CheckpointError
from .progress import track

_THREADS = 12
_PIECE_BYTES = 16 * 2**20  # smaller ones wait for the interpreter's lock more often
_PATIENCE = 2.0  # seconds without a progress bar

# safetensors' names (https://github.com/huggingface/safetensors, "Format")
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class _Stored:
    """A tensor as a header has it; start and stop are bytes of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class _Piece:
    """Bytes of a file, and the tensors that have some of them."""

    file: Path
    start: int
    stop: int
    tensors: tuple[_Stored, ...]


class DeviceFiles:
    """All tensors of safetensors files, read onto a device in the background.

    Reading begins where the context is entered; when it is left the threads have ended, whether or
    not all was read. No two files may have a tensor of one name: `names` has those of all.

    Raises CheckpointError for a file that is missing, damaged or cut short, by its name.
    """

    def __init__(
        self, files: Sequence[Path], device: torch.device, piece_bytes: int = _PIECE_BYTES
    ) -> None:
        stored = {file: _read_header(file) for file in files}
        self.files = list(files)
        self._pieces = [one for file in files for one in _cut(file, stored[file], piece_bytes)]
        self.names = [one.name for some in stored.values() for one in some]
        self._stored = {one.name: one for some in stored.values() for one in some}
        self._device = device
        self._largest = max((one.stop - one.start for one in self._pieces), default=0)
        self._threads = threading.local()
        self._memory: dict[str, Tensor] = {}
        self._tensors: dict[str, Tensor] | None = None

    def wait(self) -> dict[str, Tensor]:
        """All tensors by name, each in memory of its own, once they are there.

        It is the same dictionary at each call: who takes a tensor out of it is its only holder.
        Raises CheckpointError for a file that cannot be read to its end.
        """
        if self._tensors is None:
            self._allocated.result()
            soon = futures.wait(self._read, _PATIENCE, futures.FIRST_EXCEPTION)
            read, count = futures.as_completed(self._read), len(self._read)
            for piece in track(read, "reading", shown=bool(soon.not_done), total=count):
                piece.result()
            self._tensors = {
                name: self._memory.pop(name).view(one.dtype).view(one.shape)
                for name, one in self._stored.items()
            }
        return self._tensors

    def __enter__(self) -> DeviceFiles:
        self._opened = {file: file.open("rb", buffering=0) for file in self.files}
        in_use = self._device.type == "cuda" and torch.cuda.is_initialized()
        stream = torch.cuda.current_stream(self._device) if in_use else None
        self._pool = futures.ThreadPoolExecutor(_THREADS, "atom-read")
        self._allocated = self._pool.submit(self._allocate, stream)
        self._read = [self._pool.submit(self._read_piece, piece) for piece in self._pieces]
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for opened in self._opened.values():
            opened.close()

    def __deepcopy__(self, memo: object) -> DeviceFiles:
        """There is one: transformers copies the configurations that it is handed over in."""
        return self

    def _lane(self) -> _Lane:
        if not hasattr(self._threads, "lane"):
            self._threads.lane = _Lane(self._device, self._largest)
        lane: _Lane = self._threads.lane
        return lane

    def _allocate(self, stream: torch.cuda.Stream | None) -> None:
        """Memory for each tensor. stream: the loading thread's, if it has used CUDA yet."""
        sizes = {name: one.stop - one.start for name, one in self._stored.items()}
        with torch.cuda.stream(stream):
            if self._device.type == "cuda":
                # the allocator keeps what is freed: one allocation is much faster than many
                with contextlib.suppress(torch.OutOfMemoryError):
                    self._empty(sum(sizes.values()))
            self._memory.update({name: self._empty(size) for name, size in sizes.items()})
        if self._device.type == "cuda":  # what was freed may still be in use by a kernel
            torch.cuda.synchronize(self._device)

    def _empty(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, device=self._device)

    def _read_piece(self, piece: _Piece) -> None:
        lane, opened = self._lane(), self._opened[piece.file]
        self._allocated.result()
        size, filled = piece.stop - piece.start, 0
        while filled < size:
            try:
                count = os.preadv(opened.fileno(), [lane.bytes[filled:size]], piece.start + filled)
            except OSError as error:
                raise damaged_file(piece.file.name, str(error)) from error
            if not count:
                raise damaged_file(piece.file.name, "it ended while it was read")
            filled += count
        for one in piece.tensors:
            start, stop = max(one.start, piece.start), min(one.stop, piece.stop)
            read = lane.buffer[start - piece.start : stop - piece.start]
            memory = self._memory[one.name][start - one.start : stop - one.start]
            memory.copy_(read, non_blocking=True)
        if lane.stream is not None:
            lane.stream.synchronize()


class _Lane:
    """What a thread of the pool has of its own: on a GPU pinned memory, and a stream to copy in."""

    def __init__(self, device: torch.device, size: int) -> None:
        on_gpu = device.type == "cuda"
        self.stream: torch.cuda.Stream | None = None
        if on_gpu:
            torch.cuda.set_device(device)
            self.stream = torch.cuda.Stream(device)
            torch.cuda.set_stream(self.stream)
        self.buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=on_gpu)
        self.bytes: Any = self.buffer.numpy()  # shares its memory, and can be read into


def _read_header(file: Path) -> list[_Stored]:
    """In the order of the file."""
    with open_file(file):  # which checks that the header is sound and covers the file
        pass
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    stored = []
    for name, one in header.items():
        if one["dtype"] not in _DTYPES:
            raise CheckpointError(f"{file.name} holds {name} in {one['dtype']}, which is not read")
        start, stop = (8 + length + offset for offset in one["data_offsets"])
        stored.append(_Stored(name, _DTYPES[one["dtype"]], tuple(one["shape"]), start, stop))
    return sorted(stored, key=lambda one: (one.start, one.stop))


def _cut(file: Path, stored: Sequence[_Stored], piece_bytes: int) -> Iterator[_Piece]:
    """All of the file that tensors lie in, without a gap; a piece may end within a tensor."""
    if not stored:
        return
    first = 0
    for start in range(stored[0].start, stored[-1].stop, piece_bytes):
        stop = min(start + piece_bytes, stored[-1].stop)
        while stored[first].stop <= start:
            first += 1
        end = first
        while end < len(stored) and stored[end].start < stop:
            end += 1
        yield _Piece(file, start, stop, tuple(stored[first:end]))
