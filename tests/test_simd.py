"""Every word of kernels/simd.py against numpy, by dtype and number of lanes: any number of lanes compiles on any CPU.

Each kernel below does a group of words, so that the file compiles few of them.  Results come back as rows in the order they are
stored; a table beside the test says what each row must be.
"""

import ctypes
import itertools
import math
import mmap
import platform
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fastpool.kernels import number, simd
from fastpool.kernels.compile import WORKER, specialised
from fastpool.kernels.cpu.number import WORDS, jitable
from fastpool.kernels.cpu.reduction import has_nan
from fastpool.kernels.launch import bits
from fastpool.kernels.simd import (
    absolute,
    between,
    bits_of,
    by_width,
    convert,
    exchange,
    from_bits,
    fused,
    gather_between,
    highest,
    lane_index,
    larger,
    like,
    load,
    load_across,
    load_masked,
    load_phases,
    load_phases_between,
    lowest,
    multiply_wide,
    numbers,
    permuted_each,
    phase,
    pointer,
    polynomial,
    prefetch,
    quotient,
    repeat,
    scatter_between,
    settle,
    smaller,
    splat,
    sqrt,
    store,
    store_across,
    store_masked,
    store_past,
    store_phases,
    store_phases_between,
    store_phases_past,
    unit,
    unroll,
    where,
    with_phase,
)
from numba import cfunc, float32, float64, int32, int64, types, uint8, uint32, uint64
from numba.core.errors import TypingError

FLOATS, INTEGERS = (float32, float64), (int32, uint32, uint8, int64)

all_lanes = pytest.mark.parametrize("lanes", [4, 8, 16])
floats = pytest.mark.parametrize("dtype", FLOATS, ids=str)
integers = pytest.mark.parametrize("dtype", INTEGERS, ids=str)
all_dtypes = pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)


def run(worker, *args):
    """One job of a worker on numpy arrays, which travel as their addresses, and ints."""
    slots = [a.ctypes.data if isinstance(a, np.ndarray) else int(a) for a in args]
    worker.call(struct.pack(f"{len(slots)}q", *slots), 0, 1)


def numpy_dtype(dtype):
    return np.dtype(str(dtype))


def pairs(dtype):
    """Two arrays of 256 numbers: every pair of sixteen that are likely to go wrong."""
    kind = numpy_dtype(dtype)
    if kind.kind == "f":
        tiny, big = np.finfo(kind).smallest_subnormal, np.finfo(kind).max
        hard = [0.0, -0.0, 1, -1, 0.1, -2.5, 3, 7.75, 1e-3, tiny, big, -big, np.inf, -np.inf, np.nan, -np.nan]
    else:
        low, high = np.iinfo(kind).min, np.iinfo(kind).max
        hard = [low, low + 1, high, high - 1, high // 2, high // 2 + 1, *range(10)]
    hard = np.array(hard, kind)
    return np.repeat(hard, 16), np.tile(hard, 16)


def assert_same_bits(actual, expected):
    """Equal, zeros by their sign too; one NaN is as good as another."""
    assert actual.dtype == expected.dtype
    same = actual.view(f"u{actual.itemsize}") == expected.view(f"u{expected.itemsize}")
    if actual.dtype.kind == "f":
        same |= np.isnan(actual) & np.isnan(expected)
    where_not = np.argwhere(~same)
    assert same.all(), f"{len(where_not)} differ, first at {where_not[0]}: {actual[~same][0]!r}, not {expected[~same][0]!r}"


# Arithmetic


@specialised
def float_arithmetic(dtype, lanes):
    L = lanes

    def kernel(args, start, stop):
        x, y, out, n = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype), args[3]
        for at in range(0, n, L):
            a, b = load(x, at, L), load(y, at, L)
            store(out, at, a + b)
            store(out, n + at, a - b)
            store(out, 2 * n + at, a * b)
            store(out, 3 * n + at, a / b)
            store(out, 4 * n + at, -a)
            store(out, 5 * n + at, sqrt(a))
            store(out, 6 * n + at, absolute(a))

    return kernel


@all_lanes
@floats
def test_float_arithmetic(dtype, lanes):
    x, y = pairs(dtype)
    out = np.empty((7, x.size), x.dtype)
    run(float_arithmetic(dtype, lanes), x, y, out, x.size)
    with np.errstate(all="ignore"):
        expected = np.stack([x + y, x - y, x * y, x / y, -x, np.sqrt(x), np.abs(x)])
    assert_same_bits(out, expected)


