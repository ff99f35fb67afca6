"""Loop nests of an activation by itself, of its gradient, and of zeros, over elements that follow each other.  A job is a block of them."""

import functools

from ..compile import specialised
from ..launch import bits
from ..simd import between, integers, load, load_masked, native_lanes, number, numbers, pointer, splat, store, store_masked
from .geometry import itemsize, stored_dtype
from .number import compiled
from .pooling import SERIAL_BYTES, Plan

BLOCK = 1 << 13
"""Elements of a job: 64 KiB of two float32 arrays, which L2 holds several times."""


@specialised
def value(activation, dtype, lanes):
    """Arguments: x, y; their elements; the activation's parameters."""
    f, P, L, real = compiled(activation.value), len(activation.defaults), lanes, number(dtype)

    def kernel(args, start, stop):
        x, y = pointer(args, 0, dtype), pointer(args, 1, dtype)
        (count,) = integers(args, 2, 1)
        p, end = numbers(args, 3, P, real, L), min(count, stop * BLOCK)
        whole = start * BLOCK + (end - start * BLOCK) // L * L
        for at in range(start * BLOCK, whole, L):
            store(y, at, f(load(x, at, L), p))
        if whole < end:
            inside = between(whole, 1, 0, end, L)
            store_masked(y, whole, f(load_masked(x, whole, inside, splat(real(0), L)), p), inside)

    return kernel


@specialised
def gradient(activation, dtype, lanes, by_result):
    """Arguments: gx, gy, x or, ``by_result``, y; their elements; the activation's parameters."""
    slope, P, L, real = compiled(activation.slope if by_result else activation.derivative), len(activation.defaults), lanes, number(dtype)

    def kernel(args, start, stop):
        gx, gy, x = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype)
        (count,) = integers(args, 3, 1)
        p, end = numbers(args, 4, P, real, L), min(count, stop * BLOCK)
        whole = start * BLOCK + (end - start * BLOCK) // L * L
        for at in range(start * BLOCK, whole, L):
            store(gx, at, load(gy, at, L) * slope(load(x, at, L), p))
        if whole < end:
            inside, zero = between(whole, 1, 0, end, L), splat(real(0), L)
            store_masked(gx, whole, load_masked(gy, whole, inside, zero) * slope(load_masked(x, whole, inside, zero), p), inside)

    return kernel


@specialised
def zero(dtype, lanes):
    """Arguments: y; its elements."""
    L, real = lanes, number(dtype)

    def kernel(args, start, stop):
        y = pointer(args, 0, dtype)
        (count,) = integers(args, 1, 1)
        for at in range(start * BLOCK, min(count, stop * BLOCK), L):
            store_masked(y, at, splat(real(0), L), between(at, 1, 0, count, L))

    return kernel


def _plan(nest, dtype, elements, *constants):
    return Plan(nest(*constants), -(-elements // BLOCK), (elements,), elements * itemsize(dtype) >= SERIAL_BYTES)


@functools.lru_cache(maxsize=1024)
def forward(activation, dtype, elements):
    """Arguments of ``run``: x, y; then the parameters."""
    dtype = stored_dtype(dtype)
    return _plan(value, dtype, elements, activation, dtype, native_lanes(dtype))


@functools.lru_cache(maxsize=1024)
def backward(activation, dtype, elements, by_result):
    """Arguments of ``run``: gx, gy, and x or y; then the parameters."""
    dtype = stored_dtype(dtype)
    return _plan(gradient, dtype, elements, activation, dtype, native_lanes(dtype), by_result)


@functools.lru_cache(maxsize=1024)
def zeros(dtype, elements):
    """Argument of ``run``: y."""
    dtype = stored_dtype(dtype)
    return _plan(zero, dtype, elements, dtype, native_lanes(dtype))


__all__ = ["backward", "bits", "forward", "zeros"]
