"""Pooling and convolution under torch.nn.functional's names, orders and defaults; what torch lacks is keyword-only or a function of its
own.

Each exists for one, two and three spatial axes (``max_pool1d``, ``max_pool2d``, ``max_pool3d``).  Those of the pooling types whose file in
kernels/pool says how they are called (``Face``) are made from it: max, min, l2 and whatever is added there.

Shapes: input (N, C, *sizes) or (C, *sizes), where sizes is (L,), (H, W) or (D, H, W); N may be 0.  The output has the same axes, with
out = floor((size + 2 * padding - dilation * (kernel_size - 1) - 1) / stride) + 1 along each (ceil_mode rounds up, and drops a window that
would start in the right padding).  Sizes of windows are ints or a tuple of an int for each axis; stride defaults to kernel_size.
Adaptive functions give ``output_size`` outputs (None: as many as the input has), output i of n from the elements
floor(i * size / n) .. ceil((i + 1) * size / n) - 1.

Dtypes: float32, float64, bfloat16 and float16, the 16-bit ones computed in float32 and rounded once; max and min also int8, uint8, int16,
int32, int64 and bool; avg, over windows, also int64, as torch.  Layouts: contiguous, channels_last (of one axis: dense as (N, L, C)), and
any view of either whose last axis or channels are dense run as they lie, and the output keeps the memory format; any other input is copied
once.

Errors: TypeError for what is no int, tensor or bool; RuntimeError for sizes that cannot work (with the sizes in the message);
NotImplementedError for a dtype or device without kernels; always before anything is computed.

Every pooling takes, by keyword, ``before=f`` for pool(f(x)) and ``after=f`` for f(pool(x)): the name of an activation ("relu", ...), a
module of torch.nn's (with its parameters; a PReLU's weight gets its gradient), a dropout, a batch-norm (folded in evaluation), or several
in a tuple; and ``affine=(scale, shift)``, each (C,), for scale * x + shift before all that, as a folded batch-norm.  One pass over memory
where a law (``fastpool.commutes``) or the arithmetic allows it; else f has a pass of its own before the pooling, and where a gradient needs
the element chosen, one over the outputs.  Results are those of the steps one after the other, but for rounding.  Of elements that f makes
equal the largest, not the first, gets the gradient (the smallest, where f falls), except with ``return_indices``.  Saved for backward by
max and min: one byte an output where f' is 0 or 1 (ReLU); with the output where that tells f' (LeakyReLU, sigmoid, tanh); else with the
element chosen (GELU, SiLU).

Gradients of any order; backward is deterministic.  Under torch.no_grad(), or where the input needs no gradient, nothing is saved.

Tiny maps: where max or avg, over windows without dilation, adaptive or global, read about 1024 elements or fewer of a contiguous float32
or float64 input on the CPU, and torch is set to one thread or two, the call is one of torch's own operator (fastpool/tiny.py): a kernel's
takes 4.8 us for 1x8x8x8 and 8 to 10 with a gradient, torch's 1.6 to 3.9.  Values, gradients and errors are the same, rounding of avg
apart; but what is saved for backward is torch's, the input too, so that an input changed in place before backward is torch's RuntimeError.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from . import activations, backend, convolution, fusion, library, tiny
from .activations import Applied
from .autograd import Convolve, ConvolveInput, run_selecting, run_summing, run_unpool
from .backend import Pooling
from .kernels.pool import KINDS
from .window import WORDS, adaptive, check_shape, ints, window

__all__: list[str] = []

Function = Callable[..., Any]

_INT = {int}
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# Names of this module: each look-up in another is 0.04 us of a call's 8.
# torch.compile alone has plain tensors traced, and to ask for that is 0.02 us where torch.compiler.is_compiling is 0.05, functorch's stack
# 0.03 and a tensor's wrapper 0.1; 1 us in all, not 4, where a large map has just gone through the caches.
_is_compiling, _is_grad_enabled = torch.compiler.is_dynamo_compiling, torch.is_grad_enabled
_is_wrapped, _transforms = torch._C._functorch.is_functorch_wrapped_tensor, torch._C._are_functorch_transforms_active
_is_autocast = torch.is_autocast_enabled
_threads, _STRIDED = torch.get_num_threads, torch.strided


def _published(make: Callable[..., Function], stem: str, *more: Any) -> None:
    """Put ``make(name, rank, *more)`` into this module for each number of spatial axes; {n} in ``stem`` is that number."""
    for rank in WORDS:
        name = stem.format(n=rank)
        function = make(name, rank, *more)
        function.__name__ = function.__qualname__ = name
        globals()[name] = function
        __all__.append(name)


def _asking(caller: str, rank: int, kind: Any) -> Callable[[Any, Any, Any, Any, Any], Pooling]:
    """(kernel_size, stride, padding, dilation, ceil_mode) -> the operation, one object for equal arguments."""

    def make(kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any) -> Pooling:
        return Pooling(caller, kind, rank, window(caller, rank, kernel_size, stride, padding, dilation, ceil_mode))

    known = functools.lru_cache(maxsize=1024, typed=True)(make)  # typed: True is no int here

    def asked(kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any) -> Pooling:
        if _is_compiling():  # which would trace through the cache anyway, and warn of it
            return make(kernel_size, stride, padding, dilation, ceil_mode)
        if type(kernel_size) is int and type(padding) is int and type(dilation) is int and (stride is None or type(stride) is int):
            return known(kernel_size, stride, padding, dilation, ceil_mode)
        for value in (kernel_size, stride, padding, dilation):
            # Lists have no hash; (1, 1) and (True, 1) have the same.
            if type(value) is not int and value is not None and (type(value) is not tuple or {*map(type, value)} != _INT):
                kernel_size, padding, dilation = (
                    ints(caller, name, value, rank)
                    for name, value in (("kernel_size", kernel_size), ("padding", padding), ("dilation", dilation))
                )
                stride = _stride(caller, rank, stride)
                break
        return known(kernel_size, stride, padding, dilation, ceil_mode)

    return asked


def _stride(caller: str, rank: int, stride: Any) -> Any:
    """None for what stands for kernel_size: None and, as in torch, an empty sequence."""
    empty = stride is None or (hasattr(stride, "__len__") and not isinstance(stride, (str, torch.Tensor)) and len(stride) == 0)
    return None if empty else ints(caller, "stride", stride, rank)


def _check_tensor(caller: str, input: Any) -> None:
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"{caller}: input must be a Tensor, got {type(input).__name__}")


def _has_no_memory(x: torch.Tensor) -> bool:
    """Whether x only stands for a tensor (under torch.compile, export, in a FakeTensorMode): the operators know what to do then."""
    return type(x) not in _PLAIN or _is_compiling()


def _refuse_transforms(caller: str, x: torch.Tensor) -> None:
    """NotImplementedError for what would read a wrapper's memory, or lose a tangent."""
    if _is_wrapped(x):
        raise NotImplementedError(f"{caller}: torch.func's transforms and vmap do not reach it; batch by N, and use backward()")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError(f"{caller}: there is no forward-mode derivative; backward() and torch.autograd.grad work")


