"""Lp norm of the window: y = (sum |x|^p)^(1/p), without 1/n; its usual forms L2, L1 and L-infinity, and any other p but 0.

A window that ceil_mode clips is scaled to a whole one (size / count under the root), as torch does by way of its average pooling.
The gradient is 0 where y = 0; L-infinity's is shared evenly by equal largest elements, like torch.linalg.vector_norm's.
Differs from torch: |x| is taken, where torch's F.lp_pool2d raises a negative x to the p as it is.
"""

from ..number import absolute, highest, like, power, sqrt, where
from . import Face, Structure, Summing


def init(zero):
    return zero


def combine(a, b):
    return a + b


def sign(x):
    return where(x > like(x, 0), like(x, 1), where(x < like(x, 0), like(x, -1), x))


def accumulate_p(total, x, p):
    return total + power(absolute(x), p[0])


def finalise_p(total, count, size, p):
    return power(total * (size / count), like(total, 1) / p[0])


def residue_p(total):
    return total


def share_p(gy, x, y, total, count, size, p):
    # (|x|^p / sum)^((p - 1) / p): a base in 0..1, near 1 where the share is large, so that neither the exponent's rounding nor the
    # sum's is raised to a power.  By |x|^(p - 1) and y^(1 - p) it cost 5 to 9 ulp at p = -1.5, by this formula torch's one or two.
    one = like(x, 1)
    flat = (y == like(y, 0)) | (x == like(x, 0))
    part = power(where(flat, one, absolute(x)), p[0]) / where(flat, one, total)
    slope = power(part, (p[0] - one) / p[0]) * power(size / count, one / p[0])
    return where(flat & ~(p[0] == one), like(gy, 0), gy * sign(x) * slope)


def accumulate_2(total, x, p):
    return total + x * x


def finalise_2(total, count, size, p):
    return sqrt(total * (size / count))


def gives_2(gy, y, residue, count, size, p):
    # No overflow: a square that is not 0 makes y at least 3e-23 in float32.
    flat = y == like(y, 0)
    return where(flat, like(gy, 0), gy * (size / count) / where(flat, like(y, 1), y))


def takes_2(x, given, p):
    return x * given


def share_2(gy, x, y, residue, count, size, p):
    return takes_2(x, gives_2(gy, y, residue, count, size, p), p)


def accumulate_1(total, x, p):
    return total + absolute(x)


def finalise_1(total, count, size, p):
    return total * (size / count)


def gives_1(gy, y, residue, count, size, p):
    return gy * (size / count)


def takes_1(x, given, p):
    return sign(x) * given


def share_1(gy, x, y, residue, count, size, p):
    return takes_1(x, gives_1(gy, y, residue, count, size, p), p)


def init_inf(zero):
    return zero, zero


def accumulate_inf(state, x, p):
    best, ties = state
    a = absolute(x)
    wins = (a > best) | (a != a)
    return where(wins, a, best), where(wins, like(x, 1), where(a == best, ties + like(x, 1), ties))


def combine_inf(a, b):
    x, m = a
    y, n = b
    wins = (y > x) | (y != y)
    return where(wins, y, x), where(wins, n, where(y == x, m + n, m))


def finalise_inf(state, count, size, p):
    return state[0]


def residue_inf(state):
    return state[1]


def share_inf(gy, x, y, ties, count, size, p):
    return where(absolute(x) == y, gy * sign(x) / ties, like(gy, 0))


L2_DOC = "The Euclidean norm of each window, sqrt(sum x^2), without 1/n: lp_pool with norm_type 2.  Not in torch."
NORM = Structure(scales="all")
L2 = Summing(
    "l2",
    init,
    accumulate_2,
    finalise_2,
    share_2,
    combine=combine,
    gives=gives_2,
    takes=takes_2,
    face=Face("l2", "L2", L2_DOC),
    structure=NORM,
)
L1 = Summing("l1", init, accumulate_1, finalise_1, share_1, combine=combine, gives=gives_1, takes=takes_1, structure=NORM)
LINF = Summing("linf", init_inf, accumulate_inf, finalise_inf, share_inf, combine=combine_inf, residue=residue_inf, structure=NORM)
LP = Summing("lp", init, accumulate_p, finalise_p, share_p, combine=combine, residue=residue_p, parameters=("p",), structure=NORM)
# The padding that adds nothing to a sum of |x|^p: 0 for p > 0, infinity for p < 0.
LP_NEGATIVE = Summing(
    "lp_negative",
    init,
    accumulate_p,
    finalise_p,
    share_p,
    combine=combine,
    neutral=highest,
    residue=residue_p,
    parameters=("p",),
    structure=NORM,
)
