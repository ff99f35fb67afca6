"""How a kernel is compiled, and where the machine code is kept.

``@specialised`` turns a factory of Python functions into a factory of compiled *workers* (see launch.py).  What makes two
compilations the same is written down, not found out by pickling closures: the factory, its arguments, the text of the sources,
and the compiler and CPU.  So a second process compiles nothing, and an edited source recompiles what depends on it: an arithmetic
file its own kernels, every other file of ``kernels/`` those of the files that import it or call its nests.  (Numba's own cache misses on
closures over dispatchers, goes stale on closures over imported helpers, and does not notice an edited intrinsic.)
"""

import ast
import contextlib
import ctypes
import functools
import hashlib
import os
import pickle
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import llvmlite
import numba
from numba import types
from numba.core import ccallback, registry
from numba.core.caching import CompileResultCacheImpl, NullCache, _Cache
from numba.core.codegen import CodeLibrary

from .pipeline import Whole, uncollected

HERE = Path(__file__).parent
WORKER = types.void(types.CPointer(types.int64), types.int64, types.int64)

# The arguments travel as packed bytes, which ctypes passes as their address: no array is made for a serial call.
_SERIAL = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64)


class Worker(NamedTuple):
    """A compiled worker."""

    name: str
    address: int
    call: Callable[[bytes, int, int], None]
    """(packed int64 arguments, start, stop); releases the GIL"""
    library: CodeLibrary
    """Holds the code; where it was compiled in this process ``get_asm_str()`` shows it.  All that compiling made besides is let go: a
    process that compiles many kernels grows by 3.5 MB each where it grew by 4.7."""


compiled_here = []
"""Names of what this process compiled."""
loaded_here = []
"""Names of what it loaded instead."""

DAY = 24 * 3600
UNUSED = 30 * DAY
"""Seconds after which a file that no process loads is deleted."""
_OURS = re.compile(r"[\w.]+(-[0-9a-f]{8,24}){1,2}(\.bin|\.ptx|-\w+\.tmp)")


@functools.cache
def directory():
    """Where machine code is kept: $FASTPOOL_CACHE_DIR, else the user's cache directory; None if there is no such place.

    A directory that can only be read serves what it holds.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    path = os.path.expanduser(os.environ.get("FASTPOOL_CACHE_DIR") or os.path.join(base, "fastpool"))
    if path.startswith("~"):  # a user without a home directory: no folder called "~" is meant
        return None
    path = Path(path).absolute()
    with contextlib.suppress(OSError):
        path.mkdir(parents=True, exist_ok=True)
    return path if os.path.isdir(path) else None  # Path.is_dir raises, until Python 3.12, inside a folder that may not be entered


class Kept(NamedTuple):
    """Files of machine code."""

    files: int
    bytes: int


def _files():
    """(path, stat) of each file of the cache; nothing else in its directory."""
    paths = []
    with contextlib.suppress(OSError):  # a directory that may not be listed
        paths = list(directory().iterdir() if directory() else ())
    for path in paths:
        if _OURS.fullmatch(path.name):
            with contextlib.suppress(OSError):  # deleted by another process meanwhile
                yield path, path.stat()


@functools.cache
def _marks():
    """What the present sources, compiler and CPU leave in the names of files."""
    return {_common_digest(path)[:8] for path in HERE.rglob("*.py")}


def _is_present(path):
    return not _marks().isdisjoint(path.name.split("-"))


def kept():
    """What the cache holds: (of the present sources, compiler and CPU; of others)."""
    sizes = {True: [], False: []}
    for path, stat in _files():
        sizes[_is_present(path)].append(stat.st_size)
    return tuple(Kept(len(found), sum(found)) for found in sizes.values())


def prune(superseded=False):
    """Delete what no process loaded for 30 days; with ``superseded`` also what other sources, compilers or CPUs made.  What went.

    Safe beside other processes: a file is read in one go, and one that is missing is compiled.  Not told from present ones are those of a
    worker that calls another nest (``across``, ``few``, ``conv_pool``) whose file alone was edited: these go after 30 days.
    """
    sizes = []
    for path, stat in _files():
        if stat.st_mtime < time.time() - UNUSED or (superseded and not _is_present(path)):
            with contextlib.suppress(OSError):
                path.unlink()
                sizes.append(stat.st_size)
    return Kept(len(sizes), sum(sizes))


@functools.cache
def _prune_once():
    prune()


@functools.cache
def _digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@functools.cache
def _imported(path):
    """The files of ``kernels/`` that one of them imports, or a file elsewhere by their full names."""
    return tuple(named for named in _named(path) if named.is_file())


def _named(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if not node.level and f"{module}.".startswith(f"{__package__}."):
                base = HERE.joinpath(*module.split(".")[__package__.count(".") + 1 :])
            elif node.level:
                base = path.parents[node.level - 1].joinpath(*module.split("."))
            else:
                continue
            yield from (base.with_suffix(".py"), base / "__init__.py", *(base / f"{alias.name}.py" for alias in node.names))


@functools.cache
def _sources(path):
    """A file and all of ``kernels/`` that it imports, directly or not; the arithmetic files are told by the kinds that are used."""
    found, todo = set(), [path]
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += _imported(path)
    return sorted(found)


@functools.cache
def _common_digest(path):
    """Of everything a kernel of this file may depend on but the arithmetic files: sources, compiler, CPU."""
    versions = (numba.__version__, llvmlite.__version__, sys.version_info[:2])
    target = registry.cpu_target.target_context.codegen().magic_tuple()
    text = repr(([(os.path.relpath(p, HERE), _digest(p)) for p in _sources(path)], versions, target))
    return hashlib.sha256(text.encode()).hexdigest()


def _describe(constant):
    """A factory's argument as text that changes when the code it stands for does."""
    if sources := getattr(constant, "sources", None):
        return f"{constant.name}@{'+'.join(map(_digest, sources))}"
    if nest := getattr(constant, "__wrapped__", None):
        return f"{nest_name(nest)}@{_common_digest(Path(nest.__code__.co_filename))}"
    return repr(constant)


