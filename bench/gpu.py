"""Pooling and convolution on a GPU beside PyTorch's there (cuDNN's), by the device's own clock.

Nobody has run this on a GPU so far; tests run it on the CPU, with a clock of theirs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as T
from rich import box
from rich.table import Table

import fastpool.functional as F

from . import check, peers
from .cases import Window
from .cuda_model import CONVOLUTIONS, LAYER, SHAPE
from .libraries import LAYOUTS
from .rows import milliseconds

POOLINGS = ("max", "avg", "l2", "global_max", "global_avg")
WINDOWS = {"2x2 s2": Window(2, 2), "3x3 s2 p1": Window(3, 2, 1), "3x3 s1 p1": Window(3, 1, 1)}
PASSES = ("forward", "training")

SAMPLES = 20
FLUSHED = 256 << 20
"""Bytes written before each sample, which none of a GPU's caches holds."""

ALLOWED = 1e-3
"""Of the largest magnitude: cuDNN may sum products of float32 in another order, and by Winograd's algorithm."""


class Clock(Protocol):
    """Times calls where they run."""

    def __call__(self, call: Callable[[], object]) -> float:
        """Milliseconds of one, the median of several."""

    def launching(self, call: Callable[[], object]) -> float:
        """Microseconds that the caller waits until one is on its way."""


class Events:
    """The GPU's, by its own events, with cold caches."""

    def __init__(self, device: torch.device) -> None:
        self._flushed = torch.empty(FLUSHED, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        call()  # compiles
        found = []
        for _ in range(SAMPLES):
            self._flushed.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end))
        return statistics.median(found)

    def launching(self, call: Callable[[], object]) -> float:
        call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(SAMPLES):
            call()
        seconds = time.perf_counter() - begin
        torch.cuda.synchronize()
        return seconds / SAMPLES * 1e6


class Case(NamedTuple):
    """A row of the benchmark, to be measured."""

    operation: str
    """One of POOLINGS, or conv"""
    what: str
    """One of WINDOWS or of CONVOLUTIONS, or global"""
    layout: str
    run: str


@dataclass
class Row:
    """What was measured of a case."""

    operation: str
    what: str
    layout: str
    run: str
    fastpool_ms: float | None = None
    torch_ms: float | None = None
    copy_ms: float | None = None
    """Of a copy that moves as many bytes as must be moved forward."""
    launch_us: float | None = None
    """The caller's time, of maps so small that nothing else is."""
    torch_launch_us: float | None = None
    error: str | None = None


def cases(operations: Sequence[str], layouts: Sequence[str]) -> list[Case]:
    """All of these operations."""
    found = []
    for operation in operations:
        whats: Sequence[str] = list(WINDOWS)
        if operation == "conv":
            whats = list(CONVOLUTIONS)
        elif operation.startswith("global"):
            whats = ["global"]
        found += [Case(operation, what, layout, run) for what in whats for layout in layouts for run in PASSES]
    return found


def _pair(case: Case, device: torch.device) -> tuple[list[Callable[[torch.Tensor], torch.Tensor]], tuple[int, ...]]:
    """fastpool's function of a map and PyTorch's, and the map's shape."""
    if case.operation != "conv":
        window = WINDOWS.get(case.what, Window(1, 1))
        return [lambda x, pool=of[case.operation]: pool(x, window, None) for of in (peers.FASTPOOL, peers.TORCH)], SHAPE  # type: ignore[misc]
    shape, groups = CONVOLUTIONS[case.what]
    w = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device).requires_grad_()
    return [lambda x, f=f: f(x, w, padding=shape[2] // 2, groups=groups) for f in (F.conv2d, T.conv2d)], LAYER  # type: ignore[misc, attr-defined]


def _call(f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, run: str) -> Callable[[], object]:
    if run == "training":
        leaf = x.detach().requires_grad_()
        gy = torch.ones_like(f(leaf).detach())
        return lambda: f(leaf).backward(gy)

    def forward() -> object:
        with torch.no_grad():
            return f(x)

    return forward


def row(case: Case, device: torch.device, clock: Clock, scale: int = 1) -> Row:
    """``scale``: maps of so much less height and width."""
    found = Row(*case)
    try:
        (ours, theirs), (n, c, *sizes) = _pair(case, device)
        x = torch.randn(n, c, *(size // scale for size in sizes), generator=torch.Generator().manual_seed(1)).to(device)
        memory_format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
        x = x.contiguous(memory_format=memory_format)
        with torch.no_grad():
            y, expected = ours(x), theirs(x)
        if not torch.allclose(y, expected, rtol=ALLOWED, atol=ALLOWED * float(expected.abs().max())):
            raise check.WrongResultError(f"values differ by up to {float((y - expected).abs().max()):.2g}")
        source = torch.ones((x.numel() + y.numel()) // 2, device=device)
        target = torch.empty_like(source)
        found.fastpool_ms, found.torch_ms = (clock(_call(f, x, case.run)) for f in (ours, theirs))
        found.copy_ms = clock(lambda: target.copy_(source))
        small = x[:1, :, :8, :8].contiguous(memory_format=memory_format)
        found.launch_us, found.torch_launch_us = (clock.launching(_call(f, small, case.run)) for f in (ours, theirs))
    except (check.WrongResultError, RuntimeError, NotImplementedError) as error:
        found.error = check.said(error)
    return found


def measured(todo: Sequence[Case], device: torch.device) -> Iterator[Row]:
    """A row a case."""
    clock = Events(device)
    for case in todo:
        yield row(case, device, clock)


def table(found: Sequence[Row]) -> Table:
    """A line a row."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("", "of", "lay-\nout", "pass"):
        table.add_column(name, no_wrap=True)
    for name in ("fastpool\nms", "PyTorch\nms", "times\nas fast", "of a\ncopy", "launch\nus", "PyTorch's\nus"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for row in found:
        if before is not None and row.operation != before:
            table.add_section()
        head = "" if row.operation == before else row.operation, row.what, row.layout[:4], row.run
        before = row.operation
        if row.fastpool_ms is None or row.torch_ms is None or row.copy_ms is None:
            table.add_row(*head, "WRONG")
            continue
        share = f"{row.copy_ms / row.fastpool_ms:.0%}" if row.run == "forward" and row.operation != "conv" else ""
        launches = (f"{us:.1f}" for us in (row.launch_us, row.torch_launch_us) if us is not None)
        table.add_row(
            *head, milliseconds(row.fastpool_ms), milliseconds(row.torch_ms), f"{row.torch_ms / row.fastpool_ms:.2f}x", share, *launches
        )
    return table


def rows(found: Sequence[Row]) -> list[dict[str, Any]]:
    """For machines."""
    return [asdict(row) for row in found]


__all__ = ["LAYOUTS", "Case", "Events", "Row", "cases", "measured", "row", "rows", "table"]
