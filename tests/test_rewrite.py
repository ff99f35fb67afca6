"""``fastpool.optimize``: the same results, the report, and every condition under which a site is left alone."""

import copy
import json

import pytest
import torch
import torch.nn.functional as T
from click.testing import CliRunner
from fastpool.bench import models
from fastpool.kernels.cpu import conv_pool
from test_rewrite_conditions import Of, batch_norm
from torch import nn

import fastpool
import fastpool.functional as F
import fastpool.nn as fast
from fastpool import convolution, rewrite, sites, tracing
from fastpool.optimizing import optimize as command


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Every form that can be is taken: what is quicker is for benchmarks to say."""
    monkeypatch.setattr(rewrite, "SECONDS", 0)
    monkeypatch.setattr(rewrite, "FASTER", 1e9)
    monkeypatch.setattr(rewrite, "WORSE", 1e9)


def map_of(*shape):
    return torch.randn(shape or (2, 4, 12, 12))


def results(model, x):
    leaf = x.clone().requires_grad_()
    y = model(leaf.clone())
    weights = list(model.parameters())
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *weights], allow_unused=True)]


def same(model, rewritten, x):
    for a, b in zip(results(model, x), results(rewritten, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(model(x.clone()), rewritten(x.clone()), rtol=1e-4, atol=1e-4)


def stands(model):
    return [row.stands for row in model.report.rows if row.changed]


def whys(model):
    return " ".join(row.why for row in model.report.rows)


def test_act_and_pool():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)).train(), map_of(2, 3, 12, 12)
    found = fastpool.optimize(model)
    assert stands(found) == ["fastpool MaxPool2d(before=ReLU)"]
    assert found.report.rows[-1].law == "exact"
    assert isinstance(found, torch.fx.GraphModule)
    same(model, found, x)


def test_a_folded_batch_norm():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), batch_norm(4), nn.GELU(), nn.AvgPool2d(2), nn.Tanh()).eval(), map_of(2, 3, 12, 12)
    found = fastpool.optimize(model)
    assert stands(found) == ["Conv2d + BatchNorm2d, fastpool AvgPool2d(before=GELU, after=Tanh)"]
    same(model, found, x)
    with torch.no_grad():  # what was folded is folded anew
        model[0].weight.mul_(2), model[1].running_mean.add_(1)
    same(model, found, x)
    model.train(), found.train()
    torch.testing.assert_close(model(x), found(x))


@pytest.mark.parametrize(
    ("pool", "whole"),
    [
        *((nn.MaxPool2d(3, 2, 1), True), (nn.AvgPool2d(2), True), (fast.MinPool2d(2), False), (nn.MaxPool2d(2, dilation=2), False)),
        *((nn.MaxPool2d(4, ceil_mode=True), False), (nn.AvgPool2d(4, ceil_mode=True), False)),
        *((nn.AvgPool2d(3, 2, 1, count_include_pad=False), False), (nn.AvgPool2d(2, divisor_override=3), False)),
    ],
)
def test_every_form(monkeypatch, pool, whole):
    monkeypatch.setattr(conv_pool, "LEAST", 0)
    convolution.call.cache_clear()
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), batch_norm(4), nn.ReLU(), pool).eval(), map_of(2, 3, 12, 12)
    parts = next(tracing.chains(tracing.trace_of(model).graph, dict(model.named_modules()))).parts
    name = type(pool).__name__
    shown = [f"{ours}Conv2d + BatchNorm2d, fastpool {name}(before=ReLU)" for ours in ("", "fastpool ")]
    shown += [f"fastpool Conv2d + BatchNorm2d + ReLU{by}" for by in (f", fastpool {name}", *([f" + {name}"] if whole else []))]
    found = sites.forms(parts, True)
    assert [sites.described(parts, form) for form in found] == shown
    for form in found:
        chain = sites.Site(parts, form)
        for _ in range(2):  # packed weights are kept
            with torch.no_grad():
                torch.testing.assert_close(chain(x), model(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(chain(x), model(x), rtol=1e-5, atol=1e-5)


def test_padding_that_reflects_is_not_in_one_launch():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.MaxPool2d(2))
    parts = next(tracing.chains(tracing.trace_of(model).graph, dict(model.named_modules()))).parts
    assert not any(form.whole for form in sites.forms(parts, True))
    for form in sites.forms(parts, True):
        x = map_of(2, 3, 12, 12)
        torch.testing.assert_close(sites.Site(parts, form)(x), model(x), rtol=1e-5, atol=1e-5)


FORWARDS = {
    "functions": (lambda m, x: relu_max(x), "fastpool max_pool2d(before=relu)"),
    "methods": (lambda m, x: T.avg_pool2d(x.tanh(), 2), "fastpool avg_pool2d(before=tanh)"),
    "arguments": (lambda m, x: T.max_pool2d(T.leaky_relu(x, negative_slope=0.3), kernel_size=2), "fastpool max_pool2d(before=leaky_relu)"),
    "gelu": (lambda m, x: T.max_pool2d(T.gelu(x, approximate="tanh"), 2), "fastpool max_pool2d(before=gelu)"),
    "hardtanh": (lambda m, x: T.max_pool2d(T.hardtanh(x, -0.2, 0.3), 2), "fastpool max_pool2d(before=hardtanh)"),
    "after": (lambda m, x: T.silu(T.adaptive_max_pool2d(x, 3)), "fastpool adaptive_max_pool2d(after=silu)"),
    "fastpool's": (lambda m, x: F.l2_pool2d(torch.sigmoid(x), 2), "fastpool l2_pool2d(before=sigmoid)"),
}


def relu_max(x):
    return T.max_pool2d(torch.relu(x), 3, 2, 1)


@pytest.mark.parametrize("name", FORWARDS)
def test_calls(name):
    forward, expected = FORWARDS[name]
    model, x = Of(forward), map_of()
    found = fastpool.optimize(model)
    assert stands(found) == [expected]
    same(model, found, x)


def test_modules_of_both():
    model = nn.Sequential(fast.MinPool2d(2), nn.ReLU(), fast.MaxPool2d(2, before="tanh"), nn.Sigmoid(), fast.GeMPool2d(2))
    found = fastpool.optimize(model)
    same(model, found, map_of(2, 4, 16, 16))
    assert "fastpool MinPool2d(after=ReLU)" in stands(found)


# Left alone


def relu_then_pool(m, x):
    y = m.act(x)
    return m.pool(y) + y.mean()


def overwritten(m, x):
    y = x * 2
    z = m.pool(m.act(y))
    return z + y.mean()


def a_view(m, x):
    y = x * 2
    return m.pool(m.act(y.view(2, 4, 12, 12))) + y.mean()


ALONE = {
    "another reader": (relu_then_pool, nn.ReLU(), nn.MaxPool2d(2), "read elsewhere too"),
    "overwritten": (overwritten, nn.ReLU(inplace=True), nn.MaxPool2d(2), "overwrites what others may read"),
    "a view": (a_view, nn.ReLU(inplace=True), nn.MaxPool2d(2), "overwrites what others may read"),
    "draws": (lambda m, x: m.pool(m.act(x)), nn.Dropout(0.5), nn.MaxPool2d(2), "draws in training"),
    "random slopes": (lambda m, x: m.pool(m.act(x)), nn.RReLU(), nn.MaxPool2d(2), "draws in training"),
    "the batch's statistics": (lambda m, x: m.pool(m.act(x)), nn.BatchNorm2d(4), nn.MaxPool2d(2), "statistics of the batch"),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_cannot_be_joined(name):
    forward, act, pool, why = ALONE[name]
    model = Of(forward, act=act, pool=pool).train()
    found = fastpool.optimize(model)
    assert stands(found) == ["fastpool MaxPool2d"]
    assert why in whys(found)
    x = map_of()
    torch.manual_seed(1)
    expected = copy.deepcopy(model)(x.clone())
    torch.manual_seed(1)
    torch.testing.assert_close(found(x.clone()), expected)


def test_indices():
    model = Of(lambda m, x: m.pool(m.act(x))[1].float(), act=nn.ReLU(), pool=nn.MaxPool2d(2, return_indices=True))
    found = fastpool.optimize(model)
    assert not stands(found)
    assert "returns indices" in whys(found)
    x = -map_of().abs()
    assert torch.equal(found(x), model(x))


@pytest.mark.parametrize("where", ["act", "pool"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_are_called(where, kind):
    seen = []
    model = nn.Sequential()
    model.act, model.pool = nn.ReLU(), nn.MaxPool2d(2)
    getattr(getattr(model, where), kind)(lambda *_: seen.append(1))
    found = fastpool.optimize(model)
    found(map_of().requires_grad_()).sum().backward()
    assert seen == [1]
    assert "before" not in " ".join(stands(found))


def test_a_parametrization():
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
    model = nn.Sequential(conv, batch_norm(4), nn.ReLU(), nn.MaxPool2d(2)).eval()
    found = fastpool.optimize(model)
    with torch.no_grad():
        torch.testing.assert_close(found(map_of() * 0 + 1), model(map_of() * 0 + 1))
    assert "ParametrizedConv2d has a parametrization" in whys(found)


def test_a_shared_module_keeps_its_own_uses():
    """The same ReLU before a pooling and elsewhere, the same convolution twice."""
    model = Of(lambda m, x: m.pool(m.act(m.conv(m.act(m.conv(x))))), conv=nn.Conv2d(4, 4, 3), act=nn.ReLU(), pool=nn.MaxPool2d(2)).eval()
    found = fastpool.optimize(model)
    assert stands(found) == ["Conv2d, fastpool MaxPool2d(before=ReLU)"]
    same(model, found, map_of())


def test_padding_that_fills_a_window():
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2, 1, 1, 3))
    x = map_of(1, 2, 2, 2)
    assert torch.equal(fastpool.optimize(model)(x), model(x))
    assert model(x).isinf().any()


def test_a_prelu_of_slopes_below_0():
    model = nn.Sequential(nn.PReLU(4), nn.MaxPool2d(2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.2, -0.5, 0.0, 1.0]))
    same(model, fastpool.optimize(model), map_of())


def test_an_odd_norm_stays_torchs():
    model, x = nn.Sequential(nn.Tanh(), nn.LPPool2d(3, 2)), map_of().abs()
    found = fastpool.optimize(model)
    assert not stands(found)
    torch.testing.assert_close(found(x), model(x))


# The whole


def test_the_model_is_not_changed():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), batch_norm(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(100, 3)).eval()
    before, x = repr(model), map_of(2, 3, 12, 12)
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    found = fastpool.optimize(model, x, training=True)
    assert repr(model) == before
    assert not model.training
    assert all(torch.equal(kept[name], t) for name, t in model.state_dict().items())
    assert found.state_dict().keys() == model.state_dict().keys()
    assert all(a is b for a, b in zip(model.parameters(), found.parameters(), strict=True))
    other = fastpool.optimize(copy.deepcopy(model))
    other.load_state_dict({name: t + 1 for name, t in model.state_dict().items()})
    again = copy.deepcopy(model)
    again.load_state_dict({name: t + 1 for name, t in model.state_dict().items()})
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(x), again.eval()(x))


def test_copies():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), batch_norm(4), nn.ReLU(), nn.MaxPool2d(2)).eval(), map_of(2, 3, 12, 12)
    other = copy.deepcopy(fastpool.optimize(model))
    with torch.no_grad():
        expected = model(x)
        model[0].weight.zero_()
        torch.testing.assert_close(other(x), expected)


class Branching(nn.Module):
    """Cannot be traced."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        x = self.body(x)
        return self.pool(x) if x.sum() > 0 else -self.pool(x)


