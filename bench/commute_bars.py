"""What the order benchmark must show, one bar at a time: met or not, and by the worst case."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from .bar import Bar, Measured, at_least, at_most
from .cases import ACTIVATIONS
from .commute import ALONE, ORDERS, PASSES, ROUNDING
from .report import named
from .rows import SLOWER, Row, number, times

RELU_LIKE = ("relu", "leaky_relu")
LIMITS = {RELU_LIKE: 1.1, tuple(name for name in ACTIVATIONS if name not in RELU_LIKE): 1.5}
"""Times the pooling alone."""

WORDS = {"act_pool": "activate, pool", "pool_act": "pool, activate"}

EQUAL = {"exact": 0.0, "rounding": ROUNDING}
"""How far apart values may be, a part of the largest, by the law's class."""

BYTE = ("max", "2x2 s2 p0", "relu")
"""The pooling, window and activation that save one byte an output."""

_BYTE_WORDS = "max 2x2 s2 with relu: 1 byte an output saved"


def bars(rows: Sequence[Row]) -> list[Bar]:
    """Every bar; wrong rows answer none."""
    rows = [row for row in rows if row["correct"]]
    found = []
    for names, limit in LIMITS.items():
        of = [row for row in rows if row["activation"] in names]
        for order in ORDERS:
            for a_pass in PASSES:
                words = f"{WORDS[order]}, fused, {a_pass}: at most {limit}x the pooling alone with {_listed(names)}"
                found.append(at_most(words, limit, _over_alone(of, order, a_pass), times))
    for a_pass in PASSES:
        words = f"{a_pass}, either order: fused not behind unfused by more than noise ({1 - SLOWER:.0%})"
        found.append(at_least(words, SLOWER, _over_fused(rows, a_pass), times))
    byte = [(row[f"fused_{order}_saved_bytes"], f"{words}, {named(row)}") for row in _byte(rows) for order, words in WORDS.items()]
    found.append(at_most(f"either order, {_BYTE_WORDS}", 1, byte, number))
    for kind, allowed in EQUAL.items():
        gaps = [(_relative_gap(row), named(row)) for row in rows if row["law"] == kind]
        apart = f"at most {allowed:g} of the largest apart" if allowed else "bit for bit"
        found.append(at_most(f'law "{kind}": the orders\' values equal, {apart}', allowed, gaps, _gap))
    return [*found, at_least('law "never": the orders\' values apart on some map', ROUNDING, _furthest(rows), _gap)]


def conv_bars(rows: Sequence[Row]) -> list[Bar]:
    """Of the convolution in front of both, by F.conv_pool2d."""
    rows = [row for row in rows if row["correct"]]
    noise = f"its own unfused form not ahead by more than noise ({1 - SLOWER:.0%})"
    asked = [
        ("forward", "unfused", 1, "ahead of its own unfused form in every case"),
        *((a_pass, "unfused", SLOWER, noise) for a_pass in PASSES),
        *((a_pass, "torch_act_pool", 1, "ahead of PyTorch's convolution, activation, pooling") for a_pass in PASSES),
    ]
    found = [at_least(f"F.conv_pool2d, {a_pass}: {words}", bar, _over_one(rows, form, a_pass), times) for a_pass, form, bar, words in asked]
    byte = [(row["conv_pool_saved_bytes"], named(row)) for row in _byte(rows)]
    return [*found, at_most(f"F.conv_pool2d, {_BYTE_WORDS}", 1, byte, number)]


def _over_one(rows: Iterable[Row], form: str, a_pass: str) -> Measured:
    return [(row[f"{form}_{a_pass}_ms"] / row[f"conv_pool_{a_pass}_ms"], named(row)) for row in rows]


def _byte(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if (row["pooling"], row["window"], row["activation"]) == BYTE]


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _over_alone(rows: Iterable[Row], order: str, a_pass: str) -> Measured:
    return [(row[f"fused_{order}_{a_pass}_ms"] / row[f"{ALONE}_{a_pass}_ms"], named(row)) for row in rows]


def _over_fused(rows: Iterable[Row], a_pass: str) -> Iterator[tuple[float, str]]:
    for row in rows:
        for order, words in WORDS.items():
            yield row[f"unfused_{order}_{a_pass}_ms"] / row[f"fused_{order}_{a_pass}_ms"], f"{words}, {named(row)}"


def _furthest(rows: Iterable[Row]) -> Measured:
    """Of each pooling and activation the largest gap: on a map whose windows hold numbers of one sign alone there may be none."""
    largest: dict[str, float] = {}
    for row in rows:
        if row["law"] == "never":
            pair = f"{row['pooling'].replace('_', ' ')} with {row['activation']}"
            largest[pair] = max(largest.get(pair, 0.0), _relative_gap(row))
    return [(gap, pair) for pair, gap in largest.items()]


def _relative_gap(row: Row) -> float:
    """All is 0 where min pooling meets ReLU."""
    return row["value_gap"] / (row["value_scale"] or 1.0)


def _gap(gap: float) -> str:
    return f"{gap:.1e}" if gap else "0"
