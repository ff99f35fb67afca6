"""A correlation, or a part of one, as a nest, a job list and tables: what packs its weights, its bands, the panel of each."""

import functools
import math

import numpy as np

from ..correlation import Axis
from ..launch import share
from ..simd import LINE, number
from . import blocking, elementwise, weights
from .geometry import itemsize, lanes_for
from .pooling import Plan
from .taps import lines_of, rows_inside


class Part:
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


class Zeros:
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


PHASES = 4
"""Strides up to which a panel is by phases: a register of each is made at once."""


class Banded(Part):
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
            lines, planes, rows, Q = lines_of(depth, height, x_strides)
            outs = np.arange(depth.outputs)[:, None] * y_strides[2] + np.arange(height.outputs) * y_strides[3]
            inside = rows_inside(depth, height) * len(width.offsets)
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
