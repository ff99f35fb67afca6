"""CUDA kernels on a real GPU: ``pytest -m gpu``.  Nobody has run this file on one so far.

First tensors that are there: what allocates, streams, graphs, devices, sizes; beside this package on the CPU, or torch.  Then the tests
that the emulator runs, each launch of which is on the device (staged.py).
"""

import functools
import math
import os
import re
import shutil
import subprocess
import sys
import threading

import emulated
import pytest
import reference
import staged
import test_cuda
import test_cuda_conv
import test_cuda_geometry
import test_cuda_wide
import torch
import torch.nn.functional as T
from cases import GEOMETRIES, LAYOUTS, adversarial
from fastpool.bench import gpu
from fastpool.kernels.pool import KINDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import ROOT, run
from test_conv import ASKED, PLACES, assert_equal, convolved, integers, truth
from test_conv import DTYPES as CONVOLVED
from test_cuda_code import CALLS as CALLED
from test_cuda_code import CAPABILITIES, CODE, disassembled, sections
from test_cuda_code import kernels as launched_by
from test_cuda_conv import EXAMPLES as CONVOLUTIONS
from test_cuda_geometry import PLACES as DRAWN
from test_cuda_geometry import asked
from test_cuda_wide import WIDE
from test_pooling import SELECTING, leaf, op

import fastpool.functional as F
import fastpool.nn
from fastpool.functional import _pooled, _with_indices

pytestmark = [
    pytest.mark.gpu,
    emulated.needs_toolchain,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device, or a torch that is built without CUDA"),
]

FLOATS = torch.float32, torch.float64, torch.bfloat16, torch.float16
CYCLES = 100_000_000
"""That a stream sleeps, some 50 ms: longer than the caller takes to launch on the wrong one."""


@pytest.fixture(autouse=True)
def exact():
    """torch's products of float32 are so."""
    with gpu.tf32(False):
        yield


@pytest.fixture(autouse=True)
def exponentials_are_the_devices(monkeypatch):
    """Soft pooling is compared with torch's on a GPU too: 2^x is off there by up to 2 roundings, torch's as well."""

    def soft(*given):
        return reference.soft(*(t.cuda() if isinstance(t, torch.Tensor) else t for t in given)).cpu()

    monkeypatch.setitem(reference.REFERENCE, "soft", soft)


def on_gpu(x, device=0):
    """x on a GPU at the same strides."""
    if not x.numel():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=f"cuda:{device}")
    extent = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return x.detach().as_strided((extent,), (1,)).to(f"cuda:{device}").as_strided(x.shape, x.stride())


def everything(call, x, gy):
    """y with what comes beside it, the gradient by x, and y's strides; as they come from x's device."""
    x = leaf(x)
    y, *more = found if isinstance(found := call(x), tuple) else (found,)
    return [t.detach().cpu() for t in (y, *more, *torch.autograd.grad(y, x, gy.to(y)))], y.stride()


def emulating():
    """The emulator, of the code that this GPU runs."""
    from fastpool.kernels.cuda.compile import capability

    return emulated.device(capability(torch.cuda.get_device_capability()))


def assert_as_emulated(call, x, **tolerance):
    """Values, gradients by integers, strides: those of a tensor on the GPU are those of the very PTX in the emulator."""
    with emulating():
        with torch.no_grad():
            y = call(x)
        gy = torch.randint(-4, 5, (y[0] if isinstance(y, tuple) else y).shape)
        expected, strides = everything(call, x, gy)
    found, as_found = everything(call, on_gpu(x), gy)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, **tolerance)
    assert as_found == strides


# Pooling


BITS = {"rtol": 0, "atol": 0}
CLOSE = {torch.float16: {"rtol": 2e-3, "atol": 2e-3}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}
"""By 2^x and the like, which PTX calls approximate; a rounding to 16 bits may then come out on the other side."""
APPROXIMATE = "soft", "lp", "lp_negative", "gem", "before", "before and after", "affine", "convolution and activation"
"""Kinds and CALLS; "affine" is torch's."""


def tolerance(name, dtype=torch.float32):
    return CLOSE.get(dtype, {}) if name in APPROXIMATE else BITS


