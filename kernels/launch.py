"""Workers, and the one driver that runs them.

A *worker* is a serial C function ``worker(args, start, stop)``: it does jobs start..stop (planes, bands of rows, images) of one
operation.  ``args`` is a flat int64 array of addresses, sizes and the bits of numbers.  A worker trusts its arguments, allocates nothing
and returns nothing.  ``launch`` spreads the jobs over threads.

Measured: a worker compiles in 0.4 to 0.8 s, and is small enough that hundreds of specialisations are affordable.
"""

import contextlib
import ctypes
import functools
import os
import struct
import threading

import numba
from llvmlite import ir
from numba import njit, prange, types
from numba.core import ccallback, cgutils
from numba.extending import intrinsic
from numba.np.ufunc import parallel

from .compile import cache

_lock = threading.Lock()


@intrinsic
def _call(tyctx, worker, args, start, stop):
    def codegen(ctx, b, sig, values):
        i64 = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [i64] * 3)
        b.call(b.inttoptr(values[0], kind.as_pointer()), values[1:])
        return ctx.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def _take(tyctx, threads):
    """numba.set_num_threads by the symbol of its layer: in Numba's own a cached function keeps the address that it had in one process."""

    def codegen(ctx, b, sig, values):
        i32 = ir.IntType(32)
        function = cgutils.get_or_insert_function(b.module, ir.FunctionType(ir.VoidType(), [i32]), "set_num_threads")
        b.call(function, [b.trunc(values[0], i32)])
        return ctx.get_dummy_value()

    return types.void(types.int64), codegen


@contextlib.contextmanager
def _openmp_first():
    """Numba takes TBB's threads where it finds them, as beside OpenVINO, and OpenMP's else.  But PyTorch's parallel loops are OpenMP's,
    whose threads spin on after each: max 2x2 s2 of 8x64x112x112 on two cores, after a copy by PyTorch, 1.3 and 0.65 ms."""
    before = numba.config.THREADING_LAYER_PRIORITY
    if "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
        numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
    try:
        yield
    finally:
        numba.config.THREADING_LAYER_PRIORITY = before


# Packed arguments travel as the address of their bytes, as to a worker.
_RUN = ctypes.CFUNCTYPE(None, ctypes.c_char_p, *[ctypes.c_int64] * 3)


@functools.cache
def _driver():
    """(args, worker's address, jobs, threads), compiled, and whether its threading layer lets two Python threads in at once.

    A C function, as workers are, not one of Numba's: 2 cores, us a launch, after a call of little and after one that filled the caches,
    3.4 and 11 where Numba's, with an array for ``args`` and a count of threads set from Python, took 4.9 and 21.
    """

    @njit(parallel=True)
    def spread(args, worker, jobs, grain):
        for chunk in prange((jobs + grain - 1) // grain):
            _call(worker, args, chunk * grain, min(jobs, (chunk + 1) * grain))

    def run(args, worker, jobs, threads):
        _take(threads)
        spread(args, worker, jobs, (jobs + threads - 1) // threads)

    with _openmp_first():
        parallel._launch_threads()
    compiled = ccallback.CFunc(run, ((types.int64,) * 4, types.void), {}, {})
    compiled._cache = cache("launch.run", "run(args, worker, jobs, threads)", __file__)
    compiled.compile()
    return _RUN(compiled.address), compiled, numba.threading_layer() != "workqueue"


def start():
    """Compile the driver and start its threads, once.  OpenMP's count of threads in this process may change: the caller restores it."""
    _driver()


def reentrant():
    """Whether the threading layer lets two Python threads in at once; ``launch`` locks one that does not."""
    return _driver()[2]


def started():
    """Whether ``start`` has run in this process."""
    return _driver.cache_info().currsize > 0


def bits(value, dtype):
    """A number as the int64 slot that ``simd.numbers`` reads; dtype is its name."""
    return struct.unpack("<q", struct.pack("<d", value) if dtype == "float64" else struct.pack("<fi", value, 0))[0]


@functools.cache
def packer(count):
    """(``count`` int64 values) -> the bytes that a worker's ``args`` points to.  0.15 us where struct.pack with a format takes 0.5."""
    return struct.Struct(f"{count}q").pack


def pack(*values):
    """int64 values as the bytes that a worker's ``args`` points to."""
    return packer(len(values))(*values)


def share(jobs, threads):
    """(threads that take part, jobs of each but the last) of a ``launch``: job j is done by the thread j // share(...)[1]."""
    threads = max(1, min(threads, jobs, numba.config.NUMBA_NUM_THREADS))
    return threads, -(-jobs // threads)


def launch(worker, jobs, args, threads=1):
    """Run jobs 0..jobs-1 of a worker on up to ``threads`` threads; args are packed.

    The GIL is released.  Safe from several Python threads at once: the workqueue layer, which would end the process, is locked.
    """
    if threads <= 1 or jobs <= 1:
        worker.call(args, 0, jobs)
        return
    run, _, several = _driver()
    threads, _ = share(jobs, threads)
    if several:
        run(args, worker.address, jobs, threads)
    else:
        with _lock:
            run(args, worker.address, jobs, threads)
