"""Differentiable pooling: one pair of Functions for selecting pools, one for summing pools.

Each pair is a pooling and its gradient, both linear passes over memory, so that a double backward is the gradient's own backward.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from . import backend, convolution
from .activations import Applied
from .backend import Call, Pooling
from .convolution import Call as ConvolutionCall
from .convolution import Convolution
from .window import Window


class SelectingPool(torch.autograd.Function):
    """y; saves the taps chosen, and y where an activation in the kind has its slope told from it.  ``kept``, a list, gets the taps and
    the ``Call``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, op: Pooling, seed: int, kept: list[Any] | None) -> torch.Tensor:
        y, taps, call = backend.forward(x, op, True, seed)
        ctx.op, ctx.call = op, call
        ctx.save_for_backward(taps, y if op.kind.tells else None)
        if kept is not None:
            kept += taps, call
        return y

    @staticmethod
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        taps, y = ctx.saved_tensors
        if y is not None:
            gy = _told(gy, y, ctx.op)
        if torch.is_grad_enabled():
            return SelectingPoolBackward.apply(gy, taps, ctx.call), None, None, None
        return backend.backward(gy, None, None, taps, ctx.call), None, None, None


def _told(gy: torch.Tensor, y: torch.Tensor, op: Pooling) -> torch.Tensor:
    """gy times the slope of the activation that y is of what was pooled, whose parameters are the operation's last."""
    tells, p = op.kind.tells, op.parameters
    return sloped(gy, y, Applied(tells, p[len(p) - len(tells.defaults) :]), True)


class SelectingPoolBackward(torch.autograd.Function):
    """gx: each gy at the element its window chose."""

    @staticmethod
    def forward(ctx: Any, gy: torch.Tensor, taps: torch.Tensor, call: Call) -> torch.Tensor:
        ctx.call = call
        ctx.save_for_backward(taps)
        return backend.backward(gy, None, None, taps, call)

    @staticmethod
    def backward(ctx: Any, ggx: torch.Tensor) -> Any:
        (taps,), call = ctx.saved_tensors, ctx.call
        rank, window = call.op.rank, call.window
        flat = backend.flat_positions(taps, call).flatten(-rank)
        # Some windows chose nothing: stochastic pooling where no element is positive, max pooling of nothing but (dilated) padding.
        inside = flat >= 0
        if isinstance(window, Window):
            here = torch.ones((), dtype=torch.bool)
            for axis, size in enumerate(call.shape[-rank:]):
                here = here[..., None] & torch.from_numpy(window.counts(axis, size, False) > 0)
            inside &= here.flatten().to(flat.device)
        chosen = ggx.flatten(-rank).gather(-1, flat.where(inside, 0))
        return chosen.where(inside, 0).reshape(taps.shape), None, None


class SummingPool(torch.autograd.Function):
    """y; saves nothing if the pooling is linear, y if that is an activation of one, else x, y and the kind's residue.

    ``p``, if given, is a tensor of all the kind's parameters (float64), which gets a gradient too; else they are the operation's.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, op: Pooling, p: torch.Tensor | None) -> torch.Tensor:
        if p is not None:
            op = op.at(tuple(p.tolist()))
        y, residue, call = backend.forward(x, op, True)
        ctx.op, ctx.call = op, call
        if not op.kind.linear:
            ctx.save_for_backward(x, y, residue, p)
        elif op.kind.tells:
            ctx.save_for_backward(None, y, None, None)
        return y

    @staticmethod
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        op, (needs_x, _, needs_p) = ctx.op, ctx.needs_input_grad
        saved: Any = ctx.saved_tensors or (None,) * 4
        x, y, residue, p = saved
        if op.kind.tells:
            gy, y, op = _told(gy, y, op), None, op.routed
        if torch.is_grad_enabled():
            gx, gp = SummingPoolBackward.apply(gy, x, y, residue, p, op, ctx.call, (needs_x, needs_p))
        else:
            gx, gp = gradients(gy, x, y, residue, op, ctx.call, (needs_x, needs_p))
        return gx, None, gp


def gradients(
    gy: torch.Tensor,
    x: torch.Tensor | None,
    y: torch.Tensor | None,
    residue: torch.Tensor | None,
    op: Pooling,
    call: Call,
    needs: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x and of the parameters, each if it is needed."""
    gx = backend.backward(gy, x, y, residue, call, op.parameters) if needs[0] else None
    if not needs[1]:
        return gx, None
    assert x is not None
    gp = gy.new_zeros(len(op.parameters), dtype=torch.float64)
    for name, slope in op.slopes.items():
        gp[op.kind.parameters.index(name)] = (gy * backend.forward(x, slope.at(op.parameters), False)[0]).sum(dtype=torch.float64)
    return gx, gp


