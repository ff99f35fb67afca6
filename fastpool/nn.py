"""Pooling and convolution modules: torch.nn's own classes with fastpool's forward where torch has one, so that isinstance, repr,
state_dict and constructors are torch's; and the ones torch lacks.  Each exists for one, two and three spatial axes.

Shapes, dtypes, layouts and errors: see ``fastpool.functional``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import convolution, fusion
from . import functional as F
from .kernels.pool import KINDS
from .window import WORDS

__all__: list[str] = []

Forward = Callable[..., Any]
Bases = tuple[type[nn.Module], ...]


def _published(stem: str, function: str, make: Callable[[int, Any], tuple[Bases, dict[str, Any]]]) -> None:
    """Put a class for each number of spatial axes into this module; {n} is that number.  ``make(rank, function)`` returns its bases and
    its members."""
    for rank in WORDS:
        name, of = stem.format(n=rank), function.format(n=rank)
        bases, members = make(rank, getattr(F, of))
        doc = f"``fastpool.functional.{of}`` as a module{_after(bases[-1])}."
        globals()[name] = type(name, bases, {"__module__": __name__, "__doc__": doc, **members})
        __all__.append(name)


def _after(base: type[nn.Module]) -> str:
    return f": torch.nn.{base.__name__}'s arguments" if base.__module__.startswith("torch.") else ""


class _Beside(nn.Module):
    """``before`` and ``after``, by keyword: the function's, kept where torch finds modules among them."""

    def __init__(self, *args: Any, before: Any = None, after: Any = None, **more: Any) -> None:
        super().__init__(*args, **more)
        for name, given in (("before", before), ("after", after)):
            fusion.steps(type(self).__name__, given)
            if given is not None:
                several = isinstance(given, (tuple, list)) and all(isinstance(part, nn.Module) for part in given)
                setattr(self, name, nn.Sequential(*given) if several else given)
                self._beside = (*self._more(), name)

    def _more(self) -> dict[str, Any]:
        """The keywords that were given."""
        names = self.__dict__.get("_beside")  # not there in most, nor in a module of torch.nn that was converted
        return {name: getattr(self, name) for name in names} if names else {}

    def extra_repr(self) -> str:
        # A module is shown among the children, where torch puts it.
        plain = [f"{name}={value!r}" for name, value in self._more().items() if not isinstance(value, nn.Module)]
        return ", ".join(filter(None, [super().extra_repr(), *plain]))


_KEYWORDS = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in ("before", "after")]


def _like(base: str, forward: Callable[[Any, int], Forward]) -> Callable[[int, Any], tuple[Bases, dict[str, Any]]]:
    """Subclasses of torch's class whose forward is ``forward(function, rank)``."""

    def make(rank: int, function: Any) -> tuple[Bases, dict[str, Any]]:
        torchs = getattr(nn, base.format(n=rank))
        of = inspect.signature(torchs)
        signature = of.replace(parameters=[*of.parameters.values(), *_KEYWORDS])
        return (_Beside, torchs), {"forward": forward(function, rank), "__signature__": signature}

    return make


def _select(pool: Any, rank: int) -> Forward:
    def forward(self: Any, input: torch.Tensor) -> Any:
        return pool(input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.return_indices, **self._more())

    return forward


def _average(pool: Any, rank: int) -> Forward:
    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        more = () if rank == 1 else (self.divisor_override,)
        return pool(input, self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad, *more, **self._more())

    return forward


def _norm(pool: Any, rank: int) -> Forward:
    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        return pool(input, float(self.norm_type), self.kernel_size, self.stride, self.ceil_mode, **self._more())

    return forward


def _adapt(pool: Any, rank: int) -> Forward:
    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        return pool(input, self.output_size, **self._more())

    return forward


def _adapt_and_select(pool: Any, rank: int) -> Forward:
    def forward(self: Any, input: torch.Tensor) -> Any:
        return pool(input, self.output_size, self.return_indices, **self._more())

    return forward


class _WindowPool(_Beside):
    """kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False."""

    pool: Any

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        *,
        before: Any = None,
        after: Any = None,
    ) -> None:
        super().__init__(before=before, after=after)
        self.kernel_size = kernel_size
        self.stride = stride if stride is not None else kernel_size
        self.padding = padding
        self.dilation = dilation
        self.ceil_mode = ceil_mode

    def extra_repr(self) -> str:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
        return ", ".join(filter(None, [*(f"{name}={getattr(self, name)}" for name in names), super().extra_repr()]))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return type(self).pool(input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, **self._more())


