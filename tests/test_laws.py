"""Laws of layer order: each is tried on inputs meant to break it, values and gradients; each refusal's counterexample is tried on torch."""

import json
import math

import pytest
import torch
import torch.nn.functional as T
from fastpool.kernels.activation import rising
from fastpool.kernels.pool import KINDS as POOLS
from torch import nn

import fastpool
import fastpool.functional as F
import fastpool.nn as fast
from fastpool import activations, laws, layers
from fastpool.backend import Pooling
from fastpool.window import window

TABLES = {"f first": laws.table(), "pool first": laws.table(pool_first=True)}
TABLE = TABLES["f first"]
orders = pytest.mark.parametrize("order", TABLES)
LAYERS_OF = laws.rows()


def function_of(row):
    """torch's own, of a row of the table."""
    layer = LAYERS_OF[row]
    if isinstance(layer, nn.BatchNorm2d):
        tensors = (layer.running_mean, layer.running_var, layer.weight, layer.bias)
        return lambda x: T.batch_norm(x, *(t.detach().to(x.dtype) for t in tensors), eps=0)
    if isinstance(layer, nn.Module):
        return layer
    plain = row in ("abs", "square", "neg", "exp")
    return getattr(torch, row) if plain else lambda x: activations.on_torch(activations.named("test", row), x)


def in_order(order, f, pool):
    """What is asked for: of the two, in this order."""
    return (lambda x: pool(f(x))) if order == "f first" else (lambda x: f(pool(x)))


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
ENDS = ("max", "min")
FORMS = {
    "f(pool(x))": lambda x, f, pool, top, low: f(pool(x)),
    "pool(f(x))": lambda x, f, pool, top, low: pool(f(x)),
    "pool(x)": lambda x, f, pool, top, low: pool(x),
    "f(max(x))": lambda x, f, pool, top, low: f(top(x)),
    "f(min(x))": lambda x, f, pool, top, low: f(low(x)),
    "max(f(x))": lambda x, f, pool, top, low: top(f(x)),
    "min(f(x))": lambda x, f, pool, top, low: low(f(x)),
    "max(f(min(x)), f(max(x)))": lambda x, f, pool, top, low: torch.maximum(f(low(x)), f(top(x))),
    "min(f(min(x)), f(max(x)))": lambda x, f, pool, top, low: torch.minimum(f(low(x)), f(top(x))),
}
"""What laws say the first order equals; ``top`` and ``low``: the largest and the smallest of the pooling's windows."""


def as_told(law, f, pool, top=POOLINGS["max"], low=minimum):
    """What the law says the first order equals, by torch."""
    if law.form.endswith(" * pool(x)"):
        return lambda x: float(law.form.split(" *")[0]) * pool(x)
    return lambda x: FORMS[law.form](x, f, pool, top, low)


def numbers(dtype):
    """Ties and near ties, signed zeros, subnormals, corners and minima with their neighbours, saturation, the largest, infinities."""
    info = torch.finfo(dtype)
    centres = [0.0, 0.1, 0.5, 1.0, 3.0, 6.0, 20.0, 1.5, 0.7517915, 0.7524614, 1.2784645, 1.1924312]
    base = torch.tensor([*centres, *(-c for c in centres)], dtype=dtype)
    up, down = (base.nextafter(torch.tensor(end, dtype=dtype)) for end in (math.inf, -math.inf))
    hard = [-0.0, info.smallest_normal, info.smallest_normal / 8, 30.0, 88.0, 100.0, 17.5, 16.6, 9.1, 5.7, info.max, math.inf]
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


