"""PTX's text as instructions, and where what executes an opcode is found."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np

WARP, ALIGNED = 32, 16
"""Threads in lock step; bytes that an access has at most."""
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES = {f"{letter}{8 * size}": np.dtype(f"{kind}{size}") for letter, kind in (("b", "u"), ("u", "u"), ("s", "i")) for size in UNSIGNED} | {
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "pred": np.dtype(bool),
}
TOWARDS = {"rz": 0, "rm": -np.inf, "rp": np.inf}
"""Where an opcode's part rounds to."""
ABSENT = frozenset({"cc", "relu", "satfinite", "xorsign", "f4e", "b4e", "rc8", "ecl", "ecr", "rc16"})
"""Parts of opcodes that would change a result."""
OPERATIONS: dict[str, Callable[[Any, Any], None]] = {}
"""The beginning of an opcode -> what executes it: a function of the launch and the ``Instruction``."""


def operation(*names):
    """The decorated function executes the opcodes that begin so."""

    def register(function):
        OPERATIONS.update(dict.fromkeys(names, function))
        return function

    return register


def aligned(size):
    """Bytes to where the widest access may begin."""
    return -(-size // ALIGNED) * ALIGNED


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
def listed(operand):
    return _split(operand.strip("{}")) if operand.startswith("{") else (operand,)


@functools.cache
def immediate(text, dtype):
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
            array[i : i + 1] = immediate(value, array.dtype).view(array.dtype)
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
        return places, aligned(top)
