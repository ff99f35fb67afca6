"""Launches of CUDA kernels: on PyTorch's current stream, by the driver; or by whoever ``use`` puts in its place, as tests do.

Nothing here allocates or waits, so that launches can be captured in a CUDA graph.
"""

import contextlib
import functools
import re
from collections.abc import Callable

from .compile import capability

stream_of: Callable[[int], int] = lambda device: 0
"""(index of a device) -> the handle of the stream to launch on; whoever owns the tensors sets it."""


class Driver:
    """The CUDA driver, through cuda.core: what it runs is assembled from ``Kernel.ptx``."""

    def launch(self, kernel, blocks, threads, arguments, device):
        from cuda.core import LaunchConfig, Stream, launch

        with _current(device):
            config = LaunchConfig(grid=blocks, block=threads)
            launch(Stream.from_handle(stream_of(device)), config, _loaded(kernel, device), *arguments)


@contextlib.contextmanager
def _current(device):
    """The device's primary context, which is torch's, is the thread's meanwhile."""
    from cuda.bindings import driver

    _checked(driver.cuCtxPushCurrent(_context(device)))
    try:
        yield
    finally:
        _checked(driver.cuCtxPopCurrent())


@functools.cache
def _context(device):
    from cuda.bindings import driver

    return _checked(driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(device))))


@functools.cache
def _loaded(kernel, device):
    """The kernel as the driver has it, for the context that is current: that of the device."""
    from cuda.core import Device

    own = tuple(Device(device).compute_capability)
    text = kernel.ptx(capability(own))
    return machine_code(text, own).get_kernel(entry(text))


def machine_code(text, cc):
    """A PTX text assembled for a compute capability: here, not by the driver, which may be older than the PTX is."""
    from cuda.core import Program, ProgramOptions

    return Program(text, "ptx", ProgramOptions(arch=f"sm_{cc[0]}{cc[1]}")).compile("cubin")


def _checked(result):
    error, *values = result
    if error != 0:
        raise RuntimeError(f"CUDA driver: {error.name}")
    return values[0] if values else None


def entry(text):
    """The name of the kernel in a PTX text."""
    found = re.search(r"\.entry\s+([\w$]+)", text)
    assert found, "no kernel"
    return found[1]


_launcher = Driver()


@contextlib.contextmanager
def use(other):
    """``other``, which has ``Driver``'s ``launch``, in its place."""
    global _launcher
    before, _launcher = _launcher, other
    try:
        yield
    finally:
        _launcher = before


def launch(kernel, blocks, threads, arguments, device):
    """``kernel`` in a line of so many blocks of so many threads; arguments as its ``converters`` make them."""
    _launcher.launch(kernel, blocks, threads, arguments, device)
