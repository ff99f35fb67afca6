"""CUDA's kernels over a hundred geometries of every kind and dtype: selections are the CPU kernels' bit for bit, sums no worse than theirs.

What a kernel is compiled for, its window above all, is not drawn, or compiling would take minutes; what it lies on is.
"""

import functools
from typing import Any, NamedTuple

import emulated
import pytest
import reference
import torch
from cases import LAYOUTS, adversarial
from emulated import names
from fastpool.kernels.pool import FLOATS, INTEGERS, KINDS
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from test_conv import DTYPES, assert_equal, both_sides, convolved, integers, truth
from test_conv import PLACES as CONVOLVED
from test_pooling import SUMMING, largest, leaf, no_worse

import fastpool.functional as F
from fastpool.activations import named, on_torch
from fastpool.autograd import activate
from fastpool.backend import Pooling
from fastpool.functional import _pooled, _with_indices
from fastpool.window import Adaptive, Bins, Window

pytestmark = emulated.needs_toolchain

NARROW = torch.bfloat16, torch.float16
hundred = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def windows(draw, kernel, stride, dilation=None):
    """(shape, window, layout): of widths and channels that vectors of four do not divide, and no window a whole map."""
    dilation = dilation or (1,) * len(kernel)
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    least = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation, strict=True)]
    *sizes, width = (draw(st.integers(n, n + 5)) for n in least)
    width += 1 if (width + 1) % 4 else 2
    shape = draw(st.integers(1, 2)), draw(st.integers(1, 3)), *sizes, width
    return shape, Window(kernel, stride, padding, dilation, draw(st.booleans())), draw(LAID)


@st.composite
def fours(draw):
    """Of such as they divide."""
    layout, channels = draw(st.sampled_from([("contiguous", 3), ("sliced", 3), ("channels_last", 4)]))
    shape = draw(st.integers(1, 2)), channels * draw(st.integers(1, 2)), draw(st.integers(1, 9)), 4 * draw(st.integers(1, 3))
    return shape, Window((3, 3), (2, 2), (1, 1), (1, 1), layout == "channels_last" and draw(st.booleans())), layout


LAID = st.sampled_from(list(LAYOUTS))
LARGEST_OF_3 = [(n, out) for n in range(2, 12) for out in range(2, n) if n % out and Bins((n,), (out,)).kernel_size == (3,)]
"""(size, outputs) of adaptive pooling with bins of several sizes, of which the largest is 3."""


@st.composite
def bins(draw):
    sizes, outputs = zip(*(draw(st.sampled_from(LARGEST_OF_3)) for _ in range(2)), strict=True)
    return (draw(st.integers(1, 2)), draw(st.integers(1, 3)), *sizes), Adaptive(outputs), draw(LAID)


