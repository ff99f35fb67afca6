"""Which layers may change places, as checked laws: ``fastpool.commutes(first, second)``.

A law is derived from the *shape* an activation declares (kernels/activation: where it is least, what it does to 0, ...) and the *structure*
a pooling declares (kernels/pool: the largest element, weights by place alone, ...), never looked up by pair.  A refusal carries an input
on which the two orders differ, found by trying them on torch's activations and the poolings' own arithmetic; where neither a law is
known nor such an input is found, or where a function is not one that declares a shape, the answer is "probed".
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from . import window as windows
from .backend import Pooling
from .layers import CALLER, FUNCTIONS, Channels, Function, Layer, Mask, Pool, Training, layer_of, pooled

KINDS = {
    "exact": "equal bit for bit, but for the sign of a zero",
    "rounding": "equal but for the rounding of the function itself",
    "exchange": "max becomes min, or min max, where the function falls",
    "two-point": "the extreme of f is at one of two points: f of the window's smallest and of its largest element",
    "affine": "equal but for rounding, as the weights' sum is what the shift needs",
    "scaling": "equal but for rounding: a factor passes",
    "mask": "equal for one and the same random mask",
    "never": "different: see the counterexample",
    "probed": "not proved: a judgement from numbers tried",
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
    """The largest difference of the two orders on it."""

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
            lines.append(f"  differs by {self.gap:.3g} on {self.counterexample.flatten().tolist()[:8]}")
        lines.append(f"  {self.source}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return found | {
            "conditions": list(self.conditions),
            "counterexample": None if self.counterexample is None else self.counterexample.tolist(),
        }


# Counterexamples


_SIZES = (0.01, 0.03, 0.07, 0.15, 0.25, 0.35, 0.5, 0.75, 1.0, 1.1924, 1.2785, 1.5, 2.0, 3.0, 4.5, 7.0, 20.0, 30.0)
VALUES = (0.0, *_SIZES, *(-v for v in _SIZES))
"""What maps are made of, two at a time: around 0, minima and corners of the activations, and where they saturate."""


def _maps(pool: Pool | None, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of two values each, in turns along every axis: (pairs, channels, *sizes), float64; and where the second stands: (*sizes)."""
    values = torch.tensor(VALUES, dtype=torch.float32).double()
    one, other = (t.flatten() for t in torch.meshgrid(values, values, indexing="ij"))
    rank = pool.op.rank if pool else 2
    sizes, steps = (2,) * rank, (1,) * rank
    if pool and isinstance(pool.op.window, windows.Window):
        # Neighbours within a window are a dilation apart.
        steps = pool.op.window.dilation
        sizes = tuple(max(2, n) * (1 if step == 1 else 2) for n, step in zip(pool.op.window.extent, steps, strict=True))
    elif pool and isinstance(pool.op.window, windows.Adaptive):
        sizes = tuple(2 * (n or 2) for n in pool.op.window.outputs)
    turns = torch.zeros(sizes, dtype=torch.int64)
    for axis, (n, step) in enumerate(zip(sizes, steps, strict=True)):
        turns += torch.arange(n).div(step, rounding_mode="floor").view([-1 if a == axis else 1 for a in range(rank)])
    second = (turns % 2).bool()
    shape = (-1, 1, *(1,) * rank)
    return torch.where(second, other.view(shape), one.view(shape)).expand(-1, channels, *sizes).contiguous(), second


def _apart(left: torch.Tensor, right: torch.Tensor) -> tuple[int, float]:
    """The sample that shows best that the two differ, and the largest difference in it; 0 if by rounding alone."""
    difference = (left - right).abs().flatten(1).amax(1).nan_to_num(0, 0, 0)
    size = torch.maximum(left.abs(), right.abs()).flatten(1).amax(1).nan_to_num(0, 0, 0)
    different = difference > 1e-9 * size
    # Large differences, but of numbers that one can read.
    worst = int(torch.where(different, difference / (1 + size) ** 1.5, 0).argmax())
    return worst, float(difference[worst]) if bool(different[worst]) else 0.0


