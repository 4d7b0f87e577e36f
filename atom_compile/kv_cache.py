"""A quantized KV cache for transformers: `model.generate(..., past_key_values=KVCache(...))`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    StaticLayer,
    get_layer_types_and_kwargs,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .errors import CacheError, OptionError
from .kernels.kv_cache import kv_append, kv_read
from .kernels.rotate import rotate_heads
from .scheme import KVScheme

_ATTENTION_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


class KVCache(Cache):  # type: ignore[misc]
    """Keys and values in 4, 8 or 16 bits, allocated once.

    It works as any static cache of transformers does: a model writes to it and attends to what it
    reads back. Uncompiled, that is a 16-bit copy of one layer at a time; `backend="atom"` compiles
    attention that reads the codes themselves. Layers whose attention slides over a window keep no
    more than their window. Layers without keys and values (state-space, convolution) are
    transformers' own.

    config: the model's configuration.
    max_batch, max_len: how many sequences, and tokens of each, prompt included, there is room for.
    scheme: "kv4", "kv4-rotated", "kv8", "kv16" or a `KVScheme`.
    device: the model's; by default a GPU if there is one. In a model that is spread over several,
        layers move to their own when they are first written to.
    dtype: of what stays in 16 bits; the configuration's by default.

    Raises OptionError for an unknown scheme or one that does not suit the model, and CacheError
    for more tokens or sequences than there is room for.
    """

    def __init__(
        self,
        config: Any,
        max_batch: int,
        max_len: int,
        scheme: str | KVScheme = "kv4",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if max_batch < 1 or max_len < 1:
            raise OptionError(
                f"max_batch is {max_batch} and max_len {max_len}; both must be at least 1"
            )
        self.scheme = KVScheme.of(scheme)
        config = config.get_text_config(decoder=True)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        device = torch.empty(0, device=device).device  # with its index
        dtype = dtype or getattr(config, "dtype", None) or torch.get_default_dtype()
        layer_types, extras = get_layer_types_and_kwargs(config)
        tables: dict[str, Tensor | None] = {}
        layers = []
        for index, layer_type in enumerate(layer_types):
            if layer_type not in _ATTENTION_LAYERS:
                if layer_type not in STATIC_LAYER_TYPE_MAPPING:
                    raise OptionError(
                        f"{config.model_type} has layers of {layer_type}, for which transformers "
                        "has no cache of fixed size: call the model without a KVCache"
                    )
                others = STATIC_LAYER_TYPE_MAPPING[layer_type]
                layers.append(others(max_cache_len=max_len, **extras))
                continue
            heads, key_dim, value_dim = _sizes(config, index)
            if layer_type not in tables:
                before = self.scheme.keys_before_rope
                tables[layer_type] = (
                    _rope_table(config, layer_type, max_len, key_dim).to(device) if before else None
                )
            window = None if layer_type == "full_attention" else extras["sliding_window"]
            layer = KVLayer(max_len, window, self.scheme, tables[layer_type])
            layer.allocate(max_batch, heads, key_dim, value_dim, dtype, device)
            layers.append(layer)
        super().__init__(layers=layers)
        if not self.quantized_layers:
            raise OptionError(
                f"{config.model_type} has no attention whose keys and values a KVCache could hold: "
                "call the model without one"
            )

    @property
    def quantized_layers(self) -> list[KVLayer]:
        return [layer for layer in self.layers if isinstance(layer, KVLayer)]

    @property
    def nbytes(self) -> int:
        """The bytes allocated for keys and values, scales and 16-bit tokens included."""
        tensors = [
            one for layer in self.quantized_layers for one in layer.tensors if one is not None
        ]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def bytes_per_token(self) -> float:
        """Of all layers together, for a token that every layer still holds."""
        return sum(layer.bytes_per_token for layer in self.quantized_layers)


class KVLayer(StaticLayer):  # type: ignore[misc]
    """One layer's cache; kernels/kv_cache.py has the layout."""

    def __init__(
        self, max_len: int, window: int | None, scheme: KVScheme, rope: Tensor | None
    ) -> None:
        super().__init__(max_cache_len=max_len)
        self.window = min(window or max_len, max_len)
        self.is_sliding = window is not None
        self.scheme = scheme
        self.rope = rope

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """transformers' way to allocate; ours are allocated when the cache is made."""

    def allocate(
        self,
        batch: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.batch_size, self.num_heads = batch, heads
        self.k_head_dim, self.v_head_dim = key_dim, value_dim
        self.dtype, self.device = dtype, device
        tokens = (batch, heads, self.window)
        self.key_codes, self.key_scale = self._empty(tokens, key_dim)
        self.value_codes, self.value_scale = self._empty(tokens, value_dim)
        self.key_recent = self.value_recent = None
        if self.scheme.residual:
            recent = (batch, heads, self.scheme.residual)
            self.key_recent = torch.zeros(*recent, key_dim, dtype=dtype, device=device)
            self.value_recent = torch.zeros(*recent, value_dim, dtype=dtype, device=device)
        self.cumulative_length = torch.zeros((), dtype=torch.int64, device=device)
        for tensor in (*self.tensors, self.rope, self.cumulative_length):
            if tensor is not None:
                torch._dynamo.mark_static_address(tensor)  # CUDA graphs then need no copy of it
        self.is_initialized = True

    def _empty(self, tokens: tuple[int, ...], head_dim: int) -> tuple[Tensor, Tensor | None]:
        bits = self.scheme.bits
        if bits == 16:
            return torch.zeros(*tokens, head_dim, dtype=self.dtype, device=self.device), None
        groups = self.scheme.groups(head_dim)
        codes = torch.zeros(*tokens, head_dim * bits // 8, dtype=torch.uint8, device=self.device)
        return codes, torch.zeros(*tokens, groups, 2, dtype=torch.float16, device=self.device)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What holds tokens, in the order in which the operators take it; batch leads."""
        return (
            self.key_codes,
            self.key_scale,
            self.value_codes,
            self.value_scale,
            self.key_recent,
            self.value_recent,
        )

    @property
    def bytes_per_token(self) -> float:
        held = [one for one in self.tensors[:4] if one is not None]
        return sum(tensor.nbytes for tensor in held) / (self.batch_size * self.window)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stores keys and values (batch, num_kv_heads, tokens, head_dim); returns all, read back.

        Both come back as (batch, num_kv_heads, max_len, head_dim), zeros where nothing is held.
        """
        self._follow(key_states.device)
        self._check(key_states, value_states)
        if self.scheme.rotate:
            key_states, value_states = rotate_heads(key_states), rotate_heads(value_states)
        bits, tokens = self.scheme.bits, key_states.shape[-2]
        cache, start = self.tensors, self.cumulative_length
        if tokens > 1 and self.window < self.max_cache_len:
            # the first of these tokens must see a window of its own that the last overwrite
            wide = self._widened(tokens)
            kv_append(key_states, value_states, *wide, self.rope, start, bits)
            kv_append(key_states, value_states, *cache, self.rope, start, bits)
            cache = wide
        else:
            kv_append(key_states, value_states, *cache, self.rope, start, bits)
        self.cumulative_length.add_(tokens)
        length, batch = self.cumulative_length, key_states.shape[0]
        sizes = batch, self.max_cache_len, bits, key_states.dtype
        key_codes, key_scale, value_codes, value_scale, key_recent, value_recent = cache
        keys = kv_read(key_codes, key_scale, key_recent, self.rope, length, *sizes)
        values = kv_read(value_codes, value_scale, value_recent, None, length, *sizes)
        if self.scheme.rotate:
            return rotate_heads(keys, inverse=True), rotate_heads(values, inverse=True)
        return keys, values

    def _widened(self, tokens: int) -> tuple[Tensor | None, ...]:
        """A copy with room for `tokens` more, with the window's tokens in the slots that fit it."""
        slots = self.window + tokens
        held = self.cumulative_length - self.window + torch.arange(self.window, device=self.device)

        def widen(ring: Tensor | None) -> Tensor | None:
            if ring is None:
                return None
            wide = ring.new_zeros(*ring.shape[:2], slots, *ring.shape[3:])
            return wide.index_copy(2, held % slots, ring.index_select(2, held % self.window))

        return (*(widen(ring) for ring in self.tensors[:4]), self.key_recent, self.value_recent)

    def _follow(self, device: torch.device) -> None:
        """To where the model's layer lies, while nothing is held."""
        if torch.compiler.is_compiling() or device == self.device or int(self.cumulative_length):
            return
        self.rope = None if self.rope is None else self.rope.to(device)
        sizes = self.batch_size, self.num_heads, self.k_head_dim, self.v_head_dim
        self.allocate(*sizes, self.dtype, device)

    def _check(self, key: Tensor, value: Tensor) -> None:
        batch, heads, tokens, key_dim = key.shape
        eager = not torch.compiler.is_compiling()
        shapes = heads, key_dim, value.shape[-1]
        expected = self.num_heads, self.k_head_dim, self.v_head_dim
        if shapes != expected or (eager and key.device != self.device):
            raise CacheError(
                f"the model's keys have {heads} heads of {key_dim} channels on {key.device}, its "
                f"values {value.shape[-1]} channels, and the cache was made for {self.num_heads} "
                f"heads of {self.k_head_dim} and {self.v_head_dim} on {self.device}: make "
                "KVCache(model.config, ..., device=model.device) for this model"
            )
        if batch > self.batch_size:
            raise CacheError(f"{batch} sequences, and the cache has room for {self.batch_size}")
        # compiled, or for each new token on a GPU, reading the length would cost too much
        if eager and (tokens > 1 or not key.is_cuda):
            length = int(self.cumulative_length)
            if length + tokens > self.max_cache_len:
                raise CacheError(
                    f"{tokens} tokens after {length}, and the cache has room for "
                    f"{self.max_cache_len}: make it with a larger max_len, or reset() it"
                )

    def reset(self) -> None:
        self.cumulative_length.zero_()  # what is past the length is never read

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """The first sequences become those at `indices`."""
        for tensor in self.tensors:
            if tensor is not None:
                tensor[: len(indices)] = tensor[indices.to(tensor.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        indices = torch.arange(self.batch_size // repeats, device=self.device)
        self.batch_select_indices(indices.repeat_interleave(repeats))

    def offload(self) -> None:
        raise CacheError("a KVCache cannot be offloaded: its place in memory is fixed")


def _sizes(config: Any, layer: int) -> tuple[int, int, int]:
    """The heads, and their channels of keys and of values, that models of transformers cache."""
    if layers := getattr(config, "per_layer_config", None):
        config = layers[layer]
    queries = config.num_attention_heads
    if latent := getattr(config, "kv_lora_rank", None):  # of which all heads are computed, and RoPE
        return 1, latent, config.qk_rope_head_dim
    heads = getattr(config, "num_key_value_heads", None) or queries
    if getattr(config, "new_decoder_architecture", False):
        heads = queries  # Falcon repeats its heads before it caches them
    elif getattr(config, "multi_query", False):
        heads = 1
    key_dim = getattr(config, "head_dim", None) or config.hidden_size // queries
    return heads, key_dim, getattr(config, "v_head_dim", None) or key_dim


def _rope_table(config: Any, layer_type: str, max_len: int, head_dim: int) -> Tensor:
    """(max_len, rotated_channels) float32: cosines, then sines, of the model's RoPE by position.

    Rotating keys back and forth by any table gives what they were; the model's own gives in between
    what they were before RoPE.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    per_type = layer_type in parameters
    parameters = parameters[layer_type] if per_type else parameters
    if "rope_theta" not in parameters:
        raise OptionError("keys_before_rope=True, and the model's configuration names no RoPE")
    kind = parameters.get("rope_type", "default")
    if kind in ROPE_INIT_FUNCTIONS:
        options = {"layer_type": layer_type} if per_type else {}
        frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, device="cpu", seq_len=max_len, **options)
    else:
        rotated = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        frequencies = parameters["rope_theta"] ** -(torch.arange(0, rotated, 2) / rotated)
    angles = torch.arange(max_len)[:, None] * frequencies.float()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
