"""Convolution modules: torch.nn's own in everything but forward; the packed weights they keep; ``convert``; training."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import fastpool
import fastpool.functional as F
import fastpool.nn as fast
from fastpool import convolution

RANKS = (1, 2, 3)


@pytest.fixture(autouse=True)
def few_kernels(small):
    small("model", 1 << 20)


def of(rank, channels=4):
    return torch.randint(-4, 5, (2, channels, 5, 6, 7)[: 2 + rank]).float()


def exact(module):
    """Small integers for parameters: results are equal, whoever computes them."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randint(-4, 5, p.shape))
    return module


def pair(rank, *args, **more):
    """Our module and torch's, of equal parameters."""
    ours = exact(getattr(fast, f"Conv{rank}d")(*args, **more))
    theirs = getattr(nn, f"Conv{rank}d")(*args, **more)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


FORMS = {
    "plain": ((4, 6, 3), {}),
    "no-bias": ((4, 6, 3), {"bias": False, "stride": 2, "padding": 1}),
    "groups": ((4, 6, 2), {"groups": 2, "dilation": 2}),
    "same": ((4, 3, 3), {"padding": "same"}),
    "float64": ((4, 6, 3), {"dtype": torch.float64}),
}


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("form", FORMS)
def test_a_module_is_torchs_own_in_all_but_forward(form, rank):
    args, more = FORMS[form]
    ours, theirs = pair(rank, *args, **more)
    assert isinstance(ours, getattr(nn, f"Conv{rank}d"))
    assert repr(ours) == repr(theirs)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(exact(theirs).state_dict())
    x = of(rank).to(ours.weight.dtype)
    for given in (x, x[0]):
        assert torch.equal(ours(given), theirs(given))
        with torch.no_grad():
            assert torch.equal(ours(given), theirs(given))


def test_the_signature_is_torchs_and_after():
    ours, theirs = (list(inspect.signature(c.__init__).parameters) for c in (fast.Conv2d, nn.Conv2d))
    assert ours == ["self", "args", "after", "more"]
    assert "after" not in theirs
    assert repr(fast.Conv2d(3, 4, 5, 2, 1, after="relu")) == "Conv2d(3, 4, kernel_size=(5, 5), stride=(2, 2), padding=(1, 1), after='relu')"
    assert repr(fast.Conv1d(3, 4, 5, after=nn.ReLU6())) == "Conv1d(\n  3, 4, kernel_size=(5,), stride=(1,)\n  (after): ReLU6()\n)"
    with pytest.raises(ValueError, match=r"^Conv2d: an activation must be one of "):
        fast.Conv2d(3, 4, 5, after="swish")


def test_parameters_start_as_torchs():
    """The same draws from the generator."""
    torch.manual_seed(7)
    ours = fast.Conv2d(3, 4, 5)
    torch.manual_seed(7)
    theirs = nn.Conv2d(3, 4, 5)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


@pytest.mark.parametrize("after", ["relu", "relu6", "leaky_relu", nn.ReLU(), nn.LeakyReLU(0.5)], ids=str)
def test_an_activation_after(after):
    module = exact(fast.Conv2d(4, 6, 3, after=after))
    x = of(2)
    expected = F.conv2d(x, module.weight, module.bias, after=after)
    assert torch.equal(module(x), expected)
    with torch.no_grad():
        assert torch.equal(module(x), expected)
    assert list(module.state_dict()) == ["weight", "bias"]
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), expected)


def test_an_activation_given_later():
    """To a converted module too."""
    module = exact(nn.Conv2d(4, 6, 3))
    fastpool.convert(module, conv=True)
    for after in ("relu6", None, nn.ReLU()):
        module.after, x = after, of(2)
        assert torch.equal(module(x).relu(), module(x)) == (after is not None)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("rank", RANKS)
def test_padding_modes(mode, rank):
    for padding in (1, (2, 1, 0)[:rank], "same"):
        ours, theirs = pair(rank, 4, 6, 3, padding=padding, padding_mode=mode)
        assert repr(ours) == repr(theirs)
        x = of(rank)
        a, b = (x.clone().requires_grad_() for _ in range(2))
        y, z = ours(a), theirs(b)
        assert torch.equal(y, z)
        y.sum().backward()
        z.sum().backward()
        assert torch.equal(a.grad, b.grad)
        assert torch.equal(ours.weight.grad, theirs.weight.grad)


# Packed weights


@pytest.fixture
def packings(monkeypatch):
    """A list that grows with each packing of weights."""
    found, plain = [], convolution.packed
    monkeypatch.setattr(convolution, "packed", lambda *a: found.append(tuple(a[1].shape)) or plain(*a))
    return found


@pytest.fixture
def module():
    return exact(fast.Conv2d(4, 6, 3)).eval()


