"""A pooling window: what a user may ask for, what comes out of it, and how a refusal reads.

Every tuple has a member for each spatial axis, of which there are one to three: (width,), (height, width) or (depth, height, width).
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

LARGEST = 2**31 - 1

Ints = tuple[int, ...]


class RankError(IndexError, RuntimeError):
    """An input of the wrong rank: torch raises an IndexError from avg_pool2d, a RuntimeError from max_pool2d."""


class Wording(NamedTuple):
    """How messages speak of a number of spatial axes."""

    ints: str
    axes: str
    shapes: str


WORDS = {
    1: Wording("one int", "length", "(C, L) or (N, C, L)"),
    2: Wording("two ints", "height and width", "(C, H, W) or (N, C, H, W)"),
    3: Wording("three ints", "depth, height and width", "(C, D, H, W) or (N, C, D, H, W)"),
}


def _several(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def ints(caller: str, name: str, value: Any, rank: int) -> Ints:
    """An int, or a sequence of one or ``rank`` ints, as ``rank`` ints; anything else is torch's TypeError or RuntimeError."""
    expected = WORDS[rank].ints
    try:
        values = tuple(value) if _several(value) else (value,)
        if any(isinstance(v, bool) for v in values):
            raise TypeError
        found = tuple(operator.index(v) for v in values)
    except TypeError:  # also from a tensor or array of several elements
        raise TypeError(f"{caller}: {name} must be an int or a tuple of {expected}, got {value!r}") from None
    if len(found) not in (1, rank):
        raise RuntimeError(f"{caller}: {name} must be a single int or a tuple of {expected}, got {len(found)} of them: {value!r}")
    if any(abs(i) > LARGEST for i in found):
        raise RuntimeError(f"{caller}: {name} {found} does not fit 32 bits")
    return found if len(found) == rank else found * rank


