"""Convolution and pooling in one launch: the map between them is made in bands of rows that stay in L2, and pooled there.

The nests are those of convolution and of pooling.  A job is a band of one image, all output channels; rows that the windows of the next
band reach back to are kept from one job to the next, and computed anew by the first job of a thread.
"""

import functools
import math

import numpy as np
from numba import int64

from .. import correlation
from ..compile import specialised
from ..geometry import Geometry
from ..launch import share
from ..simd import integers, load, native_lanes, pointer, pointer_at, stacked, store
from . import blocking, choice, convolution
from .geometry import itemsize, stored_dtype
from .number import inlined, jitable
from .pooling import Plan

MOST_ARGUMENTS, SLACK = 64, 512
"""Arguments of a nest; elements behind a map that are read, or written, and thrown away."""

LEAST = 12 << 20
"""Bytes of the map between from which on it is not written whole.  ms of VGG-16's blocks, one after the other and so, a batch of 8 (one
core of an EPYC, contiguous): 64x224x224 184 and 138, 128x112x112 154 and 131, 256x56x56 139 and 129, 512x28x28 130 and 131; but of batch
1 512x14x14 4.5 and 4.8, 64x32x32 of CIFAR-10 0.04 and 0.08: other nests pool small maps quicker, and the map stays in a cache."""

PART_OF_L2 = 4
"""The map between takes this part of L2: the convolution's panel takes half."""


