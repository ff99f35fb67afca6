"""What CUDA kernels move and execute, counted by executing their PTX, and what that comes to on a GPU by its makers' numbers."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Iterator, Sequence
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
LAYER, COUNTED_LAYER = (8, 64, 56, 56), (1, 64, 16, 16)
"""The same of convolutions."""
CONVOLUTIONS = {"3x3": ((64, 64, 3, 3), 1), "1x1": ((64, 64, 1, 1), 1), "3x3 depthwise": ((64, 1, 3, 3), 64)}
"""Name -> the weights' shape and groups, of stride 1 and a result as large as the map."""

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
    products: float
    """Multiply-adds of float32 a second, of warps."""


DEVICES = (
    Device("T4", 320e9, 40 * 4 * 1.59e9, 40 * 2 * 1.59e9),
    Device("A100", 1555e9, 108 * 4 * 1.41e9, 108 * 2 * 1.41e9),
    Device("H100", 3350e9, 132 * 4 * 1.7e9, 132 * 4 * 1.7e9),
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
    products: int
    """Of those, multiply-adds."""
    scale: float
    """So much larger are the maps that times are of."""

    def microseconds(self, device: Device) -> tuple[float, str]:
        """(so many, what takes them): a bound by memory or products, an estimate by instructions, as machine code merges some of PTX's."""
        times = {
            "memory": self.bytes / device.bandwidth,
            "products": self.products / device.products,
            "instructions": self.instructions / device.issues,
        }
        limit = max(times, key=lambda name: times[name])
        return times[limit] * 1e6 * self.scale, limit


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


def _run(plan: Any, tensors: Sequence[torch.Tensor | None], *more: Any) -> list[ptx.Counters]:
    """What each launch of a pooling's plan does."""
    return _counted(lambda: plan.run([0 if t is None else t.data_ptr() for t in tensors], 1, *more), tensors)


def _by_address(plan: Any, *tensors: torch.Tensor) -> list[ptx.Counters]:
    """What each launch of a convolution's plan does, which needs no panels and no threads."""
    return _counted(lambda: plan.run(*(t.data_ptr() for t in tensors), 0, 1), tensors)


def _counted(call: Callable[[], object], tensors: Sequence[torch.Tensor | None]) -> list[ptx.Counters]:
    from fastpool.kernels.cuda import launch

    emulator = Emulator((8, 0))
    for tensor in tensors:
        if tensor is not None:
            emulator.know(tensor, tensor.data_ptr())
    with launch.use(emulator):
        call()
    return [counters for _, counters in emulator.launches]


def _count(name: str, window: str, layout: str, run: str, outputs: int, launches: Sequence[ptx.Counters], scale: float) -> Count:
    free = products = moved = asked = instructions = 0
    for counters in launches:
        free += sum(count for opcode, count in counters.by_opcode.items() if opcode.startswith(FREE))
        products += sum(count for opcode, count in counters.by_opcode.items() if opcode.startswith("fma"))
        moved += counters.sectors_loaded + counters.sectors_stored
        asked += counters.sectors
        instructions += counters.warp_instructions
    return Count(name, window, layout, run, outputs, moved * ptx.SECTOR, asked / moved, instructions - free, products, scale)


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
    yield _count(name, window, layout, "forward", y.numel(), _run(forward, (x, y, saved), 0, 0), SCALE)
    backward = kernels.backward(kind, geometry, held)
    tensors = torch.empty_like(x), torch.ones_like(y), saved, x, y
    yield _count(name, window, layout, "backward", y.numel(), _run(backward, tensors), SCALE)


def convolution_counts(name: str, layout: str) -> Iterator[Count]:
    """Of a convolution of float32: forward, the gradients by the input and by the weights; without packing, which is of the weights."""
    from fastpool.kernels.cuda import convolution as kernels

    from fastpool import convolution

    (weight, groups), last = CONVOLUTIONS[name], layout == "channels_last"
    x = torch.rand(COUNTED_LAYER).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    w = torch.rand(weight)
    op = convolution.asked("conv2d", 2, 1, weight[2] // 2, 1, groups)
    here = convolution.call(op, x.shape, x.stride(), w.shape, w.stride(), x.dtype, x.device)
    y, gx, gw, device = (
        torch.empty_strided(here.out, here.out_strides).fill_(1),
        torch.empty_like(x),
        torch.empty_like(w),
        kernels.Device(0, 1),
    )
    scale, outputs = math.prod(LAYER) / math.prod(COUNTED_LAYER), y.numel()
    for run, plan, source, result in (
        ("forward", device.forward(here.geometry, None), x, y),
        ("gradient", device.input_gradient(here.geometry), y, gx),
    ):
        packed = torch.zeros(plan.packed)
        yield _count("conv", name, layout, run, outputs, _by_address(plan, source, packed, result), scale)
    plan = device.weight_gradient(here.geometry)
    sums = torch.zeros(plan.sums)
    yield _count("conv", name, layout, "weights", outputs, _by_address(plan, x, y, gw, sums), scale)


def table(found: Sequence[Count]) -> Table:
    """A row a launch."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("", "window", "lay-\nout", "pass", "bytes\nan output", "sectors\nasked / had", "instructions\nan output"):
        table.add_column(column, no_wrap=True, justify="right" if "output" in column or "had" in column else "left")
    for device in DEVICES:
        table.add_column(f"{device.name}\nus", justify="right", no_wrap=True)
    before = None
    for row in found:
        times = [row.microseconds(device) for device in DEVICES]
        if before is not None and row.kind != before:
            table.add_section()
        cells = [f"{time:.1f} {limit[0]}" for time, limit in times]
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
