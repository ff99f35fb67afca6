"""What moves numbers: memory, registers, a warp's threads among each other."""

import re

import numpy as np

from .memory import LOCAL, SHARED
from .program import UNSIGNED, WARP, PTXError, listed, operation

# Memory


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
    for k, register in enumerate(listed(target)):
        m.write(register, memory.view(i.type)[place // i.type.itemsize + k])


@operation("st")
def _store(m, i):
    target, source = i.operands
    if "param" in i.opcode:
        held = m.parameters.setdefault(_parameter(target), np.zeros(m.count, i.type))
        held[m.at] = m.read(source, i.type)
        return
    memory, place = m.reach(i, m.address(target), i.width * i.type.itemsize, "st")
    for k, register in enumerate(listed(source)):
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
        value, parts = m.read(source, i.type), listed(target)
        size = i.type.itemsize // len(parts)
        for k, part in enumerate(parts):
            m.write(part, (value >> value.dtype.type(8 * size * k)).astype(UNSIGNED[size]))
    elif source.startswith("{"):
        parts = listed(source)
        size, whole = i.type.itemsize // len(parts), UNSIGNED[i.type.itemsize]
        m.write(target, sum(m.read(p, np.dtype(UNSIGNED[size])).astype(whole) << whole(8 * size * k) for k, p in enumerate(parts)))
    else:
        m.write(target, m.read(source, i.type))


@operation("selp")
def _select(m, i):
    target, x, y, condition = i.operands
    m.write(target, np.where(m.predicate(condition), m.read(x, i.type), m.read(y, i.type)).astype(i.type))


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
