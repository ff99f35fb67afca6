"""Activations against torch over the float32 range: values, derivatives, slopes told by results; and the shapes they declare."""

import functools
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from fastpool.kernels.activation import ACTIVATIONS
from fastpool.kernels.compile import WORKER, specialised
from fastpool.kernels.cpu.number import compiled
from fastpool.kernels.launch import bits
from fastpool.kernels.simd import load, native_lanes, numbers, pointer, store
from numba import cfunc, float32, float64
from scipy.special import ndtr
from test_code import DOUBLE
from test_simd import run

from fastpool import activations

PARAMETERS = {
    "leaky_relu": [(0.01,), (0.5,), (1.5,), (0.0,), (-0.5,), (1.0,)],
    "prelu": [(0.25,), (-0.1,)],
    "rrelu": [(1 / 8, 1 / 3), (-0.5, 0.25)],
    "threshold": [(0.5, -2.0), (0.0, 0.0), (-1.0, -1.0), (1.0, 1.5), (-1.0, 0.25), (0.5, 0.0)],
    "elu": [(1.0,), (0.5,), (0.0,), (-1.0,)],
    "celu": [(1.0,), (0.3,), (-2.0,)],
    "softplus": [(1.0, 20.0), (2.5, 20.0), (0.5, 3.0), (-1.0, 20.0)],
    "hardtanh": [(-1.0, 1.0), (0.0, math.inf), (-math.inf, 0.0), (-math.inf, math.inf), (0.5, 2.0)],
    "softshrink": [(0.5,), (0.0,), (1.25,)],
    "hardshrink": [(0.5,), (0.0,), (-1.0,)],
}
CASES = [(name, p) for name, of in ACTIVATIONS.items() for p in PARAMETERS.get(name, [tuple(of.defaults.values())])]
cases = pytest.mark.parametrize(("name", "p"), CASES, ids=str)
FLOATS = {np.float32: float32, np.float64: float64}
dtypes = pytest.mark.parametrize("dtype", FLOATS)

ARITHMETIC = {name for name in ACTIVATIONS if ACTIVATIONS[name].shape(*PARAMETERS.get(name, [()])[0]).ordered} | {"hardswish"}
"""Those without a function of kernels/elementary.py: torch's results, bit for bit."""


class Source(NamedTuple):
    """A constant of the kernel below: its own text."""

    name: str = "test_activation"
    source: str = __file__


@specialised
def evaluated(this, activation, dtype, lanes):
    """value, derivative and, where there is one, slope of value, side by side."""
    L, count = lanes, len(activation.defaults)
    value, derivative = compiled(activation.value), compiled(activation.derivative)
    told = activation.slope is not None
    slope = compiled(activation.slope) if told else None

    def kernel(args, start, stop):
        x, y, d, s, n = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype), pointer(args, 3, dtype), args[4]
        p = numbers(args, 5, count, dtype, L)
        for at in range(0, n, L):
            v = load(x, at, L)
            store(y, at, value(v, p))
            store(d, at, derivative(v, p))
            if told:
                store(s, at, slope(value(v, p), p))

    return kernel


def by_kernel(name, p, x):
    """value, derivative, slope of the value (0 where there is none) of an array."""
    dtype = FLOATS[x.dtype.type]
    lanes = native_lanes(dtype)
    padded = np.append(x, np.zeros(-x.size % lanes, x.dtype))
    found = [np.zeros_like(padded) for _ in range(3)]
    run(evaluated(Source(), ACTIVATIONS[name], dtype, lanes), padded, *found, padded.size, *(bits(v, x.dtype.name) for v in p))
    return [a[: x.size] for a in found]


@functools.cache
def span(dtype):
    """Finite numbers of every exponent, runs of neighbours at corners, minima and where functions saturate, evenly spaced ones; sorted."""
    info = np.finfo(dtype)
    unsigned = f"u{np.dtype(dtype).itemsize}"
    fraction = np.linspace(0, 2**info.nmant - 1, 200 if dtype is np.float32 else 20).astype(unsigned)
    heads = np.arange(2**info.nexp - 1, dtype=unsigned) << info.nmant
    positive = (heads[:, None] | fractions_near_both_ends(fraction)).ravel().view(dtype)
    corners = [c for of in CASES for c in (*of[1], *minima(*of))] + [
        0,
        1,
        -1,
        3,
        -3,
        6,
        0.5,
        1.5,
        2,
        4,
        5.5,
        9,
        17,
        20,
        88.7,
        -87.3,
        -103.9,
    ]
    corners = np.array([c for c in corners if math.isfinite(c)], dtype)
    around = np.concatenate([neighbours(c) for c in np.concatenate([corners, -corners])])
    even = np.linspace(-25, 25, 200_001).astype(dtype)
    return np.unique(np.concatenate([positive, -positive, around, even]))


