"""What CUDA kernels move and execute, counted by executing their PTX, and what that comes to on a GPU by its makers' numbers."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from fastpool.kernels.pool import KINDS
from rich import box
from rich.table import Table

from fastpool import backend
from fastpool.window import Window

from . import ptx

SHAPE, COUNTED = (8, 64, 112, 112), (1, 32, 24, 32)
"""The maps that times are of, and the small ones that are counted: what they take is in proportion to their elements."""
SCALE = math.prod(SHAPE) / math.prod(COUNTED)

WINDOWS = {"2x2 s2": ((2, 2), (2, 2), (0, 0)), "3x3 s2 p1": ((3, 3), (2, 2), (1, 1)), "3x3 s1 p1": ((3, 3), (1, 1), (1, 1)), "global": None}
POOLINGS = "max", "avg", "l2", "stochastic"
FREE = "ld.param", "mov", "cvta", "ret"
"""What becomes an operand, an address or nothing in machine code."""


class Device(NamedTuple):
    """A GPU, by its makers' numbers."""

    name: str
    bandwidth: float
    """Bytes a second."""
    issues: float
    """Warp instructions a second: four of a multiprocessor in each clock."""


DEVICES = (
    Device("T4", 320e9, 40 * 4 * 1.59e9),
    Device("A100", 1555e9, 108 * 4 * 1.41e9),
    Device("H100", 3350e9, 132 * 4 * 1.7e9),
)


@dataclass
class Count:
    """What a launch does."""

    kind: str
    window: str
    layout: str
    run: str
    """forward, or backward"""
    outputs: int
    bytes: int
    """Moved to and from memory, each sector once."""
    redundancy: float
    """Sectors that the cores ask for, over those."""
    instructions: int
    """Of warps, in PTX, but for those that cost nothing."""

    def microseconds(self, device: Device) -> tuple[float, str]:
        """(so many for SHAPE, what takes them): a bound by memory, an estimate by instructions, as machine code merges some of PTX's."""
        memory, issue = self.bytes / device.bandwidth, self.instructions / device.issues
        return max(memory, issue) * 1e6 * SCALE, "memory" if memory >= issue else "instructions"


class Emulator:
    """In the driver's place: executes a kernel's PTX for a compute capability, on tensors of the CPU, and counts."""

    def __init__(self, cc: tuple[int, int]) -> None:
        self.cc, self.memory = cc, ptx.Memory()
        self.launches = list[tuple[Any, ptx.Counters]]()
        """(kernel, counters) of each."""

    def know(self, tensor: torch.Tensor, address: int, initialised: bool = True) -> None:
        """The tensor's memory is the device's, from its first element to its last."""
        extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        memory = (ctypes.c_uint8 * (extent * tensor.element_size())).from_address(address)
        self.memory.add(address, np.ctypeslib.as_array(memory), initialised)

    def launch(self, kernel: Any, blocks: int, threads: int, arguments: Sequence[Any], device: int) -> None:
        found = ptx.execute(_parsed(kernel, self.cc), (blocks,), (threads,), arguments, self.memory)
        self.launches.append((kernel, found))


@functools.cache
def _parsed(kernel: Any, cc: tuple[int, int]) -> ptx.Kernel:
    return ptx.Kernel(kernel.ptx(cc))


def _run(plan: Any, tensors: Sequence[torch.Tensor | None], *more: Any) -> ptx.Counters:
    from fastpool.kernels.cuda import launch

    emulator = Emulator((8, 0))
    for tensor in tensors:
        if tensor is not None:
            emulator.know(tensor, tensor.data_ptr())
    with launch.use(emulator):
        plan.run([0 if t is None else t.data_ptr() for t in tensors], 1, *more)
    ((_, found),) = emulator.launches
    return found


def _count(name: str, window: str, layout: str, run: str, outputs: int, counters: ptx.Counters) -> Count:
    free = sum(count for opcode, count in counters.by_opcode.items() if opcode.startswith(FREE))
    moved = counters.sectors_loaded + counters.sectors_stored
    instructions = counters.warp_instructions - free
    return Count(name, window, layout, run, outputs, moved * ptx.SECTOR, counters.sectors / moved, instructions)


def counts(name: str, window: str, layout: str) -> Iterator[Count]:
    """Of a pooling of float32, forward with what is saved for backward, and backward."""
    from fastpool.kernels.cuda import pooling

    kernels, kind, given = pooling.on(0), KINDS[name], WINDOWS[window]
    if given is None and kind.combine is None:
        return
    w = Window(*given, (1, 1), False) if given else None
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.rand(COUNTED).contiguous(memory_format=memory_format)
    out = (*COUNTED[:2], *(w.output_size(*COUNTED[2:]) if w else (1, 1)))
    taps = w.taps if w else COUNTED[2] * COUNTED[3]
    held = kind.saved_dtype(taps, "float32")
    y = torch.zeros(out).contiguous(memory_format=memory_format)
    saved = torch.zeros(out, dtype=getattr(torch, held)).contiguous(memory_format=memory_format) if held else None
    place = backend.five_axes(tuple(x.shape), x.stride(), 2, layout == "channels_last")
    geometry = kernels.Geometry("float32", *place, w and w.on_three_axes)
    forward = kernels.forward(kind, geometry, held, held is not None)
    yield _count(name, window, layout, "forward", y.numel(), _run(forward, (x, y, saved), 0, 0))
    backward = kernels.backward(kind, geometry, held)
    tensors = torch.empty_like(x), torch.ones_like(y), saved, x, y
    yield _count(name, window, layout, "backward", y.numel(), _run(backward, tensors))


def table(found: Sequence[Count]) -> Table:
    """A row a launch."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("pooling", "window", "lay-\nout", "pass", "bytes\nan output", "sectors\nasked / had", "instructions\nan output"):
        table.add_column(column, no_wrap=True, justify="right" if "output" in column or "had" in column else "left")
    for device in DEVICES:
        table.add_column(f"{device.name}\nus", justify="right", no_wrap=True)
    before = None
    for row in found:
        times = [row.microseconds(device) for device in DEVICES]
        if before is not None and row.kind != before:
            table.add_section()
        cells = [f"{time:.1f} {'m' if limit == 'memory' else 'i'}" for time, limit in times]
        numbers = f"{row.bytes / row.outputs:.1f}", f"{row.redundancy:.1f}", f"{row.instructions / row.outputs:.1f}"
        table.add_row("" if row.kind == before else row.kind, row.window, row.layout[:4], row.run, *numbers, *cells)
        before = row.kind
    return table


def rows(found: Sequence[Count]) -> list[dict[str, Any]]:
    """For machines."""
    return [
        {
            **vars(row),
            "microseconds": {d.name: row.microseconds(d)[0] for d in DEVICES},
            "limit": {d.name: row.microseconds(d)[1] for d in DEVICES},
        }
        for row in found
    ]
