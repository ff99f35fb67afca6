"""Every dtype: selections bit for bit, sums no less accurate than torch's own, over nests; and more than 2**31 elements."""

import math
import os

import pytest
import reference
import torch
import torch.nn.functional as T
from cases import LAYOUTS, window
from fastpool.kernels.pool import FLOATS, INTEGERS, KINDS
from test_pooling import largest, op

import fastpool.functional as F
from fastpool.functional import _pooled, _with_indices

HALVES = ("bfloat16", "float16")
LAST = {name: LAYOUTS[name] for name in ("contiguous", "channels_last", "cropped")}
# One for each nest: small maps, rows between, large windows, bins; 3-d and 1-d by the same.
PLACES = {
    "small": ((2, 5, 9, 21), window((2, 2))),
    "small-3x3s2p1": ((2, 3, 7, 7), window((3, 3), (2, 2), (1, 1))),
    "wide": ((1, 2, 6, 2100), window((3, 3), (2, 2), (1, 1))),
    "dilated": ((1, 3, 11, 40), window((3, 2), (1, 2), (1, 1), (2, 3))),
    "large": ((1, 2, 9, 40), window((5, 7), (1, 1), (2, 3))),
    "across": ((2, 19, 6, 9), window((2, 3), (1, 3), (1, 1), (3, 2))),
    "across-large": ((2, 19, 9, 7), window((5, 5), (1, 1), (2, 2))),
    "bins": ((1, 2, 12, 40), window((6, 8))),
    "map": ((2, 9, 5, 33), None),
    "1-d": ((2, 3, 37), window((3,), (2,), (1,), (1,))),
    "3-d": ((1, 2, 5, 6, 13), window((2, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1))),
}


def values(shape, dtype):
    """Ties, extremes and, of floats, NaN and infinities."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.3
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        x = torch.randint(-4 if limits.min else 0, 5, shape).to(dtype)
        x[torch.rand(shape) < 0.05], x[torch.rand(shape) < 0.05] = limits.min, limits.max
        return x
    x = torch.randint(-3, 4, shape).to(dtype) / 2
    for value in (math.nan, math.inf, -math.inf, -0.0):
        x[torch.rand(shape) < 0.04] = value
    return x


# A kernel takes a second to compile: one dtype of each size goes everywhere, the others to the nest of small maps and to channels_last's.
EVERYWHERE, ONE = ("bfloat16", "uint8"), "small-3x3s2p1"
SELECTIONS = [("max", dtype, place) for dtype in (*HALVES, *INTEGERS) for place in PLACES if dtype in EVERYWHERE or place == ONE]
SELECTIONS += [("min", dtype, ONE) for dtype in ("float16", "uint8", "int64")]
ROUNDED = [(kind, "bfloat16", place) for kind in ("max", "avg", "l2") for place in PLACES]
ROUNDED += [(name, dtype, ONE) for name, kind in KINDS.items() for dtype in HALVES if not kind.draws]


@pytest.mark.parametrize(("kind", "dtype", "place"), SELECTIONS)
def test_selections(kind, dtype, place):
    shape, w = PLACES[place]
    x = values(shape, getattr(torch, dtype))
    truth, chosen = reference.pool(KINDS[kind], x.double(), w)
    for name, layout in LAST.items():
        y, flat = _with_indices(layout(x), op(kind, w, rank=len(shape) - 2))
        assert torch.equal(y.double().nan_to_num(77), truth.nan_to_num(77)), name
        if dtype != "int64":  # its extremes are one float64
            assert torch.equal(flat, chosen), name
        assert torch.equal(_pooled(layout(x), op(kind, w, rank=len(shape) - 2)).double().nan_to_num(77), truth.nan_to_num(77)), name


@pytest.mark.parametrize(("kind", "dtype", "place"), list(dict.fromkeys(ROUNDED)))
def test_halves(kind, dtype, place):
    """Computed in float32 and rounded once: within half an ulp, and what float32 itself was off by, of the float64 truth."""
    shape, w = PLACES[place]
    dtype = getattr(torch, dtype)
    x = torch.rand(shape).to(dtype) + 0.25
    extra = reference.PARAMETERS.get(kind, ())
    wide = x.double().requires_grad_()
    truth, chosen = reference.pool(KINDS[kind], wide, w, extra=extra)
    gy = torch.randint(1, 5, truth.shape).to(dtype)  # of at most 35 windows an element: their sums are bfloat16s
    if KINDS[kind].selects:
        planes = torch.zeros(*shape[:2], math.prod(shape[2:]), dtype=torch.double)
        expected = planes.scatter_add(2, chosen.flatten(2), gy.double().flatten(2)).reshape(shape)
    else:
        truth.backward(gy.double())
    half = torch.finfo(dtype).eps / 2 + 1e-5
    for name, layout in LAST.items():
        a = layout(x).detach().requires_grad_()
        y = _pooled(a, op(kind, w, rank=len(shape) - 2))
        assert y.dtype == dtype
        assert ((y.double() - truth).abs() <= half * truth.abs()).all(), name
        y.backward(gy)
        if KINDS[kind].selects:
            assert torch.equal(a.grad.double(), expected), name
        else:
            # Saved y is rounded, and a gradient may be a difference: relative to the largest.
            error, allowed = largest(a.grad.double() - wide.grad), 4 * torch.finfo(dtype).eps * largest(wide.grad)
            assert error <= allowed, name


@pytest.mark.parametrize("shape", [(2, 3, 9, 14), (1, 2, 40, 300)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_average_of_integers_is_torchs(layout, shape):
    x = LAYOUTS[layout](torch.randint(-1000, 1000, shape))
    for arguments in ((2,), (3, 2, 1), (3, 2, 1, True, False), (5, 1, 2), (5,), (2, 2, 0, False, True, -3)):
        assert torch.equal(F.avg_pool2d(x, *arguments), T.avg_pool2d(x.contiguous(), *arguments)), arguments


def test_no_kind_takes_what_it_has_no_arithmetic_for():
    for name, kind in KINDS.items():
        refused = [d for d in (*FLOATS, *INTEGERS) if d not in kind.dtypes]
        for dtype in refused:
            with pytest.raises(NotImplementedError, match="not implemented for"):
                _pooled(torch.ones(1, 1, 4, 4).to(getattr(torch, dtype)), op(name, window((2, 2))))


@pytest.mark.skipif(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 8 * 2**30, reason="needs 8 GiB of free memory")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_2_to_the_31_elements(layout):
    """The last elements are as right as the first."""
    shape = (3, 2, 2**15, 11000) if layout == "contiguous" else (3, 2**15, 2, 11000)
    x = torch.zeros(shape, dtype=torch.uint8)
    if layout == "channels_last":
        x = torch.zeros(3, 2, 11000, 2**15, dtype=torch.uint8).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    for at, value in (((0, 0, 0, 0), 3), ((2, -1, -1, -1), 7), ((2, 0, 0, 5), 5)):
        x[at] = value
    y = F.max_pool2d(x, 2)
    assert (y[0, 0, 0, 0], y[2, -1, -1, -1], y[2, 0, 0, 2]) == (3, 7, 5)
    assert y.count_nonzero() == 3