@pytest.mark.parametrize("example", [None, map_of()])
def test_a_model_that_cannot_be_traced(example):
    model = Branching().eval()
    found = fastpool.optimize(model, example)
    same(model, found, map_of())
    assert any("cannot be traced as a whole" in note for note in found.report.notes)
    assert [row.place for row in found.report.rows if row.changed] == ["body.2", "pool"]
    assert found.state_dict().keys() == model.state_dict().keys()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = (
            nn.Conv2d(4, 4, 3, padding=1),
            batch_norm(4),
            nn.Conv2d(4, 4, 3, padding=1),
            batch_norm(4),
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


@pytest.mark.parametrize("training", [False, True])
def test_a_residual_block(training):
    model, x = nn.Sequential(Residual(), nn.MaxPool2d(2), Residual(), nn.AdaptiveAvgPool2d(1)).train(training), map_of()
    found = fastpool.optimize(copy.deepcopy(model), x)
    same(copy.deepcopy(model), found, x)
    assert found.report.error <= 2 * found.report.torch_error + 1e-5
    assert "fastpool MaxPool2d(before=ReLU)" in " ".join(stands(found))


PARAMETERS = {"lenet5": 44_426, "alexnet": 62_378_344, "vgg16": 138_357_544, "simple_resnet": 2_777_674, "cifar10net": 4_507_722}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_lessons_networks_are_of_the_lessons_size(name):
    with torch.device("meta"):
        assert sum(p.numel() for p in getattr(models, name)().parameters()) == PARAMETERS[name]


SITES = {"conv_block": 1, "conv_block_without_norm": 1}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [name for name in models.INPUTS if name not in ("alexnet", "vgg16")])
def test_the_lessons_networks(name, training):
    """Results and gradients, which ``optimize`` holds against float64 as it goes."""
    torch.manual_seed(2)
    model, x = getattr(models, name)().train(training), torch.randn(2, *models.INPUTS[name])
    found = fastpool.optimize(model, x)
    assert len(stands(found)) >= SITES.get(name, 2)
    assert found.report.notes == []
    torch.manual_seed(1)
    expected = copy.deepcopy(model)(x)
    torch.manual_seed(1)
    torch.testing.assert_close(found(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "divisor", "size", "poolings"), [("alexnet", 8, 67, 3), ("vgg16", 16, 32, 5)])
