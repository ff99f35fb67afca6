"""What launches CUDA kernels on a GPU (kernels/cuda/launch.py), without one: by stubs of cuda.core, and by the true one over a stub of the
driver (driver_stub.c)."""

import ctypes
import shutil
import subprocess
import sys
import types

import emulated
import numpy as np
import pytest
import staged
import torch
import torch.nn.functional as T
from cases import LAYOUTS
from fastpool.bench import cuda_model
from processes import ROOT, run
from test_pooling import leaf

import fastpool.functional as F
from fastpool import runtime

pytestmark = emulated.needs_toolchain

CONTEXTS = {0: "context 0", 1: "context 1"}


class Stub:
    """In the places of cuda.core and of cuda.bindings.driver: writes down what it is asked, and has nothing else to ask for."""

    def __init__(self):
        self.said, self.contexts, self.pushed, self.fails = [], ["another"], [], {}
        core, driver, bindings = types.ModuleType("cuda.core"), types.ModuleType("driver"), types.ModuleType("cuda.bindings")
        vars(core).update(
            Device=lambda index: types.SimpleNamespace(compute_capability=((7, 5), (9, 0))[index]),
            ProgramOptions=lambda arch: arch,
            Program=lambda text, kind, arch: types.SimpleNamespace(compile=lambda target: self.assembled(text, kind, arch, target)),
            LaunchConfig=lambda grid, block: self.made("config", (grid, block)),
            Stream=types.SimpleNamespace(from_handle=lambda handle: self.made("stream", handle)),
            launch=self.launch,
        )
        vars(driver).update(
            cuDeviceGet=lambda index: (0, index),
            cuDevicePrimaryCtxRetain=lambda device: (0, CONTEXTS[device]),
            cuCtxGetCurrent=lambda: (0, self.contexts[-1]),
            cuCtxPushCurrent=self.push,
            cuCtxPopCurrent=lambda: (0, self.contexts.pop()),
            cuDriverGetVersion=lambda: (0, 12040),
        )
        bindings.driver, bindings.__version__ = driver, "13.5.0"
        self.modules = {
            "cuda": types.SimpleNamespace(core=core, bindings=bindings),
            "cuda.core": core,
            "cuda.bindings": bindings,
            "cuda.bindings.driver": driver,
        }

    def fail(self, where):
        if where in self.fails:
            raise self.fails[where]

    def made(self, what, of):
        self.said.append(f"make {what}")
        return of

    def assembled(self, text, kind, arch, target):
        self.fail("assemble")
        assert (kind, target) == ("ptx", "cubin")

        def get_kernel(name):
            self.fail("load")
            self.said.append(("load", name, text, arch, self.contexts[-1]))
            return f"{name} of {arch}"

        return types.SimpleNamespace(get_kernel=get_kernel)

    def push(self, context):
        self.pushed.append(context)
        self.contexts.append(context)
        return (0,)

    def launch(self, stream, config, code, *arguments):
        self.said.append((stream, config, code, arguments, self.contexts[-1]))
        self.fail("launch")


class Kernel:
    def __init__(self, name, error=None):
        self.name, self.error = name, error

    def ptx(self, cc):
        if self.error:
            raise self.error
        return f"// {cc}\n.visible .entry {self.name}(.param .u64 x)"


@pytest.fixture
def stub(monkeypatch):
    """The stub, with a Driver of its own; streams are torch's."""
    from fastpool.kernels.cuda import launch

    found = Stub()
    for name, module in found.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(launch, "stream_of", None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=streams[device]))
    streams = found.streams = {0: 0, 1: 71}
    runtime.hand_over_streams.__wrapped__()
    with launch.use(launch.Driver()):
        found.driver = launch._launcher
        yield found


