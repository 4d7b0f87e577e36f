"""What the kernel tests share: the shapes they draw, and how results are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from atom_compile.kernels.packing import GroupLayout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

few_examples = settings(
    deadline=None, max_examples=20, derandomize=True
)  # each compiles or interprets a kernel

seeds = st.integers(0, 2**32 - 1)
tokens = st.sampled_from([0, 1, 3, 5])
four_bit_formats = st.sampled_from(["int", "e2m1"])
dtypes = st.sampled_from(DTYPES)
layouts = st.builds(
    GroupLayout,
    st.sampled_from([256, 344, 352, 1376, 2817]),
    st.sampled_from([64, 128]),
    st.sampled_from([0, 16, 48, 128]),
)


def kernel_device() -> torch.device:
    """Where launchers run: on the GPU, or in the interpreter on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills new tensors with NaN or the largest integer: an element that nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def random_order(width: int) -> Tensor:
    return torch.randperm(width).to(torch.int32)


def assert_quantized_alike(
    got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], rtol: float = 0.0
) -> None:
    """For inputs within `rtol` of each other; at 0 equal to the last bit, NaNs in the same places.

    A scale that is `rtol` off moves a 4-bit code by 7 rtol at most, and so carries about that share
    of them over a rounding boundary.
    """
    (codes, scale), (want_codes, want_scale) = got, want
    assert codes.shape == want_codes.shape and codes.dtype == want_codes.dtype
    torch.testing.assert_close(scale.cpu(), want_scale.cpu(), rtol=rtol, atol=0.0, equal_nan=True)
    distance = (codes.cpu().int() - want_codes.cpu().int()).abs()
    assert (distance > 1).sum() == 0
    assert (distance > 0).sum() <= 7 * rtol * distance.numel()
