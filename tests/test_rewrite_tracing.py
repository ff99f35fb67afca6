"""``fastpool.optimize`` on code that a trace of torch.fx would change without a word: what it does, it does afterwards."""

import copy
import pickle
import random
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as T
import torch.utils.checkpoint
from test_rewrite_conditions import Of, batch_norm, image
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fastpool.nn as fast
from fastpool import optimize, rewrite, sites, verdict
from fastpool.report import Report


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Every form that can be is taken: what is quicker is for benchmarks to say."""
    monkeypatch.setattr(rewrite, "SECONDS", 0)
    monkeypatch.setattr(rewrite, "FASTER", 1e9)
    monkeypatch.setattr(rewrite, "WORSE", 1e9)


def pooled(x):
    return T.max_pool2d(torch.relu(x), 2)


def seeded():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def called(model, *args, **named):
    """Outputs, and in training the gradients of parameters and of the first input, as far as there are."""
    seeded()
    first, *others = args
    first = first.clone().requires_grad_(model.training)
    with torch.set_grad_enabled(model.training):
        y = model(first, *others, **named)
    if not y.requires_grad:
        return [y]
    given = [first, *(p for p in model.parameters() if p.requires_grad)]
    return [y, *torch.autograd.grad((y * torch.arange(y.numel()).reshape(y.shape).cos()).sum(), given, allow_unused=True)]


def assert_alike(found, model, *args, **named):
    ours, theirs = called(found, *args, **named), called(model, *args, **named)
    assert [(t is None) or (t.dtype, t.requires_grad) for t in ours] == [(t is None) or (t.dtype, t.requires_grad) for t in theirs]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def held(model):
    """All that a model is, tensors and attributes."""
    attributes = {
        (path, name): repr(value)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (int, float, list, dict, set, tuple)) and not name.startswith("_")
    }
    return {name: t.clone() for name, t in model.state_dict().items()}, attributes


def assert_does_the_same(model, example, *, training=False, said="", **named):
    """As it is, again, with other numbers, in float64 and in the other mode; the model has not changed meanwhile."""
    model.train(training)
    plain, then = copy.deepcopy(model), held(model)
    found = optimize(model, example)
    state, attributes = held(model)
    assert attributes == then[1]
    assert all(torch.equal(t, then[0][name]) for name, t in state.items())
    for _ in range(2):
        assert_alike(found, plain, image(), **named)
    numbers = {name: t * 1.5 + 1 for name, t in plain.state_dict().items()}
    for net in (found, plain):
        net.load_state_dict(numbers)
    assert_alike(found, plain, image(), **named)
    for name, t in plain.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], t)
    found.double(), plain.double()
    assert_alike(found, plain, image().double(), **named)
    found.train(not training), plain.train(not training)
    assert_alike(found, plain, image().double(), **named)
    if said:
        assert any(said in note for note in found.report.notes), found.report.notes
    assert found.report.changed, found.report
    return found


class With(Of):
    """``Of``, with tensors as buffers."""

    def __init__(self, function, **children):
        tensors = {name: child for name, child in children.items() if isinstance(child, torch.Tensor)}
        super().__init__(function, **{name: child for name, child in children.items() if name not in tensors})
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


class Flagged(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)

    def forward(self, x, flag=None, *more, loud=False, how="sum", **others):
        if flag is None:
            x = x * 2
        if loud is True or how == "mean" or more or others.get("loud") is not None:
            x = x - 1
        return self.pool(torch.relu(self.conv(x)))


def by_type(m, x):
    return pooled(x * 2 if isinstance(x, torch.Tensor) else x)


def by_match(m, x):
    match x:
        case torch.Tensor():
            return pooled(m.pool(x))
    return x


def by_attribute(m, x):
    return pooled(m.pool(x.tensors if hasattr(x, "tensors") else x))


def by_try(m, x):
    try:
        x = x * 3 if x.sum() == x.sum() else x
    except Exception:
        x = x * 5
    return m.pool(torch.relu(x))


def by_gradients(m, x):
    return m.pool(torch.relu(x)) * (2 if torch.is_grad_enabled() else 3)


def frozen(m, x):
    with torch.no_grad():
        x = m.conv(x)
    return m.head(x)


def cast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        x = m.head(m.conv(x))
        return m.head(m.last(x))


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gy):
        return 3 * gy


def checkpointed(m, x):
    return torch.utils.checkpoint.checkpoint(lambda x: m.head(m.conv(x)), x, use_reentrant=False)


def counted(m, x):
    m.steps += 1
    return m.head(m.conv(x)) * m.steps


def counted_anew(m, x):
    m.steps = m.steps + 1
    return m.head(m.conv(x)) * m.steps


def remembered(m, x):
    y = m.head(m.conv(x))
    m.seen.append(float(len(m.seen)))
    return y * len(m.seen)


def kept_for_later(m, x):
    m.__dict__["last"] = m.conv(x)
    return m.head(m.last)


def head():
    return nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))


def conv():
    return nn.Conv2d(3, 4, 3)


def statistics():
    return {"mean": torch.rand(3), "std": torch.rand(3) + 1}


def normal(m, x):
    return m.head((x - m.mean[None, :, None, None]) / m.std[None, :, None, None])


PARTS, WHOLE = "cannot be traced as a whole", ""

CODE = {
    "arguments by default": (Flagged, WHOLE),
    "isinstance": (lambda: Of(by_type, head=head()), "goes by the type"),
    "torch.is_tensor": (lambda: Of(lambda m, x: m.pool(x * 2 if torch.is_tensor(x) else x), pool=nn.MaxPool2d(2)), "goes by the type"),
    "match": (lambda: Of(by_match, pool=nn.MaxPool2d(2)), "goes by the type"),
    "hasattr": (lambda: Of(by_attribute, pool=nn.MaxPool2d(2)), "an attribute tensors"),
    "an exception that is caught": (lambda: Of(by_try, pool=nn.MaxPool2d(2)), "goes by a value"),
    "an attribute of a tensor": (
        lambda: Of(lambda m, x: (lambda y: (setattr(y, "mark", 1), m.pool(y))[1])(x * 2), pool=nn.MaxPool2d(2)),
        "sets an attribute mark",
    ),
    "whether gradients are wanted": (lambda: Of(by_gradients, pool=nn.MaxPool2d(2)), "with gradients"),
    "no_grad": (lambda: Of(frozen, conv=conv(), head=head()), "gradients or autocast"),
    "no_grad, all of it": (lambda: Of(torch.no_grad()(frozen), conv=conv(), head=head()), "gradients or autocast"),
    "autocast": (lambda: Of(cast, conv=conv(), head=head(), last=nn.Conv2d(4, 4, 1)), "gradients or autocast"),
    "a gradient of its own": (lambda: Of(lambda m, x: m.head(Straight.apply(x * 9)), head=head()), PARTS),
    "checkpoint": (lambda: Of(checkpointed, conv=conv(), head=head()), PARTS),
    "a buffer that counts": (lambda: With(counted, steps=torch.zeros(1), conv=conv(), head=head()), "sets an attribute"),
    "a buffer that counts, in place": (
        lambda: With(lambda m, x: m.head(m.conv(x)) * m.steps.add_(1), steps=torch.zeros(1), conv=conv(), head=head()),
        WHOLE,
    ),
    "a buffer that is another each time": (lambda: With(counted_anew, steps=torch.zeros(1), conv=conv(), head=head()), "sets an attribute"),
    "a number that counts": (lambda: Of(counted, steps=0, conv=conv(), head=head()), "changes steps"),
    "a list that grows": (lambda: Of(remembered, seen=[], conv=conv(), head=head()), "changes seen"),
    "a result that is kept": (lambda: Of(kept_for_later, conv=conv(), head=head()), "changes last"),
    "a reciprocal of a buffer": (lambda: With(lambda m, x: m.head(x * (1 / m.std)), std=torch.ones(1), head=head()), WHOLE),
    "parts of buffers": (lambda: With(normal, **statistics(), head=head()), WHOLE),
    "parts of tensors": (lambda: Of(normal, **statistics(), head=head()), WHOLE),
    "the shape of a buffer": (
        lambda: With(lambda m, x: m.head(x + sum(m.mean[i] for i in range(len(m.mean)))), **statistics(), head=head()),
        WHOLE,
    ),
    "the numbers of a buffer": (lambda: With(lambda m, x: m.head(x) * m.std.sum().item(), **statistics(), head=head()), WHOLE),
    "tensors that the code makes": (lambda: Of(lambda m, x: m.head(x * torch.arange(16) + torch.tensor(2.0)), head=head()), WHOLE),
    "tensors in a list": (
        lambda: Of(lambda m, x: m.head(x * (1 / m.all[0])), all=[torch.ones(1)], head=head()),
        "no parameters or buffers",
    ),
    "torch.rand": (lambda: Of(lambda m, x: m.head(x) * torch.rand(1), head=head()), "random"),
    "numpy.random": (lambda: Of(lambda m, x: m.head(x) * np.random.rand(), head=head()), "random"),
    "random": (lambda: Of(lambda m, x: m.head(x) if random.random() > 0.5 else m.head(-x), head=head()), "random"),
    "a generator of its own": (
        lambda: Of(lambda m, x: m.head(x) * m.draws.random(), draws=np.random.default_rng(0), head=head()),
        "changes draws",
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("name", CODE)
def test_code_that_a_trace_would_change(name, example, training):
    make, said = CODE[name]
    found = assert_does_the_same(make(), image() if example else None, training=training, said=said)
    assert isinstance(found, torch.fx.GraphModule) is (said == WHOLE)


GENERATOR = torch.Generator().manual_seed(5)


def test_generators_are_as_they_were():
    """After code that draws, and after an example."""
    state = GENERATOR.get_state()
    found = optimize(Of(lambda m, x: m.pool(x) * torch.rand(1, generator=GENERATOR), pool=nn.MaxPool2d(2)))
    assert torch.equal(GENERATOR.get_state(), state)
    assert not torch.equal(found(torch.ones(1, 1, 2, 2)), found(torch.ones(1, 1, 2, 2)))
    for function in (lambda m, x: m.pool(x) * np.random.rand() * random.random() * torch.rand(1), lambda m, x: m.pool(T.dropout(x))):
        seeded()
        expected = torch.rand(1), random.random(), np.random.rand()
        model = Of(function, pool=nn.MaxPool2d(2))
        seeded()
        optimize(model, torch.ones(2, 3, 16, 16))
        assert (torch.rand(1), random.random(), np.random.rand()) == expected


class Mark:
    """Is itself and nothing else, as ``object()``: so copy.deepcopy would change what code does."""


MARKS = object(), Mark()


def marked(m, x):
    x = x * 2 if m.mark is MARKS[0] else x
    return m.head(x * 3 if m.others[0] is MARKS[1] else x)


def test_marks_are_themselves():
    model, x = Of(marked, mark=MARKS[0], others=[MARKS[1]], head=head()), image()
    found = optimize(model)
    assert isinstance(found, torch.fx.GraphModule)
    torch.testing.assert_close(found(x), model(x))


class Normalised(nn.Module):
    """With tensors of every kind: a buffer, an attribute, one that the code makes, and x += y."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.rand(3))
        self.factor = torch.tensor(3.0)
        self.head = head()

    def forward(self, x, flag=None):
        x = (x - self.mean[None, :, None, None]) / (self.factor * 2)
        y = x
        x += torch.tensor(0.25)
        return self.head(x) + y.mean() if flag is None else x


