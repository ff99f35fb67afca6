"""The lessons' worked numbers."""

import pytest
import torch

import fastpool.functional as F


def image(rows):
    return torch.tensor(rows, dtype=torch.float32)[None, None]


FIRST = image([[1, 3, 2, 1], [4, 6, 5, 2], [0, 2, 1, 3], [1, 2, 4, 0]])
LARGER = image([[1, 3, 2, 1], [4, 6, 5, 2], [7, 2, 8, 1], [1, 3, 2, 0]])
RAMP = image([[1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6], [4, 5, 6, 7]])
FOURTH = image([[1, 3, 2, 4], [5, 6, 1, 2], [7, 2, 8, 3], [1, 4, 6, 9]])


@pytest.mark.parametrize(
    ("pool", "x", "expected"),
    [
        (F.max_pool2d, FIRST, [[6, 5], [2, 4]]),
        (F.avg_pool2d, FIRST, [[3.5, 2.5], [1.25, 2]]),
        (F.max_pool2d, LARGER, [[6, 5], [7, 8]]),
        (F.min_pool2d, image([[1, 4], [0, 2]]), [[0]]),
        (F.max_pool2d, FOURTH, [[6, 4], [7, 9]]),
        (F.l2_pool2d, image([[1, 1], [1, 1]]), [[2]]),
        (F.l2_pool2d, image([[3, 0], [0, 4]]), [[5]]),
    ],
)
def test_two_by_two(pool, x, expected):
    assert pool(x, 2)[0, 0].tolist() == expected


def test_global_and_corner():
    assert F.global_avg_pool2d(RAMP).item() == 4
    assert F.global_max_pool2d(RAMP).item() == 7
    assert F.avg_pool2d(FOURTH, 2)[0, 0, 0, 0].item() == 3.75


def test_shift_invariance():
    a, b = torch.zeros(2, 1, 1, 4, 4)
    a[0, 0, 0, 2 - 1] = a[0, 0, 1, 2] = 1
    b[0, 0, 1, 1] = b[0, 0, 0, 2] = 1
    assert F.max_pool2d(a, 2)[0, 0].tolist() == F.max_pool2d(b, 2)[0, 0].tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize(("kernel", "stride", "size", "fewer"), [(2, 2, 4, 75), (3, 2, 3, 85.9), (2, 1, 7, 23.4)])
def test_fewer_values(kernel, stride, size, fewer):
    y = F.max_pool2d(torch.rand(1, 1, 8, 8), kernel, stride)
    assert y.shape[2:] == (size, size)
    assert round(100 * (1 - y.numel() / 64), 1) == fewer


def test_shapes():
    x = torch.randn(2, 512, 7, 7)
    assert F.global_avg_pool2d(x).shape == (2, 512, 1, 1)
    assert F.global_avg_pool2d(x, keepdim=False).shape == F.global_avg_pool2d(x).flatten(1).shape == (2, 512)
    assert F.max_pool2d(torch.rand(1, 1, 28, 28), 2, 2).shape[-1] == 14


def test_ring():
    """A 6x6 ring of ones, border and centre zero: max keeps the ring whole, avg thins it."""
    ring = torch.zeros(1, 1, 6, 6)
    ring[..., 1:5, 1:5] = 1
    ring[..., 2:4, 2:4] = 0
    assert F.max_pool2d(ring, 2)[0, 0].tolist() == [[1, 1, 1], [1, 0, 1], [1, 1, 1]]
    assert F.avg_pool2d(ring, 2)[0, 0].tolist() == [[0.25, 0.5, 0.25], [0.5, 0, 0.5], [0.25, 0.5, 0.25]]


def test_stochastic_draws_an_element():
    a = image([[1.0, 2.0], [3.0, 4.0]])
    drawn = {F.stochastic_pool2d(a, 2).item() for _ in range(60)}
    assert drawn == {1, 2, 3, 4}
