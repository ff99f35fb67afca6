"""tanh; Tanhshrink, x - tanh(x); and Softsign, x / (1 + |x|).

Tanhshrink of small x is what rounding leaves, as in torch.  Softsign of an infinity is NaN, as torch's.
"""

from ..number import absolute, like, tanh
from . import Activation, rising


def value(x, p):
    return tanh(x)


def slope(y, p):
    one = like(y, 1)
    return one - y * y


def derivative(x, p):
    return slope(tanh(x), p)


def tanhshrink(x, p):
    return x - tanh(x)


def tanhshrink_derivative(x, p):
    t = tanh(x)
    return t * t


def softsign(x, p):
    return x / (like(x, 1) + absolute(x))


def softsign_derivative(x, p):
    one, whole = like(x, 1), like(x, 1) + absolute(x)
    return one / (whole * whole)


TANH = Activation("tanh", value, derivative, lambda: rising(root=0.0), slope)
TANHSHRINK = Activation("tanhshrink", tanhshrink, tanhshrink_derivative, lambda: rising(root=0.0))
SOFTSIGN = Activation("softsign", softsign, softsign_derivative, lambda: rising(root=0.0))
