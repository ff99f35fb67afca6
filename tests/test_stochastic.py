"""Stochastic pooling: who is drawn how often, what evaluation expects, and that a seed means one result everywhere."""

import math

import numpy as np
import pytest
import reference
import torch
from cases import GEOMETRIES, LAYOUTS
from fastpool.kernels.pool import KINDS
from fastpool.kernels.random import uniform
from scipy import stats

import fastpool.functional as F


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_in_proportion(layout, dtype):
    """Chi-square over 40,000 windows that hold the same nine elements, two of them not positive."""
    window = torch.tensor([[0.5, -1.0, 2.0], [0.0, 4.0, 1.0], [0.25, 3.0, 0.125]], dtype=dtype)
    x = LAYOUTS[layout](window.repeat(4, 25, 20, 20))
    y = F.stochastic_pool2d(x, 3, generator=torch.Generator().manual_seed(3))
    weights = window.clamp(min=0).flatten()
    positive = weights[weights > 0]
    counts = torch.stack([(y == v).sum() for v in positive])
    assert counts.sum() == y.numel()
    assert stats.chisquare(counts.numpy(), (positive / positive.sum() * y.numel()).numpy()).pvalue > 0.001


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["2x2s2", "3x3s2p1", "asymmetric-dilated", "9x9s1p4"])
def test_draws_are_philoxs_by_the_rule(name, layout):
    """Each output against the reference, with the draw computed for it on numpy scalars."""
    shape, w = GEOMETRIES[name]
    x = LAYOUTS[layout](torch.randn(shape, dtype=torch.float64)).requires_grad_()
    seed = int(torch.empty((), dtype=torch.int64).random_(generator=torch.Generator().manual_seed(9)))
    y = F.stochastic_pool2d(x, w.kernel_size, w.stride, w.padding, w.dilation, w.ceil_mode, generator=torch.Generator().manual_seed(9))
    n, c, height, width = y.shape
    with np.errstate(over="ignore"):
        u = [
            uniform(np.uint32(position), np.uint32(plane), np.uint32(seed & 0xFFFFFFFF), np.uint32(seed >> 32), np.float64(0))
            for plane in range(n * c)
            for position in range(height * width)
        ]
    truth, chosen = reference.pool(KINDS["stochastic"], x.detach(), w, extra=(torch.tensor(u).reshape(n, c, -1),))
    assert torch.equal(y, truth)
    y.sum().backward()
    picked = torch.zeros(shape, dtype=torch.float64).flatten(2)
    picked.scatter_add_(2, chosen.clamp(min=0).flatten(2), (chosen >= 0).double().flatten(2))
    assert torch.equal(x.grad.flatten(2), picked)


def test_mean_of_draws_is_what_evaluation_gives():
    x = torch.rand(1, 1, 4, 6).repeat(3000, 1, 1, 1)
    drawn = F.stochastic_pool2d(x, 2, generator=torch.Generator().manual_seed(1)).mean(0)
    expected = F.stochastic_pool2d(x[:1], 2, training=False)[0]
    assert (drawn - expected).abs().max() < 0.03


def test_evaluation_rule():
    x = torch.tensor([[[[1.0, -5.0, 0.0, -1.0], [3.0, 0.0, -2.0, -0.0]]]])
    assert F.stochastic_pool2d(x, 2, training=False).flatten().tolist() == [(1 + 9) / 4, 0]


@pytest.mark.parametrize("training", [True, False])
def test_nothing_positive_and_not_finite(training):
    x = torch.tensor([[[[-1.0, 0.0, math.nan, 1.0, math.inf, 1.0], [-2.0, -3.0, 2.0, 3.0, 2.0, 3.0]]]], requires_grad=True)
    y = F.stochastic_pool2d(x, 2, training=training)
    assert y[..., 0].item() == 0
    assert y[..., 1:].isnan().all()
    y.nansum().backward()
    assert x.grad[..., :2].eq(0).all()


@pytest.mark.parametrize("shape", [(3, 21, 37, 45), (2, 35, 5, 6), (2, 3, 20, 21), (1, 32, 9, 11), (1, 2096, 5, 6)], ids=str)
def test_a_seed_means_one_result(shape):
    """The same draws for any layout and number of threads, and from torch.manual_seed as from a generator."""
    x = torch.rand(shape)
    torch.manual_seed(11)
    first = F.stochastic_pool2d(x, 3, 2, 1)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for layout in LAYOUTS.values():
            torch.manual_seed(11)
            assert torch.equal(F.stochastic_pool2d(layout(x), 3, 2, 1), first)
    assert torch.equal(F.stochastic_pool2d(x, 3, 2, 1, generator=torch.Generator().manual_seed(11)), first)
    assert not torch.equal(F.stochastic_pool2d(x, 3, 2, 1), first)


def test_draws_differ_between_places():
    """Equal windows side by side, in rows, channels and images do not draw alike."""
    x = torch.tensor([1.0, 1.0, 1.0, 1.0]).reshape(1, 1, 2, 2).repeat(8, 8, 16, 16)
    x = x + torch.arange(4.0).reshape(2, 2).repeat(16, 16) * 1e-4
    y = F.stochastic_pool2d(x, 2)
    for other in (y.roll(1, 0), y.roll(1, 1), y.roll(1, 2), y.roll(1, 3)):
        assert 0.15 < (y == other).float().mean() < 0.35  # a quarter by chance


def test_gradient_goes_to_the_drawn_element():
    x = torch.rand(2, 3, 8, 10, requires_grad=True)
    y = F.stochastic_pool2d(x, 2)
    gy = torch.randn_like(y)
    y.backward(gy)
    blocks = x.grad.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    assert torch.equal(blocks.sum(-1), gy)
    assert ((blocks != 0).sum(-1) == 1).all()
    assert torch.equal((x.detach().unfold(2, 2, 2).unfold(3, 2, 2).flatten(4) * (blocks != 0)).sum(-1), y.detach())


def test_subnormal_windows_still_draw():
    x = torch.full((1, 1, 2, 64), 1e-45)
    assert (F.stochastic_pool2d(x, 2) == 1e-45).all()