@specialised
def integer_arithmetic(dtype, lanes):
    L, top_bit = lanes, dtype.bitwidth - 1

    def kernel(args, start, stop):
        x, y, out, n = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype), args[3]
        for at in range(0, n, L):
            a, b = load(x, at, L), load(y, at, L)
            distance = b & like(b, top_bit)
            store(out, at, a + b)
            store(out, n + at, a - b)
            store(out, 2 * n + at, a * b)
            store(out, 3 * n + at, -a)
            store(out, 4 * n + at, a & b)
            store(out, 5 * n + at, a | b)
            store(out, 6 * n + at, a ^ b)
            store(out, 7 * n + at, ~a)
            store(out, 8 * n + at, a << distance)
            store(out, 9 * n + at, a >> distance)
            store(out, 10 * n + at, lane_index(dtype, L))

    return kernel


@all_lanes
@integers
def test_integer_arithmetic(dtype, lanes):
    x, y = pairs(dtype)
    out = np.empty((11, x.size), x.dtype)
    run(integer_arithmetic(dtype, lanes), x, y, out, x.size)
    distance = y & (dtype.bitwidth - 1)
    index = np.tile(np.arange(lanes, dtype=x.dtype), x.size // lanes)
    expected = [x + y, x - y, x * y, -x, x & y, x | y, x ^ y, ~x, x << distance, x >> distance, index]
    assert_same_bits(out, np.stack(expected))


@specialised
def comparisons(dtype, lanes):
    L = lanes

    def kernel(args, start, stop):
        x, y, out, n = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype), args[3]
        one, zero = splat(dtype(1), L), splat(dtype(0), L)
        for at in range(0, n, L):
            a, b = load(x, at, L), load(y, at, L)
            less, equal, self_equal = a < b, a == b, b == b
            store(out, at, where(less, one, zero))
            store(out, n + at, where(a <= b, one, zero))
            store(out, 2 * n + at, where(a > b, one, zero))
            store(out, 3 * n + at, where(a >= b, one, zero))
            store(out, 4 * n + at, where(equal, one, zero))
            store(out, 5 * n + at, where(a != b, one, zero))
            store(out, 6 * n + at, where(~less, one, zero))
            store(out, 7 * n + at, where(less & self_equal, one, zero))
            store(out, 8 * n + at, where(less | self_equal, one, zero))
            store(out, 9 * n + at, where(less ^ self_equal, one, zero))
            store(out, 10 * n + at, where(less, a, b))
            store(out, 11 * n + at, where(at > 0, a, b))
            store(out, 12 * n + at, larger(a, b))
            store(out, 13 * n + at, smaller(a, b))

    return kernel


@all_lanes
@all_dtypes
def test_comparisons_masks_and_where(dtype, lanes):
    x, y = pairs(dtype)
    out = np.empty((14, x.size), x.dtype)
    run(comparisons(dtype, lanes), x, y, out, x.size)
    less, own = x < y, y == y
    masks = [less, x <= y, x > y, x >= y, x == y, x != y, ~less, less & own, less | own, less ^ own]
    by_block = np.where(np.arange(x.size) >= lanes, x, y)
    assert_same_bits(
        out, np.stack([m.astype(x.dtype) for m in masks] + [np.where(less, x, y), by_block, np.where(x > y, x, y), np.where(less, x, y)])
    )


@specialised
def building_words(dtype, lanes):
    L = lanes

    def kernel(args, start, stop):
        x, y, out, n = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype), args[3]
        for at in range(0, n, L):
            a, b = load(x, at, L), load(y, at, L)
            store(out, at, fused(a, b, a))
            store(out, n + at, fused(a, b, -(a * b)))
            store(out, 2 * n + at, by_width(a, 0.1, 0.2))
            store(out, 3 * n + at, polynomial(a, (0.5, 0.1), (3.0, 0.2, 0.1)))
            bits = bits_of(a)
            store(out, 4 * n + at, from_bits(bits + (bits >> by_width(bits, 23, 52)), b))

    return kernel


@all_lanes
@floats
def test_words_that_build_functions(dtype, lanes):
    x, y = pairs(dtype)
    out = np.empty((5, x.size), x.dtype)
    run(building_words(dtype, lanes), x, y, out, x.size)
    with np.errstate(all="ignore"):
        expected = [
            [number.fused(a, b, a) for a, b in zip(x, y, strict=True)],
            [number.fused(a, b, -(a * b)) for a, b in zip(x, y, strict=True)],
            [number.by_width(a, 0.1, 0.2) for a in x],
            [number.polynomial(a, (0.5, 0.1), (3.0, 0.2, 0.1)) for a in x],
            [number.from_bits(number.bits_of(a) + (number.bits_of(a) >> number.by_width(number.bits_of(a), 23, 52)), a) for a in x],
        ]
    assert_same_bits(out, np.array(expected))


@specialised
def wide_products(lanes):
    L = lanes

    def kernel(args, start, stop):
        x, y, out, n = pointer(args, 0, uint32), pointer(args, 1, uint32), pointer(args, 2, uint32), args[3]
        for at in range(0, n, L):
            high, low = multiply_wide(load(x, at, L), load(y, at, L))
            store(out, at, high)
            store(out, n + at, low)
            # In 64 bits only the low halves count.
            noise = splat(uint64(0xABCD << 32), L)
            high, low = multiply_wide(convert(load(x, at, L), uint64) | noise, convert(load(y, at, L), uint64) | noise)
            store(out, 2 * n + at, convert(high, uint32))
            store(out, 3 * n + at, convert(low, uint32))

    return kernel


