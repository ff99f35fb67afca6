"""Layers as the algebra of their order sees them: a function of a shape, an affine map a channel, a mask, a pooling of a structure.

``layer_of`` takes what users give: names, functions of torch, modules, and callables that have to be tried.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from . import activations, backend
from . import window as windows
from .autograd import on_tensors, windows_of
from .backend import Pooling

CALLER = "commutes"
"""What errors start with."""


@dataclass(frozen=True, eq=False)
class Function:
    """An elementwise function of a known shape; ``evidence``: the shape was found by trying."""

    name: str
    apply: Callable[[torch.Tensor], torch.Tensor]
    shape: Any
    evidence: str = ""
    in_place: bool = False


@dataclass(frozen=True, eq=False)
class Channels:
    """scale * x + shift, a number of each a channel: batch-norm in inference."""

    name: str
    scale: torch.Tensor
    shift: torch.Tensor

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        sizes = (-1, *(1,) * (x.dim() - 2))
        return x * self.scale.view(sizes) + self.shift.view(sizes)

    def parts(self) -> list[tuple[list[int], Function]]:
        """Channels whose maps are of one shape, and that."""
        found: dict[Any, list[int]] = {}
        for channel, (a, b) in enumerate(zip(self.scale.tolist(), self.shift.tolist(), strict=True)):
            found.setdefault((a > 0, a < 0, a == 1, b == 0), []).append(channel)
        return [
            (channels, affine(self.name, float(self.scale[channels[0]]), float(self.shift[channels[0]]))) for channels in found.values()
        ]


@dataclass(frozen=True, eq=False)
class Training:
    """Batch-norm in training: by the statistics of what it sees."""

    name: str

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(x, None, None, training=True)


@dataclass(frozen=True, eq=False)
class Mask:
    """Dropout in training."""

    name: str
    p: float
    whole: bool
    """Channels are dropped, not elements."""

    @property
    def factor(self) -> float:
        return 0.0 if self.p == 1 else 1 / (1 - self.p)


@dataclass(frozen=True, eq=False)
class Pool:
    """A pooling; ``structure`` may say less than its kind's."""

    name: str
    op: Pooling
    structure: Any
    return_indices: bool = False
    run: Callable[[torch.Tensor], torch.Tensor] | None = None
    """torch's own, where the kind's arithmetic is not what it does."""

    @property
    def counts_all(self) -> bool:
        """Whether the weights of a linear pooling sum to 1 in every window; torch's sums do not."""
        padded = isinstance(self.op.window, windows.Window) and any(self.op.window.padding) and self.op.include_pad
        return not padded and self.op.divisor is None and self.run is None

    @property
    def may_be_empty(self) -> bool:
        """Whether a window may hold nothing but padding: its taps step over a map shorter than their distance."""
        window = self.op.window
        return isinstance(window, windows.Window) and any(d > 1 and p > 0 for d, p in zip(window.dilation, window.padding, strict=True))

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x) if self.run else pooled(self.op, x)[0]


Layer = Function | Channels | Training | Mask | Pool


def affine(name: str, a: float, b: float) -> Function:
    from .kernels.activation import Shape

    fixes = b == 0
    root = 0.0 if fixes else -b / a if a else None
    shape = Shape(
        minimum=-math.inf if a >= 0 else math.inf,
        maximum=math.inf if a >= 0 else -math.inf,
        ordered=True,
        root=root,
        homogeneous=fixes,
        slope_above=a if fixes and a >= 0 else None,
        affine=(a, b),
    )
    return Function(name, lambda x: x * a + b, shape)


@functools.cache
def _more_functions() -> dict[Any, tuple[str, Any]]:
    """Functions of torch that are no activations, with their shapes."""
    from .kernels.activation import Shape, rising, valley

    falling = Shape(math.inf, -math.inf, True, 0.0, affine=(-1.0, 0.0), homogeneous=True)
    found: dict[Any, tuple[str, Any]] = {}
    shapes = valley(0.0, True, root=0.0, homogeneous=True), valley(0.0, True, root=0.0), falling, rising(root=-math.inf)
    for name, shape in zip(FUNCTIONS, shapes, strict=True):
        found[name] = found[getattr(torch, name)] = (name, shape)
    return found


@functools.cache
def _activation_functions() -> dict[Any, str]:
    """torch's functions of activations with torch's own parameters -> the name."""
    from .kernels.activation import ACTIVATIONS

    found: dict[Any, str] = {}
    for name, activation in ACTIVATIONS.items():
        if None not in activation.defaults.values() and name not in ("prelu", "rrelu"):
            for space in (torch, nn.functional, torch.Tensor):
                if hasattr(space, name):
                    found[getattr(space, name)] = name
    return found


