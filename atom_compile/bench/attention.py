"""Attention over a KV cache, and storing into it, for caches of 4, 8 and 16 bits:

    op       baseline               unfused                             fused
    decode   SDPA on 16-bit k, v    kv_read of keys and values, SDPA    attention
    prefill  the same, causal       the same                            attention
    append   RoPE, index_copy_      RoPE, kv_append                     rope_append

decode: one new token of each sequence, `length` cached. prefill: `length` tokens of one sequence.
append: one new token of each sequence, and `length` tokens of one sequence.

SDPA is `scaled_dot_product_attention`: in decode by whichever of its backends is fastest on those
sizes, in prefill by FlashAttention, with the times of the others in a note. RoPE and index_copy_
are compiled by Inductor. On a CPU our operators run as their references.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels import attention, kv_cache, rope_append
from .cases import OTHER_ROUNDING, SAME_ROUNDING, Case, Draw, Setting
from .operators import by_inductor
from .timing import measure

LEVELS = {"attention": ("decode", "prefill", "append")} | {
    phase: (phase,) for phase in ("decode", "prefill", "append")
}
BITS = (4, 8, 16)
# weights, keys and values are rounded to 16 bits at one place or another; a wrong mask is off by 1
_ROUNDED_WEIGHTS = 2e-2
_CHECKED = 64  # tokens, and at most 2 sequences: the references hold all scores in float32
_SPARE_SLOTS = 255  # of a cache that tokens are appended to


class Plan(NamedTuple):
    """`tokens` new ones of `batch` sequences, the last of `length` in a cache of `bits`."""

    phase: str
    batch: int
    tokens: int
    length: int
    bits: int

    @property
    def op(self) -> str:
        return f"{self.phase} kv{self.bits} x{self.batch}"


class Cache(NamedTuple):
    """Those of the operators' tensors that our caches have here."""

    key_codes: Tensor
    key_scale: Tensor | None
    value_codes: Tensor
    value_scale: Tensor | None

    def of(self, sequences: Tensor) -> Cache:
        picked: Any = (x if x is None else x[sequences] for x in self)
        return Cache(*picked)

    def arguments(self, length: Tensor) -> tuple[Any, ...]:
        """From `key_codes` to `length`, without `recent` and `rope`."""
        return *self, None, None, None, length


@dataclass(frozen=True)
class Target:
    """A cache to append to: no pytree, so that its bytes are not taken for bytes moved."""

    cache: Cache
    position: Tensor


def attention_plans(setting: Setting, level: str) -> list[Plan]:
    plans = []
    for phase in LEVELS[level]:
        for bits in BITS:
            one_token = [(batch, 1) for batch in setting.batches]
            prompts = [(1, length) for length in setting.lengths]
            if phase == "decode":
                plans += [
                    Plan(phase, batch, 1, length, bits)
                    for batch in setting.batches
                    for length in setting.lengths
                ]
            elif phase == "prefill":
                plans += [Plan(phase, *prompt, prompt[1], bits) for prompt in prompts]
            else:
                appended = dict.fromkeys(sorted(one_token + prompts))
                plans += [Plan(phase, *new, new[1], bits) for new in appended]
    return plans


def attention_cases(setting: Setting, plan: Plan) -> Iterator[Case]:
    """The variants of one plan; made when they are due, since making one may time SDPA."""
    yield from (_append_cases if plan.phase == "append" else _attention_cases)(setting, plan)


