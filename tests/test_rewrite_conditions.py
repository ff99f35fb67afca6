"""``fastpool.optimize`` on models that a rewrite, or a trace, would change: their results stay, and the report says why."""

import copy
import json
import pickle

import pytest
import torch
import torch.nn.functional as T
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastpool.functional as F
from fastpool import nn as fast
from fastpool import optimize, rewrite

EPS = 2.0**-24


def image(*shape):
    return torch.randn(shape or (2, 3, 16, 16))


def results(model, x, training, seed=1):
    """Outputs, and in training the gradients of all parameters and of x by a fixed random one."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_(training)
    with torch.set_grad_enabled(training):
        y = model(x.clone() if training else x)
    outputs = list(y) if isinstance(y, tuple) else [y]
    if not training:
        return outputs
    loss = sum((t * torch.randn_like(t)).sum() for t in outputs if t.is_floating_point())
    given = [x, *model.parameters()]
    return outputs + list(torch.autograd.grad(loss, given, allow_unused=True))


def assert_same(model, x, *, training=False, changed=None, why=None, laws=None, exactly=True):
    """The rewritten model, whose results are the original's, of each twice, and whose state is the original's."""
    model.train(training)
    names, text = list(model.state_dict()), repr(model)
    found = optimize(model)
    twice = copy.deepcopy(model)
    assert list(found.state_dict()) == names
    assert [name for name, _ in found.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert repr(model) == text
    for _ in range(2):
        for ours, theirs in zip(results(found, x, training), results(twice, x, training), strict=True):
            if theirs is None:
                assert ours is None
            elif exactly and theirs.is_floating_point():
                scale = theirs.detach().nan_to_num(0, 0, 0).abs().max()
                torch.testing.assert_close(ours, theirs, rtol=0, atol=float(64 * EPS * scale), equal_nan=True)
            else:
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for name, ours in found.state_dict().items():
        torch.testing.assert_close(ours, twice.state_dict()[name])
    text = str(found.report)
    assert json.loads(found.report.to_json())["training"] is training
    if changed is not None:
        assert sum(row.changed for row in found.report.rows) == changed, text
    if why is not None:
        said = [row.why for row in found.report.rows] + found.report.notes
        assert any(why in reason for reason in said), (why, said)
    if laws is not None:
        assert [row.law for row in found.report.rows] == laws
    return found


def batch_norm(channels):
    """With statistics, and scales of both signs."""
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.copy_(torch.randn(channels).abs() * torch.tensor([1.0, -1.0]).repeat(channels)[:channels])
        norm.bias.normal_()
    return norm


class Of(nn.Module):
    """A model of a function of itself and its input, and some children."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.function(self, x)


# What is rewritten

