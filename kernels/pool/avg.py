"""Average: the sum over the window by the number of taps that count (count_include_pad, divisor_override)."""

from . import Summing


def init(zero):
    return zero


def accumulate(total, x, p):
    return total + x


def combine(a, b):
    return a + b


def finalise(total, count, size, p):
    return total / count


def share(gy, x, y, residue, count, size, p):
    return gy / count


AVG = Summing("avg", init, accumulate, finalise, share, combine=combine, linear=True, integers=("int64",))
