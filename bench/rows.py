"""What the reports of benchmarks share: when a row counts, and how numbers, cases and comparisons are written."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .libraries import TITLES

Row = Mapping[str, Any]

SLOWER = 0.95
"""A ratio below this is told in words; nearer to 1 the two are as fast as each other."""

NAMED = 8
"""Cases that a sentence names at most."""

DISTURBED = 1.5
"""A roofline above this is no achievement: the copy lost a scheduler's slice to other work, as its neighbours may have."""

DIGITS = 4
"""Of every number in a row."""


def rounded(row: Row) -> dict[str, Any]:
    return {name: float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value for name, value in row.items()}


def peers_of(rows: Iterable[Row]) -> list[str]:
    """Those that have a time in one row at least."""
    rows = list(rows)
    return [peer for peer in TITLES if any(row[f"{peer}_ms"] for row in rows)]


def is_disturbed(row: Row) -> bool:
    return (row["roofline"] or 0) > DISTURBED


def milliseconds(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 0.1 else f"{ms:.3f}"


def number(value: float | None, style: str = "") -> str:
    """Two or three digits; a value that there is not is a dash."""
    if value is None:
        return "-"
    text = f"{value:.0f}" if value >= 9.95 or value == int(value) else f"{value:.1f}" if value >= 0.995 else f"{value:.2f}"
    return f"[{style}]{text}[/]" if style else text


def share(value: float) -> str:
    return f"{value:.0%}"


def times(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:.0f}x"


def listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return "; ".join([*names[:NAMED], *([f"and {more} more"] if more > 0 else [])])


def beside(peer: str, a_pass: str, rows: Sequence[Row], named: Callable[[Row], str]) -> str:
    """A sentence on the rows of a pass that have the peer's ratio: their mean, and where the peer is ahead."""
    name = f"{peer}_ratio"
    ratios = [row[name] for row in rows]
    spread = f"geometric mean of {len(ratios)}; {number(min(ratios))}x to {number(max(ratios))}x"
    text = f"fastpool is {number(statistics.geometric_mean(ratios))}x as fast as {TITLES[peer]}, {a_pass} ({spread})"
    ahead = [f"{named(row)} ({row[name]:.2f}x)" for row in sorted(rows, key=lambda row: row[name]) if row[name] < SLOWER]
    return f"{text}; {TITLES[peer]} is ahead in {len(ahead)}: {listed(ahead)}." if ahead else f"{text}; it is nowhere ahead."


def wrong(rows: Iterable[Row], named: Callable[[Row], str]) -> list[str]:
    """The wrong rows in a sentence, if there are any."""
    found = [f"{named(row)}: {row['error']}" for row in rows if not row["correct"]]
    return [f"Wrong, and not timed: {listed(found)}."] if found else []


def disturbed(rows: Sequence[Row]) -> list[str]:
    """The disturbed rows in a sentence, if there are any."""
    found = sum(map(is_disturbed, rows))
    words = f"In {found} of {len(rows)} rows the copy took over {DISTURBED} times as long as fastpool: other work disturbed them,"
    return [f"{words} and what follows leaves them out."] if found else []


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], numbers: int | None = None) -> str:
    """``numbers``: the first column of them."""
    rule = ["---" if numbers is None or i < numbers else "---:" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))
