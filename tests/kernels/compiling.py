"""Compiles what the launchers would launch, for GPUs that need not be here.

A program of its own, since Triton cannot compile a kernel that it has been told to interpret.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from atom_compile.kernels import gated_quantize, linear, norm_quantize, packing, quantize
from atom_compile.kernels import quantize_rows as rows

OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}
TYPES = {
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
}


class Compiled:
    """Stands in for a kernel: compiles at the launch, and launches nothing."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self._kernel = kernel
        self._target = GPUTarget("cuda", capability, 32)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._compile

    def _compile(self, *args: Any, **named: Any) -> None:
        options = {name: value for name, value in named.items() if name in OPTIONS}
        constants = {name: value for name, value in named.items() if name not in OPTIONS}
        if "PTX" in constants:
            constants["PTX"] = True
        names = self._kernel.arg_names
        values = dict(zip(names, args, strict=False))
        signature = {name: self._type(values.get(name)) for name in names}
        aligned = [name for name, value in values.items() if isinstance(value, Tensor)]
        source = ASTSource(
            self._kernel,
            signature,
            {(names.index(name),): value for name, value in constants.items()},
            {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        compiled = triton.compile(source, target=self._target, options=options)
        assert compiled.metadata.shared < 99 * 1024, "more shared memory than the smallest GPU has"

    @staticmethod
    def _type(value: Any) -> str:
        if isinstance(value, Tensor):
            return TYPES[value.dtype]
        if value is None:
            return "constexpr"
        return "i32" if isinstance(value, int) else "fp32"


def main(capability: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear, "linear_kernel", Compiled(linear.linear_kernel, capability))
        patch.setattr(linear, "_multiprocessors", lambda device: 132)
        patch.setattr(rows, "quantize_rows_kernel", Compiled(rows.quantize_rows_kernel, capability))
        K, N = 1408, 4096
        x = torch.randn(64, K, dtype=torch.bfloat16)
        order = torch.randperm(K).to(torch.int32)
        weight = torch.ones(K, dtype=torch.bfloat16)
        numbers = (4, 128, 128, 0.9)
        quantize.launch(x, *numbers)
        gated_quantize.launch(x, x, order, "silu", *numbers)
        norm_quantize.launch(x, weight, None, order, 1e-6, False, True, x.dtype, *numbers)
        norm_quantize.launch(x, weight, weight, None, 1e-6, True, False, x.dtype, *numbers)
        layout = packing.GroupLayout(K, 128, 128)
        packed = packing.pack_weight(torch.randn(N, K), layout, bits=4, clip=0.85)
        for M in (1, 16, 64, 300):
            codes, scale = quantize.reference(torch.randn(M, K), *numbers)
            residual = torch.zeros(M, N, dtype=torch.bfloat16)
            linear.launch(codes, scale, *packed, torch.zeros(N), residual, torch.bfloat16)


if __name__ == "__main__":
    main(int(sys.argv[1]))
