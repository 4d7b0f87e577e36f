"""`atom::weight_only_linear`: 16-bit activations times a packed INT4 weight.

    out[m, n] = sum_g weight_scale[g, n] * sum_k x[m, k] * (weight[n, k] - zero_point[g, n])
              + bias[n]                 rounded to the output's dtype, then + residual[m, n]

The sums run over k, the channels of group g. Codes are exact in 16 bits, so tensor cores multiply
them as they are and the scale goes to a group's sum: no weight is rounded, and all sums are of
float32. Only for many tokens, where unpacking for every tile of them would cost more than it saves,
the whole weight is dequantized first, to `dtype`, and PyTorch multiplies.

Sources: GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978) for the numbers; for turning codes into
16-bit floats by their exponent Kim et al., "Who Says Elephants Can't Run" (arXiv 2211.10017).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import linear
from .devices import multiprocessors
from .library import define
from .linear import Tiling, split_buffers, store_tile, tile_in_band
from .packing import GroupedWeight, GroupLayout, dequantize_weight


def reference(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """x (*, K), rounded to `dtype`; the weight as `packing.GroupedWeight`, bias (N,), residual
    (*, N) -> (*, N) in `dtype`."""
    layout = GroupLayout(x.shape[-1], 2 * weight.shape[2], 0)
    dense = dequantize_weight(GroupedWeight(weight, weight_scale, zero_point), layout)
    out = F.linear(x.to(dtype).float(), dense)
    if bias is not None:
        out = out + bias.float()
    out = out.to(dtype)
    return out if residual is None else out + residual


def fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1], dtype=dtype)


@triton.constexpr_function
def _unpacking(dtype, pack):
    """PTX that makes 16-bit floats of 4-bit codes, two bytes at a time.

    The bytes are spread over the halves of a register. The mantissa of 128 in bfloat16, of 1024 in
    float16, counts in ones: a code plus 8 in its last bits makes it 136 or 1032 plus the code. To
    add the summand, -136 or -1032 less the zero point, is exact.

    Results are the lower codes of `pack` bytes, then the upper ones; operands the bytes, a whole
    register or half a one, then the summand.
    """
    words = pack // 2  # of a result
    if dtype == tl.bfloat16:
        kind, one, code_zero = "bf16x2", "0x3F803F80", "0x43084308"
    else:
        kind, one, code_zero = "f16x2", "0x3C003C00", "0x64086408"
    packed, summand = 2 * words, 2 * words + 1
    operand = f"${packed}" if words == 2 else f"{{${packed}, none}}"
    lines = [".reg .b32 bytes, pair, one;", ".reg .b16 none;", "mov.b16 none, 0;"]
    lines += [f"mov.b32 bytes, {operand};", f"mov.b32 one, {one};"]
    for word, to_halves in enumerate(("0x4140", "0x4342")[:words]):
        lines.append(f"prmt.b32 pair, bytes, 0, {to_halves};")
        for result in (word, words + word):
            lines.append(f"lop3.b32 ${result}, pair, 0x000F000F, {code_zero}, 0x6A;")  # (a & b) ^ c
            lines.append(f"fma.rn.{kind} ${result}, ${result}, one, ${summand + word};")
            if result == word:
                lines.append("shr.u32 pair, pair, 4;")
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def _registers(pack):
    return "=&r,=&r,=&r,=&r,r,r,r" if pack == 4 else "=&r,=&r,h,r"


@triton.constexpr_function
def _twice(dtype):
    return dtype, dtype


@triton.jit
def to_values(packed, zero_point, DTYPE: tl.constexpr, PACK: tl.constexpr):
    """Packed rows (N, J) -> what their lower and upper codes stand for before they are scaled.

    The one place that knows the weight's format. zero_point (N, 1), int32. Two tiles (N, J) of
    DTYPE, exact; nothing moves between threads. PACK: so many bytes of a row lie side by side in a
    thread, 2 for Hopper's products of four warps and 4 for all others; 0 for no PTX at all.
    """
    if PACK > 0 and DTYPE.primitive_bitwidth == 16:
        CODE_ZERO: tl.constexpr = 136 if DTYPE.is_bf16() else 1032
        summand = (-CODE_ZERO - zero_point).to(tl.float32).to(DTYPE)
        low, high = tl.inline_asm_elementwise(
            _unpacking(DTYPE, PACK), _registers(PACK), [packed, summand],
            dtype=_twice(DTYPE), is_pure=True, pack=PACK,
        )  # fmt: skip
    else:
        low = (((packed << 4) >> 4).to(tl.int32) - zero_point).to(tl.float32).to(DTYPE)
        high = ((packed >> 4).to(tl.int32) - zero_point).to(tl.float32).to(DTYPE)
    return low, high


@triton.jit
def weight_only_kernel(
    x_ptr,
    weight_ptr,
    weight_scale_ptr,
    zero_point_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    M,
    N,
    K,
    weight_rows,
    num_groups,
    HALF_GROUP: tl.constexpr,
    HALF_STEP: tl.constexpr,
    RAGGED: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    TILES_PER_BAND: tl.constexpr,
    PACK: tl.constexpr,
):
    """One tile of out^T = weight x^T: a weight on the left stays in registers, unpacked.

    A step is a group, or the part of a large one whose codes lie in HALF_STEP bytes of a row.
    Programs along the grid's second axis split K, as in `linear_kernel`. A group begins
    `weight_rows` rows after the one before: N, or more where the weight is part of a larger one.
    RAGGED: the last group is not full, and what lies behind a token's last channel is another
    token's.
    """
    STEPS: tl.constexpr = HALF_GROUP // HALF_STEP  # a group's
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    tile = tl.program_id(0)
    split = tl.program_id(1)
    splits = tl.num_programs(1) if IS_SPLIT else 1
    tile_m, tile_n = tile_in_band(tile, M, N, BLOCK_M, BLOCK_N, TILES_PER_BAND)

    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    live_n = n < N
    # tokens past the end: as in linear_kernel
    m_row = tl.where(m < M, m, tl.minimum(m - M, M - 1)).to(tl.int64)
    n_row = tl.where(live_n, n, 0).to(tl.int64)
    lane = tl.arange(0, HALF_STEP)
    x_tile = x_ptr + m_row[None, :] * K + lane[:, None]
    weight_tile = weight_ptr + n_row[:, None] * HALF_GROUP + lane[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    first = split * num_groups // splits
    end = (split + 1) * num_groups // splits
    # Triton does not pipeline loads this small: they are fetched one step ahead
    scale_at = tl.cast(first, tl.int64) * weight_rows + n
    scale = tl.load(weight_scale_ptr + scale_at, mask=live_n, other=0.0)
    zero_point = tl.zeros((BLOCK_N,), dtype=tl.int8)
    if HAS_ZERO_POINT:
        zero_point = tl.load(zero_point_ptr + scale_at, mask=live_n, other=0)
    for step in range(first * STEPS, end * STEPS):
        group = step // STEPS
        byte = (step % STEPS) * HALF_STEP
        following = tl.cast(tl.minimum((step + 1) // STEPS, num_groups - 1), tl.int64)
        following = following * weight_rows + n
        next_scale = tl.load(weight_scale_ptr + following, mask=live_n, other=0.0)
        if HAS_ZERO_POINT:
            next_zero_point = tl.load(zero_point_ptr + following, mask=live_n, other=0)
        packed = tl.load(weight_tile + tl.cast(group, tl.int64) * weight_rows * HALF_GROUP + byte)
        channel = group * 2 * HALF_GROUP + byte
        if RAGGED:
            low_live = channel + lane[:, None] < K
            high_live = channel + HALF_GROUP + lane[:, None] < K
            x_low = tl.load(x_tile + channel, mask=low_live, other=0.0)
            x_high = tl.load(x_tile + channel + HALF_GROUP, mask=high_live, other=0.0)
        else:
            x_low = tl.load(x_tile + channel)
            x_high = tl.load(x_tile + channel + HALF_GROUP)
        low, high = to_values(
            packed.to(tl.int8, bitcast=True), zero_point.to(tl.int32)[:, None], DTYPE, PACK
        )
        sums = tl.dot(low, x_low, input_precision="ieee")
        sums = tl.dot(high, x_high, sums, input_precision="ieee")
        acc += sums * scale.to(tl.float32)[:, None]
        scale = next_scale
        if HAS_ZERO_POINT:
            zero_point = next_zero_point

    store_tile(
        acc, m, n, M, N, bias_ptr, residual_ptr, out_ptr, partial_ptr, arrivals_ptr,
        tile, split, splits, HAS_BIAS, HAS_RESIDUAL, IS_SPLIT,
    )  # fmt: skip


@triton.jit
def dequantize_kernel(
    weight_ptr,
    weight_scale_ptr,
    zero_point_ptr,
    out_ptr,
    N,
    K,
    weight_rows,
    HALF_GROUP: tl.constexpr,
    HAS_ZERO_POINT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACK: tl.constexpr,
):
    """One group of BLOCK_N rows of the weight (N, K)."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    group = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_n = n < N
    at = tl.cast(group, tl.int64) * weight_rows + n
    lane = tl.arange(0, HALF_GROUP)
    packed = tl.load(weight_ptr + at[:, None] * HALF_GROUP + lane, mask=live_n[:, None], other=0)
    scale = tl.load(weight_scale_ptr + at, mask=live_n, other=0.0).to(tl.float32)[:, None]
    zero_point = tl.zeros((BLOCK_N,), dtype=tl.int8)
    if HAS_ZERO_POINT:
        zero_point = tl.load(zero_point_ptr + at, mask=live_n, other=0)
    low, high = to_values(
        packed.to(tl.int8, bitcast=True), zero_point.to(tl.int32)[:, None], DTYPE, PACK
    )
    channel = group * 2 * HALF_GROUP + lane[None, :]
    out = out_ptr + n.to(tl.int64)[:, None] * K + channel
    tl.store(out, (low.to(tl.float32) * scale).to(DTYPE), mask=live_n[:, None] & (channel < K))
    tl.store(
        out + HALF_GROUP,
        (high.to(tl.float32) * scale).to(DTYPE),
        mask=live_n[:, None] & (channel + HALF_GROUP < K),
    )


