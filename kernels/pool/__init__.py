"""Pooling types: one file of arithmetic each, and the two forms such arithmetic takes.

A file defines its functions on "a number" (kernels/number.py) and binds them into one or more reductions, ``Selecting`` or
``Summing``.  That is all a pooling type is: ``KINDS`` finds the file, and the loop nests, the autograd functions, the tests and the
benchmark take what is in ``KINDS``.

In the signatures below x, y, gy are numbers (an element, an output, its gradient); ``zero`` is 0 of the dtype to compute in;
``state`` is whatever ``init`` returns: a number or a tuple of numbers.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..number import like, where
from ..registry import by_name

FLOATS = ("float32", "float64", "bfloat16", "float16")
INTEGERS = ("int8", "uint8", "int16", "int32", "int64", "bool")


def _no_change(zero):
    return zero


@dataclass(frozen=True)
class Face:
    """How users call a pooling type: fastpool.functional and fastpool.nn make its functions and modules of 1 to 3 dimensions from this.

    ``Face("soft", "Soft", ...)`` makes soft_pool1d .. 3d and SoftPool1d .. 3d, and where the reduction has a ``combine``, which the
    global form needs, global_soft_pool1d .. 3d and GlobalSoftPool1d .. 3d.
    """

    stem: str
    """Of the functions' names."""
    title: str
    """Of the modules' names."""
    doc: str
    """The functions' docstring, in the words of what comes out: "The largest element of each window; ..."."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    """Each of the reduction's ``parameters``, in their order -> the default of the argument of that name; such an argument may be
    a number, or a tensor of one element, which gets a gradient if the reduction has a slope for it."""
    refuse: Callable[..., str | None] | None = None
    """(**parameters) -> what is wrong with these numbers ("p must not be 0, got 0.0"), or None."""
    map_by_default: bool = False
    """``kernel_size`` may be left out, and the window is the map then; it comes after the parameters."""
    adaptive: bool = False
    """There is adaptive_STEM_pool1d .. 3d, and AdaptiveTITLEPool1d .. 3d."""
    trainable: tuple[str, ...] = ()
    """The parameters that are an nn.Parameter in the modules, unless they are told ``trainable=False``."""


@dataclass(frozen=True)
class Structure:
    """What a pooling is to a function that would change places with it; tests/test_laws.py holds it against the arithmetic."""

    order: int = 0
    """1: the result is the window's largest element, -1: its smallest."""
    linear: bool = False
    """The weights depend on the taps' places alone."""
    scales: str | None = None
    """"positive": pool(c x) = c pool(x) for c >= 0; "all": abs(c) pool(x) for any c; None: neither."""
    shifts: bool = False
    """pool(x + c) = pool(x) + c."""
    reads_above: bool = False
    """Of x only max(x, 0) counts, and the result is at least 0."""


class _Reduction:
    """What the two forms share."""

    selects = False

    @functools.cached_property
    def sources(self):
        """The files the arithmetic is written in: part of what a compiled kernel is cached by."""
        return self.made_from or (self.init.__code__.co_filename,)

    def __repr__(self):
        return f"{type(self).__name__}({self.name!r})"


@dataclass(frozen=True, repr=False, eq=False)
class Selecting(_Reduction):
    """A pooling that returns one of the window's elements; its gradient goes to that element alone.

    Saved for backward: the chosen tap (its number in the window, row by row), nothing else.
    """

    name: str
    init: Callable[..., Any]
    """(zero, tap) -> state, whose first two members are the chosen value and tap; ``tap`` is the window's first inside the
    input.  If ``draws``: (zero, tap, total, u) with the survey's total and u uniform in [0, 1)."""
    accumulate: Callable[..., Any]
    """(state, x, tap) -> state.  Taps come in rising order."""
    ordered: Callable[..., Any] | None = None
    """``accumulate`` where no x is NaN, if that is quicker: for loop nests that have looked."""
    neutral: Callable[..., Any] = _no_change
    """(zero) -> the x that changes no state: what padding is filled with."""
    combine: Callable[..., Any] | None = None
    """(state, state) -> state of both parts, in whatever order their taps are: makes the global pooling.  None: there is none."""
    survey: Callable[..., Any] | None = None
    """(total, x) -> total: a first pass over the window, from zero, before ``init``."""
    draws: bool = False
    reads: Callable[..., Any] | None = None
    """(x, p) -> what is accumulated in the place of x."""
    finalise: Callable[..., Any] | None = None
    """(state, p) -> (y, tap); tap -1: nobody gets the gradient.  None: the state's first two members."""
    routed: "Selecting | None" = None
    """The reduction whose gradient this one's is: how that moves depends on the taps alone.  None: itself."""
    tells: Any = None
    """The ``Activation`` that y is of what was chosen: its slope, told by y, is still to be multiplied into the gradient."""
    parameters: tuple[str, ...] = ()
    face: Face | None = None
    structure: Structure = Structure()
    made_from: tuple[str, ...] = ()
    """The files of a reduction derived from others (kernels/fusion.py)."""
    selects = True

    @property
    def dtypes(self):
        """The names of the dtypes it takes: all that have an order, or to draw by, the floats."""
        return FLOATS if self.draws else FLOATS + INTEGERS

    def gradient(self):
        return _selected

    def saved_dtype(self, taps, dtype):
        """The name of the dtype that one output's tap is saved in, for windows of this many taps; -1 means no tap."""
        return "uint8" if taps <= 255 else "uint16" if taps <= 65535 else "int32"


