"""Poolings with an activation before or after them, against the two steps by torch."""

import copy
import functools
import math
import pickle
import types

import pytest
import torch
import torch.nn.functional as T
from fastpool.kernels.activation import ACTIVATIONS
from fastpool.kernels.pool import KINDS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpool.functional as F
import fastpool.nn as fast
from fastpool import backend, fusion
from fastpool.activations import named, on_torch
from fastpool.backend import Pooling
from fastpool.window import window

PARAMETERS = {"threshold": (0.1, -0.3)}
CASES = {name: PARAMETERS.get(name, ()) for name in ACTIVATIONS}
FALLS_FIRST = nn.LeakyReLU(-0.3)
"""A valley with its minimum at 0, whose parameter kernels read."""


def smallest(x, *window):
    return -T.max_pool2d(-x, *window)


POOLS = {
    "max": (F.max_pool2d, T.max_pool2d, (3, 2, 1)),
    "min": (F.min_pool2d, smallest, (2,)),
    "avg": (F.avg_pool2d, T.avg_pool2d, (3, 2, 1)),
    "l2": (lambda x, *w, **k: F.lp_pool2d(x, 2, *w, **k), lambda x, *w: T.lp_pool2d(x, 2.0, *w), (2,)),
    "global_max": (F.global_max_pool2d, lambda x: x.amax((2, 3), keepdim=True), ()),
    "global_avg": (F.global_avg_pool2d, lambda x: x.mean((2, 3), keepdim=True), ()),
    "adaptive_max": (F.adaptive_max_pool2d, T.adaptive_max_pool2d, (3,)),
}


def everything(f, x, weights=()):
    """y, its gradients, the gradient of a sum of these, and y without a gradient."""
    x = x.detach().requires_grad_()
    y = f(x)
    g = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    gradients = torch.autograd.grad(y, [x, *weights], g, create_graph=True)
    second = torch.autograd.grad((gradients[0] * x.detach()).sum(), x, allow_unused=True)[0] if gradients[0].requires_grad else None
    with torch.no_grad():
        return [y, *gradients, torch.zeros_like(x) if second is None else second, f(x)]


def same(ours, theirs, x, weights=(), rtol=1e-12):
    for name, a, b in zip(
        ("y", "gx", *["gw"] * len(weights), "second", "y"), everything(ours, x, weights), everything(theirs, x, weights), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol, msg=lambda words, name=name: f"{name}: {words}")


@pytest.mark.parametrize("name", CASES)
def test_max_of_every_activation(name):
    """By the law each shape has: a swap, two points; or evaluated."""
    torch.manual_seed(1)
    f = named("t", name, CASES[name])
    module = nn.Threshold(*CASES[name]) if CASES[name] else name
    # torch has no second derivative of its hardsigmoid.
    torchs = (lambda x: T.relu6(x + 3) / 6) if name == "hardsigmoid" else functools.partial(on_torch, f)
    x = 2 * torch.randn(2, 3, 11, 14, dtype=torch.float64)
    same(lambda x: F.max_pool2d(x, 2, before=module), lambda x: T.max_pool2d(torchs(x), 2), x)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("module", [nn.ReLU(), nn.ELU(0.7), nn.SiLU(), FALLS_FIRST], ids=lambda m: type(m).__name__)
def test_before_and_after(module, pool, channels_last):
    torch.manual_seed(2)
    ours, theirs, arguments = POOLS[pool]
    x = torch.randn(2, 5, 13, 10, dtype=torch.float64)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    if pool != "l2":  # of a root of sums the reference has NaN where nothing is positive
        same(lambda x: ours(x, *arguments, before=module), lambda x: theirs(module(x), *arguments), x)
    same(lambda x: ours(x, *arguments, after=module), lambda x: module(theirs(x, *arguments)), x)


def test_both_at_once_and_several_steps():
    torch.manual_seed(3)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    same(
        lambda x: F.max_pool2d(x, 3, 2, before=("tanh", "gelu"), after=["softsign", nn.Sigmoid()]),
        lambda x: torch.sigmoid(T.softsign(T.max_pool2d(T.gelu(torch.tanh(x)), 3, 2))),
        x,
    )
    same(
        lambda x: F.avg_pool2d(x, 3, 2, before="silu", after="tanh"),
        lambda x: torch.tanh(T.avg_pool2d(T.silu(x), 3, 2)),
        x,
    )