def test_a_launch_is_of_the_kernels_code_for_the_device_on_torchs_current_stream(stub):
    from fastpool.kernels.cuda import launch

    kernel, arguments = Kernel("k"), [140737488355328, np.uint32(7), np.float32(0.1)]
    launch.launch(kernel, 3, 256, arguments, 1)
    *made, (stream, config, code, given, context) = stub.said
    assert made == [("load", "k", kernel.ptx((9, 0)), "sm_90", "context 1"), "make stream", "make config"]
    assert (stream, config, code, context) == (71, (3, 256), "k of sm_90", "context 1")
    assert [type(a) for a in given] == [int, np.uint32, np.float32]
    assert list(given) == arguments
    assert stub.contexts == ["another"]


def test_what_is_made_once(stub):
    """Code of each kernel on each device, streams and grids; which stream is current is asked at each launch."""
    from fastpool.kernels.cuda import launch

    kernels = Kernel("a"), Kernel("b")
    for _ in range(2):
        for kernel in kernels:
            for device in (0, 1):
                launch.launch(kernel, 3, 256, [1], device)
    assert [(name, arch) for what, name, _, arch, _ in (s for s in stub.said if s[0] == "load")] == [
        ("a", "sm_75"), ("a", "sm_90"), ("b", "sm_75"), ("b", "sm_90"),
    ]  # fmt: skip
    assert stub.said.count("make stream") == stub.said.count("make config") == 2
    stub.said.clear()
    stub.streams[1] = 72
    for blocks in (3, 4):
        launch.launch(kernels[0], blocks, 256, [1], 1)
    code = "a of sm_90"
    assert stub.said == [
        "make stream", (72, (3, 256), code, (1,), "context 1"), "make config", (72, (4, 256), code, (1,), "context 1"),
    ]  # fmt: skip


@pytest.mark.parametrize("current", ["context 1", "context 0", None])
@pytest.mark.parametrize("fails", [False, True])
def test_the_context_is_the_devices_and_then_the_callers_again(stub, current, fails):
    """Pushed only where another is current: not in torch's own threads."""
    from fastpool.kernels.cuda import launch

    kernel = Kernel("k")
    launch.launch(kernel, 1, 32, [], 1)
    stub.pushed.clear()
    stub.contexts[:] = [current]
    if fails:
        stub.fails["launch"] = ValueError("launch")
        with pytest.raises(ValueError, match="launch"):
            launch.launch(kernel, 1, 32, [5, 6], 1)
    else:
        launch.launch(kernel, 1, 32, [5, 6], 1)
    assert stub.said[-1] == (71, (1, 32), "k of sm_90", (5, 6), "context 1")
    assert stub.contexts == [current]
    assert stub.pushed == ([] if current == "context 1" else ["context 1"])


class DynamicLibNotFoundError(RuntimeError):
    """As cuda.pathfinder's."""


EXTRA, NEWER = (
    r"pip install 'fastpool\[cuda\]'",
    r"driver, of CUDA 12.4, does not take code of CUDA 13.5 \({}\): install a driver of CUDA 13",
)


