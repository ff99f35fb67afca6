"""Elementwise activations as users name them: torch.nn's modules, torch's functions and names, each to an activation of
kernels/activation and its parameters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from . import tiny

MODULES: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.ReLU: ("relu", ()),
    nn.ReLU6: ("relu6", ()),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.PReLU: ("prelu", ("weight",)),
    nn.RReLU: ("rrelu", ("lower", "upper")),
    nn.ELU: ("elu", ("alpha",)),
    nn.CELU: ("celu", ("alpha",)),
    nn.SELU: ("selu", ()),
    nn.GELU: ("gelu", ()),
    nn.SiLU: ("silu", ()),
    nn.Mish: ("mish", ()),
    nn.Sigmoid: ("sigmoid", ()),
    nn.Tanh: ("tanh", ()),
    nn.Softplus: ("softplus", ("beta", "threshold")),
    nn.Softsign: ("softsign", ()),
    nn.LogSigmoid: ("logsigmoid", ()),
    nn.Hardtanh: ("hardtanh", ("min_val", "max_val")),
    nn.Hardsigmoid: ("hardsigmoid", ()),
    nn.Hardswish: ("hardswish", ()),
    nn.Tanhshrink: ("tanhshrink", ()),
    nn.Softshrink: ("softshrink", ("lambd",)),
    nn.Hardshrink: ("hardshrink", ("lambd",)),
    nn.Threshold: ("threshold", ("threshold", "value")),
}
"""torch.nn's module -> the activation and the module's attributes that are its parameters, in their order.  GELU's form is told by
its ``approximate``."""

_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "relu": torch.relu,
    "gelu_tanh": functools.partial(nn.functional.gelu, approximate="tanh"),
    "prelu": lambda x, weight: nn.functional.prelu(x, x.new_tensor([weight])),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""torch's functions that are not torch.nn.functional's of the same name and arguments."""


class Applied(NamedTuple):
    """An activation and its parameters."""

    activation: Any
    parameters: tuple[float, ...]

    @property
    def name(self) -> str:
        return self.activation.name

    @property
    def shape(self) -> Any:
        """What order knows of it: a ``Shape``."""
        return self.activation.shape(*self.parameters)

    @property
    def slope(self) -> Any:
        """(y, p) -> the derivative, told from the result; None: it is not."""
        return self.activation.slope_for(self.parameters)


@functools.lru_cache(maxsize=256)
def _named(caller: str, name: str, parameters: tuple[float, ...]) -> Applied:
    from .kernels.activation import ACTIVATIONS

    if name not in ACTIVATIONS:
        raise ValueError(f"{caller}: an activation must be one of {', '.join(ACTIVATIONS)}, or such a module of torch.nn, got {name!r}")
    activation = ACTIVATIONS[name]
    values = parameters or tuple(activation.defaults.values())
    if None in values:
        (module,) = (kind.__name__ for kind, (of, _) in MODULES.items() if of == name)
        raise ValueError(f"{caller}: {name} has no default {' or '.join(activation.defaults)}: give a torch.nn.{module}")
    wrong = activation.refuse and activation.refuse(*values)
    if wrong:
        raise ValueError(f"{caller}: {wrong}")
    return Applied(activation, values)


def named(caller: str, name: str, parameters: tuple[float, ...] = ()) -> Applied:
    """The activation of a name, with torch's parameters unless others are given; ValueError if there is none such."""
    # torch.compile would trace through the cache anyway, and warn of it.
    return (_named.__wrapped__ if torch.compiler.is_compiling() else _named)(caller, name, parameters)


def of(caller: str, module: Any) -> Applied | None:
    """The activation of a name or of a module of torch.nn; None for what is neither.

    ValueError where it is one but cannot be had: RReLU in training; PReLU with a weight a channel, or one that is to get a gradient.
    """
    if isinstance(module, Applied):
        return module
    if isinstance(module, str):
        return named(caller, module)
    if type(module) not in MODULES:
        return None
    name, attributes = MODULES[type(module)]
    if name == "gelu" and module.approximate == "tanh":
        name = "gelu_tanh"
    if not attributes:
        return named(caller, name)
    if isinstance(module, nn.RReLU) and module.training:
        raise ValueError(f"{caller}: RReLU draws its slopes in training; in evaluation, module.eval(), it is an activation")
    if isinstance(module, nn.PReLU):
        if module.weight.numel() != 1:
            raise ValueError(f"{caller}: PReLU must have one weight, got {module.weight.numel()}: a slope a channel is not there yet")
        if module.weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{caller}: PReLU's weight gets no gradient here; module.requires_grad_(False), torch.no_grad(), or the module by itself"
            )
    return named(caller, name, tuple(float(getattr(module, attribute)) for attribute in attributes))


FROM = {
    "gelu": 0,
    "softsign": 0,
    "mish": 2048,
    "tanh": 4096,
    "tanhshrink": 4096,
    "gelu_tanh": 8192,
    "elu": 16384,
    "celu": 16384,
    "selu": 16384,
    "prelu": 16384,
}
"""The activations of which a pass over a tensor, with its gradient, is quicker by kernels than by torch's operation, and from how many
elements: torch computes them number by number, or starts them slowly.  In us, by kernels and by torch, forward and backward, of 8,192 and
262,144 elements on one thread (EPYC, Zen 5): tanh 25 and 30, 126 and 597; mish 28 and 66, 195 and 1,670; gelu 28 and 35, 340 and 276; but
relu 24 and 14, 87 and 73; silu 27 and 18, 150 and 145.  float64 is about the same; of 16 bits mish is, tanh and elu are quicker at 65,536
and not at 8,192, gelu is within a third of torch's either way.
"""


def pays(applied: Applied, x: torch.Tensor) -> bool:
    """Whether kernels compute the activation of x by itself, not ``on_torch``."""
    return x.numel() >= FROM.get(applied.activation.name, math.inf) or not (x.is_cpu and tiny.are_torchs())


@functools.lru_cache(maxsize=256)
def _bound(applied: Applied) -> Callable[[torch.Tensor], torch.Tensor]:
    function = _FUNCTIONS.get(applied.name) or getattr(nn.functional, applied.name)
    return (lambda x: function(x, *applied.parameters)) if applied.parameters else function


def on_torch(applied: Applied, x: torch.Tensor) -> torch.Tensor:
    """The activation by torch's own operation."""
    # torch.compile would trace through the cache anyway, and warn of it.
    return (_bound.__wrapped__ if torch.compiler.is_dynamo_compiling() else _bound)(applied)(x)
