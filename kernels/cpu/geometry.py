"""What the CPU's nests are told of a pooling's geometry: tables of its windows.

Along an axis the nests know a window from tables, so that padding, dilation, ceil_mode and adaptive bins are all the same to them:

* spans: for each output three int64, the position of tap 0 (in padding at times), the first tap inside, and the end of those;
* the windows of an input position: int64 offsets where each one's begin, then (output, tap) pairs;
* counts, in the dtype computed in, whose product over the axes is what an average divides by.
"""

import numba
import numpy as np

from ..simd import LINE, bfloat16, float16, native_lanes, number

LEAST_LANES = 4
"""Narrower registers are not quicker."""

PADDING = 64
"""Elements that tables by column are longer than a row, for a last block that runs over its end."""


_STORED = {"float16": float16, "bfloat16": bfloat16, "bool": numba.uint8}


def stored_dtype(name):
    return _STORED.get(name) or getattr(numba, name or "uint8")


def lanes_for(dtype, width):
    """As many as fit a register, but no more than a row asks for."""
    lanes = native_lanes(dtype)
    while lanes > LEAST_LANES and lanes // 2 >= width:
        lanes //= 2
    return lanes


def itemsize(dtype):
    return dtype.bitwidth // 8


class _WholeMap:
    """The window of a global pooling, on tables."""

    def __init__(self, shape):
        self.kernel_size = self.stride = shape
        self.padding, self.dilation = (0, 0, 0), (1, 1, 1)

    def spans(self, axis, size):
        return np.zeros(1, int), np.zeros(1, int), np.full(1, size)

    def counts(self, axis, size, include_pad):
        return np.full(1, size)


