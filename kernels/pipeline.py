"""Numba's compiler, cut down to what a kernel needs.

A kernel is one worker and some thirty small functions that are all inlined into it.  Numba's own pipeline optimises each of them,
optimises it again in everything that calls it, and writes machine code for each, which nobody runs.  Here such a function stays as it
was lowered (``Part``) until the worker that it ends in is linked and optimised as one (``Whole``).  Left out is what no kernel has a use
for: ``with`` blocks, array expressions, closures, reference counts and the lives of variables.  The machine code is as quick: of
100 kernels 44 are the same to the letter, others but for an error's path that LLVM now sees is never taken, or for its order; 196 times of
forward and backward are 1.00 of what they were in the geometric mean.

Measured, CPU seconds for 100 kernels of pooling and convolution: Numba's pipeline of one optimisation a kernel 0.77 each, 0.57 without
counts and lives, with each part linked once, and with builtin functions' types remembered, 0.49 with no garbage collected meanwhile.  Of
115 kernels on a quicker CPU 0.37 each, and 0.24 since what kernels share is compiled once (``interned``): as many instructions.  On CUDA,
of 62 kernels, 0.37 each by numba-cuda's passes, 0.29 with that, 0.20 by the passes here.
"""

import contextlib
import functools
import gc
import importlib
import numbers
from types import CellType, FunctionType

from numba.core import cgutils, typed_passes, types, untyped_passes
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase
from numba.core.compiler_machinery import register_pass
from numba.core.lowering import Lower


@contextlib.contextmanager
def uncollected():
    """Without a search for garbage: compiling makes millions of objects, and each search goes through all that a process holds.  A tenth of
    the time in a small process."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _exactly(constant):
    """What equals that of the same constant of the same type alone: 1, 1.0 and True are three, 0.0 and -0.0 two."""
    if isinstance(constant, tuple):
        return type(constant), tuple(map(_exactly, constant))
    return type(constant), repr(constant) if isinstance(constant, numbers.Number) else constant


def interned(jit):
    """``jit``, which is given a function once: another of the same code over the same constants is the same.

    A factory of kernels makes its small functions anew for each kernel, and of two kernels of a kind half are the same.  They are kept:
    20 MB of 115 kernels' 600.
    """
    known = {}

    @functools.wraps(jit)
    def of(function):
        try:
            constants = [cell.cell_contents for cell in function.__closure__ or ()]
            key = function.__code__, id(function.__globals__), _exactly(function.__defaults__ or ()), _exactly(tuple(constants))
            found = known.get(key)
        except (ValueError, TypeError):  # calls itself, or holds what has no hash
            return jit(function)
        if found is None:
            # Its own cells: what the factory gives a name later is not meant.
            cells = tuple(map(CellType, constants))
            copy = FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
            copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
            found = known[key] = jit(copy)
        return found

    return of


class _Remembering:
    """A typing context that knows what a builtin function made of these types before: of three questions it is asked two again."""

    def __init__(self, context, known):
        self._context = context
        self._known = known

    def __getattr__(self, name):
        return getattr(self._context, name)

    def resolve_function_type(self, func, args, kws):
        if kws or not isinstance(func, types.Function) or not all(map(_is_data, args)):
            return self._context.resolve_function_type(func, args, kws)
        key = func, args
        if (found := self._known.get(key)) is None:
            found = self._known[key] = self._context.resolve_function_type(func, args, kws)
        return found


def _is_data(kind):
    """Of a function's own type there is one a kernel: what is known of it is of no use to another, and would keep its code."""
    if isinstance(kind, types.BaseTuple):
        return all(map(_is_data, kind))
    return isinstance(kind, types.Type) and not isinstance(kind, types.Callable)