@all_lanes
def test_multiply_wide(lanes):
    x, y = pairs(uint32)
    out = np.empty((4, x.size), np.uint32)
    run(wide_products(lanes), x, y, out, x.size)
    product = x.astype(np.uint64) * y
    assert_same_bits(out, np.stack([product >> 32, product & 0xFFFFFFFF] * 2).astype(np.uint32))


MEANINGLESS = {
    "two dtypes": lambda x, a, b, m: a + b,
    "two lane counts": lambda x, a, b, m: a + splat(float32(1), 4),
    "a Vec and a scalar": lambda x, a, b, m: a * float32(2),
    "bits of floats": lambda x, a, b, m: a & a,
    "a sum of masks": lambda x, a, b, m: m + m,
    "order of masks": lambda x, a, b, m: m < m,
    "a shifted mask": lambda x, a, b, m: m << m,
    "where of two dtypes": lambda x, a, b, m: where(m, a, b),
    "where of two lane counts": lambda x, a, b, m: where(m, splat(1, 4), splat(1, 4)),
    "a store of another dtype": lambda x, a, b, m: store(x, 0, b),
    "a store of a wider dtype": lambda x, a, b, m: store(x, 0, convert(a, float64)),
    "a masked store of another dtype": lambda x, a, b, m: store_masked(x, 0, b, m),
    "phases stored to another dtype": lambda x, a, b, m: store_phases(x, 0, (b, b)),
}


@pytest.mark.parametrize("function", MEANINGLESS.values(), ids=MEANINGLESS)
def test_what_has_no_meaning_does_not_compile(function):
    function = jitable(function)

    def kernel(args, start, stop):
        a, b = splat(float32(1), 8), splat(int32(1), 8)
        function(pointer(args, 0, float32), a, b, a < a)

    with pytest.raises(TypingError):
        cfunc(WORKER)(kernel)


# Making Vecs, and moving lanes


@specialised
def making(dtype, lanes):
    L, half = lanes, lanes // 2

    def kernel(args, start, stop):
        x, out = pointer(args, 0, dtype), pointer(args, 1, dtype)
        v, w = load(x, 0, L), load(x, L, L)
        store(out, 0, splat(x[3], L))
        store(out, L, like(v, 5))
        store(out, 2 * L, lowest(v))
        store(out, 3 * L, highest(v))
        a, b = exchange(v, w, 1)
        store(out, 4 * L, a)
        store(out, 5 * L, b)
        a, b = exchange(v, w, half)
        store(out, 6 * L, a)
        store(out, 7 * L, b)

    return kernel


