"""Convolution, forward and its three gradients, against the float64 reference: any geometry, layout and dtype, through every nest.

Whether the right elements are multiplied is tested on small integers, whose sums are exact in float32: results must be equal.  How the
sums are rounded is tested on random numbers, against torch's own error.
"""

import math
import re

import conv_reference
import numpy as np
import pytest
import torch
import torch.nn.functional as T
from cases import LAYOUTS
from fastpool.kernels import simd
from fastpool.kernels.cpu import ahead, blocking, channel_lanes, depthwise, pixel_lanes, plane_products
from fastpool.kernels.cpu import weight_gradient as weight_gradients
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from processes import run

import fastpool.functional as F
from fastpool import convolution

DTYPES = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16}


def expanded(x):
    """One channel, or output channel's weights, for all."""
    return x[:, :1].expand_as(x)


def every_other(x):
    """Elements with a gap between them along every axis: none is dense."""
    big = torch.full([2 * n for n in x.shape], math.nan, dtype=x.dtype)
    view = big[(slice(None, None, 2),) * x.dim()]
    view.copy_(x)
    return view


PLACES = LAYOUTS | {"every-other": every_other, "expanded": expanded, "repeated": lambda x: x[:1].expand_as(x)}


@pytest.fixture
def ran(monkeypatch, fresh):
    """(nest, its constants by name) of every kernel that is asked for, in order; as of a CPU with AVX-512 and 1 MiB of L2."""
    found = []
    monkeypatch.setenv("FASTPOOL_REGISTER_BYTES", "64")
    monkeypatch.setattr(blocking, "l2_bytes", lambda: 1 << 20)

    def watch(module, name):
        plain = getattr(module, name)
        names = plain.__wrapped__.__code__.co_varnames

        def asked(*constants):
            found.append((f"{module.__name__.rpartition('.')[2]}.{name}", dict(zip(names, constants, strict=False))))
            return plain(*constants)

        monkeypatch.setattr(module, name, asked)

    watch(channel_lanes, "forward")
    watch(pixel_lanes, "forward")
    watch(weight_gradients, "backward")
    watch(plane_products, "backward")
    for name in ("forward", "forward_rows", "forward_planes", "spread_rows", "weights_of_rows", "weights_of_planes", "weights_of_pixels"):
        watch(depthwise, name)
    for known in (simd.register_bytes, blocking.registers):
        known.cache_clear()
    yield found
    monkeypatch.undo()
    for known in (simd.register_bytes, blocking.registers):
        known.cache_clear()


def integers(*shape, dtype=torch.float32):
    return torch.randint(-4, 5, shape).to(dtype)


def both_sides(op_padding, kernel, dilation):
    """A padding as torch takes it -> (before, after) an axis."""
    if op_padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(t // 2, t - t // 2) for t in totals]
    values = (0,) * len(kernel) if op_padding == "valid" else op_padding
    values = (values,) * len(kernel) if isinstance(values, int) else values
    return [(p, p) for p in values]


def truth(x, w, b, gy, stride=1, padding=0, dilation=1, groups=1, exact=torch.float64):
    """y, and where gy is given gx, gw, gb."""
    rank = w.dim() - 2
    stride, dilation = ((v,) * rank if isinstance(v, int) else v for v in (stride, dilation))
    sides = both_sides(padding, w.shape[2:], dilation)
    kind = np.float64 if exact == torch.float64 else np.longdouble
    arrays = [None if t is None else t.detach().double().numpy().astype(kind) for t in (x, w, b, gy)]
    y = conv_reference.forward(*arrays[:3], stride, sides, dilation, groups)
    if gy is None:
        return (y,)
    return y, *conv_reference.backward(arrays[3], *arrays[:2], stride, sides, dilation, groups)


def convolved(x, w, b, gy, function=None, **more):
    """y, gx, gw, gb"""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, w, b)]
    function = function or getattr(F, f"conv{w.dim() - 2}d")
    y = function(*leaves, **more)
    gradients = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], gy))
    return y.detach(), *(None if t is None else next(gradients) for t in leaves)


WHAT = ("y", "gradient by x", "gradient by the weights", "gradient by the bias")


def assert_equal(found, expected, note):
    for ours, theirs, what in zip(found, expected, WHAT, strict=True):
        if ours is not None:
            assert torch.equal(ours, torch.from_numpy(np.ascontiguousarray(theirs, np.float64)).to(ours.dtype)), f"{what}: {note}"


