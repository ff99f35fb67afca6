"""SoftPool (Stergiou, Poppe & Kalliatakis, "Refining activation downsampling with SoftPool", ICCV 2021, equation 2):
y = sum e^x x / sum e^x, the mean of a window weighted by its softmax.

Sums are kept relative to the largest element so far, so that no e^x overflows.  The gradient is s * (1 + x - y) with s the softmax.
-inf has no weight, as e^x x has the limit 0 there; a window of nothing else, or of nothing but padding, gives -inf.  inf gives inf.
"""

from ..number import absolute, exp, highest, like, log, lowest, where
from . import Face, Structure, Summing

# Up to this |largest element| the sum of e^x over any map is a float32.
LARGE = 64


def relative(x, largest):
    """e^(x - largest) for x <= largest: of infinities 0 and 1."""
    infinite = absolute(x) == highest(x)
    return exp(where(infinite, where(x > like(x, 0), like(x, 0), x), x - largest))


def init(zero):
    return lowest(zero), zero, zero


def accumulate(state, x, p):
    return combine(state, (x, like(x, 1), where(x == lowest(x), like(x, 0), x)))


def combine(a, b):
    x, n, v = a
    y, m, w = b
    wins = y > x
    one = like(x, 1)
    # The larger keeps its weights: one exponential serves both.
    less = relative(where(wins, x, y), where(wins, y, x))
    of_a, of_b = where(wins, less, one), where(wins, one, less)
    return where(wins, y, x), n * of_a + m * of_b, v * of_a + w * of_b


def finalise(state, count, size, p):
    largest, weights, weighted = state
    empty = weights == like(weights, 0)
    return where(empty, largest, weighted / where(empty, like(weights, 1), weights))


def residue(state):
    # sum e^x; where that may be out of range, -|ln(sum e^x)|, whose sign is y's.  The logarithm alone would do but for a large map of
    # small numbers: its rounding made the gradient of 120 x 157 normal ones 4 times as wrong as it may be.
    largest, weights, _ = state
    near = absolute(largest) < like(largest, LARGE)
    total = weights * exp(where(near, largest, like(largest, 0)))
    logarithm = largest + log(where(weights == like(weights, 0), like(weights, 1), weights))
    return where(near, total, -absolute(logarithm))


def share(gy, x, y, total, count, size, p):
    zero, one = like(x, 0), like(x, 1)
    near = total > zero
    logarithm = where(near, zero, where(y > zero, -total, total))
    weight = exp(x - logarithm) / where(near, total, one)
    return where(weight == zero, zero, gy * weight * (one + (x - y)))


DOC = """The softmax-weighted mean of each window, sum e^x x / sum e^x.  Not in torch.

    Padding, and -inf, have no weight; a window of nothing else gives -inf.  inf gives inf, NaN gives NaN.  No e^x overflows, however
    large x is.  Saved for backward: one number an output, besides input and output.
    """
SOFT = Summing(
    "soft",
    init,
    accumulate,
    finalise,
    share,
    combine=combine,
    neutral=lowest,
    residue=residue,
    face=Face("soft", "Soft", DOC),
    structure=Structure(shifts=True),
)
