"""A reduction's arithmetic, compiled for ``Vec``, in the one form that every CPU loop nest calls."""

import functools
from typing import Any, NamedTuple

import numpy as np
from numba import int32, types, uint8, uint16, uint32, uint64

from .. import number as vocabulary
from .. import random
from ..pool import Selecting
from ..simd import any_lane, between, lane_index, load, load_masked, number, splat, stacked, store, store_phases
from .number import compiled, jitable


class Arithmetic(NamedTuple):
    """The functions of a reduction, all inlined; p is the tuple of its parameters as Vecs."""

    neutral: Any
    """(zero) -> what padding is filled with"""
    survey: Any
    """(total, x, tap, p) -> total: the first pass, if ``surveys``"""
    begin: Any
    """(zero, tap, total, u) -> state"""
    step: Any
    """(state, x, tap, p) -> state"""
    ordered: Any
    """The same where no x is NaN, if that is quicker; else None"""
    combine: Any
    """(state, state) -> state"""
    finish: Any
    """(state, count, size, p) -> (y, saved)"""
    share: Any
    """(gy, x, y, saved, tap, count, size, p) -> what one window gives to the gradient of x"""
    gives: Any
    """(gy, y, saved, count, size, p) -> the part of ``share`` that does not depend on x, if there is one, as a tuple"""
    takes: Any
    """(x, given, p) -> the gradient of x from the sum of those, such a tuple"""
    surveys: bool
    reads_values: bool
    """``share`` reads x and y"""
    reads_saved: bool


def index(dtype, saved):
    """The integer that counts taps beside numbers of a dtype: as wide as they are where that holds every tap, so that a register of
    one goes with a register of the other."""
    narrow = {8: uint8, 16: uint16}.get(number(dtype).bitwidth, int32)
    return narrow if saved.bitwidth <= narrow.bitwidth else int32


@functools.cache
def arithmetic(kind):
    """The ``Arithmetic`` of a reduction of kernels/pool."""
    init, accumulate = compiled(kind.init), compiled(kind.accumulate)
    combine = compiled(kind.combine or kind.init)
    neutral = compiled(kind.neutral)
    if isinstance(kind, Selecting):
        return _selecting(kind, neutral, init, accumulate, combine)
    return _summing(kind, neutral, init, accumulate, combine)


def _selecting(kind, neutral, init, accumulate, combine):
    selected = compiled(kind.gradient())
    reads = compiled(kind.reads) if kind.reads else None
    ended = compiled(kind.finalise) if kind.finalise else None
    surveyed = compiled(kind.survey) if kind.survey else None

    @jitable
    def begin(zero, tap, total, u):
        return init(zero, tap)

    @jitable
    def begin_drawn(zero, tap, total, u):
        return init(zero, tap, total, u)

    @jitable
    def survey(total, x, tap, p):
        return surveyed(total, x)

    @jitable
    def step(state, x, tap, p):
        return accumulate(state, x, tap)

    @jitable
    def step_read(state, x, tap, p):
        return accumulate(state, reads(x, p), tap)

    @jitable
    def finish(state, count, size, p):
        return state[0], state[1]

    @jitable
    def finish_ended(state, count, size, p):
        return ended(state, p)

    @jitable
    def share(gy, x, y, saved, tap, count, size, p):
        return selected(gy, saved, tap)

    ordered = None
    if kind.ordered:
        clean = compiled(kind.ordered)
        ordered = jitable(lambda state, x, tap, p: clean(state, x, tap))
    return Arithmetic(
        neutral,
        survey,
        begin_drawn if kind.draws else begin,
        step_read if reads else step,
        ordered,
        combine,
        finish_ended if ended else finish,
        share,
        None,
        None,
        bool(surveyed),
        False,
        True,
    )


def _summing(kind, neutral, init, accumulate, combine):
    finalise, rule = compiled(kind.finalise), compiled(kind.share)
    residue = compiled(kind.residue) if kind.residue else None

    @jitable
    def begin(zero, tap, total, u):
        return init(zero)

    @jitable
    def step(state, x, tap, p):
        return accumulate(state, x, p)

    @jitable
    def finish(state, count, size, p):
        y = finalise(state, count, size, p)
        return y, y

    @jitable
    def finish_with_residue(state, count, size, p):
        return finalise(state, count, size, p), residue(state)

    @jitable
    def share(gy, x, y, saved, tap, count, size, p):
        return rule(gy, x, y, saved, count, size, p)

    gives, takes = None, None
    if kind.gives:
        parts, given = gift(kind, None), compiled(kind.gives)
        bare_of, tuple_of = bare(parts), tupled(parts)
        gives = jitable(lambda gy, y, saved, count, size, p: tuple_of(given(gy, y, saved, count, size, p)))
        if kind.takes:
            taken = compiled(kind.takes)
            takes = jitable(lambda x, given, p: taken(x, bare_of(given), p))
        else:
            takes = jitable(lambda x, given, p: given[0])
    return Arithmetic(
        neutral,
        None,
        begin,
        step,
        None,
        combine,
        finish_with_residue if residue else finish,
        share,
        gives,
        takes,
        False,
        not kind.linear,
        bool(residue),
    )


