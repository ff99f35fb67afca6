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
from typing import Any, NamedTuple

import torch
from torch import nn

from . import activations
from .activations import Applied
from .autograd import activate
from .backend import Pooling
from .kernels import fusion
from .kernels.pool import FLOATS, KINDS
from .window import Window

Step = Applied | nn.Module
"""What is applied elementwise: an activation of kernels/activation, or a module that is called as it is."""

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DTYPES = {getattr(torch, name) for name in FLOATS}
"""In which kernels compute activations."""
_CALLED = (*_NORMS, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Identity)


def steps(caller: str, given: Any) -> tuple[Step, ...]:
    """``before`` or ``after`` as steps: a name, a module of torch.nn, or several in a tuple, list or nn.Sequential.

    ValueError for a name there is none of, TypeError for what is none of these.
    """
    if given is None:
        return ()
    if isinstance(given, (str, Applied)):
        return (given if isinstance(given, Applied) else activations.named(caller, given),)
    if isinstance(given, (tuple, list, nn.Sequential)):
        return tuple(step for part in given for step in steps(caller, part))
    learned = isinstance(given, nn.PReLU) and (given.weight.numel() > 1 or given.weight.requires_grad or not _may_look(given.weight))
    if learned or isinstance(given, _CALLED) or (isinstance(given, nn.RReLU) and given.training):
        return (given,)
    found = activations.of(caller, given)
    if found is None:
        raise TypeError(
            f"{caller}: before and after must be an activation's name ('relu', 'gelu', ...), such a module of torch.nn, a dropout, a "
            f"batch-norm, or several in a tuple, got {given!r}"
        )
    return (found,)


def _may_look(t: torch.Tensor) -> bool:
    """Whether the host may read numbers of t to choose a form by them: on a GPU that waits for it, and cannot be captured in a graph."""
    return not t.is_cuda


def _rises(step: Step) -> bool:
    """Whether a step passes max and min, and its gradients do: its own sign is known.

    A PReLU's slope of 0 makes elements equal, and the weight's gradient goes by the first of them.
    """
    if isinstance(step, Applied):
        return step.shape.rises
    if isinstance(step, nn.PReLU):
        return _may_look(step.weight) and bool((step.weight > 0).all())
    return isinstance(step, nn.Identity)


def _leaves_windows_empty(op: Pooling) -> bool:
    """Whether a window may hold nothing but padding, whose value f would change."""
    return isinstance(op.window, Window) and max(op.window.dilation) > 1 and max(op.window.padding) > 0


def _overlap(op: Pooling) -> bool:
    """Whether elements are read by several windows: an f that costs had better have a pass of its own then."""
    return isinstance(op.window, Window) and op.window.taps > math.prod(op.window.stride)


def _is_large(op: Pooling) -> bool:
    """Whether windows seldom hold numbers below 0 alone: of normal ones 16 windows of 2x2 do so in 64%, of 3x3 in 3%.  There a branch cost
    GELU 1.9 times a max pooling and both evaluations 1.7, here the branch 1.1 to 1.8 and both 1.5 to 2.0."""
    return not isinstance(op.window, Window) or op.window.taps >= 8


def _opposite(kind: Any) -> Any:
    return KINDS["min" if kind.structure.order > 0 else "max"]


@functools.lru_cache(maxsize=1024)
def _of(op: Pooling, kind: Any) -> Pooling:
    """The operation of another kind: one object, which remembers its calls."""
    return op.of(kind)


class _Plan(NamedTuple):
    """A pooling with what it has of ``before`` and ``after`` in it."""

    first: tuple[Applied, ...]
    """What needs a pass of its own before it."""
    op: Pooling
    parameters: tuple[float, ...]
    """Behind the pooling's own."""
    left: tuple[Applied, ...]
    """What is still to be applied to its result."""


@functools.lru_cache(maxsize=1024)
def _planned(op: Pooling, before: Applied | None, after: Applied | None, needs: bool, tiny: bool) -> _Plan:
    """``needs``: for a gradient; ``tiny``: see ``fused``."""
    kind, first = op.kind, tuple(f for f in (before,) if f)
    left, parameters = tuple(f for f in (after,) if f), tuple[float, ...]()
    if before and (taken := _taken_in(op, before, needs)):
        kind, pending = taken
        first, left = (), first + left if pending else left
        parameters = before.parameters if kind not in KINDS.values() else ()
    if left and not tiny and (followed := _followed(kind, left[0], needs)):
        kind, parameters, left = followed, parameters + left[0].parameters, left[1:]
    return _Plan(first, _of(op, kind), parameters, left)