def fractions_near_both_ends(fraction):
    return np.unique(
        np.concatenate([fraction, fraction[:1] + np.arange(3, dtype=fraction.dtype), fraction[-1:] - np.arange(3, dtype=fraction.dtype)])
    )


def neighbours(c, count=300):
    """So many numbers to either side of c, the next after each other, and as many again at 64 times their distance."""
    steps = np.arange(-count, count + 1, dtype=f"i{c.dtype.itemsize}")
    at = abs(c).view(steps.dtype)
    found = np.concatenate([at + steps, at + 64 * steps])
    return np.copysign(found[found >= 0].view(c.dtype), c)


def minima(name, p):
    shape = ACTIVATIONS[name].shape(*p)
    return [v for v in (shape.minimum, shape.maximum, shape.root) if v is not None]


def by_torch(name, p, x):
    """Values and derivatives of an array, in its dtype."""
    t = torch.tensor(x, requires_grad=True)
    y = activations.on_torch(activations.named("test", name, p), t)
    (d,) = torch.autograd.grad(y.sum(), t)
    return y.detach().numpy(), d.numpy()


def in_bins(x, y, truth, least):
    """The largest |y - truth| in units of truth's last place, or that of ``least`` if it is larger, of each sign and power of two of x."""
    with np.errstate(all="ignore"):
        nearest = truth.astype(y.dtype)
        size = np.spacing(np.maximum(np.abs(nearest), least)).astype(truth.dtype)
        off = np.abs(y.astype(truth.dtype) - truth) / size
    off = np.where((y == nearest) | (np.isnan(y) & np.isnan(nearest)), 0, np.where(np.isnan(off), np.inf, off))
    _, exponent = np.frexp(x)
    bins = np.unique(np.stack([np.sign(x), exponent]), axis=1, return_inverse=True)[1].ravel()
    worst = np.zeros(bins.max() + 1)
    np.maximum.at(worst, bins, off)
    return worst, bins


@cases
def test_values_and_derivatives_are_torchs(name, p):
    """At most twice torch's own error against float64 and one last place, in each power of two; those of arithmetic alone, bit for bit.

    Last places of a derivative below 1 are 1's: torch's own formulas, in float64 too, keep no more of them.
    """
    x = span(np.float32)
    y, d, _ = by_kernel(name, p, x)
    theirs = by_torch(name, p, x)
    if name in ARITHMETIC and name != "rrelu":  # torch takes the middle of its slopes in float64
        np.testing.assert_array_equal(y, theirs[0])
        np.testing.assert_array_equal(d, theirs[1])
        return
    value, derivative = by_torch(name, p, x.astype(np.float64))
    if name == "gelu":  # torch's formula is 0 below -8.3 in float64 too
        value = np.where(np.isfinite(x), x * ndtr(x.astype(np.float64)), value)
    for ours, torchs, truth, least in zip((y, d), theirs, (value, derivative), (np.finfo(np.float32).tiny, np.float32(1)), strict=True):
        mine, bins = in_bins(x, ours, truth, least)
        allowed = 2 * in_bins(x, torchs, truth, least)[0] + 1
        where = (mine > allowed)[bins]
        assert not where.any(), (
            f"{name}{p}: {mine[bins][where].max()} ulp, torch {allowed[bins][where][0] / 2}, at {x[where][:3]}, {ours[where][:3]}"
        )


@cases
def test_float64_is_torchs(name, p):
    x = span(np.float64)
    x = x[(np.abs(x) < 700) & ((x == 0) | (np.abs(x) > 1e-300))]
    y, d, _ = by_kernel(name, p, x)
    values, derivatives = by_torch(name, p, x)
    # GELU's tail subtracts numbers near each other, times x, in torch as here.
    np.testing.assert_allclose(y, values, rtol=4e-15, atol=2e-14)
    # torch's derivatives of these two have constants of float32 in float64.
    np.testing.assert_allclose(d, derivatives, rtol=1e-6 if name in ("celu", "hardsigmoid") else 4e-15, atol=2e-14)


