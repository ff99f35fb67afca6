"""The rectifiers.  NaN stays NaN, as in torch; the slope at a corner is the left one, torch's (relu6's at 6: the right one)."""

from ..number import like, where
from . import Activation, Shape, rising, valley


def relu(x, p):
    zero = like(x, 0)
    return where(x < zero, zero, x)


def step(x, p):
    """relu's slope, from x or y."""
    return where(x > like(x, 0), like(x, 1), like(x, 0))


def relu6(x, p):
    zero, six = like(x, 0), like(x, 6)
    return where(x < zero, zero, where(x > six, six, x))


def inside_6(x, p):
    """relu6's slope, from x or y."""
    return where((x > like(x, 0)) & (x < like(x, 6)), like(x, 1), like(x, 0))


def leaky_relu(x, p):
    return where(x > like(x, 0), x, x * p[0])


def leaky_slope(x, p):
    """From x; from y where it has x's sign."""
    return where(x > like(x, 0), like(x, 1), p[0])


def rrelu(x, p):
    return where(x > like(x, 0), x, x * ((p[0] + p[1]) * like(x, 0.5)))


def rrelu_slope(x, p):
    return where(x > like(x, 0), like(x, 1), (p[0] + p[1]) * like(x, 0.5))


def threshold(x, p):
    return where(x <= p[0], p[1], x)


def beyond(x, p):
    """threshold's slope: from x; from y where a replaced x does not pass for another."""
    return where(x > p[0], like(x, 1), like(x, 0))


def leaky_shape(slope):
    """A negative slope makes a valley."""
    more = {"root": 0.0, "homogeneous": True, "affine": (1.0, 0.0) if slope == 1 else None}
    return rising(True, slope_above=1.0, **more) if slope >= 0 else valley(0.0, True, **more)


def threshold_shape(at, value):
    """Where a replaced x gets more than ``at``, f jumps down behind it, and rises from there."""
    root = 0.0 if at < 0 or value == 0 else None
    above = 1.0 if at <= 0 and value <= 0 else None
    if value <= at:
        return rising(True, root=root, homogeneous=at == value == 0, slope_above=above)
    return Shape(at, None, True, root, slope_above=above)


RELU = Activation("relu", relu, step, lambda: leaky_shape(0.0), step, switches=True)
RELU6 = Activation("relu6", relu6, inside_6, lambda: rising(True, root=0.0), inside_6, switches=True)
# Of a slope of 0 or less y does not tell the sign of x.
LEAKY_RELU = Activation("leaky_relu", leaky_relu, leaky_slope, leaky_shape, leaky_slope, lambda slope: slope > 0, {"negative_slope": 0.01})
PRELU = Activation("prelu", leaky_relu, leaky_slope, leaky_shape, leaky_slope, lambda slope: slope > 0, {"weight": 0.25})
RRELU = Activation(
    "rrelu",
    rrelu,
    rrelu_slope,
    lambda lower, upper: leaky_shape((lower + upper) / 2),
    rrelu_slope,
    lambda lower, upper: lower + upper > 0,
    {"lower": 1 / 8, "upper": 1 / 3},
    lambda lower, upper: None if lower <= upper else f"lower must be at most upper, got {lower} and {upper}",
)
"""Evaluation's: the middle of the slopes that training draws from."""
THRESHOLD = Activation(
    "threshold",
    threshold,
    beyond,
    threshold_shape,
    beyond,
    lambda at, value: value <= at,
    {"threshold": None, "value": None},
    switches=True,
)