@pytest.mark.parametrize("shape", [(3, 8, 8), (0, 3, 8, 8), (2, 1, 40, 3)])
def test_unbatched_empty_and_long(shape):
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(
            F.max_pool2d(x, 2, before="relu"), T.max_pool2d(x, 2, ceil_mode=False).relu() if 0 not in shape else x[..., :4, :4]
        )


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks(rank):
    x = torch.randn(2, 3, *[7] * rank, dtype=torch.float64)
    ours, theirs = getattr(F, f"max_pool{rank}d"), getattr(T, f"max_pool{rank}d")
    same(lambda x: ours(x, 3, 2, before="gelu", after="relu6"), lambda x: T.relu6(theirs(T.gelu(x), 3, 2)), x)


# Where a law has conditions


def op_of(kind="max", *more):
    return Pooling("t", KINDS[kind], 2, window("t", 2, 2, 2, 0, 1, False), *more)


@pytest.mark.parametrize(
    ("activation", "kind", "needs", "expected"),
    [
        ("relu", "max", True, "relu_switch(max)"),
        ("relu", "max", False, "relu(max)"),
        ("silu", "max", False, "two_point_silu"),
        ("silu", "max", True, "two_point_chosen_silu"),
        ("silu", "min", False, "two_sides_silu"),
        ("silu", "min", True, "two_sides_chosen_silu"),
        ("hardswish", "min", False, "min_of_hardswish"),
        ("elu", "avg", True, "avg_of_elu"),
        ("relu", "avg", False, "avg_of_relu"),
    ],
)
def test_the_cheapest_form_is_taken(activation, kind, needs, expected):
    plan = fusion._planned(op_of(kind), named("t", activation), None, needs, False, (True, True))
    assert plan.first == ()
    assert plan.op.kind.name.startswith(expected)


def test_calls_are_remembered_whatever_the_parameters(monkeypatch):
    """What depends on shapes is worked out once for each kind, not for each slope."""
    asked, plain = [], backend._prepared
    monkeypatch.setattr(backend, "_prepared", lambda op, *of: asked.append(op.kind.name) or plain(op, *of))
    x, y = torch.randn(1, 3, 31, 33), None
    for slope in (0.1, 0.2, 0.3):
        y = F.max_pool2d(x, 3, 2, before=nn.LeakyReLU(slope), after=nn.ELU(slope))
        F.gem_pool2d(x.abs(), 3.0 + slope, 1e-6, 2, after=nn.LeakyReLU(slope))
    assert sorted(asked) == ["leaky_relu(gem)", "leaky_relu(max)"]
    torch.testing.assert_close(y, T.elu(T.max_pool2d(T.leaky_relu(x, 0.3), 3, 2), 0.3))


def test_without_memory():
    """Under a FakeTensorMode nobody reads a weight or a scale."""
    with FakeTensorMode():
        x, scale = torch.randn(2, 3, 8, 8), torch.randn(3)
        assert F.max_pool2d(x, 2, before=nn.PReLU(3), affine=(scale, scale)).shape == (2, 3, 4, 4)


def test_windows_of_nothing_but_padding_stay_what_they_are():
    x, window = torch.randn(1, 2, 2, 2), (2, 1, 1, 3)
    expected = T.max_pool2d(x.relu(), *window)
    assert expected.isinf().any()
    assert torch.equal(F.max_pool2d(x, *window, before="relu"), expected)
    assert torch.equal(F.max_pool2d(x, *window, after="relu"), T.max_pool2d(x, *window).relu())


@pytest.mark.parametrize("name", ["relu", "hardtanh", "silu"])
def test_indices_are_those_of_the_first_order(name):
    x = torch.randn(2, 3, 12, 12).round()  # many ties
    f = named("t", name)
    y, indices = F.max_pool2d(x, 3, 2, 1, return_indices=True, before=name)
    expected, theirs = T.max_pool2d(on_torch(f, x), 3, 2, 1, return_indices=True)
    torch.testing.assert_close(y, expected)
    assert torch.equal(indices, theirs)
    y, indices = F.max_pool2d(x, 3, 2, 1, return_indices=True, after=name)
    expected, theirs = T.max_pool2d(x, 3, 2, 1, return_indices=True)
    torch.testing.assert_close(y, on_torch(f, expected))
    assert torch.equal(indices, theirs)


