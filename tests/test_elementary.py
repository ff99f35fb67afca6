"""The words of kernels/elementary.py: how far from the truth, at their edges, and in what instructions."""

import functools
import itertools
import platform
import re

import mpmath
import numpy as np
import pytest
import torch
from fastpool.kernels import elementary
from fastpool.kernels.compile import WORKER, specialised
from fastpool.kernels.cpu.number import WORDS
from fastpool.kernels.simd import load, native_lanes, pointer, store
from numba import cfunc, float32, float64
from scipy.special import erf, ndtr
from test_simd import assert_same_bits, run

FLOATS = {np.float32: float32, np.float64: float64}

ULP = {"exp": 0.8, "log": 0.51, "power": 0.9, "expm1": 1.1, "log1p": 0.67, "tanh": 0.96, "erf": 1.26, "decay": 1.03}
"""The largest error that kernels/elementary.py claims, in units of the last place of the nearest result."""
ULP_64 = ULP | {"erf": 2.3}
UNARY = [name for name in ULP if name not in ("power", "decay")]
NDTR = 0.74
"""The same of ndtr, in units of the last place of 1."""

SCIPY = {"erf": erf, "ndtr": ndtr}

dtypes = pytest.mark.parametrize("dtype", FLOATS)


@specialised
def unary(of, dtype, lanes):
    L, word = lanes, WORDS[of]

    def kernel(args, start, stop):
        x, y, n = pointer(args, 0, dtype), pointer(args, 1, dtype), args[2]
        for at in range(0, n, L):
            store(y, at, word(load(x, at, L)))

    return kernel


@specialised
def binary(of, dtype, lanes):
    L, word = lanes, WORDS[of]

    def kernel(args, start, stop):
        x, p, y, n = pointer(args, 0, dtype), pointer(args, 1, dtype), pointer(args, 2, dtype), args[3]
        for at in range(0, n, L):
            store(y, at, word(load(x, at, L), load(p, at, L)))

    return kernel


def computed(name, *operands, lanes=None):
    """word(*operands), arrays of one length, by a kernel."""
    n, dtype = operands[0].size, FLOATS[operands[0].dtype.type]
    lanes = lanes or native_lanes(dtype)
    padded = [np.append(x, np.ones(-n % lanes, x.dtype)) for x in operands]
    y = np.empty_like(padded[0])
    run((unary if len(operands) == 1 else binary)(name, dtype, lanes), *padded, y, y.size)
    return y[:n]


def errors(y, truth):
    """|y - truth| in units of the last place of truth rounded to y's dtype; 0 where y is that, inf where y is NaN or inf alone."""
    with np.errstate(all="ignore"):
        nearest = truth.astype(y.dtype)
        difference = np.abs(y.astype(truth.dtype) - truth) / np.spacing(np.abs(nearest)).astype(truth.dtype)
    same = (y == nearest) | (np.isnan(y) & np.isnan(nearest))
    return np.where(same & ~np.isfinite(difference), 0, np.where(np.isnan(difference), np.inf, difference))


def exact(name, *operands):
    """The truth of float32 operands, in float64."""
    with np.errstate(all="ignore"):
        function = SCIPY.get(name) or getattr(np, name)
        return function(*(x.astype(np.float64) for x in operands))


