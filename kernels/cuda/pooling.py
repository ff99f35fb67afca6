"""Pooling on CUDA, for the backend: from shapes and strides to launches, once for each, then from a cache.

As kernels/cpu/pooling.py, of a device: ``on(index)`` has ``forward``, ``backward`` and ``flat_positions``, which give plans to ``run``.
"""

import functools
import math

import numpy as np

from ..geometry import Geometry
from . import whole_map, wide, windows
from .launch import launch
from .number import divisors

THREADS = 256
"""Of a block."""

MOST = 2**31 - 1
"""Elements that one launch counts: indices are uint32, divided as numbers below 2^31."""


NEAR = 2**32
"""An axis' size by its bins, one more of each, from which bins are found by divisions of 64 bits."""


class Plan:
    """Launches of one kernel over parts of a batch."""

    parallel = False
    """No threads of the CPU."""

    def __init__(self, device, kernel, launches, itemsizes):
        self.device, self.kernel = device, kernel
        self.itemsizes = itemsizes
        """Bytes of an element of each address."""
        self.launches = launches
        """(blocks, threads, elements into each address, numbers)"""

    @functools.cached_property
    def _ready(self):
        """The launches, with steps in bytes and numbers as the kernel takes them: to make those anew was most of a call's time."""
        sizes, of_numbers = self.itemsizes, self.kernel.converters[len(self.itemsizes) :]
        return [
            (blocks, block, [step * size for step, size in zip(steps, sizes, strict=True)], _converted(of_numbers, numbers))
            for blocks, block, steps, numbers in self.launches
        ]

    def run(self, addresses, threads, *more):
        """Do it on the device's current stream: ``addresses``, then the numbers, then ``more`` (seed, parameters)."""
        for blocks, block, steps, numbers in self._ready:
            moved = [address and address + step for address, step in zip(addresses, steps, strict=True)]
            rest = self.kernel.converters[len(moved) + len(numbers) :]
            given = _converted(rest, (*more, *(0,) * (len(rest) - len(more))))
            launch(self.kernel, blocks, block, [*moved, *numbers, *given], self.device)


def _converted(converters, numbers):
    return [convert(number) for convert, number in zip(converters, numbers, strict=False)]


def itemsize(name):
    """Bytes of a dtype of this name."""
    return {"bool": 1, "bfloat16": 2}.get(name) or np.dtype(name).itemsize


def bits(value, dtype):
    """A parameter as ``run`` takes it."""
    return value


class _Window:
    """A pooling's window, or the whole map, as kernels are specialised by it."""

    def __init__(self, geometry):
        self.geometry = geometry
        (_, C, *self.sizes), window = geometry.shape, geometry.window
        self.channels, self.whole = C, window is None
        self.padding = (0, 0, 0)
        self.out = (1, 1, 1)
        if window:
            self.out = tuple(len(window.spans(axis, size)[0]) for axis, size in enumerate(self.sizes))
            self.padding = window.padding
            products = [(size + 1) * (out + 1) for size, out in zip(self.sizes, self.out, strict=True)]
            stride = tuple(step or (0 if most < NEAR else windows.FAR) for step, most in zip(window.stride, products, strict=True))
            self.constants = window.kernel_size, stride, window.dilation

    def parts(self, per_image):
        """Launches of so many elements an image."""
        (n, *shape), (step, *strides) = self.geometry.shape, self.geometry.strides
        extent = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
        return parts(n, per_image, extent, step)

    def together(self, geometry):
        """Outputs that one thread makes: wide.py's, where the map is read by whole loads, and written so."""
        last, (kernel_size, stride, _) = geometry.channels_last, self.constants
        if not wide.fits(kernel_size, stride, last):
            return 1
        many, (n, c, *rest, along) = wide.lanes(last, stride[2]), geometry.strides
        if last:
            whole, steps = self.channels % many == 0 and c == 1, (n, *rest, along)
        else:
            whole = self.sizes[2] % wide.QUAD == self.out[2] % many == 0 and along == 1
            steps = n, c, *rest
        return many if whole and not any(step % wide.QUAD for step in steps) else 1


