"""Convolution under torch.compile and export, transforms, autocast, marks on tensors; in threads and forks; in memory and machine code."""

import ctypes
import mmap
import os
import re
import threading
import types

import pytest
import torch
import torch.nn.functional as T
from processes import LAYERS, run
from test_code import DOUBLE
from torch import nn

import fastpool
import fastpool.functional as F
import fastpool.nn as fast
from fastpool import convolution, functional, library


@pytest.fixture
def few_kernels(small):
    small("model", 1 << 20)


@pytest.fixture
def compiled():
    """torch.compile by the backend that traces forward and backward but needs no C++ compiler."""
    torch.compiler.reset()
    yield lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.compiler.reset()


def integers(*shape):
    return torch.randint(-4, 5, shape).float()


CALLS = {
    "plain": lambda x, w, b: F.conv2d(x, w, b, 1, 1),
    "stride-groups": lambda x, w, b: F.conv2d(x[:, :2], w[:, :1], b, 2, (1, 0), 1, 2),
    "same-dilated": lambda x, w, b: F.conv2d(x, w, None, padding="same", dilation=2),
    "after": lambda x, w, b: F.conv2d(x, w, b, after="relu6"),
    "after-slope": lambda x, w, b: F.conv2d(x, w, b, after=nn.LeakyReLU(0.5)),
    "affine": lambda x, w, b: F.conv2d(x, w, b, affine=(b + 1, b)),
    "unbatched": lambda x, w, b: F.conv2d(x[0], w, b),
    "1d": lambda x, w, b: F.conv1d(x[:, :, 0], w[:, :, 0], b),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CALLS)
def test_one_graph_with_eagers_results(name, layout, compiled, few_kernels):
    call = CALLS[name]
    tensors = integers(2, 3, 8, 9).contiguous(memory_format=layout), integers(4, 3, 3, 3), integers(4)
    ours, eager = ([t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in tensors] for _ in range(2))
    found, expected = compiled(call)(*ours), call(*eager)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    gy = integers(*found.shape)
    found.backward(gy)
    expected.backward(gy)
    for a, b in zip(ours, eager, strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)
    with torch.no_grad():
        assert torch.equal(compiled(call)(*tensors), call(*tensors))


def test_a_converted_model(compiled, few_kernels):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 5, 2))
    x = torch.randn(2, 3, 10, 10)
    expected = model(x)
    fastpool.convert(model, conv=True)
    torch.testing.assert_close(compiled(model)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.export.export(model.eval(), (x,)).module()(x), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("asked", [(1, 1, 1, 1), (2, 0, 2, 1), (1, "same", 1, 3)], ids=str)
def test_operators_keep_torchs_rules(asked, layout, few_kernels):
    stride, padding, dilation, groups = asked
    op = convolution.asked("conv2d", 2, stride, padding, dilation, groups)
    pad = [0, 0] if padding == "same" else list(op.padding)
    more = 2, list(op.stride), pad, padding == "same", list(op.dilation), groups
    x = torch.randn(2, 3, 7, 8).contiguous(memory_format=layout).requires_grad_()
    w, b = torch.randn(6, 3 // groups, 3, 3, requires_grad=True), torch.randn(6, requires_grad=True)
    for bias in (b, None):
        torch.library.opcheck(torch.ops.fastpool.convolve, (x, w, bias, *more))
    y = library.convolve(x, w, b, op)
    assert torch.equal(y, F.conv2d(x, w, b, stride, padding, dilation, groups))
    rules = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastpool.convolve_input, (torch.randn_like(y), x.detach(), w.detach(), *more), test_utils=rules)
    torch.library.opcheck(torch.ops.fastpool.convolve_weight, (torch.randn_like(y), x.detach(), w.detach(), *more), test_utils=rules)


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad, torch.func.functionalize], ids=["vmap", "grad", "functionalize"])
@pytest.mark.parametrize("conv", [F.conv2d, F.conv_transpose2d], ids=["conv2d", "conv_transpose2d"])
def test_functional_transforms_are_refused(transform, conv):
    x, w = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3)
    with pytest.raises(NotImplementedError, match=rf"{conv.__name__}: torch\.func"):
        transform(lambda t: conv(t, w).sum())(x)
    with pytest.raises(NotImplementedError, match=rf"{conv.__name__}: torch\.func"):
        transform(lambda t: conv(x, t).sum())(w if transform is not torch.vmap else w[None])


def test_forward_mode_is_refused():
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        F.conv2d(forward_ad.make_dual(torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4)), torch.rand(1, 1, 2, 2))


