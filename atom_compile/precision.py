"""Which channels become outliers, and how many groups are INT8: by measured noise, layer by layer.

Rounding a channel's activations adds noise to the linear's output: the channel's own squared error
times the power of the weight column that reads it. Sums of that, over channels and tokens, compare
orders and precisions without one matrix product. Sources: Atom (arXiv 2310.19102), section 4.1;
COMET (arXiv 2410.12168), section 4.

Shapes: T tokens, K channels, G groups.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .kernels import quantize, quantize_e4m3
from .kernels.packing import GroupLayout, dequantize
from .passes.transforms import Transform, deal
from .scheme import Scheme

ACTIVATION_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_SHARES = (0.0, 0.125, 0.25, 0.5, 1.0)
_MOST_COUNTS = 9
_MOST_TOKENS = 1024


def transform_of(scheme: Scheme, order: Tensor) -> Transform:
    """What `scheme` does with an activation whose channels are in `order` (K,)."""
    return Transform(order, scheme.layout(len(order)), scheme.rotation or 0)


def fake_quantize(
    x: Tensor, scheme: Scheme, layout: GroupLayout, clip: float, int8_groups: int
) -> Tensor:
    """x (T, K) transformed -> float32 (T, K), as the quantize operators would have it."""
    if scheme.activation_bits == 16:
        return x.float()
    if scheme.activation_format == "e4m3":
        codes, token_scale = quantize_e4m3.reference(x)
        return codes.float() * token_scale[..., None]
    cut = layout.group_size, layout.outlier_channels
    numbers = (scheme.activation_bits, *cut, clip, int8_groups, 0, layout.per_token)
    rounded = quantize.reference(x.float(), *numbers, format=scheme.activation_format)
    return dequantize(*rounded, layout)


def sample_rows(x: Tensor, most: int = _MOST_TOKENS) -> Tensor:
    """(*, K) -> at most `most` of its tokens, evenly spread, (T, K) float32."""
    rows = x.detach().reshape(-1, x.shape[-1])
    return rows[:: max(1, -(-rows.shape[0] // most))].float()


@dataclass
class Noise:
    """The noise over signal of one activation's linears, for each choice.

    magnitude: (K,) each channel's mean square. importance: (K,) the power of its weight columns.
    """

    layout: GroupLayout
    scheme: Scheme
    magnitude: Tensor
    importance: Tensor
    names: tuple[str, ...]
    counts: tuple[int, ...] = ()
    power: float = 0.0
    noise: dict[tuple[float, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        least = self.scheme.int8_groups(self.layout) if not self.counts else 0
        self.counts = self.counts or (least,)

    def add(self, x: Tensor) -> None:
        """x (*, K): more tokens."""
        rows = sample_rows(x)
        for count in self.counts:
            for share in _SHARES:
                transform = transform_of(self.scheme, self.order(share, count))
                x = transform.apply(rows)
                rounded = fake_quantize(
                    x, self.scheme, transform.layout, self.scheme.activation_clip, count
                )
                errors = transform.undo(rounded - x).square() @ self.importance
                key = share, count
                self.noise[key] = self.noise.get(key, 0.0) + errors.sum().item()

    def add_output(self, out: Tensor) -> None:
        """out (*, N) of one of the linears, for the same tokens."""
        self.power += sample_rows(out).square().sum().item()

    def order(self, share: float, int8_groups: int) -> Tensor:
        """(K,) int64: the channels in order, if `share` of those in INT8 are the largest ones.

        The rest of those in INT8 are the ones that would cause the most noise in INT4, going by
        their magnitude and importance. Groups ascend in magnitude, as a group's grid is as wide as
        its largest channel; those that are rotated are alike.
        """
        order = self._ascending(share, int8_groups)
        return deal(order, self.layout, int8_groups) if self.scheme.rotation else order

    def _ascending(self, share: float, int8_groups: int) -> Tensor:
        outliers = self.layout.outlier_channels
        wide = min(outliers + int8_groups * self.layout.group_size, self.layout.width)
        if not wide:
            return self.magnitude.argsort(stable=True)
        loudness = self.magnitude * self.importance
        largest = self.magnitude.argsort(descending=True, stable=True)[: round(share * wide)]
        loudness[largest] = torch.inf
        by_loudness = loudness.argsort(stable=True)
        split = self.layout.width - wide
        cuts = (by_loudness[:split], by_loudness[split : self.layout.width - outliers])
        parts = [part[self.magnitude[part].argsort(stable=True)] for part in cuts]
        return torch.cat([*parts, by_loudness[self.layout.width - outliers :]])

    def best(self, int8_groups: int) -> tuple[float, Tensor]:
        """The least noise over signal with so many INT8 groups, and the order that has it."""
        share = min(_SHARES, key=lambda share: self.noise[share, int8_groups])
        power = max(self.power, 1e-30)
        return self.noise[share, int8_groups] / power, self.order(share, int8_groups)

    @property
    def curve(self) -> dict[int, float]:
        """INT8 groups -> noise over signal, never rising."""
        curve, least = {}, float("inf")
        for count in self.counts:
            least = min(least, self.best(count)[0])
            curve[count] = least
        return curve


def counts_to_try(layout: GroupLayout) -> tuple[int, ...]:
    """Numbers of INT8 groups, from none to all."""
    steps = min(layout.num_groups, _MOST_COUNTS - 1)
    return tuple(sorted({round(layout.num_groups * step / steps) for step in range(steps + 1)}))


def allocate(
    curves: Sequence[Mapping[int, float]],
    layouts: Sequence[GroupLayout],
    int8_share: float,
    error_budget: float | None,
) -> list[int]:
    """How many INT8 groups each activation gets.

    int8_share: of all activations' blocks of channels, the outliers counted as one, at most so many
        are INT8. Each step goes to where it takes away the most noise a block.
    error_budget: beyond that, what brings an activation's noise over signal under it.
    """
    blocks = sum(layout.num_scales for layout in layouts)
    budget = int(int8_share * blocks) - sum(layout.outlier_channels > 0 for layout in layouts)
    chosen = _spend(curves, budget)
    if error_budget is not None:
        for index, curve in enumerate(curves):
            enough = [count for count, error in curve.items() if error <= error_budget]
            chosen[index] = max(chosen[index], min(enough, default=max(curve)))
    return chosen


def _spend(curves: Sequence[Mapping[int, float]], budget: int) -> list[int]:
    chosen = [min(curve) for curve in curves]
    steps = [(-gain, index, count) for index in range(len(curves))
             for gain, count in _next_steps(curves[index], chosen[index])]  # fmt: skip
    heapq.heapify(steps)
    while steps:
        _, index, count = heapq.heappop(steps)
        cost = count - chosen[index]
        if cost <= 0 or cost > budget:
            continue
        budget -= cost
        chosen[index] = count
        for gain, further in _next_steps(curves[index], count):
            heapq.heappush(steps, (-gain, index, further))
    return chosen


def _next_steps(curve: Mapping[int, float], start: int) -> list[tuple[float, int]]:
    """(noise taken away per block, count) of every further count."""
    return [
        ((curve[start] - error) / (count - start), count)
        for count, error in curve.items()
        if count > start
    ]
