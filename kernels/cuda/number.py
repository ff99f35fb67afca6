"""The words of kernels/number.py on a CUDA thread's scalar, and how an arithmetic file's functions become device functions.

Integers of geometry are uint32, and each result is made one again: Numba would go on in 64 bits (max 3x3: 327 instructions, not 114).
"""

import functools
import math
from types import FunctionType

import numba
from llvmlite import ir
from numba import cuda, float32, float64, uint16, uint32, uint64
from numba.cuda.extending import intrinsic

from .. import arithmetic as shared
from .. import number
from ..pipeline import interned


def where(condition, x, y):
    return x if condition else y


def like(x, value):
    return type(x)(value)


def _limit(name, sign):
    @intrinsic
    def limit(tyctx, x):
        def codegen(ctx, builder, sig, args):
            value = sign * math.inf if isinstance(x, numba.types.Float) else x.minval if sign < 0 else x.maxval
            return ctx.get_constant(x, value)

        return x(x), codegen

    limit.__name__ = name
    return limit


lowest, highest = _limit("lowest", -1), _limit("highest", 1)


def larger(x, y):
    return x if x > y else y


def smaller(x, y):
    return x if x < y else y


def absolute(x):
    return abs(x)


@intrinsic
def quotient(tyctx, x, count):
    """Of integers too, towards 0."""

    def codegen(ctx, builder, sig, args):
        divide = builder.fdiv if isinstance(x, numba.types.Float) else builder.sdiv if x.signed else builder.udiv
        return divide(*args)

    return x(x, x), codegen


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
    # Sums of two uint32 are uint64 to Numba, with a carry that is not meant.
    product = uint64(uint32(a)) * uint64(uint32(b))
    return uint32(product >> uint64(32)), uint32(product)


def unit(bits, x):
    bits = uint32(bits)
    if type(x) is float64:
        return type(x)(bits) * type(x)(2.0**-32)
    return type(x)(uint32(bits >> uint32(8))) * type(x)(2.0**-24)


device = interned(cuda.jit(device=True))


WORDS = {word.__name__: globals()[word.__name__] for word in number.WORDS}
WORDS |= {name: device(word) for name, word in WORDS.items() if isinstance(word, FunctionType)}


@functools.cache
def compiled(function):
    """A function of an arithmetic file as a CUDA device function."""
    return number.retarget(function, WORDS, device)


@functools.cache
def arithmetic(kind):
    """The ``Arithmetic`` of a reduction of kernels/pool, on scalars."""
    return shared.arithmetic(kind, compiled, device)


# Dtypes in memory and in registers: 16-bit floats lie as their bits, and are computed as float32.


def _stores(name):
    return {"float16": uint16, "bfloat16": uint16, "bool": numba.uint8}.get(name) or getattr(numba, name)


@functools.cache
def stored(name):
    """Numba's dtype of the memory of the dtype of this name."""
    return _stores(name)


@functools.cache
def computed(name):
    """That of its numbers in registers."""
    return float32 if name in ("float16", "bfloat16") else _stores(name)


@intrinsic
def _of_half(tyctx, bits):
    def codegen(ctx, builder, sig, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return float32(bits), codegen


@intrinsic
def _half(tyctx, x):
    def codegen(ctx, builder, sig, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return uint16(x), codegen


@intrinsic
def float_of_bits(tyctx, bits):
    """The float32 of these 32 bits."""

    def codegen(ctx, builder, sig, args):
        return builder.bitcast(args[0], ir.FloatType())

    return float32(bits), codegen


@intrinsic
def bits_of_float(tyctx, x):
    """The bits of a float32."""

    def codegen(ctx, builder, sig, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return uint32(x), codegen


def _of_bfloat(bits):
    return float_of_bits(uint32(uint32(bits) << uint32(16)))


def _bfloat(x):
    """To the nearest, of two as near the even one; NaN stays one."""
    bits = bits_of_float(x)
    rounded = uint32(bits + uint32(uint32(0x7FFF) + uint32(uint32(bits >> uint32(16)) & uint32(1))))
    return uint16(uint32((rounded if x == x else uint32(bits | uint32(0x400000))) >> uint32(16)))


def _same(x):
    return x


_READ = {"float16": lambda bits: _of_half(bits), "bfloat16": _of_bfloat}
_WRITTEN = {"float16": lambda x: _half(x), "bfloat16": _bfloat}


@functools.cache
def read(name):
    """(what lies in memory) -> the number."""
    return device(_READ.get(name, _same))


@functools.cache
def written(name):
    """(a number) -> what lies in memory."""
    return device(_WRITTEN.get(name, _same))


@device
def quotient_of(n, divisor, multiplier, shift):
    """(n // divisor, n % divisor) of n < 2^31; ``divisor_of`` makes the other three."""
    q = uint32(uint64(uint64(uint64(n) * uint64(multiplier)) >> uint64(31)) >> uint64(shift))
    return q, uint32(n - uint32(q * divisor))


def divisor_of(size):
    """(divisor, multiplier, shift) for ``quotient_of``: a product and a shift where a division takes some 20 instructions (Granlund and
    Montgomery, "Division by Invariant Integers using Multiplication", 1994)."""
    shift = (size - 1).bit_length()
    return size, -(-(1 << (31 + shift)) // size), shift


def divisors(*sizes):
    """Those of each, in a list, as arguments of a kernel."""
    return [number for size in sizes for number in divisor_of(size)]
