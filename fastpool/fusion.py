"""What stands before and after a pooling, in one pass with it where a law or its arithmetic allows.

``before``: pool(f(x)); ``after``: f(pool(x)).  For max and min, f moves behind the pooling where it rises (max(f(x)) = f(max(x))), turns
max into min where it falls, and where it falls, then rises is looked at in two points a window: for max its ends, for min those next to
where f turns.  Elsewhere, and in sums, it is evaluated as elements are read, if windows do not overlap or f costs nothing.  Behind the
pooling it is applied in the pooling's registers; where torch computes it as quickly, it may be left to torch (``_in_one_pass``).  What a
gradient then needs is a byte an output where f' is 0 or 1, with y where y tells f', else with the element chosen; of an average y alone.
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
from .tiny import are_torchs
from .window import Window

Step = Applied | nn.Module
"""What is applied elementwise: an activation of kernels/activation, or a module that is called as it is."""

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
DTYPES = {getattr(torch, name) for name in FLOATS}
"""In which kernels compute activations."""
_VALUES = {str, Applied, type(None)}
_OWN = (nn.PReLU, nn.RReLU)
"""Activations that may learn or draw."""
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


def key(caller: str, given: Any) -> Any:
    """``before`` or ``after`` as what can be looked up: a name, an ``Applied`` or None; Ellipsis where it is more than one of these."""
    if type(given) in _VALUES:
        return given
    if type(given) is tuple and len(given) == 1:
        return key(caller, given[0])
    return activations.of(caller, given) if type(given) in activations.MODULES and not isinstance(given, _OWN) else ...


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
    left: tuple[Applied, ...]
    """What is still to be applied to its result."""


MANY = 1 << 17
"""Results from which, for a gradient, an activation that torch computes as quickly as kernels do had better be in the pooling's pass:
autograd has more to keep.  Two threads, avg 2x2 of ReLU of 512x28x28: 155 us in one pass, 119 in two; of 128x112x112 301 and 418.
"""

SOME = range(1 << 13, 1 << 17)
"""Elements, without a gradient, of which such an activation had better have a pass of its own before the pooling if it costs: rows so short
fill no registers.  Two threads, avg 2x2 of sigmoid of 512x14x14: 41 us in one pass, 30 in two; of 256x56x56 115 and 120.
"""


def _in_one_pass(x: torch.Tensor, op: Pooling, needs: bool) -> tuple[bool, bool]:
    """Whether an activation that torch computes as quickly had better be in the pooling's pass: before it and after it.

    Behind draws it does not overlap with what other windows do: sigmoid in stochastic 2x2 of 128x112x112 took 105 us, by itself 46.
    """
    if not (x.is_cpu and are_torchs()):
        return True, True
    if needs:
        many = x.numel() >= MANY * op.thins and not op.kind.draws
        return many, many
    return x.numel() not in SOME, not op.kind.draws


@functools.lru_cache(maxsize=1024)
def _planned(
    op: Pooling, before: str | Applied | None, after: str | Applied | None, needs: bool, tiny: bool, in_one: tuple[bool, bool]
) -> _Plan:
    """``needs``: for a gradient; ``tiny``: see ``fused``; ``in_one``: see ``_in_one_pass``.

    By names too: to look these up was most of what a call of a small map cost.
    """
    (first,), (then,) = (steps(op.caller, given) or (None,) for given in (before, after))
    assert not isinstance(first, nn.Module)
    assert not isinstance(then, nn.Module)

    def pays(f: Applied, one: bool) -> bool:
        free = f.activation.switches and op.kind.selects and not op.kind.draws if needs else f.shape.ordered
        return one or free or f.name in activations.FROM

    kind, parameters = op.kind, tuple[float, ...]()
    apart, left = (tuple(f for f in (step,) if f) for step in (first, then))
    if first and (taken := _taken_in(op, first, needs, pays(first, in_one[0]))):
        kind, pending = taken
        apart, left = (), apart + left if pending else left
        parameters = first.parameters if kind not in KINDS.values() else ()
    if left and not tiny and pays(left[0], in_one[1]) and (followed := _followed(kind, left[0], needs)):
        kind, parameters, left = followed, parameters + left[0].parameters, left[1:]
    return _Plan(apart, _of(op.root, kind).at((*op.parameters, *parameters)), left)


def planned(x: torch.Tensor, op: Pooling, before: str | Applied | None, after: str | Applied | None, tiny: bool) -> _Plan:
    """How a pooling with these beside it is computed; ``tiny``: see ``fused``."""
    needs = torch.is_grad_enabled() and x.requires_grad
    return _planned(op, before, after, needs, tiny, _in_one_pass(x, op, needs))


def _taken_in(op: Pooling, f: Applied, needs: bool, pays: bool) -> tuple[Any, bool] | None:
    """(the kind whose windows see f(x), whether f is still to be applied to its result), or None: there is none.  ``pays``: whether to
    compute f of what is read, if need be."""
    kind, shape = op.kind, f.shape
    if _leaves_windows_empty(op):
        return None
    if kind.structure.order:
        if shape.rises:
            return kind, True
        if shape.falls:
            return _opposite(kind), True
        valley = shape.minimum is not None and math.isfinite(shape.minimum)
        if valley and kind.structure.order > 0:
            bounded = fusion.is_bounded(*f)
            return fusion.two_point(f.activation, shape.minimum, bounded, bounded and _is_large(op), chosen=needs), needs
        # us, one thread, 64x112x112 3x3 s2 silu 325 and, in two passes, 256; 128x112x112 2x2, trained, 1,220 and 2,190.
        if valley and fusion.has_two_sides(*f) and (not _overlap(op) or (needs and f.name in activations.FROM)):
            return fusion.two_sides(f.activation, shape.minimum, chosen=needs), needs
    if not pays or (_overlap(op) and not shape.ordered):
        return None
    if kind.structure.order and not needs and fusion.keeps_neutral(kind, f.activation, f.parameters):
        return fusion.by_value(kind, f.activation), False
    if kind.selects or shape.root is None or not fusion.is_one_sum(kind):
        return None
    return fusion.fed(kind, f.activation, shape.root), False


def _followed(kind: Any, f: Applied, needs: bool) -> Any:
    """The kind that gives f of what ``kind`` gives; None where its gradient needs more than that saves."""
    switches = needs and f.activation.switches and kind.selects and not kind.draws
    if needs and not switches and (f.slope is None or not (kind.selects or kind.linear)):
        return None
    return fusion.activated(kind, f.activation, switches)


def applied(given: Sequence[Step], x: torch.Tensor, fast: bool) -> torch.Tensor:
    """The steps of x, one after the other; ``fast``: by kernels where they are the quicker ones."""
    for step in given:
        if not isinstance(step, Applied):
            x = step(x)
        else:
            x = activate(x, step) if fast and activations.pays(step, x) else activations.on_torch(step, x)
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
    fast = fast and x.dtype in DTYPES
    first, then = steps(op.caller, before), steps(op.caller, after)
    if first and affine is None and isinstance(first[0], _NORMS) and not first[0].training and first[0].running_var is not None:
        affine, first = folded(first[0]), first[1:]
    if affine is not None:
        y = _through_affine(x, op, affine, first, pooled) if fast else None
        if y is not None:
            return applied((*first, *then), y, fast and not tiny)
        x = scaled(x, op.rank, affine)
    if not fast:
        return applied(then, pooled(applied(first, x, False), op), False)
    moves = op.kind.structure.order and not _leaves_windows_empty(op)
    if moves and first and not isinstance(first[-1], Applied) and _rises(first[-1]):
        first, then = first[:-1], (first[-1], *then)
    before, after = (step if isinstance(step, Applied) else None for step in (first[-1] if first else None, then[0] if then else None))
    x = applied(first[: -1 if before else None], x, not tiny)
    plan = planned(x, op, before, after, tiny)
    y = pooled(applied(plan.first, x, not tiny), plan.op)
    return applied((*plan.left, *then[after is not None :]), y, not tiny)


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
    y, indices = chosen(applied(first, x, False), op)
    return applied(then, y, False), indices


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
