"""Which channels are outliers, and who gets the INT8 groups."""

from __future__ import annotations

import pytest
import torch

from atom_compile import Scheme
from atom_compile.kernels.packing import GroupLayout
from atom_compile.precision import Noise, allocate, counts_to_try, fake_quantize


def noise_of(x: torch.Tensor, weight: torch.Tensor, counts: tuple[int, ...] = ()) -> Noise:
    scheme = Scheme(group_size=64, outlier_channels=32)
    layout = scheme.layout(x.shape[1])
    noise = Noise(layout, scheme, x.square().mean(0), weight.square().sum(0), ("w",), counts)
    noise.add(x)
    noise.add_output(x @ weight.t())
    return noise


def test_measured_noise_is_that_of_the_output() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1000, 256), torch.randn(300, 256)
    noise = noise_of(x, weight)
    error, order = noise.best(0)
    assert torch.equal(order.sort().values, torch.arange(256))
    rounded = fake_quantize(x[:, order], noise.scheme, noise.layout, 0.85, 0)
    wrong = (rounded - x[:, order]) @ weight[:, order].t()
    assert error == pytest.approx(
        float(wrong.square().sum() / (x @ weight.t()).square().sum()), rel=0.1
    )


def test_outliers_are_found_by_size_or_by_importance() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(500, 256), torch.randn(64, 256)
    large = x.clone()
    large[:, :8] *= 60
    shrunk = weight.clone()
    shrunk[:, :8] /= 60
    assert set(range(8)) <= set(noise_of(large, shrunk).best(0)[1][-32:].tolist())
    important = weight.clone()
    important[:, :32] *= 20
    assert set(range(32)) == set(noise_of(x, important).best(0)[1][-32:].tolist())


def test_more_int8_groups_mean_less_noise() -> None:
    torch.manual_seed(0)
    curve = noise_of(torch.randn(500, 256), torch.randn(64, 256), (0, 1, 2, 4)).curve
    assert curve[0] > curve[1] > curve[2] > 20 * curve[4]


def test_the_budget_goes_where_the_noise_is() -> None:
    layouts = [GroupLayout(640 + 128, 128, 128)] * 3
    curves = [{0: 1.0, 1: 0.9, 2: 0.8, 5: 0.0}, {0: 4.0, 1: 2.0, 2: 1.0, 5: 0.0}, {0: 0.1, 5: 0.0}]
    assert allocate(curves, layouts, 0.0, None) == [0, 0, 0]
    assert allocate(curves, layouts, 0.3, None) == [0, 2, 0]  # 5 of 18 blocks, 3 of them outliers
    assert allocate(curves, layouts, 1.0, None) == [5, 5, 5]
    assert allocate(curves, layouts, 0.0, 0.95) == [1, 5, 0]


def test_counts_reach_from_none_to_all() -> None:
    assert counts_to_try(GroupLayout(768, 128, 128)) == (0, 1, 2, 3, 4, 5)
    counts = counts_to_try(GroupLayout(14336, 128, 128))
    assert counts[0] == 0 and counts[-1] == 111 and len(counts) == 9