def _counterexample(first: Layer, second: Layer) -> tuple[torch.Tensor, float] | None:
    """An input on which the two orders differ, and by how much."""
    pool = next((o for o in (first, second) if isinstance(o, Pool)), None)
    channels = next((len(o.scale) for o in (first, second) if isinstance(o, Channels)), 1)
    x, second_value = _maps(pool, channels)
    mask = next((o for o in (first, second) if isinstance(o, Mask)), None)
    if mask is not None:
        other: Any = second if mask is first else first
        worst, gap = _apart_by_mask(mask, other, x, second_value)
    elif any(isinstance(o, Training) for o in (first, second)):
        # Its result is of the whole batch: some batches, not one of all pairs.
        batches = [x[torch.arange(i, len(x), 37)] for i in range(0, 37, 6)]
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


def _indices_apart(function: Any, pool: Pool, x: torch.Tensor, op: Pooling) -> torch.Tensor | None:
    """An input on which pooling f(x) names another element than pooling x, of two values that f makes equal."""
    before, after = pooled(pool.op, function.apply(x))[1], pooled(op, x)[1]
    assert before is not None
    assert after is not None
    apart = (before != after).flatten(1).any(1)
    return x[int(apart.int().argmax())][None].float() if bool(apart.any()) else None


# Derivations


class _Found(NamedTuple):
    """A law as it is derived: without names and numbers."""

    kind: str
    form: str
    reason: str
    source: str
    conditions: tuple[str, ...] = ()
    gradient: str = ""


SAME = "equal, but where f makes elements equal: by rounding or saturation, where its slope is small, the first of them gets the gradient"


def _with_pool(shape: Any, pool: Pool) -> _Found | None:
    """The law of a function of this shape and a pooling; None: none is known."""
    of = pool.structure
    found = _by_order(shape, of.order, pool) if of.order else None
    if found is None and of.linear and shape.affine is not None:
        a, b = shape.affine
        if b == 0 or pool.counts_all:
            why = "the weights of each window sum to 1" if b else "a sum of products with one factor"
            found = _Found("affine", "f(pool(x))", f"the function is affine, and {why}", ALGEBRA, gradient="equal but for rounding")
    if found is None and of.reads_above and shape.slope_above == 1:
        reason = "of x only max(x, 0) counts, which the function leaves as it is, and the result is at least 0"
        found = _Found("exact", "pool(x), the function left out", reason, STOCHASTIC, gradient="equal")
    if found is None and of.scales == "positive" and of.reads_above and shape.slope_above is not None:
        reason = f"of x only max(x, 0) counts, which the function multiplies by {shape.slope_above:.6g}"
        border = ("no draw falls within rounding of the border between two elements",) if pool.op.kind.draws else ()
        found = _Found("scaling", f"{shape.slope_above} * pool(x)", reason, STOCHASTIC, border, "equal but for rounding")
    if found is None and shape.affine is not None and shape.affine[1] == 0 and of.scales:
        a = shape.affine[0]
        if a >= 0 or of.scales == "all":
            form = "f(pool(x))" if a >= 0 else f"{abs(a):.6g} * pool(x)"
            found = _Found("scaling", form, f"a factor c leaves the pooling as {'abs(c)' if of.scales == 'all' else 'c'}", NORMS)
    if found is None and shape.affine is not None and shape.affine[0] == 1 and of.shifts:
        found = _Found("affine", "f(pool(x))", "a shift of every element shifts the result", ALGEBRA)
    return found


def _by_order(shape: Any, order: int, pool: Pool) -> _Found | None:
    name, other = ("max", "min") if order > 0 else ("min", "max")
    empty = ("no axis of the map is shorter than the dilation along it: a window of padding alone gives an infinity",)
    conditions = empty if pool.may_be_empty else ()
    bits = "in floating point too" if shape.ordered else "but for its rounding"
    if shape.rises:
        kind = "exact" if shape.ordered else "rounding"
        reason = f"the function never falls, {bits}: it keeps the order of a window's elements"
        return _Found(kind, f"f({name}(x))", reason, FLAT, conditions, SAME)
    if shape.falls:
        form = f"f({other}(x))"
        return _Found(
            "exchange", form, f"the function never rises, {bits}: it reverses the order of a window's elements", FLAT, conditions, SAME
        )
    turn = shape.minimum if order > 0 else shape.maximum
    if turn is not None:
        way = ("falls", "rises") if order > 0 else ("rises", "falls")
        reason = (
            f"the function {way[0]} up to {turn:.6g} and {way[1]} from there, {bits}: between two elements it is never beyond both ends"
        )
        gradient = "to the end that wins; if both give one f, the first of the two in the window gets it in the first order"
        return _Found("two-point", f"{name}(f(min(x)), f(max(x)))", reason, CONVEX, conditions, gradient)
    return None