def _is_tiny(x: torch.Tensor, op: Pooling) -> bool:
    """Whether torch's operator is the quicker one."""
    few = op.equal is not None and 0 < x.numel() * op.equal.reads <= tiny.MOST and _threads() <= tiny.THREADS
    return few and x.dtype in tiny.DTYPES and x.is_cpu and x.layout is _STRIDED and x.is_contiguous()


def _fused(
    x: torch.Tensor, op: Pooling, before: Any, after: Any, affine: Any, seed: int = 0, p: torch.Tensor | None = None
) -> torch.Tensor:
    """``_pooled`` with what stands before and after it."""
    _check_tensor(op.caller, x)
    if affine is not None:
        check_shape(op.caller, op.rank, x.shape)
        fusion.check_affine(op.caller, affine, x.shape[-op.rank - 1])
    alone = _has_no_memory(x) or _transforms() or forward_ad._current_level >= 0 or p is not None
    if not alone:
        x = backend.materialised(x)
    small = not alone and _is_tiny(x, op)
    return fusion.fused(x, op, before, after, affine, not alone, small, lambda x, op: _pooled(x, op, seed, p))


def _pooled(
    x: torch.Tensor,
    op: Pooling,
    seed: int = 0,
    p: torch.Tensor | None = None,
    before: Any = None,
    after: Any = None,
    affine: Any = None,
) -> torch.Tensor:
    """y through autograd where a gradient will be asked for; ``p``: the kind's parameters (float64), if one of them may need a gradient."""
    if before is not None or after is not None or affine is not None:
        first, then = fusion.key(op.caller, before), fusion.key(op.caller, after)
        named = affine is None and p is None and first is not ... and then is not ...
        if not named or type(x) not in _PLAIN or x.dtype not in fusion.DTYPES or _is_compiling() or _is_special(x):
            return _fused(x, op, before, after, affine, seed, p)
        small = op.equal is not None and _is_tiny(x, op)
        plan = fusion.planned(x, op, first, then, small)
        y = (_pooled if small else _by_kernels)(fusion.applied(plan.first, x, not small), plan.op, seed)
        return fusion.applied(plan.left, y, not small)
    if type(x) not in _PLAIN or _is_compiling():
        return _pooled_by_library(x, op, False, seed, p)[0]
    if _transforms() or forward_ad._current_level >= 0:
        _refuse_transforms(op.caller, x)
    if op.equal is not None:
        try:
            if _is_tiny(x, op):
                return op.equal.run(x)
        except (RuntimeError, IndexError):
            pass  # what torch refuses fastpool may take; if not, in its own words
    if x.is_neg() or x._is_zerotensor():
        x = backend.materialised(x)
    return _by_kernels(x, op, seed, p)


def _is_special(x: torch.Tensor) -> bool:
    """Whether a plain tensor may be more, or its memory not what it says."""
    return _transforms() or forward_ad._current_level >= 0 or x.is_neg() or x._is_zerotensor()


def _by_kernels(x: torch.Tensor, op: Pooling, seed: int = 0, p: torch.Tensor | None = None) -> torch.Tensor:
    """``_pooled`` of a tensor whose memory may be read."""
    if (x.requires_grad or (p is not None and p.requires_grad)) and _is_grad_enabled():
        if op.kind.selects:
            return run_selecting(x, op, seed, None)
        return run_summing(x, op, p)
    return backend.forward(x, op if p is None else op.at(tuple(p.tolist())), False, seed)[0]


