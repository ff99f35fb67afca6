"""Unpooling: elements to the flat positions their indices name, and back."""

import functools

import numba
from numba import int64

from ..compile import specialised
from ..simd import pointer
from .pooling import SERIAL_BYTES, Plan


@specialised
def scatter(dtype, channels_last):
    """Jobs: planes (n, c) or, in channels_last, images; all tensors are dense, y begins as zeros.

    Arguments: y, x, indices, wrong (one int64); C; elements of a map of x, and of y.  The last element of a map with an index stays.
    An index outside the map is left out, and written to ``wrong``.
    """

    def kernel(args, start, stop):
        y, x, indices, wrong = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, int64), pointer(args, 3, int64)
        C, length, size = args[4], args[5], args[6]
        inner = C if channels_last else 1
        for job in range(start, stop):
            source, target = job * length * inner, job * size * inner
            for k in range(length):
                for c in range(inner):
                    at = indices[source + k * inner + c]
                    if 0 <= at < size:
                        y[target + at * inner + c] = x[source + k * inner + c]
                    else:
                        wrong[0] = at

    return kernel


@specialised
def gather(dtype, channels_last):
    """The gradient, and its own inverse.  Jobs, layouts: as ``scatter``.  Arguments: gx, gy, indices; C; elements of a map of gx, and
    of gy.  All indices are inside."""

    def kernel(args, start, stop):
        gx, gy, indices = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, int64)
        C, length, size = args[3], args[4], args[5]
        inner = C if channels_last else 1
        for job in range(start, stop):
            target, source = job * length * inner, job * size * inner
            for k in range(length):
                for c in range(inner):
                    at = indices[target + k * inner + c]
                    gx[target + k * inner + c] = gy[source + at * inner + c]

    return kernel


def _plan(kernel, itemsize, channels_last, planes, length, size):
    """``planes``: (N, C); only the size of an element matters, not what it means."""
    n, channels = planes
    worker = kernel(getattr(numba, f"int{8 * itemsize}"), channels_last)
    parallel = n * channels * (length * (itemsize + 8) + size * itemsize) >= SERIAL_BYTES
    return Plan(worker, n if channels_last else n * channels, (channels, length, size), parallel)


scatter_plan = functools.lru_cache(maxsize=1024)(functools.partial(_plan, scatter))
"""(itemsize, channels_last, (N, C), elements of a small map, of a large one); arguments of ``run``: y, x, indices, wrong."""
gather_plan = functools.lru_cache(maxsize=1024)(functools.partial(_plan, gather))
"""The same; arguments of ``run``: gx, gy, indices."""