@st.composite
def maps(draw, layouts=("contiguous", "channels_last")):
    """Of few elements, which a warp shares where they are contiguous, and of more than 1,024, which a block does."""
    layout, images = draw(st.sampled_from(layouts)), (draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    if layout != "channels_last" and draw(st.booleans()):
        return (*images, draw(st.integers(33, 36)), draw(st.integers(32, 40))), None, layout
    return (*images, draw(st.integers(1, 12)), draw(st.integers(2, 20))), None, layout


class Place(NamedTuple):
    drawn: Any
    """Strategy of (shape, window as ``Pooling`` has it, layout)."""
    kernels: set[str]
    """Which must have run; forward alone, of integers."""


BY_ONE = {"windows.forward", "windows.backward"}
PLACES = {
    "window": Place(windows((3, 3), (2, 2)), BY_ONE),
    "fours": Place(fours(), {"wide.forward", "wide.backward"}),
    "dilated": Place(windows((2, 3), (1, 3), (3, 2)), BY_ONE),
    "1-d": Place(windows((3,), (2,)), BY_ONE),
    "3-d": Place(windows((1, 3, 2), (2, 1, 3), (1, 2, 3)), BY_ONE),
    "many taps": Place(windows((7, 6), (3, 2)), BY_ONE),
    "bins": Place(bins(), BY_ONE),
    "map": Place(maps(), {"whole_map.forward", "whole_map.backward"}),
    "map with gaps": Place(maps(("cropped", "channels_last-sliced")), {"whole_map.forward", "whole_map.backward"}),
}
APART = "dilated", "1-d", "3-d", "many taps"
"""Kernels differ by these in what they do with positions, which no dtype knows of."""
SELECTIONS = [(place, "max", dtype) for place in ("window", "fours", "map") for dtype in FLOATS + INTEGERS]
SELECTIONS += [("bins", "max", dtype) for dtype in (*FLOATS, "uint8", "int64")]
SELECTIONS += [(place, "max", "float32") for place in (*APART, "map with gaps")]
SELECTIONS += [(place, "max", "uint8") for place in ("3-d", "many taps")]
SELECTIONS += [("window", "min", dtype) for dtype in ("float16", "uint8", "int64")]
SELECTIONS += [("map", "min", dtype) for dtype in ("float16", "int64")]
SELECTIONS += [("window", "stochastic", dtype) for dtype in FLOATS]
SUMS = [("window", kind, dtype) for kind in SUMMING for dtype in FLOATS]
SUMS += [("map", kind, dtype) for kind in SUMMING for dtype in ("float32", "bfloat16")]
SUMS += [("map", "avg", dtype) for dtype in ("float64", "float16")]
SUMS += [(place, "avg", dtype) for place in ("fours", "bins") for dtype in FLOATS]
SUMS += [(place, "avg", "float32") for place in (*APART, "map with gaps")]
SUMS += [("many taps", "avg", "bfloat16")]


seeded = torch.default_generator.manual_seed
"""torch.manual_seed, which writes down a stack for each device that there may be, took a twentieth of these tests."""


def pooled(x, op, gy, seed=0):
    """y; the positions chosen, if a gradient does not tell them, and of float32; and of floats the gradient."""
    floats, kind = x.is_floating_point(), op.kind
    a, positions = leaf(x) if floats else x, kind.selects and not kind.draws and x.dtype not in (torch.float64, *NARROW)
    y, *chosen = _with_indices(a, op) if positions else (_pooled(a, op, seed),)
    # Of a window of nothing but padding the position is nobody's.
    inside = [flat.where((flat >= 0) & (flat < x[0, 0].numel()), -1) for flat in chosen]
    return y.detach(), *inside, *(torch.autograd.grad(y, a, gy.to(y)) if floats else ())


def on_the_cpu(x, op, gy, seed=0):
    """The same by the CPU's kernels, each plane as an image of two channels with a gap behind them: by two kernels, where the layouts and
    sizes would take thirty."""
    if op.kind.draws:  # by the plane's number
        return pooled(LAYOUTS["channels_last-sliced"](x), op, gy, seed)
    one, other = (t.flatten(0, 1)[:, None].expand(-1, 2, *t.shape[2:]) for t in (x, gy))
    return [t[:, 0].reshape(*x.shape[:2], *t.shape[2:]) for t in pooled(LAYOUTS["channels_last-sliced"](one), op, other)]


def outputs(shape, window):
    sizes = shape[2:]
    return (*shape[:2], *((1,) * len(sizes) if window is None else window.output_size(*sizes)))


def asked(kind, shape, window, include_pad=True):
    return Pooling("test", KINDS[kind], len(shape) - 2, window, reference.PARAMETERS.get(kind, ()), include_pad)


def filled(shape, kind, dtype, values):
    """Ties, with or without NaN, infinities and extremes; or nothing but what every other number beats."""
    if values != "beaten":
        return adversarial(shape, dtype, values == "special")
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype) if dtype != torch.bool else None
    lowest, highest = (limits.min, limits.max) if limits else (0, 1)
    lowest, highest = (-torch.inf, torch.inf) if dtype.is_floating_point else (lowest, highest)
    return torch.full(shape, {"max": lowest, "min": highest, "stochastic": 0}[kind], dtype=dtype)


