"""What stands before and after a pooling, in one pass with it where a law or its arithmetic allows.

``before``: pool(f(x)); ``after``: f(pool(x)).  For max and min, f moves behind the pooling where it rises (max(f(x)) = f(max(x))), turns
max into min where it falls, and where it falls, then rises is looked at in two points a window; elsewhere, and in sums, it is evaluated
as elements are read, if windows do not overlap or f costs nothing.  Behind the pooling it is applied in the pooling's registers.  What a
gradient then needs is a byte an output where f' is 0 or 1, with y where y tells f', else with the element chosen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from . import activations, backend
from .activations import Applied
from .autograd import activate
from .backend import Pooling
from .kernels import fusion
from .kernels.pool import FLOATS, KINDS
from .window import Window

Step = Applied | nn.Module
"""What is applied elementwise: an activation of kernels/activation, or a module that is called as it is."""

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CALLED = (*_NORMS, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity)


def steps(caller: str, given: Any) -> tuple[Step, ...]:
    """``before`` or ``after`` as steps: a name, a module of torch.nn, or several in a tuple, list or nn.Sequential.

    ValueError for a name there is none of, TypeError for what is none of these.
    """
    if given is None:
        return ()
    if isinstance(given, Applied):
        return (given,)
    if isinstance(given, (tuple, list, nn.Sequential)):
        return tuple(step for part in given for step in steps(caller, part))
    learned = isinstance(given, nn.PReLU) and (given.weight.numel() > 1 or given.weight.requires_grad)
    if learned or isinstance(given, _CALLED) or (isinstance(given, nn.RReLU) and given.training):
        return (given,)
    found = activations.of(caller, given)
    if found is None:
        raise TypeError(
            f"{caller}: before and after must be an activation's name ('relu', 'gelu', ...), such a module of torch.nn, a dropout, a "
            f"batch-norm, or several in a tuple, got {given!r}"
        )
    return (found,)


def _rises(step: Step) -> bool:
    """Whether a step passes max and min: its own sign is known."""
    if isinstance(step, Applied):
        return step.shape.rises
    return isinstance(step, nn.Identity) or (isinstance(step, nn.PReLU) and bool((step.weight >= 0).all()))


@functools.lru_cache(maxsize=1024)
def _derived(op: Pooling, kind: Any, slope: Applied | None = None) -> Pooling:
    """The operation with a derived kind, apart from its parameters; one object for equal arguments."""
    found = Pooling(op.caller, kind, op.rank, op.window, (), op.include_pad, op.divisor)
    found.equal = None
    found.slope = slope
    return found


def _leaves_windows_empty(op: Pooling) -> bool:
    """Whether a window may hold nothing but padding, whose value f would change."""
    return isinstance(op.window, Window) and max(op.window.dilation) > 1 and max(op.window.padding) > 0


def _overlap(op: Pooling) -> bool:
    """Whether elements are read by several windows: an f that costs had better have a pass of its own then."""
    return isinstance(op.window, Window) and op.window.taps > math.prod(op.window.stride)


def _opposite(op: Pooling) -> Pooling:
    return _derived(op, KINDS["min" if op.kind.structure.order > 0 else "max"])


def _taken_in(op: Pooling, f: Applied, needs: bool) -> tuple[Pooling, bool] | None:
    """(the operation whose windows see f(x), whether f is still to be applied to its result), or None: there is none."""
    kind, shape = op.kind, f.shape
    if _leaves_windows_empty(op):
        return None
    if kind.structure.order:
        if shape.rises:
            return op, True
        if shape.falls:
            return _opposite(op), True
        if kind.structure.order > 0 and shape.minimum is not None and math.isfinite(shape.minimum):
            bounded = fusion.is_bounded(*f)
            return _derived(op, fusion.two_point(f.activation, shape.minimum, bounded, chosen=needs)).at(f.parameters), needs
        if needs or not fusion.keeps_neutral(kind, f.activation, f.parameters):
            return None
        return _derived(op, fusion.by_value(kind, f.activation)).at(f.parameters), False
    if kind.selects or shape.root is None or not fusion.is_one_sum(kind) or (_overlap(op) and not shape.ordered):
        return None
    return _derived(op, fusion.fed(kind, f.activation, shape.root)).at((*op.parameters, *f.parameters)), False


def _followed(op: Pooling, f: Applied, needs: bool) -> Pooling | None:
    """The operation that gives f of what ``op`` gives; None where its gradient needs more than that saves."""
    kind, slope = op.kind, None
    if needs:
        switches = f.activation.switches and kind.selects and not kind.draws
        if not switches and (not kind.selects or f.slope is None):
            return None
        kind, slope = fusion.activated(kind, f.activation, switches), None if switches else f
    else:
        kind = fusion.activated(kind, f.activation)
    return _derived(op, kind, slope).at((*op.parameters, *f.parameters))


def _applied(given: Sequence[Step], x: torch.Tensor, fast: bool) -> torch.Tensor:
    for step in given:
        if not isinstance(step, Applied):
            x = step(x)
        else:
            x = activate(x, step) if fast else activations.on_torch(step, x)
    return x


def fused(
    x: torch.Tensor,
    op: Pooling,
    before: Any,
    after: Any,
    affine: Any,
    fast: bool,
    tiny: bool,
    pooled: Callable[[torch.Tensor, Pooling], torch.Tensor],
) -> torch.Tensor:
    """after(pool(before(scale * x + shift))), ``pooled(x, op)`` being a pooling by itself, through autograd.

    ``fast``: x is what kernels read; otherwise all but the pooling is torch's.  ``tiny``: so small that torch's are the quicker ones.
    """
    first, then = steps(op.caller, before), steps(op.caller, after)
    fast = fast and backend.name_of(x.dtype) in FLOATS
    grad = torch.is_grad_enabled()
    if first and affine is None and isinstance(first[0], _NORMS) and not first[0].training and first[0].running_var is not None:
        affine, first = folded(first[0]), first[1:]
    if affine is not None:
        y = _through_affine(x, op, affine, first, pooled, grad)
        if y is not None:
            return _applied((*first, *then), y, fast and not tiny)
        x = _scaled(x, op, affine)
    if first:
        *earlier, last = first
        x = _applied(earlier, x, fast and not tiny)
        needs = grad and x.requires_grad
        found = None
        if isinstance(last, Applied) and fast:
            found = _taken_in(op, last, needs)
        elif op.kind.structure.order and not torch.compiler.is_compiling() and not _leaves_windows_empty(op) and _rises(last):
            found = op, True
        if found is None:
            x = _applied((last,), x, fast and not tiny)
        else:
            op, pending = found
            then = (last, *then) if pending else then
    if not then:
        return pooled(x, op)
    if fast and not tiny and isinstance(then[0], Applied):
        followed = _followed(op, then[0], grad and x.requires_grad)
        if followed is not None:
            return _applied(then[1:], pooled(x, followed), True)
    return _applied(then, pooled(x, op), fast and not tiny)


def with_indices(
    x: torch.Tensor,
    op: Pooling,
    before: Any,
    after: Any,
    affine: Any,
    chosen: Callable[[torch.Tensor, Pooling], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """``fused`` one step after the other, with the positions that ``chosen`` finds: those of the first order, whatever f makes equal."""
    first, then = steps(op.caller, before), steps(op.caller, after)
    if affine is not None:
        check_affine(op.caller, x, op.rank, affine)
        x = _scaled(x, op, affine)
    y, indices = chosen(_applied(first, x, False), op)
    return _applied(then, y, False), indices


# Affine maps of channels


def folded(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift) of a batch-norm in evaluation, differentiable by its weight and bias."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def _of_channels(op: Pooling, t: torch.Tensor) -> torch.Tensor:
    return t.view(-1, *(1,) * op.rank)


def _scaled(x: torch.Tensor, op: Pooling, affine: Any) -> torch.Tensor:
    scale, shift = (_of_channels(op, t) for t in affine)
    return torch.addcmul(shift, x, scale)


def check_affine(caller: str, x: torch.Tensor, rank: int, affine: Any) -> None:
    """TypeError and RuntimeError for what is no affine map of x's channels."""
    if not (isinstance(affine, tuple) and len(affine) == 2 and all(isinstance(t, torch.Tensor) for t in affine)):
        raise TypeError(f"{caller}: affine must be a tuple of two tensors, (scale, shift), got {affine!r}")
    channels = x.shape[-rank - 1]
    for t in affine:
        if tuple(t.shape) != (channels,):
            raise RuntimeError(f"{caller}: affine's tensors must be of shape ({channels},), a number a channel, got {tuple(t.shape)}")


def _through_affine(
    x: torch.Tensor, op: Pooling, affine: Any, first: Sequence[Step], pooled: Callable[[torch.Tensor, Pooling], torch.Tensor], grad: bool
) -> torch.Tensor | None:
    """scale * pool(x) + shift where that equals pool(scale * x + shift) and what follows passes too: max where a scale is positive, min
    where it is negative (and min, max).  None where it does not."""
    scale, _ = affine
    if not op.kind.structure.order or _leaves_windows_empty(op) or torch.compiler.is_compiling() or not all(map(_rises, first)):
        return None
    # Of a scale of 0 all elements are equal, and the scale's gradient goes by the first of them.
    if not bool((scale != 0).all()):
        return None
    up = scale > 0
    if bool(up.all()):
        y = pooled(x, op)
    elif not bool(up.any()):
        y = pooled(x, _opposite(op))
    else:
        y = torch.where(_of_channels(op, up), pooled(x, op), pooled(x, _opposite(op)))
    return _scaled(y, op, affine)