CHAINS = {
    "relu, max": (lambda: [nn.ReLU(), nn.MaxPool2d(2)], ["exact"]),
    "gelu, max": (lambda: [nn.GELU(), nn.MaxPool2d(2)], ["two-point"]),
    "relu, avg": (lambda: [nn.ReLU(), nn.AvgPool2d(2)], ["never"]),
    "max, relu": (lambda: [nn.MaxPool2d(2), nn.ReLU()], ["exact"]),
    "norm, relu, max": (lambda: [batch_norm(3), nn.ReLU(), nn.MaxPool2d(2)], ["exact"]),
    "norm, max": (lambda: [batch_norm(3), nn.MaxPool2d(2)], ["exchange"]),
    "conv, norm": (lambda: [nn.Conv2d(3, 4, 3, bias=False), batch_norm(4)], None),
    "conv, norm, relu, dropout, max": (
        lambda: [nn.Conv2d(3, 4, 3), batch_norm(4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.MaxPool2d(2)],
        ["exact"],
    ),
    "conv, relu, max, relu": (lambda: [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.ReLU6()], ["exact"]),
    "max with fastpool's": (lambda: [fast.Conv2d(3, 4, 3), nn.ReLU(), fast.MaxPool2d(2)], ["exact"]),
    "min": (lambda: [nn.ReLU(), fast.MinPool2d(2)], ["exact"]),
    "pool alone": (lambda: [nn.AvgPool2d(2)], None),
    "prelu": (lambda: [nn.PReLU(3), nn.MaxPool2d(2)], ["exact"]),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_chains(name, training):
    make, laws = CHAINS[name]
    model = nn.Sequential(*make())
    changed = 1
    if training and name == "conv, norm":
        changed = None
    assert_same(model, image(), training=training, changed=changed, laws=None if training else laws)


CALLS = {
    "F.relu": lambda m, x: T.max_pool2d(T.relu(x), 2),
    "torch.relu": lambda m, x: T.max_pool2d(torch.relu(x), 2, 2),
    "x.relu": lambda m, x: torch.max_pool2d(x.relu(), 2),
    "by name": lambda m, x: T.max_pool2d(input=T.leaky_relu(x, negative_slope=0.2), kernel_size=2),
    "parameters by place": lambda m, x: T.max_pool2d(T.leaky_relu(x, 0.2), (2, 2)),
    "gelu, tanh": lambda m, x: T.max_pool2d(T.gelu(x, approximate="tanh"), 2),
    "avg": lambda m, x: T.avg_pool2d(x.tanh(), 2),
    "adaptive": lambda m, x: T.adaptive_avg_pool2d(x.sigmoid(), 1),
    "in place": lambda m, x: T.max_pool2d(T.relu(x + 1, inplace=True), 2),
    "fastpool's": lambda m, x: F.max_pool2d(T.relu(x), 2),
    "flattened behind": lambda m, x: torch.flatten(T.max_pool2d(T.relu(x), 2), 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_functions(name):
    for training in (False, True):
        assert_same(Of(CALLS[name]), image(), training=training, changed=1)


# What is not, and why


class Doubling:
    def __call__(self, module, args, output):
        return 2 * output


def doubling_before(module, args):
    return (2 * args[0] - 1,)


def hooked(module, hook=None):
    module.register_forward_hook(hook or Doubling())
    return module


def hooked_before(module):
    module.register_forward_pre_hook(doubling_before)
    return module


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


class Shifted(nn.ReLU):
    """What it changed of torch's layer only its code knows."""

    def forward(self, x):
        return super().forward(x) - 1


def parametrized():
    conv = nn.Conv2d(3, 4, 3)
    parametrize.register_parametrization(conv, "weight", Halved())
    return conv


def through_identity(m, x):
    x = x * 1
    return T.max_pool2d(T.relu_(m.dropout(x)), 2), x


def with_input_too(m, x):
    y = m.conv(x)
    return T.max_pool2d(T.relu_(y), 2), y


def overwritten_between(m, x):
    x = x * 1
    y = x.relu()
    x.mul_(-1)
    return T.max_pool2d(y, 2), x


def identity_overwritten(m, x):
    x = x * 1
    y = m.dropout(x)
    x.mul_(-1)
    return T.max_pool2d(y, 2), x


def augmented(m, x):
    x = x * 1
    y = x
    x += 1
    return T.max_pool2d(T.relu(y), 2), x


def in_place_on_augmented(m, x):
    x = x * 1
    y = x
    x -= 1
    return T.max_pool2d(T.relu_(x), 2), y


READ, OVERWRITES, HOOK = "read elsewhere", "overwrites", "hook"

REFUSED = {
    "activation read": (lambda: Of(lambda m, x: (lambda y: (T.max_pool2d(y, 2), y))(T.relu(x))), False, READ),
    "norm read": (
        lambda: Of(
            lambda m, x: (lambda y: T.max_pool2d(T.relu(m.norm(y)), 2) + T.avg_pool2d(y, 2))(m.conv(x)),
            conv=nn.Conv2d(3, 4, 3),
            norm=batch_norm(4),
        ),
        False,
        READ,
    ),
    "indices": (lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, return_indices=True)), False, "indices"),
    "indices by name": (lambda: Of(lambda m, x: T.max_pool2d(T.relu(x), 2, return_indices=True)), False, "indices"),
    "indices by place": (lambda: Of(lambda m, x: T.max_pool2d(T.relu(x), 2, 2, 0, 1, False, True)), False, "indices"),
    "fastpool's indices": (lambda: Of(lambda m, x: F.max_pool2d(T.relu(x), 2, return_indices=True)), False, "max_pool2d returns indices"),
    "adaptive indices": (lambda: Of(lambda m, x: T.adaptive_max_pool2d(T.relu(x), 4, True)), False, "indices"),
    "in place, of what is read": (lambda: Of(with_input_too, conv=nn.Conv2d(3, 4, 3)), False, OVERWRITES),
    "in place by place": (
        lambda: Of(lambda m, x: (lambda y: (T.max_pool2d(T.leaky_relu(y, 0.1, True), 2), y))(m.conv(x)), conv=nn.Conv2d(3, 4, 3)),
        False,
        OVERWRITES,
    ),
    "in place, of the input": (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2)), False, OVERWRITES),
    "in place, through an identity": (lambda: Of(through_identity, dropout=nn.Dropout()), False, OVERWRITES),
    "in place, through a view": (lambda: Of(lambda m, x: (lambda y: (T.max_pool2d(T.relu_(y[:, :2]), 2), y))(x * 1)), False, OVERWRITES),
    "activation hooked": (lambda: nn.Sequential(hooked(nn.ReLU()), nn.MaxPool2d(2)), False, HOOK),
    "pooling hooked": (lambda: nn.Sequential(nn.ReLU(), hooked_before(nn.MaxPool2d(2))), False, HOOK),
    "convolution hooked": (lambda: nn.Sequential(hooked(nn.Conv2d(3, 4, 3)), batch_norm(4), nn.ReLU(), nn.MaxPool2d(2)), False, HOOK),
    "container hooked": (lambda: nn.Sequential(hooked(nn.Sequential(nn.ReLU())), nn.MaxPool2d(2)), False, HOOK),
    "parametrization": (lambda: nn.Sequential(parametrized(), batch_norm(4), nn.MaxPool2d(2)), False, "parametrization"),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), batch_norm(4), nn.ReLU(), nn.MaxPool2d(2)),
        False,
        "parametrization",
    ),
    "batch-norm in training": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), batch_norm(4), nn.ReLU(), nn.MaxPool2d(2)), True, "statistics"),
    "batch-norm without statistics": (
        lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.MaxPool2d(2)),
        False,
        "statistics",
    ),
    "dropout in training": (lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.5), nn.MaxPool2d(2)), True, "draws"),
    "dropout2d in training": (lambda: nn.Sequential(nn.Tanh(), nn.Dropout2d(0.5), nn.MaxPool2d(2)), True, "draws"),
    "rrelu in training": (lambda: nn.Sequential(nn.RReLU(), nn.MaxPool2d(2)), True, "draws"),
    "lp of an uneven norm": (lambda: nn.Sequential(nn.ReLU(), nn.LPPool2d(3, 2)), False, "norm_type"),
    "convolution with an activation": (
        lambda: nn.Sequential(fast.Conv2d(3, 4, 3, after="relu"), batch_norm(4), nn.MaxPool2d(2)),
        False,
        "has an activation",
    ),
    "pooling with an activation": (
        lambda: nn.Sequential(nn.Tanh(), fast.MaxPool2d(2, before=nn.Softplus())),
        False,
        "has an activation",
    ),
    "derived": (lambda: nn.Sequential(Shifted(), nn.MaxPool2d(2)), False, None),
    "flattened between": (lambda: Of(lambda m, x: T.max_pool1d(torch.flatten(T.relu(x), 2), 2)), False, None),
    "augmented": (lambda: Of(augmented), False, None),
    "in place, of what was augmented": (lambda: Of(in_place_on_augmented), False, None),
    "overwritten between": (lambda: Of(overwritten_between), False, None),
    "identity overwritten": (lambda: Of(identity_overwritten, dropout=nn.Dropout()), False, None),
    "window of padding": (lambda: nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, 2, padding=1, dilation=17)), False, None),
    "average of zeros too": (lambda: nn.Sequential(nn.Sigmoid(), nn.AvgPool2d(3, 2, 1)), False, None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, training, why = REFUSED[name]
    assert_same(make(), image(), training=training, why=why)


def test_inputs_are_overwritten_as_before():
    x = image()
    y = x.clone()
    optimize(nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(2)).eval())(y)
    assert torch.equal(y, x.relu())