PATH = "triton 16-bit"
DEQUANTIZE = "dequantize, cuBLAS"
_MOST_TOKENS = 256  # for more the weight is dequantized; an estimate, not yet measured
_MOST_CHANNELS = 128  # a step's


@functools.lru_cache(maxsize=4096)
def choose_tiling(
    M: int, N: int, num_groups: int, dtype: torch.dtype, device: torch.device
) -> Tiling | None:
    """How `weight_only_kernel` cuts the product; None where dequantizing should be faster."""
    if M > _MOST_TOKENS:
        return None
    tiling = linear.default_tiling(M, N, num_groups, multiprocessors(device))
    # two warps multiply by mma.sync, on Hopper too, which takes its weights by whole words: a third
    # fewer instructions than with wgmma at 8 tokens, as many at 32, a third more at 64
    few = tiling.block_m <= 16
    # what the shared memory of every GPU since sm_80 holds
    block_m = min(tiling.block_m, 128 if dtype.itemsize == 2 else 32)
    stages = 4 if few else 3 if block_m <= 64 else 2
    return Tiling(64, block_m, tiling.split_k, 2 if few else 4, stages)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def _pack(device: torch.device, tiling: Tiling) -> int:
    """See to_values."""
    if device.type != "cuda":
        return 0
    return 2 if is_hopper(device) and tiling.num_warps >= 4 and tiling.block_n >= 64 else 4


