"""`atom::linear`: the product of quantized activations with a packed INT4 weight, exact group by group.

    out[m, n] = sum_g scale[g, m] * weight_scale[g, n] * (sum of codes[m, k] * weight[n, k] over the k of group g)
              + scale[G, m] * outlier_scale[n] * (sum of codes[m, k] * outlier_weight[n, k] over the outliers)
              + bias[n]                                 rounded to the output's dtype, then + residual[m, n]

The inner sums are integers, exact in every implementation. Source: Atom (arXiv 2310.19102), section 4.1 and 4.4.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .library import define
from .packing import unpack_int4


def reference(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    outlier_weight: Tensor,
    outlier_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """codes (*, padded_width), scale (num_scales, *), the weight as packed by packing.py, bias (N,), residual (*, N).

    Returns (*, N) in `dtype`. Float32 holds every inner sum exactly: it stays below 2^24 for groups of up to 1024.
    """
    num_groups, N, half_group = weight.shape
    codes_MK = codes.reshape(-1, codes.shape[-1]).float()
    scale_GM = scale.reshape(scale.shape[0], -1)
    groups_GMK = (
        codes_MK[:, : num_groups * half_group * 2]
        .unflatten(1, (num_groups, half_group * 2))
        .transpose(0, 1)
    )
    sums_GMN = torch.bmm(groups_GMK, unpack_int4(weight).float().transpose(1, 2))
    out = (sums_GMN * (scale_GM[:num_groups, :, None] * weight_scale.float()[:, None, :])).sum(0)
    if outlier_weight.shape[1]:
        outliers = codes_MK[:, num_groups * half_group * 2 :] @ outlier_weight.float().t()
        out = out + outliers * (scale_GM[num_groups, :, None] * outlier_scale)
    if bias is not None:
        out = out + bias.float()
    out = out.to(dtype).reshape(*codes.shape[:-1], N)
    return out if residual is None else out + residual


def fake(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    outlier_weight: Tensor,
    outlier_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], weight.shape[1], dtype=dtype)


@triton.jit
def linear_kernel(
    codes_ptr,
    scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    outlier_weight_ptr,
    outlier_scale_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    partial_ptr,
    arrivals_ptr,
    M,
    N,
    codes_stride,
    residual_stride,
    NUM_GROUPS: tl.constexpr,
    HALF_GROUP: tl.constexpr,
    OUTLIERS: tl.constexpr,
    OUTLIER_BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    TILES_PER_BAND: tl.constexpr,
):
    """One tile of out^T = weight codes^T: with the weight on the left it is unpacked in registers and stays there.

    `SPLIT_K` programs share a tile: each leaves a float32 partial sum, and the last to arrive adds them up in order.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    # tiles go down bands of a few blocks of tokens, so that weights and activations stay in the L2
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles_m = tl.cdiv(M, BLOCK_M)
    band = tile // (TILES_PER_BAND * tiles_n)
    band_tiles = tl.minimum(tiles_m - band * TILES_PER_BAND, TILES_PER_BAND)
    tile_m = band * TILES_PER_BAND + (tile % (TILES_PER_BAND * tiles_n)) % band_tiles
    tile_n = (tile % (TILES_PER_BAND * tiles_n)) // band_tiles

    m = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    live_m = m < M
    live_n = n < N
    m_row = tl.where(live_m, m, 0)  # rows past the end read the first one and are never stored
    n_row = tl.where(live_n, n, 0)
    half = tl.arange(0, HALF_GROUP)
    codes_low = codes_ptr + m_row[None, :] * codes_stride + half[:, None]
    weight_tile = weight_ptr + n_row[:, None] * HALF_GROUP + half[None, :]

    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for group in range(split * NUM_GROUPS // SPLIT_K, (split + 1) * NUM_GROUPS // SPLIT_K):
        packed = tl.load(weight_tile + tl.cast(group, tl.int64) * N * HALF_GROUP).to(
            tl.int8, bitcast=True
        )
        x_low = tl.load(codes_low + group * (2 * HALF_GROUP))
        x_high = tl.load(codes_low + group * (2 * HALF_GROUP) + HALF_GROUP)
        # a code in the upper half of its byte is itself times 16: one operation each, and 1/16 at the end
        sums = tl.dot(packed << 4, x_low, out_dtype=tl.int32)
        sums = tl.dot(packed & -16, x_high, sums, out_dtype=tl.int32)
        weight_scale = tl.load(weight_scale_ptr + tl.cast(group, tl.int64) * N + n_row).to(
            tl.float32
        )
        scale = tl.load(scale_ptr + tl.cast(group, tl.int64) * M + m_row)
        acc += sums.to(tl.float32) * (weight_scale[:, None] * scale[None, :])
    acc *= 0.0625

    if OUTLIERS > 0:
        if split == SPLIT_K - 1:
            lane = tl.arange(0, OUTLIER_BLOCK)
            x = tl.load(
                codes_ptr
                + m_row[None, :] * codes_stride
                + NUM_GROUPS * (2 * HALF_GROUP)
                + lane[:, None],
                mask=lane[:, None] < OUTLIERS,
                other=0,
            )
            w = tl.load(
                outlier_weight_ptr + n_row[:, None] * OUTLIERS + lane[None, :],
                mask=lane[None, :] < OUTLIERS,
                other=0,
            )
            scale = tl.load(scale_ptr + NUM_GROUPS * M + m_row)
            outlier_scale = tl.load(outlier_scale_ptr + n_row)
            acc += tl.dot(w, x, out_dtype=tl.int32).to(tl.float32) * (
                outlier_scale[:, None] * scale[None, :]
            )

    live = live_m[None, :] & live_n[:, None]
    at = m[None, :] * N + n[:, None]
    last = True
    if SPLIT_K > 1:
        tl.store(partial_ptr + tl.cast(split, tl.int64) * M * N + at, acc, mask=live)
        tl.debug_barrier()  # all threads' stores come before this program's arrival
        last = tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == SPLIT_K - 1
        if last:
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            for other in range(SPLIT_K):
                acc += tl.load(
                    partial_ptr + tl.cast(other, tl.int64) * M * N + at,
                    mask=live,
                    other=0.0,
                    cache_modifier=".cg",
                )
            tl.store(arrivals_ptr + tile, 0)  # for the next call
    if last:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n_row).to(tl.float32)[:, None]
        out = acc.to(out_ptr.dtype.element_ty)
        if HAS_RESIDUAL:
            residual = tl.load(
                residual_ptr + m[None, :] * residual_stride + n[:, None], mask=live, other=0.0
            )
            out = (out.to(tl.float32) + residual.to(tl.float32)).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, out, mask=live)