def edges(dtype):
    """Both signs of every exponent with the fractions at either end and in the middle: zeros, subnormals, infinities and NaN too."""
    bits, fraction, top = {np.float32: (32, 23, 0x7FFFFF), np.float64: (64, 52, 0xFFFFFFFFFFFFF)}[dtype]
    fractions = np.array([0, 1, 2, top // 2, top // 2 + 1, top // 3, 0x3504F3 << (fraction - 23), top - 1, top], np.uint64)
    heads = np.arange(2 ** (bits - fraction), dtype=np.uint64) << np.uint64(fraction)
    return (heads[:, None] | fractions).ravel().astype(f"u{bits // 8}").view(dtype)


def near_the_ends(name, dtype):
    """Around 0, 1 and where the result over- or underflows."""
    ends = {
        "exp": np.log(np.array([np.finfo(dtype).max, np.finfo(dtype).tiny, np.finfo(dtype).smallest_subnormal], dtype)),
        "log": [1, 2, 0.5],
        "expm1": [np.log(np.finfo(dtype).max), np.log(0.5), np.log(2), -18],
        "log1p": [-1, -0.5],
        "tanh": [-1, 10],
        "erf": [-1, 4],
    }
    centres = np.append(np.array(ends[name], dtype), [0, 1])
    return (
        (centres[:, None] + np.linspace(-1, 1, 2001, dtype=dtype) * np.array([1, 1e-3, 1e-6], dtype)[:, None, None]).astype(dtype).ravel()
    )


def not_negative(dtype):
    """Every size, and more of those that are neither small nor large."""
    rng = np.random.default_rng(0)
    sizes = [np.abs(edges(dtype)), *(rng.uniform(0, end, 2_000_000).astype(dtype) for end in (110, 12, 2))]
    return np.concatenate([x[~np.isnan(x)] for x in sizes])


def test_float32_decay_over_its_whole_range():
    x = not_negative(np.float32)
    found = errors(computed("decay", x), exact("exp", -x))
    worst = found.argmax()
    assert found[worst] <= ULP["decay"], f"decay({x[worst]!r}) is off by {found[worst]} ulp"


def test_float32_ndtr_over_its_whole_range():
    x = not_negative(np.float32)
    x = np.concatenate([x, -x])
    found = np.abs(computed("ndtr", x) - ndtr(x.astype(np.float64))) / np.finfo(np.float32).eps
    worst = found.argmax()
    assert found[worst] <= NDTR, f"ndtr({x[worst]!r}) is off by {found[worst]} of the last place of 1"


@pytest.mark.parametrize("name", UNARY)
def test_float32_over_its_whole_range(name):
    strided = np.arange(0, 2**32, 431, np.uint32).view(np.float32)  # 10 million
    x = np.concatenate([strided, edges(np.float32), near_the_ends(name, np.float32)])
    found = errors(computed(name, x), exact(name, x))
    worst = found.argmax()
    assert found[worst] <= ULP[name], f"{name}({x[worst]!r}) is off by {found[worst]} ulp"


def test_float32_power_over_results_of_every_size():
    rng = np.random.default_rng(0)
    wide = np.exp(rng.uniform(-103, 88.7, 3_000_000))
    near = 1 + rng.uniform(-0.3, 0.5, 3_000_000)
    x = np.concatenate([wide, near]).astype(np.float32)
    x = x[x != 1]
    p = (rng.uniform(-104, 89, x.size) / np.log(x.astype(np.float64))).astype(np.float32)
    truth = exact("power", x, p)
    found = errors(computed("power", x, p), truth)
    worst = found.argmax()
    assert found[worst] <= ULP["power"], f"{x[worst]!r} ** {p[worst]!r} is off by {found[worst]} ulp"
    theirs = errors(torch.pow(torch.from_numpy(x), torch.from_numpy(p)).numpy(), truth)
    assert found[worst] <= 2 * theirs.max()


def precise_errors(name, y, *operands):
    """``errors`` of finite float64 results against 120 bits."""
    function = getattr(mpmath, name)
    with mpmath.workprec(120):
        truth = [function(*map(mpmath.mpf, map(float, values))) for values in zip(*operands, strict=True)]
        return [float(abs(mpmath.mpf(float(a)) - t) / mpmath.mpf(float(np.spacing(abs(float(t)))))) for a, t in zip(y, truth, strict=True)]


def test_float64():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-745, 709.7, 4000), rng.normal(size=2000), rng.normal(size=2000) * 1e-3])
    assert max(precise_errors("exp", computed("exp", x), x)) <= ULP["exp"]
    x = np.concatenate([np.exp(rng.uniform(-744, 709, 4000)), rng.uniform(0.5, 2, 2000), 1 + rng.normal(size=2000) * 1e-5])
    assert max(precise_errors("log", computed("log", x), x)) <= ULP["log"]
    around = np.concatenate([rng.uniform(-6.2, 6.2, 4000), rng.uniform(-1.05, 1.05, 4000), rng.normal(size=2000) * 1e-3])
    for name, more in (("expm1", rng.uniform(-40, 709, 2000)), ("log1p", np.exp(rng.uniform(-700, 709, 2000))), ("tanh", x), ("erf", x)):
        chosen = np.concatenate([around, more])
        chosen = chosen[chosen > -1] if name == "log1p" else chosen
        assert max(precise_errors(name, computed(name, chosen), chosen)) <= ULP_64[name]
    far = np.concatenate([rng.uniform(0, 708, 4000), rng.uniform(0, 1, 2000), rng.uniform(700, 745, 1000)])
    assert max(precise_errors("exp", computed("decay", far), -far)) <= ULP_64["decay"]
    with mpmath.workprec(120):
        either = np.concatenate([rng.uniform(-11, 11, 4000), rng.normal(size=4000), rng.normal(size=2000) * 1e-3])
        pairs = zip(computed("ndtr", either), either, strict=True)
        worst = max(abs(mpmath.mpf(float(y)) - mpmath.ncdf(mpmath.mpf(float(x)))) for y, x in pairs)
    assert float(worst) / np.finfo(np.float64).eps <= NDTR
    x = np.concatenate([x, rng.uniform(0.3, 3, 4000)])
    p = rng.uniform(-745, 709.7, x.size) / np.log(x)
    p[::5] = rng.choice([0.5, -1, 2, 3, 1 / 3], p[::5].size)
    y = computed("power", x, p)
    inside = np.isfinite(y) & (y > 0)
    assert inside.mean() > 0.9
    assert max(precise_errors("power", y[inside], x[inside], p[inside])) <= ULP["power"]


