"""Average: the sum over the window by the number of taps that count (count_include_pad, divisor_override)."""

from ..number import quotient
from . import Structure, Summing


def init(zero):
    return zero


def accumulate(total, x, p):
    return total + x


def combine(a, b):
    return a + b


def finalise(total, count, size, p):
    return quotient(total, count)


def gives(gy, y, residue, count, size, p):
    return quotient(gy, count)


def share(gy, x, y, residue, count, size, p):
    return gives(gy, y, residue, count, size, p)


AVG = Summing("avg", init, accumulate, finalise, share, combine=combine, gives=gives, integers=("int64",), structure=Structure(linear=True))