class Tiling(NamedTuple):
    """How one launch cuts the product; see linear_kernel."""

    block_n: int
    block_m: int
    split_k: int
    num_warps: int
    num_stages: int


def default_tiling(M: int, N: int, num_groups: int, multiprocessors: int) -> Tiling:
    """A sound choice for any shape: few tokens are split along K until the device is full, many are tiled."""
    if M > 64:
        return Tiling(128, 128, 1, 8, 3)
    block_m = max(16, triton.next_power_of_2(M))
    block_n = 64
    wanted = triton.cdiv(4 * multiprocessors, triton.cdiv(N, block_n))
    return Tiling(block_n, block_m, max(1, min(wanted, num_groups // 4, 16)), 4, 3)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )


_MOST_TILES = 1 << 16


@functools.cache
def _cached_arrivals(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(_MOST_TILES, dtype=torch.int32, device=device)


def _arrivals(device: torch.device) -> Tensor:
    """Zeroed counters; every launch leaves them zeroed. One buffer a stream, since launches on one are in order."""
    if device.type != "cuda":
        return torch.zeros(_MOST_TILES, dtype=torch.int32, device=device)
    if (
        torch.cuda.is_current_stream_capturing()
    ):  # a graph must not keep a buffer that it has not zeroed itself
        return torch.zeros(_MOST_TILES, dtype=torch.int32, device=device)
    return _cached_arrivals(device, torch.cuda.current_stream(device).cuda_stream)


def launch(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    outlier_weight: Tensor,
    outlier_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    tiling: Tiling | None = None,
) -> Tensor:
    """The Triton kernel on the arguments of `reference`; `tiling` is for tuning."""
    num_groups, N, half_group = weight.shape
    outliers = outlier_weight.shape[1]
    codes = codes.contiguous()
    scale = scale.contiguous()
    M = codes.numel() // codes.shape[-1]
    out = codes.new_empty(*codes.shape[:-1], N, dtype=dtype)
    if M == 0:
        return out
    if residual is not None:
        residual = residual.expand(out.shape).reshape(M, N).contiguous()
    tiling = tiling or default_tiling(M, N, num_groups, _multiprocessors(codes.device))
    tiles = triton.cdiv(M, tiling.block_m) * triton.cdiv(N, tiling.block_n)
    partial, arrivals = out, out
    if tiling.split_k > 1:
        partial = out.new_empty(tiling.split_k, M, N, dtype=torch.float32)
        arrivals = _arrivals(codes.device)
        assert tiles <= _MOST_TILES, "split along K is for few tokens"
    linear_kernel[(tiles, tiling.split_k)](
        codes,
        scale,
        weight,
        weight_scale,
        outlier_weight,
        outlier_scale,
        out if bias is None else bias,
        out if residual is None else residual,
        out,
        partial,
        arrivals,
        M,
        N,
        codes.shape[-1],
        N,
        NUM_GROUPS=num_groups,
        HALF_GROUP=half_group,
        OUTLIERS=outliers,
        OUTLIER_BLOCK=max(32, triton.next_power_of_2(max(outliers, 1))),
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK_M=tiling.block_m,
        BLOCK_N=tiling.block_n,
        SPLIT_K=tiling.split_k,
        TILES_PER_BAND=8,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    return out


linear = define(
    "linear(Tensor codes, Tensor scale, Tensor weight, Tensor weight_scale, Tensor outlier_weight, "
    "Tensor outlier_scale, Tensor? bias, Tensor? residual, ScalarType dtype) -> Tensor",
    reference,
    fake,
    launch,
)
