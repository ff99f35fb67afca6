"""The truth of convolution and its gradients: numpy, tap by tap, slowly and obviously, in the dtype of the arrays.

Padding is a (before, after) for each axis.  Of float64 or of small integers it is exact or nearly so; of np.longdouble it judges float64.
"""

from itertools import product
from math import prod

import numpy as np


def _tap(position, outputs, stride, dilation):
    """Where a tap reads the padded maps, for all outputs."""
    steps = zip(position, outputs, stride, dilation, strict=True)
    return (..., *(slice(k * d, k * d + (n - 1) * s + 1, s) for k, n, s, d in steps))


def _padded(x, padding):
    return np.pad(x, [(0, 0), (0, 0), *padding])


def _outputs(sizes, kernel, stride, padding, dilation):
    parts = zip(sizes, kernel, stride, padding, dilation, strict=True)
    return tuple((n + a + b - d * (k - 1) - 1) // s + 1 for n, k, s, (a, b), d in parts)


def forward(x, w, bias, stride, padding, dilation, groups):
    """x (N, C, *sizes), w (O, C / groups, *kernel), bias (O,) or None -> (N, O, *outputs)"""
    n, kernel = x.shape[0], w.shape[2:]
    out = _outputs(x.shape[2:], kernel, stride, padding, dilation)
    y = np.zeros((n, groups, w.shape[0] // groups, *out), x.dtype)
    x = _padded(x, padding).reshape(n, groups, w.shape[1], *(size + a + b for size, (a, b) in zip(x.shape[2:], padding, strict=True)))
    w = w.reshape(groups, w.shape[0] // groups, *w.shape[1:])
    for k in product(*map(range, kernel)):
        y += np.einsum("ngi...,goi->ngo...", x[_tap(k, out, stride, dilation)], w[(..., *k)])
    y = y.reshape(n, y.shape[1] * y.shape[2], *out)
    return y if bias is None else y + bias.reshape(-1, *[1] * len(out))


def backward(gy, x, w, stride, padding, dilation, groups):
    """(gx, gw, gb)"""
    n, kernel, out = x.shape[0], w.shape[2:], gy.shape[2:]
    wide = tuple(size + a + b for size, (a, b) in zip(x.shape[2:], padding, strict=True))
    padded = _padded(x, padding).reshape(n, groups, w.shape[1], *wide)
    gx, gw = np.zeros_like(padded), np.zeros((groups, w.shape[0] // groups, *w.shape[1:]), w.dtype)
    w = w.reshape(gw.shape)
    g = gy.reshape(n, groups, w.shape[1], *out)
    for k in product(*map(range, kernel)):
        here = _tap(k, out, stride, dilation)
        gx[here] += np.einsum("ngo...,goi->ngi...", g, w[(..., *k)])
        gw[(..., *k)] = np.einsum("ngop,ngip->goi", *(t.reshape(*t.shape[:3], prod(out)) for t in (g, padded[here])))
    inside = (..., *(slice(a, a + size) for size, (a, _) in zip(x.shape[2:], padding, strict=True)))
    axes = tuple(axis for axis in range(gy.ndim) if axis != 1)
    return gx.reshape(*x.shape[:2], *wide)[inside], gw.reshape(-1, *gw.shape[2:]), gy.sum(axes)