HOLDING = [
    (order, *pair)
    for order, table in TABLES.items()
    for pair, law in table.items()
    if law.holds and pair[1] in POOLINGS and not pair[0].startswith("dropout")
]
NEVER = [(order, *pair) for order, table in TABLES.items() for pair, law in table.items() if law.kind == "never"]
holding = pytest.mark.parametrize(("order", "row", "column"), HOLDING)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@holding
def test_a_law_holds(order, row, column, dtype):
    """Bit for bit where it says so, else within a few last places of torch's own function; with infinities, but where it says that x is
    finite, and with NaN."""
    law, f, pool = TABLES[order][row, column], function_of(row), POOLINGS[column]
    told = as_told(law, f, pool)
    x = windows_of(numbers(dtype))
    if "x is finite" in " ".join(law.conditions):
        infinite = windows_of(numbers(dtype)[-24:])
        assert not torch.equal(in_order(order, f, pool)(infinite).isnan(), told(infinite).isnan()), "the condition is not needed"
        x = x.nan_to_num(0)
    if column not in ENDS:
        x = torch.where(x.isinf(), x, x.clamp(-1e6, 1e6))  # sums of four, squares and cubes are finite
    nan = torch.full((1, 1, 2, 2), math.nan, dtype=dtype)
    some = x[..., :12000].clone()
    some[0, 0, 0, ::6] = math.nan
    x = torch.cat([x, some, nan], -1)
    first, other = in_order(order, f, pool)(x), told(x)
    if law.kind == "exact":
        torch.testing.assert_close(first, other, rtol=0, atol=0, equal_nan=True)
        return
    eps = torch.finfo(dtype).eps
    if "no draw falls" in " ".join(law.conditions):
        weights = x.double().clamp(min=0).view(2, -1, 2).transpose(0, 1).flatten(1)
        border = ((weights.cumsum(1) / weights.sum(1, keepdim=True) - 0.4).abs() < 4 * eps).any(1)
        assert border.float().mean() < 2e-3
        first, other = first.flatten()[~border], other.flatten()[~border]
    if law.kind == "affine":
        # Sums of numbers of both signs: within what their sizes are rounded to.
        size = 1 + T.avg_pool2d(x.abs(), 2).nan_to_num(0, 0, 0)
        first, other = first / size, other / size
    atol = 8 * eps if dtype is torch.float32 or row != "softplus" else 3e-9  # what softplus falls by at its threshold
    torch.testing.assert_close(first, other, rtol=16 * eps, atol=atol, equal_nan=True)


@holding
def test_gradients_follow_the_law(order, row, column):
    """Float64, no ties: equal, element by element."""
    law, f, pool = TABLES[order][row, column], function_of(row), POOLINGS[column]
    torch.manual_seed(0)
    x = torch.randn(1, 1, 2, 4000, dtype=torch.float64).mul(2.5)
    x = x + 0.004 * torch.rand_like(x)
    gy = torch.randn(1, 1, 1, 2000, dtype=torch.float64)

    def gradient(layer, x):
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(layer(leaf), leaf, gy)[0]

    # Two elements that f makes equal: whoever is first.  None is here, but on flat parts, whose slope is 0.
    flat = row in ("hardtanh", "relu6", "hardsigmoid", "softshrink", "hardshrink", "relu", "threshold(0.1, 0)")
    tolerance = 1e-12 if flat else 1e-9
    first, other = gradient(in_order(order, f, pool), x), gradient(as_told(law, f, pool), x)
    torch.testing.assert_close(first, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("order", "row", "column"), [pair for pair in HOLDING if pair[2] in ENDS])
def test_gradients_of_ties_go_where_the_law_says(order, row, column):
    """Float32, ties everywhere: a window's whole gradient differs by what one slope there differs from another, and little."""
    law, f, pool = TABLES[order][row, column], function_of(row), POOLINGS[column]
    x = windows_of(numbers(torch.float32).clamp(-40, 40), 20_000)

    def sums(layer):
        leaf = x.clone().requires_grad_()
        return T.avg_pool2d(torch.autograd.grad(layer(leaf).sum(), leaf)[0], 2) * 4

    a, b = sums(in_order(order, f, pool)), sums(as_told(law, f, pool))
    if row == "hardsigmoid":
        # The last number below 3 is 1 already, with a slope.
        below = 3 - x.abs()
        last = T.max_pool2d(((below > 0) & (below < 1e-6)).float(), 2).bool()
        assert torch.equal(a[~last], b[~last])
        assert last.float().mean() < 0.2
    elif law.kind == "two-point":
        # Of two ends that f makes equal, on the two sides of its valley, the first gets it; in this form each a half.
        ends = f(minimum(x)), f(POOLINGS["max"](x))
        equal = ((ends[0] - ends[1]).abs() <= 4e-7 * ends[0].abs()) & (minimum(x) != POOLINGS["max"](x))
        assert 0 < equal.float().mean() < 0.5
        torch.testing.assert_close(a[~equal], b[~equal], rtol=2e-3, atol=2e-3)
    elif law.kind in ("exact", "exchange"):
        # Elements that f makes equal lie on a flat part, whose slope is 0 at its corners too.
        torch.testing.assert_close(a, b, rtol=1e-6 if row.startswith("batch_norm") else 0, atol=0)
    else:
        # Saturated, or a last place apart: slopes there differ by as much as they change in a step of rounding.
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def shown_gap(law, first, second):
    """Of what is told to be never: by torch's own layers, in float32."""
    x = law.counterexample
    return (second(first(x)) - first(second(x))).abs().max().item()


