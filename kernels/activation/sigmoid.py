"""The logistic function and SiLU (Elfwing, Uchibe & Doya, "Sigmoid-Weighted Linear Units", 2018).

By e^-|x|, which does not overflow: results below float32's smallest normal number are right too, where torch's are 0.
SiLU of -inf is NaN, as torch's.
"""

import math

from ..number import absolute, decay, like, where
from . import Activation, rising, valley


def sigmoid(x, p):
    one, e = like(x, 1), decay(absolute(x))
    return where(x < like(x, 0), e, one) / (one + e)


def sigmoid_derivative(x, p):
    one, e = like(x, 1), decay(absolute(x))
    return e / ((one + e) * (one + e))


def sigmoid_slope(y, p):
    return y * (like(y, 1) - y)


def silu(x, p):
    e = decay(absolute(x))
    return where(x < like(x, 0), x * e, x) / (like(x, 1) + e)


def silu_derivative(x, p):
    one, e = like(x, 1), decay(absolute(x))
    below = x < like(x, 0)
    whole = one + e
    return where(below, e, one) / whole * (one + x * (where(below, one, e) / whole))


SIGMOID = Activation("sigmoid", sigmoid, sigmoid_derivative, lambda: rising(root=-math.inf), sigmoid_slope)
SILU = Activation("silu", silu, silu_derivative, lambda: valley(-1.2784645427610738, root=0.0))
