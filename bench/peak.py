"""How many float32 operations a second the cores can do at most: the other limit of a kernel, beside the copy's."""

from __future__ import annotations

import functools
from time import perf_counter
from typing import NamedTuple

import torch

TRIES = 5
"""Of which the best counts: other work only takes from a peak."""

SIDE = 1024
"""Of the square matrices whose product stands in."""


class Peak(NamedTuple):
    gflop_s: float
    by: str
    """'fma': a kernel that stays in the registers; 'sgemm': PyTorch's matrix product, which loads and stores besides."""


@functools.cache
def peak(threads: int) -> Peak:
    """Measured once in a process; PyTorch's number of threads must be this one already."""
    try:
        from fastpool.kernels.cpu import peak as registers
    except ImportError:
        return Peak(max(_sgemm() for _ in range(4 * TRIES)), "sgemm")
    return Peak(max(registers.gflops(threads) for _ in range(TRIES)), "fma")


def _sgemm() -> float:
    a = torch.ones(SIDE, SIDE)
    product = torch.empty_like(a)
    start = perf_counter()
    torch.mm(a, a, out=product)
    return 2 * SIDE**3 / (perf_counter() - start) / 1e9