def same(ours, theirs):
    """Bit for bit, but for the sign of a zero and which NaN it is."""
    return torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.where(~ours.isnan(), 0), theirs.where(~theirs.isnan(), 0))


@pytest.mark.parametrize(("place", "kind", "dtype"), SELECTIONS)
def test_selections(place, kind, dtype):
    dtype, place, seen = getattr(torch, dtype), PLACES[place], set()

    @hundred
    @given(place.drawn, st.sampled_from(["tied", "special", "special", "beaten"]), st.integers(0, 2**31))
    def one(geometry, values, seed):
        seeded(seed)
        shape, window, layout = geometry
        x, op, gy = filled(shape, kind, dtype, values), asked(kind, shape, window), torch.randint(-4, 5, outputs(shape, window))
        expected = on_the_cpu(x, op, gy, seed)
        with emulated.device() as emulator:
            found = pooled(LAYOUTS[layout](x), op, gy, seed)
        assert all(map(same, found, expected))
        seen.update(names(emulator))

    one()
    assert seen >= {name for name in place.kernels if dtype.is_floating_point or "backward" not in name}


@pytest.mark.parametrize(("place", "kind", "dtype"), SUMS)
def test_sums(place, kind, dtype):
    """Those of 16 bits are rounded once; of the others none is off by more than twice what the worst of the CPU's hundred in float32 is."""
    dtype, everywhere, seen = getattr(torch, dtype), place in ("window", "fours"), set()
    place, extra, narrow, found = PLACES[place], reference.PARAMETERS.get(kind, ()), dtype in NARROW, {}
    eps = torch.finfo(dtype).eps

    @hundred
    @given(place.drawn, st.booleans() if kind == "avg" and everywhere else st.just(True), st.integers(0, 2**31))
    def one(geometry, include_pad, seed):
        seeded(seed)
        shape, window, layout = geometry
        x, op = torch.randn(shape).to(dtype), asked(kind, shape, window, include_pad)
        gy, a = torch.randint(1, 5, outputs(shape, window)), leaf(x.double())
        y = reference.pool(op.kind, a, list(window.outputs) if isinstance(window, Adaptive) else window, include_pad, extra=extra)[0]
        truth = y.detach(), *torch.autograd.grad(y, a, gy.double())
        with emulated.device() as emulator:
            ours = pooled(LAYOUTS[layout](x), op, gy)
        theirs = ours if narrow else on_the_cpu(x.float(), op, gy)
        for what, *three in zip(("value", "gradient"), ours, truth, theirs, strict=True):
            mine, true, _ = (t.flatten() for t in three)
            assert torch.equal(mine.isnan(), true.isnan()), what
            error, size = (mine.double() - true).abs().nan_to_num(0), largest(true)
            # Saved y is rounded, and a gradient may be a difference.
            rounding = eps / 2 * true.abs().clamp(min=torch.finfo(dtype).smallest_normal) + 1e-6 * size
            allowed = (4 * eps * size if what == "gradient" else rounding) if narrow else 1e3 * eps * max(1, size)
            assert not (error > allowed).any(), what  # no sum of other elements
            if not narrow:
                found.setdefault(what, []).append([t.flatten() for t in three])
        seen.update(names(emulator))

    one()
    assert seen >= place.kernels
    for what, several in found.items():
        no_worse(*map(torch.cat, zip(*several, strict=True)), what)


@pytest.mark.parametrize(("test", "kind"), [(test_selections, "max"), (test_sums, "avg")])
def test_bins_of_very_many(test, kind, monkeypatch):
    """Whose places take divisions of 64 bits: few are found so too."""
    from fastpool.kernels.cuda import pooling

    device = pooling.Device(0)
    monkeypatch.setattr(pooling, "NEAR", 0)
    monkeypatch.setattr(pooling, "on", lambda index: device)
    test("bins", kind, "float32")


# What stands beside a pooling

