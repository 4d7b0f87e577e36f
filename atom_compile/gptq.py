"""GPTQ, Atom's way: a weight is rounded group by group, later columns make up for earlier ones.

    minimize  || W X - Q X ||^2  over Q on the grid,  H = X X^T / tokens

Columns come in channel order, the outliers last, so that the errors of all groups flow into columns
of INT8. X is what the linear will really read: the *quantized* activation. Where activations stay
in 16 bits it is GPTQ as published: no outliers, X as it is, channels in any order. Sources: GPTQ
(arXiv 2210.17323), section 3; Atom (arXiv 2310.19102), section 4.

Shapes: N output rows, K input channels in order, G groups. Weights are held transposed, (K, N), as
every step works on one channel of all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.packing import (
    OUTLIER_BITS,
    TINY,
    AnyWeight,
    GroupLayout,
    affine_grid,
    best_group_scales,
    grouped_codes,
    pack_codes,
    two_level_codes,
    two_level_row_scale,
)

WEIGHT_CLIPS = tuple(round(1.0 - 0.05 * step, 2) for step in range(11))
"""The shares of a group's largest weight that are tried as the end of its grid: 1.0 to 0.5."""

_DAMPING = 0.01
_RIDGE = 0.3
_MOST_DAMPING = 1e3


class Rounded(NamedTuple):
    """A packed weight, rows as they were and columns in order, and what was unusual about it."""

    packed: AnyWeight
    note: str | None


class _Grid(NamedTuple):
    """Codes, from -largest - 1 to `largest`, stand for (code - zero_point) * scale, both (N,)."""

    scale: Tensor
    largest: int
    zero_point: Tensor | None = None

    def round(self, x_KN: Tensor) -> Tensor:
        steps = x_KN / self.scale
        steps = steps if self.zero_point is None else steps + self.zero_point
        return steps.round().clamp(-self.largest - 1, self.largest)

    def values(self, codes_KN: Tensor) -> Tensor:
        codes = codes_KN if self.zero_point is None else codes_KN - self.zero_point
        return codes * self.scale


def round_weight(
    weight: Tensor,
    hessian: Tensor,
    layout: GroupLayout,
    bits: int,
    clips: Sequence[float] = WEIGHT_CLIPS,
    weight_only: bool = False,
    symmetric: bool = True,
) -> Rounded:
    """weight (N, K) in channel order, hessian (K, K) of its quantized input, in that order too.

    clips: the candidates of each group's clip; the best for the output is taken, row by row.
    weight_only, symmetric: the kind of weight that results, as in `PackedLinear`.
    """
    factor, importance, note = _error_factor(hessian.float())
    remaining_KN = weight.float().t().contiguous()
    codes_KN = torch.zeros_like(remaining_KN)
    # later columns take in errors, but their rows' largest magnitudes hardly change
    if layout.per_token:
        row_scale = two_level_row_scale(layout.split(weight.float())[0])
    scales, zero_points = [], []
    for start, end in _cuts(layout):
        block_KN = remaining_KN[start:end]
        if start < layout.width - layout.outlier_channels:
            if layout.per_token:
                steps = best_group_scales(block_KN.t()[:, None], row_scale)[:, 0]
                grid = _Grid(steps * row_scale, 2 ** (bits - 1) - 1)
                scales.append(steps)
            else:
                grid = _best_grid(block_KN, importance[start:end], bits, clips, symmetric)
                scales.append(grid.scale)
                if grid.zero_point is not None:
                    zero_points.append(grid.zero_point)
        else:
            largest = 2 ** (OUTLIER_BITS - 1) - 1
            grid = _Grid((block_KN.abs().amax(0) / largest).clamp(min=TINY), largest)
        codes_KN[start:end], errors_KN = _round_block(block_KN, factor[start:end, start:end], grid)
        remaining_KN[end:] -= factor[start:end, end:].t() @ errors_KN
    groups, outliers = layout.split(codes_KN.t())
    if weight_only:
        zero_point = torch.stack(zero_points, 1) if zero_points else None
        return Rounded(grouped_codes(groups, torch.stack(scales, 1), zero_point), note)
    outlier_scale = grid.scale if layout.outlier_channels else weight.new_zeros(weight.shape[0])
    group_scale = torch.stack(scales, 1)
    if layout.per_token:
        two_level = two_level_codes(groups, group_scale, row_scale, outliers, outlier_scale)
        return Rounded(two_level, note)
    return Rounded(pack_codes(groups, group_scale, outliers, outlier_scale), note)