def test_tensors_without_numbers_in_memory(few_kernels):
    """Fake tensors have a shape only, zero and negated views a mark: none may be read as it lies."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert F.conv2d(torch.rand(1, 2, 8, 8), torch.rand(3, 2, 3, 3), padding=1).shape == (1, 3, 8, 8)
    zero = torch._efficientzerotensor(1, 2, 8, 8)
    x, w, b = integers(1, 2, 8, 8), integers(3, 2, 3, 3), integers(3)
    assert torch.equal(F.conv2d(zero, w, b), b.view(-1, 1, 1).expand(1, 3, 6, 6))
    negated = [torch.complex(t, -t).conj().imag for t in (x, w, b)]
    assert all(t.is_neg() for t in negated)
    for k in range(3):
        given = [n if i == k else t for i, (t, n) in enumerate(zip((x, w, b), negated, strict=True))]
        assert torch.equal(F.conv2d(*given), T.conv2d(*(t.clone() for t in given)))
    scale, shift = negated[2], integers(3)
    expected = T.conv2d(x, w) * scale.clone().view(-1, 1, 1) + shift.view(-1, 1, 1)
    assert torch.equal(F.conv2d(x, w, affine=(scale, shift)), expected)
    leaves = [t.requires_grad_() for t in (x, w)]
    assert torch.equal(F.conv2d(leaves[0], leaves[1], negated[2]), T.conv2d(x, w, negated[2].clone()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_autocast(layout, few_kernels):
    """To bfloat16, as torch; float64 stays; gradients come back as the parameters are."""
    x, w, b = integers(2, 3, 8, 9).contiguous(memory_format=layout), integers(4, 3, 3, 3), integers(4)
    leaves, others = ([t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, w, b)] for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        y, z = F.conv2d(*leaves), T.conv2d(*others)
        scaled = F.conv2d(x, w, b, affine=(b, b))
        wide = F.conv2d(x.double(), w.double())
        module = fast.Conv2d(3, 4, 3)
        assert module(x).dtype == torch.bfloat16
    assert y.dtype == z.dtype == scaled.dtype == torch.bfloat16
    assert wide.dtype == torch.float64
    assert torch.equal(y, z)
    y.sum().backward()
    z.sum().backward()
    for a, c in zip(leaves, others, strict=True):
        assert a.grad.dtype == torch.float32
        torch.testing.assert_close(a.grad, c.grad, rtol=2**-7, atol=0)
    with torch.autocast("cpu", enabled=False):
        assert F.conv2d(x, w, b).dtype == torch.float32


def test_autocast_of_a_gpu_is_not_the_cpus():
    """``torch.autocast("cuda")`` turns itself off where there is no GPU."""
    x, w = torch.randn(1, 3, 8, 9), torch.randn(4, 3, 3, 3)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert functional._autocasts(types.SimpleNamespace(is_cuda=True))
        assert F.conv2d(x, w).dtype == torch.float32
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_gradients_are_computed_in_autograds_thread_and_honour_inference_mode(few_kernels):
    x, w, found = integers(1, 3, 8, 9), integers(4, 3, 3, 3), []

    def work():
        with torch.inference_mode():
            found.append(F.conv2d(x, w))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert torch.equal(found[0], T.conv2d(x, w))


# Processes

SAME = """
import os, threading, torch, torch.nn.functional as T, fastpool.functional as F
torch.set_num_threads(2)
# Enough for fastpool's threads; torch's are not woken in a forked child, where the truth is the parent's.
x, w = torch.randint(-4, 5, (1, 16, 14, 14)).float(), torch.randint(-4, 5, (32, 16, 3, 3)).float()
gy = torch.randint(-4, 5, (1, 32, 14, 14)).float()

def convolved(f):
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    y = f(*leaves, padding=1)
    return y.detach(), *torch.autograd.grad(y, leaves, gy)

truth = convolved(T.conv2d)

def same():
    return all(map(torch.equal, convolved(F.conv2d), truth))
"""


@pytest.mark.parametrize("layer", LAYERS)
def test_python_threads_at_once(layer):
    """Four Python threads, forward and backward, on two threads each."""
    code = (
        SAME
        + """
wrong = []
def work():
    torch.set_num_threads(2)
    for _ in range(20):
        if not same() or torch.get_num_threads() != 2:
            wrong.append(1)
workers = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in workers]
[t.join() for t in workers]
print(wrong)
"""
    )
    assert run(code, NUMBA_THREADING_LAYER=layer) == "[]"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("before", ["same()", ""], ids=["after", "before-the-first"])
def test_a_forked_child_works(before):
    code = f"""
{SAME}
torch.randn(1000, 1000) @ torch.randn(1000, 1000)
{before}
child = os.fork()
if child == 0:
    os._exit(0 if same() else 1)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), same())
"""
    assert run(code, PYTHONWARNINGS="ignore::DeprecationWarning") == "0 True"


def test_modules_in_threads(few_kernels):
    """One module's packed weights, asked for by several Python threads at once."""
    module, x, wrong = fast.Conv2d(3, 4, 3).eval(), integers(1, 3, 8, 9), []

    def work():
        with torch.no_grad():
            wrong.extend(k for k in range(50) if not torch.equal(module(x), F.conv2d(x, module.weight, module.bias)))

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


# Memory


