"""Every kind x geometry x layout x dtype, forward and backward, against the float64 reference and against torch."""

import math

import pytest
import reference
import torch
import torch.nn.functional as T
from cases import DTYPES, EVERY_KIND, EVERY_NEST, GEOMETRIES, LAYOUTS, adversarial, window
from fastpool.kernels.cpu import choice, flat, pooling
from fastpool.kernels.geometry import Geometry, dense_strides
from fastpool.kernels.pool import KINDS
from fastpool.kernels.simd import native_lanes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numba import float32, uint8

import fastpool.functional as F
from fastpool import backend
from fastpool.backend import Pooling
from fastpool.functional import _pooled, _with_indices

EVERYWHERE, THROUGH_NESTS = ("max", "avg", "l2"), ("stochastic", "gem", "soft")
"""A kernel takes a second to compile, and neither a nest nor a pooling type knows the other: a few types go everywhere, and those with a
survey, parameters or a state of several numbers through each nest; float64 of the others is test_gradients'."""


def places(kinds):
    """(kind, geometry, dtype)"""
    found = []
    for kind in kinds:
        names = GEOMETRIES if kind in EVERYWHERE else EVERY_NEST if kind in THROUGH_NESTS else EVERY_KIND
        found += [(kind, name, "f32") for name in names]
        found += [(kind, name, "f64") for name in EVERY_KIND if kind in EVERYWHERE]
    return found


SUMMING = [name for name, kind in KINDS.items() if not kind.selects]
SELECTING = [name for name, kind in KINDS.items() if kind.selects and not kind.draws]


def op(kind, w, rank=None, **more):
    return Pooling("test", KINDS[kind], rank or w.rank, w, reference.PARAMETERS.get(kind, ()), **more)


def leaf(x):
    """x as a leaf that keeps its strides."""
    return x.detach().requires_grad_()


def largest(x):
    return x.abs().nan_to_num(0, 0, 0).max().item() if x.numel() else 0.0


def no_worse(ours, truth, theirs, what):
    """The rule for sums: NaN where the truth has it, and at most twice torch's own error against float64, plus one rounding.

    ``theirs`` is torch's float32.  Of a float64 result torch's error is taken to be that, scaled down; and the truth, no more
    precise then, is granted as much.
    """
    assert torch.equal(ours.isnan(), truth.isnan()), what
    rounding, torchs = torch.finfo(ours.dtype).eps * largest(truth), largest(theirs.double() - truth)
    if ours.dtype == torch.float32:
        bound = 2 * torchs + rounding
    else:
        scaled = torchs * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        bound = (2 * scaled + rounding) + (scaled + rounding)
    error = largest(ours.double() - truth)
    assert error <= bound, f"{what}: error {error}, at most {bound}"


def test_every_kind_has_a_reference():
    assert set(reference.REFERENCE) == set(KINDS)


@pytest.mark.parametrize(("kind", "geometry", "dtype"), places(SELECTING))
def test_selecting(kind, geometry, dtype):
    """Values, indices and gradients are the reference's bit for bit, in every layout, with NaN, infinities and ties."""
    shape, w = GEOMETRIES[geometry]
    x = adversarial(shape, DTYPES[dtype])
    truth, chosen = reference.pool(KINDS[kind], x, w)
    gy = torch.randint(-4, 5, truth.shape).to(x)
    plane = torch.zeros_like(x).flatten(2)
    valid = (chosen >= 0) & (chosen < plane.shape[2])
    gx = plane.scatter_add(2, chosen.where(valid, 0).flatten(2), gy.where(valid, 0).flatten(2)).reshape(shape)
    for name, layout in LAYOUTS.items():
        a = leaf(layout(x))
        y, flat = _with_indices(a, op(kind, w))
        y.backward(gy)
        assert torch.equal(y.nan_to_num(77), truth.nan_to_num(77)), name
        assert torch.equal(y.isnan(), truth.isnan()), name
        assert torch.equal(flat.where(valid, 0), chosen.where(valid, 0)), name
        assert torch.equal(a.grad, gx), name  # integers: sums in any order are the same


