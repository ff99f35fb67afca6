"""Between tensors and kernels: which layout a tensor is in, what an operation allocates, who runs it.

Nothing here reads or writes an element of a tensor.  What depends on shapes and strides alone is worked out once and cached: a call looks
it up, allocates and launches.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from . import runtime
from .window import LARGEST, Window, output_size

if TYPE_CHECKING:
    from .kernels.pool import Selecting, Summing

_BACKENDS = {"cpu": "fastpool.kernels.cpu.pooling"}
_DTYPES = {torch.float32: "float32", torch.float64: "float64"}

Sizes = tuple[int, int, int, int]


class Pooling(NamedTuple):
    """One pooling operation, apart from the tensor."""

    caller: str
    """The public function's name: what an error starts with."""
    kind: Selecting | Summing
    window: Window | None
    """None: the whole map."""
    parameters: tuple[float, ...] = ()
    include_pad: bool = True
    divisor: int | None = None


class Layout(NamedTuple):
    """How a 4-d tensor lies in memory, as far as the kernels care."""

    shape: Sizes
    strides: Sizes
    channels_last: bool

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


class _Forward(NamedTuple):
    """What a forward call needs to know; ``plan`` None: there is nothing to compute."""

    plan: Any
    layout: Layout
    copies: bool
    out: Sizes
    saved: torch.dtype | None
    parameters: tuple[int, ...]


class _Backward(NamedTuple):
    plan: Any
    parameters: tuple[int, ...]


def kernels_for(device: torch.device, dtype: torch.dtype, caller: str) -> Any:
    """The kernels for a device and dtype, imported on first use; NotImplementedError if there are none."""
    module = _BACKENDS.get(device.type)
    if module is None:
        raise NotImplementedError(f"{caller}: no kernels for device {str(device)!r}; {', '.join(_BACKENDS)} works: x.cpu()")
    if dtype not in _DTYPES:
        works = ", ".join(str(d).removeprefix("torch.") for d in _DTYPES)
        advice = "" if dtype.is_complex else ": x.float()"
        raise NotImplementedError(f"{caller}: not implemented for {str(dtype).removeprefix('torch.')}; {works} work{advice}")
    return importlib.import_module(module)


def is_channels_last(x: torch.Tensor) -> bool | None:
    """Whether lanes can run along a 4-d tensor's channels (True) or its columns (False) as it lies; None: along neither."""
    if x.is_contiguous():
        return False
    if x.is_contiguous(memory_format=torch.channels_last):
        return True
    _, stride_c, _, stride_w = x.stride()
    if stride_w == 1 or x.shape[3] == 1:
        return False
    return True if stride_c == 1 else None


def materialised(x: torch.Tensor) -> torch.Tensor:
    """x with its numbers in memory: torch keeps a negation, or that all is zero, as a mark on the tensor at times."""
    if x.is_neg():
        x = x.resolve_neg()
    return x.clone() if x._is_zerotensor() else x


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, layout: Layout) -> torch.Tensor:
    """What an operation allocates: uninitialised, in the memory format of ``layout``."""
    return torch.empty(shape, dtype=dtype, device=device, memory_format=layout.memory_format)


def saved_dtype(op: Pooling, dtype: torch.dtype, shape: Sizes) -> torch.dtype | None:
    """The dtype of what is saved for backward of an input of this dtype and shape, or None."""
    taps = op.window.taps if op.window else shape[2] * shape[3]
    name = op.kind.saved_dtype(taps, _DTYPES[dtype])
    return getattr(torch, name) if name else None