def follows(module, x=None):
    """Without a gradient the module gives what torch makes of its parameters now."""
    x = of(2).to(module.weight.dtype) if x is None else x
    with torch.no_grad():
        assert torch.equal(module(x), nn.functional.conv2d(x, module.weight, module.bias))


def test_weights_are_packed_once(module, packings):
    for _ in range(3):
        follows(module)
    assert packings == [(6, 4, 3, 3)]
    with torch.no_grad():
        F.conv2d(of(2), module.weight)
        F.conv2d(of(2), module.weight)
    assert len(packings) == 3


def test_of_several_forms_each_is_packed_once(module, packings):
    """Narrow and wide maps have other tiles; maps of another height alone have not."""
    shapes = [(1, 4, 5, 9), (2, 4, 8, 9), (1, 4, 5, 3), (1, 4, 5, 9), (1, 4, 5, 3)]
    with torch.no_grad():
        for shape in shapes:
            x = torch.randint(-4, 5, shape).float()
            for given in (x, x.contiguous(memory_format=torch.channels_last)):
                follows(module, given)
    assert 1 <= len(packings) <= 2
    assert len(module._kept._found) == len(packings)


def test_no_more_forms_are_kept_than_four(monkeypatch, packings):
    """Of more, the oldest goes."""
    kept, weight = convolution.Kept(), torch.randn(4, 2, 1, 1)

    class Plan:
        packed, parallel, pack = 8, False, staticmethod(lambda *a: None)

    for form in (0, 1, 2, 3, 4, 4, 0):
        plan = Plan()
        plan.form = form
        kept.get(plan, weight, None)
    assert list(kept._found) == [2, 3, 4, 0]
    assert len(packings) == 6


def changed_in_place(m):
    with torch.no_grad():
        m.weight.add_(1)


def changed_at_one_place(m):
    with torch.no_grad():
        m.weight[3, 1, 2, 0] = 9


def bias_changed(m):
    with torch.no_grad():
        m.bias.mul_(2)


def step(m):
    m(of(2)).sum().backward()
    torch.optim.SGD(m.parameters(), 1.0).step()


def a_number_unseen(m):
    m.weight.data.view(-1)[1] = 9
    m.repack()


def replaced(m):
    m.weight = nn.Parameter(m.weight.detach() + 1)


def bias_gone(m):
    m.bias = None


CHANGES = {
    "in-place": changed_in_place,
    "one-place": changed_at_one_place,
    "bias": bias_changed,
    "no-bias": bias_gone,
    "optimiser": step,
    "load_state_dict": lambda m: m.load_state_dict({"weight": m.weight.detach() + 2, "bias": m.bias.detach() - 1}),
    "load_state_dict-assign": lambda m: m.load_state_dict({"weight": m.weight.detach() + 2, "bias": m.bias.detach() - 1}, assign=True),
    "data-copy": lambda m: m.weight.data.copy_(m.weight.data.flip(0) + 1),
    "data": lambda m: setattr(m.weight, "data", m.weight.data * 2),
    "data-one-number-and-repack": a_number_unseen,
    "bias-data": lambda m: m.bias.data.add_(1),
    "parameter": replaced,
    "float64": lambda m: m.to(torch.float64),
    "float64-and-back": lambda m: m.double().float(),
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "init": lambda m: nn.init.constant_(m.weight, 3.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_are_noticed(change, module):
    for _ in range(2):
        follows(module)
        change(module)
        follows(module)
        if module.bias is None:
            break


def test_changed_weights_are_packed_once_more(module, packings):
    for expected in (1, 2):
        changed_in_place(module)
        follows(module)
        follows(module)
        assert len(packings) == expected


def test_under_grad_weights_are_packed_at_each_call(module, packings):
    """They are changed before the next, as a rule; and then are right again without one."""
    follows(module)
    step(module)
    follows(module)
    x = of(2)
    assert torch.equal(module(x), nn.functional.conv2d(x, module.weight, module.bias))


def test_in_inference_mode(module):
    x = of(2)
    expected = nn.functional.conv2d(x, module.weight, module.bias).detach()
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(module(x), expected)
        made = exact(fast.Conv2d(4, 6, 3))
        for _ in range(2):
            assert torch.equal(made(x), nn.functional.conv2d(x, made.weight, made.bias))
            made.weight.add_(1)  # parameters made here have no version
    follows(module)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))], ids=("deepcopy", "copy", "pickle"))
def test_copies(copied, module):
    follows(module)
    other = copied(module)
    assert type(other) is fast.Conv2d
    assert repr(other) == repr(module)
    follows(other)
    if copied is not copy.copy:
        before = module.weight.clone()
        changed_in_place(other)
        follows(other)
        assert torch.equal(module.weight, before)
    follows(module)