# The reference


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_the_reference_is_torchs_float64(rank, groups):
    x, w, b = (
        torch.randn(2, 6, *(9, 8, 7)[:rank]).double(),
        torch.randn(12, 6 // groups, *(3, 2, 1)[:rank]).double(),
        torch.randn(12).double(),
    )
    for more in ({}, {"stride": (2, 1, 3)[:rank], "padding": (3, 0, 1)[:rank], "dilation": (1, 2, 2)[:rank]}, {"padding": "same"}):
        theirs = getattr(T, f"conv{rank}d")
        gy = torch.randn_like(theirs(x, w, b, groups=groups, **more))
        found = truth(x, w, b, gy, groups=groups, **more)
        for ours, expected in zip(found, convolved(x, w, b, gy, theirs, groups=groups, **more), strict=True):
            torch.testing.assert_close(torch.from_numpy(np.ascontiguousarray(ours)), expected, rtol=1e-12, atol=1e-12)


# Any geometry

SIZES = (1, 7, 13, 14)
COUNTS = (1, 3, 17)


@st.composite
def convolutions(draw):
    """(x's shape, the weight's, arguments)"""
    rank = draw(st.sampled_from([2, 2, 2, 1, 3]))
    groups, inputs, outputs = draw(
        st.one_of(
            st.tuples(st.just(1), st.sampled_from(COUNTS), st.sampled_from(COUNTS)),
            st.tuples(st.sampled_from([2, 3]), st.sampled_from([1, 3]), st.sampled_from([1, 3, 17])),
            st.tuples(st.sampled_from([5, 17]), st.just(1), st.sampled_from([1, 2])),  # depthwise, with a multiplier too
        )
    )

    def each(values):
        return tuple(draw(st.sampled_from(values)) for _ in range(rank))

    kernel, dilation = each([1, 2, 3, 3]), each([1, 1, 1, 2])
    padding = draw(st.sampled_from(["same", "valid", "int", "tuple", "tuple"]))
    stride = (1,) * rank if padding == "same" else each([1, 1, 2, 3])
    if padding == "int":
        padding = draw(st.integers(0, 2))
    elif padding == "tuple":
        padding = each([0, 1, 2, 4])
    sizes = each(SIZES if rank < 3 else (1, 4, 7))
    sides = both_sides(padding, kernel, dilation)
    parts = zip(sizes, kernel, sides, dilation, strict=True)
    assume(all(n + a + b > d * (k - 1) for n, k, (a, b), d in parts))
    more = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    shape = draw(st.sampled_from([0, 1, 1, 2, 3])), groups * inputs, *sizes
    return shape, (groups * outputs, inputs, *kernel), more


ASKED = (
    convolutions(),
    st.sampled_from(list(PLACES)),
    st.sampled_from(list(PLACES)),
    st.sampled_from(["f32"] * 6 + ["f64", "bf16", "f16"]),
    st.booleans(),
)
"""The arguments of ``agrees``."""


def agrees(geometry, place, weights_place, dtype, biased):
    """A convolution of random integers and its gradients are the reference's; a single image's unbatched too."""
    shape, weight, more = geometry
    x, w = PLACES[place](integers(*shape, dtype=DTYPES[dtype])), PLACES[weights_place](integers(*weight, dtype=DTYPES[dtype]))
    b = integers(weight[0], dtype=DTYPES[dtype]) if biased else None
    y = truth(x, w, b, None, **more)[0]
    gy = integers(*y.shape, dtype=DTYPES[dtype])
    assert_equal(convolved(x, w, b, gy, **more), truth(x, w, b, gy, **more), f"{shape} {weight} {more} {place} {weights_place} {dtype}")
    if len(x) == 1:
        found = convolved(x[0], w, b, gy[0], **more)
        expected = truth(x, w, b, gy, **more)
        assert_equal(found, (expected[0][0], expected[1][0], *expected[2:]), f"unbatched {shape} {weight} {more}")


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(*ASKED, st.sampled_from(["model", "channels", "pixels"]), st.sampled_from([1 << 20, 1 << 13]), st.integers(0, 2**31))
@example(((2, 17, 7, 13), (17, 17, 1, 1), {}), "channels_last", "contiguous", "f32", True, "channels", 1 << 20, 0)
@example(((2, 17, 7, 13), (17, 17, 1, 1), {}), "contiguous", "channels_last", "f32", True, "pixels", 1 << 13, 0)
@example(((1, 3, 14, 14), (17, 3, 3, 3), {"padding": 4, "stride": 2}), "channels_last", "contiguous", "f32", True, "model", 1 << 13, 0)
@example(((1, 3, 4, 7), (17, 3, 1, 1), {}), "contiguous", "expanded", "f32", False, "model", 1 << 20, 0)
@example(((2, 3, 4, 7), (17, 3, 1, 1), {}), "repeated", "repeated", "f32", True, "channels", 1 << 20, 0)
@example(((3, 34, 7, 13), (50, 17, 1, 1), {"groups": 2}), "contiguous", "contiguous", "f32", True, "model", 1 << 13, 0)
@example(((2, 17, 13, 7), (3, 17, 1, 1), {}), "contiguous", "channels_last", "bf16", True, "model", 1 << 20, 0)
def test_any_geometry(small, geometry, place, weights_place, dtype, biased, nest, l2, seed):
    small(nest, l2)
    torch.manual_seed(seed)
    agrees(geometry, place, weights_place, dtype, biased)


STEPS = {"stride": (2, 2), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
"""Over elements that no tap reaches: they are the bias alone."""


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(convolutions(), st.sampled_from(list(PLACES)), st.integers(0, 2**31))
@example(((2, 3, 7, 13), (17, 3, 1, 1), STEPS), "contiguous", 0)
@example(((2, 3, 7, 13), (17, 3, 1, 1), STEPS), "channels_last", 0)
@example(((2, 5, 7, 13), (5, 1, 1, 3), STEPS | {"groups": 5}), "contiguous", 0)
def test_transposed_of_any_geometry(small, geometry, place, seed):
    """The gradient by the input as an operation: torch's own is exact on these integers too."""
    small("model", 1 << 20)
    torch.manual_seed(seed)
    shape, weight, more = geometry
    if isinstance(more["padding"], str):
        more = more | {"padding": 0}
    rank = len(weight) - 2
    x, w, b = PLACES[place](integers(shape[0], weight[0], *shape[2:])), integers(*weight), integers(weight[1] * more["groups"])
    extra = tuple(max(s, d) - 1 for s, d in zip(more["stride"], more["dilation"], strict=True))
    more = more | {"output_padding": extra}
    ours, theirs = (getattr(library, f"conv_transpose{rank}d") for library in (F, T))
    try:
        expected = theirs(x.double(), w.double(), b.double(), **more)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            ours(x, w, b, **more)
        return
    if 0 in expected.shape[-rank:]:  # torch does not look where N is 0
        with pytest.raises(RuntimeError):
            ours(x, w, b, **more)
        return
    gy = integers(*expected.shape)
    exact = convolved(*(t.double() for t in (x, w, b, gy)), theirs, **more)
    assert_equal(convolved(x, w, b, gy, ours, **more), [t.numpy() for t in exact], f"{shape} {weight} {more} {place}")


@pytest.mark.parametrize("place", ["contiguous", "channels_last"])
def test_outputs_far_from_the_map(place, small):
    """Of which no tap is inside, nor near: a row's padding ends with the row."""
    small("model", 1 << 20)
    x, w, b = PLACES[place](integers(2, 4, 3, 2)), integers(5, 4, 1, 1), integers(5)
    more = {"stride": (1, 40000), "padding": (0, 10000)}
    gy = integers(2, 5, 3, 1)
    assert_equal(convolved(x, w, b, gy, **more), truth(x, w, b, gy, **more), place)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_the_memory_format_is_kept(rank, small):
    """Of y as x's, of the gradients as x's and the weights'."""
    small("model", 1 << 20)
    x, w = torch.randn(2, 5, *(6, 7, 8)[:rank]), torch.randn(4, 5, *[3] * rank)
    for place in ("contiguous", "channels_last"):
        a, b = PLACES[place](x), PLACES[place](w)
        y = getattr(F, f"conv{rank}d")(a, w)
        assert y.stride() == PLACES[place](torch.empty(y.shape)).stride()
        _, gx, gw, _ = convolved(a, b, None, torch.ones_like(y))
        assert (gx.stride(), gw.stride()) == (a.stride(), b.stride())


def test_no_dense_axis_costs_the_only_copy(monkeypatch):
    copied, plain = [], torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t, **more: copied.append(tuple(t.shape)) or plain(t, **more))
    x, w = torch.randn(2, 5, 9, 10), torch.randn(4, 5, 3, 3)
    for place in ("contiguous", "channels_last", "sliced", "cropped", "channels_last-sliced"):
        t = PLACES[place](x)
        copied.clear()
        F.conv2d(t, w)
        assert copied == [], place
    t = every_other(x)
    copied.clear()
    F.conv2d(t, w)
    assert copied == [(2, 5, 9, 10)]


# How sums are rounded


def largest(x):
    return float(np.abs(x).max()) if x.size else 0.0


def no_worse(ours, theirs, exact, note):
    """An error at most twice torch's own, plus one rounding of the largest result."""
    for found, torchs, true, what in zip(ours, theirs, exact, WHAT, strict=False):
        errors = [largest(t.double().numpy().astype(true.dtype) - true) for t in (found, torchs)]
        bound = 2 * errors[1] + torch.finfo(found.dtype).eps * largest(true)
        assert errors[0] <= bound, f"{what}: {note}: error {errors[0]}, torch's {errors[1]}, at most {bound}"


def judged(shape, weight, dtype, more, layout="contiguous"):
    kind = DTYPES[dtype]
    x, w, b = (
        LAYOUTS[layout](torch.randn(shape).to(kind)),
        (torch.randn(weight) / math.prod(weight[1:]) ** 0.5).to(kind),
        torch.randn(weight[0]).to(kind),
    )
    gy = torch.randn_like(getattr(T, f"conv{len(weight) - 2}d")(x, w, b, **more))
    theirs = convolved(x, w, b, gy, getattr(T, f"conv{len(weight) - 2}d"), **more)
    exact = truth(x, w, b, gy, exact=torch.float64 if kind != torch.float64 else None, **more)
    no_worse(convolved(x, w, b, gy, **more), theirs, exact, f"{shape} {weight} {more} {layout} {dtype}")


LAYERS = {
    # name: x, weight, arguments.  One of each kind; channels and sizes are fewer where the nest stays the same.
    "vgg16-first": ((1, 3, 32, 64), (64, 3, 3, 3), {"padding": 1}),
    "vgg16-wide": ((1, 64, 12, 56), (64, 64, 3, 3), {"padding": 1}),
    "vgg16-last": ((1, 96, 14, 14), (96, 96, 3, 3), {"padding": 1}),
    "resnet50-first": ((1, 3, 34, 64), (64, 3, 7, 7), {"stride": 2, "padding": 3}),
    "resnet50-reduce": ((1, 256, 14, 28), (64, 256, 1, 1), {}),
    "resnet50-expand": ((1, 64, 7, 7), (256, 64, 1, 1), {}),
    "resnet50-3x3-s2": ((1, 64, 14, 14), (64, 64, 3, 3), {"stride": 2, "padding": 1}),
    "resnet50-shortcut-s2": ((1, 64, 14, 14), (128, 64, 1, 1), {"stride": 2}),
    "resnet50-7x7": ((1, 96, 7, 7), (96, 96, 3, 3), {"padding": 1}),
    "alexnet-first": ((1, 3, 47, 63), (32, 3, 11, 11), {"stride": 4, "padding": 2}),
    "alexnet-5x5": ((1, 32, 13, 27), (64, 32, 5, 5), {"padding": 2}),
    "lenet5-first": ((2, 1, 28, 28), (6, 1, 5, 5), {}),
    "lenet5-second": ((2, 6, 12, 12), (16, 6, 5, 5), {}),
    "cifar10net-4x4": ((2, 64, 4, 4), (128, 64, 3, 3), {"padding": 1}),
    "mobilenetv2-depthwise": ((1, 32, 14, 28), (32, 1, 3, 3), {"padding": 1, "groups": 32}),
    "mobilenetv2-depthwise-s2": ((1, 32, 14, 28), (32, 1, 3, 3), {"stride": 2, "padding": 1, "groups": 32}),
    "mobilenetv2-project": ((1, 96, 14, 14), (24, 96, 1, 1), {}),
}


LAST = ("vgg16-first", "vgg16-wide", "resnet50-3x3-s2", "resnet50-reduce", "mobilenetv2-depthwise", "lenet5-second")
"""Of LAYERS, enough for the nests of channels_last maps."""


@pytest.mark.parametrize(("name", "layout"), [(name, "contiguous") for name in LAYERS] + [(name, "channels_last") for name in LAST])
def test_layers(name, layout):
    """Of the networks of the case list, forward and backward: an error at most twice torch's."""
    shape, weight, more = LAYERS[name]
    judged(shape, weight, "f32", more, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["f64", "bf16", "f16"])
def test_other_dtypes_are_as_accurate(dtype, layout):
    judged((2, 24, 11, 15), (20, 24, 3, 3), dtype, {"padding": 1}, layout)


@pytest.mark.parametrize(
    ("shape", "weight", "more"), [((2, 33, 90), (24, 33, 5), {"padding": 2}), ((1, 9, 6, 7, 12), (17, 9, 3, 3, 3), {"padding": 1})]
)
def test_other_ranks_are_as_accurate(shape, weight, more):
    judged(shape, weight, "f32", more)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sums_of_depthwise_gradients_are_short(layout):
    """Of 100,352 equal products: one sum of them rounds the same way again and again: 7e-4, by lanes of a row 7e-5."""
    x, w = LAYOUTS[layout](torch.full((8, 16, 112, 112), 0.1)), torch.rand(16, 1, 1, 3)
    gy = torch.full_like(x, 0.1)
    found = convolved(x, w, None, gy, padding=(0, 1), groups=16)[2]
    exact = 8 * 112 * float(x[0, 0, 0, 0]) ** 2 * torch.tensor([111.0, 112, 111])
    assert float((found / exact - 1).abs().max()) < 2e-5


def test_nan_and_infinity_go_where_they_are_read(small):
    """Padding, tails and idle lanes multiply nothing."""
    small("model", 1 << 20)
    x, w = integers(1, 3, 9, 21), integers(5, 3, 3, 3)
    x[0, 1, 4, 7], x[0, 0, 0, 0] = math.inf, math.nan
    w[w == 0] = 1  # inf * 0 is NaN, in torch too
    for layout in ("contiguous", "channels_last"):
        torch.testing.assert_close(
            F.conv2d(LAYOUTS[layout](x), w, padding=1), T.conv2d(x, w, padding=1), equal_nan=True, check_stride=False
        )
    gy = torch.zeros(1, 5, 9, 21)
    gy[0, 2, 3, 3] = math.nan
    _, gx, gw, _ = convolved(integers(1, 3, 9, 21), w, None, gy, padding=1)
    assert gx.isnan().sum() == 3 * 9
    assert gw.isnan().flatten(1).all(1).tolist() == [False, False, True, False, False]
    x, w = integers(2, 3, 9, 7), integers(5, 3, 1, 1)
    x[1, 1, 8, 6] = math.inf  # beside the tail of a plane
    expected = convolved(x.double(), w.double(), None, torch.ones(2, 5, 9, 7).double(), T.conv2d)[2]
    assert torch.equal(convolved(x, w, None, torch.ones(2, 5, 9, 7))[2], expected.float())


@pytest.mark.parametrize("size", [(7, 7), (3, 21), (8, 40)])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_gradients_keep_infinity_apart(size, stride, small):
    """Of the weights: what no tap multiplies is not in its sum, though a register holds both."""
    small("model", 1 << 20)
    x, w = integers(2, 3, *size), integers(3, 1, 3, 3)
    x[..., -1] = math.inf
    for padding in (0, 1):
        more = {"stride": stride, "padding": padding, "groups": 3}
        gy = torch.randint(1, 4, T.conv2d(x, w, **more).shape).float()
        expected = convolved(x.double(), w.double(), None, gy.double(), T.conv2d, **more)[2]
        assert torch.equal(convolved(x, w, None, gy, **more)[2].nan_to_num(nan=77), expected.float().nan_to_num(nan=77)), padding


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("nest", ["channels", "pixels"])
def test_taps_in_the_padding_multiply_nothing(nest, layout, small):
    """Rows of taps wherever they lie there, taps of a row where a tile is a whole row: else their infinity times zero would be NaN."""
    small(nest, 1 << 20)
    kernels = {"one-row": ((1, 9), (0, 2), ()), "one-pixel": ((3, 1), (), (0, 2)), "four-rows": ((4, 4), (), ())}
    for name, (size, rows, columns) in kernels.items():
        if columns and nest == "pixels":
            continue
        x, w = LAYOUTS[layout](integers(3, 17, *size)), integers(5, 17, 3, 3)
        finite = w.clone()
        for side, places in enumerate((rows, columns)):
            for place in places:
                w.select(2 + side, place).fill_(math.inf)
                finite.select(2 + side, place).zero_()
        y = F.conv2d(x, w, padding=1)
        assert torch.equal(y, T.conv2d(x, finite, padding=1)), name
        gy = integers(*y.shape)
        gx = convolved(x, w, None, gy, padding=1)[1]
        assert torch.equal(gx, convolved(x, finite, None, gy, T.conv2d, padding=1)[1]), name


# Nests

CHANNELS, PIXELS, WEIGHTS = "channel_lanes.forward", "pixel_lanes.forward", "weight_gradient.backward"
PLANES = "plane_products.backward"
SPREAD, PRODUCTS, OF_PIXELS = "depthwise.spread_rows", "depthwise.weights_of_rows", "depthwise.forward"
LAST_PRODUCTS, BOTH = "depthwise.weights_of_pixels", {"spread": (2, 2)}

REACHED = {
    # What must be among the kernels asked for: (nest, constants), by x, weight, arguments, layout, at 16 lanes.
    "one-piece": ((1, 32, 4, 56), (32, 32, 3, 3), {"padding": 1}, "channels_last", (CHANNELS, {"pieces": 1, "pitch": 48})),
    "several-pieces": ((1, 32, 8, 7), (32, 32, 3, 3), {"padding": 1}, "contiguous", (CHANNELS, {"pieces": 2, "rows": 7, "pixel": 1})),
    "pieces-of-images": ((16, 16, 1, 3), (32, 16, 1, 2), {}, "channels_last", (CHANNELS, {"pieces": 2, "rows": 2, "beside": True})),
    "uneven-pieces-of-images": ((7, 32, 4, 4), (512, 32, 3, 3), {"padding": 1}, "contiguous", (CHANNELS, {"pieces": 2, "beside": True})),
    "taps-in-the-padding": ((1, 16, 3, 14), (32, 16, 3, 3), {"padding": 1}, "contiguous", (CHANNELS, {"kept": (1, 14, 0, 14, 0, 13)})),
    "step": ((1, 32, 9, 9), (32, 32, 3, 3), {"stride": 2}, "channels_last", (CHANNELS, {"step": 96, "pitch": 48})),
    "pixel-step": ((1, 32, 15, 15), (32, 32, 3, 3), {"stride": 2, "padding": 1}, "contiguous", (CHANNELS, {"pixel": 2})),
    "pixel-step-4": ((1, 24, 9, 17), (20, 24, 3, 5), {"stride": 4, "padding": 1}, "contiguous", (CHANNELS, {"pixel": 4})),
    "in-place-pixels": ((1, 32, 5, 5), (32, 32, 1, 1), {}, "channels_last", (CHANNELS, {"in_place": True, "step": 32})),
    "few-channels": ((1, 3, 9, 20), (32, 3, 3, 3), {"padding": 1}, "channels_last", (CHANNELS, {"pitch": 3})),
    "in-place-planes": ((1, 16, 16, 16), (8, 16, 1, 1), {}, "contiguous", (PIXELS, {"in_place": True, "stride": 1})),
    "runs-of-pixels": ((1, 40, 14, 14), (32, 40, 1, 1), {}, "contiguous", (CHANNELS, {"runs": 14, "in_place": False})),
    "runs-of-planes": ((1, 64, 32, 64), (8, 64, 1, 1), {}, "contiguous", (PIXELS, {"in_place": False, "runs": 48})),
    "panel-of-planes": ((1, 4, 6, 64), (8, 4, 3, 3), {"padding": 1}, "contiguous", (PIXELS, {"in_place": False, "stride": 1})),
    "by-phases": ((1, 4, 9, 129), (8, 4, 3, 3), {"stride": 2, "padding": 1}, "contiguous", (PIXELS, {"stride": 2})),
    "joined-runs": ((1, 4, 8, 9), (16, 4, 3, 3), {}, "contiguous", (WEIGHTS, {"rows": 12, "pixels": False})),
    "depthwise-rows": ((2, 5, 9, 13), (5, 1, 3, 3), {"padding": 1, "groups": 5}, "contiguous", ("depthwise.forward_rows", {"high": 3})),
    "depthwise-planes": ((2, 5, 9, 13), (5, 1, 3, 3), {"dilation": 2, "groups": 5}, "contiguous", ("depthwise.forward_planes", {})),
    "depthwise-pixels": ((2, 5, 9, 13), (5, 1, 3, 3), {"padding": 1, "groups": 5}, "channels_last", (OF_PIXELS, {"pixels": 7})),
    "pixels-of-registers": ((2, 32, 5, 6), (32, 1, 3, 3), {"padding": 1, "groups": 32}, "channels_last", (OF_PIXELS, {"leaves": False})),
    "one-pixel": ((1, 16, 3, 1), (16, 1, 3, 3), {"padding": 1, "groups": 16}, "channels_last", (OF_PIXELS, {"pixels": 1})),
    "spread-pixels": ((2, 5, 9, 13), (5, 1, 3, 3), {"stride": 2, "groups": 5}, "channels_last", (OF_PIXELS, BOTH)),
    "spread-rows": ((2, 16, 9, 20), (16, 1, 3, 3), {"stride": (2, 1), "groups": 16}, "channels_last", (OF_PIXELS, {"spread": (2, 1)})),
    "spread-columns": ((2, 16, 9, 34), (16, 1, 1, 5), {"stride": (1, 2), "groups": 16}, "channels_last", (OF_PIXELS, {"spread": (1, 2)})),
    "spread-without-taps": ((1, 16, 6, 7), (16, 1, 1, 1), {"stride": 2, "groups": 16}, "channels_last", (OF_PIXELS, BOTH)),
    "spread-apart": ((1, 16, 30, 31), (16, 1, 3, 3), {"stride": 2, "dilation": 3, "groups": 16}, "channels_last", (OF_PIXELS, BOTH)),
    "spread": ((2, 5, 9, 13), (5, 1, 3, 3), {"stride": 2, "padding": 1, "groups": 5}, "contiguous", (SPREAD, {"down": 2})),
    "spread-wide": ((1, 3, 5, 70), (3, 1, 2, 5), {"stride": (1, 2), "padding": 2, "groups": 3}, "contiguous", (SPREAD, {"down": 1})),
    "spread-past-the-kernel": ((1, 3, 6, 7), (3, 1, 1, 1), {"stride": 2, "groups": 3}, "contiguous", (SPREAD, {"lanes": 4})),
    "products": ((2, 5, 14, 20), (5, 1, 3, 3), {"padding": 1, "groups": 5}, "contiguous", (PRODUCTS, {"rows": 7, "across": 1})),
    "products-s2": ((2, 5, 13, 70), (5, 1, 3, 3), {"stride": 2, "groups": 5}, "contiguous", (PRODUCTS, {"rows": 6, "across": 2})),
    "products-of-planes": ((1, 3, 9, 9), (3, 1, 3, 3), {"stride": 3, "groups": 3}, "contiguous", ("depthwise.weights_of_planes", {})),
    "products-of-pixels": ((1, 3, 9, 9), (3, 1, 3, 3), {"stride": 2, "groups": 3}, "channels_last", (LAST_PRODUCTS, {"step": (2, 2)})),
    "dots-by-outputs": ((2, 7, 24, 25), (33, 7, 1, 1), {}, "contiguous", (PLANES, {"by_inputs": False})),
    "dots-by-inputs": ((2, 21, 24, 25), (5, 21, 1, 1), {}, "contiguous", (PLANES, {"by_inputs": True})),
    "dots-of-groups": ((1, 9, 32, 33), (6, 3, 1, 1), {"groups": 3}, "contiguous", (PLANES, {})),
    "no-dots": ((2, 7, 22, 23), (33, 7, 1, 1), {}, "contiguous", (WEIGHTS, {"pixels": False})),
    "dilated-runs": ((1, 4, 8, 9), (16, 4, 3, 3), {"dilation": 2}, "channels_last", (WEIGHTS, {"rows": 4, "pixels": True})),
}  # fmt: skip


@pytest.mark.parametrize("name", REACHED)
def test_each_nest_is_reached_and_right(name, ran):
    shape, weight, more, layout, (nest, constants) = REACHED[name]
    x, w, b = LAYOUTS[layout](integers(*shape)), integers(*weight), integers(weight[0])
    gy = integers(*truth(x, w, b, None, **more)[0].shape)
    assert_equal(convolved(x, w, b, gy, **more), truth(x, w, b, gy, **more), name)
    assert any(kind == nest and constants.items() <= found.items() for kind, found in ran), ran


@pytest.mark.parametrize(
    ("width", "kernel_size", "padding", "dilation", "differ"),
    [(47, 5, 12, 6, [5, 5, 8]), (5, 3, 20, 1, [4, 1, 6])],
    ids=["several", "all-outside"],
)
def test_tiles_of_pixels_that_reach_into_the_padding(width, kernel_size, padding, dilation, differ, ran):
    x, w, b = LAYOUTS["channels_last"](integers(1, 16, 9, width)), integers(16, 1, 3, kernel_size), integers(16)
    more = {"padding": (3, padding), "dilation": (3, dilation), "groups": 16}
    gy = integers(*truth(x, w, b, None, **more)[0].shape)
    assert_equal(convolved(x, w, b, gy, **more), truth(x, w, b, gy, **more), more)
    assert [len(constants["sides"]) for kind, constants in ran if kind in (OF_PIXELS, LAST_PRODUCTS)] == differ


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "padding"),
    [
        ((5, 4, 6), (2, 3, 3), (1, 2, 2), 0),
        ((5, 7, 6), (3, 3, 3), 2, 0),
        ((5, 7, 2), (3, 1, 2), (1, 2, 2), 0),  # no tap reads every other row
        ((5, 7, 2), (3, 1, 2), (1, 2, 2), (0, 1, 0)),  # the first among these
        ((6, 9, 5), (3, 1, 1), (2, 2, 1), 0),  # nor the last slice
        # As many correlations as steps of the last two axes would make.
        ((4, 1, 6), (2, 1, 2), 2, 0),
        ((4, 1, 6), (2, 1, 1), (2, 2, 1), 0),
        ((4, 4, 1), (2, 2, 1), (2, 1, 2), 0),
        ((1, 4, 6), (1, 2, 2), 2, 0),
    ],
)
def test_depthwise_slices_that_lie_apart(size, kernel_size, stride, padding, layout):
    x, w, b = LAYOUTS[layout](integers(2, 16, *size)), integers(16, 1, *kernel_size), integers(16)
    more = {"stride": stride, "padding": padding, "groups": 16}
    gy = integers(*truth(x, w, b, None, **more)[0].shape)
    assert_equal(convolved(x, w, b, gy, **more), truth(x, w, b, gy, **more), more)


