"""What CUDA kernels move and execute, counted where their PTX is executed: memory once, whole sectors, instructions within a budget."""

import re
from typing import NamedTuple

import emulated
import pytest
from fastpool.bench.ptx import SECTOR
from test_cuda_code import CALLS, FACTORIES, LONGER, SHORTER

pytestmark = emulated.needs_toolchain

MOST = 1.25
"""Sectors of any access to global memory, by those that its lanes' bytes fill, or its requests, whichever are more."""


class Moves(NamedTuple):
    """What a launch did when it was last looked at.  Its bytes, of memory that holds what was moved once, are those of its tensors."""

    kernel: str
    reads: str
    """Arguments that are tensors, and a number of bytes more or less."""
    writes: str
    instructions: float
    """Of warps, in PTX, by the elements of the first of ``writes``: a warp's are those of 32 threads."""
    loads: float = 0
    """Where an access has more than MOST: sectors of all loads together, or of all stores, by the least."""
    stores: float = 0
    why: str = ""


APART = "a lane's elements are steps of the width apart, and of a sector each request takes a part"
BINS = "bins begin anywhere, as windows as wide as they are apart do"
INSIDE = "rows begin inside sectors"
POSITIONS = "positions are where the indices say, here every second of every second row"
ACROSS = "weights of an input channel are strided, those of an output channel follow each other"
QUARTER = "a lane's sums follow each other, those of the next lane are 4 further on"
HALF = "of a pixel's channels a lane has 4, the next lane is at the next pixel"
SUMMED = "one lane of a channel writes its sums, those of the next channel are as many further on"
FEW = "of 3 channels a pixel's are 12 bytes, of which two threads read 2 and 1"

