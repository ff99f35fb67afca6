"""What the convolution benchmark must show, one bar at a time: met or not, and by the worst case."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from .bar import Bar, Measured, at_least, at_most
from .conv import key
from .conv_peers import PASSES, PEERS
from .conv_report import named
from .libraries import LAYOUTS, TITLES
from .rows import Row, is_disturbed, share, times

MEAN = 1.15
"""Times each peer's speed, in the geometric mean over layers."""

BEHIND = 1.1
"""Times the best peer's time, on any layer."""

PEAK, CHANNELS = 0.85, 64
"""Of the FMA peak on 3x3 layers of so many channels and more."""

SCALING = 1.8
"""Times one thread's speed on two."""

ERROR = 2
"""Times PyTorch's."""


def bars(rows: Sequence[Row]) -> list[Bar]:
    """Every bar, in the order of the passes; rows whose copy was disturbed answer none, wrong ones that of the error alone."""
    rows = [row for row in rows if not is_disturbed(row)]
    checked = [row for row in rows if row["fastpool_error"] is not None and row["torch_error"]]
    rows = [row for row in rows if row["fastpool_ms"]]
    forward = [row for row in rows if row["pass"] == "forward"]
    found = [
        *(
            at_least(f"forward, {layout}: ahead of PyTorch on every layer", 1, _of(_in(forward, layout), "torch_ratio"), times)
            for layout in LAYOUTS
        ),
        *(at_least(f"forward: {MEAN}x {TITLES[peer]} in the geometric mean", MEAN, _means(forward, peer), times) for peer in PEERS),
        at_least("forward: no layer more than 10% behind the best peer", 1 / BEHIND, _best(forward), times),
        at_least(f"forward: {PEAK:.0%} of the FMA peak on 3x3 layers of {CHANNELS} channels and more", PEAK, _dense(forward), share),
    ]
    for a_pass in PASSES[1:]:
        of = [row for row in rows if row["pass"] == a_pass]
        found.append(at_least(f"{a_pass.replace('_', ' ')}: ahead of PyTorch on every layer", 1, _of(of, "torch_ratio"), times))
    words = f"every pass: error at most {ERROR}x PyTorch's"
    return [
        *found,
        at_least(f"every pass: {SCALING}x as fast on 2 threads as on 1 where compute-bound", SCALING, _scaling(rows), times),
        at_most(words, ERROR, [(row["fastpool_error"] / row["torch_error"], _named(row)) for row in checked], times),
    ]


def _in(rows: Iterable[Row], layout: str) -> list[Row]:
    return [row for row in rows if row["layout"] == layout]


def _named(row: Row) -> str:
    return f"{row['pass'].replace('_', ' ')}, {named(row)}"


def _of(rows: Iterable[Row], name: str) -> Measured:
    return [(row[name], named(row)) for row in rows if row[name] is not None]


def _means(rows: Sequence[Row], peer: str) -> Measured:
    """One a layout and number of threads."""
    groups: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row[f"{peer}_ratio"]:
            groups.setdefault((row["layout"], row["threads"]), []).append(row[f"{peer}_ratio"])
    return [(statistics.geometric_mean(ratios), f"{layout}, {threads} thr") for (layout, threads), ratios in groups.items()]


def _best(rows: Iterable[Row]) -> Measured:
    """The quickest peer's time over fastpool's."""
    for row in rows:
        ratios = {peer: row[f"{peer}_ratio"] for peer in PEERS if row[f"{peer}_ratio"]}
        if ratios:
            best = min(ratios, key=lambda peer: ratios[peer])
            yield ratios[best], f"{TITLES[best]}, {named(row)}"


def _dense(rows: Iterable[Row]) -> Measured:
    many = [
        row for row in rows if row["kernel_size"] == 3 and row["groups"] == 1 and min(row["in_channels"], row["out_channels"]) >= CHANNELS
    ]
    return _of(many, "peak")


def _scaling(rows: Sequence[Row]) -> Measured:
    """One thread's time over two threads'."""
    rows_of = {key(row): row for row in rows}
    for of, row in rows_of.items():
        two = rows_of.get((*of[:-1], 2))
        if row["threads"] == 1 and two and row["bound"] == two["bound"] == "compute":
            yield row["fastpool_ms"] / two["fastpool_ms"], _named(two)
