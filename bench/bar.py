"""A bar that a benchmark must clear: met or not, and by the worst case."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple


class Bar(NamedTuple):
    asked: str
    passed: int
    """Cases."""
    of: int
    """Cases that were measured; 0: no answer."""
    worst: str

    @property
    def verdict(self) -> str:
        return "not measured" if not self.of else "met" if self.passed == self.of else "not met"


Measured = Iterable[tuple[float, str]]
"""A value and the case it is of."""


def at_least(asked: str, bar: float, measured: Measured, show: Callable[[float], str]) -> Bar:
    found = sorted(measured)
    worst = f"{show(found[0][0])}, {found[0][1]}" if found else ""
    return Bar(asked, sum(value >= bar for value, _ in found), len(found), worst)


def at_most(asked: str, bar: float, measured: Measured, show: Callable[[float], str]) -> Bar:
    found = sorted(measured, reverse=True)
    worst = f"{show(found[0][0])}, {found[0][1]}" if found else ""
    return Bar(asked, sum(value <= bar for value, _ in found), len(found), worst)


def summary(found: Iterable[Bar]) -> str:
    """A bar in two lines."""
    lines = ["The bars:"]
    for bar in found:
        lines.append(f"{bar.verdict + ':':13} {bar.asked}")
        if bar.of:
            lines.append(f"{'':13} {bar.passed} of {bar.of}; worst {bar.worst}")
    return "\n".join(lines)
