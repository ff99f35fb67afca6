"""PTX of CUDA kernels, made without a driver or a device, and where it is kept.

``@specialised`` turns a factory of Python functions into a factory of ``Kernel``s: what reaches the GPU, and what the tests execute on a
CPU, is the very text that ``Kernel.ptx`` returns.
"""

import contextlib
import functools
import types
from typing import Any

import numba
import numba_cuda
import numpy as np

from ..compile import File, compiled_here, directory, key_of, loaded_here, nest_name
from ..pipeline import reduced, uncollected

CAPABILITIES = (7, 5), (8, 0), (9, 0), (10, 0)
"""Compute capabilities that code is made for; a device takes the last that it is not below."""


@functools.cache
def _passes():
    """Of numba-cuda's compiler, those that a kernel needs.

    ``IRLegalization`` says where a variable's life ends: without it NVVM moves more (in a 3x3 convolution 16,000 times, with it 10,700).
    """
    from numba.cuda import compiler
    from numba.cuda.core.typed_passes import IRLegalization

    passes = reduced("numba.cuda.core", compiler.CUDATranslateBytecode)
    return lambda state: passes(state, IRLegalization, compiler.CreateLibrary, compiler.CUDANativeLowering, compiler.CUDABackend)


def capability(device):
    """The one of ``CAPABILITIES`` for a device of this compute capability; RuntimeError if it is older than all."""
    found = [cc for cc in CAPABILITIES if cc <= tuple(device)]
    if not found:
        raise RuntimeError(f"fastpool's CUDA kernels need compute capability {CAPABILITIES[0]} or later, the device has {tuple(device)}")
    return found[-1]


@contextlib.contextmanager
def compiling():
    """Device functions compile where numba-cuda asks for the current device, of which there may be none; and by passes that are fewer than
    its own.  It has arguments for neither.  Other threads' compilations wait meanwhile."""
    from numba.cuda import compiler, dispatcher
    from numba.cuda.core.compiler_lock import global_compiler_lock

    passes = _passes()
    with global_compiler_lock:
        asked, defined = dispatcher.get_current_device, compiler.CUDACompiler.define_pipelines
        dispatcher.get_current_device = lambda: types.SimpleNamespace(compute_capability=CAPABILITIES[0])
        compiler.CUDACompiler.define_pipelines = lambda self: passes(self.state)
        try:
            yield
        finally:
            dispatcher.get_current_device, compiler.CUDACompiler.define_pipelines = asked, defined


_printed = functools.lru_cache(500)(str)
"""LLVM code as NVVM reads it.  Kernels share functions: to print each anew took 7% of a kernel's time."""


@functools.lru_cache(1)
def library(kernel):
    """numba-cuda's of a kernel, of which NVVM makes the code for any capability: until there nothing asks for which.  While ``compiling``.

    The last one is kept: it takes seven tenths of a kernel's time.
    """
    from numba.cuda import compiler

    function, signature = kernel.made
    found, _ = compiler._compile_pyfunc_with_fixup(function, signature, device=False, abi="numba", cc=CAPABILITIES[0])
    found._llvm_strs = [_printed(module) for module in found.modules]
    return found


class Kernel:
    """A kernel by its constants."""

    def __init__(self, factory, constants):
        self.name = nest_name(factory)
        self._factory, self.constants, self._key = factory, constants, key_of(factory, constants)
        self._texts: dict[Any, str] = {}

    @functools.cached_property
    def made(self):
        return self._factory(*self.constants)

    @functools.cached_property
    def converters(self):
        """What makes an argument of each parameter, in their order: an int of an address, a numpy scalar of a number."""
        _, signature = self.made
        return tuple(int if isinstance(kind, numba.types.CPointer) else getattr(np, kind.name) for kind in signature)

    def ptx(self, cc):
        """The text for one of ``CAPABILITIES``."""
        if cc not in self._texts:
            self._texts[cc] = self._loaded(cc)
        return self._texts[cc]

    def _loaded(self, cc):
        file = (
            File(self.name, f"{self._key} {cc} {numba_cuda.__version__}", self._factory.__code__.co_filename, ".ptx")
            if directory()
            else None
        )
        payload = file and file.read()
        if payload:
            loaded_here.append(self.name)
            return payload.decode()
        with compiling(), uncollected():
            text = library(self).get_asm_str(cc)
        compiled_here.append(self.name)
        if file:
            file.write(text.encode())
        return text


def specialised(factory):
    """``factory(*constants)`` returns (a Python function, the types of its arguments); the decorated one a ``Kernel``."""

    @functools.cache
    def kernel(*constants):
        return Kernel(factory, constants)

    return functools.wraps(factory)(kernel)