@dataclass(frozen=True, repr=False, eq=False)
class Summing(_Reduction):
    """A pooling whose every element has a share in the output, and in the gradient.

    ``p`` is the tuple of ``parameters``; ``count`` the number of taps that the average divides by (by
    count_include_pad, ceil_mode and divisor_override); ``size`` the number of taps of a whole window.
    """

    name: str
    init: Callable[..., Any]
    """(zero) -> state."""
    accumulate: Callable[..., Any]
    """(state, x, p) -> state."""
    finalise: Callable[..., Any]
    """(state, count, size, p) -> y."""
    share: Callable[..., Any]
    """(gy, x, y, residue, count, size, p) -> gy * dy/dx for one tap x of a window."""
    combine: Callable[..., Any]
    """(state, state) -> state of both parts: makes the global pooling, and the double backward."""
    neutral: Callable[..., Any] = _no_change
    """(zero) -> the x that changes no state: what padding is filled with."""
    residue: Callable[..., Any] | None = None
    """(state) -> one more number an output, saved for ``share``."""
    gives: Callable[..., Any] | None = None
    """(gy, y, residue, count, size, p) -> what an output gives to each of its elements, a number or a tuple of them; zeros, where gy, y and
    residue are 0.  With it ``share`` is, but for rounding, ``takes`` of that, and the gradient costs no more than the
    pooling however large the window: what the outputs give is summed first."""
    takes: Callable[..., Any] | None = None
    """(x, given, p) -> the gradient of x, from the sum of what its windows give.  None: that sum itself; the reduction is linear then."""
    parameters: tuple[str, ...] = ()
    integers: tuple[str, ...] = ()
    """The names of the integer dtypes whose sums it takes, beside the floats."""
    slopes: Mapping[str, "Summing"] = field(default_factory=dict)
    """Parameter -> the pooling (a ``slope``) whose output is dy by that parameter."""
    routed: "Summing | None" = None
    """The linear reduction whose gradient this one's is, once gy is multiplied by a slope.  None: itself."""
    tells: Any = None
    """The ``Activation`` that y is of the linear reduction's result, as in ``Selecting``."""
    face: Face | None = None
    structure: Structure = Structure()
    made_from: tuple[str, ...] = ()
    """The files of a reduction derived from others (kernels/fusion.py)."""

    @property
    def linear(self):
        """Whether ``share`` reads neither x, y nor residue: nothing is saved, and the second derivative is zero."""
        return self.gives is not None and self.takes is None

    @property
    def draws(self):
        return False

    @property
    def dtypes(self):
        """The names of the dtypes it takes."""
        return FLOATS + self.integers

    def saved_dtype(self, taps, dtype):
        """The name of the dtype of the residue, that which is computed in; None if there is none."""
        return (dtype if dtype == "float64" else "float32") if self.residue else None


def _selected(gy, saved, tap):
    return where(saved == tap, gy, like(gy, 0))


def _no_share(gy, x, y, residue, count, size, p):
    return like(gy, 0)


def slope(name, init, accumulate, finalise, combine, neutral=_no_change, parameters=()):
    """A Summing for ``slopes``: run forward alone, and differentiated as its arithmetic on tensors.

    Written inside its reduction's ``slopes``, it is no pooling type of its own.
    """
    return Summing(name, init, accumulate, finalise, _no_share, combine, neutral, parameters=parameters)


KINDS = by_name(__name__, _Reduction)
"""Every reduction by name: what the loop nests can run and the tests and benchmarks go through."""
