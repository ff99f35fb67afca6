"""The arithmetic files mean the same on every target: on plain numpy scalars here; CUDA's are in test_cuda.py."""

import math

import numpy as np
import pytest
import reference
import torch
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