@all_lanes
@all_dtypes
def test_making_vecs_and_moving_lanes(dtype, lanes):
    kind, L = numpy_dtype(dtype), lanes
    x = np.arange(7, 7 + 2 * L).astype(kind)
    out = np.empty((8, L), kind)
    run(making(dtype, L), x, out)
    v, w, lane = x[:L], x[L:], np.arange(L)
    lowest, highest = (-np.inf, np.inf) if kind.kind == "f" else (np.iinfo(kind).min, np.iinfo(kind).max)
    constants = [np.full(L, value, kind) for value in (x[3], 5, lowest, highest)]
    exchanged = [np.where(lane & d, w[lane ^ flip], v[lane ^ flip]) for d in (1, L // 2) for flip in (0, d)]
    assert_same_bits(out, np.stack([*constants, *exchanged]))


@specialised
def permuting(dtypes, lanes):
    first, second = dtypes

    def kernel(args, start, stop):
        x, y, order = pointer(args, 0, first), pointer(args, 1, second), pointer(args, 2, int32)
        a, b = permuted_each((load(x, 0, lanes), load(y, 0, lanes)), load(order, 0, lanes))
        store(x, lanes, a)
        store(y, lanes, b)

    return kernel


@all_lanes
@pytest.mark.parametrize("dtypes", [(float32, int32), (float64, int32), (int64, uint8)], ids=str)
def test_lanes_in_any_order(dtypes, lanes):
    """Those of a register that has an instruction for it, and of others."""
    order = np.random.default_rng(0).integers(0, lanes, lanes).astype(np.int32)
    x, y = (np.arange(3, 3 + 2 * lanes).astype(numpy_dtype(dtype)) for dtype in dtypes)
    run(permuting(dtypes, lanes), x, y, order)
    for found in (x, y):
        assert_same_bits(found[lanes:], found[:lanes][order])


@specialised
def other_scalars(lanes):
    L = lanes

    def kernel(args, start, stop):
        singles, doubles, tuples = pointer(args, 0, float32), pointer(args, 1, float64), pointer(args, 2, int64)
        v = splat(float32(0.5), L)
        # The lanes of a tuple may be of several dtypes: a reduction's value and tap.
        pair = lane_index(int32, L), convert(lane_index(int32, L), int64)
        value, tap = exchange(pair, pair, 1)[1]
        store(singles, 0, like(v, 0.1))
        store(singles, L, like(v, -3))
        store(doubles, 0, like(convert(v, float64), 0.1))
        store(tuples, 0, convert(value, int64))
        store(tuples, L, tap)

    return kernel


@all_lanes
def test_a_constant_is_rounded_to_the_vec_and_a_tuple_may_mix_dtypes(lanes):
    singles, doubles, swapped = np.empty((2, lanes), np.float32), np.empty(lanes), np.empty((2, lanes), np.int64)
    run(other_scalars(lanes), singles, doubles, swapped)
    assert_same_bits(singles, np.stack([np.full(lanes, v, np.float32) for v in (0.1, -3)]))
    assert_same_bits(doubles, np.full(lanes, 0.1))
    assert_same_bits(swapped, np.stack([np.arange(lanes) ^ 1] * 2))


@specialised
def conversions(source, lanes):
    L = lanes

    def kernel(args, start, stop):
        x, n = pointer(args, 0, source), args[7]
        to_float32, to_float64, to_int32 = pointer(args, 1, float32), pointer(args, 2, float64), pointer(args, 3, int32)
        to_uint32, to_uint8, to_int64 = pointer(args, 4, uint32), pointer(args, 5, uint8), pointer(args, 6, int64)
        for at in range(0, n, L):
            v = load(x, at, L)
            store(to_float32, at, convert(v, float32))
            store(to_float64, at, convert(v, float64))
            store(to_int32, at, convert(v, int32))
            store(to_uint32, at, convert(v, uint32))
            store(to_uint8, at, convert(v, uint8))
            store(to_int64, at, convert(v, int64))

    return kernel


@all_lanes
@pytest.mark.parametrize("source", FLOATS + INTEGERS, ids=str)
def test_convert(source, lanes):
    # A float out of an integer's range is undefined in LLVM as in C, so floats are tried where they fit.
    if source in INTEGERS:
        inputs = {pairs(source)[0].tobytes(): FLOATS + INTEGERS}
    else:
        kind = numpy_dtype(source)
        negative = np.array([-0.0, -0.75, -1.5, -2, -100.25, -(2.0**30), -(2.0**24) - 2, -1e-40], kind)
        positive = np.array([0, 0.5, 0.999, 1, 2.5, 100.1, 254.9, 255], kind)
        large = np.array([1e30, -1e300, np.inf, -np.inf, np.nan, 3.4028235677973366e38, 1e-46, 1 / 3], np.float64)
        with np.errstate(over="ignore"):
            large = large.astype(kind)
        inputs = {
            np.tile(positive, 2).tobytes(): FLOATS + INTEGERS,
            np.tile(negative, 2).tobytes(): (*FLOATS, int32, int64),
            np.tile(large, 2).tobytes(): FLOATS,
        }
    for data, targets in inputs.items():
        x = np.frombuffer(data, numpy_dtype(source))
        outs = {target: np.empty(x.size, numpy_dtype(target)) for target in FLOATS + INTEGERS}
        run(conversions(source, lanes), x, *outs.values(), x.size)
        for target in targets:
            with np.errstate(over="ignore"):
                assert_same_bits(outs[target], x.astype(numpy_dtype(target)))


@specialised
def units(lanes):
    L = lanes

    def kernel(args, start, stop):
        words, singles, doubles, n = pointer(args, 0, uint32), pointer(args, 1, float32), pointer(args, 2, float64), args[3]
        for at in range(0, n, L):
            store(singles, at, unit(load(words, at, L), splat(float32(0), L)))
            store(doubles, at, unit(load(words, at, L), splat(float64(0), L)))
            wide = convert(load(words, at, L), uint64) | splat(uint64(1 << 40), L)  # whose low halves count
            store(singles, n + at, unit(wide, splat(float32(0), L)))
            store(doubles, n + at, unit(wide, splat(float64(0), L)))

    return kernel


@all_lanes
def test_unit_equals_the_scalar_word_and_never_reaches_one(lanes):
    words = pairs(uint32)[0]
    singles, doubles = np.empty((2, words.size), np.float32), np.empty((2, words.size))
    run(units(lanes), words, singles, doubles, words.size)
    for found, zero in (singles, np.float32(0)), (doubles, np.float64(0)):
        assert_same_bits(found, np.array([[number.unit(word, zero) for word in words]] * 2))
        assert found.min() == 0
        assert found.max() < 1


def test_every_word_of_an_arithmetic_file_has_its_simd_form():
    assert {word.__name__ for word in number.WORDS + number.BUILDING} == set(WORDS)


@specialised
def quotients(dtype, lanes):
    L = lanes

    def kernel(args, start, stop):
        x, count, found, n = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype), args[3]
        for at in range(0, n, L):
            store(found, at, quotient(load(x, at, L), load(count, at, L)))

    return kernel


@floats
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 9, 25, 169, 961, 12543, -7, 2.0**40])
def test_quotient_has_a_divisions_bits(dtype, count):
    """Of any bit pattern whose quotient is normal, zero, infinite or NaN."""
    kind = numpy_dtype(dtype)
    x = np.random.default_rng(0).integers(0, 2 ** (8 * kind.itemsize), 1 << 14, f"u{kind.itemsize}").view(kind)
    x[:16] = pairs(dtype)[0][::16]
    counts, found = np.full_like(x, count), np.empty_like(x)
    run(quotients(dtype, 8), x, counts, found, x.size)
    with np.errstate(all="ignore"):
        expected = x / counts
    whole = ~(np.abs(expected) < np.finfo(kind).tiny) | (expected == 0) & (x == 0)
    assert_same_bits(found[whole], expected[whole])


