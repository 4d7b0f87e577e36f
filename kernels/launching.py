"""The one way to launch a kernel, for a fraction of the host's time that Triton's own takes.

Triton binds the arguments of every launch anew, derives what to compile the kernel for, and looks
that up. A `Launch` has what does not change from call to call: grid, numbers and constants. Left to
a call are dtypes, alignment, addresses, device and stream. The first with its dtypes is launched by
Triton, and those after it by what Triton compiled, which takes the addresses.

Launchers plan a `Launch` in functions under `lru_cache`, of shapes, strides, dtypes and options but
of no tensors: what is not in the key cannot get into the plan.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime.jit import JITFunction

plan = functools.lru_cache(maxsize=4096)
_ALIGNMENT = 16  # bytes: Triton compiles a kernel for whether addresses are multiples of it
_MOST_DESCRIPTORS = 1024  # that are kept of a launch
# allocates as Inductor's graphs do, in half the time that it takes by way of the dispatcher
_empty_strided_cuda: Callable[..., Tensor] = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]

_RUNTIME = knobs.runtime
Prepared = Callable[[int, Sequence[Tensor | None], list[int]], object]


class Buffer(NamedTuple):
    """Memory that a call needs, of contiguous elements."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def beside(self, x: Tensor) -> Tensor:
        """An uninitialized tensor on x's device, which is the current one."""
        fills = torch._C._get_deterministic_algorithms()  # new memory, to show who reads it
        if x.is_cuda and not fills:
            return _empty_strided_cuda(*self)
        return x.new_empty(self.shape, dtype=self.dtype)


def buffer(*shape: int, dtype: torch.dtype) -> Buffer:
    stride = [1]
    for length in shape[:0:-1]:
        stride.append(stride[-1] * max(length, 1))
    return Buffer(shape, tuple(reversed(stride[: len(shape)])), dtype)


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """x (*, K), or its rows (M, K), with unit stride along K; and from one row to the next.

    It is a view, if x is a slice of a merged linear's output.
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    return rows, rows.stride(0)


class Blocks(NamedTuple):
    """How TMA is to read a matrix without gaps, which lies at a tensor's beginning."""

    shape: tuple[int, int]
    dtype: torch.dtype  # what the kernel takes the elements for
    block_shape: tuple[int, int]
    layout: Any  # of a block in shared memory

    def descriptor(self, base: Tensor) -> TensorDescriptor:
        sizes = list(self.shape), [self.shape[1], 1], list(self.block_shape)
        return TensorDescriptor(base.view(self.dtype), *sizes, self.layout)


