"""Tiny maps, which functions leave to torch's operators: that they do, for these alone, and that nothing else tells."""

import pytest
import torch
from cases import GEOMETRIES, adversarial
from processes import run
from test_errors import AVERAGES, BY_RANK, DILATED, OUTPUTS, SHAPES, WINDOWS, map_of, refusal

import fastpool.functional as F
from fastpool import activations, backend, tiny

MOST = tiny.MOST


@pytest.fixture(autouse=True)
def left_to_torch(monkeypatch):
    """As for a user; tests/conftest.py has it otherwise."""
    monkeypatch.setattr(tiny, "MOST", MOST)


@pytest.fixture
def ran(monkeypatch):
    """The functions whose kernels ran."""
    found, plain = [], backend.forward
    monkeypatch.setattr(backend, "forward", lambda x, op, *more: found.append(op.caller) or plain(x, op, *more))
    return found


CALLS = {
    "max_pool": (2,),
    "avg_pool": (2,),
    "adaptive_max_pool": (2,),
    "adaptive_avg_pool": (2,),
    "global_max_pool": (),
    "global_avg_pool": (),
}
"""The functions that have an operator of torch's, and arguments."""
every_call = pytest.mark.parametrize(("stem", "arguments"), CALLS.items(), ids=CALLS)


@every_call
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_torchs_operator_runs(stem, arguments, rank, dtype, ran):
    pool, x = getattr(F, f"{stem}{rank}d"), torch.rand(1, 2, *[4] * rank, dtype=dtype, requires_grad=True)
    y = pool(x, *arguments)
    y.sum().backward()
    with torch.no_grad():
        pool(x, *arguments)
        pool(x[0], *arguments)
    assert ran == []


@pytest.mark.parametrize(
    ("call", "grad_fn"),
    [
        (lambda x: F.max_pool2d(x, 2, 2), "MaxPool2DWithIndicesBackward0"),
        (lambda x: F.avg_pool2d(x, 2, 2), "AvgPool2DBackward0"),
        (F.global_max_pool2d, "AdaptiveMaxPool2DBackward0"),
        (F.global_avg_pool2d, "MeanBackward1"),
    ],
    ids=["max", "avg", "global-max", "global-avg"],
)
def test_the_tiny_rows_of_the_benchmark(call, grad_fn, ran):
    assert call(torch.rand(1, 8, 8, 8, requires_grad=True)).grad_fn.name() == grad_fn
    call(torch.rand(1, 8, 8, 8))
    assert ran == []


