"""Modules: torch.nn's own in everything but forward; and ``convert``, which swaps them in a model."""

import copy
import inspect
import pickle
import re

import pytest
import torch
from fastpool.kernels.pool import KINDS
from torch import nn

import fastpool
import fastpool.functional as F
import fastpool.nn as fast

# Stem -> (arguments of the module, what the functional makes of them); a function takes ``f``, its namespace by rank
STEMS = {
    "MaxPool": ((3, 2, 1, 2), lambda f, x: f("max_pool")(x, 3, 2, 1, 2)),
    "MinPool": ((3, 2, 1, 2), lambda f, x: f("min_pool")(x, 3, 2, 1, 2)),
    "AvgPool": ((3, 2, 1, True, False), lambda f, x: f("avg_pool")(x, 3, 2, 1, True, False)),
    "LPPool": ((2, 3, 2, True), lambda f, x: f("lp_pool")(x, 2, 3, 2, True)),
    "L2Pool": ((3, 2, 1, 2, True), lambda f, x: f("l2_pool")(x, 3, 2, 1, 2, True)),
    "StochasticPool": ((3, 2, 1, 2, True), lambda f, x: f("stochastic_pool")(x, 3, 2, 1, 2, True)),
    "GlobalMaxPool": ((False,), lambda f, x: f("global_max_pool")(x, False)),
    "GlobalAvgPool": ((), lambda f, x: f("global_avg_pool")(x)),
    "GlobalMinPool": ((True,), lambda f, x: f("global_min_pool")(x)),
    "GlobalL2Pool": ((False,), lambda f, x: f("global_l2_pool")(x, keepdim=False)),
    "AdaptiveMaxPool": ((3,), lambda f, x: f("adaptive_max_pool")(x, 3)),
    "AdaptiveMinPool": ((3,), lambda f, x: f("adaptive_min_pool")(x, 3)),
    "AdaptiveAvgPool": ((3,), lambda f, x: f("adaptive_avg_pool")(x, 3)),
}
RANKS = (1, 2, 3)


def _functional(stem, rank):
    return lambda x: STEMS[stem][1](lambda name: getattr(F, f"{name}{rank}d"), x)


# Name -> (arguments of the module, what the functional makes of them)
MODULES = {f"{stem}{rank}d": (STEMS[stem][0], _functional(stem, rank)) for stem in STEMS for rank in RANKS}
TORCH_HAS = [f"{stem}Pool{rank}d" for stem in ("Max", "Avg", "LP", "AdaptiveMax", "AdaptiveAvg") for rank in RANKS]
UNPOOLS = [f"MaxUnpool{rank}d" for rank in RANKS]
CONVS = [f"Conv{rank}d" for rank in RANKS]
"""tests/test_conv_nn.py."""
FACES = {
    f"{whole}{kind.face.title}Pool{rank}d"
    for kind in KINDS.values()
    if kind.face and kind.name not in ("max", "min", "l2")
    for whole in ("", *["Global"] * bool(kind.combine))
    for rank in RANKS
}
"""Modules with parameters of their kind's own: tests/test_faces.py."""
every_module = pytest.mark.parametrize("name", MODULES)


def made(name, library=fast):
    return getattr(library, name)(*MODULES[name][0])


def made_of(rank):
    return torch.randn((2, 3, 7, 9, 11)[: 2 + rank], generator=torch.Generator().manual_seed(3))


@pytest.fixture
def x(request):
    """An input of the rank of the module that the test is given."""
    name = request.getfixturevalue("name") if "name" in request.fixturenames else "2d"
    return made_of(int(name[-2]))


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_every_module_is_in_the_list():
    assert {*MODULES, *UNPOOLS, *CONVS, *FACES} == set(fast.__all__)


@every_module
def test_a_module_is_its_functional(name, x):
    module, functional = made(name), MODULES[name][1]
    for given in x, x[0]:
        torch.manual_seed(5)
        found = module(given)
        torch.manual_seed(5)
        equal(found, functional(given))


@every_module
def test_a_module_of_one_argument_takes_the_functionals_defaults(name, x):
    arguments = (2, 3) if name.startswith("LP") else () if name.startswith("Global") else (3,)
    stem = name[: name.index("Pool")]
    words = [word.lower() for word in re.findall("[A-Z][a-z2]+|LP", stem)]
    torch.manual_seed(5)
    found = getattr(fast, name)(*arguments)(x)
    torch.manual_seed(5)
    equal(found, getattr(F, f"{'_'.join(words)}_pool{name[-2:]}")(x, *arguments))


