"""A reduction's arithmetic, compiled for ``Vec``, in the one form that every CPU loop nest calls."""

import functools
from typing import Any, NamedTuple

from numba import int32, uint8, uint16, uint32

from .. import random
from ..pool import Selecting
from ..simd import number, splat
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
    combine: Any
    """(state, state) -> state"""
    finish: Any
    """(state, count, size, p) -> (y, saved)"""
    share: Any
    """(gy, x, y, saved, tap, count, size, p) -> what one window gives to the gradient of x"""
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
    def finish(state, count, size, p):
        return state[0], state[1]

    @jitable
    def share(gy, x, y, saved, tap, count, size, p):
        return selected(gy, saved, tap)

    return Arithmetic(neutral, survey, begin_drawn if kind.draws else begin, step, combine, finish, share, bool(surveyed), False, True)


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

    return Arithmetic(
        neutral,
        None,
        begin,
        step,
        combine,
        finish_with_residue if residue else finish,
        share,
        False,
        not kind.linear,
        bool(residue),
    )


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
