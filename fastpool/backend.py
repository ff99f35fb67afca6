"""Between tensors and kernels: which layout a tensor is in, what an operation allocates, who runs it.

Nothing here reads or writes an element of a tensor.  What depends on shapes and strides alone is worked out once, as a ``Call``, and
kept: a call of a function looks it up, allocates and launches.  Tensors have one to three spatial axes, and may be unbatched; kernels see
five axes, (N, C, D, H, W), always.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import runtime, tiny
from .window import LARGEST, Adaptive, Bins, Ints, Window, check_shape, output_size

if TYPE_CHECKING:
    from .kernels.pool import Selecting, Summing

_BACKENDS = {"cpu": "fastpool.kernels.cpu.pooling", "cuda": "fastpool.kernels.cuda.pooling"}
_UNPOOLING = {"cpu": "fastpool.kernels.cpu.unpool", "cuda": "fastpool.kernels.cuda.unpool"}
_ELEMENTWISE = {"cpu": "fastpool.kernels.cpu.elementwise", "cuda": "fastpool.kernels.cuda.elementwise"}
_SEED = 0xFFFFFFFF


def name_of(dtype: torch.dtype) -> str:
    """What kernels call a dtype."""
    return str(dtype).removeprefix("torch.")


class Pooling:
    """One pooling operation, apart from the tensor, with what is known of it for the shapes seen; equal to itself alone."""

    def __init__(
        self,
        caller: str,
        kind: Selecting | Summing,
        rank: int,
        window: Window | Adaptive | None,
        parameters: tuple[float, ...] = (),
        include_pad: bool = True,
        divisor: int | None = None,
    ) -> None:
        self.caller = caller
        """The public function's name: what an error starts with."""
        self.kind, self.rank = kind, rank
        self.window = window
        """None: the whole map."""
        self.parameters, self.include_pad, self.divisor = parameters, include_pad, divisor
        # None for torch.compile, which would trace the making of what it does not use.
        self.equal = None if torch.compiler.is_dynamo_compiling() else tiny.equal(kind.name, rank, window, include_pad, divisor)
        """torch's operator, for tiny maps, if there is one."""
        self.root = self
        """That of which it is another ``at``."""

    @functools.cached_property
    def call(self) -> Callable[[Ints, Ints, torch.dtype, torch.device, bool], Call]:
        """(shape, strides, dtype, device, saves) -> the ``Call``."""
        return functools.lru_cache(maxsize=512)(functools.partial(_prepared, self))

    def at(self, parameters: tuple[float, ...]) -> Pooling:
        """The same with other parameters, on which no ``Call`` depends."""
        if parameters == self.parameters:
            return self
        return self._another(parameters) if torch.compiler.is_dynamo_compiling() else self.root._others(parameters)

    @functools.cached_property
    def _others(self) -> Callable[[tuple[float, ...]], Pooling]:
        # To make one is 3 us of a call's 8; those of a trained parameter are never asked for again.
        return functools.lru_cache(maxsize=16)(self._another)

    def _another(self, parameters: tuple[float, ...]) -> Pooling:
        other = Pooling(self.caller, self.kind, self.rank, self.window, parameters, self.include_pad, self.divisor)
        other.root = self.root
        if not torch.compiler.is_dynamo_compiling():
            vars(other)["call"] = self.call
        return other

    @property
    def dtypes(self) -> Sequence[str]:
        """The names of the dtypes it takes; sums of integers are for windows, as in torch."""
        from .kernels.pool import FLOATS

        return self.kind.dtypes if self.kind.selects or isinstance(self.window, Window) else FLOATS

    def of(self, kind: Selecting | Summing) -> Pooling:
        """The same windows of another kind, apart from its parameters."""
        return self if kind is self.kind else Pooling(self.caller, kind, self.rank, self.window, (), self.include_pad, self.divisor)

    @functools.cached_property
    def thins(self) -> float:
        """Elements a result, about, whatever the map: of a whole map, or bins, more than there are."""
        return math.prod(self.window.stride) if isinstance(self.window, Window) else math.inf

    @functools.cached_property
    def routed(self) -> Pooling:
        """That whose gradient this one's is, apart from the slope of an activation."""
        return self.of(self.kind.routed or self.kind)

    @functools.cached_property
    def slopes(self) -> dict[str, Pooling]:
        """Parameter -> the pooling that gives it its gradient."""
        kinds = getattr(self.kind, "slopes", {})
        return {p: self.of(k) for p, k in kinds.items()}