@dtypes
def test_zeros_infinities_nan_and_results_out_of_range(dtype):
    """As C's exp, log and pow; powers of x < 0 are NaN."""
    inf, nan, limits = np.inf, np.nan, np.finfo(dtype)
    tiny, big, next_to_one = limits.smallest_subnormal, limits.max, np.nextafter(dtype(1), dtype(2))
    with np.errstate(all="ignore"):
        for name, x in (
            ("exp", [0.0, -0.0, inf, -inf, nan, big, -big, 1e4, -1e4, tiny, -tiny, 1]),
            ("log", [0.0, -0.0, inf, -inf, nan, -1, -tiny, -big, tiny, big, 1]),
            ("expm1", [0.0, -0.0, inf, -inf, nan, big, -big, 1e4, -1e4, tiny, -tiny]),
            ("log1p", [0.0, -0.0, inf, -inf, nan, -1, -2, -big, tiny, -tiny]),
            ("tanh", [0.0, -0.0, inf, -inf, nan, big, -big, tiny, -tiny, 100]),
            ("erf", [0.0, -0.0, inf, -inf, nan, big, -big, 100, -100]),
            ("ndtr", [0.0, -0.0, inf, -inf, nan, big, -big, 100, -100]),
            ("decay", [0.0, -0.0, inf, nan, big, 1e4, tiny]),
        ):
            x = np.array(x, dtype)
            if name == "decay":
                truth = np.exp(-x.astype(np.longdouble))
            elif name in SCIPY:
                truth = SCIPY[name](x.astype(np.float64))
            else:
                truth = getattr(np, name)(x.astype(np.longdouble))
            assert_same_bits(computed(name, x), truth.astype(dtype))
        bases = [0.0, tiny, 0.5, next_to_one, 1, 2, big, inf, nan]
        exponents = [0.0, -0.0, 1, -1, 0.5, -0.5, 1e-30, 3, -3, 1e4, -1e4, 1e30, -1e30, inf, -inf, nan]
        x, p = (np.array(v, dtype).ravel() for v in np.meshgrid(bases, exponents))
        y = computed("power", x, p)
        np.testing.assert_array_max_ulp(y, np.power(x.astype(np.longdouble), p.astype(np.longdouble)).astype(dtype), 1)
        below = (x > 0) & (p != 0)
        assert np.isnan(computed("power", -x, p)[below]).all()


@dtypes
def test_the_same_on_numpy_scalars_and_any_number_of_lanes(dtype):
    rng = np.random.default_rng(0)
    x, p = np.exp(rng.normal(size=60) * 5).astype(dtype), rng.normal(size=60).astype(dtype)
    for name, operands in (
        ("exp", (p * 20,)),
        ("log", (x,)),
        ("power", (x, p)),
        *((name, (p * 2,)) for name in ("expm1", "log1p", "tanh", "erf", "ndtr")),
        ("decay", (x,)),
    ):
        word = getattr(elementary, name)
        expected = np.array([word(*values) for values in zip(*operands, strict=True)])
        assert expected.dtype == dtype
        for lanes in (4, 8, 16):
            assert_same_bits(computed(name, *operands, lanes=lanes), expected)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the instructions' names are x86's")
@pytest.mark.parametrize("name", [*ULP, "ndtr"])
@dtypes
def test_packed_code_without_a_call(name, dtype):
    number, letter, other = FLOATS[dtype], *("sd" if dtype is np.float32 else "ds")
    factory = (binary if name == "power" else unary).__wrapped__
    code = cfunc(WORKER, error_model="numpy")(factory(name, number, native_lanes(number)))._library.get_asm_str()
    body = code[: code.index("Lfunc_end0")]  # what follows is Numba's wrapper, which calls it
    assert re.search(rf"\bvfmadd\w*p{letter}\s", body)
    assert re.findall(r"\b(?:call\w*|v?(?:add|sub|mul|div)s[sd]|vf\w+s[sd]|v?p(?:ins|ext)r\w*|v\w*gather\w*)\b", body) == []
    assert re.findall(rf"\bv?(?:(?:f?n?m?(?:add|sub)|mul|div)\w*p{other}|cvt\w+)\b", body) == []


GRID = 400
"""On which the exchange looks for extremes."""