@integers
def test_quotient_of_integers_truncates(dtype):
    x, y = pairs(dtype)
    fits = [bool(b) and abs(int(a)) // abs(int(b)) <= np.iinfo(x.dtype).max for a, b in zip(x, y, strict=True)]
    x, y = x[fits], y[fits]
    found = np.empty(x.size + 4, x.dtype)
    run(quotients(dtype, 1), x, y, found, x.size)
    sign = [1 if (a < 0) == (b < 0) else -1 for a, b in zip(x, y, strict=True)]
    assert found[: x.size].tolist() == [s * (abs(int(a)) // abs(int(b))) for s, a, b in zip(sign, x, y, strict=True)]


# Memory: arrays lie inside larger ones, whose other elements must be neither seen nor changed

MARGIN = 83  # odd: no access below is aligned to its register
SENTINEL = 99


def surrounded(dtype, length):
    """An array of 1 .. length, as far as the dtype goes, and where its first element lies: MARGIN others are on either side."""
    buffer = np.full(length + 2 * MARGIN, SENTINEL, numpy_dtype(dtype))
    buffer[MARGIN:-MARGIN] = np.arange(1, length + 1) % 97
    return buffer


def fills(dtype, lanes):
    """Values that no ``surrounded`` array holds."""
    return np.arange(100, 100 + lanes).astype(numpy_dtype(dtype))


@specialised
def plain_access(dtype, lanes):
    L = lanes

    def kernel(args, start, stop):
        x, y, z, out = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype), pointer(args, 3, dtype)
        base, first, low, high, fill = args[5], args[6], args[7], args[8], load(pointer(args, 4, dtype), 0, L)
        mask = between(first, 1, low, high, L)
        whole = load(x, base + first, L)
        prefetch(x, base + first)
        store(out, 0, whole)
        store(out, L, load_masked(x, base + first, mask, fill))
        store(y, base + first, whole)
        store_masked(z, base + first, whole, mask)

    return kernel


def bounds(lanes, reach):
    """(first, low, high), low <= high: accesses of ``reach`` elements that are whole, cut on the left, right, both sides, or empty."""
    middle = reach // 2
    yield 0, 0, reach
    yield 3, -10, reach + 20
    yield -5, 0, max(1, reach - 7)
    yield -1, 0, reach
    yield -middle, -1, reach
    yield middle, 0, reach
    yield 0, 1, 2
    yield 2, middle, middle + 3
    yield 0, 4, 4
    yield -reach, 0, reach
    yield reach, 0, reach


@all_lanes
@all_dtypes
def test_load_and_store(dtype, lanes):
    L, worker = lanes, plain_access(dtype, lanes)
    x, fill = surrounded(dtype, 4 * L), fills(dtype, L)
    for first, low, high in bounds(L, L):
        y, z, out = np.full_like(x, SENTINEL), np.full_like(x, SENTINEL), np.empty((2, L), x.dtype)
        run(worker, x, y, z, out, fill, MARGIN, first, low, high)
        position = first + np.arange(L)
        inside = (low <= position) & (position < high)
        here = x[MARGIN + position]
        assert_same_bits(out, np.stack([here, np.where(inside, here, fill)]))
        whole, masked = np.full_like(x, SENTINEL), np.full_like(x, SENTINEL)
        whole[MARGIN + position] = here
        masked[MARGIN + position[inside]] = here[inside]
        assert_same_bits(y, whole)
        assert_same_bits(z, masked)


@specialised
def across_access(dtype, lanes):
    L = lanes

    def kernel(args, start, stop):
        x, y, origins, out = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, int64), pointer(args, 3, dtype)
        found = load_across(x, origins, 1, args[4], L)
        for k in range(4):
            store(out, k * L, phase(found, k))
        store_across(y, origins, 1, args[4], found)

    return kernel


@all_lanes
@all_dtypes
def test_across(dtype, lanes):
    """Lanes from rows that lie anywhere, and back; of rows that are one, the first lane's elements stay."""
    L, worker = lanes, across_access(dtype, lanes)
    x = np.arange(MARGIN + 40 * L).astype(numpy_dtype(dtype))
    origins = np.r_[-1, np.random.default_rng(L).permutation(L) * 7 + 3]  # the first is not read
    y, out = np.full_like(x, SENTINEL), np.empty((4, L), x.dtype)
    run(worker, x, y, origins, out, 2)
    at = origins[1:, None] + 2 + np.arange(4)
    assert_same_bits(out, x[at].T.copy())
    expected = np.full_like(x, SENTINEL)
    expected[at] = x[at]
    assert_same_bits(y, expected)


@specialised
def stores_past(dtype, lanes):
    L = lanes

    def kernel(args, start, stop):
        x, y, pairs = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype)
        store_past(y, L, load(x, 0, L))
        store_phases_past(pairs, 2 * L, load_phases(x, 0, 2, L))
        settle()

    return kernel