def blocks(count, threads=THREADS):
    """That many threads, or more, are in."""
    return -(-count // threads)


def parts(images, *elements):
    """(first image, images) of each launch, in none of which an index reaches MOST; ``elements``: of an image, of one tensor or another."""
    most = MOST // max(elements)
    if most == 0:
        raise NotImplementedError(f"one image has {max(elements)} elements: CUDA kernels count up to {MOST}, the CPU's further")
    return [(first, min(most, images - first)) for first in range(0, images, most)]


class Device:
    """The plans of one device."""

    Geometry = staticmethod(Geometry)
    bits = staticmethod(bits)

    def __init__(self, index):
        self.index = index
        self.forward, self.backward, self.flat_positions = map(
            functools.lru_cache(maxsize=4096), (self._forward, self._backward, self._flat_positions)
        )

    def _forward(self, kind, geometry, saved, saves):
        """Arguments of ``run``: x, y, saved; then the seed's two halves and the parameters."""
        W, dtype, last = _Window(geometry), geometry.dtype, geometry.channels_last
        outputs, itemsizes = W.channels * math.prod(W.out), (itemsize(dtype), itemsize(dtype), itemsize(saved or "uint8"))
        plans = []
        if W.whole:
            *_, step_d, step_h, step_w = geometry.strides
            dense = (step_d, step_h) == (W.sizes[1] * step_h, W.sizes[2] * step_w)
            side = whole_map.maps_of_a_block(last, math.prod(W.sizes))
            kernel = whole_map.forward(kind, dtype, saved or "uint8", saves, last, dense, side)
            for first, images in W.parts(W.channels):
                maps = images * W.channels
                numbers = [maps, *divisors(W.channels, *W.sizes[1:]), math.prod(W.sizes), *geometry.strides]
                steps = first * geometry.strides[0], first * outputs, first * outputs
                plans.append((blocks(maps, side), whole_map.THREADS, steps, numbers))
            return _Seedless(self.index, kernel, plans, itemsizes)
        many = W.together(geometry)

        def planned(kernel, many):
            """Of threads that make so many outputs."""
            plans, (*sizes, width) = [], W.out
            counts = (W.channels // many, *W.out) if last else (W.channels, *sizes, width // many)
            for first, images in W.parts(outputs):
                total = images * outputs // many
                numbers = [total, *divisors(*counts), *W.sizes, *geometry.strides, *W.padding, first * W.channels]
                plans.append((blocks(total), THREADS, (first * geometry.strides[0], first * outputs, first * outputs), numbers))
            return Plan(self.index, kernel, plans, itemsizes)

        constants = kind, dtype, saved or "uint8", saves, last, *W.constants
        single = planned(windows.forward(*constants, geometry.include_pad, geometry.divisor), 1)
        if many == 1:
            return single
        padding = 0 if last else W.padding[2]
        several = planned(wide.forward(*constants, padding, geometry.include_pad, geometry.divisor), many)
        own, _, kept = itemsizes
        return Aligned(several, single, (wide.QUAD * own, many * own, many * kept))

    def _backward(self, kind, geometry, saved):
        """Arguments of ``run``: gx, gy, saved, x, y; then the parameters.  gx, gy, saved and y are dense in geometry's layout."""
        kind = getattr(kind, "routed", None) or kind
        W, dtype, last = _Window(geometry), geometry.dtype, geometry.channels_last
        elements, outputs = W.channels * math.prod(W.sizes), W.channels * math.prod(W.out)
        own = itemsize(dtype)
        itemsizes = own, own, itemsize(saved or "uint8"), own, own

        def planned(kernel, many, rest, more):
            """Of threads that make so many elements."""
            plans, (*sizes, width) = [], W.sizes
            counts = (W.channels // many, *W.sizes) if last else (W.channels, *sizes, width // many)
            for first, images in W.parts(max(elements, outputs)):
                total = images * elements // many
                numbers = [total, *divisors(*counts), *rest, *geometry.strides, *more]
                steps = first * elements, first * outputs, first * outputs, first * geometry.strides[0], first * outputs
                plans.append((blocks(total), THREADS, steps, numbers))
            return Plan(self.index, kernel, plans, itemsizes)

        if W.whole:
            return planned(whole_map.backward(kind, dtype, saved, last), 1, [math.prod(W.sizes)], [])
        constants, behind = (kind, dtype, saved, last, *W.constants), (geometry.include_pad, geometry.divisor)
        single = planned(windows.backward(*constants, *behind), 1, W.out, W.padding)
        many = W.together(geometry)
        if many == 1 or not wide.gathers(kind, *W.constants, last):
            return single
        several = planned(wide.backward(*constants, 0 if last else W.padding[2], *behind), wide.QUAD, W.out, W.padding)
        return Aligned(several, single, (*(wide.QUAD * size for size in itemsizes),))

    def _flat_positions(self, geometry, saved):
        """Arguments of ``run``: flat (int64), saved; both dense in geometry's layout."""
        W = _Window(geometry)
        kernel, outputs = windows.flat_positions(saved, geometry.channels_last, *W.constants), W.channels * math.prod(W.out)
        plans = []
        for first, images in W.parts(outputs):
            numbers = [images * outputs, *divisors(W.channels, *W.out), *W.sizes, *W.padding]
            plans.append((blocks(images * outputs), THREADS, (first * outputs,) * 2, numbers))
        return Plan(self.index, kernel, plans, (8, itemsize(saved)))


class Aligned:
    """A plan that wants its addresses to be multiples of some bytes, and one for others."""

    parallel = False

    def __init__(self, aligned, other, multiples):
        self.aligned, self.other, self.multiples = aligned, other, multiples

    def run(self, addresses, threads, *more):
        fits = not any(address % multiple for address, multiple in zip(addresses, self.multiples, strict=True))
        (self.aligned if fits else self.other).run(addresses, threads, *more)


class _Seedless(Plan):
    """Of a kernel that draws nothing, and is told no seed."""

    def run(self, addresses, threads, *more):
        super().run(addresses, threads, *more[2:])


on = functools.cache(Device)
