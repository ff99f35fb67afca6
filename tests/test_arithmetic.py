"""The arithmetic files mean the same on every target: on plain numpy scalars, and compiled into a CUDA kernel without a GPU."""

import contextlib
import importlib.metadata
import math
import re
import types

import numpy as np
import pytest
import reference
import torch
from fastpool.kernels import random
from fastpool.kernels.pool import KINDS

WINDOWS = [
    [1.0, 3.0, 2.0, 3.0],
    [-1.0, -2.0, -0.5, -2.0],
    [0.0, -0.0, 0.0, -1.0],
    [0.5],
    [2.0, math.nan, 5.0, math.nan, 1.0],
    [-math.inf, -math.inf],
    [math.inf, 1.0, math.inf],
    [-3.0, 3.0, 0.25, -0.125, 3.0, 7.5, -7.5, 0.0, 1.0],
]
DTYPES = [np.float32, np.float64]


def states(kind, x, p, u):
    """The state after each tap of one window, on numpy scalars."""
    zero = x.dtype.type(0)
    taps = [np.int32(k) for k in range(len(x))]
    if kind.selects and kind.draws:
        total = zero
        for v in x:
            total = kind.survey(total, v)
        state = kind.init(zero, taps[0], total, x.dtype.type(u))
    else:
        state = kind.init(zero, taps[0]) if kind.selects else kind.init(zero)
    for v, tap in zip(x, taps, strict=True):
        state = kind.accumulate(state, v, tap) if kind.selects else kind.accumulate(state, v, p)
    return state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_on_numpy_scalars(kind, dtype):
    """One window at a time: forward, and the share each tap gets, against the reference and its derivative by torch."""
    kind, u = KINDS[kind], 0.4
    p = reference.PARAMETERS.get(kind.name, ())
    close = {"rtol": 1e-5 if dtype is np.float32 else 1e-12, "equal_nan": True}
    for values in WINDOWS:
        x = np.array(values, dtype)
        truth = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        inside, size = torch.ones(len(values), dtype=torch.bool), dtype(len(values))
        extra = (u,) if kind.name == "stochastic" else p
        numbers = tuple(map(dtype, p))
        with np.errstate(all="ignore"):
            state = states(kind, x, numbers, u)
            expected = reference.REFERENCE[kind.name](truth.expand(2, -1), inside, torch.tensor(float(size)), len(values), *extra)
            if kind.selects:
                assert np.array_equal(state[0], expected[0][0].item(), equal_nan=True), values
                if np.isfinite(x).all() or kind.name != "stochastic":
                    assert state[1] == expected[1][0], values
                continue
            y = kind.finalise(state, size, size, numbers)
            np.testing.assert_allclose(y, expected[0].item(), **close)
            assert y.dtype == dtype
            if not np.isfinite(x).all() or y == 0 or 0 in values:
                continue
            expected[0].backward()
            residue = kind.residue(state) if kind.residue else None
            shares = [kind.share(dtype(1), v, y, residue, size, size, numbers) for v in x]
            np.testing.assert_allclose(shares, truth.grad, **close)
            assert all(s.dtype == dtype for s in shares)
            if kind.gives:
                given = kind.gives(dtype(1), y, residue, size, size, numbers)
                shares = [kind.takes(v, given, numbers) if kind.takes else given for v in x]
                np.testing.assert_allclose(shares, truth.grad, **close)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if kind.combine])
def test_combine_is_accumulate_in_any_split(kind):
    """Two parts of a window, their taps in order or interleaved, combine to the state of the whole."""
    kind = KINDS[kind]
    p = tuple(map(np.float64, reference.PARAMETERS.get(kind.name, ())))
    with np.errstate(all="ignore"):
        for values in WINDOWS:
            x = np.array(values)
            whole = states(kind, x, p, 0)
            for odd in (np.arange(len(x)) % 2 == 1, np.arange(len(x)) >= len(x) // 2):
                parts = []
                for chosen in (~odd, odd):
                    state = kind.init(np.float64(0), np.int32(0)) if kind.selects else kind.init(np.float64(0))
                    for k in np.flatnonzero(chosen):
                        state = kind.accumulate(state, x[k], np.int32(k) if kind.selects else p)
                    parts.append(state)
                for merged in (kind.combine(*parts), kind.combine(*parts[::-1])):
                    np.testing.assert_allclose(np.array(merged), np.array(whole), rtol=1e-14, equal_nan=True)


TOOLCHAIN = ("numba-cuda", "nvidia-cuda-nvrtc", "nvidia-nvvm")


def installed(name):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(name))
    return False


@contextlib.contextmanager
def compiling_for(cc):
    """Device functions compile for this compute capability, with no driver and no device."""
    from numba.cuda import dispatcher

    asked = dispatcher.get_current_device
    dispatcher.get_current_device = lambda: types.SimpleNamespace(compute_capability=cc)
    try:
        yield
    finally:
        dispatcher.get_current_device = asked


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_to_ptx(kind, dtype):
    """The same functions inside a toy kernel, a window a thread, for sm_80; float32 arithmetic stays float32."""
    missing = [name for name in TOOLCHAIN if not installed(name)]
    if missing:
        pytest.skip(f"the CUDA toolchain's wheels are not installed ({', '.join(missing)}): pip install 'fastpool[cuda]'")
    import numba
    from fastpool.kernels.cuda.number import compiled
    from numba import cuda, int32, uint32

    kind, number = KINDS[kind], getattr(numba, dtype)
    init, accumulate, neutral = compiled(kind.init), compiled(kind.accumulate), compiled(kind.neutral)
    pointer, taps = numba.types.CPointer(number), 4

    if kind.selects:
        uniform, gradient = compiled(random.uniform), compiled(kind.gradient())
        survey, draws = compiled(kind.survey) if kind.survey else None, kind.draws

        def toy(x, gy, y, gx, p, n):
            t = cuda.grid(1)
            if t < n:
                zero = number(0)
                if draws:
                    total = neutral(zero)
                    for k in range(taps):
                        total = survey(total, x[t * taps + k])
                    state = init(zero, int32(0), total, uniform(uint32(t), uint32(0), uint32(1), uint32(2), zero))
                else:
                    state = init(zero, int32(0))
                for k in range(taps):
                    state = accumulate(state, x[t * taps + k], int32(k))
                y[t] = state[0]
                for k in range(taps):
                    gx[t * taps + k] = gradient(gy[t], state[1], int32(k))

    else:
        finalise, share = compiled(kind.finalise), compiled(kind.share)
        read = cuda.jit((lambda p: (), lambda p: (p[0],), lambda p: (p[0], p[1]))[len(kind.parameters)], device=True)
        residue = compiled(kind.residue) if kind.residue else None

        def toy(x, gy, y, gx, p, n):
            t = cuda.grid(1)
            if t < n:
                parameters = read(p)
                state = init(number(0))
                for k in range(taps):
                    state = accumulate(state, x[t * taps + k], parameters)
                y[t] = finalise(state, number(taps), number(taps), parameters)
                rest = residue(state) if residue is not None else y[t]
                for k in range(taps):
                    gx[t * taps + k] = share(gy[t], x[t * taps + k], y[t], rest, number(taps), number(taps), parameters)

    with compiling_for((8, 0)):
        ptx, _ = cuda.compile_ptx(toy, (*[pointer] * 5, int32), cc=(8, 0))
    assert ".target sm_80" in ptx
    assert len(re.findall(rf"st\.(?:global\.)?(?:f|b){dtype[5:]}", ptx)) >= 2
    if dtype == "float32":
        assert ".f64" not in ptx