@all_lanes
@all_dtypes
def test_stores_past_the_caches(dtype, lanes):
    L, kind = lanes, numpy_dtype(dtype)
    x = np.arange(2 * L).astype(kind)
    room = np.full(6 * L + 64, SENTINEL, kind)
    first = -room.ctypes.data // kind.itemsize % 64  # a multiple of a register's bytes
    y, pairs = room[first : first + 2 * L], room[first + 2 * L : first + 6 * L]
    run(stores_past(dtype, lanes), x, y, pairs)
    assert_same_bits(y, np.r_[np.full(L, SENTINEL, kind), x[:L]])
    assert_same_bits(pairs, np.r_[np.full(2 * L, SENTINEL, kind), x])


@specialised
def nan_search(dtype, lanes):
    found = has_nan(dtype, lanes)

    def kernel(args, start, stop):
        out = pointer(args, 1, int64)
        out[0] = found(pointer(args, 0, dtype), args[2], args[3], args[4])

    return kernel


@all_lanes
@floats
def test_nan_is_seen_and_nothing_beyond_the_end(dtype, lanes):
    worker, out = nan_search(dtype, lanes), np.empty(1, np.int64)
    for at in range(3 * lanes):
        x = np.zeros(3 * lanes + 1, numpy_dtype(dtype))
        x[at], x[-1] = np.nan, np.nan
        run(worker, x, out, 1, 3 * lanes - 1, 3 * lanes)
        assert out[0] == (at >= 1), at


STRIDES = (1, 2, 3, 4)


def _phases(dtype, lanes, stride):
    S, L = stride, lanes

    @jitable
    def access(x, y, z, out, at, base, first, low, high, fill):
        whole = load_phases(x, base + first, S, L)
        part = load_phases_between(x, base, first, low, high, S, fill)
        for p in range(S):
            store(out, p * L, phase(whole, p))
            store(out, (S + p) * L, phase(part, p))
        store_phases(y, at + base + first, whole)
        store_phases_between(z, at + base, first, low, high, whole)

    return access


@specialised
def phased_access(dtype, lanes):
    L = lanes
    by_one, by_two, by_three, by_four = (_phases(dtype, lanes, stride) for stride in STRIDES)

    def kernel(args, start, stop):
        x, y, z, out = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype), pointer(args, 3, dtype)
        base, first, low, high, n = args[5], args[6], args[7], args[8], args[9]
        fill = splat(pointer(args, 4, dtype)[0], L)
        by_one(x, y, z, out, 0, base, first, low, high, fill)
        by_two(x, y, z, pointer(args, 10, dtype), n, base, first, low, high, fill)
        by_three(x, y, z, pointer(args, 11, dtype), 2 * n, base, first, low, high, fill)
        by_four(x, y, z, pointer(args, 12, dtype), 3 * n, base, first, low, high, fill)

    return kernel


@all_lanes
@all_dtypes
def test_phases(dtype, lanes):
    L, worker = lanes, phased_access(dtype, lanes)
    x, fill = surrounded(dtype, 8 * L), fills(dtype, 1)
    for first, low, high in itertools.chain.from_iterable(bounds(L, s * L) for s in STRIDES):
        y, z = np.full((4, x.size), SENTINEL, x.dtype), np.full((4, x.size), SENTINEL, x.dtype)
        outs = [np.empty((2, s, L), x.dtype) for s in STRIDES]
        run(worker, x, y, z, outs[0], fill, MARGIN, first, low, high, x.size, *outs[1:])
        for s, out, stored, masked in zip(STRIDES, outs, y, z, strict=True):
            position = first + np.arange(s * L)
            inside = (low <= position) & (position < high)
            here = x[MARGIN + position]
            # [s * L] elements -> [s, L] phases
            assert_same_bits(out[0], here.reshape(L, s).T.copy())
            assert_same_bits(out[1], np.where(inside, here, fill).reshape(L, s).T.copy())
            expected = np.full_like(x, SENTINEL)
            expected[MARGIN + position] = here
            assert_same_bits(stored, expected)
            expected = np.full_like(x, SENTINEL)
            expected[MARGIN + position[inside]] = here[inside]
            assert_same_bits(masked, expected)