FUSED = {
    "two points of a window": ("max", {"before": "gelu"}, ("two_point_gelu", "two_point_chosen_gelu")),
    "two sides of a valley": ("min", {"before": "gelu"}, ("two_sides_chosen_gelu",)),
    "an activation and its switches": ("max", {"after": "relu"}, ("relu(max)", "relu_switch(max)")),
    "a slope told by y": ("min", {"after": "tanh"}, ("tanh(min)",)),
    "fed": ("avg", {"before": "relu"}, ("avg_of_relu",)),
    "a pass behind": ("l2", {"after": "silu"}, ("silu(l2)", "silu")),
    "a scale of both signs": ("max", {"affine": ((-0.5, 1.5, 2.0), (0.25, -1.0, 0.5)), "before": "relu"}, ("max", "min")),
}
"""Name -> (kind, what ``_pooled`` is told of, how the kinds and activations of its kernels begin)"""


@pytest.mark.parametrize(
    ("name", "dtype"), [(name, dtype) for i, name in enumerate(FUSED) for dtype in (torch.float32, NARROW[i % 2])], ids=str
)
def test_beside_a_pooling(name, dtype):
    """No worse than twice torch's steps of the same dtype; but those of 16 bits make elements equal, and theirs are other gradients."""
    (kind, beside, made), found, seen = FUSED[name], {}, set()
    eps, steps = torch.finfo(dtype).eps, [named("t", beside[place]) if place in beside else None for place in ("before", "after")]

    def by_steps(x, window, gy):
        y = a = leaf(x)
        if "affine" in beside:
            scale, shift = (x.new_tensor(t)[: x.shape[1], None, None] for t in beside["affine"])
            y = y * scale + shift
        y = reference.pool(KINDS[kind], on_torch(steps[0], y) if steps[0] else y, window)[0].to(x.dtype)
        y = on_torch(steps[1], y) if steps[1] else y
        return y.detach(), *torch.autograd.grad(y, a, gy.to(y))

    @hundred
    @given(PLACES["window"].drawn, st.integers(0, 2**31))
    def one(geometry, seed):
        seeded(seed)
        shape, window, layout = geometry
        # Of numbers so far apart none comes so close to another that rounding may choose.
        x, gy = (torch.randint(-24, 25, shape) / 8).to(dtype), torch.randint(1, 5, outputs(shape, window))
        if kind == "l2":
            x += 4
        affine = tuple(x.new_tensor(t)[: shape[1]] for t in beside["affine"]) if "affine" in beside else None
        with emulated.device() as emulator:
            a, op = leaf(LAYOUTS[layout](x)), asked(kind, shape, window)
            y = _pooled(a, op, 0, None, *steps, affine)
            (ga,) = torch.autograd.grad(y, a, gy.to(y))
            alone = _pooled(a.detach(), op, 0, None, *steps, affine)
        (true, gradient), (theirs, of_theirs) = by_steps(x.double(), window, gy), by_steps(x, window, gy)
        results = {"value": (y.detach(), true, theirs), "value alone": (alone, true, theirs)}
        if dtype in NARROW:
            assert largest(ga.double() - gradient) <= 4 * eps * max(largest(gradient), largest(gy))
        else:
            results["gradient"] = ga, gradient, of_theirs
        for what, three in results.items():
            found.setdefault(what, []).append([t.flatten() for t in three])
        seen.update(kernel.constants[0].name for kernel, _ in emulator.launches)

    one()
    assert all(any(kind.startswith(begin) for kind in seen) for begin in made)
    for what, several in found.items():
        ours, true, theirs = map(torch.cat, zip(*several, strict=True))
        assert largest(ours.double() - true) <= 2 * largest(theirs.double() - true) + eps * largest(true), what


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", ["gelu", "tanh"])
def test_activations(name, dtype):
    """A gradient by x, and one by y; 128 bits at once where all is aligned."""
    dtype, f, found, seen = getattr(torch, dtype), named("t", name), {}, set()

    def run(x, gy):
        a = leaf(x)
        y = activate(a, f)
        return y.detach(), *torch.autograd.grad(y, a, gy.to(y))

    @hundred
    @given(st.integers(1, 70), st.integers(0, 3), st.booleans(), st.integers(0, 2**31))
    def one(count, start, fours, seed):
        seeded(seed)
        count, start = (8 * count, 0) if fours else (count, start)
        x, gy = (3 * torch.randn(count + start)).to(dtype)[start:], torch.randint(1, 5, (count,))
        wide = leaf(x.double())
        y = on_torch(f, wide)
        truth = y.detach(), *torch.autograd.grad(y, wide, gy.double())
        with emulated.device() as emulator:
            ours = run(x, gy)
        for what, *three in zip(("value", "gradient"), ours, truth, run(x.float(), gy), strict=True):
            if dtype in NARROW:  # rounded once; the y that a slope is told by is rounded too
                error, eps = (three[0].double() - three[1]).abs(), torch.finfo(dtype).eps
                assert (error <= (eps / 2 * three[1].abs() + 1e-6 if what == "value" else 4 * eps * largest(gy))).all(), what
            else:
                found.setdefault(what, []).append(three)
        seen.update((kernel.name, kernel.constants[-1]) for kernel, _ in emulator.launches)

    one()
    many = 16 // dtype.itemsize
    assert seen >= {("elementwise.value", 1), ("elementwise.value", many), ("elementwise.gradient", 1), ("elementwise.gradient", many)}
    for what, several in found.items():
        no_worse(*map(torch.cat, zip(*several, strict=True)), what)


