"""Maps so small that a call is all that they cost: which operator of torch does the same, and up to where it is quicker.

No kernel behind Python keeps up there.  Of 1x8x8x8 on one thread torch's max_pool2d takes 2.4 us, and 3.1 where a gradient will be asked
for, its avg_pool2d 1.6 and 2.2; calls of kernels 4.8 and 9.7, 4.8 and 8.1; a torch.autograd.Function that computes nothing 2.5.  By
torch's operators fastpool's take 3.3 and 4.0, 2.8 and 3.4.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as T

from .window import LARGEST, Adaptive, Window

MOST = 1024
"""Reads of elements up to which torch's operator is called; -1: never.

Without a gradient max 2x2 s2 is as quick either way at 1250 elements, avg at 1900, global max at 4100; with one at 4600, 4000 and 12000;
global avg is quicker by torch there still.  float32, one thread; float64 is the same.
"""

THREADS = 2
"""With more of them fastpool's kernels run: torch's operators wake every thread of torch's, however few the elements."""

DTYPES = (torch.float32, torch.float64)
"""In which torch computes as fastpool does."""


def _after_fork() -> None:
    global MOST
    MOST = -1


# torch's operators would wait for OpenMP's threads, which do not survive a fork.
os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def kernels_only() -> Iterator[None]:
    """fastpool's kernels on tiny maps too: for whoever compiles or tests them."""
    global MOST
    before, MOST = MOST, -1
    try:
        yield
    finally:
        MOST = before


def are_torchs() -> bool:
    """Whether torch's operators may take what they are quicker at: not in ``kernels_only``, nor in a forked child."""
    return MOST >= 0


@dataclass(frozen=True)
class Equal:
    """torch's operator that equals a pooling over contiguous maps, of DTYPES, on the CPU."""

    run: Callable[[torch.Tensor], torch.Tensor]
    """Raises RuntimeError or IndexError for what torch refuses, which fastpool may take."""
    reads: int
    """How often an element is read, about."""


_WINDOWS: dict[tuple[str, int], Callable[..., torch.Tensor]] = {
    ("max", 1): torch.max_pool1d,
    ("max", 2): torch.max_pool2d,
    ("max", 3): torch.max_pool3d,
    ("avg", 1): T.avg_pool1d,
    ("avg", 2): T.avg_pool2d,
    ("avg", 3): T.avg_pool3d,
}
"""(kind, axes) -> the operator: torch.max_pool2d is 0.4 us less than torch.nn.functional's, which is Python."""

_ADAPTIVE: dict[tuple[str, int], Callable[..., Any]] = {
    ("max", 1): torch.adaptive_max_pool1d,
    ("max", 2): torch._C._nn.adaptive_max_pool2d,
    ("max", 3): torch._C._nn.adaptive_max_pool3d,
    ("avg", 1): T.adaptive_avg_pool1d,
    ("avg", 2): torch._C._nn.adaptive_avg_pool2d,
    ("avg", 3): torch._C._nn.adaptive_avg_pool3d,
}
"""The same for adaptive pooling, of which the whole map is one; what torch.nn.functional's call, 0.7 us less.  max returns indices too."""


def equal(kind: str, rank: int, window: Window | Adaptive | None, include_pad: bool, divisor: int | None) -> Equal | None:
    """torch's operator for a pooling, its arguments bound; None: there is none, or it differs somewhere."""
    if (kind, rank) not in _WINDOWS:
        return None
    if isinstance(window, Window):
        return _over_windows(kind, window, include_pad, divisor)
    outputs = (1,) * rank if window is None else window.outputs
    if None in outputs or 0 in outputs:
        return None
    pool, sizes = _ADAPTIVE[kind, rank], _short(outputs)
    reads = math.prod(n for n in outputs if n)  # at most: an output is made of the whole map, or of less
    if kind == "max":
        return Equal(lambda x: pool(x, sizes)[0], reads)

    def average(x: torch.Tensor) -> torch.Tensor:
        # Of whole maps torch makes a mean, whatever the number of axes before them.
        if x.dim() - rank not in (1, 2):
            raise IndexError
        return pool(x, sizes)

    return Equal(average, reads)


def _over_windows(kind: str, window: Window, include_pad: bool, divisor: int | None) -> Equal | None:
    # Dilated windows may hold nothing but padding: torch gives the gradient of these to some element.
    if set(window.dilation) != {1} or window.taps > LARGEST:
        return None
    pool, ceil_mode = _WINDOWS[kind, window.rank], window.ceil_mode
    size, stride, padding = (_short(values) for values in (window.kernel_size, window.stride, window.padding))
    reads = max(1, window.taps // math.prod(window.stride))
    if kind == "max":
        return Equal(lambda x: pool(x, size, stride, padding, 1, ceil_mode), reads)
    if window.rank == 1:
        return Equal(lambda x: pool(x, size, stride, padding, ceil_mode, include_pad), reads)
    return Equal(lambda x: pool(x, size, stride, padding, ceil_mode, include_pad, divisor), reads)


def _short(values: tuple[int | None, ...]) -> Any:
    """One int for several equal ones: torch reads a tuple in 0.2 us."""
    return values[0] if len(set(values)) == 1 else values