def _attention_cases(setting: Setting, plan: Plan) -> Iterator[Case]:
    batch, bits, length = plan.batch, plan.bits, plan.length
    shape, device, dtype = setting.shape, setting.device, setting.dtype
    causal = plan.tokens > 1
    times = _sdpa_times(setting, batch, plan.tokens, length)
    backend = min(times, key=lambda one: times[one])
    if causal and SDPBackend.FLASH_ATTENTION in times:
        backend = SDPBackend.FLASH_ATTENTION
    sdpa = f"scaled_dot_product_attention by {backend.name.lower()}"
    others = [f"{one.name.lower()} {us:.0f} us" for one, us in times.items() if one != backend]
    note = f" (hot inputs: {', '.join(others)})" if others else ""
    sequences = torch.tensor(sorted({0, batch - 1}), device=device)
    checked = _spread(plan.tokens, device)
    factor = shape.head_dim**-0.5

    def inputs(draw: Draw, bits: int) -> tuple[Any, ...]:
        query = _query(draw, setting, batch, plan.tokens)
        position = torch.arange(length - plan.tokens, length, device=device)
        held = torch.tensor([length], device=device)
        return query, _filled_cache(draw, setting, batch, length, bits), held, position

    def fused(query: Tensor, cache: Cache, held: Tensor, position: Tensor) -> Tensor:
        arguments = (*cache.arguments(held), position, None, bits, 0, factor, 0.0)
        out: Tensor = attention.attention(query, *arguments)
        return out

    def unfused(query: Tensor, cache: Cache, held: Tensor, _: Tensor) -> Tensor:
        numbers = (batch, length, bits, dtype)
        key = kv_cache.kv_read(*cache[:2], None, None, held, *numbers)
        value = kv_cache.kv_read(*cache[2:], None, None, held, *numbers)
        return _sdpa(query, key, value, backend, causal)

    def baseline(query: Tensor, cache: Cache, *_: Tensor) -> Tensor:
        return _sdpa(query, cache.key_codes, cache.value_codes, backend, causal)

    def reference(
        query: Tensor, cache: Cache, held: Tensor, position: Tensor, *, bits: int
    ) -> Tensor:
        some = query[sequences][:, :, checked]
        some_cache = cache.of(sequences).arguments(held)
        numbers = (bits, 0, factor, 0.0)
        arguments: list[Any] = [some, *some_cache, position[checked], None, *numbers]
        return attention.reference(*arguments)

    flops = 4 * batch * shape.heads * shape.head_dim * (length * (length + 1) // 2)
    case = functools.partial(
        Case,
        op=plan.op,
        M=length,
        N=None,
        K=shape.head_dim,
        observe=lambda out, *_: out[sequences][:, :, checked],
        limit=_ROUNDED_WEIGHTS,
        flops=flops if causal else 0,
    )
    variants = (
        ("baseline", sdpa + note, baseline, 16),
        ("unfused", f"atom.kv_read twice, {sdpa}", unfused, bits),
        ("fused", "atom.attention", fused, bits),
    )
    for variant, runs, function, cache_bits in variants:
        yield case(
            variant=variant,
            runs=runs,
            inputs=functools.partial(inputs, bits=cache_bits),
            function=function,
            reference=functools.partial(reference, bits=cache_bits),
        )


def _append_cases(setting: Setting, plan: Plan) -> Iterator[Case]:
    batch, tokens = plan.batch, plan.tokens
    shape, device = setting.shape, setting.device
    checked = _spread(tokens, device)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)

    def inputs(draw: Draw, bits: int) -> tuple[Any, ...]:
        merged = draw.normal(batch, tokens, sum(heads) * shape.head_dim)
        parts = merged.split([count * shape.head_dim for count in heads], dim=-1)
        query, key, value = (x.unflatten(-1, (-1, shape.head_dim)).transpose(1, 2) for x in parts)
        angle = torch.arange(_SPARE_SLOTS, _SPARE_SLOTS + tokens, device=device)[:, None] * (
            500000.0 ** -torch.linspace(0, 1, shape.head_dim // 2 + 1, device=device)[:-1]
        )
        angle = torch.cat([angle, angle], dim=-1)[None]
        cos, sin = angle.cos().to(setting.dtype), angle.sin().to(setting.dtype)
        cache = _empty_cache(setting, batch, tokens + _SPARE_SLOTS, bits)
        position = torch.arange(_SPARE_SLOTS, _SPARE_SLOTS + tokens, device=device)
        return query, key, value, cos, sin, Target(cache, position)

    def baseline(query: Tensor, *rest: Any) -> Tensor:
        *tensors, target = rest
        key_cache, _, value_cache, _ = target.cache
        copied: Tensor = _compiled_copy(query, *tensors, key_cache, value_cache, target.position)
        return copied

    def unfused(
        query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, target: Target
    ) -> Tensor:
        turned: Tensor
        turned, key = _compiled_rope(query, key, cos, sin)
        kv_cache.kv_append(key, value, *target.cache.arguments(target.position[:1]), plan.bits)
        return turned

    def fused(*inputs: Any) -> Tensor:
        *tensors, target = inputs
        arguments = target.cache.arguments(target.position[:1])
        turned: Tensor = rope_append.rope_append(*tensors, *arguments, plan.bits)
        return turned

    def reference(*inputs: Any, bits: int) -> Tensor:
        """Of the checked tokens, into a cache of no others."""
        *heads, cos, sin, _ = inputs
        few = [x[:, :, checked] for x in heads] + [x[:, checked] for x in (cos, sin)]
        cache = _empty_cache(setting, batch, len(checked), bits)
        start = torch.zeros(1, dtype=torch.int64, device=device)
        arguments: list[Any] = [*few, *cache.arguments(start), bits]
        query = rope_append.reference(*arguments)
        return torch.cat([query, *_stored(cache, slice(None), bits)], dim=1)

    def observe(query: Tensor, *inputs: Any, bits: int) -> Tensor:
        target: Target = inputs[-1]
        stored = _stored(target.cache, target.position[checked], bits)
        return torch.cat([query[:, :, checked], *stored], dim=1)

    variants = (
        ("baseline", "RoPE, index_copy_ by Inductor", baseline, 16, SAME_ROUNDING),
        ("unfused", "RoPE by Inductor, atom.kv_append", unfused, plan.bits, OTHER_ROUNDING),
        ("fused", "atom.rope_append", fused, plan.bits, SAME_ROUNDING),
    )
    for variant, runs, function, bits, limit in variants:
        one_token = _empty_cache(setting, 1, 1, bits)
        yield Case(
            op=plan.op,
            variant=variant,
            runs=runs,
            M=tokens,
            N=None,
            K=shape.head_dim,
            inputs=functools.partial(inputs, bits=bits),
            function=function,
            reference=functools.partial(reference, bits=bits),
            observe=functools.partial(observe, bits=bits),
            limit=limit,
            weight_bytes=batch * tokens * sum(x.nbytes for x in one_token if x is not None),
        )


def _stored(cache: Cache, slots: Any, bits: int) -> tuple[Tensor, Tensor]:
    """What keys and values in those slots stand for."""
    key, value = (
        codes[:, :, slots]
        if scale is None
        else kv_cache.dequantize(codes[:, :, slots], scale[:, :, slots], bits)
        for codes, scale in (cache[:2], cache[2:])
    )
    return key, value


def _rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rope_append.apply_rope(query, cos, sin), rope_append.apply_rope(key, cos, sin)


def _rope_and_copy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    position: Tensor,
) -> Tensor:
    query, key = _rope(query, key, cos, sin)
    key_cache.index_copy_(2, position, key)
    value_cache.index_copy_(2, position, value)
    return query


