"""A pooling type is one file: what its face makes of it, and the gradient of its parameters.

Besides the types that have a face and parameters, one that is written here: y = sum(|x|^2)^p / scale.
"""

import inspect
import pickle

import pytest
import torch
from fastpool.kernels.number import like, power, where
from fastpool.kernels.pool import KINDS, Face, Summing, slope
from torch.autograd import gradcheck, gradgradcheck

import fastpool.functional as F
import fastpool.nn as fast
from fastpool.nn import _ParametrisedPool


def init(zero):
    return zero


def accumulate(total, x, p):
    return total + x * x


def combine(a, b):
    return a + b


def finalise(total, count, size, p):
    return power(total, p[0]) / p[1]


def share(gy, x, y, residue, count, size, p):
    flat = y == like(y, 0)
    base = where(flat, like(y, 1), power(y * p[1], (p[0] - like(y, 1)) / p[0]))
    return where(flat, like(gy, 0), gy * (x + x) * p[0] * base / p[1])


def finalise_scale(total, count, size, p):
    return like(total, -1) * power(total, p[0]) / (p[1] * p[1])


def refuse(p, scale):
    return f"scale must not be 0, got {scale!r}" if scale == 0 else None


HERE = Summing(
    "here",
    init,
    accumulate,
    finalise,
    share,
    combine,
    parameters=("p", "scale"),
    slopes={"scale": slope("here_scale", init, accumulate, finalise_scale, combine, parameters=("p", "scale"))},
    face=Face("here", "Here", "y = sum(|x|^2)^p / scale, of each window.", {"p": 0.75, "scale": 2.0}, refuse, trainable=("scale",)),
)
KIND_NAMES = [name for name, kind in KINDS.items() if kind.face and kind.parameters]


def functions(kind, rank):
    """(over windows, over maps), both taking (input, kernel_size or nothing, parameters by name)."""
    if kind is HERE:
        return F._windowed(f"here_pool{rank}d", rank, HERE), F._whole(f"global_here_pool{rank}d", rank, HERE)
    stem = kind.face.stem
    return getattr(F, f"{stem}_pool{rank}d"), getattr(F, f"global_{stem}_pool{rank}d")


every_kind = pytest.mark.parametrize("kind", [HERE, *map(KINDS.get, KIND_NAMES)], ids=["here", *KIND_NAMES])


def truth(x, p, scale):
    return x.unfold(-1, 3, 2).square().sum(-1).pow(p) / scale


def test_values_and_gradients():
    x = torch.rand(2, 3, 9, dtype=torch.float64).requires_grad_()
    scale = torch.tensor(1.5, requires_grad=True)
    pool, whole = functions(HERE, 1)
    found = [(pool(x, 3, 2, p=0.5, scale=scale), truth(x, 0.5, scale)), (whole(x, 0.5, scale), x.square().sum(-1, True).sqrt() / scale)]
    for y, expected in found:
        torch.testing.assert_close(y, expected, check_dtype=False)
        gy = torch.randn_like(y)
        ours, theirs = (torch.autograd.grad(t, (x, scale), gy) for t in (y, expected))
        torch.testing.assert_close(ours, theirs)
        assert ours[1].dtype == torch.float32
        assert ours[1].shape == ()
    (only,) = torch.autograd.grad(pool(x.detach(), 3, 2, p=0.5, scale=scale).sum(), scale)
    torch.testing.assert_close(only, torch.autograd.grad(truth(x.detach(), 0.5, scale).sum(), scale)[0])


@every_kind
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("where", ["window", "padded", "global"])
def test_derivatives_by_input_and_parameters(kind, rank, where):
    """First and second, of everything by everything."""
    pool, whole = functions(kind, rank)
    x = (torch.rand(1, 2, *(5, 4, 3)[:rank], dtype=torch.float64) + 0.5).requires_grad_()
    values = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True) if name in kind.slopes else value
        for name, value in kind.face.defaults.items()
    }
    learned = [v for v in values.values() if isinstance(v, torch.Tensor)]

    def run(t, *numbers):
        given = values | dict(zip(kind.slopes, numbers, strict=True))
        if where == "global":
            return whole(t, **given)
        return pool(t, kernel_size=3, stride=2, padding=1, **given) if where == "padded" else pool(t, kernel_size=2, **given)

    assert gradcheck(run, (x, *learned))
    assert gradgradcheck(run, (x, *learned))