class _Spatial:
    """A window with a depth of 1: kernels see three axes."""

    def __init__(self, window: Window) -> None:
        self._window, self.regular = window, True
        self.kernel_size, self.stride, self.dilation = ((1, *v) for v in (window.kernel_size, window.stride, window.dilation))
        self.padding, self.taps = (0, *window.padding), window.taps

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Spatial) and self._window == other._window

    def __hash__(self) -> int:
        return hash(self._window)

    def output_size(self, depth: int, *sizes: int) -> Any:
        return depth, *self._window.output_size(*sizes)

    def counts(self, axis: int, size: int, include_pad: bool) -> Any:
        return np.ones(1, int) if axis == 0 else self._window.counts(axis - 1, size, include_pad)

    def spans(self, axis: int, size: int) -> Any:
        origin = self._window._starts(axis - 1, size) if axis else np.zeros(1, int)
        step, taps = self.dilation[axis], self.kernel_size[axis]
        first = np.clip(-(origin // step), 0, taps)
        return origin, first, np.clip(-((origin - size) // step), first, taps)


def _geometry(backend: Any, op: Pooling, dtype: torch.dtype, layout: Layout) -> Any:
    (n, c, h, w), (sn, sc, sh, sw) = layout.shape, layout.strides
    window = _Spatial(op.window) if op.window else None
    return backend.Geometry(
        _DTYPES[dtype], (n, c, 1, h, w), (sn, sc, h * sh, sh, sw), layout.channels_last, window, op.include_pad, op.divisor
    )


def _name(dtype: torch.dtype | None) -> str | None:
    return str(dtype).removeprefix("torch.") if dtype else None


def _bits(backend: Any, op: Pooling, dtype: torch.dtype) -> tuple[int, ...]:
    return tuple(backend.bits(value, _DTYPES[dtype]) for value in op.parameters)


@functools.lru_cache(maxsize=4096)
def _forward(op: Pooling, device: torch.device, dtype: torch.dtype, shape: Sizes, strides: Sizes, saves: bool) -> _Forward:
    backend = kernels_for(device, dtype, op.caller)
    channels_last = is_channels_last(torch.empty_strided(shape, strides, device="meta"))
    copies = channels_last is None
    n, channels, height, width = shape
    if copies:
        strides = (channels * height * width, height * width, width, 1)
    layout = Layout(shape, strides, bool(channels_last))
    if op.window:
        out = output_size(op.caller, op.window, height, width)
    elif height * width > LARGEST:
        raise RuntimeError(f"{op.caller}: a map of {height} x {width} has more than 2**31 - 1 elements")
    else:
        out = 1, 1
    saved = saved_dtype(op, dtype, shape)
    saves = saves and saved is not None
    plan = backend.forward(op.kind, _geometry(backend, op, dtype, layout), _name(saved), saves) if n else None
    return _Forward(plan, layout, copies, (n, channels, *out), saved if saves else None, _bits(backend, op, dtype))


@functools.lru_cache(maxsize=4096)
def _backward(op: Pooling, device: torch.device, dtype: torch.dtype, layout: Layout) -> _Backward:
    backend = kernels_for(device, dtype, op.caller)
    saved = _name(saved_dtype(op, dtype, layout.shape))
    return _Backward(backend.backward(op.kind, _geometry(backend, op, dtype, layout), saved), _bits(backend, op, dtype))


def check(x: torch.Tensor, op: Pooling) -> None:
    """Raise what ``forward`` would of a 4-d input that it cannot pool."""
    _forward(op, x.device, x.dtype, tuple(x.shape), x.stride(), False)


def forward(x: torch.Tensor, op: Pooling, saves: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None, Layout]:
    """(y, saved, layout) of a 4-d input: y (N, C, OH, OW) in x's layout, and what backward needs besides x and y, or None.

    A copy is made only of an input that has no dense axis; with ``saves`` false nothing is saved.
    """
    plan, layout, copies, out, saved_as, parameters = _forward(op, x.device, x.dtype, x.shape, x.stride(), saves)
    if copies:
        x = x.contiguous()
    y = empty(out, x.dtype, x.device, layout)
    saved = empty(out, saved_as, x.device, layout) if saved_as else None
    if plan:
        halves = (seed & 0xFFFFFFFF, seed >> 32) if op.window else ()
        plan.run((x.data_ptr(), y.data_ptr(), saved.data_ptr() if saved is not None else 0), runtime.threads(), *halves, *parameters)
    return y, saved, layout


def backward(
    gy: torch.Tensor, x: torch.Tensor | None, y: torch.Tensor | None, saved: torch.Tensor | None, op: Pooling, layout: Layout
) -> torch.Tensor:
    """gx, of the shape and memory format of ``layout``, which ``forward`` gave.

    x (as given to ``forward``) and y are needed only where the kind's gradient reads them.
    """
    # Saved tensors may come back with other strides (hooks that move them, an input that was copied to be read).
    if x is not None and x.stride() != layout.strides:
        x = x.contiguous(memory_format=layout.memory_format)
        layout = Layout(layout.shape, x.stride(), layout.channels_last)  # type: ignore[arg-type]
    gy = materialised(gy)
    gx = empty(layout.shape, gy.dtype, gy.device, layout)
    if gx.numel():
        plan, parameters = _backward(op, gy.device, gy.dtype, layout)
        dense = [None if t is None else t.contiguous(memory_format=layout.memory_format) for t in (gy, saved, y)]
        addresses = [t.data_ptr() if t is not None else 0 for t in (gx, *dense[:2], x, dense[2])]
        plan.run(addresses, runtime.threads(), *parameters)
    return gx


def flat_positions(taps: torch.Tensor, op: Pooling, x: torch.Tensor) -> torch.Tensor:
    """The taps that a selecting pooling of x saved, as int64 positions in the input plane: torch's ``return_indices``.

    Of x only shape, dtype and memory format are looked at.
    """
    if op.window is None:
        return taps.long()
    backend = kernels_for(x.device, x.dtype, op.caller)
    layout = Layout(tuple(x.shape), (0, 0, 0, 0), bool(is_channels_last(x)))  # type: ignore[arg-type]
    taps = taps.contiguous(memory_format=layout.memory_format)
    flat = empty(tuple(taps.shape), torch.int64, taps.device, layout)
    if flat.numel():
        plan = backend.flat_positions(_geometry(backend, op, x.dtype, layout), _name(taps.dtype))
        plan.run((flat.data_ptr(), taps.data_ptr()), runtime.threads())
    return flat
