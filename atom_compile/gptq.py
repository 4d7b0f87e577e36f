"""GPTQ, Atom's way: a weight is rounded group by group, later columns make up for earlier ones.

    minimize  || W X - Q X ||^2  over Q on the grid,  H = X X^T / tokens

Columns come in channel order, the outliers last, so that the errors of all groups flow into columns
of INT8. X is what the linear will really read: the *quantized* activation. Sources: GPTQ (arXiv
2210.17323), section 3; Atom (arXiv 2310.19102), section 4.

Shapes: N output rows, K input channels in order, G groups. Weights are held transposed, (K, N), as
every step works on one channel of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .kernels.formats import BLOCK_FORMATS, E2M1, FORMATS, FloatFormat, IntFormat
from .kernels.packing import (
    BLOCK_CLIPS,
    FLOAT_CLIPS,
    OUTLIER_BITS,
    TINY,
    AnyWeight,
    FloatWeight,
    GroupLayout,
    affine_grid,
    best_group_scales,
    best_scale,
    block_codes,
    four_bit_codes,
    grouped_codes,
    pack_codes,
    pack_float_codes,
    row_scales,
    to_bfloat16,
    two_level_codes,
    two_level_row_scale,
    with_row_scale,
    without_outliers,
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


class RoundedFloat(NamedTuple):
    """As `Rounded`, of a floating-point format."""

    packed: FloatWeight
    note: str | None


class _Grid(NamedTuple):
    """The values of a format less `zero_point` (N,), times `scale` (N,)."""

    scale: Tensor
    format: FloatFormat | IntFormat
    zero_point: Tensor | None = None

    def units_(self, x_KN: Tensor) -> Tensor:
        """The format's values nearest to x, which is overwritten."""
        x_KN.div_(self.scale)
        if self.zero_point is not None:
            x_KN.add_(self.zero_point)
        return self.format.nearest_(x_KN)

    def centered(self, units_KN: Tensor) -> Tensor:
        """What is left to multiply by the scale."""
        return units_KN if self.zero_point is None else units_KN - self.zero_point


def round_weight(
    weight: Tensor,
    hessian: Tensor,
    layout: GroupLayout,
    bits: int,
    clips: Sequence[float] = WEIGHT_CLIPS,
    weight_only: bool = False,
    symmetric: bool = True,
    format: str = "int",
    row_scale: Tensor | None = None,
) -> Rounded:
    """weight (N, K) in channel order, hessian (K, K) of its quantized input, in that order too.

    clips: the candidates of each group's clip; the best for the output is taken, row by row.
    weight_only, symmetric, format: the kind of weight that results, as in `PackedLinear`. One of a
    floating-point format has its own bits and clips. row_scale: what `row_scales` gives, if the
    rows are those of several weights.
    """
    if format in BLOCK_FORMATS:
        return _round_in_blocks(weight, hessian, layout, format, row_scale)
    if format != "int":
        rounded, note = round_float_weight(weight, hessian, layout, FORMATS[format])
        if layout.per_token:
            return Rounded(with_row_scale(rounded), note)
        return Rounded(without_outliers(rounded) if weight_only else four_bit_codes(rounded), note)
    integers = IntFormat(bits)
    factor, importance, note = _error_factor(hessian.float())
    if weight_only:
        zero_points: list[Tensor] = []

        def grid_of(block_KN: Tensor, importance: Tensor) -> _Grid:
            if symmetric:
                return _best_grid(block_KN, integers, clips, importance)
            scale, zero_point = _best_affine_grid(block_KN, integers, clips, importance)
            zero_points.append(zero_point)
            return _Grid(scale, integers, zero_point)

        codes, scale, *_ = _round_blocks(weight, factor, importance, layout, grid_of)
        zero_point = None if symmetric else torch.stack(zero_points, 1)
        return Rounded(grouped_codes(codes, scale, zero_point), note)
    if not layout.per_token:

        def best(block_KN: Tensor, importance: Tensor) -> _Grid:
            return _best_grid(block_KN, integers, clips, importance)

        return Rounded(pack_codes(*_round_blocks(weight, factor, importance, layout, best)), note)
    # later columns take in errors, but their rows' largest magnitudes hardly change
    row_scale = two_level_row_scale(layout.split(weight.float())[0])

    def multiple(block_KN: Tensor, importance: Tensor) -> _Grid:
        scale = best_group_scales(block_KN.t()[:, None], row_scale)[:, 0] * row_scale
        return _Grid(scale, integers)

    codes, scale, *outliers = _round_blocks(weight, factor, importance, layout, multiple)
    group_scale = (scale / row_scale[:, None]).round()
    return Rounded(two_level_codes(codes, group_scale, row_scale, *outliers), note)


def round_float_weight(
    weight: Tensor,
    hessian: Tensor,
    layout: GroupLayout,
    format: FloatFormat,
    clips: Sequence[float] = FLOAT_CLIPS,
) -> RoundedFloat:
    """As `round_weight`, to a floating-point format; layout.per_token: one scale per row."""
    factor, importance, note = _error_factor(hessian.float())
    row_grid = None
    if layout.per_token:
        grouped = layout.width - layout.outlier_channels
        row_grid = _best_grid(weight.float().t()[:grouped], format, clips, importance[:grouped])

    def grid(block_KN: Tensor, importance: Tensor) -> _Grid:
        return row_grid or _best_grid(block_KN, format, clips, importance)

    groups, scale, outliers, outlier_scale = _round_blocks(weight, factor, importance, layout, grid)
    codes, scale = format.round_to(groups), scale[:, :1] if layout.per_token else scale
    return RoundedFloat(pack_float_codes(codes, scale, outliers, outlier_scale, format), note)