def test_of_equals_the_largest_element_gets_the_gradient():
    x = torch.tensor([[[[-4.0, -1.0], [-3.0, -2.0]], [[2.0, 6.5], [7.0, 6.0]]]], requires_grad=True)
    F.max_pool2d(x, 2, before=nn.Threshold(-5, -5)).sum().backward()
    assert x.grad.flatten().tolist() == [0, 1, 0, 0, 0, 0, 1, 0]
    x.grad = None
    F.max_pool2d(x, 2, before="relu6").sum().backward()  # all that f makes equal here has no slope
    assert not x.grad.any()


@pytest.mark.parametrize("name", ["relu", "silu", "gelu", "leaky_relu", "tanh"])
@pytest.mark.parametrize("pool", ["max", "min", "avg"])
def test_what_is_not_finite(name, pool):
    ours, theirs, arguments = POOLS[pool]
    values = torch.tensor([0.0, -0.0, 1.5, -1.2784645, -0.7517916, torch.nan, torch.inf, -torch.inf, 1e-40, -3e38])
    x = values[torch.randint(len(values), (4, 3, 12, 12), generator=torch.Generator().manual_seed(4))]
    f = named("t", name)
    close = {"equal_nan": True, "rtol": 2e-6, "atol": 1e-8}
    # fastpool's own pass of f: torch's vector code makes NaN of GELU's infinity.
    torch.testing.assert_close(ours(x, *arguments, before=name), theirs(backend.activated(x, f), *arguments), **close)
    torch.testing.assert_close(ours(x, *arguments, after=name), backend.activated(theirs(x, *arguments), f), **close)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["relu", "gelu"])
def test_16_bits_are_rounded_once(name, dtype):
    x = torch.randn(2, 3, 17, 17).to(dtype)
    f = named("t", name)
    exact = T.max_pool2d(on_torch(f, x.double()), 3, 2)
    ours, theirs = F.max_pool2d(x, 3, 2, before=name), T.max_pool2d(on_torch(f, x), 3, 2)
    assert ours.dtype == dtype
    assert (ours.double() - exact).abs().max() <= 2 * (theirs.double() - exact).abs().max()


def test_integers_by_steps():
    x = torch.randint(-9, 9, (2, 3, 8, 8), dtype=torch.int32)
    assert torch.equal(F.max_pool2d(x, 2, before="relu"), F.max_pool2d(x.relu(), 2))


# What is saved


@pytest.mark.parametrize(
    ("name", "bytes_an_output"), [("relu", 1), ("hardtanh", 1), ("leaky_relu", 5), ("tanh", 5), ("gelu", 5), ("silu", 5)]
)
@pytest.mark.parametrize("place", ["before", "after"])
def test_saved_for_backward(name, bytes_an_output, place):
    saved = []

    def keep(t):
        saved.append(t.numel() * t.element_size())
        return t

    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = F.max_pool2d(x, 2, **{place: name})
    assert sum(saved) == bytes_an_output * y.numel()


@pytest.mark.parametrize("name", ["gelu", "silu", "mish"])
def test_saved_of_a_smallest_element_in_a_valley(name):
    saved = []
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel() * t.element_size()) or t, lambda t: t):
        y = F.min_pool2d(x, 2, before=name)
    assert sum(saved) == 5 * y.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("w", [(2,), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "mish"])
