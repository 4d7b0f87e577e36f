"""The operators of a decoder layer, three variants each, and beside the linears their peers:

    op            baseline   unfused                       fused
    each linear   F.linear   quantize, linear              linear, its input arriving quantized
    norm          RMSNorm    RMSNorm, reorder, quantize    norm_quantize
    silu_mul      SiLU * up  SiLU * up, reorder, quantize  gated_quantize, the order folded away
    o_proj_input  -          reorder, quantize             reorder_quantize

With 16-bit activations nothing is quantized: the linears alone are timed, and what is called fused
is atom.weight_only_linear. With FP8 activations it is Inductor that quantizes: the linears alone
are timed, atom.float8_linear and, unfused, the quantization before it.

RMSNorm, SiLU * up and the quantization to FP8 are compiled by Inductor. On a CPU our operators run
as their references, uncompiled; only the decoder layer (layer.py) runs as the backend compiles it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import OptionError
from ..kernels import (
    float8_linear,
    gated_quantize,
    linear,
    norm_quantize,
    quantize,
    two_level_linear,
    weight_only_linear,
)
from ..kernels.packing import (
    AnyWeight,
    dequantize,
    pack_grouped,
    pack_rows,
    pack_two_level,
    pack_weight,
)
from ..kernels.quantize_e4m3 import quantize_e4m3
from ..kernels.reorder import reorder
from ..passes.derived import named_format
from .cases import OTHER_ROUNDING, SAME_ROUNDING, Case, Draw, Setting, checked_tokens
from .peers import PEERS, peer_case, peer_weights

_EPS = 1e-5
_LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
OPERATORS = (*_LINEARS, "norm", "silu_mul", "o_proj_input")
GROUPS = {"linears": _LINEARS} | {op: (op,) for op in OPERATORS}  # what `only` may name


def operator_cases(setting: Setting) -> Iterator[Case]:
    """One operator after the other, so that only one operator's weights are in memory."""
    wanted = [op for name in setting.only for op in GROUPS[name]] or OPERATORS
    for op, (N, K) in setting.shape.linears.items():
        if op in wanted:
            yield from _linear_cases(setting, op, N, K)
    quantizing = {
        "norm": _norm_cases,
        "silu_mul": _silu_mul_cases,
        "o_proj_input": _o_proj_input_cases,
    }
    if not setting.scheme.sorts_channels:
        if not set(wanted) & set(_LINEARS):
            raise OptionError(
                f"only is {list(setting.only)}: with activations in 16 bits or FP8 only linears "
                "are timed"
            )
        return
    for op, cases in quantizing.items():
        if op in wanted:
            for M in setting.tokens:
                yield from cases(setting, M)


def _quantize_numbers(setting: Setting, width: int) -> tuple[Any, ...]:
    """The last arguments of every quantize operator."""
    scheme, layout = setting.scheme, setting.scheme.layout(width)
    bits, clip = scheme.activation_bits, scheme.activation_clip
    eights, rotation = scheme.int8_groups(layout), scheme.rotation or 0
    cut = layout.group_size, layout.outlier_channels
    return bits, *cut, clip, eights, rotation, layout.per_token


def _linear_cases(setting: Setting, op: str, N: int, K: int) -> Iterator[Case]:
    scheme, layout = setting.scheme, setting.scheme.layout(K)
    weight_only = scheme.activation_bits == 16
    in_float8 = scheme.activation_format == "e4m3"
    ours = _float8_cases if in_float8 else _weight_only_case if weight_only else _quantized_cases

    @functools.cache
    def dense(index: int) -> Tensor:
        return setting.weight_draw(index).normal(N, K)

    @functools.cache
    def packed(index: int) -> AnyWeight:
        weight = setting.weight_draw(index).normal(N, K)
        if weight_only:
            numbers = scheme.weight_bits, scheme.weight_clip, scheme.symmetric
            return pack_grouped(weight, layout, *numbers, scheme.weight_format)
        if in_float8:
            return pack_rows(weight, layout, scheme.weight_format)
        if layout.per_token:
            return pack_two_level(weight, layout)
        of_four_bits = scheme.weight_bits, scheme.weight_clip, scheme.weight_format
        return pack_weight(weight, layout, *of_four_bits)

    of_peers = peer_weights(setting, N, K)
    for M in setting.tokens:
        yield _baseline_case(setting, op, M, N, K, dense)
        yield from ours(setting, op, M, N, K, packed)
        for peer in PEERS if setting.peers else ():
            yield peer_case(peer, of_peers[peer.name], setting, op=op, M=M, N=N, K=K)


