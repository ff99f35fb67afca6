"""Laws of layer order: each is tried on inputs meant to break it, values and gradients; each refusal's counterexample is tried on torch."""

import json
import math

import pytest
import torch
import torch.nn.functional as T
from fastpool.kernels.pool import KINDS as POOLS
from torch import nn

import fastpool
import fastpool.functional as F
import fastpool.nn as fast
from fastpool import activations, laws, layers
from fastpool.backend import Pooling
from fastpool.window import window

TABLE = laws.table()
FUNCTIONS = {name: layer for name, layer in laws.rows().items() if not name.startswith(("batch_norm", "dropout"))}


def function_of(row):
    """torch's own, of a row of the table."""
    layer = FUNCTIONS[row]
    if isinstance(layer, nn.Module):
        return layer
    plain = row in ("abs", "square", "neg", "exp")
    return getattr(torch, row) if plain else lambda x: activations.on_torch(activations.named("test", row), x)


def drawn(kind):
    """A kind's arithmetic over 2x2 windows, the draws alike."""
    face = POOLS[kind].face
    op = Pooling("test", POOLS[kind], 2, window("test", 2, 2, None, 0, 1, False), tuple(face.defaults.values()) if face else ())
    return lambda x: layers.pooled(op, x)[0]


def minimum(x):
    return -T.max_pool2d(-x, 2)


POOLINGS = {
    "max": lambda x: T.max_pool2d(x, 2),
    "min": minimum,
    "avg": lambda x: T.avg_pool2d(x, 2),
    "l2": lambda x: T.lp_pool2d(x, 2, 2),
    "stochastic": drawn("stochastic"),
    "gem": drawn("gem"),
    "soft": drawn("soft"),
}
OTHER = {"max": "min", "min": "max"}


def as_told(law, column, f):
    """What the law says the first order equals, by torch."""
    pool = POOLINGS[column]
    if law.kind == "exchange":
        return lambda x: f(POOLINGS[OTHER[column]](x))
    if law.kind == "two-point":
        ends = POOLINGS["max"], POOLINGS["min"]
        extreme = torch.maximum if column == "max" else torch.minimum
        return lambda x: extreme(f(ends[0](x)), f(ends[1](x)))
    if law.kind == "scaling" and "*" in law.form:
        return lambda x: float(law.form.split(" *")[0]) * pool(x)
    if "left out" in law.form:
        return pool
    return lambda x: f(pool(x))


def numbers(dtype):
    """Ties and near ties, signed zeros, subnormals, corners and minima with their neighbours, saturation, the largest."""
    info = torch.finfo(dtype)
    centres = [0.0, 0.1, 0.5, 1.0, 3.0, 6.0, 20.0, 1.5, 0.7517915, 0.7524614, 1.2784645, 1.1924312]
    base = torch.tensor([*centres, *(-c for c in centres)], dtype=dtype)
    up, down = (base.nextafter(torch.tensor(end, dtype=dtype)) for end in (math.inf, -math.inf))
    hard = [-0.0, info.smallest_normal, info.smallest_normal / 8, 30.0, 88.0, 100.0, 17.5, 16.6, 9.1, 5.7, info.max]
    return torch.cat([base, up, down, base + 1e-3, torch.tensor([*hard, *(-h for h in hard)], dtype=dtype)])


def windows_of(values, count=60_000, seed=0):
    """(1, 1, 2, 2 * windows): four numbers a window, most of them of one neighbourhood."""
    generator = torch.Generator().manual_seed(seed)
    order = values.sort().values
    middle = torch.randint(len(order), (count, 1), generator=generator)
    reach = torch.where(torch.rand(count, 1, generator=generator) < 0.6, 3, len(order))
    step = (torch.rand(count, 4, generator=generator) * 2 - 1) * reach
    picked = order[(middle + step.long()).clamp(0, len(order) - 1)]
    return picked.view(count, 2, 2).permute(1, 0, 2).reshape(1, 1, 2, 2 * count)


def said(layer):
    """A test's name: of a function without its address, which differs from process to process."""
    return str(layer) if isinstance(layer, (nn.Module, str)) else getattr(layer, "__name__", type(layer).__name__)