def test_smallest_in_a_valley(name, w, dtype):
    """On both sides of where f turns and close to it, with equal elements, infinities and NaN: f of that element, and its slope there."""
    f = named("t", name)
    assert fusion._planned(op_of("min"), f, None, True, False, (True, True)).op.kind.name.startswith("two_sides_chosen")
    values = torch.cat(
        [f.shape.minimum + torch.linspace(-1e-3, 1e-3, 9), torch.linspace(-4, 4, 17), torch.tensor([math.inf, math.nan, -0.0])]
    )
    x = values[torch.randint(len(values), (2, 3, 48, 48))].to(dtype)
    x[:, 1] = torch.where(torch.rand(2, 48, 48) < 0.02, -math.inf, x[:, 1])
    x[0, 2, :8] = math.inf
    with torch.no_grad():
        found = F.min_pool2d(x, *w, before=name)
    expected = smallest(on_torch(f, x.double()), *w)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=8 * eps, atol=2 * eps, equal_nan=True)
    leaf = x.nan_to_num(0.5, 3, -3).requires_grad_()
    (gx,) = torch.autograd.grad(F.min_pool2d(leaf, *w, before=name).sum(), leaf)
    plain = leaf.detach().double().requires_grad_()
    (of_torch,) = torch.autograd.grad(smallest(on_torch(f, plain), *w).sum(), plain)
    # Of elements that f makes equal either may have it: slopes there differ by as much as they change in a step of rounding.
    sums = (
        [T.avg_pool2d(t.double(), 2) * 4 for t in (gx, of_torch)] if w == (2,) else [t.double().sum((2, 3)) / 2304 for t in (gx, of_torch)]
    )
    torch.testing.assert_close(*sums, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("pool", ["avg_pool2d", "adaptive_avg_pool2d"])
@pytest.mark.parametrize("name", ["relu", "leaky_relu", "sigmoid", "tanh"])
def test_of_an_average_the_result_is_saved_alone(name, pool):
    saved = []
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = getattr(F, pool)(x, 2, after=name)
    assert saved == [y.numel()]
    assert y.grad_fn.next_functions[0][0].name() == "torch::autograd::AccumulateGrad"


def test_parameters_are_looked_up_once():
    op = op_of("gem").at((2.5, 1e-6))
    assert op.at((3.0, 1e-6)) is op.root.at((3.0, 1e-6)) is op.at((3.0, 1e-6))
    assert op.at((3.0, 1e-6)).parameters == (3.0, 1e-6)
    assert op.parameters == (2.5, 1e-6)


# Affine maps, batch-norm, and modules that are called


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, -1), (1, -1, 1), (1, 0, -1)])
@pytest.mark.parametrize("pool", ["max", "min", "avg", "l2"])
@pytest.mark.parametrize("before", [None, "relu", "silu"])
def test_affine(pool, signs, before):
    torch.manual_seed(5)
    ours, theirs, arguments = POOLS[pool]
    scale = (torch.tensor(signs, dtype=torch.float64) * torch.tensor([0.5, 1.5, 2.0])).requires_grad_()
    shift = torch.randn(3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def reference(x):
        x = x * scale.view(3, 1, 1) + shift.view(3, 1, 1)
        return theirs(x if before is None else on_torch(named("t", before), x), *arguments)

    if pool == "l2" and before:
        x = x + 3 * x.sign()  # the reference has NaN at 0
        scale.data.abs_(), shift.data.abs_()
        x = x.abs()
    same(lambda x: ours(x, *arguments, affine=(scale, shift), before=before), reference, x, (scale, shift))


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm(training):
    torch.manual_seed(6)
    norm = nn.BatchNorm2d(3).double().train(training)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
        norm.bias.normal_(), norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    theirs, x = copy.deepcopy(norm), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    y = F.max_pool2d(x, 2, before=(norm, nn.ReLU()))
    torch.testing.assert_close(y, T.max_pool2d(theirs(x).relu(), 2))
    torch.testing.assert_close(norm.running_mean, theirs.running_mean)
    if not training:
        weights = norm.weight, norm.bias
        same(lambda x: F.max_pool2d(x, 2, before=(norm, nn.ReLU())), lambda x: T.max_pool2d(norm(x).relu(), 2), x, weights)


@pytest.mark.parametrize("weight", [[0.2], [0.1, 0.4, 0.9], [0.1, -0.4, 0.9], [0.0], [0.1, 0.0, 0.9]], ids=str)
@pytest.mark.parametrize("place", ["before", "after"])
def test_prelu_gets_its_gradient(weight, place):
    torch.manual_seed(7)
    module = nn.PReLU(len(weight)).double()
    module.weight.data = torch.tensor(weight, dtype=torch.float64)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)

    def reference(x):
        return T.max_pool2d(module(x), 2) if place == "before" else module(T.max_pool2d(x, 2))

    same(lambda x: F.max_pool2d(x, 2, **{place: module}), reference, x, (module.weight,))


