"""Depthwise convolutions and their gradients: which nest of depthwise.py, and its tables."""

import itertools
import math

import numpy as np

from ..simd import native_lanes, number
from . import ahead, blocking, depthwise
from .geometry import itemsize, lanes_for
from .parts import PHASES, Banded, Layout, Part
from .pooling import Plan
from .taps import end_of_x, in_order, inside_of, is_depthwise, lie_side_by_side, regular


def part(problem, after):
    """A depthwise correlation by a nest of its own, or None."""
    problem = in_order(problem)
    if problem.channels_last:
        return _Pixels([problem], (1, 1), [axis.outputs for axis in problem.axes], after)
    if _reads_rows(problem):
        return _Rows(problem, after)
    return _planes(problem, after) if problem.axes[2].step <= PHASES else None


def weight_gradient(problem):
    """-> a ``weight_plans.WeightGradient``, or None."""
    return WeightGradient(problem) if problem.channels_last or problem.axes[2].step <= PHASES else None


class _Pixels(Part):
    """A depthwise correlation of channels_last maps, or the several that a gradient by the input is."""

    panel = 0

    def __init__(self, parts, spread, size, after=None):
        """``spread``: the rows and columns of y that a position makes; ``size``: y's."""
        problem, (tall, wide), (_, OH, OW) = parts[0], spread, size
        dtype, channels, (depth, height, width) = problem.dtype, problem.groups, problem.axes
        picks, lanes = tuple(tap for part in parts for tap in part.weight_taps), native_lanes(dtype)
        taps, blocks, maps = len(picks), -(-channels // lanes), problem.images * channels
        self.itemsize, self.packed = itemsize(number(dtype)), blocks * lanes * (taps + 1)
        self.start = problem.y_start * itemsize(dtype)
        self.products = maps * taps * depth.outputs * height.outputs * width.outputs
        self.form = dtype, "depthwise", picks, problem.weight_steps
        reads, writes = (maps * math.prod(n) * itemsize(dtype) for n in ([axis.size for axis in problem.axes], size))
        few = writes > ahead.CACHED if max(spread) > 1 else max(height.step, width.step) > 1 and reads > 4 * ahead.CACHED
        pixels = blocking.pixels_together(width.outputs, few)
        sides, ends = _tiles_of_a_row(parts, pixels, wide, OW)
        shapes = tuple(tuple((len(axis.offsets), *regular(axis)) for axis in part.axes[1:]) for part in parts)
        low_d, apart_d = regular(depth)
        xn, _, xd, xh, xw = problem.x_strides
        yn, _, yd, yh, yw = problem.y_strides
        # From the first row of taps: behind the last one.  192x28x28, 5 MB that L3 holds: 275 us with, 225 without.
        far = max(height.offsets, default=0) * xh + ahead.distance(dtype) if reads > 2 * ahead.CACHED else 0
        soon = pixels * yw if writes > ahead.CACHED else 0
        self.sizes = (
            *(channels, taps, depth.outputs, depth.size, len(depth.offsets), low_d, depth.step, apart_d),
            *(height.size, height.outputs, OH, width.outputs),
            *(xn, xd, xh, xw, yn, yd, yh // tall, yw // wide, far, soon, *ends),
        )
        self.nest, self.jobs = depthwise.forward, problem.images * depth.outputs * height.outputs
        self.constants = dtype, lanes, pixels, (height.step, width.step), spread, shapes, sides, channels % lanes > 0, after
        self._packs(dtype, lanes, 1, channels, (0, problem.weight_steps[0], 0), 1, picks)


def _tiles_of_a_row(parts, pixels, wide, size):
    """depthwise.forward's ``sides``, and of each the end of its tiles: of a row of y of ``size``, ``wide`` for each position."""
    sides, outputs = [], parts[0].axes[2].outputs
    for first in range(0, outputs, pixels):
        first = min(first, outputs - pixels)
        inside = tuple(_columns_inside(part.axes[2], first, pixels) for part in parts)
        sides.append((wide * (first + pixels) > size, inside))
    return _runs(sides)


def _runs(sides):
    """Those that differ from the one before, and where each of their runs ends."""
    runs = [(side, len(list(run))) for side, run in itertools.groupby(sides)]
    return tuple(side for side, _ in runs), tuple(itertools.accumulate(count for _, count in runs))


def _columns_inside(width, first, count):
    """The first and the end of the columns inside that so many outputs read, from the first on."""
    left, columns = first * width.step + min(width.offsets, default=0), 0
    if width.offsets:
        columns = (count - 1) * width.step + max(width.offsets) - min(width.offsets) + 1
    begin, end = max(0, -left), min(columns, width.size - left)
    return (begin, end) if begin < end else (0, 0)


class _Rows(Part):
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
            *(height.offsets[0], width.offsets[0], end_of_x(problem), xn, xc, *x_steps, yn, yc, *y_steps),
        )
        self.nest, self.constants = depthwise.forward_rows, (dtype, lanes, rows, high, along, height.step, width.step, after)
        self.jobs = planes * bands
        self._packs(dtype, 1, channels, 1, problem.weight_steps, 1, problem.weight_taps)


def _planes(problem, after):
    _, height, width = problem.axes
    lanes = lanes_for(problem.dtype, width.outputs)
    rows, cols = blocking.plane_tile(width.outputs, height.outputs, lanes)
    layout = Layout(problem, 1, rows, cols * lanes, lanes, False, width.step, alone=True)
    constants = lanes, rows, cols, width.step, after, problem.y_strides[4]
    return Banded(problem, layout, depthwise.forward_planes, constants, 1)


def _reads_own_slice(depth):
    """Whether each output slice reads the one where it lies, and that is there: the last of a gradient may be read by none."""
    return depth.step == 1 and depth.offsets == (0,) and depth.outputs <= depth.size


def _reads_rows(problem):
    """Whether ``depthwise.forward_rows`` can run it."""
    depth, height, width = problem.axes
    flat = _reads_own_slice(depth)
    small = 0 < len(problem.weight_taps) <= blocking.WINDOW and max(height.step, width.step) <= 2
    return flat and small and lie_side_by_side(height) and lie_side_by_side(width) and problem.y_strides[4] == 1


def input_gradient(parts, geometry):
    """What makes a gradient by the input, of which several correlations make neighbouring elements, in one pass, or None."""
    _, down, across = geometry.stride
    # One a step, but of a map that is shorter; in one slice.
    together = [min(n) for n in zip(geometry.stride, geometry.shape[2:], strict=True)] == [1, down, across]
    if not together or max(down, across) != 2 or not all(map(is_depthwise, parts)):
        return None
    parts = list(map(in_order, parts))
    if geometry.channels_last:
        return _Pixels(parts, (down, across), geometry.shape[2:])
    flat = all(_reads_own_slice(part.axes[0]) for part in parts)
    side_by_side = all(lie_side_by_side(axis) for part in parts for axis in part.axes[1:])
    if flat and side_by_side and across == 2 and math.prod(geometry.weight_shape[2:]) <= blocking.WINDOW:
        return SpreadRows(parts, geometry)
    return None


class SpreadRows(Part):
    """The gradient by the input of a depthwise convolution of contiguous maps, from its parts."""

    panel = 0

    def __init__(self, parts, geometry):
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
            *(yn, yc, *y_steps, gn, gc, gd, gh // down, ahead.distance_in(dtype, math.prod(geometry.shape))),
        )
        self.nest, self.constants = depthwise.spread_rows, (dtype, lanes, rows, down, tuple(shapes))
        self.jobs = planes * bands
        self._packs(dtype, 1, channels, 1, problem.weight_steps, 1, picks)


def _rows_of_sums(problem):
    """So many rows of the kernel that they divide it, and their sums fit the registers."""
    _, KH, KW = (len(axis.offsets) for axis in problem.axes)
    return max(h for h in range(1, KH + 1) if KH % h == 0 and (h == 1 or h * KW <= blocking.registers() - 4))


class WeightGradient:
    """``weight_plans.WeightGradient`` of a depthwise convolution: it needs neither sums nor panels."""

    parallel, sums, panel = True, 0, 0

    def __init__(self, problem):
        if problem.channels_last:
            self._of_pixels(problem)
        elif problem.x_strides[4] == 1 and _reads_rows(problem):
            self._of_rows(problem)
        else:
            self._of_planes(problem)

    def _of_pixels(self, problem):
        dtype, lanes, channels, (depth, height, width) = problem.dtype, native_lanes(problem.dtype), problem.groups, problem.axes
        self.tables = np.array(problem.weight_taps, np.int64)
        (low_d, apart_d), (low_h, apart_h), (low_w, apart_w) = map(regular, problem.axes)
        high, along = _rows_of_sums(problem), len(width.offsets)
        pixels, sides = blocking.pixels_together(width.outputs, True), []
        for first in range(0, width.outputs, pixels):
            count = min(pixels, width.outputs - first)
            sides.append((count, _columns_inside(width, first, count)))
        sides, ends = _runs(sides)
        xn, _, *x_steps = problem.x_strides
        yn, _, *y_steps = problem.y_strides
        sizes = (
            *(self.tables.ctypes.data, problem.images, channels),
            *(depth.outputs, depth.size, len(depth.offsets), low_d, depth.step, apart_d),
            *(height.outputs, height.size, len(height.offsets), low_h, low_w, problem.weight_steps[0], xn, *x_steps, yn, *y_steps, *ends),
        )
        steps, apart, leaves = (height.step, width.step), (apart_h, apart_w), channels % lanes > 0
        worker = depthwise.weights_of_pixels(dtype, lanes, high, along, steps, apart, sides, leaves)
        self.plan = Plan(worker, -(-channels // lanes), sizes, True)

    def _of_planes(self, problem):
        dtype, counts = problem.dtype, [axis.outputs for axis in problem.axes]
        inside, taps, steps = inside_of(problem.axes, problem.x_strides)
        self.tables = inside, taps, np.array(problem.weight_taps, np.int64)
        (KD, KH, KW), high = (len(axis.offsets) for axis in problem.axes), _rows_of_sums(problem)
        xn, xc, yn, yc = *problem.x_strides[:2], *problem.y_strides[:2]
        sizes = (
            *(t.ctypes.data for t in self.tables),
            *(problem.images, problem.groups, *counts, problem.axes[2].size, KD, KH, max(KD, KH, KW)),
            *(xn, xc, *steps, yn, yc, *problem.y_strides[2:], problem.weight_steps[0]),
        )
        worker = depthwise.weights_of_planes(dtype, lanes_for(dtype, counts[2]), high, KW, problem.axes[2].step)
        self.plan = Plan(worker, problem.groups, sizes, True)

    def _of_rows(self, problem):
        dtype, (depth, height, width) = problem.dtype, problem.axes
        lanes, high, along = lanes_for(dtype, width.outputs), len(height.offsets), len(width.offsets)
        self.tables = np.array(problem.weight_taps, np.int64)
        rows = blocking.product_rows(height.outputs, high * along, along)
        xn, xc, *x_steps, _ = problem.x_strides
        yn, yc, *y_steps, _ = problem.y_strides
        sizes = (
            *(self.tables.ctypes.data, problem.images, depth.outputs, height.outputs, width.outputs, height.size, width.size),
            *(height.offsets[0], width.offsets[0], end_of_x(problem), xn, xc, *x_steps, yn, yc, *y_steps, problem.weight_steps[0]),
        )
        worker = depthwise.weights_of_rows(dtype, lanes, rows, high, along, height.step, width.step)
        self.plan = Plan(worker, problem.groups, sizes, True)

    def run(self, x, gy, gw, sums, panels, threads):
        self.plan.run((x, gy, gw), threads)
