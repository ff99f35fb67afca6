"""Convolution on CUDA, for the backend: from shapes and strides to launches, once for each, then from a cache.

As kernels/cpu/convolution.py, of a device: ``on(index)`` has ``forward``, ``input_gradient`` and ``weight_gradient``.
"""

import functools
import itertools
import math

from .. import correlation
from ..correlation import Geometry
from ..geometry import dense_strides
from . import correlate, depthwise, weight_gradient
from .correlate import RUN, Tile
from .number import computed, divisors
from .pooling import MOST, THREADS, Plan, bits, blocks, itemsize, parts

WIDE, NARROW, SMALL = Tile(128, 64, 8, 4, 8), Tile(128, 32, 4, 4, 8), Tile(64, 32, 4, 4, 8)
"""Tiles of many channels, of few, and of so few outputs that larger ones would leave multiprocessors without a block."""

SQUARE = Tile(64, 64, 8, 4, 8)
"""Of sums over outputs, by 64 output channels: a thread's products are as many as of WIDE."""

FILLED = 128
"""Blocks that keep every multiprocessor busy: an A100 has 108, an H100 132."""

SHARED = 16
"""Steps, at least, of each of the blocks that divide a tile's among them, where there are fewer tiles than keep a device busy."""

FEW = 4
"""Input channels up to which a step has so many only: of more, most would be zeros."""

PARTS, LEAST = 512, 512
"""Blocks among which a gradient by the weights is divided, and outputs that a block has at least."""

LARGEST_WORD = 4
"""Bytes of numbers of which RUN are read or written at once."""


class Device:
    """The plans of one device."""

    Geometry = staticmethod(Geometry)
    bits = staticmethod(bits)

    def __init__(self, index, filled=FILLED):
        self.index, self.filled = index, filled
        self.forward, self.input_gradient, self.weight_gradient = map(
            functools.lru_cache(maxsize=1024), (self._forward, self._input_gradient, self._weight_gradient)
        )

    def _forward(self, geometry, after):
        """-> Convolution; ``after``: an ``Activation`` or None."""
        return Convolution(self.index, [correlation.forward(geometry)], after, filled=self.filled)

    def _input_gradient(self, geometry, biased=False):
        """-> Convolution that takes gy, dense in geometry's layout, to gx, likewise, with a bias or without."""
        return Convolution(self.index, list(correlation.input_gradient(geometry)), None, filled=self.filled)

    def _weight_gradient(self, geometry):
        """-> WeightGradient, which takes x and gy, dense in geometry's layout, to gw, which lies as the weights."""
        return WeightGradient(self.index, correlation.forward(geometry), geometry)


def is_depthwise(problem):
    """Whether depthwise.py's kernels do it: each channel of y, whose weights follow those of the one before, is of one of x."""
    step_g, step_o, _ = problem.weight_steps
    follow = problem.outputs == 1 or step_g == problem.outputs * step_o
    return problem.groups > 1 and problem.inputs == 1 and follow and len(problem.weight_taps) <= depthwise.UNROLLED


class Convolution:
    """Correlations that make one result, of weights that are packed before.

    ``pooling``: of each window of the results only (reduction, window, what an average divides by) is kept, ``out`` of them along each
    axis.
    """

    parallel, panel = False, 0

    def __init__(self, device, parts, after, pooling=None, out=None, filled=FILLED):
        of = [_Depthwise if is_depthwise(part) else _Product for part in parts]
        self.parts = [kind(device, part, after, pooling, out, filled) for kind, part in zip(of, parts, strict=True)]
        self.packed = sum(part.packed for part in self.parts)
        """Elements of packed weights."""
        self.sums = max(part.sums for part in self.parts)
        """Elements of the dtype computed in that ``run`` needs: its ``panels``."""
        self.form = tuple(part.form for part in self.parts)

    def pack(self, packed, weight, bias, scale, threads):
        """All are addresses, 0 where there is none."""
        for part in self.parts:
            part.pack(packed, weight, bias, scale)
            packed += part.packed * part.itemsize

    def run(self, x, packed, y, panels, threads, *more):
        for part in self.parts:
            part.run(x, packed, y, panels, *more)
            packed += part.packed * part.itemsize