HOLDING = [pair for pair, law in TABLE.items() if law.holds and pair[0] in FUNCTIONS and pair[1] in POOLINGS]
NEVER = [pair for pair, law in TABLE.items() if law.kind == "never"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("row", "column"), HOLDING)
def test_a_law_holds(row, column, dtype):
    """Bit for bit where it says so, NaN included; else within a few last places of torch's own function."""
    law, f = TABLE[row, column], function_of(row)
    x = windows_of(numbers(dtype))
    if column not in OTHER:
        x = x.clamp(-1e6, 1e6)  # sums of four, squares and cubes are finite
    first, other = POOLINGS[column](f(x)), as_told(law, column, f)(x)
    if law.kind == "exact" and column != "stochastic":
        assert torch.equal(first, other)
        with_nan = torch.cat([x, torch.full((1, 1, 2, 2), math.nan, dtype=dtype)], -1)
        with_nan[0, 0, 0, ::6] = math.nan
        torch.testing.assert_close(POOLINGS[column](f(with_nan)), as_told(law, column, f)(with_nan), rtol=0, atol=0, equal_nan=True)
        return
    eps = torch.finfo(dtype).eps
    if "no draw falls" in " ".join(law.conditions):
        weights = x.double().clamp(min=0).view(2, -1, 2).transpose(0, 1).flatten(1)
        border = ((weights.cumsum(1) / weights.sum(1, keepdim=True) - 0.4).abs() < 4 * eps).any(1)
        assert border.float().mean() < 2e-3
        first, other = first.flatten()[~border], other.flatten()[~border]
    atol = 8 * eps if dtype is torch.float32 or row != "softplus" else 3e-9  # what softplus falls by at its threshold
    torch.testing.assert_close(first, other, rtol=16 * eps, atol=atol, equal_nan=True)


@pytest.mark.parametrize(("row", "column"), HOLDING)
def test_gradients_follow_the_law(row, column):
    """Float64, no ties: equal, element by element; with ties and saturation each window's sum is, where both orders have one slope."""
    law, f = TABLE[row, column], function_of(row)
    torch.manual_seed(0)
    x = torch.randn(1, 1, 2, 4000, dtype=torch.float64).mul(2.5)
    x = x + 0.004 * torch.rand_like(x)
    gy = torch.randn(1, 1, 1, 2000, dtype=torch.float64)

    def gradient(layer, x):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(layer(leaf), leaf, gy)[0]

    def first(x):
        return POOLINGS[column](f(x))

    a, b = gradient(first, x), gradient(as_told(law, column, f), x)
    sums = [T.avg_pool2d(t, 2) for t in (a, b)]
    if law.kind == "two-point":
        # Two elements that f makes equal: whoever is first.  None is here, but on flat parts, whose slope is 0.
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    elif row in ("hardtanh", "relu6", "hardsigmoid", "softshrink", "hardshrink", "relu", "threshold(0.1, 0)"):
        torch.testing.assert_close(*sums, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    else:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("row", "column"), [pair for pair in HOLDING if TABLE[pair].kind in ("exact", "rounding") and pair[1] in ("max", "min")]
)
def test_gradients_of_ties_go_where_the_law_says(row, column):
    """Float32, ties everywhere: a window's whole gradient differs by what one slope there differs from another, and little."""
    f = function_of(row)
    x = windows_of(numbers(torch.float32).clamp(-40, 40), 20_000)

    def sums(layer):
        leaf = x.clone().requires_grad_()
        return T.avg_pool2d(torch.autograd.grad(layer(leaf).sum(), leaf)[0], 2) * 4

    a, b = sums(lambda x: POOLINGS[column](f(x))), sums(lambda x: f(POOLINGS[column](x)))
    if row == "hardsigmoid":
        # The last number below 3 is 1 already, with a slope.
        below = 3 - x.abs()
        last = T.max_pool2d(((below > 0) & (below < 1e-6)).float(), 2).bool()
        assert torch.equal(a[~last], b[~last])
        assert last.float().mean() < 0.2
    elif TABLE[row, column].kind == "exact":
        # Elements that f makes equal lie on a flat part, whose slope is 0 at its corners too.
        assert torch.equal(a, b)
    else:
        # Saturated, or a last place apart: slopes there differ by as much as they change in a step of rounding.
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def shown_gap(law, first, second):
    x = law.counterexample
    return (second(first(x)) - first(second(x))).abs().max().item()


