"""A chain of layers as parts, and the forms in which they run."""

from __future__ import annotations

import copy
import copyreg
import functools
import inspect
import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from . import activations, conversion, functional, fusion
from . import nn as fast
from .activations import Applied
from .convolution import Kept, samples_of, state_of
from .laws import commutes

Tensor = torch.Tensor

CALLER = "optimize"

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, fast.Conv1d, fast.Conv2d, fast.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
MASKS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
POOLINGS: conversion.Swaps = {
    **conversion._POOLINGS,
    **{ours: ours for ours in vars(fast).values() if isinstance(ours, type) and issubclass(ours, fast._Beside)},
}
KNOWN = (*_CONVOLUTIONS, *_NORMS, *MASKS, *activations.MODULES, *POOLINGS)
HOOKS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs"),
    *("_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook"),
)


def _functions_of(module: Any, names: Sequence[str]) -> dict[Any, str]:
    return {getattr(module, name): name for name in names if hasattr(module, name)}


_ELEMENTWISE: dict[Any, str] = {
    **_functions_of(nn.functional, [name for name, _ in activations.MODULES.values()]),
    **_functions_of(nn.functional, ["relu_", "leaky_relu_", "elu_", "celu_", "selu_", "hardtanh_", "threshold_", "rrelu_"]),
    **_functions_of(torch, ["relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "selu", "selu_", "celu", "celu_"]),
}
_METHODS = ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_")
_POOLED: dict[Any, str] = {
    getattr(home, name): name
    for home in (nn.functional, torch, functional)
    for name in functional.__all__
    if "pool" in name and not name.startswith(("conv_", "max_unpool")) and hasattr(home, name)
}


def _reduced(applied: Applied) -> tuple[Any, ...]:
    return activations.named, (CALLER, applied.name, applied.parameters)


copyreg.pickle(Applied, _reduced)  # its arithmetic has no name


class Part(NamedTuple):
    """One layer of a chain."""

    role: str
    """conv, norm, act, mask or pool"""
    shown: str
    call: Callable[[Tensor], Tensor]
    """As it stands in the model."""
    module: Any
    """The nn.Module, or None of a function."""
    fused: Any
    """act and norm: what ``before`` and ``after`` take; pool: (before, after) -> the pooling with these."""
    in_place: bool = False


class _Call:
    """A function of one tensor, with its other arguments."""

    def __init__(self, function: Any, more: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.function, self.more, self.named = function, more, named

    def __call__(self, x: Tensor) -> Any:
        return self.function(x, *self.more, **self.named)

    def __repr__(self) -> str:
        return f"{self.more}{self.named}"


def shallow(module: nn.Module) -> Any:
    """The module as another object with the same parameters, buffers and children."""
    found = object.__new__(type(module))  # a GraphModule's own would be one without a forward
    found.__dict__ = {name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
    return found


def is_hooked(module: nn.Module) -> bool:
    return any(vars(module).get(name) for name in HOOKS)


def altered(module: nn.Module) -> str:
    """What makes a call of the module another than its class's, or ""."""
    if "forward" in vars(module):
        return "a forward of its own"
    return "a hook" if is_hooked(module) else ""


def source_of(node: fx.Node) -> fx.Node | None:
    """The one node that a node reads."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, fx.Node) and len(node.all_input_nodes) == 1 else None


# Layers as parts


class _PoolingModule:
    """(before, after) -> fastpool's module with them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, before: Any, after: Any) -> Any:
        made = self.module.__new__(POOLINGS[type(self.module)])
        # Its parameters are the model's own module's, whatever becomes of them; ``before`` and ``after`` are no children.
        made.__dict__ = vars(self.module) | {"before": before, "after": after}
        made.__dict__["_beside"] = tuple(name for name in ("before", "after") if made.__dict__[name])

        def pool(x: Tensor) -> Any:
            made.__dict__["training"] = self.module.training
            return made(x)

        return pool


class _PoolingFunction:
    def __init__(self, name: str, more: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.name, self.more, self.named = name, more, named

    def __call__(self, before: Any, after: Any) -> Any:
        named = self.named | {name: given for name, given in (("before", before), ("after", after)) if given}
        return _Call(getattr(functional, self.name), self.more, named)


def part_of_module(module: nn.Module) -> Part | str | None:
    """A part; why there is none of a layer that might be one; None: another layer."""
    kind, name = type(module), type(module).__name__
    if kind not in KNOWN:
        if hasattr(module, "parametrizations"):
            return f"{name} has a parametrization"
        return conversion._why_kept(module, conversion._SWAPS)
    if alteration := altered(module):
        return f"{name} has {alteration}"
    if kind in _CONVOLUTIONS:
        activates = vars(module).get("after") or "after" in module._modules
        return f"{name} has an activation already" if activates else Part("conv", name, module, module, None)
    if kind in _NORMS:
        if module.training or module.running_var is None:
            return f"{name} goes by the statistics of the batch"
        return Part("norm", name, module, module, module)
    if kind in MASKS:
        return f"{name} draws in training" if module.training and kind is not nn.Identity else Part("mask", name, module, module, None)
    if kind in activations.MODULES:
        if isinstance(module, nn.RReLU) and module.training:
            return "RReLU draws in training"
        # By name, convolutions remember their calls; parameters are read from the module at each.
        of, parameters = activations.MODULES[kind]
        step = module if parameters or kind is nn.GELU else of
        return Part("act", name, module, module, step, bool(getattr(module, "inplace", False)))
    if getattr(module, "return_indices", False):
        return f"{name} returns indices"
    if isinstance(module, fast._Beside) and module._more():
        return f"{name} has an activation already"
    why = conversion._why_kept(module, conversion._POOLINGS)
    return why or Part("pool", name, module, module, _PoolingModule(module))


def _given(function: Any, node: fx.Node) -> dict[str, Any] | None:
    """A call's arguments but the first by name, as far as they are given; None where that is not known."""
    try:
        bound = inspect.signature(function).bind(*node.args, **node.kwargs).arguments
    except (TypeError, ValueError):  # torch's built-in functions have no signature
        return dict(node.kwargs) if len(node.args) <= 1 else None
    return dict(list(bound.items())[1:])


def _applied(name: str, node: fx.Node) -> tuple[Applied, bool] | None:
    """An activation from a call of torch's function, and whether it is in place; None where the arguments are not understood."""
    from .kernels.activation import ACTIVATIONS

    wanted = () if name in ("relu", "gelu", "selu") else tuple(ACTIVATIONS[name].defaults)
    given = _given(node.target, node)
    if given is None and len(node.args) - 1 <= len(wanted):
        given = dict(zip(wanted, node.args[1:], strict=False)) | dict(node.kwargs)
    if given is None or name in ("prelu", "rrelu"):
        return None
    given.pop("input", None)
    in_place = bool(given.pop("inplace", False)) or str(getattr(node.target, "__name__", node.target)).endswith("_")
    if given.pop("approximate", "none") == "tanh":
        name = "gelu_tanh"
    values = {**ACTIVATIONS[name].defaults, **given}
    if set(given) - set(wanted) or not all(isinstance(value, (int, float)) for value in values.values()):
        return None
    return activations.named(CALLER, name, tuple(map(float, values.values()))), in_place


def part_of_call(node: fx.Node) -> Part | str | None:
    more, named = node.args[1:], {name: value for name, value in node.kwargs.items() if name != "input"}
    if node.op == "call_function" and node.target in _POOLED:
        name = _POOLED[node.target]
        given = _given(getattr(functional, name), node)
        if given is None:
            return f"{name}: its arguments are not understood"
        if given.get("return_indices"):
            return f"{name} returns indices"
        if any(given.get(word) is not None for word in functional._BESIDE):
            return f"{name} has an activation already"
        if name.startswith("lp_pool") and node.target is not getattr(functional, name) and float(given["norm_type"]) % 2:
            return f"{name} of norm_type {given['norm_type']}: torch raises x itself to a power that is not even, fastpool |x|"
        return Part("pool", name, _Call(node.target, more, named), None, _PoolingFunction(name, more, named))
    if node.op == "call_method" and node.target in _METHODS:
        name, call = str(node.target), _Call(operator.methodcaller(str(node.target)), (), {})
    elif node.op == "call_function" and node.target in _ELEMENTWISE:
        name, call = _ELEMENTWISE[node.target], _Call(node.target, more, named)
    else:
        name = getattr(node.target, "__name__", "")
        return f"{name} has no counterpart in fastpool" if node.op == "call_function" and "pool" in name else None
    found = _applied(name.rstrip("_"), node)
    return found and Part("act", name, call, None, *found)


# Forms


@dataclass(frozen=True)
class Form:
    """How a chain runs."""

    ours: bool = False
    """fastpool's convolution"""
    early: bool = False
    """with the activation in it; else that is the pooling's"""
    whole: bool = False
    """and with the pooling in it: the map between is never whole"""
    fuses: bool = True
    folds: bool = True
    """a batch-norm into the convolution's weights; else that is the pooling's, as the activation"""


STOOD = Form(fuses=False)


def passes(parts: Sequence[Part], form: Form) -> list[tuple[Part, ...]]:
    """The parts, by passes over memory."""
    if not form.fuses:
        return [(part,) for part in parts]
    parts = [part for part in parts if part.role != "mask"]
    if form.whole:
        return [tuple(parts)]
    roles = [part.role for part in parts]
    at = 0
    if roles[0] == "conv":
        at = 1 + (form.folds and roles[1:2] == ["norm"])
        at += form.early and roles[at : at + 1] == ["act"]
    rest = tuple(parts[at:])
    return [tuple(parts[:at])] * bool(at) + ([rest] if "pool" in roles[at:] else [(part,) for part in rest])


def _made(group: tuple[Part, ...], form: Form) -> Callable[[Tensor], Any]:
    """What runs a pass."""
    roles = [part.role for part in group]
    if form.whole:
        return _ConvolvedAndPooled(group)
    if form.fuses and roles[0] == "conv" and (len(group) > 1 or form.ours):
        return _Convolved(group, form.ours)
    if form.fuses and "pool" in roles:
        at = roles.index("pool")
        before, after = (tuple(part.fused for part in side) for side in (group[:at], group[at + 1 :]))
        return group[at].fused(before or None, after or None)
    return functools.partial(stepwise, group)


def stepwise(parts: Sequence[Part], x: Tensor) -> Any:
    for part in parts:
        x = part.call(x)
    return x


_SHORT = (torch.float16, torch.bfloat16)


def _in_16_bits(x: Tensor) -> bool:
    kind = x.device.type
    return x.dtype in _SHORT or (torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) in _SHORT)


class _Convolved:
    """A convolution with a batch-norm in its weights, and fastpool's with an activation too."""

    def __init__(self, group: tuple[Part, ...], ours: bool) -> None:
        self.group, self.conv, self.runs = group, group[0].module, group[0].module
        self.norm = next((part.module for part in group if part.role == "norm"), None)
        self.folded = _Folded()
        if ours:
            self.runs = shallow(self.conv)
            self.runs.__class__ = conversion._SWAPS.get(type(self.conv), type(self.conv))
            self.runs.__dict__.pop("_kept", None)
            # Parameters are given at each call: they may become others in the model's module.
            self.runs.__dict__["after"] = next((part.fused for part in group if part.role == "act"), None)

    def __call__(self, x: Tensor) -> Any:
        if self.norm is None:
            return self.convolve(x, self.conv.weight, self.conv.bias)
        if _in_16_bits(x):  # of a model that was converted, or under autocast
            return stepwise(self.group, x)
        if torch.is_grad_enabled() and any(p.requires_grad for m in (self.conv, self.norm) for p in m.parameters(False)):
            return stepwise(self.group, x)
        return self.convolve(x, *self.folded(self.conv, self.norm))

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        return self.runs._conv_forward(x, weight, bias)


class _ConvolvedAndPooled(_Convolved):
    """All in one launch."""

    def __init__(self, group: tuple[Part, ...]) -> None:
        super().__init__(group, False)
        pool = group[-1].module
        self.window = ("max" if isinstance(pool, nn.MaxPool2d) else "avg", pool.kernel_size, pool.stride, pool.padding)
        self.act, self.kept = next((part.fused for part in group if part.role == "act"), None), Kept()

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        geometry = self.conv.stride, self.conv.padding, self.conv.dilation, self.conv.groups
        return functional.conv_pooled(x, weight, bias, geometry, None, self.act, self.window, self.kept)


class _Folded:
    """A convolution's weight and bias with a batch-norm in them, until one of these changes.

    A change in place raises a tensor's version; what is done to ``parameter.data`` does not, so its address and, on a CPU, some of its
    numbers are compared too, as of packed weights.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor | None] = []
        self.key: Any = None
        self.memory: list[Tensor] = []
        """So that no other tensor comes to lie there; on a CPU the views would do."""
        self.views: list[Any] = []
        self.samples: list[bytes] = []
        self.found: tuple[Tensor, Tensor] | None = None

    def __call__(self, conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            return _fold(conv, norm)
        tensors = [conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias]
        there = [t for t in tensors if t is not None]
        key = None if any(t.is_inference() for t in there) else (norm.eps, state_of(there))
        same = key is not None and key == self.key and all(map(operator.is_, tensors, self.tensors))
        if self.found is None or not same or self.samples != [view.tobytes() for view in self.views]:
            self.found = _fold(conv, norm)
            self.tensors, self.key, self.memory = tensors, key, [t.detach() for t in there]
            self.views = [] if key is None or conv.weight.is_cuda else [samples_of(t) for t in there]
            self.samples = [view.tobytes() for view in self.views]
        return self.found


def _fold(conv: Any, norm: Any) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        scale, shift = fusion.folded(norm)
        weight = conv.weight * scale.view(-1, *(1,) * (conv.weight.dim() - 1)).to(conv.weight.dtype)
        bias = shift if conv.bias is None else torch.addcmul(shift, conv.bias.to(shift.dtype), scale)
        return weight, bias.to(weight.dtype)


def _is_cast(part: Part) -> bool:
    """Whether torch's autocast computes it in float32: poolings of three axes on a CPU, powers and softplus on a GPU."""
    name = part.shown.lower().replace("_", "")
    return name.startswith(("lppool", "softplus")) or (part.role == "pool" and name.endswith("3d"))


class Site(nn.Module):
    """A chain in a form.  It owns none of the modules: these stay where the model has them."""

    parts: tuple[Part, ...]
    form: Form
    made: list[Callable[[Tensor], Any]]
    moody: list[nn.Module]
    cast: bool

    def __init__(self, parts: Sequence[Part], form: Form) -> None:
        super().__init__()
        named = {"parts": tuple(parts), "form": form, "made": [_made(group, form) for group in passes(parts, form)]}
        named["moody"] = [p.module for p in parts if p.role in ("norm", "mask") or isinstance(p.module, nn.RReLU)]
        named["cast"] = any(_is_cast(part) for part in parts)
        self.__dict__.update(named)

    def extra_repr(self) -> str:
        return described(self.parts, self.form)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Site, (self.parts, self.form)

    def forward(self, x: Tensor) -> Any:
        # Batch-norm and dropout are what evaluation makes of them until somebody calls train().
        if any(module.training for module in self.moody) or (self.cast and torch.is_autocast_enabled(x.device.type)):
            return stepwise(self.parts, x)
        for run in self.made:
            x = run(x)
        return x


def forms(parts: Sequence[Part], measured: bool) -> list[Form]:
    """What may stand in the place of a chain, the best guess first; fastpool's convolution only where its time can be seen."""
    roles = {part.role for part in parts}
    folds = not is_unfolded(parts)
    found = []
    if "pool" in roles or ({"conv", "norm"} <= roles and folds):
        found.append(Form(folds=folds))
    if measured and "conv" in roles:
        found.append(Form(ours=True, folds=folds))
        acts = _acts_behind_convolution(parts)
        takes = all(map(_can_follow, acts)) and (folds or "norm" not in roles)
        if acts and takes:
            found.append(Form(ours=True, early=True))
        if takes and _is_one_launch(parts):
            found.append(Form(ours=True, early=True, whole=True))
    return found


def is_unfolded(parts: Sequence[Part]) -> bool:
    """Whether a batch-norm stays out of the weights: rounded to 16 bits once more, with it in them, they made errors of 1.2 to 1.7 times
    the size."""
    return parts[0].role == "conv" and parts[0].module.weight.dtype in _SHORT and any(part.role == "norm" for part in parts)


def _acts_behind_convolution(parts: Sequence[Part]) -> list[Part]:
    return [part for part in itertools.takewhile(lambda part: part.role != "pool", parts) if part.role == "act"]


def _can_follow(act: Part) -> bool:
    """Whether fastpool's convolution takes the activation."""
    try:
        return isinstance(act.fused, Applied) or activations.of(CALLER, act.fused) is not None
    except ValueError:  # a PReLU that learns, or has a slope a channel
        return False


def _is_one_launch(parts: Sequence[Part]) -> bool:
    """Whether conv_pool2d has the convolution and the pooling, and nothing is left over."""
    conv, pool = parts[0].module, parts[-1].module
    if not isinstance(conv, nn.Conv2d) or conv.padding_mode != "zeros" or len(_acts_behind_convolution(parts)) > 1:
        return False
    if type(pool) in (nn.MaxPool2d, fast.MaxPool2d):  # MinPool2d is derived from torch's class
        return pool.dilation in (1, (1, 1)) and not pool.ceil_mode
    return type(pool) in (nn.AvgPool2d, fast.AvgPool2d) and pool.count_include_pad and pool.divisor_override is None and not pool.ceil_mode


def described(parts: Sequence[Part], form: Form) -> str:
    if not form.fuses:
        return ", ".join(part.shown for part in parts)
    said = []
    for group in passes(parts, form):
        roles = [part.role for part in group]
        if "pool" in roles and not form.whole:
            at = roles.index("pool")
            sides = zip(("before", "after"), (group[:at], group[at + 1 :]), strict=True)
            inside = ", ".join(f"{name}={' + '.join(part.shown for part in side)}" for name, side in sides if side)
            said.append(f"fastpool {group[at].shown}" + (f"({inside})" if inside else ""))
        else:
            ours = "fastpool " if form.ours and roles[0] == "conv" else ""
            said.append(ours + " + ".join(part.shown for part in group))
    return ", ".join(said)


def law_of(parts: Sequence[Part]) -> str:
    """The class of the law for the layer and the pooling that follow each other."""
    parts = [part for part in parts if part.role != "mask"]
    for one, other in itertools.pairwise(parts):
        if "pool" in (one.role, other.role) and "conv" not in (one.role, other.role):
            first, second = (p.module or (p.fused.name if p.role == "act" else getattr(functional, p.shown)) for p in (one, other))
            try:
                return commutes(first, second).kind
            except (TypeError, ValueError):
                return "-"
    return "-"
