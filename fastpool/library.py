"""Pooling and convolution as torch.library operators: for tensors that only stand for one, under torch.compile, torch.export and in a
FakeTensorMode.

``fastpool::pool`` and its backward serve every kind; a reduction goes by its name, a window as a list of ints.  A call costs
more than the eager path's, so functional.py comes here only where it must.  The gradient is first order: torch.compile knows no other.
"""

from __future__ import annotations

from typing import Any

import torch

from . import autograd, backend, convolution
from .backend import Pooling
from .convolution import Convolution
from .window import Adaptive, Window

DEVICES = ("cpu", "cuda")
"""Of which the operators have kernels: backend.py takes those of the tensors' device."""

_OPERATION = "str kind, int rank, int[] window, float[] parameters, bool include_pad, int divisor"

torch.library.define("fastpool::pool", f"(Tensor x, Tensor? p, {_OPERATION}, int seed, bool saves) -> (Tensor, Tensor)")
torch.library.define(
    "fastpool::pool_backward",
    f"(Tensor gy, Tensor? x, Tensor? y, Tensor saved, Tensor? p, {_OPERATION}, SymInt[] shape, SymInt[] strides, "
    "ScalarType dtype, bool needs_x, bool needs_p) -> (Tensor, Tensor)",
)
torch.library.define("fastpool::flat_positions", f"(Tensor taps, Tensor x, {_OPERATION}) -> Tensor")
torch.library.define("fastpool::unpool", "(Tensor x, Tensor indices, SymInt[] sizes) -> Tensor")
torch.library.define("fastpool::unpool_backward", "(Tensor gy, Tensor indices, int rank) -> Tensor")


_CONVOLUTION = "int rank, int[] stride, int[] padding, bool same, int[] dilation, int groups"

torch.library.define("fastpool::convolve", f"(Tensor x, Tensor weight, Tensor? bias, {_CONVOLUTION}) -> Tensor")
torch.library.define("fastpool::convolve_input", f"(Tensor gy, Tensor x, Tensor weight, {_CONVOLUTION}) -> Tensor")
torch.library.define("fastpool::convolve_weight", f"(Tensor gy, Tensor x, Tensor weight, {_CONVOLUTION}) -> Tensor")