@pytest.mark.parametrize(("row", "column"), [pair for pair in NEVER if pair[0] in FUNCTIONS and pair[1] in POOLINGS])
def test_a_counterexample_breaks_it_in_torch(row, column):
    """The gap that is told, by torch's own layers in float32."""
    law = TABLE[row, column]
    assert not law
    assert law.counterexample.dtype == torch.float32
    assert shown_gap(law, function_of(row), POOLINGS[column]) == pytest.approx(law.gap, rel=1e-3, abs=1e-6)
    assert law.gap > 1e-3 or (row, column) == ("selu", "gem")  # which differ below eps alone, 1e-6


def test_every_refusal_has_a_counterexample_and_every_law_a_reason():
    assert len(TABLE) > 300
    for law in TABLE.values():
        assert law.kind in laws.KINDS
        assert (law.kind == "never") == (not law.holds) == (law.counterexample is not None)
        assert law.reason
        assert law.source
        assert bool(law.form) == law.holds
        assert law.kind == "probed" or (laws.BETWEEN in law.conditions) == law.holds
        json.dumps(law.as_dict())
        assert law.reason[1:] in str(law)
    assert {pair for pair, law in TABLE.items() if law.kind == "probed"} == {("abs", "l2")}


CLASSES = {
    ("relu", "max"): "exact",
    ("leaky_relu", "min"): "exact",
    ("sigmoid", "max"): "rounding",
    ("gelu", "max"): "two-point",
    ("mish", "max"): "two-point",
    ("hardswish", "max"): "two-point",
    ("gelu", "min"): "never",
    ("batch_norm, scale > 0", "max"): "exact",
    ("batch_norm, scale < 0", "max"): "exchange",
    ("batch_norm, scale < 0", "avg"): "affine",
    ("relu", "avg"): "never",
    ("relu", "stochastic"): "exact",
    ("selu", "stochastic"): "scaling",
    ("neg", "l2"): "scaling",
    ("relu", "dropout"): "mask",
    ("tanh", "dropout"): "never",
    ("relu", "batch_norm"): "never",
    ("batch_norm_training", "max"): "never",
    ("dropout", "max"): "never",
    ("dropout2d", "max"): "mask",
}


@pytest.mark.parametrize("pair", CLASSES)
def test_classes(pair):
    assert TABLE[pair].kind == CLASSES[pair]


# The other order of arguments, other forms of a layer


LAYERS = [
    (nn.GELU(), nn.MaxPool2d(3, 2, 1), "two-point"),
    (nn.MaxPool2d(3, 2, 1), nn.GELU(approximate="tanh"), "two-point"),
    (torch.relu, T.max_pool2d, "exact"),
    (T.relu, fast.MaxPool2d(2), "exact"),
    (nn.ReLU(), fast.MinPool3d(2), "exact"),
    (nn.GELU(), fast.MinPool2d(2), "never"),
    (nn.ReLU(), nn.AdaptiveMaxPool1d(3), "exact"),
    (nn.ReLU(), fast.GlobalMaxPool2d(), "exact"),
    (nn.Tanh(), nn.AdaptiveAvgPool2d((2, None)), "never"),
    (nn.ReLU(), fast.GlobalAvgPool2d(), "never"),
    (nn.SELU(), fast.StochasticPool2d(2), "scaling"),
    (nn.ELU(), fast.StochasticPool2d(2).eval(), "exact"),
    (nn.ReLU(), fast.GeMPool2d(), "exact"),
    (nn.ReLU(), fast.SoftPool2d(2), "never"),
    (nn.ReLU(), F.l2_pool2d, "never"),
    (torch.neg, nn.LPPool2d(2, 2), "scaling"),
    (torch.neg, nn.LPPool2d(3, 2), "never"),
    (torch.neg, "max_pool2d", "exchange"),
    (nn.PReLU(), nn.MaxPool2d(2), "exact"),
    (nn.PReLU(3, init=-0.1), nn.MaxPool2d(2), "two-point"),
    (nn.PReLU(3), nn.MaxPool2d(2), "exact"),
    (nn.LeakyReLU(-0.1), nn.MaxPool2d(2), "two-point"),
    (nn.RReLU().eval(), nn.MaxPool2d(2), "exact"),
    (nn.Threshold(0.1, 20), nn.MaxPool2d(2), "two-point"),
    (nn.Softplus(threshold=1), nn.MaxPool2d(2), "never"),
    (nn.Dropout().eval(), nn.MaxPool2d(2), "exact"),
    (nn.Identity(), nn.AvgPool2d(2), "exact"),
    (nn.Dropout2d(), nn.AvgPool2d(2), "mask"),
    (nn.Dropout2d(), nn.Mish(), "never"),
    (nn.Dropout(1.0), nn.Mish(), "mask"),
    (nn.Dropout(), nn.LeakyReLU(), "mask"),
    (nn.Dropout(), "batch_norm", "never"),
    (nn.BatchNorm2d(3), nn.MaxPool2d(2), "never"),
    (nn.BatchNorm2d(3).eval(), nn.MaxPool2d(2), "exact"),
    (nn.BatchNorm2d(3, track_running_stats=False).eval(), nn.MaxPool2d(2), "never"),
    (nn.BatchNorm2d(3).eval(), nn.ReLU(), "scaling"),
    (nn.BatchNorm2d(3), nn.Identity(), "exact"),
    (nn.ReLU(), nn.Sigmoid(), "never"),
    (nn.ReLU(), nn.Tanh(), "probed"),
    (nn.ReLU(), nn.ReLU6(), "probed"),
    (torch.neg, torch.neg, "affine"),
]