COUNTS = {
    "max 3x3 s2, by one": [
        Moves("windows.forward", "x", "y kept", 10.4, loads=2.55, why=APART),
        Moves("windows.backward", "gy kept", "gx", 4.73, loads=1.17, why=APART),
    ],
    "avg 3x3 s2, by one": [
        Moves("windows.forward", "x", "y", 7.34, loads=2.55, why=APART),
        Moves("windows.backward", "gy", "gx", 5.11, loads=1.08, why=APART),
    ],
    "l2 3x3 s2, by one": [
        Moves("windows.forward", "x", "y", 7.43, loads=2.55, why=APART),
        Moves("windows.backward", "gy x y", "gx", 6.96, loads=1.07, why=APART),
    ],
    "stochastic 3x3 s2, by one": [
        Moves("windows.forward", "x", "y kept", 13.9, loads=2.55, why=APART),
        Moves("windows.backward", "gy kept", "gx", 4.73, loads=1.17, why=APART),
    ],
    "max 3x3 s2": [
        Moves("wide.forward", "x", "y kept", 4.02, loads=1.63, why=APART),
        Moves("wide.backward", "gy kept", "gx", 1.6, loads=1.33, why=APART),
    ],
    "avg 3x3 s2": [
        Moves("wide.forward", "x", "y", 3.38, loads=1.63, why=APART),
        Moves("wide.backward", "gy", "gx", 1.8, loads=1.37, why=APART),
    ],
    "l2 3x3 s2": [
        Moves("wide.forward", "x", "y", 3.45, loads=1.63, why=APART),
        Moves("wide.backward", "gy x y", "gx", 2.78, loads=1.25, why=APART),
    ],
    "stochastic 3x3 s2": [
        Moves("wide.forward", "x", "y kept", 9.31, loads=1.63, why=APART),
        Moves("wide.backward", "gy kept", "gx", 1.6, loads=1.33, why=APART),
    ],
    "max 3x3 s2, channels_last": [
        Moves("wide.forward", "x", "y kept", 3.0),
        Moves("wide.backward", "gy kept", "gx", 1.48),
    ],
    "avg 3x3 s2, channels_last": [
        Moves("wide.forward", "x", "y", 1.91),
        Moves("wide.backward", "gy", "gx", 1.44),
    ],
    "stochastic 3x3 s2, channels_last": [
        Moves("wide.forward", "x", "y kept", 9.28),
        Moves("wide.backward", "gy kept", "gx", 1.48),
    ],
    "max 3x3 s2, by one, channels_last": [
        Moves("windows.forward", "x", "y kept", 8.57, loads=1.39, why=INSIDE),
        Moves("windows.backward", "gy kept", "gx", 4.82, loads=1.36, why=INSIDE),
    ],
    "max 2x2 s2": [
        Moves("wide.forward", "x", "y kept", 2.66),
        Moves("wide.backward", "gy kept", "gx", 0.836),
    ],
    "max 2x2 s2, channels_last": [
        Moves("wide.forward", "x", "y kept", 1.8),
        Moves("wide.backward", "gy kept", "gx", 0.867),
    ],
    "max 3x3 s1": [
        Moves("wide.forward", "x", "y kept", 2.88, loads=2.05, why=APART),
        Moves("wide.backward", "gy kept", "gx", 3.39, loads=2.03, why=APART),
    ],
    "max 3x3 s1, channels_last": [
        Moves("wide.forward", "x", "y kept", 2.98),
        Moves("wide.backward", "gy kept", "gx", 2.83),
    ],
    "avg 9x9 s1": [
        Moves("windows.forward", "x", "y", 27.1, loads=1.16, why=APART),
        Moves("windows.backward", "gy", "gx", 65.9, loads=1.16, why=APART),
    ],
    "max over bins": [
        Moves("windows.forward", "x", "y kept", 9.88, loads=2.4, why=BINS),
        Moves("windows.backward", "gy kept", "gx", 7.13, loads=0.98, why=BINS),
    ],
    "avg over bins": [
        Moves("windows.forward", "x", "y", 9.0, loads=2.4, why=BINS),
        Moves("windows.backward", "gy", "gx", 10.2, loads=1.35, why=BINS),
    ],
    "max 3x3 s2 of silu": [
        Moves("wide.forward", "x", "y kept", 5.64, loads=1.63, why=APART),
        Moves("elementwise.value", "x", "y", 0.807),
        Moves("elementwise.gradient", "gy x", "gx", 0.966),
        Moves("wide.backward", "gy kept", "gx", 1.6, loads=1.33, why=APART),
    ],
    "avg 3x3 s2 of relu": [
        Moves("wide.forward", "x", "y", 3.84, loads=1.63, why=APART),
        Moves("wide.backward", "gy x", "gx", 2.14, loads=1.19, why=APART),
    ],
    "positions of max 3x3 s2": [
        Moves("wide.forward", "x", "y kept", 4.02, loads=1.63, why=APART),
        Moves("windows.flat_positions", "kept", "flat", 2.56),
    ],
    "max of maps": [
        Moves("whole_map.forward", "x", "y kept", 1370.0),
        Moves("whole_map.backward", "gy kept", "gx", 1.69),
    ],
    "avg of maps": [
        Moves("whole_map.forward", "x", "y", 906.0),
        Moves("whole_map.backward", "gy", "gx", 1.28),
    ],
    "max of small maps": [
        Moves("whole_map.forward", "x", "y kept", 186.0),
        Moves("whole_map.backward", "gy kept", "gx", 1.66),
    ],
    "avg of small maps": [
        Moves("whole_map.forward", "x", "y", 97.0),
        Moves("whole_map.backward", "gy", "gx", 1.28),
    ],
    "l2 of small maps": [
        Moves("whole_map.forward", "x", "y", 99.0),
        Moves("whole_map.backward", "gy x y", "gx", 2.75),
    ],
    "avg of 7x7": [
        Moves("whole_map.forward", "x", "y", 97.0, loads=1.29, why=INSIDE),
        Moves("whole_map.backward", "gy", "gx", 1.36),
    ],
    "max of maps, channels_last": [
        Moves("whole_map.forward", "x", "y kept", 42.1),
        Moves("whole_map.backward", "gy kept", "gx", 1.98),
    ],
    "avg of maps, channels_last": [
        Moves("whole_map.forward", "x", "y", 28.1),
        Moves("whole_map.backward", "gy", "gx", 1.64),
    ],
    "unpool": [
        Moves("unpool.scatter", "x indices", "y -8192", 0.305, stores=2.0, why=POSITIONS),
        Moves("unpool.gather", "indices gy -8192", "gx", 0.969, loads=2.0, why=POSITIONS),
    ],
    "unpool, channels_last": [
        Moves("unpool.scatter", "x indices", "y -24576", 0.398),
        Moves("unpool.gather", "indices gy -24576", "gx", 1.34, loads=1.5, why=POSITIONS),
    ],
    "relu": [
        Moves("elementwise.value", "x", "y", 0.203),
        Moves("elementwise.gradient", "gy x", "gx", 0.266),
    ],
    "relu, by one": [
        Moves("elementwise.value", "x", "y", 0.637),
        Moves("elementwise.gradient", "gy x", "gx", 0.799),
    ],
    "conv wide, contiguous": [
        Moves("correlate.pack", "w biases", "packed", 3.0, loads=7.96, why=ACROSS),
        Moves("correlate.forward", "x packed", "y", 7.61),
        Moves("correlate.pack", "w", "packed", 2.94, loads=8.0, why=ACROSS),
        Moves("correlate.forward", "x packed", "y", 145.0),
        Moves("weight_gradient.partial", "x gy", "sums", 19.1, loads=1.11, stores=4.0, why=QUARTER),
        Moves("weight_gradient.ordered", "sums", "gw", 2.56, stores=4.89, why=ACROSS),
    ],
    "conv square, contiguous": [
        Moves("correlate.pack", "w biases", "packed", 3.04, loads=7.9, why=ACROSS),
        Moves("correlate.forward", "x packed", "y", 3.76),
        Moves("correlate.pack", "w", "packed", 2.97),
        Moves("correlate.forward", "x packed", "y", 3.76),
        Moves("weight_gradient.partial", "x gy", "sums", 8.14, stores=4.0, why=QUARTER),
        Moves("weight_gradient.ordered", "sums", "gw", 2.56),
    ],
    "conv narrow, contiguous": [
        Moves("correlate.pack", "w biases", "packed", 3.21, loads=7.79, why=ACROSS),
        Moves("correlate.forward", "x packed", "y", 3.01),
    ],
    "conv small, contiguous": [
        Moves("correlate.pack", "w biases", "packed", 3.21, loads=7.79, why=ACROSS),
        Moves("correlate.forward", "x packed", "y", 3.04),
        Moves("correlate.pack", "w", "packed", 3.14),
        Moves("correlate.forward", "x packed", "y", 3.04),
        Moves("weight_gradient.partial", "x gy", "sums", 19.9, stores=4.0, why=QUARTER),
        Moves("weight_gradient.ordered", "sums", "gw", 2.56),
    ],
    "conv divided, contiguous": [
        Moves("correlate.pack", "w biases", "packed", 3.01, loads=7.99, why=ACROSS),
        Moves("correlate.forward", "x packed -128", "y", 10.0),
        Moves("correlate.summed", "sums 128", "y", 4.16),
        Moves("correlate.pack", "w", "packed", 2.95, loads=8.0, why=ACROSS),
        Moves("correlate.forward", "x packed -256", "y", 10.1),
        Moves("correlate.summed", "sums 256", "y", 3.53),
        Moves("weight_gradient.partial", "x gy", "sums", 19.8, loads=1.19, stores=4.0, why=QUARTER),
        Moves("weight_gradient.ordered", "sums", "gw", 2.56, stores=8.0, why=ACROSS),
    ],
    "conv wide, channels_last": [
        Moves("correlate.pack", "w biases", "packed", 3.0, loads=7.96, why=ACROSS),
        Moves("correlate.forward", "x packed", "y", 7.13),
        Moves("correlate.pack", "w", "packed", 2.94, loads=8.0, why=ACROSS),
        Moves("correlate.forward", "x packed", "y", 124.0, stores=2.0, why=HALF),
        Moves("weight_gradient.partial", "x gy", "sums", 19.1, stores=4.0, why=QUARTER),
        Moves("weight_gradient.ordered", "sums", "gw", 2.56, stores=4.89, why=ACROSS),
    ],
    "conv square, channels_last": [
        Moves("correlate.pack", "w biases", "packed", 3.04, loads=7.9, why=ACROSS),
        Moves("correlate.forward", "x packed", "y", 3.56),
        Moves("correlate.pack", "w", "packed", 2.97),
        Moves("correlate.forward", "x packed", "y", 3.56),
        Moves("weight_gradient.partial", "x gy", "sums", 8.14, stores=4.0, why=QUARTER),
        Moves("weight_gradient.ordered", "sums", "gw", 2.56),
    ],
    "conv narrow, channels_last": [
        Moves("correlate.pack", "w biases", "packed", 3.21, loads=7.79, why=ACROSS),
        Moves("correlate.forward", "x packed", "y", 2.61, stores=2.0, why=HALF),
    ],
    "conv small, channels_last": [
        Moves("correlate.pack", "w biases", "packed", 3.21, loads=7.79, why=ACROSS),
        Moves("correlate.forward", "x packed", "y", 2.62),
        Moves("correlate.pack", "w", "packed", 3.14),
        Moves("correlate.forward", "x packed", "y", 2.62),
        Moves("weight_gradient.partial", "x gy", "sums", 19.9, stores=4.0, why=QUARTER),
        Moves("weight_gradient.ordered", "sums", "gw", 2.56),
    ],
    "conv divided, channels_last": [
        Moves("correlate.pack", "w biases", "packed", 3.01, loads=7.99, why=ACROSS),
        Moves("correlate.forward", "x packed -128", "y", 8.57),
        Moves("correlate.summed", "sums 128", "y", 4.16),
        Moves("correlate.pack", "w", "packed", 2.95, loads=8.0, why=ACROSS),
        Moves("correlate.forward", "x packed -256", "y", 8.61),
        Moves("correlate.summed", "sums 256", "y", 3.53),
        Moves("weight_gradient.partial", "x gy", "sums", 19.8, stores=4.0, why=QUARTER),
        Moves("weight_gradient.ordered", "sums", "gw", 2.56, stores=8.0, why=ACROSS),
    ],
    "depthwise, contiguous": [
        Moves("correlate.pack", "w biases", "packed", 3.58, loads=7.3, why=ACROSS),
        Moves("depthwise.forward", "x packed", "y", 8.28),
        Moves("correlate.pack", "w", "packed", 3.48, loads=8.0, why=ACROSS),
        Moves("depthwise.forward", "x packed", "y", 8.28),
        Moves("depthwise.weights", "x gy", "sums", 467.0),
        Moves("weight_gradient.ordered", "sums", "gw", 3.24),
    ],
    "depthwise, channels_last": [
        Moves("correlate.pack", "w biases", "packed", 3.58, loads=7.3, why=ACROSS),
        Moves("depthwise.forward", "x packed", "y", 7.79),
        Moves("correlate.pack", "w", "packed", 3.48, loads=8.0, why=ACROSS),
        Moves("depthwise.forward", "x packed", "y", 7.79),
        Moves("depthwise.weights", "x gy", "sums", 150.0, stores=8.0, why=SUMMED),
        Moves("weight_gradient.ordered", "sums", "gw", 3.24),
    ],
    "conv of few, contiguous": [
        Moves("correlate.pack", "w biases", "packed", 2.86, loads=7.75, why=ACROSS),
        Moves("correlate.forward", "x packed", "y", 2.68),
    ],
    "conv of few, channels_last": [
        Moves("correlate.pack", "w biases", "packed", 2.86, loads=7.75, why=ACROSS),
        Moves("correlate.forward", "x packed", "y", 2.71, loads=1.39, why=FEW),
    ],
    "conv of few to few": [
        Moves("correlate.pack", "w biases", "packed", 2.86, loads=7.75, why=ACROSS),
        Moves("correlate.forward", "x packed", "y", 2.86),
    ],
    "conv and max, contiguous": [
        Moves("correlate.pack", "w", "packed", 3.03, loads=8.0, why=ACROSS),
        Moves("correlate.forward", "x packed", "y", 22.8),
    ],
    "conv and max, channels_last": [
        Moves("correlate.pack", "w", "packed", 3.03, loads=8.0, why=ACROSS),
        Moves("correlate.forward", "x packed", "y", 20.6),
    ],
}