def _case_of_linear(setting: Setting, op: str, M: int, N: int, K: int) -> Callable[..., Case]:
    checked = checked_tokens(setting, M)
    return functools.partial(
        Case, op=op, M=M, N=N, K=K, observe=lambda out, *_: out[checked], limit=SAME_ROUNDING
    )


def _baseline_case(
    setting: Setting, op: str, M: int, N: int, K: int, dense: Callable[[int], Tensor]
) -> Case:
    checked = checked_tokens(setting, M)
    return _case_of_linear(setting, op, M, N, K)(
        variant="baseline",
        runs="F.linear",
        inputs=lambda draw: (draw.normal(M, K), dense(draw.index)),
        function=F.linear,
        reference=lambda x, weight: F.linear(x[checked].float(), weight.float()),
        flops=2 * M * N * K,
    )


def _weight_only_case(
    setting: Setting, op: str, M: int, N: int, K: int, packed: Callable[[int], AnyWeight]
) -> list[Case]:
    dtype, layout = setting.dtype, setting.scheme.layout(K)
    format = setting.scheme.weight_format
    checked = checked_tokens(setting, M)

    def reference(x: Tensor, *packed: Tensor | None) -> Tensor:
        arguments: tuple[Any, ...] = (x[checked], *packed, None, None, dtype)
        out: Tensor = weight_only_linear.reference(*arguments, format=format)
        return out

    return [
        _case_of_linear(setting, op, M, N, K)(
            variant="fused",
            runs="atom.weight_only_linear",
            inputs=lambda draw: (draw.normal(M, K), *packed(draw.index)),
            function=lambda *inputs: weight_only_linear.weight_only_linear(
                *inputs, None, None, dtype, format=format
            ),
            reference=reference,
            flops=2 * M * N * K,
            path=weight_only_linear.describe(
                M, N, layout, dtype, setting.device, setting.scheme.weight_format
            ),
        )
    ]


def _float8_cases(
    setting: Setting, op: str, M: int, N: int, K: int, packed: Callable[[int], AnyWeight]
) -> list[Case]:
    dtype, layout = setting.dtype, setting.scheme.layout(K)
    format = setting.scheme.weight_format
    checked = checked_tokens(setting, M)

    def multiply(*inputs: Tensor) -> Tensor:
        out: Tensor = float8_linear.float8_linear(*inputs, None, None, dtype, format=format)
        return out

    def reference(codes: Tensor, scale: Tensor, *packed: Tensor) -> Tensor:
        arguments: tuple[Any, ...] = (codes[checked], scale[checked], *packed, None, None, dtype)
        return float8_linear.reference(*arguments, format=format)

    ours = functools.partial(
        _case_of_linear(setting, op, M, N, K),
        flops=2 * M * N * K,
        arithmetic="8-bit",
        path=float8_linear.describe(M, N, layout, dtype, setting.device),
    )
    quantize_alone = by_inductor(quantize_e4m3)
    return [
        ours(
            variant="unfused",
            runs="atom.quantize_e4m3, atom.float8_linear",
            inputs=lambda draw: (draw.normal(M, K), *packed(draw.index)),
            function=lambda x, *packed: multiply(*quantize_alone(x), *packed),
            reference=lambda x, *packed: reference(*quantize_e4m3(x), *packed),
        ),
        ours(
            variant="fused",
            runs="atom.float8_linear, its input arriving quantized",
            inputs=lambda draw: (*quantize_e4m3(draw.normal(M, K)), *packed(draw.index)),
            function=multiply,
            reference=reference,
        ),
    ]


