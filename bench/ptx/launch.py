"""A launch: threads in lock step, their registers, and every access to memory checked and counted."""

import numpy as np

from .memory import LOCAL, SECTOR, SHARED, Allocation, Counters, Space, firsts, unique
from .program import ALIGNED, TYPES, UNSIGNED, WARP, PTXError, aligned, immediate

BANKS, WORDS = 32, 1 << 20
"""Of shared memory: words served at a time, and more words than it has."""
GRID = 2**31 - 1, 65535, 65535
"""Blocks at most, by axis."""


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
            "shared": Space(blocks * aligned(self.shared_size), self.unit),
            "local": Space(self.count * kernel.local_bytes, self.unit),
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
            held.append(Allocation(self.names[name], values.view(np.uint8).copy(), np.ones(values.nbytes, bool), ()))
        self.held = held
        self.starts = np.array([a.address for a in held], np.int64)
        self.sizes = np.array([a.array.size for a in held], np.int64)
        # As on a device, where what is no view begins a sector; what is one keeps its alignment.
        room = (self.sizes + 2 * SECTOR - 1 + ALIGNED) // SECTOR * SECTOR
        self.places = (np.cumsum(room) - room + self.starts % ALIGNED).astype(np.int64)
        self.global_memory = space = Space(int(room.sum()), self.unit)
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
        return immediate(name, dtype)

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
            at = address + own[lanes] * aligned(most)
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
        begins = np.flatnonzero(firsts(served))
        if (np.maximum.reduceat(words, begins) - np.minimum.reduceat(words, begins) + each <= BANKS).all():
            return 0
        served, words = np.repeat(served, each), np.add.outer(words, np.arange(each)).ravel()
        served, words = np.divmod(unique(served * WORDS + words), WORDS)  # addresses of shared memory are below this many words
        first = firsts(served)
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
        every, warps = slice(None) if lanes.size == self.count else lanes, int(np.count_nonzero(firsts(self.warp[lanes])))
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
