"""Convolution on the CPU, for the backend: from shapes and strides to what runs, once for each, then from a cache.

A convolution and its gradient by the input are correlations (correlation.py); each becomes a nest, a job list and tables: parts.py, and for
depthwise ones depthwise_plans.py.  Gradients by the weights: weight_plans.py.
"""

import functools

from .. import correlation
from ..correlation import Geometry
from ..launch import bits
from ..simd import native_lanes, number
from . import blocking, channel_lanes, depthwise_plans, pixel_lanes
from .geometry import itemsize
from .parts import PHASES, Banded, Layout, Zeros
from .taps import is_depthwise, is_flat, pixels_kept, share_of_rows, stored
from .weight_plans import WeightGradient, weight_gradient


@functools.lru_cache(maxsize=1024)
def forward(geometry, after):
    """-> Convolution; ``after``: an ``Activation`` or None."""
    return Convolution([part(stored(correlation.forward(geometry)), after)])


@functools.lru_cache(maxsize=1024)
def input_gradient(geometry, biased=False):
    """-> Convolution that takes gy, dense in geometry's layout, to gx, likewise, and where ``biased`` adds a bias."""
    parts = [stored(part) for part in correlation.input_gradient(geometry)]
    if (spread := depthwise_plans.input_gradient(parts, geometry)) is not None:
        return Convolution([spread])
    made = [part(problem, None) for problem in parts if biased or problem.weight_taps]
    return Convolution(made if len(made) == len(parts) else [Zeros(geometry), *made])


SERIAL = 300_000
"""Multiply-adds below which a second thread costs more than it brings: handing over takes about 3 us."""


class Convolution:
    """Correlations that make one result, of weights that are packed before."""

    sums = 0

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


def part(problem, after, most=None):
    """The nest of least cost, by blocking.py's model.  ``most``: rows of one map that a band may have."""
    if is_depthwise(problem) and (found := depthwise_plans.part(problem, after)):
        return found
    lanes, flat = native_lanes(problem.dtype), is_flat(problem)
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
    return blocking.tile(
        *_extent(problem, flat), problem.outputs, lanes, steps, functools.partial(share_of_rows, problem), pixels_kept(width)
    )


def _pixel_tile(problem, lanes, flat):
    taps = len(problem.weight_taps)
    steps = problem.inputs * max(1, taps) * share_of_rows(problem, 1)
    return blocking.pixel_tile(*_extent(problem, flat), problem.outputs, lanes, steps, taps > 1)


def _extent(problem, flat):
    """(columns, rows) that tiles are cut from; a map is one row where it is ``flat``."""
    depth, height, width = problem.axes
    if flat:
        return depth.size * height.size * width.size, problem.images
    return width.outputs, height.outputs * problem.images


def _with_channel_lanes(problem, after, tile, lanes, flat, most=None):
    block, real, last = tile.cols * lanes, number(problem.dtype), problem.channels_last
    layout, pitch = _channel_layout(problem, tile, lanes, flat, most)
    step = (1 if flat else problem.axes[2].step) * (pitch or 1)
    pixel, between = (1, problem.x_strides[4]) if last else (problem.y_strides[4], 0)
    small = between * itemsize(real) <= blocking.UNPACKED_BYTES and problem.outputs <= blocking.UNPACKED_OUTPUTS
    in_place = last and flat and small and real == problem.dtype
    step = between if in_place else step
    runs = layout.columns if flat and not last else 0
    kept = pixels_kept(problem.axes[2]) if tile.pixels == problem.axes[2].outputs and not flat else ()
    beside = 1 < tile.pieces <= layout.maps and not flat
    constants = lanes, *tile, step, pitch, runs, pixel, after, in_place, kept, beside
    return Banded(problem, layout, channel_lanes.forward, constants, block, ahead=functools.partial(layout.asked, step, in_place, beside))


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
    return Banded(problem, layout, pixel_lanes.forward, constants, block, turns)


__all__ = ["Convolution", "Geometry", "WeightGradient", "bits", "forward", "input_gradient", "weight_gradient"]