_compiled_rope = by_inductor(_rope)
_compiled_copy = by_inductor(_rope_and_copy)


def _spread(count: int, device: torch.device) -> Tensor:
    return torch.linspace(0, count - 1, min(count, _CHECKED), device=device).long()


def _query(draw: Draw, setting: Setting, batch: int, tokens: int) -> Tensor:
    shape = setting.shape
    return draw.normal(batch, tokens, shape.heads, shape.head_dim).transpose(1, 2)


def _empty_cache(setting: Setting, batch: int, slots: int, bits: int) -> Cache:
    size, head_dim = (batch, setting.shape.kv_heads, slots), setting.shape.head_dim
    zeros = functools.partial(torch.zeros, device=setting.device)
    if bits == 16:
        key, value = (zeros(*size, head_dim, dtype=setting.dtype) for _ in range(2))
        return Cache(key, None, value, None)
    key, value = (zeros(*size, head_dim * bits // 8, dtype=torch.uint8) for _ in range(2))
    key_scale, value_scale = (zeros(*size, 1, 2, dtype=torch.float16) for _ in range(2))
    return Cache(key, key_scale, value, value_scale)


def _filled_cache(draw: Draw, setting: Setting, batch: int, length: int, bits: int) -> Cache:
    size = (batch, setting.shape.kv_heads, length, setting.shape.head_dim)
    key, value = draw.normal(*size), draw.normal(*size)
    if bits == 16:
        return Cache(key, None, value, None)
    cache = _empty_cache(setting, batch, length, bits)
    start = torch.zeros(1, dtype=torch.int64, device=setting.device)
    kv_cache.kv_append(key, value, *cache.arguments(start), bits)
    return cache


def _sdpa(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend, causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)


@functools.cache
def _sdpa_times(setting: Setting, batch: int, tokens: int, length: int) -> dict[SDPBackend, float]:
    """Microseconds by each backend that takes these sizes, on inputs that are read again."""
    draw = setting.draw(0)
    times: dict[SDPBackend, float] = {}
    query = _query(draw, setting, batch, tokens)
    cache = _filled_cache(draw, setting, batch, length, bits=16)
    backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    if setting.device.type == "cuda":
        backends[1:] = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    for backend in backends:
        call = functools.partial(
            _sdpa, query, cache.key_codes, cache.value_codes, backend, tokens > 1
        )
        try:
            with warnings.catch_warnings(action="ignore"):  # of what a backend cannot do
                times[backend] = measure([call], setting.device, 0.01).median_us
        except RuntimeError:  # no kernel of this backend takes these tensors
            continue
    return times or {SDPBackend.MATH: 0.0}
