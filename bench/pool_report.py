"""Rows of the pooling benchmark as tables and as words."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from .libraries import SHORT
from .pool_peers import CALLS, PASSES
from .rows import SLOWER, Row, beside, disturbed, is_disturbed, listed, milliseconds, number, peers_of, wrong

WORST = 5
"""Cases whose distance from the roofline a sentence names."""

FAULTY = 0.1
"""Page faults a 4 KB page of a call's bytes: above, its time is the system's as much as anybody's."""

EXPLAINED = """\
thr: threads.  roof: part of the time in which a copy of as many bytes, over as many threads, would be done.
GB/s: of the fewest bytes.  x: a peer's time over fastpool's (above 1: fastpool is faster).  saved: bytes an output kept for backward."""


def table(rows: Sequence[Row], peers: Sequence[str], title: str) -> Table:
    """Of one map, at most 120 columns wide: a line a case, forward and training side by side; a section a window."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    for header in ("\nwindow", "\nkind", "\nlayout"):
        made.add_column(header, no_wrap=True)
    forward = ("forward\nms", "\nroof", "\nGB/s", *(f"{SHORT[peer]}\nx" for peer in peers))
    training = ("train.\nms", "\nroof", "\nGB/s", *(f"{SHORT[peer]}\nx" for peer in peers if peer == "torch"))
    for header in ("\nthr", *forward, *training, "saved\nours", "\ntorch"):
        made.add_column(header, justify="right", no_wrap=True)
    lines: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row["window"], row["kind"], row["layout"], row["threads"]), {})[row["pass"]] = row
    previous = None
    for (window, kind, layout, threads), passes in lines.items():
        if previous not in (None, window):
            made.add_section()
        kind_name = kind.replace("global_", "").replace("stochastic", "stoch.").replace("_", " ")
        cells = [window if window != previous else "", kind_name, "last" if layout == "channels_last" else "contig.", str(threads)]
        for a_pass in PASSES:
            cells += _cells(passes.get(a_pass), [peer for peer in peers if a_pass == "forward" or peer == "torch"])
        saved = passes.get("training", {})
        made.add_row(*cells, *(number(saved.get(f"{name}_saved_bytes")) for name in ("fastpool", "torch")))
        previous = window
    return made


def calls(rows: Sequence[Row], peers: Sequence[str], title: str) -> Table:
    """Of the tiny map: what a call costs, without and with a gradient asked for; a line a pooling."""
    made = Table(title=f"{title}, one call", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    for header in ("kind", "window", "thr", "us", "torch x", "us, grad", "torch x"):
        made.add_column(header, justify="left" if header in ("kind", "window") else "right", no_wrap=True)
    lines: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row["kind"], row["window"], row["threads"]), {})[row["pass"]] = row
    for (kind, window, threads), passes in lines.items():
        found = [passes.get(a_pass, {}) for a_pass in CALLS]
        cells = [(row.get("fastpool_ms"), row.get("torch_ratio")) for row in found]
        made.add_row(kind, window, str(threads), *(text for ms, x in cells for text in (number(ms and ms * 1e3), number(x))))
    return made


def _cells(row: Row | None, peers: Sequence[str]) -> list[str]:
    if row is None:
        return ["-"] * (3 + len(peers))
    ratios = [number(row[f"{peer}_ratio"], "red" if (row[f"{peer}_ratio"] or 1) < SLOWER else "") for peer in peers]
    if row["fastpool_ms"] is None:
        return ["[bold red]WRONG", "-", "-", *ratios]
    return [milliseconds(row["fastpool_ms"]), f"{row['roofline']:.0%}", number(row["gb_s"]), *ratios]


def reading(rows: Sequence[Row]) -> str:
    """What the tables say, in sentences made from their numbers, one a line."""
    said = wrong(rows, named)
    faulty = [row for row in rows if _faults(row) > FAULTY]
    if faulty:
        worst = max(faulty, key=_faults)
        said.append(f"In {len(faulty)} of {len(rows)} rows calls faulted pages in, most {named(worst)}.")
    said += disturbed(rows)
    rows = [row for row in rows if not is_disturbed(row)]
    for peer in peers_of(rows):
        for a_pass in PASSES:
            compared = [row for row in rows if row["pass"] == a_pass and row[f"{peer}_ratio"]]
            if compared:
                said.append(beside(peer, a_pass, compared, named))
    for a_pass in PASSES:
        timed = sorted((row for row in rows if row["pass"] == a_pass and row["roofline"]), key=lambda row: row["roofline"])
        if timed:
            middle = statistics.median(row["roofline"] for row in timed)
            worst = [f"{named(row)} ({row['roofline']:.0%})" for row in timed[:WORST]]
            said.append(f"Roofline, {a_pass}: {middle:.0%} in the median; furthest from it {listed(worst)}.")
    return "\n".join(said)


def _faults(row: Row) -> float:
    """A 4 KB page of the fewest bytes, by whoever of fastpool and PyTorch faults more."""
    most = max(row["fastpool_faults"] or 0, row["torch_faults"] or 0)
    return most / max(1.0, row["bytes"] / 4096) if row["bytes"] else 0.0


def named(row: Row) -> str:
    """'max 2x2 s2 on 8x64x112x112 contiguous, 1 thr'"""
    kind = row["kind"].replace("_", " ")
    window = "" if row["window"] == "global" else f" {row['window']}"
    return f"{kind}{window} on {row['shape']} {row['layout']}, {row['threads']} thr"