def reduced(core, translate):
    """(state, *lower) -> the pass managers of a compiler of the package ``core``: ``numba.core``, or its twin in numba-cuda, of the same
    names.

    ``translate`` is the pass that reads bytecode, ``lower`` are those that make LLVM's code of typed functions.
    """
    machinery, untyped, typed, transforms, ssa, utilities = (
        importlib.import_module(f"{core}.{name}")
        for name in ("compiler_machinery", "untyped_passes", "typed_passes", "transforms", "ssa", "ir_utils")
    )
    registered = machinery.register_pass(mutates_CFG=True, analysis_only=False)
    known = {}  # (builtin function, types of its arguments) -> the signature

    @registered
    class Canonical(untyped.IRProcessing):
        """Loops with one edge back each, as the passes after it expect."""

        _name = "canonical"

        def run_pass(self, state):
            state.func_ir.blocks = transforms.canonicalize_cfg(state.func_ir.blocks)
            return True

    @registered
    class Assigned(untyped.ReconstructSSA):
        """Static single assignment."""

        _name = "assigned"

        def run_pass(self, state):
            state.func_ir = ssa.reconstruct_ssa(state.func_ir)
            state.func_ir._definitions = utilities.build_definitions(state.func_ir.blocks)
            return True

    @registered
    class Inference(typed.NopythonTypeInference):
        _name = "inference"

        def run_pass(self, state):
            context, state.typingctx = state.typingctx, _Remembering(state.typingctx, known)
            try:
                return super().run_pass(state)
            finally:
                state.typingctx = context

    @registered
    class WithoutPhis(typed.PreLowerStripPhis):
        _name = "without_phis"

        def run_pass(self, state):
            state.func_ir = self._strip_phi_nodes(state.func_ir)
            state.func_ir._definitions = utilities.build_definitions(state.func_ir.blocks)
            return True

    class Manager(machinery.PassManager):
        """Runs passes, and after each of them nothing: Numba's finds anew where every variable lives."""

        def _runPass(self, index, pss, state):  # noqa: N802
            pss.analysis = self._analysis
            pss.run_initialization(state)
            pss.run_pass(state)
            pss.run_finalizer(state)

    front = (
        translate,
        untyped.FixupArgs,
        Canonical,
        untyped.RewriteSemanticConstants,
        untyped.DeadBranchPrune,
        untyped.GenericRewrites,
        Canonical,
        Assigned,
        Inference,
        WithoutPhis,
    )

    def managers(state, *lower):
        manager = Manager("kernel")
        for step in (*front, *lower):
            manager.add_pass(step, step.__name__)
        manager.finalize()
        return [manager]

    return managers


class _Unoptimised(JITCodeLibrary):
    """LLVM code of one function, to be linked into other code."""

    def _optimize_functions(self, ll_module):
        ll_module.data_layout = self._codegen._data_layout

    def finalize(self):
        self._raise_if_finalized()
        self._finalized = True

    def own(self):
        """Without what it calls."""
        return super()._get_module_for_linking()

    def _get_module_for_linking(self):
        module = self.own().clone()
        _link(module, self._linking_libraries)
        return module


def _link(module, libraries):
    """Those, and what they call, directly or not: each once."""
    seen, todo = set(), list(libraries)
    while todo:
        library = todo.pop()
        if library in seen:
            continue
        seen.add(library)
        if isinstance(library, _Unoptimised):
            todo += library._linking_libraries
            module.link_in(library.own(), preserve=True)
        else:
            module.link_in(library._get_module_for_linking(), preserve=True)


class _Optimised(JITCodeLibrary):
    """A worker's code: what it calls is linked into it here, where Numba links it into every function on the way."""

    def finalize(self):
        _link(self._final_module, self._linking_libraries)
        self._linking_libraries = []
        super().finalize()


class _Lower(Lower):
    """Nothing in a kernel is counted: it holds numbers, Vecs, pointers and tuples of them."""

    def incref(self, typ, value):
        pass

    def decref(self, typ, value):
        pass

    def alloca_lltype(self, name, lltype, datamodel=None):
        return cgutils.alloca_once(self.builder, lltype, name=name)  # Numba's asks LLVM for the size, for a debugger


@register_pass(mutates_CFG=True, analysis_only=False)
class _PartLowering(typed_passes.BaseNativeLowering):
    _name = "part_lowering"
    lowering_class = _Lower

    def run_pass(self, state):
        state.library = _Unoptimised(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)
        state.cr.fndesc.typemap = state.cr.fndesc.calltypes = None  # nobody asks again, and interned functions are kept
        key = [].append  # callers find the function by its entry point, which must be a builtin and is never called
        state.targetctx.insert_user_function(key, state.cr.fndesc, [state.library])
        state.cr = state.cr._replace(cfunc=key)
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class _WholeLowering(typed_passes.BaseNativeLowering):
    _name = "whole_lowering"
    lowering_class = _Lower

    def run_pass(self, state):
        state.library = _Optimised(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        return super().run_pass(state)


_passes = reduced("numba.core", untyped_passes.TranslateByteCode)


class Part(CompilerBase):
    """Of a function that is inlined into others: it cannot be called from Python."""

    def define_pipelines(self):
        return _passes(self.state, _PartLowering, typed_passes.NoPythonBackend)


class Whole(CompilerBase):
    """Of a worker."""

    def define_pipelines(self):
        return _passes(self.state, _WholeLowering, typed_passes.NoPythonBackend)
