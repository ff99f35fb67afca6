"""A pooling with an activation before or after it, in one pass: reductions derived from a kind of pool/ and an activation of activation/.

Loop nests run them as any other.  The parameters of a derived reduction are its kind's, then its activation's.
"""

import functools
from dataclasses import replace
from types import FunctionType

import numpy as np

from .number import any_lane, highest, like, lowest, where
from .pool import KINDS, Selecting, Summing

# What ``_written`` puts in their places.
f = slope = accumulate = finalise = gives = share = takes = top_start = top_step = top_clean = low_start = low_step = low_clean = None
top_join = low_join = undecided = None
N = POINT = 0
RARE = False


def _written(template, **names):
    """A copy of ``template`` with these functions and constants for its globals, which ``retarget`` follows, as it does not closures."""
    scope = {**template.__globals__, **names}
    return FunctionType(template.__code__, scope, template.__name__, template.__defaults__)


def _point(zero):
    return like(zero, POINT)


def _chosen(state, p):
    return state[0], state[1]


def _activated(state, p):
    y, tap = finalise(state, p[:N])
    return f(y, p[N:]), tap


def _switched(state, p):
    """No tap where the slope is 0: nothing else need be saved."""
    z, tap = finalise(state, p[:N])
    a = p[N:]
    return f(z, a), where(slope(z, a) == like(z, 0), like(tap, -1), tap)


def _pair_init(zero, tap):
    top, i = top_start(zero, tap)
    low, j = low_start(zero, tap)
    return top, i, low, j


def _pair_accumulate(state, x, tap):
    top, i, low, j = state
    top, i = top_step((top, i), x, tap)
    low, j = low_step((low, j), x, tap)
    return top, i, low, j


def _pair_ordered(state, x, tap):
    top, i, low, j = state
    top, i = top_clean((top, i), x, tap)
    low, j = low_clean((low, j), x, tap)
    return top, i, low, j


def _pair_combine(a, b):
    top, i = top_join((a[0], a[1]), (b[0], b[1]))
    low, j = low_join((a[2], a[3]), (b[2], b[3]))
    return top, i, low, j


def _undecided(top, low):
    """Where f may be larger at either of a window's two points: they lie on both sides of the minimum."""
    point = like(top, POINT)
    return (low < point) & (top >= point)


def _undecided_below(top, low):
    """The same where f is at most 0 = f(0) below 0; but f(-inf) may not be a number."""
    point = like(top, POINT)
    return ((low < point) & (top >= point) & (top < like(top, 0))) | (low == lowest(low))


def _two_point(state, p):
    """No tap: without a gradient none is counted."""
    top, i, low, _ = state
    y, unsure = f(where(top < like(top, POINT), low, top), p), undecided(top, low)
    if not RARE or any_lane(unsure):
        other = f(low, p)
        y = where(unsure & ((other > y) | (other != other)), other, y)
    return y, i


def _two_point_chosen(state, p):
    top, i, low, j = state
    falling = top < like(top, POINT)
    x, tap, unsure = where(falling, low, top), where(falling, j, i), undecided(top, low)
    if not RARE or any_lane(unsure):
        here, other = f(x, p), f(low, p)
        wins = unsure & ((other > here) | (other != other) | ((other == here) & (j < tap)))
        x, tap = where(wins, low, x), where(wins, j, tap)
    return x, tap


def _sides_accumulate(state, x, tap):
    top, i, low, j = state
    below = x < like(x, POINT)
    top, i = top_step((top, i), where(below, x, lowest(x)), tap)
    low, j = low_step((low, j), where(below, where(x == lowest(x), like(x, float("nan")), highest(x)), x), tap)
    return top, i, low, j


def _sides(top, low):
    """A window's two points; of what there is on one side alone, that twice: f of an infinity takes as long as subnormal numbers do."""
    none, some = top == lowest(top), top > lowest(top)
    return where(none, low, top), where(some & (low == highest(low)), top, low)


