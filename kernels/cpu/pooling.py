"""Which worker runs a pooling on the CPU, on what jobs: from shapes and strides to a ``Plan``, once for each, then from a cache.

Raw geometry in, addresses and ints out.  ``window`` is any object like fastpool.window's with three axes, or None for global pooling.

Along an axis the nests know a window from tables, so that padding, dilation, ceil_mode and adaptive bins are all the same to them:

* spans: for each output three int64, the position of tap 0 (in padding at times), the first tap inside, and the end of those;
* the windows of an input position: int64 offsets where each one's begin, then (output, tap) pairs;
* counts, in the dtype computed in, whose product over the axes is what an average divides by.
"""

import functools
from typing import Any, NamedTuple

import numba
import numpy as np

from ..launch import bits, launch, pack
from ..simd import bfloat16, float16, native_lanes, number
from . import bins, contiguous, positions, separable, small, whole_map
from . import channels_last as last
from .reduction import index

MOST_TAPS, MOST_STRIDE = 8, 4
"""Windows up to this many columns are unrolled and strides up to this share their loads; beyond, one kernel serves all sizes."""

LEAST_LANES = 4
"""Narrower registers are not quicker."""

SERIAL_BYTES = 1 << 16
"""Below this much input a second thread costs more than it brings: handing over takes about 3 us, 64 KiB from L2 about 1 us."""

JOBS = 16
"""A batch of fewer planes is split into bands of rows until there are about this many jobs."""

MOST_ROWS = 3
"""Rows, columns and strides of the windows that are written out whole: the usual ones, or every odd window would cost a compilation."""

LARGE_WINDOW = 16
"""Taps of a window of stride 1 from which on its rows and columns are reduced apart."""

PADDING = 64
"""Elements that tables by column are longer than a row, for a last block that runs over its end."""


class Geometry(NamedTuple):
    """What a plan depends on besides the reduction: an input's layout and the window on it.  Axes: N, C, D, H, W."""

    dtype: str
    shape: tuple[int, int, int, int, int]
    strides: tuple[int, int, int, int, int]
    channels_last: bool
    window: Any
    include_pad: bool = True
    divisor: int | None = None

    @property
    def end(self):
        """One past the last element, counted from the first."""
        return sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)) + 1


class Plan:
    """A worker, how many jobs, and the arguments that do not change from call to call."""

    def __init__(self, worker, jobs, sizes, parallel, tables=()):
        self.worker, self.jobs, self.parallel = worker, jobs, parallel
        self.sizes = pack(*sizes)
        self.tables = tables  # arrays whose addresses are among the sizes

    def run(self, addresses, threads, *more):
        """Do it: ``addresses`` come before the sizes, ``more`` (seed, parameters as bits) after them."""
        launch(self.worker, self.jobs, pack(*addresses) + self.sizes + pack(*more), threads if self.parallel else 1)


_STORED = {"float16": float16, "bfloat16": bfloat16, "bool": numba.uint8}


def _numba_dtype(name):
    return _STORED.get(name) or getattr(numba, name or "uint8")


class _WholeMap:
    """The window of a global pooling, on tables."""

    def __init__(self, shape):
        self.kernel_size = shape
        self.stride = self.dilation = 1, 1, 1

    def spans(self, axis, size):
        return np.zeros(1, int), np.zeros(1, int), np.full(1, size)

    def counts(self, axis, size, include_pad):
        return np.full(1, size)