@pytest.mark.parametrize("dtype", ["uint8", "bool", "int8", "bfloat16", "float32", "float64"])
def test_unpooling(dtype):
    """Kernels know a dtype by its bytes alone."""
    dtype, seen = getattr(torch, dtype), set()

    def run(x, at, gy):
        a = leaf(x) if dtype.is_floating_point else x
        y = F.max_unpool2d(a, at, 2)
        return y.detach(), *(torch.autograd.grad(y, a, gy) if dtype.is_floating_point else ())

    @hundred
    @given(st.tuples(*(st.integers(1, most) for most in (2, 3, 5, 7))), LAID, LAID, st.integers(0, 2**31))
    def one(shape, layout, of_indices, seed):
        seeded(seed)
        x, size = adversarial(shape, dtype), 4 * shape[2] * shape[3]
        at = torch.rand(*shape[:2], size).argsort(-1)[..., : size // 4].reshape(shape)
        gy = adversarial((*shape[:2], 2 * shape[2], 2 * shape[3]), dtype)
        with emulated.device() as emulator:
            found = run(LAYOUTS[layout](x), LAYOUTS[of_indices](at), gy)
        assert all(map(same, found, run(x, at, gy)))
        seen.update(names(emulator))

    one()
    assert seen >= {"unpool.scatter", "unpool.gather"} if dtype.is_floating_point else {"unpool.scatter"}


# Convolutions: of small integers, whose sums are exact


@st.composite
def convolutions(draw, depthwise):
    """(x's shape, the weight's, arguments): of few steps, as each is executed, and of channels that 128 bits hold and others."""
    rank = 2 if depthwise else draw(st.sampled_from([2, 2, 2, 1, 3]))

    def each(*values):
        return tuple(draw(st.sampled_from(values)) for _ in range(rank))

    if depthwise:  # compiled for its taps, and of a gradient by the input for those that each remainder of a stride has
        groups, inputs, outputs = draw(st.integers(2, 3)), 1, draw(st.integers(1, 2))
        kernel, stride = (2, 3), draw(st.sampled_from([(1, 1), (2, 2)]))
    else:
        groups, (inputs, outputs) = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from(CHANNELS))
        kernel, stride = each(1, 1, 2, 3)[: rank - 1] + each(1, 2, 3)[:1], each(1, 1, 1, 2, 3)
    dilation, padding, sizes = (
        each(1, 1, 2) if not depthwise or max(stride) == 1 else (1, 1),
        each(0, 1, 2),
        each(1, 2, 3, *[4, 6][: 2 * (rank < 3)]),
    )
    if max(stride) == 1 and draw(st.booleans()):
        padding = "same"
    sides = both_sides(padding, kernel, dilation)
    assume(all(n + a + b > d * (k - 1) for n, k, (a, b), d in zip(sizes, kernel, sides, dilation, strict=True)))
    more = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return (draw(st.integers(1, 2)), groups * inputs, *sizes), (groups * outputs, inputs, *kernel), more


