"""``conv_pool2d``: one launch, or two, against the steps by torch in float64."""

import pytest
import torch
import torch.nn.functional as T
from fastpool.kernels.cpu import blocking, conv_pool
from torch import nn

import fastpool.functional as F
from fastpool import convolution

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
POOLS = {"max": T.max_pool2d, "avg": T.avg_pool2d, "min": lambda x, *w: -T.max_pool2d(-x, *w)}


@pytest.fixture
def in_one(monkeypatch):
    """Maps of any size are pooled in bands, of few rows; the calls that were."""
    monkeypatch.setattr(conv_pool, "LEAST", 0)
    monkeypatch.setattr(blocking, "l2_bytes", lambda: 1 << 16)
    conv_pool._planned.cache_clear(), convolution.call.cache_clear()
    plain, found = convolution.pooled, []

    def pooled(*args, **more):
        y = plain(*args, **more)
        found.append(y is not None)
        return y

    monkeypatch.setattr(convolution, "pooled", pooled)
    yield found
    conv_pool._planned.cache_clear(), convolution.call.cache_clear()


def tensors(shape, weight, dtype=torch.float32, layout="contiguous", bias=True):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    w = (torch.randn(weight, dtype=torch.float64) / (weight[1] * weight[2] * weight[3]) ** 0.5).to(dtype)
    b = torch.randn(weight[0], dtype=torch.float64).to(dtype) if bias else None
    return x.to(memory_format=LAYOUTS[layout]) if x.dim() == 4 else x, w, b


def reference(x, w, b, conv, pool, window, act=torch.relu):
    return POOLS[pool](act(T.conv2d(x, w, b, **conv)), *window)


CASES = {
    # name: (x, weight, convolution, pooling's kernel_size, stride, padding)
    "2x2": ((2, 5, 22, 19), (20, 5, 3, 3), {"padding": 1}, (2, 2, 0)),
    "odd": ((1, 4, 23, 21), (17, 4, 3, 3), {}, (2, 2, 0)),
    "overlapping": ((2, 4, 25, 27), (18, 4, 5, 5), {"padding": 2}, (3, 2, 0)),
    "padded": ((1, 4, 24, 20), (16, 4, 3, 3), {"padding": 1}, (3, 2, 1)),
    "stride 1": ((1, 3, 16, 18), (16, 3, 3, 3), {"padding": 1}, (3, 1, 1)),
    "stem": ((1, 3, 47, 51), (24, 3, 7, 7), {"stride": 2, "padding": 3}, (3, 2, 1)),
    "gaps": ((1, 3, 26, 26), (16, 3, 3, 3), {}, (2, 3, 0)),
    "groups": ((2, 6, 20, 20), (12, 3, 3, 3), {"groups": 2, "padding": 1}, (2, 2, 0)),
    "dilated": ((1, 4, 24, 24), (16, 4, 3, 3), {"dilation": 2, "padding": 2}, (2, 2, 0)),
    "1x1": ((2, 8, 20, 20), (32, 8, 1, 1), {}, (2, 2, 0)),
    "few outputs": ((1, 4, 20, 20), (2, 4, 3, 3), {}, (2, 2, 0)),
    "wide window": ((1, 4, 20, 40), (16, 4, 3, 3), {"padding": 1}, ((2, 4), (2, 4), 0)),
    "one band": ((3, 4, 6, 6), (8, 4, 3, 3), {"padding": 1}, (2, 2, 0)),
}


