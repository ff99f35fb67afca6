"""The geometries, layouts and values that the tests of every kind go through."""

import math

import torch

from fastpool.window import Window


def window(kernel_size, stride=None, padding=(0, 0), dilation=(1, 1), ceil_mode=False):
    return Window(kernel_size, stride or kernel_size, padding, dilation, ceil_mode)


GEOMETRIES = {
    "2x2s2": ((2, 3, 12, 38), window((2, 2))),
    "2x2s2-ceil": ((1, 2, 7, 35), window((2, 2), ceil_mode=True)),
    "3x3s2p1": ((2, 17, 13, 37), window((3, 3), (2, 2), (1, 1))),
    "3x3s1p1-one-row": ((1, 2, 1, 19), window((3, 3), (1, 1), (1, 1))),
    "3x3s1p1": ((1, 5, 9, 34), window((3, 3), (1, 1), (1, 1))),
    "window-is-input": ((2, 3, 5, 7), window((5, 7))),
    "one-pixel": ((3, 2, 1, 1), window((1, 1))),
    "asymmetric-dilated": ((1, 3, 16, 21), window((2, 3), (1, 3), (1, 1), (3, 2))),
    "stride-over-kernel-ceil": ((1, 4, 11, 26), window((2, 2), (3, 3), (1, 1), ceil_mode=True)),
    "9x9s1p4": ((1, 2, 11, 20), window((9, 9), (1, 1), (4, 4))),
    "7x7s7": ((1, 33, 7, 42), window((7, 7))),
    "dilated-padding-only": ((1, 2, 2, 2), window((2, 2), (1, 1), (1, 1), (3, 3))),
}
"""name -> (shape, window): odd sizes, size 1, window = input, columns below and above a register, each nest's every specialisation."""


def adversarial(shape, dtype, special=True):
    """Values with ties, and zeros of both signs; with ``special`` also NaN and infinities."""
    x = torch.randint(-3, 4, shape).to(dtype) + torch.where(torch.rand(shape) < 0.3, torch.rand(shape), 0.0).to(dtype)
    x[torch.rand(shape) < 0.1] = -0.0
    if special:
        for value in (math.nan, math.inf, -math.inf):
            x[torch.rand(shape) < 0.04] = value
    return x


def _inside(x, pad, slices):
    """x as a slice of a larger tensor full of NaN: a kernel that strays reads NaN."""
    big = torch.full([size + extra for size, extra in zip(x.shape, pad, strict=True)], math.nan, dtype=x.dtype)
    view = big[slices]
    view.copy_(x)
    return view


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: _inside(x, (1, 2, 0, 0), (slice(1, None), slice(1, -1))),
    "cropped": lambda x: _inside(x, (0, 0, 3, 5), (..., slice(2, -1), slice(1, -4))),
    "channels_last-sliced": lambda x: _inside(
        x.permute(0, 2, 3, 1), (1, 1, 2, 3), (slice(1, None), slice(1, None), slice(2, None), slice(1, -2))
    ).permute(0, 3, 1, 2),
    "transposed": lambda x: _inside(x.permute(0, 1, 3, 2), (0, 0, 1, 1), (..., slice(1, None), slice(1, None))).permute(0, 1, 3, 2),
}
"""name -> the same values in another place in memory: a dense axis each, but for the last, which is copied."""

DTYPES = {"f32": torch.float32, "f64": torch.float64}