class _StochasticPool(_WindowPool):
    """A random element of each window while training, its expectation in evaluation."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return type(self).pool(
            input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode, self.training, **self._more()
        )


class _GlobalPool(_Beside):
    """keepdim=True: (N, C, 1, 1); False: (N, C)."""

    pool: Any

    def __init__(self, keepdim: bool = True, *, before: Any = None, after: Any = None) -> None:
        super().__init__(before=before, after=after)
        self.keepdim = keepdim

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [f"keepdim={self.keepdim}", super().extra_repr()]))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return type(self).pool(input, self.keepdim, **self._more())


class _ParametrisedPool(_Beside):
    """The arguments of the function ``pool`` but its input; then, where a parameter can be learned, ``trainable``."""

    pool: Any
    learnable: tuple[str, ...] = ()
    """The parameters that ``trainable`` makes an nn.Parameter."""

    def __init__(self, *args: Any, before: Any = None, after: Any = None, **kwargs: Any) -> None:
        super().__init__(before=before, after=after)
        given = inspect.signature(type(self)).bind(*args, **kwargs)
        given.apply_defaults()
        del given.arguments["before"], given.arguments["after"]
        trainable = given.arguments.pop("trainable", False)
        for name, value in given.arguments.items():
            learned = trainable and name in self.learnable
            setattr(self, name, nn.Parameter(torch.as_tensor(value, dtype=torch.get_default_dtype()).clone()) if learned else value)
        self._names = tuple(given.arguments)

    def extra_repr(self) -> str:
        values = {name: getattr(self, name) for name in self._names}
        shown = {name: round(value.item(), 6) if isinstance(value, torch.Tensor) else value for name, value in values.items()}
        return ", ".join(filter(None, [*(f"{name}={value}" for name, value in shown.items()), super().extra_repr()]))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return type(self).pool(input, *[getattr(self, name) for name in self._names], **self._more())


def _of(base: type[nn.Module]) -> Callable[[int, Any], tuple[Bases, dict[str, Any]]]:
    return lambda rank, function: ((base,), {"pool": staticmethod(function)})


def _parametrised(kind: Any) -> Callable[[int, Any], tuple[Bases, dict[str, Any]]]:
    def make(rank: int, function: Any) -> tuple[Bases, dict[str, Any]]:
        of = inspect.signature(function).parameters.values()
        parameters = [p for p in of if p.kind is not inspect.Parameter.KEYWORD_ONLY][1:]
        if kind.slopes:
            trainable = inspect.Parameter("trainable", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=bool(kind.face.trainable))
            parameters.append(trainable)
        members = {
            "pool": staticmethod(function),
            "learnable": kind.face.trainable or tuple(kind.slopes),
            "__signature__": inspect.Signature([*parameters, *_KEYWORDS]),
        }
        return (_ParametrisedPool,), members

    return make


def _of_face(kind: Any) -> None:
    """The modules of a pooling type that says how it is called."""
    face = kind.face
    windowed = _like("MaxPool{n}d", _select) if kind.selects else _parametrised(kind) if kind.parameters else _of(_WindowPool)
    _published(f"{face.title}Pool{{n}}d", f"{face.stem}_pool{{n}}d", windowed)
    if kind.combine:
        _published(
            f"Global{face.title}Pool{{n}}d",
            f"global_{face.stem}_pool{{n}}d",
            _parametrised(kind) if kind.parameters else _of(_GlobalPool),
        )
    if face.adaptive:
        base = _like("AdaptiveMaxPool{n}d", _adapt_and_select) if kind.selects else _like("AdaptiveAvgPool{n}d", _adapt)
        _published(f"Adaptive{face.title}Pool{{n}}d", f"adaptive_{face.stem}_pool{{n}}d", base)


def _convolving(rank: int, function: Any) -> tuple[Bases, dict[str, Any]]:
    """torch's class, which keeps packed weights; ``after``, keyword-only, is the function's."""
    base = getattr(nn, f"Conv{rank}d")

    def __init__(self: Any, *args: Any, after: Any = None, **more: Any) -> None:  # noqa: N807
        convolution.epilogue(f"Conv{rank}d", after)
        base.__init__(self, *args, **more)
        self.after = after

    def _conv_forward(self: Any, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        padding, after, kept = self.padding, getattr(self, "after", None), None
        if self.padding_mode != "zeros":
            input, padding = nn.functional.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        geometry = self.stride, padding, self.dilation, self.groups
        # The parameters of an activation that is a module may be others at the next call.
        asked = (*geometry, after) if after is None or isinstance(after, str) else None
        if not torch.compiler.is_compiling():
            kept = vars(self).get("_kept")
            if kept is None:
                kept = vars(self)["_kept"] = convolution.Kept()
            y = F.remembered(kept, asked, input, weight, bias)
            if y is not None:
                return y
        op = convolution.request(function.__name__, rank, *geometry)
        return F.convolved(input, weight, bias, op, None, after, kept, asked)

    def extra_repr(self: Any) -> str:
        after = getattr(self, "after", None)
        # A module is shown among the children, where torch puts it.
        return base.extra_repr(self) + (f", after={after!r}" if isinstance(after, str) else "")

    def repack(self: Any) -> None:
        """Forget the packed weights: after changes of single numbers through ``.data``, which leave no trace."""
        vars(self).pop("_kept", None)

    # No ``after`` of the class, which converted modules are given: it would hide a child of that name.
    members = {"__init__": __init__, "_conv_forward": _conv_forward, "extra_repr": extra_repr, "repack": repack}
    return (base,), members


def _unpooling(rank: int, function: Any) -> tuple[Bases, dict[str, Any]]:
    def forward(self: Any, input: torch.Tensor, indices: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        return function(input, indices, self.kernel_size, self.stride, self.padding, output_size)

    return (getattr(nn, f"MaxUnpool{rank}d"),), {"forward": forward}


for _kind in KINDS.values():
    if _kind.face:
        _of_face(_kind)
_published("AvgPool{n}d", "avg_pool{n}d", _like("AvgPool{n}d", _average))
_published("GlobalAvgPool{n}d", "global_avg_pool{n}d", _of(_GlobalPool))
_published("AdaptiveAvgPool{n}d", "adaptive_avg_pool{n}d", _like("AdaptiveAvgPool{n}d", _adapt))
_published("LPPool{n}d", "lp_pool{n}d", _like("LPPool{n}d", _norm))
_published("StochasticPool{n}d", "stochastic_pool{n}d", _of(_StochasticPool))
_published("MaxUnpool{n}d", "max_unpool{n}d", _unpooling)
_published("Conv{n}d", "conv{n}d", _convolving)
__all__.sort()

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...
