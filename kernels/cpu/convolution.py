"""Convolution on the CPU, for the backend: from shapes and strides to what runs, once for each, then from a cache.

A convolution and its gradient by the input are correlations (correlation.py); each becomes a nest, a job list and tables.
"""

import functools
import itertools
import math

import numpy as np

from .. import correlation
from ..correlation import Axis, Geometry
from ..launch import bits, share
from ..simd import LINE, native_lanes, number
from . import blocking, channel_lanes, depthwise, elementwise, pixel_lanes, plane_products, weights
from . import weight_gradient as weight_gradients
from .ahead import distance, distance_in
from .geometry import itemsize, lanes_for, stored_dtype
from .pooling import Plan


@functools.lru_cache(maxsize=1024)
def forward(geometry, after):
    """-> Convolution; ``after``: an ``Activation`` or None."""
    return Convolution([_part(stored(correlation.forward(geometry)), after)])


@functools.lru_cache(maxsize=1024)
def input_gradient(geometry, biased=False):
    """-> Convolution that takes gy, dense in geometry's layout, to gx, likewise, and where ``biased`` adds a bias."""
    parts = [stored(part) for part in correlation.input_gradient(geometry)]
    if _spreads_rows(parts, geometry):
        return Convolution([_SpreadRows(parts, geometry)])
    made = [_part(part, None) for part in parts if biased or part.weight_taps]
    return Convolution(made if len(made) == len(parts) else [_Zeros(geometry), *made])


def stored(problem):
    """A correlation with its dtype as the nests know it."""
    return problem._replace(dtype=stored_dtype(problem.dtype))


SERIAL = 300_000
"""Multiply-adds below which a second thread costs more than it brings: handing over takes about 3 us."""


class Convolution:
    """Correlations that make one result, of weights that are packed before."""

    def __init__(self, parts):
        self.parts = parts
        self.packed = sum(part.packed for part in parts)
        """Elements of packed weights, of ``number(dtype)``."""
        self.panel = max(part.panel for part in parts)
        """Bytes of a thread's panel."""
        self.parallel = sum(part.products for part in parts) >= SERIAL
        self.form = tuple(part.form for part in parts)
        """Plans of equal form read the same packed weights."""

    def pack(self, packed, weight, bias, scale, threads):
        """All are addresses, 0 where there is none."""
        for part in self.parts:
            part.pack(packed, weight, bias, scale, threads)
            packed += part.packed * part.itemsize

    def run(self, x, packed, y, panels, threads, *more):
        """``panels``: of ``threads`` threads."""
        for part in self.parts:
            part.run(x, packed, y, panels, threads, *more)
            packed += part.packed * part.itemsize


