"""`atom::float8_linear`: e4m3 activations, a scale a token; weights of 6 bits, a scale a row.

    out[m, n] = scale[m] * row_scale[n] * sum_k codes[m, k] * weight[n, k]
              + bias[n]                 rounded to the output's dtype, then + residual[m, n]

Every value of E3M2 and E2M3 is one of e4m3, a power of two apart that goes into the scale
(formats.py): tensor cores multiply the codes as they are, and all scaling is at the end. Sums are
of float32; but tensor cores that multiply e4m3 keep some 14 bits of a sum, so our kernels let them
add up no more than 512 channels, unless there are many tokens and outputs are bfloat16, which
rounds away more.

For few tokens it is `weight_only_linear`'s kernel, with e4m3 in place of 16 bits where the GPU
multiplies it, and float16, as exact, where it does not. For more there is one of its own on Hopper
(float8_hopper.py). For very many, and elsewhere, the whole weight is put into e4m3 first, and
cuBLAS multiplies, with which tensor cores add up all channels.

Sources: FP6-LLM (arXiv 2401.14112) for the weights; Micikevicius et al., "FP8 Formats for Deep
Learning" (arXiv 2209.05433), for e4m3; DeepSeek-V3 (arXiv 2412.19437), section 3.3.2, for the sums.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from . import float8_hopper, linear, tuning, weight_only_linear
from .dequantize import dequantize
from .devices import multiplies_e4m3, multiprocessors
from .formats import FORMATS
from .hopper_tiles import HopperTiling
from .library import define
from .linear import Tiling, tuned_tiling
from .packing import GroupLayout, RowWeight, dequantize_weight, rows_per_group
from .weight_only_linear import Dense

GROUP_SIZE = 128
"""Channels that lie together in the planes; see packing.py."""
WEIGHT_FORMATS = tuple(name for name, format in FORMATS.items() if format.bits == 6)


def reference(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    high_bits: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    *,
    format: str,
) -> Tensor:
    """codes (*, K) float8_e4m3fn, scale (*) float32, the weight as `packing.RowWeight`, bias (N,),
    residual (*, N) -> (*, N) in `dtype`.

    format: the weight's, one of `WEIGHT_FORMATS`.
    """
    layout = GroupLayout(codes.shape[-1], GROUP_SIZE, 0, per_token=True)
    unscaled = RowWeight(weight, high_bits, torch.ones_like(row_scale))
    sums = F.linear(codes.float(), dequantize_weight(unscaled, layout, format))
    out = sums * (scale[..., None] * row_scale)
    if bias is not None:
        out = out + bias.float()
    out = out.to(dtype)
    return out if residual is None else out + residual


def fake(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    high_bits: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    *,
    format: str,
) -> Tensor:
    return codes.new_empty(*codes.shape[:-1], weight.shape[1], dtype=dtype)


PATH = "triton e4m3"
HOPPER = float8_hopper.PATH
IN_16_BITS = weight_only_linear.PATH
SCALED = "e4m3 weight, cuBLAS"
DEQUANTIZE = weight_only_linear.DEQUANTIZE
_FEW_TOKENS = 32  # for more there is Hopper's own kernel
_MOST_TOKENS = 256  # for more the weight is unpacked first, where there is none: an estimate
_MANY_TOKENS = 8192  # so many that unpacking first, at cuBLAS's rate, is faster than any other way


@functools.lru_cache(maxsize=4096)
def choose_tiling(
    M: int, N: int, K: int, num_groups: int, dtype: torch.dtype, device: torch.device
) -> Tiling | HopperTiling | Dense:
    """The tuned one, where there is one, and by that which kernel's; for a weight of E3M2, what
    E2M3 was tuned for."""
    known = dtype.itemsize == 2
    tuned = tuning.find(device, M, N, num_groups, GROUP_SIZE, "float8_linear") if known else None
    if tuned and tuned.path in (SCALED, DEQUANTIZE):
        return Dense()
    if tuned:
        hopper = _hopper_tilings(N, K, dtype, device)
        if tiling := tuned_tiling(tuned, _own_path(device), HOPPER, hopper):
            return tiling
    return fastest_tiling(M, N, K, num_groups, dtype, device)


def fastest_tiling(
    M: int, N: int, K: int, num_groups: int, dtype: torch.dtype, device: torch.device
) -> Tiling | HopperTiling | Dense:
    """For sizes that nobody tuned; Dense where unpacking the weight first should be faster."""
    if M >= _MANY_TOKENS and _can_scale(N, K, dtype, device):
        return Dense()
    if M > _FEW_TOKENS and float8_hopper.fits(device, N, K):
        return float8_hopper.best_tiling(M, N, num_groups, dtype, multiprocessors(device))
    if M > _MOST_TOKENS:
        return Dense()
    if not multiplies_e4m3(device):
        return weight_only_linear.packed_tiling(M, N, num_groups, torch.float16, device, "e2m3")
    tiling = linear.default_tiling(M, N, num_groups, multiprocessors(device))
    # at 8 tokens Triton would multiply by mma.sync in float16, from 16 on by wgmma
    return tiling._replace(
        block_m=max(16, tiling.block_m), num_stages=4 if tiling.block_m <= 32 else 3
    )


def candidates(
    M: int, N: int, K: int, num_groups: int, dtype: torch.dtype, device: torch.device
) -> list[Tiling | HopperTiling | Dense]:
    """What tuning measures, the likeliest first."""
    found: list[Tiling | HopperTiling | Dense] = [
        one for one in _hopper_tilings(N, K, dtype, device) if one.block_m <= 4 * M
    ]
    if M > _FEW_TOKENS:
        found.append(Dense())
    own = linear.split_candidates(M, num_groups, stages=(4, 3, 5, 2))
    return found + [one for one in own if one.num_warps >= 4]


def _hopper_tilings(N: int, K: int, dtype: torch.dtype, device: torch.device) -> list[HopperTiling]:
    return float8_hopper.tilings(dtype) if float8_hopper.fits(device, N, K) else []


def _own_path(device: torch.device) -> str:
    return PATH if multiplies_e4m3(device) else IN_16_BITS


def describe(M: int, N: int, layout: GroupLayout, dtype: torch.dtype, device: torch.device) -> str:
    """The path that a product of these sizes takes."""
    if device.type != "cuda":
        return "reference"
    tiling = choose_tiling(M, N, layout.width, layout.num_groups, dtype, device)
    return path_of(tiling, N, layout.width, dtype, device)


def path_of(
    tiling: Tiling | HopperTiling | Dense, N: int, K: int, dtype: torch.dtype, device: torch.device
) -> str:
    if isinstance(tiling, HopperTiling):
        return HOPPER
    if isinstance(tiling, Tiling):
        return _own_path(device)
    return SCALED if _can_scale(N, K, dtype, device) else DEQUANTIZE


def forget_tilings() -> None:
    """Looks tuned launches up anew from now on."""
    tuning.forget()
    choose_tiling.cache_clear()


def _can_scale(N: int, K: int, dtype: torch.dtype, device: torch.device) -> bool:
    """What `torch._scaled_mm` takes with a scale for each row of both operands."""
    return multiplies_e4m3(device) and dtype == torch.bfloat16 and N % 16 == 0 and K % 16 == 0


def launch(
    codes: Tensor,
    scale: Tensor,
    weight: Tensor,
    high_bits: Tensor,
    row_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    tiling: Tiling | HopperTiling | Dense | None = None,
    *,
    format: str,
) -> Tensor:
    """The arguments of `reference`, on a GPU; `tiling` is for tuning."""
    num_groups, N, _ = weight.shape
    K, device = codes.shape[-1], codes.device
    M = codes.numel() // K
    if M == 0:
        return codes.new_empty(*codes.shape[:-1], N, dtype=dtype)
    if tiling is None:
        tiling = choose_tiling(M, N, K, num_groups, dtype, device)
    packed = RowWeight(weight, high_bits, row_scale)
    arguments = codes, scale, packed, bias, residual, dtype
    if isinstance(tiling, HopperTiling):
        return multiply_on_hopper(*arguments, tiling, format=format)
    if isinstance(tiling, Tiling):
        return multiply_packed(*arguments, tiling, format=format)
    if _can_scale(N, K, dtype, device):
        return multiply_scaled(*arguments, format=format)
    return multiply_dense(*arguments, format=format)


def multiply_packed(
    codes: Tensor,
    scale: Tensor,
    packed: RowWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    tiling: Tiling,
    *,
    format: str,
    in_e4m3: bool | None = None,
) -> Tensor:
    """`launch` by one kernel. in_e4m3: what tensor cores multiply; by default what they can."""
    if in_e4m3 is None:
        in_e4m3 = multiplies_e4m3(codes.device)
    x = codes if in_e4m3 else codes.view(torch.uint8)
    planes = packed.weight, packed.weight, None, packed.high_bits, packed.row_scale
    return weight_only_linear.multiply_packed(
        x, *planes, bias, residual, tiling, format=format, x_scale=scale, dtype=dtype
    )


def multiply_on_hopper(
    codes: Tensor,
    scale: Tensor,
    packed: RowWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    tiling: HopperTiling,
    *,
    format: str,
) -> Tensor:
    """`launch` by Hopper's own kernel, for sizes that it `fits`."""
    weight, high_bits, row_scale = packed
    codes, scale = codes.contiguous(), scale.contiguous()
    product = float8_hopper.plan_product(
        codes.shape, weight.shape, rows_per_group(weight), dtype, bias is not None,
        residual is not None, format, tiling, multiprocessors(codes.device),
    )  # fmt: skip
    return product.multiply(codes, (codes, weight, high_bits, scale, row_scale), bias, residual)