class _Part:
    """A correlation, its weights in rows of ``pitch``: of ``groups`` groups, ``each`` rows a tap and one behind."""

    sums = 0

    def __init__(self, device, problem, pitch, groups, each, inputs, outputs, steps):
        self.device, self.problem = device, problem
        real, taps = computed(problem.dtype), len(problem.weight_taps)
        self.itemsize, self.element = real.bitwidth // 8, itemsize(problem.dtype)
        rows = taps * each + 1
        self.packed = groups * rows * pitch
        self.form = problem.dtype, pitch, each, problem.weight_taps, problem.weight_steps
        if self.packed > MOST:
            raise NotImplementedError(f"weights come to {self.packed} elements: CUDA kernels count up to {MOST}, the CPU's further")
        counts = tuple(len(axis.offsets) for axis in problem.axes)
        self.counts = counts
        self.numbers = [self.packed, *divisors(pitch, rows, each, max(1, counts[1]), max(1, counts[2])), inputs, outputs, *steps]
        self.numbers += _progression(problem.weight_taps, counts)

        self._packing, self._planned = (functools.lru_cache(maxsize=4)(f) for f in (self._pack, self._plan))

    def _pack(self, biased, scaled):
        kernel, itemsizes = correlate.pack(self.problem.dtype, biased, scaled), (self.itemsize, *(self.element,) * 3)
        return Plan(self.device, kernel, [(blocks(self.packed), THREADS, (0,) * 4, self.numbers)], itemsizes)

    def pack(self, packed, weight, bias, scale):
        self._packing(bias != 0, scale != 0).run((packed, weight, bias, scale), 1)