@dtypes
@cases
def test_the_slope_is_the_derivative(name, p, dtype):
    """From y = f(x) as from x: equal where f is piecewise linear, else within the rounding of torch's own formula by y."""
    x = span(dtype)
    _, d, s = by_kernel(name, p, x)
    if ACTIVATIONS[name].slope_for(p) is None:
        return
    if name in ARITHMETIC:
        np.testing.assert_array_equal(s, d)
    else:
        np.testing.assert_allclose(s, d, rtol=1e-5 if dtype is np.float32 else 1e-14, atol=2 * np.finfo(dtype).eps)


@cases
def test_infinities_and_nan(name, p):
    """NaN stays NaN; of infinities what torch's float64 makes."""
    for dtype in FLOATS:
        x = np.array([-np.inf, np.inf, np.nan, -0.0, 0.0] * 16, dtype)
        y, _, _ = by_kernel(name, p, x)
        expected = by_torch(name, p, x.astype(np.float64))[0].astype(dtype)
        np.testing.assert_allclose(y, expected, rtol=1e-6)
        assert np.isnan(y[2])


@cases
def test_on_numpy_numbers(name, p):
    """The same arithmetic in plain Python, which the words of numpy round otherwise."""
    activation = ACTIVATIONS[name]
    for dtype in FLOATS:
        x = np.array([-7.5, -1.5, -0.3, -0.0, 0.0, 0.4, 1.0, 2.0, 6.0, 25.0], dtype)
        y, d, s = by_kernel(name, p, x)
        numbers_of = tuple(map(dtype, p))
        values = [activation.value(v, numbers_of) for v in x]
        assert all(v.dtype == dtype for v in values)
        close = {"rtol": 1e-5, "atol": 1e-6} if dtype is np.float32 else {"rtol": 1e-13, "atol": 1e-14}
        np.testing.assert_allclose(values, y, **close)
        np.testing.assert_allclose([activation.derivative(v, numbers_of) for v in x], d, **close)
        if activation.slope:
            np.testing.assert_allclose([activation.slope(v, numbers_of) for v in y], s, **close)


# Shapes


def falls_at(x, y, slack):
    """Where a next number's value is less by more than ``slack``, of sorted x."""
    with np.errstate(over="ignore"):
        return np.flatnonzero(y[1:] < y[:-1] - slack[1:])


@dtypes
@cases
def test_the_shape_is_what_the_code_does(name, p, dtype):
    """Falls up to the minimum, rises from there: ``ordered`` bit for bit, others up to the rounding that torch's own have."""
    shape, x = ACTIVATIONS[name].shape(*p), span(dtype)
    y, _, _ = by_kernel(name, p, x)
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    # Rounding: of the value, and of x where f is x less something.
    with np.errstate(over="ignore"):
        slack = np.zeros_like(x) if shape.ordered else 4 * np.spacing(np.maximum(np.abs(y), np.minimum(np.abs(x), 8)))
    if name == "softplus":
        slack += math.log1p(math.exp(-p[1])) / abs(p[0])  # what it falls by at its threshold
    for turn, sign in ((shape.minimum, 1), (shape.maximum, -1)):
        if turn is not None:
            above, below = x > turn, x < turn
            assert falls_at(x[above], sign * y[above], slack[above]).size == 0
            assert falls_at(x[below][::-1], sign * y[below][::-1], slack[below][::-1]).size == 0
    at, least = (
        by_kernel(name, p, np.array([0.0 if shape.minimum is None or math.isinf(shape.minimum) else shape.minimum] * 16, dtype))[0][0],
        y.min(),
    )
    if (
        shape.minimum is not None and math.isfinite(shape.minimum) and name != "threshold"
    ):  # whose minimum is not taken: just behind the jump
        assert at <= least + 4 * np.finfo(dtype).eps