@pytest.mark.parametrize("geometry", ["3x3s2p1", "asymmetric-dilated"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind, geometry):
    shape, w = GEOMETRIES[geometry]
    x = adversarial(shape, torch.float32, special=kind in SELECTING)
    for layout in LAYOUTS.values():
        call = _with_indices if kind in SELECTING else lambda x, op: _pooled(x, op, 7)
        assert_as_emulated(lambda x, call=call: call(x, op(kind, w)), layout(x), **tolerance(kind))


@pytest.mark.parametrize("geometry", WIDE)
@pytest.mark.parametrize("kind", ["max", "avg", "l2"])
def test_four_elements_at_a_time(kind, geometry):
    shape, w = WIDE[geometry]
    for name in ("contiguous", "channels_last"):
        assert_as_emulated(lambda x: _pooled(x, op(kind, w)), LAYOUTS[name](torch.randn(shape)), **BITS)


def weights(x, *shape):
    return torch.linspace(-1, 1, math.prod(shape)).to(x).view(shape)


def unpooled(x):
    """Each element at the second place of its window."""
    height, width = x.shape[2:]
    at = 2 * torch.arange(width) + 1 + 4 * width * torch.arange(height)[:, None]
    return F.max_unpool2d(x, at.to(x.device).expand_as(x), 2)


CALLS = {
    "max with indices": lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True),
    "avg": lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "lp": lambda x: F.lp_pool2d(x.abs() + 1, 3, 2),
    "soft": lambda x: F.soft_pool2d(x, 2),
    "stochastic": lambda x: _pooled(x, op("stochastic", GEOMETRIES["3x3s2p1"][1]), 7),
    "global max": F.global_max_pool2d,
    "global avg": F.global_avg_pool2d,
    "global l2": F.global_l2_pool2d,
    "adaptive max": lambda x: F.adaptive_max_pool2d(x, (3, 5), return_indices=True),
    "adaptive avg": lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
    "unpool": unpooled,
    "before": lambda x: F.max_pool2d(x, 3, 2, 1, before="gelu"),
    "after": lambda x: F.avg_pool2d(x, 2, after=torch.nn.LeakyReLU(0.3)),
    "before and after": lambda x: F.min_pool2d(x, 2, before=torch.nn.SiLU(), after="sigmoid"),
    "affine": lambda x: F.max_pool2d(x, 2, before="relu", affine=tuple(weights(x, 2, 4))),
    "convolution": lambda x: F.conv2d(x, weights(x, 8, 4, 3, 3), padding=1),
    "depthwise": lambda x: F.conv2d(x, weights(x, 4, 1, 3, 3), groups=4),
    "transposed": lambda x: F.conv_transpose2d(x, weights(x, 4, 2, 3, 3), stride=2),
    "convolution and activation": lambda x: F.conv2d(x, weights(x, 8, 4, 3, 3), weights(x, 8), after="tanh"),
}
"""name -> of an (N, 4, H, W) map, wherever it is."""


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
@pytest.mark.parametrize("name", CALLS)
def test_every_operation(name, layout, dtype):
    x = LAYOUTS[layout](torch.randn(2, 4, 9, 12).to(dtype))
    assert_as_emulated(CALLS[name], x, **tolerance(name, dtype))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool], ids=str)
def test_integers(dtype):
    x = adversarial((2, 4, 9, 12), dtype)
    for layout in LAYOUTS.values():
        with emulating():
            expected = F.max_pool2d(layout(x), 3, 2, 1, return_indices=True)
        for ours, theirs in zip(F.max_pool2d(on_gpu(layout(x)), 3, 2, 1, return_indices=True), expected, strict=True):
            assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("name", CALLS)
def test_of_nothing(name):
    """An empty batch, which launches nothing: a grid of no blocks is an error."""
    assert_as_emulated(CALLS[name], torch.empty(0, 4, 8, 12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_elements_that_are_not_aligned(layout, dtype):
    """Of maps that go by 16 bytes where they lie so; and a view of every second column."""
    memory = torch.randint(0, 9, (2 * 8 * 8 * 32 + 1,)).to(dtype)[1:]
    x = memory.view(2, 8, 8, 32) if layout == "contiguous" else memory.view(2, 8, 32, 8).permute(0, 3, 1, 2)
    there = memory.cuda().repeat(2)[1:][: memory.numel()].copy_(memory).as_strided(x.shape, x.stride(), 1)
    assert there.data_ptr() % 16
    for a, b in ((there, x), (there[..., ::2], x[..., ::2])):
        assert torch.equal(F.max_pool2d(a, 2).cpu().double(), T.max_pool2d(b.double(), 2))
        if dtype.is_floating_point:
            w = integers(16, 8, 1, 1, dtype=dtype)
            assert torch.equal(F.conv2d(a, w.cuda()).cpu(), T.conv2d(b.double(), w.double()).to(dtype))


hundred = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))


