"""Maximum, by torch's rule: the first of equals wins; a NaN beats everything and the last NaN the others."""

from ..number import larger, lowest, where
from . import Face, Selecting, Structure


def init(zero, tap):
    return lowest(zero), tap


def accumulate(state, x, tap):
    best, index = state
    nan = x != x
    # The value does not wait for the comparison that its index needs.
    return where(nan, x, larger(x, best)), where((x > best) | nan, tap, index)


def accumulate_ordered(state, x, tap):
    best, index = state
    return larger(x, best), where(x > best, tap, index)


def combine(a, b):
    x, i = a
    y, j = b
    later = j > i
    wins = (y > x) | ((y == x) & ~later) | ((y != y) & (later | (x == x)))
    return where(wins, y, x), where(wins, j, i)


DOC = """The largest element of each window; with ``return_indices`` also its flat position in the input plane (int64), as torch.

    Padding is ignored.  The first of equal elements wins; a NaN wins over everything, the last NaN over the others.  Values and
    indices equal torch's bit for bit.  Saved for backward: one byte an output (windows of up to 255 taps), where torch saves eight.
    """
MAX = Selecting(
    "max",
    init,
    accumulate,
    ordered=accumulate_ordered,
    neutral=lowest,
    combine=combine,
    face=Face("max", "Max", DOC, adaptive=True),
    structure=Structure(order=1, scales="positive", shifts=True),
)