class Layout(NamedTuple):
    """How a tensor lies in memory, as far as the kernels care: five axes, (N, C, D, H, W)."""

    shape: Ints
    strides: Ints
    channels_last: bool


@dataclass(eq=False)
class Call:
    """What is known of a pooling of tensors of one shape, strides, dtype and device."""

    op: Pooling
    window: Window | Bins | None
    """Of the tensor's own rank; None: the whole map."""
    shape: Ints
    strides: Ints
    """As kernels read it: of the tensor itself, or of its copy."""
    dtype: torch.dtype
    device: torch.device
    layout: Layout
    copies: bool
    """No axis is dense."""
    out: Ints
    out_strides: Ints
    saves: torch.dtype | None
    saved: torch.dtype | None
    """What is saved for backward by a call that saves; ``saves``: by this one."""
    kernels: Any
    plan: Any
    """None: there is nothing to compute."""

    @functools.cached_property
    def geometry(self) -> Any:
        return _geometry(self.kernels, self.op, self.dtype, self.layout, self.window)

    @functools.cached_property
    def dense(self) -> Ints:
        """The strides of a gradient of the input."""
        return dense_strides(self.shape, self.op.rank, self.layout.channels_last)

    @functools.cached_property
    def gradient(self) -> Any:
        """The plan of the backward pass."""
        return self.kernels.backward(self.op.kind, self.geometry, self.saved and name_of(self.saved))

    def restrided(self, strides: Ints) -> Call:
        """The same of an input that lies otherwise."""
        return self.op.call(self.shape, strides, self.dtype, self.device, self.saves is not None)

    def bits(self, parameters: tuple[float, ...]) -> tuple[int, ...]:
        return _bits(self.kernels, self.dtype, parameters)

    @functools.cached_property
    def flat_positions(self) -> Any:
        """The plan that makes flat indices of what this call saves."""
        assert self.saved
        return self.kernels.flat_positions(self.geometry, name_of(self.saved))


def kernels_for(
    device: torch.device, dtype: torch.dtype, caller: str, dtypes: Sequence[str], modules: Mapping[str, str] = _BACKENDS
) -> Any:
    """The kernels for a device, imported on first use; NotImplementedError if there are none, or none for this dtype, ImportError where
    what CUDA's need is not installed."""
    module = modules.get(device.type)
    if module is None:
        raise NotImplementedError(f"{caller}: no kernels for device {str(device)!r}; {', '.join(modules)} works: x.cpu()")
    if name_of(dtype) not in dtypes:
        advice = "" if dtype.is_complex else ": x.float()"
        raise NotImplementedError(f"{caller}: not implemented for {name_of(dtype)}; {', '.join(dtypes)} work{advice}")
    if device.type != "cuda":
        return importlib.import_module(module)
    try:
        kernels = importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{caller}: CUDA kernels need numba-cuda: pip install 'fastpool[cuda]' ({error})") from error
    runtime.hand_over_streams()
    return kernels.on(device.index)


def dense_strides(shape: Sequence[int], rank: int, channels_last: bool) -> Ints:
    """The strides of a tensor without gaps, of channels and ``rank`` axes, batched or not."""
    order = list(range(len(shape)))
    if channels_last:
        order.append(order.pop(-rank - 1))
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= max(shape[axis], 1)
    return tuple(strides)


def _is_dense(shape: Sequence[int], strides: Sequence[int], dense: Sequence[int]) -> bool:
    return all(size == 1 or stride == expected for size, stride, expected in zip(shape, strides, dense, strict=True))