class SummingPoolBackward(torch.autograd.Function):
    """gx, each element's share in the windows that hold it; and the parameters' gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        gy: torch.Tensor,
        x: torch.Tensor | None,
        y: torch.Tensor | None,
        residue: torch.Tensor | None,
        p: torch.Tensor | None,
        op: Pooling,
        call: Call,
        needs: tuple[bool, bool],
    ) -> Any:
        ctx.op = op
        ctx.set_materialize_grads(False)
        if not op.kind.linear:
            ctx.save_for_backward(gy, x, p)
        return gradients(gy, x, y, residue, op, call, needs)

    @staticmethod
    def backward(ctx: Any, ggx: torch.Tensor | None, ggp: torch.Tensor | None) -> Any:
        if ctx.op.kind.linear:
            # gx = A' gy, so the gradient of gy is A ggx: the pooling itself.
            return None if ggx is None else SummingPool.apply(ggx, ctx.op, None), *[None] * 7
        gy, x, p = ctx.saved_tensors
        with torch.enable_grad():
            # y and the residue are functions of x, and computed from it here: their own gradients are none.
            # Views: gy may be a function of x, which is not to be counted here.
            leaves: list[Any] = [t if t is None else t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in (gy, x, p)]
            gy, x, p = leaves
            pairs = [(g, gg) for g, gg in zip(_gradient(gy, x, p, ctx.op), (ggx, ggp), strict=True) if gg is not None]
            if not pairs:
                return (None,) * 8
            sought = [t for t in leaves if t is not None]
            outputs, given = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(outputs, sought, given, create_graph=True, allow_unused=True)
        found = iter(gradients)
        gy, x, p = (None if t is None else next(found) for t in leaves)
        return gy, x, None, None, p, None, None, None


class Activation(torch.autograd.Function):
    """f(x) of a dense x; saves the result where its slope is told from that, else x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, applied: Applied) -> torch.Tensor:
        y = backend.activated(x, applied)
        ctx.applied, ctx.by_result = applied, applied.slope is not None
        ctx.save_for_backward(y if ctx.by_result else x)
        return y

    @staticmethod
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        return sloped(gy, ctx.saved_tensors[0], ctx.applied, ctx.by_result), None


def activate(x: torch.Tensor, applied: Applied) -> torch.Tensor:
    """An activation of a tensor of any strides, through autograd."""
    if sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1 != x.numel():
        x = x.contiguous()  # there are gaps
    if torch.is_grad_enabled() and x.requires_grad:
        return Activation.apply(x, applied)
    return backend.activated(x, applied)


def sloped(gy: torch.Tensor, x: torch.Tensor, applied: Applied, by_result: bool) -> torch.Tensor:
    """gy times the slope at x or, ``by_result``, where the result is x; by torch's operations where it will be differentiated."""
    if not torch.is_grad_enabled():
        return backend.activation_gradient(gy, x, applied, by_result)
    slope = on_tensors(applied.slope if by_result else applied.activation.derivative)
    return gy * slope(x, tuple(x.new_tensor(value) for value in applied.parameters))


