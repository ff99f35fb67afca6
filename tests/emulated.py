"""CUDA kernels on a machine without a GPU: their PTX is executed on the CPU (bench/ptx), behind the launch that the driver would have.

Tensors on the CPU stand for tensors on a GPU: what the backend allocates is memory never written, and what a kernel may touch is what
tensors hold, whose addresses the backend has asked for.
"""

import contextlib
import functools
import importlib.metadata
import re

import pytest
import torch
from fastpool.bench import cuda_model

from fastpool import backend, convolution

TOOLCHAIN = ("numba-cuda", "nvidia-cuda-nvrtc", "nvidia-nvvm")


def missing():
    """The sentence of a test that cannot run without the CUDA toolchain, or None."""
    absent = [name for name in TOOLCHAIN if not _installed(name)]
    return f"the CUDA toolchain's wheels are not installed ({', '.join(absent)}): pip install 'fastpool[cuda]'" if absent else None


def _installed(name):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return bool(importlib.metadata.version(name))
    return False


needs_toolchain = pytest.mark.skipif(missing() is not None, reason=str(missing()))


class Emulator(cuda_model.Emulator):
    """One that keeps what it knows, so that its addresses are no other tensor's."""

    def __init__(self, cc):
        super().__init__(cc)
        self._known = {}

    def know(self, tensor, address, initialised=True):
        held = self._known.get(address)
        size = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) * tensor.element_size()
        if tensor.numel() and (held is None or held[0] < size):
            super().know(tensor, address, initialised)
            self._known[address] = size, tensor.detach()

    def launch(self, kernel, *launched):
        assert not costly(kernel, self.cc), kernel.name
        super().launch(kernel, *launched)


@functools.cache
def costly(kernel, cc):
    """What of a kernel's PTX has no place there, if it is of floats no wider than 32 bits: float64, memory of threads' own, calls
    (libdevice's too), division of 64 bits, but where bins of very many elements need it."""
    from fastpool.kernels.cuda.windows import FAR

    if "float64" in kernel.constants or not any(dtype in kernel.constants for dtype in ("float32", "bfloat16", "float16")):
        return set()
    found = set(re.findall(r"\.f64|\.local\b|\bcall\b|(?:div|rem)\.[us]64", kernel.ptx(cc)))
    far = any(isinstance(given, tuple) and FAR in given for given in kernel.constants)
    return found - {"div.u64"} if far else found


def names(emulator):
    """Of the kernels that were launched."""
    return [kernel.name for kernel, _ in emulator.launches]


@contextlib.contextmanager
def device(cc=(8, 0), emulator=None):
    """The ``Emulator``, or another that knows and launches as it does, that what is called inside runs on."""
    from fastpool.kernels.cuda import conv_pool, elementwise, launch, pooling, unpool
    from fastpool.kernels.cuda import convolution as convolving

    emulator = emulator or Emulator(cc)
    modules = {
        id(backend._BACKENDS): pooling,
        id(backend._ELEMENTWISE): elementwise,
        id(backend._UNPOOLING): unpool,
        id(convolution._BACKENDS): convolving,
        id(convolution._POOLED): conv_pool,
    }
    address_of, allocate = torch.Tensor.data_ptr, backend.empty

    def kernels_for(device, dtype, caller, dtypes, modules_of=backend._BACKENDS):
        assert backend.name_of(dtype) in dtypes
        return modules[id(modules_of)].on(0)

    def empty(*args):
        tensor = allocate(*args)
        emulator.know(tensor, address_of(tensor), initialised=False)
        return tensor

    def data_ptr(tensor):
        address = address_of(tensor)
        emulator.know(tensor, address)
        return address

    with pytest.MonkeyPatch.context() as patch, launch.use(emulator):
        patch.setattr(backend, "kernels_for", kernels_for)
        patch.setattr(backend, "empty", empty)
        patch.setattr(torch.Tensor, "data_ptr", data_ptr)
        # No ``Call`` of the CPU's kernels is found again, and none of these is kept.
        patch.setattr(backend.Pooling, "call", property(lambda op: functools.partial(backend._prepared, op)))
        patch.setattr(backend, "_numbers", backend._numbers.__wrapped__)
        patch.setattr(convolution, "call", convolution.call.__wrapped__)
        yield emulator


@pytest.fixture(autouse=True, name="emulator")
def on_the_emulator():
    """For a module that imports it: each of its tests runs there, and launches something."""
    with device() as found:
        yield found
        assert found.launches