@pytest.mark.parametrize(("stride", "pixels"), [(1, 8), (2, 4)])
def test_maps_beyond_the_caches(stride, pixels, ran, monkeypatch):
    """What is asked for ahead may lie behind the last map."""
    monkeypatch.setattr(ahead, "CACHED", 0)
    x, w, b = LAYOUTS["channels_last"](integers(2, 20, 9, 48 * stride)), integers(20, 1, 3, 3), integers(20)
    more = {"stride": stride, "padding": 1, "groups": 20}
    gy = integers(*truth(x, w, b, None, **more)[0].shape)
    assert_equal(convolved(x, w, b, gy, **more), truth(x, w, b, gy, **more), more)
    assert [constants["pixels"] for kind, constants in ran if kind == OF_PIXELS] == [pixels, pixels]


def test_an_epilogue_reaches_the_nests(ran):
    x, w = integers(1, 4, 6, 64), integers(8, 4, 3, 3)
    for layout in ("contiguous", "channels_last"):
        F.conv2d(LAYOUTS[layout](x), w, padding=1, after="relu")
    assert [constants["after"].name for _, constants in ran] == ["relu", "relu"]
    assert [kind for kind, _ in ran] == [PIXELS, CHANNELS]


NARROW = """
import sys; sys.path.insert(0, "tests")
import torch, test_conv as tests
from fastpool.kernels.simd import native_lanes
from fastpool.kernels.cpu import blocking
from numba import float32
print(native_lanes(float32), blocking.registers(), end=" ")
for shape, weight, more, layout in (
    ((1, 17, 7, 9), (19, 17, 3, 3), {"padding": 1}, "contiguous"),
    ((1, 3, 9, 24), (4, 3, 1, 2), {"stride": (1, 2)}, "contiguous"),
    ((2, 5, 4, 8), (7, 5, 1, 1), {}, "channels_last"),
    ((2, 5, 24, 25), (7, 5, 1, 1), {}, "contiguous"),
    ((2, 7, 24, 25), (5, 7, 1, 1), {}, "contiguous"),
    ((2, 24, 9, 13), (24, 1, 3, 3), {"stride": 2, "padding": 1, "groups": 24}, "channels_last"),
    ((1, 5, 9, 13), (5, 1, 3, 3), {"padding": 1, "groups": 5}, "channels_last"),
):
    x, w, b = tests.LAYOUTS[layout](tests.integers(*shape)), tests.integers(*weight), tests.integers(weight[0])
    gy = tests.integers(*tests.truth(x, w, b, None, **more)[0].shape)
    tests.assert_equal(tests.convolved(x, w, b, gy, **more), tests.truth(x, w, b, gy, **more), (shape, weight, more, layout))
print("same")
"""