def _kind_of(name: str) -> str | None:
    """The pooling type that a function of torch or fastpool, or a kind, is called by."""
    from .kernels.pool import KINDS as POOLS

    stem = name.removeprefix("global_").removeprefix("adaptive_")
    if stem[-2:] in ("1d", "2d", "3d"):
        stem = stem[:-2]
    stem = stem.removesuffix("_pool")
    return stem if stem in POOLS else "l2" if stem == "lp" else None


def _pool_named(name: str) -> Pool | None:
    """Of a function's or a kind's name, with windows of 2 an axis; Lp is L2."""
    kind = _kind_of(name)
    if kind is None:
        return None
    rank = int(name[-2]) if name[-2:] in ("1d", "2d", "3d") else 2
    if name.startswith("global_"):
        return _pool(name, kind, rank, None)
    if name.startswith("adaptive_"):
        return _pool(name, kind, rank, windows.adaptive(CALLER, rank, 2))
    return _pool(name, kind, rank, windows.window(CALLER, rank, 2, None, 0, 1, False))


def _pool(name: str, kind: str, rank: int, window: Any, parameters: tuple[float, ...] | None = None, **more: Any) -> Pool:
    from .kernels.pool import KINDS as POOLS

    of = POOLS[kind]
    if parameters is None:
        parameters = tuple(of.face.defaults.values()) if of.face else (3.0,) * len(of.parameters)
    return Pool(name, Pooling(CALLER, of, rank, window, parameters, **more), of.structure)


def _pool_of(module: nn.Module) -> Pool | None:
    """Of a module of torch.nn or fastpool.nn."""
    from .kernels.pool import KINDS as POOLS

    kind = type(module)
    if not kind.__module__.startswith(("torch.nn.", "fastpool.nn")) or "Pool" not in kind.__name__:
        return None
    m: Any = module
    name, rank = kind.__name__, int(kind.__name__[-2])
    stem = name[:-2].removesuffix("Pool").removeprefix("Global").removeprefix("Adaptive")
    titles = {of.face.title: of for of in POOLS.values() if of.face} | {"Avg": POOLS["avg"]}
    if "Unpool" in name or "Fractional" in name:
        return None
    if stem == "Stochastic":
        of = POOLS["stochastic" if m.training else "stochastic_mean"]
    elif stem == "LP":
        p = float(m.norm_type)
        of = POOLS[{1.0: "l1", 2.0: "l2", math.inf: "linf"}.get(p, "lp" if p > 0 else "lp_negative")]
    elif stem in titles:
        of = titles[stem]
    else:
        return None
    given = (m.norm_type if stem == "LP" else getattr(m, name) for name in of.parameters)
    parameters = tuple(float(p.detach() if isinstance(p, torch.Tensor) else p) for p in given)
    more: dict[str, Any] = {}
    window: Any = None
    if name.startswith("Adaptive"):
        window = windows.adaptive(CALLER, rank, m.output_size)
    elif not name.startswith("Global") and getattr(m, "kernel_size", None) is not None:
        padding, dilation = getattr(m, "padding", 0), getattr(m, "dilation", 1)
        window = windows.window(CALLER, rank, m.kernel_size, m.stride, padding, dilation, m.ceil_mode)
    if stem == "Avg" and not name.startswith(("Adaptive", "Global")):
        more = {"include_pad": m.count_include_pad, "divisor": getattr(m, "divisor_override", None)}
    found = _pool(name, of.name, rank, window, parameters, **more)
    if stem == "LP" and kind.__module__.startswith("torch.") and float(m.norm_type) % 2:
        # torch raises a negative x to an odd power as it is: of 1 the sum.
        structure = replace(found.structure, scales="positive", linear=float(m.norm_type) == 1)
        found = replace(found, structure=structure, run=module)
    return replace(found, return_indices=bool(getattr(m, "return_indices", False)))


def _batch_norm(module: Any) -> Layer:
    name = type(module).__name__
    if module.training or module.running_mean is None:
        return Training(name)
    with torch.no_grad():
        scale = (module.running_var.double() + module.eps).rsqrt()
        if module.weight is not None:
            scale = scale * module.weight
        shift = -module.running_mean * scale
        if module.bias is not None:
            shift = shift + module.bias
    return Channels(name, scale.detach(), shift.detach())


_ELEMENTS = (nn.Dropout,)
_WHOLE = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

_CALLS: dict[Any, str] = {torch.dropout: "dropout"}
_CALLS |= {getattr(nn.functional, name): name for name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "batch_norm")}
"""torch's functions of layers that are no functions of x alone, with torch's own parameters -> the name."""

FUNCTIONS = ("abs", "square", "neg", "exp")
"""Of torch, no activations."""
NAMES = ("dropout", "dropout1d", "dropout2d", "dropout3d", "batch_norm", "batch_norm_training", "identity", *FUNCTIONS)
"""What may be named beside activations and poolings."""


