"""CUDA kernels on a real GPU: ``pytest -m gpu``.  Nobody has run this file on one so far."""

import emulated
import pytest
import reference
import torch
from cases import EVERY_NEST, GEOMETRIES, LAYOUTS, adversarial
from fastpool.kernels.pool import KINDS
from test_conv import assert_equal, convolved, integers, truth
from test_cuda_conv import EXAMPLES as CONVOLUTIONS
from test_cuda_wide import WIDE
from test_pooling import SELECTING, SUMMING, leaf, no_worse, op

import fastpool.functional as F
import fastpool.nn
from fastpool.functional import _pooled, _with_indices

pytestmark = [
    pytest.mark.gpu,
    emulated.needs_toolchain,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or a torch that is built without CUDA"),
]


def on_gpu(x, device=0):
    """x on a GPU at the same strides."""
    extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.as_strided((extent,), (1,)).to(f"cuda:{device}").as_strided(x.shape, x.stride())


@pytest.mark.parametrize("geometry", EVERY_NEST)
@pytest.mark.parametrize("kind", SELECTING)
def test_selecting(kind, geometry):
    shape, w = GEOMETRIES[geometry]
    x = adversarial(shape, torch.float32)
    for name, layout in LAYOUTS.items():
        here, there = leaf(layout(x)), leaf(on_gpu(layout(x)))
        (y, flat), (ours, ours_flat) = _with_indices(here, op(kind, w)), _with_indices(there, op(kind, w))
        gy = torch.randint(-4, 5, y.shape).float()
        y.backward(gy)
        ours.backward(gy.cuda())
        assert torch.equal(ours.cpu().nan_to_num(77), y.nan_to_num(77)), name
        assert torch.equal(ours_flat.cpu(), flat), name
        assert torch.equal(there.grad.cpu(), here.grad), name
        assert ours.stride() == y.stride(), name


@pytest.mark.parametrize("geometry", EVERY_NEST)
@pytest.mark.parametrize("kind", SUMMING)
def test_summing(kind, geometry):
    shape, w = GEOMETRIES[geometry]
    x, extra = torch.randn(shape), reference.PARAMETERS.get(kind, ())
    truth, theirs = (x.to(t, copy=True).requires_grad_() for t in (torch.float64, torch.float32))
    y64, y32 = (reference.pool(KINDS[kind], t, w, extra=extra)[0] for t in (truth, theirs))
    gy = torch.randn_like(y32)
    y64.backward(gy.double())
    y32.backward(gy)
    for name, layout in LAYOUTS.items():
        a = leaf(on_gpu(layout(x)))
        y = _pooled(a, op(kind, w))
        y.backward(gy.cuda())
        no_worse(y.detach().cpu(), y64.detach(), y32.detach(), f"{name} value")
        no_worse(a.grad.cpu(), truth.grad, theirs.grad, f"{name} gradient")


@pytest.mark.parametrize("kind", ["max", "avg", "l2", "stochastic"])
def test_the_emulator_computes_the_same_bits(kind):
    """The very PTX, on both."""
    shape, w = GEOMETRIES["3x3s2p1"]
    x = torch.randn(shape)
    from fastpool.kernels.cuda.compile import capability

    with emulated.device(capability(torch.cuda.get_device_capability())):
        expected = _pooled(x, op(kind, w), 7)
    assert torch.equal(_pooled(x.cuda(), op(kind, w), 7).cpu(), expected)


@pytest.mark.parametrize("geometry", WIDE)
@pytest.mark.parametrize("kind", ["max", "avg", "l2"])
def test_four_elements_at_a_time(kind, geometry):
    shape, w = WIDE[geometry]
    x = torch.randn(shape)
    for name in ("contiguous", "channels_last"):
        here, there = leaf(LAYOUTS[name](x)), leaf(on_gpu(LAYOUTS[name](x)))
        y, ours = _pooled(here, op(kind, w)), _pooled(there, op(kind, w))
        y.sum().backward()
        ours.sum().backward()
        torch.testing.assert_close(ours.cpu(), y)
        torch.testing.assert_close(there.grad.cpu(), here.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name, layout, dtype):
    """Of small integers, whose sums are exact."""
    shape, weight, more = CONVOLUTIONS[name]
    x, w, b = LAYOUTS[layout](integers(*shape, dtype=dtype)), integers(*weight, dtype=dtype), integers(weight[0], dtype=dtype)
    y = truth(x, w, b, None, **more)[0]
    gy = integers(*y.shape, dtype=dtype)
    found = convolved(on_gpu(x), w.cuda(), b.cuda(), gy.cuda(), **more)
    assert_equal([t.cpu() for t in found], truth(x, w, b, gy, **more), name)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_convolution_and_pooling(layout):
    x, w, b = LAYOUTS[layout](torch.randn(4, 16, 32, 32)), torch.randn(64, 16, 3, 3) / 12, torch.randn(64)
    ours = F.conv_pool2d(on_gpu(x), w.cuda(), b.cuda(), padding=1, activation="relu", kernel_size=2)
    theirs = torch.nn.functional.max_pool2d(torch.nn.functional.conv2d(x, w, b, padding=1).relu(), 2)
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)


def test_a_convolution_in_a_graph_sees_its_weights_as_they_are():
    x, w = torch.randn(4, 8, 16, 16, device="cuda"), torch.randn(8, 8, 3, 3, device="cuda")
    F.conv2d(x, w)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = F.conv2d(x, w)
    w.mul_(2)
    graph.replay()
    torch.testing.assert_close(y, torch.nn.functional.conv2d(x, w), rtol=1e-3, atol=1e-3)


def test_under_torch_compile():
    model = torch.nn.Sequential(fastpool.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), fastpool.nn.MaxPool2d(2)).cuda()
    x = torch.randn(2, 3, 16, 16, device="cuda")
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


def test_on_another_stream():
    x = torch.randn(8, 64, 112, 112, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        y = F.max_pool2d(x + 1, 2)
    stream.synchronize()
    assert torch.equal(y, torch.nn.functional.max_pool2d(x + 1, 2))


def test_captured_in_a_graph():
    x = torch.randn(4, 8, 32, 32, device="cuda")
    F.max_pool2d(x, 2)  # compiles, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = F.max_pool2d(x, 2)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, torch.nn.functional.max_pool2d(x, 2))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_the_second_device():
    x = torch.randn(4, 8, 32, 32)
    assert torch.equal(F.max_pool2d(on_gpu(x, 1), 2).cpu(), F.max_pool2d(x, 2))


def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    x = torch.zeros(3, 1, 32768, 32768, dtype=torch.uint8, device="cuda")
    x[2, 0, -1, -1] = 7
    y = F.max_pool2d(x, 2)
    assert y[2, 0, -1, -1] == 7
    assert y.sum() == 7