@pytest.mark.parametrize(
    ("call", "elements"),
    [
        (lambda x: F.max_pool1d(x, 2), MOST),
        (lambda x: F.max_pool1d(x, 3, 1), MOST // 3),
        (lambda x: F.avg_pool1d(x, 9, 2), MOST // 4),
        (lambda x: F.avg_pool1d(x, 2, 5), MOST),
        (F.global_max_pool1d, MOST),
        (lambda x: F.adaptive_avg_pool1d(x, 4), MOST // 4),
    ],
)
def test_larger_maps_have_kernels(call, elements, ran):
    """By how often their elements are read."""
    call(torch.rand(1, 1, elements))
    assert ran == []
    call(torch.rand(1, 1, elements + 1))
    assert len(ran) == 1


X = torch.rand(1, 3, 4, 6)
KERNELS = {
    "channels_last": lambda: F.max_pool2d(X.to(memory_format=torch.channels_last), 2),
    "sliced": lambda: F.avg_pool2d(X[..., 1:], 2),
    "float16": lambda: F.avg_pool2d(X.half(), 2),
    "bfloat16": lambda: F.global_max_pool2d(X.bfloat16()),
    "int32": lambda: F.max_pool2d(X.int(), 2),
    "int64": lambda: F.avg_pool2d(X.long(), 2),
    "bool": lambda: F.max_pool2d(X > 0.5, 2),
    "N = 0": lambda: F.max_pool2d(X[:0], 2),
    "indices": lambda: F.max_pool2d(X, 2, return_indices=True),
    "indices, adaptive": lambda: F.adaptive_max_pool2d(X, 2, return_indices=True),
    "dilated": lambda: F.max_pool2d(X, 2, dilation=2),
    "output_size of None": lambda: F.adaptive_avg_pool2d(X, (2, None)),
    "output_size of 0": lambda: F.adaptive_max_pool2d(X, (2, 0)),
    "min": lambda: F.min_pool2d(X, 2),
    "global l2": lambda: F.global_l2_pool2d(X),
    "lp": lambda: F.lp_pool2d(X, 3, 2),
    # torch compares a window with the map as if there were no padding.
    "3-d, larger than the map": lambda: F.avg_pool3d(X, 5, 1, 2),
}


@pytest.mark.parametrize("call", KERNELS.values(), ids=KERNELS)
def test_what_has_kernels_whatever_its_size(call, ran):
    call()
    assert len(ran) == 1


def test_more_threads_than_two(ran):
    """torch would wake them all."""
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        F.max_pool2d(X, 2)
    torch.set_num_threads(before)
    assert len(ran) == 1


def test_a_forked_child_has_kernels():
    """Of OpenMP's threads, which torch's operators take from two on, it has none: they would never return."""
    code = """
import os, signal, torch, fastpool.functional as F
torch.set_num_threads(2)
x = torch.rand(1, 8, 8, 8)
expected = F.max_pool2d(x, 2)
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if torch.equal(F.max_pool2d(x, 2), expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code, PYTHONWARNINGS="ignore::DeprecationWarning") == "0"


# What stands beside a pooling

SMALL, MIDDLE, LARGE = (1, 6, 24, 24), (1, 16, 32, 32), (1, 64, 128, 128)


@pytest.mark.parametrize(
    ("call", "shape", "needs", "expected"),
    [
        (lambda x: F.max_pool2d(x, 2, after="silu"), SMALL, True, ["torch's silu"]),
        (lambda x: F.max_pool2d(x, 2, after="silu"), LARGE, True, ["torch's silu"]),
        (lambda x: F.max_pool2d(x, 2, after="gelu"), SMALL, True, ["gelu"]),
        (lambda x: F.max_pool2d(x, 2, after="mish"), SMALL, True, ["torch's mish"]),
        (lambda x: F.max_pool2d(x, 2, before="mish"), LARGE, True, ["mish"]),
        (lambda x: F.max_pool2d(x, 2, before="mish"), SMALL, False, []),
        (lambda x: F.max_pool2d(x, 2, before="leaky_relu"), SMALL, True, ["torch's leaky_relu"]),
        (lambda x: F.max_pool2d(x, 2, before="leaky_relu"), LARGE, True, []),
        (lambda x: F.max_pool2d(x, 2, after="relu"), SMALL, True, []),
        (lambda x: F.avg_pool2d(x, 2, before="sigmoid"), SMALL, False, []),
        (lambda x: F.avg_pool2d(x, 2, before="sigmoid"), MIDDLE, False, ["torch's sigmoid"]),
        (lambda x: F.avg_pool2d(x, 2, after="sigmoid"), MIDDLE, False, []),
        (lambda x: F.avg_pool2d(x, 2, before="sigmoid"), LARGE, False, []),
        (lambda x: F.avg_pool2d(x, 3, 2, before="sigmoid"), LARGE, False, ["torch's sigmoid"]),
        (lambda x: F.avg_pool2d(x, 2, before="relu"), SMALL, False, []),
        (lambda x: F.avg_pool2d(x, 2, before="relu"), SMALL, True, ["torch's relu"]),
        (lambda x: F.min_pool2d(x, 3, 2, before="silu"), LARGE, False, ["torch's silu"]),
        (lambda x: F.min_pool2d(x, 2, before="silu"), LARGE, False, []),
        (lambda x: F.stochastic_pool2d(x, 2, training=True, after="sigmoid"), LARGE, False, ["torch's sigmoid"]),
        (lambda x: F.global_avg_pool2d(x, after="sigmoid"), LARGE, True, ["torch's sigmoid"]),
    ],
)
def test_an_activation_that_is_quicker_by_itself(call, shape, needs, expected, monkeypatch):
    """By whom it is computed; by nobody where the pooling's pass does.  The values are those of one pass, but for rounding."""
    found, plain, activated = [], activations.on_torch, backend.activated
    monkeypatch.setattr(activations, "on_torch", lambda f, x: found.append(f"torch's {f.name}") or plain(f, x))
    monkeypatch.setattr(backend, "activated", lambda x, f: found.append(f.name) or activated(x, f))
    x = torch.randn(shape, requires_grad=needs)
    torch.manual_seed(0)
    y = call(x)
    assert found == expected
    torch.manual_seed(0)
    with tiny.kernels_only():
        torch.testing.assert_close(y, call(x))


# As the kernels have it

SAME = {f"{name} {kind}": (kind, *of) for name, of in GEOMETRIES.items() for kind in ("max", "avg") if set(of[1].dilation) == {1}}
MORE = {
    "global 1d": ("global", (2, 3, 17), ()),
    "global 2d": ("global", (2, 5, 7, 9), ()),
    "global 3d": ("global", (1, 3, 4, 5, 6), ()),
    "adaptive 1d": ("adaptive", (2, 3, 17), (5,)),
    "adaptive 2d": ("adaptive", (2, 5, 7, 9), ((3, 4),)),
    "adaptive 2d, more than there are": ("adaptive", (1, 2, 2, 3), (5,)),
    "adaptive 3d": ("adaptive", (1, 3, 4, 5, 6), ((2, 1, 3),)),
}


def everything(pool, x, arguments):
    """Without a gradient; with one; the gradient; the gradient of that."""
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        quiet = pool(x, **arguments)
    y = pool(leaf, **arguments)
    generator = torch.Generator().manual_seed(0)
    gy, ggx = (torch.randint(-4, 5, t.shape, generator=generator).to(x.dtype).requires_grad_() for t in (y, x))
    (gx,) = torch.autograd.grad(y, leaf, gy, create_graph=True)
    (ggy,) = torch.autograd.grad(gx, gy, ggx)
    return quiet, y.detach(), gx.detach(), ggy


def check(name, x, monkeypatch, **arguments):
    pool = getattr(F, name)
    with tiny.kernels_only():
        expected = everything(pool, x, arguments)
    monkeypatch.setattr(tiny, "MOST", 2**62)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "forward", None)
        found = everything(pool, x, arguments)
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}[x.dtype]
    for a, b in zip(found, expected, strict=True):
        assert a.stride() == b.stride()
        if "max" in name:
            assert torch.equal(a.view(bits), b.view(bits))
        else:
            torch.testing.assert_close(a, b, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize(("kind", "shape", "w"), SAME.values(), ids=SAME)
def test_windows_are_as_by_kernels(kind, shape, w, batched, dtype, monkeypatch):
    """Values and gradients of both orders: of NaN, infinities, zeros of both signs, ties."""
    if w.rank == 3 and any(k > n for k, n in zip(w.kernel_size, shape[2:], strict=True)):
        pytest.skip("torch refuses it")
    x = adversarial(shape if batched else shape[1:], dtype)
    arguments = {"kernel_size": w.kernel_size, "stride": w.stride, "padding": w.padding, "ceil_mode": w.ceil_mode}
    name = f"{kind}_pool{w.rank}d"
    check(name, x, monkeypatch, **arguments)
    if kind == "max":
        check(name, torch.full_like(x, -torch.inf), monkeypatch, **arguments)
    else:
        check(name, x, monkeypatch, **arguments, count_include_pad=False)
        if w.rank > 1:
            check(name, x, monkeypatch, **arguments, divisor_override=-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize(("which", "shape", "arguments"), MORE.values(), ids=MORE)
def test_whole_maps_and_bins_are_as_by_kernels(which, shape, arguments, kind, dtype, monkeypatch):
    name, named = f"{which}_{kind}_pool{len(shape) - 2}d", dict(zip(("output_size",), arguments, strict=False))
    for x in (adversarial(shape, dtype), adversarial(shape, dtype, special=False)[0]):
        check(name, x, monkeypatch, **named)


def test_marks_of_torchs():
    assert torch.equal(F.max_pool2d(torch._efficientzerotensor(1, 1, 4, 4), 2), torch.zeros(1, 1, 2, 2))
    negated = torch.randn(1, 3, 4, 4, dtype=torch.complex64).conj().imag.contiguous()
    for x in (negated, torch._neg_view(negated)):
        assert torch.equal(F.max_pool2d(x, 2), torch.nn.functional.max_pool2d(x.clone(), 2))


def test_autocast_changes_nothing():
    with torch.autocast("cpu", torch.bfloat16):
        for stem, arguments in CALLS.items():
            for rank in (1, 2, 3):
                assert getattr(F, f"{stem}{rank}d")(torch.rand(1, 2, *[4] * rank), *arguments).dtype == torch.float32


def test_what_is_changed_in_place_cannot_be_saved():
    """The one difference: torch saves the input."""
    for x, fails in ((torch.rand(1, 1, 8, 8), True), (torch.rand(1, 1, 64, 64), False)):
        x = x.requires_grad_() * 1
        y = F.max_pool2d(x, 2)
        x.zero_()
        if fails:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        else:
            y.sum().backward()


# Refusals

REFUSED = [
    *(("max_pool2d", map_of(1, 1, 4, 4), arguments) for arguments, _ in (WINDOWS | DILATED).values()),
    *(("avg_pool2d", map_of(1, 1, 4, 4), arguments) for arguments, _ in (WINDOWS | AVERAGES).values()),
    *((f"{kind}_pool{rank}d", map_of(1, 1, *[4] * rank), of) for kind in ("max", "avg") for rank, of, _ in BY_RANK.values()),
    *((f"adaptive_{kind}_pool2d", map_of(1, 1, 4, 4), {"output_size": of}) for kind in ("max", "avg") for of, _ in OUTPUTS.values()),
]
SHAPES_OF = {"max_pool": {"kernel_size": 1}, "avg_pool": {"kernel_size": 1}, "adaptive_max_pool": {"output_size": 1}}
SHAPES_OF |= {"adaptive_avg_pool": {"output_size": 1}, "global_max_pool": {}, "global_avg_pool": {}}


def refused_alike(name, x, arguments):
    found = refusal(getattr(F, name), x, **arguments)
    with tiny.kernels_only():
        expected = refusal(getattr(F, name), x, **arguments)
    assert (type(found), str(found)) == (type(expected), str(expected))
    assert repr(found.__context__) == repr(expected.__context__)


@pytest.mark.parametrize(("name", "x", "arguments"), REFUSED, ids=lambda v: "" if isinstance(v, torch.Tensor) else str(v))
def test_arguments_are_refused_alike(name, x, arguments):
    refused_alike(name, x, arguments)


@pytest.mark.parametrize("stem", SHAPES_OF)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_shapes_are_refused_alike(stem, rank):
    shapes = [*SHAPES.values(), (0, 2, 2, 2, 0), *([2] * dimensions for dimensions in range(7))]
    for shape in shapes:
        if len(shape) not in (rank + 1, rank + 2) or 0 in shape[-rank - 1 :]:
            refused_alike(f"{stem}{rank}d", map_of(*shape), SHAPES_OF[stem])


@every_call
def test_tensors_are_refused_alike(stem, arguments):
    named = dict(zip(SHAPES_OF[stem], arguments, strict=False))
    for x in (
        *(X.to("meta"), X.to(torch.complex64), X.to(torch.uint32)),
        *(X.to_sparse(), X.to_mkldnn()),  # of no strides, of hidden ones
        *([[1.0]], None),
    ):
        refused_alike(f"{stem}2d", x, named)


@every_call
def test_transforms_are_refused_as_ever(stem, arguments):
    pool, forward_ad = getattr(F, f"{stem}2d"), torch.autograd.forward_ad
    for transform in (torch.vmap, torch.func.grad):
        with pytest.raises(NotImplementedError, match=rf"{stem}2d: torch\.func"):
            transform(lambda t: pool(t, *arguments).sum())(X)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        pool(forward_ad.make_dual(X, X), *arguments)


@every_call
def test_torch_compile_sees_fastpools_operator(stem, arguments):
    graphs = []

    def backend(graph, _):
        graphs.append(graph.code)
        return graph

    torch.compiler.reset()
    pool = getattr(F, f"{stem}2d")
    found = torch.compile(lambda x: pool(x, *arguments), backend=backend, fullgraph=True)(X)
    torch.compiler.reset()
    torch.testing.assert_close(found, pool(X, *arguments))
    assert "fastpool.pool" in graphs[0]