def of_two_signs(x):
    """What "batch_norm" stands for: a batch-norm in inference of two channels."""
    scale, shift = torch.tensor([1.5, -0.5]), torch.tensor([0.25, -1.0])
    return T.batch_norm(x, torch.zeros(2), torch.ones(2), scale, shift, eps=0)


def seeded(seed, call):
    torch.manual_seed(seed)
    return call()


def gap_of_draws(law, other, drop, whole):
    """The largest over many masks of what ``drop`` draws before ``other``, against the same mask behind it; behind a pooling, where one
    mask has no counterpart, against the nearer of what is kept and dropped."""
    x, found = law.counterexample, 0.0
    for seed in range(300):
        before = seeded(seed, lambda: other(drop(x)))
        if whole:
            gaps = (before - seeded(seed, lambda: drop(other(x)))).abs()
        else:
            gaps = torch.minimum(before.abs(), (before - 2 * other(x)).abs())
        found = max(found, gaps.max().item())
    return found


@pytest.mark.parametrize(("order", "row", "column"), NEVER)
def test_a_counterexample_breaks_it_in_torch(order, row, column):
    """The gap that is told, by torch's own layers in float32."""
    law = TABLES[order][row, column]
    assert not law
    assert law.counterexample.dtype == torch.float32
    if row.startswith("dropout") or column == "dropout":
        drop = T.dropout2d if row == "dropout2d" else T.dropout
        other = POOLINGS[column] if column in POOLINGS else of_two_signs if column == "batch_norm" else function_of(row)
        element = row == "dropout" and column in POOLINGS
        found = gap_of_draws(law, other, drop, whole=not element)
        # Of elements the law looks at one mask of many.
        assert found == pytest.approx(law.gap, rel=1e-3, abs=1e-6) or (element and found > law.gap)
    else:
        training = row == "batch_norm_training"
        first = (lambda x: T.batch_norm(x, None, None, training=True)) if training else function_of(row)
        second = of_two_signs if column == "batch_norm" else POOLINGS[column]
        pair = (first, second) if order == "f first" else (second, first)
        assert shown_gap(law, *pair) == pytest.approx(law.gap, rel=1e-3, abs=1e-6)
    assert law.gap > 1e-3 or (row, column) in (("selu", "gem"), ("dropout2d", "gem"), ("batch_norm, scale > 0", "gem"))


