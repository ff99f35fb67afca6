"""Modules: torch.nn's own in everything but forward; and ``convert``, which swaps them in a model."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import fastpool
import fastpool.functional as F
import fastpool.nn as fast

# Name -> (arguments of the module, what the functional makes of them)
MODULES = {
    "MaxPool2d": ((3, 2, 1, 2), lambda x: F.max_pool2d(x, 3, 2, 1, 2)),
    "MinPool2d": ((3, 2, 1, 2), lambda x: F.min_pool2d(x, 3, 2, 1, 2)),
    "AvgPool2d": ((3, 2, 1, True, False, 5), lambda x: F.avg_pool2d(x, 3, 2, 1, True, False, 5)),
    "LPPool2d": ((2, 3, 2, True), lambda x: F.lp_pool2d(x, 2, 3, 2, True)),
    "L2Pool2d": ((3, 2, 1, 2, True), lambda x: F.l2_pool2d(x, 3, 2, 1, 2, True)),
    "StochasticPool2d": ((3, 2, 1, 2, True), lambda x: F.stochastic_pool2d(x, 3, 2, 1, 2, True)),
    "GlobalMaxPool2d": ((False,), lambda x: F.global_max_pool2d(x, False)),
    "GlobalAvgPool2d": ((), lambda x: F.global_avg_pool2d(x)),
    "GlobalMinPool2d": ((True,), lambda x: F.global_min_pool2d(x)),
    "GlobalL2Pool2d": ((False,), lambda x: F.global_l2_pool2d(x, keepdim=False)),
}
TORCH_HAS = ("MaxPool2d", "AvgPool2d", "LPPool2d")
every_module = pytest.mark.parametrize("name", MODULES)


def made(name, library=fast):
    return getattr(library, name)(*MODULES[name][0])


@pytest.fixture
def x():
    return torch.randn(2, 3, 9, 11, generator=torch.Generator().manual_seed(3))


def equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_every_module_is_in_the_list():
    assert set(MODULES) == set(fast.__all__)


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
    arguments = {"LPPool2d": (2, 3)}.get(name, () if name.startswith("Global") else (3,))
    functional = {"MaxPool2d": F.max_pool2d, "AvgPool2d": F.avg_pool2d, "MinPool2d": F.min_pool2d, "LPPool2d": F.lp_pool2d}
    functional |= {"L2Pool2d": F.l2_pool2d, "StochasticPool2d": F.stochastic_pool2d}
    functional |= {f"Global{kind}Pool2d": getattr(F, f"global_{kind.lower()}_pool2d") for kind in ("Max", "Avg", "Min", "L2")}
    torch.manual_seed(5)
    found = getattr(fast, name)(*arguments)(x)
    torch.manual_seed(5)
    equal(found, functional[name](x, *arguments))


@pytest.mark.parametrize("name", TORCH_HAS)
def test_a_module_is_torchs_own_in_all_but_forward(name, x):
    ours, theirs = made(name), made(name, nn)
    assert isinstance(ours, getattr(nn, name))
    assert repr(ours) == repr(theirs)
    assert inspect.signature(type(ours)) == inspect.signature(type(theirs))
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
    "GlobalL2Pool2d": "GlobalL2Pool2d(keepdim=False)",
}


@pytest.mark.parametrize("name", REPRS)
def test_repr_of_what_torch_lacks(name):
    assert repr(made(name)) == REPRS[name]


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
    assert list(done.swapped) == ["stem.3", "body.norm", "body.mean"]
    assert [type(m) for m in (net.stem[3], net.body["norm"], net.body["mean"])] == [fast.MaxPool2d, fast.LPPool2d, fast.AvgPool2d]
    assert net.stem[3] is net.body["same"] is shared
    assert done.swapped["stem.3"] == repr(nn.MaxPool2d(2, ceil_mode=True))
    assert list(net.state_dict()) == keys
    assert not any(m.training for m in net.modules())
    torch.testing.assert_close(net(x), before)


def test_convert_keeps_and_reports_what_it_does_not_know(net):
    done = fastpool.convert(net)
    assert done.kept == {
        "odd": "Widened is derived from MaxPool2d, and may have changed it",
        "head.0": "AdaptiveAvgPool2d(1) is fastpool.nn.GlobalAvgPool2d, a class of its own: put that in its place",
    }
    assert type(net.odd) is Widened
    assert type(net.head[0]) is nn.AdaptiveAvgPool2d


def test_a_report_reads(net):
    assert str(fastpool.convert(net)).splitlines() == [
        "swapped stem.3: MaxPool2d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=True)",
        "swapped body.norm: LPPool2d(norm_type=2, kernel_size=2, stride=1, ceil_mode=False)",
        "swapped body.mean: AvgPool2d(kernel_size=2, stride=1, padding=1)",
        "kept    odd: Widened is derived from MaxPool2d, and may have changed it",
        "kept    head.0: AdaptiveAvgPool2d(1) is fastpool.nn.GlobalAvgPool2d, a class of its own: put that in its place",
    ]


def test_converting_again_swaps_nothing(net):
    kept = fastpool.convert(net).kept
    again = fastpool.convert(net)
    assert again.swapped == {}
    assert again.kept == kept
    assert str(fastpool.convert(nn.Sequential(fast.MaxPool2d(2), fast.GlobalAvgPool2d()))) == "no pooling modules found"


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