@pytest.mark.parametrize("norm_dtype", [torch.float32, None], ids=["float32", "its own"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pool", ["max", "min", "avg", "global_avg"])
def test_batch_norm_of_16_bits(pool, dtype, norm_dtype):
    """Of torch's dtype, whatever the norm's parameters are of, and no farther from float64: its numbers a channel are computed in
    float32."""
    torch.manual_seed(9)
    ours, theirs, arguments = POOLS[pool]
    norm = nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
        norm.bias.normal_(), norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    norm = norm.to(norm_dtype or dtype)
    x = torch.randn(2, 3, 17, 17).to(dtype)
    with torch.no_grad():
        y, expected = ours(x, *arguments, before=(norm, nn.ReLU())), theirs(norm(x).relu(), *arguments)
        truth = theirs(copy.deepcopy(norm).double()(x.double()).relu(), *arguments)
    assert y.dtype == expected.dtype == dtype
    assert (y.double() - truth).abs().max() <= 1.2 * (expected.double() - truth).abs().max()


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pool", ["max", "avg"])
@pytest.mark.parametrize("signs", [(1.0, 2.0), (1.0, 0.0)], ids=str)
def test_an_affine_map_of_another_dtype_keeps_the_inputs(pool, x_dtype, signs):
    """And its own gradients are of its dtype."""
    ours, theirs, arguments = POOLS[pool]
    x = torch.randn(2, 2, 8, 8).to(x_dtype)
    scale, shift = torch.tensor(signs, requires_grad=True), torch.randn(2, requires_grad=True)
    y = ours(x, *arguments, affine=(scale, shift))
    assert y.dtype == x_dtype
    gradients = torch.autograd.grad(y.sum(), (scale, shift))
    exact = theirs(x.double() * scale.double().view(2, 1, 1) + shift.double().view(2, 1, 1), *arguments)
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(x_dtype).eps, atol=1e-2 if x_dtype.itemsize == 2 else 1e-6)
    for ours_of, of in zip(gradients, torch.autograd.grad(exact.sum(), (scale, shift)), strict=True):
        assert ours_of.dtype == torch.float32
        torch.testing.assert_close(ours_of, of, rtol=2e-2, atol=2e-2)


# Where the host may not look


class LookedError(Exception):
    pass


def unseen(monkeypatch, f):
    """f() where asking a tensor for its numbers, for which a GPU would have to be waited, raises LookedError."""

    def refuse(self, *more):
        raise LookedError

    with monkeypatch.context() as patch:
        for name in ("__bool__", "__float__", "__int__", "item", "tolist"):
            patch.setattr(torch.Tensor, name, refuse)
        return f()


FIXED = nn.PReLU(init=0.2).requires_grad_(False)
CHOOSING = {
    "norm": (lambda m: {"before": m}, ("max", "min")),
    "norm, relu": (lambda m: {"before": (m, nn.ReLU())}, ("max", "min")),
    "affine": (lambda m: {"affine": tuple(t.detach() for t in fusion.folded(m)), "before": "relu"}, ("max", "min")),
    "prelu": (lambda m: {"before": FIXED}, ("max", "min", "avg")),
    "prelu after": (lambda m: {"after": FIXED}, ("max", "min", "avg")),
    "prelu that learns": (lambda m: {"before": nn.PReLU(3, init=0.3)}, ("max", "min")),
}
"""What is asked for, and the poolings whose form is chosen by the numbers of a tensor, on the CPU."""


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("pool", ["max", "min", "avg"])
def test_on_a_gpu_no_form_is_chosen_by_numbers(name, pool, monkeypatch):
    """That would wait for it, and cannot be captured in a CUDA graph: the general form, whose results are the same."""
    torch.manual_seed(10)
    ours, _, arguments = POOLS[pool]
    norm = nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -2.0, 0.5]))
        norm.bias.normal_(), norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    make, chosen = CHOOSING[name]
    given, x = make(norm), torch.randn(2, 3, 20, 20)
    with torch.no_grad():
        expected = ours(x, *arguments, **given)
        if pool in chosen:
            with pytest.raises(LookedError):
                unseen(monkeypatch, lambda: ours(x, *arguments, **given))
        monkeypatch.setattr(fusion, "_may_look", lambda t: False)
        torch.testing.assert_close(unseen(monkeypatch, lambda: ours(x, *arguments, **given)), expected)


def test_what_may_be_looked_at():
    assert fusion._may_look(torch.ones(1))
    assert not fusion._may_look(types.SimpleNamespace(is_cuda=True))


