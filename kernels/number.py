"""The words a reduction is written in, and how it moves between targets.

An arithmetic file (``kernels/pool/*.py``) works on "a number".  What that is depends on where it runs:

==================  ===========================================  ====================================
target              a number                                     these words come from
==================  ===========================================  ====================================
plain Python        a numpy scalar                               this file
CPU kernel          a ``Vec``: one SIMD register                 ``kernels/simd.py``
CUDA kernel         a thread's scalar                            ``kernels/cuda/number.py``
double backward     a ``torch.Tensor``                           ``fastpool/autograd.py``
==================  ===========================================  ====================================

``retarget`` copies a function and rebinds its words to one target's, so the arithmetic itself is written once.
"""

import math
from fractions import Fraction
from types import FunctionType

import numpy as np


def where(condition, x, y):
    """x where condition holds, else y: a select, not a branch; both sides are computed."""
    return x if condition else y


def like(x, value):
    """The constant ``value`` as a number of x's dtype (a bare 0.5 would make a float64)."""
    return x.dtype.type(value)


def lowest(x):
    """The number of x's dtype that no other is below: -inf, or the smallest integer."""
    return x.dtype.type(-np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min)


def highest(x):
    """The number of x's dtype that no other is above: inf, or the largest integer."""
    return x.dtype.type(np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).max)


def larger(x, y):
    """x if x > y, else y; so y where one of them is NaN."""
    return x if x > y else y


def smaller(x, y):
    """x if x < y, else y; so y where one of them is NaN."""
    return x if x < y else y


def absolute(x):
    """abs(x), without the sign of zero."""
    return np.abs(x)


def quotient(x, count):
    """x / count, for a count that many x share: a target may take its reciprocal once, and then must round as a division does."""
    return x / count


def sqrt(x):
    """Square root, correctly rounded."""
    return np.sqrt(x)


def exp(x):
    """e^x."""
    return np.exp(x)


def log(x):
    """The natural logarithm of x >= 0."""
    return np.log(x)


def power(x, p):
    """x ** p for x >= 0."""
    return np.power(x, p)


def expm1(x):
    """e^x - 1, without the loss of 1 where x is small."""
    return np.expm1(x)


def log1p(x):
    """ln(1 + x) for x >= -1, without the loss of x where it is small."""
    return np.log1p(x)


def tanh(x):
    """The hyperbolic tangent."""
    return np.tanh(x)


def erf(x):
    """The error function, 2 / sqrt(pi) times the integral of e^(-t^2) from 0 to x."""
    return x.dtype.type(math.erf(x))


def decay(x):
    """e^-x for x >= 0: what is left of ``exp`` without the other half of its range, and its last half ulp."""
    return np.exp(-x)


def ndtr(x):
    """The standard normal distribution's function, (1 + erf(x / sqrt(2))) / 2, to a part of 1."""
    return x.dtype.type(math.erfc(-x * math.sqrt(0.5)) / 2)


def any_lane(condition):
    """Whether a condition holds for one at least of the numbers that are worked on together: for a branch that saves work."""
    return bool(condition)


def multiply_wide(a, b):
    """The 64-bit product of two uint32 as (high, low) uint32."""
    product = int(a) * int(b)
    return np.uint32(product >> 32), np.uint32(product & 0xFFFFFFFF)


def unit(bits, x):
    """32 random bits as a number of x's dtype, uniform in [0, 1): the top 24 bits for float32, all 32 for float64."""
    if x.dtype.itemsize == 8:
        return x.dtype.type(int(bits) * 2.0**-32)
    return x.dtype.type((int(bits) >> 8) * 2.0**-24)


def fused(a, b, c):
    """a * b + c, rounded once."""
    if not (np.isfinite(a) and np.isfinite(b) and np.isfinite(c)):
        return c if np.isfinite(a * 0 + b * 0) else a * b + c
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    # 0 has a sign, which the fraction lacks; the dtype's own product and sum are exact there, and overflow where it does.
    return c.dtype.type(float(exact)) if 0 < abs(exact) < 2**1024 - 2**970 else a * b + c


def by_width(x, single, double):
    """One of two constants as a number of x's dtype: ``single`` where that is of 32 bits, ``double`` where of 64."""
    return x.dtype.type(double if x.dtype.itemsize == 8 else single)


def polynomial(x, single, double):
    """c0 + c1 * x + c2 * x^2 + ... by Horner's rule, each step fused; the coefficients are one of two tuples, by x's dtype."""
    *rest, value = (x.dtype.type(c) for c in (double if x.dtype.itemsize == 8 else single))
    for c in reversed(rest):
        value = fused(value, x, c)
    return value


def bits_of(x):
    """The bit pattern of a float32 or float64 as an unsigned integer of its width."""
    return x.view(f"u{x.dtype.itemsize}")


def from_bits(bits, x):
    """The number of x's dtype that has this bit pattern."""
    return bits.view(x.dtype)


MATHEMATICS = (exp, log, power, expm1, log1p, tanh, erf, decay, ndtr)
"""The words that kernels/elementary.py builds, for targets that have none of their own."""
WORDS = (where, like, lowest, highest, larger, smaller, absolute, quotient, sqrt, any_lane, *MATHEMATICS, multiply_wide, unit)
BUILDING = (fused, by_width, polynomial, bits_of, from_bits)
"""The further words of kernels/elementary.py; a target with an exp, log and so on of its own, as CUDA's, needs none of them."""


def retarget(function, words, compiled=lambda f: f):
    """A copy of ``function`` that speaks ``words`` (name -> function) instead of this file's, passed through ``compiled``.

    Functions of an arithmetic file that it calls are copied likewise.  A word the target lacks is a KeyError, not a silent fall-back.
    """
    if function in WORDS or function in BUILDING:
        return words[function.__name__]
    scope = dict(function.__globals__)
    for name in function.__code__.co_names:
        value = scope.get(name)
        if isinstance(value, FunctionType) and value is not function:
            scope[name] = retarget(value, words, compiled)
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__module__ = function.__module__
    return compiled(copy)