class _Taps:
    """What is known of a window from its taps along each axis: ``kernel_size`` and ``_tap_positions``."""

    kernel_size: Ints

    def _tap_positions(self, axis: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(outputs, taps) along one axis: the position of each tap (int64), and whether it is inside the input."""
        raise NotImplementedError

    @functools.cached_property
    def taps(self) -> int:
        """How many elements a whole window has."""
        return math.prod(self.kernel_size)

    @property
    def rank(self) -> int:
        """How many spatial axes."""
        return len(self.kernel_size)

    def tap_table(self, *sizes: int) -> tuple[np.ndarray, np.ndarray]:
        """(taps, outputs) int64: each tap's flat position in the input plane; and a bool array of that shape: whether it is inside."""
        flat: Any = 0
        inside: Any = True
        for axis, size in enumerate(sizes):
            positions, here = self._tap_positions(axis, size)
            shape = [1] * 2 * len(sizes)
            shape[axis], shape[len(sizes) + axis] = positions.shape
            flat = flat * size + positions.reshape(shape)
            inside = inside & here.reshape(shape)
        return flat.reshape(-1, self.taps).T.copy(), inside.reshape(-1, self.taps).T.copy()


@dataclass(frozen=True)
class Window(_Taps):
    """A pooling window of regular steps.

    Hashable: what is derived from a window (output sizes, compiled kernels, count tables) is cached by it.
    """

    kernel_size: Ints
    stride: Ints
    padding: Ints
    dilation: Ints
    ceil_mode: bool

    regular = True
    """Whether all windows have the same taps, at equal steps."""

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode))

    def __hash__(self) -> int:
        return self._hash

    @functools.cached_property
    def extent(self) -> Ints:
        """Positions from a window's first tap to its last along each axis: dilation * (kernel_size - 1) + 1."""
        return tuple(d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True))

    @functools.cached_property
    def on_three_axes(self) -> Window:
        """The same window for kernels, which see (depth, height, width) always: missing axes come first and are 1 long."""
        more = 3 - self.rank
        one, zero = (1,) * more, (0,) * more
        return Window(one + self.kernel_size, one + self.stride, zero + self.padding, one + self.dilation, self.ceil_mode)

    def output_size(self, *sizes: int) -> Ints:
        """floor((size + 2 * padding - extent) / stride) + 1; ceil_mode rounds up, but a window must start in the input or left padding."""
        return tuple(self._along(axis, size) for axis, size in enumerate(sizes))

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
        first, end = self._within(axis, size, self.padding[axis] if include_pad else 0)
        return np.maximum(0, end - first)

    def spans(self, axis: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Along one axis, of each window (int64): where its first tap is (it may be before the input), and the taps first .. end - 1
        that are inside the input."""
        first, end = self._within(axis, size, 0)
        first = np.minimum(first, self.kernel_size[axis])
        return self._starts(axis, size), first, np.maximum(first, end)

    def _within(self, axis: int, size: int, margin: int) -> tuple[np.ndarray, np.ndarray]:
        starts, step = self._starts(axis, size), self.dilation[axis]
        return np.maximum(0, -((starts + margin) // step)), np.minimum(self.kernel_size[axis], -((starts - size - margin) // step))

    def _starts(self, axis: int, size: int) -> np.ndarray:
        return np.arange(self._along(axis, size)) * self.stride[axis] - self.padding[axis]

    def _tap_positions(self, axis: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        positions = self._starts(axis, size)[:, None] + np.arange(self.kernel_size[axis]) * self.dilation[axis]
        return positions, (positions >= 0) & (positions < size)


@dataclass(frozen=True)
class Bins(_Taps):
    """The windows of adaptive pooling where they are of several sizes: of output i of ``outputs`` along an axis of ``size``, from
    floor(i * size / outputs) to ceil((i + 1) * size / outputs).  Taps are numbered in the largest."""

    sizes: Ints
    outputs: Ints

    regular = False

    def _bounds(self, axis: int) -> tuple[np.ndarray, np.ndarray]:
        size, outputs = self.sizes[axis], self.outputs[axis]
        i = np.arange(outputs)
        return i * size // outputs, -(-(i + 1) * size // outputs)

    @functools.cached_property
    def kernel_size(self) -> Ints:  # type: ignore[override]
        """The largest bin along each axis."""
        return tuple(int(np.max(np.subtract(*self._bounds(axis)[::-1]))) for axis in range(len(self.sizes)))

    @property
    def stride(self) -> Ints:
        return (0,) * len(self.sizes)

    @property
    def padding(self) -> Ints:
        return (0,) * len(self.sizes)

    @property
    def dilation(self) -> Ints:
        return (1,) * len(self.sizes)

    @functools.cached_property
    def on_three_axes(self) -> Bins:
        one = (1,) * (3 - self.rank)
        return Bins(one + self.sizes, one + self.outputs)

    def output_size(self, *sizes: int) -> Ints:
        return self.outputs

    def counts(self, axis: int, size: int, include_pad: bool) -> np.ndarray:
        start, end = self._bounds(axis)
        return end - start

    def spans(self, axis: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        start, end = self._bounds(axis)
        return start, np.zeros_like(start), end - start

    def _tap_positions(self, axis: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        start, end = self._bounds(axis)
        positions = start[:, None] + np.arange(self.kernel_size[axis])
        return positions, positions < end[:, None]


@dataclass(frozen=True)
class Adaptive:
    """Adaptive pooling as it is asked for: the windows follow from the input."""

    outputs: tuple[int | None, ...]
    """None: as many as the input has."""

    def output_size(self, *sizes: int) -> Ints:
        return tuple(size if out is None else out for size, out in zip(sizes, self.outputs, strict=True))

    def resolve(self, *sizes: int) -> Window | Bins | None:
        """The windows over an input of these sizes; None: one of them, the whole map.  Outputs are not empty."""
        outputs = self.output_size(*sizes)
        if set(outputs) == {1}:
            return None
        if any(size % out for size, out in zip(sizes, outputs, strict=True)):
            return Bins(sizes, outputs)
        step = tuple(size // out for size, out in zip(sizes, outputs, strict=True))
        return Window(step, step, (0,) * len(sizes), (1,) * len(sizes), False)


def window(caller: str, rank: int, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any) -> Window:
    """The window of ``rank`` axes that a user asked ``caller`` for, checked."""
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"{caller}: ceil_mode must be a bool, got {ceil_mode!r}")
    kernel = ints(caller, "kernel_size", kernel_size, rank)
    step = kernel if stride is None or (_several(stride) and not stride) else ints(caller, "stride", stride, rank)
    pad, spread = ints(caller, "padding", padding, rank), ints(caller, "dilation", dilation, rank)
    for name, values, least in (("kernel_size", kernel, 1), ("stride", step, 1), ("padding", pad, 0), ("dilation", spread, 1)):
        if min(values) < least:
            raise RuntimeError(f"{caller}: {name} must be at least {least}, got {values}")
    most = tuple(k // 2 for k in kernel)
    if any(p > m for p, m in zip(pad, most, strict=True)):
        raise RuntimeError(f"{caller}: padding {pad} is more than half of kernel_size {kernel}; at most {most} works")
    return Window(kernel, step, pad, spread, ceil_mode)


def adaptive(caller: str, rank: int, output_size: Any) -> Adaptive:
    """The adaptive pooling to ``output_size`` (an int, None, or a sequence of ``rank`` of them) that a user asked ``caller`` for."""
    values = list(output_size) if _several(output_size) else [output_size] * rank
    if len(values) == 1:
        values *= rank
    numbers = ints(caller, "output_size", [0 if v is None else v for v in values], rank)
    if min(numbers) < 0:
        raise RuntimeError(f"{caller}: output_size must be at least 0, got {numbers}")
    return Adaptive(tuple(None if v is None else n for v, n in zip(values, numbers, strict=True)))


def check_shape(caller: str, rank: int, shape: Sequence[int]) -> None:
    """Refuse what is not channels and ``rank`` axes, each of at least 1, or N of that."""
    words = WORDS[rank]
    if len(shape) not in (rank + 1, rank + 2):
        raise RankError(f"{caller}: expected a {words.shapes} input, got {len(shape)} dimensions: {tuple(shape)}")
    if 0 in shape[-rank - 1 :]:
        axes = f"and {words.axes}" if rank == 1 else words.axes
        joint = " " if rank == 1 else ", "
        raise RuntimeError(f"{caller}: channels{joint}{axes} must not be empty (N may be 0), got {tuple(shape)}")


def output_size(caller: str, window: Window | Bins, *sizes: int) -> Ints:
    """``window.output_size``, refused if nothing would come out."""
    if max(sizes) > LARGEST:  # lanes know their column in 32 bits
        raise RuntimeError(f"{caller}: {WORDS[len(sizes)].axes} must be below 2**31, got {tuple(sizes)}")
    out = window.output_size(*sizes)
    if min(out) < 1:
        assert isinstance(window, Window)
        padded = tuple(size + 2 * p for size, p in zip(sizes, window.padding, strict=True))
        what = f"kernel_size {window.kernel_size}"
        if max(window.dilation) > 1:
            what += f" dilated by {window.dilation} to {window.extent}"
        raise RuntimeError(
            f"{caller}: {what} is larger than the padded input {padded}: the output would be {out}; the largest that fits is {padded}"
        )
    if window.taps > LARGEST:
        raise RuntimeError(f"{caller}: a window of kernel_size {window.kernel_size} has {window.taps} taps, more than 2**31 - 1")
    return out
