"""A pooling's geometry, as the backend describes it to kernels."""

from typing import Any, NamedTuple


class Geometry(NamedTuple):
    """What a plan depends on besides the reduction: an input's layout and the window on it.  Axes: N, C, D, H, W."""

    dtype: str
    shape: tuple[int, int, int, int, int]
    strides: tuple[int, int, int, int, int]
    channels_last: bool
    window: Any
    """Any object like fastpool.window's with three axes; None: the whole map."""
    include_pad: bool = True
    divisor: int | None = None

    @property
    def end(self):
        """One past the last element, counted from the first."""
        return sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True)) + 1


def dense_strides(channels, sizes, channels_last):
    """Strides of N, C, D, H and W of a dense tensor."""
    depth, height, width = sizes
    if channels_last:
        return depth * height * width * channels, 1, height * width * channels, width * channels, channels
    return channels * depth * height * width, depth * height * width, height * width, width, 1
