"""Which nest runs a pooling on the CPU: the first that fits, of those in FORWARD and BACKWARD.

Each candidate answers with a ``Choice``, or None.  The numbers that draw the lines between them were measured where a comment says so.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..geometry import Geometry, dense_strides
from ..simd import LINE, native_lanes, number
from . import across, ahead, bins, contiguous, few, flat, narrow, rows, separable, small, whole_map, whole_plane
from . import channels_last as last
from .blocking import l3_bytes
from .geometry import Tables, itemsize, lanes_for, stored_dtype
from .reduction import can_carry, index, members

MOST_TAPS, MOST_STRIDE = 8, 4
"""Windows up to this many columns are unrolled and strides up to this share their loads; beyond, one kernel serves all sizes."""

JOBS = 16
"""A batch of fewer planes is split into bands of rows until there are about this many jobs."""

PAST = min(64 << 20, l3_bytes() // 2)
"""Bytes of a result from which on it is written past the caches (``simd.store_past``).  Of 480 MB for 60 cores (a Xeon) 25 MB were written
twice as fast through L3, 100 MB 2.5 times as fast past it.  Of 32 MB (Zen 5, one thread): 25 MB, 8x256x56x56 channels_last, forward and
backward in turns, ms: max 2x2 s1 4.0 through it and 2.5 past it, s2 2.4 and 1.9, avg 2x2 s1 3.3 and 1.7; 13 MB mixed on two threads."""

MOST_ROWS = 3
"""Rows, columns and strides of the windows that are written out whole: the usual ones, or every odd window would cost a compilation."""

MOST_SQUARE = (24, 9), (0, 5)
"""(columns of a map, rows and columns of the largest square window of stride 1 that is written out, for maps of so many and more): beyond,
it pays to share what windows that overlap have in common.

us a call, one core (Zen 5), max, so and by ``separable``: 64x56x56 5x5 53 and 141, 9x9 85 and 170, 13x13 131 and 170; 512x112x112 5x5 1,950
and 3,090, 9x9 2,840 and 3,850, 13x13 4,260 and 3,920; 4096x20x20 5x5 680 and 870, 9x9 1,450 and 1,100.
"""

LARGE_WINDOW = 16
"""Taps of a window of stride 1 from which on its rows and columns are reduced apart."""

NARROW, PADDED = 128, 256
"""Elements of a contiguous map up to which lanes run across planes: of any map; of one with padding and strided windows, or windows of
MANY_TAPS, which would be copied between margins anyway.

us a call, one core of a Xeon with AVX-512, lanes along rows and across planes: max 3x3 s2 p1 64x512x7x7 1,290 and 480, 8x512x14x14
317 and 225; 2x2 s2 64x512x7x7 460 and 320, but 8x512x14x14 138 and 200; as far as a batch finds room, large windows, 8x256x28x28
5x5 s1 2,050 and 1,210.  On Zen 5: bins of several sizes, 32x64x32x32 to 7x7, max 900 and 400, but 8x64x31x31 to 2x2 62 and 82; 3x3 s1 p1 of
8x512x14x14, max 392 and 282, avg 303 and 242, max that saves 525 and 373; 2x2 s2 78 and 129.
"""

MANY_TAPS = 9
"""Taps of a window that are more than the copying there and back."""

FLAT, TINY, FLAT_SQUARE = 1024, 64, ((24, 13), (0, 9))
"""Elements of a contiguous map up to which maps are pooled as one long row: of padded windows whose strides, if any, divide rows; of
windows that lie inside, where a state is one number; and as MOST_SQUARE.

us a call, one core (Zen 5), max, by what else there is and so: 3x3 s1 p1 of 64x512x7x7 770 and 270, 8x512x14x14 279 and 134, 32x64x32x32
391 and 322, with what backward needs 860 and 510, 393 and 252, 625 and 569; but 8x256x40x40 853 and 947.  3x3 s2 p1 of 8x512x14x14 156 and
110, 32x64x32x32 317 and 249; of 8x512x13x13 151 and 159.  9x9 of 8x512x14x14 468 and 368, 13x13 479 and 569, of 32x64x32x32 2,270 and
1,440.  Inside: 2x2 s2 of 64x512x7x7 300 and 220, 8x512x14x14 73 and 84, 3x2 s2 351 and 317, 86 and 88.
"""


FLAT_TAPS, SPREAD, SPREAD_ANY = 5, 4, 256
"""Of gradients as one long row: rows and columns of the largest window of stride 1 that is gathered from; the most windows that an element
may lie in otherwise, of maps of more than so many elements; whole maps are spread up to those.

us a call, one core (Zen 5), by ``narrow`` or ``rows`` and so: max 2x2 s2 of 64x512x7x7 340 and 140, 8x512x14x14 165 and 76, 32x64x32x32 366
and 199; whole maps of 64x512x7x7 302 and 136, 16x512x10x10 167 and 74, 8x512x14x14 94 and 72, but 32x64x32x32 130 and 199; 3x2 s2 379 and
194, 167 and 101, 367 and 237; 3x3 s2 p1 408 and 332, 184 and 169, 412 and 420; 2x2 s1 574 and 345, 297 and 178.
"""

WIDE, SHORT = 16, 8
"""Outputs of a row up to which ``small`` is better than ``rows``: of numbers of fewer than 32 bits, whose registers are wide, and of
windows inside the map, which it reads where they lie, if what they choose is saved (else always).

