"""Executes PTX, the very text that reaches a GPU's driver, on numpy: every thread of a launch in lock step.

The threads with the smallest program counter go first, a basic block at a time, so that they always meet again after a branch.  On the way
it refuses what a GPU would let pass or not: access misaligned or outside the allocations that the arguments are in, memory read before it
was written, two threads at one byte without a barrier between them, a barrier that not all reach.  It counts warp instructions, 32-byte
sectors and bank conflicts.

A barrier orders a block's threads, nothing orders blocks; an atomic is in no race with another, or with a read (a loop of compare and swap
begins with one).  Not modelled: weak ordering of memory, barriers of a warp or of some threads, spin locks, textures, tensor cores, time,
NaNs' bits.  ex2, lg2, sin and cos are numpy's, and what PTX calls approximate is rounded to nearest; fma of float64 is of long double.
"""

import ctypes
import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

WARP, SECTOR, BANKS, WORDS = 32, 32, 32, 1 << 20
ALIGNED = 16
"""Bytes: no access is wider."""
TINY = float(np.finfo(np.float32).tiny)
"""The least float32 that is not subnormal."""
GRID = 2**31 - 1, 65535, 65535
SHARED, LOCAL = 1 << 60, 1 << 61
"""Where generic addresses of shared and of local memory begin: no host's address is as large."""

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES = {f"{letter}{8 * size}": np.dtype(f"{kind}{size}") for letter, kind in (("b", "u"), ("u", "u"), ("s", "i")) for size in UNSIGNED} | {
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "pred": np.dtype(bool),
}


class PTXError(Exception):
    """What a program may not do, or this executor cannot."""


@dataclasses.dataclass
class Instruction:
    """One line of a program; what its every execution asks is found at its first."""

    predicate: str | None
    """With a "!" in front, where it must be false."""
    opcode: tuple[str, ...]
    """Its parts: ("ld", "global", "f32")."""
    operands: tuple[str, ...]
    text: str
    name: str
    """The opcode as it is written: "ld.global.f32"."""

    @functools.cached_property
    def type(self):
        """The last part's dtype, which most go by."""
        return self.type_of(self.opcode[-1])

    @functools.cached_property
    def width(self):
        """Numbers of a load or a store."""
        return next((int(part[1]) for part in self.opcode if part in ("v2", "v4")), 1)

    @functools.cached_property
    def space(self):
        """Of memory; None: any, by the address."""
        found = next((part for part in self.opcode if part in ("global", "shared", "local", "const")), None)
        return "global" if found == "const" else found

    @functools.cached_property
    def towards(self):
        """Where it rounds to; None: to the nearest."""
        return next((TOWARDS[part] for part in self.opcode if part in TOWARDS), None)

    @functools.cached_property
    def flushes(self):
        return "ftz" in self.opcode

    @functools.cached_property
    def saturates(self):
        return "sat" in self.opcode

    @functools.cached_property
    def handler(self):
        """What executes it."""
        if self.opcode[0] not in OPERATIONS or not ABSENT.isdisjoint(self.opcode):
            raise PTXError(f"no such operation here: {self.text}")
        return OPERATIONS[self.opcode[0]]

    def type_of(self, part):
        if part not in TYPES:
            raise PTXError(f"no such type here: {self.text}")
        return TYPES[part]


def _split(text):
    """Operands, which are parted by commas outside braces and brackets."""
    return tuple(part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if part.strip())


@functools.cache
def _immediate(text, dtype):
    """A number written in an instruction, as bits of ``dtype`` if it is whole."""
    bits = re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", text)
    if bits:
        return np.array([int(bits[1], 16)], np.uint32).view("f4") if bits[1] else np.array([int(bits[2], 16)], np.uint64).view("f8")
    try:
        value = int(text.rstrip("U"), 0)
    except ValueError:
        raise PTXError(f"no such operand here: {text}") from None
    if dtype.kind == "b":
        return np.array([bool(value)])
    return np.array([value & ((1 << 8 * dtype.itemsize) - 1)], np.uint64).astype(UNSIGNED[dtype.itemsize])


class Program:
    """The instructions between two braces."""

    def __init__(self, body):
        self.registers, self.instructions, self.labels = {}, [], {}
        self._scopes, self._opened = [{}], 0
        # Where a line is from is no statement: it has no semicolon.
        for line in re.sub(r"^\s*\.(?:loc|file)\b[^\n]*", "", body, flags=re.MULTILINE).split(";"):
            self._add(" ".join(line.split()))
        self.targets = frozenset(self.labels.values())
        accesses = [i for i in self.instructions if i.opcode[0] in ("ld", "ldu", "st", "atom", "red") and "param" not in i.opcode]
        self.smallest = min((i.type.itemsize for i in accesses), default=8)
        """Bytes that no access parts, as each is aligned."""

    def _add(self, line):
        while begins := re.match(r"([{}]|([$\w]+):)\s*", line):
            line = line[begins.end() :]
            if begins[1] == "{":
                self._scopes.append({})
                self._opened += 1
            elif begins[1] == "}":
                self._scopes.pop()
            elif begins[2] in self.labels:
                raise PTXError(f"a label twice: {begins[2]}")
            else:
                self.labels[begins[2]] = len(self.instructions)
        if declared := re.match(r"\.reg\s+\.(\w+)\s+(.*)", line):
            self._declare(*declared.groups())
        elif line and not line.startswith("."):
            found = re.match(r"(?:@(!?)(%?[\w$]+)\s+)?([\w.:]+)\s*(.*)$", line)
            if found is None:
                raise PTXError(f"no instruction: {line}")
            negated, predicate, opcode, operands = found.groups()
            predicate = predicate and negated + self._seen(predicate)
            self.instructions.append(Instruction(predicate, tuple(opcode.split(".")), _split(self._seen(operands)), line, opcode))

    def _declare(self, kind, names):
        if kind not in TYPES:
            raise PTXError(f"registers of a type that is not here: {kind}")
        kind = TYPES[kind] if TYPES[kind].kind == "b" else np.dtype(UNSIGNED[TYPES[kind].itemsize])
        for name, count in re.findall(r"(%?[\w$]+)(?:<(\d+)>)?", names):
            for register in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                # What inline assembly declares between braces hides what has the same name outside.
                own = register if len(self._scopes) == 1 else f"{register}@{self._opened}"
                self._scopes[-1][register] = own
                self.registers[own] = kind

    def _seen(self, operands):
        """With each register's own name, where scopes inside others declare any."""
        if not any(self._scopes[1:]):
            return operands
        names = {name: own for scope in self._scopes for name, own in scope.items()}
        return re.sub(r"%?[\w$]+", lambda found: names.get(found[0], found[0]), operands)


