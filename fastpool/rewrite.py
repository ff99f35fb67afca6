"""``optimize``: a copy of a model with the layers around its poolings in the cheapest exact form.

The model is traced (torch.fx).  Around each pooling a *chain* is found: convolution, batch-norm in evaluation, activation, pooling,
activation, as far as nothing else reads or hooks what stands between.  Its forms are what stood there; the batch-norm folded into the
convolution and the activation in the pooling; both in fastpool's convolution.  They give the same results by construction: by the laws, or
by evaluating as elements are read.  An example input decides between them by time, and holds the whole against the original.
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from . import activations, conversion, functional, fusion
from . import nn as fast
from .activations import Applied
from .convolution import Kept
from .laws import commutes
from .measuring import medians
from .report import Report, Row

Tensor = torch.Tensor

CALLER = "optimize"
FASTER = 0.98
"""A form replaces what stood there where it takes at most this part of its time."""
WORSE = 1.0
"""The new model replaces the original where it takes at most this part of its time."""
ROUNDING = 16 * 2.0**-24
"""Of the largest number, beside twice the original's error: what summing in another order may do to numbers that torch had by luck."""
SECONDS = 0.4
"""Of timing, a site and the whole model, at most; but each form is called five times at least."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, fast.Conv1d, fast.Conv2d, fast.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_MASKS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_POOLINGS: dict[type[nn.Module], type[nn.Module]] = {
    **conversion._POOLINGS,
    **{ours: ours for ours in vars(fast).values() if isinstance(ours, type) and issubclass(ours, fast._Beside)},
}
_FRESH = (operator.add, torch.add, torch.cat, torch.mul, operator.mul)
"""Functions whose result is nobody else's memory."""


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
    if "pool" in name and "unpool" not in name and hasattr(home, name)
}


class _Part(NamedTuple):
    """One layer of a chain."""

    role: str
    """conv, norm, act, mask or pool"""
    shown: str
    call: Callable[[Tensor], Tensor]
    """As it stands in the model."""
    module: Any
    """The nn.Module, or None of a function."""
    fused: Any
    """act: what ``before`` and ``after`` take; pool: (before, after) -> the pooling with these."""
    in_place: bool = False


