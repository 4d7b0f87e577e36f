"""Compares transforms of linears' inputs before INT4, on a real Llama, by perplexity; writes JSON.

    python benchmarks/rotations.py MODEL_DIR --calibration FILE --validation FILE --out FILE
                                   [--outliers FILE] [--methods NAME ...]

Everything is simulated in float32 on a model written out here: each linear's input goes through a
method's transform and is rounded per token and group, its weight goes through the inverse and is
rounded to nearest (RTN, the best of nine clips per group) or by GPTQ. So methods can be tried that
the product does not have. `ratio`: of the perplexity to float32's, over windows spread evenly over
the validation text; half a percent either way is chance. `divergence`: the mean Kullback-Leibler
divergence from float32's predictions, in nats, which tells methods apart better. `activations`
leaves the weights as they are. Rows that FILE has already are kept.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from reference_model import load_function
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from atom_compile.evaluate import text_windows
from atom_compile.kernels.rotate import rotate_blocks

WINDOWS, LENGTH, BATCH, GROUP = 24, 512, 6, 128
CLIPS = tuple(0.6 + 0.05 * step for step in range(9))
SITES = ("qkv", "o", "gate_up", "down")
Cache = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
Key = tuple[int, str]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A transform of a linear's input, and how both sides are rounded.

    order: "none", "sorted" by magnitude, or "dealt" over the groups, so that all are alike.
    outliers: so many of the largest channels are INT8. rotation: "none", "blocks" (Hadamard in
    each group), "full" (one random orthogonal matrix over all groups). turn_outliers: "blocks" in
    the outliers as well.
    smoothing: the exponent of a scale per channel, sqrt(mean square) over the weight's column norm.
    clips: more than one: the best for each token and group. rms: steps of so many root mean squares
    instead.
    weights: "float", "rtn", "gptq", or "gptaq", which fits what the unquantized inputs give.
    cache: "none", "kv4" (keys after RoPE) or "kv4 rotated" (keys, queries and values).
    """

    order: str = "dealt"
    outliers: int = 128
    rotation: str = "blocks"
    turn_outliers: bool = True
    smoothing: float = 0.0
    group: int = GROUP
    clips: tuple[float, ...] = (0.8,)
    rms: float = 0.0
    weights: str = "rtn"
    cache: str = "none"


BEST = Method()
ATOM = Method(order="sorted", rotation="none", clips=(0.85,))
METHODS = {
    "atom": ATOM,
    "rotated": BEST,
    "rotated, kv4": replace(BEST, cache="kv4"),
    "rotated, kv4 rotated": replace(BEST, cache="kv4 rotated"),
    "rotated, outliers as they are": Method(turn_outliers=False),
    "rotated, gptq": replace(BEST, weights="gptq"),
    "rotated, gptq, kv4 rotated": replace(BEST, weights="gptq", cache="kv4 rotated"),
    "random rotation of the whole width": Method(order="none", outliers=0, rotation="full"),
    "blocks, no outliers, channels as they are": Method(order="none", outliers=0),
    "blocks, no outliers, sorted": Method(order="sorted", outliers=0),
    "blocks, no outliers, dealt, smoothed": Method(outliers=0, smoothing=0.5),
    "blocks, sorted": Method(order="sorted"),
    "blocks, dealt, smoothed": Method(smoothing=0.5),
    "dealt, no rotation": Method(rotation="none", clips=(0.85,)),
    "rotated, groups of 64, 64 outliers": Method(group=64, outliers=64),
    "rotated, clip 0.75": Method(clips=(0.75,)),
    "rotated, clip 0.85": Method(clips=(0.85,)),
    "rotated, best of three clips": Method(clips=(0.7, 0.8, 0.9)),
    "rotated, scale by root mean square": Method(rms=0.335),
    "rotated, gptaq": replace(BEST, weights="gptaq"),
    "atom, gptq": replace(ATOM, weights="gptq"),
    "atom, kv4": replace(ATOM, cache="kv4"),
}
METHODS |= {
    f"{name}: activations": replace(METHODS[name], weights="float")
    for name in ("atom", "rotated", "random rotation of the whole width", "blocks, sorted")
}


