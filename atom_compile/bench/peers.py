"""Other ways to multiply by a weight of 8 or 4 bits, timed beside ours:

    peer         runs                                           activations   weights
    fp8 row      scaled_mm, a scale per token and row           e4m3          e4m3
    fp8 1x128    scaled_mm, a scale per 128 channels            e4m3 INT4     e4m3 INT4
    int8         _int_mm: the product alone, no scales          INT8          INT8
    tinygemm     _weight_int4pack_mm, groups of 128             bfloat16      INT4
    torchao      Int4WeightOnlyConfig, groups of 128            bfloat16      INT4
    gemlite      A16W4_HQQ_INT, groups of 128                   bfloat16      INT4

Where activations have 8 bits or fewer they arrive quantized, as ours do. Each is checked against
what it computes. A peer that cannot run says why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cases import FIRST_WEIGHT, SAME_ROUNDING, Case, Draw, Setting, checked_tokens

_GROUP = 128
# INT4 with asymmetric groups of 128 costs a random weight about 0.08; a wrong product 1 or more
_WEIGHTS_OF_ITS_OWN = 0.2
# 4-bit weights are unpacked for every few tokens: a product of thousands takes a second
_MOST_TOKENS_16_BIT = 512


@dataclass(frozen=True, kw_only=True)
class Peer:
    """`function(*activations, *weights)`, with `reference` in float32 on the same arguments.

    `package`: what must be installed. `limit`: of the relative error.
    """

    name: str
    runs: str
    activations: Callable[[Draw, int, int], tuple[Any, ...]]  # of M, K
    weights: Callable[[Draw, int, int], tuple[Any, ...]]  # of N, K
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    arithmetic: str = "8-bit"
    fewest_tokens: int = 1
    most_tokens: int | None = None
    package: str | None = None
    limit: float = SAME_ROUNDING
    weight_bytes: Callable[[int, int], int] = lambda N, K: 0

    def missing(self, M: int, device: torch.device) -> str | None:
        """Why it cannot run, if it cannot."""
        if device.type != "cuda":
            return "needs a GPU"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.fewest_tokens > M:
            return f"takes no fewer than {self.fewest_tokens} tokens"
        if self.most_tokens and self.most_tokens < M:
            return f"made for few tokens, not timed past {self.most_tokens}"
        return None


Weights = Callable[[int], tuple[Any, ...]]


def peer_weights(setting: Setting, N: int, K: int) -> dict[str, Weights]:
    """Peer -> the weights of each copy to rotate through, made once."""

    def weights(peer: Peer, index: int) -> tuple[Any, ...]:
        return peer.weights(setting.weight_draw(index), N, K)

    return {peer.name: functools.cache(functools.partial(weights, peer)) for peer in PEERS}


def peer_case(
    peer: Peer, weights: Weights, setting: Setting, *, op: str, M: int, N: int, K: int
) -> Case:
    checked = checked_tokens(setting, M)
    return Case(
        op=op,
        variant=peer.name,
        runs=peer.runs,
        M=M,
        N=N,
        K=K,
        inputs=lambda draw: (*peer.activations(draw, M, K), *weights(draw.index)),
        function=peer.function,
        reference=functools.partial(peer.reference, checked),
        observe=lambda out, *_: out[checked],
        limit=peer.limit,
        weight_bytes=peer.weight_bytes(N, K),
        flops=2 * M * N * K,
        arithmetic=peer.arithmetic,
        missing=peer.missing(M, setting.device),
    )


def _float8(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn)


def _fp8_rows(draw: Draw, rows: int, K: int) -> tuple[Tensor, Tensor]:
    return _float8(draw.normal(rows, K)), draw.scale(rows, 1)


def _fp8_blocks(draw: Draw, rows: int, K: int) -> tuple[Tensor, Tensor]:
    """INT4 values as e4m3; scales (rows, K / 128) with the rows of a block side by side."""
    return _float8(draw.integers(-8, 8, rows, K)), draw.scale(K // _GROUP, rows).t()


def _scaled_mm_by_rows(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    scales = x_scale, weight_scale.t()
    return torch._scaled_mm(x, weight.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def _scaled_mm_by_blocks(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor
) -> Tensor:
    blocks = F.ScalingType.BlockWise1x128
    out: Tensor = F.scaled_mm(
        x, weight.t(), x_scale, blocks, weight_scale, blocks, output_dtype=torch.bfloat16
    )
    return out


def _scaled_reference(
    checked: Tensor, x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor
) -> Tensor:
    return F.linear(_spread(x.float()[checked], x_scale[checked]), _spread(weight, weight_scale))


def _spread(codes: Tensor, scale: Tensor) -> Tensor:
    """Codes (rows, K) times their scales (rows, blocks), in float32."""
    blocks = codes.float().unflatten(1, (scale.shape[1], -1))
    values: Tensor = blocks * scale.float()[..., None]
    return values.flatten(1)


def _int8_rows(draw: Draw, rows: int, K: int) -> tuple[Tensor]:
    return (draw.integers(-127, 128, rows, K),)


def _int4_rows(draw: Draw, N: int, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0..15, scales and what a code of 0 stands for: value = code * scale + zero."""
    scale = draw.scale(N, K // _GROUP)
    return draw.integers(0, 16, N, K), scale.bfloat16(), (-8 * scale).bfloat16()


def _int4_reference(checked: Tensor, x: Tensor, *packed_and_rows: Any) -> Tensor:
    codes, scale, zero = packed_and_rows[-1].tensors
    weight = _spread(codes, scale) + _spread(torch.ones_like(codes), zero)
    return F.linear(x[checked].float(), weight)


@dataclass(frozen=True)
class _Unpacked:
    """What a weight was packed from: no pytree, so that its bytes are not taken for bytes read."""

    tensors: tuple[Tensor, ...]


def _unpacked(draw: Draw, *tensors: Tensor) -> _Unpacked:
    """Kept of the one copy that is checked."""
    return _Unpacked(tensors if draw.index == FIRST_WEIGHT else ())


def _tinygemm_weight(draw: Draw, N: int, K: int) -> tuple[Any, ...]:
    codes, scale, zero = _int4_rows(draw, N, K)
    pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).view(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    # tinygemm's zero is the value of the middle code, 8
    middle = zero + 8 * scale
    scale_and_zero = torch.stack([scale.t(), middle.t()], dim=-1).contiguous()
    return packed, scale_and_zero, _unpacked(draw, codes, scale, middle.float() - 8 * scale.float())


def _tinygemm(x: Tensor, packed: Tensor, scale_and_zero: Tensor, _: _Unpacked) -> Tensor:
    out: Tensor = torch.ops.aten._weight_int4pack_mm(x, packed, _GROUP, scale_and_zero)
    return out


def _torchao_layer(draw: Draw, N: int, K: int) -> tuple[nn.Module, _Unpacked]:
    quantization = importlib.import_module("torchao.quantization")
    weight = draw.normal(N, K)
    layer = nn.Sequential(nn.Linear(K, N, bias=False, device="meta"))
    layer[0].weight = nn.Parameter(weight, requires_grad=False)
    config = quantization.Int4WeightOnlyConfig(
        group_size=_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )
    quantization.quantize_(layer, config)
    return layer, _unpacked(draw, weight)


def _torchao_reference(checked: Tensor, x: Tensor, _: nn.Module, rows: _Unpacked) -> Tensor:
    (weight,) = rows.tensors
    return F.linear(x[checked].float(), weight.float())


def _gemlite_layer(draw: Draw, N: int, K: int) -> tuple[nn.Module, _Unpacked]:
    helper = importlib.import_module("gemlite.helper")
    codes, scale, _ = _int4_rows(draw, N, K)
    middle = torch.full_like(scale, 8.0)  # subtracted from the code before it is scaled
    layer = helper.A16W4_HQQ_INT(device=codes.device, dtype=torch.bfloat16).from_weights(
        codes.view(torch.uint8), scale.clone(), middle
    )
    return layer, _unpacked(draw, codes, scale, -8 * scale.float())


def _call_layer(x: Tensor, layer: nn.Module, _: _Unpacked) -> Tensor:
    out: Tensor = layer(x)
    return out


def _int4_bytes(N: int, K: int) -> int:
    """Codes, and a 16-bit scale and zero for each group."""
    return N * K // 2 + 4 * N * (K // _GROUP)


def _bfloat16_rows(draw: Draw, M: int, K: int) -> tuple[Tensor]:
    return (draw.normal(M, K),)


_weight_only = functools.partial(
    Peer,
    activations=_bfloat16_rows,
    arithmetic="16-bit",
    most_tokens=_MOST_TOKENS_16_BIT,
)

PEERS = (
    Peer(
        name="fp8 row",
        runs="_scaled_mm, a scale per token and row",
        activations=_fp8_rows,
        weights=_fp8_rows,
        function=_scaled_mm_by_rows,
        reference=_scaled_reference,
    ),
    Peer(
        name="fp8 1x128",
        runs="scaled_mm, INT4 values as e4m3, a scale per 128 channels",
        activations=_fp8_blocks,
        weights=_fp8_blocks,
        function=_scaled_mm_by_blocks,
        reference=_scaled_reference,
    ),
    Peer(
        name="int8",
        runs="_int_mm, the product alone",
        activations=_int8_rows,
        weights=_int8_rows,
        function=lambda x, weight: torch._int_mm(x, weight.t()),
        reference=lambda checked, x, weight: F.linear(x[checked].float(), weight.float()),
        fewest_tokens=17,
    ),
    _weight_only(
        name="tinygemm",
        runs="_weight_int4pack_mm",
        weights=_tinygemm_weight,
        function=_tinygemm,
        reference=_int4_reference,
    ),
    _weight_only(
        name="torchao",
        runs="Int4WeightOnlyConfig, tile_packed_to_4d",
        weights=_torchao_layer,
        function=_call_layer,
        reference=_torchao_reference,
        package="torchao",
        limit=_WEIGHTS_OF_ITS_OWN,
        weight_bytes=_int4_bytes,
    ),
    _weight_only(
        name="gemlite",
        runs="A16W4_HQQ_INT",
        weights=_gemlite_layer,
        function=_call_layer,
        reference=_int4_reference,
        package="gemlite",
        weight_bytes=_int4_bytes,
    ),
)