def describe(M: int, N: int, layout: GroupLayout, dtype: torch.dtype, device: torch.device) -> str:
    """The path that a product of these sizes takes."""
    if device.type != "cuda":
        return "reference"
    return PATH if choose_tiling(M, N, layout.num_groups, dtype, device) else DEQUANTIZE


def launch(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """The arguments of `reference`, on a GPU."""
    x = x.to(dtype)
    num_groups, N, _ = weight.shape
    M = x.numel() // x.shape[-1]
    if M == 0:
        return x.new_empty(*x.shape[:-1], N)
    tiling = choose_tiling(M, N, num_groups, dtype, x.device)
    arguments = (x, weight, weight_scale, zero_point, bias, residual)
    return multiply_dense(*arguments) if tiling is None else multiply_packed(*arguments, tiling)


def multiply_packed(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    tiling: Tiling,
) -> Tensor:
    """`launch` by one kernel, in x's dtype, for at least one token."""
    num_groups, N, half_group = weight.shape
    K = x.shape[-1]
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], N)
    if residual is not None:
        residual = residual.expand(out.shape).contiguous()
    tiles, partial, arrivals = split_buffers(out, tiling)
    weight_only_kernel[(tiles, tiling.split_k)](
        x,
        weight,
        weight_scale,
        out if zero_point is None else zero_point,
        out if bias is None else bias,
        out if residual is None else residual,
        out,
        partial,
        arrivals,
        x.numel() // K,
        N,
        K,
        weight.stride(0) // half_group,
        num_groups,
        HALF_GROUP=half_group,
        HALF_STEP=min(half_group, _MOST_CHANNELS // 2),
        RAGGED=K % (2 * half_group) != 0,
        HAS_ZERO_POINT=zero_point is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        IS_SPLIT=tiling.split_k > 1,
        TILES_PER_BAND=8,
        PACK=_pack(x.device, tiling),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    return out


def multiply_dense(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """`launch` by way of the whole weight in x's dtype, for as long as the call takes."""
    num_groups, N, half_group = weight.shape
    dense = x.new_empty(N, x.shape[-1])
    block_n = max(1, 4096 // half_group)
    dequantize_kernel[(triton.cdiv(N, block_n), num_groups)](
        weight,
        weight_scale,
        dense if zero_point is None else zero_point,
        dense,
        N,
        x.shape[-1],
        weight.stride(0) // half_group,
        HALF_GROUP=half_group,
        HAS_ZERO_POINT=zero_point is not None,
        BLOCK_N=block_n,
        PACK=4 if x.is_cuda else 0,
    )
    out = F.linear(x, dense, None if bias is None else bias.to(x.dtype))
    return out if residual is None else out + residual


weight_only_linear = define(
    "weight_only_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? zero_point, "
    "Tensor? bias, Tensor? residual, ScalarType dtype) -> Tensor",
    reference,
    fake,
    launch,
)