def at_the_edges(*shapes):
    """In a process of its own: tensors, each at the end of a page before one that may not be touched, or at the start of one after."""
    protect, page, found = ctypes.CDLL(None, use_errno=True).mprotect, mmap.PAGESIZE, []
    for shape, last in shapes:
        count = 4 * torch.Size(shape).numel()
        pages = -(-count // page)
        memory = mmap.mmap(-1, (pages + 2) * page)
        origin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for forbidden in origin, origin + (pages + 1) * page:
            assert protect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0) == 0, ctypes.get_errno()
        offset = page + (pages * page - count if last else 0)
        found.append(torch.frombuffer(memory, dtype=torch.float32, count=count // 4, offset=offset).view(shape))
    return found


EDGES = """
import sys; sys.path.insert(0, "tests")
import torch, test_conv_compile as tests, torch.nn.functional as T, fastpool.functional as F
from fastpool import backend
for last in (True, False):
    for shape, weight, more in (
        ((1, 3, 9, 21), (5, 3, 3, 3), {"padding": 1}),
        ((1, 16, 5, 13), (8, 16, 1, 1), {}),
    ):
        out = T.conv2d(torch.empty(shape), torch.empty(weight), **more).shape
        for lies in (False, True):
            def given(shape, lies=lies):
                order = (0, 2, 3, 1) if lies else (0, 1, 2, 3)
                (t,) = tests.at_the_edges(([shape[i] for i in order], last))
                return (t.permute(0, 3, 1, 2) if lies else t).copy_(torch.randint(-4, 5, shape))
            x, w, b, gy = given(shape), given(weight, False), given((weight[0], 1, 1, 1), False).flatten(), given(out)
            def empty(t, shape, strides, dtype=None):
                if len(shape) == 1:  # packed weights, and sums
                    return given((*shape, 1, 1, 1), False).flatten()
                return given(shape, lies and tuple(shape) != weight)
            backend.empty = empty
            leaves = [t.requires_grad_() for t in (x, w, b)]
            y = F.conv2d(*leaves, **more)
            found = torch.autograd.grad(y, leaves, gy)
            z = T.conv2d(*leaves, **more)
            assert torch.equal(y, z) and all(map(torch.equal, found, torch.autograd.grad(z, leaves, gy)))
print("untouched")
"""


def test_nothing_is_read_or_written_beside_tensors():
    """Inputs and results at the very end of a page before one that may not be touched, and at the very start."""
    assert run(EDGES) == "untouched"


# Machine code

PROGRAM = """
import torch
import fastpool.functional as F
from fastpool.kernels import compile

workers, kept = [], compile.Worker
compile.Worker = lambda *parts: workers.append(kept(*parts)) or workers[-1]

for shape, weight, layout, padding in (
    ((1, 64, 14, 14), (64, 64, 3, 3), torch.channels_last, 1),
    ((1, 256, 7, 7), (48, 256, 1, 1), torch.channels_last, 0),
    ((1, 4, 6, 64), (8, 4, 3, 3), torch.contiguous_format, 1),
    ((1, 8, 24, 24), (16, 8, 1, 1), torch.contiguous_format, 0),
):
    x = torch.rand(shape).contiguous(memory_format=layout).requires_grad_()
    F.conv2d(x, torch.rand(weight).requires_grad_(), torch.rand(weight[0]), padding=padding, after="leaky_relu").sum().backward()

with open({listing!r}, "w") as file:
    for worker in workers:
        print("WORKER", worker.name, file=file)
        print(worker.library.get_asm_str(), file=file)
print("done")
"""


def inner_loops(code):
    """Bodies of the loops that hold no other label: (lines), from a label to the jump back to it."""
    lines, found = code.splitlines(), []
    labels = {line.split(":")[0]: at for at, line in enumerate(lines) if re.match(r"\.L\w+:", line)}
    for at, line in enumerate(lines):
        jump = re.match(r"\tj\w+\t(\.L\w+)", line)
        if jump and labels.get(jump[1], at) < at:
            body = lines[labels[jump[1]] + 1 : at]
            if not any(re.match(r"\.L\w+:", other) for other in body):
                found.append(body)
    return found


@pytest.fixture(scope="module")
def listings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("code")
    run(PROGRAM.format(listing=str(folder / "listing")), FASTPOOL_CACHE_DIR=str(folder / "cache"))
    parts = (folder / "listing").read_text().split("WORKER ")[1:]
    return [(name, code) for name, _, code in (part.partition("\n") for part in parts)]


MOVES = {"weights.pack", "weight_gradient.ordered"}
"""Kernels that multiply nothing."""


def test_float32_kernels_hold_no_float64(listings):
    sums = {"channel_lanes.forward", "pixel_lanes.forward", "weight_gradient.backward", "plane_products.backward"}
    assert {name for name, _ in listings} == sums | MOVES
    for name, code in listings:
        found = re.findall(f".*(?:{DOUBLE}).*", code)
        assert not found, f"{name}: {found[:3]}"


def test_a_tile_stays_in_registers(listings):
    """The loop with the most multiply-adds moves no register to or from the stack."""
    for name, code in listings:
        if name in MOVES:
            continue
        loops = [(sum("vfmadd" in line for line in body), body) for body in inner_loops(code)]
        count, body = max(loops, key=lambda loop: loop[0])
        assert count >= 8, name
        spills = [line for line in body if re.search(r"\tv?mov[au]p[sd]\s.*\(%[re](sp|bp)\)", line)]
        assert not spills, f"{name}: {spills[:3]}"
