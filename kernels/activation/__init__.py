"""Activations: one file a family, each a value and its slope on "a number" (kernels/number.py), and what a kernel needs to know of them."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class Activation:
    """An elementwise function."""

    name: str
    value: Callable[..., Any]
    """(x, p) -> f(x); p is the tuple of ``parameters``."""
    slope: Callable[..., Any]
    """(y, p) -> f'(x) from y = f(x), by torch's rule where f has a corner."""
    defaults: Mapping[str, float] = field(default_factory=dict)
    """Parameter -> the value torch gives it."""
    refuse: Callable[..., str | None] | None = None
    """(**parameters) -> what is wrong with these numbers, or None."""

    @functools.cached_property
    def source(self):
        """The file the arithmetic is written in: part of what a compiled kernel is cached by."""
        return self.value.__code__.co_filename

    def __repr__(self):
        return f"Activation({self.name!r})"


def _all():
    from . import relu

    return {activation.name: activation for activation in (relu.RELU, relu.RELU6, relu.LEAKY_RELU)}


ACTIVATIONS = _all()
