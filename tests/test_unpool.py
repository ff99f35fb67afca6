"""max_unpool1d .. 3d against torch's: values, gradients, sizes, errors."""

import re

import pytest
import torch
import torch.nn.functional as T
from cases import LAYOUTS
from torch.autograd import gradcheck, gradgradcheck

import fastpool.functional as F

SHAPES = {1: (2, 5, 24), 2: (2, 5, 8, 18), 3: (2, 3, 4, 6, 10)}
RANKS = pytest.mark.parametrize("rank", SHAPES)


def both(rank):
    return getattr(F, f"max_unpool{rank}d"), getattr(T, f"max_unpool{rank}d")


def pooled(rank, x, *arguments):
    return getattr(T, f"max_pool{rank}d")(x, *arguments, return_indices=True)


@RANKS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arguments", [(2,), (2, 2, 1)], ids=str)
def test_round_trip_is_torchs(rank, layout, arguments):
    ours, theirs = both(rank)
    y, index = pooled(rank, torch.randn(SHAPES[rank]), *arguments)
    a, b = LAYOUTS[layout](y).detach().requires_grad_(), y.detach().requires_grad_()
    for indices in (index, LAYOUTS[layout](index)):
        found, expected = ours(a, indices, *arguments), theirs(b, index, *arguments)
        assert torch.equal(found, expected)
        gy = torch.randn_like(expected)
        (ga,), (gb,) = torch.autograd.grad(found, a, gy), torch.autograd.grad(expected, b, gy)
        assert torch.equal(ga, gb)
    assert torch.equal(ours(a[1], index[1], *arguments), expected[1])
    last = layout == "channels_last"
    assert (found.movedim(1, -1) if last else found).is_contiguous() or "sliced" in layout


@RANKS
def test_derivatives(rank):
    """Windows that overlap: elements share a position, of which the last stays."""
    x = torch.rand(1, 2, *(5, 4, 5)[:rank], dtype=torch.float64)
    y, index = pooled(rank, x, 2, 1)
    index = index.clone()
    distinct = torch.arange(index[0, 0].numel()).reshape(index[0, 0].shape).expand_as(index)
    assert gradcheck(lambda t: both(rank)[0](t, distinct, 2, 1), y.requires_grad_())
    assert gradgradcheck(lambda t: both(rank)[0](t, distinct, 2, 1), y)


@RANKS
def test_of_equal_indices_the_last_stays(rank):
    shape = (1, 1, *[2] * rank)
    x, index = torch.arange(1.0, 1 + 2**rank).reshape(shape), torch.full(shape, 3)
    x.requires_grad_()
    ours, theirs = (f(x, index, 2) for f in both(rank))
    assert torch.equal(ours, theirs)
    assert ours.flatten()[3] == 2**rank
    gy = torch.randn_like(ours)
    assert torch.equal(*(torch.autograd.grad(y, x, gy)[0] for y in (ours, theirs)))
    gy.requires_grad_()
    second = []
    for f in both(rank):
        (gx,) = torch.autograd.grad(f(x, index, 2), x, gy, create_graph=True)
        second.append(torch.autograd.grad(gx.sum(), gy)[0])
    assert torch.equal(second[0].flatten()[3], torch.tensor(2.0**rank))


@RANKS
def test_output_size(rank):
    """Any size less than a stride from the default, with or without N and C."""
    ours, theirs = both(rank)
    for size in (8, 9):
        sizes = [size] * rank
        y, index = pooled(rank, torch.randn(2, 3, *sizes), 2)
        for asked in (sizes, [2, 3, *sizes], torch.Size(sizes)):
            assert torch.equal(ours(y, index, 2, output_size=asked), theirs(y, index, 2, output_size=asked))
        if size == 8:
            assert torch.equal(ours(y, index, 2, None, 0), theirs(y, index, 2, None, 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int32], ids=str)
def test_dtypes(dtype):
    x = torch.randint(-9, 9, (2, 3, 4, 6)).to(dtype)
    index = torch.arange(24).reshape(4, 6).expand_as(x) * 4 + 1
    expected = torch.zeros(2, 3, 8 * 12, dtype=dtype).scatter(2, index.flatten(2), x.flatten(2)).reshape(2, 3, 8, 12)
    assert torch.equal(F.max_unpool2d(x, index, 2), expected)


def test_empty_batch():
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    y = F.max_unpool2d(x, torch.zeros(0, 3, 4, 4, dtype=torch.int64), 2)
    assert y.shape == (0, 3, 8, 8)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def refusal(function, *args, **kwargs):
    with pytest.raises(Exception) as caught:
        function(*args, **kwargs)
    return caught.value


X, INDEX = torch.ones(1, 2, 3, 3), torch.arange(9).reshape(1, 1, 3, 3).expand(1, 2, 3, 3)
REFUSED = {
    "index too large": ((X, INDEX + 30, 2), {}, "is outside the output of (6, 6), which has 36 elements"),
    "index negative": ((X, INDEX - 1, 2), {}, "index -1 is outside"),
    "index int32": ((X, INDEX.int(), 2), {}, "indices must be int64, got int32"),
    "shapes differ": ((X, INDEX[..., :2], 2), {}, "indices must have the input's shape (1, 2, 3, 3), got (1, 2, 3, 2)"),
    "2-d": ((X[0, 0], INDEX[0, 0], 2), {}, "expected a (C, H, W) or (N, C, H, W) input, got 2 dimensions"),
    "size too large": ((X, INDEX, 2), {"output_size": (8, 8)}, "output_size (8, 8) is not between (5, 5) and (7, 7)"),
    "size too small": ((X, INDEX, 2), {"output_size": (6, 4)}, "output_size (6, 4) is not between"),
    "size of three": ((X, INDEX, 2), {"output_size": (1, 6, 6)}, "output_size must have 2 or 4 elements, got 3"),
}


@pytest.mark.parametrize(("args", "kwargs", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals_are_torchs(args, kwargs, words):
    error = refusal(T.max_unpool2d, *args, **kwargs)
    with pytest.raises(type(error), match=rf"^max_unpool2d: .*{re.escape(words)}"):
        F.max_unpool2d(*args, **kwargs)


def test_kernels_are_deterministic_on_threads():
    torch.set_num_threads(2)
    y, index = pooled(2, torch.randn(4, 16, 60, 60), 3, 1)
    for layout in ("contiguous", "channels_last"):
        assert torch.equal(F.max_unpool2d(LAYOUTS[layout](y), LAYOUTS[layout](index), 3, 1), T.max_unpool2d(y, index, 3, 1))