class Llama:
    """A Llama's forward written out: `linear(key, x)` stands for each of its linears."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps
        self.table = model.model.embed_tokens.weight.detach()
        self.last_norm = model.model.norm.weight.detach()
        self.head = model.lm_head.weight.detach()
        self.norms: list[tuple[Tensor, Tensor]] = []
        self.weights: dict[Key, Tensor] = {}
        for number, layer in enumerate(model.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            self.norms.append(
                (layer.input_layernorm.weight.detach(), layer.post_attention_layernorm.weight.data)
            )
            merged = {
                "qkv": (attention.q_proj, attention.k_proj, attention.v_proj),
                "o": (attention.o_proj,),
                "gate_up": (mlp.gate_proj, mlp.up_proj),
                "down": (mlp.down_proj,),
            }
            for site, linears in merged.items():
                self.weights[number, site] = torch.cat([one.weight.detach() for one in linears])
        position = torch.arange(LENGTH)[None]
        with torch.no_grad():
            self.cos, self.sin = model.model.rotary_emb(self.table[:LENGTH][None], position)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))

    def attend(self, qkv: Tensor, cache: Cache) -> Tensor:
        widths = [count * self.head_dim for count in (self.heads, self.kv_heads, self.kv_heads)]
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in qkv.split(widths, dim=-1)
        )
        query, key, value = cache(self.turn(query), self.turn(key), value)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    def turn(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos[:, None] + torch.cat([-second, first], dim=-1) * self.sin[:, None]

    def steps(self, number: int, cache: Cache) -> Iterator[tuple[str, Callable[..., Tensor]]]:
        """A layer's linears in order: site, and what makes its input of (hidden, last output)."""
        before, after = self.norms[number]
        yield "qkv", lambda hidden, out: self.norm(hidden, before)
        yield "o", lambda hidden, out: self.attend(out, cache)
        yield "gate_up", lambda hidden, out: self.norm(hidden, after)
        yield "down", lambda hidden, out: F.silu(out.chunk(2, -1)[0]) * out.chunk(2, -1)[1]

    def hidden(self, ids: Tensor, linear: Callable[[Key, Tensor], Tensor], cache: Cache) -> Tensor:
        hidden = out = self.table[ids]
        for number in range(len(self.norms)):
            for site, make_input in self.steps(number, cache):
                out = linear((number, site), make_input(hidden, out))
                hidden = hidden + out if site in ("o", "down") else hidden
        return hidden

    def predictions(
        self, ids: Tensor, linear: Callable[[Key, Tensor], Tensor], cache: Cache
    ) -> Iterator[Tensor]:
        """Logarithms of probabilities (batch, tokens, vocabulary)."""
        for batch in ids.split(BATCH):
            hidden = self.norm(self.hidden(batch, linear, cache), self.last_norm)
            yield F.linear(hidden, self.head).log_softmax(-1)

    def in_full(self, key: Key, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[key])