def test_dropout_follows():
    x = torch.rand(2, 8, 6, 6) + 1
    dropout = nn.Dropout2d(0.5)
    y = F.max_pool2d(x, 2, before="relu", after=dropout)
    whole = T.max_pool2d(x, 2)
    kept = (y != 0).any(-1).any(-1)
    assert 0 < kept.sum() < 16
    assert torch.equal(y, whole * 2 * kept[..., None, None])
    assert torch.equal(F.max_pool2d(x, 2, after=(nn.ReLU(), dropout.eval())), whole)


def test_rrelu_draws_in_training_and_does_not_in_evaluation():
    x, module = torch.randn(2, 3, 8, 8), nn.RReLU()
    with torch.random.fork_rng():
        torch.manual_seed(8)
        ours = F.avg_pool2d(x, 2, before=module)
        torch.manual_seed(8)
        assert torch.allclose(ours, T.avg_pool2d(module(x), 2))
    module.eval()
    torch.testing.assert_close(F.avg_pool2d(x, 2, before=module), T.avg_pool2d(module(x), 2))


# Modules


MADE = {
    "MaxPool2d": lambda **k: fast.MaxPool2d(2, **k),
    "MinPool2d": lambda **k: fast.MinPool2d(2, **k),
    "AvgPool2d": lambda **k: fast.AvgPool2d(2, **k),
    "LPPool2d": lambda **k: fast.LPPool2d(2, 2, **k),
    "AdaptiveMaxPool2d": lambda **k: fast.AdaptiveMaxPool2d(2, **k),
    "GlobalMaxPool2d": lambda **k: fast.GlobalMaxPool2d(**k),
    "GeMPool2d": lambda **k: fast.GeMPool2d(**k),
    "StochasticPool2d": lambda **k: fast.StochasticPool2d(2, **k),
}


@pytest.mark.parametrize("name", MADE)
def test_modules(name):
    x = torch.rand(2, 3, 8, 8) - 0.5
    module = MADE[name](before=nn.ReLU(), after="tanh").eval()
    plain = MADE[name]().eval()
    plain.load_state_dict(module.state_dict())
    expected = plain(x.relu()).tanh()
    torch.testing.assert_close(module(x), expected)
    assert repr(module).count("ReLU()") == 1
    assert "after='tanh'" in repr(module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(x), expected)


def test_parameters_of_what_stands_beside_are_the_modules():
    module = fast.MaxPool2d(2, before=[nn.BatchNorm2d(3), nn.PReLU()], after=nn.Dropout())
    assert list(dict(module.named_parameters())) == ["before.0.weight", "before.0.bias", "before.1.weight"]
    assert not module.eval().after.training


def test_errors():
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"^max_pool2d: an activation must be one of .*'rule'"):
        F.max_pool2d(x, 2, before="rule")
    with pytest.raises(TypeError, match=r"^MaxPool2d: before and after must be an activation's name .* got Conv2d"):
        fast.MaxPool2d(2, after=nn.Conv2d(1, 1, 1))
    with pytest.raises(RuntimeError, match=r"^avg_pool2d: affine's tensors must be of shape \(3,\), got \(2,\)"):
        F.avg_pool2d(x, 2, affine=(torch.ones(2), torch.ones(2)))
    with pytest.raises(TypeError, match=r"^max_pool2d: affine must be a tuple of two tensors"):
        F.max_pool2d(x, 2, affine=torch.ones(3))
    with pytest.raises(TypeError, match="positional argument"):
        F.max_pool2d(x, 2, 2, 0, 1, False, False, "relu")


def test_under_torch_compile():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    run = torch.compile(lambda x: F.max_pool2d(x, 2, before="gelu", after=nn.Hardtanh()), fullgraph=True, backend="eager")
    y = run(x)
    torch.testing.assert_close(y, T.hardtanh(T.max_pool2d(T.gelu(x), 2)))
    (gx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gx, torch.autograd.grad(T.hardtanh(T.max_pool2d(T.gelu(x), 2)).sum(), x)[0])


@pytest.mark.parametrize("width", [36, 11])
def test_where_the_activation_is_flat_no_element_far_to_the_right_is_chosen_either(width):
    """Windows side by side count their taps from the first one's column, and no tap at all is below 0."""
    x = (-torch.rand(2, 3, 8, 8 * width) - 1).requires_grad_()
    F.max_pool2d(x, (1, width), after="relu").sum().backward()
    assert not x.grad.any()