@pytest.mark.parametrize("where", ["relu", "container", "model"])
def test_backward_hooks_run(where):
    """They see the gradient at their place: where a rewrite took it away, they would not."""
    relu = nn.ReLU()
    model = nn.Sequential(nn.Sequential(relu), nn.MaxPool2d(2))
    seen = []
    module = {"relu": relu, "container": model[0], "model": model}[where]
    module.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_output[0].shape))
    found = optimize(model, training=True)
    found(image().requires_grad_()).sum().backward()
    assert seen == [torch.Size((2, 3, 8, 8) if where == "model" else (2, 3, 16, 16))]


def test_what_a_hook_keeps_is_overwritten():
    """By the layer in place behind it, as in the model."""
    kept = []
    conv = nn.Conv2d(3, 4, 3)
    conv.register_forward_hook(lambda module, args, output: kept.append(output))
    found = optimize(nn.Sequential(conv, nn.ReLU(inplace=True), nn.MaxPool2d(2)).eval())
    with torch.no_grad():
        found(image())
    assert kept[0].min() == 0
    assert "overwrites" in found.report.rows[0].why


def test_hooks_of_the_model_run():
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    hooked(model)
    assert_same(model, image(), changed=1)


def test_shared_modules():
    """One convolution before two batch-norms, one activation and one pooling at two places."""

    def forward(m, x):
        return m.pool(m.act(m.one(m.conv(x)))) + m.pool(m.act(m.other(m.conv(x))))

    children = {"conv": nn.Conv2d(3, 4, 3), "one": batch_norm(4), "other": batch_norm(4), "act": nn.ReLU(), "pool": nn.MaxPool2d(2)}
    assert_same(Of(forward, **children), image(), changed=2)
    twice = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    assert_same(nn.Sequential(twice, twice), image(), training=True, changed=2)


