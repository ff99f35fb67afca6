"""Several numbers of a thread as a tuple in its registers: loads and stores of up to 128 bits, and the product of a tile.

Each is LLVM's own instruction for it: whether a loop over an array would be unrolled, and the array kept in registers, is not left to
the compiler.
"""

import functools

from llvmlite import ir
from numba import typeof, types, uint32
from numba.cuda import cgutils
from numba.cuda.extending import intrinsic

from .number import device


def _place(context, builder, kind, value, at, more):
    """The address of element ``at + more``: ``more``, a constant, becomes a part of the instruction."""
    if isinstance(kind, types.Array):
        value = context.make_array(kind)(context, builder, value).data
    place = builder.gep(value, [builder.zext(at, ir.IntType(64))])
    return builder.gep(place, [ir.Constant(ir.IntType(64), more)])


def _of_pairs(builder, place, count):
    """``count`` numbers of 16 bits, loaded by twos: of four halves NVVM makes two loads."""
    word, half = ir.IntType(32), ir.IntType(16)
    vector = ir.VectorType(word, count // 2)
    got = builder.load(builder.bitcast(place, vector.as_pointer()), align=2 * count)
    pairs = [builder.extract_element(got, ir.Constant(word, k)) for k in range(count // 2)]
    return [builder.trunc(part, half) for pair in pairs for part in (pair, builder.lshr(pair, ir.Constant(word, 16)))]


def _by_pairs(builder, place, parts):
    """The other way."""
    word = ir.IntType(32)
    vector = ir.VectorType(word, len(parts) // 2)
    put = ir.Constant(vector, ir.Undefined)
    for k, (low, high) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        pair = builder.or_(builder.zext(low, word), builder.shl(builder.zext(high, word), ir.Constant(word, 16)))
        put = builder.insert_element(put, pair, ir.Constant(word, k))
    builder.store(put, builder.bitcast(place, vector.as_pointer()), align=2 * len(parts))


@functools.cache
def load(count, more=0):
    """(pointer or array, i, uint32) -> the tuple of ``count`` elements from i + more; where that is more than one, aligned as a whole."""

    @intrinsic
    def load(tyctx, array, at):
        def codegen(context, builder, signature, args):
            element = context.get_data_type(array.dtype)
            place, size = _place(context, builder, array, *args, more), context.get_abi_sizeof(element)
            if count == 1:
                return context.make_tuple(builder, signature.return_type, [builder.load(place, align=size)])
            if size == 2:
                parts = _of_pairs(builder, place, count)
            else:
                vector = ir.VectorType(element, count)
                got = builder.load(builder.bitcast(place, vector.as_pointer()), align=size * count)
                parts = [builder.extract_element(got, ir.Constant(ir.IntType(32), k)) for k in range(count)]
            return context.make_tuple(builder, signature.return_type, parts)

        return types.UniTuple(array.dtype, count)(array, at), codegen

    return load


@functools.cache
def store(count, more=0):
    """(pointer or array, i, tuple): the other way."""

    @intrinsic
    def store(tyctx, array, at, values):
        def codegen(context, builder, signature, args):
            element = context.get_data_type(array.dtype)
            place, size = _place(context, builder, array, *args[:2], more), context.get_abi_sizeof(element)
            parts = cgutils.unpack_tuple(builder, args[2], count)
            if count == 1:
                builder.store(parts[0], place, align=size)
            elif size == 2:
                _by_pairs(builder, place, parts)
            else:
                vector = ir.VectorType(element, count)
                put = ir.Constant(vector, ir.Undefined)
                for k, part in enumerate(parts):
                    put = builder.insert_element(put, part, ir.Constant(ir.IntType(32), k))
                builder.store(put, builder.bitcast(place, vector.as_pointer()), align=size * count)
            return context.get_dummy_value()

        return types.void(array, at, values), codegen

    return store


@intrinsic
def outer(tyctx, sums, a, b):
    """(sums, a, b) -> sums[i * len(b) + j] + a[i] * b[j], fused, of tuples."""

    def codegen(context, builder, signature, args):
        lefts, rights = (cgutils.unpack_tuple(builder, arg, kind.count) for arg, kind in ((args[1], a), (args[2], b)))
        found = cgutils.unpack_tuple(builder, args[0], sums.count)
        pairs = [(left, right) for left in lefts for right in rights]
        got = [builder.fma(left, right, total) for (left, right), total in zip(pairs, found, strict=True)]
        return context.make_tuple(builder, signature.return_type, got)

    return sums(sums, a, b), codegen


@intrinsic
def added(tyctx, values, more):
    """values[k] + more[k % len(more)], of tuples: of two as long, or of rows to each of which one is added."""

    def codegen(context, builder, signature, args):
        found, others = (cgutils.unpack_tuple(builder, arg, kind.count) for arg, kind in ((args[0], values), (args[1], more)))
        got = [builder.fadd(value, others[k % more.count]) for k, value in enumerate(found)]
        return context.make_tuple(builder, signature.return_type, got)

    return values(values, more), codegen


@functools.cache
def filled(count):
    """(x) -> a tuple of so many x."""

    @intrinsic
    def filled(tyctx, x):
        def codegen(context, builder, signature, args):
            return context.make_tuple(builder, signature.return_type, [args[0]] * count)

        return types.UniTuple(x, count)(x), codegen

    return filled


@functools.cache
def picked(places):
    """(tuple) -> the tuple of its elements at these places."""

    @intrinsic
    def picked(tyctx, values):
        def codegen(context, builder, signature, args):
            found = cgutils.unpack_tuple(builder, args[0], values.count)
            return context.make_tuple(builder, signature.return_type, [found[place] for place in places])

        return types.UniTuple(values.dtype, len(places))(values), codegen

    return picked


def _called(f):
    """(the types of tuples and of p) -> the signature and the code of f, a device function, of an element of each tuple and p."""

    def called(tyctx, tuples, p):
        of = typeof(f)
        one = of.get_call_type(tyctx, (*(t.dtype for t in tuples), p), {})

        def codegen(context, builder, signature, args):
            call, parts = context.get_function(of, one), [cgutils.unpack_tuple(builder, arg, tuples[0].count) for arg in args[:-1]]
            got = [call(builder, (*of_one, args[-1])) for of_one in zip(*parts, strict=True)]
            return context.make_tuple(builder, signature.return_type, got)

        return types.UniTuple(one.return_type, tuples[0].count)(*tuples, p), codegen

    return called


@functools.cache
def mapped(f, tuples=1):
    """(so many tuples, p) -> the tuple of f(an element of each, p): f, a device function, is compiled once for all."""
    called = _called(f)

    @intrinsic
    def of_one(tyctx, x, p):
        return called(tyctx, (x,), p)

    @intrinsic
    def of_two(tyctx, x, y, p):
        return called(tyctx, (x, y), p)

    @intrinsic
    def of_four(tyctx, x, y, z, w, p):
        return called(tyctx, (x, y, z, w), p)

    return {1: of_one, 2: of_two, 4: of_four}[tuples]


# Loops whose index is a constant in each turn, as indices of tuples must be.


def tupled(count, make):
    """``make(k)``: (arguments) -> number k; (arguments) -> the tuple of ``count`` of them."""
    last = make(count - 1)
    if count == 1:
        return device(lambda *args: (last(*args),))
    before = tupled(count - 1, make)
    return device(lambda *args: (*before(*args), last(*args)))


def repeated(count, make):
    """``make(k)``: (arguments) -> nothing; (arguments), all ``count`` of them, one after the other."""
    last = make(count - 1)
    if count == 1:
        return last
    before = repeated(count - 1, make)

    @device
    def every(*args):
        before(*args)
        last(*args)

    return every


def folded(count, make):
    """``make(k)``: (state, arguments) -> state; (state, arguments) -> the state after all ``count`` of them."""
    last = make(count - 1)
    if count == 1:
        return last
    before = folded(count - 1, make)
    return device(lambda state, *args: last(before(state, *args), *args))


@functools.cache
def gathered(count):
    """(x, i, step, many, zero) -> the elements at i, i + step, ..., and zero behind the first ``many``."""

    def make(k):
        k = uint32(k)

        @device
        def one(x, at, step, many, zero):
            found = zero
            if k < many:
                found = x[uint32(at + uint32(k * step))]
            return found

        return one

    return tupled(count, make)