def channels_last(shape: Sequence[int], strides: Sequence[int], rank: int) -> bool | None:
    """Whether lanes can run along a tensor's channels (True) or its last axis (False) as it lies; None: along neither."""
    for last in (False, True):
        if _is_dense(shape, strides, dense_strides(shape, rank, last)):
            return last
    if strides[-1] == 1:
        return False
    if strides[-rank - 1] == 1:
        return True
    return False if shape[-1] == 1 else None


def five_axes(shape: Ints, strides: Ints, rank: int, last: bool) -> Layout:
    """(N, C, D, H, W) of a tensor with less: missing axes are 1 long, at the step at which they would follow each other."""
    if len(shape) == rank + 1:
        shape, strides = (1, *shape), (0, *strides)
    (n, c, *sizes), (stride_n, stride_c, *steps) = shape, strides
    while len(sizes) < 3:
        steps.insert(0, sizes[0] * steps[0])
        sizes.insert(0, 1)
    return Layout((n, c, *sizes), (stride_n, stride_c, *steps), last)


def materialised(x: torch.Tensor) -> torch.Tensor:
    """x with its numbers in memory: torch keeps a negation, or that all is zero, as a mark on the tensor at times."""
    if x.is_neg():
        x = x.resolve_neg()
    return x.clone() if x._is_zerotensor() else x