# Other modes, other parameters, other objects


def test_train_after_eval():
    """What evaluation allows steps aside."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), batch_norm(4), nn.RReLU(), nn.Dropout(0.5), nn.MaxPool2d(2)).eval()
    found, plain, x = optimize(model), copy.deepcopy(model), image()
    for training in (True, False, True):
        found.train(training)
        plain.train(training)
        for ours, theirs in zip(results(found, x, training), results(plain, x, training), strict=True):
            torch.testing.assert_close(ours, theirs)
    assert torch.equal(
        found[1].running_mean if hasattr(found, "__getitem__") else found.state_dict()["1.running_mean"], plain[1].running_mean
    )


def test_draws_after_an_expectation():
    """Stochastic pooling in another mode than it was rewritten in."""
    model = nn.Sequential(nn.Softplus(), fast.StochasticPool2d(2)).eval()
    found, x = optimize(model), image()
    assert found.report.changed
    torch.testing.assert_close(found(x), model(x))
    first, other = (results(net.train(), x, False)[0] for net in (found, model))
    torch.testing.assert_close(first, other)
    assert not torch.allclose(first, results(found.eval(), x, False)[0])


def test_code_that_asks_for_the_mode():
    """A trace is of one mode: in the other it would silently do what it does in the first."""
    model = Of(lambda m, x: T.dropout(T.max_pool2d(T.relu(x), 2), 0.5, m.training))
    assert_same(model, image(), changed=1, why="training")
    assert_same(model, image(), changed=1, training=True)
    found = optimize(model.eval())
    with pytest.raises(RuntimeError, match="rewritten for evaluation"):
        found.train()(image())
    found.eval()(image())


def test_parts_that_ask_for_the_mode():
    """The same, where the whole cannot be traced; copies ask their own."""
    for wrap in (Uncertain, nn.Sequential):
        model = wrap(Of(lambda m, x: T.dropout(T.max_pool2d(m.act(x), 2), 0.5, m.training), act=nn.ReLU())).eval()
        found = optimize(model)
        assert found.report.changed
        assert torch.equal(found(image() * 0 + 1), model(image() * 0 + 1))
        with pytest.raises(RuntimeError, match="optimize the original with training=True"):
            copy.deepcopy(found).train()(image())
        found(image())


class Uncertain(nn.Sequential):
    def forward(self, x):
        return super().forward(x if x.mean() < 1e9 else -x)


def test_a_forward_of_its_own():
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    model.forward = lambda x: model[1](model[0](x)) + 1
    x, found = image(), optimize(model)
    assert torch.equal(found(x), model(x))
    assert any("its forward is not its class's" in note for note in found.report.notes)


def test_an_empty_container_keeps_its_mode():
    model = nn.Sequential(nn.Sequential(), nn.ReLU(), nn.MaxPool2d(2)).train()
    found = optimize(model, training=False)
    assert not found.get_submodule("0").training
    assert model[0].training
    assert found.get_submodule("0") is not model[0]


class WithScale(nn.Module):
    def forward(self, x, scale):
        return T.max_pool2d(T.relu(x * scale), 2)


def test_parts_called_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = WithScale()

        def forward(self, x):
            return self.part(x, scale=x * 0 + 2) if x.mean() < 1e9 else x

    model, x = Named().eval(), image(2, 8, 64, 64)
    found = optimize(model, x)
    assert found.report.rows[0].before_ms > 0
    assert torch.equal(found(x), model(x))


def test_what_has_no_kernel_stays(monkeypatch):
    def refuse(self, *_):
        raise NotImplementedError("no such dtype")

    monkeypatch.setattr(fast.Conv2d, "_conv_forward", refuse)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), image()
    found = optimize(model, x)
    assert "no kernel" in found.report.rows[0].why
    assert torch.equal(found(x), model(x))


def test_draws_of_code_are_no_constants():
    model = Of(lambda m, x: T.max_pool2d(T.relu(x + torch.rand(16)), 2))
    found = assert_same(model, image(), why="random")
    torch.manual_seed(1)
    assert not torch.equal(found(image()), found(image()))


def test_new_parameters_are_seen():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), batch_norm(4), nn.ReLU(), nn.MaxPool2d(2)).eval()
    found, x = optimize(model), image()
    other = nn.Sequential(nn.Conv2d(3, 4, 3), batch_norm(4), nn.ReLU(), nn.MaxPool2d(2)).eval()
    with torch.no_grad():
        found(x)
        found.load_state_dict(other.state_dict())
        torch.testing.assert_close(found(x), other(x))
        found.load_state_dict({name: t + 1 for name, t in other.state_dict().items()}, assign=True)
        other.load_state_dict({name: t + 1 for name, t in other.state_dict().items()})
        torch.testing.assert_close(found(x), other(x))
        getattr(found, "0").weight.mul_(2)
        other[0].weight.mul_(2)
        torch.testing.assert_close(found(x), other(x))
        torch.testing.assert_close(found.double()(x.double()), other.double()(x.double()))


def test_training_trains():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(196, 2))
    plain, found = copy.deepcopy(model), optimize(model)
    losses = {}
    for name, net in (("plain", plain), ("ours", found)):
        torch.manual_seed(4)
        step = torch.optim.SGD(net.parameters(), 0.05)
        for _ in range(4):
            x = image()
            step.zero_grad()
            loss = T.cross_entropy(net(x), torch.tensor([0, 1]))
            loss.backward()
            step.step()
        losses[name] = loss.item()
    assert losses["ours"] == pytest.approx(losses["plain"], rel=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


def test_copies():
    """By copy.deepcopy and pickle, with their own parameters, the model's hooks, and modules under each of their names."""
    relu = nn.PReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), batch_norm(4), relu, nn.MaxPool2d(2), relu).eval()
    hooked(model)
    found, x = optimize(model), image()
    with torch.no_grad():
        expected = found(x)
        for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
            assert list(other.state_dict()) == list(model.state_dict())
            assert torch.equal(other(x), expected)
            assert other.report.rows == found.report.rows
            other.load_state_dict({name: t + 1 for name, t in model.state_dict().items()})
            assert not torch.allclose(other(x), expected)
            assert torch.equal(found(x), expected)