class _Part:
    """A correlation as a nest, a job list and tables: ``plan``; and how its weights are packed."""

    def _packs(self, dtype, block, groups, outputs, steps, inputs, taps, along=1, together=1):
        """Weights of ``groups`` times ``outputs`` channels by blocks of so many; ``steps``: from group to group, output to output and input
        to input; taps of a row, inputs of a chain."""
        step_g, step_o, step_i = steps
        lanes, blocks = lanes_for(dtype, block), -(-outputs // block)
        self.order = weights.order(inputs, along, together, step_i, taps)
        each, runs = self.order
        addresses = (table.ctypes.data for table in self.order)
        self.packing = functools.partial(weights.pack, dtype, lanes, block, weights.how(runs, outputs, step_o, lanes))
        self.blocks = groups * blocks
        self.pack_sizes = *addresses, outputs, blocks, len(each), len(runs), step_g, step_o

    def pack(self, packed, weight, bias, scale, threads):
        plan = Plan(self.packing(bias != 0, scale != 0), self.blocks, self.pack_sizes, True)
        plan.run((packed, weight, bias, scale), threads)

    @functools.cached_property
    def plan(self):
        return Plan(self.nest(*self.constants), self.jobs, self.sizes, True)

    def run(self, x, packed, y, panels, threads, *more):
        plan = self.plan
        plan.run((x, packed, y + self.start, panels, share(plan.jobs, threads)[1]), threads, *more)


class _Zeros:
    """All of a gradient by the input, where a step passes over elements that no tap reads: 1x1 with steps of 2 of 256 channels of 56x56 to
    512, a batch of 8, 9.7 ms so and 13.5 by correlations without a tap."""

    packed = panel = products = 0
    itemsize, form = 1, "zeros"

    def __init__(self, geometry):
        self.plan = elementwise.zeros(geometry.dtype, math.prod(geometry.shape))

    def pack(self, packed, weight, bias, scale, threads):
        pass

    def run(self, x, packed, y, panels, threads, *more):
        self.plan.run((y,), threads)


class _Banded(_Part):
    """By a nest over bands."""

    def __init__(self, problem, layout, nest, constants, block, per=1, ahead=None):
        """``ahead``: (steps of a chain) -> what to ask for at each."""
        real = number(problem.dtype)
        self.itemsize = itemsize(real)
        blocks, taps = -(-problem.outputs // block), len(problem.weight_taps)
        self.packed = problem.groups * blocks * block * (problem.inputs * taps + 1)
        self.panel = layout.panel
        self.products = problem.images * problem.groups * problem.outputs * problem.inputs * taps * layout.results
        self.form = problem.dtype, block, problem.weight_taps, problem.weight_steps
        self.start = problem.y_start * itemsize(problem.dtype)
        lines, outs, offsets = layout.tables
        together, along = blocking.chain(problem.inputs, taps), max(1, len(problem.axes[2].offsets))
        steps = []
        for channels in (together, problem.inputs % together):
            # By rows of taps, then channels, then taps of a row, as weights.py has them.
            rows_of_taps = np.array(offsets, int).reshape(-1, 1, along)
            chain = (rows_of_taps + np.arange(channels)[:, None] * layout.next_channel).ravel()
            steps += [chain, ahead(chain)] if ahead else [chain]
        self.tables = [np.ascontiguousarray(t, np.int64) for t in (lines, outs, np.concatenate(steps))]
        tables = (t.ctypes.data for t in self.tables)
        counts = problem.images, problem.inputs, problem.outputs, problem.groups, blocks, taps, together
        self.rows, self.jobs_a_band = layout.rows, problem.groups * -(-blocks // per)
        self.nest, self.constants, self.sizes = nest, (problem.dtype, *constants), (*tables, *counts, *layout.sizes)
        self.jobs = layout.bands * self.jobs_a_band
        more = problem.weight_steps, problem.inputs, problem.weight_taps, along, together
        self._packs(problem.dtype, block, problem.groups, problem.outputs, *more)


def _part(problem, after, most=None):
    """The nest of least cost, by blocking.py's model.  ``most``: rows of one map that a band may have."""
    if _is_depthwise(problem):
        problem = _in_order(problem)
        if problem.channels_last:
            return _Depthwise(problem, after)
        if _reads_rows(problem):
            return _DepthwiseRows(problem, after)
        if problem.axes[2].step <= PHASES:
            return _depthwise_planes(problem, after)
    lanes, flat = native_lanes(problem.dtype), _is_flat(problem)
    cost, tile = _channel_tile(problem, lanes, flat)
    if tile.pieces > 1:
        maps = _channel_layout(problem, tile, lanes, flat, most)[0].maps
        if maps < tile.pieces:
            # A panel ends with its maps, where 7 rows by twos are 8: of 512 channels of 14x14, 3x3 at stride 2, a batch of 8 ran at 79%
            # of the peak so and at 88% by ones.
            cost, tile = _channel_tile(problem._replace(images=maps), lanes, flat)
            cost *= problem.images / maps
    if not problem.channels_last and problem.axes[2].step <= PHASES:
        other, pixel_tile = _pixel_tile(problem, lanes, flat)
        if other < cost:
            return _with_pixel_lanes(problem, after, pixel_tile, lanes, flat, most)
    return _with_channel_lanes(problem, after, tile, lanes, flat, most)


def _channel_tile(problem, lanes, flat):
    steps, width = problem.inputs * max(1, len(problem.weight_taps)), problem.axes[2]
    return blocking.tile(*_extent(problem, flat), problem.outputs, lanes, steps, functools.partial(_share, problem), _kept(width))


def _pixel_tile(problem, lanes, flat):
    taps = len(problem.weight_taps)
    steps = problem.inputs * max(1, taps) * _share(problem, 1)
    return blocking.pixel_tile(*_extent(problem, flat), problem.outputs, lanes, steps, taps > 1)


def _extent(problem, flat):
    """(columns, rows) that tiles are cut from; a map is one row where it is ``flat``."""
    depth, height, width = problem.axes
    if flat:
        return depth.size * height.size * width.size, problem.images
    return width.outputs, height.outputs * problem.images


class _Depthwise(_Part):
    """A depthwise correlation of channels_last maps."""

    def __init__(self, problem, after):
        dtype, real, channels = problem.dtype, number(problem.dtype), problem.groups
        lanes, taps = native_lanes(dtype), len(problem.weight_taps)
        self.itemsize, blocks = itemsize(real), -(-channels // lanes)
        self.packed, self.panel = blocks * lanes * (taps + 1), 0
        self.start = problem.y_start * itemsize(dtype)
        counts = tuple(axis.outputs for axis in problem.axes)
        self.products = problem.images * channels * taps * math.prod(counts)
        self.form = dtype, "depthwise", problem.weight_taps, problem.weight_steps
        inside, tables, steps = _inside(problem.axes, problem.x_strides)
        self.tables = inside, tables
        KD, KH, KW = (len(axis.offsets) for axis in problem.axes)
        whole = [o for o, (first, end) in enumerate(inside[sum(counts[:2]) :]) if first == 0 and end == KW]
        left, right = (whole[0], whole[-1] + 1) if whole else (0, 0)
        xn, yn, *y_steps = problem.x_strides[0], problem.y_strides[0], *problem.y_strides[2:]
        addresses = inside.ctypes.data, tables.ctypes.data
        sizes = *addresses, channels, *counts, KH, KW, taps, max(KD, KH, KW), left, right, xn, *steps, yn, *y_steps
        elements = problem.images * channels * math.prod(axis.size for axis in problem.axes)
        # From the first row of taps: behind the last one.
        far = distance_in(dtype, elements) and int(tables[1, KH - 1]) + distance(dtype)
        sizes = *sizes, far
        pixels = blocking.pixels_together(right - left)
        width = problem.axes[2]
        across = width.step if KW > 1 and width.step <= 2 and _lie_side_by_side(width) else 0
        self.nest, self.constants, self.sizes = depthwise.forward, (dtype, lanes, pixels, KW, across, after), sizes
        self.jobs = problem.images * counts[0] * counts[1]
        self._packs(dtype, lanes, 1, channels, (0, problem.weight_steps[0], 0), 1, problem.weight_taps)


def _inside(axes, x_strides):
    """depthwise.py's tables, of the taps inside and of the taps, and x's steps from output to output."""
    most = max(1, *(len(axis.offsets) for axis in axes))
    taps = np.zeros((3, most), np.int64)
    for i, (axis, stride) in enumerate(zip(axes, x_strides[2:], strict=True)):
        taps[i, : len(axis.offsets)] = np.array(axis.offsets, int) * stride
    steps = (axis.step * stride for axis, stride in zip(axes, x_strides[2:], strict=True))
    inside = np.concatenate([_spans(_is_inside(axis)) for axis in axes])
    return np.ascontiguousarray(inside, np.int64), taps, tuple(steps)


def _is_inside(axis):
    """[output, tap]: whether the tap lies in the map."""
    positions = np.arange(axis.outputs)[:, None] * axis.step + np.array(axis.offsets, int)
    return (positions >= 0) & (positions < axis.size)


def _spans(here):
    """(first, end) of what is true in each row, where it lies side by side; 0, 0 where nothing is."""
    first = here.argmax(1) if here.shape[1] else np.zeros(len(here), int)
    return np.stack([first, first + here.sum(1)], 1)


def _rows_inside(depth, height):
    """[output slab, output row, (first, end)]: the rows of taps, of a kernel's depth and height, between which all lie that have one in
    the map."""
    (deep, tall), KH = (_spans(_is_inside(axis))[:, None] for axis in (depth, height)), len(height.offsets)
    deep, tall = np.broadcast_arrays(deep, tall.swapaxes(0, 1))
    first, end = deep[..., 0] * KH + tall[..., 0], (deep[..., 1] - 1) * KH + tall[..., 1]
    some = (deep[..., 1] > deep[..., 0]) & (tall[..., 1] > tall[..., 0])
    return np.where(some[..., None], np.stack([first, end], -1), 0)


def _share(problem, pieces):
    """The part of the rows of taps that a tile of so many output rows goes through: the same row of several maps, or rows that follow."""
    depth, height, _ = problem.axes
    inside, rows = _rows_inside(depth, height), len(depth.offsets) * len(height.offsets)
    groups = np.arange(0, height.outputs, pieces if problem.images < pieces else 1)
    first, end = np.minimum.reduceat(inside[..., 0], groups, 1), np.maximum.reduceat(inside[..., 1], groups, 1)
    return float((end - first).mean()) / rows if rows else 1.0


def _kept(width):
    """Of each tap of a row the outputs, first and end, that it does not take into the padding; () where there are none but those."""
    spans = _spans(_is_inside(width).T)
    return () if (spans == (0, width.outputs)).all() else tuple(spans.ravel().tolist())


def _is_depthwise(problem):
    return problem.groups > 1 and problem.inputs == problem.outputs == 1


def _spreads_rows(parts, geometry):
    """Whether ``depthwise.spread_rows`` can run a gradient by the input."""
    _, down, across = geometry.stride
    taps = math.prod(geometry.weight_shape[2:])
    if not (_is_depthwise(parts[0]) and not geometry.channels_last and down <= 2 == across and taps <= blocking.WINDOW):
        return False
    # Of each first row and column some; and in one slice, of which none reads another.
    return len(parts) == down * across and all(
        depth.step == 1 and depth.offsets == (0,) and all(map(_lie_side_by_side, along)) for depth, *along in (part.axes for part in parts)
    )


def _reads_rows(problem):
    """Whether ``depthwise.forward_rows`` can run it."""
    depth, height, width = problem.axes
    flat = depth.step == 1 and depth.offsets == (0,)
    small = 0 < len(problem.weight_taps) <= blocking.WINDOW and max(height.step, width.step) <= 2
    return flat and small and _lie_side_by_side(height) and _lie_side_by_side(width) and problem.y_strides[4] == 1


def _lie_side_by_side(axis):
    """Whether an axis's taps do."""
    return not axis.offsets or max(axis.offsets) - min(axis.offsets) == len(axis.offsets) - 1


def _in_order(problem):
    """The same correlation with each axis's taps from the first to the last: a gradient by the input has them the other way round."""
    orders = [np.argsort(axis.offsets) for axis in problem.axes]
    taps = np.array(problem.weight_taps, np.int64).reshape([len(order) for order in orders])[np.ix_(*orders)]
    axes = (axis._replace(offsets=tuple(sorted(axis.offsets))) for axis in problem.axes)
    return problem._replace(axes=tuple(axes), weight_taps=tuple(taps.ravel().tolist()))


def _end_of_x(problem):
    """Elements from a depthwise correlation's first to behind its last."""
    shape = problem.images, problem.groups, *(axis.size for axis in problem.axes)
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, problem.x_strides, strict=True))


class _DepthwiseRows(_Part):
    """A depthwise correlation of contiguous maps by windows side by side."""

    panel = 0

    def __init__(self, problem, after):
        dtype, real, channels = problem.dtype, number(problem.dtype), problem.groups
        depth, height, width = problem.axes
        taps, lanes = len(problem.weight_taps), lanes_for(dtype, width.outputs)
        high, along = len(height.offsets), len(width.offsets)
        self.itemsize = itemsize(real)
        self.packed = channels * (taps + 1)
        self.start = problem.y_start * itemsize(dtype)
        self.products = problem.images * channels * taps * depth.outputs * height.outputs * width.outputs
        self.form = dtype, "rows", problem.weight_taps, problem.weight_steps
        planes = problem.images * channels * depth.outputs
        rows = blocking.window_rows(height.outputs, taps, height.step)
        band, bands = blocking.plane_bands(planes, height.outputs, rows)
        xn, xc, *x_steps, _ = problem.x_strides
        yn, yc, *y_steps, _ = problem.y_strides
        self.sizes = (
            *(channels, depth.outputs, height.outputs, width.outputs, height.size, width.size, bands, band),
            *(height.offsets[0], width.offsets[0], _end_of_x(problem), xn, xc, *x_steps, yn, yc, *y_steps),
        )
        self.nest, self.constants = depthwise.forward_rows, (dtype, lanes, rows, high, along, height.step, width.step, after)
        self.jobs = planes * bands
        self._packs(dtype, 1, channels, 1, problem.weight_steps, 1, problem.weight_taps)


class _SpreadRows(_Part):
    """The gradient by the input of a depthwise convolution of contiguous maps, from its parts."""

    panel = 0

    def __init__(self, parts, geometry):
        parts = [_in_order(part) if part.weight_taps else part for part in parts]
        problem, (_, down, _) = parts[0], geometry.stride
        dtype, channels, (depth, height, width) = problem.dtype, problem.groups, problem.axes
        _, _, _, H, W = geometry.shape
        shapes = []
        for part in parts:
            _, *along = (axis.offsets for axis in part.axes)
            shapes.append((*map(len, along), *(offsets[0] if offsets else 0 for offsets in along)))
        picks = tuple(tap for part in parts for tap in part.weight_taps)
        taps, lanes, most = len(picks), lanes_for(dtype, width.outputs), -(-H // down)
        self.itemsize, self.packed, self.start = itemsize(number(dtype)), channels * (taps + 1), 0
        self.products = problem.images * channels * taps * depth.outputs * height.outputs * width.outputs
        self.form = dtype, "spread", picks, problem.weight_steps
        planes = problem.images * channels * depth.outputs
        rows = blocking.window_rows(most, taps, 1)
        band, bands = blocking.plane_bands(planes, most, rows)
        yn, yc, *y_steps, _ = problem.x_strides
        gn, gc, gd, gh, _ = problem.y_strides
        self.sizes = (
            *(channels, depth.outputs, taps, height.size, width.size, H, W, bands, band),
            *(yn, yc, *y_steps, gn, gc, gd, gh // down, distance_in(dtype, math.prod(geometry.shape))),
        )
        self.nest, self.constants = depthwise.spread_rows, (dtype, lanes, rows, down, tuple(shapes))
        self.jobs = planes * bands
        self._packs(dtype, 1, channels, 1, problem.weight_steps, 1, picks)


PHASES = 4
"""Strides up to which a panel is by phases: a register of each is made at once."""


def _depthwise_planes(problem, after):
    _, height, width = problem.axes
    lanes = lanes_for(problem.dtype, width.outputs)
    rows, cols = blocking.plane_tile(width.outputs, height.outputs, lanes)
    layout = Layout(problem, 1, rows, cols * lanes, lanes, False, width.step, alone=True)
    constants = lanes, rows, cols, width.step, after, problem.y_strides[4]
    return _Banded(problem, layout, depthwise.forward_planes, constants, 1)


def _with_channel_lanes(problem, after, tile, lanes, flat, most=None):
    block, real, last = tile.cols * lanes, number(problem.dtype), problem.channels_last
    layout, pitch = _channel_layout(problem, tile, lanes, flat, most)
    step = (1 if flat else problem.axes[2].step) * (pitch or 1)
    pixel, between = (1, problem.x_strides[4]) if last else (problem.y_strides[4], 0)
    small = between * itemsize(real) <= blocking.UNPACKED_BYTES and problem.outputs <= blocking.UNPACKED_OUTPUTS
    in_place = last and flat and small and real == problem.dtype
    step = between if in_place else step
    runs = layout.columns if flat and not last else 0
    kept = _kept(problem.axes[2]) if tile.pixels == problem.axes[2].outputs and not flat else ()
    beside = 1 < tile.pieces <= layout.maps and not flat
    constants = lanes, *tile, step, pitch, runs, pixel, after, in_place, kept, beside
    return _Banded(problem, layout, channel_lanes.forward, constants, block, ahead=functools.partial(layout.asked, step, in_place, beside))


def _channel_layout(problem, tile, lanes, flat, most):
    pitch = blocking.pitch(problem.inputs, itemsize(number(problem.dtype))) if problem.channels_last else 0
    return Layout(problem, tile.cols * lanes, tile.pieces, tile.pixels, lanes, flat, pitch=pitch, most=most, narrow=True), pitch


def _with_pixel_lanes(problem, after, tile, lanes, flat, most=None):
    block, width = tile.channels, problem.axes[2]
    stride = 1 if flat else width.step
    single = blocking.chain(problem.inputs, len(problem.weight_taps)) >= problem.inputs
    turns = 1 if single and not flat else blocking.TURNS
    layout = Layout(problem, block * turns, 1, tile.cols * lanes, lanes, flat, stride, most=most)
    real, xc = number(problem.dtype), problem.x_strides[1]
    fits = layout.columns >= tile.cols * lanes and blocking.stays(problem.inputs, xc * itemsize(real), tile.cols + 1)
    in_place = flat and fits and real == problem.dtype
    if in_place:
        layout.next_channel = xc
    constants = lanes, *tile, turns, stride, in_place, layout.columns if flat else 0, after, problem.y_strides[4]
    return _Banded(problem, layout, pixel_lanes.forward, constants, block, turns)


class Layout:
    """A correlation cut into bands, each with its panel."""

    def __init__(self, problem, block, pieces, pixels, lanes, flat, phases=1, alone=False, pitch=0, most=None, narrow=False):
        real = number(problem.dtype)
        size = itemsize(real)
        depth, height, width = problem.axes
        x_strides, y_strides = problem.x_strides, problem.y_strides
        if flat:  # a map is one row, cut into tiles
            length = depth.size * height.size * width.size
            run = min(pixels, length)
            starts = np.minimum(np.arange(-(-length // run)) * run, length - run)
            depth, height, width = (Axis(n, n, 1, (0,)) for n in (1, len(starts), run))
            lines, planes, rows, Q = starts * x_strides[4], [(0, 0)], [((0, 0), 0)], len(starts)
            outs, inside = starts[None] * y_strides[4], np.full((1, Q, 2), (0, 1))
        else:
            lines, planes, rows, Q = _lines(depth, height, x_strides)
            outs = np.arange(depth.outputs)[:, None] * y_strides[2] + np.arange(height.outputs) * y_strides[3]
            inside = _rows_inside(depth, height) * len(width.offsets)
        self.columns = width.outputs
        self.results = depth.outputs * height.outputs * width.outputs
        low, high = min(width.offsets, default=0), max(width.offsets, default=0)
        columns = (width.outputs - 1) * width.step + high - low + 1
        # A last register of a row may run over its end.
        slack = blocking.padded(pixels, lanes)
        if pitch:
            self.next_channel, rowstep = 1, blocking.padded(columns * pitch, lanes) + slack
        else:
            columns = blocking.panel_columns(columns, lanes * phases, narrow)
            columns = columns if phases > 1 else blocking.spread(columns, size)
            self.next_channel, rowstep = columns, blocking.padded(problem.inputs * columns, lanes) + slack
        extra, blocks = Q - height.outputs, problem.groups * -(-problem.outputs // block)
        maps = problem.images if depth.outputs == 1 and not alone else 1
        bands = blocking.bands(
            rowstep * size * max(1, len(planes)), extra, height.outputs, maps, pieces, blocks, blocking.NEAREST if alone else None
        )
        if most:
            bands = blocking.Bands(min(most, bands.rows), 1)
        self.rows, self.maps = bands
        RQ, along = bands.rows + extra, -(-height.outputs // bands.rows)

        def column(offset):
            at = offset - low
            if pitch:
                return at * pitch
            return at // phases + at % phases * (columns // phases)

        taps = [(planes.index(plane) * RQ + row) * rowstep + column(offset) for plane, row in rows for offset in width.offsets]
        self.tables = lines, np.concatenate([outs[..., None], inside], -1), taps
        self.bands = -(-problem.images // bands.images) * depth.outputs * along
        # A row's last tile may overlap the one before, which asks for what follows that as if it did not.
        slack += pixels * (pitch or 1) * width.step
        self.panel = blocking.padded((bands.images * len(planes) * RQ * rowstep + slack) * size, 64)
        xn, xc, *_, xw = x_strides
        yn, yc, *_, yw = y_strides
        sizes = depth.outputs, height.outputs, width.outputs, bands.rows, bands.images, along, len(planes), Q, RQ, columns, low, width.size
        self.sizes = *sizes, xn, xc, xw, yn, yc, yw, rowstep, self.panel
        self.tile, self.rowstep, self.mapstep, self.line = (pieces, pixels), rowstep, len(planes) * RQ * rowstep, LINE // size

    def asked(self, step, in_place, beside, steps):
        """What to ask for at each product of a chain: the cache lines that the next tile reads and this one does not.  ``step``: from
        pixel to pixel."""
        pieces, pixels = self.tile
        apart = self.mapstep if beside else self.rowstep
        reads = np.arange(pieces)[:, None] * apart + np.arange(pixels) * step
        here = (steps[:, None] + reads.ravel()).ravel()
        below = self.rowstep if beside and self.maps <= pieces else pieces * apart
        after = here + (pixels * step if self.columns > pixels or in_place else below)
        lines, first = np.unique(after // self.line, return_index=True)
        lines = after[np.sort(first[~np.isin(lines, here // self.line)])]
        return lines[np.arange(len(steps)) * len(lines) // max(1, len(steps))] if len(lines) else steps


@functools.lru_cache(maxsize=1024)
def weight_gradient(geometry):
    """-> WeightGradient, which takes x and gy, dense in geometry's layout, to gw, which lies as the weights."""
    problem = stored(correlation.forward(geometry))
    if _is_depthwise(problem) and (problem.channels_last or problem.axes[2].step <= PHASES):
        return DepthwiseWeightGradient(problem)
    if not problem.channels_last and _is_flat(problem) and problem.x_strides[4] == 1 and math.prod(geometry.out) >= blocking.SEGMENT:
        return PlaneProducts(problem)
    return WeightGradient(problem, geometry)


class PlaneProducts:
    """``WeightGradient`` of a 1x1 convolution of contiguous maps: it needs no panels."""

    panel = 0

    def __init__(self, problem):
        dtype, inputs, outputs = problem.dtype, problem.inputs, problem.outputs
        lanes, length = native_lanes(dtype), math.prod(axis.size for axis in problem.axes)
        size = itemsize(number(dtype))
        by_inputs = inputs > outputs
        outer, inner = blocking.pairs()
        rows, cols = (inner, outer) if by_inputs else (outer, inner)
        part, near = blocking.segment(length, lanes, size)
        tiles = -(-outputs // rows), -(-inputs // cols)
        self.sums = problem.groups * math.prod(tiles) * rows * cols
        (xn, xc, *_), (yn, yc, *_) = problem.x_strides, problem.y_strides
        sizes = problem.images, inputs, outputs, length, part, max(1, near // inner), xn, xc, yn, yc, problem.weight_steps[1]
        self.plan = Plan(plane_products.backward(dtype, lanes, rows, cols, by_inputs), problem.groups * tiles[by_inputs], sizes, True)

    def run(self, x, gy, gw, sums, panels, threads):
        self.plan.run((x, gy, gw, sums), threads)


class DepthwiseWeightGradient:
    """``WeightGradient`` of a depthwise convolution: it needs neither sums nor panels."""

    sums = panel = 0

    def __init__(self, problem):
        if not problem.channels_last and problem.x_strides[4] == 1 and _reads_rows(problem):
            self._of_rows(problem)
            return
        dtype, lanes, channels = problem.dtype, native_lanes(problem.dtype), problem.groups
        inside, taps, steps = _inside(problem.axes, problem.x_strides)
        self.tables = inside, taps, np.array(problem.weight_taps, np.int64)
        counts, (KD, KH, KW) = [axis.outputs for axis in problem.axes], (len(axis.offsets) for axis in problem.axes)
        # So many rows of the kernel that they divide it, and their sums fit the registers.
        high = max(h for h in range(1, KH + 1) if KH % h == 0 and (h == 1 or h * KW <= blocking.registers() - 4))
        xn, xc, yn, yc = *problem.x_strides[:2], *problem.y_strides[:2]
        sizes = (
            *(t.ctypes.data for t in self.tables),
            *(problem.images, channels, *counts, problem.axes[2].size, KD, KH, max(KD, KH, KW)),
            *(xn, xc, *steps, yn, yc, *problem.y_strides[2:], problem.weight_steps[0]),
        )
        if problem.channels_last:
            new = (min(axis.step, taps) for axis, taps in zip(problem.axes[1:], (high, KW), strict=True))
            worker, jobs = depthwise.weights_of_pixels(dtype, lanes, high, KW, *new), -(-channels // lanes)
        else:
            lanes = lanes_for(dtype, counts[2])
            worker, jobs = depthwise.weights_of_planes(dtype, lanes, high, KW, problem.axes[2].step), channels
        self.plan = Plan(worker, jobs, sizes, True)

    def _of_rows(self, problem):
        dtype, (depth, height, width) = problem.dtype, problem.axes
        lanes, high, along = lanes_for(dtype, width.outputs), len(height.offsets), len(width.offsets)
        self.tables = np.array(problem.weight_taps, np.int64)
        rows = blocking.product_rows(height.outputs, high * along, along)
        xn, xc, *x_steps, _ = problem.x_strides
        yn, yc, *y_steps, _ = problem.y_strides
        sizes = (
            *(self.tables.ctypes.data, problem.images, depth.outputs, height.outputs, width.outputs, height.size, width.size),
            *(height.offsets[0], width.offsets[0], _end_of_x(problem), xn, xc, *x_steps, yn, yc, *y_steps, problem.weight_steps[0]),
        )
        worker = depthwise.weights_of_rows(dtype, lanes, rows, high, along, height.step, width.step)
        self.plan = Plan(worker, problem.groups, sizes, True)

    def run(self, x, gy, gw, sums, panels, threads):
        self.plan.run((x, gy, gw), threads)


class WeightGradient:
    """``sums`` elements of ``number(dtype)`` and ``panel`` bytes a thread are needed to ``run`` it."""

    def __init__(self, problem, geometry):
        dtype = problem.dtype
        real, lanes = number(dtype), native_lanes(dtype)
        size = itemsize(real)
        depth, height, width = problem.axes
        taps, dilation = geometry.weight_shape[2:], geometry.dilation[2]
        *_, step_d, step_h, step_w = geometry.weight_strides
        step_i = problem.weight_steps[2]
        joined = dilation == 1 or taps[2] == 1
        length = problem.inputs * (taps[2] if joined else 1)
        lines, planes, rows, Q = _lines(depth, height, problem.x_strides)
        outs = np.arange(depth.outputs)[:, None] * problem.y_strides[2] + np.arange(height.outputs) * problem.y_strides[3]
        low, high = width.offsets[0], width.offsets[-1]
        columns = (width.outputs - 1) * width.step + high - low + 1
        # Runs of several taps need pixels that follow each other.
        x_pitch = problem.inputs if joined and taps[2] > 1 else blocking.spread(problem.inputs, size)
        rowstep = blocking.padded(columns * x_pitch, lanes)
        tile = blocking.sum_tile(length, problem.outputs, lanes)
        block = tile.cols * lanes
        blocks = -(-problem.outputs // block)
        tiles = -(-length // tile.pixels)
        each = taps[0] * taps[1] * (1 if joined else taps[2]) * tiles * tile.pixels * block
        few = blocking.few_weights(problem.groups * blocks * each * size, problem.images)
        per = blocks if few else blocking.chunk(blocks, problem.groups)
        pitch = blocking.spread(per * block, size)
        extra = Q - height.outputs
        row_bytes = (rowstep * len(planes) + pitch * width.outputs) * size
        bands = blocking.bands(row_bytes, extra, height.outputs, 1, 1, blocking.SLICES if few else blocking.JOBS)
        RQ = bands.rows + extra
        starts = np.minimum(np.arange(tiles) * tile.pixels, length - tile.pixels)
        position = np.arange(length)
        row_of = position - starts[position // tile.pixels] + position // tile.pixels * tile.pixels
        along = range(taps[2] if joined else 1)
        offsets = np.array([kw * step_w + c * step_i for kw in along for c in range(problem.inputs)])
        runs, weights_each = [], problem.inputs * math.prod(taps)
        sources = np.zeros(blocking.padded(weights_each, lanes), np.int64)
        for (kd, kh), (plane, row) in zip(itertools.product(range(taps[0]), range(taps[1])), rows, strict=True):
            for kw in range(1 if joined else taps[2]):
                sources[kd * step_d + kh * step_h + kw * step_w + offsets] = (len(runs) * tiles * tile.pixels + row_of) * block
                runs.append((planes.index(plane) * RQ + row) * rowstep + kw * dilation * x_pitch)
        gy_panel = blocking.padded((len(planes) * RQ * rowstep + lanes + tile.pixels) * size, 64)
        asked = weight_gradients.AHEAD * width.step * x_pitch  # what lies behind a panel is another thread's
        self.panel = gy_panel + blocking.padded(max(bands.rows * width.outputs * pitch + block, asked) * size, 64)
        self.tables = [np.ascontiguousarray(t, np.int64) for t in (lines, outs, runs, sources)]
        *addresses, source = (t.ctypes.data for t in self.tables)
        chunks, count = -(-blocks // per), -(-height.outputs // bands.rows)
        slices = min(blocking.SLICES, problem.images * depth.outputs * count) if few else 1
        self.sums = slices * problem.groups * blocks * each
        xn, xc, *_, xw = problem.x_strides
        yn, yc, *_, yw = problem.y_strides
        sizes = (
            *addresses,
            *(problem.images, problem.inputs, problem.outputs, chunks, blocks, per),
            *(depth.outputs, height.outputs, width.outputs, bands.rows, count),
            *(len(planes), Q, RQ, columns, low, width.size, width.step, xn, xc, xw, yn, yc, yw),
            *(rowstep, pitch, gy_panel, self.panel, len(runs), length, tiles),
            *(max(1, blocking.NEAR // width.outputs), slices, problem.groups, x_pitch),
        )
        worker = weight_gradients.backward(dtype, lanes, tile.pixels, tile.cols, problem.channels_last)
        self.plan = Plan(worker, slices * problem.groups * chunks, sizes, True)
        sizes = source, weights_each, problem.outputs, blocks, each, slices, problem.groups * blocks * each
        self.last = Plan(weight_gradients.ordered(dtype, lanes, block), problem.groups * blocks, sizes, True)

    def run(self, x, gy, gw, sums, panels, threads):
        plan = self.plan
        plan.run((x, gy, sums, panels, share(plan.jobs, threads)[1]), threads)
        self.last.run((gw, sums), threads)


def _is_flat(problem):
    """Whether one tap reads the maps as they are written: then rows need not be told apart."""
    axes, (*_, xd, xh, xw), (*_, yd, yh, yw) = problem.axes, problem.x_strides, problem.y_strides
    same = all(axis.step == 1 and axis.offsets == (0,) and axis.size == axis.outputs for axis in axes)
    _, height, width = (axis.size for axis in axes)
    return same and (xh, xd) == (xw * width, xw * width * height) and (yh, yd) == (yw * width, yw * width * height)


def _lines(depth, height, strides):
    """Where rows of x begin, -1: of zeros, as (output slab, plane, row), and how taps find theirs.

    A plane is what taps share that differ by whole steps: an offset along the depth, a remainder of the offset along the height.
    -> lines, planes, each tap pair's (plane, row) in order, rows a plane."""
    remainders = sorted({offset % height.step for offset in height.offsets})
    low = min((offset // height.step for offset in height.offsets), default=0)
    high = max((offset // height.step for offset in height.offsets), default=0)
    planes = [(offset, r) for offset in dict.fromkeys(depth.offsets) for r in remainders]
    rows = [((z, o % height.step), o // height.step - low) for z in depth.offsets for o in height.offsets]
    Q = height.outputs + high - low
    lines = np.empty((depth.outputs, len(planes), Q), np.int64)
    for i, (z, r) in enumerate(planes):
        d = np.arange(depth.outputs)[:, None] * depth.step + z
        h = (np.arange(Q) + low) * height.step + r
        inside = (d >= 0) & (d < depth.size) & (h >= 0) & (h < height.size)
        lines[:, i] = np.where(inside, d * strides[2] + h * strides[3], -1)
    return lines, planes, rows, Q


__all__ = ["Convolution", "Geometry", "WeightGradient", "bits", "forward", "input_gradient", "weight_gradient"]