CLEAN = (
    "3x3s1p1",
    "3x3s1p1-parts",
    "5x5s1p2",
    "3x3s1p1-wide",
    "3x3s1-dilated",
    "narrow-3x3s2p1",
    "narrow-2x2s1",
    "flat-3x3s1p1",
    "flat-3x3s2p1",
    "2x2s1-many-channels",
    "1d-31s1p15",
)
"""Of GEOMETRIES, where nests look for NaN, and what stands beside them."""


@pytest.mark.parametrize("kind", ["max", "min"])
@pytest.mark.parametrize("geometry", CLEAN)
def test_nan_is_found_wherever_it_lies(kind, geometry):
    """Nests that look for NaN first take a quicker way where there is none: no NaN, and one at every tenth place in turn."""
    shape, w = GEOMETRIES[geometry]
    clean = adversarial(shape, torch.float32, special=False)
    pool = op(kind, w)
    for at in (None, *range(0, clean.numel(), 1 + clean.numel() // 10), clean.numel() - 1):
        x = clean.clone()
        if at is not None:
            x.view(-1)[at] = math.nan
        truth, chosen = reference.pool(KINDS[kind], x, w)
        for name in ("contiguous", "channels_last", "cropped"):
            y, flat = _with_indices(LAYOUTS[name](x), pool)
            assert torch.equal(y.nan_to_num(77), truth.nan_to_num(77)), (name, at)
            assert torch.equal(y.isnan(), truth.isnan()), (name, at)
            assert torch.equal(flat, chosen), (name, at)


@pytest.mark.parametrize(("kind", "value"), [("max", -math.inf), ("min", math.inf)])
@pytest.mark.parametrize("geometry", [name for name in EVERY_NEST if "dilated" not in name] + ["2x2s2", "1d-5s7d2"])
def test_first_inside_is_chosen_where_no_element_wins(kind, value, geometry):
    """Of windows of nothing but the value that every other beats."""
    shape, w = GEOMETRIES[geometry]
    x = torch.full(shape, value)
    _, chosen = reference.pool(KINDS[kind], x, w)
    for name, layout in LAYOUTS.items():
        y, flat = _with_indices(layout(x), op(kind, w))
        assert (y == value).all(), name
        assert torch.equal(flat, chosen), name


@pytest.mark.parametrize(("kind", "geometry", "dtype"), places(SUMMING))
def test_summing(kind, geometry, dtype):
    shape, w = GEOMETRIES[geometry]
    x = torch.randn(shape).to(DTYPES[dtype])
    extra = reference.PARAMETERS.get(kind, ())
    truth, theirs = (x.to(t, copy=True).requires_grad_() for t in (torch.float64, torch.float32))
    y64, y32 = (reference.pool(KINDS[kind], t, w, extra=extra)[0] for t in (truth, theirs))
    gy = torch.randn_like(y32)
    y64.backward(gy.double())
    y32.backward(gy)
    for name, layout in LAYOUTS.items():
        a = leaf(layout(x))
        y = _pooled(a, op(kind, w))
        y.backward(gy.to(y))
        no_worse(y.detach(), y64.detach(), y32.detach(), f"{name} value")
        no_worse(a.grad, truth.grad, theirs.grad, f"{name} gradient")


@pytest.mark.parametrize("include_pad", [True, False])
@pytest.mark.parametrize("divisor", [None, 3, -2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_avg_counts(include_pad, divisor, layout):
    for name in ("3x3s2p1", "stride-over-kernel-ceil", "2x2s2-ceil", "flat-3x3s1p1", "flat-3x3s2p1"):
        shape, w = GEOMETRIES[name]
        x = LAYOUTS[layout](torch.randn(shape))
        a, b = leaf(x), leaf(x)
        y = F.avg_pool2d(a, w.kernel_size, w.stride, w.padding, w.ceil_mode, include_pad, divisor)
        theirs = T.avg_pool2d(b, w.kernel_size, w.stride, w.padding, w.ceil_mode, include_pad, divisor)
        gy = torch.randn_like(theirs)
        y.backward(gy)
        theirs.backward(gy)
        truth, _ = reference.pool(KINDS["avg"], x.double(), w, include_pad, divisor)
        no_worse(y.detach(), truth, theirs.detach(), "value")
        torch.testing.assert_close(a.grad, b.grad)
        assert y.stride() == theirs.stride()


WINDOWS = (((2, 2), (2, 2)), ((3, 1), (3, 1)), ((3, 2), (3, 2)), ((4, 3), (3, 2)), ((1, 1), (9, 3)), ((6, 1), (9, 1)), ((5, 4), (2, 6)))
"""((kernel_size, stride) of rows, of columns)"""


@st.composite
def geometries(draw):
    """Shape, kernel, stride, padding, dilation, ceil_mode: a few windows of each nest, or compiling would take minutes; all else random.

    Of 32 channels every register is full: those of channels_last go by loops of their own."""

    def axis(k, s):
        d = draw(st.sampled_from([1, 1, 2])) if dilates else 1
        extent = d * (k - 1) + 1
        p = draw(st.integers(0, k // 2))
        return k, s, p, d, draw(st.integers(max(1, extent - 2 * p), extent + 40))

    dilates, (rows, columns) = draw(st.booleans()), draw(st.sampled_from(WINDOWS))
    kh, sh, ph, dh, h = axis(*rows)
    kw, sw, pw, dw, w = axis(*columns)
    ceil = draw(st.booleans())
    return (draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3, 32])), h, w), ((kh, kw), (sh, sw), (ph, pw), (dh, dw), ceil)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(geometries(), st.sampled_from(list(LAYOUTS)), st.integers(0, 2**31))
def test_max_is_torchs_at_any_geometry(geometry, layout, seed):
    torch.manual_seed(seed)
    shape, arguments = geometry
    x = LAYOUTS[layout](adversarial(shape, torch.float32))
    a, b = leaf(x), leaf(x)
    try:
        theirs, index = T.max_pool2d(b, *arguments, return_indices=True)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            F.max_pool2d(a, *arguments)
        return
    ours, ours_index = F.max_pool2d(a, *arguments, return_indices=True)
    assert torch.equal(ours.nan_to_num(77), theirs.nan_to_num(77))
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours_index, index)
    w = window(*arguments)
    if (reference.taps(w, *shape[2:])[0] >= 0).any(-1).all():  # torch sends the gradient of windows of nothing but padding anywhere
        gy = torch.randint(-4, 5, theirs.shape).float()
        ours.backward(gy)
        theirs.backward(gy)
        assert torch.equal(a.grad, b.grad)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(geometries(), st.sampled_from(list(LAYOUTS)), st.booleans(), st.integers(0, 2**31))
def test_avg_is_torchs_at_any_geometry(geometry, layout, include_pad, seed):
    """Errors are the largest of several maps': of a single sum torch may be lucky."""
    torch.manual_seed(seed)
    shape, (kernel, stride, padding, _, ceil) = geometry
    found = []
    for _ in range(8):
        x = LAYOUTS[layout](torch.randn(shape))
        a, b = leaf(x), leaf(x)
        try:
            theirs = T.avg_pool2d(b, kernel, stride, padding, ceil, include_pad)
        except RuntimeError:
            with pytest.raises(RuntimeError):
                F.avg_pool2d(a, kernel, stride, padding, ceil, include_pad)
            return
        ours = F.avg_pool2d(a, kernel, stride, padding, ceil, include_pad)
        gy = torch.randn_like(theirs)
        ours.backward(gy)
        theirs.backward(gy)
        torch.testing.assert_close(a.grad, b.grad)
        truth, _ = reference.pool(KINDS["avg"], x.double(), window(kernel, stride, padding, (1, 1), ceil), include_pad)
        found.append((ours.detach(), truth, theirs.detach()))
    no_worse(*map(torch.stack, zip(*found, strict=True)), "value")


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from([((3, 3), (1, 1), (1, 1)), ((3, 3), (2, 2), (1, 1)), ((2, 2), (2, 2), (0, 0))]),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(2, 32), st.integers(2, 32)),
    st.sampled_from(["contiguous", "sliced"]),
    st.booleans(),
    st.sampled_from([None, math.nan, 3e38]),
    st.integers(0, 2**31),
)
def test_many_small_maps_are_torchs(w, shape, layout, ceil_mode, odd, seed):
    """Maps as one long row: batches of any number, their ends, views with gaps between images; values that make a batch be done again."""
    torch.manual_seed(seed)
    x = torch.randint(-3, 4, shape).float()
    if odd is not None:
        x[torch.rand(shape) < 0.01] = odd
    for ours, theirs in ((F.max_pool2d, T.max_pool2d), (F.avg_pool2d, T.avg_pool2d)):
        a, b = leaf(LAYOUTS[layout](x)), leaf(x.clone())
        y, z = ours(a, *w, ceil_mode=ceil_mode), theirs(b, *w, ceil_mode=ceil_mode)
        torch.testing.assert_close(y, z, equal_nan=True)
        torch.testing.assert_close(ours(a.detach(), *w, ceil_mode=ceil_mode), z.detach(), equal_nan=True)
        gy = torch.randint(-4, 5, z.shape).float()
        y.backward(gy)
        z.backward(gy)
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("kernel", [(2, 2), (3, 3), (1, 2), (2, 1)])
@pytest.mark.parametrize("size", [(1, 48), (1, 243), (1, 1024), (4, 64), (16, 16)], ids=str)
def test_outputs_have_room_where_they_are_copied(kernel, size):
    """Those of a batch and of all that its elements reach, and the counts before a batch's first, whatever a nest is asked for."""
    w = window((1, *kernel), (1, 1, 1), (0, *(k // 2 for k in kernel)))
    geometry = Geometry("float32", (1, 64, 1, *size), dense_strides(64, (1, *size), False), False, w, include_pad=False)
    chosen = choice.backward(choice.Asked(KINDS["avg"], geometry, float32, uint8))
    if chosen.nest is flat.spread:
        across, down = chosen.constants[4:6]
        _, group, _, outputs, row = chosen.sizes[4:]
        before = (down - 1) * row + across - 1
        assert before + group * outputs + row + native_lanes(float32) <= flat.ROOM + 2 * flat.MARGIN
        assert before <= flat.MARGIN
    assert (chosen.nest is flat.spread) == (size in ((1, 48), (4, 64), (16, 16)))


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, -1, -1.5, -2])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_lp_is_torchs_on_positive_input(p, ceil_mode):
    x = torch.rand(2, 3, 9, 20) + 0.1
    a, b = leaf(x), leaf(x)
    ours, theirs = F.lp_pool2d(a, p, 3, 2, ceil_mode), T.lp_pool2d(b, p, 3, 2, ceil_mode)
    ours.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(a.grad, b.grad)


def test_lp_at_zero_and_infinity():
    x = torch.zeros(1, 1, 2, 4, requires_grad=True)
    for y in (F.l2_pool2d(x, 2), F.lp_pool2d(x, 3, 2), F.lp_pool2d(x, float("inf"), 2)):
        assert torch.equal(y, torch.zeros(1, 1, 1, 2))
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros_like(x))
    x = torch.tensor([[[[-3.0, 3.0, 1.0], [2.0, 0.0, -5.0]]]], requires_grad=True)
    y = F.lp_pool2d(x, float("inf"), 2, 1)
    assert y.flatten().tolist() == [3, 5]
    y.sum().backward()
    ours = x.grad.clone()
    x.grad = None
    (torch.linalg.vector_norm(x[..., :2].flatten(), torch.inf) + torch.linalg.vector_norm(x[..., 1:].flatten(), torch.inf)).backward()
    assert torch.equal(ours, x.grad)


