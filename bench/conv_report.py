"""Rows of the convolution benchmark as tables and as words."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table

from .conv_peers import PASSES
from .libraries import LAYOUTS, SHORT
from .rows import SLOWER, Row, beside, disturbed, is_disturbed, listed, milliseconds, number, peers_of, share, wrong

WORST = 3
"""Cases whose distance from the peak a sentence names."""

EXPLAINED = """\
peak: part of the FMA peak of as many threads.  copy: part of the time in which a copy of the fewest bytes (input,
weights and output, once each) would be done.  x: a peer's time over fastpool's (above 1: fastpool is faster);
PyTorch's in its better layout, l where that is channels_last.  pack: ms to pack the weights, which fastpool's layer
does once.  error: the largest, over the largest magnitude.  MB beside operands and result: im2col's of one image;
fastpool's packed weights, and its panels on all threads."""

_LAYOUTS = {"contiguous": "cont.", "channels_last": "last"}


def tables(rows: Sequence[Row]) -> Iterator[Table]:
    """Of each network, batch and number of threads two, forward and backward, at most 120 columns wide; a line a layer and layout."""
    peers = peers_of(rows)
    for network, batch, threads in dict.fromkeys((row["network"], row["batch"], row["threads"]) for row in rows):
        of = [row for row in rows if (row["network"], row["batch"], row["threads"]) == (network, batch, threads)]
        title = f"{network}, batch {batch}, {threads} thread{'s' if threads > 1 else ''}"
        forward = [row for row in of if row["pass"] == "forward"]
        if forward:
            yield _forward(forward, peers, f"{title}: forward")
        if len(forward) < len(of):
            yield _backward(of, f"{title}: backward")


def _table(title: str, numbers: Iterable[str]) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    for header in ("\nlayer", "\nlay."):
        made.add_column(header, no_wrap=True)
    for header in numbers:
        made.add_column(header, justify="right", no_wrap=True)
    return made


def _forward(rows: Sequence[Row], peers: Sequence[str], title: str) -> Table:
    theirs = (f"{SHORT[peer]}\nx" for peer in peers)
    made = _table(
        title, ("\nms", "GF\n/s", "\npeak", "\ncopy", *theirs, "\npack", "error\nours", "\ntorch", "MB\nim2c.", "\npack", "\npan.")
    )
    previous = None
    for row in sorted(rows, key=_order(rows)):
        mega = (number(row[name] and row[name] / 1e6) for name in ("im2col_bytes", "packed_bytes", "panel_bytes"))
        packing = None if row["functional_ms"] is None else max(0.0, row["functional_ms"] - row["fastpool_ms"])
        cells = [*_cells(row), *(_ratio(row, peer) for peer in peers), "-" if packing is None else milliseconds(packing)]
        made.add_row("" if row["layer"] == previous else row["layer"], _LAYOUTS[row["layout"]], *cells, *_errors(row), *mega)
        previous = row["layer"]
    return made


def _backward(rows: Sequence[Row], title: str) -> Table:
    of_pass = ("\nms", "GF\n/s", "\npeak", "\ncopy", "torch\nx", "error\nours", "\ntorch")
    made = _table(title, [*_headed("input", of_pass), *_headed("weight", of_pass)])
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in sorted(rows, key=_order(rows)):
        lines.setdefault((row["layer"], row["layout"]), {})[row["pass"]] = row
    previous = None
    for (layer, layout), passes in lines.items():
        cells: list[str] = []
        for row in (passes.get(a_pass) for a_pass in PASSES[1:]):
            cells += [*_cells(row), _ratio(row, "torch"), *_errors(row)] if row else ["-"] * len(of_pass)
        made.add_row("" if layer == previous else layer, _LAYOUTS[layout], *cells)
        previous = layer
    return made


def _headed(name: str, headers: Sequence[str]) -> list[str]:
    return [f"{name}{headers[0]}", *headers[1:]]


def _order(rows: Sequence[Row]) -> Any:
    """Layers as they first come, and of each the layouts: rows come pass by pass."""
    first: dict[str, int] = {}
    for row in rows:
        first.setdefault(row["layer"], len(first))
    return lambda row: (first[row["layer"]], list(LAYOUTS).index(row["layout"]))


def _cells(row: Row) -> list[str]:
    if row["fastpool_ms"] is None:
        return ["[bold red]WRONG", "-", "-", "-"]
    return [milliseconds(row["fastpool_ms"]), number(row["gflop_s"]), share(row["peak"]), share(row["roofline"])]


def _ratio(row: Row, peer: str) -> str:
    ratio = row[f"{peer}_ratio"]
    layout = "l" if peer == "torch" and row["torch_layout"] == "channels_last" else ""
    return f"{number(ratio, 'red' if (ratio or 1) < SLOWER else '')}{layout}"


def _errors(row: Row) -> list[str]:
    return ["-" if (error := row[f"{name}_error"]) is None else f"{error:.0e}" for name in ("fastpool", "torch")]


def reading(rows: Sequence[Row]) -> str:
    """What the tables say, in sentences made from their numbers, one a line."""
    said = wrong(rows, named) + disturbed(rows)
    rows = [row for row in rows if not is_disturbed(row)]
    said += _peaks(rows)
    for peer in peers_of(rows):
        for a_pass in PASSES:
            compared = [row for row in rows if row["pass"] == a_pass and row[f"{peer}_ratio"]]
            if compared:
                said.append(beside(peer, a_pass.replace("_", " "), compared, named))
    for a_pass in PASSES:
        for words, limit, bound in (("FMA peak", "peak", "compute"), ("copy", "roofline", "memory")):
            timed = [row for row in rows if row["pass"] == a_pass and row["bound"] == bound]
            if timed:
                timed.sort(key=lambda row: row[limit])
                middle = statistics.median(row[limit] for row in timed)
                worst = listed([f"{named(row)} ({row[limit]:.0%})" for row in timed[:WORST]])
                head = f"{a_pass.replace('_', ' ').capitalize()}, bound by {bound}"
                said.append(f"{head}: {middle:.0%} of the {words} in the median; furthest from it {worst}.")
    return "\n".join([*said, *_memory(rows)])


def _peaks(rows: Sequence[Row]) -> list[str]:
    """The peaks in a sentence: rows that were kept may be of another run's."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["peak_gflop_s"]:
            found.setdefault(row["threads"], []).append(row["peak_gflop_s"])
    words = [f"{statistics.median(peaks):.0f} GFLOP/s on {threads} thr" for threads, peaks in sorted(found.items())]
    return [f"FMA peak, by a kernel in registers: {'; '.join(words)}."] if words else []


def _memory(rows: Sequence[Row]) -> list[str]:
    """What fastpool takes beside im2col in a sentence."""
    known = [row for row in rows if row["panel_bytes"] is not None]
    if not known:
        return []
    most = max(known, key=lambda row: row["panel_bytes"] / row["threads"])
    panel = f"{most['panel_bytes'] / most['threads'] / 1024:.0f} KB"
    column = max(row["im2col_bytes"] for row in known) / 1e6
    weights = max(row["packed_bytes"] for row in known) / 1e6
    sizes = f"packed weights of at most {number(weights)} MB, where im2col's matrix takes up to {number(column)} MB an image"
    return [f"Memory: at most {panel} of panels a thread ({named(most)}), and {sizes}."]


def named(row: Row) -> str:
    """'VGG-16 64x224x224 to 64, 3x3 p1, batch 8 contiguous, 1 thr'"""
    return f"{row['network']} {row['layer']}, batch {row['batch']} {row['layout']}, {row['threads']} thr"
