"""One to three spatial axes: every function against torch's of the same name, or against the one it is defined by."""

import inspect

import pytest
import reference
import torch
import torch.nn.functional as T
from cases import LAYOUTS, adversarial
from fastpool.kernels.pool import KINDS

import fastpool.functional as F
from fastpool.backend import Pooling
from fastpool.functional import _pooled, _with_indices

SHAPES = {1: (2, 5, 37), 2: (2, 5, 9, 21), 3: (2, 3, 5, 7, 13)}
RANKS = pytest.mark.parametrize("rank", SHAPES)


def named(stem, rank, library=F):
    return getattr(library, f"{stem}_pool{rank}d")


def leaf(x):
    return x.detach().requires_grad_()


def same(a, b):
    assert a.shape == b.shape
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(77), b.nan_to_num(77))


SELECTIONS = {
    "k2": (2,),
    "k3s2p1": (3, 2, 1),
    "k3s1p1d2-ceil": (3, 1, 1, 2, True),
    "k2s3-ceil": (2, 3, 0, 1, True),
    "k5s1p2": (5, 1, 2),
}


@RANKS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("arguments", SELECTIONS.values(), ids=SELECTIONS)
def test_max_and_min(rank, layout, arguments):
    """Values, indices and gradients bit for bit; min is max of the negated (no value's negative is another's)."""
    x = LAYOUTS[layout](adversarial(SHAPES[rank], torch.float32))
    for ours, sign in (("max", 1), ("min", -1)) if arguments == (3, 2, 1) else (("max", 1),):
        a, b = leaf(x), leaf(sign * x.contiguous())
        y, found = named(ours, rank)(a, *arguments, return_indices=True)
        theirs, index = named("max", rank, T)(b, *arguments, return_indices=True)
        same(y, sign * theirs)
        assert torch.equal(found, index)
        same(named(ours, rank)(x, *arguments), y)
        gy = torch.randint(-4, 5, theirs.shape).float()
        y.backward(gy)
        theirs.backward(gy)
        same(a.grad, b.grad)


@RANKS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("arguments", [(2,), (3, 2, 1), (3, 2, 1, True), (3, 2, 1, True, False), (2, 3, 0, True)], ids=str)
def test_avg(rank, layout, arguments):
    x = LAYOUTS[layout](torch.randn(SHAPES[rank]))
    a, b = leaf(x), leaf(x.contiguous())
    y, theirs = named("avg", rank)(a, *arguments), named("avg", rank, T)(b, *arguments)
    torch.testing.assert_close(y, theirs, check_stride=False)
    gy = torch.randn_like(theirs)
    y.backward(gy)
    theirs.backward(gy)
    torch.testing.assert_close(a.grad, b.grad, check_stride=False)


@RANKS
@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_lp(rank, p):
    x = torch.rand(SHAPES[rank]) + 0.1
    a, b = leaf(x), leaf(x)
    y, theirs = named("lp", rank)(a, p, 3, 2, True), named("lp", rank, T)(b, p, 3, 2, True)
    torch.testing.assert_close(y, theirs)
    y.sum().backward()
    theirs.sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(named("l2", rank)(x, 2), named("lp", rank, T)(x, 2, 2))


@RANKS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_stochastic(rank, layout):
    """What is drawn lies in its window, by one seed the same in any layout; evaluation is the expectation."""
    x = torch.rand(SHAPES[rank])
    draw = lambda t: named("stochastic", rank)(t, 2, generator=torch.Generator().manual_seed(7))
    a = leaf(LAYOUTS[layout](x))
    y = draw(a)
    assert torch.equal(y, draw(x))
    y.sum().backward()
    assert ((a.grad == 0) | (a.grad == 1)).all()
    assert a.grad.sum() == y.numel()
    torch.testing.assert_close((a.grad * x).sum(), y.sum().detach())
    sums, squares = (named("avg", rank, T)(t, 2) for t in (x, x * x))
    torch.testing.assert_close(named("stochastic", rank)(LAYOUTS[layout](x), 2, training=False), squares / sums, check_stride=False)


@RANKS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_global(rank, layout):
    x = LAYOUTS[layout](torch.randn(SHAPES[rank]))
    axes = tuple(range(-rank, 0))
    expected = {"max": x.amax(axes), "min": x.amin(axes), "avg": x.mean(axes), "l2": x.square().sum(axes).sqrt()}
    for name, value in expected.items():
        pool = named(f"global_{name}", rank)
        torch.testing.assert_close(pool(x, keepdim=False), value)
        assert pool(x).shape == (*x.shape[:2], *[1] * rank)