class _Call:
    """A function of one tensor, with its other arguments."""

    def __init__(self, function: Any, more: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.function, self.more, self.named = function, more, named

    def __call__(self, x: Tensor) -> Any:
        return self.function(x, *self.more, **self.named)

    def __deepcopy__(self, memo: Any) -> _Call:
        return self


def _shallow(module: nn.Module) -> Any:
    """The module as another object with the same parameters, buffers and children."""
    found = module.__new__(type(module))
    found.__dict__ = {name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
    return found


def _cloned(module: nn.Module, memo: dict[int, nn.Module]) -> Any:
    """A tree of modules that shares parameters and buffers with another."""
    if id(module) not in memo:
        memo[id(module)] = found = _shallow(module)
        for name, child in module._modules.items():
            found._modules[name] = None if child is None else _cloned(child, memo)
    return memo[id(module)]


def _is_hooked(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in names)


# Layers as parts


class _PoolingModule:
    """(before, after) -> fastpool's module with them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, before: Any, after: Any) -> Any:
        found = _shallow(self.module)
        found.__class__ = _POOLINGS[type(self.module)]
        for name, given in (("before", before), ("after", after)):
            if given is not None:
                # No child: its parameters and mode are those of the model's own module.
                found.__dict__[name] = given
                found.__dict__["_beside"] = (*found._more(), name)
        return found


class _PoolingFunction:
    def __init__(self, name: str, more: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.name, self.more, self.named = name, more, named

    def __call__(self, before: Any, after: Any) -> Any:
        return _Call(getattr(functional, self.name), self.more, {**self.named, "before": before, "after": after})


def _part_of_module(module: nn.Module) -> _Part | str | None:
    """A part; why there is none of a layer that might be one; None: another layer."""
    kind, name = type(module), type(module).__name__
    bases = [base for base in (*_CONVOLUTIONS, *_NORMS, *_MASKS, *activations.MODULES, *_POOLINGS) if isinstance(module, base)]
    if not bases and kind is not nn.Identity:
        return None
    if bases and kind not in bases:
        return f"{name} is derived from {bases[0].__name__}, and may have changed it"
    if _is_hooked(module):
        return f"{name} has hooks"
    if kind in _CONVOLUTIONS:
        return _Part("conv", name, module, module, None)
    if kind in _NORMS:
        if module.training or module.running_var is None:
            return f"{name} goes by the statistics of the batch"
        return _Part("norm", name, module, module, module)
    if kind in _MASKS or kind is nn.Identity:
        return f"{name} draws in training" if module.training and kind is not nn.Identity else _Part("mask", name, module, module, None)
    if kind in activations.MODULES:
        if isinstance(module, nn.RReLU) and module.training:
            return "RReLU draws in training"
        return _Part("act", name, module, module, module, bool(getattr(module, "inplace", False)))
    if getattr(module, "return_indices", False):
        return f"{name} returns indices"
    why = conversion._why_kept(module, conversion._POOLINGS)
    return why or _Part("pool", name, module, module, _PoolingModule(module))


def _applied(name: str, more: tuple[Any, ...], named: dict[str, Any]) -> Applied | None:
    """An activation from the arguments of torch's function; None where they are not understood."""
    named = {k: v for k, v in named.items() if k != "inplace"}
    if name == "gelu" and not more and set(named) <= {"approximate"}:
        return activations.named(CALLER, "gelu_tanh" if named.get("approximate") == "tanh" else "gelu")
    if not more and not named:
        return None if name in ("prelu", "threshold", "rrelu") else activations.named(CALLER, name)
    from .kernels.activation import ACTIVATIONS

    wanted = list(ACTIVATIONS[name].defaults)
    values = dict(zip(wanted, more, strict=False)) | named
    if name in ("prelu", "rrelu") or set(values) - set(wanted) or not all(isinstance(v, (int, float)) for v in values.values()):
        return None
    return activations.named(CALLER, name, tuple(float(values.get(k, ACTIVATIONS[name].defaults[k])) for k in wanted))


def _part_of_call(node: fx.Node) -> _Part | str | None:
    more, named = node.args[1:], dict(node.kwargs)
    named.pop("input", None)
    if node.op == "call_function" and node.target in _POOLED:
        name = _POOLED[node.target]
        if more[6:7] == (True,) or named.get("return_indices"):
            return f"{name} returns indices"
        if {"before", "after", "affine"} & named.keys():
            return None
        norm: Any = more[0] if more else named.get("norm_type", 1)
        if name.startswith("lp_pool") and norm % 2:
            return f"{name} of an uneven norm_type: torch raises x itself to that power, fastpool |x|"
        return _Part("pool", name, _Call(node.target, more, named), None, _PoolingFunction(name, more, named))
    if node.op == "call_method" and node.target in _METHODS:
        name, call = str(node.target), _Call(operator.methodcaller(str(node.target)), (), {})
    elif node.op == "call_function" and node.target in _ELEMENTWISE:
        name, call = _ELEMENTWISE[node.target], _Call(node.target, more, named)
    else:
        return None
    in_place = name.endswith("_") or bool(named.get("inplace"))
    places = inspect.signature(nn.functional.relu).parameters
    if name.rstrip("_") == "relu" and len(more) == len(places) - 1:
        in_place, more = in_place or bool(more[0]), ()
    found = _applied(name.rstrip("_"), more, named)
    return _Part("act", name, call, None, found, in_place) if found else None


def _source(node: fx.Node) -> fx.Node | None:
    """The one node that a node reads."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, fx.Node) and len(node.all_input_nodes) == 1 else None


class _Chain(nn.Module):
    """Some parts, and the form they run in.  It owns none of their modules: these stay where the model has them."""

    parts: tuple[_Part, ...]
    form: str
    folded: _Folded
    made: Callable[[_Chain, Tensor], Any]

    def __init__(self, parts: Sequence[_Part], form: str) -> None:
        super().__init__()
        self.__dict__["parts"] = tuple(parts)
        self.__dict__["folded"] = _Folded()
        self.take(form)

    def take(self, form: str) -> _Chain:
        self.__dict__["form"] = form
        self.__dict__["made"] = _FORMS[form](self.parts)
        return self

    def extra_repr(self) -> str:
        return described(self.parts, self.form)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Chain:
        parts = [
            part._replace(**{name: copy.deepcopy(getattr(part, name), memo) for name in ("call", "module", "fused")}) for part in self.parts
        ]
        return _Chain(parts, self.form)

    def forward(self, x: Tensor) -> Any:
        # What a form takes as fixed may have changed since: a call of train().
        if any(part.module is not None and part.module.training and part.role in ("norm", "mask") for part in self.parts):
            return stepwise(self.parts, x)
        return self.made(self, x)


def stepwise(parts: Sequence[_Part], x: Tensor) -> Any:
    for part in parts:
        x = part.call(x)
    return x


class _Folded:
    """A convolution's weight and bias with a batch-norm in them, until one of these changes."""

    def __init__(self) -> None:
        self.key: Any = None
        self.found: Any = None

    def __call__(self, conv: Any, norm: Any) -> tuple[Tensor, Tensor | None]:
        tensors = [conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias]
        key = None
        if not any(t is not None and t.is_inference() for t in tensors):
            key = tuple(None if t is None else (id(t), t._version) for t in tensors)
        if key is None or key != self.key:
            with torch.no_grad():
                scale, shift = fusion.folded(norm)
                weight = conv.weight * scale.view(-1, *(1,) * (conv.weight.dim() - 1))
                bias = shift if conv.bias is None else torch.addcmul(shift, conv.bias, scale)
            self.key, self.found = key, (weight, bias.to(weight.dtype))
        return self.found


def _split(parts: Sequence[_Part]) -> tuple[dict[str, _Part], Any, Any]:
    """The parts by role but activations; those before and after the pooling."""
    by_role = {part.role: part for part in parts if part.role != "act"}
    roles = [part.role for part in parts]
    at = roles.index("pool") if "pool" in roles else len(roles)
    before = tuple(part.fused for part in parts[:at] if part.role == "act")
    after = tuple(part.fused for part in parts[at + 1 :] if part.role == "act")
    return by_role, before, after


def _needs_steps(x: Tensor, *modules: Any) -> bool:
    return torch.is_grad_enabled() and any(p.requires_grad for m in modules for p in m.parameters())


def _given(steps: tuple[Any, ...]) -> Any:
    return steps if steps else None


def _as_it_stood(parts: Sequence[_Part]) -> Any:
    return lambda chain, x: stepwise(chain.parts, x)


def _in_pooling(parts: Sequence[_Part]) -> Any:
    """The batch-norm in the convolution, if there is one, else with the activations in the pooling, if there is one."""
    by_role, before, after = _split(parts)
    conv, norm = by_role.get("conv"), by_role.get("norm")
    if norm and not conv:
        before = (norm.module, *before)
    pool = by_role["pool"].fused(_given(before), _given(after)) if "pool" in by_role else None
    rest = [part for part in parts if part.role == "act"] if pool is None else []

    def run(chain: _Chain, x: Tensor) -> Any:
        if conv:
            if norm and not _needs_steps(x, conv.module, norm.module):
                x = conv.module._conv_forward(x, *chain.folded(conv.module, norm.module))
            else:
                x = conv.call(x)
                x = norm.call(x) if norm else x
        return pool(x) if pool is not None else stepwise(rest, x)

    return run


def _in_convolution(parts: Sequence[_Part]) -> Any:
    """Batch-norm and activation in fastpool's convolution, the pooling after it."""
    by_role, before, after = _split(parts)
    conv, norm = by_role["conv"], by_role.get("norm")
    ours = _shallow(conv.module)
    if type(conv.module) in conversion._SWAPS:
        ours.__class__ = conversion._SWAPS[type(conv.module)]
    ours.__dict__.pop("_kept", None)
    first, *more = before or (None,)
    ours.__dict__["after"] = first
    pool = by_role["pool"].fused(_given(tuple(more)), _given(after)) if "pool" in by_role else None

    def run(chain: _Chain, x: Tensor) -> Any:
        if norm and _needs_steps(x, conv.module, norm.module):
            return stepwise(chain.parts, x)
        weight, bias = chain.folded(conv.module, norm.module) if norm else (conv.module.weight, conv.module.bias)
        y = ours._conv_forward(x, weight, bias)
        return y if pool is None else pool(y)

    return run


def _in_one_launch(parts: Sequence[_Part]) -> Any:
    """Batch-norm, activation and pooling in the convolution: the map between is never whole."""
    by_role, before, _ = _split(parts)
    conv, norm, pool, kept = by_role["conv"].module, by_role.get("norm"), by_role["pool"].module, Kept()
    window = ("max" if isinstance(pool, nn.MaxPool2d) else "avg", pool.kernel_size, pool.stride, pool.padding)

    def run(chain: _Chain, x: Tensor) -> Any:
        if norm and _needs_steps(x, conv, norm.module):
            return stepwise(chain.parts, x)
        weight, bias = chain.folded(conv, norm.module) if norm else (conv.weight, conv.bias)
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        return functional.conv_pooled(x, weight, bias, geometry, None, before[0] if before else None, window, kept)

    return run


def _is_one_launch(parts: Sequence[_Part]) -> bool:
    """Whether conv_pool2d has the convolution and the pooling, and nothing is left over."""
    by_role, before, after = _split(parts)
    conv, pool = (by_role[role].module if role in by_role else None for role in ("conv", "pool"))
    if not isinstance(conv, nn.Conv2d) or conv.padding_mode != "zeros" or len(before) > 1 or after:
        return False
    if isinstance(pool, nn.MaxPool2d):
        return pool.dilation in (1, (1, 1)) and not pool.ceil_mode
    return isinstance(pool, nn.AvgPool2d) and pool.count_include_pad and pool.divisor_override is None and not pool.ceil_mode


_FORMS = {"as it stood": _as_it_stood, "pooling": _in_pooling, "convolution": _in_convolution, "one launch": _in_one_launch}


def forms(parts: Sequence[_Part], measured: bool) -> list[str]:
    """What may stand in the place of a chain, the best guess first; fastpool's convolution only where its time can be seen."""
    roles = {part.role for part in parts}
    found = []
    if "pool" in roles or {"conv", "norm"} <= roles:
        found.append("pooling")
    if measured and "conv" in roles and _can_follow(parts):
        found.append("convolution")
        if _is_one_launch(parts):
            found.append("one launch")
    return found


def _can_follow(parts: Sequence[_Part]) -> bool:
    """Whether fastpool's convolution takes the activation."""
    conv, (_, before, _) = next(part for part in parts if part.role == "conv"), _split(parts)
    if conv.module is None or getattr(conv.module, "after", None) is not None:
        return False
    try:
        return not before or isinstance(before[0], Applied) or activations.of(CALLER, before[0]) is not None
    except ValueError:  # a PReLU that learns, or has a slope a channel
        return False


def described(parts: Sequence[_Part], form: str) -> str:
    if form == "as it stood":
        return ", ".join(part.shown for part in parts)
    roles = {part.role: part.shown for part in parts}
    at = [part.role for part in parts].index("pool") if "pool" in roles else len(parts)
    before, after = ([part.shown for part in side if part.role == "act"] for side in (parts[:at], parts[at + 1 :]))
    conv, norm, pool = (roles.get(role, "") for role in ("conv", "norm", "pool"))
    if form == "one launch":
        return " + ".join(filter(None, ["fastpool " + conv, norm, *before, pool]))
    if form == "convolution":
        first, before = ["fastpool " + conv, norm, *before], []
    elif conv or not pool:
        first = [conv, norm]
    else:
        first, before = [], [*filter(None, [norm]), *before]
    said = [" + ".join(filter(None, first))]
    if not pool:
        return ", ".join(filter(None, [*said, *before]))
    inside = [f"{name}={' + '.join(shown)}" for name, shown in (("before", before), ("after", after)) if shown]
    return ", ".join(filter(None, [*said, f"fastpool {pool}" + (f"({', '.join(inside)})" if inside else "")]))


def law_of(parts: Sequence[_Part]) -> str:
    """The class of the law for the activation and the pooling that follow each other."""
    for one, other in pairwise(parts):
        if {one.role, other.role} == {"act", "pool"}:
            act, pool = (one, other) if one.role == "act" else (other, one)
            try:
                first = act.module if act.module is not None else act.fused.name
                second = pool.module if pool.module is not None else getattr(functional, pool.shown)
                return commutes(first, second).kind
            except (TypeError, ValueError):
                return "-"
    return "-"


# Finding chains


class _Found(NamedTuple):
    nodes: list[fx.Node]
    parts: list[_Part]
    why: str
    """What ended it before a layer that might have been part of it."""


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(autowrap_modules=(functional,))

    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        return type(m).__module__.startswith("fastpool.") or super().is_leaf_module(m, qualname)


def _part(node: fx.Node, modules: dict[str, nn.Module]) -> _Part | str | None:
    if _source(node) is None:
        return None
    return _part_of_module(modules[str(node.target)]) if node.op == "call_module" else _part_of_call(node)


def _writes_safely(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether what an in-place layer overwrites is nobody else's."""
    source = _source(node)
    if source is None or len(source.users) != 1:
        return False
    makes = (*_CONVOLUTIONS, *_NORMS, nn.Linear, *_POOLINGS)
    return source.target in _FRESH or (source.op == "call_module" and type(modules[str(source.target)]) in makes)


_BEFORE: dict[str, tuple[str, ...]] = {
    "pool": ("act", "norm", "conv", "mask"),
    "act": ("norm", "conv", "mask"),
    "norm": ("conv", "mask"),
    "mask": ("act", "norm", "conv", "mask"),
    "conv": (),
}
"""What may stand before a layer of a chain."""


def chains(graph: fx.Graph, modules: dict[str, nn.Module]) -> Iterator[_Found]:
    """Each pooling's chain, then those of the convolutions that are left, in no common node."""
    parts = {node: _part(node, modules) for node in graph.nodes}
    taken: set[fx.Node] = set()
    for role in ("pool", "act", "norm", "conv"):
        for node in graph.nodes:
            part = parts[node]
            if isinstance(part, str) and role == "pool" and ("Pool" in part or "pool" in part):
                yield _Found([node], [], part)
            if not isinstance(part, _Part) or part.role != role or node in taken:
                continue
            found = _chain(node, part, parts, modules, taken)
            if role == "pool" or any(p.role == "conv" for p in found.parts):
                taken.update(found.nodes)
                yield found


def _chain(node: fx.Node, part: _Part, parts: dict[fx.Node, Any], modules: dict[str, nn.Module], taken: set[fx.Node]) -> _Found:
    nodes, found, why = [node], [part], ""
    if part.in_place and not _writes_safely(node, modules):
        return _Found([node], [part], "")
    while (source := _source(nodes[0])) is not None:
        before = parts.get(source)
        if isinstance(before, str):
            why = before
            break
        last = next((p.role for p in found if p.role != "mask"), "mask")
        if not isinstance(before, _Part) or before.role not in _BEFORE[last] or source in taken:
            break
        if len(source.users) > 1:
            why = f"the result of {before.shown} is read elsewhere too"
            break
        if before.in_place and not _writes_safely(source, modules):
            why = f"{before.shown} overwrites what others may read"
            break
        nodes.insert(0, source)
        found.insert(0, before)
    if part.role == "pool" and len(node.users) == 1:
        (user,) = node.users
        behind = parts.get(user)
        if isinstance(behind, _Part) and behind.role == "act" and user not in taken:
            nodes.append(user)
            found.append(behind)
    return _Found(nodes, found, why)


# The whole


def optimize(
    model: nn.Module,
    example_input: Any = None,
    *,
    training: bool | None = None,
    progress: Callable[[int, int], None] = lambda done, sites: None,
) -> nn.Module:
    """A copy of ``model`` whose batch-norms in evaluation, activations and poolings that follow each other run in the cheapest exact form.

    ``example_input``: a tensor, or a tuple of what the model takes; with it the forms of each site are timed on what arrives there, and
    the one that stood there stays where none is quicker; outputs (and in training gradients) are held against the original's in
    float64; and both models are timed.  The original comes back, as a copy, where the new one is not right or not quicker.
    ``training``: for which mode; default: ``model.training``.  A form that evaluation allows steps aside after ``train()``.
    ``progress`` is told how many sites are done, of how many.

    The result is a torch.fx.GraphModule with ``report``: a row a site, and why what was left alone was.  A model that cannot be traced is
    rewritten submodule by submodule, and the report says so.  It shares parameters and buffers with ``model``, which is not changed,
    under the same names in the state_dict.

    Left alone: what another layer reads too, poolings that return indices, modules with hooks or parametrizations, layers that overwrite
    what others may read, batch-norm and dropout in training.  TypeError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{CALLER}: model must be a torch.nn.Module, got {type(model).__name__}")
    mode = model.training if training is None else training
    inputs = example_input if isinstance(example_input, tuple) else () if example_input is None else (example_input,)
    found = _cloned(model, {})
    if training is not None:
        found.train(training)
    report = Report(training=mode)
    rewritten = _rewritten(found, "", inputs, report, progress)
    if inputs and any(row.changed for row in report.rows):
        rewritten = _judged(found, rewritten, inputs, report)
    rewritten.report = report  # type: ignore[assignment]
    return rewritten


def _rewritten(model: nn.Module, name: str, inputs: tuple[Any, ...], report: Report, progress: Callable[[int, int], None]) -> nn.Module:
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # a tracer runs the model's own code, which may raise anything
        report.notes.append(f"{name or 'the model'} cannot be traced as a whole ({type(error).__name__}: {str(error).splitlines()[0]})")
        arriving = _arriving(model, inputs) if inputs else {}
        found = _shallow(model)
        for child, module in model._modules.items():
            if module is not None and not _Tracer().is_leaf_module(module, child):
                found._modules[child] = _rewritten(module, f"{name}.{child}".lstrip("."), arriving.get(child, ()), report, progress)
            elif module is not None:
                found._modules[child] = _alone(module, f"{name}.{child}".lstrip("."), report)
        return found
    return _rewritten_graph(model, graph, name, inputs, report, progress)


def _alone(module: nn.Module, name: str, report: Report) -> nn.Module:
    """A layer that the code of its parent calls: its pooling is fastpool's."""
    part = _part_of_module(module)
    if isinstance(part, _Part) and part.role == "pool" and type(module) in conversion._POOLINGS:
        report.rows.append(Row(name, part.shown, f"fastpool {part.shown}", True))
        return part.fused(None, None)
    return module


def _arriving(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """What each child is called with, the first time."""
    seen: dict[str, tuple[Any, ...]] = {}
    handles = [
        child.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args) and None)
        for name, child in model.named_children()
    ]
    try:
        with torch.no_grad(), torch.random.fork_rng(), _kept_buffers(model):
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class _kept_buffers:  # noqa: N801
    """A model's buffers as they were, whatever runs."""

    def __init__(self, *models: nn.Module) -> None:
        self.buffers = [buffer for model in models for buffer in model.buffers()]

    def __enter__(self) -> None:
        self.values = [buffer.clone() for buffer in self.buffers]

    def __exit__(self, *_: Any) -> None:
        with torch.no_grad():
            for buffer, value in zip(self.buffers, self.values, strict=True):
                buffer.copy_(value)


class _Recorder(fx.Interpreter):
    """Keeps what some nodes give."""

    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self.wanted, self.seen = wanted, dict[fx.Node, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        if n in self.wanted and isinstance(found, Tensor):
            self.seen[n] = found.detach().clone()
        return found


def _rewritten_graph(
    model: nn.Module, graph: fx.Graph, name: str, inputs: tuple[Any, ...], report: Report, progress: Callable[[int, int], None]
) -> nn.Module:
    modules = dict(model.named_modules())
    sites = list(chains(graph, modules))
    order = {node: i for i, node in enumerate(graph.nodes)}
    sites.sort(key=lambda site: order[site.nodes[0]])
    result = fx.GraphModule(model, graph, type(model).__name__)
    sources = [_source(site.nodes[0]) for site in sites]
    seen: dict[fx.Node, Tensor] = {}
    if inputs:
        recorder = _Recorder(result, {source for source in sources if source is not None})
        with torch.no_grad(), torch.random.fork_rng(), _kept_buffers(model):
            recorder.run(*inputs)
        seen = recorder.seen
    for i, (site, source) in enumerate(zip(sites, sources, strict=True)):
        progress(i, len(sites))
        last = site.nodes[-1]
        place = f"{name}.{last.target if last.op == 'call_module' else last.name}".lstrip(".")
        if not site.parts:
            report.rows.append(Row(place, str(last.target), "", False, why=site.why))
            continue
        assert source is not None
        row, form = _chosen(site, seen.get(source), report.training)
        report.rows.append(replace(row, place=place))
        if form == "as it stood":
            continue
        target = f"fused_{i}"
        result.add_submodule(target, _Chain(site.parts, form))
        with graph.inserting_after(last):
            new = graph.call_module(target, (_source(site.nodes[0]),))
        last.replace_all_uses_with(new)
        for node in reversed(site.nodes):
            graph.erase_node(node)
    # All the model has stays where it was: folded layers are read, and found in the state_dict, there.
    result._modules.update(model._modules)
    result._parameters.update(model._parameters)
    result._buffers.update(model._buffers)
    result.training = model.training
    result.recompile()
    return result


def _chosen(site: _Found, x: Tensor | None, training: bool) -> tuple[Row, str]:
    """What is to stand in the place of a chain, and the row that says so."""
    parts, measured = site.parts, x is not None
    candidates = forms(parts, measured)
    row = Row("", described(parts, "as it stood"), "", False, law=law_of(parts), why=site.why)
    if not candidates:
        return replace(row, why=site.why or "nothing to fuse"), "as it stood"
    if x is None:
        form = candidates[0]
        return replace(row, stands=described(parts, form), changed=True), form
    calls = {form: _call(_Chain(parts, form), x, training) for form in ("as it stood", *candidates)}
    ms = medians(calls, SECONDS)
    best = min(candidates, key=lambda form: ms[form])
    row = replace(row, before_ms=ms["as it stood"], after_ms=ms[best], bytes_saved=_moved(parts, best, x))
    if ms[best] > FASTER * ms["as it stood"]:
        return replace(row, bytes_saved=None, why=f"{described(parts, best)} is not quicker"), "as it stood"
    return replace(row, stands=described(parts, best), changed=True), best


def _moved(parts: Sequence[_Part], form: str, x: Tensor) -> int:
    """Bytes of maps between layers that are no longer written and read again."""
    pools, moved = any(part.role == "pool" for part in parts), 0
    with torch.no_grad():
        for one, other in pairwise(parts):
            x = one.call(x.clone() if one.in_place else x)
            if form == "one launch":
                joined = True
            elif form == "convolution":
                joined = other.role in ("norm", "act")
            else:
                joined = (one.role, other.role) == ("conv", "norm") or (pools and one.role != "conv")
            moved += 2 * x.numel() * x.element_size() if joined and one.role != "mask" else 0
    return moved


def _call(chain: Callable[[Tensor], Tensor], x: Tensor, training: bool) -> Callable[[], object]:
    if not training:

        def forward() -> object:
            with torch.no_grad():
                return chain(x)

        return forward
    leaf = x.detach().requires_grad_(x.is_floating_point())
    weights = [p for part in getattr(chain, "parts", ()) if part.module is not None for p in part.module.parameters() if p.requires_grad]
    with torch.no_grad():
        gy = torch.ones_like(chain(x.clone()))
    # A copy for layers that overwrite their input; every form pays it.
    return lambda: torch.autograd.grad(chain(leaf.clone()), [leaf, *weights], gy, allow_unused=True)


# The verdict


def _judged(before: nn.Module, after: nn.Module, inputs: tuple[Any, ...], report: Report) -> nn.Module:
    """``after`` if it is right and quicker, else ``before``, as a graph where it can be one."""
    with _kept_buffers(before, after):
        truth = _results(copy.deepcopy(before).double(), tuple(_double(t) for t in inputs), report.training)
        theirs, ours = (_results(model, inputs, report.training) for model in (before, after))
        report.error, report.torch_error = (max(map(_apart, found, truth), default=0.0) for found in (ours, theirs))
        # A gradient may be 0 but for rounding, as that of a bias before a batch-norm: rounding is of what was summed.
        size = max((float(t.abs().max()) for t in truth if t.numel()), default=0.0)
        right = all(_apart(a, t) <= 2 * _apart(b, t) + ROUNDING * size for a, b, t in zip(ours, theirs, truth, strict=True))
        if right:
            calls = {
                name: functools.partial(_run, model, inputs, report.training) for name, model in (("before", before), ("after", after))
            }
            ms = medians(calls, SECONDS)
            report.before_ms, report.after_ms = ms["before"], ms["after"]
    if right and ms["after"] <= WORSE * ms["before"]:
        return after
    report.notes.append(
        "the model stays as it was: " + ("as a whole it is not quicker" if right else f"results differ by {report.error:.2g}")
    )
    report.rows = [replace(row, changed=False, stands="") for row in report.rows]
    try:
        return fx.GraphModule(before, _Tracer().trace(before), type(before).__name__)
    except Exception:  # as above
        return before


def _double(t: Any) -> Any:
    return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t


def _tensors(found: Any) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    return [t for t in tree_leaves(found) if isinstance(t, Tensor) and t.is_floating_point()]


def _results(model: nn.Module, inputs: tuple[Any, ...], training: bool) -> list[Tensor]:
    """Outputs, and in training the gradients of inputs and parameters; the same draws each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [t.detach().double() for t in _run(model, inputs, training)]


def _run(model: nn.Module, inputs: tuple[Any, ...], training: bool) -> list[Tensor]:
    if not training:
        with torch.no_grad():
            return _tensors(model(*inputs))
    leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
    # Copies, for layers that overwrite what they are given.
    outputs = _tensors(model(*(t.clone() if isinstance(t, Tensor) else t for t in leaves)))
    sought = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad] + [p for p in model.parameters() if p.requires_grad]
    mean = torch.stack([t.sum() for t in outputs]).sum() / sum(t.numel() for t in outputs)
    return [*outputs, *(g for g in torch.autograd.grad(mean, sought, allow_unused=True) if g is not None)]


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0
