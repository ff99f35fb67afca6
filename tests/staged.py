"""CUDA kernels on a real device in tests of tensors on the CPU: at each launch what a kernel may touch is copied there, and back.

So the tests that the emulator runs (emulated.py) run there unchanged, by the driver's own ``launch``.
"""

import ctypes
import functools

import torch

GUARD = 4096
"""Bytes before and behind a tensor's, that nobody may write; as a float they are NaN, which spreads from where one reads them."""
ALIGNED = 256
"""Bytes to which an address on the device lies as that on the CPU does, and beyond which no kernel asks."""

_address_of = torch.Tensor.data_ptr  # emulated.device has its own in this one's place


@functools.cache
def _driver():
    """One, so that code is loaded once, on torch's streams."""
    from fastpool.kernels.cuda.launch import Driver

    from fastpool import runtime

    runtime.hand_over_streams()
    return Driver()


class Staged:
    """In an ``emulated.Emulator``'s place, for a device that torch knows."""

    def __init__(self, cc=None):
        self._known = {}
        self.launches = []
        """(kernel, None) of each."""

    def know(self, tensor, address, initialised=True):
        extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        size, held = extent * tensor.element_size(), self._known.get(address)
        if tensor.numel() and (held is None or held[0] < size):
            self._known[address] = size, tensor.detach()

    def _around(self, address):
        """(first, last + 1) of what is known where a kernel is given this address: a view's are its tensor's too."""
        found = [(first, first + size) for first, (size, _) in self._known.items() if first <= address < first + size]
        assert found, "an address of no tensor that is known"
        return min(first for first, _ in found), max(end for _, end in found)

    def launch(self, kernel, blocks, threads, arguments, device):
        copies, given = {}, []
        for argument, converter in zip(arguments, kernel.converters, strict=True):
            if converter is int and argument:
                first, end = self._around(argument)
                if first not in copies:
                    host = torch.frombuffer((ctypes.c_uint8 * (end - first)).from_address(first), dtype=torch.uint8)
                    whole = self._allocated(GUARD + ALIGNED + len(host) + GUARD).fill_(0xFF)
                    start = GUARD + (first - _address_of(whole) - GUARD) % ALIGNED
                    whole[start : start + len(host)] = host.to(whole.device)
                    copies[first] = host, whole, start
                _, whole, start = copies[first]
                argument = _address_of(whole) + start + argument - first
            given.append(argument)
        self._run(kernel, blocks, threads, given)
        for host, whole, start in copies.values():
            end = start + len(host)
            host.copy_(whole[start:end])
            assert (whole[:start] == 0xFF).all(), f"{kernel.name} wrote before a tensor"
            assert (whole[end:] == 0xFF).all(), f"{kernel.name} wrote behind a tensor"
        self.launches.append((kernel, None))

    def _allocated(self, size):
        return torch.empty(size, dtype=torch.uint8, device="cuda")

    def _run(self, kernel, blocks, threads, arguments):
        _driver().launch(kernel, blocks, threads, arguments, 0)
