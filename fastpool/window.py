"""A pooling window: what a user may ask for, what comes out of it, and how a refusal reads."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

LARGEST = 2**31 - 1


class RankError(IndexError, RuntimeError):
    """An input of the wrong rank: torch raises an IndexError from avg_pool2d, a RuntimeError from max_pool2d."""


def _several(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def pair(caller: str, name: str, value: Any) -> tuple[int, int]:
    """An int, or a sequence of one or two ints, as two ints; anything else is torch's TypeError or RuntimeError."""
    try:
        values = tuple(value) if _several(value) else (value,)
        if any(isinstance(v, bool) for v in values):
            raise TypeError
        ints = tuple(operator.index(v) for v in values)
    except TypeError:  # also from a tensor or array of several elements
        raise TypeError(f"{caller}: {name} must be an int or a tuple of two ints, got {value!r}") from None
    if len(ints) not in (1, 2):
        raise RuntimeError(f"{caller}: {name} must be a single int or a tuple of two ints, got {len(ints)} of them: {value!r}")
    if any(abs(i) > LARGEST for i in ints):
        raise RuntimeError(f"{caller}: {name} {ints} does not fit 32 bits")
    return ints if len(ints) == 2 else (ints[0], ints[0])


@dataclass(frozen=True)
class Window:
    """Rows and columns of a pooling window; every tuple is (height, width).

    Hashable: what is derived from a window (output sizes, compiled kernels, count tables) is cached by it.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    ceil_mode: bool

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode))

    def __hash__(self) -> int:
        return self._hash  # asked for at every call, by the caches of plans and sizes

    @property
    def taps(self) -> int:
        """How many elements a whole window has."""
        return self.kernel_size[0] * self.kernel_size[1]

    @functools.cached_property
    def extent(self) -> tuple[int, int]:
        """Rows and columns from a window's first tap to its last: dilation * (kernel_size - 1) + 1."""
        (kh, kw), (dh, dw) = self.kernel_size, self.dilation
        return dh * (kh - 1) + 1, dw * (kw - 1) + 1

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """floor((size + 2 * padding - extent) / stride) + 1; ceil_mode rounds up, but a window must start in the input or left padding."""
        return self._along(0, height), self._along(1, width)

    def _along(self, axis: int, size: int) -> int:
        extent, stride, padding = self.extent[axis], self.stride[axis], self.padding[axis]
        free = size + 2 * padding - extent
        if not self.ceil_mode:
            return free // stride + 1
        found = -(-free // stride) + 1
        return found - 1 if (found - 1) * stride >= size + padding else found

    def counts(self, axis: int, size: int, include_pad: bool) -> np.ndarray:
        """Along one axis, how many taps of each window an average divides by (int64): those inside the input, or inside input and padding.

        ceil_mode's overhang past the padding never counts.
        """
        margin, step = self.padding[axis] if include_pad else 0, self.dilation[axis]
        starts = self._starts(axis, size)
        first = np.maximum(0, -((starts + margin) // step))
        end = np.minimum(self.kernel_size[axis], -((starts - size - margin) // step))
        return np.maximum(0, end - first)

    def _starts(self, axis: int, size: int) -> np.ndarray:
        return np.arange(self._along(axis, size)) * self.stride[axis] - self.padding[axis]

    def _tap_positions(self, axis: int, size: int) -> np.ndarray:
        return self._starts(axis, size)[:, None] + np.arange(self.kernel_size[axis]) * self.dilation[axis]

    def tap_table(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(taps, outputs) int64: each tap's flat position in the input plane; and a bool array of that shape: whether it is inside."""
        rows, columns = self._tap_positions(0, height), self._tap_positions(1, width)
        inside_rows, inside_columns = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
        flat = rows[:, None, :, None] * width + columns[None, :, None, :]
        inside = inside_rows[:, None, :, None] & inside_columns[None, :, None, :]
        outputs = flat.shape[0] * flat.shape[1]
        return flat.reshape(outputs, self.taps).T.copy(), inside.reshape(outputs, self.taps).T.copy()

    def tap_offsets(self, width: int) -> np.ndarray:
        """Each tap's flat position relative to the window's first tap (int64), in an input of this width."""
        (kh, kw), (dh, dw) = self.kernel_size, self.dilation
        return (np.arange(kh)[:, None] * dh * width + np.arange(kw) * dw).reshape(-1)


def window(caller: str, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any) -> Window:
    """The window a user asked ``caller`` for, checked."""
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"{caller}: ceil_mode must be a bool, got {ceil_mode!r}")
    # torch.compile would trace through the cache anyway, and warn of it.
    check = _checked.__wrapped__ if torch.compiler.is_compiling() else _checked
    return check(
        caller,
        _plain(caller, "kernel_size", kernel_size),
        None if stride is None or (_several(stride) and not stride) else _plain(caller, "stride", stride),
        _plain(caller, "padding", padding),
        _plain(caller, "dilation", dilation),
        ceil_mode,
    )


def _plain(caller: str, name: str, value: Any) -> Any:
    return value if type(value) is int else pair(caller, name, value)


@functools.lru_cache(maxsize=4096, typed=True)  # typed: True is no int here
def _checked(caller: str, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any) -> Window:
    kernel = pair(caller, "kernel_size", kernel_size)
    step = kernel if stride is None else pair(caller, "stride", stride)
    pad, spread = pair(caller, "padding", padding), pair(caller, "dilation", dilation)
    for name, values, least in (("kernel_size", kernel, 1), ("stride", step, 1), ("padding", pad, 0), ("dilation", spread, 1)):
        if min(values) < least:
            raise RuntimeError(f"{caller}: {name} must be at least {least}, got {values}")
    most = kernel[0] // 2, kernel[1] // 2
    if pad[0] > most[0] or pad[1] > most[1]:
        raise RuntimeError(f"{caller}: padding {pad} is more than half of kernel_size {kernel}; at most {most} works")
    return Window(kernel, step, pad, spread, ceil_mode)


def check_shape(caller: str, shape: Sequence[int]) -> None:
    """Refuse what is not (C, H, W) or (N, C, H, W) with C, H and W of at least 1."""
    if len(shape) not in (3, 4):
        raise RankError(f"{caller}: expected a (C, H, W) or (N, C, H, W) input, got {len(shape)} dimensions: {tuple(shape)}")
    if 0 in shape[-3:]:
        raise RuntimeError(f"{caller}: channels, height and width must not be empty (N may be 0), got {tuple(shape)}")


def output_size(caller: str, window: Window, height: int, width: int) -> tuple[int, int]:
    """``window.output_size``, refused if nothing would come out."""
    if max(height, width) > LARGEST:  # lanes know their column in 32 bits
        raise RuntimeError(f"{caller}: height and width must be below 2**31, got ({height}, {width})")
    out = window.output_size(height, width)
    if min(out) < 1:
        padded = tuple(size + 2 * p for size, p in zip((height, width), window.padding, strict=True))
        what = f"kernel_size {window.kernel_size}"
        if max(window.dilation) > 1:
            what += f" dilated by {window.dilation} to {window.extent}"
        raise RuntimeError(
            f"{caller}: {what} is larger than the padded input {padded}: the output would be {out}; the largest that fits is {padded}"
        )
    if window.taps > LARGEST:
        raise RuntimeError(f"{caller}: a window of kernel_size {window.kernel_size} has {window.taps} taps, more than 2**31 - 1")
    return out