def _round_in_blocks(
    weight: Tensor, hessian: Tensor, layout: GroupLayout, format: str, row_scale: Tensor | None
) -> Rounded:
    """A block's scale is rounded to its 8 bits before any of its channels are."""
    factor, importance, note = _error_factor(hessian.float())
    block, clips = BLOCK_FORMATS[format], BLOCK_CLIPS[format]
    if row_scale is None:
        row_scale = row_scales([weight], format)
    if row_scale is not None:  # rows do not depend on each other, nor does their unit matter
        weight = weight.float() / row_scale[:, None]

    def grid(block_KN: Tensor, importance: Tensor) -> _Grid:
        return _best_grid(block_KN, E2M1, clips, importance, block.scale.nearest)

    blocks = replace(layout, group_size=block.size)
    units, scale, *_ = _round_blocks(weight, factor, importance, blocks, grid)
    return Rounded(block_codes(E2M1.round_to(units), scale, row_scale, format), note)


def _round_blocks(
    weight: Tensor,
    factor: Tensor,
    importance: Tensor,
    layout: GroupLayout,
    grid_of: Callable[[Tensor, Tensor], _Grid],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weight in units of its scales, as `pack_codes` takes it.

    grid_of: of a group (channels, N), with the errors of earlier ones in it, and the importance
        of its channels.
    """
    remaining_KN = weight.float().t().contiguous()
    units_KN = torch.zeros_like(remaining_KN)
    outlier_scale = weight.new_zeros(weight.shape[0])
    scales = []
    for start, end in _cuts(layout):
        block_KN = remaining_KN[start:end]
        if start < layout.width - layout.outlier_channels:
            grid = grid_of(block_KN, importance[start:end])
            scales.append(grid.scale)
        else:
            format = IntFormat(OUTLIER_BITS)
            outlier_scale = (block_KN.abs().amax(0) * (1.0 / format.largest)).clamp(min=TINY)
            grid = _Grid(outlier_scale, format)
        units_KN[start:end], errors_KN = _round_block(block_KN, factor[start:end, start:end], grid)
        remaining_KN[end:] -= factor[start:end, end:].t() @ errors_KN
    groups, outliers = layout.split(units_KN.t())
    return groups, torch.stack(scales, 1), outliers, outlier_scale


def fit_weight(weight: Tensor, hessian: Tensor, cross: Tensor) -> Tensor:
    """The weight (N, K) that makes of the quantized input what `weight` makes of the input.

    minimize  || W X - V X' ||^2 + ridge || W - V ||^2  over V

    hessian: X' X'^T, cross: X X'^T, both (K, K) over the same tokens, X the input and X' what it
    is quantized to. The ridge keeps few tokens from being overfitted. X is what the quantized
    layers before give: with that of the unquantized model, as in GPTAQ (arXiv 2504.02692), W4A4
    measured worse than without this step (KL 0.066 and 0.062, against 0.059 as it is here).
    """
    ridge = _RIDGE * hessian.diagonal().double().mean().clamp(min=TINY)
    # V = W (cross + ridge) / (hessian + ridge), written as what it adds to W
    added = weight.double() @ (cross.double() - hessian)
    damped = hessian.to(torch.float64, copy=True)
    damped.diagonal().add_(ridge)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed.item():
        return weight.float()
    return weight.float() + torch.cholesky_solve(added.t(), lower).t().float()


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
    hessian = hessian.to(torch.float64, copy=True)
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
    block_KN: Tensor,
    format: FloatFormat | IntFormat,
    clips: Sequence[float],
    importance: Tensor,
    round_scale: Callable[[Tensor], Tensor] = to_bfloat16,
) -> _Grid:
    """For each row the clip with the least squared error, weighted by `importance` (K,)."""
    scale = best_scale(block_KN, format, clips, importance[:, None], 0, round_scale)
    return _Grid(scale[0], format)


def _best_affine_grid(
    block_KN: Tensor, format: IntFormat, clips: Sequence[float], importance: Tensor
) -> tuple[Tensor, Tensor]:
    """Scale and zero point (N,), as `_best_grid` but from the least weight to the largest."""
    grids = [affine_grid(block_KN, format.bits, clip, dim=0) for clip in clips]
    errors = []
    for scale, zero_point in grids:
        grid = _Grid(scale, format, zero_point)
        rounded = grid.centered(grid.units_(block_KN.clone())) * scale
        errors.append(((rounded - block_KN).square() * importance[:, None]).sum(0))
    best = torch.stack(errors).argmin(0, keepdim=True)
    scales, zero_points = (torch.stack(one).gather(0, best)[0] for one in zip(*grids, strict=True))
    return scales, zero_points


def _round_block(block_KN: Tensor, factor: Tensor, grid: _Grid) -> tuple[Tensor, Tensor]:
    """A block in units of the scale, channel by channel, and the errors that later blocks take.

    Written for few operators: on a GPU their launches, for each of the channels, are what it takes.
    """
    errors_KN = block_KN.clone()  # each row is a channel until it is rounded, then its error
    units_KN = torch.empty_like(block_KN)
    diagonal = factor.diagonal()
    shares = factor / diagonal[:, None]
    for k, (error, units) in enumerate(zip(errors_KN, units_KN, strict=True)):
        grid.units_(units.copy_(error))
        error.addcmul_(grid.centered(units), grid.scale, value=-1)
        errors_KN[k + 1 :].addr_(shares[k, k + 1 :], error, alpha=-1)
    return units_KN, errors_KN / diagonal[:, None]