OUTPUTS = {
    1: [(1,), (4,), (37,), (50,), (None,)],
    2: [1, 3, (1, 7), (9, 4), (None, 3), (12, 25)],
    3: [1, 2, (5, 1, 13), (2, 3, 4), (None, 1, 5)],
}


@pytest.mark.parametrize(("rank", "out"), [(rank, out) for rank, several in OUTPUTS.items() for out in several], ids=str)
@pytest.mark.parametrize(
    ("layout", "channels"), [("contiguous", 5), ("channels_last", 5), ("channels_last", 3), ("sliced", 5), ("transposed", 5)]
)
def test_adaptive(rank, out, layout, channels):
    """Windows of one size (9 to 3), of several, overlapping (9 to 12), and the whole map; gradients of all."""
    shape = (2, channels, *SHAPES[rank][2:])
    x = adversarial(shape, torch.float32, special=layout == "contiguous")
    theirs_out = x.shape[2:] if out == (None,) else out
    a, b = leaf(LAYOUTS[layout](x)), leaf(x)
    y, found = named("adaptive_max", rank)(a, out, return_indices=True)
    theirs, index = named("adaptive_max", rank, T)(b, theirs_out, return_indices=True)
    same(y, theirs)
    assert torch.equal(found, index)
    gy = torch.randint(-4, 5, theirs.shape).float()
    y.backward(gy)
    theirs.backward(gy)
    same(a.grad, b.grad)
    same(named("adaptive_min", rank)(a, out), -named("adaptive_max", rank, T)(-x, theirs_out))

    x = torch.randn(shape)
    a, b = leaf(LAYOUTS[layout](x)), leaf(x)
    y, theirs = named("adaptive_avg", rank)(a, out), named("adaptive_avg", rank, T)(b, theirs_out)
    torch.testing.assert_close(y, theirs, check_stride=False)
    gy = torch.randn_like(theirs)
    y.backward(gy)
    theirs.backward(gy)
    torch.testing.assert_close(a.grad, b.grad, check_stride=False)


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("sizes", [(32, 32), (19, 21)], ids=str)
def test_adaptive_across_planes(kind, sizes):
    """Enough planes for a lane each; 4 KiB of them, whose lines lie in one set of the cache."""
    x = torch.randint(-9, 10, (2, 11, *sizes)).float()
    a, b = leaf(x), leaf(x)
    y, theirs = (named(f"adaptive_{kind}", 2, library)(t, (7, 5)) for t, library in ((a, F), (b, T)))
    torch.testing.assert_close(y, theirs)
    gy = torch.randn_like(theirs)
    y.backward(gy)
    theirs.backward(gy)
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("kind", ["max", "min", "avg"])
@pytest.mark.parametrize(("shape", "out"), [((1, 2, 7), [3]), ((2, 3, 10, 7), [4, 3]), ((1, 2, 3, 5, 7), [2, 5, 3])], ids=str)
def test_adaptive_by_the_rule(kind, shape, out):
    """Against bins written down one by one."""
    x = torch.randn(shape, dtype=torch.float64)
    truth, chosen = reference.pool(KINDS[kind], x, out)
    pool = named(f"adaptive_{kind}", len(out))
    torch.testing.assert_close(pool(x, out), truth)
    if chosen is not None:
        assert torch.equal(pool(x, out, return_indices=True)[1], chosen)


def test_adaptive_to_nothing():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    for pool in (F.adaptive_max_pool2d, F.adaptive_avg_pool2d):
        y = pool(x, (0, 3))
        assert y.shape == (2, 3, 0, 3)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros_like(x))


@RANKS
def test_unbatched_and_empty_batches(rank):
    x = torch.randn(SHAPES[rank])
    calls = {
        "max": lambda t: named("max", rank)(t, 3, 2, 1),
        "indices": lambda t: named("max", rank)(t, 3, 2, 1, return_indices=True)[1],
        "avg": lambda t: named("avg", rank)(t, 3, 2, 1),
        "lp": lambda t: named("lp", rank)(t, 3, 2),
        "global": named("global_l2", rank),
        "flat": lambda t: named("global_max", rank)(t, False),
        "adaptive": lambda t: named("adaptive_avg", rank)(t, 3),
        "stochastic": lambda t: named("stochastic", rank)(t, 2, training=False),
    }
    for name, call in calls.items():
        for layout in ("contiguous", "channels_last", "transposed"):
            laid = LAYOUTS[layout](x)
            whole = call(laid)
            assert torch.equal(call(laid[1]), whole[1]), f"{name}, {layout}"
            assert call(laid[:0]).shape == (0, *whole.shape[1:]), name
        if name != "indices":
            a, b = leaf(x[1]), leaf(x)
            call(a).sum().backward()
            call(b)[1].sum().backward()
            assert torch.equal(a.grad, b.grad[1]), name
            none = leaf(x[:0])
            assert torch.autograd.grad(call(none).sum(), none)[0].shape == none.shape