CHANNELS = (2, 3), (3, 8), (4, 4), (8, 5), (9, 2), (12, 3), (2, 33)


@functools.cache
def dividing(steps):
    """A device on which blocks that divide a sum have so many steps, at least."""
    from fastpool.kernels.cuda import convolution

    return convolution.Device(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depthwise", [False, True])
def test_convolutions(depthwise, dtype, monkeypatch):
    """Forward and all gradients; of float32 and bfloat16 some sums are divided among blocks."""
    from fastpool.kernels.cuda import convolution

    seen, least = set(), [2, 16] if dtype in ("f32", "bf16") and not depthwise else [16]

    @hundred
    @given(
        convolutions(depthwise),
        st.sampled_from(list(CONVOLVED)),
        st.sampled_from(list(CONVOLVED)),
        st.booleans(),
        st.sampled_from(least),
        st.integers(0, 2**31),
    )
    def one(geometry, place, weights_place, biased, steps, seed):
        seeded(seed)
        shape, weight, more = geometry
        x, w = CONVOLVED[place](integers(*shape, dtype=DTYPES[dtype])), CONVOLVED[weights_place](integers(*weight, dtype=DTYPES[dtype]))
        b = integers(weight[0], dtype=DTYPES[dtype]) if biased else None
        gy = integers(*truth(x, w, b, None, **more)[0].shape, dtype=DTYPES[dtype])
        monkeypatch.setattr(convolution, "SHARED", steps)
        monkeypatch.setattr(convolution, "on", lambda index: dividing(steps))
        with emulated.device() as emulator:
            found = convolved(x, w, b, gy, **more)
        assert_equal(found, truth(x, w, b, gy, **more), f"{shape} {weight} {more} {place} {weights_place}")
        seen.update(names(emulator))

    one()
    assert seen >= {"correlate.pack", "weight_gradient.ordered"} | ({"correlate.summed"} if 2 in least else set())
    assert seen >= ({"depthwise.forward", "depthwise.weights"} if depthwise else {"correlate.forward", "weight_gradient.partial"})


@pytest.mark.parametrize(
    ("pool", "window", "dtype"), [("max", (2, 2), "f32"), ("avg", (1, 4), "f64"), ("avg", (1, 4), "bf16"), ("max", (2, 2), "f16")]
)
def test_convolutions_with_pooling(pool, window, dtype):
    dtype, seen = DTYPES[dtype], set()

    @hundred
    @given(
        st.sampled_from([(1, 3, 8), (1, 12, 4), (2, 3, 5)]),
        st.tuples(st.integers(1, 2), st.integers(1, 3), *[st.integers(0, 2)] * 2),
        st.tuples(st.integers(1, 3), *[st.integers(4, 6)] * 2),
        st.sampled_from(["contiguous", "channels_last", "cropped"]),
        st.integers(0, 2**31),
    )
    def one(channels, geometry, sizes, place, seed):
        seeded(seed)
        (groups, inputs, outputs), (*kernel, down, along), (images, height, width) = channels, geometry, sizes
        x, w = (
            integers(*shape, dtype=dtype) for shape in ((images, groups * inputs, height, width + 2), (groups * outputs, inputs, *kernel))
        )
        b, more = integers(len(w), dtype=dtype), {"padding": (down, along), "groups": groups}
        with emulated.device() as emulator, torch.no_grad():
            y = F.conv_pool2d(CONVOLVED[place](x), w, b, **more, activation="relu", pool=pool, kernel_size=window)
        steps = torch.from_numpy(truth(x, w, b, None, **more)[0]).relu()
        assert torch.equal(y, getattr(torch.nn.functional, f"{pool}_pool2d")(steps, window).to(dtype))
        assert emulator.launches[1:] or not y.numel()
        seen.update(kernel.constants.index(KINDS[pool]) for kernel, _ in emulator.launches[1:])

    one()
    assert len(seen) == 1
