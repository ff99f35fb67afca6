"""Derivatives of convolution in float64, first and second; what is computed and what is saved for them."""

import pytest
import torch
import torch.nn.functional as T
from cases import LAYOUTS
from torch.autograd import gradcheck, gradgradcheck

import fastpool.functional as F
from fastpool import activations, convolution

# name: function, x, weight, arguments
CASES = {
    "1d": (F.conv1d, (2, 2, 6), (3, 2, 3), {"padding": 2, "stride": 2}),
    "2d": (F.conv2d, (2, 2, 4, 5), (3, 2, 2, 3), {}),
    "2d-s2": (F.conv2d, (1, 2, 5, 6), (3, 2, 3, 3), {"stride": 2, "padding": (1, 2)}),
    "2d-dilated": (F.conv2d, (1, 2, 5, 7), (2, 2, 2, 3), {"dilation": (1, 2), "padding": 1}),
    "2d-groups": (F.conv2d, (1, 4, 4, 4), (6, 2, 2, 2), {"groups": 2, "padding": "same"}),
    "2d-depthwise": (F.conv2d, (1, 3, 4, 4), (6, 1, 2, 2), {"groups": 3, "stride": (1, 2)}),
    "3d": (F.conv3d, (1, 2, 3, 3, 4), (2, 2, 2, 1, 2), {"stride": (1, 2, 1), "padding": (1, 0, 0)}),
    "transposed": (F.conv_transpose2d, (1, 3, 3, 4), (3, 2, 2, 3), {"stride": 2, "padding": 1, "output_padding": (1, 0)}),
    "transposed-dilated": (F.conv_transpose2d, (1, 2, 3, 3), (2, 1, 2, 2), {"groups": 2, "dilation": 2, "output_padding": 1}),
}


@pytest.fixture(autouse=True)
def few_kernels(small):
    small("model", 1 << 20)


def leaf(x):
    return x.detach().requires_grad_()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CASES)
def test_derivatives(name, layout):
    function, shape, weight, more = CASES[name]
    outputs = weight[1] * more.get("groups", 1) if "transposed" in name else weight[0]
    x, w, b = LAYOUTS[layout](torch.randn(shape).double()), LAYOUTS[layout](torch.randn(weight).double()), torch.randn(outputs).double()

    def convolved(*tensors):
        return function(*tensors, **more)

    assert gradcheck(convolved, (leaf(x), leaf(w), leaf(b)))
    assert gradgradcheck(convolved, (leaf(x), leaf(w), leaf(b)))


AFTER = ["relu", "relu6", "leaky_relu", torch.nn.LeakyReLU(0.3), "sigmoid", "tanh", "logsigmoid", "softshrink", "gelu", torch.nn.ELU(0.7)]
"""With a slope that the result tells, and without one."""


@pytest.mark.parametrize("after", AFTER, ids=str)
def test_derivatives_through_an_activation(after):
    """No result lies near a corner: a numeric derivative would step over it."""
    for seed in range(20):
        torch.manual_seed(seed)
        leaves = [leaf(torch.randn(shape).double()) for shape in ((1, 2, 4, 5), (3, 2, 2, 3), (3,))]
        y = T.conv2d(*leaves)
        if all((y - corner).abs().min() > 1e-2 for corner in (-0.5, 0, 0.5, 6)):
            break
    else:
        raise AssertionError("every seed has a result near a corner")
    assert (y < 0).any()
    for layout in ("contiguous", "channels_last"):
        x = leaf(LAYOUTS[layout](leaves[0]))
        assert gradcheck(lambda *t: F.conv2d(*t, after=after), (x, *leaves[1:]))
        assert gradgradcheck(lambda *t: F.conv2d(*t, after=after), (x, *leaves[1:]))


def test_gradient_penalty_follows_torch():
    """Double backward in use, float32: the gradient of a gradient's norm by x, the weights and the bias, through two layers."""
    x, first, second, b = torch.randn(2, 3, 9, 10), torch.randn(5, 3, 3, 3), torch.randn(2, 5, 2, 2), torch.randn(5)
    found = []
    for conv, act in ((lambda *a: F.conv2d(*a, 1, 1, after="relu"), lambda y: y), (lambda *a: T.conv2d(*a, 1, 1), torch.relu)):
        leaves = [leaf(t.clone()) for t in (x, first, b, second)]
        y = conv(act(conv(*leaves[:3])), leaves[3], None)
        (gx,) = torch.autograd.grad(act(y).pow(2).sum(), leaves[0], create_graph=True)
        found.append(torch.autograd.grad(gx.norm(), leaves))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