@pytest.mark.parametrize("again", [lambda model: pickle.loads(pickle.dumps(model)), copy.deepcopy, optimize])
def test_copies_compute_what_the_first_did(again):
    """A graph that is unpickled is traced once more."""
    model = Normalised().eval()
    found = again(optimize(model))
    assert isinstance(found, torch.fx.GraphModule)
    assert_alike(found, model, image())
    for net in (found, model):
        net.load_state_dict({"mean": torch.tensor([1.0, 2.0, 3.0])})
    assert_alike(found, model, image())
    with pytest.raises(RuntimeError, match="rewritten for flag=None"):
        found(image(), True)


def test_graphs_are_compiled_and_exported():
    for model in (Flagged().eval(), nn.Sequential(nn.Conv2d(3, 4, 3), batch_norm(4), nn.ReLU(), nn.MaxPool2d(2)).eval()):
        found, x = optimize(model), image()
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(found, backend="eager", fullgraph=True)(x), model(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(torch.export.export(found, (x,)).module()(x), model(x), rtol=1e-4, atol=1e-5)


def body(inputs):
    return nn.Sequential(nn.Conv2d(inputs, 3, 3), nn.ReLU(), nn.MaxPool2d(2))


def cast_twice(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return m.two(m.one(x))


def frozen_body(m, x):
    with torch.no_grad():
        x = m.one(x)
    return m.two(x)


def test_parts_are_measured_as_they_are_called(monkeypatch):
    """Under autocast, and without gradients where they get none."""
    model = Of(cast_twice, one=body(3), two=body(3)).eval()
    found = optimize(model, image())
    assert [row.place for row in found.report.changed] == ["one.2", "two.2"]
    assert all("Conv2d" in row.stands for row in found.report.changed)
    assert_alike(found, model, image())
    seen, call = [], rewrite._call
    monkeypatch.setattr(
        rewrite, "_call", lambda site, parts, x, training, learns: seen.append(training) or call(site, parts, x, training, learns)
    )
    optimize(Of(frozen_body, one=body(3), two=nn.Sequential(nn.Tanh(), nn.MaxPool2d(2))).train(), image())
    assert seen == sorted(seen)
    assert set(seen) == {False, True}


# Arguments


def test_what_was_assumed_of_arguments_is_looked_at():
    found, plain = optimize(Flagged().eval()), None
    for args, named in (((1,), {}), ((), {"loud": True}), ((), {"how": "mean"}), ((None, 1), {}), ((), {"other": 1})):
        with pytest.raises(RuntimeError, match=r"optimize: the model was rewritten for .*: give optimize an example_input"):
            found(image(), *args, **named)
    model = Flagged().eval()
    for example in ((image(), 1), {"x": image(), "flag": 1, "how": "mean"}, {"x": image(), "loud": True}):
        found, plain = optimize(model, example), copy.deepcopy(model)
        args, named = (image(), *example[1:]) if isinstance(example, tuple) else (image(),), {} if isinstance(example, tuple) else example
        named = {name: value for name, value in named.items() if name != "x"}
        assert isinstance(found, torch.fx.GraphModule)
        assert_alike(found, plain, *args, **named)
    with pytest.raises(RuntimeError, match=r"rewritten for loud=True"):
        found(image())


def test_arguments_that_no_trace_is_made_of():
    """Any number of them, and None among tensors: parts are rewritten, for all."""
    model = Flagged().eval()
    found = optimize(model, (image(), None, 1))
    assert any("it is called with arguments by way of *more" in note for note in found.report.notes)
    for args in ((), (None,), (1, 2)):
        assert_alike(found, model, image(), *args)
    model, x = Of(lambda m, x: m.pool(x[0] if x[1] is None else x[0] + x[1]), pool=nn.MaxPool2d(2)), image()
    found = optimize(model, ([x, None],))
    assert any("x holds tensors and what is none" in note for note in found.report.notes)
    assert torch.equal(found([x, None]), model([x, None]))
    assert torch.equal(found([x, x]), model([x, x]))
    found = optimize(model)
    assert torch.equal(found([x, x]), model([x, x]))
    with pytest.raises(RuntimeError, match="rewritten for tensors in x"):
        found([x, None])


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x, mask, scale=2.0):
        if mask is None:
            return self.pool(torch.relu(x - 1))
        return self.pool(torch.relu(x * mask * scale))


class Masking(nn.Module):
    """Cannot be traced, and calls its part in both ways."""

    def __init__(self):
        super().__init__()
        self.part = Masked()

    def forward(self, x):
        return self.part(x, x) + self.part(x, mask=None) if x.sum() == x.sum() else x


def test_none_for_a_tensor():
    found, model = optimize(Masked().eval()), Masked().eval()
    assert found.report.changed
    assert_alike(found, model, image(), image())
    assert_alike(found, model, image(), image(), 3.0)
    with pytest.raises(RuntimeError, match="rewritten for tensors in mask"):
        found(image(), None)
    found = optimize(model, (image(), None))
    assert_alike(found, model, image(), None)
    with pytest.raises(RuntimeError, match="rewritten for mask=None"):
        found(image(), image())


@pytest.mark.parametrize("example", [None, image()])
def test_a_part_runs_its_own_code_for_what_was_not_assumed(example):
    model = Masking().eval()
    found = optimize(model, example)
    assert [row.place for row in found.report.changed] == ["part.pool"]
    for each in (found, copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert_alike(each, model, image())


def test_examples_of_several_arguments():
    """By place and by name; what does not fit is said so."""
    model, x, y = Masked().eval(), image(), image()
    for example in ((x, y), [x, y], {"mask": y, "x": x}, {"x": x, "mask": y, "scale": 3.0}):
        found = optimize(model, example)
        assert found.report.rows[0].before_ms > 0
        assert_alike(found, model, x, y)
    lists = Of(lambda m, x: m.pool(torch.relu(x[0] + x[1]))).eval()
    lists.pool = nn.MaxPool2d(2)
    found = optimize(lists, ([x, y],))
    assert isinstance(found, torch.fx.GraphModule)
    torch.testing.assert_close(found([x, y]), lists([x, y]))
    for example in ([x], {"y": x}, (x, y, 1.0, 2), {"x": x}):
        with pytest.raises(TypeError, match=r"optimize: example_input does not fit Masked\.forward\(x, mask, scale=2\.0\): "):
            optimize(model, example)


# Whose code runs


def own_forward(layers, at, forward):
    model = nn.Sequential(*layers)
    model[at].forward = forward
    return model.eval()


LAYERS = {
    "convolution": (lambda: [nn.Conv2d(3, 3, 3), batch_norm(3), nn.ReLU(), nn.MaxPool2d(2)], 0, "Conv2d has a forward of its own"),
    "batch-norm": (lambda: [nn.Conv2d(3, 3, 3), batch_norm(3), nn.ReLU(), nn.MaxPool2d(2)], 1, "BatchNorm2d has a forward of its own"),
    "activation": (lambda: [nn.Conv2d(3, 3, 3), nn.ReLU(), nn.MaxPool2d(2)], 1, "ReLU has a forward of its own"),
    "pooling": (lambda: [nn.ReLU(), nn.MaxPool2d(2)], 1, "MaxPool2d has a forward of its own"),
    "fastpool's pooling": (lambda: [nn.ReLU(), fast.MaxPool2d(2)], 1, "MaxPool2d has a forward of its own"),
    "container": (lambda: [nn.Conv2d(3, 3, 3), nn.Sequential(nn.ReLU()), nn.MaxPool2d(2)], 1, "1 has a forward of its own"),
}


@pytest.mark.parametrize("example", [None, image()])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_a_forward_of_its_own(name, example):
    make, at, said = LAYERS[name]
    model = own_forward(make(), at, lambda x: torch.sin(x) + 1)
    found = optimize(model, example)
    assert_alike(found, model, image())
    assert any(said in text for text in [*found.report.notes, *(row.why for row in found.report.rows)]), found.report


def test_a_part_with_a_forward_of_its_own():
    """Of a model that cannot be traced; and what overwrites its result may overwrite what it keeps."""
    body = own_forward([nn.ReLU(), nn.MaxPool2d(2)], 1, lambda x: x)
    model = Of(lambda m, x: m.body(x) if x.sum() == x.sum() else x, body=body, pool=fast.MaxPool2d(2)).eval()
    assert_alike(optimize(model, image()), model, image())
    kept = []
    model = own_forward([nn.Conv2d(3, 3, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2)], 0, lambda x: kept.append(x * 1) or kept[-1])
    found = optimize(model)
    found(image())
    assert kept[-1].min() == 0
    assert "overwrites" in found.report.rows[0].why


def test_code_of_a_clone_runs_clones():
    """Lists of layers, and bound methods, which refer to the model's: in the mode that is asked for, and not in the original's."""
    conv, norm, head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    model = Of(lambda m, x: m.after(m.layers[1](m.layers[0](x))) if x.sum() == x.sum() else x, conv=conv, norm=norm, head=head)
    model.layers = [conv, norm]
    model.after = types.MethodType(lambda m, x: m.head(x), model)
    plain, statistics = copy.deepcopy(model).eval(), norm.running_mean.clone()
    for example in (None, image()):
        found = optimize(model, example, training=False)
        assert found.report.changed
        assert_alike(found, plain, image())
    assert model.training
    assert torch.equal(norm.running_mean, statistics)
    assert found.layers[1] is found.norm


class KeepsNorms(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


class Versioned(nn.Sequential):
    def get_extra_state(self):
        return {"version": 2}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize("kind", [KeepsNorms, Versioned])
def test_methods_of_the_class_stay(kind):
    """A graph would have torch.fx's."""
    model = kind(nn.Conv2d(3, 4, 3), batch_norm(4), nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))).train()
    found = optimize(model)
    assert isinstance(found, kind)
    assert found.report.changed
    assert list(found.state_dict()) == list(model.state_dict())
    assert [module.training for module in found.eval().train().modules() if isinstance(module, nn.BatchNorm2d)] == [kind is Versioned]
    assert_alike(found, copy.deepcopy(model).train(), image())


def test_hooks_of_the_state_dict_stay():
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    model.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.update(mark=torch.ones(1)))
    found = optimize(model)
    assert isinstance(found, torch.fx.GraphModule)
    assert list(found.state_dict()) == ["mark"]


