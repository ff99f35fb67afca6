"""CUDA kernels of an activation by itself, and of its gradient: a thread an element."""

import functools

from numba import types, uint32

from .compile import specialised
from .number import compiled, computed, read, stored, written
from .pooling import MOST, THREADS, Plan, bits, itemsize
from .windows import PARAMETERS, first_parameters, thread


@specialised
def value(activation, dtype):
    """Arguments: x, y; their elements; the activation's parameters."""
    f, take, write, first_of = compiled(activation.value), read(dtype), written(dtype), first_parameters(len(activation.defaults))

    def kernel(x, y, total, a0, a1, a2, a3, a4, a5):
        t = thread()
        if t < total:
            y[t] = write(f(take(x[t]), first_of(a0, a1, a2, a3, a4, a5)))

    return kernel, (*(types.CPointer(stored(dtype)),) * 2, uint32, *(computed(dtype),) * PARAMETERS)


@specialised
def gradient(activation, dtype, by_result):
    """Arguments: gx, gy, x or, ``by_result``, y; their elements; the activation's parameters."""
    slope = compiled(activation.slope if by_result else activation.derivative)
    take, write, first_of = read(dtype), written(dtype), first_parameters(len(activation.defaults))

    def kernel(gx, gy, x, total, a0, a1, a2, a3, a4, a5):
        t = thread()
        if t < total:
            gx[t] = write(take(gy[t]) * slope(take(x[t]), first_of(a0, a1, a2, a3, a4, a5)))

    return kernel, (*(types.CPointer(stored(dtype)),) * 3, uint32, *(computed(dtype),) * PARAMETERS)


class Device:
    """The plans of one device."""

    bits = staticmethod(bits)

    def __init__(self, index):
        self.index = index
        self.forward, self.backward = map(functools.lru_cache(maxsize=1024), (self._forward, self._backward))

    def _plan(self, kernel, dtype, elements, pointers):
        parts = [(first, min(MOST, elements - first)) for first in range(0, elements, MOST)]
        launches = [(-(-count // THREADS), THREADS, (first,) * pointers, (count,)) for first, count in parts]
        return Plan(self.index, kernel, launches, (itemsize(dtype),) * pointers)

    def _forward(self, activation, dtype, elements):
        """Arguments of ``run``: x, y; then the parameters."""
        return self._plan(value(activation, dtype), dtype, elements, 2)

    def _backward(self, activation, dtype, elements, by_result):
        """Arguments of ``run``: gx, gy, and x or y; then the parameters."""
        return self._plan(gradient(activation, dtype, by_result), dtype, elements, 3)


on = functools.cache(Device)