@pytest.mark.parametrize("name", TORCH_HAS)
def test_a_module_is_torchs_own_in_all_but_forward(name, x):
    ours, theirs = made(name), made(name, nn)
    assert isinstance(ours, getattr(nn, name))
    assert repr(ours) == repr(theirs)
    parameters = inspect.signature(type(ours)).parameters
    beside = [] if "Unpool" in name else ["before", "after"]
    assert [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY] == beside
    assert [p for p in parameters.values() if p.kind is not p.KEYWORD_ONLY] == [*inspect.signature(type(theirs)).parameters.values()]
    assert vars(ours).keys() == vars(theirs).keys()
    torch.testing.assert_close(ours(x), theirs(x))


@every_module
def test_a_module_holds_nothing(name):
    module = made(name)
    assert module.state_dict() == {}
    module.load_state_dict({})
    assert list(module.parameters()) == list(module.buffers()) == []


@every_module
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))], ids=("deepcopy", "copy", "pickle"))
def test_a_copy_is_the_same_module(name, copied, x):
    module = made(name).eval()
    other = copied(module)
    assert type(other) is type(module)
    assert repr(other) == repr(module)
    assert not other.training
    equal(other(x), module(x))


REPRS = {
    "MinPool2d": "MinPool2d(kernel_size=3, stride=2, padding=1, dilation=2, ceil_mode=False)",
    "L2Pool2d": "L2Pool2d(kernel_size=3, stride=2, padding=1, dilation=2, ceil_mode=True)",
    "StochasticPool2d": "StochasticPool2d(kernel_size=3, stride=2, padding=1, dilation=2, ceil_mode=True)",
    "GlobalMaxPool2d": "GlobalMaxPool2d(keepdim=False)",
    "GlobalAvgPool2d": "GlobalAvgPool2d(keepdim=True)",
    "GlobalMinPool2d": "GlobalMinPool2d(keepdim=True)",
    "GlobalL2Pool3d": "GlobalL2Pool3d(keepdim=False)",
    "AdaptiveMinPool1d": "AdaptiveMinPool1d(output_size=3)",
}


@pytest.mark.parametrize("name", REPRS)
def test_repr_of_what_torch_lacks(name):
    assert repr(made(name)) == REPRS[name]


@pytest.mark.parametrize("name", UNPOOLS)
def test_unpooling(name, x):
    y, indices = getattr(nn, name.replace("Unpool", "Pool"))(2, return_indices=True)(x)
    ours, theirs = getattr(fast, name)(2), getattr(nn, name)(2)
    assert repr(ours) == repr(theirs)
    equal(ours(y, indices, output_size=x.shape[2:]), theirs(y, indices, output_size=x.shape[2:]))


@pytest.mark.parametrize("module", [fast.MaxPool2d, fast.MinPool2d], ids=lambda m: m.__name__)
def test_return_indices(module, x):
    values, indices = module(3, 2, 1, return_indices=True)(x)
    equal(values, module(3, 2, 1)(x))
    assert indices.dtype == torch.int64
    equal(values.flatten(2), x.flatten(2).gather(2, indices.flatten(2)))
    if module is fast.MaxPool2d:
        equal(indices, nn.MaxPool2d(3, 2, 1, return_indices=True)(x)[1])


@every_module
def test_gradients_reach_the_input(name, x):
    x.requires_grad_()
    made(name)(x).sum().backward()
    assert x.grad.shape == x.shape
    assert x.grad.abs().sum() > 0


def test_stochastic_draws_while_training_and_expects_in_evaluation(x):
    module = fast.StochasticPool2d(3, 2, 1)
    torch.manual_seed(1)
    first, second = module(x), module(x)
    torch.manual_seed(1)
    equal(module(x), first)
    equal(module(x), second)
    assert not torch.equal(first, second)

    module.eval()
    before = torch.get_rng_state()
    mean = module(x)
    equal(module(x), mean)
    equal(mean, F.stochastic_pool2d(x, 3, 2, 1, training=False))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(mean, first)

    module.train()
    torch.manual_seed(1)
    equal(module(x), first)


# convert