def _named(name: str) -> Layer:
    from .kernels.activation import ACTIVATIONS

    if name in ACTIVATIONS:
        applied = activations.named(CALLER, name)
        return Function(name, functools.partial(activations.on_torch, applied), applied.shape)
    pool = _pool_named(name)
    if pool is not None:
        return pool
    if name in ("dropout", "dropout1d", "dropout2d", "dropout3d"):
        return Mask(name, 0.5, name != "dropout")
    if name == "batch_norm":
        # Of no module in particular: scales of both signs, with shifts.
        return Channels(name, torch.tensor([1.5, -0.5], dtype=torch.float64), torch.tensor([0.25, -1.0], dtype=torch.float64))
    if name == "batch_norm_training":
        return Training(name)
    if name == "identity":
        return affine(name, 1.0, 0.0)
    if name in _more_functions():
        _, shape = _more_functions()[name]
        return Function(name, getattr(torch, name), shape)
    raise ValueError(
        f"{CALLER}: no layer is called {name!r}; there are the activations {', '.join(ACTIVATIONS)}; the poolings of fastpool.functional;"
        f" and {', '.join(NAMES)}"
    )


def layer_of(layer: Any) -> Layer:
    """TypeError for what is no layer of this algebra."""
    if isinstance(layer, str):
        return _named(layer)
    if isinstance(layer, nn.Module):
        module: Any = layer
        kind = type(layer).__name__
        if isinstance(layer, nn.Identity) or (type(layer) in (*_ELEMENTS, *_WHOLE) and (not layer.training or layer.p == 0)):
            return affine(kind, 1.0, 0.0)
        if type(layer) in (*_ELEMENTS, *_WHOLE):
            return Mask(kind, module.p, type(layer) in _WHOLE)
        if type(layer) in _NORMS:
            return _batch_norm(layer)
        if type(layer) is nn.RReLU and layer.training:
            raise TypeError(f"{CALLER}: RReLU draws its slopes in training and is no function then; module.eval() is one")
        if type(layer) is nn.PReLU and layer.weight.numel() > 1:
            # What holds for the least slope holds for all: rising if none is negative, else two-point; the identity only if all are 1.
            worst = min((slope for slope in layer.weight.detach().tolist() if slope != 1), default=1.0)
            return replace(layer_of(nn.LeakyReLU(worst)), name=kind)
        pool = _pool_of(layer)
        if pool is not None:
            return pool
        if type(layer) in activations.MODULES:
            with torch.no_grad():
                applied = activations.of(CALLER, layer)
            assert applied is not None
            in_place = bool(getattr(layer, "inplace", False))
            return Function(kind, functools.partial(activations.on_torch, applied), applied.shape, in_place=in_place)
    elif not callable(layer):
        raise TypeError(f"{CALLER}: expected a layer's name, a function or a module, got {type(layer).__name__}")
    elif layer in _CALLS:
        return _named(_CALLS[layer])
    elif layer in _activation_functions():
        return _named(_activation_functions()[layer])
    elif layer in _more_functions():
        return _named(_more_functions()[layer][0])
    elif "pool" in getattr(layer, "__name__", "") and "unpool" not in layer.__name__:
        pool = _pool_named(layer.__name__.removesuffix("_with_indices"))
        if pool is not None:
            return pool
    return _probed(layer)


# Functions that nobody has declared


PROBES = 2**17
"""Finite float32 numbers that a function is tried on."""


