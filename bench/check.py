"""Whether a result is right: nothing is timed that did not pass here."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .cases import Window
from .peers import unfolded

SELECTING = frozenset({"max", "min", "global_max"})
"""Poolings that copy an element: no rounding, so results are bit-equal."""

ROUNDING = 1e-6
"""Two numbers at most so far apart may be one number but for rounding, the larger of this part of them and this."""

TOLERANCE = 1e-5
"""Of the result, or of the input's largest value over ten where sums cancel: float32 rounding of sums of up to 50,000 terms."""


class WrongResultError(Exception):
    """A provider's result is not what the pooling is."""


def said(error: Exception) -> str:
    """In one line."""
    if isinstance(error, WrongResultError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class Result(NamedTuple):
    value: torch.Tensor
    """(N, C, OH, OW)"""
    gradient: torch.Tensor
    """(N, C, H, W), of the input, for ``upstream`` at the output."""


def upstream(shape: torch.Size) -> torch.Tensor:
    """The gradient given at every output of a shape: seeded normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def agree(expected: Result, actual: Result, largest: float, bit_equal: bool, undecided: torch.Tensor | None = None) -> None:
    """Raise WrongResultError unless ``actual`` is ``expected``: forward bit for bit if ``bit_equal``, else up to rounding.

    ``largest``: the largest magnitude in what was pooled.  Gradients are compared where PyTorch's is a number: that of its
    lp_pool2d is NaN around windows of zeros, where fastpool's is 0.  With ``undecided``, (N, C), sums over planes are, which may differ
    by so much more.
    """
    _finite(actual)
    if actual.value.shape != expected.value.shape:
        raise WrongResultError(f"shape {tuple(actual.value.shape)}, not {tuple(expected.value.shape)}")
    if bit_equal and not torch.equal(actual.value, expected.value):
        raise WrongResultError(f"values differ by up to {(actual.value - expected.value).abs().max():.2g}, and must not differ at all")
    _close("values", expected.value, actual.value, TOLERANCE / 10 * largest)
    if undecided is not None:
        size = TOLERANCE * float(upstream(actual.value.shape).abs().sum((2, 3)).max())
        apart = (expected.gradient.sum((2, 3)) - actual.gradient.sum((2, 3))).abs() - undecided
        _close("sums of gradients", torch.zeros_like(apart), apart.clamp(min=0), size)
        return
    known = expected.gradient.isfinite()
    _close("gradients", expected.gradient.where(known, 0), actual.gradient.where(known, 0), TOLERANCE)


def undecided(pooling: str, window: Window, values: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    """(N, C): how far apart sums of gradients by what was activated may be, where max or min pooling of ``values``, an activation's, may
    choose any element of a window that is equal to the chosen one up to rounding: their ``slopes`` differ, by 0.5 on the two sides of
    GELU's valley."""
    order = -values if pooling == "min" else values
    if pooling.startswith("global"):
        order, slopes = order.flatten(2)[..., None], slopes.flatten(2)[..., None]
    else:
        around, bare = [window.padding] * 4, window._replace(padding=0)
        order, slopes = (unfolded(F.pad(t, around, value=fill), bare) for t, fill in ((order, -torch.inf), (slopes, 0.0)))
    best = order.amax(2, keepdim=True)
    near = order >= best - ROUNDING * best.abs().clamp(min=1)
    spread = slopes.where(near, -torch.inf).amax(2) - slopes.where(near, torch.inf).amin(2)
    return (spread * upstream(torch.Size((*spread.shape[:2], 1, spread.shape[2]))).abs().squeeze(2)).sum(2)


def drawn(x: torch.Tensor, window: Window, pooled: Result) -> None:
    """Raise WrongResultError unless ``pooled`` can be stochastic pooling of x, (N, C, H, W).

    Each output is a positive element of its window, or 0 where there is none; the gradient of each output that is not 0 arrives at
    one element.
    """
    _finite(pooled)
    weights = unfolded(x, window).clamp(min=0)
    y = pooled.value.flatten(2)
    if y.shape[2] != weights.shape[3]:
        raise WrongResultError(f"{y.shape[2]} outputs a map, not {weights.shape[3]}")
    if not (weights == y[:, :, None]).any(2).all():
        raise WrongResultError("an output is no element of its window")
    if not torch.equal(y > 0, weights.amax(2) > 0):
        raise WrongResultError("an output is 0 although its window has positive elements")
    gy = upstream(pooled.value.shape)
    sent = gy.where(pooled.value > 0, 0).sum((2, 3))
    # The two sums add the same terms in another order.
    _close("sums of gradients", sent, pooled.gradient.sum((2, 3)), TOLERANCE * float(gy.abs().sum((2, 3)).max()))


def _finite(result: Result) -> None:
    for name, tensor in zip(Result._fields, result, strict=True):
        if not tensor.isfinite().all():
            raise WrongResultError(f"a {name} is not finite")


def _close(what: str, expected: torch.Tensor, actual: torch.Tensor, absolute: float) -> None:
    if not torch.allclose(actual, expected, rtol=TOLERANCE, atol=absolute):
        raise WrongResultError(f"{what} differ by up to {(actual - expected).abs().max():.2g}")