def _two_sides(state, p):
    """No tap: without a gradient none is counted."""
    top, low = _sides(state[0], state[2])
    here, other = f(low, p), f(top, p)
    return where(other < here, other, here), state[3]


def _two_sides_chosen(state, p):
    top, i, low, j = state
    some, (below, above) = top > lowest(top), _sides(top, low)
    here, other = f(above, p), f(below, p)
    wins = some & ((other < here) | (low == highest(low)) | ((other == here) & (i < j)))
    return where(wins, below, above), where(wins, i, j)


def _finished(state, count, size, p):
    return f(finalise(state, count, size, p[:N]), p[N:])


def _fed(state, x, p):
    return accumulate(state, f(x, p[N:]), p[:N])


def _fed_finalise(state, count, size, p):
    return finalise(state, count, size, p[:N])


def _fed_gives(gy, y, residue, count, size, p):
    return gives(gy, y, residue, count, size, p[:N])


def _fed_share(gy, x, y, residue, count, size, p):
    a = p[N:]
    return share(gy, f(x, a), y, residue, count, size, p[:N]) * slope(x, a)


def _fed_takes(x, given, p):
    a = p[N:]
    return takes(f(x, a), given, p[:N]) * slope(x, a)


def _fed_linear(x, given, p):
    return given * slope(x, p[N:])


def _made_from(kind, activation):
    return *kind.sources, *activation.sources, __file__


def _parameters(kind, activation):
    return *kind.parameters, *activation.defaults


@functools.cache
def activated(kind, activation, switches=False):
    """f of what a pooling gives.  ``switches``: for a gradient, where f' is 0 or 1: no tap where it is 0, and nothing left to multiply."""
    n, changes = len(kind.parameters), {}
    if isinstance(kind, Selecting):
        template, of = (_switched, {"slope": activation.derivative}) if switches else (_activated, {})
        changes["finalise"] = _written(template, f=activation.value, finalise=kind.finalise or _chosen, N=n, **of)
    else:
        changes["finalise"] = _written(_finished, f=activation.value, finalise=kind.finalise, N=n)
    if kind.selects or kind.linear:
        changes |= {"routed": kind.routed or kind, "tells": None if switches else activation}
    name = f"{activation.name}{'_switch' if switches else ''}({kind.name})"
    return replace(kind, name=name, parameters=_parameters(kind, activation), face=None, made_from=_made_from(kind, activation), **changes)


@functools.cache
def two_point(activation, minimum, bounded, rare, chosen=False):
    """max over f where f falls up to ``minimum`` and rises from there: f of the smallest or of the largest element (Boyd & Vandenberghe,
    Convex Optimization, section 3.4).  ``bounded``: f is at most 0 = f(0) below 0.
    ``rare``: few windows need both, so that a branch is foretold.  ``chosen``: that element instead of f of it.

    Padding is the minimum: f of no element is below f of that.
    """
    top, low = KINDS["max"], KINDS["min"]
    words = {"top_start": top.init, "low_start": low.init, "top_step": top.accumulate, "low_step": low.accumulate}
    undecided = _written(_undecided_below if bounded else _undecided, POINT=minimum)
    finalise = _written(_two_point_chosen if chosen else _two_point, f=activation.value, undecided=undecided, POINT=minimum, RARE=rare)
    return Selecting(
        f"two_point_{'chosen_' if chosen else ''}{activation.name}_{minimum!r}{'_bounded' if bounded else ''}{'_rare' if rare else ''}",
        _written(_pair_init, **words),
        _written(_pair_accumulate, **words),
        ordered=_written(_pair_ordered, top_clean=top.ordered, low_clean=low.ordered),
        neutral=_written(_point, POINT=minimum),
        combine=_written(_pair_combine, top_join=top.combine, low_join=low.combine),
        finalise=finalise,
        parameters=tuple(activation.defaults),
        routed=top,
        made_from=(*top.sources, *low.sources, *activation.sources, __file__),
    )