def test_frozen_batch_norms_stay_frozen():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), batch_norm(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.MaxPool2d(2)
    )
    model[1].eval()
    for example in (None, image()):
        found = optimize(model, example, training=True)
        assert found.report.training
        assert [found.get_submodule(name).training for name in "15"] == [False, True]
        assert_alike(found, copy.deepcopy(model), image())
    found = optimize(model.eval(), training=True)
    assert [found.get_submodule(name).training for name in "15"] == [True, True]


# Verified


class Confused(nn.Module):
    """Asks what no proxy hears of."""

    def __init__(self):
        super().__init__()
        self.act, self.pool = nn.ReLU(), nn.MaxPool2d(2)

    def forward(self, x):
        return self.pool(self.act(x * 2 if type(x) is torch.Tensor else x))


@pytest.mark.parametrize("training", [False, True])
def test_an_example_shows_what_a_trace_does_not(training):
    model = Confused().train(training)
    found = optimize(model, image())
    assert isinstance(found, Confused)
    assert any("a trace does something else: outputs are apart" in note for note in found.report.notes)
    assert [row.stands for row in found.report.changed] == ["fastpool MaxPool2d"]
    assert_alike(found, model, image())


def test_nothing_rewritten_is_the_model():
    """A graph would gain nothing, and may do something else."""
    model = Of(lambda m, x: m.linear(x * 2 if type(x) is torch.Tensor else x), linear=nn.Linear(16, 3))
    for example in (None, image()):
        found = optimize(model, example)
        assert type(found) is Of
        assert not found.report.rows
        assert found is not model
        assert_alike(found, model, image())


