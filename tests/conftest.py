"""What every test gets: outputs born poisoned, kernels whatever the size, and torch's settings put back."""

import gc
import math
from contextlib import contextmanager

import pytest
import torch
from fastpool.kernels.cpu import blocking
from fastpool.kernels.cpu import convolution as nests
from torch._subclasses.fake_tensor import FakeTensor

from fastpool import backend, convolution, tiny

GUARD = 4096
"""Bytes behind a convolution's scratch memory that nobody may write."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """What earlier tests left, most of it what compiling made, is there to stay: to go through it again was a ninth of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Whatever fastpool allocates starts as NaN (or the largest integer): an element a kernel forgets shows."""
    plain = backend.empty

    def empty(x, shape, strides, dtype=None):
        found = plain(x, shape, strides, dtype)
        if torch.compiler.is_compiling() or isinstance(found, FakeTensor):
            return found
        torch.empty(0, dtype=torch.uint8, device=found.device).set_(found.untyped_storage()).fill_(0xFF)
        return found

    monkeypatch.setattr(backend, "empty", empty)


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    """So do a convolution's packed weights, sums and panels, behind which nothing may be written."""
    plain = convolution._elements

    @contextmanager
    def scratch(size):
        block = torch.full((size + GUARD,), 0xFF, dtype=torch.uint8)
        yield block.data_ptr()
        assert (block[size:] == 0xFF).all(), "written past the end of the panels"

    monkeypatch.setattr(convolution, "_elements", lambda like, count: plain(like, count).fill_(torch.nan))
    monkeypatch.setattr(convolution, "_Scratch", scratch)


@pytest.fixture(autouse=True)
def kernels():
    """fastpool's own, on the smallest maps too: a user's calls of these are torch's (tests/test_tiny.py)."""
    with tiny.kernels_only():
        yield


@pytest.fixture(autouse=True)
def settings():
    """One thread, a fixed seed; a test that wants others sets them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def forget():
    """What is known of convolutions by their shapes: with other registers, caches or tiles it is something else."""
    for known in (convolution.call, nests.forward, nests.input_gradient, nests.weight_gradient):
        known.cache_clear()


@pytest.fixture
def fresh():
    forget()
    yield forget
    forget()


@pytest.fixture
def small(monkeypatch, fresh):
    """A convolution's tiles are few, as each is another kernel, compiled in half a second; the nest is the model's, or "channels" or
    "pixels"; of a small cache there are several bands.  ``small(nest, l2)`` chooses, until the next call."""
    chosen = {}
    plain, plain_pixel = blocking.tile, blocking.pixel_tile

    def tile(width, rows, *more):
        cost = plain(width, rows, *more)[0]
        pixels = 4 if width >= 4 else 1
        return cost, blocking.Tile(2 if pixels == width and rows > 1 else 1, pixels, 1)

    def pixel_tile(width, rows, channels, *more):
        cost = plain_pixel(width, rows, channels, *more)[0]
        return {"channels": math.inf, "pixels": -1.0}.get(chosen["nest"], cost), blocking.PixelTile(4, 1)

    monkeypatch.setattr(blocking, "tile", tile)
    monkeypatch.setattr(blocking, "pixel_tile", pixel_tile)
    monkeypatch.setattr(blocking, "sum_tile", lambda length, *_: blocking.Tile(1, 3 if length >= 3 else 1, 1))
    monkeypatch.setattr(blocking, "l2_bytes", lambda: chosen["l2"])
    monkeypatch.setattr(blocking, "SEGMENT", 20)

    def choose(nest, l2):
        fresh()
        chosen.update(nest=nest, l2=l2)

    return choose