def _probes() -> torch.Tensor:
    """In rising order: of every exponent as many; and evenly, from -16 to 16, as many again."""
    least, most = 1, 0x7F7FFFFF
    bits = torch.linspace(least, most, PROBES // 4, dtype=torch.float64).round().to(torch.int32)
    positive = bits.view(torch.float32)
    even = torch.linspace(-16, 16, PROBES // 2 + 1, dtype=torch.float64).float()
    return torch.cat([positive, -positive, even]).unique()


def _called(function: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return function(x)


def _check_elementwise(function: Any, name: str) -> None:
    """TypeError unless each element of the result is a function of the element at its place alone, the same everywhere."""
    x = torch.linspace(-3, 3, 2 * 4 * 6 * 6).sin().mul(3).reshape(2, 4, 6, 6)
    try:
        y = _called(function, x.clone())
    except Exception as error:
        raise TypeError(f"{CALLER}: {name} is no elementwise function: on a (2, 4, 6, 6) tensor it raises {error}") from error
    if not isinstance(y, torch.Tensor) or y.shape != x.shape:
        what = tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
        raise TypeError(f"{CALLER}: {name} is no elementwise function: of a (2, 4, 6, 6) tensor it makes {what}")
    if not torch.allclose(y, _called(function, x.clone()), rtol=0, atol=0, equal_nan=True):
        raise TypeError(f"{CALLER}: {name} is no function: of one input it makes different results")
    order = torch.arange(x.numel()).mul(97).remainder(x.numel())
    moved = _called(function, x.flatten()[order].reshape(x.shape)).flatten()
    other = x.clone()
    other[:, :, ::2] = 0.5
    kept = _called(function, other)[:, :, 1::2]
    if not torch.allclose(moved, y.flatten()[order], equal_nan=True) or not torch.allclose(kept, y[:, :, 1::2], equal_nan=True):
        raise TypeError(f"{CALLER}: {name} is not elementwise: an element of its result depends on other elements, or on its place")


def _probed(function: Any) -> Function:
    """A callable with the shape that it has on the numbers tried."""
    from .kernels.activation import Shape

    name = getattr(function, "__name__", type(function).__name__)
    _check_elementwise(function, name)
    x = _probes()
    y = _called(function, x.clone()).double()
    fine = y.isfinite()
    steps, at = y[fine].diff(), x[fine].double()
    slack = 4 * torch.finfo(torch.float32).eps * torch.maximum(y[fine][1:].abs(), at[1:].abs().clamp(max=8))
    falls, rises = steps < -slack, steps > slack
    turn, peak = _turn(falls, rises, at), _turn(rises, falls, at)
    a, b = _called(function, torch.tensor([0.0, 1.0])).double().tolist()
    small = x.abs() < 1e6
    line = torch.allclose(y[small], (b - a) * x[small].double() + a, rtol=1e-5, atol=1e-6)
    doubled = _called(function, (x[small] * 2).clone()).double()
    homogeneous = a == 0 and torch.allclose(doubled, 2 * y[small], rtol=1e-5, atol=0)
    above = homogeneous and bool((y[small & (x <= 0)] <= 0).all()) and b >= 0
    shape = Shape(turn, peak, False, 0.0 if a == 0 else None, homogeneous, b if above else None, (b - a, a) if line else None)
    words = "never falls" if shape.rises else "never rises" if shape.falls else None
    if words is None and turn is not None:
        words = f"falls up to {turn:.6g}, then rises"
    elif words is None and peak is not None:
        words = f"rises up to {peak:.6g}, then falls"
    evidence = f"{name} on {int(fine.sum())} float32 numbers of every exponent: {words or 'falls and rises more than once'}"
    return Function(name, lambda x: _called(function, x.clone()), shape, evidence)


def _turn(falls: torch.Tensor, rises: torch.Tensor, at: torch.Tensor) -> float | None:
    """Where falling ends and rising begins, if it does so once; -inf: it never falls, inf: it never rises."""
    if not bool(falls.any()):
        return -math.inf
    if not bool(rises.any()):
        return math.inf
    last, first = int(falls.nonzero()[-1]), int(rises.nonzero()[0])
    return float(at[last + 1]) if last < first else None


# The poolings' own arithmetic, on tensors


def pooled(op: Pooling, x: torch.Tensor, u: float = 0.4) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y, and of a selecting pooling the taps; by torch's operations, on small maps.  ``u``: what is drawn, everywhere."""
    kind, rank = op.kind, op.rank
    out = backend.outputs(op, tuple(x.shape))[1]
    taps, inside, count, gathered = windows_of(x, op)
    words: Callable[[Any], Any] = on_tensors
    zero = torch.zeros_like(gathered[..., 0, :])
    numbers = tuple(x.new_tensor(value) for value in op.parameters)
    padding = words(kind.neutral)(zero)
    tap = torch.zeros_like(zero, dtype=torch.int64)
    each = [(torch.where(inside[k], gathered[..., k, :], padding), torch.full_like(tap, k), inside[k]) for k in range(len(taps))]
    if kind.selects:
        first = inside.int().argmax(0).expand_as(tap)
        if kind.draws:
            total = zero
            for value, _, _ in each:
                total = words(kind.survey)(total, value)
            state = words(kind.init)(zero, first, total, torch.full_like(zero, u))
        else:
            state = words(kind.init)(zero, first)
        for value, k, here in each:
            after = words(kind.accumulate)(state, value, k)
            state = tuple(torch.where(here, new, old) for new, old in zip(after, state, strict=True))
        return state[0].reshape(*x.shape[:-rank], *out[-rank:]), state[1]
    state = words(kind.init)(zero)
    for value, _, _ in each:
        state = words(kind.accumulate)(state, value, numbers)
    y = words(kind.finalise)(state, count, x.new_tensor(len(taps)), numbers)
    return y.reshape(*x.shape[:-rank], *out[-rank:]), None