def test_every_refusal_has_a_counterexample_and_every_law_a_reason():
    every = [law for table in TABLES.values() for law in table.values()]
    assert len(every) > 600
    for law in every:
        assert law.kind in laws.KINDS
        assert law.kind != "probed"
        assert (law.kind == "never") == (not law.holds) == (law.counterexample is not None)
        assert law.reason
        assert law.source
        assert bool(law.form) == law.holds
        assert (laws.BETWEEN in law.conditions) == law.holds
        json.dumps(law.as_dict())
        assert law.reason[1:] in str(law)


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
    (nn.GELU(), nn.MaxPool2d(3, 2, 1), "two-point", "never"),
    (nn.GELU(approximate="tanh"), nn.MaxPool2d(3, 2, 1), "two-point", "never"),
    (torch.relu, T.max_pool2d, "exact"),
    (T.relu, fast.MaxPool2d(2), "exact"),
    (nn.ReLU(), fast.MinPool3d(2), "exact"),
    (nn.GELU(), fast.MinPool2d(2), "never"),
    (nn.ReLU(), nn.AdaptiveMaxPool1d(3), "exact"),
    (nn.ReLU(), fast.GlobalMaxPool2d(), "exact"),
    (nn.Sigmoid(), nn.MaxPool2d(3, 1, 1, dilation=2), "rounding"),
    (nn.Tanh(), nn.AdaptiveAvgPool2d((2, None)), "never"),
    (nn.ReLU(), fast.GlobalAvgPool2d(), "never"),
    (nn.SELU(), fast.StochasticPool2d(2), "scaling"),
    (nn.SELU(), fast.StochasticPool2d(3, 2).eval(), "scaling"),
    (nn.ELU(), fast.StochasticPool2d(2).eval(), "exact"),
    (nn.Threshold(0.0, -2.0), fast.StochasticPool2d(2).eval(), "exact", "never"),
    (nn.ReLU(), fast.GeMPool2d(), "exact"),
    (nn.Threshold(0.0, -2.0), fast.GeMPool2d(), "exact"),
    (nn.ReLU(), fast.SoftPool2d(2), "never"),
    (nn.ReLU(), F.l2_pool2d, "never"),
    (torch.neg, nn.LPPool2d(2, 2), "scaling", "never"),
    (torch.abs, nn.LPPool2d(2, 3, 1), "scaling"),
    (nn.LeakyReLU(-1.0), fast.LPPool2d(1, 2), "scaling"),
    (nn.LeakyReLU(0.5), nn.LPPool2d(2, 2), "never"),
    (torch.neg, nn.LPPool2d(3, 2), "never"),
    (torch.neg, "max_pool2d", "exchange"),
    (torch.neg, nn.MaxPool2d(3, 2, 1), "exchange"),
    (torch.neg, nn.AvgPool2d(3, 2, 1), "affine"),
    (nn.PReLU(), nn.MaxPool2d(2), "exact"),
    (nn.PReLU(3, init=-0.1), nn.MaxPool2d(2), "two-point", "never"),
    (nn.PReLU(3), nn.MaxPool2d(2), "exact"),
    (nn.PReLU(3), nn.AvgPool2d(2), "never"),
    (nn.LeakyReLU(-0.1), nn.MaxPool2d(2), "two-point", "never"),
    (nn.RReLU().eval(), nn.MaxPool2d(2), "exact"),
    (nn.Threshold(0.1, 20), nn.MaxPool2d(2), "two-point", "never"),
    (nn.Softplus(threshold=1), nn.MaxPool2d(2), "never"),
    (nn.Softplus(threshold=2), nn.MaxPool2d(2), "never"),
    (nn.Softplus(2.5, 5), nn.MaxPool2d(2), "never"),
    (nn.Hardtanh(-60.0, 60.0), nn.AvgPool2d(2), "never"),
    (nn.Hardtanh(-60.0, 60.0), fast.L2Pool2d(2), "never"),
    (nn.Hardtanh(-60.0, 60.0), fast.GeMPool2d(), "never"),
    (nn.Hardtanh(-60.0, 60.0), nn.Dropout(), "never"),
    (nn.Threshold(50.0, 0.0), nn.AvgPool2d(2), "never"),
    (nn.Hardshrink(1e-3), nn.AvgPool2d(2), "never"),
    (nn.AvgPool2d(2), lambda x: x.clamp(-255, 255), "never"),
    (nn.Dropout().eval(), nn.MaxPool2d(2), "exact"),
    (nn.Identity(), nn.AvgPool2d(2), "exact"),
    (nn.Dropout2d(), nn.AvgPool2d(2), "mask"),
    (nn.Dropout2d(), nn.MaxPool2d(3, 2, 1), "mask"),
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
    (nn.ReLU(), nn.Tanh(), "rounding"),
    (nn.ReLU(), nn.ReLU6(), "exact"),
    (nn.Hardtanh(), nn.ReLU(), "exact"),
    (nn.Threshold(-1, -1), nn.ReLU6(), "exact"),
    (nn.Hardtanh(), nn.Tanh(), "never"),
    (torch.neg, torch.neg, "affine"),
]
SHAPES = {1: (2, 3, 24), 2: (2, 3, 12, 12), 3: (2, 3, 6, 6, 6)}


def as_called(layer):
    """What torch, or fastpool, runs for a layer; of a pooling that draws, its arithmetic."""
    if layer in (T.max_pool2d, "max_pool2d"):
        return POOLINGS["max"]
    if layer is F.l2_pool2d:
        return lambda x: F.l2_pool2d(x, 2)
    if layer == "batch_norm":
        return of_two_signs
    if isinstance(layer, nn.BatchNorm2d) and (layer.training or layer.running_var is None):
        return lambda x: T.batch_norm(x, None, None, training=True)
    if isinstance(layer, fast.StochasticPool2d) and layer.training:
        return layers._pool_of(layer).apply
    return layer


def mirrored(pool):
    return lambda x: -pool(-x)


