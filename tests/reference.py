"""The truth: every pooling type by gathering windows and reducing them tap by tap, in the dtype of the input, slowly and obviously.

``REFERENCE[kind](v, inside, count, size, *parameters)`` takes v (..., taps), inside (taps) or (outputs, taps) bool, and returns y (...);
selecting kinds return (y, tap).  In float64 it is the truth, in float32 it is what torch makes of the same formula.
"""

import math
from functools import reduce
from itertools import product

import torch

PARAMETERS = {"lp": (3.0,), "lp_negative": (-2.0,), "gem": (3.0, 1e-6)}
"""What the tests pass to kinds that take parameters; -2 has an exact reciprocal, or the float64 truth would itself be off by the
exponent's rounding times the logarithm of the sum."""


def select(v, inside, beats):
    """Tap by tap: the first inside stands until another beats it; NaN beats all."""
    if v.is_floating_point():
        worst = {"max": -math.inf, "min": math.inf}[beats]
    else:
        limits = (0, 1) if v.dtype == torch.bool else (torch.iinfo(v.dtype).min, torch.iinfo(v.dtype).max)
        worst = limits[beats == "min"]
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


def gem(v, inside, count, size, p, eps):
    mean = total(v.clamp(min=eps).pow(p).where(inside, 0)) / inside.sum(-1).clamp(min=1)
    return mean.pow(1 / p)


def soft(v, inside, count, size):
    v = v.where(inside, -math.inf)
    largest = v.amax(-1).detach()
    weights = (v - largest.where(largest.isfinite(), 0)[..., None]).exp()
    return (total(weights * v.where(v > -math.inf, 0)) / total(weights)).where(largest.isfinite(), largest)


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
    "gem": gem,
    "soft": soft,
}


def taps(w, *sizes):
    """For each output and tap: its flat position in the input plane or -1, and whether it is inside input and padding."""
    out = w.output_size(*sizes)
    flat, padded = [], []
    for o in product(*map(range, out)):
        for k in product(*map(range, w.kernel_size)):
            at = [a * s - p + i * d for a, s, p, i, d in zip(o, w.stride, w.padding, k, w.dilation, strict=True)]
            inside = all(0 <= i < size for i, size in zip(at, sizes, strict=True))
            flat.append(reduce(lambda total, step: total * step[1] + step[0], zip(at, sizes, strict=True), 0) if inside else -1)
            padded.append(all(i < size + p for i, size, p in zip(at, sizes, w.padding, strict=True)))
    shape = math.prod(out), w.taps
    return torch.tensor(flat).reshape(shape), torch.tensor(padded).reshape(shape), out


def bins(outputs, *sizes):
    """``taps`` of adaptive pooling, by torch's rule: the taps of a bin first, then -1 up to the largest bin's number."""
    ranges = [[range(i * n // o, -(-(i + 1) * n // o)) for i in range(o)] for o, n in zip(outputs, sizes, strict=True)]
    flat = [
        [reduce(lambda total, step: total * step[1] + step[0], zip(at, sizes, strict=True), 0) for at in product(*window)]
        for window in product(*ranges)
    ]
    most = max(map(len, flat))
    found = torch.tensor([row + [-1] * (most - len(row)) for row in flat])
    return found, found >= 0, tuple(outputs)


def pool(kind, x, w, include_pad=True, divisor=None, extra=()):
    """y (N, C, *out), and for a selecting kind the chosen flat positions (-1: none).  Summing kinds are differentiable by torch.

    ``w``: a window, None for the whole map, or a list of ints: the outputs of adaptive pooling.
    """
    n, c, *sizes = x.shape
    if w is None:
        size = math.prod(sizes)
        flat, padded, out = torch.arange(size)[None], torch.ones(1, size, dtype=torch.bool), (1,) * len(sizes)
    elif isinstance(w, list):
        flat, padded, out = bins(w, *sizes)
    else:
        flat, padded, out = taps(w, *sizes)
    inside = flat >= 0
    v = x.flatten(2)[:, :, flat.clamp(min=0)]
    real = x.dtype if x.is_floating_point() else torch.float64
    count = (padded if include_pad else inside).sum(-1).to(real) if divisor is None else torch.tensor(float(divisor), dtype=real)
    found = REFERENCE[kind.name](v, inside, count, flat.shape[1], *extra)
    if not kind.selects:
        return found.reshape(n, c, *out), None
    y, tap = found
    chosen = flat.expand(n, c, -1, -1).gather(3, tap.clamp(min=0)[..., None])[..., 0].where(tap >= 0, -1)
    return y.reshape(n, c, *out), chosen.reshape(n, c, *out)