@pytest.mark.parametrize("register_bytes", [16, 32])
def test_narrower_registers(register_bytes):
    """The code of a CPU with AVX2 or NEON, run here."""
    found = run(NARROW, FASTPOOL_REGISTER_BYTES=str(register_bytes))
    assert re.fullmatch(rf"{register_bytes // 4} (16|32) same", found)


# Threads


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "weight", "more"),
    [
        ((1, 32, 28, 28), (48, 32, 3, 3), {"padding": 1}),
        ((3, 48, 10, 10), (48, 6, 3, 3), {"stride": 2, "groups": 8}),
        ((2, 48, 29, 29), (80, 24, 1, 1), {"groups": 2}),
    ],
    ids=["one-image", "groups", "planes"],
)
def test_bits_do_not_depend_on_threads(shape, weight, more, layout, small):
    small("model", 1 << 20)
    x, w, b = LAYOUTS[layout](torch.randn(shape)), torch.randn(weight), torch.randn(weight[0])
    gy = torch.randn_like(T.conv2d(x, w, b, **more))
    found = []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        found.append(convolved(x, w, b, gy, **more))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    # torch sums the bias's gradient, by as many threads as it likes.
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][:3], others[:3], strict=True))


def test_large_convolutions_are_shared_by_threads():
    """Enough products for two threads, and enough jobs."""
    x, w = torch.randn(1, 32, 28, 28), torch.randn(128, 32, 3, 3)
    here = convolution.called(convolution.asked("conv2d", 2, 1, 1, 1, 1), x, w)
    for plan in (here.forward(None), here.input_gradient):
        assert plan.parallel
        assert all(part.plan.jobs >= 2 for part in plan.parts)
    assert here.weight_gradient.plan.jobs >= 2
    tiny = convolution.called(convolution.asked("conv2d", 2, 1, 1, 1, 1), x[..., :4, :4], w[:4])
    assert not tiny.forward(None).parallel


