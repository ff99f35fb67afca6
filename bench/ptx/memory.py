"""Memory of a launch: what was written, who wrote and read it last, and what of it moved."""

import ctypes
from collections import Counter
from typing import NamedTuple

import numpy as np

from .program import PTXError, aligned

SECTOR = 32
"""Bytes that memory moves at a time."""
SHARED, LOCAL = 1 << 60, 1 << 61
"""Where generic addresses of shared and of local memory begin: no host's address is as large."""


class Allocation(NamedTuple):
    address: int
    array: np.ndarray
    written: np.ndarray
    owners: tuple[np.ndarray, ...]
    """Kept, so that the memory stays theirs."""

    @property
    def end(self):
        return self.address + self.array.size

    def joined(self, other):
        """From the first byte of both to the last."""
        begin = min(self.address, other.address)
        size = max(self.end, other.end) - begin
        array = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(begin))
        written = np.zeros(size, bool)
        for part in (other, self):
            written[part.address - begin : part.end - begin] = part.written
        return Allocation(begin, array, written, self.owners + other.owners)


class Memory:
    """Device memory: host arrays at the addresses that they really have."""

    def __init__(self):
        self.allocations = {}

    def add(self, address, array, initialised=True):
        """``array``, uint8, lies at ``address``.

        Inside a known allocation it is a view of it, of which nothing changes. Where one begins that is no larger, it takes its place, and
        that of all that lie inside. One that overlaps others, a view beside views, becomes one allocation with them.
        """
        end = address + array.size
        known = [a for a in self.allocations.values() if a.address < end and address < a.end]
        if any(a.address <= address and end <= a.end and (a.address, a.end) != (address, end) for a in known):
            return
        added = Allocation(address, array, np.full(array.size, initialised), (array,))
        for old in known:
            del self.allocations[old.address]
            if old.address < added.address or added.end < old.end:
                added = added.joined(old)
        self.allocations[added.address] = added


def firsts(numbers):
    """Of numbers in order, which are not as the one before."""
    return np.concatenate(([True], numbers[1:] != numbers[:-1]))


def unique(numbers):
    """numpy's, which goes by hashes and then sorts, takes three times as long for the few thousand of an instruction."""
    found = np.sort(numbers)
    return found[firsts(found)]


class Access(NamedTuple):
    """Of an instruction that reads or writes global memory."""

    kind: str
    bytes: int
    """A lane."""
    requests: int
    lanes: int
    sectors: int


class Counters:
    """What a launch did."""

    def __init__(self, size):
        """``size``: bytes of global memory."""
        self.warp_instructions = 0
        self.by_opcode: Counter[str] = Counter()
        self.accesses: dict[str, Access] = {}
        self.bank_conflicts = 0
        """Rounds of shared memory beyond the first of each request."""
        self._touched = {kind: np.zeros(size // SECTOR + 1, bool) for kind in ("ld", "st")}

    def access(self, text, kind, size, warps, addresses):
        """One more request, of each warp, in their order; addresses count from where global memory begins."""
        sectors = addresses // SECTOR
        self._touched[kind][sectors] = True
        before = self.accesses.get(text, Access(kind, size, 0, 0, 0))
        requests, sectors = int(np.count_nonzero(firsts(warps))), unique(warps * (1 << 40) + sectors).size
        self.accesses[text] = Access(kind, size, before.requests + requests, before.lanes + warps.size, before.sectors + sectors)

    @property
    def sectors(self):
        """Moved between the cores and L2 if L1 held nothing."""
        return sum(access.sectors for access in self.accesses.values())

    @property
    def sectors_loaded(self):
        """Different ones: what memory must deliver."""
        return int(np.count_nonzero(self._touched["ld"]))

    @property
    def sectors_stored(self):
        return int(np.count_nonzero(self._touched["st"]))


NOBODY, SEVERAL = 0, -1


class _Visitors:
    """The thread, counted from 1, that was last at each unit of bytes and is not yet ordered before all others; or that several were, of
    one block or more."""

    def __init__(self, size):
        self.thread, self.block, self.epoch = (np.zeros(size, np.int32) for _ in range(3))

    def unordered(self, at, threads, blocks, epochs):
        """Where another thread was, and no barrier of its block and this one's was since."""
        return self._unordered(self.block[at], at, threads, blocks, epochs)

    def _unordered(self, block, at, threads, blocks, epochs):
        last = self.thread[at]
        others = (last != NOBODY) & (last != threads)
        return others & ((block != blocks) | (self.epoch[at] >= epochs)) if others.any() else others

    def add(self, at, threads, blocks, epochs):
        block = self.block[at]
        alone = ~self._unordered(block, at, threads, blocks, epochs)
        thread = np.where(alone, threads, SEVERAL)
        block = np.where(alone | (block == blocks), blocks, SEVERAL)
        self.thread[at], self.block[at], self.epoch[at] = thread, block, epochs
        # Of threads at one unit the last one's number is there now.
        for held, own in ((self.thread, thread), (self.block, block)):
            held[at[held[at] != own]] = SEVERAL


class Space:
    """A space of memory during a launch, as one array; of each unit of its bytes, whether it was written, and who was there last."""

    def __init__(self, size, unit):
        self.bytes = np.zeros(aligned(size), np.uint8)
        self.written = np.zeros(self.bytes.size // unit, bool)
        self.unit, self._visitors = unit, {}

    def check(self, kind, at, size, threads, blocks, epochs, text):
        """PTXError where bytes are read that nobody wrote, or where another thread was at one of ``size`` bytes since the last barrier,
        and one of the two writes.

        ``kind``: "ld", "st" or "atom".
        """
        units = size // self.unit
        at = at // self.unit
        if units > 1:
            at = np.add.outer(at, np.arange(units)).ravel()
            threads, blocks, epochs = (np.repeat(each, units) for each in (threads, blocks, epochs))
        if kind != "st" and not self.written[at].all():
            raise PTXError(f"memory is read that nobody has written: {text}")
        if kind == "st":  # what an atomic operation changes was written before
            self.written[at] = True
        visit, clash = (at, threads + 1, blocks, epochs), np.zeros(at.size, bool)
        for other in {"ld": ("st",), "st": ("ld", "st", "atom"), "atom": ("st",)}[kind]:
            if other in self._visitors:
                clash |= self._visitors[other].unordered(*visit)
        if kind not in self._visitors:
            self._visitors[kind] = _Visitors(self.written.size)
        visitors = self._visitors[kind]
        visitors.add(*visit)
        if kind == "st":
            clash |= visitors.thread[at] == SEVERAL
        if clash.any():
            raise PTXError(f"race: threads {threads[clash][0]} and another, without a barrier between them: {text}")