class Function:
    """A device function that is called."""

    def __init__(self, result, parameters, body):
        self.result, self.parameters = (re.findall(r"([\w$]+)\s*(?:,|$)", names) for names in (result, parameters))
        self.program = Program(body)


class Kernel:
    """A parsed entry of a PTX text: the first, or the one whose name holds ``entry``."""

    def __init__(self, text, entry=None):
        text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
        entries = re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*(?:\.\w+[^\n{]*\s*)*\{", text, re.DOTALL)
        found = next((m for m in entries if entry is None or entry in m[1]), None)
        if found is None:
            raise PTXError(f"no kernel {entry or ''}")
        self.name = found[1]
        self.parameters = [self._parameter(p) for p in found[2].split(",") if p.strip()]
        body, outside = self._body(text, found.end()), text[: found.start()]
        self.functions = {}
        for m in re.finditer(r"\.func\s+(?:\(([^)]*)\)\s*)?([\w$]+)\s*\(([^)]*)\)\s*(?:\.\w+[^\n{;]*\s*)*\{", text):
            self.functions[m[2]] = Function(m[1] or "", m[3], self._body(text, m.end()))
        declared = r"\.(?:global|const)\s+\.align\s+\d+\s+\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?(?:\s*=\s*\{?([^;}]*)\}?)?\s*;"
        self.constants = {name: self._initial(kind, size, values) for kind, name, size, values in re.findall(declared, outside)}
        self.shared, self.shared_bytes = self._placed("shared", text)
        self.local, self.local_bytes = self._placed("local", body)
        self.program = Program(body)

    @staticmethod
    def _parameter(text):
        found = re.fullmatch(r"\s*\.param\b.*?\.([busf]\d+)\b.*?([\w$]+)\s*", text, re.DOTALL)
        if found is None:
            raise PTXError(f"a parameter that is more than a number: {text.strip()}")
        return found[1], found[2]

    @staticmethod
    def _initial(kind, size, values):
        """A variable's numbers, 0 where none is given."""
        array = np.zeros(int(size or 1), TYPES[kind])
        for i, value in enumerate(v for v in re.split(r"[\s,]+", values.strip()) if v):
            array[i : i + 1] = _immediate(value, array.dtype).view(array.dtype)
        return array

    @staticmethod
    def _body(text, begin):
        depth, end = 1, begin
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        return text[begin : end - 1]

    @staticmethod
    def _placed(space, text):
        """(name -> offset of each array of a space, bytes in all); one without a size is the launch's, and comes last."""
        places, top = {}, 0
        declared = re.findall(rf"\.{space}\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)\[(\d*)\]", text)
        for align, kind, name, size in sorted(declared, key=lambda found: not found[3]):
            places[name] = -(-top // int(align)) * int(align)
            top = places[name] + int(size or 0) * TYPES[kind].itemsize
        return places, -(-top // 16) * 16


class _Allocation(NamedTuple):
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
        return _Allocation(begin, array, written, self.owners + other.owners)


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
        added = _Allocation(address, array, np.full(array.size, initialised), (array,))
        for old in known:
            del self.allocations[old.address]
            if old.address < added.address or added.end < old.end:
                added = added.joined(old)
        self.allocations[added.address] = added


def _firsts(numbers):
    """Of numbers in order, which are not as the one before."""
    return np.concatenate(([True], numbers[1:] != numbers[:-1]))


def _unique(numbers):
    """numpy's, which goes by hashes and then sorts, takes three times as long for the few thousand of an instruction."""
    found = np.sort(numbers)
    return found[_firsts(found)]


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
        requests, sectors = int(np.count_nonzero(_firsts(warps))), _unique(warps * (1 << 40) + sectors).size
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


class _Space:
    """A space of memory during a launch, as one array; of each unit of its bytes, whether it was written, and who was there last."""

    def __init__(self, size, unit):
        self.bytes = np.zeros(-(-size // ALIGNED) * ALIGNED, np.uint8)
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


def _block(shape):
    return (*shape, 1, 1)[:3]


def execute(kernel, grid, block, arguments, memory, dynamic_shared=0):
    """Run it, and return its ``Counters``; results are in the arrays of ``memory``.

    ``arguments``: ints for addresses, ints, floats or numpy scalars for the rest.
    """
    if len(arguments) != len(kernel.parameters):
        raise PTXError(f"{kernel.name} takes {len(kernel.parameters)} arguments, got {len(arguments)}")
    if not 1 <= np.prod(block) <= 1024 or not all(1 <= size <= most for size, most in zip(_block(grid), GRID, strict=True)):
        raise PTXError(f"no GPU has such a launch: {grid} blocks of {block}")
    launch = _Launch(kernel, _block(grid), _block(block), arguments, memory, dynamic_shared)
    with np.errstate(all="ignore"):
        launch.run()
    launch.write_back()
    return launch.counters


def _argument(kind, value):
    """As a parameter's type, or as its bits where that is b32 or b64 and the value is a float."""
    dtype, value = TYPES[kind], np.array([value])
    if value.dtype.kind == "f" and dtype.kind != "f":
        value = value.astype(f"f{dtype.itemsize}").view(dtype)
    return value.astype(dtype)


class _Launch:
    def __init__(self, kernel, grid, block, arguments, memory, dynamic_shared):
        self.kernel, self.program = kernel, kernel.program
        self.parameters = {name: _argument(kind, value) for (kind, name), value in zip(kernel.parameters, arguments, strict=True)}
        threads = block[0] * block[1] * block[2]
        blocks = grid[0] * grid[1] * grid[2]
        self.count = threads * blocks
        number = np.arange(self.count)
        self.block, thread = number // threads, number % threads
        self.lane, self.blocks = thread % WARP, blocks
        self.warp = self.block * -(-threads // WARP) + thread // WARP
        self.warp_begin = self.block * threads + thread // WARP * WARP
        places = {"tid": (thread, block), "ctaid": (self.block, grid)}
        self.special = {
            f"%{name}.{axis}": value // int(np.prod(sizes[:i])) % sizes[i]
            for name, (value, sizes) in places.items()
            for i, axis in enumerate("xyz")
        }
        self.special |= {
            f"%{name}.{axis}": np.full(self.count, size)
            for name, sizes in (("ntid", block), ("nctaid", grid))
            for axis, size in zip("xyz", sizes, strict=True)
        }
        self.special |= {"%laneid": self.lane, "%warpid": thread // WARP, "WARP_SZ": np.full(self.count, WARP)}
        self.special["%dynamic_smem_size"] = np.full(self.count, dynamic_shared)
        masks = {"eq": (1, 0), "lt": (1, -1), "le": (2, -1), "gt": (-2, 0), "ge": (-1, 0)}
        self.special |= {f"%lanemask_{name}": (factor << self.lane) + more for name, (factor, more) in masks.items()}
        self.special = {name: value.astype(np.uint32) for name, value in self.special.items()}
        self.registers = {}
        self.unit = min(program.smallest for program in (kernel.program, *(f.program for f in kernel.functions.values())))
        self._lay_out(memory, arguments)
        self.counters = Counters(self.global_memory.bytes.size)
        self.shared_size = kernel.shared_bytes + dynamic_shared
        self.spaces = {
            "global": self.global_memory,
            "shared": _Space(blocks * -(-self.shared_size // ALIGNED) * ALIGNED, self.unit),
            "local": _Space(self.count * kernel.local_bytes, self.unit),
        }
        self.epoch = np.zeros(blocks, np.int64)
        self.pc, self.waits = np.zeros(self.count, np.int64), np.zeros(self.count, bool)
        self.lanes = self.at = None

    def _lay_out(self, memory, arguments):
        """The allocations that the arguments are in, one behind the other, with guards between, and constants of the program."""
        held = [memory.allocations[address] for address in sorted(memory.allocations)]
        held = [a for a in held if any(a.address <= argument < a.end for argument in arguments)]
        self.names = {}
        for i, (name, values) in enumerate(self.kernel.constants.items()):
            self.names[name] = (1 << 59) + (i << 32)
            held.append(_Allocation(self.names[name], values.view(np.uint8).copy(), np.ones(values.nbytes, bool), ()))
        self.held = held
        self.starts = np.array([a.address for a in held], np.int64)
        self.sizes = np.array([a.array.size for a in held], np.int64)
        # As on a device, where what is no view begins a sector; what is one keeps its alignment.
        room = (self.sizes + 2 * SECTOR - 1 + ALIGNED) // SECTOR * SECTOR
        self.places = (np.cumsum(room) - room + self.starts % ALIGNED).astype(np.int64)
        self.global_memory = space = _Space(int(room.sum()), self.unit)
        written = np.zeros(space.bytes.size, np.uint8)
        for a, place in zip(held, self.places, strict=True):
            space.bytes[place : place + a.array.size] = a.array
            written[place : place + a.array.size] = a.written
        whole = np.ones(self.unit, np.uint8).view(UNSIGNED[self.unit])
        space.written[:] = written.view(whole.dtype) == whole

    def write_back(self):
        written = self.global_memory.written.repeat(self.unit)
        for a, place in zip(self.held, self.places, strict=True):
            a.array[:] = self.global_memory.bytes[place : place + a.array.size]
            a.written[:] |= written[place : place + a.array.size]

    # Operands

    def read(self, name, dtype):
        """An operand's numbers of the threads that run; one for all, if it is a constant."""
        dtype = TYPES[dtype] if isinstance(dtype, str) else dtype
        held = self.registers.get(name)
        if held is not None:
            value = held[self.at]
        elif name in self.program.registers:
            value = self._register(name)[self.at]
        elif name in self.special:
            value = self.special[name][self.at]
        else:
            value = self._constant(name, dtype)
        if value.dtype == dtype or value.dtype == bool:
            return value
        unsigned = np.dtype(UNSIGNED[dtype.itemsize]) if dtype.kind != "b" else dtype
        return value.astype(unsigned).view(dtype) if value.itemsize != dtype.itemsize else value.view(dtype)

    def _register(self, name):
        if name not in self.registers:
            self.registers[name] = np.zeros(self.count, self.program.registers[name])
        return self.registers[name]

    def _constant(self, name, dtype):
        for places in (self.kernel.shared, self.kernel.local, self.names):
            if name in places:  # an address in its own space: ``cvta`` makes it generic
                return np.array([places[name]], np.uint64)
        return _immediate(name, dtype)

    def predicate(self, name):
        """With a "!" in front, the other way round."""
        value = self.read(name.lstrip("!"), "pred")
        return ~value if name.startswith("!") else value

    def write(self, name, value):
        if name == "_":
            return
        register, value = self._register(name), np.asarray(value)
        if register.dtype != bool:
            if value.itemsize < register.itemsize:
                kind = "i" if value.dtype.kind == "i" else "u"
                value = (value if kind == "i" else value.view(UNSIGNED[value.itemsize])).astype(f"{kind}{register.itemsize}")
            value = value.view(UNSIGNED[value.itemsize])  # of a wider one the lower bytes are kept
        register[self.at] = value

    # Memory

    def address(self, operand):
        name, _, offset = operand[1:-1].partition("+")
        return self.read(name.strip(), "u64").astype(np.int64) + int(offset or "0", 0)

    def reach(self, instruction, address, size, kind, atomic=False):
        """(the space's bytes, where in them each lane's are), after all that there is to check, counted."""
        text, lanes = instruction.text, self.lanes
        if address.size != lanes.size:
            address = np.broadcast_to(address, lanes.shape)
        space = instruction.space
        if space is None:
            space = "local" if (address >= LOCAL).all() else "shared" if (address >= SHARED).all() else "global"
            address = address - {"local": LOCAL, "shared": SHARED, "global": 0}[space]
        if (address % size).any():
            raise PTXError(f"misaligned access of {size} bytes: {text}")
        held = self.spaces[space]
        if space == "global":
            at = self._place(address, size, kind, text)
        else:
            own, most = (self.block, self.shared_size) if space == "shared" else (np.arange(self.count), self.kernel.local_bytes)
            if ((address < 0) | (address + size > most)).any():
                raise PTXError(f"out of bounds of {space} memory: {text}")
            at = address + own[lanes] * (-(-most // ALIGNED) * ALIGNED)
        if space != "local":
            blocks = self.block[lanes]
            held.check("atom" if atomic else kind, at, size, lanes, blocks, self.epoch[blocks], text)
        if space == "global":
            self.counters.access(text, kind, size, self.warp[lanes], at)
        elif space == "shared":
            self.counters.bank_conflicts += self._conflicts(self.warp[lanes], self.lane[lanes], address, size)
        return held.bytes, at

    def _place(self, address, size, kind, text):
        which = np.searchsorted(self.starts, address, "right") - 1
        inside = (which >= 0) & (address + size <= self.starts[which] + self.sizes[which])
        if not inside.all():
            lane = self.lanes[~inside][0]
            raise PTXError(f"out of bounds: {kind} of {size} bytes by thread {lane} of block {self.block[lane]}: {text}")
        return address - self.starts[which] + self.places[which]

    @staticmethod
    def _conflicts(warps, lanes, address, size):
        """Words of one bank are had one after the other; the same word by all at once.  Of 64 and 128 bits a half or a quarter of a warp
        is served at a time (NVIDIA, "CUDA C++ Programming Guide", shared memory)."""
        each = max(1, size // 4)
        served, words = warps * each + lanes // (WARP // each), address // 4
        begins = np.flatnonzero(_firsts(served))
        if (np.maximum.reduceat(words, begins) - np.minimum.reduceat(words, begins) + each <= BANKS).all():
            return 0
        served, words = np.repeat(served, each), np.add.outer(words, np.arange(each)).ravel()
        served, words = np.divmod(_unique(served * WORDS + words), WORDS)  # addresses of shared memory are below this many words
        first = _firsts(served)
        rounds = np.bincount((np.cumsum(first) - 1) * BANKS + words % BANKS, minlength=np.count_nonzero(first) * BANKS)
        return int((rounds.reshape(-1, BANKS).max(1) - 1).sum())

    # The program

    def run(self):
        end = len(self.program.instructions)
        while True:
            runs = (self.pc < end) & ~self.waits
            if runs.any():
                pc = int(self.pc[runs].min())
                self._basic_block(pc, np.flatnonzero(runs & (self.pc == pc)))
            elif self.waits.any():
                self._release()
            else:
                return

    def call(self, function, result, arguments):
        """Run a function of the threads that run now, to its end."""
        kept = self.program, self.registers, self.pc, self.lanes, self.at
        given = {name: self.parameters[argument] for name, argument in zip(function.parameters, arguments, strict=True)}
        outer, self.parameters = self.parameters, given
        self.program, self.registers, self.pc = function.program, {}, np.full(self.count, len(function.program.instructions))
        self.pc[self.lanes] = 0
        self.run()
        found = [self.parameters[name] for name in function.result]
        self.program, self.registers, self.pc, self.lanes, self.at = kept
        self.parameters = outer | dict(zip(result, found, strict=True))

    def _release(self):
        """The blocks whose every thread waits, or has ended, go on."""
        for block in np.unique(self.block[self.waits]):
            waiting = np.flatnonzero((self.block == block) & self.waits)
            if np.unique(self.pc[waiting]).size > 1 or waiting.size < np.count_nonzero(self.block == block):
                raise PTXError(f"a barrier that not all threads of block {block} reach")
            self.waits[waiting] = False
            self.epoch[block] += 1

    def _basic_block(self, pc, lanes):
        instructions, targets, end = self.program.instructions, self.program.targets, len(self.program.instructions)
        every, warps = slice(None) if lanes.size == self.count else lanes, int(np.count_nonzero(_firsts(self.warp[lanes])))
        while True:
            instruction = instructions[pc]
            name = instruction.opcode[0]
            self.counters.warp_instructions += warps
            self.counters.by_opcode[instruction.name] += warps
            self.lanes, self.at = lanes, every
            taken = None
            if instruction.predicate:
                taken = self.predicate(instruction.predicate)
            if name in ("bra", "ret", "exit"):
                target = self.program.labels[instruction.operands[0]] if name == "bra" else end
                self.pc[lanes] = target if taken is None else np.where(taken, target, pc + 1)
                return
            if name in ("bar", "barrier"):
                if set(instruction.opcode) - {"bar", "barrier", "cta", "sync", "aligned"} or len(instruction.operands) > 1:
                    raise PTXError(f"no such operation here: {instruction.text}")
                self.waits[lanes if taken is None else lanes[taken]], self.pc[lanes] = True, pc + 1
                return
            if taken is not None:
                self.lanes = self.at = lanes[taken]
            if self.lanes.size:
                instruction.handler(self, instruction)
            pc += 1
            if pc in targets or pc == end:
                self.pc[lanes] = pc
                return


ABSENT = frozenset({"cc", "relu", "satfinite", "xorsign", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"})
"""Parts of opcodes that would change a result."""
OPERATIONS: dict[str, Callable[[_Launch, Instruction], None]] = {}


def operation(*names):
    """The decorated function executes the opcodes that begin so."""

    def register(function):
        OPERATIONS.update(dict.fromkeys(names, function))
        return function

    return register


# Memory


@functools.cache
def _listed(operand):
    return _split(operand.strip("{}")) if operand.startswith("{") else (operand,)


def _parameter(operand):
    """Its name; each holds one number here."""
    name, _, offset = operand[1:-1].partition("+")
    if offset not in ("", "0"):
        raise PTXError(f"a parameter that is more than a number: {operand}")
    return name


@operation("ld", "ldu")
def _load(m, i):
    target, source = i.operands
    if "param" in i.opcode:
        value = m.parameters[_parameter(source)]
        return m.write(target, (value if value.size == 1 else value[m.at]).view(i.type))
    memory, place = m.reach(i, m.address(source), i.width * i.type.itemsize, "ld")
    for k, register in enumerate(_listed(target)):
        m.write(register, memory.view(i.type)[place // i.type.itemsize + k])


@operation("st")
def _store(m, i):
    target, source = i.operands
    if "param" in i.opcode:
        held = m.parameters.setdefault(_parameter(target), np.zeros(m.count, i.type))
        held[m.at] = m.read(source, i.type)
        return
    memory, place = m.reach(i, m.address(target), i.width * i.type.itemsize, "st")
    for k, register in enumerate(_listed(source)):
        memory.view(i.type)[place // i.type.itemsize + k] = m.read(register, i.type)


_ATOMIC = {
    "add": lambda old, v: old + v,
    "min": min,
    "max": max,
    "exch": lambda old, v: v,
    "and": lambda old, v: old & v,
    "or": lambda old, v: old | v,
    "xor": lambda old, v: old ^ v,
    "inc": lambda old, v: 0 if old >= v else old + 1,
    "dec": lambda old, v: v if old == 0 or old > v else old - 1,
}


@operation("atom", "red")
def _atomic(m, i):
    """One thread after the other."""
    target, (where, *values) = (i.operands[0], i.operands[1:]) if i.opcode[0] == "atom" else (None, i.operands)
    memory, place = m.reach(i, m.address(where), i.type.itemsize, "st", atomic=True)
    given = [np.broadcast_to(m.read(v, i.type), m.lanes.shape) for v in values]
    old = np.empty(m.lanes.size, i.type)
    change = next((f for name, f in _ATOMIC.items() if name in i.opcode), None)
    if change is None and "cas" not in i.opcode:
        raise PTXError(f"no such operation here: {i.text}")
    for lane, at in enumerate(place):
        here = memory[at : at + i.type.itemsize].view(i.type)
        old[lane] = here[0]
        if "cas" in i.opcode:
            here[0] = given[1][lane] if here[0] == given[0][lane] else here[0]
        else:
            here[0] = change(here[0], given[0][lane])
    if target:
        m.write(target, old)


@operation("call")
def _call(m, i):
    names = [re.findall(r"[\w$]+", operand) for operand in re.findall(r"\([^)]*\)|[\w$]+", i.text.split(" ", 1)[1])]
    result, (name,), arguments = names if len(names) == 3 else ([], *names)
    if name not in m.kernel.functions:
        raise PTXError(f"no such function here: {i.text}")
    m.call(m.kernel.functions[name], result, arguments)


@operation("cvta")
def _generic_address(m, i):
    base = {"shared": SHARED, "local": LOCAL}.get(next(part for part in i.opcode[1:] if part != "to"), 0)
    address = m.read(i.operands[1], "u64")
    m.write(i.operands[0], address - np.uint64(base) if "to" in i.opcode else address + np.uint64(base))


@operation("membar", "fence", "nanosleep", "prefetch", "prefetchu")
def _nothing(m, i):
    pass


# Moves


@operation("mov")
def _move(m, i):
    target, source = i.operands
    if target.startswith("{"):
        value, parts = m.read(source, i.type), _listed(target)
        size = i.type.itemsize // len(parts)
        for k, part in enumerate(parts):
            m.write(part, (value >> value.dtype.type(8 * size * k)).astype(UNSIGNED[size]))
    elif source.startswith("{"):
        parts = _listed(source)
        size, whole = i.type.itemsize // len(parts), UNSIGNED[i.type.itemsize]
        m.write(target, sum(m.read(p, np.dtype(UNSIGNED[size])).astype(whole) << whole(8 * size * k) for k, p in enumerate(parts)))
    else:
        m.write(target, m.read(source, i.type))


@operation("selp")
def _select(m, i):
    target, x, y, condition = i.operands
    m.write(target, np.where(m.predicate(condition), m.read(x, i.type), m.read(y, i.type)).astype(i.type))


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
TOWARDS = {"rz": 0, "rm": -np.inf, "rp": np.inf}


def _flushed(value, i):
    """Subnormal float32 as zero, where an opcode says so."""
    if i.flushes and value.dtype == np.float32:
        value = np.where(np.abs(value) < np.float32(TINY), np.copysign(np.float32(0), value), value)
    return value


def _given(m, i, name, dtype=None):
    """An operand of arithmetic."""
    return _flushed(m.read(name, dtype or i.type), i)


def _rounded(value, i, dtype):
    """Float64, or what rounds like the exact value, in a float type by an opcode's direction."""
    found = value.astype(dtype)
    if i.towards is None:
        return found
    past = found > value if i.towards < 0 else found < value if i.towards > 0 else np.abs(found) > np.abs(value)
    return np.where(past, np.nextafter(found, dtype.type(i.towards)), found)


def _finished(value, i):
    """With what an opcode's modifiers do to a result."""
    value = np.asarray(value)
    if i.saturates and value.dtype.kind == "f":
        value = np.where(np.isnan(value), 0, np.clip(value, 0, 1)).astype(value.dtype)
    return _flushed(value, i)


@operation("cvt")
def _convert(m, i):
    to, of = i.opcode[-2:]
    if "bf16" in (to, of):
        return _convert_bfloat16(m, i, to, of)
    to, of = i.type_of(to), i.type
    value = _given(m, i, i.operands[1], of)
    rounding = next((_ROUND[part] for part in i.opcode if part in _ROUND), None)
    if of.kind == "f" and rounding:
        value = rounding(value)
    if of.kind == "f" and to.kind != "f":
        limits = np.iinfo(to)
        inside = np.where(np.isnan(value), 0, value).astype(np.longdouble)
        value = np.clip(inside, limits.min, limits.max)
    elif to.kind == "f":
        value = _rounded(value if of.kind == "f" else value.astype(np.longdouble), i, to)
    elif "sat" in i.opcode:
        limits = np.iinfo(to)
        value = np.array([min(max(int(v), limits.min), limits.max) for v in value], to)
    return m.write(i.operands[0], _finished(value.astype(to), i))


def _convert_bfloat16(m, i, to, of):
    """From or to the upper half of a float32, rounded to nearest even."""
    target, source = i.operands
    if (of, to) == ("bf16", "f32"):
        return m.write(target, m.read(source, "b16").astype(np.uint32) << np.uint32(16))
    if (of, to) != ("f32", "bf16") or "rn" not in i.opcode:
        raise PTXError(f"no such operation here: {i.text}")
    bits = m.read(source, "b32")
    nearest = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return m.write(target, np.where(np.isnan(bits.view(np.float32)), 0x7FFF, nearest).astype(np.uint16))


# Arithmetic


def _fused(x, y, z, i):
    """x * y + z with one rounding: of narrower floats in float64, rounded to odd there (Boldo and Melquiond, 2008)."""
    if x.dtype == np.float64:
        if i.towards is not None:
            raise PTXError(f"no such rounding here: {i.text}")
        return (x.astype(np.longdouble) * y + z).astype(np.float64)
    product, dtype = np.multiply(x, y, dtype=np.float64), x.dtype
    total = product + z
    if dtype == np.float32 and i.towards is None:
        # Rounded twice is not rounded once only where the first ends half way between two numbers; subnormal ones lie elsewhere.
        half_way, size = total.view(np.int64) & 0x1FFFFFFF == 0x10000000, np.abs(total)
        if not half_way.any() and not (size.min() < TINY and ((size < TINY) & (size > 0)).any()):
            return total.astype(np.float32)
    part = total - product
    lost = (product - (total - part)) + (z - part)
    if not lost.any():
        return _rounded(total, i, dtype)
    bits = np.ascontiguousarray(total).view(np.int64)
    odd = np.isfinite(total) & (lost != 0) & (bits & 1 == 0)
    total = np.where(odd, bits + np.where((lost > 0) == (total > 0), 1, -1), bits).view(np.float64)
    return _rounded(total, i, dtype)


def _quotient(x, y):
    if x.dtype.kind == "f":
        return x / y
    if x.dtype.kind == "u":
        return x // y
    floor = x // y
    return floor + ((floor * y != x) & ((x < 0) != (y < 0))).astype(x.dtype)


def _high(x, y):
    """The upper half of a product."""
    if x.itemsize < 8:
        wide = np.dtype(f"{x.dtype.kind}{2 * x.itemsize}")
        return ((x.astype(wide) * y.astype(wide)) >> wide.type(8 * x.itemsize)).astype(x.dtype)
    return np.array([(int(a) * int(b)) >> 64 for a, b in np.broadcast(x, y)]).astype(x.dtype)


def _wide(x):
    return x.astype(f"{x.dtype.kind}{2 * x.itemsize}")


def _product(x, y, i):
    if "wide" in i.opcode:
        return _wide(x) * _wide(y)
    return _high(x, y) if "hi" in i.opcode else x * y


def _directed(plain, fused):
    """An operation that rounds as its opcode says; ``fused`` is the factors and addend that it is of floats."""

    def apply(x, y, i):
        if i.towards is None:
            return plain(x, y, i)
        if fused is None:
            raise PTXError(f"no such rounding here: {i.text}")
        return _fused(*fused(*np.broadcast_arrays(x, y), x.dtype.type(1)), i)

    return apply


def _least(plain, strict, of_zeros):
    def apply(x, y, i):
        if x.dtype.kind != "f":
            return strict(x, y)
        zeros = (x == 0) & (y == 0)
        return np.where(zeros, of_zeros(x, y), (strict if "NaN" in i.opcode else plain)(x, y))

    return apply


BINARY = {
    "add": _directed(lambda x, y, i: x + y, lambda x, y, one: (x, one, y)),
    "sub": _directed(lambda x, y, i: x - y, lambda x, y, one: (x, one, -y)),
    "mul": _directed(_product, lambda x, y, one: (x, y, np.copysign(one - one, x * y))),
    "div": _directed(lambda x, y, i: _quotient(x, y), None),
    "rem": lambda x, y, i: x - _quotient(x, y) * y,
    # -0 is below +0.
    "min": _least(np.fmin, np.minimum, lambda x, y: -(-x - y)),
    "max": _least(np.fmax, np.maximum, lambda x, y: x + y),
    "and": lambda x, y, i: x & y,
    "or": lambda x, y, i: x | y,
    "xor": lambda x, y, i: x ^ y,
    "copysign": lambda x, y, i: np.copysign(y, x),
}


@operation(*BINARY)
def _binary(m, i):
    target, x, y = i.operands
    m.write(target, _finished(BINARY[i.opcode[0]](_given(m, i, x), _given(m, i, y), i), i))


@operation("fma", "mad")
def _multiply_add(m, i):
    target, *rest = i.operands
    x, y = _given(m, i, rest[0]), _given(m, i, rest[1])
    if i.type.kind == "f":
        value = _fused(x, y, _given(m, i, rest[2]), i)
    else:
        value = _product(x, y, i)
        value = value + m.read(rest[2], value.dtype)
    m.write(target, _finished(value, i))


@operation("shl", "shr")
def _shift(m, i):
    target, x, count = i.operands
    value, by = m.read(x, i.type), m.read(count, "u32").astype(np.int64)
    bits = 8 * i.type.itemsize
    if i.opcode[0] == "shr" and i.type.kind == "i":
        return m.write(target, value >> np.minimum(by, bits - 1).astype(value.dtype))
    value = value.view(UNSIGNED[i.type.itemsize])
    few = np.minimum(by, bits - 1).astype(value.dtype)
    return m.write(target, np.where(by >= bits, 0, value << few if i.opcode[0] == "shl" else value >> few).astype(value.dtype))


UNARY = {
    "neg": np.negative,
    "abs": np.abs,
    "not": np.invert,
    "sqrt": np.sqrt,
    "rcp": lambda x: (1 / x).astype(x.dtype),
    "rsqrt": lambda x: (1 / np.sqrt(x)).astype(x.dtype),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "popc": lambda x: np.bitwise_count(x).astype(np.uint32),
    "clz": lambda x: np.array([8 * x.itemsize - int(v).bit_length() for v in x.view(UNSIGNED[x.itemsize])], np.uint32),
    "brev": lambda x: np.array([int(f"{int(v):0{8 * x.itemsize}b}"[::-1], 2) for v in x], x.dtype),
}


@operation(*UNARY)
def _unary(m, i):
    if i.towards is not None:
        raise PTXError(f"no such rounding here: {i.text}")
    m.write(i.operands[0], _finished(UNARY[i.opcode[0]](_given(m, i, i.operands[1])), i))


_COMPARE = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}


def _compared(name, x, y):
    if name == "ne":
        return (x != y) & (x == x) & (y == y)
    if name in _COMPARE:
        return _COMPARE[name](x, y)
    # equ, neu, ltu ...: true of NaN too.
    return _compared(name[:-1], x, y) | np.isnan(x) | np.isnan(y)


_JOIN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _relation(m, i, x, y, joined, dtype):
    """(whether two operands compare so, and whether they do not), each joined with a predicate where the opcode says how."""
    found = _compared(i.opcode[1], _given(m, i, x, dtype), _given(m, i, y, dtype))
    join = next((f for name, f in _JOIN.items() if name in i.opcode[2:]), None)
    return (found, ~found) if join is None else tuple(join(f, m.predicate(joined[0])) for f in (found, ~found))


@operation("setp")
def _set_predicate(m, i):
    target, x, y, *joined = i.operands
    for register, value in zip(target.split("|"), _relation(m, i, x, y, joined, i.type), strict=False):
        m.write(register, value)


@operation("set")
def _set(m, i):
    """1 of floats, every bit of integers."""
    target, x, y, *joined = i.operands
    to = i.type_of(i.opcode[-2])
    found, _ = _relation(m, i, x, y, joined, i.type)
    m.write(target, np.where(found, to.type(1) if to.kind == "f" else ~to.type(0), to.type(0)))


@operation("slct")
def _select_by_sign(m, i):
    target, x, y, sign = i.operands
    to = i.type_of(i.opcode[-2])
    m.write(target, np.where(_given(m, i, sign) >= 0, m.read(x, to), m.read(y, to)).astype(to))


@operation("testp")
def _test(m, i):
    x = m.read(i.operands[1], i.type)
    tests = {"finite": np.isfinite, "infinite": np.isinf, "notanumber": np.isnan, "number": lambda v: ~np.isnan(v)}
    m.write(i.operands[0], tests[i.opcode[1]](x))


def _field(m, begin, length, bits):
    """Where a field begins and ends, within a number of this many bits."""
    begin, length = (m.read(v, "u32").astype(np.int64) & 255 for v in (begin, length))
    return np.minimum(begin, bits), np.minimum(begin + length, bits)


def _ones(count, kind):
    """Numbers of that many ones."""
    bits = 8 * np.dtype(kind).itemsize
    return np.where(count >= bits, ~kind(0), (kind(1) << np.minimum(count, bits - 1).astype(kind)) - kind(1))


@operation("bfe")
def _extract(m, i):
    target, x, *field = i.operands
    kind, bits = UNSIGNED[i.type.itemsize], 8 * i.type.itemsize
    begin, end = _field(m, *field, bits)
    value = m.read(x, i.type)
    found = (value.view(kind) >> np.minimum(begin, bits - 1).astype(kind)) & _ones(end - begin, kind)
    if i.type.kind == "i":  # the sign is the field's last bit, or the number's where the field is beyond it
        length = m.read(field[1], "u32").astype(np.int64) & 255
        negative = (value.view(kind) >> np.clip(end - 1, 0, bits - 1).astype(kind)) & kind(1) & (length > 0)
        found = found | np.where(negative, ~_ones(end - begin, kind), kind(0))
    m.write(target, found.astype(kind))


@operation("bfi")
def _insert(m, i):
    target, part, whole, *field = i.operands
    kind, bits = UNSIGNED[i.type.itemsize], 8 * i.type.itemsize
    begin, end = _field(m, *field, bits)
    mask = _ones(end, kind) & ~_ones(begin, kind)
    shifted = m.read(part, i.type) << np.minimum(begin, bits - 1).astype(kind)
    m.write(target, (m.read(whole, i.type) & ~mask) | (shifted & mask))


@operation("prmt")
def _permute(m, i):
    target, low, high, selector = i.operands
    both = m.read(low, "u32").astype(np.uint64) | (m.read(high, "u32").astype(np.uint64) << np.uint64(32))
    chosen, found = m.read(selector, "u32").astype(np.uint64), np.uint64(0)
    for byte in range(4):
        which = chosen >> np.uint64(4 * byte)
        value = (both >> ((which & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        signs = np.where(value & np.uint64(128), np.uint64(255), np.uint64(0))
        found = found | (np.where(which & np.uint64(8), signs, value) << np.uint64(8 * byte))
    m.write(target, found.astype(np.uint32))


@operation("shf")
def _funnel(m, i):
    target, low, high, count = i.operands
    low, high, count = (m.read(v, "u32").astype(np.uint64) for v in (low, high, count))
    count = count & np.uint64(31) if "wrap" in i.opcode else np.minimum(count, 32)
    both = (high << np.uint64(32)) | low
    m.write(target, ((both >> count) if i.opcode[1] == "r" else (both << count) >> np.uint64(32)).astype(np.uint32))


@operation("lop3")
def _logic(m, i):
    target, x, y, z, table = i.operands[:5]
    x, y, z = (m.read(v, "u32") for v in (x, y, z))
    found, table = np.uint32(0), int(table, 0)
    for row in range(8):
        if table >> row & 1:
            found = found | ((x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z))
    m.write(target, found)


# A warp's threads together


@operation("shfl")
def _shuffle(m, i):
    target, value, other, clamp = i.operands[:4]
    mode = i.opcode[2]
    lane = m.lane[m.lanes]
    by, clamp = (np.broadcast_to(m.read(v, "u32").astype(np.int64), lane.shape) for v in (other, clamp))
    segment, most = clamp >> 8 & 31, clamp & 31
    first = lane & segment
    last = first | (most & ~segment & 31)
    source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first | (by & ~segment & 31)}[mode]
    inside = source >= last if mode == "up" else source <= last
    source = m.warp_begin[m.lanes] + np.where(inside, source, lane)
    full = np.zeros(m.count + WARP, np.uint32)
    active = np.zeros(m.count + WARP, bool)
    full[m.lanes], active[m.lanes] = np.broadcast_to(m.read(value, "b32"), lane.shape), True
    if not active[source].all():
        raise PTXError(f"a thread is asked for its number that does not take part: {i.text}")
    for register, found in zip(target.split("|"), (full[source], inside), strict=False):
        m.write(register, found)


def _ballots(m, votes):
    found = np.zeros(m.warp.max() + 1, np.uint64)
    np.bitwise_or.at(found, m.warp[m.lanes], np.where(votes, np.uint64(1) << m.lane[m.lanes].astype(np.uint64), np.uint64(0)))
    return found[m.warp[m.lanes]]


@operation("vote")
def _vote(m, i):
    votes = np.broadcast_to(m.predicate(i.operands[1]), m.lanes.shape)
    found, everyone = _ballots(m, votes), _ballots(m, np.ones(m.lanes.size, bool))
    by = {"ballot": found.astype(np.uint32), "any": found != 0, "all": found == everyone, "uni": (found == 0) | (found == everyone)}
    m.write(i.operands[0], by[next(mode for mode in by if mode in i.opcode)])


@operation("activemask")
def _active(m, i):
    m.write(i.operands[0], _ballots(m, np.ones(m.lanes.size, bool)).astype(np.uint32))


__all__: list[Any] = ["Counters", "Kernel", "Memory", "PTXError", "execute"]