def empty(x: torch.Tensor, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """What an operation allocates, uninitialised, where x is and of its dtype unless another is given."""
    # 1.35 us where Tensor.new_empty takes 1.9 and torch.empty with a memory format 2.4; dtype=None costs 0.3.
    return x.new_empty_strided(shape, strides, dtype=dtype) if dtype else x.new_empty_strided(shape, strides)


def restride(x: torch.Tensor, strides: Ints) -> torch.Tensor:
    """x in memory without gaps, at these strides; x itself if it lies so."""
    if x.stride() == strides or _is_dense(x.shape, x.stride(), strides):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def outputs(op: Pooling, shape: Ints) -> tuple[Window | Bins | None, Ints]:
    """The windows over an input of this shape, and the output's; RuntimeError for what cannot be pooled."""
    check_shape(op.caller, op.rank, shape)
    sizes = tuple(shape[-op.rank :])
    window: Window | Bins | None
    if isinstance(op.window, Adaptive):
        out = op.window.output_size(*sizes)
        if 0 in out:
            return None, (*shape[: -op.rank], *out)
        window = op.window.resolve(*sizes)
    else:
        window = op.window
    if window is not None:
        return window, (*shape[: -op.rank], *output_size(op.caller, window, *sizes))
    if math.prod(sizes) > LARGEST:
        raise RuntimeError(f"{op.caller}: a map of {' x '.join(map(str, sizes))} has more than 2**31 - 1 elements")
    return None, (*shape[: -op.rank], *(1,) * op.rank)


def saved_dtype(op: Pooling, window: Window | Bins | None, dtype: torch.dtype, shape: Ints) -> torch.dtype | None:
    """The dtype of what is saved for backward of an input of this dtype and shape, or None."""
    taps = window.taps if window else math.prod(shape[-op.rank :])
    name = op.kind.saved_dtype(taps, name_of(dtype))
    return getattr(torch, name) if name else None


def _geometry(kernels: Any, op: Pooling, dtype: torch.dtype, layout: Layout, window: Window | Bins | None) -> Any:
    return kernels.Geometry(name_of(dtype), *layout, window and window.on_three_axes, op.include_pad, op.divisor)


def _prepared(op: Pooling, shape: Ints, strides: Ints, dtype: torch.dtype, device: torch.device, saves: bool) -> Call:
    shape = tuple(shape)  # torch.Size, whose slices torch.compile would trace
    window, out = outputs(op, shape)
    kernels = kernels_for(device, dtype, op.caller, op.dtypes)
    last = channels_last(shape, strides, op.rank)
    copies, last = last is None, bool(last)
    if copies:
        strides = dense_strides(shape, op.rank, False)
    layout = five_axes(shape, strides, op.rank, last)
    saved = saved_dtype(op, window, dtype, shape)
    call = Call(
        op=op,
        window=window,
        shape=shape,
        strides=strides,
        dtype=dtype,
        device=device,
        layout=layout,
        copies=copies,
        out=out,
        out_strides=dense_strides(out, op.rank, last),
        saves=saved if saves else None,
        saved=saved,
        kernels=kernels,
        plan=None,
    )
    if math.prod(out):
        call.plan = kernels.forward(op.kind, call.geometry, saved and name_of(saved), call.saves is not None)
    return call


def check(x: torch.Tensor, op: Pooling) -> None:
    """Raise what ``forward`` would of an input that it cannot pool."""
    op.call(x.shape, x.stride(), x.dtype, x.device, False)


def forward(x: torch.Tensor, op: Pooling, saves: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor | None, Call]:
    """(y, saved, call): y in x's layout, what backward needs besides x and y, or None, and what ``backward`` is to be given.

    A copy is made only of an input that has no dense axis; with ``saves`` false nothing is saved.
    """
    call = op.call(x.shape, x.stride(), x.dtype, x.device, saves)
    if call.copies:
        x = x.contiguous()
    out, strides, plan = call.out, call.out_strides, call.plan
    y = empty(x, out, strides)
    saved, address = None, 0
    if call.saves is not None:
        saved = empty(x, out, strides, call.saves)
        address = saved.data_ptr()
    if plan is not None:
        more: tuple[int, ...] = (seed & _SEED, seed >> 32)
        if op.parameters:
            more += call.bits(op.parameters)
        plan.run((x.data_ptr(), y.data_ptr(), address), runtime.threads() if plan.parallel else 1, *more)
    return y, saved, call


def backward(
    gy: torch.Tensor,
    x: torch.Tensor | None,
    y: torch.Tensor | None,
    saved: torch.Tensor | None,
    call: Call,
    parameters: tuple[float, ...] = (),
) -> torch.Tensor:
    """gx, dense in the layout of the call that ``forward`` made.

    x (as given to ``forward``) and y are needed only where the kind's gradient reads them.
    """
    # Saved tensors may come back with other strides (hooks that move them, an input that was copied to be read).
    if x is not None and x.stride() != call.strides:
        x = restride(x, call.dense)
        call = call.restrided(x.stride())
    gy = materialised(gy)
    gx = empty(gy, call.shape, call.dense)
    if call.plan is None:
        return gx.zero_()
    gy, saved, y = (None if t is None else restride(t, call.out_strides) for t in (gy, saved, y))  # type: ignore[assignment]
    plan = call.gradient
    addresses = [t.data_ptr() if t is not None else 0 for t in (gx, gy, saved, x, y)]
    plan.run(addresses, runtime.threads() if plan.parallel else 1, *call.bits(parameters))
    return gx


@functools.lru_cache(maxsize=256)
def _bits(kernels: Any, dtype: torch.dtype, parameters: tuple[float, ...]) -> tuple[int, ...]:
    """Parameters as kernels of a dtype are given them."""
    name = name_of(dtype)
    return tuple(kernels.bits(value, name) for value in parameters)


@functools.lru_cache(maxsize=256)
def _numbers(applied: Any, dtype: torch.dtype, device: torch.device) -> tuple[Any, str, tuple[int, ...]]:
    """The kernels of an activation, what they call a dtype, and its parameters as bits: found anew they take 3 us of a call's 6."""
    from .kernels.pool import FLOATS

    kernels = kernels_for(device, dtype, applied.name, FLOATS, _ELEMENTWISE)
    return kernels, name_of(dtype), _bits(kernels, dtype, applied.parameters)


def activated(x: torch.Tensor, applied: Any) -> torch.Tensor:
    """An activation (``Applied``) of a dense x, at x's strides."""
    kernels, name, more = _numbers(applied, x.dtype, x.device)
    y = empty(x, x.shape, x.stride())
    if x.numel():
        plan = kernels.forward(applied.activation, name, x.numel())
        plan.run((x.data_ptr(), y.data_ptr()), runtime.threads() if plan.parallel else 1, *more)
    return y


def activation_gradient(gy: torch.Tensor, x: torch.Tensor, applied: Any, by_result: bool) -> torch.Tensor:
    """gy times the slope at a dense x or, ``by_result``, where the result is x; at x's strides."""
    kernels, name, more = _numbers(applied, x.dtype, x.device)
    gy = restride(materialised(gy), x.stride())
    gx = empty(x, x.shape, x.stride())
    if x.numel():
        plan = kernels.backward(applied.activation, name, x.numel(), by_result)
        plan.run((gx.data_ptr(), gy.data_ptr(), x.data_ptr()), runtime.threads() if plan.parallel else 1, *more)
    return gx


def flat_positions(taps: torch.Tensor, call: Call) -> torch.Tensor:
    """The taps that a call saved, as int64 positions in the input plane: torch's ``return_indices``."""
    if call.window is None:
        return taps.long()
    taps = restride(taps, call.out_strides)
    flat = empty(taps, call.out, call.out_strides, torch.int64)
    if call.plan:
        plan = call.flat_positions
        plan.run((flat.data_ptr(), taps.data_ptr()), runtime.threads() if plan.parallel else 1)
    return flat


def _unpooling(caller: str, x: torch.Tensor, indices: torch.Tensor, rank: int) -> tuple[Any, bool, Ints]:
    """The kernels for x, whether the tensors are to be channels last, and the strides of those of the indices' shape."""
    from .kernels.pool import FLOATS, INTEGERS

    kernels = kernels_for(x.device, x.dtype, caller, FLOATS + INTEGERS, _UNPOOLING)
    last = bool(channels_last(indices.shape, indices.stride(), rank))
    return kernels, last, dense_strides(indices.shape, rank, last)


def _planes(shape: Sequence[int], rank: int) -> tuple[int, int]:
    """(N, C)"""
    return (shape[0] if len(shape) == rank + 2 else 1), shape[-rank - 1]


def unpool(caller: str, x: torch.Tensor, indices: torch.Tensor, sizes: Ints) -> torch.Tensor:
    """Zeros of these sizes, in x's layout, with each element of x at its index; RuntimeError for an index outside.

    On CUDA such an element is left out: to know of it is to wait for the device.
    """
    rank, shape = len(sizes), (*x.shape[: -len(sizes)], *sizes)
    kernels, last, dense = _unpooling(caller, x, x, rank)
    y = empty(x, shape, dense_strides(shape, rank, last)).zero_()
    if x.numel():
        x, indices = restride(x, dense), restride(indices, dense)
        wrong = torch.zeros((), dtype=torch.int64, device=x.device)  # 0 is right for any map
        plan = kernels.scatter_plan(x.element_size(), last, _planes(shape, rank), math.prod(x.shape[-rank:]), math.prod(sizes))
        plan.run([t.data_ptr() for t in (y, x, indices, wrong)], runtime.threads() if plan.parallel else 1)
        if not x.is_cuda and wrong:
            raise RuntimeError(
                f"{caller}: index {int(wrong)} is outside the output of {sizes}, which has {math.prod(sizes)} elements a map"
            )
    return y


def gather(gy: torch.Tensor, indices: torch.Tensor, rank: int) -> torch.Tensor:
    """The elements of gy at the indices, which ``unpool`` has seen, in the indices' layout."""
    kernels, last, dense = _unpooling("max_unpool", gy, indices, rank)
    gy = restride(materialised(gy), dense_strides(gy.shape, rank, last))
    gx = empty(gy, indices.shape, dense)
    if gx.numel():
        indices = restride(indices, dense)
        sizes = math.prod(indices.shape[-rank:]), math.prod(gy.shape[-rank:])
        plan = kernels.gather_plan(gy.element_size(), last, _planes(gy.shape, rank), *sizes)
        plan.run([t.data_ptr() for t in (gx, gy, indices)], runtime.threads() if plan.parallel else 1)
    return gx
