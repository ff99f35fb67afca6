"""CUDA kernels of an activation by itself, and of its gradient: a thread 128 bits where all is aligned, or else an element."""

import functools

from numba import types, uint32

from . import vector
from .compile import specialised
from .number import compiled, computed, device, read, stored, written
from .pooling import MOST, THREADS, Aligned, Plan, bits, blocks, itemsize
from .windows import PARAMETERS, first_parameters, thread

WHOLE = 16
"""Bytes of the widest load."""


@specialised
def value(activation, dtype, many):
    """``many``: elements of a thread.  Arguments: x, y; threads; the activation's parameters."""
    f, take, write, first_of = compiled(activation.value), read(dtype), written(dtype), first_parameters(len(activation.defaults))
    load, store, each = vector.load(many), vector.store(many), uint32(many)
    values = vector.mapped(device(lambda x, p: write(f(take(x), p))))

    def kernel(x, y, total, a0, a1, a2, a3, a4, a5):
        t = thread()
        if t < total:
            at = uint32(t * each)
            store(y, at, values(load(x, at), first_of(a0, a1, a2, a3, a4, a5)))

    return kernel, (*(types.CPointer(stored(dtype)),) * 2, uint32, *(computed(dtype),) * PARAMETERS)


@specialised
def gradient(activation, dtype, by_result, many):
    """Arguments: gx, gy, x or, ``by_result``, y; threads; the activation's parameters."""
    slope = compiled(activation.slope if by_result else activation.derivative)
    take, write, first_of = read(dtype), written(dtype), first_parameters(len(activation.defaults))
    load, store, each = vector.load(many), vector.store(many), uint32(many)
    slopes = vector.mapped(device(lambda gy, x, p: write(take(gy) * slope(take(x), p))), 2)

    def kernel(gx, gy, x, total, a0, a1, a2, a3, a4, a5):
        t = thread()
        if t < total:
            at = uint32(t * each)
            store(gx, at, slopes(load(gy, at), load(x, at), first_of(a0, a1, a2, a3, a4, a5)))

    return kernel, (*(types.CPointer(stored(dtype)),) * 3, uint32, *(computed(dtype),) * PARAMETERS)


class Device:
    """The plans of one device."""

    bits = staticmethod(bits)

    def __init__(self, index):
        self.index = index
        self.forward, self.backward = map(functools.lru_cache(maxsize=1024), (self._forward, self._backward))

    def _plan(self, kernel, dtype, elements, pointers):
        """``kernel``: that of so many elements a thread."""
        size = itemsize(dtype)

        def planned(many):
            most = MOST // many * many
            parts = [(first, min(most, elements - first) // many) for first in range(0, elements, most)]
            launches = [(blocks(count), THREADS, (first,) * pointers, (count,)) for first, count in parts]
            return Plan(self.index, kernel(many), launches, (size,) * pointers)

        many = WHOLE // size
        return planned(1) if elements % many else Aligned(planned(many), planned(1), (WHOLE,) * pointers)

    def _forward(self, activation, dtype, elements):
        """Arguments of ``run``: x, y; then the parameters."""
        return self._plan(functools.partial(value, activation, dtype), dtype, elements, 2)

    def _backward(self, activation, dtype, elements, by_result):
        """Arguments of ``run``: gx, gy, and x or y; then the parameters."""
        return self._plan(functools.partial(gradient, activation, dtype, by_result), dtype, elements, 3)


on = functools.cache(Device)
