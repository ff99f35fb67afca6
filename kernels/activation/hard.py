"""Piecewise: Hardtanh, Hardsigmoid, Hardswish (Howard et al., "Searching for MobileNetV3", 2019) and the shrinkages.

NaN stays NaN; the slope at a corner is that of the flat side, torch's.
"""

import math

from ..number import like, where
from . import Activation, rising, valley

SIXTH = 1 / 6


def hardtanh(x, p):
    return where(x < p[0], p[0], where(x > p[1], p[1], x))


def inside(x, p):
    """hardtanh's slope, from x or y."""
    return where((x > p[0]) & (x < p[1]), like(x, 1), like(x, 0))


def clipped(x):
    """x + 3, kept within 0 .. 6."""
    zero, six, y = like(x, 0), like(x, 6), x + like(x, 3)
    return where(y < zero, zero, where(y > six, six, y))


def hardsigmoid(x, p):
    return clipped(x) / like(x, 6)


def hardsigmoid_derivative(x, p):
    return where((x > like(x, -3)) & (x < like(x, 3)), like(x, SIXTH), like(x, 0))


def hardswish(x, p):
    return x * clipped(x) / like(x, 6)


def hardswish_derivative(x, p):
    one, zero, three = like(x, 1), like(x, 0), like(x, 3)
    return where(x <= -three, zero, where(x < three, x / three + like(x, 0.5), one))


def softshrink(x, p):
    return where(x > p[0], x - p[0], where(x < -p[0], x + p[0], x * like(x, 0)))


def softshrink_derivative(x, p):
    return where((x > p[0]) | (x < -p[0]), like(x, 1), like(x, 0))


def nonzero(y, p):
    """A shrinkage's slope, from y."""
    return where(y == like(y, 0), like(y, 0), like(y, 1))


def hardshrink(x, p):
    return where((x >= -p[0]) & (x <= p[0]), like(x, 0), x)


def hardshrink_derivative(x, p):
    return where((x >= -p[0]) & (x <= p[0]), like(x, 0), like(x, 1))


def hardtanh_shape(low, high):
    ends = {low, high} <= {0.0, math.inf, -math.inf}
    root = 0.0 if low <= 0 <= high else None
    above = {0.0: 0.0, math.inf: 1.0}.get(high) if low <= 0 else None
    identity = (1.0, 0.0) if low == -math.inf and high == math.inf else None
    return rising(True, root=root, homogeneous=ends, slope_above=above, affine=identity)


def shrink_shape(lambd):
    """The identity where nothing is shrunk."""
    same = lambd <= 0
    return rising(True, root=0.0, homogeneous=same, slope_above=1.0 if same else None, affine=(1.0, 0.0) if same else None)


HARDTANH = Activation(
    "hardtanh",
    hardtanh,
    inside,
    hardtanh_shape,
    inside,
    defaults={"min_val": -1.0, "max_val": 1.0},
    refuse=lambda low, high: None if low < high else f"min_val must be below max_val, got {low} and {high}",
    switches=True,
)
# At 3 less a last place y is 1 already: from y the slope would be 0 there.
HARDSIGMOID = Activation("hardsigmoid", hardsigmoid, hardsigmoid_derivative, lambda: rising(True, root=-3.0))
HARDSWISH = Activation("hardswish", hardswish, hardswish_derivative, lambda: valley(-1.5, root=0.0))
SOFTSHRINK = Activation(
    "softshrink",
    softshrink,
    softshrink_derivative,
    shrink_shape,
    nonzero,
    defaults={"lambd": 0.5},
    refuse=lambda lambd: None if lambd >= 0 else f"lambd must be at least 0, got {lambd}",
    switches=True,
)
HARDSHRINK = Activation(
    "hardshrink", hardshrink, hardshrink_derivative, shrink_shape, nonzero, lambda lambd: lambd >= 0, {"lambd": 0.5}, switches=True
)