@pytest.fixture
def calls(monkeypatch):
    """What was computed: "x" for a gradient by the input, "w" by the weights."""
    found = []
    for name, letter in (("input_gradient", "x"), ("weight_gradient", "w")):
        plain = getattr(convolution, name)
        monkeypatch.setattr(convolution, name, lambda *a, plain=plain, letter=letter: found.append(letter) or plain(*a))
    return found


@pytest.mark.parametrize("wanted", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str)
def test_only_what_is_asked_for_is_computed(wanted, calls):
    tensors = [torch.randn(1, 2, 4, 5), torch.randn(3, 2, 2, 3), torch.randn(3)]
    for k in wanted:
        tensors[k].requires_grad_()
    y = F.conv2d(*tensors)
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.sum().backward()
    assert [k for k, t in enumerate(tensors) if t.grad is not None] == list(wanted)
    assert calls == ["xw"[k] for k in wanted if k < 2]


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("way", ["grad", "of what is no leaf", "inputs of backward", "grad of a gradient"])
def test_of_a_layer_that_is_trained_only_what_is_asked_for_is_computed(way, wanted, calls):
    """Where all three tensors require a gradient."""
    leaves = [leaf(torch.randn(shape).double()) for shape in ((1, 2, 4, 5), (3, 2, 2, 3), (3,))]
    tensors = [t * 1 for t in leaves] if way == "of what is no leaf" else leaves
    asked = [tensors[k] for k in wanted]
    y, theirs = F.conv2d(*tensors).square().sum(), T.conv2d(*tensors).square().sum()
    expected = torch.autograd.grad(theirs, asked, create_graph=True)
    if way == "inputs of backward":
        y.backward(inputs=asked)
        found = [t.grad for t in asked]
    else:
        found = torch.autograd.grad(y, asked, create_graph=way == "grad of a gradient")
    for ours, other in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, other)
    assert calls == ["xw"[k] for k in wanted if k < 2]
    if way == "grad of a gradient":
        again, expected = (torch.autograd.grad(sum(g.sum() for g in gs), leaves) for gs in (found, expected))
        for ours, other in zip(again, expected, strict=True):
            torch.testing.assert_close(ours, other)


def saved(call):
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(tuple(t.shape)) or t, lambda t: t):
        call()
    return seen