class MaxUnpool(torch.autograd.Function):
    """Each element of x at its index in a larger map of zeros; saves the indices."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, indices: torch.Tensor, caller: str, sizes: tuple[int, ...]) -> torch.Tensor:
        ctx.caller, ctx.sizes = caller, sizes
        ctx.save_for_backward(indices)
        return backend.unpool(caller, x, indices, sizes)

    @staticmethod
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        (indices,) = ctx.saved_tensors
        return MaxUnpoolBackward.apply(gy, indices, ctx.caller, ctx.sizes), None, None, None


class MaxUnpoolBackward(torch.autograd.Function):
    """gx: the elements of gy at the indices."""

    @staticmethod
    def forward(ctx: Any, gy: torch.Tensor, indices: torch.Tensor, caller: str, sizes: tuple[int, ...]) -> torch.Tensor:
        ctx.caller, ctx.sizes = caller, sizes
        ctx.save_for_backward(indices)
        return backend.gather(gy, indices, len(sizes))

    @staticmethod
    def backward(ctx: Any, ggx: torch.Tensor) -> Any:
        # Of elements that share a position one stays in ``unpool``, but all have its gradient: the gradient of gy is their sum.
        (indices,) = ctx.saved_tensors
        rank = len(ctx.sizes)
        zeros = ggx.new_zeros((*ggx.shape[:-rank], math.prod(ctx.sizes)))
        summed = zeros.scatter_add(-1, indices.flatten(-rank), ggx.flatten(-rank))
        return summed.unflatten(-1, ctx.sizes), None, None, None


def _asked(ctx: Any, count: int) -> list[bool]:
    """Which gradients of a function's first ``count`` inputs, of which the last alone may be no tensor, are asked for.

    ``needs_input_grad`` says what requires one: of a layer that is trained ``torch.autograd.grad(y, x)`` made the weights' gradient too.
    Where one alone requires it, that is asked for; to ask costs 17 us where a leaf is the answer, by way of an exception.
    """
    needs, nodes = list(ctx.needs_input_grad[:count]), getattr(ctx, "next_functions", None)  # torch.func's contexts have none
    if nodes is None or sum(needs) < 2:
        return needs
    return [needed and _is_executed(nodes[i][0]) for i, needed in enumerate(needs)]


def _is_executed(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient is the result of torch.autograd.grad, or no engine runs
        return True


class Convolve(torch.autograd.Function):
    """y; saves x and the weights, and y where an activation follows, whose slope must be told from it."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, op: Convolution, after: Applied | None
    ) -> torch.Tensor:
        y = convolution.forward(x, weight, bias, op, after)
        ctx.op, ctx.after = op, after
        ctx.save_for_backward(x, weight, y if after else None)
        return y

    @staticmethod
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        x, weight, y = ctx.saved_tensors
        here = convolution.called(ctx.op, x, weight)
        if ctx.after:
            slope = on_tensors(ctx.after.slope)
            gy = gy * slope(y, ctx.after.parameters)
        needs_x, needs_w, needs_b = _asked(ctx, 3)
        gx = ConvolveInput.apply(gy, weight, None, here) if needs_x else None
        gw = ConvolveWeight.apply(gy, x, here) if needs_w else None
        gb = convolution.bias_gradient(gy, ctx.op.rank) if needs_b else None
        return gx, gw, gb, None, None


class ConvolveInput(torch.autograd.Function):
    """gx, linear in gy and in the weights; with a bias, transposed convolution."""

    @staticmethod
    def forward(ctx: Any, gy: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, here: ConvolutionCall) -> torch.Tensor:
        ctx.here = here
        ctx.save_for_backward(gy, weight)
        return convolution.input_gradient(gy, weight, bias, here)

    @staticmethod
    def backward(ctx: Any, ggx: torch.Tensor) -> Any:
        (gy, weight), op = ctx.saved_tensors, ctx.here.op
        needs_gy, needs_w, needs_b = _asked(ctx, 3)
        to_gy = Convolve.apply(ggx, weight, None, op, None) if needs_gy else None
        to_w = ConvolveWeight.apply(gy, ggx, convolution.called(op, ggx, weight)) if needs_w else None
        to_b = convolution.bias_gradient(ggx, op.rank) if needs_b else None
        return to_gy, to_w, to_b, None


class ConvolveWeight(torch.autograd.Function):
    """gw, linear in gy and in x."""

    @staticmethod
    def forward(ctx: Any, gy: torch.Tensor, x: torch.Tensor, here: ConvolutionCall) -> torch.Tensor:
        ctx.here = here
        ctx.save_for_backward(gy, x)
        return convolution.weight_gradient(gy, x, here)

    @staticmethod
    def backward(ctx: Any, ggw: torch.Tensor) -> Any:
        (gy, x), op = ctx.saved_tensors, ctx.here.op
        needs_gy, needs_x = _asked(ctx, 2)
        to_gy = Convolve.apply(x, ggw, None, op, None) if needs_gy else None
        to_x = ConvolveInput.apply(gy, ggw, None, convolution.called(op, x, ggw)) if needs_x else None
        return to_gy, to_x, None


# ``apply`` for callers that have refused torch.func's transforms: what it does beside C's for those is 2.4 us of 8.
run_selecting, run_summing, run_unpool = (
    super(torch.autograd.Function, function).apply  # type: ignore[misc]
    for function in (SelectingPool, SummingPool, MaxUnpool)
)


def _safe(f: Any) -> Any:
    """f on tensors, with derivative 0 where x = 0: that of the root of an all-zero window, by definition."""

    def word(x: torch.Tensor, *more: Any) -> torch.Tensor:
        zero = x == 0
        return torch.where(zero, f(torch.zeros_like(x), *more), f(torch.where(zero, torch.ones_like(x), x), *more))

    return word


