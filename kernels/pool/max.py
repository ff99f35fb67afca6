"""Maximum, by torch's rule: the first of equals wins; a NaN beats everything and the last NaN the others."""

from ..number import lowest, where
from . import Selecting


def init(zero, tap):
    return lowest(zero), tap


def accumulate(state, x, tap):
    best, index = state
    wins = (x > best) | (x != x)
    return where(wins, x, best), where(wins, tap, index)


def combine(a, b):
    x, i = a
    y, j = b
    later = j > i
    wins = (y > x) | ((y == x) & ~later) | ((y != y) & (later | (x == x)))
    return where(wins, y, x), where(wins, j, i)


MAX = Selecting("max", init, accumulate, neutral=lowest, combine=combine)