class Widened(nn.MaxPool2d):
    """What a user derives from torch's module: it may do anything."""

    def forward(self, input):
        return super().forward(input) + 1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        shared = nn.MaxPool2d(2, ceil_mode=True)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), shared)
        self.body = nn.ModuleDict({"same": shared, "norm": nn.LPPool2d(2, 2, 1), "mean": nn.AvgPool2d(2, 1, 1, count_include_pad=False)})
        self.odd = Widened(2, 1)
        self.thin = nn.FractionalMaxPool2d(2, output_ratio=0.9)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    def forward(self, x):
        x = self.body["same"](self.stem(x))
        return self.head(self.odd(self.body["mean"](self.body["norm"](x))))


@pytest.fixture
def net():
    torch.manual_seed(11)
    return Net().eval()


def test_convert_swaps_a_nested_model(net):
    x = torch.randn(2, 3, 19, 21, generator=torch.Generator().manual_seed(3))
    before, keys, shared = net(x), list(net.state_dict()), net.stem[3]
    done = fastpool.convert(net)
    assert list(done.swapped) == ["stem.3", "body.norm", "body.mean", "head.0"]
    swapped = net.stem[3], net.body["norm"], net.body["mean"], net.head[0]
    assert [type(m) for m in swapped] == [fast.MaxPool2d, fast.LPPool2d, fast.AvgPool2d, fast.AdaptiveAvgPool2d]
    assert net.stem[3] is net.body["same"] is shared
    assert done.swapped["stem.3"] == repr(nn.MaxPool2d(2, ceil_mode=True))
    assert list(net.state_dict()) == keys
    assert not any(m.training for m in net.modules())
    torch.testing.assert_close(net(x), before)


def test_convert_keeps_and_reports_what_it_does_not_know(net):
    done = fastpool.convert(net)
    assert done.kept == {
        "odd": "Widened is derived from MaxPool2d, and may have changed it",
        "thin": "FractionalMaxPool2d has no counterpart in fastpool",
    }
    assert type(net.odd) is Widened
    assert type(net.thin) is nn.FractionalMaxPool2d


def test_a_report_reads(net):
    assert str(fastpool.convert(net)).splitlines() == [
        "swapped stem.3: MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=True)",
        "swapped body.norm: LPPool2d(norm_type=2, kernel_size=2, stride=1, ceil_mode=False)",
        "swapped body.mean: AvgPool2d(kernel_size=2, stride=1, padding=1)",
        "swapped head.0: AdaptiveAvgPool2d(output_size=1)",
        "kept    odd: Widened is derived from MaxPool2d, and may have changed it",
        "kept    thin: FractionalMaxPool2d has no counterpart in fastpool",
    ]


def test_converting_again_swaps_nothing(net):
    kept = fastpool.convert(net).kept
    again = fastpool.convert(net)
    assert again.swapped == {}
    assert again.kept == kept
    assert str(fastpool.convert(nn.Sequential(fast.MaxPool2d(2), fast.GlobalAvgPool2d()))) == "nothing to swap found"


@pytest.mark.parametrize("name", TORCH_HAS)
def test_convert_of_a_pooling_module_itself(name, x):
    module = made(name, nn)
    done = fastpool.convert(module)
    assert type(module) is getattr(fast, name)
    assert done.swapped == {"": repr(module)}
    assert str(done).startswith("swapped (the model): ")
    equal(module(x), made(name)(x))


def test_hooks_and_attributes_survive(net):
    pool, seen = net.stem[3], []
    pool.register_forward_hook(lambda module, args, output: seen.append("after"))
    pool.register_forward_pre_hook(lambda module, args: seen.append("before"))
    pool.note = "mine"
    fastpool.convert(net)
    pool(torch.randn(1, 4, 6, 6))
    assert seen == ["before", "after"]
    assert pool.note == "mine"


def test_a_converted_model_copies_and_pickles(net):
    x = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    fastpool.convert(net)
    for other in copy.deepcopy(net), pickle.loads(pickle.dumps(net)):
        assert repr(other) == repr(net)
        equal(other(x), net(x))


def test_a_converted_model_trains(net):
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))
    other = copy.deepcopy(net)
    fastpool.convert(other)
    for model in net.train(), other.train():
        model(x).square().sum().backward()
    for (name, ours), theirs in zip(other.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=lambda text, name=name: f"{name}: {text}")
