"""Convolution and pooling in one launch: a thread makes whole windows, and writes what each comes to."""

import functools
import math

from .. import correlation
from ..geometry import dense_strides
from .convolution import Convolution, is_depthwise
from .correlate import RUN


class Device:
    """The plans of one device."""

    def __init__(self, index):
        self.index = index
        self.planned = functools.lru_cache(maxsize=1024)(self._planned)

    def _planned(self, geometry, after, kind, window, include_pad, divisor):
        """-> convolution.py's Convolution, pooled by a reduction without parameters; None where the two are to be taken one by one: of
        windows that overlap, reach into padding or are not a part of a thread's RUN results, and of so few that blocks divide the sums."""
        problem, taps = correlation.forward(geometry), math.prod(window.kernel_size)
        apart = window.stride == window.kernel_size and max(window.dilation) == 1 and max(window.padding) == 0
        out = window.output_size(*geometry.out)
        inside = all(n * k <= size for n, k, size in zip(out, window.kernel_size, geometry.out, strict=True))
        if kind.parameters or kind.draws or not (apart and inside) or taps == 1 or RUN % taps or is_depthwise(problem):
            return None
        pooled = problem._replace(y_strides=dense_strides(geometry.weight_shape[0], out, geometry.channels_last))
        found = Convolution(self.index, [pooled], after, (kind, window.kernel_size, taps if divisor is None else divisor), out)
        return None if found.sums else found


on = functools.cache(Device)
