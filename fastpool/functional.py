"""Pooling functions under torch.nn.functional's names, orders and defaults; what torch lacks is keyword-only or a function of its own.

Shapes: input (N, C, H, W) or (C, H, W), N may be 0; output (N, C, OH, OW) or (C, OH, OW) with
OH = floor((H + 2 * padding - dilation * (kernel_size - 1) - 1) / stride) + 1 (ceil_mode rounds up, and drops a window that would start
in the right padding).  Sizes are ints or (height, width) pairs; stride defaults to kernel_size.

Dtypes: float32 and float64.  Layouts: contiguous, channels_last, and any view of either whose columns or channels are dense run as
they lie, and the output keeps the memory format; any other input is copied once.

Errors: TypeError for what is no int, tensor or bool; RuntimeError for sizes that cannot work (with the sizes in the message);
NotImplementedError for a dtype or device without kernels; always before anything is computed.

Gradients of any order; backward is deterministic.  Under torch.no_grad(), or where the input needs no gradient, nothing is saved.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch.autograd import forward_ad

from . import backend, library
from .autograd import SelectingPool, SummingPool
from .backend import Pooling
from .window import check_shape, window

__all__ = [
    "avg_pool2d",
    "global_avg_pool2d",
    "global_l2_pool2d",
    "global_max_pool2d",
    "global_min_pool2d",
    "l2_pool2d",
    "lp_pool2d",
    "max_pool2d",
    "min_pool2d",
    "stochastic_pool2d",
]


def max_pool2d(
    input: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The largest element of each window; with ``return_indices`` also its flat position in the input plane (int64), as torch.

    Padding is ignored.  The first of equal elements wins; a NaN wins over everything, the last NaN over the others.  Values and
    indices equal torch's bit for bit.  Saved for backward: one byte an output (windows of up to 255 taps), where torch saves eight.
    """
    return _selected("max_pool2d", "max", input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def min_pool2d(
    input: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """The smallest element of each window: max_pool2d with the order reversed, NaN and ties by the same rules.  Not in torch."""
    return _selected("min_pool2d", "min", input, kernel_size, stride, padding, dilation, ceil_mode, return_indices)


def avg_pool2d(
    input: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> torch.Tensor:
    """The mean of each window: its sum by the number of taps inside the input and (``count_include_pad``) its padding, or by
    ``divisor_override``.  Sums in the input's dtype, row by row, as torch.  Nothing is saved for backward."""
    name = "avg_pool2d"
    if not isinstance(count_include_pad, bool):
        raise TypeError(f"{name}: count_include_pad must be a bool, got {count_include_pad!r}")
    if divisor_override is not None:
        if isinstance(divisor_override, bool) or not hasattr(divisor_override, "__index__"):
            raise TypeError(f"{name}: divisor_override must be an int or None, got {divisor_override!r}")
        divisor_override = int(divisor_override)
        if divisor_override == 0:
            raise RuntimeError(f"{name}: divisor_override must not be zero")
        if abs(divisor_override) >= 2**63:
            raise ValueError(f"{name}: divisor_override {divisor_override} does not fit 64 bits")
    w = window(name, kernel_size, stride, padding, 1, ceil_mode)
    return _pooled(input, Pooling(name, _kind("avg"), w, (), count_include_pad, divisor_override))[0]


def lp_pool2d(
    input: torch.Tensor,
    norm_type: float,
    kernel_size: Any,
    stride: Any = None,
    ceil_mode: bool = False,
    *,
    padding: Any = 0,
    dilation: Any = 1,
) -> torch.Tensor:
    """The p-norm of each window, (sum |x|^p)^(1/p), p = ``norm_type``: any number but 0, math.inf included (the largest |x|).

    A window that ceil_mode clips is scaled up to a whole one, as torch does.  The gradient is 0 where the norm is 0.

    Differs from torch: |x| is taken (torch raises x itself, so odd p gives it NaN for negative sums); inf works; p = 0 is a
    ValueError (torch: ZeroDivisionError); padding and dilation exist.
    """
    return _norm("lp_pool2d", norm_type, input, kernel_size, stride, padding, dilation, ceil_mode)


def l2_pool2d(
    input: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> torch.Tensor:
    """The Euclidean norm of each window, sqrt(sum x^2), without 1/n: lp_pool2d with norm_type 2.  Not in torch."""
    return _norm("l2_pool2d", 2, input, kernel_size, stride, padding, dilation, ceil_mode)


def stochastic_pool2d(
    input: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    training: bool = True,
    *,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Stochastic pooling (Zeiler & Fergus 2013); weights are w = max(x, 0).  Not in torch.

    ``training``: one element of each window, drawn with probability w / sum(w); its gradient goes to that element.
    Otherwise: the expectation of that draw, sum(w * w) / sum(w), with its true gradient.
    Windows without a positive element give 0 and pass no gradient; NaN, or a sum that is not finite, gives NaN.  Evaluation squares
    the weights in the input's dtype: beyond about 1e19 (float32) it overflows.

    The draws come from Philox, keyed by one number of ``generator`` (default: torch's) and the output's place: the same for every
    memory layout and number of threads.
    """
    name = "stochastic_pool2d"
    w = window(name, kernel_size, stride, padding, dilation, ceil_mode)
    if not training:
        return _pooled(input, Pooling(name, _kind("stochastic_mean"), w))[0]
    op = Pooling(name, _kind("stochastic"), w)
    if not _has_no_memory(x := _batched(name, input)):
        backend.check(x, op)  # a refused call leaves the generator as it was
    return _pooled(input, op, seed=int(torch.empty((), dtype=torch.int64).random_(generator=generator)))[0]


def global_max_pool2d(input: torch.Tensor, keepdim: bool = True) -> torch.Tensor:
    """The largest element of each map: (N, C, 1, 1), or (N, C) without ``keepdim``.  NaN and ties as max_pool2d."""
    return _global("global_max_pool2d", "max", input, keepdim)


def global_avg_pool2d(input: torch.Tensor, keepdim: bool = True) -> torch.Tensor:
    """The mean of each map: (N, C, 1, 1), or (N, C) without ``keepdim``.  Nothing is saved for backward."""
    return _global("global_avg_pool2d", "avg", input, keepdim)


def global_min_pool2d(input: torch.Tensor, keepdim: bool = True) -> torch.Tensor:
    """The smallest element of each map: (N, C, 1, 1), or (N, C) without ``keepdim``.  NaN and ties as min_pool2d."""
    return _global("global_min_pool2d", "min", input, keepdim)


def global_l2_pool2d(input: torch.Tensor, keepdim: bool = True) -> torch.Tensor:
    """The Euclidean norm of each map: (N, C, 1, 1), or (N, C) without ``keepdim``."""
    return _global("global_l2_pool2d", "l2", input, keepdim)


_kinds: dict[str, Any] = {}


def _kind(name: str) -> Any:
    if not _kinds:  # on first use: Numba takes 0.3 s to import
        from .kernels.pool import KINDS

        _kinds.update(KINDS)
    return _kinds[name]


def _batched(caller: str, input: Any) -> torch.Tensor:
    """(N, C, H, W) of a legal input; TypeError or RuntimeError of any other."""
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"{caller}: input must be a Tensor, got {type(input).__name__}")
    if 0 in input.shape[-3:] or input.dim() not in (3, 4):
        check_shape(caller, input.shape)
    return input if input.dim() == 4 else input.unsqueeze(0)


def _selected(
    caller: str,
    kind: str,
    input: torch.Tensor,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    ceil_mode: bool,
    return_indices: bool,
) -> Any:
    op = Pooling(caller, _kind(kind), window(caller, kernel_size, stride, padding, dilation, ceil_mode))
    y, taps = _pooled(input, op, return_indices)
    if not return_indices:
        return y
    x = _batched(caller, input)
    flat = (library if _has_no_memory(x) else backend).flat_positions(taps, op, x)
    return y, flat if input.dim() == 4 else flat.squeeze(0)


_NORMS = {1.0: "l1", 2.0: "l2", math.inf: "linf"}


def _norm(
    caller: str, norm_type: float, input: torch.Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> torch.Tensor:
    if isinstance(norm_type, bool) or not isinstance(norm_type, numbers.Real):
        raise TypeError(f"{caller}: norm_type must be a number, got {norm_type!r}")
    p = float(norm_type)
    if p == 0 or math.isnan(p) or p == -math.inf:
        raise ValueError(f"{caller}: norm_type must be a number other than 0 and -inf, got {norm_type!r}; math.inf gives the largest |x|")
    limits = torch.finfo(torch.float32)
    if p != math.inf and not limits.tiny <= abs(p) <= limits.max:
        raise ValueError(f"{caller}: norm_type {norm_type!r} is outside float32's range, {limits.tiny} to {limits.max}")
    w = window(caller, kernel_size, stride, padding, dilation, ceil_mode)
    name = _NORMS.get(p, "lp" if p > 0 else "lp_negative")
    return _pooled(input, Pooling(caller, _kind(name), w, () if p in _NORMS else (p,)))[0]


def _global(caller: str, kind: str, input: torch.Tensor, keepdim: bool) -> torch.Tensor:
    y = _pooled(input, Pooling(caller, _kind(kind), None))[0]
    return y if keepdim else y.flatten(-3)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _has_no_memory(x: torch.Tensor) -> bool:
    """Whether x only stands for a tensor (under torch.compile, export, in a FakeTensorMode): the operators know what to do then."""
    return torch.compiler.is_compiling() or type(x) not in _PLAIN


def _refuse_transforms(caller: str, x: torch.Tensor) -> None:
    """NotImplementedError for what would read a wrapper's memory, or lose a tangent."""
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise NotImplementedError(f"{caller}: torch.func's transforms and vmap do not reach it; batch by N, and use backward()")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(f"{caller}: there is no forward-mode derivative; backward() and torch.autograd.grad work")


def _pooled(input: torch.Tensor, op: Pooling, return_indices: bool = False, seed: int = 0) -> Any:
    """(y, taps) through autograd where a gradient will be asked for; without one, taps only if ``return_indices``."""
    x = _batched(op.caller, input)
    taps: torch.Tensor | None
    differentiates = torch.is_grad_enabled() and x.requires_grad
    if _has_no_memory(x):
        y, taps = library.pool(x, op, return_indices or differentiates, seed)
        return (y if input.dim() == 4 else y.squeeze(0)), taps
    _refuse_transforms(op.caller, x)
    x = backend.materialised(x)
    if not differentiates:
        y, taps, _ = backend.forward(x, op, return_indices, seed)
    elif op.kind.selects:
        y, taps = SelectingPool.apply(x, op, seed)
    else:
        y, taps = SummingPool.apply(x, op), None
    return (y if input.dim() == 4 else y.squeeze(0)), taps