class Times(nn.Module):
    def __init__(self, scale, function):
        super().__init__()
        self.scale, self.function = nn.Parameter(torch.ones(1)), function
        self.scale.data *= scale

    def forward(self, x):
        return self.function(x * self.scale)


WRONG = {
    "number": (lambda x: x, lambda x: (x, x), "nested in another way"),
    "form": (lambda x: (x, x), lambda x: [x, x], "nested in another way"),
    "shape": (lambda x: x, lambda x: x[:1], r"an output is float32 (1, 3, 16, 16), with a gradient, its own float32 (2, 3, 16, 16)"),
    "dtype": (lambda x: x, lambda x: x.double(), "an output is float64"),
    "a gradient more": (lambda x: x.detach(), lambda x: x, "with a gradient, its own float32 (2, 3, 16, 16)"),
    "gradients of others": (
        lambda x: x.detach() + ONE,
        lambda x: x + ONE,
        "gradients reach another set of inputs and parameters: number 0",
    ),
    "numbers": (lambda x: x, lambda x: x * 1.001, "outputs differ from float64"),
    "complex numbers": (lambda x: x * 1j, lambda x: x * 1.001j, "outputs differ from float64"),
    "gradients": (lambda x: x, lambda x: x.detach() + (x - x.detach()) * 1.001, "gradients differ from float64"),
    "integers": (lambda x: (x, x.argmax(-1)), lambda x: (x, x.argmin(-1)), "integers differ"),
    "no tensor": (lambda x: (x, "a"), lambda x: (x, "b"), "an output is 'b', its own 'a'"),
    "not a number": (lambda x: x, lambda x: x / (x > 0), "outputs differ from float64 by inf"),
}
ONE = torch.ones(1, requires_grad=True)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong(name):
    one, other, said = WRONG[name]
    before, after = Times(1.5, one), Times(1.5, other)
    example = verdict.Example.of(image(), before, True)
    assert said in verdict.wrong(before, after, example, Report(True))
    assert verdict.wrong(before, copy.deepcopy(before), example, Report(True)) == ""