@pytest.mark.parametrize(("first", "second", "kind"), LAYERS, ids=said)
def test_layers_as_users_have_them(first, second, kind):
    for pair in ((first, second), (second, first)):
        law = fastpool.commutes(*pair)
        assert law.kind == kind
        assert bool(law) == (kind != "never")


@pytest.mark.parametrize(
    "pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(2), nn.MaxPool2d(2, dilation=2)], ids=said
)
@pytest.mark.parametrize("layer", [torch.sin, nn.Tanh(), nn.GELU(), nn.Hardtanh(0.5, 1)], ids=said)
def test_counterexamples_of_modules(layer, pool):
    """Of the module's own window."""
    law = fastpool.commutes(layer, pool)
    if not law:
        assert shown_gap(law, layer, pool) == pytest.approx(law.gap, rel=1e-4)
        assert law.gap > 1e-2
    else:
        assert isinstance(pool, nn.MaxPool2d)


def inference(*scales, shift=0.5):
    module = nn.BatchNorm2d(len(scales)).eval()
    with torch.no_grad():
        module.weight.copy_(torch.tensor(scales))
        module.bias.fill_(shift)
        module.running_mean.copy_(torch.randn(len(scales)))
        module.running_var.copy_(torch.rand(len(scales)) + 0.5)
    return module


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [4, 14, 33])
def test_batch_norm_in_inference_is_exact_in_torch(size, layout):
    """Its own code keeps the order bit for bit, wherever an element lies; with a negative scale max becomes min, channel by channel."""
    module = inference(1.5, 0.3, -0.7, -2.0, 1e-3, 17.0)
    x = torch.randn(3, 6, size, size).contiguous(memory_format=layout)
    law = fastpool.commutes(module, nn.MaxPool2d(2))
    assert law.kind == "exchange"
    assert "f(max(x)) in 4 channels, f(min(x)) in 2 channels" in law.form
    with torch.no_grad():
        up = module.weight > 0
        swapped = torch.where(up.view(-1, 1, 1), module(T.max_pool2d(x, 2)), module(minimum(x)))
        assert torch.equal(T.max_pool2d(module(x), 2), swapped)


def test_batch_norm_over_channels():
    assert fastpool.commutes(inference(1.0, 2.0), nn.MaxPool2d(2)).kind == "exact"
    assert fastpool.commutes(inference(1.0, -2.0), nn.AvgPool2d(3, 1)).kind == "affine"
    padded = fastpool.commutes(inference(1.0, -2.0), nn.AvgPool2d(3, 1, 1))
    assert padded.kind == "never"  # a shift does not reach the padding that is counted
    assert shown_gap(padded, lambda x: x * 2 + 1, nn.AvgPool2d(3, 1, 1)) > 0.1
    assert fastpool.commutes(inference(1.0, -2.0), nn.AvgPool2d(3, 1, 1, count_include_pad=False)).kind == "affine"
    assert fastpool.commutes(inference(1.0, -2.0), nn.AvgPool2d(2, divisor_override=3)).kind == "never"
    still = inference(1.0, -2.0)
    still.bias.data.copy_(still.running_mean * still.weight * (still.running_var + still.eps).rsqrt())
    assert fastpool.commutes(torch.neg, nn.AvgPool2d(2, divisor_override=3)).kind == "affine"


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_dropouts_mask(name):
    """One mask, two orders, by torch."""
    f, x = function_of(name), torch.randn(1, 8, 6, 6)
    results = []
    for order in (lambda x: T.dropout(f(x), 0.3), lambda x: f(T.dropout(x, 0.3))):
        torch.manual_seed(1)
        results.append(order(x))
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)
    assert fastpool.commutes(nn.Dropout(0.3), name).kind == "mask"