@RANKS
def test_the_output_keeps_the_memory_format(rank):
    """channels_last of one axis, which torch has no name for, is (N, L, C) without gaps."""
    x = LAYOUTS["channels_last"](torch.randn(SHAPES[rank])).requires_grad_()
    for y in (
        named("max", rank)(x, 2),
        named("max", rank)(x, 2, return_indices=True)[1],
        named("avg", rank)(x, 3, 2, 1),
        named("adaptive_max", rank)(x, 3),
        named("stochastic", rank)(x, 2),
    ):
        assert y.movedim(1, -1).is_contiguous()
        if y.is_floating_point():
            (gx,) = torch.autograd.grad(y.sum(), x)
            assert gx.movedim(1, -1).is_contiguous()


def test_views_run_as_they_lie(monkeypatch):
    """Only what has no dense axis is copied."""
    copied = []
    plain = torch.Tensor.contiguous
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t, *more, **named: copied.append(t.shape) or plain(t, *more, **named))
    for rank, shape in SHAPES.items():
        x = torch.randn(shape)
        views = [LAYOUTS[name](x) for name in LAYOUTS if name != "transposed"]
        copied.clear()
        for view in views:
            named("max", rank)(view, 2)
            named("global_avg", rank)(view)
        assert not copied
        named("max", rank)(LAYOUTS["transposed"](x), 2)


SIGNATURES = [f"{stem}_pool{rank}d" for stem in ("max", "avg", "lp", "adaptive_max", "adaptive_avg") for rank in SHAPES]


@pytest.mark.parametrize("name", [*SIGNATURES, *[f"max_unpool{rank}d" for rank in SHAPES]])
def test_arguments_are_torchs(name):
    """Names, order and defaults; what torch lacks is keyword-only.  (Of torch's builtins only the docstring has a signature.)"""
    ours = inspect.signature(getattr(F, name)).parameters.values()
    by_place = {p.name: p.default for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD}
    theirs = getattr(T, name)
    if name.startswith(("max_pool", "adaptive_max")):
        theirs = getattr(T, f"{name}_with_indices")
    try:
        expected = {p.name: p.default for p in inspect.signature(theirs).parameters.values()}
    except ValueError:
        text = theirs.__doc__.strip().partition("(")[2].partition(")")[0]
        words = [word.strip().partition("=") for word in text.split(",")]
        expected = {word: eval(value) if equals else inspect.Parameter.empty for word, equals, value in words}
    assert list(by_place) == list(expected)
    for argument, default in expected.items():
        if default is not None or argument == "stride":
            assert by_place[argument] in (default, None), argument


@pytest.mark.parametrize("name", F.__all__)
def test_functions_say_who_they_are(name):
    function = getattr(F, name)
    assert function.__name__ == function.__qualname__ == name
    assert function.__module__ == "fastpool.functional"
    assert len(function.__doc__) > 40


# Every kind, at each rank, forward and backward against the reference


@pytest.mark.parametrize("where", [[2], [2, 3], [2, 2, 2]], ids=str)
@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if not kind.draws])
def test_every_kind_over_bins(kind, where):
    """Adaptive windows of several sizes, for kinds that no function offers them of too."""
    from fastpool.window import Adaptive

    kind, rank = KINDS[kind], len(where)
    extra = reference.PARAMETERS.get(kind.name, ())
    x = torch.randn(2, 3, *(5, 4, 7)[:rank], dtype=torch.float64)
    op = Pooling("test", kind, rank, Adaptive(tuple(where)), extra)
    a, b = leaf(x), leaf(x)
    truth, chosen = reference.pool(kind, b, where, extra=extra)
    y = _pooled(a, op)
    torch.testing.assert_close(y, truth)
    if kind.selects:
        assert torch.equal(_with_indices(x, op)[1], chosen)
    else:
        gy = torch.randn_like(truth)
        y.backward(gy)
        truth.backward(gy)
        torch.testing.assert_close(a.grad, b.grad)
