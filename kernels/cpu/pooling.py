"""Which worker runs a pooling on the CPU, on what jobs: from shapes and strides to a ``Plan``, once for each, then from a cache.

Raw geometry in, addresses and ints out.  ``window`` is any object like fastpool.window.Window, or None for global pooling.
"""

import functools
from typing import Any, NamedTuple

import numba
import numpy as np

from ..launch import bits, launch, pack
from ..simd import native_lanes
from . import channels_last as last
from . import contiguous, positions, whole_map

MOST_TAPS, MOST_STRIDE = 8, 4
"""Windows up to this many columns are unrolled and strides up to this share their loads; beyond, one kernel serves all sizes."""

SERIAL_BYTES = 1 << 16
"""Below this much input a second thread costs more than it brings: handing over takes about 3 us, 64 KiB from L2 about 1 us."""

JOBS = 16
"""A batch of fewer planes is split into bands of rows until there are about this many jobs."""


class Geometry(NamedTuple):
    """What a plan depends on besides the reduction: an input's layout and the window on it."""

    dtype: str
    shape: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    channels_last: bool
    window: Any
    include_pad: bool = True
    divisor: int | None = None


class Plan:
    """A worker, how many jobs, and the arguments that do not change from call to call."""

    def __init__(self, worker, jobs, sizes, parallel, tables=()):
        self.worker, self.jobs, self.parallel = worker, jobs, parallel
        self.sizes = pack(*sizes)
        self.tables = tables  # arrays whose addresses are among the sizes

    def run(self, addresses, threads, *more):
        """Do it: ``addresses`` come before the sizes, ``more`` (seed, parameters as bits) after them."""
        launch(self.worker, self.jobs, pack(*addresses) + self.sizes + pack(*more), threads if self.parallel else 1)


def _numba_dtype(name):
    return getattr(numba, name or "uint8")


def _columns(window):
    """(taps, stride, dilation) of the contiguous nests that serve this window: constants where they pay, 0 where run-time."""
    stride = window.stride[1]
    if stride > MOST_STRIDE:
        return 0, 0, 0
    taps = window.kernel_size[1]
    return taps if taps <= MOST_TAPS else 0, stride, 1 if window.dilation[1] == 1 else 0


def _counts(geometry):
    """Two tables of the dtype computed in, whose product at (oh, ow) is the count that an average divides by."""
    window, (_, _, height, width) = geometry.window, geometry.shape
    rows, columns = (window.counts(axis, size, geometry.include_pad).astype(geometry.dtype) for axis, size in ((0, height), (1, width)))
    if geometry.divisor is not None:
        rows[:], columns[:] = geometry.divisor, 1
    return rows, columns


def _window_arguments(window):
    return tuple(
        value for axis in (0, 1) for value in (window.kernel_size[axis], window.stride[axis], window.dilation[axis], window.padding[axis])
    )


def _windowed(geometry):
    """(sizes shared by forward and backward, tables)."""
    (_, channels, height, width), (sn, sc, sh, sw) = geometry.shape, geometry.strides
    tables = _counts(geometry)
    strides = (sn, sh, sw) if geometry.channels_last else (sn, sc, sh)
    out = len(tables[0]), len(tables[1])
    sizes = (*(t.ctypes.data for t in tables), channels, height, width, *out, *strides, *_window_arguments(geometry.window))
    return sizes, tables, out


def _bands(planes, rows):
    """(bands of a plane, rows of a band)."""
    bands = min(rows, max(1, JOBS // planes))
    band = -(-rows // bands)
    return -(-rows // band), band


def _is_parallel(geometry):
    return int(np.prod(geometry.shape)) * np.dtype(geometry.dtype).itemsize >= SERIAL_BYTES


def _map_rows(geometry):
    """A map as (rows, their length, their stride): one long row where rows follow each other."""
    (_, _, height, width), row = geometry.shape, geometry.strides[2]
    return (1, height * width, 0) if row == width or height == 1 else (height, width, row)


def _global_sizes(geometry):
    (_, channels, height, width), (sn, sc, sh, sw) = geometry.shape, geometry.strides
    if geometry.channels_last:
        return channels, height, width, sn, sh, sw
    return channels, sn, sc, *_map_rows(geometry)


@functools.lru_cache(maxsize=4096)
def forward(kind, geometry, saved, saves):
    """Arguments of ``run``: x, y, saved; then the seed's two halves (windows only) and the parameters.

    ``saved``: name of the dtype of what is saved, or None; ``saves``: whether this call writes it.
    """
    dtype, kept = _numba_dtype(geometry.dtype), _numba_dtype(saved)
    n, channels, _, _ = geometry.shape
    lanes, parallel = native_lanes(dtype), _is_parallel(geometry)
    if geometry.window is None:
        if geometry.channels_last:
            worker = whole_map.forward_channels_last(kind, dtype, kept, saves, lanes)
            return Plan(worker, n * -(-channels // (4 * lanes)), _global_sizes(geometry), parallel)
        worker = whole_map.forward_contiguous(kind, dtype, kept, saves, lanes)
        return Plan(worker, n * channels, _global_sizes(geometry), parallel)
    sizes, tables, (out_rows, _) = _windowed(geometry)
    if geometry.channels_last:
        return Plan(last.forward(kind, dtype, kept, saves, lanes), n * out_rows, sizes, parallel, tables)
    worker = contiguous.forward(kind, dtype, kept, saves, lanes, *_columns(geometry.window))
    bands = _bands(n * channels, out_rows)
    return Plan(worker, n * channels * bands[0], (*sizes, *bands), parallel, tables)


@functools.lru_cache(maxsize=4096)
def backward(kind, geometry, saved):
    """Arguments of ``run``: gx, gy, saved, x, y; then the parameters.  gx, gy, saved and y are dense in geometry's layout."""
    dtype, kept = _numba_dtype(geometry.dtype), _numba_dtype(saved)
    n, channels, height, _ = geometry.shape
    lanes, parallel = native_lanes(dtype), _is_parallel(geometry)
    if geometry.window is None:
        if geometry.channels_last:
            return Plan(whole_map.backward_channels_last(kind, dtype, kept, lanes), n * height, _global_sizes(geometry), parallel)
        return Plan(whole_map.backward_contiguous(kind, dtype, kept, lanes), n * channels, _global_sizes(geometry), parallel)
    sizes, tables, _ = _windowed(geometry)
    if geometry.channels_last:
        return Plan(last.backward(kind, dtype, kept, lanes), n * height, sizes, parallel, tables)
    worker = contiguous.backward(kind, dtype, kept, lanes, *_columns(geometry.window))
    bands = _bands(n * channels, height)
    return Plan(worker, n * channels * bands[0], (*sizes, *bands), parallel, tables)


@functools.lru_cache(maxsize=4096)
def flat_positions(geometry, saved):
    """Arguments of ``run``: flat (int64), saved; both dense in geometry's layout, whose strides do not matter."""
    window, (n, channels, height, width) = geometry.window, geometry.shape
    out_rows, out_columns = window.output_size(height, width)
    offsets = window.tap_offsets(width)
    (sh, sw), (ph, pw) = window.stride, window.padding
    sizes = offsets.ctypes.data, channels, out_rows, out_columns, width, sh, ph, sw, pw, window.taps
    jobs = n * out_rows * (1 if geometry.channels_last else channels)
    return Plan(positions.flat(_numba_dtype(saved), geometry.channels_last), jobs, sizes, _is_parallel(geometry), (offsets,))


__all__ = ["Geometry", "Plan", "backward", "bits", "flat_positions", "forward"]