def test_integers_of_equal_numbers_are_those_of_float64():
    """Rounding alone decides between them."""
    before = Times(1.0, lambda x: torch.stack([x + 1, x + 1 + 1e-9]).argmax(0)).eval()
    after = Times(1.0, lambda x: torch.stack([(x + 1) * (1 - 1e-9), x + 1 + (0 if x.dtype is torch.float64 else 2e-7)]).argmax(0)).eval()
    report = Report(False)
    assert verdict.wrong(before, after, verdict.Example.of(image().abs(), before, False), report) == ""
    assert any("kink" in note for note in report.notes)


def test_a_model_that_is_float32_alone():
    """Held against itself."""
    model = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), Of(lambda m, x: x @ torch.ones(8, 3))).eval()
    found = optimize(model, image())
    assert found.report.changed
    assert any("does not run in float64" in note for note in found.report.notes)
    assert_alike(found, model, image())


# Folded


def scaled_parameters(model):
    vector_to_parameters(parameters_to_vector(model.parameters()) * 2, model.parameters())


CHANGES = {
    "a weight's data": lambda m: m.get_submodule("0").weight.data.mul_(3),
    "a bias's data": lambda m: m.get_submodule("0").bias.data.add_(3),
    "a mean's data": lambda m: m.get_submodule("1").running_mean.data.add_(3),
    "a variance's data": lambda m: m.get_submodule("1").running_var.data.mul_(3),
    "a scale's data": lambda m: m.get_submodule("1").weight.data.mul_(-1),
    "other data": lambda m: setattr(m.get_submodule("0").weight, "data", m.get_submodule("0").weight.data * 2),
    "a vector of parameters": scaled_parameters,
    "epsilon": lambda m: setattr(m.get_submodule("1"), "eps", 1.0),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("ours", [False, True])
def test_what_was_folded_is_folded_anew(name, ours, monkeypatch):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), batch_norm(4), nn.ReLU(), nn.MaxPool2d(2)).eval()
    if ours:
        monkeypatch.setattr(rewrite, "forms", lambda parts, measured: [sites.Form(ours=True, early=True, whole=True)])
    found, x = optimize(model), image()
    with torch.no_grad():
        for _ in range(2):  # what is known of the last call is forgotten too
            torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-4)
        before = model(x)
        CHANGES[name](found)
        if name == "epsilon":  # which they do not share
            CHANGES[name](model)
        assert not torch.allclose(model(x), before)
        torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-4)