def test_narrow_ones_of_small_images(monkeypatch, name, divisor, size, poolings, training):
    """The best guess at each site, which moves no number over a kink; convolutions of every form are others' to test."""
    monkeypatch.setattr(rewrite, "forms", lambda parts, measured: sites.forms(parts, False))
    torch.manual_seed(2)
    model, x = getattr(models, name)(divisor, 1).train(training), torch.randn(2, 3, size, size)
    found = fastpool.optimize(model, x)
    assert [row.stands.split("(")[0] for row in found.report.changed] == ["Conv2d, fastpool MaxPool2d"] * poolings
    assert found.report.notes == []
    gradients = []
    for net in (copy.deepcopy(model), found):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        y = net(leaf)
        gradients.append([y.detach(), *torch.autograd.grad(y.square().mean(), [leaf, *net.parameters()])])
    assert len(gradients[0]) == 2 + len(list(model.parameters()))
    for ours, theirs in zip(*reversed(gradients), strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_never_worse(monkeypatch):
    model, x = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), map_of()
    monkeypatch.setattr(rewrite, "FASTER", 0.0)
    found = fastpool.optimize(model, x)
    assert not stands(found)
    assert "is not quicker" in whys(found)
    assert found.report.rows[0].after_ms > 0
    monkeypatch.setattr(rewrite, "FASTER", 1e9)
    monkeypatch.setattr(rewrite, "WORSE", 1.0)
    monkeypatch.setattr(rewrite, "medians", lambda calls, seconds: dict(zip(calls, (1.0, 2.0), strict=True)))
    found = fastpool.optimize(model, x)
    assert not stands(found)
    assert "as a whole it is not quicker" in " ".join(found.report.notes)
    assert torch.equal(found(x), model(x))


