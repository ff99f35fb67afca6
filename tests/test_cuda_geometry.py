"""CUDA's kernels of pooling over a hundred geometries of every dtype: selections bit for bit, sums of integers to a rounding.

Windows are a kernel's constants, and so few; what they lie on is not.
"""

import emulated
import pytest
import torch
import torch.nn.functional as T
from cases import LAYOUTS, adversarial
from emulated import names
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_pooling import leaf

import fastpool.functional as F

pytestmark = emulated.needs_toolchain

FLOATS = "float32", "float64", "bfloat16", "float16"
INTEGERS = "int8", "uint8", "int16", "int32", "int64", "bool"
WINDOWS = ((2, 2), (2, 2)), ((3, 3), (2, 2)), ((3, 2), (1, 1))
"""Kernel size and stride."""
WIDE = (1, 4, 8, 16), ((3, 3), (2, 2), (1, 1)), False
NARROW = (1, 3, 7, 7), ((3, 3), (2, 2), (1, 1)), False
"""One of each, as those drawn may be all of a kind: in one of forty runs 5 of 100 were wide."""
LAID = st.sampled_from(["contiguous", "channels_last", "cropped"])
hundred = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def geometries(draw):
    """(shape, (kernel_size, stride, padding), ceil_mode); of widths and channels that vectors of four divide, and of others."""
    kernel, stride = draw(st.sampled_from(WINDOWS))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    height = draw(st.integers(kernel[0], 9))
    width = draw(st.one_of(st.integers(kernel[1], 13), st.sampled_from([4, 8, 16])))
    channels = draw(st.sampled_from([1, 3, 4, 8]))
    return (draw(st.integers(1, 2)), channels, height, width), (kernel, stride, padding), draw(st.booleans())


def exact(x):
    return x.double().nan_to_num(77)


@pytest.mark.parametrize(
    ("kind", "dtype"), [*(("max", dtype) for dtype in FLOATS + INTEGERS), ("min", "float16"), ("min", "uint8"), ("min", "int64")]
)
def test_selections(kind, dtype):
    pool, sign = getattr(F, f"{kind}_pool2d"), 1 if kind == "max" else -1
    dtype, seen = getattr(torch, dtype), set()

    @hundred
    @example(WIDE, "contiguous", 0)
    @example(NARROW, "contiguous", 0)
    @given(geometries(), LAID, st.integers(0, 2**31))
    def one(geometry, layout, seed):
        torch.manual_seed(seed)
        (shape, window, ceil), floats = geometry, dtype.is_floating_point
        x = LAYOUTS[layout](adversarial(shape, dtype, special=dtype != torch.int64))  # whose extremes are one float64
        a, b = leaf(x) if floats else x, leaf(sign * x.double())
        with emulated.device() as emulator:
            y, at = pool(a, *window, ceil_mode=ceil, return_indices=True)
            theirs, theirs_at = T.max_pool2d(b, *window, ceil_mode=ceil, return_indices=True)
            assert torch.equal(exact(y), exact(sign * theirs))
            assert torch.equal(at, theirs_at)
            if floats:
                gy = torch.randint(-4, 5, y.shape)
                y.backward(gy.to(y))
                theirs.backward(gy.to(theirs))
                assert torch.equal(a.grad.double(), b.grad)
        seen.update(names(emulator))

    one()
    assert seen >= {"windows.forward", "wide.forward", "windows.flat_positions"}
    assert not dtype.is_floating_point or seen >= {"windows.backward", "wide.backward"}


@pytest.mark.parametrize("dtype", FLOATS)
def test_averages(dtype):
    dtype, seen = getattr(torch, dtype), set()

    @hundred
    @example(WIDE, "contiguous", True, 0)
    @example(NARROW, "contiguous", True, 0)
    @given(geometries(), LAID, st.booleans(), st.integers(0, 2**31))
    def one(geometry, layout, include_pad, seed):
        torch.manual_seed(seed)
        shape, window, ceil = geometry
        x = LAYOUTS[layout](torch.randint(-8, 9, shape).to(dtype))
        a, b = leaf(x), leaf(x.double())
        with emulated.device() as emulator:
            y = F.avg_pool2d(a, *window, ceil, include_pad)
            theirs = T.avg_pool2d(b, *window, ceil, include_pad)
            gy = torch.randint(-4, 5, y.shape)
            y.backward(gy.to(y))
            theirs.backward(gy.to(theirs))
        eps = torch.finfo(dtype).eps
        assert ((y.double() - theirs).abs() <= eps * theirs.abs()).all()
        assert ((a.grad.double() - b.grad).abs() <= 4 * eps * b.grad.abs().max()).all()
        seen.update(names(emulator))

    one()
    assert seen >= {"windows.forward", "wide.forward", "windows.backward", "wide.backward"}


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_whole_maps(dtype):
    dtype, seen = getattr(torch, dtype), set()

    @hundred
    @given(st.tuples(*(st.integers(1, most) for most in (3, 9, 12, 20))), LAID, st.integers(0, 2**31))
    def one(shape, layout, seed):
        torch.manual_seed(seed)
        floats = dtype.is_floating_point
        x = LAYOUTS[layout](adversarial(shape, dtype, special=False))
        a = leaf(x) if floats else x
        with emulated.device() as emulator:
            y = F.global_max_pool2d(a)
            assert torch.equal(exact(y), exact(x).amax((2, 3), keepdim=True))
            if floats:
                y.sum().backward()
                assert torch.equal(a.grad.sum((2, 3), keepdim=True), torch.ones_like(y))
                assert torch.equal((a.grad * x).sum((2, 3), keepdim=True).double(), exact(y))
        seen.update(names(emulator))

    one()
    assert seen >= {"whole_map.forward"}
