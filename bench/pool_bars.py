"""What the pooling benchmark must show, one bar at a time: met or not, and by the worst case."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .bar import Bar, Measured, at_least, at_most
from .libraries import TITLES
from .pool import key
from .pool_peers import COMMON_WINDOWS, GROWTH_SHAPE, GROWTH_WINDOWS, PEERS, TINY, WINDOWS, Sliding, sizes
from .pool_report import named
from .rows import SLOWER, Row, is_disturbed, number, share, times

GROWING = ("5x5 s1 p2", "9x9 s1 p4", "13x13 s1 p6", *GROWTH_WINDOWS)
"""The windows whose times are compared with the first one's."""

DRAWS = "stochastic"
"""The kind that is measured against max, not against the roofline: it reads a window twice and draws."""

BYTE_OF_TAPS = 256
"""Taps that one byte tells apart."""


def bars(rows: Sequence[Row]) -> list[Bar]:
    """Every bar, in the order of the passes; rows whose copy was disturbed answer none."""
    rows = [row for row in rows if row["fastpool_ms"] and not is_disturbed(row)]
    bound = [row for row in rows if row["roofline"] and row["kind"] != DRAWS]
    common = [row for row in bound if row["window"] in COMMON_WINDOWS]
    wide, small = (
        [row for row in common if _pass(row) == ("forward", "contiguous") and (sizes(row["shape"])[3] >= 28) == is_wide]
        for is_wide in (True, False)
    )
    last = [row for row in common if _pass(row) == ("forward", "channels_last")]
    training = [row for row in rows if row["pass"] == "training"]
    windows = ", ".join(COMMON_WINDOWS)
    found = [
        at_least(f"forward, contiguous, {windows}, maps of 28 and wider: 80% of the roofline", 0.8, _of(wide, "roofline"), share),
        at_least(f"forward, contiguous, {windows}, maps of 14 and 7: 60% of the roofline", 0.6, _of(small, "roofline"), share),
        *(_ahead(rows, "contiguous", peer, 1.0, f"ahead of {TITLES[peer]} in every case") for peer in PEERS),
        at_least(f"forward, channels_last, {windows}: 90% of the roofline", 0.9, _of(last, "roofline"), share),
        *(
            _ahead(rows, "channels_last", peer, SLOWER, f"{TITLES[peer]} not ahead by more than noise ({1 - SLOWER:.0%})")
            for peer in ("torch", "compile")
        ),
    ]
    contiguous = [row for row in training if row["layout"] == "contiguous"]
    byte = [row for row in training if isinstance(w := WINDOWS[row["window"]], Sliding) and w.taps(0, 0) <= BYTE_OF_TAPS]
    wide_windows = [row for row in rows if row["window"] == "13x13 s1 p6" and _pass(row) == ("forward", "contiguous")]
    found += [
        at_least(f"training, contiguous: 10x PyTorch{_moving(contiguous, 10)}", 10, _of(contiguous, "torch_ratio"), times),
        at_least("training: 70% of the roofline", 0.7, _of([row for row in bound if row["pass"] == "training"], "roofline"), share),
        at_most(f"training, windows of {BYTE_OF_TAPS} taps and less: 1 byte an output saved", 1, _of(byte, "fastpool_saved_bytes"), number),
        *(
            at_most(f"{a_pass}, stride 1, {GROWTH_SHAPE}: 5x5 to 31x31 within 1.2x", 1.2, _growth(rows, a_pass), times)
            for a_pass in ("forward", "training")
        ),
        at_least(f"forward, contiguous, 13x13: 50x PyTorch{_moving(wide_windows, 50)}", 50, _of(wide_windows, "torch_ratio"), times),
        at_most("stochastic within 2x of max", 2, _over_max(rows), times),
    ]
    for a_pass, words in (("call", "without"), ("call_grad", "with")):
        calls = [(1 / ratio, case) for ratio, case in _of([row for row in rows if row["pass"] == a_pass], "torch_ratio")]
        found.append(at_most(f"a call on {TINY} {words} a gradient: at most 2x PyTorch's", 2, calls, times))
    return found


def _pass(row: Row) -> tuple[str, str]:
    return row["pass"], row["layout"]


def _of(rows: Iterable[Row], name: str) -> Measured:
    return [(row[name], named(row)) for row in rows if row[name] is not None]


def _moving(rows: Sequence[Row], factor: float) -> str:
    """How often a copy of the bytes alone is that much quicker than PyTorch: more cannot be asked of a pooling that goes through memory."""
    of = [row["torch_ratio"] / row["roofline"] for row in rows if row["torch_ratio"] and row["roofline"]]
    return f" (a copy of the bytes alone is in {sum(value >= factor for value in of)} of {len(of)})" if of else ""


def _ahead(rows: Sequence[Row], layout: str, peer: str, bar: float, words: str) -> Bar:
    cases = [row for row in rows if _pass(row) == ("forward", layout)]
    return at_least(f"forward, {layout}: {words}", bar, _of(cases, f"{peer}_ratio"), times)


def _growth(rows: Sequence[Row], a_pass: str) -> Measured:
    """Each larger window's time over 5x5's."""
    rows_of = {key(row): row for row in rows if row["shape"] == GROWTH_SHAPE and row["pass"] == a_pass}
    first, *others = GROWING
    for name in others:
        for of, row in rows_of.items():
            base = rows_of.get((*of[:2], first, *of[3:]))
            if row["window"] == name and row["kind"] != DRAWS and base:
                yield row["fastpool_ms"] / base["fastpool_ms"], named(row)


def _over_max(rows: Sequence[Row]) -> Measured:
    rows_of = {key(row): row for row in rows}
    for of, row in rows_of.items():
        base = rows_of.get((of[0], "max", *of[2:]))
        if row["kind"].startswith("stochastic") and base:
            yield row["fastpool_ms"] / base["fastpool_ms"], f"{row['pass']}, {named(row)}"