def test_tensors_and_attributes_of_the_model_stay():
    model = Of(lambda m, x: T.max_pool2d(T.relu(x * m.factor + torch.tensor(2.0)), 2), factor=torch.tensor(3.0))
    model.name_of_mine = "a name"
    found = assert_same(model, image(), changed=1)
    assert found.name_of_mine == "a name"


def test_what_was_rewritten_is_rewritten():
    """Its layers are found where they stand now; those of both are the original's."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), batch_norm(4), nn.ReLU(), nn.MaxPool2d(2), nn.Tanh(), nn.AvgPool2d(2)).eval()
    once, x = optimize(model), image()
    again = optimize(once)
    with torch.no_grad():
        torch.testing.assert_close(again(x), model(x))
    plain = copy.deepcopy(model).train()
    torch.testing.assert_close(again.train()(x), plain(x))
    assert not once.training


# Models that cannot be traced as a whole


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = Of(lambda m, x: m.pool(T.relu(m.conv(x))), conv=nn.Conv2d(3, 4, 3), pool=nn.MaxPool2d(2))
        self.stem.scale = 3
        self.tails = nn.ModuleList([nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)), nn.MaxPool2d(2)])

    def forward(self, x):
        x = self.stem(x) * self.stem.scale
        return self.tails[0](x) if x.mean() > 0 else self.tails[1](x)


@pytest.mark.parametrize("training", [False, True])
def test_untraceable(training):
    model = Branching()
    for x in (image(), -image()):
        found = assert_same(model, x, training=training, changed=3, why="cannot be traced")
    assert isinstance(found, Branching)
    assert isinstance(found.stem, Of)
    found = optimize(model.train(training), image())
    assert any(row.before_ms for row in found.report.rows)


# With an example


def test_verified_and_measured():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), batch_norm(8), nn.ReLU(), nn.MaxPool2d(2)).eval()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    for training in (False, True):
        report = optimize(model, image(2, 3, 64, 64), training=training).report
        assert not model.training
        assert report.before_ms > 0
        assert report.error <= 2 * report.torch_error + 1e-5
        assert report.speedup == report.before_ms / report.after_ms
        assert all(row.after_ms and row.before_ms for row in report.rows if row.changed)
    for name, t in model.state_dict().items():
        assert torch.equal(t, state[name])


@pytest.fixture
def taken(monkeypatch):
    """Every form that can be is, whatever its time."""
    monkeypatch.setattr(rewrite, "FASTER", 1e9)
    monkeypatch.setattr(rewrite, "WORSE", 1e9)


class Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gy):
        return 1.001 * gy


def test_wrong_gradients_are_not_returned(monkeypatch, taken):
    model = nn.Sequential(nn.Tanh(), nn.MaxPool2d(2))
    pool = fast.MaxPool2d.forward
    monkeypatch.setattr(fast.MaxPool2d, "forward", lambda self, x: Wrong.apply(pool(self, x)))
    found = optimize(model, image(4, 3, 64, 64))
    assert not found.report.changed
    assert any("gradients differ" in note for note in found.report.notes)


def test_kinks_are_told_from_mistakes(monkeypatch, taken):
    """One number that rounding moved over ReLU's corner has another gradient, and rightly so."""
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(1, 1, 1, bias=False))
    x = image(1, 1, 256, 256)
    x[..., ::2, ::2] = -1e-9  # the largest of its window in a sea of -1
    x[..., 1::2, :] = x[..., :, 1::2] = -1
    x[..., :8] = 1
    plain = fast.MaxPool2d.forward
    monkeypatch.setattr(fast.MaxPool2d, "forward", lambda self, x: plain(self, x if x.dtype is torch.float64 else x + 2e-9))
    report = optimize(model, x).report
    assert any("kink" in note for note in report.notes), report
