"""ELU (Clevert, Unterthiner & Hochreiter, "Fast and Accurate Deep Network Learning by Exponential Linear Units", 2016) and its kin.

The slope below 0 is not told from y: y + alpha has lost all that f'(x) = alpha e^x is made of where y nears -alpha (torch's in-place
forms do that, its others keep x).
"""

from ..number import exp, expm1, like, where
from . import Activation, rising, valley

# Klambauer, Unterthiner, Mayr & Hochreiter, "Self-Normalizing Neural Networks", 2017.
SELU_ALPHA = 1.6732632423543772848170429916717
SELU_SCALE = 1.0507009873554804934193349852946
SELU_BOTH = SELU_ALPHA * SELU_SCALE


def elu(x, p):
    return where(x > like(x, 0), x, expm1(x) * p[0])


def elu_derivative(x, p):
    return where(x > like(x, 0), like(x, 1), exp(x) * p[0])


def celu(x, p):
    return where(x > like(x, 0), x, expm1(x * (like(x, 1) / p[0])) * p[0])


def celu_derivative(x, p):
    return where(x > like(x, 0), like(x, 1), exp(x * (like(x, 1) / p[0])))


def selu(x, p):
    return where(x > like(x, 0), x * like(x, SELU_SCALE), expm1(x) * like(x, SELU_BOTH))


def selu_derivative(x, p):
    return where(x > like(x, 0), like(x, SELU_SCALE), exp(x) * like(x, SELU_BOTH))


def elu_shape(alpha):
    """A negative alpha makes a valley."""
    return rising(root=0.0, homogeneous=alpha == 0, slope_above=1.0) if alpha >= 0 else valley(0.0, root=0.0)


ELU = Activation("elu", elu, elu_derivative, elu_shape, defaults={"alpha": 1.0})
CELU = Activation(
    "celu",
    celu,
    celu_derivative,
    lambda alpha: rising(root=0.0, slope_above=1.0),
    defaults={"alpha": 1.0},
    refuse=lambda alpha: None if alpha else f"alpha must not be 0, got {alpha}",
)
SELU = Activation("selu", selu, selu_derivative, lambda: rising(root=0.0, slope_above=SELU_SCALE))