class Counting(emulated.Emulator):
    """One that keeps what it launched with."""

    def __init__(self):
        super().__init__((8, 0))
        self.found = []
        """(kernel, counters, name -> tensor of each argument that is one's address) of each launch."""

    def launch(self, kernel, blocks, threads, arguments, device):
        super().launch(kernel, blocks, threads, arguments, device)
        given = zip(kernel.made[0].__code__.co_varnames, arguments, strict=False)
        tensors = {name: self._known[value][1] for name, value in given if value in self._known}
        self.found.append((*self.launches[-1], tensors))


def expected(names, tensors):
    """Bytes of whole sectors: of tensors by their names, and so many more or less."""
    sizes = [int(name) if name not in tensors else tensors[name].numel() * tensors[name].element_size() for name in names.split()]
    return sum(-(-size // SECTOR) * SECTOR for size in sizes)


def complaints(row, counters, tensors):
    """What is wrong with a launch."""
    wrong = []
    if counters.sectors_loaded * SECTOR != expected(row.reads, tensors):
        wrong.append("bytes loaded")
    if counters.sectors_stored * SECTOR != expected(row.writes, tensors):
        wrong.append("bytes stored")
    for kind, most in (("ld", row.loads), ("st", row.stores)):
        of_kind = [access for access in counters.accesses.values() if access.kind == kind]
        least = [max(access.requests, access.lanes * access.bytes / SECTOR) for access in of_kind]
        if all(access.sectors <= MOST * fewest for access, fewest in zip(of_kind, least, strict=True)) == bool(most):
            wrong.append(f"an access of {kind}")  # or none, which is no exemption then
        if most and sum(access.sectors for access in of_kind) > most * sum(least):
            wrong.append(f"accesses of {kind}")
    wrong += ["bank conflicts"] if counters.bank_conflicts else []
    instructions = row.instructions * tensors[row.writes.split()[0]].numel()
    wrong += [] if SHORTER * instructions <= counters.warp_instructions <= LONGER * instructions else ["instructions"]
    return wrong


@pytest.mark.parametrize("call", COUNTS)
def test_counters(call):
    """Memory moves what must be moved and nothing twice; no lane's sector is asked for in vain; the convolution has no bank conflicts."""
    with emulated.device(emulator=Counting()) as emulator:
        CALLS[call]()
    assert [kernel.name for kernel, _, _ in emulator.found] == [row.kernel for row in COUNTS[call]]
    for row, (_, counters, tensors) in zip(COUNTS[call], emulator.found, strict=True):
        assert not complaints(row, counters, tensors), (row, counters.warp_instructions)
        assert bool(row.why) == bool(row.loads or row.stores)
    weights = None
    for kernel, counters, tensors in emulator.found:
        weights, y = tensors.get("w", weights), tensors.get("y")
        if kernel.name == "correlate.forward" and re.match("conv (wide|square|narrow|small)", call) and y.shape[1] % 32 == 0:
            # Tiles without a rest: no product is made but the convolution's.
            products = sum(count for opcode, count in counters.by_opcode.items() if opcode.startswith("fma"))
            assert 32 * products == y.numel() // y.shape[1] * weights.numel()


def test_every_kernel_is_counted():
    assert {row.kernel for rows in COUNTS.values() for row in rows} == set(FACTORIES)
