"""Stochastic pooling (Zeiler & Fergus, "Stochastic Pooling for Regularization of Deep Convolutional Neural Networks", 2013).

Training: one element a window, drawn with probability w / sum(w), w = max(x, 0): the first whose running sum of weights
exceeds u * sum(w).  Evaluation: the expectation of that draw, sum(w * w) / sum(w), with its true gradient.  Both give 0, and pass
no gradient, where no element is positive; NaN where the sum of weights is NaN or infinite.
"""

from ..number import like, where
from . import Selecting, Structure, Summing

LITTLE = 2.0**-100
"""A sum of weights below which a large window passes no gradient."""


def weight(x):
    return where(x <= like(x, 0), like(x, 0), x)


def survey(total, x):
    return total + weight(x)


def init_draw(zero, tap, total, u):
    # nothing: 0, or NaN where the sum is not finite (no running sum passes a NaN).  The tap -1 belongs to no element: no gradient.
    nothing = total - total
    return nothing, like(tap, -1), zero, total * u + nothing


def accumulate_draw(state, x, tap):
    # Takes every positive element until the running sum has passed the threshold: the last taken is the one that passed
    # it, or, should rounding (a subnormal sum) keep it from being passed, the last positive one.
    value, index, running, threshold = state
    takes = (x > like(x, 0)) & (running <= threshold)
    return where(takes, x, value), where(takes, tap, index), running + weight(x), threshold


def init_mean(zero):
    return zero, zero


def accumulate_mean(state, x, p):
    total, squares = state
    w = weight(x)
    return total + w, squares + w * w


def combine_mean(a, b):
    return a[0] + b[0], a[1] + b[1]


def finalise_mean(state, count, size, p):
    total, squares = state
    empty = total == like(total, 0)
    return where(empty, total, squares / where(empty, like(total, 1), total))


def residue_mean(state):
    return state[0]


def share_mean(gy, x, y, total, count, size, p):
    w = weight(x)
    empty = total == like(total, 0)
    slope = (w + w - y) / where(empty, like(total, 1), total)
    return where((x <= like(x, 0)) | empty, like(gy, 0), gy * slope)


def gives_mean(gy, y, total, count, size, p):
    # share_mean in two parts, 2 x / total and y / total.  Each would overflow for a window of next to nothing, and is left out there.
    little = total < like(total, LITTLE)
    part = where(little, like(gy, 0), gy / where(little, like(total, 1), total))
    return part, part * y


def takes_mean(x, given, p):
    part, of_y = given
    return where(x <= like(x, 0), like(x, 0), (x + x) * part - of_y)


WEIGHED = Structure(scales="positive", reads_above=True)
DRAW = Selecting("stochastic", init_draw, accumulate_draw, survey=survey, draws=True, structure=WEIGHED)
MEAN = Summing(
    "stochastic_mean",
    init_mean,
    accumulate_mean,
    finalise_mean,
    share_mean,
    combine=combine_mean,
    residue=residue_mean,
    gives=gives_mean,
    takes=takes_mean,
    structure=WEIGHED,
)