def test_other_memory_is_told_from_the_first(monkeypatch):
    """Numbers that are not looked at, in new memory, which may lie where the old was."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)).eval()
    found, x = optimize(model), image()
    weight = model[0].weight
    with torch.no_grad():
        found(x)
        for _ in range(4):
            data = weight.data.clone()
            data.view(-1)[1] += 5  # of 1728 numbers each 55th is looked at
            weight.data = data
            del data
            torch.testing.assert_close(found(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_16_bits_are_not_folded(dtype):
    """Their error is no larger than torch's, of float64, whether they were so before or became so."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(64, 64, 3), batch_norm(64), nn.ReLU(), nn.MaxPool2d(2)).eval()
    late = optimize(copy.deepcopy(model)).to(dtype)
    model.to(dtype)
    x = torch.randn(4, 64, 16, 16).to(dtype)
    truth = copy.deepcopy(model).double()(x.double())
    found = optimize(model)
    assert found.report.rows[0].stands == "Conv2d, fastpool MaxPool2d(before=BatchNorm2d + ReLU)"
    assert "16 bits" in found.report.rows[0].why
    with torch.no_grad():
        own = (model(x).double() - truth).square().mean()
        for net in (found, late, optimize(model, x)):
            assert (net(x).double() - truth).square().mean() <= 1.02 * own


def test_nothing_is_folded_under_autocast():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), batch_norm(4), nn.ReLU(), nn.MaxPool2d(2)).eval()
    found, x = optimize(model), image()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(found(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("pool", [nn.MaxPool3d(2), nn.AvgPool3d(2), nn.AdaptiveAvgPool3d(2)])
def test_autocast_computes_what_it_does_in_float32(pool):
    model = nn.Sequential(nn.Tanh(), pool).eval()
    found, x = optimize(model), torch.randn(2, 3, 8, 8, 8, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(found(x), model(x), rtol=0, atol=0)