@every_kind
def test_a_parameter_is_a_number_or_a_tensor_of_one(kind):
    x = torch.rand(2, 3, 8, 8)
    pool, _ = functions(kind, 2)
    expected = pool(x, kernel_size=2)
    for form in (float, torch.tensor, lambda v: torch.tensor([v]), lambda v: torch.tensor(v, dtype=torch.float64)):
        values = {name: form(value) for name, value in kind.face.defaults.items()}
        torch.testing.assert_close(pool(x, kernel_size=2, **values), expected, rtol=1e-6, atol=0)
    name = kind.parameters[0]
    with pytest.raises(TypeError, match=f"{pool.__name__ if kind is not HERE else 'here_pool2d'}: {name} must be a number or a tensor"):
        pool(x, kernel_size=2, **{name: "3"})
    with pytest.raises(ValueError, match=f"{name} must be a number or a tensor of one element, got a tensor of shape"):
        pool(x, kernel_size=2, **{name: torch.ones(2)})


def test_what_a_face_refuses():
    pool, whole = functions(HERE, 2)
    x = torch.rand(2, 3, 8, 8)
    for given in (0, torch.zeros(())):
        with pytest.raises(ValueError, match=r"^here_pool2d: scale must not be 0, got 0\.0$"):
            pool(x, 2, scale=given)
    with pytest.raises(ValueError, match=r"^global_here_pool2d: scale"):
        whole(x, scale=0)
    with pytest.raises(NotImplementedError, match=r"^here_pool2d: there is no gradient by p; p\.detach\(\) works"):
        pool(x, 2, p=torch.ones((), requires_grad=True))
    for wrong in ({"q": 1}, {"input": x}, {}):
        with pytest.raises(TypeError):
            pool(x, *([2] if wrong else []), **wrong)
    with pytest.raises(TypeError):
        pool(x, 2, 2, 0, 1, False, 0.5, 2.0, 7)


@every_kind
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_signatures(kind, rank):
    pool, whole = functions(kind, rank)
    window = ["kernel_size", "stride", "padding", "dilation", "ceil_mode"]
    parameters = list(kind.parameters)
    first = [*parameters, *window] if kind.face.map_by_default else [*window, *parameters]
    beside = ["before", "after", "affine"]
    assert list(inspect.signature(pool).parameters) == ["input", *first, *beside]
    assert list(inspect.signature(whole).parameters) == ["input", *parameters, "keepdim", *beside]
    assert {name: inspect.signature(pool).parameters[name].default for name in parameters} == kind.face.defaults
    assert pool.__doc__ == kind.face.doc
    if kind.face.map_by_default:
        x = torch.rand(2, 3, *[5] * rank)
        assert torch.equal(pool(x), whole(x))


def test_by_place_and_by_name():
    pool, _ = functions(HERE, 2)
    x = torch.rand(1, 2, 8, 8)
    expected = pool(x, 3, 2, 1, 1, True, 0.5, 3.0)
    assert torch.equal(pool(x, stride=2, kernel_size=3, padding=1, scale=3.0, p=0.5, ceil_mode=True), expected)
    assert torch.equal(pool(input=x, kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=True, p=0.5, scale=3.0), expected)


class HerePool2d(_ParametrisedPool):
    """What fastpool.nn makes of the type written here, under a name that pickle finds."""

    vars().update(fast._parametrised(HERE)(2, functions(HERE, 2)[0])[1])


def modules():
    return [(HerePool2d, HERE), *((getattr(fast, f"{KINDS[name].face.title}Pool2d"), KINDS[name]) for name in KIND_NAMES)]


@pytest.mark.parametrize(("module", "kind"), modules(), ids=lambda v: getattr(v, "__name__", None))
def test_modules(module, kind):
    x = torch.rand(2, 3, 8, 8)
    pool, _ = functions(kind, 2)
    made = module(kernel_size=2)
    torch.testing.assert_close(made(x), pool(x, kernel_size=2))
    assert [name for name, _ in made.named_parameters()] == list(kind.face.trainable)
    assert list(made.state_dict()) == list(kind.face.trainable)
    assert f"{kind.parameters[0]}={kind.face.defaults[kind.parameters[0]]}" in repr(made)
    again = pickle.loads(pickle.dumps(made))
    assert repr(again) == repr(made)
    assert torch.equal(again(x), made(x))
    if kind.slopes:
        fixed = module(kernel_size=2, trainable=False)
        assert not list(fixed.parameters())
        torch.testing.assert_close(fixed(x), made(x))
        made(x).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite() for p in made.parameters())
    else:
        assert "trainable" not in inspect.signature(module).parameters


def test_a_parameter_learns():
    """The p that makes a map of one window's pooling is found by descent."""
    torch.manual_seed(0)
    x = torch.rand(8, 4, 6, 6)
    pool, _ = functions(HERE, 2)
    module = HerePool2d(2, scale=2.0)
    target = pool(x, 2, scale=0.8)
    optimiser = torch.optim.Adam(module.parameters(), 0.1)
    for _ in range(120):
        optimiser.zero_grad()
        (module(x) - target).square().mean().backward()
        optimiser.step()
    assert abs(module.scale.item() - 0.8) < 0.02
