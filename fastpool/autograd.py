"""Differentiable pooling: one pair of Functions for selecting pools, one for summing pools.

Each pair is a pooling and its gradient, both linear passes over memory, so that a double backward is the gradient's own backward.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from . import backend
from .backend import Layout, Pooling


class SelectingPool(torch.autograd.Function):
    """y (N, C, OH, OW) and the taps chosen; saves the taps alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, op: Pooling, seed: int) -> Any:
        y, taps, ctx.layout = backend.forward(x, op, True, seed)
        assert taps is not None
        ctx.op = op
        ctx.save_for_backward(taps)
        ctx.mark_non_differentiable(taps)
        ctx.set_materialize_grads(False)
        return y, taps

    @staticmethod
    def backward(ctx: Any, gy: torch.Tensor | None, _: Any) -> Any:
        if gy is None:
            return None, None, None
        (taps,) = ctx.saved_tensors
        return SelectingPoolBackward.apply(gy, taps, ctx.op, ctx.layout), None, None


class SelectingPoolBackward(torch.autograd.Function):
    """gx: each gy at the element its window chose."""

    @staticmethod
    def forward(ctx: Any, gy: torch.Tensor, taps: torch.Tensor, op: Pooling, layout: Layout) -> torch.Tensor:
        ctx.op, ctx.layout = op, layout
        ctx.save_for_backward(taps)
        return backend.backward(gy, None, None, taps, op, layout)

    @staticmethod
    def backward(ctx: Any, ggx: torch.Tensor) -> Any:
        (taps,) = ctx.saved_tensors
        ggx = ggx.contiguous(memory_format=ctx.layout.memory_format)
        flat = backend.flat_positions(taps, ctx.op, ggx).flatten(2)
        # Some windows chose nothing: stochastic pooling where no element is positive, max pooling of nothing but (dilated) padding.
        inside = flat >= 0
        if ctx.op.window is not None:
            rows, columns = (torch.from_numpy(ctx.op.window.counts(axis, ggx.shape[2 + axis], False) > 0) for axis in (0, 1))
            inside &= (rows[:, None] & columns).flatten().to(flat.device)
        chosen = ggx.flatten(2).gather(2, flat.where(inside, 0))
        return chosen.where(inside, 0).reshape(taps.shape), None, None, None


class SummingPool(torch.autograd.Function):
    """y (N, C, OH, OW); saves nothing if the pooling is linear, else x, y and the kind's residue."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, op: Pooling) -> torch.Tensor:
        y, residue, ctx.layout = backend.forward(x, op, True)
        ctx.op = op
        if not op.kind.linear:
            ctx.save_for_backward(x, y, residue)
        return y

    @staticmethod
    def backward(ctx: Any, gy: torch.Tensor) -> Any:
        x, y, residue = (None, None, None) if ctx.op.kind.linear else ctx.saved_tensors
        return SummingPoolBackward.apply(gy, x, y, residue, ctx.op, ctx.layout), None


class SummingPoolBackward(torch.autograd.Function):
    """gx: each element's share in the windows that hold it."""

    @staticmethod
    def forward(
        ctx: Any,
        gy: torch.Tensor,
        x: torch.Tensor | None,
        y: torch.Tensor | None,
        residue: torch.Tensor | None,
        op: Pooling,
        layout: Layout,
    ) -> torch.Tensor:
        ctx.op = op
        if not op.kind.linear:
            ctx.save_for_backward(gy, x)
        return backend.backward(gy, x, y, residue, op, layout)

    @staticmethod
    def backward(ctx: Any, ggx: torch.Tensor) -> Any:
        if ctx.op.kind.linear:
            # gx = A' gy, so the gradient of gy is A ggx: the pooling itself.
            return SummingPool.apply(ggx, ctx.op), None, None, None, None, None
        gy, x = ctx.saved_tensors
        with torch.enable_grad():
            # y and the residue are functions of x, and computed from it here: their own gradients are none.
            gy, x = (t if t.requires_grad else t.detach().requires_grad_() for t in (gy, x))
            gradients = torch.autograd.grad(_gradient(gy, x, ctx.op), (gy, x), ggx, create_graph=True, allow_unused=True)
        return *gradients, None, None, None, None


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
    "sqrt": _safe(torch.sqrt),
    "power": _safe(torch.pow),
}


@functools.cache
def _on_tensors(function: Any) -> Any:
    """A function of a kernel's arithmetic, on tensors, where torch can differentiate it."""
    from .kernels.number import retarget

    return retarget(function, _WORDS)


def _gradient(gy: torch.Tensor, x: torch.Tensor, op: Pooling) -> torch.Tensor:
    """The gradient of a summing pooling as torch operations on gathered windows: slow, kernel_size times the memory, differentiable.

    The arithmetic is the kernels' own.  x: (N, C, H, W), gy: (N, C, OH, OW).
    """
    kind, (n, c, height, width) = op.kind, x.shape
    if op.window is None:
        taps = torch.arange(height * width, device=x.device)[:, None]
        inside = torch.ones_like(taps, dtype=torch.bool)
        size, count = height * width, torch.full((1,), height * width, dtype=x.dtype)
    else:
        taps, inside = (torch.from_numpy(t).to(x.device) for t in op.window.tap_table(height, width))
        size = op.window.taps
        rows, columns = (torch.from_numpy(op.window.counts(axis, extent, op.include_pad)) for axis, extent in ((0, height), (1, width)))
        count = (rows[:, None] * columns).flatten().to(x)
    zero = x.new_zeros(())
    p = tuple(x.new_tensor(value) for value in op.parameters)
    where = taps.where(inside, 0).flatten()
    gathered = x.flatten(2)[:, :, where].unflatten(2, taps.shape)  # (N, C, taps, outputs)
    neutral = _on_tensors(kind.neutral)(zero)
    state = _on_tensors(kind.init)(torch.zeros_like(gathered))
    state = _on_tensors(kind.accumulate)(state, torch.where(inside, gathered, neutral), p)
    state = _combined(_on_tensors(kind.combine), state)
    y = _on_tensors(kind.finalise)(state, count, x.new_tensor(size), p)
    residue = _on_tensors(kind.residue)(state) if kind.residue else None
    share = _on_tensors(kind.share)(gy.flatten(2)[:, :, None], gathered, y, residue, count, x.new_tensor(size), p)
    share = torch.where(inside, share, zero).flatten(2)
    return torch.zeros_like(x).flatten(2).index_add(2, where, share).reshape(n, c, height, width)


def _combined(combine: Any, state: Any) -> Any:
    """One state a tap along dimension 2 -> one a window, by halves."""
    several = isinstance(state, tuple)
    parts = state if several else (state,)
    while (size := parts[0].shape[2]) > 1:
        half = size // 2
        low, high, rest = ([t.narrow(2, start, length) for t in parts] for start, length in ((0, half), (half, half), (2 * half, size % 2)))
        merged = combine(tuple(low), tuple(high)) if several else combine(low[0], high[0])
        merged = merged if several else (merged,)
        parts = tuple(torch.cat(pair, 2) for pair in zip(merged, rest, strict=True))
    return parts if several else parts[0]
