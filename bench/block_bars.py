"""What the benchmark of blocks must show, one bar at a time: met or not, and by the worst case."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from .bar import Bar, Measured, at_least
from .blocks import named
from .libraries import TITLES
from .rows import SLOWER, Row, times

MEAN = 1.15
"""Times each library's speed, in the geometric mean over blocks."""

LIBRARIES = ("onnxruntime", "openvino")


def bars(rows: Sequence[Row]) -> list[Bar]:
    """Every bar; a case without a time of the fused form, or of another, answers none beside it."""
    one = sum(row["in_one"] for row in rows)
    unfused = _of(rows, "unfused_ratio")
    launches = f" (it is one launch in {one} of {len(rows)})" if rows else ""
    return [
        *(
            at_least(f"{MEAN}x {TITLES[peer]}, the geometric mean over blocks and batches", MEAN, _means(rows, peer), times)
            for peer in LIBRARIES
        ),
        at_least(f"ahead of its own unfused form on every block{launches}", 1, unfused, times),
        at_least(f"its own unfused form nowhere ahead by more than noise ({1 - SLOWER:.0%})", SLOWER, unfused, times),
        at_least("ahead of PyTorch on every block", 1, _of(rows, "torch_ratio"), times),
    ]


def _of(rows: Iterable[Row], name: str) -> Measured:
    return [(row[name], named(row)) for row in rows if row[name] is not None]


def _means(rows: Iterable[Row], peer: str) -> Measured:
    """One a layout and number of threads."""
    groups: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row[f"{peer}_ratio"]:
            groups.setdefault((row["layout"], row["threads"]), []).append(row[f"{peer}_ratio"])
    return [(statistics.geometric_mean(ratios), f"{layout}, {threads} thr") for (layout, threads), ratios in groups.items()]
