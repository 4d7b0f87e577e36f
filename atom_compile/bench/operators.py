"""The operators of a decoder layer, three variants each:

    op            baseline   unfused                       fused
    each linear   F.linear   quantize, linear              linear, its input arriving quantized
    norm          RMSNorm    RMSNorm, reorder, quantize    norm_quantize
    silu_mul      SiLU * up  SiLU * up, reorder, quantize  gated_quantize, the order folded away
    o_proj_input  -          reorder, quantize             reorder_quantize

RMSNorm and SiLU * up are compiled by Inductor. On a CPU our operators run as their references,
uncompiled; only the decoder layer (layer.py) runs as the backend compiles it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels import gated_quantize, linear, norm_quantize, quantize
from ..kernels.packing import PackedWeight, dequantize, pack_weight
from ..kernels.reorder import reorder
from .cases import OTHER_ROUNDING, SAME_ROUNDING, Case, Draw, Setting

_EPS = 1e-5
_CHECKED_TOKENS = 64  # of a linear: its reference holds every group's sums at once


def operator_cases(setting: Setting) -> list[Case]:
    cases: list[Case] = []
    for M in setting.tokens:
        for op, (N, K) in setting.shape.linears.items():
            cases += _linear_cases(setting, op, M, N, K)
        cases += _norm_cases(setting, M)
        cases += _silu_mul_cases(setting, M)
        cases += _o_proj_input_cases(setting, M)
    return cases


def _quantize_numbers(setting: Setting, width: int) -> tuple[int, int, int, float, int]:
    """The last arguments of every quantize operator."""
    scheme, layout = setting.scheme, setting.scheme.layout(width)
    bits, clip = scheme.activation_bits, scheme.activation_clip
    return bits, layout.group_size, layout.outlier_channels, clip, scheme.rotation or 0


def _linear_cases(setting: Setting, op: str, M: int, N: int, K: int) -> list[Case]:
    dtype, scheme = setting.dtype, setting.scheme
    numbers = _quantize_numbers(setting, K)
    checked = torch.linspace(0, M - 1, min(M, _CHECKED_TOKENS), device=setting.device).long()

    def packed(draw: Draw) -> PackedWeight:
        weight = draw.normal(N, K)
        return pack_weight(weight, scheme.layout(K), scheme.weight_bits, scheme.weight_clip)

    def reference(codes: Tensor, scale: Tensor, *packed: Tensor) -> Tensor:
        arguments: tuple[Any, ...] = (codes[checked], scale[:, checked], *packed, None, None, dtype)
        return linear.reference(*arguments)

    case = functools.partial(
        Case, op=op, M=M, N=N, K=K, observe=lambda out, *_: out[checked], limit=SAME_ROUNDING
    )
    return [
        case(
            variant="baseline",
            runs="F.linear",
            inputs=lambda draw: (draw.normal(M, K), draw.normal(N, K)),
            function=F.linear,
            reference=lambda x, weight: F.linear(x[checked].float(), weight.float()),
        ),
        case(
            variant="unfused",
            runs="atom.quantize, atom.linear",
            inputs=lambda draw: (draw.normal(M, K), *packed(draw)),
            function=lambda x, *packed: linear.linear(
                *quantize.quantize(x, *numbers), *packed, None, None, dtype
            ),
            reference=lambda x, *packed: reference(*quantize.reference(x, *numbers), *packed),
        ),
        case(
            variant="fused",
            runs="atom.linear, its input arriving quantized",
            inputs=lambda draw: (*quantize.reference(draw.normal(M, K), *numbers), *packed(draw)),
            function=lambda *inputs: linear.linear(*inputs, None, None, dtype),
            reference=reference,
        ),
    ]


def _norm_cases(setting: Setting, M: int) -> list[Case]:
    K = setting.shape.hidden

    def arguments(x: Tensor, weight: Tensor, order: Tensor, *numbers: Any) -> tuple[Any, ...]:
        return x, weight, None, order, _EPS, False, True, x.dtype, *numbers

    return _quantizing_cases(
        setting,
        "norm",
        (M, K),
        tensors=lambda draw: (draw.normal(M, K), draw.norm_weight(K)),
        baseline=_rms_norm,
        unfused=by_inductor(_rms_norm_reorder_quantize),
        fused=lambda *inputs: norm_quantize.norm_quantize(*arguments(*inputs)),
        reference=lambda *inputs: norm_quantize.reference(*arguments(*inputs)),
        runs=("RMSNorm", "RMSNorm, atom.reorder, atom.quantize", "atom.norm_quantize"),
    )


def _silu_mul_cases(setting: Setting, M: int) -> list[Case]:
    K = setting.shape.intermediate

    def arguments(gate: Tensor, up: Tensor, order: Tensor | None, *numbers: Any) -> tuple[Any, ...]:
        return gate, up, order, "silu", *numbers

    return _quantizing_cases(
        setting,
        "silu_mul",
        (M, K),
        tensors=lambda draw: draw.normal(M, 2 * K).chunk(2, dim=-1),
        baseline=_silu_mul,
        unfused=by_inductor(_silu_mul_reorder_quantize),
        fused=lambda *inputs: gated_quantize.gated_quantize(*arguments(*inputs)),
        reference=lambda *inputs: gated_quantize.reference(*arguments(*inputs)),
        runs=("SiLU * up", "SiLU * up, atom.reorder, atom.quantize", "atom.gated_quantize"),
        order_is_folded=True,
    )


def _o_proj_input_cases(setting: Setting, M: int) -> list[Case]:
    K = setting.shape.heads * setting.shape.head_dim
    return _quantizing_cases(
        setting,
        "o_proj_input",
        (M, K),
        tensors=lambda draw: (draw.normal(M, K),),
        baseline=None,
        unfused=lambda x, order, *numbers: quantize.quantize(reorder(x, order), *numbers),
        fused=quantize.reorder_quantize,
        reference=quantize.reorder_reference,
        runs=("", "atom.reorder, atom.quantize", "atom.reorder_quantize"),
    )


def _quantizing_cases(
    setting: Setting,
    op: str,
    size: tuple[int, int],
    *,
    tensors: Callable[[Draw], tuple[Tensor, ...]],
    baseline: Callable[..., Tensor] | None,
    unfused: Callable[..., Any],
    fused: Callable[..., Any],
    reference: Callable[..., tuple[Tensor, Tensor]],
    runs: tuple[str, str, str],
    order_is_folded: bool = False,
) -> list[Case]:
    """Of variants that all take `tensors`, and but for the baseline an order and the numbers."""
    M, K = size
    layout, numbers = setting.scheme.layout(K), _quantize_numbers(setting, K)

    def restored(outputs: tuple[Tensor, Tensor]) -> Tensor:
        codes, scale = outputs
        return dequantize(codes, scale, layout)

    case = functools.partial(Case, op=op, M=M, N=None, K=K)
    quantizing_case = functools.partial(
        case,
        reference=lambda *inputs: restored(reference(*inputs, *numbers)),
        observe=lambda outputs, *_: restored(outputs),
    )
    cases = [
        quantizing_case(
            variant="unfused",
            runs=runs[1],
            inputs=lambda draw: (*tensors(draw), draw.order(K)),
            function=lambda *inputs: unfused(*inputs, *numbers),
            limit=OTHER_ROUNDING,
        ),
        quantizing_case(
            variant="fused",
            runs=runs[2],
            inputs=lambda draw: (*tensors(draw), None if order_is_folded else draw.order(K)),
            function=lambda *inputs: fused(*inputs, *numbers),
            limit=SAME_ROUNDING,
        ),
    ]
    if baseline is not None:
        cases.insert(
            0,
            case(
                variant="baseline",
                runs=runs[0],
                inputs=tensors,
                function=by_inductor(baseline),
                reference=baseline,
                observe=lambda out, *_: out,
                limit=SAME_ROUNDING,
            ),
        )
    return cases


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return norm_quantize.norm(x, weight, None, _EPS, False, True, x.dtype)


def _rms_norm_reorder_quantize(x: Tensor, weight: Tensor, order: Tensor, *numbers: Any) -> Any:
    return quantize.quantize(reorder(_rms_norm(x, weight), order), *numbers)


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _silu_mul_reorder_quantize(gate: Tensor, up: Tensor, order: Tensor, *numbers: Any) -> Any:
    return quantize.quantize(reorder(_silu_mul(gate, up), order), *numbers)


def by_inductor(function: Callable[..., Any]) -> Callable[..., Any]:
    # fullgraph: past the limit on recompilations Dynamo raises, and does not run eagerly unseen
    return torch.compile(function, fullgraph=True)
