"""Compiles what the launchers would launch, for GPUs that need not be here.

A program of its own, since Triton cannot compile a kernel that it has been told to interpret.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from atom_compile.kernels import (
    attention,
    attention_decode,
    attention_prefill,
    attention_quantize,
    dequantize,
    float8_hopper,
    float8_linear,
    formats,
    gated_quantize,
    kv_cache,
    linear,
    linear_hopper,
    norm_quantize,
    overlap,
    packing,
    quantize,
    quantize_e4m3,
    rope_append,
    rotate,
    weight_only_hopper,
    weight_only_linear,
)
from atom_compile.kernels import quantize_rows as rows
from atom_compile.kernels.hopper_tiles import HopperTiling

OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion", "launch_pdl"}
TYPES = {
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
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
        if constants.get("PACK") == 0:
            constants["PACK"] = 4
        names = self._kernel.arg_names
        values = dict(zip(names, args, strict=False))
        signature = {name: self._type(values.get(name)) for name in names}
        aligned = [
            name
            for name, value in values.items()
            if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0)
        ]
        kind = GluonASTSource if self._kernel.is_gluon() else ASTSource
        source = kind(
            self._kernel,
            signature,
            {(names.index(name),): value for name, value in constants.items()},
            {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        compiled = triton.compile(source, target=self._target, options=options)
        smallest = 227 if kind is GluonASTSource else 99  # KiB of shared memory
        assert compiled.metadata.shared <= smallest * 1024, "more than the smallest GPU has"
        if constants.get("MMA_SYNC"):
            check_side_by_side(str(compiled.asm["ttgir"]))
            if constants.get("OVERLAP"):  # the first weights do not wait
                ptx = str(compiled.asm["ptx"])
                assert ptx.index("cp.async") < ptx.index("griddepcontrol.wait")

    @staticmethod
    def _type(value: Any) -> str:
        if isinstance(value, Tensor):
            return TYPES[value.dtype]
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{TYPES[value.base.dtype][1:]}{value.block_shape},{value.layout!r}>"
        if value is None:
            return "constexpr"
        return "i32" if isinstance(value, int) else "fp32"


def check_side_by_side(ttgir: str) -> None:
    """What `_side_by_side` relies on: it is where tensor cores take tiles from, four in a row."""
    asm = re.compile(r"\{mov\.b32 \$0, \$[48];")
    exchanging = [line for line in ttgir.splitlines() if asm.search(line)]
    for line in exchanging:
        assert "#ttg.dot_op" in line.rsplit("->")[1], line
    if exchanging:
        operands = re.findall(r"#ttg.dot_op<(.*?)>", ttgir)
        assert not any("kWidth = 2" in operand for operand in operands)


def main(capability: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overlap, "overlaps", lambda device: capability >= 90)
        patch.setattr(linear, "linear_kernel", Compiled(linear.linear_kernel, capability))
        patch.setattr(linear, "multiprocessors", lambda device: 132)
        patch.setattr(rows, "quantize_rows_kernel", Compiled(rows.quantize_rows_kernel, capability))
        K, N = 1408, 4096
        x = torch.randn(64, K, dtype=torch.bfloat16)
        order = torch.randperm(K).to(torch.int32)
        weight = torch.ones(K, dtype=torch.bfloat16)
        numbers = (4, 128, 128, 0.9)
        patch.setattr(rotate, "rotate_kernel", Compiled(rotate.rotate_kernel, capability))
        rotate.launch(x, 128, 128, 128)
        rotate.launch(x[:, :80], 80, 0, 16, True)
        norm_quantize.launch(x, weight, None, order, 1e-6, False, True, x.dtype, *numbers, 0, 128)
        gated_quantize.launch(x, x, None, "silu", *numbers, 0, 64)
        quantize.launch(x, *numbers)
        gated_quantize.launch(x, x, order, "silu", *numbers)
        norm_quantize.launch(x, weight, None, order, 1e-6, False, True, x.dtype, *numbers)
        norm_quantize.launch(x, weight, weight, None, 1e-6, True, False, x.dtype, *numbers)
        ragged = (4, 128, 48, 0.9)
        norm_quantize.launch(x, weight, weight, order, 1e-6, True, True, x.dtype, *ragged)
        gated_quantize.launch(x, x, order, "gelu", *ragged, 2, 16)
        per_token = (8, 128, 128, 1.0, 0, 128, True)
        quantize.launch(x, *per_token)
        quantize.launch(x, *numbers, format="e2m1")
        gated_quantize.launch(x, x, order, "silu", *ragged, 2, format="e2m1")
        norm = weight, None, order, 1e-6, False, True, x.dtype
        norm_quantize.launch(x, *norm, *numbers, format="e2m1")
        patch.setattr(rows, "_MANY_ROWS", 1)
        rows.plan_rows.cache_clear()
        for one in (numbers, ragged, per_token):
            norm_quantize.launch(x, weight, None, order, 1e-6, False, True, x.dtype, *one)
        layout = packing.GroupLayout(K, 128, 128)
        packed = packing.pack_weight(torch.randn(N, K), layout, bits=4, clip=0.85)
        for M in (1, 16, 64, 300):
            codes, scale = quantize.reference(torch.randn(M, K), *numbers)
            residual = torch.zeros(M, N, dtype=torch.bfloat16)
            linear.launch(codes, scale, *packed, torch.zeros(N), residual, torch.bfloat16)
        of_e2m1 = packing.pack_weight(torch.randn(N, K), layout, 4, 1.0, "e2m1")
        for M in (1, 16, 64, 300):
            codes, scale = quantize.reference(torch.randn(M, K), *numbers, format="e2m1")
            operands = codes, scale, *of_e2m1, None, None, torch.bfloat16
            linear.launch(*operands, format="e2m1")
        some_rows = packing.narrow_rows(packed, 64, 1024)
        linear.launch(codes, scale, *some_rows, None, None, torch.bfloat16)
        if capability == 90:
            kernel = Compiled(linear_hopper.linear_hopper_kernel, capability)
            patch.setattr(linear_hopper, "linear_hopper_kernel", kernel)
            codes, scale = quantize.reference(torch.randn(300, K), *numbers)
            extras = torch.zeros(N), torch.zeros(300, N, dtype=torch.bfloat16), torch.bfloat16
            tiling = HopperTiling(128, 1)
            linear.launch(codes, scale, *packed, *extras, tiling)
            linear.launch(codes, scale, *of_e2m1, *extras, tiling, format="e2m1")
            plain = packing.GroupLayout(K, 128, 0)
            codes_plain, scale_plain = quantize.reference(torch.randn(300, K), 4, 128, 0, 0.9)
            packed_plain = packing.pack_weight(torch.randn(N, K), plain, bits=4, clip=0.85)
            few = HopperTiling(16, 1)
            operands = codes_plain, scale_plain, *packed_plain, None, None, torch.bfloat16
            linear.launch(*operands, few)
            some = torch.zeros(1024), extras[1][:, :1024].contiguous(), torch.bfloat16
            linear.launch(codes, scale, *some_rows, *some, HopperTiling(128, 1))
            two_levels = packing.pack_two_level(torch.randn(N, K), layout)
            tiling = HopperTiling(128, 2)
            linear.multiply(codes, scale[:2], *two_levels, *extras, tiling)
        patch.setattr(weight_only_linear, "multiprocessors", lambda device: 132)
        for module, name in (
            (weight_only_linear, "weight_only_kernel"),
            (dequantize, "dequantize_kernel"),
        ):
            patch.setattr(module, name, Compiled(getattr(module, name), capability))

        def takes_mma_sync(device: torch.device, tiling: linear.Tiling) -> bool:
            return capability < 90 or not weight_only_linear._fills_warpgroups(tiling)

        patch.setattr(weight_only_linear, "_takes_mma_sync", takes_mma_sync)
        patch.setattr(weight_only_linear, "_pack", lambda *its: 4 if takes_mma_sync(*its) else 2)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            compile_weight_only(dtype, group_size=128, symmetric=True, K=K)
        compile_few_tokens(symmetric=True)
        compile_few_tokens(symmetric=False)
        compile_weight_only(torch.bfloat16, group_size=32, symmetric=False, K=1000)
        compile_weight_only(torch.float16, group_size=512, symmetric=False, K=K)
        for format in formats.FORMATS:
            for dtype in (torch.bfloat16, torch.float16):
                compile_weight_only(dtype, group_size=128, symmetric=True, K=K, format=format)
        for format in formats.BLOCK_FORMATS:
            for dtype in (torch.bfloat16, torch.float16):
                compile_weight_only(dtype, group_size=32, symmetric=True, K=K, format=format)
        compile_weight_only(torch.float32, group_size=32, symmetric=True, K=1000, format="nvfp4")
        compile_weight_only(torch.bfloat16, group_size=512, symmetric=True, K=1000, format="e3m2")
        compile_weight_only(torch.float32, group_size=128, symmetric=True, K=K, format="e2m3")
        if capability == 90:
            kernel = Compiled(weight_only_hopper.weight_only_hopper_kernel, capability)
            patch.setattr(weight_only_hopper, "weight_only_hopper_kernel", kernel)
            for format, dtype in (("int", torch.float16), ("e2m3", torch.bfloat16)):
                compile_weight_only_on_hopper(dtype, K, format)
        patch.setattr(float8_linear, "multiprocessors", lambda device: 132)
        patch.setattr(float8_linear, "multiplies_e4m3", lambda device: capability >= 89)
        for format in float8_linear.WEIGHT_FORMATS:
            compile_float8(format, K=K)
        compile_float8("e2m3", K=1000)
        if capability == 90:
            kernel = Compiled(float8_hopper.float8_hopper_kernel, capability)
            patch.setattr(float8_hopper, "float8_hopper_kernel", kernel)
            patch.setattr(float8_hopper, "is_hopper", lambda device: True)
            float8_linear.choose_tiling.cache_clear()
            for format in float8_linear.WEIGHT_FORMATS:
                compile_float8(format, K=K)
        patch.setattr(kv_cache, "append_kernel", Compiled(kv_cache.append_kernel, capability))
        patch.setattr(kv_cache, "read_kernel", Compiled(kv_cache.read_kernel, capability))
        for module, name in (
            (attention_decode, "decode_kernel"),
            (attention_decode, "combine_kernel"),
            (attention_prefill, "prefill_kernel"),
        ):
            patch.setattr(module, name, Compiled(getattr(module, name), capability))
        fused = Compiled(attention_quantize.combine_quantize_kernel, capability)
        patch.setattr(attention_quantize, "combine_quantize_kernel", fused)
        compile_attention(D=128, bits=4, groups=1, tokens=1, plain=True)
        compile_attention(D=80, bits=8, groups=1, tokens=4, plain=True)
        compile_attention(D=80, bits=4, groups=5, tokens=1, plain=False)
        compile_attention(D=128, bits=4, groups=1, tokens=100, plain=True)
        compile_attention(D=256, bits=4, groups=2, tokens=100, plain=False)
        compile_cache(bits=4, groups=1, tokens=1, rope=None)
        compile_cache(bits=8, groups=5, tokens=40, rope=torch.zeros(64, 80))


def compile_weight_only(
    dtype: torch.dtype, group_size: int, symmetric: bool, K: int, format: str = "int"
) -> None:
    N, layout = 4096, packing.GroupLayout(K, group_size, 0)
    packed = packing.pack_grouped(torch.randn(N, K), layout, 4, 1.0, symmetric, format)
    for M in (1, 16, 64, 200, 300):
        residual = torch.zeros(M, N, dtype=dtype)
        x = torch.zeros(M, K, dtype=dtype)
        weight_only_linear.launch(x, *packed, residual[0], residual, dtype, format=format)


def compile_few_tokens(symmetric: bool) -> None:
    """In every shape of tile that tuning tries."""
    N, K = 512, 1024
    layout = packing.GroupLayout(K, 128, 0)
    packed = packing.pack_grouped(torch.randn(N, K), layout, 4, 1.0, symmetric)
    for M in (8, 16):
        x = torch.zeros(M, K, dtype=torch.bfloat16)
        candidates = linear.split_candidates(M, K // 128, stages=(3,))
        for tiling in (one for one in candidates if one.split_k == 1):
            weight_only_linear.multiply_packed(x, *packed, None, None, tiling)


def compile_float8(format: str, K: int) -> None:
    N, layout = 4096, packing.GroupLayout(K, float8_linear.GROUP_SIZE, 0, per_token=True)
    packed = packing.pack_rows(torch.randn(N, K), layout, format)
    for M in (1, 16, 64, 200, 300, 1000):
        residual = torch.zeros(M, N, dtype=torch.bfloat16)
        codes, scale = quantize_e4m3.reference(torch.zeros(M, K))
        extras = residual[0], residual, torch.bfloat16
        float8_linear.launch(codes, scale, *packed, *extras, format=format)


def compile_weight_only_on_hopper(dtype: torch.dtype, K: int, format: str) -> None:
    N, layout = 4096, packing.GroupLayout(K, 128, 0)
    planes = packing.pack_grouped(torch.randn(N, K), layout, 4, 1.0, format != "int", format)[:4]
    x, residual = torch.zeros(300, K, dtype=dtype), torch.zeros(300, N, dtype=dtype)
    for tiling in weight_only_hopper.STEP_US["int"]:
        if tiling in weight_only_hopper.tilings(dtype, "int"):
            extras = residual[0], residual, tiling
            weight_only_linear.multiply_on_hopper(x, *planes, *extras, format=format)


def compile_attention(D: int, bits: int, groups: int, tokens: int, plain: bool) -> None:
    num_kv_heads, slots = 2, 4096
    query = torch.zeros(1, 8, tokens, D, dtype=torch.bfloat16)
    codes = torch.zeros(1, num_kv_heads, slots, D * bits // 8, dtype=torch.uint8)
    scale = torch.zeros(1, num_kv_heads, slots, groups, 2, dtype=torch.float16)
    recent = None if plain else torch.zeros(1, num_kv_heads, 8, D, dtype=torch.bfloat16)
    rope = None if plain else torch.zeros(64, 16)
    length = torch.zeros(1, dtype=torch.int64)
    cache = (codes, scale, codes, scale, recent, recent, rope, length)
    mask = None if plain else torch.zeros(1, 1, tokens, slots, dtype=torch.bfloat16)
    numbers = (bits, 0, 0.1, 0.0) if plain else (bits, 9, 0.1, 30.0)
    arguments = (query, *cache, torch.zeros(tokens, dtype=torch.int64), mask, *numbers)
    if bits == 8:
        order = torch.zeros(8 * D, dtype=torch.int32)
        attention_quantize.launch(*arguments, order, 4, 128, 128, 0.9)
        attention_quantize.launch(*arguments, order, 4, 128, 128, 0.9, 0, 128)
        attention_quantize.launch(*arguments, order, 4, 128, 128, 0.9, format="e2m1")
    else:
        attention.launch(*arguments)


def compile_cache(bits: int, groups: int, tokens: int, rope: Tensor | None) -> None:
    batch, num_kv_heads, slots, D = 2, 2, 64, 80
    query = torch.zeros(batch, 4, tokens, D, dtype=torch.bfloat16)
    key = query[:, :num_kv_heads]
    cos = torch.zeros(1, tokens, D)
    codes = torch.zeros(batch, num_kv_heads, slots, D * bits // 8, dtype=torch.uint8)
    scale = torch.zeros(batch, num_kv_heads, slots, groups, 2, dtype=torch.float16)
    recent = None if rope is None else torch.zeros_like(key[:, :, :1])
    length = torch.zeros(batch, dtype=torch.int64)
    cache = (codes, scale, codes, scale, recent, recent, rope, length)
    kv_cache.launch_append(key, key, *cache, bits)
    rope_append.launch(query, key, key, cos, cos, *cache, bits)
    kv_cache.launch_read(codes, scale, recent, rope, length, batch, slots, bits, key.dtype)
    values = torch.zeros(batch, num_kv_heads, slots, D, dtype=torch.bfloat16)
    as_values = (values, None, values, None, None, None, rope, length)
    rope_append.launch(query, key, key, cos, cos, *as_values, 16)
    kv_cache.launch_read(values, None, None, rope, length, batch, slots, 16, key.dtype)


if __name__ == "__main__":
    main(int(sys.argv[1]))