us a call, one core (Zen 5), by ``rows`` and by ``small``: int8, max 3x3 s2 p1 of 16x16 125 and 85; max 3x2 s2 of 18x18 88 and 62; that
saves, 3x3 s2 of 14x14 162 and 130, of 24x24 93 and 113.
"""


class Choice(NamedTuple):
    """A factory of workers and its constants, how many jobs, the arguments that do not change, and the tables they point to."""

    nest: Any
    constants: tuple
    jobs: int
    sizes: tuple
    tables: Any = ()
    streams: bool = False
    """Of all that it reads next to nothing is made or written."""


class Asked(NamedTuple):
    """A pooling, and the Numba dtypes of what is read and written, and saved."""

    kind: Any
    geometry: Geometry
    dtype: Any
    kept: Any
    saves: bool = False
    """Whether this call writes what is saved (forward)."""

    def on(self, geometry):
        """The same of numbers that are as wide in memory as in registers, on another geometry."""
        return self._replace(geometry=geometry, dtype=number(self.dtype))


def forward(asked):
    """The ``Choice`` for a pooling.  Arguments before its sizes: x, y, saved; after them: the seed's two halves, the parameters."""
    asked = asked._replace(geometry=_merged(asked.kind, asked.geometry))
    return next(choice for candidate in FORWARD if (choice := candidate(asked)))


def backward(asked):
    """The ``Choice`` for a gradient.  Arguments before its sizes: gx, gy, saved, x, y; after them: the parameters."""
    asked = asked._replace(geometry=_merged(asked.kind, asked.geometry))
    return next(choice for candidate in BACKWARD if (choice := candidate(asked)))


def mirrored(asked):
    """The ``Choice`` of the forward pass that a gradient is: at stride 1 an element's share of averages of equal counts is the average of
    their gradients, over as many, with padding where theirs had none.  None: it is not one.

    us a call, one core (Zen 5), gathered and so: 8x512x14x14 3x3 s1 p1 280 and 160, 64x512x7x7 5x5 1,340 and 480; 8x256x56x56 3,090 and
    2,080.
    """
    kind, geometry, window = asked.kind, asked.geometry, asked.geometry.window
    if kind.selects or not kind.linear or window is None or not window.regular or max(window.stride) > 1:
        return None
    padding = tuple(extent - 1 - pad for extent, pad in zip(window.extent, window.padding, strict=True))
    tables = Tables(geometry)
    shape, out = (*geometry.shape[:2], *tables.out), geometry.shape[2:]
    turned = geometry._replace(
        shape=shape,
        strides=dense_strides(shape[1], tables.out, geometry.channels_last),
        window=replace(window, padding=padding),
        include_pad=True,
    )
    if not tables.even or tables.count != Tables(turned).count or turned.window.output_size(*tables.out) != out:
        return None
    if _elements(*out) > 2 * _elements(*tables.out):
        return None  # most of what is read would be padding
    if _elements(*out) <= FLAT and out != tables.out and not geometry.channels_last:
        return None  # spread: 2x2 s1 of 8x512x14x14 160 us, 320 so
    return forward(asked._replace(geometry=turned))


def _covers(kind, geometry):
    """Whether a window is one over the whole map, which ``kind`` may be asked for as such.

    us a call, one core (Zen 5), contiguous, as a window and as a whole map: avg 64x512x7x7 256 and 117, 8x512x14x14 152 and 42, max 185,
    57.
    """
    window, sizes = geometry.window, geometry.shape[2:]
    if not window.regular or not kind.combine or kind.draws or (kind.selects and kind.survey) or geometry.divisor is not None:
        return False
    return tuple(window.kernel_size) == tuple(sizes) and max(window.padding) == 0 and tuple(window.output_size(*sizes)) == (1, 1, 1)


def _merged(kind, geometry):
    """The geometry of a global pooling, as such, with the axes that follow each other in memory made one: its taps are numbered as
    before."""
    if geometry.window is not None and not _covers(kind, geometry):
        return geometry
    geometry = geometry._replace(window=None)
    (n, c, *sizes), (sn, sc, *strides) = geometry.shape, geometry.strides
    if not geometry.channels_last and sizes[-1] == 1:
        strides[-1] = 1  # the step of an axis of one element may be anything: that of a column of a larger tensor, not to go along it
    while (len(sizes) > 1 and strides[-2] == sizes[-1] * strides[-1]) or (len(sizes) > 1 and sizes[-2] == 1):
        sizes[-2:] = [sizes[-2] * sizes[-1]]
        strides[-2:] = [strides[-1]]
    pad = (1,) * (3 - len(sizes))
    return geometry._replace(shape=(n, c, *pad, *sizes), strides=(sn, sc, *(0 for _ in pad), *strides))


def _goes_past(dtype, elements, row):
    """Whether what is written, in rows of so many elements, should not go through the caches."""
    return elements * itemsize(dtype) >= PAST and row * itemsize(dtype) % LINE == 0


def _elements(*shape):
    return int(np.prod(shape))


# Lanes across planes


def _can_lie_across(geometry, dtype):
    """Whether lanes can run across planes: contiguous maps without gaps, of numbers of 32 bits or more, enough for one register."""
    sizes, dense = geometry.shape[2:], dense_strides(1, geometry.shape[2:], False)[2:]
    together = all(size == 1 or step == next_to for size, step, next_to in zip(sizes, geometry.strides[2:], dense, strict=True))
    enough = geometry.shape[0] * geometry.shape[1] * sizes[0] >= native_lanes(dtype)
    return together and enough and not geometry.channels_last and number(dtype).bitwidth >= 32


