from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


@pytest.fixture(scope="session", autouse=True)
def _interpreter_rounds_to_nearest() -> Iterator[None]:
    """Triton 3.7's interpreter cuts float32 off to bfloat16, where a GPU rounds to nearest."""
    truncating = interpreter.InterpreterBuilder.cast_impl

    def rounding(self: Any, source: Any, dtype: Any) -> Any:
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return truncating(self, source, dtype)
        rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16().view(torch.uint16)
        return interpreter.TensorHandle(rounded.numpy().reshape(source.data.shape), dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounding)
        yield


@pytest.fixture(scope="session", autouse=True)
def _interpreter_multiplies_bfloat16() -> Iterator[None]:
    """Triton 3.7's interpreter multiplies the bits of bfloat16 as if they were integers."""
    integers = interpreter.InterpreterBuilder.create_dot

    def floats(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return integers(self, _to_float32(a), _to_float32(b), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", floats)
        yield


def _to_float32(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    wide = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(wide.view(np.float32), tl.float32)
