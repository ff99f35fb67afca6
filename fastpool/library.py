"""Pooling as torch.library operators: for tensors that only stand for one, under torch.compile, torch.export and in a FakeTensorMode.

``fastpool::pool`` and its backward serve every kind; a reduction goes by its name, a window as a list of ints.  A call costs
more than the eager path's, so functional.py comes here only where it must.  The gradient is first order: torch.compile knows no other.
"""

from __future__ import annotations

from typing import Any

import torch

from . import backend
from .backend import Layout, Pooling
from .window import Window

_OPERATION = "str kind, int[] window, float[] parameters, bool include_pad, int divisor"

torch.library.define("fastpool::pool", f"(Tensor x, {_OPERATION}, int seed, bool saves) -> (Tensor, Tensor)")
torch.library.define(
    "fastpool::pool_backward",
    f"(Tensor gy, Tensor? x, Tensor? y, Tensor saved, {_OPERATION}, SymInt[] shape, bool channels_last) -> Tensor",
)
torch.library.define("fastpool::flat_positions", f"(Tensor taps, Tensor x, {_OPERATION}) -> Tensor")


def pool(x: torch.Tensor, op: Pooling, saves: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, saved) of ``backend.forward`` through the operator; saved is empty where there is nothing to save."""
    return torch.ops.fastpool.pool(x, *_described(op), seed, saves)


def flat_positions(taps: torch.Tensor, op: Pooling, x: torch.Tensor) -> torch.Tensor:
    """``backend.flat_positions`` through the operator."""
    return torch.ops.fastpool.flat_positions(taps, x, *_described(op))


def _described(op: Pooling) -> tuple[str, list[int], list[float], bool, int]:
    w = op.window
    window = [] if w is None else [*w.kernel_size, *w.stride, *w.padding, *w.dilation, int(w.ceil_mode)]
    return op.kind.name, window, list(op.parameters), op.include_pad, op.divisor or 0


def _operation(kind: str, w: list[int], parameters: list[float], include_pad: bool, divisor: int) -> Pooling:
    from .kernels.pool import KINDS

    window = Window((w[0], w[1]), (w[2], w[3]), (w[4], w[5]), (w[6], w[7]), bool(w[8])) if w else None
    return Pooling(f"{kind} pooling", KINDS[kind], window, tuple(parameters), include_pad, divisor or None)


@torch.library.impl("fastpool::pool", "cpu")
def _pool(x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *operation, seed, saves = arguments
    y, saved, _ = backend.forward(x, _operation(*operation), saves, seed)
    return y, x.new_empty(0) if saved is None else saved


@torch.library.register_fake("fastpool::pool")
def _pool_fake(x: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *operation, _, saves = arguments
    op, layout = _operation(*operation), _layout(x)
    out = op.window.output_size(x.shape[2], x.shape[3]) if op.window else (1, 1)
    y = backend.empty((x.shape[0], x.shape[1], *out), x.dtype, x.device, layout)
    saved = backend.saved_dtype(op, x.dtype, layout.shape) if saves else None
    return y, backend.empty(tuple(y.shape), saved, x.device, layout) if saved else x.new_empty(0)


def _layout(x: torch.Tensor) -> Layout:
    return Layout(tuple(x.shape), (0, 0, 0, 0), bool(backend.is_channels_last(x)))  # type: ignore[arg-type]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, *ctx.operation, _, _ = inputs
    y, saved = output
    kind = _operation(*ctx.operation).kind
    reads_values = not (kind.selects or kind.linear)
    ctx.save_for_backward(saved, *((x, y) if reads_values else ()))
    ctx.shape, ctx.channels_last = x.shape, bool(backend.is_channels_last(x))
    ctx.mark_non_differentiable(saved)


def _pool_gradient(ctx: Any, gy: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    saved, *values = ctx.saved_tensors
    x, y = values or (None, None)
    gx = torch.ops.fastpool.pool_backward(gy, x, y, saved, *ctx.operation, ctx.shape, ctx.channels_last)
    return gx, *[None] * (len(ctx.operation) + 2)


torch.library.register_autograd("fastpool::pool", _pool_gradient, setup_context=_setup_context)


@torch.library.impl("fastpool::pool_backward", "cpu")
def _pool_backward(gy: torch.Tensor, x: Any, y: Any, saved: torch.Tensor, *arguments: Any) -> torch.Tensor:
    *operation, shape, channels_last = arguments
    layout = Layout(tuple(shape), (0, 0, 0, 0), channels_last)
    return backend.backward(gy, x, y, saved if saved.dim() == 4 else None, _operation(*operation), layout)


@torch.library.register_fake("fastpool::pool_backward")
def _pool_backward_fake(gy: torch.Tensor, x: Any, y: Any, saved: torch.Tensor, *arguments: Any) -> torch.Tensor:
    *_, shape, channels_last = arguments
    return backend.empty(shape, gy.dtype, gy.device, Layout(shape, (0, 0, 0, 0), channels_last))


@torch.library.impl("fastpool::flat_positions", "cpu")
def _flat_positions(taps: torch.Tensor, x: torch.Tensor, *operation: Any) -> torch.Tensor:
    return backend.flat_positions(taps, _operation(*operation), x)


@torch.library.register_fake("fastpool::flat_positions")
def _flat_positions_fake(taps: torch.Tensor, x: torch.Tensor, *operation: Any) -> torch.Tensor:
    return torch.empty_like(taps, dtype=torch.int64)