_WORST = ("exact", "rounding", "scaling", "affine", "mask", "two-point", "exchange", "never")


def _channels_with_pool(first: Channels, pool: Pool) -> _Found | None:
    laws = [(channels, _with_pool(part.shape, pool)) for channels, part in first.parts()]
    if any(law is None for _, law in laws):
        return None
    known = [(channels, law) for channels, law in laws if law is not None]
    _, worst = max(known, key=lambda pair: _WORST.index(pair[1].kind))
    if len({law.form for _, law in known}) == 1:
        return worst._replace(source=f"{BATCH_NORM}; {worst.source}")
    parts = [f"{law.form} in {len(channels)} channel{'s' if len(channels) > 1 else ''}" for channels, law in known]
    reason = "an affine map a channel: " + "; ".join(dict.fromkeys(law.reason for _, law in known))
    return _Found(worst.kind, ", ".join(parts), reason, f"{BATCH_NORM}; {worst.source}", worst.conditions, worst.gradient)


def _with_mask(mask: Mask, other: Layer) -> _Found | None:
    if isinstance(other, Channels):
        linear = not bool(other.shift.any())
        return _Found("mask", "either", "a factor, and a mask of zeros and factors", DROPOUT, gradient="equal") if linear else None
    if isinstance(other, Function):
        if other.shape.homogeneous or (mask.factor in (0.0, 1.0) and other.shape.fixes_zero):
            reason = "f(0) = 0 passes the mask, and f(c x) = c f(x) the factor 1 / (1 - p)"
            return _Found("mask", "either, with one mask", reason, DROPOUT, ("both orders draw the same mask",), "equal")
        return None
    if isinstance(other, Pool):
        if mask.whole and (other.structure.scales or other.structure.linear):
            conditions = ("both orders draw the same mask", "x is finite: 0 times an infinity is NaN")
            return _Found(
                "mask",
                "either, with one mask",
                "whole maps are dropped or multiplied, and a factor passes the pooling",
                DROPOUT,
                conditions,
            )
        return None
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
            name = "max" if one.structure.order > 0 else "min"
            return (
                f"{name} keeps what keeps the order of elements; the function falls here and rises there, the wrong way round for {name}",
                CONVEX,
            )
        if isinstance(one, Pool) and one.structure.scales == "all":
            return "a norm passes a factor and nothing else", NORMS
        if isinstance(one, Pool):
            return "the weights follow the values, and the function changes them", ALGEBRA
    return "the two are functions whose order matters", ALGEBRA


def commutes(first: Any, second: Any) -> Law:
    """Whether ``second(first(x))`` may be computed in the other order.

    Each is a name ("gelu", "max_pool2d", "dropout", "batch_norm"), a function of torch or fastpool, or a module of torch.nn or
    fastpool.nn, taken as it is: batch-norm and dropout in training or evaluation, the window of a pooling.  A pooling's name or function
    stands for windows of 2 an axis, "batch_norm" for inference with scales of both signs.  Any other callable that is elementwise is
    tried on float32 numbers, and its laws are of class "probed".

    Returns a ``Law``, true where the two may be exchanged; its ``kind`` is one of ``KINDS``.  One of kind "never" carries an input, and the
    gap between the orders on it.
    Errors: ValueError for a name that is none; TypeError for what is not a layer of this algebra, is not elementwise, or for two poolings.
    """
    one, other = layer_of(first), layer_of(second)
    law = _law(one, other)
    inside = [o for o in (one, other) if isinstance(o, Function) and o.in_place]
    conditions = law.conditions
    if law.holds:
        conditions += (BETWEEN, *(f"nothing else reads the input that {o.name} overwrites" for o in inside))
    return replace(law, conditions=conditions)


