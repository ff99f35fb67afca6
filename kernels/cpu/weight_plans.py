"""Gradients by the weights: which nest, its tables, the memory it needs."""

import functools
import itertools
import math

import numpy as np

from .. import correlation
from ..launch import share
from ..simd import native_lanes, number
from . import blocking, depthwise_plans, plane_products
from . import weight_gradient as nests
from .geometry import itemsize
from .pooling import Plan
from .taps import is_depthwise, is_flat, lines_of, stored


@functools.lru_cache(maxsize=1024)
def weight_gradient(geometry):
    """-> WeightGradient, which takes x and gy, dense in geometry's layout, to gw, which lies as the weights."""
    problem = stored(correlation.forward(geometry))
    if is_depthwise(problem) and (found := depthwise_plans.weight_gradient(problem)):
        return found
    if not problem.channels_last and is_flat(problem) and problem.x_strides[4] == 1 and math.prod(geometry.out) >= blocking.SEGMENT:
        return PlaneProducts(problem)
    return WeightGradient(problem, geometry)


class PlaneProducts:
    """``WeightGradient`` of a 1x1 convolution of contiguous maps: it needs no panels."""

    parallel, panel = True, 0

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


class WeightGradient:
    """``sums`` elements of ``number(dtype)`` and ``panel`` bytes a thread are needed to ``run`` it."""

    parallel = True

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
        lines, planes, rows, Q = lines_of(depth, height, problem.x_strides)
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
        asked = nests.AHEAD * width.step * x_pitch  # what lies behind a panel is another thread's
        self.panel = gy_panel + blocking.padded(max(bands.rows * width.outputs * pitch + block, asked) * size, 64)
        self.tables = [np.ascontiguousarray(t, np.int64) for t in (lines, outs, runs, sources)]
        *addresses, source = (t.ctypes.data for t in self.tables)
        chunks, count = -(-blocks // per), -(-height.outputs // bands.rows)
        slices = min(blocking.SLICES, problem.images * depth.outputs * count) if few else 1
        self.sums = slices * problem.groups * blocks * each
        near = blocking.near(problem.images * depth.outputs * height.outputs * width.outputs)
        xn, xc, *_, xw = problem.x_strides
        yn, yc, *_, yw = problem.y_strides
        sizes = (
            *addresses,
            *(problem.images, problem.inputs, problem.outputs, chunks, blocks, per),
            *(depth.outputs, height.outputs, width.outputs, bands.rows, count),
            *(len(planes), Q, RQ, columns, low, width.size, width.step, xn, xc, xw, yn, yc, yw),
            *(rowstep, pitch, gy_panel, self.panel, len(runs), length, tiles),
            *(max(1, near // width.outputs), slices, problem.groups, x_pitch),
        )
        worker = nests.backward(dtype, lanes, tile.pixels, tile.cols, problem.channels_last)
        self.plan = Plan(worker, slices * problem.groups * chunks, sizes, True)
        sizes = source, weights_each, problem.outputs, blocks, each, slices, problem.groups * blocks * each
        self.last = Plan(nests.ordered(dtype, lanes, block), problem.groups * blocks, sizes, True)

    def run(self, x, gy, gw, sums, panels, threads):
        plan = self.plan
        plan.run((x, gy, sums, panels, share(plan.jobs, threads)[1]), threads)
        self.last.run((gw, sums), threads)
