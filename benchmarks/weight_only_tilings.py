"""Times every way to multiply by a packed weight with 16-bit activations on Hopper; writes JSON.

    python benchmarks/weight_only_tilings.py --out FILE

What `weight_only_linear` chooses from, and what the constants that it chooses by were read from:
the Triton kernel up to 256 tokens and dequantizing for more, each tiling of Hopper's own kernel,
and cuBLAS in BF16. Codes are drawn at random. Microseconds, medians of CUDA-graph replays over
weights rotated past the L2.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from atom_compile.bench.result import describe_environment
from atom_compile.bench.timing import copies_past_cache, measure
from atom_compile.files import write_text
from atom_compile.kernels import weight_only_hopper
from atom_compile.kernels import weight_only_linear as operator
from atom_compile.kernels.packing import GroupedWeight, high_bytes

SIZES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (57344, 8192)]
TOKENS = [1, 16, 32, 64, 128, 256, 512, 1024, 4096]
GROUP_SIZE = 128
SECONDS = 0.005


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", nargs="+", default=["e2m3", "int"])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    cases = [(format, *size) for format in arguments.formats for size in SIZES]
    rows = [row for case in track(cases, "timing") for row in time_size(*case, device)]
    record = {"environment": describe_environment(device), "rows": rows}
    write_text(arguments.out, json.dumps(record, indent=1) + "\n")


@torch.no_grad()
def time_size(format: str, N: int, K: int, device: torch.device) -> list[dict[str, Any]]:
    first = random_weight(format, N, K, device)
    size = sum(one.nbytes for one in first if one is not None)
    weights = [first]
    for _ in range(copies_past_cache(size, device) - 1):
        weights.append(random_weight(format, N, K, device))
    dense = [
        torch.randn(N, K, dtype=torch.bfloat16, device=device)
        for _ in range(copies_past_cache(2 * N * K, device))
    ]
    rows = []
    for M in TOKENS:
        x = torch.randn(M, K, dtype=torch.bfloat16, device=device)

        def timed(call: Callable[..., Tensor], ones: list[Any]) -> float:
            calls = [functools.partial(call, one) for one in ones]
            return round(measure(calls, device, SECONDS).median_us, 1)

        us = {"cuBLAS BF16": timed(functools.partial(F.linear, x), dense)}
        packed: Callable[..., Tensor] = functools.partial(multiply_packed, x, format)
        whole: Callable[..., Tensor] = functools.partial(multiply_dense, x, format)
        if M <= 256:
            us[operator.PATH] = timed(packed, weights)
        else:
            us[operator.DEQUANTIZE] = timed(whole, weights)
        for tiling in weight_only_hopper.STEP_US["int"]:
            if tiling.block_m <= 4 * max(M, 8):
                call = functools.partial(multiply_on_hopper, x, format, tiling)
                name = f"{weight_only_hopper.PATH} {tiling.block_m}, {tiling.blocks}"
                us[name] = timed(call, weights)
        rows.append({"format": format, "N": N, "K": K, "M": M, "us": us})
    return rows


def random_weight(format: str, N: int, K: int, device: torch.device) -> GroupedWeight:
    G, P = K // GROUP_SIZE, high_bytes(GROUP_SIZE, format) if format != "int" else 0
    bytes_of = functools.partial(torch.randint, 0, 256, dtype=torch.uint8, device=device)
    scale = torch.rand(G, N, device=device).add(1).mul(0.01).to(torch.bfloat16)
    high_bits = bytes_of((G, N, P)) if P else None
    return GroupedWeight(bytes_of((G, N, GROUP_SIZE // 2)), scale, None, high_bits)


def multiply_packed(x: Tensor, format: str, weight: GroupedWeight) -> Tensor:
    num_groups, N, _ = weight.weight.shape
    tiling = operator.packed_tiling(len(x), N, num_groups, x.dtype, x.device, format)
    return operator.multiply_packed(x, *weight, None, None, tiling, format=format)


def multiply_dense(x: Tensor, format: str, weight: GroupedWeight) -> Tensor:
    return operator.multiply_dense(x, *weight, None, None, format=format)


def multiply_on_hopper(x: Tensor, format: str, tiling: Any, weight: GroupedWeight) -> Tensor:
    return operator.multiply_on_hopper(x, *weight[:4], None, None, tiling, format=format)


if __name__ == "__main__":
    main()