class _Product(_Part):
    """By correlate.py's kernel."""

    def __init__(self, device, problem, after, pooling, out, filled):
        self.after, self.pooling = after, pooling
        window = pooling[1] if pooling else (1, 1, 1)
        outputs = out or tuple(axis.outputs for axis in problem.axes)
        each, self.outputs, self.taps = math.prod(outputs), outputs, math.prod(window)
        self.tile = _tile(problem, problem.images * each * self.taps, filled)
        columns = -(-problem.outputs // self.tile.channels)
        rows = -(-problem.inputs // self.tile.depth) * self.tile.depth
        super().__init__(
            device, problem, columns * self.tile.channels, problem.groups, rows, problem.inputs, problem.outputs, problem.weight_steps
        )
        self.rows, self.columns = rows, columns
        self.steps = len(problem.weight_taps) * rows // self.tile.depth
        tiles = -(-problem.images * each * self.taps // self.tile.pixels) * columns * problem.groups
        self.part = -(-self.steps // max(1, min(filled // max(1, tiles), self.steps // SHARED)))
        """Steps of a block."""
        self.parts = -(-self.steps // max(1, self.part)) or 1
        self.divided = self.parts > 1
        self.channels, self.strides, written = problem.groups * problem.outputs, problem.y_strides, self.element
        if self.divided:
            self.strides, written = dense_strides(self.channels, outputs, problem.channels_last), self.itemsize
            self.sums = sum(self.parts * apart for _, _, apart in self._images())
        self.written = written
        self.reads_wide = self.element <= LARGEST_WORD and self._wide_steps_of_x()
        self.writes_wide = written <= LARGEST_WORD and self._wide_steps_of_y()

    @property
    def share(self):
        """Elements of x that a thread reads at once."""
        return self.tile.pixels * self.tile.depth // self.tile.threads

    def _wide_steps_of_x(self):
        p = self.problem
        return p.channels_last and not any(step % self.share for step in (p.inputs, p.x_strides[0], *p.x_strides[2:]))

    def _wide_steps_of_y(self):
        p, strides, (_, height, width) = self.problem, self.strides, self.outputs
        if p.channels_last:
            steps, whole = (p.outputs, strides[0], *strides[2:]), True
        else:
            steps, whole = (math.prod(self.outputs), *strides[:2]), self.taps == 1 and strides[2:] == (height * width, width, 1)
        return whole and not any(step % RUN for step in steps)

    def _images(self):
        """(first image, images, results of each part) of each launch."""
        each = math.prod(self.outputs)
        for first, images in _images(self.problem, max(each * self.taps * self.channels, 1)):
            yield first, images, -(-images * each * self.channels // RUN) * RUN

    def plan(self, x, to, first=0):
        """``first``: of the results, in elements from ``to``."""
        wide_in = self.reads_wide and x % (self.share * self.element) == 0
        return self._planned(wide_in, self.writes_wide and (to + first * self.written) % (RUN * self.written) == 0)

    def run(self, x, packed, y, sums, *more):
        if self.divided:
            self.plan(x, sums).run((x, packed, sums), 1)
            self.last.run((y, sums, packed), 1, *more)
        else:
            self.plan(x, y, self.problem.y_start).run((x, packed, y), 1, *more)

    def _plan(self, wide_in, wide_out):
        p, (kind, window, divisor) = self.problem, self.pooling or (None, (1, 1, 1), 1)
        constants = p.dtype, p.channels_last, self.tile, None if self.divided else self.after, kind, window, divisor
        kernel = correlate.forward(*constants, wide_in, wide_out, self.divided)
        each, launches, behind = math.prod(self.outputs), [], 0
        pitch = self.columns * self.tile.channels
        for first, images, apart in self._images():
            total = images * each * self.taps
            tiles = -(-total // self.tile.pixels)
            numbers = [total, *divisors(*self.outputs, self.columns, tiles), p.inputs, self.rows, p.outputs, pitch, self.steps]
            numbers += [*(axis.size for axis in p.axes), *p.x_strides, *_along(p), *self.counts[1:], *self.strides]
            numbers += [p.groups, self.part, apart]
            moved = first * p.x_strides[0], 0, behind if self.divided else first * p.y_strides[0] + p.y_start
            launches.append((tiles * self.columns * p.groups * self.parts, self.tile.threads, moved, numbers))
            behind += self.parts * apart
        return Plan(self.device, kernel, launches, (self.element, self.itemsize, self.written))

    @functools.cached_property
    def last(self):
        """What adds the parts up."""
        p, launches, behind, pitch = self.problem, [], 0, self.columns * self.tile.channels
        before, kernel = self.steps * self.tile.depth * pitch, correlate.summed(self.problem.dtype, self.problem.channels_last, self.after)
        for first, images, apart in self._images():
            total = images * math.prod(self.outputs) * self.channels
            numbers = [total, self.parts, apart, *divisors(self.channels, *self.outputs, p.outputs), before + pitch, before, *p.y_strides]
            launches.append((blocks(total), THREADS, (first * p.y_strides[0] + p.y_start, behind, 0), numbers))
            behind += self.parts * apart
        return Plan(self.device, kernel, launches, (self.element, self.itemsize, self.itemsize))


class _Depthwise(_Part):
    """By depthwise.py's kernel."""

    def __init__(self, device, problem, after, pooling, out, filled):
        channels = problem.groups * problem.outputs
        step_g, step_o, step_i = problem.weight_steps
        steps = 0, step_o if problem.outputs > 1 else step_g, step_i
        super().__init__(device, problem, channels, 1, 1, 1, channels, steps)
        self.form = *self.form, "depthwise"
        self.after = after

    def _plan(self):
        p = self.problem
        kernel = depthwise.forward(p.dtype, p.channels_last, self.after, self.counts)
        channels, outputs, launches = p.groups * p.outputs, tuple(axis.outputs for axis in p.axes), []
        each = channels * math.prod(outputs)
        for first, images in _images(p, each):
            numbers = [images * each, *divisors(channels, *outputs, p.outputs), *(axis.size for axis in p.axes)]
            numbers += [*p.x_strides, *_along(p), *p.y_strides]
            moved = first * p.x_strides[0], 0, first * p.y_strides[0] + p.y_start
            launches.append((blocks(images * each), THREADS, moved, numbers))
        return Plan(self.device, kernel, launches, (self.element, self.itemsize, self.element))

    def run(self, x, packed, y, sums, *more):
        self._planned().run((x, packed, y), 1, *more)


class WeightGradient:
    """``sums`` elements of the dtype computed in are needed to ``run`` it."""

    parallel, panel = False, 0

    def __init__(self, device, problem, geometry):
        p = problem
        real, size = computed(p.dtype).bitwidth // 8, itemsize(p.dtype)
        counts, outputs = tuple(len(axis.offsets) for axis in p.axes), tuple(axis.outputs for axis in p.axes)
        taps, each, channels = math.prod(counts), math.prod(outputs), p.groups * p.outputs
        alone = p.groups > 1 and p.inputs == 1 and taps <= depthwise.SUMMED
        columns, inputs = p.inputs * taps, p.inputs
        count = channels * columns
        behind = [*(axis.size for axis in p.axes), *p.x_strides, *_along(p), *p.y_strides]
        launches, slices = [], 0
        for first, images in _images(p, max(1, channels * each, inputs * p.groups)):
            total = images * each
            if alone:
                threads, tiles = depthwise.THREADS, -(-channels // depthwise.CHANNELS) if p.channels_last else channels
                part, many = _division(total, tiles, 1)
                numbers = [*divisors(tiles), channels, total, part, *divisors(*outputs, p.outputs), *behind]
            else:
                tile = _sum_tile(p)
                threads, rows, across = tile.threads, -(-p.outputs // tile.pixels), -(-columns // tile.channels)
                tiles = rows * across * p.groups
                part, many = _division(total, tiles, tile.depth)
                numbers = [*divisors(rows, across, p.groups), columns, total, part, *divisors(*outputs, inputs, *counts[1:])]
                numbers += [p.outputs, *behind]
            launches.append((tiles * many, threads, (slices * count, first * p.x_strides[0], first * p.y_strides[0]), numbers))
            slices += many
        self.sums = slices * count
        constants = p.dtype, p.channels_last
        kernel = depthwise.weights(*constants, counts) if alone else weight_gradient.partial(*constants, _sum_tile(p))
        self.partial = Plan(device, kernel, launches, (real, size, size))
        numbers = [count, slices, *divisors(columns, inputs, *counts[1:]), *geometry.weight_strides]
        self.last = Plan(device, weight_gradient.ordered(p.dtype), [(blocks(count), THREADS, (0, 0), numbers)], (size, real))

    def run(self, x, gy, gw, sums, panels, threads):
        self.partial.run((sums, x, gy), 1)
        self.last.run((gw, sums), 1)


def _tile(problem, outputs, filled):
    """The largest tile of which there are ``filled`` blocks, or else the smallest."""
    tiles = (WIDE, NARROW, SMALL) if problem.outputs > NARROW.channels else (NARROW, SMALL)
    if problem.dtype == "float64":
        tiles = (SMALL,)
    enough = (t for t in tiles if -(-outputs // t.pixels) * -(-problem.outputs // t.channels) * problem.groups >= filled)
    tile = next(enough, SMALL)
    if problem.inputs > FEW:
        return tile
    # Of so few channels a step's weights are 4 by 32: no more threads than those.
    return tile._replace(depth=FEW, rows=8 if tile is NARROW else tile.rows)


def _sum_tile(problem):
    """That of a gradient by the weights, whose outputs are divided until a device is filled."""
    if problem.dtype == "float64" or problem.outputs <= SMALL.channels:
        return SMALL
    return WIDE if problem.outputs > SQUARE.pixels else SQUARE


def _division(outputs, tiles, whole):
    """(outputs of a part, a multiple of ``whole``; parts)"""
    many = max(1, min(-(-PARTS // tiles), outputs // LEAST))
    part = -(-outputs // many // whole) * whole
    return part, -(-outputs // part)


def _images(problem, most):
    """``parts`` of it; ``most``: elements of an image of y."""
    sizes = problem.groups * problem.inputs, *(axis.size for axis in problem.axes)
    x = sum((size - 1) * step for size, step in zip(sizes, problem.x_strides[1:], strict=True)) + 1
    return parts(problem.images, most, x, problem.x_strides[0], problem.y_strides[0])


def _along(problem):
    """Step, first offset and distance of taps, each of D, H and W, as uint32."""
    firsts = [axis.offsets[0] if axis.offsets else 0 for axis in problem.axes]
    apart = [axis.offsets[1] - axis.offsets[0] if len(axis.offsets) > 1 else 0 for axis in problem.axes]
    return [number % 2**32 for number in (*(axis.step for axis in problem.axes), *firsts, *apart)]


def _progression(taps, counts):
    """(first, distance along D, H and W) of the taps' places in a kernel: equal distances, as those of a correlation are."""
    if not taps:
        return [0, 0, 0, 0]
    KD, KH, KW = counts
    steps = [taps[following] - taps[0] if count > 1 else 0 for count, following in ((KD, KH * KW), (KH, KW), (KW, 1))]
    assert all(
        taps[0] + sum(map(int.__mul__, at, steps)) == tap for at, tap in zip(itertools.product(*map(range, counts)), taps, strict=True)
    )
    return [taps[0], *steps]


on = functools.cache(Device)