_WORDS = {
    "where": torch.where,
    "like": lambda x, value: torch.as_tensor(value, dtype=x.dtype, device=x.device),
    "lowest": lambda x: torch.full_like(x, -torch.inf),
    "highest": lambda x: torch.full_like(x, torch.inf),
    "absolute": torch.abs,
    "quotient": torch.div,
    "sqrt": _safe(torch.sqrt),
    "power": _safe(torch.pow),
    "exp": torch.exp,
    "log": _safe(torch.log),
    "expm1": torch.expm1,
    "log1p": torch.log1p,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "decay": lambda x: torch.exp(-x),
    "ndtr": torch.special.ndtr,
    "larger": lambda x, y: torch.where(x > y, x, y),
    "smaller": lambda x, y: torch.where(x < y, x, y),
}


@functools.cache
def on_tensors(function: Any) -> Any:
    """A function of a kernel's arithmetic, on tensors, where torch can differentiate it."""
    from .kernels.number import retarget

    return retarget(function, _WORDS)


def windows_of(x: torch.Tensor, op: Pooling) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each window, along the last two axes (taps, outputs): the taps' flat positions, whether they are inside, what an average
    divides by (outputs), and the elements, (..., taps, outputs)."""
    rank = op.rank
    window, _ = backend.outputs(op, tuple(x.shape))
    if window is None:
        taps = torch.arange(math.prod(x.shape[-rank:]), device=x.device)[:, None]
        inside = torch.ones_like(taps, dtype=torch.bool)
        count = torch.full((1,), len(taps), dtype=x.dtype, device=x.device)
    else:
        taps, inside = (torch.from_numpy(t).to(x.device) for t in window.tap_table(*x.shape[-rank:]))
        count = torch.ones((), dtype=x.dtype, device=x.device)
        for axis, extent in enumerate(x.shape[-rank:]):
            count = count[..., None] * torch.from_numpy(window.counts(axis, extent, op.include_pad)).to(x)
        count = count.flatten()
    if op.divisor is not None:
        count = torch.full_like(count, op.divisor)
    return taps, inside, count, x.flatten(-rank)[..., taps.where(inside, 0).flatten()].unflatten(-1, taps.shape)


def _gradient(gy: torch.Tensor, x: torch.Tensor, p: torch.Tensor | None, op: Pooling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gradients of a summing pooling, of x and of its parameters if they are given, as torch operations on gathered windows: slow,
    kernel_size times the memory, differentiable.

    The arithmetic is the kernels' own.  x: (N, C, *sizes) or (C, *sizes), gy the same with the output's sizes.
    """
    kind, rank, dtype, shape = op.kind, op.rank, x.dtype, x.shape
    gy, x = (t.float() if t.dtype.itemsize == 2 else t for t in (gy, x))
    taps, inside, count, gathered = windows_of(x, op)
    size = x.new_tensor(len(taps))
    numbers = tuple(x.new_tensor(value) for value in op.parameters) if p is None else p.to(x.dtype).unbind()
    where = taps.where(inside, 0).flatten()

    def reduced(kind: Any) -> tuple[Any, torch.Tensor]:
        """The state and output of each window."""
        neutral = on_tensors(kind.neutral)(x.new_zeros(()))
        state = on_tensors(kind.init)(torch.zeros_like(gathered))
        state = on_tensors(kind.accumulate)(state, torch.where(inside, gathered, neutral), numbers)
        state = _combined(on_tensors(kind.combine), state)
        return state, on_tensors(kind.finalise)(state, count, size, numbers)

    state, y = reduced(kind)
    residue = on_tensors(kind.residue)(state) if kind.residue else None
    gy = gy.flatten(-rank)[..., None, :]
    share = on_tensors(kind.share)(gy, gathered, y, residue, count, size, numbers)
    share = torch.where(inside, share, 0).flatten(-2)
    gx = torch.zeros_like(x).flatten(-rank).index_add(-1, where, share).reshape(shape).to(dtype)
    if p is None:
        return gx, None
    zero = p.new_zeros(())
    slopes = {name: (gy * reduced(slope.kind)[1]).sum().to(p.dtype) for name, slope in op.slopes.items()}
    return gx, torch.stack([slopes.get(name, zero) for name in kind.parameters])


def _combined(combine: Any, state: Any) -> Any:
    """One state a tap along the second last dimension -> one a window, by halves."""
    several = isinstance(state, tuple)
    parts = state if several else (state,)
    while (size := parts[0].shape[-2]) > 1:
        half = size // 2
        low, high, rest = (
            [t.narrow(-2, start, length) for t in parts] for start, length in ((0, half), (half, half), (2 * half, size % 2))
        )
        merged = combine(tuple(low), tuple(high)) if several else combine(low[0], high[0])
        merged = merged if several else (merged,)
        parts = tuple(torch.cat(pair, -2) for pair in zip(merged, rest, strict=True))
    return parts if several else parts[0]