@cases
def test_a_shape_without_a_minimum_has_none(name, p):
    """What declares no order has none: it rises, falls and rises again, or the like."""
    shape = ACTIVATIONS[name].shape(*p)
    x = span(np.float32)
    y, _, _ = by_kernel(name, p, x)
    steps = np.sign(np.diff(y[np.isfinite(y)].astype(np.float64)))
    runs = steps[steps != 0]
    changes = np.count_nonzero(np.diff(runs))
    if shape.ordered:
        declared = 0 if shape.rises or shape.falls else 1
        assert changes == declared
    if shape.minimum is None:
        assert changes >= 2


@cases
def test_points_of_the_shape(name, p):
    """The root, the ray above 0, homogeneity and affinity; and none of them is left undeclared."""
    shape = ACTIVATIONS[name].shape(*p)

    def f(x):
        x = np.asarray(x, np.float64)
        return by_kernel(name, p, np.append(x, np.zeros(-x.size % 16)))[0][: x.size]

    x = np.linspace(-9, 9, 1441)
    y = f(x)
    assert (f([0.0])[0] == 0) == shape.fixes_zero
    if shape.root is not None:
        assert f([shape.root])[0] == 0
    elif name != "softplus":
        assert not (f([0.0, math.inf, -math.inf]) == 0).any()
    homogeneous = all(np.allclose(f(c * x), c * y, rtol=1e-12, atol=0) for c in (0.0, 0.37, 2.0, 5.5))
    assert homogeneous == shape.homogeneous
    slopes = y[x > 0] / x[x > 0]
    above = np.ptp(slopes) < 1e-12 and slopes[0] >= 0 and (y[x <= 0] <= 0).all()
    assert above == (shape.slope_above is not None)
    if above:
        assert slopes[0] == pytest.approx(shape.slope_above)
    affine = np.ptp(np.diff(y)) < 1e-12
    assert affine == (shape.affine is not None)
    if affine:
        np.testing.assert_array_equal(y, shape.affine[0] * x + shape.affine[1])


def test_every_elementwise_activation_of_torch_is_here():
    """All of torch.nn's modules of activations, but those that look at more than one number."""
    more = {"GLU", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin", "LogSoftmax", "Module", "Parameter", "Tensor"}
    from torch.nn.modules import activation as module

    assert {getattr(module, name) for name in module.__all__} - {getattr(module, n, None) for n in more} == set(activations.MODULES)
    assert {name for name, _ in activations.MODULES.values()} | {"gelu_tanh"} == set(ACTIVATIONS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_defaults_are_torchs(name):
    of = ACTIVATIONS[name]
    assert (of.name, repr(of)) == (name, f"Activation({name!r})")
    if None in of.defaults.values():
        return
    (module,) = [m for m, (of_module, _) in activations.MODULES.items() if of_module == name.removesuffix("_tanh")]
    found = activations.of("test", module(approximate="tanh") if name == "gelu_tanh" else module().eval().requires_grad_(False))
    assert (found.name, found.parameters) == (name, tuple(of.defaults.values()))


@pytest.mark.parametrize("name", [name for name, of in ACTIVATIONS.items() if of.switches])
def test_a_switch_is_off_or_on(name):
    """By the code, whatever the number and the parameters: poolings save no more than which."""
    of, x = ACTIVATIONS[name], np.array([0.0, -0.0, 0.3, -0.3, 1e-40, 7, -7, np.inf, -np.inf, np.nan], np.float32)
    for p in ([0.3, 0.7], [-1, 2], [0, 0]):
        parameters = tuple(map(np.float32, p[: len(of.defaults)]))
        assert {float(of.derivative(v, parameters)) for v in x} <= {0.0, 1.0}


def test_the_source_is_the_file_it_is_written_in():
    """Part of what a compiled kernel is kept by."""
    for activation in ACTIVATIONS.values():
        assert activation.value.__name__ in Path(activation.sources[0]).read_text()
        assert activation.derivative.__code__.co_filename == activation.sources[0]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_float32_code_holds_no_float64(name):
    factory = evaluated.__wrapped__
    code = cfunc(WORKER, error_model="numpy")(factory(Source(), ACTIVATIONS[name], float32, native_lanes(float32)))._library.get_asm_str()
    body = code[: code.index("Lfunc_end0")]  # what follows is Numba's wrapper, which calls it
    assert not re.findall(f".*(?:{DOUBLE}).*", body)
