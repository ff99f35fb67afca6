"""A reduction's arithmetic, compiled for ``Vec``, and what loop nests need beside it: draws, a look for NaN, arrays of states."""

import functools
from typing import Any, NamedTuple

from numba import int32, types, uint8, uint16, uint32, uint64

from .. import arithmetic as shared
from .. import number as vocabulary
from .. import random
from ..simd import any_lane, between, convert, lane_index, load, load_masked, number, splat, stacked, store, store_masked, store_phases
from .number import compiled, jitable


def index(dtype, saved):
    """The integer that counts taps beside numbers of a dtype: as wide as they are where that holds every tap, so that a register of
    one goes with a register of the other."""
    narrow = {8: uint8, 16: uint16}.get(number(dtype).bitwidth, int32)
    return narrow if saved.bitwidth <= narrow.bitwidth else int32


@functools.cache
def arithmetic(kind):
    """The ``Arithmetic`` of a reduction of kernels/pool, on Vecs."""
    return shared.arithmetic(kind, compiled, jitable)


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
        nan, at = zero != zero, first
        whole = min(first + count, end - lanes + 1)
        while at < whole:
            v = load(array, at, lanes)
            nan = nan | (v != v)
            at += lanes
        if at < first + count:
            v = load_masked(array, at, between(at, 1, at, end, lanes), zero)
            nan = nan | (v != v)
        return any_lane(nan)

    return found


def members(kind, real):
    """The dtypes of a state's members."""
    return shared.members(kind, real, int32)


@functools.cache
def bare(parts):
    """A state as the reduction knows it, from a tuple of its members."""
    return shared.bare(len(parts), jitable)


@functools.cache
def tupled(parts):
    """The tuple of a state's members."""
    return shared.tupled(len(parts), jitable)


class Carried(NamedTuple):
    """The functions of a reduction whose windows' states are kept in arrays and joined: a state is a tuple, of which what is selected but
    not saved has no tap."""

    parts: tuple
    """The dtypes of its members."""
    start: Any
    """(zero, tap) -> the state of nothing, the first tap inside being ``tap``"""
    lift: Any
    """(x, tap, p) -> that of one element"""
    more: Any
    """(state, x, tap, p) -> that of one more"""
    merge: Any
    """(a, b, p) -> that of both, a's elements before b's"""
    moved: Any
    """(state, taps) -> the same of taps so many further on"""
    finish: Any
    """(state, count, size, p) -> (y, saved)"""


def can_carry(kind):
    """Whether a reduction has these functions."""
    return bool(kind.combine) and not (kind.selects and (kind.reads or kind.survey or len(members(kind, None)) > 2))


@functools.cache
def carried(kind, real, tapped, lanes, saves, ordered=False):
    """The ``Carried`` of a reduction on numbers of dtype ``real`` and taps in ``tapped``; ``ordered``: where no x is NaN."""
    A = arithmetic(kind)
    begin, combine, ended, step = A.begin, A.combine, A.finish, A.ordered if ordered else A.step
    if not kind.selects:
        parts = members(kind, real)
        bare_of, tuple_of = bare(parts), tupled(parts)

        @jitable
        def start(zero, tap):
            return tuple_of(begin(zero, tap, zero, zero))

        @jitable
        def lift(x, tap, p):
            zero = splat(real(0), lanes)
            return tuple_of(step(begin(zero, tap, zero, zero), x, tap, p))

        return Carried(
            parts,
            start,
            lift,
            jitable(lambda state, x, tap, p: tuple_of(step(bare_of(state), x, tap, p))),
            jitable(lambda a, b, p: tuple_of(combine(bare_of(a), bare_of(b)))),
            jitable(lambda state, taps: state),
            jitable(lambda state, count, size, p: ended(bare_of(state), count, size, p)),
        )
    # Taps come in order, so that a state joins another as one more element does.
    if saves:
        return Carried(
            (real, tapped),
            jitable(lambda zero, tap: begin(zero, tap, zero, zero)),
            jitable(lambda x, tap, p: (x, tap)),
            step,
            jitable(lambda a, b, p: step(a, b[0], b[1], p)),
            jitable(lambda state, taps: (state[0], state[1] + splat(tapped(taps), lanes))),
            ended,
        )

    @jitable
    def alone(state, x, tap, p):
        none = splat(tapped(0), lanes)
        return (step((state[0], none), x, none, p)[0],)

    return Carried(
        (real,),
        jitable(lambda zero, tap: (begin(zero, tap, zero, zero)[0],)),
        jitable(lambda x, tap, p: (x,)),
        alone,
        jitable(lambda a, b, p: alone(a, b[0], b[0], p)),
        jitable(lambda state, taps: state),
        jitable(lambda state, count, size, p: ended((state[0], splat(tapped(0), lanes)), count, size, p)),
    )


def in_order(kind, dtype, lanes, saves):
    """A reduction's functions on whole maps, of elements in the order of their taps; those of ``Carried``, where it has them."""
    real = number(dtype)
    if can_carry(kind):
        return carried(kind, real, int32, lanes, saves)
    A = arithmetic(kind)
    begin, combine = A.begin, A.combine
    start, merge = jitable(lambda zero, tap: begin(zero, tap, zero, zero)), jitable(lambda a, b, p: combine(a, b))
    return Carried(members(kind, real), start, None, A.step, merge, None, A.finish)


def all_finite(count):
    """(state) -> where all ``count`` members of a state are numbers that are neither infinite nor NaN."""
    finite = jitable(lambda v: v - v == v - v)
    if count == 1:
        return jitable(lambda state: finite(state[0]))
    before, last = all_finite(count - 1), count - 1
    return jitable(lambda state: before(state) & finite(state[last]))


def writing(saved, saves, put):
    """(y, kept, at, tail, whole, value, choice): write a register of outputs, or of a row's last those of ``tail``."""

    @jitable
    def write(y, kept, at, tail, whole, value, choice):
        if whole:
            put(y, at, value)
            if saves:
                store(kept, at, convert(choice, saved))
        else:
            store_masked(y, at, value, tail)
            if saves:
                store_masked(kept, at, convert(choice, saved), tail)

    return write


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
