"""Direct convolution between tensors and kernels: what is asked for, what it allocates, who runs it.

Nothing here reads or writes an element of a tensor.  As for pooling (backend.py), what depends on shapes and strides alone is worked out
once, as a ``Call``.  Kernels see five axes, (N, C, D, H, W), always.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch

from . import activations, backend, runtime
from .activations import Applied
from .backend import Pooling
from .window import LARGEST, WORDS, Ints, Window, ints

_BACKENDS = {"cpu": "fastpool.kernels.cpu.convolution", "cuda": "fastpool.kernels.cuda.convolution"}
_POOLED = {"cpu": "fastpool.kernels.cpu.conv_pool", "cuda": "fastpool.kernels.cuda.conv_pool"}


@dataclass(frozen=True)
class Convolution:
    """One convolution, apart from the tensors."""

    caller: str
    """The public function's name: what an error starts with."""
    rank: int
    stride: Ints
    padding: Ints | str
    """Of both sides, or "same": the smaller half comes before."""
    dilation: Ints
    groups: int

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.caller, self.rank, self.stride, self.padding, self.dilation, self.groups))

    def __hash__(self) -> int:
        return self._hash

    def before_and_after(self, kernel_size: Ints) -> tuple[Ints, Ints]:
        """Padding on each side."""
        if isinstance(self.padding, str):
            total = tuple(d * (k - 1) for k, d in zip(kernel_size, self.dilation, strict=True))
            return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
        return self.padding, self.padding

    def output_size(self, sizes: Ints, kernel_size: Ints) -> Ints:
        """floor((size + padding - dilation * (kernel_size - 1) - 1) / stride) + 1"""
        low, high = self.before_and_after(kernel_size)
        extent = (d * (k - 1) + 1 for k, d in zip(kernel_size, self.dilation, strict=True))
        return tuple((n + a + b - e) // s + 1 for n, a, b, e, s in zip(sizes, low, high, extent, self.stride, strict=True))


@functools.lru_cache(maxsize=1024, typed=True)
def asked(caller: str, rank: int, stride: Any, padding: Any, dilation: Any, groups: Any) -> Convolution:
    """The convolution that a user asked ``caller`` for, checked; RuntimeError or TypeError as torch."""
    step, spread = ints(caller, "stride", stride, rank), ints(caller, "dilation", dilation, rank)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise RuntimeError(f"{caller}: padding must be ints, 'same' or 'valid', got {padding!r}")
        if padding == "same" and set(step) != {1}:
            raise RuntimeError(f"{caller}: padding='same' needs stride 1, got {step}")
        pad: Ints | str = "same" if padding == "same" else (0,) * rank
    else:
        pad = ints(caller, "padding", padding, rank)
        if min(pad) < 0:
            raise RuntimeError(f"{caller}: padding must be at least 0, got {pad}")
    for name, values in (("stride", step), ("dilation", spread)):
        if min(values) < 1:
            raise RuntimeError(f"{caller}: {name} must be at least 1, got {values}")
    (count,) = ints(caller, "groups", groups, 1)
    if count < 1:
        raise RuntimeError(f"{caller}: groups must be at least 1, got {count}")
    return Convolution(caller, rank, step, pad, spread, count)


def request(caller: str, rank: int, stride: Any, padding: Any, dilation: Any, groups: Any) -> Convolution:
    """``asked``, of arguments that may have no hash."""
    values = (tuple(v) if isinstance(v, (list, torch.Size)) else v for v in (stride, padding, dilation))
    if torch.compiler.is_compiling():
        return asked.__wrapped__(caller, rank, *values, groups)
    return asked(caller, rank, *values, groups)


def epilogue(caller: str, after: Any) -> Applied | None:
    """The ``after=`` of a user: a name, or a module of torch.nn."""
    if after is None:
        return None
    found = activations.of(caller, after)
    if found is None:
        raise TypeError(f"{caller}: after must be a name or one of torch.nn's elementwise activations, got {type(after).__name__}")
    return found


@dataclass(eq=False)
class Call:
    """What is known of a convolution of tensors of one shape, strides and dtype."""

    op: Convolution
    shape: Ints
    weight_shape: Ints
    weight_strides: Ints
    strides: Ints
    """As kernels read x: of the tensor itself, or of its copy."""
    copies: bool
    """Neither the last axis nor the channels are dense."""
    last: bool
    """channels_last"""
    out: Ints
    out_strides: Ints
    geometry: Any
    kernels: Any
    dtype: torch.dtype
    device: torch.device
    poolings: dict[Any, Any] = field(default_factory=dict)
    """What ``pooling_plan`` has found."""

    @functools.cached_property
    def dense(self) -> Ints:
        """The strides of a gradient of the input."""
        return backend.dense_strides(self.shape, self.op.rank, self.last)

    @functools.cached_property
    def empty(self) -> bool:
        return 0 in self.out or 0 in self.shape

    def forward(self, after: Applied | None) -> Any:
        return self.kernels.forward(self.geometry, after and after.activation)

    @functools.cached_property
    def input_gradient(self) -> Any:
        return self.kernels.input_gradient(self.geometry)

    @functools.cached_property
    def transposed(self) -> Any:
        """``input_gradient`` that adds a bias."""
        return self.kernels.input_gradient(self.geometry, True)

    @functools.cached_property
    def weight_gradient(self) -> Any:
        return self.kernels.weight_gradient(self.geometry)


def _fits(op: Convolution, shape: Ints, weight: Ints) -> Ints:
    """The output's sizes; RuntimeError for what does not fit."""
    caller, rank = op.caller, op.rank
    words = WORDS[rank]
    axes = words.shapes.replace("(C", "(out_channels, in_channels / groups").split(" or ")[0]
    if len(weight) != rank + 2:
        raise RuntimeError(f"{caller}: expected a weight of {rank + 2} dimensions, {axes}, got {len(weight)}: {weight}")
    if len(shape) not in (rank + 1, rank + 2):
        raise RuntimeError(f"{caller}: expected a {words.shapes} input, got {len(shape)} dimensions: {shape}")
    channels, outputs, inputs = shape[-rank - 1], *weight[:2]
    if min(weight) < 1:
        raise RuntimeError(f"{caller}: a weight must not be empty, got {weight}")
    if outputs % op.groups:
        raise RuntimeError(f"{caller}: groups={op.groups} does not divide the {outputs} output channels of a weight of {weight}")
    if channels != inputs * op.groups:
        raise RuntimeError(
            f"{caller}: a weight of {weight} with groups={op.groups} takes {inputs * op.groups} channels, the input {shape} has {channels}"
        )
    sizes, kernel = shape[-rank:], weight[2:]
    if min(sizes) < 1:
        raise RuntimeError(f"{caller}: {words.axes} must not be empty, got {shape}")
    out = op.output_size(sizes, kernel)
    if min(out) < 1:
        low, high = op.before_and_after(kernel)
        padded = tuple(n + a + b for n, a, b in zip(sizes, low, high, strict=True))
        what = f"kernel_size {kernel}"
        if max(op.dilation) > 1:
            what += f" dilated by {op.dilation}"
        raise RuntimeError(f"{caller}: {what} is larger than the padded input {padded}: the output would be {out}")
    if max(*sizes, *out) > LARGEST:
        raise RuntimeError(f"{caller}: {words.axes} must be below 2**31, got {sizes}")
    return out


def _on_three_axes(values: Ints, missing: int) -> Ints:
    return (missing,) * (3 - len(values)) + values


@functools.lru_cache(maxsize=2048)
def call(op: Convolution, shape: Ints, strides: Ints, weight: Ints, weight_strides: Ints, dtype: torch.dtype, device: torch.device) -> Call:
    """What there is to know of such tensors; RuntimeError or NotImplementedError for what cannot be convolved."""
    from .kernels.pool import FLOATS

    rank, shape, weight = op.rank, tuple(shape), tuple(weight)
    out = _fits(op, shape, weight)
    kernels = backend.kernels_for(device, dtype, op.caller, FLOATS, _BACKENDS)
    last = backend.channels_last(shape, strides, rank)
    copies = last is None
    if copies:
        strides = backend.dense_strides(shape, rank, False)
    layout = backend.five_axes(shape, tuple(strides), rank, bool(last))
    dense = 1 if last else 4  # an axis 1 long may have any stride; kernels step along this one by 1
    steps_of_x = (*layout.strides[:dense], 1, *layout.strides[dense + 1 :])
    step_o, step_i, *steps = weight_strides
    full = (*shape[: -rank - 1], weight[0], *out)
    geometry = kernels.Geometry(
        dtype=backend.name_of(dtype),
        shape=layout.shape,
        strides=steps_of_x,
        channels_last=bool(last),
        weight_shape=(*weight[:2], *_on_three_axes(weight[2:], 1)),
        weight_strides=(step_o, step_i, *_on_three_axes(tuple(steps), 0)),
        groups=op.groups,
        stride=_on_three_axes(op.stride, 1),
        padding=_on_three_axes(op.before_and_after(weight[2:])[0], 0),
        dilation=_on_three_axes(op.dilation, 1),
        out=_on_three_axes(out, 1),
    )
    out_strides = backend.dense_strides(full, rank, bool(last))
    return Call(
        op, shape, weight, tuple(weight_strides), tuple(strides), copies, bool(last), full, out_strides, geometry, kernels, dtype, device
    )


def called(op: Convolution, x: torch.Tensor, weight: torch.Tensor) -> Call:
    return call(op, x.shape, x.stride(), weight.shape, weight.stride(), x.dtype, x.device)


class _Scratch:
    """``with _Scratch(size) as address``: so many bytes, kept from call to call: fresh memory would cost page faults, 1 to 12 us.

    Nobody else's meanwhile: a list's pop is atomic, so Python threads take different ones.  A class, as a generator costs 1 us more."""

    __slots__ = ("block",)
    KEPT = 4
    """One for each Python thread that convolves at a time, a few of them."""
    _free: ClassVar[list[tuple[int, int, torch.Tensor]]] = []

    def __init__(self, size: int) -> None:
        try:
            self.block = self._free.pop()
        except IndexError:
            self.block = 0, 0, torch.empty(0)
        if self.block[0] < size:
            memory = torch.empty(size, dtype=torch.uint8)
            self.block = size, memory.data_ptr(), memory

    def __enter__(self) -> int:
        return self.block[1]

    def __exit__(self, *error: object) -> None:
        if len(self._free) < self.KEPT:
            self._free.append(self.block)


class _Sums:
    """The same of numbers for a GPU, from torch's allocator: what is given back is another's after the launches that were before."""

    def __init__(self, like: torch.Tensor, count: int) -> None:
        self.block = _elements(like, count)

    def __enter__(self) -> int:
        return self.block.data_ptr()

    def __exit__(self, *error: object) -> None:
        pass


def _panels(plan: Any, threads: int, like: torch.Tensor) -> _Scratch | _Sums:
    """What a convolution's plan writes to besides its result, on so many threads."""
    return _Sums(like, plan.sums) if plan.sums else _Scratch(threads * plan.panel)


def bias_gradient(gy: torch.Tensor, rank: int) -> torch.Tensor:
    """The sum of each channel, differentiable."""
    return gy.sum([axis for axis in range(gy.dim()) if axis != gy.dim() - rank - 1])


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _elements(like: torch.Tensor, count: int) -> torch.Tensor:
    """Uninitialised numbers of the dtype that is computed in."""
    return backend.empty(like, (count,), (1,), _computed(like.dtype))


def _computed(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def packed(plan: Any, weight: torch.Tensor, bias: torch.Tensor | None, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Weights (each output channel's times its scale) and biases as ``plan`` reads them."""
    found = _elements(weight, plan.packed)
    plan.pack(found.data_ptr(), weight.data_ptr(), _address(bias), _address(scale), runtime.threads() if plan.parallel else 1)
    return found


class Kept:
    """Packed weights of a module, until a parameter is another tensor, is changed in place, or is needed in another form.

    An in-place change raises a tensor's version; what is done to ``parameter.data`` does not, so SAMPLES of its numbers are compared
    too.
    """

    SAMPLES = 32
    FORMS = 4

    def __init__(self) -> None:
        self._found: dict[Any, _Entry] = {}
        self.last: Remembered | None = None

    def __deepcopy__(self, memo: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> Any:
        return Kept, ()

    def get(self, plan: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> _Entry:
        tensors = [t for t in (weight, bias) if t is not None]
        # To look at a GPU's numbers is to wait for it, and a CUDA graph that is replayed is to see what they are then.
        if any(t.is_inference() or t.is_cuda for t in tensors):
            return _Entry(None, [], [], packed(plan, weight, bias))
        known = self._found.get(plan.form)
        if known is not None and known.holds(tensors):
            return known
        while len(self._found) >= self.FORMS:
            del self._found[next(iter(self._found))]
        views = [samples_of(t) for t in tensors]
        found = _Entry(state_of(tensors), views, [v.tobytes() for v in views], packed(plan, weight, bias))
        self._found[plan.form] = found
        return found


class _Entry(NamedTuple):
    """One form of packed weights."""

    key: Any
    """None where packed weights are not kept: of inference tensors, whose changes leave no trace, and on CUDA."""
    views: list[Any]
    """Of some numbers of each tensor, in its memory."""
    samples: list[bytes]
    packed: torch.Tensor

    def holds(self, tensors: list[torch.Tensor]) -> bool:
        """Whether they are what was packed, unchanged."""
        return self.key is not None and self.key == state_of(tensors) and self.samples == [v.tobytes() for v in self.views]


def state_of(tensors: list[torch.Tensor]) -> Any:
    return [(t.data_ptr(), t._version, t.stride()) for t in tensors]


def samples_of(t: torch.Tensor) -> Any:
    """NumPy's, of SAMPLES of a tensor's numbers."""
    count = min(t.numel(), Kept.SAMPLES)
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    spread = t.detach().as_strided((count,), (max(1, last // max(1, count - 1)),))
    return spread.view(_BITS[t.dtype.itemsize]).numpy()


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Remembered(NamedTuple):
    """A module's call, for the next if that is of the same shapes, strides, dtype and parameters: 18 us of Python become 10.  With
    a pooling behind it, of 3x32x32 to 64, 38.7 us in all 29.4."""

    asked: Any
    weight: torch.Tensor
    bias: torch.Tensor | None
    of_input: Any
    here: Call
    run: _Run
    entry: _Entry
    then: Pooling | None
    """A pooling that takes a launch of its own."""

    def again(self, x: torch.Tensor) -> torch.Tensor | None:
        """y of a plain tensor, or None if anything is another than it was."""
        tensors = [self.weight] if self.bias is None else [self.weight, self.bias]
        if _of(x) != self.of_input or not self.entry.holds(tensors):
            return None
        return self.run(x, self.entry.packed, self.here)


def _of(x: torch.Tensor) -> Any:
    return x.shape, x.stride(), x.dtype, x.device


class _Run(NamedTuple):
    """A plan with the parameters of its activation."""

    plan: Any
    more: tuple[int, ...]

    def __call__(self, x: torch.Tensor, ready: torch.Tensor, here: Call) -> torch.Tensor:
        plan, y = self.plan, backend.empty(x, here.out, here.out_strides)
        threads = runtime.threads() if plan.parallel else 1
        with _panels(plan, threads, x) as panels:
            plan.run(x.data_ptr(), ready.data_ptr(), y.data_ptr(), panels, threads, *self.more)
        return y


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    op: Convolution,
    after: Applied | None = None,
    scale: torch.Tensor | None = None,
    kept: Kept | None = None,
    asked: Any = None,
    then: Pooling | None = None,
) -> torch.Tensor:
    """y in x's layout.  ``kept`` (without a scale) remembers the call as what a module ``asked`` for, unless that is None, with the pooling
    that it does ``then``."""
    here = called(op, x, weight)
    if here.empty:
        return backend.empty(x, here.out, here.out_strides)
    return _run(here.forward(after), after, x, weight, bias, scale, here, kept, asked, then)


def _run(
    plan: Any,
    after: Applied | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scale: torch.Tensor | None,
    here: Call,
    kept: Kept | None,
    asked: Any,
    then: Pooling | None = None,
) -> torch.Tensor:
    """What ``plan`` makes of x, in a tensor as ``here`` says; the rest as for ``forward``."""
    name = backend.name_of(_computed(x.dtype))
    run = _Run(plan, tuple(here.kernels.bits(value, name) for value in after.parameters) if after else ())
    if kept is None:
        ready = packed(plan, weight, bias, scale)
    else:
        entry = kept.get(plan, weight, bias)
        ready = entry.packed
        if asked is not None:
            kept.last = None if here.copies or entry.key is None else Remembered(asked, weight, bias, _of(x), here, run, entry, then)
    return run(x.contiguous() if here.copies else x, ready, here)


def pooling_plan(here: Call, after: Applied | None, pooling: Pooling) -> tuple[Any, Ints]:
    """The one launch of a convolution and a pooling of it, or None; and the result's shape."""
    from .kernels.pool import FLOATS

    key = after and after.activation, pooling
    found = here.poolings.get(key)
    if found is None:
        window, out = backend.outputs(pooling, here.out)
        plan = None
        if not here.empty and isinstance(window, Window):
            kernels = backend.kernels_for(here.device, here.dtype, here.op.caller, FLOATS, _POOLED)
            plan = kernels.planned(here.geometry, key[0], pooling.kind, window.on_three_axes, pooling.include_pad, pooling.divisor)
        found = here.poolings[key] = plan, out
    return found


def pooled(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    op: Convolution,
    after: Applied | None,
    scale: torch.Tensor | None,
    pooling: Pooling,
    kept: Kept | None = None,
    asked: Any = None,
) -> torch.Tensor | None:
    """``forward`` and a pooling of it in one launch; None where the two are taken one by one."""
    here = called(op, x, weight)
    plan, out = pooling_plan(here, after, pooling)
    if plan is None:
        return None
    to = replace(here, out=out, out_strides=backend.dense_strides(out, op.rank, here.last))
    return _run(plan, after, x, weight, bias, scale, to, kept, asked)


def input_gradient(gy: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, here: Call) -> torch.Tensor:
    """gx, dense in the call's layout; ``bias``, if given, is added to each channel (as transposed convolution does)."""
    gx = backend.empty(gy, here.shape, here.dense)
    if gx.numel() == 0:
        return gx
    gy = backend.restride(backend.materialised(gy), here.out_strides)
    plan = here.input_gradient if bias is None else here.transposed
    threads = runtime.threads() if plan.parallel else 1
    ready = packed(plan, weight, bias)
    with _panels(plan, threads, gy) as panels:
        plan.run(gy.data_ptr(), ready.data_ptr(), gx.data_ptr(), panels, threads)
    return gx


def transposed_shape(op: Convolution, shape: Ints, weight: Ints, more: Ints) -> Ints:
    """The output's shape of a transposed convolution of an input of ``shape``; RuntimeError for what does not fit."""
    caller, rank = op.caller, op.rank
    if len(weight) != rank + 2 or len(shape) not in (rank + 1, rank + 2):
        raise RuntimeError(
            f"{caller}: expected an input of {WORDS[rank].shapes} and a weight of {rank + 2} dimensions, got {shape}, {weight}"
        )
    assert not isinstance(op.padding, str)
    if shape[-rank - 1] != weight[0] or weight[0] % op.groups or min(weight) < 1:
        raise RuntimeError(
            f"{caller}: a weight of {weight} with groups={op.groups} takes {weight[0]} channels, the input {shape} has others"
        )
    if any(not 0 <= extra < max(s, d) for extra, s, d in zip(more, op.stride, op.dilation, strict=True)):
        raise RuntimeError(f"{caller}: output_padding {more} must be smaller than stride {op.stride} or dilation {op.dilation}")
    sizes = tuple(
        (n - 1) * s - 2 * p + d * (k - 1) + extra + 1
        for n, s, p, d, k, extra in zip(shape[-rank:], op.stride, op.padding, op.dilation, weight[2:], more, strict=True)
    )
    if min(sizes) < 1:
        raise RuntimeError(f"{caller}: the output of an input {shape} would be {sizes}")
    return (*shape[: -rank - 1], weight[1] * op.groups, *sizes)


def transposed_call(op: Convolution, shape: Ints, gy: torch.Tensor, weight: torch.Tensor) -> Call:
    """The call whose gradient by the input is that transposed convolution."""
    last = bool(backend.channels_last(gy.shape, gy.stride(), op.rank))
    strides = backend.dense_strides(shape, op.rank, last)
    return call(op, shape, strides, weight.shape, weight.stride(), gy.dtype, gy.device)


def weight_gradient(gy: torch.Tensor, x: torch.Tensor, here: Call) -> torch.Tensor:
    """gw; it lies as the weights of the call did."""
    gw = backend.empty(gy, here.weight_shape, gradient_strides(here.weight_shape, here.weight_strides, here.op.rank))
    if here.empty:
        return gw.zero_()
    if x.stride() != here.strides:
        x = backend.restride(x, here.dense)
    here = call(here.op, x.shape, x.stride(), here.weight_shape, gw.stride(), x.dtype, x.device)
    gy = backend.restride(backend.materialised(gy), here.out_strides)
    plan = here.weight_gradient
    threads = runtime.threads() if plan.parallel else 1
    sums = _elements(gy, plan.sums)
    with _Scratch(threads * plan.panel) as panels:
        plan.run(x.data_ptr(), gy.data_ptr(), gw.data_ptr(), sums.data_ptr(), panels, threads)
    return gw


def gradient_strides(shape: Ints, strides: Ints, rank: int) -> Ints:
    """Of a gradient of the weights: channels_last where they are so, else contiguous."""
    return backend.dense_strides(shape, rank, bool(backend.channels_last(shape, strides, rank)))


class Memory(NamedTuple):
    """Bytes that a convolution needs beside its input, weights and output."""

    packed: int
    """The weights once more, in blocks of output channels."""
    panels: int
    """Of all threads: a part of a cache each."""


def memory(
    input_shape: Ints, weight_shape: Ints, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1, threads: int = 1
) -> Memory:
    """Of a float32 convolution of contiguous maps forward, on so many threads."""
    rank = len(weight_shape) - 2
    op = asked(f"conv{rank}d", rank, stride, padding, dilation, groups)
    strides, steps = (backend.dense_strides(s, rank, False) for s in (input_shape, weight_shape))
    plan = call(op, tuple(input_shape), strides, tuple(weight_shape), steps, torch.float32, torch.device("cpu")).forward(None)
    return Memory(4 * plan.packed, threads * plan.panel)