class _Tables:
    """A window's tables on one geometry; kept alive by the plan that holds their addresses."""

    def __init__(self, geometry):
        self.geometry, self.window = geometry, geometry.window or _WholeMap(geometry.shape[2:])
        self.sizes = geometry.shape[2:]
        self.found = [self.window.spans(axis, size) for axis, size in enumerate(self.sizes)]
        self.out = tuple(len(origin) for origin, _, _ in self.found)
        self.kept = []

    def _address(self, table):
        table = np.ascontiguousarray(table)
        self.kept.append(table)
        return table.ctypes.data

    def spans(self, axis):
        return self._address(np.stack(self.found[axis], 1).astype(np.int64))

    def first(self, dtype):
        """The first tap inside of each column, in the dtype that counts taps."""
        return self._address(np.pad(self.found[2][1], (0, PADDING)).astype(dtype.name))

    def windows(self, axis):
        _, pairs = self._pairs(axis)
        return self._address(pairs)

    def _pairs(self, axis):
        origin, first, end = self.found[axis]
        outputs = np.repeat(np.arange(len(origin)), end - first)
        taps = np.arange(len(outputs)) - np.repeat(np.cumsum(end - first) - end, end - first)
        at = origin[outputs] + taps * self.window.dilation[axis]
        order = np.lexsort((taps, outputs, at))
        begins = np.searchsorted(at[order], np.arange(self.sizes[axis] + 1))
        pairs = np.stack((outputs[order], taps[order]), 1).reshape(-1)
        return begins, np.concatenate((len(begins) + 2 * begins, pairs)).astype(np.int64)

    def offsets(self):
        """Of each tap of a window one slice deep: its place in the map from the first's."""
        (_, rows, columns), (_, spread, step), width = self.window.kernel_size, self.window.dilation, self.sizes[2]
        return self._address((np.arange(rows)[:, None] * spread * width + np.arange(columns) * step).reshape(-1).astype(np.int64))

    def blocks(self, lanes, together):
        """What ``small`` reads a block of outputs at a time: counts and first taps, as arrays (blocks, together, lanes)."""
        _, height, width = self.out
        rows = np.minimum(np.arange(0, height, together), height - together)[:, None] + np.arange(together)
        columns = np.arange(0, width, lanes)[:, None] + np.arange(lanes)
        rows, columns = rows[:, None, :, None], columns[None, :, None, :]
        inside, within = columns < width, np.minimum(columns, width - 1)
        (_, first_h, _), (_, first_w, _) = self.found[1:]
        counts_h, counts_w = (self._count(axis) for axis in (1, 2))
        counts = np.where(inside, counts_h[rows] * counts_w[within], 1)
        firsts = np.where(inside, first_h[rows] * self.window.kernel_size[2] + first_w[within], 0)
        return counts, firsts

    def by_blocks(self, lanes, together, dtypes):
        """Addresses of ``blocks``, each in its dtype."""
        tables = self.blocks(lanes, together)
        with np.errstate(all="ignore"):
            return tuple(self._address(table.astype(dtype.name).reshape(-1)) for table, dtype in zip(tables, dtypes, strict=True))

    @property
    def once(self):
        """Whether every position lies in exactly one window."""
        return all((np.diff(self._pairs(axis)[0]) == 1).all() for axis in range(3))

    def _count(self, axis):
        """Along one axis; a divisor stands for rows."""
        if self.geometry.divisor is not None:
            return np.full(self.out[axis], self.geometry.divisor if axis == 1 else 1)
        return self.window.counts(axis, self.sizes[axis], self.geometry.include_pad)

    def counts(self, margin=0):
        """Addresses for D, H and W; the last readable ``margin`` elements before its first, too."""
        dtype = number(_numba_dtype(self.geometry.dtype)).name
        tables = [self._count(axis) for axis in range(3)]
        tables[2] = np.pad(tables[2], (margin, margin + PADDING), constant_values=1)
        with np.errstate(all="ignore"):  # small integers compute no average
            depth, height, width = (self._address(table.astype(dtype)) for table in tables)
        return depth, height, width + margin * np.dtype(dtype).itemsize

    def steps(self, axes=3):
        """The strides of the first axes, dilated."""
        return tuple(self.window.dilation[axis] * self.geometry.strides[2 + axis] for axis in range(axes))


def _columns(window):
    """(taps, stride, dilation) of the contiguous nests that serve this window: constants where they pay, 0 where run-time."""
    stride = window.stride[2]
    if stride > MOST_STRIDE:
        return 0, 0, 0
    taps = window.kernel_size[2]
    return taps if taps <= MOST_TAPS else 0, stride, 1 if window.dilation[2] == 1 else 0