# Memory


def test_memory_is_a_panel_and_the_weights():
    packed, panels = convolution.memory((1, 64, 56, 56), (64, 64, 3, 3), padding=1, threads=2)
    assert 4 * 64 * 64 * 9 <= packed <= 1.1 * 4 * 64 * 64 * 9
    assert panels <= 2 * (blocking.l2_bytes() // blocking.PART_OF_L2 + 64 * 1024)


# Epilogues

AFTER = {
    "relu": ("relu", T.relu),
    "relu6": ("relu6", T.relu6),
    "leaky_relu": ("leaky_relu", T.leaky_relu),
    "ReLU()": (torch.nn.ReLU(), T.relu),
    "ReLU(inplace)": (torch.nn.ReLU(inplace=True), T.relu),
    "ReLU6()": (torch.nn.ReLU6(), T.relu6),
    "LeakyReLU(0.25)": (torch.nn.LeakyReLU(0.25), lambda y: T.leaky_relu(y, 0.25)),
    "Hardtanh(-2, 3)": (torch.nn.Hardtanh(-2, 3), lambda y: T.hardtanh(y, -2, 3)),
    "Threshold(1, 5)": (torch.nn.Threshold(1, 5), lambda y: T.threshold(y, 1, 5)),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", AFTER)
def test_an_activation_after(name, layout):
    """Equal to the two steps, bit for bit, and so are its gradients on integers; NaN stays."""
    after, step = AFTER[name]
    x, w, b = LAYOUTS[layout](integers(1, 3, 9, 21)), integers(5, 3, 3, 3), integers(5)
    gy = integers(1, 5, 9, 21)
    found = convolved(x, w, b, gy, padding=1, after=after)
    assert torch.equal(found[0], step(F.conv2d(x, w, b, padding=1)))
    expected = convolved(x, w, b, gy, lambda *a, **m: step(F.conv2d(*a, **m)), padding=1)
    # A slope of 0.01 makes no integers of gy: other sums, other rounding.
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if name == "leaky_relu" else {"rtol": 0, "atol": 0}
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    with torch.no_grad():
        assert torch.equal(F.conv2d(x, w, b, padding=1, after=after), found[0])
        x[0, 0, 4, 4] = math.nan
        torch.testing.assert_close(F.conv2d(x, w, b, 1, 1, after=after), step(T.conv2d(x, w, b, 1, 1)), equal_nan=True, check_stride=False)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_affine(dtype, layout):
    """Equal to the steps within rounding, with and without a bias and an activation; exact where scales are powers of two."""
    kind = DTYPES[dtype]
    x, w, b = LAYOUTS[layout](torch.randn(2, 8, 7, 17).to(kind)), torch.randn(12, 4, 3, 3).to(kind), torch.randn(12).to(kind)
    scale, shift = torch.randn(12).to(kind), torch.randn(12).to(kind)
    a, c = (t.view(-1, 1, 1) for t in (scale, shift))
    for bias in (None, b):
        for after, step in ((None, lambda y: y), ("relu", torch.relu)):
            found = F.conv2d(x, w, bias, 1, 1, 1, 2, affine=(scale, shift), after=after)
            torchs = step(T.conv2d(x, w, bias, 1, 1, 1, 2) * a + c)
            r = truth(x, w, bias, None, padding=1, groups=2, exact=None)[0]
            exact = r * a.numpy().astype(r.dtype) + c.numpy().astype(r.dtype)
            no_worse([found], [torchs], [np.maximum(exact, 0) if after else exact], "affine")
    x, w, b = integers(1, 3, 8, 9), integers(5, 3, 2, 2), integers(5)
    scale, shift = torch.tensor([2.0, -0.5, 4.0, 0.0, 1.0]), integers(5)
    expected = T.conv2d(x, w, b) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    assert torch.equal(F.conv2d(x, w, b, affine=(scale, shift)), expected)


def test_affine_under_grad(small):
    """Gradients of the scale and the shift too: the steps, one by one."""
    small("model", 1 << 20)
    x, w, b, scale, shift = integers(2, 3, 8, 9), integers(5, 3, 2, 2), integers(5), integers(5), integers(5)
    leaves = [t.double().requires_grad_() for t in (x, w, b, scale, shift)]
    y = F.conv2d(*leaves[:3], affine=tuple(leaves[3:]), after="leaky_relu")
    others = [t.detach().clone().requires_grad_() for t in leaves]
    expected = T.leaky_relu(T.conv2d(*others[:3]) * others[3].view(-1, 1, 1) + others[4].view(-1, 1, 1))
    torch.testing.assert_close(y, expected)
    gy = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, leaves, gy), torch.autograd.grad(expected, others, gy), strict=True):
        torch.testing.assert_close(ours, theirs)
    only = shift.clone().requires_grad_()
    F.conv2d(x, w, affine=(scale, only)).sum().backward()
    assert only.grad.tolist() == [2 * 7 * 8] * 5
