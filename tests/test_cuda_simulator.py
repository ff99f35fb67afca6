"""A few CUDA kernels as Python, in Numba's simulator: what they say, apart from what the compiler makes of it (the emulator's part).

It runs what is written in Python alone.  Kernels of 128 bits, of whole warps and of convolution are not: those are the emulator's.
"""

import emulated
import pytest
from processes import ROOT, run

pytestmark = emulated.needs_toolchain

PROGRAM = """
import sys, warnings
sys.path.insert(0, {tests!r})
import numpy as np, torch, torch.nn.functional as T
from numba import config, cuda, types
import emulated, fastpool.functional as F
from fastpool import tiny
from fastpool.kernels.cuda import number

assert config.ENABLE_CUDASIM
warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning)  # of uint32, which is meant
# The words that are one LLVM instruction or constant.
number.WORDS |= dict(
    lowest=lambda x: type(x)(-np.inf), highest=lambda x: type(x)(np.inf), quotient=lambda x, count: type(x)(x / count)
)


class Simulator:
    def __init__(self):
        self.known, self.launches = dict(), []

    def know(self, tensor, address, initialised=True):
        self.known[address] = tensor

    def array(self, address, kind):
        tensor = self.known.get(address)
        if tensor is None:
            return np.empty(0, kind)
        return np.ctypeslib.as_array((np.ctypeslib.as_ctypes_type(kind) * tensor.numel()).from_address(address))

    def launch(self, kernel, blocks, threads, arguments, device):
        function, signature = kernel.made
        given = [
            self.array(value, np.dtype(kind.dtype.name)) if isinstance(kind, types.CPointer) else np.dtype(kind.name).type(value)
            for value, kind in zip(arguments, signature, strict=True)
        ]
        cuda.jit(function)[blocks, threads](*given)
        self.launches.append(kernel.name)


simulator = Simulator()
with emulated.device(emulator=simulator), tiny.kernels_only():
{case}
print(*sorted(set(simulator.launches)))
"""

CASES = {
    "windows.backward windows.forward": """
    x = torch.randn(1, 2, 5, 7, requires_grad=True)
    for ours, theirs in ((F.max_pool2d, T.max_pool2d), (F.avg_pool2d, T.avg_pool2d)):
        found = [[y.detach(), *torch.autograd.grad(y.square().sum(), x)] for y in (ours(x, 3, 2, 1), theirs(x, 3, 2, 1))]
        for a, b in zip(*found):
            torch.testing.assert_close(a, b)
""",
    "whole_map.forward": """
    x = torch.randn(1, 2, 33, 32)
    assert torch.equal(F.global_max_pool2d(x), x.amax((2, 3), keepdim=True))
    torch.testing.assert_close(F.global_avg_pool2d(x), x.mean((2, 3), keepdim=True))
""",
    "windows.forward": """
    x = torch.randn(1, 2, 6, 9)
    torch.testing.assert_close(F.avg_pool2d(x, 3, before="gelu"), T.avg_pool2d(T.gelu(x), 3))
""",
    "unpool.scatter windows.flat_positions windows.forward": """
    x = torch.randn(1, 3, 6, 9)
    y, at = F.max_pool2d(x, 2, return_indices=True)
    expected = T.max_unpool2d(*T.max_pool2d(x, 2, return_indices=True), 2, output_size=(6, 9))
    assert torch.equal(F.max_unpool2d(y, at, 2, output_size=(6, 9)), expected)
""",
}


@pytest.mark.parametrize("kernels", CASES)
def test_in_the_simulator(kernels):
    assert run(PROGRAM.format(tests=str(ROOT / "tests"), case=CASES[kernels]), NUMBA_ENABLE_CUDASIM="1") == kernels