def test_a_copy_holds_no_packed_weights(module):
    size = len(pickle.dumps(module))
    follows(module)
    assert len(pickle.dumps(module)) <= size + 200
    assert module._kept._found
    assert not copy.deepcopy(module)._kept._found


def test_packed_weights_are_no_state(module):
    follows(module)
    assert list(module.state_dict()) == ["weight", "bias"]
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]
    assert list(module.buffers()) == []


def test_parametrized_weights():
    """A weight that is another tensor at each call."""
    ours, theirs = pair(2, 4, 6, 3)
    for m in (ours, theirs):
        nn.utils.parametrizations.weight_norm(m)
    x = of(2)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(ours(x), theirs(x))
            for m in (ours, theirs):
                m.parametrizations.weight.original0.mul_(1.5)


# convert


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.MaxPool2d(2))
        self.line, self.deep = nn.Conv1d(6, 6, 3), nn.Conv3d(1, 2, 2)
        self.up = nn.ConvTranspose2d(6, 4, 2)

    def forward(self, x):
        return self.up(self.stem(x)), self.line(x.flatten(2)[:, :1].expand(-1, 6, -1)), self.deep(x[:, None])


def test_convert_swaps_convolutions_where_asked():
    net, x = exact(Net()), of(2)
    before = net(x)
    done = fastpool.convert(net)
    assert list(done.swapped) == ["stem.2"]
    assert type(net.stem[0]) is nn.Conv2d
    keys, weight = list(net.state_dict()), net.stem[0].weight
    text = repr(net.stem[0])
    done = fastpool.convert(net, conv=True)
    assert list(done.swapped) == ["stem.0", "line", "deep"]
    assert done.swapped["stem.0"] == text
    assert [type(m) for m in (net.stem[0], net.line, net.deep)] == [fast.Conv2d, fast.Conv1d, fast.Conv3d]
    assert list(net.state_dict()) == keys
    assert net.stem[0].weight is weight
    for _ in range(2):
        for ours, theirs in zip(net(x), before, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        net.eval()
    assert fastpool.convert(net, conv=True).swapped == {}
    other = pickle.loads(pickle.dumps(copy.deepcopy(net)))
    assert torch.equal(other(x)[0], before[0])


def test_derived_convolutions_are_kept_and_reported():
    class Louder(nn.Conv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    net = nn.Sequential(Louder(4, 6, 3), nn.LazyConv2d(3, 2))
    done = fastpool.convert(net, conv=True)
    assert done.swapped == {}
    assert done.kept["0"] == "Louder is derived from Conv2d, and may have changed it"
    assert fastpool.convert(nn.Sequential(Louder(4, 6, 3))).kept == {}


# Training


def lenet():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def losses(model, steps=20):
    draw = torch.Generator().manual_seed(5)
    x, labels = torch.randn(64, 1, 28, 28, generator=draw), torch.randint(10, (64,), generator=draw)
    optimiser, found = torch.optim.Adam(model.parameters(), 1e-3), []
    for at in range(steps):
        batch = slice(at % 4 * 16, at % 4 * 16 + 16)
        loss = nn.functional.cross_entropy(model(x[batch]), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    return torch.tensor(found)


def test_training_lenet5_follows_torch():
    ours = lenet()
    fastpool.convert(ours, conv=True)
    found, expected = losses(ours), losses(lenet())
    assert expected[-4:].mean() < expected[:4].mean() - 0.01
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=0)


def test_a_remembered_call_follows_what_is_changed():
    """The second call alike is remembered; anything that is another than it was is seen."""
    module, x = fastpool.nn.Conv2d(4, 6, 3), torch.randn(2, 4, 9, 9)
    plain = nn.Conv2d(4, 6, 3)
    plain.load_state_dict(module.state_dict())

    def same(x):
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(module(x), plain(x))

    same(x)
    same(x[:1])
    same(x.to(memory_format=torch.channels_last))
    same(x.transpose(2, 3))
    same(x.flip(3))
    for both in (module, plain):
        both.padding, both.stride = (1, 1), (2, 2)
    same(x)
    with torch.no_grad():
        for both in (module, plain):
            both.weight.mul_(2)
    same(x)
    for both in (module, plain):
        both.bias.data.fill_(3.0)
    same(x)
    plain.bias, module.bias = None, None
    same(x)
    x = x.double()
    module, plain = module.double(), plain.double()
    same(x)
    assert module(x).requires_grad
    slope = nn.LeakyReLU(0.5)
    module.after = slope
    first = module(x[:1])
    slope.negative_slope = 0.25
    with torch.no_grad():
        assert not torch.equal(module(x[:1]), first)
        torch.testing.assert_close(module(x[:1]), nn.functional.leaky_relu(plain(x[:1]), 0.25))