def _group(dtype, planes, cells, least):
    """How many registers of planes a batch is of, whose maps take so many cells: as many as L1 holds, and there are planes for."""
    lanes, group = native_lanes(dtype), 4
    while group > least and (cells * group * lanes * itemsize(number(dtype)) > across.CACHED or planes <= group * lanes // 2):
        group //= 2
    return group


def _is_square_window(geometry, limits):
    """Of stride 1 and no more rows and columns than ``limits``, as MOST_SQUARE, says."""
    window, most = geometry.window, next(most for least, most in limits if geometry.shape[4] >= least)
    (depth, *kernel), steps = window.kernel_size, (*window.stride, *window.dilation)
    return window.regular and depth == 1 and kernel[0] == kernel[1] <= most and max(steps) == 1 and window.padding[0] == 0


def _goes_by_rows(geometry):
    """Whether ``rows`` has the window written out."""
    return _is_small_window(geometry.window) or _is_square_window(geometry, MOST_SQUARE)


def _is_small_window(window):
    (depth, *kernel), dense = window.kernel_size, max(window.dilation) == 1 and window.stride[0] == 1 and window.padding[0] == 0
    return window.regular and depth == 1 and dense and max(*kernel, *window.stride) <= MOST_ROWS


def _planes(geometry):
    """(planes, C, x's strides of N and C), every slice a plane."""
    n, channels, depth = geometry.shape[:3]
    sn, sc, sd = geometry.strides[:3]
    return n * channels * depth, channels * depth, sn, sd if depth > 1 else sc


def _are_planes(geometry):
    """Whether ``_planes`` says where every plane is."""
    depth = geometry.shape[2]
    return not geometry.channels_last and (depth == 1 or geometry.strides[1] == depth * geometry.strides[2])


def _narrow_forward(asked):
    kind, geometry, dtype, kept, saves = asked
    window, (height, width) = geometry.window, geometry.shape[3:]
    if window is None or kind.draws or not _is_small_window(window) or not _can_lie_across(geometry, dtype) or not _are_planes(geometry):
        return None
    copied = max(window.padding) > 0 and (max(window.stride) > 1 or window.taps >= MANY_TAPS)
    if height * width > (PADDED if copied else NARROW):
        return None
    (_, kh, kw), (_, sh, sw), (_, ph, pw) = window.kernel_size, window.stride, window.padding
    out_h, out_w = window.output_size(*geometry.shape[2:])[1:]
    rows, columns = max(ph + height, (out_h - 1) * sh + kh), max(pw + width, (out_w - 1) * sw + kw)
    planes, lanes = _planes(geometry), native_lanes(dtype)
    group = _group(dtype, planes[0], rows * columns + out_h * out_w, 2)
    if max(rows * columns, out_h * out_w) * group * lanes > across.ROOM:
        return None
    tables = Tables(geometry)
    places = (np.arange(height) + ph)[:, None] * columns + np.arange(width) + pw
    corners = np.arange(out_h)[:, None] * (sh * columns) + np.arange(out_w) * sw
    sizes = (
        tables.of_int64(places), tables.of_int64(corners), *tables.by_blocks(1, 1, (number(dtype), index(dtype, kept))), *planes,
        height * width, out_h * out_w, rows * columns, columns,
    )  # fmt: skip
    return Choice(narrow.forward, (kind, dtype, kept, saves, lanes, group, kh, kw), -(-planes[0] // (group * lanes)), sizes, tables)


def _batches(asked):
    """(a batch of planes as the image that the nest of ``across`` sees, batches, elements of a map, of its output), or None where maps are
    better pooled as they lie."""
    kind, geometry, dtype = asked[:3]
    n, channels, *sizes = geometry.shape
    window, lanes, length, most = geometry.window, native_lanes(dtype), _elements(*sizes), NARROW
    if (window and not window.regular) or _is_separable(kind, geometry):
        most = across.ROOM // lanes
    outputs = _elements(*window.output_size(*sizes)) if window else 1
    if length > most or outputs * lanes > across.ROOM or n * channels < lanes or not _can_lie_across(geometry, dtype):
        return None
    batch = _group(dtype, n * channels, length + outputs, 1) * lanes
    strides = 0, *dense_strides(batch, sizes, True)[1:]
    image = geometry._replace(dtype=number(dtype).name, shape=(1, batch, *sizes), strides=strides, channels_last=True)
    return image, -(-n * channels // batch), length, outputs


def _across_forward(asked):
    length = _elements(*asked.geometry.shape[2:])
    if asked.geometry.window and length > NARROW and can_carry(asked.kind) and _goes_by_rows(asked.geometry):
        return None  # by rows
    if not (how := _batches(asked)):
        return None
    (image, batches, length, outputs), (n, channels), (sn, sc) = how, asked.geometry.shape[:2], asked.geometry.strides[:2]
    inner = forward(asked.on(image))
    more = len(inner.sizes) + 2 + len(asked.kind.parameters)
    sizes = n * channels, channels, sn, sc, length, outputs, image.shape[1], inner.jobs, more, *inner.sizes
    constants = asked.dtype, asked.kept, asked.saves, native_lanes(asked.dtype), inner.nest, *inner.constants
    return Choice(across.forward, constants, batches, sizes, inner.tables)


def _across_backward(asked):
    if not (how := _batches(asked)):
        return None
    (image, batches, length, outputs), (n, channels), (sn, sc) = how, asked.geometry.shape[:2], asked.geometry.strides[:2]
    inner = backward(asked.on(image))
    more = len(inner.sizes) + len(asked.kind.parameters)
    sizes = n * channels, channels, sn, sc, length, outputs, image.shape[1], inner.jobs, more, *inner.sizes
    lanes = native_lanes(asked.dtype)
    together = lanes // 2 if lanes >= 8 and length * itemsize(asked.dtype) % across.ALIAS == 0 else lanes
    constants = asked.kind, asked.dtype, asked.kept, lanes, together, inner.nest, *inner.constants
    return Choice(across.backward, constants, batches, sizes, inner.tables)


# Maps as one long row


def _flat_forward(asked):
    kind, geometry, dtype, kept, saves = asked
    window, (n, channels, _, height, width) = geometry.window, geometry.shape
    if window is None or height * width > FLAT or not can_carry(kind) or not _can_lie_across(geometry, dtype) or not _are_planes(geometry):
        return None
    if not (_is_small_window(window) or _is_square_window(geometry, FLAT_SQUARE)):
        return None
    planes, channels, sn, sc = _planes(geometry)
    (_, kh, kw), (_, sh, sw), (_, ph, pw) = window.kernel_size, window.stride, window.padding
    tables, length, step = Tables(geometry), height * width, sw if width % sw == 0 else 1
    (out_h, out_w), inside, pitch = tables.out[1:], tables.inside, width // step
    several = saves or (not kind.selects and len(members(kind, None)) > 1)
    if (length > TINY or several) if inside else step < sw:
        return None
    if (out_h - 1) * sh >= height or (out_w - 1) * sw >= width or max(ph, kh - 1 - ph) * width + kw > flat.MARGIN:
        return None
    runs, maps = (1, planes) if n == 1 or sn == channels * length else (n, channels)
    if (maps > 1 and sc != length) or not (group := flat.batch(native_lanes(dtype), height * pitch, length, maps)):
        return None
    batches, dtypes = -(-maps // group), (index(dtype, kept), index(dtype, kept), number(dtype))
    sizes = (
        *tables.by_positions(group, step, native_lanes(dtype), dtypes), sn, maps, batches, group, length, width, out_h * out_w,
        geometry.end,
    )  # fmt: skip
    everywhere, even = (out_h, out_w) == (height, pitch), kind.selects or tables.even
    constants = kind, dtype, kept, saves, native_lanes(dtype), kh, kw, step, ph, pw, inside, everywhere, even
    return Choice(flat.forward, constants, runs * batches, sizes, tables)


def _flat_backward(asked):
    kind, geometry, dtype, kept, _ = asked
    window, width = geometry.window, geometry.shape[4]
    if not kind.selects or window is None or geometry.channels_last or not window.regular:
        return None
    (depth, kh, kw), (_, ph, pw), steps = window.kernel_size, window.padding, (*window.stride, *window.dilation)
    everywhere = tuple(window.output_size(*geometry.shape[2:])) == tuple(geometry.shape[2:])
    if depth > 1 or max(steps) > 1 or max(kh, kw) > FLAT_TAPS or not everywhere:
        return None
    total, lanes = _elements(*geometry.shape), native_lanes(dtype)
    together, run = (flat.TOGETHER, width) if width >= flat.WIDE else (1, min(total, flat.NEAR))
    block = together * run
    if block > total or block + kh * width + kw + 2 * lanes > flat.REACHED:
        return None
    several, past = max(1, flat.NEAR // block), together > 1 and _goes_past(dtype, total, width)
    sizes = total, width, run, several, ahead.distance_in(dtype, total)
    return Choice(flat.backward, (kind, dtype, kept, lanes, kh, kw, ph, pw, together, past), -(-total // (block * several)), sizes)


def _flat_spread(asked):
    kind, geometry, dtype, kept, _ = asked
    window, (height, width) = geometry.window, geometry.shape[3:]
    if geometry.channels_last or height * width > FLAT or not (kind.selects or kind.linear) or number(dtype).bitwidth < 32:
        return None
    if geometry.shape[2] > 1 or height * width > SPREAD_ANY if window is None else not _is_small_window(window):
        return None
    tables, lanes, planes = Tables(geometry), native_lanes(dtype), _elements(*geometry.shape[:3])
    group = flat.batch(lanes, height * width, height * width, planes)
    if not group or not (found := tables.by_elements(group, lanes, flat.MARGIN, number(dtype))):
        return None
    addresses, (down, across) = found
    out_h, out_w = tables.out[1:]
    if group * out_h * out_w > flat.ROOM or down * out_w + across + lanes > flat.MARGIN:
        return None
    if down * across > SPREAD and height * width > SPREAD_ANY:
        return None
    sizes = *addresses, planes, group, height * width, out_h * out_w, out_w
    constants = kind, dtype, kept, lanes, across, down, kind.selects or tables.even
    return Choice(flat.spread, constants, -(-planes // group), sizes, tables)


# Large windows


def _is_separable(kind, geometry):
    """Whether the time had better not depend on the window's area."""
    window = geometry.window
    if window is None or not window.regular or not can_carry(kind) or max(window.stride) > 1 or max(window.dilation) > 1:
        return False
    depth, *kernel = window.kernel_size
    fits = depth == 1 and max(kernel) <= separable.MOST and max(geometry.shape[3:]) < separable.LARGEST_MAP
    return fits and kernel[0] * kernel[1] >= LARGE_WINDOW


def _separable_jobs(geometry, lanes):
    n, channels, depth = geometry.shape[:3]
    return n * depth * (-(-channels // lanes) if geometry.channels_last else channels)


def _separable_forward(asked):
    kind, geometry, dtype, kept, saves = asked
    if not _is_separable(kind, geometry):
        return None
    lanes, tables, window = lanes_for(dtype, geometry.shape[1 if geometry.channels_last else 4]), Tables(geometry), geometry.window
    sizes = (
        *tables.counts(), *geometry.shape[1:], *tables.out[1:], *geometry.strides, *window.kernel_size[1:], *window.padding[1:],
    )  # fmt: skip
    constants = kind, dtype, kept, saves, lanes, geometry.channels_last, False
    return Choice(separable.forward, constants, _separable_jobs(geometry, lanes), sizes, tables)


def _scatter(asked):
    kind, geometry, dtype, kept, _ = asked
    if not kind.selects or not _is_separable(kind, geometry) or number(dtype) != dtype:
        return None
    n, channels, depth, height, width = geometry.shape
    tables = Tables(geometry)
    sizes = tables.spans(1), tables.spans(2), tables.offsets(), channels, height, width, *tables.out[1:], geometry.window.taps
    jobs = n * depth * (1 if geometry.channels_last else channels)
    return Choice(separable.scatter, (dtype, kept, geometry.channels_last), jobs, sizes, tables)


def _separable_backward(asked):
    kind, geometry, dtype, kept, _ = asked
    if kind.selects or not kind.gives or not _is_separable(kind, geometry):
        return None
    _, channels, depth, height, width = geometry.shape
    lanes, tables, window = lanes_for(dtype, channels if geometry.channels_last else width), Tables(geometry), geometry.window
    padding = (k - 1 - p for k, p in zip(window.kernel_size[1:], window.padding[1:], strict=True))
    sizes = (
        *tables.counts(separable.MOST), channels, depth, *tables.out[1:], height, width,
        *dense_strides(channels, tables.out, geometry.channels_last), *window.kernel_size[1:], *padding, *geometry.strides,
    )  # fmt: skip
    constants = kind, dtype, kept, False, lanes, geometry.channels_last, True
    return Choice(separable.forward, constants, _separable_jobs(geometry, lanes), sizes, tables)


# channels_last


def _has_few_channels(kind, geometry):
    """Whether ``few`` can run it: images without gaps, one slice deep, of windows whose columns share loads or that lie side by side."""
    channels, *sizes = geometry.shape[1:]
    dense = dense_strides(channels, sizes, True)
    together = all(size == 1 or step == next_to for size, step, next_to in zip(sizes, geometry.strides[2:], dense[2:], strict=True))
    window = geometry.window
    fits = _lies_side_by_side(kind, window) or window.stride[2] <= MOST_STRIDE
    return geometry.channels_last and 1 < channels <= few.MOST and together and sizes[0] == 1 and fits


def _bands_of_few(asked, rows, width, needed, lengths):
    """(bands of an image, rows of a band, first and end of the rows of the other side that each needs, the most of them): as many rows as
    fit, but bands enough for every thread; None where not even one row does."""
    channels, band = asked.geometry.shape[1], -(-rows // JOBS)
    while band:
        spans = [needed(first, min(rows, first + band)) for first in range(0, rows, band)]
        most = max(end - first for first, end in spans)
        if channels * (max(band * width, most * lengths) + few.STEP) <= few.ROOM:
            return len(spans), band, spans, most
        band //= 2
    return None


def _rows(window, height):
    """Of each row of outputs the first tap inside, the end of those, and their first and last rows of the input."""
    origin, first, end = window.spans(1, height)
    return first, end, origin + first * window.dilation[1], origin + (end - 1) * window.dilation[1]


def _few_planes(geometry, step):
    """An image's channels as the planes that the nest of contiguous maps sees, ``step`` elements apart."""
    (_, channels, *sizes), width = geometry.shape, geometry.shape[4]
    return geometry._replace(
        dtype=number(stored_dtype(geometry.dtype)).name,
        shape=(1, channels, *sizes),
        strides=(0, step, 0, width, 1),
        channels_last=False,
    )


def _few_forward(asked):
    kind, geometry, dtype, kept, saves = asked
    window = geometry.window
    if window is None or not _has_few_channels(kind, geometry):
        return None
    if len(members(kind, None)) == 1 and _lies_side_by_side(kind, window):
        return None  # one short chain of sums needs no full lanes: 1x3x224x224 to 7x7, avg 33 us so and 24 as it lies, max 41 and 80
    n, channels, _, height, width = geometry.shape
    out_h, out_w = window.output_size(*geometry.shape[2:])[1:]
    first, end, low, high = _rows(window, height)

    def needed(start, stop):
        holds = first[start:stop] < end[start:stop]
        return (int(low[start:stop][holds].min()), int(high[start:stop][holds].max()) + 1) if holds.any() else (0, 0)

    if not (how := _bands_of_few(asked, out_h, out_w, needed, width)):
        return None
    bands, band, spans, most = how
    planes = asked.on(_few_planes(geometry, most * width + few.STEP))
    inner = _bins_forward(planes) or _contiguous_forward(planes, (bands, band))
    sizes = (
        inner.tables.of_int64(np.array(spans)), geometry.strides[0], height, width, out_h, out_w, bands, band, most * width + few.STEP,
        len(inner.sizes) + 2 + len(kind.parameters), *inner.sizes,
    )  # fmt: skip
    constants = dtype, kept, saves, native_lanes(dtype), channels, inner.nest, *inner.constants
    return Choice(few.forward, constants, n * bands, sizes, inner.tables)


def _few_backward(asked):
    kind, geometry, dtype, kept, _ = asked
    window = geometry.window
    if window is None or not _has_few_channels(kind, geometry):
        return None
    n, channels, _, height, width = geometry.shape
    out_h, out_w = window.output_size(*geometry.shape[2:])[1:]
    first, end, low, high = _rows(window, height)

    def needed(start, stop):
        holds = np.flatnonzero((low < stop) & (high >= start) & (first < end))
        return (int(holds[0]), int(holds[-1]) + 1) if len(holds) else (0, 0)

    if not (how := _bands_of_few(asked, height, width, needed, out_w)):
        return None
    bands, band, spans, most = how
    planes = asked.on(_few_planes(geometry, band * width + few.STEP))
    inner = _bins_backward(planes) or _contiguous_backward(planes, (bands, band))
    sizes = (
        inner.tables.of_int64(np.array(spans)), geometry.strides[0], height, width, out_h, out_w, bands, band, most * out_w + few.STEP,
        len(inner.sizes) + len(kind.parameters), *inner.sizes,
    )  # fmt: skip
    constants = kind, dtype, kept, native_lanes(dtype), channels, inner.nest, *inner.constants
    return Choice(few.backward, constants, n * bands, sizes, inner.tables)


def _few_whole_forward(asked):
    kind, geometry, dtype, kept, saves = asked
    if geometry.window is not None or not _has_few_channels(kind, geometry):
        return None
    n, channels, *sizes = geometry.shape
    constants = kind, dtype, kept, saves, native_lanes(dtype), channels
    return Choice(few.whole_forward, constants, n, (_elements(*sizes), geometry.strides[0]))


def _few_whole_backward(asked):
    kind, geometry, dtype, kept, _ = asked
    if geometry.window is not None or not _has_few_channels(kind, geometry):
        return None
    n, channels, _, height, width = geometry.shape
    constants = kind, dtype, kept, native_lanes(dtype), channels
    return Choice(few.whole_backward, constants, n * height, (height, width, geometry.strides[0]))


def _whole_map_forward(asked):
    kind, geometry, dtype, kept, saves = asked
    if not geometry.channels_last or geometry.window is not None:
        return None
    (n, channels, *sizes), (sn, _, *steps) = geometry.shape, geometry.strides
    lanes = lanes_for(dtype, channels)
    group = whole_map.group(kind, saves, lanes, channels, sizes[2])
    arguments = channels, *sizes, sn, *steps, sizes[0] == sizes[1] == 1
    constants = kind, dtype, kept, saves, lanes, group, whole_map.asks(kind, saves, _elements(*geometry.shape) * itemsize(dtype))
    return Choice(whole_map.forward, constants, n * -(-channels // (group * lanes)), arguments, streams=True)


def _whole_map_backward(asked):
    kind, geometry, dtype, kept, _ = asked
    if not geometry.channels_last or geometry.window is not None:
        return None
    (n, channels, *sizes), (sn, _, *steps) = geometry.shape, geometry.strides
    constants = kind, dtype, kept, lanes_for(dtype, channels), _goes_past(dtype, _elements(*geometry.shape), channels)
    return Choice(whole_map.backward, constants, n * sizes[0] * sizes[1], (channels, *sizes, sn, *steps, 0))


def _written_out(window, lanes, channels):
    """What of a window of channels_last is written out: all, if its rows, columns and strides are few and channels fill registers."""
    sizes = *window.kernel_size[1:], *window.stride[1:]
    together = next((several for several in (last.GROUP, 2, 1) if channels % (several * lanes) == 0), 0)
    if not window.regular or window.kernel_size[2] > MOST_ROWS:
        return last.NOTHING
    if together and max(sizes) <= MOST_ROWS:
        return last.WrittenOut(together, window.kernel_size[0] > 1, *sizes)
    return last.NOTHING._replace(columns=window.kernel_size[2])


def _channels_last_forward(asked):
    kind, geometry, dtype, kept, saves = asked
    if not geometry.channels_last:
        return None
    n, channels = geometry.shape[:2]
    lanes, tables, window, (sn, _, *steps) = lanes_for(dtype, channels), Tables(geometry), geometry.window, geometry.strides
    sizes = (
        *map(tables.spans, range(3)), *tables.counts(), channels, *tables.out, sn, *steps, geometry.end, *tables.steps(),
        *window.kernel_size, *window.stride[1:], *tables.whole(2), ahead.distance_in(dtype, _elements(*geometry.shape)),
    )  # fmt: skip
    past, within = _goes_past(dtype, _elements(n, channels, *tables.out), channels), _written_out(window, lanes, channels)
    constants = kind, dtype, kept, saves, lanes, last.group(kind, lanes, channels, within), within, past
    return Choice(last.forward, constants, n * tables.out[0] * tables.out[1], sizes, tables)


def _channels_last_backward(asked):
    kind, geometry, dtype, kept, _ = asked
    if not geometry.channels_last:
        return None
    n, channels, depth, height, _ = geometry.shape
    lanes, tables, window, (sn, _, *steps) = lanes_for(dtype, channels), Tables(geometry), geometry.window, geometry.strides
    uniform, within = tables.uniform(kind), _written_out(window, lanes, channels)
    if not within.together or window.dilation[2] > 1 or (uniform and window.stride[2] == 1):
        within = last.NOTHING  # uniform, of stride 1: nothing is shared (avg 2x2 of 64x512x7x7 180 us, together 241)
    sizes = (
        *map(tables.windows, range(3)), *tables.counts(), *geometry.shape[1:], *tables.out, sn, *steps, geometry.end,
        *window.kernel_size, _elements(n, channels, *tables.out), *(tables.gathered(2) if within.together else (0, 0, 0)),
        ahead.distance_in(dtype, _elements(*geometry.shape)),
    )  # fmt: skip
    group, past = min(last.GROUP, last.group(kind, lanes, channels, within)), _goes_past(dtype, _elements(*geometry.shape), channels)
    constants = kind, dtype, kept, lanes, group, uniform, past, within
    return Choice(last.backward, constants, n * depth * height, sizes, tables)


# contiguous


def _lies_side_by_side(kind, window):
    """Whether the lanes of a register are best laid inside one window."""
    if window is None or not window.regular:
        return True
    return bool(kind.combine) and window.stride[2] > MOST_STRIDE and window.dilation[2] == 1


def _whole_plane_forward(asked):
    kind, geometry, dtype, kept, saves = asked
    (n, channels, *outer, length), (sn, sc, *_), lanes = geometry.shape, geometry.strides, native_lanes(dtype)
    if geometry.window is not None or geometry.channels_last or max(outer) > 1:
        return None
    if length < lanes and _can_lie_across(geometry, dtype):
        return None
    together = whole_plane.TOGETHER if length <= whole_plane.SMALL and n * channels >= whole_plane.TOGETHER * JOBS else 1
    constants = kind, dtype, kept, saves, lanes, together
    sizes = n * channels, channels, sn, sc, length
    return Choice(whole_plane.forward, constants, -(-n * channels // together), sizes, streams=True)


def _bins_forward(asked):
    kind, geometry, dtype, kept, saves = asked
    if not _lies_side_by_side(kind, geometry.window):
        return None
    tables = Tables(geometry)
    sizes = (
        *map(tables.spans, range(3)), *tables.counts(), geometry.shape[1], *tables.out, *geometry.strides[:4], geometry.end,
        *tables.steps(2), *tables.window.kernel_size,
    )  # fmt: skip
    jobs = _elements(*geometry.shape[:2], *tables.out[:2])
    return Choice(bins.forward, (kind, dtype, kept, saves, native_lanes(dtype)), jobs, sizes, tables)


def _bins_backward(asked):
    kind, geometry, dtype, kept, _ = asked
    if not _lies_side_by_side(kind, geometry.window):
        return None
    tables = Tables(geometry)
    sizes = (
        tables.windows(0), tables.windows(1), tables.spans(2), *tables.counts(), *geometry.shape[1:], *tables.out, *geometry.strides[:4],
        *tables.window.kernel_size,
    )  # fmt: skip
    once, several = tables.once, tables.out[2] > 1  # of one window a row nothing needs to be spread
    if once and several and geometry.shape[4] <= bins.CHUNK:
        return Choice(bins.spread, (kind, dtype, kept, native_lanes(dtype)), _elements(*geometry.shape[:4]), sizes, tables)
    past = geometry.window is None and _goes_past(dtype, _elements(*geometry.shape), geometry.shape[4])
    return Choice(bins.backward, (kind, dtype, kept, native_lanes(dtype), once, past), _elements(*geometry.shape[:4]), sizes, tables)


def _rounded(size, step):
    return -(-size // step) * step


def _registers(dtype, width, height):
    """(lanes of a row, rows in a register)."""
    lanes, together = lanes_for(dtype, width), 1
    while lanes * together < native_lanes(dtype) and width <= lanes and 2 * together <= height:
        together *= 2
    return lanes, together


def _rows_forward(asked):
    kind, geometry, dtype, kept, saves = asked
    window = geometry.window
    if window is None or not _are_planes(geometry) or not can_carry(kind):
        return None
    if not _goes_by_rows(geometry):
        return None
    (_, kh, kw), (_, sh, sw), (_, ph, pw) = window.kernel_size, window.stride, window.padding
    tables, (height, width) = Tables(geometry), geometry.shape[3:]
    out_h, out_w = tables.out[1:]
    whole_rows, whole_columns = ph == 0 and (out_h - 1) * sh + kh <= height, pw == 0 and (out_w - 1) * sw + kw <= width
    if not (apart := whole_rows and sh >= kh):
        if number(dtype).bitwidth < 32 and out_w <= WIDE:
            return None
        in_place = whole_rows and whole_columns and number(dtype) == dtype
        if in_place and (not saves or out_w <= SHORT) and (found := _small_forward(asked)):
            return found
    planes, channels, sn, sc = _planes(geometry)
    bands = _bands(planes, out_h)
    together = bands[1] if apart else rows.together(bands[1], out_w, kh, sh, sw * itemsize(dtype))
    sizes = (
        tables.first(index(dtype, kept)), *tables.counts(), channels, height, width, out_h, out_w, sn, sc, geometry.strides[3],
        geometry.end, sh, ph, pw, *bands, together, ahead.distance_in(dtype, _elements(*geometry.shape)),
    )  # fmt: skip
    past = _goes_past(dtype, planes * out_h * out_w, out_w)
    constants = kind, dtype, kept, saves, lanes_for(dtype, out_w), kh, kw
    if apart:
        return Choice(rows.forward_apart, (*constants, sw, past), planes * bands[0], sizes, tables)
    return Choice(rows.forward, (*constants, sh, sw, kind.selects or tables.even, past), planes * bands[0], sizes, tables)


def _small_forward(asked):
    kind, geometry, dtype, kept, saves = asked
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
    if (rows + 1) * stride > room or out_h * out_w + 8 * native_lanes(dtype) > small.ROOM:
        return None
    tables = Tables(geometry)
    sizes = (
        *tables.by_blocks(lanes, together, (number(dtype), index(dtype, kept))), *geometry.shape[1:], *tables.out[1:],
        *geometry.strides[:4], geometry.end, sh, ph, pw, rows, stride, extent,
    )  # fmt: skip
    constants = kind, dtype, kept, saves, lanes, together, kh, kw, sw, direct
    return Choice(small.forward, constants, _elements(*geometry.shape[:3]), sizes, tables)


def _rows_backward(asked):
    kind, geometry, dtype, kept, _ = asked
    window, (height, width) = geometry.window, geometry.shape[3:]
    if not (kind.selects or kind.linear) or not _is_small_window(window):
        return None
    (_, kh, kw), (_, sh, sw), (_, ph, pw) = window.kernel_size, window.stride, window.padding
    elements, planes, tables = _elements(*geometry.shape), _elements(*geometry.shape[:3]), Tables(geometry)
    past, far, (out_h, out_w) = _goes_past(dtype, elements, width), ahead.distance_in(dtype, elements), tables.out[1:]
    if kh <= sh and kw <= sw and ph == pw == 0:
        bands = _bands(planes, -(-height // sh))
        sizes = *tables.counts(), height, width, out_h, out_w, *bands, far
        constants = kind, dtype, kept, lanes_for(dtype, out_w), kh, kw, sh, sw, kind.selects or tables.even, past
        return Choice(rows.backward_apart, constants, planes * bands[0], sizes, tables)
    if past and max(sh, sw) > 1:
        return None  # what is written is most of what there is to do: 8x64x112x112 2x2 s2 1.5 ms so, 1.25 by ``contiguous``
    columns, margin = -(-width // sw), (kw - 1) // sw + 1
    lanes = lanes_for(dtype, columns)
    pitch = margin + max(_rounded(out_w, lanes), _rounded(columns, lanes) + pw // sw + 1)
    if not (part := rows.part(height, pitch, kh, sh)):
        return None
    parts = max(-(-height // part), min(JOBS // planes, height // sh))
    part = -(-height // parts // sh) * sh
    parts = -(-height // part)
    sizes = (
        *tables.counts()[1:], height, width, out_h, out_w, ph, pw, parts, part, pitch, margin, planes * out_h * out_w, far,
    )  # fmt: skip
    return Choice(rows.backward, (kind, dtype, kept, lanes, kh, kw, sh, sw, ph % sh, pw % sw, past), planes * parts, sizes, tables)


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


def _contiguous_forward(asked, bands=None):
    """``bands``: (bands of a plane, rows of a band), if they are to be these."""
    kind, geometry, dtype, kept, saves = asked
    tables, window, planes = Tables(geometry), geometry.window, _elements(*geometry.shape[:2])
    rows, width = tables.out[0] * tables.out[1], tables.out[2]
    bands = bands or _bands(planes, rows)
    sizes = (
        tables.spans(0), tables.spans(1), tables.first(index(dtype, kept)), *tables.counts(), geometry.shape[1], geometry.shape[4],
        *tables.out, *geometry.strides[:4], geometry.end, *tables.steps(2), *window.kernel_size, *window.stride[1:], window.dilation[2],
        window.padding[2], *bands,
    )  # fmt: skip
    written_out = window.kernel_size[1] if window.kernel_size[1] <= MOST_ROWS else 0
    past = _goes_past(dtype, planes * rows * width, width)
    constants = kind, dtype, kept, saves, lanes_for(dtype, width), written_out, *_columns(window), past
    return Choice(contiguous.forward, constants, planes * bands[0], sizes, tables)


def _contiguous_backward(asked, bands=None):
    """``bands``: as for forward."""
    kind, geometry, dtype, kept, _ = asked
    tables, window, planes = Tables(geometry), geometry.window, _elements(*geometry.shape[:2])
    depth, height, width = geometry.shape[2:]
    bands = bands or _bands(planes, depth * height)
    taps, stride, dilation = _columns(window)
    sizes = (
        tables.windows(0), tables.windows(1), *tables.counts(), *geometry.shape[1:], *tables.out, *geometry.strides[:4], geometry.end,
        *window.kernel_size, window.stride[2], window.dilation[2], window.padding[2], *bands, planes * _elements(*tables.out),
    )  # fmt: skip
    shift = window.padding[2] % stride if stride else 0
    lanes, past = lanes_for(dtype, -(-width // max(1, stride))), _goes_past(dtype, _elements(*geometry.shape), width)
    constants = kind, dtype, kept, lanes, taps, stride, dilation, shift, tables.uniform(kind), past
    return Choice(contiguous.backward, constants, planes * bands[0], sizes, tables)


FORWARD = (
    _whole_plane_forward,
    _flat_forward,
    _narrow_forward,
    _across_forward,
    _rows_forward,
    _separable_forward,
    _few_whole_forward,
    _whole_map_forward,
    _few_forward,
    _channels_last_forward,
    _bins_forward,
    _small_forward,
    _contiguous_forward,
)
BACKWARD = (
    _flat_backward,
    _flat_spread,
    _scatter,
    _across_backward,
    _separable_backward,
    _few_whole_backward,
    _whole_map_backward,
    _few_backward,
    _channels_last_backward,
    _bins_backward,
    _rows_backward,
    _contiguous_backward,
)
"""In this order; the last serves whatever is left."""