@specialised
def strided_access(dtype, lanes):
    L = lanes

    def kernel(args, start, stop):
        x, y, out = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype)
        base, first, stride, low, high = args[4], args[5], args[6], args[7], args[8]
        fill = load(pointer(args, 3, dtype), 0, L)
        found = gather_between(x, base, first, stride, low, high, fill)
        store(out, 0, found)
        scatter_between(y, base, first, stride, low, high, found)

    return kernel


@all_lanes
@all_dtypes
def test_gather_and_scatter(dtype, lanes):
    # Positions run far past both ends of the buffer: only those in [low, high) may be touched.
    L, worker = lanes, strided_access(dtype, lanes)
    x, fill = surrounded(dtype, 4 * L), fills(dtype, L)
    for stride in (1, 2, 3, 4, 5, 6, 7, -2, 10**9):
        for first, low, high in bounds(L, 4 * L):
            y, out = np.full_like(x, SENTINEL), np.empty(L, x.dtype)
            run(worker, x, y, out, fill, MARGIN, first, stride, low, min(high, 4 * L))
            position = first + np.arange(L) * stride
            inside = (low <= position) & (position < min(high, 4 * L))
            expected = fill.copy()
            expected[inside] = x[MARGIN + position[inside]]
            assert_same_bits(out, expected)
            written = np.full_like(x, SENTINEL)
            written[MARGIN + position[inside]] = expected[inside]
            assert_same_bits(y, written)


@specialised
def betweens(lanes):
    L = lanes

    def kernel(args, start, stop):
        out, first, low, high = pointer(args, 0, int32), args[1], args[2], args[3]
        one, zero = splat(int32(1), L), splat(int32(0), L)
        store(out, 0, where(between(first, 1, low, high, L), one, zero))
        store(out, L, where(between(first, 2, low, high, L), one, zero))
        store(out, 2 * L, where(between(first, 3, low, high, L), one, zero))
        store(out, 3 * L, where(between(first, 4, low, high, L), one, zero))

    return kernel


@all_lanes
def test_between(lanes):
    worker, far = betweens(lanes), 2**31 - 200
    cases = itertools.chain(bounds(lanes, lanes), bounds(lanes, 3 * lanes), [(0, 0, far), (far, 0, far + 9), (-far, 0, 5), (7, 9, 10)])
    # A position may be beyond 32 bits, as an offset in a large tensor is; distances may not.
    for (first, low, high), origin in itertools.product(cases, (0, 2**33 + 5)):
        out = np.empty((4, lanes), np.int32)
        run(worker, out, first + origin, low + origin, high + origin)
        position = first + np.arange(lanes) * np.array(STRIDES)[:, None]
        assert_same_bits(out, ((low <= position) & (position < high)).astype(np.int32))


# Tuples of Vecs, loops, arguments


@jitable
def _turn(carry, k, args):
    v, phases = args
    return with_phase(carry, k % 3, phase(carry, (k + 1) % 3) + phase(phases, k % 3) * v)


@specialised
def tuples(dtype, lanes):
    L = lanes

    def kernel(args, start, stop):
        x, out, p = pointer(args, 0, dtype), pointer(args, 1, dtype), args[2]
        a, b, c = load(x, 0, L), load(x, L, L), load(x, 2 * L, L)
        changed = with_phase((a, b, c), p, a + c)
        turned = unroll(_turn, 5, repeat(a, 3), (b, (a, b, c)))
        untouched = unroll(_turn, 0, (a, b, c), (b, (a, b, c)))
        for q in range(3):
            store(out, q * L, phase((a, b, c), q))
            store(out, (3 + q) * L, phase(changed, q))
            store(out, (6 + q) * L, phase(repeat(b, 3), q))
            store(out, (9 + q) * L, phase(turned, q))
            store(out, (12 + q) * L, phase(untouched, q))

    return kernel


@all_lanes
@pytest.mark.parametrize("dtype", [float32, int64], ids=str)
def test_phase_with_phase_repeat_and_unroll(dtype, lanes):
    x = np.arange(3 * lanes, dtype=numpy_dtype(dtype)).reshape(3, lanes)
    a, b, c = x
    turned = [a, a, a]
    for k in range(5):
        turned[k % 3] = turned[(k + 1) % 3] + x[k % 3] * b
    for p in range(3):
        out = np.empty((5, 3, lanes), x.dtype)
        run(tuples(dtype, lanes), x, out, p)
        changed = x.copy()
        changed[p] = a + c
        assert_same_bits(out, np.stack([x, changed, np.stack([b, b, b]), np.stack(turned), x]))