def test_wrong_results_are_not_returned(monkeypatch):
    plain = fast.MaxPool2d.forward
    monkeypatch.setattr(fast.MaxPool2d, "forward", lambda self, x: plain(self, x) + 1e-3)
    model, x = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), map_of()
    found = fastpool.optimize(model, x)
    assert "outputs differ from float64 by 0.001" in " ".join(found.report.notes)
    assert torch.equal(found(x), model(x))


def test_the_report():
    found = fastpool.optimize(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), map_of())
    text = str(found.report)
    assert "1 of 1 sites rewritten, for training." in text
    assert max(map(len, text.splitlines())) <= 110
    (row,) = json.loads(found.report.to_json())["rows"]
    assert row["bytes_saved"] == 2 * 4 * 2 * 4 * 12 * 12
    assert row["before_ms"] > 0


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"^optimize: model must be a torch\.nn\.Module, got str"):
        fastpool.optimize("model")


# As a user types it


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("place", ["net.py:build", "net:build"])
@pytest.mark.parametrize("more", [[], ["--training"], ["--channels-last", "--threads", "1"]])
def test_the_command(folder, place, more):
    ended = CliRunner().invoke(command, [place, "--input", "2x3x16x16", "--json", "report.json", *more])
    assert ended.exit_code == 0, ended.output
    assert "Conv2d, ReLU, MaxPool2d" in " ".join(ended.output.split())
    assert f"for {'training' if '--training' in more else 'evaluation'}" in ended.output
    assert json.loads((folder / "report.json").read_text())["rows"]


