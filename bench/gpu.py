"""Pooling and convolution on a GPU beside PyTorch's there (cuDNN's), by the device's own clock.

Nobody has run this on a GPU so far; tests run it on the CPU, with a clock of theirs.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

BUSY = 4_000_000
"""Cycles, some 2 ms, for which a GPU waits before what is timed: the caller launches it meanwhile, and is not timed too."""

ALLOWED = 1e-3
"""Of the largest magnitude: cuDNN may sum products of float32 in another order, and by Winograd's algorithm."""


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether torch's products of float32 may be of TF32, with 10 bits: cuDNN's are by default, on Ampere and later."""
    settings: Sequence[Any] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [setting.allow_tf32 for setting in settings]

    def allow(values: Sequence[bool]) -> None:
        with warnings.catch_warnings(action="ignore"):  # later torch has other names for these
            for setting, value in zip(settings, values, strict=True):
                setting.allow_tf32 = value

    allow([allowed] * len(settings))
    try:
        yield
    finally:
        allow(before)


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
            torch.cuda._sleep(BUSY)
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
    torch_tf32_ms: float | None = None
    """Of a convolution, with products of TF32; torch_ms is without, as fastpool's are."""
    moved: int | None = None
    """Bytes that a pass must read and write: the tensors, each once; in training their gradients too."""
    copy_ms: float | None = None
    """Of a copy that moves as many."""
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
        with tf32(False):
            expected = theirs(x)
            _agree(ours(x), expected)
            tensors = x, expected[0], *operations[0].trained
            found.moved = sum(t.numel() * t.element_size() for t in tensors) * (2 if case.run == "training" else 1)
            copied = measure.copying(found.moved, device)
            found.fastpool_ms, found.torch_ms, found.copy_ms = (clock(call) for call in (partial(ours, x), partial(theirs, x), copied))
            small = x[:1, :, :8, :8].contiguous(memory_format=memory_format)
            found.launch_us, found.torch_launch_us = (clock.launching(partial(f, small)) for f in (ours, theirs))
        if case.operation == "conv":
            with tf32(True):
                found.torch_tf32_ms = clock(partial(theirs, x))
    except (check.WrongResultError, ImportError, RuntimeError) as error:
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
    for name in ("fastpool\nms", "PyTorch\nms", "with\nTF32", "times\nas fast", "GB/s", "of a\ncopy", "launch\nus", "PyTorch's\nus"):
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for row in found:
        if before is not None and row.operation != before:
            table.add_section()
        head = "" if row.operation == before else row.operation, row.what, row.layout[:4], row.run
        before = row.operation
        if row.fastpool_ms is None or row.torch_ms is None or row.copy_ms is None or row.moved is None:
            table.add_row(*head, "not timed")
            continue
        times = [milliseconds(ms) if ms is not None else "" for ms in (row.fastpool_ms, row.torch_ms, row.torch_tf32_ms)]
        launches = (f"{us:.1f}" for us in (row.launch_us, row.torch_launch_us) if us is not None)
        table.add_row(
            *head,
            *times,
            f"{row.torch_ms / row.fastpool_ms:.2f}x",
            f"{row.moved / row.fastpool_ms / 1e6:.0f}",
            f"{row.copy_ms / row.fastpool_ms:.0%}",
            *launches,
        )
    return table


def rows(found: Sequence[Row]) -> list[dict[str, Any]]:
    """For machines."""
    return [asdict(row) for row in found]
