"""Pooling on the CPU, for the backend: from shapes and strides to a ``Plan``, once for each, then from a cache.

Raw geometry in (geometry.py), addresses and ints out; which nest it is, choice.py says.
"""

import functools

from ..geometry import Geometry
from ..launch import bits, launch, pack, packer
from . import choice, positions
from .geometry import Tables, itemsize, stored_dtype

SERIAL_BYTES = 1 << 16
"""Below this much input a second thread costs more than it brings: handing over takes about 3 us, 64 KiB from L2 about 1 us."""
STREAMED_BYTES = 10 << 16
"""The same of global pooling.  us, on one thread and on two (Zen 5): avg of 1x3x224x224, 600 KB, 7.4 and 9.0; 1x64x56x56, 800 KB, 10.5 and
9.4; channels_last 8x64x16x16, 512 KB, 7.6 and 7.7, 8x512x7x7, 780 KB, 10.9 and 9.3."""


class Plan:
    """A worker, how many jobs, and the arguments that do not change from call to call."""

    def __init__(self, worker, jobs, sizes, parallel, tables=()):
        self.worker, self.jobs, self.parallel = worker, jobs, parallel
        self.sizes = pack(*sizes)
        self.tables = tables  # arrays whose addresses are among the sizes

    def run(self, addresses, threads, *more):
        """Do it: ``addresses`` come before the sizes, ``more`` (seed, parameters as bits) after them."""
        args = packer(len(addresses))(*addresses) + self.sizes + packer(len(more))(*more)
        # Every function of Python's on this way is 0.5 us, once a large map has gone through the caches.
        if threads > 1 and self.parallel:
            launch(self.worker, self.jobs, args, threads)
        else:
            self.worker.call(args, 0, self.jobs)


class _Mirrored(Plan):
    """A forward pass that is run as a backward one."""

    def run(self, addresses, threads, *more):
        gx, gy, *_ = addresses
        super().run((gy, gx, 0), threads, 0, 0, *more)


def _plan(geometry, chosen, make=Plan):
    parallel = _is_parallel(geometry, STREAMED_BYTES if chosen.streams else SERIAL_BYTES)
    return make(chosen.nest(*chosen.constants), chosen.jobs, chosen.sizes, parallel, chosen.tables)


def _is_parallel(geometry, least=SERIAL_BYTES):
    elements = 1
    for size in geometry.shape:
        elements *= size
    return elements * itemsize(stored_dtype(geometry.dtype)) >= least


@functools.lru_cache(maxsize=4096)
def forward(kind, geometry, saved, saves):
    """Arguments of ``run``: x, y, saved; then the seed's two halves and the parameters.

    ``saved``: name of the dtype of what is saved, or None; ``saves``: whether this call writes it.
    """
    asked = choice.Asked(kind, geometry, stored_dtype(geometry.dtype), stored_dtype(saved), saves)
    return _plan(geometry, choice.forward(asked))


@functools.lru_cache(maxsize=4096)
def backward(kind, geometry, saved):
    """Arguments of ``run``: gx, gy, saved, x, y; then the parameters.  gx, gy, saved and y are dense in geometry's layout."""
    asked = choice.Asked(getattr(kind, "routed", None) or kind, geometry, stored_dtype(geometry.dtype), stored_dtype(saved))
    if chosen := choice.mirrored(asked):
        return _plan(geometry, chosen, _Mirrored)
    return _plan(geometry, choice.backward(asked))


@functools.lru_cache(maxsize=4096)
def flat_positions(geometry, saved):
    """Arguments of ``run``: flat (int64), saved; both dense in geometry's layout, whose strides do not matter."""
    tables, channels = Tables(geometry), geometry.shape[1]
    height, width = geometry.shape[3:]
    sizes = *map(tables.spans, range(3)), channels, *tables.out, height, width, *tables.window.dilation, *tables.window.kernel_size
    jobs = geometry.shape[0] * tables.out[0] * tables.out[1] * (1 if geometry.channels_last else channels)
    worker = positions.flat(stored_dtype(saved), geometry.channels_last)
    return Plan(worker, jobs, sizes, _is_parallel(geometry), tables)


__all__ = ["Geometry", "Plan", "backward", "bits", "flat_positions", "forward"]