def test_the_mask_passes_tanh_and_its_factor_does_not():
    law = fastpool.commutes(nn.Dropout(), nn.Tanh())
    assert "the mask passes" in law.reason
    assert (torch.tanh(2 * law.counterexample) - 2 * torch.tanh(law.counterexample)).abs().max() == pytest.approx(law.gap, rel=1e-5)
    assert "f(0) is not 0" in fastpool.commutes(nn.Dropout(), nn.Sigmoid()).reason


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), fast.MinPool2d(2), nn.AvgPool2d(2), nn.LPPool2d(2, 2)], ids=said)
def test_dropout_of_channels_passes_poolings(pool):
    assert fastpool.commutes(nn.Dropout2d(), pool).kind == "mask"
    x = torch.randn(2, 64, 6, 6)
    results = []
    for order in (lambda x: pool(T.dropout2d(x)), lambda x: T.dropout2d(pool(x))):
        torch.manual_seed(1)
        results.append(order(x))
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


# Conditions


def test_conditions():
    (only,) = fastpool.commutes(nn.ReLU(), nn.MaxPool2d(2)).conditions
    assert only == laws.BETWEEN
    in_place = fastpool.commutes(nn.ReLU(inplace=True), nn.MaxPool2d(2)).conditions
    assert "nothing else reads the input that ReLU overwrites" in in_place
    assert any("finite" in c for c in fastpool.commutes(nn.Softsign(), nn.MaxPool2d(2)).conditions)


def test_a_window_of_padding_alone():
    """Where a map is shorter than the dilation a window steps over it: the law does not hold, and says so."""
    pool = nn.MaxPool2d(2, stride=1, padding=1, dilation=2)
    law = fastpool.commutes(nn.ReLU(), pool)
    assert any("shorter than the dilation" in c for c in law.conditions)
    x = torch.tensor([[[[3.0]]]])
    assert torch.equal(pool(x.relu()), torch.full_like(x, -math.inf))
    assert torch.equal(pool(x).relu(), torch.zeros_like(x))
    wide = torch.randn(1, 1, 2, 2)
    assert torch.equal(pool(wide.relu()), pool(wide).relu())
    assert not any("dilation" in c for c in fastpool.commutes(nn.ReLU(), nn.MaxPool2d(2, dilation=2)).conditions)


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.Tanh(), nn.Hardtanh()], ids=said)
def test_return_indices_break_a_law(layer):
    """Of elements that f makes equal the first is named, in one order alone."""
    law = fastpool.commutes(layer, nn.MaxPool2d(2, return_indices=True))
    assert law.kind == "never"
    assert "return_indices" in law.reason
    x = law.counterexample.double()
    assert not torch.equal(T.max_pool2d(layer(x), 2, return_indices=True)[1], T.max_pool2d(x, 2, return_indices=True)[1])
    assert fastpool.commutes(nn.LeakyReLU(0.5), nn.MaxPool2d(2, return_indices=True)).kind == "exact"


# What is tried


class Scaled(nn.Module):
    def forward(self, x):
        return 3 * x.clamp(min=0)


PROBED = [
    (lambda x: x.clamp(min=-1), "max_pool2d", "f(max(x))", "never falls"),
    (lambda x: -x.exp(), "max_pool2d", "f(min(x))", "never rises"),
    (lambda x: (x - 2).abs(), "max_pool2d", "max(f(min(x)), f(max(x)))", "falls up to 2"),
    (lambda x: -((x - 2) ** 2), "min_pool2d", "min(f(min(x)), f(max(x)))", "rises up to 1.99"),
    (lambda x: 3 * x + 1, "avg_pool2d", "f(pool(x))", "never falls"),
    (Scaled(), "dropout", "either, with one mask", "never falls"),
    (Scaled(), "stochastic_pool2d", "3.0 * pool(x)", "never falls"),
]