@hundred
@given(
    st.one_of(DRAWN[place].drawn for place in ("window", "fours", "1-d", "3-d", "bins", "map")),
    st.sampled_from(FLOATS),
    st.sampled_from(["max", "min", "avg", "l2"]),
    st.integers(0, 2**31),
)
def test_pooling_of_any_geometry(geometry, dtype, kind, seed):
    torch.manual_seed(seed)
    shape, window, layout = geometry
    call, of = _with_indices if kind in SELECTING else _pooled, asked(kind, shape, window)
    assert_as_emulated(lambda x: call(x, of), LAYOUTS[layout](torch.randint(-8, 9, shape).to(dtype)), **BITS)


@hundred
@given(*ASKED, st.integers(0, 2**31))
def test_convolution_of_any_geometry(geometry, place, weights_place, dtype, biased, seed):
    torch.manual_seed(seed)
    shape, weight, more = geometry
    x, w = (PLACES[p](integers(*s, dtype=CONVOLVED[dtype])) for p, s in ((place, shape), (weights_place, weight)))
    agree(x, w, integers(weight[0], dtype=CONVOLVED[dtype]) if biased else None, more)


# Convolution


def agree(x, w, b, more):
    """Of small integers, whose sums are exact: those on the GPU are the reference's."""
    gy = integers(*truth(x, w, b, None, **more)[0].shape, dtype=x.dtype)
    found = convolved(on_gpu(x), on_gpu(w), None if b is None else b.cuda(), gy.cuda(), **more)
    assert_equal([None if t is None else t.cpu() for t in found], truth(x, w, b, gy, **more), f"{x.shape} {w.shape} {more}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name, layout, dtype):
    shape, weight, more = CONVOLUTIONS[name]
    agree(LAYOUTS[layout](integers(*shape, dtype=dtype)), integers(*weight, dtype=dtype), integers(weight[0], dtype=dtype), more)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_convolution_and_pooling(layout):
    x, w, b = LAYOUTS[layout](torch.randn(4, 16, 32, 32)), torch.randn(64, 16, 3, 3) / 12, torch.randn(64)
    ours = F.conv_pool2d(on_gpu(x), w.cuda(), b.cuda(), padding=1, activation="relu", kernel_size=2)
    theirs = T.max_pool2d(T.conv2d(x, w, b, padding=1).relu(), 2)
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)


# Streams, graphs, threads, devices


GRAPHED = {
    "max": (lambda x, w: F.max_pool2d(x, 2), lambda x, w: T.max_pool2d(x, 2)),
    "avg": (lambda x, w: F.avg_pool2d(x, 3, 2, 1), lambda x, w: T.avg_pool2d(x, 3, 2, 1)),
    "global": (lambda x, w: F.global_avg_pool2d(x), lambda x, w: x.mean((2, 3), keepdim=True)),
    "before": (lambda x, w: F.max_pool2d(x, 2, before="relu"), lambda x, w: T.max_pool2d(x.relu(), 2)),
    "convolution": (lambda x, w: F.conv2d(x, w, padding=1), lambda x, w: T.conv2d(x, w, padding=1)),
}


def another():
    """A stream of its own, after what is there."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return stream


def test_on_another_stream():
    """Once before, as what compiles, and allocates for a stream, takes longer than that sleeps, or waits."""
    x, stream = torch.randn(8, 64, 112, 112, device="cuda"), another()
    with torch.cuda.stream(stream):
        F.max_pool2d(x + 1, 2)
        torch.cuda._sleep(CYCLES)
        y = F.max_pool2d(x + 2, 2)
        assert not stream.query(), "the launch has waited"
    stream.synchronize()
    assert torch.equal(y, T.max_pool2d(x + 2, 2))


@pytest.mark.parametrize("name", ["max", "convolution"])
def test_backward_is_on_the_stream_of_forward(name):
    """Which autograd's own thread makes its current one."""
    x, w, stream = torch.randn(4, 8, 64, 64, device="cuda", requires_grad=True), integers(8, 8, 3, 3).cuda(), another()
    ours, theirs = (functools.partial(call, w=w) for call in GRAPHED[name])
    expected = theirs(x)
    gy = torch.randint(-4, 5, expected.shape, device="cuda").float()

    def gradient(cycles, times):
        with torch.cuda.stream(stream):
            y = ours(x)
            torch.cuda._sleep(cycles)
            late = gy * times
        return torch.autograd.grad(y, x, late)[0]

    gradient(1, 1)
    torch.cuda.synchronize()
    found = gradient(CYCLES, 2)
    assert not stream.query(), "the launch has waited"
    torch.cuda.synchronize()
    torch.testing.assert_close(found, torch.autograd.grad(expected, x, 2 * gy)[0])