class Tables:
    """A window's tables on one geometry; kept alive by the plan that holds their addresses."""

    def __init__(self, geometry):
        self.geometry, self.window = geometry, geometry.window or _WholeMap(geometry.shape[2:])
        self.sizes = geometry.shape[2:]
        self.found = [self.window.spans(axis, size) for axis, size in enumerate(self.sizes)]
        self.out = tuple(len(origin) for origin, _, _ in self.found)
        self.kept = []

    def _address(self, table):
        room = np.empty(table.nbytes + LINE, np.uint8)
        at = -room.ctypes.data % LINE
        room[at : at + table.nbytes] = np.ascontiguousarray(table).reshape(-1).view(np.uint8)
        self.kept.append(room)
        return room.ctypes.data + at

    def of_int64(self, table):
        return self._address(table.reshape(-1).astype(np.int64))

    def spans(self, axis):
        return self._address(np.stack(self.found[axis], 1).astype(np.int64))

    def whole(self, axis):
        """(first, end) of the outputs along an axis whose windows lie inside the input; (0, 0) where none does."""
        _, first, end = self.found[axis]
        inside = np.flatnonzero((first == 0) & (end == self.window.kernel_size[axis]))
        return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)

    def gathered(self, axis):
        """(first, end, at): the windows along an axis, not dilated, from whose beginning on ``stride`` positions lie inside the input, and
        in this window and the ones before it only, all of which exist; and where the first of them begins."""
        taps, stride, padding = self.window.kernel_size[axis], self.window.stride[axis], self.window.padding[axis]
        first = max(-(-taps // stride) - 1, -(-padding // stride))
        return first, min(self.out[axis], (self.sizes[axis] + padding) // stride), first * stride - padding

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

    def by_positions(self, maps, step, lanes, dtypes):
        """What ``flat`` reads: addresses of tables over every ``step``th position of so many maps: bits, from the second on, of which
        columns and rows are inside of a window there; of each register the lanes where windows are, and how many came before; the first tap
        inside of a window's first row and of the window, and counts by outputs, in ``dtypes``."""
        (_, rows, columns), steps, found = self.window.kernel_size, (1, step), []
        for axis, taps in enumerate((rows, columns), 1):
            origin, first, end = self.found[axis]
            size, numbers = self.sizes[axis] // steps[axis - 1], np.arange(taps)
            begins = (origin + self.window.padding[axis]) // steps[axis - 1]
            there, firsts, begun = np.zeros((size, taps), int), np.zeros(size, int), np.zeros(size, bool)
            there[begins], firsts[begins], begun[begins] = (first[:, None] <= numbers) & (numbers < end[:, None]), first, True
            found.append(((there << np.arange(taps)).sum(1), firsts, begun))
        (rows_there, first_h, begun_h), (columns_there, first_w, begun_w) = found
        words = 2 * (columns_there + (rows_there[:, None] << columns))
        begun = np.tile((begun_h[:, None] & begun_w).reshape(-1), maps).reshape(-1, lanes)
        firsts, counts = first_h[:, None] * columns + first_w, np.outer(self._count(1), self._count(2))
        tables = words, np.broadcast_to(first_w, firsts.shape), firsts, counts
        words, *tables = (np.tile(table.reshape(-1), maps) for table in tables)
        tables[2] = np.pad(tables[2], (0, lanes), constant_values=1)
        with np.errstate(all="ignore"):
            tables = [table.astype(dtype.name) for table, dtype in zip(tables, dtypes, strict=True)]
        chosen = np.argsort(~begun, axis=1, kind="stable").astype(np.int32), np.cumsum(begun.sum(1)) - begun.sum(1)
        return tuple(map(self._address, (words.astype(np.int32), *chosen, *tables)))

    def by_elements(self, maps, lanes, margin, dtype):
        """What ``flat.spread`` reads of so many maps: (addresses of the places of each element's output, from its register's first, which
        may not exist, but those before it; of these firsts; of the tap that the element is of each of its windows, -1 where there is no
        such window; of counts by outputs, in ``dtype``, with a margin on both sides; windows along both axes), or None where a register's
        outputs are further apart than it has lanes."""
        windows, found = [], []
        for axis in (1, 2):
            kernel, stride, size = self.window.kernel_size[axis], self.window.stride[axis], self.sizes[axis]
            at = np.arange(size) + self.window.padding[axis]
            windows.append(-(-kernel // stride))
            back = np.arange(windows[-1])[:, None]
            outputs, taps = at // stride - back, at % stride + back * stride
            found.append((at // stride, np.where((outputs >= 0) & (outputs < self.out[axis]) & (taps < kernel), taps, -1)))
        (rows, taps_h), (columns, taps_w) = found
        taps = taps_h[:, None, :, None] * self.window.kernel_size[2] + taps_w[None, :, None, :]
        taps = np.where((taps_h[:, None, :, None] >= 0) & (taps_w[None, :, None, :] >= 0), taps, -1).reshape(len(taps_h) * len(taps_w), -1)
        taps = np.tile(taps, maps)
        outputs = (rows[:, None] * self.out[2] + columns).reshape(-1) + np.arange(maps)[:, None] * (self.out[1] * self.out[2])
        outputs = outputs.reshape(-1, lanes)
        used = (taps >= 0).any(0).reshape(-1, lanes)
        firsts = np.where(used, outputs, outputs.max() + 1).min(1)
        firsts = np.where(used.any(1), firsts, 0)
        places = np.where(used, outputs - firsts[:, None], 0)
        if places.max() >= lanes:
            return None
        with np.errstate(all="ignore"):
            counts = np.outer(self._count(1), self._count(2)).astype(dtype.name)
        counts = np.pad(np.tile(counts.reshape(-1), maps), margin, constant_values=1)
        return tuple(map(self._address, (places.astype(np.int32), firsts, taps.astype(np.int32), counts))), windows

    @property
    def once(self):
        """Whether every position lies in exactly one window."""
        return all((np.diff(self._pairs(axis)[0]) == 1).all() for axis in range(3))

    def _count(self, axis):
        """Along one axis; a divisor stands for rows."""
        if self.geometry.divisor is not None:
            return np.full(self.out[axis], self.geometry.divisor if axis == 1 else 1)
        return self.window.counts(axis, self.sizes[axis], self.geometry.include_pad)

    @property
    def inside(self):
        """Whether all windows lie inside the input."""
        found = zip(self.found, self.window.kernel_size, strict=True)
        return all((first == 0).all() and (end == taps).all() for (_, first, end), taps in found)

    def uniform(self, kind):
        """Whether what an output gives to its elements is the same part of its gradient everywhere."""
        return not kind.selects and kind.linear and self.even

    @property
    def even(self):
        """Whether all outputs have the same count."""
        return all(len(set(self._count(axis))) == 1 for axis in range(3))

    @property
    def count(self):
        """That of the first output."""
        return int(np.prod([self._count(axis)[0] for axis in range(3)]))

    def counts(self, margin=0):
        """Addresses for D, H and W; the last readable ``margin`` elements before its first, too."""
        dtype = number(stored_dtype(self.geometry.dtype)).name
        tables = [self._count(axis) for axis in range(3)]
        tables[2] = np.pad(tables[2], (margin, margin + PADDING), constant_values=1)
        with np.errstate(all="ignore"):  # small integers compute no average
            depth, height, width = (self._address(table.astype(dtype)) for table in tables)
        return depth, height, width + margin * np.dtype(dtype).itemsize

    def steps(self, axes=3):
        """The strides of the first axes, dilated."""
        return tuple(self.window.dilation[axis] * self.geometry.strides[2 + axis] for axis in range(axes))
