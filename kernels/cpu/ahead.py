"""Asking for memory before it is read: the hardware does not see the pattern of rows that neighbouring windows read twice.

Measured on one core (Zen 5), 8x256x56x56 float32, max 3x3 s2 p1: contiguous 4.6 ms without, 1.15 ms with rows asked for 8 KiB ahead
(2 and 4 KiB 1.2, 16 KiB 1.25; at 112 columns 2.8, 2.2, 1.85 at 8 KiB, 1.9); channels_last 2.5 and 1.6 ms (1 KiB 1.8, 4 KiB 1.7).
"""

from ..simd import prefetch, prefetch_to_write
from .blocking import l2_bytes
from .number import jitable

DISTANCE = 8192
LINE = 64

CACHED = 4 * l2_bytes()
"""Bytes up to which what is read may lie in L2, where asking costs more than it brings, a few MB of it for each thread: channels_last avg
2x2 s2 of 64x512x7x7 250 us on one thread, 212 without; of 8x512x14x14 on two 44 and 40 (a Xeon of 2 MB of L2 a core).  Of 1 MB, on one
thread: 8 MB, 32x64x32x32, max 2x2 s1, forward and backward 1.05 ms with and 2.1 without; 3.2 MB the same with as without."""


def distance(dtype):
    """How many elements ahead to ask."""
    return DISTANCE * 8 // dtype.bitwidth


def distance_in(dtype, elements):
    """The same where so many elements are read; 0: not at all."""
    return distance(dtype) if elements * dtype.bitwidth // 8 > CACHED else 0


def asking(dtype, to_write=False):
    """(x, offset, count): ask for the lines of x[offset : offset + count]."""
    step, line = LINE * 8 // dtype.bitwidth, prefetch_to_write if to_write else prefetch

    @jitable
    def ask(x, offset, count):
        for at in range(0, count, step):
            line(x, offset + at)

    return ask