def _bands(planes, rows):
    """(bands of a plane, rows of a band)."""
    bands = min(rows, max(1, JOBS // planes))
    band = -(-rows // bands)
    return -(-rows // band), band


def _lanes(dtype, width):
    """As many as fit a register, but no more than a row asks for."""
    lanes = native_lanes(dtype)
    while lanes > LEAST_LANES and lanes // 2 >= width:
        lanes //= 2
    return lanes


def _bytes(dtype):
    return dtype.bitwidth // 8


def _is_parallel(geometry, dtype):
    return int(np.prod(geometry.shape)) * _bytes(dtype) >= SERIAL_BYTES


def _merged(geometry):
    """The geometry of a global pooling with the axes that follow each other in memory made one: its taps are numbered as before."""
    (n, c, *sizes), (sn, sc, *strides) = geometry.shape, geometry.strides
    while (len(sizes) > 1 and strides[-2] == sizes[-1] * strides[-1]) or (len(sizes) > 1 and sizes[-2] == 1):
        sizes[-2:] = [sizes[-2] * sizes[-1]]
        strides[-2:] = [strides[-1]]
    pad = (1,) * (3 - len(sizes))
    return geometry._replace(shape=(n, c, *pad, *sizes), strides=(sn, sc, *(0 for _ in pad), *strides))


def _dense(channels, sizes, channels_last):
    """Strides of N, C, D, H and W of a dense tensor."""
    depth, height, width = sizes
    if channels_last:
        return depth * height * width * channels, 1, height * width * channels, width * channels, channels
    return channels * depth * height * width, depth * height * width, height * width, width, 1


def _lies_side_by_side(kind, window):
    """Whether the lanes of a register are best laid inside one window."""
    if window is None or not window.regular:
        return True
    return bool(kind.combine) and window.stride[2] > MOST_STRIDE and window.dilation[2] == 1


def _is_separable(kind, geometry):
    """Whether the time had better not depend on the window's area."""
    window = geometry.window
    if window is None or not window.regular or not kind.combine or max(window.stride) > 1 or max(window.dilation) > 1:
        return False
    depth, *kernel = window.kernel_size
    fits = depth == 1 and max(kernel) <= separable.MOST and max(geometry.shape[3:]) < separable.LARGEST_MAP
    return fits and kernel[0] * kernel[1] >= LARGE_WINDOW


class _Small(NamedTuple):
    """How ``small`` works on maps of one geometry: lanes of a row, rows in a register, rows and row stride between margins."""

    lanes: int
    together: int
    rows: int
    stride: int
    more: tuple[int, ...] = ()


def _is_small_window(window):
    (depth, *kernel), dense = window.kernel_size, max(window.dilation) == 1 and window.stride[0] == 1 and window.padding[0] == 0
    return window.regular and depth == 1 and dense and max(*kernel, *window.stride) <= MOST_ROWS


def _rounded(size, step):
    return -(-size // step) * step


def _registers(dtype, width, height):
    """(lanes of a row, rows in a register)."""
    lanes, together = _lanes(dtype, width), 1
    while lanes * together < native_lanes(dtype) and width <= lanes and 2 * together <= height:
        together *= 2
    return lanes, together


def _small_forward(geometry, dtype):
    """How ``small.forward`` does it, or None if the map does not fit."""
    window, (height, width) = geometry.window, geometry.shape[3:]
    if not _is_small_window(window):
        return None
    (_, kh, kw), (_, sh, sw), (_, ph, pw) = window.kernel_size, window.stride, window.padding
    out_h, out_w = window.output_size(*geometry.shape[2:])[1:]
    lanes, together = _registers(dtype, out_w, out_h)
    rows = max(ph + height, (out_h - 1) * sh + kh)
    stride = max(pw + _rounded(width, lanes), (_rounded(out_w, lanes) - lanes) * sw + (kw - 1) // sw * sw + sw * lanes)
    direct = number(dtype) == dtype and ph == pw == 0 and rows == height and (out_w - 1) * sw + kw <= width
    extent = (rows - 1) * geometry.strides[3] + (_rounded(out_w, lanes) - lanes) * sw + (kw - 1) // sw * sw + sw * lanes
    room = small.ROOM if direct or sw == 1 else small.COPIED
    fits = (rows + 1) * stride <= room and out_h * out_w + 8 * native_lanes(dtype) <= small.ROOM
    return _Small(lanes, together, rows, stride, (direct, extent)) if fits else None


def _small_backward(kind, geometry, dtype):
    """How ``small.backward`` does it, or None."""
    window, (height, width) = geometry.window, geometry.shape[3:]
    if not (kind.selects or kind.linear) or not _is_small_window(window):
        return None
    (_, kh, kw), (_, sh, sw), (_, ph, pw) = window.kernel_size, window.stride, window.padding
    columns = -(-width // sw)
    lanes, together = _registers(dtype, columns, -(-height // sh))
    margin_h, margin_w = (kh - 1) // sh + 1, (kw - 1) // sw + 1
    out_h, out_w = window.output_size(*geometry.shape[2:])[1:]
    rows = margin_h + max(out_h, (height - 1 + ph) // sh + 1) + together
    stride = margin_w + max(_rounded(out_w, lanes), _rounded(columns, lanes) + pw // sw + 1)
    grown = _rounded(columns, lanes) * sw
    fits = (rows + 1) * stride <= small.ROOM and (height + sh * together + 1) * grown <= small.ROOM
    return _Small(lanes, together, rows, stride, (margin_h, margin_w, grown)) if fits else None


@functools.lru_cache(maxsize=4096)
def forward(kind, geometry, saved, saves):
    """Arguments of ``run``: x, y, saved; then the seed's two halves and the parameters.

    ``saved``: name of the dtype of what is saved, or None; ``saves``: whether this call writes it.
    """
    dtype, kept = _numba_dtype(geometry.dtype), _numba_dtype(saved)
    parallel, window = _is_parallel(geometry, dtype), geometry.window
    n, channels = geometry.shape[:2]
    if window is None:
        geometry = _merged(geometry)
    sn, sc, sd, sh, sw = geometry.strides
    if _is_separable(kind, geometry):
        lanes = _lanes(dtype, channels if geometry.channels_last else geometry.shape[4])
        tables = _Tables(geometry)
        jobs = n * geometry.shape[2] * (-(-channels // lanes) if geometry.channels_last else channels)
        sizes = (
            *tables.counts(), channels, *geometry.shape[2:], *tables.out[1:], *geometry.strides, *window.kernel_size[1:],
            *window.padding[1:],
        )  # fmt: skip
        return Plan(separable.forward(kind, dtype, kept, saves, lanes, geometry.channels_last, False), jobs, sizes, parallel, tables)
    if geometry.channels_last:
        lanes = _lanes(dtype, channels)
        if window is None:
            worker = whole_map.forward(kind, dtype, kept, saves, lanes)
            sizes = channels, *geometry.shape[2:], sn, sd, sh, sw, geometry.shape[2] == geometry.shape[3] == 1
            return Plan(worker, n * -(-channels // (whole_map.GROUP * lanes)), sizes, parallel)
        tables = _Tables(geometry)
        sizes = (
            *map(tables.spans, range(3)), *tables.counts(), channels, *tables.out, sn, sd, sh, sw, geometry.end, *tables.steps(),
            *window.kernel_size, *window.stride[1:],
        )  # fmt: skip
        worker = last.forward(kind, dtype, kept, saves, lanes, last.group(kind, lanes, channels))
        return Plan(worker, n * tables.out[0] * tables.out[1], sizes, parallel, tables)
    tables = _Tables(geometry)
    if _lies_side_by_side(kind, window):
        sizes = (
            *map(tables.spans, range(3)), *tables.counts(), channels, *tables.out, sn, sc, sd, sh, geometry.end, *tables.steps(2),
            *tables.window.kernel_size,
        )  # fmt: skip
        worker = bins.forward(kind, dtype, kept, saves, native_lanes(dtype))
        return Plan(worker, n * channels * tables.out[0] * tables.out[1], sizes, parallel, tables)
    if how := _small_forward(geometry, dtype):
        (_, kh, kw), (_, stride_h, stride_w) = window.kernel_size, window.stride
        blocks = tables.by_blocks(how.lanes, how.together, (number(dtype), index(dtype, kept)))
        sizes = (
            *blocks, channels, *geometry.shape[2:], *tables.out[1:], sn, sc, sd, sh, geometry.end, stride_h, *window.padding[1:],
            how.rows, how.stride, how.more[1],
        )  # fmt: skip
        worker = small.forward(kind, dtype, kept, saves, how.lanes, how.together, kh, kw, stride_w, how.more[0])
        return Plan(worker, n * channels * geometry.shape[2], sizes, parallel, tables)
    rows, width = tables.out[0] * tables.out[1], tables.out[2]
    bands = _bands(n * channels, rows)
    (kd, kh, kw), (_, stride_h, stride_w) = window.kernel_size, window.stride
    sizes = (
        tables.spans(0), tables.spans(1), tables.first(index(dtype, kept)), *tables.counts(), channels, geometry.shape[4], *tables.out,
        sn, sc, sd, sh, geometry.end, *tables.steps(2), kd, kh, kw, stride_h, stride_w, window.dilation[2], window.padding[2], *bands,
    )  # fmt: skip
    rows = kh if kh <= MOST_ROWS else 0
    worker = contiguous.forward(kind, dtype, kept, saves, _lanes(dtype, width), rows, *_columns(window))
    return Plan(worker, n * channels * bands[0], sizes, parallel, tables)


@functools.lru_cache(maxsize=4096)
def backward(kind, geometry, saved):
    """Arguments of ``run``: gx, gy, saved, x, y; then the parameters.  gx, gy, saved and y are dense in geometry's layout."""
    dtype, kept = _numba_dtype(geometry.dtype), _numba_dtype(saved)
    parallel, window = _is_parallel(geometry, dtype), geometry.window
    n, channels = geometry.shape[:2]
    if window is None:
        geometry = _merged(geometry)
    sn, sc, sd, sh, sw = geometry.strides
    depth, height, width = geometry.shape[2:]
    if kind.selects and _is_separable(kind, geometry) and number(dtype) == dtype:
        tables = _Tables(geometry)
        spans = tables.spans(1), tables.spans(2), tables.offsets()
        sizes = *spans, channels, height, width, *tables.out[1:], window.taps
        jobs = n * depth * (1 if geometry.channels_last else channels)
        return Plan(separable.scatter(dtype, kept, geometry.channels_last), jobs, sizes, parallel, tables)
    if not kind.selects and kind.gives and _is_separable(kind, geometry):
        lanes = _lanes(dtype, channels if geometry.channels_last else width)
        tables = _Tables(geometry)
        jobs = n * depth * (-(-channels // lanes) if geometry.channels_last else channels)
        padding = (k - 1 - p for k, p in zip(window.kernel_size[1:], window.padding[1:], strict=True))
        sizes = (
            *tables.counts(separable.MOST), channels, depth, *tables.out[1:], height, width,
            *_dense(channels, tables.out, geometry.channels_last), *window.kernel_size[1:], *padding, *geometry.strides,
        )  # fmt: skip
        return Plan(separable.forward(kind, dtype, kept, False, lanes, geometry.channels_last, True), jobs, sizes, parallel, tables)
    if geometry.channels_last:
        lanes = _lanes(dtype, channels)
        if window is None:
            sizes = channels, depth, height, width, sn, sd, sh, sw, 0
            return Plan(whole_map.backward(kind, dtype, kept, lanes), n * depth * height, sizes, parallel)
        tables = _Tables(geometry)
        sizes = (
            *map(tables.windows, range(3)), *tables.counts(), channels, depth, height, width, *tables.out, sn, sd, sh, sw, geometry.end,
            *window.kernel_size, n * channels * int(np.prod(tables.out)),
        )  # fmt: skip
        return Plan(last.backward(kind, dtype, kept, lanes), n * depth * height, sizes, parallel, tables)
    tables = _Tables(geometry)
    if _lies_side_by_side(kind, window):
        sizes = (
            tables.windows(0), tables.windows(1), tables.spans(2), *tables.counts(), channels, depth, height, width, *tables.out,
            sn, sc, sd, sh, *tables.window.kernel_size,
        )  # fmt: skip
        worker = bins.backward(kind, dtype, kept, native_lanes(dtype), tables.once)
        return Plan(worker, n * channels * depth * height, sizes, parallel, tables)
    if how := _small_backward(kind, geometry, dtype):
        (_, kh, kw), (_, stride_h, stride_w), (_, above, left) = window.kernel_size, window.stride, window.padding
        margin_h, margin_w, grown = how.more
        jobs = n * channels * depth
        sizes = (
            *tables.counts()[1:], height, width, *tables.out[1:], above, left, how.rows, how.stride, margin_h, margin_w, grown,
            jobs * tables.out[1] * tables.out[2],
        )  # fmt: skip
        worker = small.backward(kind, dtype, kept, how.lanes, how.together, kh, kw, stride_h, stride_w, above % stride_h, left % stride_w)
        return Plan(worker, jobs, sizes, parallel, tables)
    bands = _bands(n * channels, depth * height)
    taps, stride, dilation = _columns(window)
    sizes = (
        tables.windows(0), tables.windows(1), *tables.counts(), channels, depth, height, width, *tables.out, sn, sc, sd, sh, geometry.end,
        *window.kernel_size, window.stride[2], window.dilation[2], window.padding[2], *bands, n * channels * int(np.prod(tables.out)),
    )  # fmt: skip
    shift = window.padding[2] % stride if stride else 0
    lanes = _lanes(dtype, -(-width // max(1, stride)))
    worker = contiguous.backward(kind, dtype, kept, lanes, taps, stride, dilation, shift)
    return Plan(worker, n * channels * bands[0], sizes, parallel, tables)


@functools.lru_cache(maxsize=4096)
def flat_positions(geometry, saved):
    """Arguments of ``run``: flat (int64), saved; both dense in geometry's layout, whose strides do not matter."""
    tables, channels = _Tables(geometry), geometry.shape[1]
    height, width = geometry.shape[3:]
    sizes = *map(tables.spans, range(3)), channels, *tables.out, height, width, *tables.window.dilation, *tables.window.kernel_size
    jobs = geometry.shape[0] * tables.out[0] * tables.out[1] * (1 if geometry.channels_last else channels)
    worker = positions.flat(_numba_dtype(saved), geometry.channels_last)
    return Plan(worker, jobs, sizes, _is_parallel(geometry, _numba_dtype(geometry.dtype)), tables)


__all__ = ["Geometry", "Plan", "backward", "bits", "flat_positions", "forward"]
