"""Random geometry against torch for a minute; FASTPOOL_STRESS_SECONDS for longer, FASTPOOL_STRESS_SEED for other ones."""

import os
import random
from time import perf_counter

import pytest
import torch
import torch.nn.functional as T
from cases import LAYOUTS, adversarial

import fastpool.functional as F

SECONDS, SEED = float(os.environ.get("FASTPOOL_STRESS_SECONDS", 60)), int(os.environ.get("FASTPOOL_STRESS_SEED", 0))


def drawn(r):
    """Arguments of a pooling, and a shape it may or may not fit; windows by the nests that serve them, so that few have to be compiled."""
    rank = r.choice([1, 2, 2, 2, 3])
    kernel = [r.choice([1, 2, 3, 3, r.choice([5, 9, 20])]) for _ in range(rank)]
    stride = [r.choice([1, 1, 2, 2, r.choice([3, 5, 7])]) for _ in range(rank)]
    dilation = [r.choice([1, 1, 1, 2]) for _ in range(rank)] if r.random() < 0.3 else [1] * rank
    padding = [r.randint(0, k // 2) for k in kernel]
    largest = {1: 500, 2: 60, 3: 20}[rank]
    sizes = [r.choice([1, 2, 3, r.randint(1, largest), r.randint(1, largest)]) for _ in range(rank)]
    if r.random() < 0.1:
        sizes[-1] = r.randint(1, 3000)
    shape = r.choice([0, 1, 2, 3]), r.choice([1, 2, 5, 17, 40]), *sizes
    return rank, tuple(shape), (tuple(kernel), tuple(stride), tuple(padding)), tuple(dilation), r.random() < 0.3


def one(r):
    """Whether there was something to compare."""
    rank, shape, arguments, dilation, ceil = drawn(r)
    kind = r.choice(["max", "avg"])
    name = r.choice(list(LAYOUTS))
    what = kind, shape, arguments, dilation, ceil, name
    if kind == "max":
        arguments = *arguments, dilation
    x = LAYOUTS[name](adversarial(shape, torch.float32, special=kind == "max"))
    a, b = x.detach().requires_grad_(), x.detach().contiguous().requires_grad_()
    theirs, ours = (getattr(library, f"{kind}_pool{rank}d") for library in (T, F))
    try:
        expected = theirs(b, *arguments, ceil_mode=ceil)
    except RuntimeError:
        if rank == 3:  # torch compares a window with the input as if there were no padding
            return False
        with pytest.raises(RuntimeError):
            ours(a, *arguments, ceil_mode=ceil)
        return False
    torch.set_num_threads(r.choice([1, 2]))
    with torch.no_grad():
        quiet = ours(x, *arguments, ceil_mode=ceil)
    y = ours(a, *arguments, ceil_mode=ceil)
    assert torch.equal(quiet.nan_to_num(77), y.nan_to_num(77)), what
    tolerance = {"rtol": 0, "atol": 0} if kind == "max" else {}
    torch.testing.assert_close(y, expected, equal_nan=True, check_stride=False, msg=lambda m: f"{what}: {m}", **tolerance)
    if kind == "avg" or max(dilation) == 1:  # torch sends the gradient of windows of nothing but padding anywhere
        gy = torch.randint(-4, 5, y.shape).float()
        y.backward(gy)
        expected.backward(gy)
        torch.testing.assert_close(a.grad, b.grad, check_stride=False, msg=lambda m: f"{what}: gradient: {m}", **tolerance)
    return True


def test_random_geometry():
    r, compared, end = random.Random(SEED), 0, perf_counter() + SECONDS
    torch.manual_seed(SEED)
    while perf_counter() < end:
        compared += one(r)
    assert compared > SECONDS / 10