def test_unbatched_empty_and_memory_format():
    x = torch.randn(3, 8, 20)
    assert torch.equal(F.max_pool2d(x, 2), T.max_pool2d(x, 2))
    assert all(map(torch.equal, F.max_pool2d(x, 2, return_indices=True), T.max_pool2d(x, 2, return_indices=True)))
    assert F.global_avg_pool2d(x).shape == (3, 1, 1)
    assert F.global_avg_pool2d(x, keepdim=False).shape == (3,)
    none = torch.randn(0, 3, 8, 8, requires_grad=True)
    for y in (F.max_pool2d(none, 2), F.avg_pool2d(none, 3, 2, 1), F.global_l2_pool2d(none), F.stochastic_pool2d(none, 2)):
        assert y.shape[0] == 0
        assert torch.autograd.grad(y.sum(), none)[0].shape == none.shape
    last = torch.randn(2, 3, 8, 20).to(memory_format=torch.channels_last)
    for y in (F.max_pool2d(last, 2), F.avg_pool2d(last, 2), F.stochastic_pool2d(last, 2)):
        assert y.is_contiguous(memory_format=torch.channels_last)


GLOBAL = [(2, 3, 1, 1), (2, 5, 7, 7), (1, 70, 3, 5), (1, 70, 9, 13), (5, 13, 17, 19)]
"""Few planes and many: several go together."""