def multiply_scaled(
    codes: Tensor,
    scale: Tensor,
    packed: RowWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    *,
    format: str,
) -> Tensor:
    """`launch` by way of the whole weight in e4m3, in bfloat16.

    cuBLAS adds up more than 128 channels in the tensor cores, as everybody's FP8 does: a relative
    error of 1e-3, where rounding activations to e4m3 makes one of 3e-2.
    """
    K, N = codes.shape[-1], packed.row_scale.shape[0]
    row_scale = packed.row_scale * 2.0 ** FORMATS[format].gap(torch.float8_e4m3fn)
    out = torch._scaled_mm(
        codes.reshape(-1, K),
        _in_e4m3(packed, K, format).t(),
        scale.reshape(-1, 1),
        row_scale[None],
        None if bias is None else bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=True,
    )
    out = out.view(*codes.shape[:-1], N)
    return out if residual is None else out + residual


def _in_e4m3(packed: RowWeight, K: int, format: str) -> Tensor:
    """(N, K), 2^-gap of the values that the codes stand for."""
    return dequantize(packed, K, torch.float8_e4m3fn, format)


def multiply_dense(
    codes: Tensor,
    scale: Tensor,
    packed: RowWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
    *,
    format: str,
) -> Tensor:
    """`launch` by way of activations and the whole weight in `dtype`."""
    x = (codes.float() * scale[..., None]).to(dtype)
    dense = dequantize(packed, x.shape[-1], dtype, format)
    out = F.linear(x, dense, None if bias is None else bias.to(dtype))
    return out if residual is None else out + residual


float8_linear = define(
    "float8_linear(Tensor codes, Tensor scale, Tensor weight, Tensor high_bits, Tensor row_scale, "
    "Tensor? bias, Tensor? residual, ScalarType dtype, *, str format) -> Tensor",
    reference,
    fake,
    launch,
)
