"""Minimum: maximum's rule with the order reversed, not -max(-x), which is wrong for unsigned integers."""

from ..number import highest, smaller, where
from . import Face, Selecting, Structure


def init(zero, tap):
    return highest(zero), tap


def accumulate(state, x, tap):
    best, index = state
    nan = x != x
    # The value does not wait for the comparison that its index needs.
    return where(nan, x, smaller(x, best)), where((x < best) | nan, tap, index)


def accumulate_ordered(state, x, tap):
    best, index = state
    return smaller(x, best), where(x < best, tap, index)


def combine(a, b):
    x, i = a
    y, j = b
    later = j > i
    wins = (y < x) | ((y == x) & ~later) | ((y != y) & (later | (x == x)))
    return where(wins, y, x), where(wins, j, i)


DOC = "The smallest element of each window: max_pool with the order reversed, NaN and ties by the same rules.  Not in torch."
MIN = Selecting(
    "min",
    init,
    accumulate,
    ordered=accumulate_ordered,
    neutral=highest,
    combine=combine,
    face=Face("min", "Min", DOC, adaptive=True),
    structure=Structure(order=-1, scales="positive", shifts=True),
)
