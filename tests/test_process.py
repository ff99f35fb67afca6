"""fastpool in a process with torch: thread counts, Python threads, forks."""

import ctypes
import os
import threading

import pytest
import torch
import torch.nn.functional as T
from fastpool.kernels import launch
from fastpool.kernels.compile import Worker
from processes import LAYERS, run

import fastpool.functional as F
from fastpool import runtime

SAME = """
import os, threading, torch, torch.nn.functional as T, fastpool.functional as F
torch.set_num_threads(2)
# Enough for fastpool's threads; too few for torch's, which a forked child must not wake.
x = torch.randn(1, 16, 40, 40)

def pooled(f):
    leaf = x.clone().requires_grad_()
    y = f(leaf, 3, 2, 1)
    y.backward((torch.arange(y.numel()) % 8.0).reshape(y.shape))
    return y.detach(), leaf.grad

truth = pooled(T.max_pool2d)

def same():
    return all(map(torch.equal, pooled(F.max_pool2d), truth))
"""
"""``same()``: forward and backward give what torch gave in the parent."""


@pytest.mark.parametrize("layer", LAYERS)
def test_torchs_thread_count_is_its_own(layer):
    """Honoured in each call, and never changed, though Numba's first parallel launch sets OpenMP's count, which is torch's too.
    A new process, for the first launch."""
    code = """
import numba, torch, fastpool.functional as F
x = torch.randn(2, 16, 64, 64, requires_grad=True)
used = []
for count in (2, 1, 3, 2, 4, 7):
    torch.set_num_threads(count)
    y = F.max_pool2d(x, 2)
    assert torch.equal(y, torch.nn.functional.max_pool2d(x, 2))
    assert torch.get_num_threads() == count, (count, torch.get_num_threads())
    used.append(numba.get_num_threads())
    y.sum().backward()
    assert torch.get_num_threads() == count, (count, torch.get_num_threads())
    used.append(numba.get_num_threads())
print(used)
"""
    # Forward and backward; one thread needs no launch, which leaves the last one's count, and Numba has no more than it was given.
    assert run(code, NUMBA_THREADING_LAYER=layer, NUMBA_NUM_THREADS="4") == str([2, 2, 2, 2, 3, 3, 2, 2, 4, 4, 4, 4])


@pytest.mark.skipif("omp" not in LAYERS, reason="Numba has no OpenMP layer here")
@pytest.mark.parametrize(("environment", "layer"), [({}, "omp"), ({"NUMBA_THREADING_LAYER_PRIORITY": "workqueue omp tbb"}, "workqueue")])
def test_torchs_kind_of_threads_is_taken_first(environment, layer):
    """Whatever Numba itself would take first, as TBB beside OpenVINO, but for what the environment asks; Numba's own order is put back."""
    code = """
import numba, torch
if not {environment!r}:
    numba.config.THREADING_LAYER_PRIORITY = ["workqueue", "omp", "tbb"]
before = numba.config.THREADING_LAYER_PRIORITY
from fastpool import runtime
print(runtime.threading_layer().name, numba.config.THREADING_LAYER_PRIORITY == before)
"""
    assert run(code.format(environment=environment), **environment) == f"{layer} True"


def test_a_threads_own_count():
    """torch's count is one of each Python thread: each call is asked in the thread that makes it."""
    torch.set_num_threads(2)
    runtime.threading_layer()
    found = []

    def work():
        torch.set_num_threads(1)
        found.append(runtime.threads())
        torch.set_num_threads(2)
        found.append(runtime.threads())

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert found == [1, 2]
    assert runtime.threads() == 2


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_job_is_run_once(threads, monkeypatch):
    """By no more pieces than threads, whatever their number."""
    monkeypatch.setattr(launch.numba.config, "NUMBA_NUM_THREADS", 2)
    pieces, lock = [], threading.Lock()

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
    def work(args, start, stop):
        with lock:
            pieces.append((start, stop))

    worker = Worker("test", ctypes.cast(work, ctypes.c_void_p).value, work, None)
    for jobs in (1, 2, 3, 7):
        pieces.clear()
        launch.launch(worker, jobs, launch.pack(0), threads)
        assert sorted(job for piece in pieces for job in range(*piece)) == list(range(jobs))
        assert len(pieces) <= min(threads, 2)


@pytest.mark.parametrize("layer", LAYERS)
def test_python_threads_at_once(layer):
    """Four Python threads, forward and backward on two threads each; the first launch of all is one of theirs."""
    code = (
        SAME
        + """
wrong = []
def work():
    torch.set_num_threads(2)
    for _ in range(20):
        if not same():
            wrong.append(1)
        if torch.get_num_threads() != 2:
            wrong.append(2)
workers = [threading.Thread(target=work) for _ in range(4)]
[w.start() for w in workers]
[w.join() for w in workers]
print(wrong)
"""
    )
    assert run(code, NUMBA_THREADING_LAYER=layer) == "[]"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("before", ["same()", ""], ids=["after", "before-the-first-pooling"])
def test_a_forked_child_works(before, layer):
    """OpenMP's threads, torch's and perhaps fastpool's, are gone there: asking for them would end or hang it."""
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
    assert run(code, NUMBA_THREADING_LAYER=layer, PYTHONWARNINGS="ignore::DeprecationWarning") == "0 True"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_in_a_dataloaders_workers():
    """Forward and backward, beside a parent that pools on its threads meanwhile; also by a thread that the worker starts."""
    code = (
        SAME
        + """
class Pooled(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        found = []
        thread = threading.Thread(target=lambda: found.append(same()))
        thread.start()
        thread.join()
        return same() and found[0]
good = [same()]
for batch in torch.utils.data.DataLoader(Pooled(), num_workers=2, multiprocessing_context="fork", persistent_workers=True):
    good += [same(), *batch.tolist()]
print(len(good), all(good))
"""
    )
    assert run(code, PYTHONWARNINGS="ignore::DeprecationWarning") == "17 True"


def test_under_inference_mode_and_in_a_callers_thread():
    x, found = torch.randn(1, 3, 20, 20), []

    def work():
        with torch.inference_mode():
            found.append(F.max_pool2d(x, 2))

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert torch.equal(found[0], T.max_pool2d(x, 2))


@pytest.mark.parametrize("register_bytes", [16, 32])
def test_narrower_registers(register_bytes):
    """The code of a CPU with AVX2 or NEON, run here: fewer lanes, the same results."""
    code = """
import torch, fastpool.functional as F, torch.nn.functional as T
from fastpool.kernels.simd import native_lanes
from numba import float32
print(native_lanes(float32), end=" ")
for shape, layout in (((19, 37), torch.contiguous_format), ((19, 37), torch.channels_last), ((6, 8), torch.contiguous_format)):
    x = torch.randn(2, 21, *shape).contiguous(memory_format=layout)
    for ours, theirs in (
        (lambda t: F.max_pool2d(t, 3, 2, 1), lambda t: T.max_pool2d(t, 3, 2, 1)),
        (lambda t: F.avg_pool2d(t, 2), lambda t: T.avg_pool2d(t, 2)),
        (F.global_max_pool2d, lambda t: T.adaptive_max_pool2d(t, 1)),
    ):
        a, b = (x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
        y, z = ours(a), theirs(b)
        gy = torch.randint(-4, 5, z.shape).float()
        y.backward(gy)
        z.backward(gy)
        torch.testing.assert_close(y, z)
        torch.testing.assert_close(a.grad, b.grad)
print("same")
"""
    assert run(code, FASTPOOL_REGISTER_BYTES=str(register_bytes)) == f"{register_bytes // 4} same"
