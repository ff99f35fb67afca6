"""Activations: one file a family, each a value and its derivative on "a number" (kernels/number.py), and its shape: what order knows of it.

A file is self-contained but for the words of kernels/number.py, as a compiled kernel is cached by the file of the value it holds.
``ACTIVATIONS`` finds the files.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..registry import by_name


@dataclass(frozen=True)
class Shape:
    """What can be said of a function f of real numbers; tests/test_activation.py holds it against the code."""

    minimum: float | None = None
    """f falls (or stays) up to here and rises (or stays) from here: quasi-convex.  -inf: it never falls; inf: it never rises."""
    maximum: float | None = None
    """Quasi-concave: f rises up to here and falls from here.  inf: it never falls; -inf: it never rises."""
    ordered: bool = False
    """The code keeps the order too, bit for bit: comparisons, and single roundings of what is monotone."""
    root: float | None = None
    """An x with f(x) = 0, 0 if that is one: what padding is filled with where f(x) is summed; None: there is none."""
    homogeneous: bool = False
    """f(c x) = c f(x) for every c >= 0."""
    slope_above: float | None = None
    """c >= 0 where f(x) = c x for every x > 0, and f(x) <= 0 for the others; None: there is no such c."""
    affine: tuple[float, float] | None = None
    """(a, b) where f(x) = a x + b."""

    @property
    def rises(self):
        """f never falls."""
        return self.minimum == -math.inf

    @property
    def falls(self):
        """f never rises."""
        return self.minimum == math.inf

    @property
    def fixes_zero(self):
        """f(0) = 0."""
        return self.root == 0


def rising(ordered=False, **more):
    """The shape of a function that never falls."""
    return Shape(-math.inf, math.inf, ordered, **more)


def valley(minimum, ordered=False, **more):
    """The shape of a function that falls, then rises."""
    return Shape(minimum, None, ordered, **more)


@dataclass(frozen=True, eq=False)
class Activation:
    """An elementwise function."""

    name: str
    value: Callable[..., Any]
    """(x, p) -> f(x); p is the tuple of ``parameters``."""
    derivative: Callable[..., Any]
    """(x, p) -> f'(x), by torch's rule where f has a corner."""
    shape: Callable[..., Shape]
    """(*parameters) -> its shape with these."""
    slope: Callable[..., Any] | None = None
    """(y, p) -> f'(x) from y = f(x), as precise as from x; None: f'(x) is not told by y."""
    slope_when: Callable[..., bool] | None = None
    """(*parameters) -> whether ``slope`` holds for these; None: for all."""
    defaults: Mapping[str, float | None] = field(default_factory=dict)
    """Parameter -> the value torch gives it; None where torch has no default."""
    refuse: Callable[..., str | None] | None = None
    """(*parameters) -> what is wrong with these numbers, or None."""
    switches: bool = False
    """f'(x) is 0 or 1, whatever x and the parameters."""

    @functools.cached_property
    def sources(self):
        """The file the arithmetic is written in: part of what a compiled kernel is cached by."""
        return (self.value.__code__.co_filename,)

    def slope_for(self, parameters):
        """``slope`` where it holds for these parameters, else None."""
        holds = self.slope is not None and (self.slope_when is None or self.slope_when(*parameters))
        return self.slope if holds else None

    def __repr__(self):
        return f"Activation({self.name!r})"


ACTIVATIONS = by_name(__name__, Activation)
"""Every activation by name."""
