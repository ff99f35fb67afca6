"""fastpool in a process with torch: thread counts, Python threads, forks."""

import os
import threading

import pytest
import torch
import torch.nn.functional as T
from test_cache import run

import fastpool.functional as F


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_torchs_thread_count_is_its_own(layer):
    """Numba's first parallel launch sets OpenMP's count, which is torch's too: it is put back.  A new process, for the first launch."""
    code = """
import torch, fastpool.functional as F
x = torch.randn(2, 16, 64, 64)
for count in (2, 1, 2, 3, 2):
    torch.set_num_threads(count)
    assert torch.equal(F.max_pool2d(x, 2), torch.nn.functional.max_pool2d(x, 2))
    assert torch.get_num_threads() == count, (count, torch.get_num_threads())
print("kept")
"""
    assert run(code, NUMBA_THREADING_LAYER=layer) == "kept"


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_python_threads_at_once(layer):
    """Four Python threads, forward and backward on two OpenMP (or workqueue) threads each."""
    code = """
import threading, torch, fastpool.functional as F
torch.set_num_threads(2)
x = torch.randn(4, 16, 64, 64)
truth = torch.nn.functional.max_pool2d(x, 3, 2, 1)
wrong = []
def work():
    for _ in range(20):
        t = x.clone().requires_grad_()
        y = F.max_pool2d(t, 3, 2, 1)
        y.sum().backward()
        if not torch.equal(y, truth) or t.grad.sum() != y.numel():
            wrong.append(1)
workers = [threading.Thread(target=work) for _ in range(4)]
[w.start() for w in workers]
[w.join() for w in workers]
print(len(wrong))
"""
    assert run(code, NUMBA_THREADING_LAYER=layer) == "0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_works():
    """A DataLoader worker: OpenMP's threads are gone there, and asking for them would end or hang it."""
    code = """
import os, torch, fastpool.functional as F
torch.set_num_threads(2)
x = torch.randn(2, 16, 64, 64)
truth = F.max_pool2d(x, 2)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(F.max_pool2d(x, 2), truth) else 1)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
"""
    assert run(code, PYTHONWARNINGS="ignore::DeprecationWarning") == "0"


def test_a_child_forked_before_the_first_pooling_works():
    """torch's threads ran in the parent, fastpool's not yet: they must not be asked for in the child."""
    code = """
import os, torch, fastpool.functional as F
torch.set_num_threads(2)
x = torch.randn(2, 16, 64, 64)
truth = torch.nn.functional.max_pool2d(x, 2)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(F.max_pool2d(x, 2), truth) else 1)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
"""
    assert run(code, PYTHONWARNINGS="ignore::DeprecationWarning") == "0"


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
for layout in (torch.contiguous_format, torch.channels_last):
    x = torch.randn(2, 21, 19, 37).contiguous(memory_format=layout)
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
