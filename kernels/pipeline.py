"""Numba's compiler, cut down to what a kernel needs.

A kernel is one worker and some thirty small functions that are all inlined into it.  Numba's own pipeline optimises each of them,
optimises it again in everything that calls it, and writes machine code for each, which nobody runs.  Here such a function stays as it
was lowered (``Part``) until the worker that it ends in is linked and optimised as one (``Whole``).  Left out is what no kernel has a use
for: ``with`` blocks, array expressions, closures, reference counts and the lives of variables.  The machine code is as quick: of
100 kernels 44 are the same to the letter, others but for an error's path that LLVM now sees is never taken, or for its order; 196 times of
forward and backward are 1.00 of what they were in the geometric mean.

Measured, CPU seconds for 100 kernels of pooling and convolution: Numba's pipeline of one optimisation a kernel 0.77 each, 0.57 without
counts and lives, with each part linked once, and with builtin functions' types remembered, 0.49 with no garbage collected meanwhile.
"""

import contextlib
import gc

from numba.core import cgutils, transforms, typed_passes, types, untyped_passes
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase
from numba.core.compiler_machinery import PassManager, register_pass
from numba.core.ir_utils import build_definitions
from numba.core.lowering import Lower
from numba.core.ssa import reconstruct_ssa


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


_KNOWN = {}
"""(builtin function, types of its arguments) -> the signature."""


class _Remembering:
    """A typing context that knows what a builtin function made of these types before: of three questions it is asked two again."""

    def __init__(self, context):
        self._context = context

    def __getattr__(self, name):
        return getattr(self._context, name)

    def resolve_function_type(self, func, args, kws):
        if kws or not isinstance(func, types.Function) or not all(map(_is_data, args)):
            return self._context.resolve_function_type(func, args, kws)
        key = func, args
        if (found := _KNOWN.get(key)) is None:
            found = _KNOWN[key] = self._context.resolve_function_type(func, args, kws)
        return found


def _is_data(kind):
    """Of a function's own type there is one a kernel: what is known of it is of no use to another, and would keep its code."""
    if isinstance(kind, types.BaseTuple):
        return all(map(_is_data, kind))
    return isinstance(kind, types.Type) and not isinstance(kind, types.Callable)


@register_pass(mutates_CFG=True, analysis_only=False)
class _Canonical(untyped_passes.IRProcessing):
    """Loops with one edge back each, as the passes after it expect."""

    _name = "canonical"

    def run_pass(self, state):
        state.func_ir.blocks = transforms.canonicalize_cfg(state.func_ir.blocks)
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class _Assigned(untyped_passes.ReconstructSSA):
    """Static single assignment."""

    _name = "assigned"

    def run_pass(self, state):
        state.func_ir = reconstruct_ssa(state.func_ir)
        state.func_ir._definitions = build_definitions(state.func_ir.blocks)
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class _Inference(typed_passes.NopythonTypeInference):
    _name = "inference"

    def run_pass(self, state):
        context, state.typingctx = state.typingctx, _Remembering(state.typingctx)
        try:
            return super().run_pass(state)
        finally:
            state.typingctx = context


@register_pass(mutates_CFG=True, analysis_only=False)
class _WithoutPhis(typed_passes.PreLowerStripPhis):
    _name = "without_phis"

    def run_pass(self, state):
        state.func_ir = self._strip_phi_nodes(state.func_ir)
        state.func_ir._definitions = build_definitions(state.func_ir.blocks)
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class _PartLowering(typed_passes.BaseNativeLowering):
    _name = "part_lowering"
    lowering_class = _Lower

    def run_pass(self, state):
        state.library = _Unoptimised(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)
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


class _Manager(PassManager):
    """Runs passes, and after each of them nothing: Numba's finds anew where every variable lives."""

    def _runPass(self, index, pss, state):  # noqa: N802
        pss.analysis = self._analysis
        pss.run_initialization(state)
        pss.run_pass(state)
        pss.run_finalizer(state)


def _passes(state, lowering):
    manager = _Manager("kernel")
    for step in (
        untyped_passes.TranslateByteCode,
        untyped_passes.FixupArgs,
        _Canonical,
        untyped_passes.RewriteSemanticConstants,
        untyped_passes.DeadBranchPrune,
        untyped_passes.GenericRewrites,
        _Canonical,
        _Assigned,
        _Inference,
        _WithoutPhis,
        typed_passes.AnnotateTypes,
        lowering,
        typed_passes.NoPythonBackend,
    ):
        manager.add_pass(step, step.__name__)
    manager.finalize()
    return [manager]


class Part(CompilerBase):
    """Of a function that is inlined into others: it cannot be called from Python."""

    def define_pipelines(self):
        return _passes(self.state, _PartLowering)


class Whole(CompilerBase):
    """Of a worker."""

    def define_pipelines(self):
        return _passes(self.state, _WholeLowering)