@functools.cache
def two_sides(activation, minimum, chosen=False):
    """min over f where f falls up to ``minimum`` and rises from there: f of the largest element below it or of the smallest from it on.
    ``chosen``: that element instead of f of it.  f of -inf is NaN, and of inf inf, as of no element on that side.
    """
    top, low = KINDS["max"], KINDS["min"]
    finalise = _written(_two_sides_chosen if chosen else _two_sides, f=activation.value)
    return Selecting(
        f"two_sides_{'chosen_' if chosen else ''}{activation.name}_{minimum!r}",
        _written(_pair_init, top_start=top.init, low_start=low.init),
        _written(_sides_accumulate, top_step=top.accumulate, low_step=low.accumulate, POINT=minimum),
        neutral=low.neutral,
        combine=_written(_pair_combine, top_join=top.combine, low_join=low.combine),
        finalise=finalise,
        parameters=tuple(activation.defaults),
        routed=low,
        made_from=(*top.sources, *low.sources, *activation.sources, __file__),
    )


@functools.cache
def by_value(kind, activation):
    """max or min over f of every element: values and taps, without a gradient.  Padding is the kind's own, which f keeps."""
    return replace(
        kind,
        name=f"{kind.name}_of_{activation.name}",
        reads=activation.value,
        ordered=None,
        parameters=tuple(activation.defaults),
        face=None,
        made_from=_made_from(kind, activation),
    )


@functools.cache
def fed(kind, activation, root):
    """A sum over f of every element, and its gradient.  ``root``: what padding is filled with, f(root) = 0 as the kind's own padding is."""
    n = len(kind.parameters)
    words = {"f": activation.value, "slope": activation.derivative, "N": n}
    takes = _written(_fed_takes, takes=kind.takes, **words) if kind.takes else _written(_fed_linear, **words)
    return replace(
        kind,
        name=f"{kind.name}_of_{activation.name}_{root!r}",
        accumulate=_written(_fed, accumulate=kind.accumulate, **words),
        finalise=_written(_fed_finalise, finalise=kind.finalise, N=n),
        share=_written(_fed_share, share=kind.share, **words),
        neutral=_written(_point, POINT=root),
        gives=kind.gives and _written(_fed_gives, gives=kind.gives, N=n),
        takes=kind.gives and takes,
        parameters=_parameters(kind, activation),
        integers=(),
        slopes={name: fed(of, activation, root) for name, of in kind.slopes.items()},
        face=None,
        made_from=_made_from(kind, activation),
    )


def keeps_neutral(kind, activation, parameters):
    """Whether f leaves the kind's padding what it is, so that ``by_value`` may fill with it."""
    fill = kind.neutral(np.float64(0))
    with np.errstate(all="ignore"):
        return bool(activation.value(fill, tuple(map(np.float64, parameters))) == fill)


def is_one_sum(kind):
    """Whether ``fed`` can derive from it: a sum that starts at 0, whose padding is 0."""
    return kind.neutral is Summing.neutral and not isinstance(kind.init(np.float32(0)), tuple)


def has_two_sides(activation, parameters):
    """Whether ``two_sides`` may take f, which falls, then rises: by what it makes of infinities; and that it is not flat before it falls,
    where the first of equal elements would be another, whose slope may be."""
    p = tuple(map(np.float64, parameters))
    with np.errstate(all="ignore"):
        below, above, far, further = (activation.value(np.float64(x), p) for x in (-np.inf, np.inf, -4.0, -5.0))
    return bool(np.isnan(below) and above == np.inf and far != further)


def is_bounded(activation, parameters):
    """Whether f, which falls, then rises, is at most 0 = f(0) below 0: as it falls from there it need be asked at -inf alone."""
    p = tuple(map(np.float64, parameters))
    at_0, far = (activation.value(np.float64(x), p) for x in (0.0, -1e9))
    return bool(at_0 == 0 and far <= 0)
