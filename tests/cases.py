"""The geometries, layouts and values that the tests of every kind go through."""

import math

import torch

from fastpool.window import Window


def window(kernel_size, stride=None, padding=None, dilation=None, ceil_mode=False):
    rank = len(kernel_size)
    return Window(kernel_size, stride or kernel_size, padding or (0,) * rank, dilation or (1,) * rank, ceil_mode)


# name -> (shape, window): odd sizes, size 1, window = input, columns below and above a register, each nest's every specialisation.
GEOMETRIES = {
    "2x2s2": ((2, 3, 12, 38), window((2, 2))),
    "2x2s2-ceil": ((1, 2, 7, 35), window((2, 2), ceil_mode=True)),
    "3x3s2p1": ((2, 17, 13, 37), window((3, 3), (2, 2), (1, 1))),
    "3x3s1p1-one-row": ((1, 2, 1, 19), window((3, 3), (1, 1), (1, 1))),
    "3x3s1p1": ((1, 5, 9, 34), window((3, 3), (1, 1), (1, 1))),
    "3x3s1p1-parts": ((1, 2, 45, 150), window((3, 3), (1, 1), (1, 1))),
    "3x3s2p1-parts": ((1, 2, 99, 150), window((3, 3), (2, 2), (1, 1))),
    "5x5s1p2": ((1, 2, 9, 50), window((5, 5), (1, 1), (2, 2))),
    "2x3s3p1-apart": ((2, 2, 9, 98), window((2, 3), (3, 3), (0, 1))),
    "3x3s1p1-wide": ((1, 2, 4, 3001), window((3, 3), (1, 1), (1, 1))),
    "3x3s1-dilated": ((2, 3, 8, 40), window((3, 3), (1, 1), (1, 1), (2, 1))),
    "window-is-input": ((2, 3, 5, 7), window((5, 7))),
    "one-pixel": ((3, 2, 1, 1), window((1, 1))),
    "asymmetric-dilated": ((1, 3, 16, 21), window((2, 3), (1, 3), (1, 1), (3, 2))),
    "stride-over-kernel-ceil": ((1, 4, 11, 26), window((2, 2), (3, 3), (1, 1), ceil_mode=True)),
    "9x9s1p4": ((1, 2, 11, 20), window((9, 9), (1, 1), (4, 4))),
    "7x7s7": ((1, 33, 7, 42), window((7, 7))),
    "3x100s100p1-wide": ((1, 2, 7, 1250), window((3, 100), (3, 100), (1, 30))),
    "4x130s90-wide": ((1, 3, 9, 1190), window((4, 130), (5, 90))),
    "1x2500s500-wide": ((1, 2, 3, 3100), window((1, 2500), (1, 500))),
    "few-8x8s8": ((2, 3, 40, 48), window((8, 8))),
    "few-5x7s6": ((2, 3, 25, 43), window((5, 7), (6, 8), (1, 2))),
    "3x3s2p1-wide": ((1, 2, 5, 3001), window((3, 3), (2, 2), (1, 1))),
    "2x2s1-many-channels": ((1, 277, 3, 5), window((2, 2), (1, 1))),
    "narrow-3x3s2p1": ((2, 19, 7, 7), window((3, 3), (2, 2), (1, 1))),
    "flat-3x3s1p1": ((1, 19, 14, 14), window((3, 3), (1, 1), (1, 1))),
    "flat-3x3s2p1": ((2, 17, 6, 8), window((3, 3), (2, 2), (1, 1))),
    "flat-5x5s1p2": ((2, 19, 9, 7), window((5, 5), (1, 1), (2, 2))),
    "flat-2x2s1p1-one-row": ((1, 33, 1, 48), window((2, 2), (1, 1), (1, 1))),
    "narrow-2x2s1": ((1, 70, 5, 6), window((2, 2), (1, 1))),
    "narrow-2x3s3": ((3, 7, 11, 8), window((2, 3), (3, 1), (1, 1))),
    "narrow-one-output": ((1, 40, 2, 3), window((2, 3))),
    "across-5x4s1p2": ((2, 19, 9, 7), window((5, 4), (1, 1), (2, 2))),
    "across-dilated": ((1, 37, 6, 9), window((2, 3), (1, 3), (1, 1), (3, 2))),
    "filled-3x3s2p1": ((2, 32, 7, 9), window((3, 3), (2, 2), (1, 1))),
    "filled-2x3s1": ((1, 64, 5, 6), window((2, 3), (1, 1))),
    "filled-2x2s1s3": ((1, 64, 3, 8), window((2, 2), (1, 3))),
    "dilated-padding-only": ((1, 2, 2, 2), window((2, 2), (1, 1), (1, 1), (3, 3))),
}
LONG = {
    "1d-2s2": ((2, 3, 38), window((2,))),
    "1d-3s2p1-ceil": ((1, 5, 42), window((3,), (2,), (1,), ceil_mode=True)),
    "1d-31s1p15": ((2, 2, 70), window((31,), (1,), (15,))),
    "1d-5s7d2": ((3, 1, 61), window((5,), (7,), (2,), (2,))),
    "1d-2s50": ((2, 3, 230), window((2,), (50,))),
    "1d-one": ((2, 3, 1), window((1,))),
}
DEEP = {
    "3d-2s2": ((2, 3, 4, 6, 18), window((2, 2, 2))),
    "3d-3s2p1-ceil": ((1, 5, 6, 7, 20), window((3, 3, 3), (2, 2, 2), (1, 1, 1), ceil_mode=True)),
    "3d-asymmetric-dilated": ((1, 2, 5, 9, 13), window((1, 3, 2), (2, 1, 3), (0, 1, 1), (1, 2, 3))),
    "3d-narrow": ((2, 9, 2, 5, 6), window((1, 3, 3), (1, 2, 2), (0, 1, 1))),
    "3d-across": ((1, 18, 3, 4, 5), window((2, 3, 3), (1, 2, 2), (1, 1, 1))),
    "3d-filled": ((1, 16, 5, 4, 7), window((3, 3, 3), (2, 2, 2), (1, 1, 1))),
    "3d-window-is-input": ((2, 2, 3, 4, 5), window((3, 4, 5))),
}
GEOMETRIES |= LONG | DEEP
EVERY_NEST = (
    "3x3s2p1", "3x3s2p1-wide", "asymmetric-dilated", "9x9s1p4", "7x7s7", "window-is-input", "1d-3s2p1-ceil", "3d-3s2p1-ceil",
    "flat-3x3s2p1", "narrow-3x3s2p1", "across-5x4s1p2", "across-dilated",
)  # fmt: skip
"""Of GEOMETRIES, enough to send a pooling type through each loop nest."""
EVERY_KIND = ("3x3s2p1", "asymmetric-dilated", "9x9s1p4", "7x7s7")
"""Enough for each way in which a pooling type's arithmetic is called."""


