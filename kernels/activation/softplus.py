"""Softplus, ln(1 + e^x), and what is made of it: its mirror LogSigmoid, and Mish (Misra, "Mish: A Self Regularized Non-Monotonic
Activation Function", 2019), x tanh(softplus(x)).
"""

import math

from ..number import absolute, decay, exp, expm1, like, log1p, where
from . import Activation, Shape, rising, valley


def softplus(x, p):
    z = x * p[0]
    return where(z > p[1], x, log1p(exp(z)) / p[0])


def softplus_derivative(x, p):
    one, z = like(x, 1), x * p[0]
    e = decay(absolute(z))
    return where(z > p[1], one, where(z < like(x, 0), e, one) / (one + e))


def logsigmoid(x, p):
    zero = like(x, 0)
    return where(x < zero, x, zero) - log1p(decay(absolute(x)))


def logsigmoid_derivative(x, p):
    one, e = like(x, 1), decay(absolute(x))
    return where(x < like(x, 0), one, e) / (one + e)


def logsigmoid_slope(y, p):
    return -expm1(y)


def parts(x):
    """tanh(softplus(x)) as a / b, and b - a, by u = e^-|x|, which does not overflow."""
    two, u, above = like(x, 2), decay(absolute(x)), x > like(x, 0)
    a = where(above, like(x, 1) + two * u, u * (u + two))
    rest = where(above, two * u * u, two)
    return a, a + rest, rest, u


def mish(x, p):
    a, b, _, _ = parts(x)
    return x * (a / b)


def mish_derivative(x, p):
    a, b, rest, u = parts(x)
    one, t = like(x, 1), a / b
    sigmoid = where(x > like(x, 0), one, u) / (one + u)
    return t + x * sigmoid * (rest / b) * (one + t)


def softplus_shape(beta, threshold):
    """Rises; but falls by ln(1 + e^-threshold) / beta where beta * x passes the threshold: at 20, by 2e-9, lost in a float32's rounding."""
    root = math.copysign(math.inf, -beta)
    return rising(root=root) if threshold >= 20 else Shape(root=root)


SOFTPLUS = Activation(
    "softplus",
    softplus,
    softplus_derivative,
    softplus_shape,
    defaults={"beta": 1.0, "threshold": 20.0},
    refuse=lambda beta, threshold: None if beta else f"beta must not be 0, got {beta}",
)
LOGSIGMOID = Activation("logsigmoid", logsigmoid, logsigmoid_derivative, lambda: rising(root=math.inf), logsigmoid_slope)
MISH = Activation("mish", mish, mish_derivative, lambda: valley(-1.1924312145154952, root=0.0))