def maps_for(*pair):
    """Numbers of one neighbourhood beside each other, and of many."""
    rank = next((int(type(p).__name__[-2]) for p in pair if "Pool" in type(p).__name__), 2)
    channels = 2 if "batch_norm" in pair else 3
    values = numbers(torch.float32)[:-24]
    near = windows_of(values.clamp(-30, 30), 3000, seed=5).flatten()
    shape = SHAPES[rank]
    n = math.prod(shape[2:])
    return near[: len(near) // (channels * n) * channels * n].view(-1, channels, *shape[2:])


@pytest.mark.parametrize("turned", [False, True], ids=["as it stands", "turned"])
@pytest.mark.parametrize(("first", "second", "kinds"), [(a, b, kinds) for a, b, *kinds in LAYERS], ids=said)
def test_layers_as_users_have_them(first, second, kinds, turned):
    """Their classes in both orders, which are one unless there are two; and by torch, over windows of all forms, what each tells."""
    pair = (second, first) if turned else (first, second)
    law = fastpool.commutes(*pair)
    assert law.kind == kinds[-1 if turned else 0]
    assert bool(law) == (law.kind != "never")
    one, other = map(as_called, pair)
    drop = next((layer for layer in pair if isinstance(layer, nn.Dropout | nn.Dropout2d) and layer.training), None)
    if law.kind == "never":
        if drop is not None:
            assert gap_of_draws(law, as_called(pair[pair[0] is drop]), drop, True) == pytest.approx(law.gap, rel=1e-3)
        elif law.gap < math.inf:
            with torch.no_grad():
                assert shown_gap(law, one, other) == pytest.approx(law.gap, rel=1e-3, abs=1e-5)
        return
    x = maps_for(*pair)

    def result(call):
        torch.manual_seed(3)
        with torch.no_grad():
            return call(x.clone())

    swapped = lambda x: one(other(x))
    if not law.form.startswith("either"):
        f, pool = (other, one) if turned else (one, other)
        smallest = isinstance(second, fast.MinPool2d | fast.MinPool3d)
        top, low = (mirrored(pool), pool) if smallest else (pool, mirrored(pool))
        swapped = as_told(law, f, pool, top, low)
    close = {"rtol": 0, "atol": 0} if law.kind == "exact" else {"rtol": 3e-6, "atol": 2e-6}
    torch.testing.assert_close(result(lambda x: other(one(x))), result(swapped), **close)


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


def still(module):
    """Without a shift."""
    with torch.no_grad():
        module.bias.zero_(), module.running_mean.zero_()
    return module


def test_batch_norm_over_channels():
    assert fastpool.commutes(inference(1.0, 2.0), nn.MaxPool2d(2)).kind == "exact"
    assert fastpool.commutes(inference(1.0, -2.0), nn.AvgPool2d(3, 1)).kind == "affine"
    padded = fastpool.commutes(inference(1.0, -2.0), nn.AvgPool2d(3, 1, 1))
    assert padded.kind == "never"  # a shift does not reach the padding that is counted
    assert shown_gap(padded, lambda x: x * 2 + 1, nn.AvgPool2d(3, 1, 1)) > 0.1
    assert fastpool.commutes(inference(1.0, -2.0), nn.AvgPool2d(3, 1, 1, count_include_pad=False)).kind == "affine"
    assert fastpool.commutes(inference(1.0, -2.0), nn.AvgPool2d(2, divisor_override=3)).kind == "never"
    assert fastpool.commutes(still(inference(1.0, -2.0)), nn.AvgPool2d(2, divisor_override=3)).kind == "affine"
    assert fastpool.commutes(torch.neg, nn.AvgPool2d(2, divisor_override=3)).kind == "affine"


@orders
def test_a_factor_is_each_channels_own(order):
    """No number stands for those of all channels."""

    def asked(*pair):
        return fastpool.commutes(*(pair if order == "f first" else pair[::-1]))

    plain = {"f first": "f(pool(x))", "pool first": "pool(f(x))"}[order]
    module, pool = still(inference(2.0, 5.0)), fast.StochasticPool2d(2).eval()
    law = asked(module, pool)
    assert (law.kind, law.form) == ("scaling", plain)
    x = torch.randn(4, 2, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(pool(module(x)), module(pool(x)), rtol=1e-5, atol=1e-6)
    drawing = asked(module, fast.StochasticPool2d(2))
    assert any("no draw" in condition for condition in drawing.conditions)
    falling, norm = still(inference(2.0, -5.0)), nn.LPPool2d(2, 2)
    law = asked(falling, norm)
    if order == "pool first":
        assert law.kind == "never"
        assert shown_gap(law, norm, falling) == pytest.approx(law.gap, rel=1e-4)
        return
    assert law.form == "f(pool(x)) in 1 channel, abs(scale) * pool(x) in 1 channel"
    with torch.no_grad():
        size = falling(norm(x)).abs()
        torch.testing.assert_close(norm(falling(x)), size, rtol=1e-5, atol=1e-5)


def test_batch_norms_meet_channel_by_channel():
    """a d + b = c b + d of the first channel says nothing of the second."""

    def norm(scales, shifts):
        module = nn.BatchNorm2d(2, eps=0).eval()
        with torch.no_grad():
            module.weight.copy_(torch.tensor(scales)), module.bias.copy_(torch.tensor(shifts))
        return module

    one = norm([2.0, 2.0], [1.0, 5.0])
    assert fastpool.commutes(one, norm([3.0, 3.0], [2.0, 10.0])).kind == "affine"
    other = norm([3.0, 3.0], [2.0, 7.0])
    law = fastpool.commutes(one, other)
    assert law.kind == "never"
    assert shown_gap(law, one, other) == law.gap == 3
    with pytest.raises(TypeError, match="BatchNorm2d has 2 channels, BatchNorm2d 3"):
        fastpool.commutes(one, inference(1.0, 2.0, 3.0))


@orders
def test_prelu_of_slopes_of_several_kinds(order):
    """What holds for -1, whose PReLU is abs, does not for the others; and the counterexample is of its channels."""
    module, norm = nn.PReLU(3), nn.LPPool2d(2, 2)
    module.requires_grad_(False)
    module.weight[:] = torch.tensor([-1.0, -1.0, 0.5])
    pair = (module, norm) if order == "f first" else (norm, module)
    law = fastpool.commutes(*pair)
    assert (law.kind, law.first) == ("never", type(pair[0]).__name__)
    assert law.counterexample.shape[1] == 3
    assert shown_gap(law, *pair) == pytest.approx(law.gap, rel=1e-5)
    module.weight[:] = torch.tensor([-1.0, 1.0, -1.0])
    law, x = fastpool.commutes(*pair), torch.randn(2, 3, 6, 6)
    assert law.form == "1 * pool(x)"
    torch.testing.assert_close(pair[1](pair[0](x)), norm(x))


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
    law = fastpool.commutes(nn.Dropout2d(), pool)
    assert (law.kind, law.conditions) == ("mask", ("both orders draw the same mask", laws.FINITE, laws.BETWEEN))
    x = torch.randn(2, 64, 6, 6)
    results = []
    for order in (lambda x: pool(T.dropout2d(x)), lambda x: T.dropout2d(pool(x))):
        torch.manual_seed(1)
        results.append(order(x))
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


# Conditions


def test_the_other_order_is_another_question():
    """f of the largest element is not told by what f makes of all: GELU's -0.046, of -0.75 or of -2."""
    x = torch.tensor([[[[-2.0, -0.5], [-1.0, -0.75]]]])
    gelu, pool = nn.GELU(), nn.MaxPool2d(2)
    assert gelu(pool(x)).item() == pytest.approx(-0.154, abs=1e-3)
    assert pool(gelu(x)).item() == pytest.approx(-0.046, abs=1e-3)
    law = fastpool.commutes(pool, gelu)
    assert law.kind == "never"
    assert "does not tell the largest" in law.reason
    assert fastpool.commutes(pool, torch.neg).form == "min(f(x))"
    assert fastpool.commutes(fast.MinPool2d(2), torch.neg).form == "max(f(x))"
    assert "never below 0" in fastpool.commutes(nn.LPPool2d(2, 2), torch.neg).reason
    assert "nothing else" in fastpool.commutes(nn.LPPool2d(2, 2), nn.LeakyReLU(0.5)).reason


def test_what_is_neither_proved_nor_broken_does_not_hold(monkeypatch):
    monkeypatch.setattr(laws, "_counterexample", lambda first, second: (None, 7))
    law = fastpool.commutes(nn.ReLU(), nn.AvgPool2d(2))
    assert (law.kind, law.form, law.conditions, law.counterexample) == ("probed", "", (), None)
    assert not law
    assert "no difference among 7 maps" in law.evidence


def test_an_activation_is_tried_around_its_own_numbers():
    """A corner at 1.5e7 is outside of all that is tried for everyone."""
    layer, pool = nn.Hardtanh(-1.5e7, 1.5e7), nn.AvgPool2d(2)
    law = fastpool.commutes(layer, pool)
    assert law.kind == "never"
    assert shown_gap(law, layer, pool) == pytest.approx(law.gap, rel=1e-4)


@orders
@pytest.mark.parametrize("beta", [4.0, -16.0])
def test_softplus_falls_between_neighbours_of_its_threshold(beta, order):
    """By 6e-6 / beta, at 12 / beta: three numbers farther there is nothing to be seen of it."""
    pair = (nn.Softplus(beta, 12.0), nn.MaxPool2d(2))
    law = fastpool.commutes(*(pair if order == "f first" else pair[::-1]))
    assert law.kind == "never"
    assert law.gap == pytest.approx(math.log1p(math.exp(-12)) / abs(beta), rel=0.2)


@pytest.mark.parametrize("step", [1, 2])
def test_large_windows_are_looked_at_by_few_numbers_first(step, monkeypatch):
    lots = []
    plain = laws._breaking
    monkeypatch.setattr(laws, "_breaking", lambda first, second, one, other: lots.append(len(one)) or plain(first, second, one, other))
    pool = nn.AvgPool2d(13, step, 6)
    law = fastpool.commutes(nn.GELU(), pool)
    assert shown_gap(law, nn.GELU(), pool) == pytest.approx(law.gap, rel=1e-4)
    assert lots == [81]
    assert not fastpool.commutes(nn.Hardtanh(-60, 60), pool)
    assert lots[:2] == [81, 81]
    assert len(lots) > 2


def test_conditions():
    (only,) = fastpool.commutes(nn.ReLU(), nn.MaxPool2d(2)).conditions
    assert only == laws.BETWEEN
    in_place = fastpool.commutes(nn.ReLU(inplace=True), nn.MaxPool2d(2)).conditions
    assert "nothing else reads the input that ReLU overwrites" in in_place
    for pair in ((nn.Softsign(), nn.MaxPool2d(2)), (nn.Softsign(), nn.ReLU()), (inference(0.0), nn.MaxPool2d(2)), ("dropout", "relu")):
        assert any("finite" in c for c in fastpool.commutes(*pair).conditions), pair
    assert not any("finite" in c for c in fastpool.commutes(inference(0.5), nn.MaxPool2d(2)).conditions)


def test_where_dropped_infinities_are_nan():
    """relu takes -inf away before the mask, or the mask makes NaN of it."""
    x = torch.full((1, 1, 4, 4), -math.inf)
    before, after = seeded(1, lambda: T.dropout(x.relu())), seeded(1, lambda: T.dropout(x).relu())
    assert not before.isnan().any()
    assert after.isnan().any()


def test_where_f_is_no_number():
    """There its whole window is none, where f comes first."""
    root, pool = layers.Function("sqrt", torch.sqrt, rising(root=0.0)), layers.layer_of("max_pool2d")
    for pair in ((root, pool), (pool, root)):
        assert laws._OF_NUMBERS in laws._law(*pair).conditions
    x = torch.tensor([[[[-1.0, 4.0], [0.0, 1.0]]]])
    assert T.max_pool2d(x.sqrt(), 2).isnan()
    assert T.max_pool2d(x, 2).sqrt().item() == 2
    law = laws._law(root, layers.layer_of("neg"))
    assert (law.kind, law.gap, law.as_dict()["gap"]) == ("never", math.inf, "inf")
    assert "is NaN in one order alone on" in str(law)
    assert shown_gap(law, torch.sqrt, torch.neg) != 0


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
    assert fastpool.commutes(nn.MaxPool2d(2, return_indices=True), layer).kind == "never"
    holds = fastpool.commutes(nn.LeakyReLU(0.5), nn.MaxPool2d(2, return_indices=True))
    assert holds.kind == "exact"
    assert laws.NAMED in holds.conditions


INDEXED = {
    "scale 0": (lambda: inference(0.0, 2.0), 2),
    "rounding by a shift": (lambda: inference(1.0, shift=100.0), 1),
    "a slope that rounds": (lambda: nn.LeakyReLU(0.3), 1),
    "two points": (nn.GELU, 1),
    "a mask": (nn.Dropout2d, 1),
}


@pytest.mark.parametrize("name", INDEXED)
def test_indices_by_torch(name):
    """Of whatever stands there, not of functions alone: the element that is named before the other layer and behind it."""
    make, channels = INDEXED[name]
    layer, pool = make(), nn.MaxPool2d(2, return_indices=True)
    law = fastpool.commutes(layer, pool)
    assert (law.kind, law.gap) == ("never", 0)
    x = law.counterexample
    assert x.shape[1] == channels
    indices = pool(x)[1]
    behind = [seeded(seed, lambda: pool(layer(x))[1]) for seed in range(20)]
    assert any(not torch.equal(indices, other) for other in behind)
    made = [seeded(seed, lambda: layer(x)).flatten(2) for seed in range(20)]
    assert any((y.amax(-1) == y.amin(-1)).any() for y in made)  # equal, as the reason says


def test_indices_of_an_exchange_are_the_others():
    """-max(x) names what min(-x) does: the law finds the smallest, channel by channel."""
    pool = nn.MaxPool2d(2, return_indices=True)
    assert fastpool.commutes(torch.neg, pool).kind == "exchange"
    halves = nn.BatchNorm2d(2, eps=0).eval()
    halves.weight.data = torch.tensor([2.0, -0.5])
    assert fastpool.commutes(halves, pool).kind == "exchange"


@pytest.mark.parametrize(
    ("pool", "word"), [(fast.MaxPool2d(2, before="relu"), "before="), (fast.MaxPool2d(2, after=nn.Hardtanh(-2, -1)), "after=")], ids=said
)
def test_a_pooling_with_an_activation_in_it_is_refused(pool, word):
    """Its law would be that of three layers: commutes(neg, MaxPool2d(before=relu)) was told as max's alone."""
    for pair in ((torch.neg, pool), (pool, nn.ReLU())):
        with pytest.raises(TypeError, match=f"commutes: MaxPool2d is a pooling with {word} in it"):
            fastpool.commutes(*pair)
    assert fastpool.commutes(torch.neg, fast.MaxPool2d(2)).kind == "exchange"


def test_dropped_maps_of_windows_of_padding_alone():
    """0 times their infinity is NaN, where the pooling comes first."""
    pool = nn.MaxPool2d(2, 1, 1, dilation=2)
    law = fastpool.commutes(nn.Dropout2d(), pool)
    assert laws.EMPTY in law.conditions
    x = torch.tensor([[[[3.0]]]])
    results = [seeded(seed, lambda: T.dropout2d(pool(x))) for seed in range(20)]
    assert any(y.isnan().any() for y in results)
    assert not any(seeded(seed, lambda: pool(T.dropout2d(x))).isnan().any() for seed in range(20))


@orders
def test_torchs_norm_of_an_odd_power_is_no_norm(order):
    """It sums x^p, not |x|^p: abs before it gave 10 against 2, and was told to be the same; neg's gap was that of |x|."""

    def asked(*pair):
        return fastpool.commutes(*(pair if order == "f first" else pair[::-1]))

    x = torch.tensor([[[[-1.0, -3.0], [4.0, 2.0]]]])
    pool = nn.LPPool2d(1, 2)
    assert (pool(x).item(), pool(x.abs()).item()) == (2, 10)
    law = asked(torch.abs, pool)
    assert law.kind == "never"
    assert shown_gap(law, torch.abs, pool) == pytest.approx(law.gap)
    assert asked(torch.abs, fast.LPPool2d(1, 2)).form == "1 * pool(x)"
    assert asked(torch.neg, pool).kind == "affine"
    torch.testing.assert_close(pool(-x), -pool(x))
    shift = asked(inference(1.0), pool)  # of which each window has four
    assert shift.kind == "never"
    cubes = asked(torch.neg, nn.LPPool2d(3, 2))  # a root of what is below 0
    assert (cubes.kind, cubes.gap) == ("never", math.inf)
    assert asked(nn.ReLU(), nn.LPPool2d(3, 2)).kind == "never"


@pytest.mark.parametrize("function", [torch.sqrt, torch.log], ids=said)
def test_functions_that_are_nan_somewhere(function):
    """One result twice, NaN included: functions of x > 0 alone, under that condition."""
    law = fastpool.commutes(function, nn.MaxPool2d(2))
    assert (law.kind, law.form) == ("probed", "f(max(x))")
    assert laws._OF_NUMBERS in law.conditions
    other = fastpool.commutes(function, nn.AvgPool2d(2))
    assert other.kind == "never"
    assert shown_gap(other, function, nn.AvgPool2d(2)) == pytest.approx(other.gap, rel=1e-4)


CALLED = {"dropout1d": T.dropout1d, "dropout2d": T.dropout2d, "dropout3d": T.dropout3d, "batch_norm": T.batch_norm}


@pytest.mark.parametrize("name", CALLED)
def test_functions_of_layers_are_known_by_their_names(name):
    for other in ("max_pool2d", "relu", "tanh"):
        ours, named = fastpool.commutes(CALLED[name], other), fastpool.commutes(name, other)
        assert (ours.kind, ours.form, ours.first, ours.gap) == (named.kind, named.form, name, named.gap)


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
    assert same(pool(-2.5 * x), 2.5 * y) == same(pool(x.abs()), y) == (s.scales == "all")
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
