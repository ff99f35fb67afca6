"""GELU, x by the normal distribution's function, and its tanh form (Hendrycks & Gimpel, "Gaussian Error Linear Units", 2016).

Off by a part of x's last place, as torch's first form, x / 2 (1 + erf(x / sqrt(2))); of a result far below 0 that is a large part, below
-5.6 all of torch's, a tenth of ours at -6.  -inf gives NaN, as torch's; inf gives inf, where torch's float32 vector code gives NaN for the
first form.
"""

from ..number import decay, like, ndtr, tanh
from . import Activation, valley

DENSITY = 0.3989422804014327  # 1 / sqrt(2 pi)
TANH_SCALE = 0.7978845608028654  # sqrt(2 / pi)
TANH_CUBE = 0.044715
TANH_SQUARE = 3 * TANH_CUBE


def gelu(x, p):
    return x * ndtr(x)


def gelu_derivative(x, p):
    return ndtr(x) + x * (like(x, DENSITY) * decay(like(x, 0.5) * x * x))


def inner(x):
    return like(x, TANH_SCALE) * (x + like(x, TANH_CUBE) * x * x * x)


def gelu_tanh(x, p):
    return like(x, 0.5) * x * (like(x, 1) + tanh(inner(x)))


def gelu_tanh_derivative(x, p):
    half, one, t = like(x, 0.5), like(x, 1), tanh(inner(x))
    slope = like(x, TANH_SCALE) * (one + like(x, TANH_SQUARE) * x * x)
    return half * (one + t) + half * x * ((one - t * t) * slope)


GELU = Activation("gelu", gelu, gelu_derivative, lambda: valley(-0.7517915246935645, root=0.0))
GELU_TANH = Activation("gelu_tanh", gelu_tanh, gelu_tanh_derivative, lambda: valley(-0.7524614220710163, root=0.0))