@specialised
def forward(dtype, last, after, nest, count, *constants):
    """The convolution's nest, ``count`` of its constants and these; the pooling's nest and constants.  ``last``: channels_last.
    ``after``: the convolution's activation, or None.

    Arguments: x, packed weights, y, threads' memory, jobs a thread; a table of each band: the row of the map that lies first, the first
    pooled row and their end, rows kept from the band before; bands of an image, the convolution's jobs of a band, channels, columns of
    the map, pooled rows, how many of them a job of the pooling has, elements between planes of the map; bytes of a panel and of a
    thread's memory; how many arguments of the convolution follow, and how many of the pooling; the activation's parameters."""
    convolve = inlined(nest, *constants[:count])
    pool = inlined(*constants[count:])
    width, lanes, more = dtype.bitwidth // 8, native_lanes(dtype), len(after.defaults) if after else 0

    @jitable
    def moved(map, to, source, elements):
        for at in range(0, elements, lanes):
            store(map, to + at, load(map, source + at, lanes))

    def kernel(args, start, stop):
        memory, grain = integers(args, 3, 2)
        bands_of = pointer(args, 5, int64)
        bands, jobs, C, W, OH, each, step, panel_bytes, mine, convs, pools = integers(args, 6, 11)
        place, PJ = memory + start // grain * mine, (OH + each - 1) // each
        base = place + panel_bytes
        map, row = pointer_at(base, dtype), W * (C if last else 1)
        conv, pooling = stacked(MOST_ARGUMENTS, int64), stacked(MOST_ARGUMENTS, int64)
        conv[0], conv[1], conv[3], conv[4] = args[0], args[1], place, 1 << 62
        for i in range(convs):
            conv[5 + i] = args[17 + i]
        for i in range(more):
            conv[5 + convs + i] = args[17 + convs + pools + i]
        pooling[1] = args[2]
        for i in range(pools):
            pooling[3 + i] = args[17 + convs + i]
        for job in range(start, stop):
            n, b = job // bands, job % bands
            top, first, end, kept = bands_of[4 * b], bands_of[4 * b + 1], bands_of[4 * b + 2], bands_of[4 * b + 3]
            if kept > 0:
                before = bands_of[4 * b - 4]
                if job == start:
                    conv[2] = base - before * row * width
                    convolve(conv, (job - 1) * jobs, job * jobs)
                for plane in range(1 if last else C):
                    moved(map, plane * step, plane * step + (top - before) * row, kept * row)
            conv[2] = base - top * row * width
            convolve(conv, job * jobs, (job + 1) * jobs)
            pooling[0] = base - top * row * width
            if last:
                pool(pooling, n * OH + first, n * OH + end)
            else:
                for c in range(C):
                    plane = (n * C + c) * PJ
                    pool(pooling, plane + first // each, plane + (end + each - 1) // each)

    return kernel


class ConvolutionAndPooling:
    """As convolution.py's ``Convolution``."""

    sums = 0

    def __init__(self, part, pooling, constants, jobs, sizes, map_bytes, table):
        """``pooling``: a ``Choice``; ``table``: of the bands; ``sizes``: what ``forward`` takes behind it."""
        self.part, self.packed, self.form = part, part.packed, (part.form,)
        panel = blocking.padded(part.panel, 64)
        self.panel = panel + blocking.padded(map_bytes, 64)
        self.parallel = part.products >= convolution.SERIAL
        counts = len(part.sizes), len(pooling.sizes) + 2
        self.constants, self.jobs, self.tables = constants, jobs, (table, pooling.tables)
        self.sizes = (table.ctypes.data, *sizes, panel, self.panel, *counts, *part.sizes, *pooling.sizes, 0, 0)

    @functools.cached_property
    def plan(self):
        return Plan(forward(*self.constants), self.jobs, self.sizes, True)

    def pack(self, packed, weight, bias, scale, threads):
        self.part.pack(packed, weight, bias, scale, threads)

    def run(self, x, packed, y, panels, threads, *more):
        """``panels``: of ``threads`` threads, ``panel`` bytes each."""
        self.plan.run((x, packed, y, panels, share(self.jobs, threads)[1]), threads, *more)


def planned(geometry, after, kind, window, include_pad, divisor):
    """-> ConvolutionAndPooling of a convolution (convolution.py's Geometry) in one plane, an ``Activation`` or None, and a pooling without
    parameters over ``window``; None where the two are better, or can only be, taken one by one."""
    elements = geometry.shape[0] * geometry.weight_shape[0] * math.prod(geometry.out)
    if elements * itemsize(stored_dtype(geometry.dtype)) < LEAST:
        return None
    return _planned(geometry, after, kind, window, include_pad, divisor)


@functools.lru_cache(maxsize=1024)
def _planned(geometry, after, kind, window, include_pad, divisor):
    problem = convolution.stored(correlation.forward(geometry))
    (_, height, columns), (_, kernel, _), (_, step, _) = problem.axes, window.kernel_size, window.stride
    channels, last, size = problem.groups * problem.outputs, problem.channels_last, itemsize(problem.dtype)
    if geometry.shape[2] != 1 or geometry.weight_shape[2] != 1 or kind.parameters or kind.draws or max(window.dilation) > 1:
        return None
    if problem.groups > 1 and problem.inputs == problem.outputs == 1:
        return None
    H, W = height.outputs, columns.outputs
    pooled = window.output_size(1, H, W)
    _, _, low, high = choice._rows(window, H)
    row_bytes = channels * W * size
    least = -(-kernel // step) * step  # a window reaches into two bands at most
    most = max(least, blocking.l2_bytes() // PART_OF_L2 // row_bytes)
    # In a plane of its own, so that rows of several maps are not one tile's.
    first = convolution.part(problem._replace(y_strides=_in_bands(channels, W, last, 0)), after, min(most, H))
    rows = min(H, first.rows // step * step if first.rows < H else H)
    if rows < min(H, least):
        return None
    bands = -(-H // rows)
    band_of = high // rows
    table = np.zeros((bands, 4), np.int64)
    for b in range(bands):
        mine = np.flatnonzero(band_of == b)
        begin, end = (mine[0], mine[-1] + 1) if len(mine) else (0, 0)
        top = min(b * rows, int(low[mine].min())) if len(mine) else b * rows
        table[b] = top, begin, end, b * rows - top
    held = rows + int(table[:, 3].max())
    plane = blocking.spread(held * W + (0 if last else 64), size)
    strides = _in_bands(channels, W, last, plane)
    part = convolution.part(problem._replace(y_strides=strides), after, rows)
    shape = problem.images, channels, 1, H, W
    between = Geometry(geometry.dtype, shape, strides, last, window, include_pad, divisor)
    saved = kind.saved_dtype(window.taps, geometry.dtype)
    asked = choice.Asked(kind, between, stored_dtype(geometry.dtype), stored_dtype(saved))
    # Where no window reaches into another band a job of the pooling is a band.
    apart = not table[:, 3].any() and (table[:-1, 2] == np.arange(1, bands) * rows // step).all()
    each = rows // step if apart and bands > 1 else pooled[1] if apart else 1
    pooling = choice._channels_last_forward(asked) if last else choice._contiguous_forward(asked, (-(-pooled[1] // each), each))
    nests = part.nest, len(part.constants), *part.constants, pooling.nest, *pooling.constants
    elements = held * W * channels if last else channels * plane
    sizes = bands, part.jobs_a_band, channels, W, pooled[1], each, plane
    constants = problem.dtype, last, after, *nests
    return ConvolutionAndPooling(part, pooling, constants, problem.images * bands, sizes, (elements + SLACK) * size, table)


def _in_bands(channels, width, last, plane):
    """Strides of N, C, D, H and W of the map between."""
    return (0, 1, 0, width * channels, channels) if last else (0, plane, 0, width, 1)