def remez(f, weight, low, high, degree):
    """The least largest |weight * (p - f)| on [low, high] of a polynomial p: Remez's exchange of degree + 2 extremes."""
    points = [(low + high) / 2 - (high - low) / 2 * mpmath.cos(mpmath.pi * (2 * i + 1) / (2 * degree + 4)) for i in range(degree + 2)]
    grid = [(low + high) / 2 - (high - low) / 2 * mpmath.cos(mpmath.pi * i / GRID) for i in range(GRID + 1)]
    for _ in range(16):
        rows = [[x**j for j in range(degree + 1)] + [(-1) ** i / weight(x)] for i, x in enumerate(points)]
        *coefficients, level = mpmath.lu_solve(mpmath.matrix(rows), mpmath.matrix([f(x) for x in points]))
        error = [weight(x) * (mpmath.polyval(coefficients[::-1], x) - f(x)) for x in grid]
        runs = np.split(np.arange(GRID + 1), 1 + np.flatnonzero([a * b < 0 for a, b in itertools.pairwise(error)]))
        tops = [max(run, key=lambda i: abs(error[i])) for run in runs]
        while len(tops) > degree + 2:
            del tops[0 if abs(error[tops[0]]) < abs(error[tops[-1]]) else -1]
        points = [grid[i] for i in tops]
    return abs(level)


@functools.cache
def approximated():
    """name -> (f, weight that makes the error relative to the whole function, interval)."""
    half = mpmath.log(2) / 2 * mpmath.mpf("1.001")
    bound = (3 - mpmath.sqrt(8)) ** 2

    def exponential(r):
        return (mpmath.exp(r) - 1 - r) / r**2 if abs(r) > 1e-9 else mpmath.mpf(0.5) + r / 6

    def artanh(z):
        return (mpmath.atanh(mpmath.sqrt(z)) / mpmath.sqrt(z) - 1 - z / 3) / z**2 if z > 1e-9 else mpmath.mpf(0.2) + z / 7

    def error_function(z):
        return mpmath.erf(mpmath.sqrt(z)) / mpmath.sqrt(z) - 1 if z > 1e-9 else 2 / mpmath.sqrt(mpmath.pi) * (1 - z / 3) - 1

    def tangent(z):
        return (mpmath.tanh(mpmath.sqrt(z)) / mpmath.sqrt(z) - 1) / z if z > 1e-9 else 2 * z / 15 - mpmath.mpf(1) / 3

    zero, one = mpmath.mpf(0), mpmath.mpf(1)
    (at, at_64), (end, end_64) = elementary.ERFC_AT, elementary.ERF_IS_ONE
    return {
        "ERF": (error_function, lambda z: 1 / (1 + error_function(z)), zero, one),
        "TANH": (tangent, lambda z: z / (1 + z * tangent(z)) + mpmath.mpf("1e-30"), zero, one),
        **{
            name: (
                lambda s, c=c: -mpmath.log(mpmath.erfc(s + c)),
                lambda s, c=c: mpmath.erfc(s + c),
                mpmath.mpf(1 - c),
                mpmath.mpf(last - c),
            )
            for name, c, last in (("ERFC", at, end), ("ERFC 64", at_64, end_64))
        },
        **{
            name: (lambda t: -mpmath.log(mpmath.ncdf(-t)), lambda t: mpmath.ncdf(-t), zero, mpmath.mpf(end))
            for name, end in (("NDTR", 6), ("NDTR 64", 8.5))
        },
        "EXP": (exponential, lambda r: r**2 * mpmath.exp(-r) + mpmath.mpf("1e-30"), -half, half),
        "ATANH": (artanh, lambda z: z**2 + mpmath.mpf("1e-30"), mpmath.mpf(0), bound),
    }


@dtypes
@pytest.mark.parametrize(
    ("name", "claimed"),
    [
        ("EXP", (-27.7, -56.5)),
        ("ATANH", (-36.5, -66.3)),
        ("ERF", (-28.5, -55.1)),
        ("ERFC", (-26.9, -54.8)),
        ("TANH", (-26.9, -54.9)),
        ("NDTR", (-25.8, -54.5)),
    ],
)
def test_coefficients_are_as_near_as_claimed(name, claimed, dtype):
    with mpmath.workprec(160):
        wide = dtype is np.float64
        f, weight, low, high = approximated().get(f"{name} 64" if wide else name, approximated()[name])
        coefficients = getattr(elementary, name)[wide]
        level = remez(f, weight, low, high, len(coefficients) - 1)
        worst = max(
            weight(x) * abs(mpmath.polyval([mpmath.mpf(float(dtype(c))) for c in coefficients[::-1]], x) - f(x))
            for x in mpmath.linspace(low, high, 301)
        )
        assert mpmath.log(level, 2) < mpmath.log(worst, 2) <= claimed[wide]