class File:
    """What was compiled under ``name``, in one file, named by what it was compiled from; written whole or not at all."""

    def __init__(self, name, key, path, suffix=".bin"):
        common = _common_digest(Path(path))
        digest = hashlib.sha256(f"{common} {key}".encode()).hexdigest()
        self.name = name
        # The common digest by itself tells whose files they are.
        self.path = directory() / f"{name}-{common[:8]}-{digest[:16]}{suffix}"

    def read(self):
        """Its bytes; None: there is none."""
        try:
            payload = self.path.read_bytes()
        except OSError:
            return None
        with contextlib.suppress(OSError):  # prune goes by the time of the last change: those of access are often switched off
            if self.path.stat().st_mtime < time.time() - DAY:
                os.utime(self.path)
        return payload

    def write(self, payload):
        with contextlib.suppress(OSError):  # a full or read-only disk costs the next process a compilation, nothing else
            _prune_once()
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f"{self.path.stem}-", suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(payload)
                os.replace(temporary, self.path)
            except OSError:
                os.unlink(temporary)


class _DiskCache(_Cache):
    """One compiled function of Numba's in a ``File``."""

    def __init__(self, name, key, path):
        self._file = File(name, key, path)
        self._impl = CompileResultCacheImpl.__new__(CompileResultCacheImpl)

    @property
    def cache_path(self):
        return str(self._file.path.parent)

    def load_overload(self, sig, target_context):
        target_context.refresh()  # links the runtime's symbols, which compiling would have done
        payload = self._file.read()
        if payload is None:
            return None
        try:
            payload = pickle.loads(payload)
        except Exception:  # a file of another format or a torn one: pickle raises nearly anything
            return None
        loaded_here.append(self._file.name)
        return self._impl.rebuild(target_context, payload)

    def save_overload(self, sig, cres):
        compiled_here.append(self._file.name)
        self._file.write(pickle.dumps(self._impl.reduce(cres)))

    def enable(self):
        pass

    def disable(self):
        pass

    def flush(self):
        self._file.path.unlink(missing_ok=True)


class _NoCache(NullCache):
    """Where there is no place on disk: compiles in every process."""

    def __init__(self, name):
        self._name = name

    def save_overload(self, sig, cres):
        compiled_here.append(self._name)


def cache(name, key, path):
    """The cache of one compiled function called ``name`` that is determined by the text ``key`` and the file it is written in."""
    return _DiskCache(name, key, path) if directory() else _NoCache(name)


def nest_name(factory):
    """What a factory of workers is called: 'contiguous.forward'."""
    return f"{factory.__module__.rpartition('.')[2]}.{factory.__name__}"


def key_of(factory, constants):
    """Text that changes with what ``factory(*constants)`` makes, apart from the sources of its file."""
    return f"{factory.__module__}.{factory.__qualname__}({', '.join(map(_describe, constants))})"


def specialised(factory):
    """``factory(*constants)`` returns the Python function of a worker; the decorated one returns it compiled, a ``Worker``.

    Constants are ints, strings, None, Numba types, reductions (anything with ``name`` and ``sources``), and other such factories, whose
    workers this one calls (``inlined``).
    """

    @functools.cache
    def compiled(*constants):
        name = nest_name(factory)
        # numpy's error model: no branch for a division by zero in a worker, which could not raise.
        worker = ccallback.CFunc(factory(*constants), (WORKER.args, WORKER.return_type), {}, {"error_model": "numpy"}, Whole)
        worker._cache = cache(name, key_of(factory, constants), factory.__code__.co_filename)
        with uncollected():
            worker.compile()
        return Worker(name, worker.address, _SERIAL(worker.address), worker._library)

    return functools.wraps(factory)(compiled)
