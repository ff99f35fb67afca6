"""The words of kernels/number.py on a CUDA thread's scalar, and how an arithmetic file's functions become device functions."""

import functools
import math

from numba import cuda, float64, uint32, uint64

from .. import number


def where(condition, x, y):
    return x if condition else y


def like(x, value):
    return type(x)(value)


def lowest(x):
    return type(x)(-math.inf)


def highest(x):
    return type(x)(math.inf)


def larger(x, y):
    return x if x > y else y


def smaller(x, y):
    return x if x < y else y


def absolute(x):
    return abs(x)


def quotient(x, count):
    return x / count


def sqrt(x):
    return math.sqrt(x)


def exp(x):
    return math.exp(x)


def log(x):
    return math.log(x)


def power(x, p):
    return math.pow(x, p)


def expm1(x):
    return math.expm1(x)


def log1p(x):
    return math.log1p(x)


def tanh(x):
    return math.tanh(x)


def erf(x):
    return math.erf(x)


def decay(x):
    return math.exp(-x)


def ndtr(x):
    return type(x)(0.5) * math.erfc(type(x)(-0.7071067811865476) * x)


def any_lane(condition):
    return condition


def multiply_wide(a, b):
    product = uint64(a) * uint64(b)
    return uint32(product >> uint64(32)), uint32(product)


def unit(bits, x):
    if type(x) is float64:
        return type(x)(bits) * type(x)(2.0**-32)
    return type(x)(uint32(bits >> uint32(8))) * type(x)(2.0**-24)


def device(function):
    """A device function; a fresh copy each, for the CPU's cannot be compiled again."""
    return cuda.jit(function, device=True)


WORDS = {word.__name__: device(globals()[word.__name__]) for word in number.WORDS}


@functools.cache
def compiled(function):
    """A function of an arithmetic file as a CUDA device function."""
    return number.retarget(function, WORDS, device)