def adversarial(shape, dtype, special=True):
    """Values with ties, and zeros of both signs; with ``special`` also NaN and infinities, or the largest and smallest integers."""
    if not dtype.is_floating_point:
        least, most = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        x = torch.randint(max(least, -3), min(most, 3) + 1, shape).to(dtype)
        for value in (least, most) if special else ():
            x[torch.rand(shape) < 0.1] = value
        return x
    x = torch.randint(-3, 4, shape).to(dtype) + torch.where(torch.rand(shape) < 0.3, torch.rand(shape), 0.0).to(dtype)
    x[torch.rand(shape) < 0.1] = -0.0
    if special:
        for value in (math.nan, math.inf, -math.inf):
            x[torch.rand(shape) < 0.04] = value
    return x


def _inside(x, pad, slices):
    """x as a slice of a larger tensor full of NaN (or the largest integer): a kernel that strays reads it."""
    poison = math.nan if x.is_floating_point() else 1 if x.dtype == torch.bool else torch.iinfo(x.dtype).max
    big = torch.full([size + extra for size, extra in zip(x.shape, pad, strict=True)], poison, dtype=x.dtype)
    view = big[slices]
    view.copy_(x)
    return view


def _channels_last(x):
    """Dense as (N, *sizes, C)."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def _channels_last_sliced(x):
    more = x.dim() - 3
    view = _inside(x.movedim(1, -1), (1, *[1] * more, 2, 3), (slice(1, None), *[slice(1, None)] * more, slice(2, None), slice(1, -2)))
    return view.movedim(-1, 1)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": _channels_last,
    "sliced": lambda x: _inside(x, (1, 2, *[0] * (x.dim() - 2)), (slice(1, None), slice(1, -1))),
    "cropped": lambda x: _inside(x, (0, 0, *[3] * (x.dim() - 3), 5), (..., *[slice(2, -1)] * (x.dim() - 3), slice(1, -4))),
    "channels_last-sliced": _channels_last_sliced,
    "transposed": lambda x: _inside(x.transpose(0, -1), (1, *[0] * (x.dim() - 2), 1), (slice(1, None), ..., slice(1, None))).transpose(
        0, -1
    ),
}
"""name -> the same values in another place in memory: a dense axis each, but for the last, which is copied."""

DTYPES = {"f32": torch.float32, "f64": torch.float64}