@specialised
def arguments(dtype, lanes):
    L = lanes

    def kernel(args, start, stop):
        out = pointer(args, 0, dtype)
        none, two = numbers(args, 1, 0, dtype, L), numbers(args, 1, 2, dtype, L)
        store(out, 0, two[0])
        store(out, L, two[1])
        out[2 * L] = dtype(len(none))
        out[2 * L + 1] = dtype(stop - start)

    return kernel


@all_lanes
@floats
def test_numbers_and_pointer(dtype, lanes):
    values = 0.1, -math.inf
    out = np.empty(2 * lanes + 2, numpy_dtype(dtype))
    run(arguments(dtype, lanes), out, *(bits(v, str(dtype)) for v in values))
    assert_same_bits(out, np.array([values[0]] * lanes + [values[1]] * lanes + [0, 1]).astype(out.dtype))


# What the code does to the machine


@pytest.mark.parametrize(
    ("forced", "lanes"),
    [pytest.param("16", (4, 2, 16), id="NEON"), pytest.param("32", (8, 4, 32), id="AVX2"), pytest.param("64", (16, 8, 64), id="AVX-512")],
)
def test_lanes_of_a_register(monkeypatch, forced, lanes):
    monkeypatch.setenv("FASTPOOL_REGISTER_BYTES", forced)
    monkeypatch.setattr(simd, "register_bytes", simd.register_bytes.__wrapped__)
    assert tuple(map(simd.native_lanes, (float32, float64, uint8))) == lanes


@specialised
def at_the_edge(dtype, lanes):
    L = lanes

    def kernel(args, start, stop):
        x, y, out, n, guarded = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype), args[3], args[4]
        zero = splat(dtype(0), L)
        prefetch(x, n)
        prefetch(x, 1 << 40)
        if guarded == 0:
            store(out, 0, load(x, n - 1, L))  # reads past the end
        for at in (-2, n - 2):
            mask = between(at, 1, 0, n, L)
            v = load_masked(x, at, mask, zero)
            store_masked(y, at, v, mask)
            for p in range(3):
                v = v + phase(load_phases_between(x, 0, at, 0, n, 3, zero), p)
            store_phases_between(y, 0, at, 0, n, load_phases_between(x, 0, at, 0, n, 3, zero))
            g = gather_between(x, 0, at, 7, 0, n, zero)
            scatter_between(y, 0, at, 7, 0, n, g)
            store(out, 0, v + g)

    return kernel


def touch_the_edges(name, lanes, guarded):
    """In a process of its own: an array that fills a page between two pages that may not be touched."""
    dtype, page = getattr(types, name), mmap.PAGESIZE
    memory = mmap.mmap(-1, 3 * page)
    origin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for forbidden in origin, origin + 2 * page:
        assert protect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0) == 0, ctypes.get_errno()
    kind = numpy_dtype(dtype)
    n = page // kind.itemsize
    x = np.frombuffer(memory, kind, n, page)
    x[:] = np.arange(n) % 50
    before, out = x.copy(), np.empty(lanes, kind)
    run(at_the_edge(dtype, lanes), x, x, out, n, guarded)
    assert (x == before).all()
    print("untouched")


@pytest.mark.parametrize("guarded", [True, False], ids=("masked", "unmasked"))
@pytest.mark.parametrize("name", ["float32", "float64", "uint8"])
def test_masked_access_at_the_end_of_a_page_does_not_fault(name, guarded):
    # The unmasked control shows that the page is in fact guarded.
    lanes = simd.native_lanes(getattr(types, name))
    code = f"import test_simd; test_simd.touch_the_edges({name!r}, {lanes}, {guarded})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    if guarded:
        assert done.stdout == "untouched\n", f"exit status {done.returncode}: {done.stderr}"
    else:
        assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS), done.stderr


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the instructions' names are x86's")
def test_a_float32_kernel_is_packed_code_on_the_widest_register_without_float64():
    lanes = simd.native_lanes(float32)
    # Compiled anew: code that comes from the cache has no assembly to show.
    code = cfunc(WORKER, error_model="numpy")(float_arithmetic.__wrapped__(float32, lanes))._library.get_asm_str()
    register = {16: "xmm", 32: "ymm", 64: "zmm"}[simd.register_bytes()]
    for instruction in ("addps", "subps", "mulps", "divps", "sqrtps"):
        assert re.search(rf"\bv?{instruction}\s.*%{register}\d", code), f"no {instruction} on {register}"
    assert re.findall(r"\bv?(?:(?:add|sub|mul|div|sqrt)[ps]d|cvt\w*[ps]d\w*)\b", code) == []