def fit_weight(weight: Tensor, hessian: Tensor, cross: Tensor) -> Tensor:
    """The weight (N, K) that makes of the quantized input what `weight` makes of the input.

    minimize  || W X - V X' ||^2 + ridge || W - V ||^2  over V

    hessian: X' X'^T, cross: X X'^T, both (K, K) over the same tokens, X the input and X' what it
    is quantized to. The ridge keeps few tokens from being overfitted. X is what the quantized
    layers before give: with that of the unquantized model, as in GPTAQ (arXiv 2504.02692), W4A4
    measured worse than without this step (KL 0.066 and 0.062, against 0.059 as it is here).
    """
    ridge = _RIDGE * hessian.diagonal().double().mean().clamp(min=TINY)
    damped, cross = hessian.double(), cross.double()
    damped.diagonal().add_(ridge)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed.item():
        return weight.float()
    # V = W (cross + ridge) / (hessian + ridge): what changes is small, and float32 is enough for W
    change = torch.cholesky_solve((cross - hessian).t().contiguous(), lower).t()
    return weight.float() + weight.float() @ change.float()


def _cuts(layout: GroupLayout) -> list[tuple[int, int]]:
    """Where groups begin and end among the channels; the outliers are the last one."""
    grouped = layout.width - layout.outlier_channels
    starts = range(0, grouped, layout.group_size)
    cuts = [(start, min(start + layout.group_size, grouped)) for start in starts]
    return [*cuts, (grouped, layout.width)] if layout.outlier_channels else cuts


def _error_factor(hessian: Tensor) -> tuple[Tensor, Tensor, str | None]:
    """The upper Cholesky factor (K, K) of the damped Hessian's inverse, its diagonal, a note.

    Damping grows until the factor exists; a channel that was never anything but zero cannot cause
    an error and gets an average diagonal.
    """
    hessian = hessian.double().clone()
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    mean = diagonal[~dead].mean() if not bool(dead.all()) else diagonal.new_ones(())
    diagonal[dead] = mean
    notes = [f"{int(dead.sum())} dead input channels"] if bool(dead.any()) else []
    damping = _DAMPING
    undamped = diagonal.clone()
    while True:
        hessian.diagonal().copy_(undamped + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed.item():
            inverse = torch.cholesky_inverse(lower)
            factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed.item() and bool(factor.isfinite().all()):
            break
        assert damping < _MOST_DAMPING, "a positive diagonal this heavy has a factor"
        damping *= 10
    if damping > _DAMPING:
        notes.append(f"ill-conditioned Hessian, damped by {damping:g}")
    return factor.float(), undamped.float(), "; ".join(notes) or None


def _best_grid(
    block_KN: Tensor, importance: Tensor, bits: int, clips: Sequence[float], symmetric: bool
) -> _Grid:
    """For each row the clip with the least squared error, channels weighted by `importance` (K,).

    The scale is rounded to bfloat16, as it is stored, before anything is rounded to it.
    """
    largest = 2 ** (bits - 1) - 1
    peak = block_KN.abs().amax(0)
    least = torch.full_like(peak, torch.inf)
    best = _Grid(torch.empty_like(peak), largest, None if symmetric else torch.zeros_like(peak))
    for clip in clips:
        if symmetric:
            scale = (peak * (clip / largest)).clamp(min=TINY).to(torch.bfloat16).float()
            grid = _Grid(scale, largest)
        else:
            scale, zero_point = affine_grid(block_KN, bits, clip, dim=0)
            grid = _Grid(scale, largest, zero_point)
        error = (grid.values(grid.round(block_KN)) - block_KN).square() * importance[:, None]
        better = error.sum(0) < least
        least = torch.minimum(error.sum(0), least)
        best.scale[better] = grid.scale[better]
        if best.zero_point is not None and grid.zero_point is not None:
            best.zero_point[better] = grid.zero_point[better]
    return best


def _round_block(block_KN: Tensor, factor: Tensor, grid: _Grid) -> tuple[Tensor, Tensor]:
    """Codes of a block, one channel after the other, and the errors that later blocks take over."""
    block_KN = block_KN.clone()
    codes_KN, errors_KN = torch.empty_like(block_KN), torch.empty_like(block_KN)
    for k in range(len(block_KN)):
        codes_KN[k] = grid.round(block_KN[k])
        errors_KN[k] = (block_KN[k] - grid.values(codes_KN[k])) / factor[k, k]
        block_KN[k + 1 :].addr_(factor[k, k + 1 :], errors_KN[k], alpha=-1)
    return codes_KN, errors_KN
