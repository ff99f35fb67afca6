"""Convolutions, as kernels of every target are told of them: the geometry, and the correlations that it comes to.

A convolution, its gradients by the input and a transposed convolution are all *correlations*: along an axis, tap k of output o reads
position ``o * step + offsets[k]``, zeros outside.  A gradient by the input with stride s is s of them along an axis, one for each
remainder of the position, as no tap serves two.
"""

import itertools
from typing import NamedTuple

from .geometry import dense_strides


class Geometry(NamedTuple):
    """Of a convolution.  Axes: N, C, D, H, W; of weights: output channels, input channels of a group, D, H, W."""

    dtype: str
    shape: tuple[int, int, int, int, int]
    strides: tuple[int, int, int, int, int]
    channels_last: bool
    weight_shape: tuple[int, int, int, int, int]
    weight_strides: tuple[int, int, int, int, int]
    groups: int
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    """Before the first element; what comes after the last follows from ``out``."""
    dilation: tuple[int, int, int]
    out: tuple[int, int, int]


class Axis(NamedTuple):
    """Tap k of output o reads position o * step + offsets[k] of ``size``."""

    size: int
    outputs: int
    step: int
    offsets: tuple[int, ...]


class Correlation(NamedTuple):
    """What a nest computes."""

    dtype: str
    channels_last: bool
    images: int
    groups: int
    inputs: int
    """Channels a group."""
    outputs: int
    axes: tuple[Axis, Axis, Axis]
    x_strides: tuple[int, ...]
    y_strides: tuple[int, ...]
    y_start: int
    weight_steps: tuple[int, int, int]
    """From group to group, output to output and input to input channel."""
    weight_taps: tuple[int, ...]
    """Offsets of the taps in a kernel, the last axis fastest."""


def forward(g):
    """The one correlation that a convolution is."""
    axes = tuple(
        Axis(size, out, step, tuple(k * d - p for k in range(taps)))
        for size, out, step, taps, d, p in zip(g.shape[2:], g.out, g.stride, g.weight_shape[2:], g.dilation, g.padding, strict=True)
    )
    step_o, step_i, *steps = g.weight_strides
    outputs, inputs = g.weight_shape[0] // g.groups, g.weight_shape[1]
    taps = tuple(sum(map(int.__mul__, tap, steps)) for tap in itertools.product(*map(range, g.weight_shape[2:])))
    y = dense_strides(g.weight_shape[0], g.out, g.channels_last)
    steps = (step_o * outputs, step_o, step_i)
    return Correlation(g.dtype, g.channels_last, g.shape[0], g.groups, inputs, outputs, axes, g.strides, y, 0, steps, taps)


def input_gradient(g):
    """Those that take gy, dense in the geometry's layout, to gx, likewise."""
    step_o, step_i, *steps = g.weight_strides
    outputs, inputs = g.weight_shape[0] // g.groups, g.weight_shape[1]
    gy = dense_strides(g.weight_shape[0], g.out, g.channels_last)
    gx = dense_strides(g.shape[1], g.shape[2:], g.channels_last)
    along = []
    for size, out, step, taps, d, p, by in zip(g.shape[2:], g.out, g.stride, g.weight_shape[2:], g.dilation, g.padding, steps, strict=True):
        phases = []
        for first in range(min(step, size)):
            # gx[i] takes gy[o] through tap k where i + p = o * step + k * d; i = first + step * t.
            reach = [(k, (first + p - k * d) // step) for k in range(taps) if (first + p - k * d) % step == 0]
            axis = Axis(out, -(-(size - first) // step), 1, tuple(offset for _, offset in reach))
            phases.append((first, axis, [k * by for k, _ in reach]))
        along.append(phases)
    for phases in itertools.product(*along):
        firsts, axes, taps = zip(*phases, strict=True)
        start = sum(map(int.__mul__, firsts, gx[2:]))
        y = (*gx[:2], *map(int.__mul__, gx[2:], g.stride))
        picked = tuple(map(sum, itertools.product(*taps)))
        yield Correlation(
            g.dtype,
            g.channels_last,
            g.shape[0],
            g.groups,
            outputs,
            inputs,
            axes,
            gy,
            y,
            start,
            (step_o * outputs, step_i, step_o),
            picked,
        )