# A sum needs of each way of windows one case: the bands are the same.
SUMMED = "2x2", "overlapping", "padded", "wide window"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "pool"), [(case, pool) for case in CASES for pool in ("max", "avg") if pool == "max" or case in SUMMED])
def test_in_one_launch(in_one, case, pool, layout):
    shape, weight, conv, window = CASES[case]
    x, w, b = tensors(shape, weight, layout=layout)
    y = F.conv_pool2d(x, w, b, **conv, activation="relu", pool=pool, kernel_size=window[0], pool_stride=window[1], pool_padding=window[2])
    assert in_one == [True]
    more = {"rtol": 0, "atol": 0} if pool == "max" else {}
    convolved = F.conv2d(x, w, b, **conv, after="relu")
    torch.testing.assert_close(y, getattr(F, f"{pool}_pool2d")(convolved, *window), **more)
    torch.testing.assert_close(y, reference(x, w, b, conv, pool, window))
    assert y.is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("case", ["overlapping", "2x2"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads(in_one, case, layout):
    """Each begins in the middle of an image, without the rows of the band before: bit for bit the same."""
    *_, window = CASES[case]
    x, w, b = tensors((3, 16, 64, 66), (48, 16, 3, 3), layout=layout)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(F.conv_pool2d(x, w, b, padding=1, activation="relu", kernel_size=window[0], pool_stride=window[1]))
    assert in_one == [True, True]
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(in_one, dtype):
    shape, weight, conv, _ = CASES["2x2"]
    x, w, b = tensors(shape, weight, dtype)
    y = F.conv_pool2d(x, w, b, **conv, activation="relu", kernel_size=2)
    assert in_one == [True]
    assert torch.equal(y, F.max_pool2d(F.conv2d(x, w, b, **conv, after="relu"), 2))


@pytest.mark.parametrize("activation", [None, "gelu", nn.LeakyReLU(0.2), "softplus"], ids=str)
@pytest.mark.parametrize("affine", [False, True])
def test_epilogues(in_one, activation, affine):
    x, w, b = tensors((1, 4, 20, 20), (16, 4, 3, 3))
    of = (torch.randn(16), torch.randn(16)) if affine else None
    y = F.conv_pool2d(x, w, b, affine=of, activation=activation, kernel_size=2)
    assert in_one == [True]
    torch.testing.assert_close(y, F.max_pool2d(F.conv2d(x, w, b, affine=of, after=activation), 2))


def test_minimum_unbatched_and_a_copied_input(in_one):
    x, w, b = tensors((4, 20, 20), (16, 4, 3, 3))
    expected = reference(x, w, b, {}, "min", (2,))
    torch.testing.assert_close(F.conv_pool2d(x, w, b, activation="relu", pool="min", kernel_size=2), expected)
    torch.testing.assert_close(F.conv_pool2d(x[:, ::2, ::2], w, b, kernel_size=2), T.max_pool2d(T.conv2d(x[:, ::2, ::2], w, b), 2))
    assert in_one == [True, True]


def test_what_is_taken_one_by_one(in_one):
    x, w, b = tensors((2, 16, 20, 20), (16, 1, 3, 3))
    for more in ({"groups": 16}, {"groups": 16, "padding": 1}):
        torch.testing.assert_close(F.conv_pool2d(x, w, b, kernel_size=2, **more), T.max_pool2d(T.conv2d(x, w, b, **more), 2))
    x, w, b = tensors((2, 4, 40, 300), (16, 4, 3, 3))
    torch.testing.assert_close(F.conv_pool2d(x, w, b, kernel_size=(30, 2)), T.max_pool2d(T.conv2d(x, w, b), (30, 2)))
    x, w, b = tensors((0, 4, 20, 20), (16, 4, 3, 3))
    assert F.conv_pool2d(x, w, b, kernel_size=2).shape == (0, 16, 9, 9)
    assert in_one[0] is in_one[1] is in_one[-1] is False


def test_small_maps_are_taken_one_by_one(monkeypatch):
    monkeypatch.setattr(conv_pool, "_planned", None)
    x, w, b = tensors((2, 4, 20, 20), (16, 4, 3, 3))
    torch.testing.assert_close(F.conv_pool2d(x, w, b, activation="relu", kernel_size=2), reference(x, w, b, {}, "max", (2,)))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_gradients(activation):
    x, w, b = (t.requires_grad_() for t in tensors((2, 3, 12, 12), (8, 3, 3, 3), torch.float64))
    act = {"relu": torch.relu, "gelu": T.gelu}[activation]
    both = F.conv_pool2d(x, w, b, activation=activation, kernel_size=2), reference(x, w, b, {}, "max", (2,), act)
    found = [[y, *torch.autograd.grad(y.square().sum(), (x, w, b))] for y in both]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_prelu_of_several_slopes():
    x, w, b = tensors((1, 4, 20, 20), (16, 4, 3, 3))
    act = nn.PReLU(16)
    with torch.no_grad():
        act.weight.uniform_(-1, 1)
        torch.testing.assert_close(F.conv_pool2d(x, w, b, activation=act, kernel_size=2), reference(x, w, b, {}, "max", (2,), act))


def test_packed_weights_are_kept_until_they_change(in_one):
    x, w, b = tensors((1, 4, 20, 20), (16, 4, 3, 3))
    kept = convolution.Kept()
    run = lambda: F.conv_pooled(x, w, b, (1, 0, 1, 1), None, "relu", ("max", 2, None, 0), kept)
    torch.testing.assert_close(run(), reference(x, w, b, {}, "max", (2,)))
    w.mul_(2)
    torch.testing.assert_close(run(), reference(x, w, b, {}, "max", (2,)))


@pytest.mark.parametrize("apart", [False, True])
def test_the_last_call_is_remembered_for_what_it_was(apart, request, monkeypatch):
    """What was asked, of which tensors: a call that differs in anything is not taken for it, and one that does not is."""
    if not apart:
        request.getfixturevalue("in_one")
    x, w, b = tensors((1, 4, 20, 20), (16, 4, 3, 3))
    other, slopes, kept = torch.randn_like(w), nn.LeakyReLU(0.1), convolution.Kept()

    def run(x=x, w=w, b=b, geometry=(1, 0, 1, 1), act="relu", window=("max", 2, None, 0)):
        found = F.conv_pooled(x, w, b, geometry, None, act, window, kept)
        arguments = dict(zip(("stride", "padding", "dilation", "groups"), geometry, strict=True))
        module = {"relu": nn.ReLU(), None: nn.Identity()}.get(act, act)
        expected = reference(x, w, b, arguments, window[0], window[1:], module)
        torch.testing.assert_close(found, expected)
        return found

    run()
    assert kept.last is not None
    assert (kept.last.then is None) is not apart
    prepared = []
    monkeypatch.setattr(convolution, "called", lambda *args, plain=convolution.called: prepared.append(args) or plain(*args))
    run()
    assert not prepared
    for change in (
        {"x": torch.randn(1, 4, 20, 22)},
        {"x": x.contiguous(memory_format=torch.channels_last)},
        {"x": x.double(), "w": w.double(), "b": None},
        {"w": other},
        {"b": None},
        {"geometry": (2, 0, 1, 1)},
        {"act": None},
        {"act": slopes},
        {"window": ("avg", 2, None, 0)},
        {"window": ("max", 3, 2, 1)},
    ):
        run(**change)
        assert prepared, change
        run()
        prepared.clear()
    slopes.negative_slope = 0.5
    run(act=slopes)
    assert run(x=x.requires_grad_()).requires_grad


def test_errors():
    x, w, b = tensors((1, 4, 8, 8), (16, 4, 3, 3))
    with pytest.raises(ValueError, match=r"^conv_pool2d: pool must be one of max, avg, min, got 'l2'"):
        F.conv_pool2d(x, w, b, pool="l2", kernel_size=2)
    with pytest.raises(RuntimeError, match=r"^conv_pool2d: .*the output would be"):
        F.conv_pool2d(x, w, b, kernel_size=9)
    with pytest.raises(RuntimeError, match=r"^conv_pool2d: a weight of .* takes 4 channels"):
        F.conv_pool2d(x[:, :3], w, b, kernel_size=2)
    with pytest.raises(TypeError):
        F.conv_pool2d(x, w, b)
    with pytest.raises(TypeError, match=r"^conv_pool2d: (after|before)"):
        F.conv_pool2d(x, w, b, activation=nn.Linear(1, 1), kernel_size=2)


def test_under_torch_compile():
    x, w, b = tensors((1, 4, 20, 20), (16, 4, 3, 3))
    run = torch.compile(lambda x: F.conv_pool2d(x, w, b, activation="relu", kernel_size=2), fullgraph=True, backend="eager")
    torch.testing.assert_close(run(x), reference(x, w, b, {}, "max", (2,)))
