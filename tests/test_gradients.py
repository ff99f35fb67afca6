"""First and second derivatives in float64: gradcheck and gradgradcheck of every kind, windowed and global."""

import pytest
import reference
import torch
from cases import LAYOUTS, window
from fastpool.kernels.pool import KINDS
from torch.autograd import gradcheck, gradgradcheck

import fastpool.functional as F
from fastpool.backend import Pooling
from fastpool.functional import _pooled

WINDOWS = {
    "2x2s2": window((2, 2)),
    "3x3s2p1-ceil": window((3, 3), (2, 2), (1, 1), ceil_mode=True),
    "2x3s1-dilated": window((2, 3), (1, 1), (0, 1), (2, 1)),
    "4x4s1": window((4, 4), (1, 1), (2, 2)),
    "global": None,
}


def spread(shape):
    """Distinct values, none near zero or near another: no step of a numeric derivative changes a selection or a sign."""
    steps = torch.randperm(torch.Size(shape).numel()).double().reshape(shape)
    return (steps + 1) * torch.where(torch.rand(shape) < 0.3, -0.1, 0.1)


PLACES = [(kind, where) for kind in ("max", "l2", "stochastic_mean") for where in WINDOWS]
PLACES += [(name, where) for name, kind in KINDS.items() for where in ("3x3s2p1-ceil", "global") if WINDOWS[where] or kind.combine]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("kind", "where"), list(dict.fromkeys(PLACES)))
def test_derivatives(kind, where, layout):
    w = WINDOWS[where]
    x = LAYOUTS[layout](spread((2, 2, 5, 6))).detach().requires_grad_()
    op = Pooling("test", KINDS[kind], 2, w, reference.PARAMETERS.get(kind, ()))

    def pool(t):
        return _pooled(t, op, seed=5)

    assert gradcheck(pool, x)
    assert gradgradcheck(pool, x)


@pytest.mark.parametrize("pool", [F.l2_pool2d, lambda x, k: F.lp_pool2d(x, 3, k), lambda x, k: F.stochastic_pool2d(x, k, training=False)])
def test_second_derivative_of_an_all_zero_window_is_zero(pool):
    x = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    x[..., 2:] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    x.requires_grad_()
    (gx,) = torch.autograd.grad(pool(x, 2).sum(), x, create_graph=True)
    (ggx,) = torch.autograd.grad((gx * gx).sum(), x)
    assert torch.equal(gx[..., :2], torch.zeros(1, 1, 2, 2, dtype=torch.float64))
    assert torch.equal(ggx[..., :2], torch.zeros(1, 1, 2, 2, dtype=torch.float64))
    assert ggx.isfinite().all()


def test_gradient_penalty_follows_torch():
    """Double backward in use, float32: the gradient of a gradient's norm, through a convolution."""
    conv = torch.nn.Conv2d(3, 4, 3)
    x = torch.randn(2, 3, 12, 13)
    found = []
    for pool in (F.max_pool2d, torch.nn.functional.max_pool2d):
        t = x.clone().requires_grad_()
        (gx,) = torch.autograd.grad(pool(conv(t).relu(), 2).pow(2).sum(), t, create_graph=True)
        found.append(torch.autograd.grad(gx.norm(), conv.weight)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_second_derivative_through_what_follows(layout):
    """The gradient from above depends on x then: a part that must not be counted twice."""
    found = []
    for pool in (F.l2_pool2d, lambda x, k: torch.nn.functional.lp_pool2d(x, 2.0, k)):
        x = LAYOUTS[layout](torch.linspace(-1, 2, 96, dtype=torch.float64).view(2, 3, 4, 4)).detach().requires_grad_()
        (gx,) = torch.autograd.grad(pool(x, 2).tanh().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(gx.pow(2).sum(), x)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("pool", [F.max_pool2d, F.avg_pool2d, F.l2_pool2d])
def test_backward_is_deterministic(pool):
    torch.set_num_threads(2)
    x, gradients = torch.randn(2, 8, 60, 60), []
    for _ in range(5):
        t = x.clone().requires_grad_()
        y = pool(t, 3, 1, 1)
        y.backward(torch.linspace(-1, 1, y.numel()).reshape(y.shape))
        gradients.append(t.grad)
    assert all(torch.equal(gradients[0], g) for g in gradients)


@pytest.mark.parametrize("pool", [F.max_pool2d, F.min_pool2d, F.l2_pool2d, lambda x, k: F.lp_pool2d(x, float("inf"), k)])
def test_infinite_gradients_stay_where_they_belong(pool):
    """An inf or NaN from above reaches the elements that have a share in it, not the whole window."""
    x = torch.tensor([[[[1.0, 0.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0]]]], requires_grad=True)
    (gx,) = torch.autograd.grad(pool(x, 2), x, torch.tensor([[[[torch.inf, 1.0]]]]))
    assert gx[..., 2:].isfinite().all()
    assert not gx[..., :2].isnan().any() or pool is F.l2_pool2d  # inf * 0: torch's norm gives NaN there too


@pytest.mark.parametrize("kernel_size", [2, 17])
def test_second_derivative_of_a_window_that_chose_nothing(kernel_size):
    """Stochastic pooling of negative values: no gradient, to any order; its tap is saved as the largest number of its dtype."""
    x = torch.rand(1, 1, 2 * kernel_size, 2 * kernel_size, dtype=torch.float64) + 1
    x[..., :kernel_size, :kernel_size] *= -1
    x.requires_grad_()
    y = F.stochastic_pool2d(x, kernel_size)
    gy = torch.rand_like(y).requires_grad_()
    (gx,) = torch.autograd.grad(y, x, gy, create_graph=True)
    (ggy,) = torch.autograd.grad(gx.sum(), gy)
    assert ggy.flatten().tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pool", [F.max_pool2d, F.l2_pool2d, lambda x, k: F.stochastic_pool2d(x, k, training=False)])
def test_saved_tensors_may_move(pool, layout):
    """Hooks that store what is saved elsewhere, and so with other strides."""
    x = torch.randn(4, 3, 8, 10)
    found = []
    for move in (lambda t: t, lambda t: t.contiguous().clone()):
        leaf = LAYOUTS[layout](x).detach().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(move, lambda t: t):
            y = pool(leaf, 2)
        found.append(torch.autograd.grad(y, leaf, torch.ones_like(y))[0])
    assert torch.equal(*found)


def test_gradient_of_any_memory_format():
    """An upstream gradient that is expanded, or in the other memory format."""
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    y = F.max_pool2d(x, 2)
    (expanded,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (ones,) = torch.autograd.grad(y, x, torch.ones_like(y).to(memory_format=torch.channels_last))
    assert torch.equal(expanded, ones)
