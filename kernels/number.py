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


def absolute(x):
    """abs(x), without the sign of zero."""
    return np.abs(x)


def sqrt(x):
    """Square root, correctly rounded."""
    return np.sqrt(x)


def power(x, p):
    """x ** p for x >= 0."""
    return np.power(x, p)


def multiply_wide(a, b):
    """The 64-bit product of two uint32 as (high, low) uint32."""
    product = int(a) * int(b)
    return np.uint32(product >> 32), np.uint32(product & 0xFFFFFFFF)


def unit(bits, x):
    """32 random bits as a number of x's dtype, uniform in [0, 1): the top 24 bits for float32, all 32 for float64."""
    if x.dtype.itemsize == 8:
        return x.dtype.type(int(bits) * 2.0**-32)
    return x.dtype.type((int(bits) >> 8) * 2.0**-24)


WORDS = (where, like, lowest, highest, absolute, sqrt, power, multiply_wide, unit)


def retarget(function, words, compiled=lambda f: f):
    """A copy of ``function`` that speaks ``words`` (name -> function) instead of this file's, passed through ``compiled``.

    Functions of an arithmetic file that it calls are copied likewise.  A word the target lacks is a KeyError, not a silent fall-back.
    """
    if function in WORDS:
        return words[function.__name__]
    scope = dict(function.__globals__)
    for name in function.__code__.co_names:
        value = scope.get(name)
        if isinstance(value, FunctionType) and value is not function:
            scope[name] = retarget(value, words, compiled)
    copy = FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    copy.__module__ = function.__module__
    return compiled(copy)