@pytest.mark.parametrize(
    ("where", "error", "raised", "said"),
    [
        ("compile", ModuleNotFoundError("No module named 'numba.cuda.core'"), ImportError, EXTRA),
        ("compile", DynamicLibNotFoundError("no libnvvm\nin any of"), ImportError, EXTRA + r" \(no libnvvm\)$"),
        ("assemble", DynamicLibNotFoundError("no libnvJitLink"), ImportError, EXTRA),
        ("assemble", DynamicLibNotFoundError("an NVIDIA driver library"), DynamicLibNotFoundError, "^an NVIDIA driver library$"),
        ("assemble", RuntimeError("function cuLinkCreate_v2 is not found"), RuntimeError, NEWER.format("function .* not found")),
        ("load", Exception("CUDA_ERROR_NO_BINARY_FOR_GPU: none"), RuntimeError, NEWER.format("CUDA_ERROR_NO_BINARY_FOR_GPU")),
        ("load", Exception("CUDA_ERROR_UNSUPPORTED_PTX_VERSION: "), RuntimeError, NEWER.format("CUDA_ERROR_UNSUPPORTED_PTX_VERSION")),
        ("load", MemoryError("CUDA_ERROR_OUT_OF_MEMORY: all of it"), MemoryError, "^CUDA_ERROR_OUT_OF_MEMORY: all of it$"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalpha() else type(value).__name__,
)
def test_what_is_missing_or_too_old_is_said(stub, where, error, raised, said):
    from fastpool.kernels.cuda import launch

    stub.fails[where] = error
    kernel = Kernel("k", error if where == "compile" else None)
    for _ in range(2):
        with pytest.raises(raised, match=said):
            launch.launch(kernel, 1, 32, [], 0)
    assert stub.contexts == ["another"]


@pytest.mark.parametrize("name", ["cuda.core", "cuda.bindings"])
def test_without_cuda_core(stub, name, monkeypatch):
    from fastpool.kernels.cuda import launch

    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(sys.modules["cuda"], name.partition(".")[2])
    with pytest.raises(ImportError, match=EXTRA):
        launch.launch(Kernel("k"), 1, 32, [], 0)


@pytest.mark.parametrize("launched", [False, True])
def test_a_fork_of_a_process_that_launched_says_so(stub, launched):
    """One of a process that did not may launch."""
    from fastpool.kernels.cuda import launch

    kernel = Kernel("k")
    if launched:
        launch.launch(kernel, 1, 32, [], 0)
    for _ in range(2):  # forks of forks
        stub.driver.forked()
    if launched:
        with pytest.raises(RuntimeError, match="by multiprocessing's 'spawn'"):
            launch.launch(kernel, 1, 32, [], 0)
    else:
        launch.launch(kernel, 1, 32, [], 0)


THROUGH_CUDA_CORE = """
import ctypes, os
import numpy as np, pytest
from fastpool.kernels.cuda import launch, pooling
from fastpool.kernels.geometry import Geometry, dense_strides
from fastpool.kernels.pool import KINDS
from fastpool.window import Window

stub = ctypes.CDLL("libcuda.so.1")
stub.make_current.argtypes = [ctypes.c_void_p]
said, sizes, values = ((ctypes.c_char * n).in_dll(stub, name) for n, name in ((1 << 16, "said"), (1024, "sizes"), (4096, "parameters")))

class Recorder:
    def launch(self, *given):
        self.given = given

window = Window((1, 3, 3), (1, 2, 2), (0, 1, 1), (1, 1, 1), False)
geometry = Geometry("float32", (2, 3, 1, 9, 11), dense_strides(3, (1, 9, 11), False), False, window)
plan = pooling.on(1).forward(KINDS["stochastic"], geometry, "uint8", True)
run = lambda: plan.run((1 << 47, 2 << 44, 0), 1, 5, 6)
recorder = Recorder()
with launch.use(recorder):
    run()
kernel, blocks, threads, arguments, _ = recorder.given
given = [np.int64(a) if isinstance(a, int) else a for a in arguments]
np.frombuffer(sizes, np.int32)[: len(given)] = [a.itemsize for a in given]

launch.stream_of = lambda device: [0, 77][device]
stub.make_current(None)
for context in (None, 0x2000):
    stub.make_current(context)
    run()
    assert bytes(values).startswith(b"".join(a.tobytes() for a in given))
assert (ctypes.c_char * 4).in_dll(stub, "code").raw == b"\\x7fELF"

ctypes.c_int.in_dll(stub, "refused").value = 209
with pytest.raises(RuntimeError, match="driver, of CUDA 12.4, does not take code of CUDA .*NO_BINARY_FOR_GPU"):
    launch.Driver().launch(kernel, blocks, threads, arguments, 1)

child = os.fork()
if child == 0:
    try:
        run()
    except RuntimeError as error:
        os._exit(7 if "'spawn'" in str(error) else 1)
    os._exit(2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

grid = f"launch {blocks} 1 1, {threads} 1 1 on"
print(said.value.decode().splitlines() == [
    "push 0x2000", "load", "pop", "push 0x2000", f"{grid} 0x4d of 0x2000", "pop", f"{grid} 0x4d of 0x2000", "push 0x2000", "load", "pop",
])
"""


def test_through_cuda_core(tmp_path):
    """Of the true package over a stub of the driver: each argument's bytes in their order, as the kernel takes them; grid, stream and
    context; no other call of the driver: none that waits or allocates is there; and a fork, which has no driver."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler, which makes the driver's stub")
    library = tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, ROOT / "tests" / "driver_stub.c", "-ldl"], check=True)
    assert run(THROUGH_CUDA_CORE, LD_LIBRARY_PATH=str(tmp_path)) == "True"


class StagedOnTheEmulator(staged.Staged):
    """Copies go to other memory of the CPU, which alone the emulator knows."""

    def __init__(self, cc=(8, 0)):
        super().__init__()
        self.cc = cc

    def _allocated(self, size):
        self.emulator = getattr(self, "emulator", None) or cuda_model.Emulator(self.cc)
        found = torch.empty(size, dtype=torch.uint8)
        self.emulator.know(found, staged._address_of(found))
        return found

    def _run(self, kernel, blocks, threads, arguments):
        self.emulator.launch(kernel, blocks, threads, arguments, 0)
        del self.emulator


@pytest.mark.parametrize("layout", ["contiguous", "cropped", "channels_last"])
def test_tensors_are_staged_on_a_device_and_back(layout):
    """What `pytest -m gpu` runs the emulator's tests by: views, two tensors in one launch, what is saved, images one by one."""
    x = LAYOUTS[layout](torch.randn(2, 4, 7, 9))
    a, b = leaf(x), leaf(x)
    with emulated.device(emulator=StagedOnTheEmulator()) as found:
        (y, at), one = F.max_pool2d(a, 3, 2, 1, return_indices=True), F.max_pool2d(x[1], 3, 2, 1)
        gy = torch.randn_like(y)
        y.backward(gy)
    expected, expected_at = T.max_pool2d(b, 3, 2, 1, return_indices=True)
    expected.backward(gy)
    assert all(map(torch.equal, (y, at, one, a.grad), (expected, expected_at, expected[1], b.grad)))
    assert len(found.launches) == 4


class Kernel2:
    """Of two addresses."""

    name, converters = "two", (int, int)


class Poking(StagedOnTheEmulator):
    """What it launches writes bytes as far from its first address as it is told."""

    def __init__(self, *places):
        super().__init__()
        self.places = places

    def _run(self, kernel, blocks, threads, arguments):
        self.given = arguments
        for place in self.places:
            ctypes.c_uint8.from_address(arguments[0] + place).value = 7


def test_of_two_addresses_in_one_tensor_there_is_one_copy():
    """Of a view's the whole tensor, if that is known."""
    x, found = torch.zeros(12, dtype=torch.uint8), Poking(-4, 0, 7)
    for t in (x[4:6], x, x[4:8]):
        found.know(t, t.data_ptr())
    found.launch(Kernel2, 1, 1, [x[4:].data_ptr(), x[9:].data_ptr()], 0)
    assert found.given[1] - found.given[0] == 5
    assert found.given[0] % staged.ALIGNED == x[4:].data_ptr() % staged.ALIGNED
    assert x.tolist() == [7, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 7]


@pytest.mark.parametrize(("place", "where"), [(-1, "before"), (12, "behind")])
def test_a_staged_kernel_that_writes_outside_is_caught(place, where):
    x, found = torch.zeros(3), Poking(place)
    found.know(x, x.data_ptr())
    with pytest.raises(AssertionError, match=f"two wrote {where} a tensor"):
        found.launch(Kernel2, 1, 1, [x.data_ptr(), 0], 0)


def test_an_address_that_nobody_knows_is_refused():
    with pytest.raises(AssertionError, match="no tensor that is known"):
        Poking().launch(Kernel2, 1, 1, [64, 0], 0)