class Launch:
    """A launch of `kernel`, but for the tensors.

    The kernel's parameters are its descriptors, its pointers, its numbers and its constants, in
    this order. blocks: of the descriptors. constants: by name; Triton's options are among them.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: tuple[float, ...],
        blocks: tuple[Blocks, ...] = (),
        **constants: Any,
    ) -> None:
        self._kernel, self._grid, self._numbers = kernel, grid, numbers
        self._blocks, self._constants = blocks, constants
        self._is_compiled = isinstance(kernel, JITFunction)  # not interpreted
        self._prepared: dict[tuple[object, ...], Prepared] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """On the current device and stream.

        tensors: those of the descriptors, then the pointers; None where the kernel reads nothing.
        """
        before, after = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
        is_observed = getattr(before, "calls", before) or getattr(after, "calls", after)
        if not self._is_compiled or is_observed or self._kernel.pre_run_hooks:
            self._launch_by_triton(tensors)
            return
        # Triton refuses what is not on a GPU, but only as a tensor
        dtypes = [None if x is None else x.dtype if x.is_cuda else False for x in tensors]
        addresses = [0 if x is None else x.data_ptr() for x in tensors]
        if functools.reduce(operator.or_, addresses) % _ALIGNMENT or False in dtypes:
            self._launch_by_triton(tensors)
            return
        device = torch._C._cuda_getDevice()
        prepared = self._prepared.get((device, *dtypes))
        if prepared is None:
            compiled = self._launch_by_triton(tensors)
            self._prepared[device, *dtypes] = self._prepare(compiled, len(tensors))
        else:
            prepared(torch._C._cuda_getCurrentRawStream(device), tensors, addresses)

    def _launch_by_triton(self, tensors: Sequence[Tensor | None]) -> Any:
        num_blocks = len(self._blocks)
        unread = next(x for x in tensors[num_blocks:] if x is not None)
        arguments: list[Any] = [unread if x is None else x for x in tensors]
        arguments[:num_blocks] = map(Blocks.descriptor, self._blocks, arguments)
        return self._kernel[self._grid](*arguments, *self._numbers, **self._constants)

    def _prepare(self, compiled: Any, num_tensors: int) -> Prepared:
        """Launches what Triton compiled, or if that is not as expected, as Triton does."""

        def by_triton(_: int, tensors: Sequence[Tensor | None], __: list[int]) -> None:
            self._launch_by_triton(tensors)

        names, num_blocks = self._kernel.arg_names, len(self._blocks)
        constants = [self._constants[name] for name in names if name in self._constants]
        tail = *self._numbers, *constants
        if not isinstance(compiled, CompiledKernel) or num_tensors + len(tail) != len(names):
            return by_triton
        launcher = compiled.run
        if not num_blocks:
            run = self._bind(compiled, launcher)
            return lambda stream, _, at: run(stream, (*at, *tail))
        try:
            from triton.backends.nvidia.driver import make_tensordesc_arg

            launcher = copy.copy(launcher)  # to be given descriptors that are made
            launcher.launch = inspect.getclosurevars(launcher.launch).nonlocals["launcher"]
            metadata = compiled.metadata.tensordesc_meta
        except (ImportError, AttributeError, KeyError):
            return by_triton
        if not metadata or len(metadata) != num_blocks:
            return by_triton
        run = self._bind(compiled, launcher)
        # they follow from addresses and sizes alone, whatever comes to lie there
        known: dict[tuple[int, ...], list[Any]] = {}

        def launch(stream: int, tensors: Sequence[Tensor | None], at: list[int]) -> None:
            described = tuple(at[:num_blocks])
            parts = known.get(described)
            if parts is None:
                descriptors = map(Blocks.descriptor, self._blocks, cast(list[Tensor], tensors))
                made = map(make_tensordesc_arg, descriptors, metadata)
                parts = [part for one in made for part in one]
                if len(known) >= _MOST_DESCRIPTORS:
                    known.clear()
                known[described] = parts
            run(stream, (*parts, *at[num_blocks:], *tail))

        return launch

    def _bind(
        self, compiled: CompiledKernel, launcher: Any
    ) -> Callable[[int, tuple[Any, ...]], object]:
        """Triton's launcher of a kernel, as a function of a stream and the kernel's arguments.

        It is there to allocate what a kernel may ask to work in. For one that does not, the
        function in C that it goes on to call is called in its place, for half the time.
        """
        grid = (*self._grid, 1, 1)[:3]
        head = compiled.function, compiled.packed_metadata, None, None, None  # for no hooks
        scratch = "global_scratch_size", "profile_scratch_size"
        if not any(getattr(launcher, size, True) for size in scratch):
            given: list[Any] = []
            mark = object()
            watched = copy.copy(launcher)
            watched.launch = lambda *arguments: given.extend(arguments)
            watched(*grid, None, *head, mark)
            in_c, middle, last = launcher.launch, given[4:-1], given[-1]
            if last is mark:  # Triton 3.6
                return lambda stream, arguments: in_c(*grid, stream, *middle, *arguments)
            if last == (mark,):
                return lambda stream, arguments: in_c(*grid, stream, *middle, arguments)
        return lambda stream, arguments: launcher(*grid, stream, *head, *arguments)