def _law(first: Layer, second: Layer) -> Law:
    names = first.name, second.name
    for one in (first, second):
        if isinstance(one, Function) and one.shape.affine == (1.0, 0.0) and not one.evidence:
            return Law(*names, "exact", "either", f"{one.name} is the identity here", ALGEBRA, gradient="equal")
    if all(isinstance(o, Pool) for o in (first, second)) or all(isinstance(o, (Mask, Training)) for o in (first, second)):
        raise TypeError(f"{CALLER}: {names[0]} and {names[1]}: one of two must be a function, or a pooling beside a dropout or batch-norm")
    found = _derived(first, second)
    pool = next((o for o in (first, second) if isinstance(o, Pool)), None)
    if found is not None and pool is not None:
        found = found._replace(conditions=found.conditions + _where_infinite(first, second, found))
    functions = [o for o in (first, second) if isinstance(o, Function)]
    evidence = "; ".join(o.evidence for o in functions if o.evidence)
    if found is None:
        shown = _counterexample(first, second)
        reason, source = _refusal(first, second)
        if shown is not None:
            return Law(*names, "never", "", reason, source, (), "", False, evidence, *shown)
        tried = f"no difference among {len(VALUES) ** 2} maps of two values"
        return Law(
            *names,
            "probed",
            "f(pool(x))" if pool else "either",
            "no law is known, and no input was found that breaks it",
            TRIED,
            evidence="; ".join(filter(None, (evidence, tried))),
        )
    if pool is not None and pool.return_indices and functions:
        apart = _indices_apart(functions[0], pool, _maps(pool, 1)[0], pool.op if functions[0].shape.rises else _mirrored(pool.op))
        if apart is not None:
            reason = "the values are equal; return_indices names the first of elements that f makes equal, and another where f comes later"
            return Law(*names, "never", "", reason, found.source, (), "", False, evidence, apart, 0.0)
    if evidence:
        return Law(
            *names, "probed", found.form, f"as far as it was tried: {found.reason}", TRIED, found.conditions, found.gradient, True, evidence
        )
    return Law(*names, **found._asdict())


def _mirrored(op: Pooling) -> Pooling:
    from .kernels.pool import KINDS as POOLS

    return Pooling(
        op.caller, POOLS["min" if op.kind.structure.order > 0 else "max"], op.rank, op.window, op.parameters, op.include_pad, op.divisor
    )


def _where_infinite(first: Layer, second: Layer, found: _Found) -> tuple[str, ...]:
    """f of an infinity that is NaN takes a window that holds it, unless that is the one element f is asked for."""
    if found.kind == "two-point":
        return ()
    for one in (first, second):
        if isinstance(one, Function):
            ends = one.apply(torch.tensor([-math.inf, math.inf], dtype=torch.float64))
            if bool(ends.isnan().any()):
                return ("x is finite: f of an infinity is NaN, for the whole window where f comes first",)
    return ()


def _derived(first: Layer, second: Layer) -> _Found | None:
    for one, other in ((first, second), (second, first)):
        if isinstance(one, Mask):
            return _with_mask(one, other)
        if isinstance(other, Pool):
            if isinstance(one, Function):
                return _with_pool(one.shape, other)
            if isinstance(one, Channels):
                return _channels_with_pool(one, other)
            return None
        if isinstance(one, Training):
            return None
    parts = [[f for _, f in o.parts()] if isinstance(o, Channels) else [o] for o in (first, second)]
    found = None
    for f, g in itertools.product(*parts):
        assert isinstance(f, Function)
        assert isinstance(g, Function)
        found = _of_functions(f.shape, g.shape)
        if found is None:
            return None
    return found


def _of_functions(f: Any, g: Any) -> _Found | None:
    if f.affine is not None and g.affine is not None:
        (a, b), (c, d) = f.affine, g.affine
        if a * d + b == c * b + d:
            return _Found("affine", "either", "both are affine, and a d + b = c b + d", ALGEBRA)
        return None
    for one, other in ((f, g), (g, f)):
        if one.affine is not None and one.affine[1] == 0 and one.affine[0] >= 0 and other.homogeneous:
            return _Found("scaling", "either", "f(c x) = c f(x) for c >= 0", ALGEBRA, gradient="equal but for rounding")
    return None


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


def table() -> dict[tuple[str, str], Law]:
    """(row, column) -> the law of the layer and the column's, for every pair that has one."""
    layers = rows()
    pairs = itertools.product(layers.items(), COLUMNS.items())
    apart = ("batch_norm", "dropout")
    return {(row, column): commutes(layer, of) for (row, layer), (column, of) in pairs if not (column in apart and row.startswith(apart))}
