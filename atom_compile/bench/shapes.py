"""The model shapes that the benchmark knows by name."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import OptionError, unknown


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of one decoder layer."""

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Name -> (N, K), with q/k/v and gate/up merged as the backend merges them."""
        attention = self.heads * self.head_dim
        return {
            "qkv_proj": (attention + 2 * self.kv_heads * self.head_dim, self.hidden),
            "o_proj": (self.hidden, attention),
            "gate_up_proj": (2 * self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="prose-llama-5m", hidden=256, intermediate=768, heads=4, kv_heads=2, head_dim=64
        ),
        Shape(
            name="llama3-8b", hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128
        ),
        Shape(
            name="llama3-70b", hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128
        ),
    )
}


def find_shape(name: str) -> Shape:
    if name not in SHAPES:
        raise OptionError(unknown("model", name, SHAPES))
    return SHAPES[name]
