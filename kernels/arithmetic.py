"""A reduction's arithmetic in the one form that every loop nest and every CUDA kernel calls."""

from typing import Any, NamedTuple

import numpy as np


class Arithmetic(NamedTuple):
    """The functions of a reduction on a target's numbers, all inlined there; p is the tuple of its parameters."""

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


def arithmetic(kind, compiled, jitable):
    """The ``Arithmetic`` of a reduction of kernels/pool on a target: ``compiled`` brings a function of an arithmetic file there,
    ``jitable`` one that calls such functions."""
    return (_selecting if kind.selects else _summing)(kind, compiled, jitable)


def _selecting(kind, compiled, jitable):
    init, accumulate, combine = compiled(kind.init), compiled(kind.accumulate), compiled(kind.combine or kind.init)
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
        compiled(kind.neutral),
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


def _summing(kind, compiled, jitable):
    init, accumulate, combine = compiled(kind.init), compiled(kind.accumulate), compiled(kind.combine)
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
        count, given = len(gift(kind, None)), compiled(kind.gives)
        bare_of, tuple_of = bare(count, jitable), tupled(count, jitable)
        gives = jitable(lambda gy, y, saved, count, size, p: tuple_of(given(gy, y, saved, count, size, p)))
        if kind.takes:
            taken = compiled(kind.takes)
            takes = jitable(lambda x, given, p: taken(x, bare_of(given), p))
        else:
            takes = jitable(lambda x, given, p: given[0])
    return Arithmetic(
        compiled(kind.neutral),
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


def members(kind, real, tap):
    """The dtypes of a state's members, of numbers of dtype ``real`` and taps counted in ``tap``."""
    if kind.selects:
        return (real, tap) if kind.draws else (real, tap) * (len(kind.init(np.float32(0), np.int32(0))) // 2)
    state = kind.init(np.float32(0))
    return (real,) * (len(state) if isinstance(state, tuple) else 1)


def gift(kind, real):
    """The dtypes of what an output gives (``Summing.gives``)."""
    one = np.float32(1)
    given = kind.gives(one, one, one, one, one, (one,) * len(kind.parameters))
    return (real,) * (len(given) if isinstance(given, tuple) else 1)


def bare(count, jitable):
    """A state as the reduction knows it, from a tuple of its ``count`` members: one alone is no tuple there."""
    return jitable((lambda state: state) if count > 1 else (lambda state: state[0]))


def tupled(count, jitable):
    """The tuple of a state's members."""
    return jitable((lambda state: state) if count > 1 else (lambda state: (state,)))