class Transform:
    """A method's transform of one linear's input, from its second moment (K, K) and weight."""

    def __init__(self, method: Method, moment: Tensor, weight: Tensor) -> None:
        self.method = method
        K = weight.shape[1]
        self.grouped = K - method.outliers
        energy = moment.diagonal()
        self.order = torch.arange(K) if method.order == "none" else energy.argsort()
        if method.order == "dealt":
            rows = self.order[: self.grouped].view(-1, self.grouped // method.group).clone()
            rows[1::2] = rows[1::2].flip(1)
            self.order = torch.cat([rows.t().flatten(), self.order[self.grouped :]])
        scale = (energy / weight.square().sum(0)).sqrt() ** method.smoothing
        self.scale = (scale / scale.log().mean().exp())[self.order]
        generator = torch.Generator().manual_seed(0)
        if method.rotation == "full":
            square = torch.randn(self.grouped, self.grouped, generator=generator)
            self.matrix = torch.linalg.qr(square).Q

    def of_input(self, x: Tensor) -> Tensor:
        return self._turned(x[..., self.order] / self.scale)

    def of_weight(self, weight: Tensor) -> Tensor:
        return self._turned(weight[:, self.order] * self.scale)

    def _turned(self, x: Tensor) -> Tensor:
        groups, outliers = x[..., : self.grouped], x[..., self.grouped :]
        if self.method.rotation == "full":
            groups = groups @ self.matrix
        elif self.method.rotation == "blocks":
            groups = rotate_blocks(groups.unflatten(-1, (-1, self.method.group))).flatten(-2)
            if self.method.outliers and self.method.turn_outliers:
                outliers = rotate_blocks(outliers)
        return torch.cat([groups, outliers], dim=-1)

    def rounded_input(self, x: Tensor) -> Tensor:
        return self._rounded(self.of_input(x), self.method.clips, self.method.rms)

    def rounded_weight(self, weight: Tensor) -> Tensor:
        return self._rounded(self.of_weight(weight), CLIPS)

    def _rounded(self, x: Tensor, clips: tuple[float, ...], rms: float = 0.0) -> Tensor:
        groups = x[..., : self.grouped].unflatten(-1, (-1, self.method.group))
        rounded = round_best(groups, clips, rms).flatten(-2)
        if not self.method.outliers:
            return rounded
        outliers = x[..., self.grouped :]
        step = outliers.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return torch.cat([rounded, (outliers / step).round() * step], dim=-1)


def round_best(x: Tensor, clips: tuple[float, ...], rms: float = 0.0) -> Tensor:
    """To 4 bits over the last dimension, with whichever of `clips` is off least."""
    if rms:
        return round_to(x, x.square().mean(-1, keepdim=True).sqrt() * rms)
    largest = x.abs().amax(-1, keepdim=True)
    best, least = x, torch.full_like(largest, torch.inf)
    for clip in clips:
        rounded = round_to(x, largest * (clip / 7))
        if len(clips) == 1:
            return rounded
        error = (x - rounded).square().sum(-1, keepdim=True)
        best = torch.where(error < least, rounded, best)
        least = torch.minimum(least, error)
    return best


def round_to(x: Tensor, step: Tensor) -> Tensor:
    step = step.clamp(min=1e-30)
    return (x / step).round().clamp(-8, 7) * step


def gptq(weight: Tensor, hessian: Tensor, transform: Transform) -> Tensor:
    """GPTQ (arXiv 2210.17323) of a transformed weight, group by group, outliers in INT8 last."""
    weight, K = weight.clone(), weight.shape[1]
    damped = hessian.double()
    damped += 0.01 * damped.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    result = torch.empty_like(weight)
    grouped, size = transform.grouped, transform.method.group
    starts = [*range(0, grouped, size), *([grouped] if grouped < K else [])]
    for start, end in zip(starts, [*starts[1:], K], strict=True):
        columns = weight[:, start:end]
        if start < grouped:
            step, largest = best_step(columns), 7
        else:
            step, largest = columns.abs().amax(1) / 127, 127
        errors = torch.empty_like(columns)
        for j in range(end - start):
            column = columns[:, j]
            rounded = (column / step).round().clamp(-largest - 1, largest) * step
            result[:, start + j] = rounded
            errors[:, j] = (column - rounded) / upper[start + j, start + j]
            columns[:, j + 1 :] -= errors[:, j, None] * upper[start + j, start + j + 1 : end]
        weight[:, end:] -= errors @ upper[start:end, end:]
    return result


def best_step(columns: Tensor) -> Tensor:
    largest = columns.abs().amax(1, keepdim=True)
    steps = torch.stack([largest * (clip / 7) for clip in CLIPS])
    errors = torch.stack([(columns - round_to(columns, step)).square().sum(1) for step in steps])
    return steps[errors.argmin(0), torch.arange(len(columns)), 0]


def compare(got: Iterator[Tensor], full: list[Tensor], ids: Tensor) -> dict[str, float]:
    loss = full_loss = divergence = 0.0
    for one, wanted, batch in zip(got, full, ids.split(BATCH), strict=True):
        targets = batch[:, 1:, None]
        loss -= one[:, :-1].gather(2, targets).sum().item()
        full_loss -= wanted[:, :-1].gather(2, targets).sum().item()
        divergence += F.kl_div(one, wanted, reduction="sum", log_target=True).item()
    ratio = math.exp((loss - full_loss) / ids[:, 1:].numel())
    return {"ratio": round(ratio, 4), "divergence": round(divergence / ids.numel(), 5)}


def moments(llama: Llama, ids: Tensor) -> dict[Key, Tensor]:
    sums: dict[Key, Tensor] = {}

    def linear(key: Key, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        sums[key] = sums.get(key, torch.zeros(())) + rows.t() @ rows
        return F.linear(x, llama.weights[key])

    for batch in ids.split(BATCH):
        llama.hidden(batch, linear, CACHES["none"])
    return sums


Quantized = dict[Key, tuple[Transform, Tensor]]


def quantize(llama: Llama, method: Method, second: dict[Key, Tensor], ids: Tensor) -> Quantized:
    """The transform and the transformed, rounded weight of each linear."""
    transforms = {key: Transform(method, second[key], llama.weights[key]) for key in second}
    if method.weights in ("gptq", "gptaq"):
        return quantize_in_order(llama, method, transforms, ids)
    return {
        key: (
            one,
            one.of_weight(llama.weights[key])
            if method.weights == "float"
            else one.rounded_weight(llama.weights[key]),
        )
        for key, one in transforms.items()
    }


def quantize_in_order(
    llama: Llama, method: Method, transforms: dict[Key, Transform], ids: Tensor
) -> Quantized:
    """Linear by linear, each seeing what the quantized ones before it give."""
    quantized: Quantized = {}
    hidden = out = llama.table[ids]
    full_hidden = full_out = hidden
    for number in range(len(llama.norms)):
        full_steps = llama.steps(number, CACHES["none"])
        steps = llama.steps(number, CACHES[method.cache])
        for (site, make_input), (_, make_full) in zip(steps, full_steps, strict=True):
            key, one = (number, site), transforms[number, site]
            full_x = make_full(full_hidden, full_out)
            x = one.rounded_input(make_input(hidden, out))
            rows, wanted = x.flatten(0, 1), one.of_input(full_x).flatten(0, 1)
            hessian, weight = rows.t() @ rows, one.of_weight(llama.weights[key])
            if method.weights == "gptaq":
                damping = 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
                change = torch.linalg.solve(hessian + damping, rows.t() @ (wanted - rows))
                weight = weight + weight @ change.t()
            quantized[key] = one, gptq(weight, hessian, one)
            out, full_out = F.linear(x, quantized[key][1]), F.linear(full_x, llama.weights[key])
            if site in ("o", "down"):
                hidden, full_hidden = hidden + out, full_hidden + full_out
    return quantized


def kv4(x: Tensor) -> Tensor:
    """Asymmetric, one scale and minimum per token and head."""
    low = x.amin(-1, keepdim=True).half().float()
    scale = ((x.amax(-1, keepdim=True) - low) / 15).half().float()
    return ((x - low) / scale).round().clamp(0, 15) * scale + low


def rotated_kv4(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    back = rotate_blocks(torch.eye(value.shape[-1])).t()
    return rotate_blocks(query), kv4(rotate_blocks(key)), kv4(rotate_blocks(value)) @ back


CACHES: dict[str, Cache] = {
    "none": lambda query, key, value: (query, key, value),
    "kv4": lambda query, key, value: (query, kv4(key), kv4(value)),
    "kv4 rotated": rotated_kv4,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--outliers", type=Path)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    name = "plain"
    if arguments.outliers:
        load_function(arguments.outliers, "inject_outliers")(model, 60.0)
        name = "outliers"
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    calibration, validation = (
        text_windows(tokenizer, path.read_text(), WINDOWS, LENGTH)
        for path in (arguments.calibration, arguments.validation)
    )
    with torch.no_grad():
        measure(Llama(model), name, calibration, validation, arguments)


def measure(
    llama: Llama, name: str, calibration: Tensor, validation: Tensor, arguments: Any
) -> None:
    result: dict[str, Any] = {"model": arguments.model.name, "windows": [WINDOWS, LENGTH]}
    if arguments.out.exists():
        result = json.loads(arguments.out.read_text())
    rows = result.setdefault(name, {})
    full = list(llama.predictions(validation, llama.in_full, CACHES["none"]))
    second = moments(llama, calibration)
    for title in arguments.methods:
        if title in rows:
            continue
        method = METHODS[title]
        quantized = quantize(llama, method, second, calibration)

        def linear(key: Key, x: Tensor, quantized: Quantized = quantized) -> Tensor:
            transform, weight = quantized[key]
            return F.linear(transform.rounded_input(x), weight)

        got = llama.predictions(validation, linear, CACHES[method.cache])
        rows[title] = compare(got, full, validation)
        print(f"{name}, {title}: {rows[title]}", flush=True)
        arguments.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