def looks_for_nan(A, dtype):
    """Whether it pays to look for NaN where windows overlap so much that what is seen once saves several steps: at stride 1, and where maps
    are copied anyway.  8x64x112x112 max 3x3 s1 p1 with indices 4.4 to 3.4 ms; but s2 p1 1.19 to 1.37."""
    return A.ordered is not None and isinstance(number(dtype), types.Float)


@functools.cache
def has_nan(dtype, lanes):
    """(array, first, count, end) -> whether there is a NaN among elements first .. first + count - 1, or perhaps one of those up to the
    next whole register; none from ``end`` on is read."""
    real = number(dtype)

    @jitable
    def found(array, first, count, end):
        zero = splat(real(0), lanes)
        nan = zero != zero
        for at in range(first, first + count, lanes):
            v = load(array, at, lanes) if at + lanes <= end else load_masked(array, at, between(at, 1, at, end, lanes), zero)
            nan = nan | (v != v)
        return any_lane(nan)

    return found


def members(kind, real):
    """The dtypes of a state's members."""
    if isinstance(kind, Selecting):
        return (real, int32) if kind.draws else (real, int32) * (len(kind.init(np.float32(0), np.int32(0))) // 2)
    state = kind.init(np.float32(0))
    return (real,) * (len(state) if isinstance(state, tuple) else 1)


def gift(kind, real):
    """The dtypes of what an output gives (``Summing.gives``)."""
    one = np.float32(1)
    given = kind.gives(one, one, one, one, one, (one,) * len(kind.parameters))
    return (real,) * (len(given) if isinstance(given, tuple) else 1)


@functools.cache
def bare(parts):
    """A state as the reduction knows it, from a tuple of its members: one alone is no tuple there."""
    return jitable((lambda state: state) if len(parts) > 1 else (lambda state: state[0]))


@functools.cache
def tupled(parts):
    """The tuple of a state's members."""
    return jitable((lambda state: state) if len(parts) > 1 else (lambda state: (state,)))


def arrays(parts, count):
    """() -> one array on the stack for each member of a state."""
    if len(parts) == 1:
        return jitable(lambda: (stacked(count, parts[0]),))
    if len(parts) == 2:
        return jitable(lambda: (stacked(count, parts[0]), stacked(count, parts[1])))
    if len(parts) == 3:
        return jitable(lambda: (stacked(count, parts[0]), stacked(count, parts[1]), stacked(count, parts[2])))
    return jitable(lambda: (stacked(count, parts[0]), stacked(count, parts[1]), stacked(count, parts[2]), stacked(count, parts[3])))


@functools.cache
def draw(kind, lanes):
    """(position, plane, k0, k1, zero) -> the draws of a register of outputs; ``zero`` for a reduction that draws nothing.

    position and plane are Vecs of uint32, k0 and k1 the halves of the seed.
    """
    uniform = compiled(random.uniform)

    @jitable
    def drawn(position, plane, k0, k1, zero):
        return uniform(position, plane, splat(uint32(k0), lanes), splat(uint32(k1), lanes), zero)

    return drawn if kind.draws else jitable(lambda position, plane, k0, k1, zero: zero)


def _words(lanes, real):
    """(counter, plane, k0, k1) -> the four draws of each lane's counter; counter and plane are Vecs of uint64."""
    philox, unit = compiled(random.philox), compiled(vocabulary.unit)

    @jitable
    def words(counter, plane, k0, k1):
        none, zero = splat(uint64(0), lanes), splat(real(0), lanes)
        w = philox(counter, none, plane, none, splat(uint64(k0), lanes), splat(uint64(k1), lanes))
        return unit(w[0], zero), unit(w[1], zero), unit(w[2], zero), unit(w[3], zero)

    return words


@functools.cache
def draws_of_plane(kind, lanes, real):
    """(array, first, count, plane, k0, k1): what ``draw`` says of positions first // 4 * 4 .. first + count - 1 of a plane, into an array.

    Four positions share a counter: 2x2 windows of an 8x64x112x112 map took 40 ms when each was asked for alone.
    """
    words = _words(lanes, real)

    @jitable
    def fill(array, first, count, plane, k0, k1):
        start = first // 4 * 4
        for at in range(start, first + count, 4 * lanes):
            counter = splat(uint64(at // 4), lanes) + lane_index(uint64, lanes)
            store_phases(array, at - start, words(counter, splat(uint64(plane), lanes), k0, k1))

    return fill if kind.draws else jitable(lambda array, first, count, plane, k0, k1: None)


@functools.cache
def draws_of_pixels(kind, lanes, real):
    """(array, stride, position, plane, count, k0, k1): what ``draw`` says of four positions from ``position`` // 4 * 4 and of planes
    ``plane`` .. plane + count - 1, into an array of four rows."""
    words = _words(lanes, real)

    @jitable
    def fill(array, stride, position, plane, count, k0, k1):
        for c in range(0, count, lanes):
            planes = splat(uint64(plane + c), lanes) + lane_index(uint64, lanes)
            w = words(splat(uint64(position // 4), lanes), planes, k0, k1)
            store(array, c, w[0])
            store(array, stride + c, w[1])
            store(array, 2 * stride + c, w[2])
            store(array, 3 * stride + c, w[3])

    return fill if kind.draws else jitable(lambda array, stride, position, plane, count, k0, k1: None)