def _taken_in(op: Pooling, f: Applied, needs: bool) -> tuple[Any, bool] | None:
    """(the kind whose windows see f(x), whether f is still to be applied to its result), or None: there is none."""
    kind, shape = op.kind, f.shape
    if _leaves_windows_empty(op):
        return None
    if kind.structure.order:
        if shape.rises:
            return kind, True
        if shape.falls:
            return _opposite(kind), True
        if kind.structure.order > 0 and shape.minimum is not None and math.isfinite(shape.minimum):
            bounded = fusion.is_bounded(*f)
            return fusion.two_point(f.activation, shape.minimum, bounded, bounded and _is_large(op), chosen=needs), needs
        if needs or not fusion.keeps_neutral(kind, f.activation, f.parameters):
            return None
        return fusion.by_value(kind, f.activation), False
    if kind.selects or shape.root is None or not fusion.is_one_sum(kind) or (_overlap(op) and not shape.ordered):
        return None
    return fusion.fed(kind, f.activation, shape.root), False


def _followed(kind: Any, f: Applied, needs: bool) -> Any:
    """The kind that gives f of what ``kind`` gives; None where its gradient needs more than that saves."""
    switches = needs and f.activation.switches and kind.selects and not kind.draws
    if needs and not switches and (not kind.selects or f.slope is None):
        return None
    return fusion.activated(kind, f.activation, switches)


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
    fast = fast and x.dtype in _DTYPES
    if first and affine is None and isinstance(first[0], _NORMS) and not first[0].training and first[0].running_var is not None:
        affine, first = folded(first[0]), first[1:]
    if affine is not None:
        y = _through_affine(x, op, affine, first, pooled) if fast else None
        if y is not None:
            return _applied((*first, *then), y, fast and not tiny)
        x = scaled(x, op.rank, affine)
    if not fast:
        return _applied(then, pooled(_applied(first, x, False), op), False)
    moves = op.kind.structure.order and not _leaves_windows_empty(op)
    if moves and first and not isinstance(first[-1], Applied) and _rises(first[-1]):
        first, then = first[:-1], (first[-1], *then)
    before, after = (step if isinstance(step, Applied) else None for step in (first[-1] if first else None, then[0] if then else None))
    x = _applied(first[: -1 if before else None], x, not tiny)
    plan = _planned(op.root, before, after, torch.is_grad_enabled() and x.requires_grad, tiny)
    y = pooled(_applied(plan.first, x, not tiny), plan.op.at((*op.parameters, *plan.parameters)))
    return _applied((*plan.left, *then[after is not None :]), y, not tiny)


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
        check_affine(op.caller, affine, x.shape[-op.rank - 1])
        x = scaled(x, op.rank, affine)
    y, indices = chosen(_applied(first, x, False), op)
    return _applied(then, y, False), indices


# Affine maps of channels


def _wide(t: torch.Tensor) -> torch.Tensor:
    """In no less than float32, as torch's batch-norm computes."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def folded(norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, shift) of a batch-norm in evaluation, differentiable by its weight and bias; of 16 bits in float32."""
    scale = torch.rsqrt(_wide(norm.running_var) + norm.eps)
    scale = scale if norm.weight is None else scale * _wide(norm.weight)
    shift = -_wide(norm.running_mean) * scale
    return scale, shift if norm.bias is None else shift + _wide(norm.bias)


def _of_channels(rank: int, t: torch.Tensor) -> torch.Tensor:
    return t.view(-1, *(1,) * rank)


def scaled(x: torch.Tensor, rank: int, affine: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """scale * x + shift, a number of each a channel: of a float x's dtype, rounded to it once, whatever the two are of."""
    scale, shift = (_of_channels(rank, t) for t in affine)
    y = torch.addcmul(shift, x, scale)
    return y.to(x.dtype) if x.is_floating_point() else y


def check_affine(caller: str, affine: Any, channels: int) -> None:
    """TypeError and RuntimeError for what is no affine map of so many channels."""
    if not (isinstance(affine, tuple) and len(affine) == 2 and all(isinstance(t, torch.Tensor) for t in affine)):
        raise TypeError(f"{caller}: affine must be a tuple of two tensors, (scale, shift), got {affine!r}")
    for t in affine:
        if tuple(t.shape) != (channels,):
            raise RuntimeError(f"{caller}: affine's tensors must be of shape ({channels},), got {tuple(t.shape)}")


def _through_affine(
    x: torch.Tensor, op: Pooling, affine: Any, first: Sequence[Step], pooled: Callable[[torch.Tensor, Pooling], torch.Tensor]
) -> torch.Tensor | None:
    """scale * pool(x) + shift where that equals pool(scale * x + shift) and what follows passes too: max where a scale is positive, min
    where it is negative (and min, max).  None where it does not."""
    scale, _ = affine
    if not op.kind.structure.order or _leaves_windows_empty(op) or not all(map(_rises, first)) or not _may_look(scale):
        return None
    # Of a scale of 0 all elements are equal, and the scale's gradient goes by the first of them.
    if not bool((scale != 0).all()):
        return None
    other, up = _of(op.root, _opposite(op.kind)), scale > 0
    if bool(up.all()):
        y = pooled(x, op)
    elif not bool(up.any()):
        y = pooled(x, other)
    else:
        y = torch.where(_of_channels(op.rank, up), pooled(x, op), pooled(x, other))
    return scaled(y, op.rank, affine)