@pytest.mark.parametrize("shape", [*GLOBAL, (2, 3, 40, 57)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_global_selecting(shape, dtype):
    """Ties and NaN across registers and rows: torch's element, not just torch's value."""
    for special in (False, True):
        x = adversarial(shape, DTYPES[dtype], special)
        for kind, theirs in (("max", lambda t: T.adaptive_max_pool2d(t, 1, True)), ("min", None)):
            truth, chosen = reference.pool(KINDS[kind], x, None)
            if theirs:
                value, index = theirs(x)
                assert torch.equal(truth.nan_to_num(77), value.nan_to_num(77))
                assert torch.equal(chosen, index)
            for name, layout in LAYOUTS.items():
                a = leaf(layout(x))
                y, flat = _with_indices(a, op(kind, None, x.dim() - 2))
                assert torch.equal(y.nan_to_num(77), truth.nan_to_num(77)), name
                assert torch.equal(flat, chosen), name
                y.backward(torch.ones_like(y))
                gx = torch.zeros_like(x).flatten(2).scatter(2, chosen.flatten(2), 1.0).reshape(shape)
                assert torch.equal(a.grad, gx), name


@pytest.mark.parametrize("shape", [*GLOBAL, (2, 3, 120, 157)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", SUMMING)
def test_global_summing(kind, shape, dtype):
    x = torch.randn(shape).to(DTYPES[dtype])
    truth, theirs = (x.to(t, copy=True).requires_grad_() for t in (torch.float64, torch.float32))
    y64, y32 = (reference.pool(KINDS[kind], t, None, extra=reference.PARAMETERS.get(kind, ()))[0] for t in (truth, theirs))
    gy = torch.randn_like(y32)
    y64.backward(gy.double())
    y32.backward(gy)
    for name, layout in LAYOUTS.items():
        a = leaf(layout(x))
        y = _pooled(a, op(kind, None, x.dim() - 2))
        y.backward(gy.to(y))
        no_worse(y.detach(), y64.detach(), y32.detach(), f"{name} value")
        no_worse(a.grad, truth.grad, theirs.grad, f"{name} gradient")


def test_global_average_of_a_large_map_is_as_accurate_as_torchs():
    x = torch.rand(1, 2, 1500, 1000) + 1
    truth = x.double().mean((2, 3), keepdim=True)
    for layout in ("contiguous", "channels_last"):
        no_worse(F.global_avg_pool2d(LAYOUTS[layout](x)), truth, T.adaptive_avg_pool2d(x, 1), layout)


def test_global_pooling_of_one_column():
    """Whose last axis has a step that is nobody's."""
    for rows in (1, 40):
        x = torch.randn(2000).as_strided((2, 3, rows, 1), (900, 300, 7, 7))
        assert torch.equal(F.global_max_pool2d(x), x.amax((2, 3), keepdim=True))


@pytest.mark.parametrize("shape", [(5, 13, 17, 19), (5, 13, 40, 57)], ids=str)
def test_global_sums_do_not_depend_on_threads(shape):
    x, found = torch.randn(shape), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(F.global_l2_pool2d(x))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_nothing_is_saved_without_a_gradient(monkeypatch):
    saved = []
    plain = backend.forward
    monkeypatch.setattr(backend, "forward", lambda x, o, saves, seed=0: saved.append(saves) or plain(x, o, saves, seed))
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    with torch.no_grad():
        F.max_pool2d(x, 2)
    F.max_pool2d(x.detach(), 2)
    assert saved == [False, False]
    F.max_pool2d(x, 2)
    assert saved[2]


@pytest.mark.parametrize(("kind", "per_output"), [("max", 1), ("min", 1), ("stochastic", 1), ("avg", 0)])
def test_saved_for_backward_is_a_byte_an_output(kind, per_output):
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.numel() * t.element_size()) or t, lambda t: t):
        y = _pooled(x, op(kind, window((2, 2))))
    assert sum(seen) == per_output * y.numel()


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_bands_give_the_same(threads):
    """Few large planes are cut into bands of rows; many small ones are dealt out."""
    torch.set_num_threads(threads)
    for shape in [(1, 1, 300, 500), (1, 3, 201, 333), (4, 64, 30, 30)]:
        x = torch.randn(shape)
        for layout in ("contiguous", "channels_last"):
            a, b = leaf(LAYOUTS[layout](x)), leaf(LAYOUTS[layout](x))
            ours, theirs = F.max_pool2d(a, 3, 2, 1), T.max_pool2d(b, 3, 2, 1)
            gy = torch.randint(-4, 5, theirs.shape).float()
            ours.backward(gy)
            theirs.backward(gy)
            assert torch.equal(ours, theirs)
            assert torch.equal(a.grad, b.grad)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("kind", ["max", "avg", "l2"])
@pytest.mark.parametrize(("shape", "layout"), [((1, 2, 18, 1024), "contiguous"), ((2, 32, 9, 10), "channels_last")])
def test_results_are_the_same_past_the_caches(kind, shape, layout, monkeypatch):
    """Those of 64 MB and more are written past them, and what is read asked for ahead from 8 MB on; here all that can be."""
    x = LAYOUTS[layout](torch.randn(shape))

    def pooled(w):
        a = leaf(x)
        y = _pooled(a, Pooling("test", KINDS[kind], 2, w))
        y.backward((torch.arange(y.numel()) % 7.0).reshape(y.shape))
        return y.detach(), a.grad

    windows = (None, window((2, 2)), window((3, 3), (1, 1), (1, 1)))
    through = [pooled(w) for w in windows]
    monkeypatch.setattr(choice, "PAST", 0)
    monkeypatch.setattr(choice.ahead, "CACHED", 0)
    plans = pooling.forward, pooling.backward
    try:
        for plan in plans:
            plan.cache_clear()
        past = [pooled(w) for w in windows]
    finally:
        for plan in plans:
            plan.cache_clear()
    for found, expected in zip(past, through, strict=True):
        assert all(map(torch.equal, found, expected))


MAPS = {  # name -> x made such: what a quick look at a plane's largest element may not get wrong
    "normal": lambda x: x,
    "nan": lambda x: torch.where(torch.rand_like(x) < 0.01, math.nan, x),
    "infinite": lambda x: torch.where(torch.rand_like(x) < 0.01, -math.inf, x),
    "all-infinite": lambda x: torch.full_like(x, math.inf).copysign(x[:, :1, :1, :1]),
    "zeros": lambda x: torch.zeros_like(x).copysign(x),
    "no-negative-zero": lambda x: torch.zeros_like(x),
    "none-below-0": lambda x: x.relu().copysign(x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("content", MAPS)
@pytest.mark.parametrize("shape", [(2, 40, 7, 7), (16, 16, 13, 14), (3, 5, 32, 32), (1, 2, 40, 41)], ids=str)
@pytest.mark.parametrize("pool", [F.global_max_pool2d, F.global_min_pool2d], ids=["max", "min"])
def test_a_map_without_its_places(pool, shape, content, dtype):
    """Without a gradient a plane's elements are looked at as if none were NaN, and its zeros had one sign: the bits are the same."""
    x = MAPS[content](torch.randn(shape)).to(dtype)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    expected = pool(x.clone().requires_grad_()).detach()
    for inside in (x, torch.cat([x, x], 1)[:, : shape[1]]):
        assert torch.equal(pool(inside).view(bits), expected.view(bits))
