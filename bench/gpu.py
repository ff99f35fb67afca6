"""Pooling and convolution on a GPU beside PyTorch's there (cuDNN's), by the device's own clock.

Nobody has run this on a GPU so far; tests run it on the CPU, with a clock of theirs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table

import fastpool.functional as fp

from . import check, measure, peers
from .cases import Window
from .cuda_model import CONVOLUTIONS, LAYER, SHAPE
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


class _Operation(NamedTuple):
    """What is measured: a function of a map and of ``trained``, as one package has it."""

    call: Callable[[torch.Tensor], torch.Tensor]
    trained: tuple[torch.Tensor, ...]

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            return (self.call(x),)

    def training(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The result, and gradients by the map and by what is trained."""
        x = x.detach().requires_grad_()
        y = self.call(x)
        return y.detach(), *torch.autograd.grad(y, (x, *self.trained), torch.ones_like(y))


def _pooling(pool: peers.Pool, window: Window) -> _Operation:
    return _Operation(lambda x: pool(x, window, None), ())


def _convolution(convolve: Callable[..., torch.Tensor], w: torch.Tensor, groups: int) -> _Operation:
    return _Operation(lambda x: convolve(x, w, padding=w.shape[2] // 2, groups=groups), (w,))


def _pair(case: Case, device: torch.device) -> tuple[list[_Operation], tuple[int, ...]]:
    """fastpool's and PyTorch's, and the map's shape."""
    if case.operation != "conv":
        window = WINDOWS.get(case.what, Window(1, 1))
        return [_pooling(of[case.operation], window) for of in (peers.FASTPOOL, peers.TORCH)], SHAPE
    shape, groups = CONVOLUTIONS[case.what]
    w = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device).requires_grad_()
    return [_convolution(package.conv2d, w, groups) for package in (fp, F)], LAYER


def _agree(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
    """Raise WrongResultError unless values, and gradients where there are any, are the same up to rounding."""
    for what, found, expected in zip(("values", "gradients by the map", "gradients by the weights"), ours, theirs, strict=False):
        if not torch.allclose(found, expected, rtol=ALLOWED, atol=ALLOWED * float(expected.abs().max())):
            raise check.WrongResultError(f"{what} differ by up to {float((found - expected).abs().max()):.2g}")


def row(case: Case, device: torch.device, clock: Clock, scale: int = 1) -> Row:
    """``scale``: maps of so much less height and width."""
    found = Row(*case)
    try:
        operations, (n, c, *sizes) = _pair(case, device)
        ours, theirs = (getattr(operation, case.run) for operation in operations)
        memory_format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
        x = torch.randn(n, c, *(size // scale for size in sizes), generator=torch.Generator().manual_seed(1)).to(device)
        x = x.contiguous(memory_format=memory_format)
        expected = theirs(x)
        _agree(ours(x), expected)
        copied = measure.copying(4 * (x.numel() + expected[0].numel()), device)
        found.fastpool_ms, found.torch_ms, found.copy_ms = (clock(call) for call in (partial(ours, x), partial(theirs, x), copied))
        small = x[:1, :, :8, :8].contiguous(memory_format=memory_format)
        found.launch_us, found.torch_launch_us = (clock.launching(partial(f, small)) for f in (ours, theirs))
    except (check.WrongResultError, RuntimeError) as error:
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
            table.add_row(*head, "not timed")
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
