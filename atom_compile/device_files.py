"""Tensors of safetensors files, read onto a GPU in the background.

A copy out of a mapping of a file to a GPU runs at 5 to 7 GB/s on an H200's host, and at 17 to 22
GB/s if 16 threads do it. While a model is built beside them, each return of theirs to Python waits
for the interpreter's lock, some 5 ms: so they do nothing but copy, 32 MiB at a time, into memory
that was taken before. Small tensors are read with their neighbours and parted on the GPU.
"""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .checkpoint import open_file
from .errors import CheckpointError
from .progress import track

_THREADS = 16
_PIECE = 2**25  # bytes that a thread copies at a time
_SMALL = 2**21  # bytes: smaller tensors are read with their neighbours
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


class _Stored(NamedTuple):
    """A tensor as a header has it; start and stop are bytes of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class DeviceFiles:
    """All tensors of safetensors files, read onto a device in the background.

    Where the context is entered the device is made ready, which takes a while if the process has
    not used it yet; reading begins where `tensors` are first asked for. When the context is left
    the threads have ended, whether or not all was read.

    Raises CheckpointError for a file that is missing, damaged or cut short, by its name.
    """

    def __init__(self, files: Sequence[Path], device: torch.device) -> None:
        self.files = list(files)
        self._device = device
        self._spans: list[_Span] = []
        self._mapped: list[mmap.mmap] = []
        self._copies: dict[Future[None], _Span] = {}
        self._tensors: dict[str, Tensor] | None = None

    @property
    def names(self) -> list[str]:
        return [one.name for span in self._spans for one in span.stored]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All by name, each in memory of its own, which holds anything until they `arrive`.

        It is the same dictionary at each call: who takes a tensor out of it is its only holder.
        """
        if self._tensors is None:
            self._tensors = self._begin()
        return self._tensors

    def begin_if_ready(self) -> None:
        """Begins to read if the device need not be waited for."""
        if self._tensors is None and self._ready.done():
            self._tensors = self._begin()

    def _begin(self) -> dict[str, Tensor]:
        self._ready.result()
        spans = sorted(self._spans, key=lambda one: len(one.stored) == 1)  # small ones first
        targets = [span.allocate(self._device) for span in spans]
        streams = cycle(_streams(self._device))
        for span, target in zip(spans, targets, strict=True):
            pieces = target.split(_PIECE), span.source.split(_PIECE)
            for there, here in zip(*pieces, strict=True):
                copy = self._pool.submit(_copy, there, here, next(streams))
                self._copies[copy] = span
                span.copies += 1
        return {name: tensor for span in spans for name, tensor in span.tensors.items()}

    def arrive(self) -> Iterator[dict[str, Tensor]]:
        """Each tensor once, by its name, some at a time, as soon as they are read."""
        assert self._tensors is not None
        for copy in self._ended():
            copy.result()
            span = self._copies.pop(copy)
            span.copies -= 1
            if not span.copies:
                yield span.take()
        for mapped in self._mapped:  # gigabytes take a while
            self._pool.submit(mapped.close)

    def wait(self) -> dict[str, Tensor]:
        """`tensors`, when all have arrived."""
        tensors = self.tensors
        for _ in self.arrive():
            pass
        return tensors

    def _ended(self) -> Iterator[Future[None]]:
        try:
            yield from as_completed([*self._copies], _PATIENCE)
        except TimeoutError:
            copies = [*self._copies]
            yield from track(as_completed(copies), "reading", total=len(copies))

    def __enter__(self) -> DeviceFiles:
        self._pool = ThreadPoolExecutor(_THREADS, "atom-read")
        in_use = self._device.type == "cuda" and torch.cuda.is_initialized()
        stream = torch.cuda.current_stream(self._device) if in_use else None
        count = sum(file.stat().st_size for file in self.files if file.is_file())
        self._ready = self._pool.submit(_reserve, count, self._device, stream)
        try:
            for file in self.files:
                self._map(file)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _map(self, file: Path) -> None:
        stored = _read_header(file)
        with file.open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
        self._mapped.append(mapped)
        content = torch.frombuffer(mapped, dtype=torch.uint8)
        self._spans += [_Span(some, content) for some in _neighbours(stored)]

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._copies.clear()
        self._spans.clear()
        for mapped in self._mapped:
            mapped.close()

    def __deepcopy__(self, memo: object) -> DeviceFiles:
        """There is one: transformers copies the configurations that it is handed over in."""
        return self


class _Span:
    """Tensors that are read as one: a large one, or small ones that are neighbours in the file."""

    def __init__(self, stored: Sequence[_Stored], content: Tensor) -> None:
        self.stored = stored
        self.source = content[stored[0].start : stored[-1].stop]
        self.tensors: dict[str, Tensor] = {}
        self.copies = 0  # that are under way

    def allocate(self, device: torch.device) -> Tensor:
        """Takes memory for the tensors; returns bytes for all of the source."""
        self.tensors = {
            one.name: torch.empty(one.shape, dtype=one.dtype, device=device) for one in self.stored
        }
        if len(self.tensors) == 1:
            self._read = _bytes(self.tensors[self.stored[0].name])
        else:
            self._read = torch.empty_like(self.source, device=device)
        return self._read

    def take(self) -> dict[str, Tensor]:
        """The tensors with what was read."""
        if len(self.tensors) > 1:
            sizes = [one.stop - one.start for one in self.stored]
            for tensor, read in zip(self.tensors.values(), self._read.split(sizes), strict=True):
                _bytes(tensor).copy_(read)
        del self._read
        taken, self.tensors = self.tensors, {}
        return taken


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _neighbours(stored: Sequence[_Stored]) -> list[list[_Stored]]:
    """Each large tensor, and the small ones between them, as they can be read at a time."""
    spans: list[list[_Stored]] = []
    for one in stored:
        last = spans[-1] if spans else [one]
        small = max(one.stop - one.start, last[-1].stop - last[-1].start) < _SMALL
        if spans and small and one.stop - last[0].start <= _PIECE:
            last.append(one)
        else:
            spans.append([one])
    return spans


def _read_header(file: Path) -> list[_Stored]:
    """In the order of the file, where each begins where the one before it ended."""
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


def _reserve(count: int, device: torch.device, stream: torch.cuda.Stream | None) -> None:
    """Makes the device ready, and lets its allocator have at once what it would take in blocks."""
    with torch.cuda.stream(stream), contextlib.suppress(torch.OutOfMemoryError):
        torch.empty(count, dtype=torch.uint8, device=device)


def _streams(device: torch.device) -> list[torch.cuda.Stream | None]:
    """To copy in, beside kernels; before memory is written, those that used it last have ended."""
    if device.type != "cuda":
        return [None]
    streams = [torch.cuda.Stream(device) for _ in range(_THREADS)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(device))
    return [*streams]


def _copy(target: Tensor, source: Tensor, stream: torch.cuda.Stream | None) -> None:
    with torch.cuda.stream(stream):
        target.copy_(source)
