"""What every test gets: outputs born poisoned, kernels whatever the size, and torch's settings put back."""

from contextlib import contextmanager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from fastpool import backend, convolution, tiny

GUARD = 4096
"""Bytes behind a convolution's scratch memory that nobody may write."""


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Whatever fastpool allocates starts as NaN (or the largest integer): an element a kernel forgets shows."""
    plain = backend.empty

    def empty(x, shape, strides, dtype=None):
        found = plain(x, shape, strides, dtype)
        if torch.compiler.is_compiling() or isinstance(found, FakeTensor):
            return found
        torch.empty(0, dtype=torch.uint8).set_(found.untyped_storage()).fill_(0xFF)
        return found

    monkeypatch.setattr(backend, "empty", empty)


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch):
    """So do a convolution's packed weights, sums and panels, behind which nothing may be written."""
    plain = convolution._elements

    @contextmanager
    def scratch(size, device):
        block = torch.full((size + GUARD,), 0xFF, dtype=torch.uint8)
        yield block.data_ptr()
        assert (block[size:] == 0xFF).all(), "written past the end of the panels"

    monkeypatch.setattr(convolution, "_elements", lambda like, count: plain(like, count).fill_(torch.nan))
    monkeypatch.setattr(convolution, "_scratch", scratch)


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