def test_what_is_saved():
    x, w, b = torch.randn(1, 2, 4, 5, requires_grad=True), torch.randn(3, 2, 2, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    assert saved(lambda: F.conv2d(x, w, b)) == [(1, 2, 4, 5), (3, 2, 2, 3)]
    assert saved(lambda: F.conv2d(x, w, b, after="relu")) == [(1, 2, 4, 5), (3, 2, 2, 3), (1, 3, 3, 3)]
    assert saved(lambda: F.conv2d(x.detach(), w.detach(), b.detach())) == []
    with torch.no_grad():
        assert saved(lambda: F.conv2d(x, w, b, after="relu")) == []
        assert not F.conv2d(x, w, b).requires_grad


@pytest.mark.parametrize("changed", [0, 1], ids=["x", "weight"])
def test_changed_in_place_before_backward_is_an_error(changed):
    tensors = [torch.randn(1, 2, 4, 5, requires_grad=True), torch.randn(3, 2, 2, 3, requires_grad=True)]
    y = F.conv2d(*tensors)
    with torch.no_grad():
        tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_tensors_may_move(layout):
    """Hooks that store what is saved elsewhere, and so with other strides."""
    x, w, b = (torch.randint(-4, 5, shape).float() for shape in ((4, 3, 8, 10), (5, 3, 3, 3), (5,)))
    gy = torch.randint(-4, 5, (4, 5, 6, 8)).float()
    found = []
    for move in (lambda t: t, lambda t: t.contiguous().clone(), LAYOUTS["channels_last"]):
        leaves = [leaf(LAYOUTS[layout](x)), leaf(w), leaf(b)]
        with torch.autograd.graph.saved_tensors_hooks(move, lambda t: t):
            y = F.conv2d(*leaves, after="relu")
        found.append(torch.autograd.grad(y, leaves, gy))
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_from_above_of_any_layout(layout):
    """Expanded, of the other memory format, sliced, zero without memory, and negated by a mark."""
    leaves = [leaf(LAYOUTS[layout](torch.randint(-4, 5, (2, 3, 6, 7)).float())), leaf(torch.randint(-4, 5, (4, 3, 3, 3)).float())]
    y = F.conv2d(*leaves)
    gy = torch.randint(-4, 5, y.shape).float()
    expected = torch.autograd.grad(y, leaves, gy.clone(), retain_graph=True)
    negated = torch.complex(torch.zeros_like(gy), -gy).conj().imag
    assert negated.is_neg()
    for given in (*(place(gy) for place in LAYOUTS.values()), negated):
        assert all(map(torch.equal, torch.autograd.grad(y, leaves, given, retain_graph=True), expected))
    ones, whole = (torch.autograd.grad(t, leaves, g, retain_graph=True) for t, g in ((y, torch.ones_like(y)), (y.sum(), None)))
    assert all(map(torch.equal, ones, whole))
    zeros = torch.autograd.grad(y, leaves, torch._efficientzerotensor(y.shape), retain_graph=True)
    assert all(map(torch.equal, zeros, map(torch.zeros_like, leaves)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_of_nothing(layout):
    """N = 0: no output, gradients of zero."""
    x, w, b = LAYOUTS[layout](torch.randn(0, 3, 6, 7)), torch.randn(4, 3, 3, 3), torch.randn(4)
    leaves = [leaf(t) for t in (x, w, b)]
    y = F.conv2d(*leaves, padding=1, after="relu")
    assert y.shape == (0, 4, 6, 7)
    for t, g in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert torch.equal(g, torch.zeros_like(t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_gradients_of_gradients(dtype):
    """Of integers: exact, rounded once."""
    x, w, gy = (torch.randint(-2, 3, s).to(dtype) for s in ((1, 2, 4, 5), (3, 2, 2, 3), (1, 3, 3, 3)))
    ggx = torch.randint(-2, 3, x.shape).to(dtype)
    found = []
    for kind, conv in ((dtype, F.conv2d), (torch.float64, T.conv2d)):
        leaves = [leaf(t.to(kind)) for t in (x, w, gy)]
        (gx,) = torch.autograd.grad(conv(*leaves[:2]), leaves[0], leaves[2], create_graph=True)
        found.append(torch.autograd.grad(gx, leaves[1:], ggx.to(kind)))
    assert all(torch.equal(ours, theirs.to(dtype)) for ours, theirs in zip(*found, strict=True))


SMOOTH = ["gelu", "gelu_tanh", "silu", "mish", "sigmoid", "tanh", "softplus", "elu", "hardswish", "tanhshrink"]


@pytest.mark.parametrize("after", SMOOTH)
def test_any_activation_after(after):
    """In the kernel, and in two steps before a gradient: results and gradients at most twice as far from float64 as torch's."""
    leaves = [leaf(torch.randn(shape)) for shape in ((1, 3, 8, 17), (4, 3, 3, 3), (4,))]
    activation = activations.named("test", after)

    def with_gradients(y, of):
        return [y.detach(), *torch.autograd.grad(y.sum(), of)]

    doubles = [leaf(t.double()) for t in leaves]
    exact, theirs = (with_gradients(activations.on_torch(activation, T.conv2d(*of)), of) for of in (doubles, leaves))
    ours = with_gradients(F.conv2d(*leaves, after=after), leaves)
    with torch.no_grad():
        fused = F.conv2d(*leaves, after=after)
    for found, torchs, truth in zip((fused, *ours), (theirs[0], *theirs), (exact[0], *exact), strict=True):
        off, allowed = ((t.double() - truth).abs().max() for t in (found, torchs))
        assert off <= 2 * allowed + 1e-7 * truth.abs().max()
