"""The rectifiers.  NaN stays NaN, as in torch; the slope at a corner is the left one, torch's."""

from ..number import like, where
from . import Activation


def relu(x, p):
    zero = like(x, 0)
    return where(x < zero, zero, x)


def relu_slope(y, p):
    return where(y > like(y, 0), like(y, 1), like(y, 0))


def relu6(x, p):
    zero, six = like(x, 0), like(x, 6)
    return where(x < zero, zero, where(x > six, six, x))


def relu6_slope(y, p):
    return where((y > like(y, 0)) & (y < like(y, 6)), like(y, 1), like(y, 0))


def leaky_relu(x, p):
    return where(x > like(x, 0), x, x * p[0])


def leaky_relu_slope(y, p):
    return where(y > like(y, 0), like(y, 1), p[0])


def _refuse_slope(negative_slope):
    # From the output alone the sign of the input cannot be told otherwise.
    return None if negative_slope > 0 else f"negative_slope must be above 0, got {negative_slope}; relu is the slope of 0"


RELU = Activation("relu", relu, relu_slope)
RELU6 = Activation("relu6", relu6, relu6_slope)
LEAKY_RELU = Activation("leaky_relu", leaky_relu, leaky_relu_slope, {"negative_slope": 0.01}, _refuse_slope)