@pytest.mark.parametrize("name", GRAPHED)
def test_forward_and_backward_in_a_graph(name):
    """It sees its tensors, weights too, as they are when it is replayed."""
    x, w = (torch.randn(shape, device="cuda", requires_grad=True) for shape in ((4, 8, 16, 16), (8, 8, 3, 3)))
    leaves = (x, w) if name == "convolution" else (x,)
    ours, theirs = GRAPHED[name]

    def both(call):
        y = call(x, w)
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    stream = another()
    with torch.cuda.stream(stream):
        both(ours)  # compiles, which a capture may not
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both(ours)
    for _ in range(2):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            w.mul_(2)
        graph.replay()
        for one, other in zip(found, both(theirs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_in_a_thread_that_has_not_called_torch():
    """Whose context is nobody's."""
    x, found = torch.randn(4, 8, 32, 32, device="cuda"), []
    thread = threading.Thread(target=lambda: found.append(F.max_pool2d(x, 2)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], T.max_pool2d(x, 2))


def test_under_torch_compile():
    model = torch.nn.Sequential(fastpool.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), fastpool.nn.MaxPool2d(2)).cuda()
    x = torch.randn(2, 3, 16, 16, device="cuda")
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_on_the_second_device():
    """While the first is current; backward too, in a thread of that device."""
    x = leaf(on_gpu(torch.randn(4, 8, 32, 32), 1))
    y = F.max_pool2d(x, 2)
    (gx,) = torch.autograd.grad(y.sum(), x)
    assert torch.cuda.current_device() == 0
    assert torch.equal(y, T.max_pool2d(x, 2))
    assert torch.equal(gx, torch.autograd.grad(T.max_pool2d(x, 2).sum(), x)[0])


def test_a_forked_child_is_refused_by_torch():
    """Before anything is launched."""
    code = """
import os, torch, fastpool.functional as F
x = torch.ones(1, 2, 8, 8, device="cuda")
F.max_pool2d(x, 2)
child = os.fork()
if child == 0:
    try:
        F.max_pool2d(x, 2)
    except RuntimeError as error:
        os._exit(7 if "spawn" in str(error) else 1)
    os._exit(2)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(code) == "7"


def test_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    x = torch.zeros(3, 1, 32768, 32768, dtype=torch.uint8, device="cuda")
    x[2, 0, -1, -1] = 7
    y = F.max_pool2d(x, 2)
    assert y[2, 0, -1, -1] == 7
    assert y.sum() == 7


# The code


def test_what_the_driver_has_loaded(tmp_path):
    """Of the code that runs, assembled for this very GPU: registers (in sm_120's up to 36 where CODE's generations have 32), no stack, no
    spills, no double precision."""
    from cuda.bindings import driver
    from fastpool.kernels.cuda import launch

    cc, own, codes = torch.cuda.get_device_capability(), launch.Driver(), {}
    torch.zeros(1, device="cuda")
    _, device = driver.cuDeviceGet(0)
    for call in CALLED:
        for name, kernel in launched_by(call).items():
            handle = own.loaded(kernel, 0).handle

            def attribute(which, handle=handle):
                error, value = driver.cuKernelGetAttribute(
                    getattr(driver.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{which}"), handle, device
                )
                assert error == 0, error
                return value

            assert attribute("LOCAL_SIZE_BYTES") == 0, (call, name)
            most = max(CODE[name][call].registers) if call in CODE.get(name, ()) else 128
            assert attribute("NUM_REGS") <= most + 8 * (cc not in CAPABILITIES), (call, name)
            assert attribute("BINARY_VERSION") == 10 * cc[0] + cc[1], (call, name)
            text = kernel.ptx(launch.capability(cc))
            codes[call, name] = sections(launch.machine_code(text, cc).code)[launch.entry(text)]
    for which, instructions in zip(codes, disassembled(list(codes.values()), cc, tmp_path), strict=True):
        assert len(instructions) > 10, which
        assert not any(re.match(r"(LDL|STL|LD|ST|D(ADD|MUL|FMA|SETP|MNMX))\b", i) or ".F64" in i for i in instructions), which


SANITIZED = """
import torch, fastpool.functional as F
from fastpool import tiny

def there(*shape):
    return torch.randn(shape).to(dtype).cuda()

with tiny.kernels_only():
    for layout in (torch.contiguous_format, torch.channels_last):
        for dtype in (torch.float32, torch.float16):
            x = torch.randn(2, 16, 9, 12).to(dtype).contiguous(memory_format=layout).cuda().requires_grad_()
            w, b, depthwise, transposed = there(32, 16, 3, 3).requires_grad_(), there(32), there(16, 1, 3, 3), there(16, 8, 3, 3)
            y, at = F.max_pool2d(x, 2, return_indices=True)
            for found in (
                y,
                F.max_pool2d(x, 3, 2, 1),
                F.avg_pool2d(x, 3, 1, 1),
                F.stochastic_pool2d(x, 2),
                F.soft_pool2d(x, 2),
                F.global_max_pool2d(x),
                F.global_avg_pool2d(x),
                F.adaptive_avg_pool2d(x, 5),
                F.max_unpool2d(y, at, 2, output_size=(9, 12)),
                F.max_pool2d(x, 2, before="gelu"),
                F.conv2d(x, depthwise, groups=16),
                F.conv_transpose2d(x, transposed),
            ):
                torch.autograd.grad(found, x, there(*found.shape), retain_graph=True)
            found = F.conv2d(x, w, b, padding=1)
            torch.autograd.grad(found, (x, w), there(*found.shape))
            with torch.no_grad():
                F.conv_pool2d(x, w, b, padding=1, activation="relu", kernel_size=2)
torch.cuda.synchronize()
print("finished")
"""
CLEAN = {
    "memcheck": "ERROR SUMMARY: 0 errors",
    "initcheck": "ERROR SUMMARY: 0 errors",
    "synccheck": "ERROR SUMMARY: 0 errors",
    "racecheck": "RACECHECK SUMMARY: 0 hazards displayed",
}


@pytest.mark.parametrize("tool", CLEAN)
def test_compute_sanitizer_finds_nothing(tool):
    """Out of bounds, read before written, barriers, races in shared memory; each tensor is an allocation of the driver's, as one of torch's
    holds several."""
    paths = (os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH"))
    sanitizer = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *(f"{path}/bin" for path in paths if path)]))
    if sanitizer is None:
        pytest.skip("compute-sanitizer, of NVIDIA's CUDA toolkit, is neither in PATH nor in CUDA_HOME")
    done = subprocess.run(
        [sanitizer, "--tool", tool, sys.executable, "-c", SANITIZED],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "finished" in done.stdout, done.stdout + done.stderr
    assert CLEAN[tool] in done.stdout, done.stdout


# What the emulator runs, by launches on the device


@pytest.fixture
def emulator(monkeypatch):
    """In the emulator's place, for a test that asks for it or runs on it."""
    for name, geometry in WIDE.items():
        monkeypatch.setitem(GEOMETRIES, f"wide {name}", geometry)
    with emulated.device(emulator=staged.Staged()) as found:
        yield found
        assert found.launches


@pytest.fixture
def emulators(monkeypatch):
    """Of tests that make their own."""
    monkeypatch.setattr(emulated, "Emulator", staged.Staged)


def again(module, *fixtures):
    """The module's tests, but for those of seeded bugs: what is to find them is the emulator."""
    tests = {name: staticmethod(test) for name, test in vars(module).items() if name.startswith("test_") and "is_caught" not in name}
    return pytest.mark.usefixtures(*fixtures)(type("Again", (), tests))


TestPooling = again(test_cuda, "emulator")
TestConvolution = again(test_cuda_conv, "emulator")
TestGeometries = again(test_cuda_geometry, "emulators")
TestFourElementsAtATime = again(test_cuda_wide, "emulators")