def _quantized_cases(
    setting: Setting, op: str, M: int, N: int, K: int, packed: Callable[[int], AnyWeight]
) -> list[Case]:
    dtype, layout, numbers = setting.dtype, setting.scheme.layout(K), _quantize_numbers(setting, K)
    checked = checked_tokens(setting, M)
    format, of_weight = setting.scheme.activation_format, named_format(setting.scheme.weight_format)
    product: Any = two_level_linear if layout.per_token else linear
    multiply: Any = two_level_linear.two_level_linear if layout.per_token else linear.linear
    called = "atom.two_level_linear" if layout.per_token else "atom.linear"

    def reference(codes: Tensor, scale: Tensor, *packed: Tensor) -> Tensor:
        arguments: tuple[Any, ...] = (codes[checked], scale[:, checked], *packed, None, None, dtype)
        out: Tensor = product.reference(*arguments, **of_weight)
        return out

    ours = functools.partial(
        _case_of_linear(setting, op, M, N, K),
        flops=2 * M * N * layout.padded_width,
        arithmetic="8-bit",
        path=linear.describe(M, N, layout, setting.device),
    )
    return [
        ours(
            variant="unfused",
            runs=f"atom.quantize, {called}",
            inputs=lambda draw: (draw.normal(M, K), *packed(draw.index)),
            function=lambda x, *packed: multiply(
                *quantize.quantize(x, *numbers, format=format),
                *packed,
                None,
                None,
                dtype,
                **of_weight,
            ),
            reference=lambda x, *packed: reference(
                *quantize.reference(x, *numbers, format=format), *packed
            ),
        ),
        ours(
            variant="fused",
            runs=f"{called}, its input arriving quantized",
            inputs=lambda draw: (
                *quantize.reference(draw.normal(M, K), *numbers, format=format),
                *packed(draw.index),
            ),
            function=lambda *inputs: multiply(*inputs, None, None, dtype, **of_weight),
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
        fused=lambda *inputs, format: norm_quantize.norm_quantize(
            *arguments(*inputs), format=format
        ),
        reference=lambda *inputs, format: norm_quantize.reference(
            *arguments(*inputs), format=format
        ),
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
        fused=lambda *inputs, format: gated_quantize.gated_quantize(
            *arguments(*inputs), format=format
        ),
        reference=lambda *inputs, format: gated_quantize.reference(
            *arguments(*inputs), format=format
        ),
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
        unfused=lambda x, order, *numbers, format: quantize.quantize(
            reorder(x, order), *numbers, format=format
        ),
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
    format = setting.scheme.activation_format

    def restored(outputs: tuple[Tensor, Tensor]) -> Tensor:
        codes, scale = outputs
        return dequantize(codes, scale, layout)

    case = functools.partial(Case, op=op, M=M, N=None, K=K)
    quantizing_case = functools.partial(
        case,
        reference=lambda *inputs: restored(reference(*inputs, *numbers, format=format)),
        observe=lambda outputs, *_: restored(outputs),
    )
    cases = [
        quantizing_case(
            variant="unfused",
            runs=runs[1],
            inputs=lambda draw: (*tensors(draw), draw.order(K)),
            function=lambda *inputs: unfused(*inputs, *numbers, format=format),
            limit=OTHER_ROUNDING,
        ),
        quantizing_case(
            variant="fused",
            runs=runs[2],
            inputs=lambda draw: (*tensors(draw), None if order_is_folded else draw.order(K)),
            function=lambda *inputs: fused(*inputs, *numbers, format=format),
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


def _rms_norm_reorder_quantize(
    x: Tensor, weight: Tensor, order: Tensor, *numbers: Any, format: str
) -> Any:
    return quantize.quantize(reorder(_rms_norm(x, weight), order), *numbers, format=format)


def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _silu_mul_reorder_quantize(
    gate: Tensor, up: Tensor, order: Tensor, *numbers: Any, format: str
) -> Any:
    return quantize.quantize(reorder(_silu_mul(gate, up), order), *numbers, format=format)


def by_inductor(function: Callable[..., Any]) -> Callable[..., Any]:
    # fullgraph: past the limit on recompilations Dynamo raises, and does not run eagerly unseen
    return torch.compile(function, fullgraph=True)