@pytest.mark.parametrize(("function", "pool", "form", "words"), PROBED)
def test_other_functions_are_tried(function, pool, form, words):
    law = fastpool.commutes(function, pool)
    assert (law.kind, law.form) == ("probed", form)
    assert law
    assert words in law.evidence
    assert "float32 numbers" in law.evidence
    assert "tried" in law.source


@pytest.mark.parametrize("function", [torch.sin, lambda x: x**3 - x, lambda x: (x.abs() - 1).abs()])
def test_functions_that_no_law_is_of(function):
    law = fastpool.commutes(function, nn.MaxPool2d(2))
    assert law.kind == "never"
    assert shown_gap(law, function, nn.MaxPool2d(2)) == pytest.approx(law.gap, rel=1e-4)
    assert "falls and rises more than once" in law.evidence


REFUSED = {
    "softmax": (nn.Softmax(-1), TypeError, "not elementwise: an element of its result depends on other elements"),
    "layer_norm": (lambda x: T.layer_norm(x, x.shape[1:]), TypeError, "not elementwise"),
    "place": (lambda x: x + torch.arange(x.numel()).view(x.shape), TypeError, "or on its place"),
    "linear": (nn.Linear(6, 5), TypeError, "of a (2, 4, 6, 6) tensor it makes (2, 4, 6, 5)"),
    "conv": (nn.Conv2d(3, 4, 3), TypeError, "on a (2, 4, 6, 6) tensor it raises"),
    "random": (lambda x: x + torch.rand_like(x), TypeError, "makes different results"),
    "alpha": (nn.AlphaDropout(), TypeError, "makes different results"),
    "rrelu": (nn.RReLU(), TypeError, "RReLU draws its slopes in training"),
    "number": (3, TypeError, "expected a layer's name, a function or a module, got int"),
    "tensor": (torch.ones(3), TypeError, "got Tensor"),
    "name": ("swish", ValueError, "no layer is called 'swish'"),
    "pools": (nn.AvgPool2d(2), TypeError, "one of two must be a function"),
    "threshold": ("threshold", ValueError, "threshold has no default"),
}


@pytest.mark.parametrize(("layer", "error", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(layer, error, words):
    with pytest.raises(error, match="commutes") as caught:
        fastpool.commutes(layer, nn.MaxPool2d(2))
    assert words in str(caught.value)


# What poolings declare


@pytest.mark.parametrize("kind", POOLS)
def test_a_pooling_is_of_the_structure_it_declares(kind):
    """And of no more: what it does not declare some input breaks."""
    of = POOLS[kind]
    parameters = tuple(of.face.defaults.values()) if of.face else {"lp": (3.0,), "lp_negative": (-2.0,)}.get(kind, ())
    op = Pooling("test", of, 2, window("test", 2, 2, None, 0, 1, False), parameters)
    x = torch.randn(1, 1, 40, 40, dtype=torch.float64) * 3

    def pool(x):
        return layers.pooled(op, x)[0]

    def same(a, b):
        return torch.allclose(a, b, rtol=1e-9, atol=1e-9)

    s = of.structure
    y = pool(x)
    assert torch.equal(y, T.max_pool2d(x, 2)) == (s.order == 1)
    assert torch.equal(y, minimum(x)) == (s.order == -1)
    other = torch.randn_like(x)
    assert same(pool(x + other), y + pool(other)) == s.linear
    assert same(pool(2.5 * x), 2.5 * y) == (s.scales is not None or s.linear)
    assert same(pool(-2.5 * x), 2.5 * y) == (s.scales == "all")
    assert same(pool(x + 1.5), y + 1.5) == (s.shifts or s.linear)
    assert (same(pool(x.relu()), y) and bool((y >= 0).all())) == s.reads_above


def test_the_arithmetic_is_the_kernels():
    """What laws are tried with gives what fastpool's functions give."""
    x = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    for kind in ("max", "min", "avg", "l2", "gem", "soft"):
        found = laws.commutes(torch.sin, f"{kind}_pool2d")
        assert found.kind == "never"
        pool = layers._pool_named(f"{kind}_pool2d")
        torch.testing.assert_close(pool.apply(x), getattr(F, f"{kind}_pool2d")(x, kernel_size=2))
    module = nn.AvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=5)
    torch.testing.assert_close(layers._pool_of(module).apply(x), module(x))
    module = nn.MaxPool2d(3, 2, 1, 2, ceil_mode=True)
    assert torch.equal(layers._pool_of(module).apply(x), module(x))