def pool(x: torch.Tensor, op: Pooling, saves: bool, seed: int, p: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, saved) of ``backend.forward`` through the operator; saved is empty where there is nothing to save."""
    return torch.ops.fastpool.pool(x, p, *_described(op), seed, saves)


def flat_positions(taps: torch.Tensor, op: Pooling, x: torch.Tensor) -> torch.Tensor:
    """``backend.flat_positions`` through the operator."""
    return torch.ops.fastpool.flat_positions(taps, x, *_described(op))


def _described(op: Pooling) -> tuple[str, int, list[int], list[float], bool, int]:
    match op.window:
        case None:
            window = []
        case Adaptive(outputs):
            window = [-1 if out is None else out for out in outputs]
        case w:
            window = [*w.kernel_size, *w.stride, *w.padding, *w.dilation, int(w.ceil_mode)]
    return op.kind.name, op.rank, window, list(op.parameters), op.include_pad, op.divisor or 0


_operations: dict[Any, Pooling] = {}


def _operation(kind: str, rank: int, w: list[int], parameters: list[float], include_pad: bool, divisor: int) -> Pooling:
    key = (kind, rank, tuple(w), tuple(parameters), include_pad, divisor)
    if key not in _operations:
        from .kernels.pool import KINDS

        window: Window | Adaptive | None = None
        if len(w) == rank:
            window = Adaptive(tuple(None if out < 0 else out for out in w))
        elif w:
            of = [tuple(w[at : at + rank]) for at in range(0, 4 * rank, rank)]
            window = Window(of[0], of[1], of[2], of[3], bool(w[-1]))
        _operations[key] = Pooling(f"{kind} pooling", KINDS[kind], rank, window, tuple(parameters), include_pad, divisor or None)
    return _operations[key]


def _of(operation: Any, p: torch.Tensor | None) -> Pooling:
    op = _operation(*operation)
    return op if p is None else op.at(tuple(p.tolist()))


@torch.library.impl("fastpool::pool", DEVICES)
def _pool(x: torch.Tensor, p: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *operation, seed, saves = arguments
    y, saved, _ = backend.forward(x, _of(operation, p), saves, seed)
    return y, x.new_empty(0) if saved is None else saved


@torch.library.register_fake("fastpool::pool")
def _pool_fake(x: torch.Tensor, p: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *operation, _, saves = arguments
    op, rank = _operation(*operation), operation[1]
    sizes = x.shape[-rank:]
    out = (*x.shape[:-rank], *(op.window.output_size(*sizes) if op.window else (1,) * rank))
    window = op.window.resolve(*sizes) if isinstance(op.window, Adaptive) and 0 not in out else op.window
    strides = backend.dense_strides(out, rank, bool(backend.channels_last(x.shape, x.stride(), rank)))
    y = backend.empty(x, out, strides)
    saved = backend.saved_dtype(op, window, x.dtype, tuple(x.shape)) if saves else None  # type: ignore[arg-type]
    return y, backend.empty(x, out, strides, saved) if saved else x.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, p, *ctx.operation, _, _ = inputs
    y, saved = output
    kind = _operation(*ctx.operation).kind
    reads_values = not (kind.selects or kind.linear)
    ctx.save_for_backward(saved, p, *((x, y) if reads_values else ()))
    ctx.shape, ctx.strides, ctx.dtype = x.shape, x.stride(), x.dtype
    ctx.mark_non_differentiable(saved)


def _pool_gradient(ctx: Any, gy: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    saved, p, *values = ctx.saved_tensors
    x, y = values or (None, None)
    needs = ctx.needs_input_grad[:2]
    gx, gp = torch.ops.fastpool.pool_backward(gy, x, y, saved, p, *ctx.operation, ctx.shape, ctx.strides, ctx.dtype, *needs)
    return gx if needs[0] else None, gp if needs[1] else None, *[None] * (len(ctx.operation) + 2)


torch.library.register_autograd("fastpool::pool", _pool_gradient, setup_context=_setup_context)


@torch.library.impl("fastpool::pool_backward", DEVICES)
def _pool_backward(gy: torch.Tensor, x: Any, y: Any, saved: torch.Tensor, p: Any, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *operation, shape, strides, dtype, needs_x, needs_p = arguments
    op = _of(operation, p)
    call = op.call(tuple(shape), tuple(strides), dtype, gy.device, True)
    residue = saved if call.saves else None
    if op.kind.selects:
        return backend.backward(gy, None, None, residue, call), gy.new_empty(0)
    gx, gp = autograd.gradients(gy, x, y, residue, op, call, (needs_x, needs_p))
    return gy.new_empty(0) if gx is None else gx, gy.new_empty(0) if gp is None else gp


@torch.library.register_fake("fastpool::pool_backward")
def _pool_backward_fake(
    gy: torch.Tensor, x: Any, y: Any, saved: torch.Tensor, p: Any, *arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    *operation, shape, strides, _, needs_x, needs_p = arguments
    rank = operation[1]
    last = bool(backend.channels_last(shape, strides, rank))
    gx = backend.empty(gy, shape, backend.dense_strides(shape, rank, last)) if needs_x else gy.new_empty(0)
    return gx, torch.empty_like(p) if needs_p else gy.new_empty(0)


@torch.library.impl("fastpool::flat_positions", DEVICES)
def _flat_positions(taps: torch.Tensor, x: torch.Tensor, *operation: Any) -> torch.Tensor:
    call = _operation(*operation).call(tuple(x.shape), x.stride(), x.dtype, x.device, True)
    flat = backend.flat_positions(taps, call)
    return flat.clone() if flat is taps else flat


@torch.library.register_fake("fastpool::flat_positions")
def _flat_positions_fake(taps: torch.Tensor, x: torch.Tensor, *operation: Any) -> torch.Tensor:
    return torch.empty_like(taps, dtype=torch.int64)


@torch.library.impl("fastpool::unpool", DEVICES)
def _unpool(x: torch.Tensor, indices: torch.Tensor, sizes: Any) -> torch.Tensor:
    return backend.unpool("max_unpool", x, indices, tuple(sizes))


@torch.library.register_fake("fastpool::unpool")
def _unpool_fake(x: torch.Tensor, indices: torch.Tensor, sizes: Any) -> torch.Tensor:
    rank = len(sizes)
    shape = (*x.shape[:-rank], *sizes)
    return backend.empty(x, shape, backend.dense_strides(shape, rank, bool(backend.channels_last(x.shape, x.stride(), rank))))


@torch.library.impl("fastpool::unpool_backward", DEVICES)
def _unpool_backward(gy: torch.Tensor, indices: torch.Tensor, rank: int) -> torch.Tensor:
    return backend.gather(gy, indices, rank)


@torch.library.register_fake("fastpool::unpool_backward")
def _unpool_backward_fake(gy: torch.Tensor, indices: torch.Tensor, rank: int) -> torch.Tensor:
    last = bool(backend.channels_last(indices.shape, indices.stride(), rank))
    return backend.empty(gy, indices.shape, backend.dense_strides(indices.shape, rank, last))


def _unpool_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.rank = len(inputs[2])


def _unpool_gradient(ctx: Any, gy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return torch.ops.fastpool.unpool_backward(gy, ctx.saved_tensors[0], ctx.rank), None, None


torch.library.register_autograd("fastpool::unpool", _unpool_gradient, setup_context=_unpool_context)


def convolve(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, op: Convolution) -> torch.Tensor:
    """``convolution.forward`` through the operator."""
    padding, same = ([0] * op.rank, True) if isinstance(op.padding, str) else (list(op.padding), False)
    return torch.ops.fastpool.convolve(x, weight, bias, op.rank, list(op.stride), padding, same, list(op.dilation), op.groups)


def _convolution(rank: int, stride: Any, padding: Any, same: bool, dilation: Any, groups: int) -> Convolution:
    pad = "same" if same else tuple(padding)
    return convolution.request(f"conv{rank}d", rank, tuple(stride), pad, tuple(dilation), groups)


@torch.library.impl("fastpool::convolve", DEVICES)
def _convolve(x: torch.Tensor, weight: torch.Tensor, bias: Any, *asked: Any) -> torch.Tensor:
    return convolution.forward(x, weight, bias, _convolution(*asked))


@torch.library.register_fake("fastpool::convolve")
def _convolve_fake(x: torch.Tensor, weight: torch.Tensor, bias: Any, *asked: Any) -> torch.Tensor:
    op = _convolution(*asked)
    rank = op.rank
    out = (*x.shape[: -rank - 1], weight.shape[0], *op.output_size(x.shape[-rank:], weight.shape[2:]))
    return backend.empty(x, out, backend.dense_strides(out, rank, bool(backend.channels_last(x.shape, x.stride(), rank))))


@torch.library.impl("fastpool::convolve_input", DEVICES)
def _convolve_input(gy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *asked: Any) -> torch.Tensor:
    return convolution.input_gradient(gy, weight, None, convolution.called(_convolution(*asked), x, weight))


@torch.library.register_fake("fastpool::convolve_input")
def _convolve_input_fake(gy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *asked: Any) -> torch.Tensor:
    rank = asked[0]
    return backend.empty(x, x.shape, backend.dense_strides(x.shape, rank, bool(backend.channels_last(x.shape, x.stride(), rank))))


@torch.library.impl("fastpool::convolve_weight", DEVICES)
def _convolve_weight(gy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *asked: Any) -> torch.Tensor:
    return convolution.weight_gradient(gy, x, convolution.called(_convolution(*asked), x, weight))


@torch.library.register_fake("fastpool::convolve_weight")
def _convolve_weight_fake(gy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *asked: Any) -> torch.Tensor:
    return backend.empty(weight, weight.shape, convolution.gradient_strides(weight.shape, weight.stride(), asked[0]))


def _convolve_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, _, *ctx.asked = inputs
    ctx.save_for_backward(x, weight)


def _convolve_gradient(ctx: Any, gy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_x, needs_w, needs_b = ctx.needs_input_grad[:3]
    gx = torch.ops.fastpool.convolve_input(gy, x, weight, *ctx.asked) if needs_x else None
    gw = torch.ops.fastpool.convolve_weight(gy, x, weight, *ctx.asked) if needs_w else None
    gb = convolution.bias_gradient(gy, ctx.asked[0]) if needs_b else None
    return gx, gw, gb, *[None] * len(ctx.asked)


torch.library.register_autograd("fastpool::convolve", _convolve_gradient, setup_context=_convolve_context)