def test_frozen_layers_of_a_users_model_stay_frozen(folder):
    (folder / "frozen.py").write_text(
        "from torch import nn\n\ndef build():\n"
        "    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))\n"
        "    model[1].eval()\n    return model\n"
    )
    ended = CliRunner().invoke(command, ["frozen.py:build", "--input", "2x3x16x16", "--training"])
    assert ended.exit_code == 0, ended.output
    assert "statistics of the batch" not in " ".join(ended.output.split())
    ended = CliRunner().invoke(command, ["net.py:build", "--input", "2x3x16x16", "--training"])
    assert "for training" in ended.output


def test_a_module_of_a_package(folder):
    (folder / "nets").mkdir()
    (folder / "nets" / "__init__.py").touch()
    (folder / "nets" / "parts.py").write_text("from torch import nn\n\ndef pool():\n    return nn.MaxPool2d(2)\n")
    (folder / "nets" / "net.py").write_text(
        "from torch import nn\nfrom .parts import pool\n\ndef build():\n    return nn.Sequential(nn.ReLU(), pool())\n"
    )
    ended = CliRunner().invoke(command, ["nets.net:build", "--input", "2x3x16x16"])
    assert ended.exit_code == 0, ended.output
    assert "ReLU, MaxPool2d" in ended.output
    ended = CliRunner().invoke(command, ["nets.net:none", "--input", "2x3x16x16"])
    assert "net.py has no none; it has build" in ended.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["net.py:build"], "Missing option '--input'"),
        (["none.py:build", "--input", "1x3x8x8"], "there is no file none.py, nor a module of that name"),
        (["net:missing", "--input", "1x3x8x8"], "net.py has no missing; it has build"),
        (["net:build", "--input", "1x5x8x8"], "running the model failed: RuntimeError"),
    ],
)
def test_errors_of_the_command(folder, arguments, words):
    ended = CliRunner().invoke(command, arguments)
    assert ended.exit_code != 0
    assert words in " ".join(ended.output.split())
    assert "Traceback" not in ended.output
