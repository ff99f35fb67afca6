"""How an arithmetic file's functions are compiled for CPU kernels: on ``Vec``, inlined by LLVM into the kernel that calls them."""

import functools

from numba import njit

from .. import elementary, number, simd
from ..pipeline import Part, interned

# forceinline leaves inlining to LLVM: a backward nest compiles in 0.5 s where Numba's own inline="always" took 0.9.
jitable = interned(njit(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy", pipeline_class=Part))

_BUILT = {word.__name__: getattr(elementary, word.__name__) for word in number.MATHEMATICS}
WORDS = {word.__name__: getattr(simd, word.__name__) for word in number.WORDS + number.BUILDING if word.__name__ not in _BUILT}
WORDS |= {name: number.retarget(function, WORDS, jitable) for name, function in _BUILT.items()}


def inlined(nest, *constants):
    """The worker of another nest, for one that calls it."""
    return jitable(nest.__wrapped__(*constants))


@functools.cache
def compiled(function):
    """A function of an arithmetic file, for Vecs."""
    return number.retarget(function, WORDS, jitable)
