"""Launches of CUDA kernels: on PyTorch's current stream, by the driver; or by whoever ``use`` puts in its place, as tests do.

Nothing here allocates or waits, so that launches can be captured in a CUDA graph.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable

from .compile import capability

stream_of: Callable[[int], int] = lambda device: 0
"""(index of a device) -> the handle of the stream to launch on; whoever owns the tensors sets it."""

KEPT = 4096
"""Streams and sizes of grids that a device remembers."""

TOO_NEW = (
    r"CUDA_ERROR_(INVALID_IMAGE|INVALID_PTX|NO_BINARY_FOR_GPU|UNSUPPORTED_PTX_VERSION|JIT_COMPILER_NOT_FOUND)|function \w+ is not found"
)
"""What a driver, or cuda.bindings of it, says that is older than what it is given or asked for."""


class Driver:
    """The CUDA driver, through cuda.core: what it runs is assembled from ``Kernel.ptx``."""

    def __init__(self):
        self._devices, self._codes, self._forked = {}, {}, False

    def launch(self, kernel, blocks, threads, arguments, device):
        code = self._codes.get((kernel, device)) or self.loaded(kernel, device)
        self._devices[device].launch(code, blocks, threads, arguments)

    def loaded(self, kernel, device):
        """The kernel as the driver has it, on a device: assembled and loaded once."""
        if self._forked:
            raise RuntimeError(
                "this process is a fork of one that has launched CUDA kernels, and has no driver: start it by multiprocessing's 'spawn'"
            )
        with _explained():
            if device not in self._devices:
                self._devices[device] = _Device(device)
            found = self._codes[kernel, device] = self._devices[device].load(kernel)
        return found

    def forked(self):
        """This process is a new one: handles that the other has are none here."""
        self._forked = self._forked or bool(self._devices)
        self._devices, self._codes = {}, {}


class _Device:
    """One whose primary context is torch's.

    Streams and sizes of grids are made once, and the context is made current only in threads where it is not, that have not called torch.
    A launch of 36 arguments, by a driver that does nothing, takes the caller 1.4 us, of which 0.9 are cuda.core's; 7.9 with all anew each
    time, of which a Stream took 3.9 and the context 1.8.
    """

    def __init__(self, index):
        from cuda import core
        from cuda.bindings import driver

        self.index = index
        self.capability = tuple(core.Device(index).compute_capability)
        self._launch, self._driver = core.launch, driver
        self._context = _checked(driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(index))))
        self._stream = functools.lru_cache(KEPT)(core.Stream.from_handle)
        self._config = functools.lru_cache(KEPT)(lambda blocks, threads: core.LaunchConfig(grid=blocks, block=threads))

    def launch(self, code, blocks, threads, arguments):
        stream, config = self._stream(stream_of(self.index)), self._config(blocks, threads)
        if self._driver.cuCtxGetCurrent()[1] == self._context:
            self._launch(stream, config, code, *arguments)
        else:
            with self._current():
                self._launch(stream, config, code, *arguments)

    def load(self, kernel):
        text = kernel.ptx(capability(self.capability))
        code = machine_code(text, self.capability)
        with self._current():
            return code.get_kernel(entry(text))

    @contextlib.contextmanager
    def _current(self):
        """The device's context is the thread's meanwhile."""
        _checked(self._driver.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            _checked(self._driver.cuCtxPopCurrent())


def machine_code(text, cc):
    """A PTX text assembled for a compute capability: here, not by the driver, which may be older than the PTX is."""
    from cuda.core import Program, ProgramOptions

    return Program(text, "ptx", ProgramOptions(arch=f"sm_{cc[0]}{cc[1]}")).compile("cubin")


@contextlib.contextmanager
def _explained():
    """What is missing, or too old, is said in a sentence that says what to install."""
    try:
        yield
    except Exception as error:
        said = str(error).partition("\n")[0]
        # cuda.pathfinder's, of a library: a RuntimeError, which says enough of the driver's own.
        if isinstance(error, ImportError) or (type(error).__name__ == "DynamicLibNotFoundError" and "NVIDIA driver" not in said):
            raise ImportError(f"CUDA kernels need NVIDIA's wheels: pip install 'fastpool[cuda]' ({said})") from error
        if found := re.search(TOO_NEW, said):
            from cuda import bindings
            from cuda.bindings import driver

            major, minor, *_ = bindings.__version__.split(".")
            version = _checked(driver.cuDriverGetVersion())
            raise RuntimeError(
                f"this machine's driver, of CUDA {version // 1000}.{version % 1000 // 10}, does not take code of CUDA {major}.{minor} "
                f"({found[0]}): install a driver of CUDA {major} or later; to one that is, pip install 'fastpool[cuda]' adds an assembler"
            ) from error
        raise


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
os.register_at_fork(after_in_child=_launcher.forked)


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
