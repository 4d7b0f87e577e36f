"""A decoder layer of random weights: 16 bits by Inductor, unfused and fused by the backend."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..backend import atom
from ..kernels.packing import high_bytes, pack_grouped
from ..scheme import Scheme
from .cases import INT4, Case, Draw, Setting
from .shapes import Shape, llama_config

_MOST_LAYERS = 4  # to rotate through
# fused against unfused would say little: Inductor rounds the unfused norm elsewhere, and a bfloat16
# rounding more or less moves many a 4-bit code; that fusing changes no code is a test's business
_LIMITS = {"baseline": 5e-2, "unfused": INT4, "fused": INT4}
_RUNS = {
    "baseline": "LlamaDecoderLayer compiled by Inductor",
    "unfused": 'LlamaDecoderLayer compiled by "atom", fuse=False',
    "fused": 'LlamaDecoderLayer compiled by "atom", fuse=True',
}


def layer_cases(setting: Setting) -> Iterator[Case]:
    """One variant after the other, so that only one variant's layers are in memory."""
    for variant in _RUNS:
        torch.compiler.reset()  # else the variants share one code's limit on recompilations
        layer = functools.cache(functools.partial(_compiled_layer, setting, variant))
        for M in setting.tokens:
            yield _layer_case(setting, variant, M, layer)


def _layer_case(setting: Setting, variant: str, M: int, layer: Callable[[int], nn.Module]) -> Case:
    """Compares what the layer adds to its input with the eager 16-bit layer.

    `layer(i)` is the i-th to rotate through.
    """
    rotary = _rotary(setting)
    in_16_bits = variant == "baseline" or setting.scheme.activation_bits == 16

    def inputs(draw: Draw) -> tuple[Any, ...]:
        x = draw.normal(1, M, setting.shape.hidden)
        cos_sin = rotary(x, torch.arange(M, device=setting.device)[None])
        return layer(draw.index % _MOST_LAYERS), x, cos_sin

    def change(out: Tensor, _: nn.Module, x: Tensor, __: Any) -> Tensor:
        return out - x

    def reference(layer: nn.Module, x: Tensor, cos_sin: tuple[Tensor, Tensor]) -> Tensor:
        eager: Tensor = layer.forward(x, position_embeddings=cos_sin)  # __call__ is compiled
        return eager - x

    return Case(
        op="decoder_layer",
        variant=variant,
        runs=_RUNS[variant],
        M=M,
        N=None,
        K=setting.shape.hidden,
        inputs=inputs,
        function=lambda layer, x, cos_sin: layer(x, position_embeddings=cos_sin),
        reference=reference,
        observe=change,
        limit=_LIMITS[variant],
        weight_bytes=linear_bytes(
            setting.shape, setting.dtype if variant == "baseline" else setting.scheme
        ),
        flops=2 * M * sum(N * K for N, K in setting.shape.linears.values()),
        arithmetic="16-bit" if in_16_bits else "8-bit",
    )


def _compiled_layer(setting: Setting, variant: str, index: int) -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    with torch.device("meta"):
        layer: nn.Module = LlamaDecoderLayer(llama_config(setting.shape), layer_idx=0)
    layer = layer.to(setting.dtype).to_empty(device=setting.device).eval()
    fill_randomly(layer, setting.weight_draw(index))
    if variant == "baseline":
        layer.compile(fullgraph=True)
    else:
        options = {"scheme": setting.scheme, "fuse": variant == "fused", "strict": True}
        layer.compile(backend=atom, fullgraph=True, options=options)
    return layer


def fill_randomly(module: nn.Module, draw: Draw) -> None:
    """Weights that keep the size of what they are multiplied by."""
    for weight in module.parameters():
        size = weight.shape
        random = draw.norm_weight(*size) if len(size) == 1 else draw.normal(*size) * size[1] ** -0.5
        weight.copy_(random)


def _rotary(setting: Setting) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = LlamaRotaryEmbedding(
        llama_config(setting.shape)
    )
    return rotary


def linear_bytes(shape: Shape, numbers: torch.dtype | Scheme) -> int:
    """Of the weights of one layer's linears, as they are or packed."""
    if isinstance(numbers, torch.dtype):
        return sum(N * K * numbers.itemsize for N, K in shape.linears.values())
    return sum(_packed_bytes(N, K, numbers) for N, K in shape.linears.values())


def _packed_bytes(N: int, K: int, scheme: Scheme) -> int:
    """Of a packed weight: codes and scales of the groups, INT8 outliers and float32 scales."""
    layout = scheme.layout(K)
    if scheme.activation_format == "e4m3":
        codes = layout.group_size // 2 + high_bytes(layout.group_size, scheme.weight_format)
        return N * (layout.num_groups * codes + 4)
    if scheme.activation_bits == 16:
        row = torch.empty(1, K, device="meta")
        numbers = scheme.weight_bits, scheme.weight_clip, scheme.symmetric, scheme.weight_format
        return N * sum(one.nbytes for one in pack_grouped(row, layout, *numbers) if one is not None)
    # bfloat16; in two levels INT8, and float32 for the row
    group_scale, row_scale = (1, 4) if layout.per_token else (2, 0)
    grouped = layout.num_groups * (layout.group_size // 2 + group_scale)
    return N * (grouped + row_scale + layout.outlier_channels + 4)
