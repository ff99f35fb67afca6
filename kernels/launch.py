"""Workers, and the one driver that runs them.

A *worker* is a serial C function ``worker(args, start, stop)``: it does jobs start..stop (planes, bands of rows, images) of one
operation.  ``args`` is a flat int64 array of addresses, sizes and the bits of numbers.  A worker trusts its arguments, allocates nothing
and returns nothing.  ``launch`` spreads the jobs over threads.

Measured: a worker compiles in 0.4 to 0.8 s, and is small enough that hundreds of specialisations are affordable.
"""

import contextlib
import functools
import os
import struct
import threading

import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic
from numba.np.ufunc import parallel

from .compile import cache

_lock = threading.Lock()


@intrinsic
def _call(tyctx, address, args, start, stop):
    def codegen(ctx, b, sig, values):
        i64 = ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [i64.as_pointer(), i64, i64])
        data = ctx.make_array(sig.args[1])(ctx, b, values[1]).data
        b.call(b.inttoptr(values[0], kind.as_pointer()), [data, values[2], values[3]])
        return ctx.get_dummy_value()

    return types.void(types.int64, args, types.int64, types.int64), codegen


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


@functools.cache
def _driver():
    """The parallel driver, compiled, and whether its threading layer lets two Python threads in at once."""

    @njit(parallel=True, nogil=True)
    def run(address, args, jobs, grain):
        for chunk in prange((jobs + grain - 1) // grain):
            _call(address, args, chunk * grain, min(jobs, (chunk + 1) * grain))

    run._cache = cache("launch.run", "run(address, args, jobs, grain)", __file__)
    with _openmp_first():  # compiling starts the threads, too
        run.compile(types.void(types.int64, types.int64[::1], types.int64, types.int64))
        parallel._launch_threads()
    return run, numba.threading_layer() != "workqueue"


def start():
    """Compile the driver and start its threads, once.  OpenMP's count of threads in this process may change: the caller restores it."""
    _driver()


def reentrant():
    """Whether the threading layer lets two Python threads in at once; ``launch`` locks one that does not."""
    return _driver()[1]


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
    run, several = _driver()
    threads, grain = share(jobs, threads)
    if several:
        _run(run, worker.address, args, jobs, threads, grain)
    else:
        with _lock:
            _run(run, worker.address, args, jobs, threads, grain)


def _run(run, address, args, jobs, threads, grain):
    numba.set_num_threads(threads)
    run(address, np.frombuffer(bytearray(args), np.int64), jobs, grain)
