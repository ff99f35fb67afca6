"""Which layers may change places, as checked laws: ``fastpool.commutes(first, second)``.

A law is derived from the *shape* an activation declares (kernels/activation: where it is least, what it does to 0, ...) and the *structure*
a pooling declares (kernels/pool: the largest element, weights by place alone, ...), never looked up by pair.  A refusal carries an input
on which the two orders differ, found by trying them on torch's activations and the poolings' own arithmetic; where neither a law is
known nor such an input is found the answer is "probed", and not that they may; where a law is of a shape that was found by trying, it is
"probed" too.

The order that is asked for counts: f(max(x)) of a falling and rising f cannot be had from what f makes of the elements, max(f(x)) can from
two of them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from . import backend
from . import window as windows
from .activations import Applied
from .backend import Pooling
from .layers import CALLER, FUNCTIONS, Channels, Function, Layer, Mask, Pool, Training, affine, layer_of, pooled

KINDS = {
    "exact": "equal bit for bit, but for the sign of a zero",
    "rounding": "equal but for the rounding of the function itself",
    "exchange": "max becomes min, or min max, where the function falls",
    "two-point": "the extreme of f is at one of two points: f of the window's smallest and of its largest element",
    "affine": "equal but for rounding, as the weights' sum is what the shift needs",
    "scaling": "equal but for rounding: a factor passes",
    "mask": "equal for one and the same random mask",
    "never": "different: see the counterexample",
    "probed": "not proved: told by numbers that were tried; false where these show no law",
}
"""The classes of laws, and what they mean."""

FLAT = "Heijmans, Morphological Image Operators (1994), section 11.2: flat operators commute with increasing maps"
CONVEX = "Boyd & Vandenberghe, Convex Optimization (2004), section 3.4: a quasiconvex function on a segment is largest at an end"
JENSEN = "Hardy, Littlewood & Polya, Inequalities (1934), sections 3.5-3.8: a mean passes a function, for all numbers, only if it is affine"
NORMS = "a norm is absolutely homogeneous"
STOCHASTIC = "Zeiler & Fergus, Stochastic Pooling (2013), equation 5: weights are max(x, 0)"
DROPOUT = "Srivastava et al., Dropout (2014), section 10: scaled by 1 / (1 - p) in training"
BATCH_NORM = "Ioffe & Szegedy, Batch Normalization (2015), section 3.1: an affine map a channel in inference, of the batch in training"
ALGEBRA = "elementary algebra"
TRIED = "tried, not derived"

BETWEEN = "nothing else reads or hooks what stands between the two"
FINITE = "x is finite: 0 times an infinity is NaN"
BORDER = "no draw falls within rounding of the border between two elements"
NAMED = "no rounding of f makes two elements of a window equal"
EMPTY = "no axis of the map is shorter than the dilation along it: a window of padding alone gives an infinity"


@dataclass(frozen=True, eq=False)
class Law:
    """Whether ``second(first(x))`` may be computed in the other order, and how.  True where it may."""

    first: str
    second: str
    kind: str
    """The class, one of KINDS."""
    form: str
    """What equals the first order."""
    reason: str
    source: str
    conditions: tuple[str, ...] = ()
    """All of which must hold."""
    gradient: str = ""
    """How gradients of the two orders differ."""
    holds: bool = True
    evidence: str = ""
    """What was tried, where the answer rests on that."""
    counterexample: torch.Tensor | None = None
    """An input on which the two orders differ."""
    gap: float | None = None
    """The largest difference of the two orders on it; inf where one is NaN and the other a number."""

    def __bool__(self) -> bool:
        return self.holds

    def __str__(self) -> str:
        lines = [f"{self.first}, {self.second}: {self.kind}. {self.reason[:1].upper()}{self.reason[1:]}."]
        if self.form:
            lines.append(f"  {self.form}")
        lines += [f"  if {condition}" for condition in self.conditions]
        if self.gradient:
            lines.append(f"  gradients: {self.gradient}")
        if self.evidence:
            lines.append(f"  {self.evidence}")
        if self.counterexample is not None:
            apart = f"differs by {self.gap:.3g}" if self.gap != math.inf else "is NaN in one order alone"
            lines.append(f"  {apart} on {self.counterexample.flatten().tolist()[:8]}")
        lines.append(f"  {self.source}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return found | {
            "conditions": list(self.conditions),
            "counterexample": None if self.counterexample is None else self.counterexample.tolist(),
            "gap": "inf" if self.gap == math.inf else self.gap,
        }


# Counterexamples


_SIZES = (0.01, 0.03, 0.07, 0.15, 0.25, 0.35, 0.5, 0.75, 1.0, 1.1924, 1.2785, 1.5, 2.0, 3.0, 4.5, 7.0, 20.0, 30.0)
VALUES = (0.0, *_SIZES, *(-v for v in _SIZES))
"""What maps are made of, two at a time: around 0, minima and corners of the activations, and where they saturate."""
_FEW = (0.0, 0.15, 0.75, 2.0, 7.0, -0.15, -0.75, -2.0, -7.0)
"""Those for a first look, where maps are large."""
_LARGE = 2**22
"""Elements that windows of all maps read, above which that pays: 13x13 at stride 1 took 24 s for all of ``VALUES``, 3 s so."""
_ONES = (0.0, 1.0, -1.0)
_DECADES = tuple(sign * 10.0**k for k in (*range(-6, -2), *range(2, 7)) for sign in (1, -1))
"""What a function that looks straight nearer to 1 is tried on."""


def _neighbours(v: float) -> tuple[float, float]:
    """The float32 numbers next to v."""
    t = torch.tensor(v, dtype=torch.float32)
    return float(t.nextafter(t.new_tensor(-math.inf))), float(t.nextafter(t.new_tensor(math.inf)))


def _applied(layer: Layer) -> Applied | None:
    """The activation of kernels/activation that a layer is, if it is one."""
    given = getattr(layer.apply, "args", ()) if isinstance(layer, Function) else ()
    return given[0] if given and isinstance(given[0], Applied) else None


def _own(layers: tuple[Layer, ...]) -> tuple[float, ...]:
    """Where these bend or jump by what they say of themselves: parameters, quotients of two (softplus's threshold / beta), turns; the half
    and the double, and the numbers next to each."""
    found: set[float] = set()
    for layer in layers:
        if not isinstance(layer, Function):
            continue
        applied = _applied(layer)
        told = applied.parameters if applied else ()
        told += tuple(a / b for a, b in itertools.permutations(told, 2) if b)
        turns = (layer.shape.minimum, layer.shape.maximum, layer.shape.root)
        for v in (*told, *(t for t in turns if t is not None)):
            if v and math.isfinite(v):
                found |= {n for size in (v, -v) for n in (size, size / 2, 2 * size, *_neighbours(size))}
    return tuple(sorted(found))


def _pairs(layers: tuple[Layer, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of values to try, as (one, other): each lot where the one before showed nothing."""
    lots = [(VALUES, VALUES)]
    pool = next((o for o in layers if isinstance(o, Pool)), None)
    if pool is not None and len(VALUES) ** 2 * _reads(pool) > _LARGE:
        lots.insert(0, (_FEW, _FEW))
    own = _own(layers)
    lots += [(own, (*own, *_ONES))] * bool(own) + [(_DECADES, (*_DECADES, *own, *_ONES))]
    return [_crossed(*lot) for lot in lots]


def _crossed(some: tuple[float, ...], others: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Every pair of both, float32's values in float64."""
    one, other = (torch.tensor(v, dtype=torch.float32).double() for v in (some, others))
    first, second = torch.meshgrid(one, other, indexing="ij")
    return first.flatten(), second.flatten()


def _sizes(pool: Pool | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of a map that holds some windows; and how far apart neighbours within a window are."""
    rank = pool.op.rank if pool else 2
    sizes, steps = (2,) * rank, (1,) * rank
    if pool and isinstance(pool.op.window, windows.Window):
        steps = pool.op.window.dilation
        sizes = tuple(max(2, n) * (1 if step == 1 else 2) for n, step in zip(pool.op.window.extent, steps, strict=True))
    elif pool and isinstance(pool.op.window, windows.Adaptive):
        sizes = tuple(2 * (n or 2) for n in pool.op.window.outputs)
    return sizes, steps


def _reads(pool: Pool) -> int:
    """How many elements the windows of one map read."""
    window = pool.op.window
    outputs = backend.outputs(pool.op, (1, 1, *_sizes(pool)[0]))[1]
    return math.prod(outputs[-pool.op.rank :]) * (window.taps if isinstance(window, windows.Window) else 1)


def _maps(pool: Pool | None, channels: int, one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of two values each, in turns along every axis: (pairs, channels, *sizes), float64; and where the second stands: (*sizes)."""
    sizes, steps = _sizes(pool)
    rank = len(sizes)
    turns = torch.zeros(sizes, dtype=torch.int64)
    for axis, (n, step) in enumerate(zip(sizes, steps, strict=True)):
        turns += torch.arange(n).div(step, rounding_mode="floor").view([-1 if a == axis else 1 for a in range(rank)])
    second = (turns % 2).bool()
    shape = (-1, 1, *(1,) * rank)
    return torch.where(second, other.view(shape), one.view(shape)).expand(-1, channels, *sizes).contiguous(), second


def _apart(left: torch.Tensor, right: torch.Tensor) -> tuple[int, float]:
    """The sample that shows best that the two differ, and the largest difference in it; 0 if by rounding alone, inf if one is NaN."""
    difference = (left - right).abs().flatten(1).amax(1).nan_to_num(0, 0, 0)
    size = torch.maximum(left.abs(), right.abs()).flatten(1).amax(1).nan_to_num(0, 0, 0)
    different = difference > 1e-9 * size
    # Large differences, but of numbers that one can read.
    worst = int(torch.where(different, difference / (1 + size) ** 1.5, 0).argmax())
    if bool(different[worst]):
        return worst, float(difference[worst])
    undefined = (left.isnan() != right.isnan()).flatten(1).any(1)
    return int(undefined.int().argmax()), math.inf if bool(undefined.any()) else 0.0


def _counterexample(first: Layer, second: Layer) -> tuple[tuple[torch.Tensor, float] | None, int]:
    """An input on which the two orders differ, and by how much; and how many were tried."""
    tried = 0
    for one, other in _pairs((first, second)):
        tried += len(one)
        found = _breaking(first, second, one, other)
        if found is not None:
            return found, tried
    return None, tried


def _breaking(first: Layer, second: Layer, one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, float] | None:
    """``_counterexample`` of maps of these pairs."""
    pool = next((o for o in (first, second) if isinstance(o, Pool)), None)
    channels = next((len(o.scale) for o in (first, second) if isinstance(o, Channels)), 1)
    x, second_value = _maps(pool, channels, one, other)
    mask = next((o for o in (first, second) if isinstance(o, Mask)), None)
    if mask is not None:
        beside: Any = second if mask is first else first
        worst, gap = _apart_by_mask(mask, beside, x, second_value)
    elif any(isinstance(o, Training) for o in (first, second)):
        # Its result is of the whole batch: some batches, not one of all pairs.
        batches = [x[i::37] for i in range(0, 37, 6)]
        orders = [_both(first, second, batch) for batch in batches]
        gaps = [_apart(left[None], right[None])[1] for left, right in orders]
        best = max(range(len(gaps)), key=gaps.__getitem__)
        return (batches[best].float(), gaps[best]) if gaps[best] > 0 else None
    else:
        worst, gap = _apart(*_both(first, second, x))
    return (x[worst : worst + 1].float(), gap) if gap > 0 else None


def _both(first: Any, second: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return second.apply(first.apply(x)), first.apply(second.apply(x))


def _apart_by_mask(mask: Mask, other: Any, x: torch.Tensor, second_value: torch.Tensor) -> tuple[int, float]:
    """Of the best that any mask behind ``other`` could do against one before it: nothing dropped, all, or the second value alone."""
    nothing, plain = torch.zeros_like(x, dtype=torch.bool), other.apply(x)
    kept, gone = plain * mask.factor, torch.zeros_like(plain)
    tries: list[tuple[torch.Tensor, tuple[torch.Tensor, ...]]] = [(nothing, (kept,)), (~nothing, (gone,))]
    if isinstance(other, Pool) and not mask.whole:
        tries = [(second_value.expand_as(x), (kept, gone))]
    worst, gap = 0, 0.0
    for dropped, choices in tries:
        before = other.apply(torch.where(dropped, 0, x) * mask.factor)
        apart = torch.stack([(before - choice).abs() for choice in choices]).amin(0)
        at, found = _apart(apart, torch.zeros_like(apart))
        if found > gap:
            worst, gap = at, found
    return worst, gap


def _indices_apart(layer: Any, pool: Pool, found: _Found) -> torch.Tensor | None:
    """An input on which pooling f(x) names another element than the law finds: of elements that f makes equal, or near ones that its
    rounding does.

    The law finds the largest or the smallest of x by whether f rises, channel by channel; of two points the one that wins.  Behind a mask
    that drops everything all are equal.
    """
    near = [n for v in VALUES if v for n in (v, *_neighbours(v))]
    beside = torch.tensor(near, dtype=torch.float32).double()
    one, other = (torch.cat(t) for t in zip(_crossed(VALUES, VALUES), (beside, beside.roll(1)), (beside.roll(1), beside), strict=True))
    falls: Any = torch.tensor(isinstance(layer, Function) and layer.shape.falls)
    f, channels = layer, 1
    if isinstance(layer, Channels):
        f, channels = replace(layer, scale=layer.scale.float(), shift=layer.shift.float()), len(layer.scale)
        falls = (layer.scale < 0)[:, None]
    elif isinstance(layer, Mask):
        f = affine(layer.name, 0.0, 0.0)
    # In float32, where neighbours are.
    x = _maps(pool, channels, one, other)[0].float()
    (top, same), (bottom, opposite) = pooled(pool.op, x), pooled(_mirrored(pool.op), x)
    if found.kind == "two-point":
        falls = ((f.apply(bottom) - f.apply(top)) * pool.op.kind.structure.order > 0).flatten(2)
    named = pooled(pool.op, f.apply(x))[1]
    assert named is not None
    assert same is not None
    assert opposite is not None
    apart = (named != torch.where(falls, opposite, same)).flatten(1).any(1)
    return x[int(apart.int().argmax())][None] if bool(apart.any()) else None


# Derivations


class _Found(NamedTuple):
    """A law as it is derived: without names and numbers."""

    kind: str
    form: str
    reason: str
    source: str
    conditions: tuple[str, ...] = ()
    gradient: str = ""


SAME = (
    "equal, but where f makes elements equal, by rounding or saturation, where its slope is small: where f comes first the first of these"
    " gets it, else the first of the largest or smallest x"
)


def _with_pool(f: Function, pool: Pool, pool_first: bool, factor: str = "") -> _Found | None:
    """The law of a function and a pooling, in this order; None: none is known.  ``factor``: how abs(c) is written, of a map c x."""
    of, shape = pool.structure, f.shape
    swapped = "pool(f(x))" if pool_first else "f(pool(x))"
    border = (BORDER,) if pool.op.kind.draws else ()
    found = _by_order(shape, of.order, pool, pool_first) if of.order else None
    if found is not None:
        return found
    a, b = shape.affine or (None, None)
    if of.linear and a is not None and (b == 0 or pool.counts_all):
        why = "the weights of each window sum to 1" if b else "a sum of products with one factor"
        return _Found("affine", swapped, f"the function is affine, and {why}", ALGEBRA, gradient="equal but for rounding")
    if of.scales and a is not None and a >= 0 and b == 0:
        return _Found("scaling", swapped, "a factor c >= 0 leaves the pooling as it is", ALGEBRA, border, "equal but for rounding")
    if of.scales == "all" and shape.homogeneous:
        up, down = f.apply(torch.tensor([1.0, -1.0], dtype=torch.float64)).tolist()
        # Behind the pooling there is nothing below 0: f is a factor there, which may be one below 0.
        if abs(up) == abs(down) and (up >= 0 or not pool_first):
            reason = "a norm reads abs(x) alone, of which the function makes c abs(x), and a factor c >= 0 leaves the pooling as it is"
            return _Found("scaling", f"{factor or f'{abs(up):.6g}'} * pool(x)", reason, NORMS, gradient="equal but for rounding")
    c = shape.slope_above
    if of.reads_above and c is not None and (not pool_first or shape.fixes_zero or _is_above_zero(pool)):
        if c == 1:
            reason = "of x only max(x, 0) counts, which the function leaves as it is, and the result is at least 0"
            return _Found("exact", "pool(x)", reason, STOCHASTIC, gradient="equal")
        if of.scales:
            reason = f"of x only max(x, 0) counts, which the function multiplies by {c:.6g}, and the result is at least 0"
            return _Found("scaling", f"{c} * pool(x)", reason, STOCHASTIC, border + (FINITE,) * (c == 0), "equal but for rounding")
    if of.shifts and a == 1:
        return _Found("affine", swapped, "a shift of every element shifts the result", ALGEBRA, gradient="equal but for rounding")
    return None


def _is_above_zero(pool: Pool) -> bool:
    """Whether the result of a pooling that reads max(x, 0) is above 0, of zeros too."""
    return bool((pool.apply(torch.zeros(1, 1, *_sizes(pool)[0], dtype=torch.float64)) > 0).all())


def _by_order(shape: Any, order: int, pool: Pool, pool_first: bool) -> _Found | None:
    name, other = ("max", "min") if order > 0 else ("min", "max")
    conditions = (EMPTY,) if pool.may_be_empty else ()
    bits = "in floating point too" if shape.ordered else "but for its rounding"
    if shape.rises:
        kind = "exact" if shape.ordered else "rounding"
        reason = f"the function never falls, {bits}: it keeps the order of a window's elements"
        return _Found(kind, f"{name}(f(x))" if pool_first else f"f({name}(x))", reason, FLAT, conditions, SAME)
    if shape.falls:
        reason = f"the function never rises, {bits}: it reverses the order of a window's elements"
        return _Found("exchange", f"{other}(f(x))" if pool_first else f"f({other}(x))", reason, FLAT, conditions, SAME)
    turn = shape.minimum if order > 0 else shape.maximum
    if turn is None or pool_first:
        return None
    way = ("falls", "rises") if order > 0 else ("rises", "falls")
    reason = f"the function {way[0]} up to {turn:.6g} and {way[1]} from there, {bits}: between two elements it is never beyond both ends"
    gradient = "to the end that wins; if both give one f, the first of the two in the window gets it in the first order"
    return _Found("two-point", f"{name}(f(min(x)), f(max(x)))", reason, CONVEX, conditions, gradient)


_WORST = ("exact", "rounding", "scaling", "affine", "mask", "two-point", "exchange", "probed", "never")


def _channels_with_pool(norm: Channels, pool: Pool, pool_first: bool) -> _Found | None:
    laws = [(channels, _with_pool(part, pool, pool_first, "abs(scale)")) for channels, part in norm.parts()]
    known = [(channels, law) for channels, law in laws if law is not None]
    if len(known) < len(laws):
        return None
    worst = _worst(law for _, law in known)
    worst = worst._replace(source=f"{BATCH_NORM}; {worst.source}")
    if len({law.form for _, law in known}) == 1:
        return worst
    parts = [f"{law.form} in {len(channels)} channel{'s' if len(channels) > 1 else ''}" for channels, law in known]
    reason = "an affine map a channel: " + "; ".join(dict.fromkeys(law.reason for _, law in known))
    conditions = tuple(dict.fromkeys(c for _, law in known for c in law.conditions))
    return worst._replace(form=", ".join(parts), reason=reason, conditions=conditions)


def _worst(laws: Iterable[Any]) -> Any:
    """The law that covers the others: of the last class of ``_WORST``."""
    return max(laws, key=lambda law: _WORST.index(law.kind))


def _with_mask(mask: Mask, other: Layer) -> _Found | None:
    conditions = ("both orders draw the same mask", FINITE)
    if isinstance(other, Channels):
        reason = "a factor, and a mask of zeros and factors"
        return None if bool(other.shift.any()) else _Found("mask", "either, with one mask", reason, DROPOUT, conditions, "equal")
    if isinstance(other, Function) and (other.shape.homogeneous or (mask.factor in (0.0, 1.0) and other.shape.fixes_zero)):
        reason = "f(0) = 0 passes the mask, and f(c x) = c f(x) the factor 1 / (1 - p)"
        return _Found("mask", "either, with one mask", reason, DROPOUT, conditions, "equal")
    if isinstance(other, Pool) and mask.whole and (other.structure.scales or other.structure.linear):
        conditions += (EMPTY,) * other.may_be_empty + (BORDER,) * other.op.kind.draws
        reason = "whole maps are dropped or multiplied, and a factor passes the pooling"
        return _Found("mask", "either, with one mask", reason, DROPOUT, conditions)
    return None


def _refusal(first: Layer, second: Layer) -> tuple[str, str]:
    """Why two layers have no law, in a clause; and the source."""
    for one, other in ((first, second), (second, first)):
        if isinstance(one, Training):
            return (
                "batch-norm in training divides by the statistics of what it sees, and these are others behind the other layer",
                BATCH_NORM,
            )
        if isinstance(one, Mask):
            if isinstance(other, Function):
                if not other.shape.fixes_zero:
                    return "f(0) is not 0: a dropped element is not what f makes of a dropped one", DROPOUT
                return "the mask passes, as f(0) = 0; the factor 1 / (1 - p) does not", DROPOUT
            if isinstance(other, Pool) and not one.whole:
                return "an element that is dropped before the pooling leaves another in its place, which no mask behind it gives", DROPOUT
            return "a factor or a shift does not pass", DROPOUT
        if isinstance(one, Pool) and one.structure.linear:
            return (
                "the average of f is f of the average only where f is affine; a shift passes where weights sum to 1",
                JENSEN,
            )
        if isinstance(one, Pool) and one.structure.order:
            name, least = ("max", "largest") if one.structure.order > 0 else ("min", "smallest")
            if one is first:
                return f"the function falls here and rises there: what it makes of the elements does not tell the {least} of them", CONVEX
            return (
                f"{name} keeps what keeps the order of elements; the function falls here and rises there, the wrong way round for {name}",
                CONVEX,
            )
        if isinstance(one, Pool) and one.structure.scales == "all":
            if one is first and isinstance(other, Function) and float(other.apply(torch.ones(1))) < 0:
                return "a norm behind the function is never below 0, the function of a norm is", NORMS
            return "a norm passes a factor and nothing else", NORMS
        if isinstance(one, Pool):
            return "the weights follow the values, and the function changes them", ALGEBRA
    return "the two are functions whose order matters", ALGEBRA


def commutes(first: Any, second: Any) -> Law:
    """Whether ``second(first(x))`` may be computed in the other order: the law's ``form`` says how.

    Each is a name ("gelu", "max_pool2d", "dropout", "batch_norm"), a function of torch or fastpool, or a module of torch.nn or
    fastpool.nn, taken as it is: batch-norm and dropout in training or evaluation, the window of a pooling.  A pooling's name or function
    stands for windows of 2 an axis, "batch_norm" for inference with scales of both signs.  Any other callable that is elementwise is
    tried on float32 numbers, and its laws are of class "probed".

    Returns a ``Law``, true where the two may be exchanged; its ``kind`` is one of ``KINDS``.  One of kind "never" carries an input, and the
    gap between the orders on it.  Where neither a law nor such an input is found it is of class "probed", and false.
    Errors: ValueError for a name that is none; TypeError for what is not a layer of this algebra, is not elementwise, for two poolings, or
    for a pooling with an activation in it.
    """
    ones, others = _layers(first), _layers(second)
    law = _worst(_law(one, other) for one, other in itertools.product(ones, others))
    if law.counterexample is not None and any(map(_is_prelu_of_channels, (first, second))):
        law = _by_channel(law, first, second)
    inside = [o for o in (ones[0], others[0]) if isinstance(o, Function) and o.in_place]
    conditions = law.conditions
    if law.holds:
        conditions += (BETWEEN, *(f"nothing else reads the input that {o.name} overwrites" for o in inside))
    return replace(law, conditions=conditions)


def _layers(given: Any) -> list[Layer]:
    """What is given; of a PReLU of a slope a channel one function of each kind of slope.  TypeError for a pooling with something beside."""
    beside = [name for name in ("before", "after") if getattr(given, name, None) is not None]
    if beside and type(given).__module__.startswith("fastpool."):
        name = type(given).__name__
        raise TypeError(f"{CALLER}: {name} is a pooling with {beside[0]}= in it: ask for one without, and for what stands there")
    if _is_prelu_of_channels(given):
        slopes = {(slope < 0, abs(slope) == 1): slope for slope in sorted(given.weight.detach().tolist(), reverse=True)}
        return [replace(layer_of(nn.LeakyReLU(slope)), name=type(given).__name__) for slope in slopes.values()]
    return [layer_of(given)]


def _is_prelu_of_channels(given: Any) -> bool:
    return type(given) is nn.PReLU and given.weight.numel() > 1


def _by_channel(law: Law, first: Any, second: Any) -> Law:
    """A counterexample of as many channels as a PReLU has slopes, and the gap there."""
    assert law.counterexample is not None
    x, layers = law.counterexample, []
    for given in (first, second):
        layer = _layers(given)[0]
        if isinstance(layer, Function) and _is_prelu_of_channels(given):
            weight = given.weight.detach().double()
            layer = replace(layer, apply=functools.partial(_prelu, weight=weight))
            x = x.expand(-1, len(weight), *x.shape[2:]).contiguous()
        layers.append(layer)
    one, other = layers
    return replace(law, counterexample=x, gap=_apart(*_both(one, other, x.double()))[1])


def _prelu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return nn.functional.prelu(x, weight)


def _law(first: Layer, second: Layer) -> Law:
    names = first.name, second.name
    for one in (first, second):
        if isinstance(one, Function) and one.shape.affine == (1.0, 0.0) and not one.evidence:
            return Law(*names, "exact", "either", f"{one.name} is the identity here", ALGEBRA, gradient="equal")
    if all(isinstance(o, Pool) for o in (first, second)) or all(isinstance(o, (Mask, Training)) for o in (first, second)):
        raise TypeError(f"{CALLER}: {names[0]} and {names[1]}: one of two must be a function, or a pooling beside a dropout or batch-norm")
    found = _derived(first, second)
    evidence = "; ".join(o.evidence for o in (first, second) if isinstance(o, Function) and o.evidence)
    if found is None:
        shown, tried = _counterexample(first, second)
        reason, source = _refusal(first, second)
        if shown is not None:
            return Law(*names, "never", "", reason, source, (), "", False, evidence, *shown)
        evidence = "; ".join(filter(None, (evidence, f"no difference among {tried} maps of two values")))
        return Law(*names, "probed", "", "no law is known, and no input was found that breaks it", TRIED, holds=False, evidence=evidence)
    found = found._replace(conditions=found.conditions + _where_undefined(first, second, found))
    for one, other in ((first, second), (second, first)):
        if isinstance(one, Pool) and one.return_indices:
            apart = _indices_apart(other, one, found)
            if apart is not None:
                reason = "the values are equal; return_indices names the first of elements that are equal behind the other layer alone"
                return Law(*names, "never", "", reason, found.source, (), "", False, evidence, apart, 0.0)
            found = found._replace(conditions=(*found.conditions, NAMED))
    if evidence:
        reason = f"as far as it was tried: {found.reason}"
        return Law(*names, "probed", found.form, reason, TRIED, found.conditions, found.gradient, True, evidence)
    return Law(*names, **found._asdict())


def _mirrored(op: Pooling) -> Pooling:
    from .kernels.pool import KINDS as POOLS

    return Pooling(
        op.caller, POOLS["min" if op.kind.structure.order > 0 else "max"], op.rank, op.window, op.parameters, op.include_pad, op.divisor
    )


def _where_undefined(first: Layer, second: Layer, found: _Found) -> tuple[str, ...]:
    """Where an f that is NaN makes the orders differ: it takes a whole window, unless that is the one element f is asked for."""
    functions = [one for one in (first, second) if isinstance(one, (Function, Channels))]
    values = torch.tensor([-math.inf, math.inf, *VALUES], dtype=torch.float64)
    conditions: list[str] = []
    if len(functions) == 2:
        channels = next((len(one.scale) for one in functions if isinstance(one, Channels)), 1)
        left, right = _both(first, second, values.view(-1, 1).expand(-1, channels))
        return (_OF_INFINITY,) * bool((left.isnan() != right.isnan()).any())
    for one in functions:
        channels = len(one.scale) if isinstance(one, Channels) else 1
        undefined = one.apply(values.view(-1, 1).expand(-1, channels)).isnan().any(1)
        conditions += [_OF_INFINITY] * bool(undefined[:2].any() and found.kind != "two-point")
        conditions += [_OF_NUMBERS] * bool(undefined[2:].any())
    return tuple(conditions)


_OF_INFINITY = "x is finite: f of an infinity is NaN, for the whole window where f comes first"
_OF_NUMBERS = "x is where f is a number: elsewhere it is NaN, for the whole window where f comes first"


def _derived(first: Layer, second: Layer) -> _Found | None:
    for one, other in ((first, second), (second, first)):
        if isinstance(one, Mask):
            return _with_mask(one, other)
        if isinstance(other, Pool):
            if isinstance(one, Function):
                return _with_pool(one, other, other is first)
            return _channels_with_pool(one, other, other is first) if isinstance(one, Channels) else None
        if isinstance(one, Training):
            return None
    laws = [_of_functions(f, g) for f, g in _by_channels(first, second)]
    return None if None in laws else _worst(laws)


def _by_channels(first: Any, second: Any) -> list[tuple[Function, Function]]:
    """The functions that meet in a channel, each pair once."""
    parts = [
        [affine(o.name, a, b) for a, b in zip(o.scale.tolist(), o.shift.tolist(), strict=True)] if isinstance(o, Channels) else [o]
        for o in (first, second)
    ]
    if 1 in map(len, parts):
        return list(itertools.product(*parts))
    if len(parts[0]) != len(parts[1]):
        raise TypeError(f"{CALLER}: {first.name} has {len(parts[0])} channels, {second.name} {len(parts[1])}")
    return list(zip(*parts, strict=True))


def _of_functions(f: Function, g: Function) -> _Found | None:
    if f.shape.affine is not None and g.shape.affine is not None:
        (a, b), (c, d) = f.shape.affine, g.shape.affine
        if a * d + b == c * b + d:
            return _Found("affine", "either", "both are affine, and a d + b = c b + d", ALGEBRA)
        return None
    for one, other in ((f, g), (g, f)):
        if one.shape.affine is not None and one.shape.affine[1] == 0 and one.shape.affine[0] >= 0 and other.shape.homogeneous:
            return _Found("scaling", "either", "f(c x) = c f(x) for c >= 0", ALGEBRA, gradient="equal but for rounding")
    for one, other in ((f, g), (g, f)):
        ends = _ends(one)
        if ends is not None and other.shape.rises and bool((other.apply(ends) == ends).all()):
            reason = "one keeps x between bounds, which the other, that never falls, leaves as they are"
            gradient = "equal, but where rounding makes one of a bound"
            return _Found("exact" if other.shape.ordered else "rounding", "either", reason, FLAT, gradient=gradient)
    return None


def _ends(f: Function) -> torch.Tensor | None:
    """The finite bounds of a function that is min(max(x, low), high), float64; None: it is none."""
    applied = _applied(f)
    ends: tuple[float, ...] | None = None
    if applied is not None:
        ends = {"relu": (0.0,), "relu6": (0.0, 6.0), "hardtanh": applied.parameters}.get(applied.name)
        if applied.name == "threshold" and applied.parameters[0] == applied.parameters[1]:
            ends = applied.parameters[:1]
    return None if ends is None else torch.tensor([end for end in ends if math.isfinite(end)], dtype=torch.float64)


# The table


def rows() -> dict[str, Any]:
    """Layer -> what ``commutes`` is given for it: every activation, with torch's parameters; where torch has none, or others give another
    law, with some."""
    from .kernels.activation import ACTIVATIONS

    found: dict[str, Any] = {name: name for name, of in ACTIVATIONS.items() if None not in of.defaults.values()}
    found["threshold(0.1, 0)"] = nn.Threshold(0.1, 0.0)
    found["threshold(0.1, 20)"] = nn.Threshold(0.1, 20.0)
    found["leaky_relu(-0.5)"] = nn.LeakyReLU(-0.5)
    found |= {name: name for name in FUNCTIONS}
    for sign, scale in (("> 0", 1.5), ("< 0", -0.5)):
        found[f"batch_norm, scale {sign}"] = _inference(scale)
    return found | {name: name for name in ("batch_norm_training", "dropout", "dropout2d")}


def described(row: str) -> str:
    """The shape of a row's function, in a few words."""
    layer = layer_of(rows()[row])
    if isinstance(layer, Channels):
        return "rises" if bool((layer.scale > 0).all()) else "falls"
    if not isinstance(layer, Function):
        return ""
    shape = layer.shape
    words = ["rises" if shape.rises else "falls" if shape.falls else f"falls, rises from {shape.minimum:.4g}"]
    words += ["bit for bit"] * shape.ordered + ["f(0) = 0"] * shape.fixes_zero + ["f(cx) = c f(x)"] * shape.homogeneous
    return ", ".join(words)


def _inference(scale: float) -> nn.BatchNorm2d:
    """One channel: scale * x + 0.25."""
    module = nn.BatchNorm2d(1, eps=0).eval()
    nn.init.constant_(module.weight, scale)
    nn.init.constant_(module.bias, 0.25)
    return module


COLUMNS = {
    "max": "max_pool2d",
    "min": "min_pool2d",
    "avg": "avg_pool2d",
    "l2": "l2_pool2d",
    "stochastic": "stochastic_pool2d",
    "gem": "gem_pool2d",
    "soft": "soft_pool2d",
    "dropout": "dropout",
    "batch_norm": "batch_norm",
}
"""Column -> what ``commutes`` is given for it."""


def table(pool_first: bool = False) -> dict[tuple[str, str], Law]:
    """(row, column) -> the law of the layer and the column's, for every pair that has one; ``pool_first``: with the column's before it."""
    layers = rows()
    pairs = itertools.product(layers.items(), COLUMNS.items())
    apart = ("batch_norm", "dropout")
    asked = {(row, column): (layer, of) for (row, layer), (column, of) in pairs if not (column in apart and row.startswith(apart))}
    return {pair: commutes(*(reversed(two) if pool_first else two)) for pair, two in asked.items()}


def otherwise(first: dict[tuple[str, str], Law], other: dict[tuple[str, str], Law]) -> dict[str, list[str]]:
    """Column -> the rows whose law is of another class where the column's layer comes first: "gelu never"."""
    found: dict[str, list[str]] = {}
    for (row, column), law in other.items():
        if law.kind != first[row, column].kind:
            found.setdefault(column, []).append(f"{row} {law.kind}")
    return found
