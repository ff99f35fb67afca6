"""CUDA kernels of unpooling: elements to the flat positions their indices name, and back; a thread an element of the smaller maps."""

import functools

import numba
from numba import int64, types, uint32

from .compile import specialised
from .number import divisor_of, quotient_of
from .pooling import MOST, THREADS, Plan
from .windows import thread


def _types(itemsize):
    return types.CPointer(getattr(numba, f"uint{8 * itemsize}")), types.CPointer(int64)


@specialised
def scatter(itemsize, last):
    """Arguments: y, which begins as zeros, x, indices, wrong (one int64); elements of x; C and elements of a map of x as divisors; elements
    of a map of y.  All tensors are dense.

    An index outside the map is left out, and written to ``wrong``; of elements with the same one, any stays.
    """

    def kernel(y, x, indices, wrong, total, C, mC, sC, length, m_length, s_length, size):
        t = thread()
        if t < total:
            at = indices[t]
            if at >= int64(0) and at < int64(size):
                if last:
                    rest, c = quotient_of(t, C, mC, sC)
                    n, _ = quotient_of(rest, length, m_length, s_length)
                    y[uint32(uint32(uint32(uint32(n * size) + uint32(at)) * C) + c)] = x[t]
                else:
                    plane, _ = quotient_of(t, length, m_length, s_length)
                    y[uint32(uint32(plane * size) + uint32(at))] = x[t]
            else:
                wrong[0] = at

    own, position = _types(itemsize)
    return kernel, (own, own, position, position, *(uint32,) * 8)


@specialised
def gather(itemsize, last):
    """The gradient, and its own inverse.  Arguments: gx, gy, indices, all of them inside; then as ``scatter``, gx being the smaller one."""

    def kernel(gx, gy, indices, total, C, mC, sC, length, m_length, s_length, size):
        t = thread()
        if t < total:
            at = uint32(indices[t])
            if last:
                rest, c = quotient_of(t, C, mC, sC)
                n, _ = quotient_of(rest, length, m_length, s_length)
                gx[t] = gy[uint32(uint32(uint32(uint32(n * size) + at) * C) + c)]
            else:
                plane, _ = quotient_of(t, length, m_length, s_length)
                gx[t] = gy[uint32(uint32(plane * size) + at)]

    own, position = _types(itemsize)
    return kernel, (own, own, position, *(uint32,) * 8)


class Device:
    """The plans of one device."""

    def __init__(self, index):
        self.index = index
        self.scatter_plan, self.gather_plan = map(functools.lru_cache(maxsize=1024), (self._scatter, self._gather))

    def _plan(self, kernel, itemsizes, larger, planes, length, size):
        """``larger``: which address is that of the larger maps."""
        n, C = planes
        most = MOST // (C * max(length, size))
        if n and most == 0:
            raise NotImplementedError(f"one image of {C} maps of {size} has more than {MOST} elements: no CUDA kernel counts so far")
        launches = []
        for first in range(0, n, most):
            total = min(most, n - first) * C * length
            steps = [first * C * (size if i == larger else length) for i in range(3)] + [0] * (len(itemsizes) - 3)
            numbers = [total, *divisor_of(C), *divisor_of(length), size]
            launches.append((-(-total // THREADS), THREADS, tuple(steps), numbers))
        return Plan(self.index, kernel, launches, itemsizes)

    def _scatter(self, itemsize, last, planes, length, size):
        """Arguments of ``run``: y, x, indices, wrong."""
        return self._plan(scatter(itemsize, last), (itemsize, itemsize, 8, 8), 0, planes, length, size)

    def _gather(self, itemsize, last, planes, length, size):
        """Arguments of ``run``: gx, gy, indices."""
        return self._plan(gather(itemsize, last), (itemsize, itemsize, 8), 1, planes, length, size)


on = functools.cache(Device)
