"""The truth: every pooling type by gathering windows and reducing them tap by tap, in the dtype of the input, slowly and obviously.

``REFERENCE[kind](v, inside, count, size, *parameters)`` takes v (..., taps), inside (taps) or (outputs, taps) bool, and returns y (...);
selecting kinds return (y, tap).  In float64 it is the truth, in float32 it is what torch makes of the same formula.
"""

import math
from itertools import product

import torch

PARAMETERS = {"lp": (3.0,), "lp_negative": (-2.0,)}
"""What the tests pass to kinds that take parameters; -2 has an exact reciprocal, or the float64 truth would itself be off by the
exponent's rounding times the logarithm of the sum."""


def select(v, inside, beats):
    """Tap by tap: the first inside stands until another beats it; NaN beats all."""
    worst = {"max": -math.inf, "min": math.inf}[beats]
    best = torch.full(v.shape[:-1], worst, dtype=v.dtype)
    tap = inside.int().argmax(-1).expand(v.shape[:-1]).clone()
    for k in range(v.shape[-1]):
        x = v[..., k]
        wins = inside[..., k] & (((x > best) if beats == "max" else (x < best)) | x.isnan())
        best, tap = torch.where(wins, x, best), torch.where(wins, k, tap)
    return best, tap


def total(v):
    """The sum over taps: one after the other, as torch's pooling does, unless the window is a map, as torch's sum does."""
    if v.shape[-2] == 1:
        return v.sum(-1)
    return sum(v.unbind(-1))


def avg(v, inside, count, size):
    return total(v.where(inside, 0)) / count


def lp(v, inside, count, size, p):
    return (total(v.abs().pow(p).where(inside, 0)) * (size / count)).pow(1 / p)


def linf(v, inside, count, size):
    return v.where(inside, 0).abs().amax(-1)


def stochastic(v, inside, count, size, u):
    w = v.where(inside, 0).clamp(min=0)
    s = total(w)
    passed = (w.cumsum(-1) > (u * s)[..., None]) & (w > 0)
    tap = torch.where(passed.any(-1), passed.int().argmax(-1), -1)
    y = v.gather(-1, tap.clamp(min=0)[..., None])[..., 0]
    return y.where(tap >= 0, 0).where(s.isfinite(), math.nan), tap


def stochastic_mean(v, inside, count, size):
    w = v.where(inside, 0).clamp(min=0)
    s = total(w)
    return torch.where(s == 0, 0, total(w * w) / s.where(s != 0, 1))


REFERENCE = {
    "max": lambda v, inside, count, size: select(v, inside, "max"),
    "min": lambda v, inside, count, size: select(v, inside, "min"),
    "avg": avg,
    "l1": lambda *a: lp(*a, 1),
    "l2": lambda *a: lp(*a, 2),
    "linf": linf,
    "lp": lp,
    "lp_negative": lp,
    "stochastic": stochastic,
    "stochastic_mean": stochastic_mean,
}


def taps(w, height, width):
    """For each output and tap: its flat position in the input plane or -1, and whether it is inside input and padding."""
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = w.kernel_size, w.stride, w.padding, w.dilation
    out_h, out_w = w.output_size(height, width)
    flat, padded = [], []
    for oh, ow in product(range(out_h), range(out_w)):
        for i, j in product(range(kh), range(kw)):
            row, column = oh * sh - ph + i * dh, ow * sw - pw + j * dw
            flat.append(row * width + column if 0 <= row < height and 0 <= column < width else -1)
            padded.append(row < height + ph and column < width + pw)
    shape = out_h * out_w, kh * kw
    return torch.tensor(flat).reshape(shape), torch.tensor(padded).reshape(shape), (out_h, out_w)


def pool(kind, x, w, include_pad=True, divisor=None, extra=()):
    """y (N, C, OH, OW), and for a selecting kind the chosen flat positions (-1: none).  Summing kinds
    are differentiable by torch."""
    n, c, height, width = x.shape
    if w is None:
        flat, padded, out = torch.arange(height * width)[None], torch.ones(1, height * width, dtype=torch.bool), (1, 1)
    else:
        flat, padded, out = taps(w, height, width)
    inside = flat >= 0
    v = x.flatten(2)[:, :, flat.clamp(min=0)]
    count = (padded if include_pad else inside).sum(-1).to(x.dtype) if divisor is None else torch.tensor(float(divisor), dtype=x.dtype)
    found = REFERENCE[kind.name](v, inside, count, flat.shape[1], *extra)
    if not kind.selects:
        return found.reshape(n, c, *out), None
    y, tap = found
    chosen = flat.expand(n, c, -1, -1).gather(3, tap.clamp(min=0)[..., None])[..., 0].where(tap >= 0, -1)
    return y.reshape(n, c, *out), chosen.reshape(n, c, *out)
