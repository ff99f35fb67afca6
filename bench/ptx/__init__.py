"""Executes PTX, the very text that reaches a GPU's driver, on numpy: every thread of a launch in lock step.

The threads with the smallest program counter go first, a basic block at a time, so that they always meet again after a branch.  On the way
it refuses what a GPU would let pass or not: access misaligned or outside the allocations that the arguments are in, memory read before it
was written, two threads at one byte without a barrier between them, a barrier that not all reach.  It counts warp instructions, 32-byte
sectors and bank conflicts.

A barrier orders a block's threads, nothing orders blocks; an atomic is in no race with another, or with a read (a loop of compare and swap
begins with one).  Not modelled: weak ordering of memory, barriers of a warp or of some threads, spin locks, textures, tensor cores, time,
NaNs' bits.  ex2, lg2, sin and cos are numpy's, and what PTX calls approximate is rounded to nearest; fma of float64 is of long double.
"""

from . import arithmetic, moves  # noqa: F401 - they register what executes each opcode
from .launch import execute
from .memory import SECTOR, Counters, Memory
from .program import TYPES, Kernel, PTXError

__all__ = ["SECTOR", "TYPES", "Counters", "Kernel", "Memory", "PTXError", "execute"]