def _pooled_by_library(
    x: torch.Tensor, op: Pooling, saves: bool, seed: int = 0, p: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_tensor(op.caller, x)
    check_shape(op.caller, op.rank, x.shape)
    needs = torch.is_grad_enabled() and (x.requires_grad or (p is not None and p.requires_grad))
    return library.pool(x, op, saves or needs, seed, p)


def _with_indices(
    x: torch.Tensor, op: Pooling, before: Any = None, after: Any = None, affine: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and the flat positions (int64) of what a selecting pooling chose: of the first of what ``before`` makes equal."""
    _check_tensor(op.caller, x)
    if before is not None or after is not None or affine is not None:
        return fusion.with_indices(x, op, before, after, affine, _with_indices)
    if _has_no_memory(x):
        y, taps = _pooled_by_library(x, op, True)
        return y, library.flat_positions(taps, op, x)
    _refuse_transforms(op.caller, x)
    x = backend.materialised(x)
    if torch.is_grad_enabled() and x.requires_grad:
        kept: list[Any] = []
        y = run_selecting(x, op, 0, kept)
        return y, backend.flat_positions(*kept)
    y, saved, call = backend.forward(x, op, True)
    assert saved is not None
    return y, backend.flat_positions(saved, call)


# Functions of a pooling type with a face


def _arguments(caller: str, kind: Any, values: dict[str, Any]) -> tuple[tuple[float, ...], torch.Tensor | None]:
    """The parameters as numbers, or as one tensor (float64) if any of them is a tensor; checked."""
    of, face = [values[name] for name in kind.parameters], kind.face
    for name, value in zip(kind.parameters, of, strict=True):
        if isinstance(value, torch.Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"{caller}: {name} must be a number or a tensor of one element, got a tensor of shape {tuple(value.shape)}"
                )
            if value.requires_grad and name not in kind.slopes:
                raise NotImplementedError(f"{caller}: there is no gradient by {name}; {name}.detach() works")
        elif isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{caller}: {name} must be a number or a tensor of one element, got {value!r}")
    tensors = [value for value in of if isinstance(value, torch.Tensor)]
    if not tensors:
        given = tuple(float(value) for value in of)
        _refuse_parameters(caller, kind, given)
        return given, None
    p = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=tensors[0].device).reshape(()) for value in of])
    if not _has_no_memory(p):
        _refuse_parameters(caller, kind, tuple(p.tolist()))
    return (0.0,) * len(of) if not face else tuple(face.defaults.values()), p


def _refuse_parameters(caller: str, kind: Any, values: tuple[float, ...]) -> None:
    words = kind.face.refuse and kind.face.refuse(**dict(zip(kind.parameters, values, strict=True)))
    if words:
        raise ValueError(f"{caller}: {words}")


_BESIDE = ("before", "after", "affine")
"""What every pooling function takes by keyword alone, and what its modules keep."""
_WINDOW = {"kernel_size": inspect.Parameter.empty, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}


def _signed(function: Function, arguments: dict[str, Any]) -> Function:
    """``function(input, **arguments)`` as one that takes them by place or name, and those of _BESIDE; ``arguments``: name -> default, or
    Parameter.empty."""
    names = list(arguments)
    allowed = {*names, *_BESIDE}
    given = {name: default for name, default in arguments.items() if default is not inspect.Parameter.empty} | dict.fromkeys(_BESIDE)

    def pool(input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(names, args, strict=False))
        if len(args) > len(names) or named.keys() & kwargs.keys() or not kwargs.keys() <= allowed:
            signature.bind(input, *args, **kwargs)  # raises Python's own TypeError
        values = given | named | kwargs
        if len(values) < len(allowed):
            signature.bind(input, *args, **kwargs)
        return function(input, **values)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("input", kind)]
    parameters += [inspect.Parameter(name, kind, default=default) for name, default in arguments.items()]
    parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in _BESIDE]
    signature = inspect.Signature(parameters)
    pool.__signature__ = signature  # type: ignore[attr-defined]
    return pool


def _windowed(caller: str, rank: int, kind: Any) -> Function:
    """STEM_pool: the function over windows."""
    asked = _asking(caller, rank, kind)
    pool: Function
    if kind.selects:

        def pool(
            input: torch.Tensor,
            kernel_size: Any,
            stride: Any = None,
            padding: Any = 0,
            dilation: Any = 1,
            ceil_mode: bool = False,
            return_indices: bool = False,
            *,
            before: Any = None,
            after: Any = None,
            affine: Any = None,
        ) -> Any:
            op = asked(kernel_size, stride, padding, dilation, ceil_mode)
            if return_indices:
                return _with_indices(input, op, before, after, affine)
            return _pooled(input, op, 0, None, before, after, affine)

    elif not kind.parameters:

        def pool(
            input: torch.Tensor,
            kernel_size: Any,
            stride: Any = None,
            padding: Any = 0,
            dilation: Any = 1,
            ceil_mode: bool = False,
            *,
            before: Any = None,
            after: Any = None,
            affine: Any = None,
        ) -> torch.Tensor:
            return _pooled(input, asked(kernel_size, stride, padding, dilation, ceil_mode), 0, None, before, after, affine)

    else:
        whole = Pooling(caller, kind, rank, None)

        def parametrised(
            input: torch.Tensor, kernel_size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, **values: Any
        ) -> torch.Tensor:
            beside = [values.pop(name) for name in _BESIDE]
            given, p = _arguments(caller, kind, values)
            op = whole if kernel_size is None else asked(kernel_size, stride, padding, dilation, ceil_mode)
            return _pooled(input, op.at(given), 0, p, *beside)

        face = kind.face
        window = {**_WINDOW, "kernel_size": None} if face.map_by_default else _WINDOW
        pool = _signed(parametrised, {**face.defaults, **window} if face.map_by_default else {**window, **face.defaults})
    pool.__doc__ = kind.face.doc
    return pool


def _flattened(y: torch.Tensor, rank: int, keepdim: bool) -> torch.Tensor:
    return y if keepdim else y.flatten(-rank - 1)


def _whole(caller: str, rank: int, kind: Any) -> Function:
    """global_STEM_pool: the function over whole maps."""
    op = Pooling(caller, kind, rank, None)
    pool: Function
    if not kind.parameters:

        def pool(input: torch.Tensor, keepdim: bool = True, *, before: Any = None, after: Any = None, affine: Any = None) -> torch.Tensor:
            return _flattened(_pooled(input, op, 0, None, before, after, affine), rank, keepdim)

    else:

        def parametrised(input: torch.Tensor, keepdim: bool, **values: Any) -> torch.Tensor:
            beside = [values.pop(name) for name in _BESIDE]
            given, p = _arguments(caller, kind, values)
            return _flattened(_pooled(input, op.at(given), 0, p, *beside), rank, keepdim)

        pool = _signed(parametrised, {**kind.face.defaults, "keepdim": True})
    stem = kind.face.stem if kind.face else kind.name
    pool.__doc__ = f"{stem}_pool{rank}d over each whole map: (N, C{', 1' * rank}), or (N, C) without ``keepdim``."
    return pool


def _adaptive_asking(caller: str, rank: int, kind: Any) -> Callable[[Any], Pooling]:
    """output_size -> the operation, one object for equal arguments."""

    def make(output_size: Any) -> Pooling:
        return Pooling(caller, kind, rank, adaptive(caller, rank, output_size))

    known = functools.lru_cache(maxsize=1024, typed=True)(make)

    def asked(output_size: Any) -> Pooling:
        if _is_compiling():
            return make(output_size)
        if type(output_size) is int or (type(output_size) is tuple and {*map(type, output_size)} == _INT):
            return known(output_size)
        return known(adaptive(caller, rank, output_size).outputs)

    return asked


def _adaptive(caller: str, rank: int, kind: Any) -> Function:
    """adaptive_STEM_pool."""
    asked = _adaptive_asking(caller, rank, kind)
    pool: Function
    if kind.selects:

        def pool(
            input: torch.Tensor,
            output_size: Any,
            return_indices: bool = False,
            *,
            before: Any = None,
            after: Any = None,
            affine: Any = None,
        ) -> Any:
            if return_indices:
                return _with_indices(input, asked(output_size), before, after, affine)
            return _pooled(input, asked(output_size), 0, None, before, after, affine)

    else:

        def pool(input: torch.Tensor, output_size: Any, *, before: Any = None, after: Any = None, affine: Any = None) -> torch.Tensor:
            return _pooled(input, asked(output_size), 0, None, before, after, affine)

    stem = kind.face.stem if kind.face else kind.name
    pool.__doc__ = f"{stem}_pool{rank}d over ``output_size`` windows, by torch's rule: see the module."
    return pool


# Functions with arguments of their own


def _avg(caller: str, rank: int) -> Function:
    kind = KINDS["avg"]

    @functools.lru_cache(maxsize=1024, typed=True)
    def known(window: Any, count_include_pad: bool, divisor: int | None) -> Pooling:
        return Pooling(caller, kind, rank, window, (), count_include_pad, divisor)

    asked = _asking(caller, rank, kind)

    def counting(kernel_size: Any, stride: Any, padding: Any, ceil_mode: Any, count_include_pad: Any, divisor: Any) -> Pooling:
        if not isinstance(count_include_pad, bool):
            raise TypeError(f"{caller}: count_include_pad must be a bool, got {count_include_pad!r}")
        if divisor is not None:
            if isinstance(divisor, bool) or not hasattr(divisor, "__index__"):
                raise TypeError(f"{caller}: divisor_override must be an int or None, got {divisor!r}")
            divisor = int(divisor)
            if divisor == 0:
                raise RuntimeError(f"{caller}: divisor_override must not be zero")
            if abs(divisor) >= 2**63:
                raise ValueError(f"{caller}: divisor_override {divisor} does not fit 64 bits")
        w = window(caller, rank, kernel_size, stride, padding, 1, ceil_mode)
        make = known.__wrapped__ if _is_compiling() else known
        return make(w, count_include_pad, divisor)

    if rank == 1:

        def pool(
            input: torch.Tensor,
            kernel_size: Any,
            stride: Any = None,
            padding: Any = 0,
            ceil_mode: bool = False,
            count_include_pad: bool = True,
            *,
            before: Any = None,
            after: Any = None,
            affine: Any = None,
        ) -> torch.Tensor:
            if count_include_pad is True:
                op = asked(kernel_size, stride, padding, 1, ceil_mode)
            else:
                op = counting(kernel_size, stride, padding, ceil_mode, count_include_pad, None)
            return _pooled(input, op, 0, None, before, after, affine)

    else:

        def pool(  # type: ignore[misc]
            input: torch.Tensor,
            kernel_size: Any,
            stride: Any = None,
            padding: Any = 0,
            ceil_mode: bool = False,
            count_include_pad: bool = True,
            divisor_override: int | None = None,
            *,
            before: Any = None,
            after: Any = None,
            affine: Any = None,
        ) -> torch.Tensor:
            if count_include_pad is True and divisor_override is None:
                op = asked(kernel_size, stride, padding, 1, ceil_mode)
            else:
                op = counting(kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
            return _pooled(input, op, 0, None, before, after, affine)

    override = "" if rank == 1 else ", or by ``divisor_override``"
    pool.__doc__ = f"""The mean of each window: its sum by the number of taps inside the input and (``count_include_pad``) its
    padding{override}.  Sums in the dtype computed in, row by row, as torch.  Nothing is saved for backward."""
    return pool


_NORMS = {1.0: "l1", 2.0: "l2", math.inf: "linf"}


def _lp(caller: str, rank: int) -> Function:
    # Made here, not when asked for: torch.compile cannot trace the making of a cache.
    asking = {name: _asking(caller, rank, KINDS[name]) for name in ("lp", "lp_negative", *_NORMS.values())}

    def pool(
        input: torch.Tensor,
        norm_type: float,
        kernel_size: Any,
        stride: Any = None,
        ceil_mode: bool = False,
        *,
        padding: Any = 0,
        dilation: Any = 1,
        before: Any = None,
        after: Any = None,
        affine: Any = None,
    ) -> torch.Tensor:
        if isinstance(norm_type, bool) or not isinstance(norm_type, numbers.Real):
            raise TypeError(f"{caller}: norm_type must be a number, got {norm_type!r}")
        p = float(norm_type)
        if p == 0 or math.isnan(p) or p == -math.inf:
            raise ValueError(
                f"{caller}: norm_type must be a number other than 0 and -inf, got {norm_type!r}; math.inf gives the largest |x|"
            )
        limits = torch.finfo(torch.float32)
        if p != math.inf and not limits.tiny <= abs(p) <= limits.max:
            raise ValueError(f"{caller}: norm_type {norm_type!r} is outside float32's range, {limits.tiny} to {limits.max}")
        op = asking[_NORMS.get(p, "lp" if p > 0 else "lp_negative")](kernel_size, stride, padding, dilation, ceil_mode)
        return _pooled(input, op.at((p,)) if op.kind.parameters else op, 0, None, before, after, affine)

    pool.__doc__ = """The p-norm of each window, (sum |x|^p)^(1/p), p = ``norm_type``: any number but 0; math.inf gives the largest |x|.

    A window that ceil_mode clips is scaled up to a whole one, as torch does.  The gradient is 0 where the norm is 0.

    Differs from torch: |x| is taken (torch raises x itself, so odd p gives it NaN for negative sums); inf works; p = 0 is a
    ValueError (torch: ZeroDivisionError); padding and dilation exist.
    """
    return pool


def _stochastic(caller: str, rank: int) -> Function:
    drawn, expected = (_asking(caller, rank, KINDS[name]) for name in ("stochastic", "stochastic_mean"))

    def pool(
        input: torch.Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        training: bool = True,
        *,
        generator: torch.Generator | None = None,
        before: Any = None,
        after: Any = None,
        affine: Any = None,
    ) -> torch.Tensor:
        if not training:
            return _pooled(input, expected(kernel_size, stride, padding, dilation, ceil_mode), 0, None, before, after, affine)
        op = drawn(kernel_size, stride, padding, dilation, ceil_mode)
        _check_tensor(caller, input)
        if not _has_no_memory(input):
            backend.check(input, op)  # a refused call leaves the generator as it was
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=generator))
        return _pooled(input, op, seed, None, before, after, affine)

    pool.__doc__ = """Stochastic pooling (Zeiler & Fergus 2013); weights are w = max(x, 0).  Not in torch.

    ``training``: one element of each window, drawn with probability w / sum(w); its gradient goes to that element.
    Otherwise: the expectation of that draw, sum(w * w) / sum(w), with its true gradient.
    Windows without a positive element give 0 and pass no gradient; NaN, or a sum that is not finite, gives NaN.  Evaluation squares
    the weights in the dtype computed in: beyond about 1e19 (float32) it overflows.

    The draws come from Philox, keyed by one number of ``generator`` (default: torch's) and the output's place: the same for every
    memory layout and number of threads.
    """
    return pool


def _unpool(caller: str, rank: int) -> Function:
    def unpool(
        input: torch.Tensor, indices: torch.Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, output_size: Any = None
    ) -> torch.Tensor:
        _check_tensor(caller, input)
        if not isinstance(indices, torch.Tensor):
            raise TypeError(f"{caller}: indices must be a Tensor, got {type(indices).__name__}")
        kernel = ints(caller, "kernel_size", kernel_size, rank)
        step, pad = _stride(caller, rank, stride) or kernel, ints(caller, "padding", padding, rank)
        check_shape(caller, rank, input.shape)
        if indices.shape != input.shape:
            raise RuntimeError(f"{caller}: indices must have the input's shape {tuple(input.shape)}, got {tuple(indices.shape)}")
        if indices.dtype != torch.int64:
            raise RuntimeError(f"{caller}: indices must be int64, got {backend.name_of(indices.dtype)}")
        sizes = _unpooled_size(caller, input.shape[-rank:], kernel, step, pad, output_size)
        if _has_no_memory(input) or _has_no_memory(indices):
            return torch.ops.fastpool.unpool(input, indices, sizes)
        _refuse_transforms(caller, input)
        x = backend.materialised(input)
        if torch.is_grad_enabled() and x.requires_grad:
            return run_unpool(x, indices, caller, sizes)
        return backend.unpool(caller, x, indices, sizes)

    unpool.__doc__ = f"""The inverse of max_pool{rank}d as far as there is one: zeros, with each element at the flat position that
    ``indices`` (int64, of the input's shape) has for it.  The last of those that share a position stays, on CUDA any.

    ``output_size``: sizes of the output, with or without N and C, each less than a stride from the default,
    (size - 1) * stride - 2 * padding + kernel_size.  Errors: RuntimeError for an index outside the output (on CUDA its
    element is left out: to know is to wait for the device), ValueError for an
    ``output_size`` that cannot be, as torch.
    """
    return unpool


def _unpooled_size(caller: str, sizes: Any, kernel: Any, stride: Any, padding: Any, output_size: Any) -> tuple[int, ...]:
    """torch's rule."""
    default = tuple((n - 1) * s - 2 * p + k for n, k, s, p in zip(sizes, kernel, stride, padding, strict=True))
    found = default
    if output_size is not None:
        asked = [output_size] if not hasattr(output_size, "__len__") else list(output_size)
        if len(asked) == len(kernel) + 2:
            asked = asked[2:]
        if len(asked) != len(kernel):
            raise ValueError(
                f"{caller}: output_size must have {len(kernel)} or {len(kernel) + 2} elements, got {len(asked)} of them: {output_size!r}"
            )
        found = ints(caller, "output_size", asked, len(kernel))
        if any(abs(n - d) >= s for n, d, s in zip(found, default, stride, strict=True)):
            most = tuple(d + s - 1 for d, s in zip(default, stride, strict=True))
            least = tuple(d - s + 1 for d, s in zip(default, stride, strict=True))
            raise ValueError(f"{caller}: output_size {found} is not between {least} and {most}")
    if min(found) < 1:
        raise ValueError(f"{caller}: the output would be {found}")
    return found


def _convolution(caller: str, rank: int) -> Function:
    """torch's signature; what torch lacks is keyword-only."""

    def convolve(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        *,
        affine: tuple[torch.Tensor, torch.Tensor] | None = None,
        after: Any = None,
    ) -> torch.Tensor:
        op = convolution.request(caller, rank, stride, padding, dilation, groups)
        return convolved(input, weight, bias, op, affine, after)

    words = WORDS[rank]
    convolve.__doc__ = f"""Convolution (cross-correlation) over {words.axes}, direct: no im2col, and no copy of the input but panels of it
    that fit a cache.

    Shapes: input {words.shapes}; weight (out_channels, C / groups, *kernel_size); bias (out_channels,); output with
    out_channels and out = floor((size + 2 * padding - dilation * (kernel_size - 1) - 1) / stride) + 1 along each axis.  ``padding``
    may be "valid" (0) or "same" (as many outputs as inputs; stride 1).
    Dtypes: float32, float64; bfloat16 and float16 are computed in float32 and rounded once.  All tensors must share one.
    Layouts: contiguous and channels_last run as they lie; the output keeps the input's memory format.

    Not in torch: ``affine`` = (scale, shift), each (out_channels,), makes of each result r of a channel scale * r + shift, as a folded
    batch-norm; ``after`` is an activation of that: the name of any elementwise one of torch.nn's ("relu", "gelu", "gelu_tanh",
    "hardswish", ...) or the module (PReLU: of one weight that needs no gradient; RReLU: in evaluation).  Both cost no pass over
    memory; the scale is multiplied into the weights as they are packed.  Where a gradient of the affine's or through it is asked
    for, the steps are taken one by one; so is an activation whose slope is not told from its result (GELU, SiLU, ELU, ...).

    Weights are packed at each call; a module (fastpool.nn.Conv{rank}d) keeps them packed.
    Errors: RuntimeError for what does not fit, with the sizes; NotImplementedError for a dtype or device without kernels.
    Gradients of any order; backward is deterministic, whatever the number of threads.
    """
    return convolve


_POOLS = ("max", "avg", "min")
_ASKED = {name: _asking("conv_pool2d", 2, KINDS[name]) for name in _POOLS}


def conv_pool2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    affine: tuple[torch.Tensor, torch.Tensor] | None = None,
    activation: Any = None,
    pool: str = "max",
    kernel_size: Any,
    pool_stride: Any = None,
    pool_padding: Any = 0,
) -> torch.Tensor:
    """pool(activation(scale * conv2d(input) + shift)), the map between made and pooled in bands that stay in a cache.

    Shapes: input, weight, bias and ``affine`` = (scale, shift) as conv2d's; ``kernel_size``, ``pool_stride`` (default: that) and
    ``pool_padding`` as max_pool2d's.  ``pool``: "max", "avg" (padding counts, as avg_pool2d's) or "min".
    ``activation``: as ``before`` of max_pool2d.
    Dtypes, layouts and errors: as conv2d's and max_pool2d's; ValueError for another ``pool``.

    Where a gradient will be asked for, under torch.compile, and for depthwise convolutions, the convolution and the pooling (with the
    activation in it) are taken one by one: gradients of any order, and what they save.  Not in torch.
    """
    return conv_pooled(
        input, weight, bias, (stride, padding, dilation, groups), affine, activation, (pool, kernel_size, pool_stride, pool_padding)
    )


__all__.append("conv_pool2d")


def conv_pooled(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    geometry: tuple[Any, Any, Any, Any],
    affine: Any,
    activation: Any,
    window: tuple[str, Any, Any, Any],
    kept: convolution.Kept | None = None,
) -> torch.Tensor:
    """``conv_pool2d``; ``kept``: packed weights and the last call, for one without ``affine``."""
    caller, asked = "conv_pool2d", None
    # The numbers of an activation that is a module may change.
    if kept is not None and affine is None and (activation is None or isinstance(activation, (str, Applied))):
        asked = geometry, activation, window
        y = remembered(kept, asked, input, weight, bias)
        if y is not None:
            assert kept.last is not None
            return y if kept.last.then is None else _pooled(y, kept.last.then)
    name, kernel_size, step, pad = window
    if name not in _ASKED:
        raise ValueError(f"{caller}: pool must be one of {', '.join(_POOLS)}, got {name!r}")
    op, pooling = convolution.request(caller, 2, *geometry), _ASKED[name](kernel_size, step, pad, 1, False)
    steps = fusion.steps(caller, activation)
    given = [t for t in (input, weight, bias, *(affine if isinstance(affine, tuple) else ())) if t is not None]
    plain = all(map(_is_simple, given)) and not _autocasts(input) and len(steps) < 2 and all(isinstance(s, Applied) for s in steps)
    if not plain or (_is_grad_enabled() and any(t.requires_grad for t in given)):
        return _pooled(convolved(input, weight, bias, op, affine), pooling, before=steps or None)
    _check_alike(caller, given, weight, bias)
    scale, shift = _checked_affine(caller, weight, affine)
    if scale is not None:
        bias, kept = shift if bias is None else torch.addcmul(shift, bias, scale), None
    after: Any = steps[0] if steps else None
    y = convolution.pooled(input, weight, bias, op, after, scale, pooling, kept, asked)
    return _pooled(convolution.forward(input, weight, bias, op, after, scale, kept, asked, pooling), pooling) if y is None else y


def remembered(
    kept: convolution.Kept, asked: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """``convolved`` for a module whose last call was ``asked`` for the same of tensors alike; None if it was not."""
    last = kept.last
    if last is None or last.asked != asked or last.weight is not weight or last.bias is not bias:
        return None
    if not _is_simple(input) or _autocasts(input):
        return None
    if _is_grad_enabled() and (input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return None
    return last.again(input)


def convolved(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    op: convolution.Convolution,
    affine: Any = None,
    after: Any = None,
    kept: convolution.Kept | None = None,
    asked: Any = None,
) -> torch.Tensor:
    """The convolution of checked tensors, through autograd where a gradient will be asked for; ``kept``: a module's packed weights,
    which remembers the call by what it was ``asked`` for."""
    for t, name in ((input, "input"), (weight, "weight"), (bias, "bias")):
        if not isinstance(t, torch.Tensor) and (t is not None or name != "bias"):
            raise TypeError(f"{op.caller}: {name} must be a Tensor, got {type(t).__name__}")
    epilogue = convolution.epilogue(op.caller, after)
    if affine is None and _is_simple(input) and _is_simple(weight) and (bias is None or _is_simple(bias)) and not _autocasts(input):
        _check_alike(op.caller, (input, weight) if bias is None else (input, weight, bias), weight, bias)
        if _is_grad_enabled() and (input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
            return _convolve_and_save(input, weight, bias, op, epilogue)
        return convolution.forward(input, weight, bias, op, epilogue, None, kept, asked)
    scale, shift = _checked_affine(op.caller, weight, affine)
    tensors = [t for t in (input, weight, bias, scale, shift) if t is not None]
    if input.device.type != "meta" and torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        cast = [t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]
        given = iter(cast)
        input, weight = next(given), next(given)
        bias, scale, shift = (t if t is None else next(given) for t in (bias, scale, shift))
        tensors = cast
    _check_alike(op.caller, tensors, weight, bias)
    if any(map(_has_no_memory, tensors)):
        y = library.convolve(input, weight, bias, op)
        return _stepwise(y, op, scale, shift, epilogue)
    for t in tensors:
        _refuse_transforms(op.caller, t)
    input, weight = backend.materialised(input), backend.materialised(weight)
    bias, scale, shift = (t if t is None else backend.materialised(t) for t in (bias, scale, shift))
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        if scale is None:
            return _convolve_and_save(input, weight, bias, op, epilogue)
        return _stepwise(Convolve.apply(input, weight, bias, op, None), op, scale, shift, epilogue)
    if scale is not None:
        assert shift is not None
        bias = shift if bias is None else torch.addcmul(shift, bias, scale)
    return convolution.forward(input, weight, bias, op, epilogue, scale, kept)


def _convolve_and_save(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, op: Any, epilogue: Any) -> torch.Tensor:
    """Through autograd.  An activation whose slope is not told from its result, as GELU's, is torch's own operation, which saves its
    input: that is what backward needs, whoever saves it."""
    if epilogue is None or epilogue.slope is not None:
        return Convolve.apply(input, weight, bias, op, epilogue)
    return activations.on_torch(epilogue, Convolve.apply(input, weight, bias, op, None))


def _is_simple(t: Any) -> bool:
    """Whether a tensor is what kernels can read as it is, and nobody's stand-in: the check of all cases below takes 8 us."""
    plain = type(t) in _PLAIN and not _is_compiling() and not _is_wrapped(t) and forward_ad._current_level < 0
    return plain and not t.is_neg() and not t._is_zerotensor()


def _autocasts(t: torch.Tensor) -> bool:
    """Whether autocast is on where a tensor is: a convolution of a GPU's went by the CPU's."""
    return _is_autocast("cuda" if t.is_cuda else "cpu")


def _checked_affine(caller: str, weight: torch.Tensor, affine: Any) -> tuple[Any, Any]:
    if affine is None:
        return None, None
    fusion.check_affine(caller, affine, weight.shape[0])
    return affine


def _check_alike(caller: str, tensors: Sequence[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """RuntimeError unless all are of one dtype and device, and the bias fits."""
    for t in tensors[1:]:
        if t.dtype != tensors[0].dtype:
            raise RuntimeError(f"{caller}: input is {tensors[0].dtype}, weight or bias {t.dtype}; all must be of one dtype")
        if t.device != tensors[0].device:
            raise RuntimeError(f"{caller}: input is on {tensors[0].device}, weight or bias on {t.device}; all must be on one device")
    if bias is not None and tuple(bias.shape) != tuple(weight.shape[:1]):
        raise RuntimeError(f"{caller}: expected a bias of shape {tuple(weight.shape[:1])}, as the weight's, got {tuple(bias.shape)}")


def _stepwise(y: torch.Tensor, op: convolution.Convolution, scale: Any, shift: Any, epilogue: Any) -> torch.Tensor:
    """The epilogue by torch's operations."""
    if scale is not None:
        y = fusion.scaled(y, op.rank, (scale, shift))
    return activations.on_torch(epilogue, y) if epilogue else y


def _transposed(caller: str, rank: int) -> Function:
    def convolve_transposed(
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> torch.Tensor:
        op = convolution.request(caller, rank, stride, ints(caller, "padding", padding, rank), dilation, groups)
        more = ints(caller, "output_padding", output_padding, rank)
        for t, name in ((input, "input"), (weight, "weight")):
            if not isinstance(t, torch.Tensor):
                raise TypeError(f"{caller}: {name} must be a Tensor, got {type(t).__name__}")
        shape = convolution.transposed_shape(op, tuple(input.shape), tuple(weight.shape), more)
        tensors = [t for t in (input, weight, bias) if t is not None]
        for t in tensors:
            if _has_no_memory(t):
                raise NotImplementedError(f"{caller}: not under torch.compile yet; torch.nn.functional's works there")
            _refuse_transforms(caller, t)
        _check_alike(caller, tensors, weight, None)
        if bias is not None and tuple(bias.shape) != (shape[-rank - 1],):
            raise RuntimeError(f"{caller}: expected a bias of shape {(shape[-rank - 1],)}, got {tuple(bias.shape)}")
        input, weight = backend.materialised(input), backend.materialised(weight)
        bias = bias if bias is None else backend.materialised(bias)
        # An output_padding of a stride or more, which dilation allows: the convolution of the result has outputs beside the input's.
        beside = [n - m for n, m in zip(op.output_size(shape[-rank:], tuple(weight.shape[2:])), input.shape[-rank:], strict=True)]
        if any(beside):
            input = torch.nn.functional.pad(input, [k for n in reversed(beside) for k in (0, n)])
        here = convolution.transposed_call(op, shape, input, weight)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return ConvolveInput.apply(input, weight, bias, here)
        return convolution.input_gradient(input, weight, bias, here)

    convolve_transposed.__doc__ = f"""Transposed convolution: the gradient of conv{rank}d by its input, as an operation of its own.

    Shapes: input {WORDS[rank].shapes}; weight (C, out_channels / groups, *kernel_size); output sizes
    (size - 1) * stride - 2 * padding + dilation * (kernel_size - 1) + output_padding + 1.
    Dtypes, layouts, errors and gradients: as conv{rank}d.
    """
    return convolve_transposed


for _kind in KINDS.values():
    if _kind.face:
        _published(_windowed, f"{_kind.face.stem}_pool{{n}}d", _kind)
        if _kind.combine:
            _published(_whole, f"global_{_kind.face.stem}_pool{{n}}d", _kind)
        if _kind.face.adaptive:
            _published(_adaptive, f"adaptive_{_kind.face.stem}_pool{{n}}d", _kind)
_published(_avg, "avg_pool{n}d")
_published(_whole, "global_avg_pool{n}d", KINDS["avg"])
_published(_adaptive, "adaptive_avg_pool{n}d", KINDS["avg"])
_published(_lp, "lp_pool{n}d")
_published(_stochastic, "stochastic_pool{n}d")
_published(_unpool, "max_unpool{n}d")
_published(_convolution, "conv{n}d")
_published(_transposed, "conv_transpose{n}d")
__all__.sort()

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
