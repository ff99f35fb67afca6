"""Models as graphs of torch.fx: what a trace holds, where it would not do what the model does, and the chains of layers in it."""

from __future__ import annotations

import copy
import math
import operator
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from . import functional
from . import nn as fast
from .sites import CALLER, HOOKS, KNOWN, MASKS, Part, Site, is_hooked, part_of_call, part_of_module, shallow, source_of

_FRESH = (operator.add, torch.add, torch.cat, torch.mul, operator.mul)
"""Functions whose result is nobody else's memory."""
_AUGMENTED = (
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow, operator.imatmul),
    *(operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift),
)
"""x += y, and so on."""


# Modules that share what they hold


def cloned(model: nn.Module) -> nn.Module:
    """A tree of modules that shares parameters and buffers with another."""
    memo: dict[int, Any] = {}

    def clone(module: nn.Module) -> nn.Module:
        if id(module) not in memo:
            memo[id(module)] = found = module if isinstance(module, torch.jit.ScriptModule) else shallow(module)
            if found is not module:
                found._modules = {name: None if child is None else clone(child) for name, child in module._modules.items()}
                if isinstance(getattr(vars(found).get("forward"), "__self__", None), Optimized):
                    del found.__dict__["forward"]  # another's rewritten inside
        return memo[id(module)]

    found = clone(model)
    for module in list(found.modules()):
        for name, child in module._modules.items():
            if isinstance(child, (Site, Mode)):  # of a model that was rewritten before: they know modules that are not their children
                module._modules[name] = copy.deepcopy(child, dict(memo))
    return found


# Traces


HOLDERS = (nn.ModuleList, nn.ModuleDict)


def is_torchs(module: nn.Module) -> bool:
    """Whether it is a layer of torch's or fastpool's, not a container."""
    if isinstance(module, (Site, Mode, torch.jit.ScriptModule)) or type(module).__module__ == fast.__name__:
        return True
    return fx.Tracer().is_leaf_module(module, "")


class _Proxy(fx.Proxy):
    """torch.fx's takes x += y for x = x + y, which leaves the tensor as it was to those who know it by another name."""


def _augmented(operation: Any) -> Any:
    return lambda x, y: x.tracer.create_proxy("call_function", operation, (x, y), {})


for _operation in _AUGMENTED:
    setattr(_Proxy, f"__{_operation.__name__}__", _augmented(_operation))


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(autowrap_modules=(math, functional))  # type: ignore[arg-type]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        # Through a container's call its hooks would be traced, and run no more.
        return is_torchs(m) or is_hooked(m)


class UntraceableError(Exception):
    """Why a trace would not do what the model does."""


def graph_of(model: nn.Module) -> fx.Graph:
    """What the model's code does; Exceptions of every kind where it is no fixed list of operations."""
    if "forward" in vars(model):
        raise UntraceableError("its forward is not its class's")
    drawn, of_python = torch.get_rng_state(), random.getstate()
    graph = _Tracer().trace(model)
    if not torch.equal(drawn, torch.get_rng_state()) or of_python != random.getstate():
        torch.set_rng_state(drawn)
        random.setstate(of_python)
        raise UntraceableError("its code draws random numbers, which a trace would hold for constants")
    return graph


def asks_for_mode(model: nn.Module, graph: fx.Graph) -> bool:
    other = cloned(model).train(not model.training)
    try:
        return graph_of(other).python_code("self").src != graph.python_code("self").src
    except Exception:  # as in ``rewritten``
        return True


class Mode(nn.Module):
    """Stands at the start of a graph of code that asks for its mode: that of another mode would be another."""

    of: str
    asking: tuple[nn.Module | None, ...]
    """None: the model that this is a child of, whose mode it has."""
    modes: tuple[bool, ...]

    def __init__(self, name: str, asking: Sequence[nn.Module | None], modes: Sequence[bool], training: bool) -> None:
        super().__init__()
        self.__dict__.update(of=name, asking=tuple(asking), modes=tuple(modes), training=training)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Mode, (self.of, self.asking, self.modes, self.training)

    def forward(self) -> None:
        for module, then in zip(self.asking, self.modes, strict=True):
            if (self if module is None else module).training != then:
                said = ["evaluation", "training"]
                raise RuntimeError(
                    f"{CALLER}: {self.of} was rewritten for {said[then]}, and its code does something else in {said[not then]}: "
                    f"optimize the original with training={not then}"
                )


class Optimized(fx.GraphModule):
    """A GraphModule that keeps all the model has where it was, and so the state_dict, though its graph names little of it."""

    _KEPT = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", *HOOKS)

    def keep(self, model: nn.Module) -> None:
        for name in self._KEPT:
            if name in vars(model):
                self.__dict__[name] = copy.copy(vars(model)[name])
        for name, value in vars(model).items():  # tensors of the code too, which torch.fx makes buffers
            self.__dict__.setdefault(name, value)
        self.training = model.training

    def __deepcopy__(self, memo: Any) -> Any:
        found = super().__deepcopy__(memo)
        for name in (*self._KEPT, *(name for name in vars(self) if name not in vars(found))):
            found.__dict__[name] = copy.deepcopy(vars(self)[name], memo)
        return found

    def __reduce__(self) -> Any:
        make, args = super().__reduce__()
        return _restored, (make, args, {name: vars(self)[name] for name in self._KEPT})


def _restored(make: Any, args: Any, kept: dict[str, Any]) -> Any:
    found = make(*args)
    found.__dict__.update(kept)
    return found


# Chains


class Chain(NamedTuple):
    nodes: list[fx.Node]
    parts: list[Part]
    why: str
    """What ended it before a layer that might have been part of it."""


def _part(node: fx.Node, modules: dict[str, nn.Module]) -> Part | str | None:
    if source_of(node) is None:
        return None
    return part_of_module(modules[str(node.target)]) if node.op == "call_module" else part_of_call(node)


def _writes_safely(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether what an in-place layer overwrites is nobody else's."""
    source = node.args[0] if node.args else node.kwargs.get("input")
    return isinstance(source, fx.Node) and len(source.users) == 1 and _is_fresh(source, modules)


def _is_fresh(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a result is in no memory that another node's is in."""
    part = _part(node, modules)
    if node.target in _AUGMENTED or (isinstance(part, Part) and part.in_place):
        return _writes_safely(node, modules)
    if node.op == "call_module":
        module = modules[str(node.target)]  # in any mode; a hook might keep what it is shown
        return type(module) in (nn.Linear, *KNOWN) and type(module) not in MASKS and not is_hooked(module)
    return isinstance(part, Part) or node.target in _FRESH


_BEFORE: dict[str, tuple[str, ...]] = {
    "pool": ("act", "norm", "conv", "mask"),
    "act": ("norm", "conv", "mask"),
    "norm": ("conv", "mask"),
    "conv": (),
}
"""What may stand before a layer of a chain."""


def chains(graph: fx.Graph, modules: dict[str, nn.Module]) -> Iterator[Chain]:
    """Each pooling's chain, then those of the convolutions that are left, in no common node."""
    parts = {node: _part(node, modules) for node in graph.nodes}
    taken: set[fx.Node] = set()
    for role in ("pool", "act", "norm", "conv"):
        for node in graph.nodes:
            part = parts[node]
            if isinstance(part, str) and role == "pool" and "pool" in part.split()[0].lower():
                yield Chain([node], [], part)
            if not isinstance(part, Part) or part.role != role or node in taken:
                continue
            found = _chain(node, part, parts, modules, taken)
            if role == "pool" or found.parts[0].role == "conv":
                taken.update(found.nodes)
                yield found


def _chain(node: fx.Node, part: Part, parts: dict[fx.Node, Any], modules: dict[str, nn.Module], taken: set[fx.Node]) -> Chain:
    nodes, found, why = [node], [part], ""
    while (source := source_of(nodes[0])) is not None and source not in taken:
        before = parts.get(source)
        if isinstance(before, str):
            why = before
            break
        last = next(p.role for p in found if p.role != "mask")
        if not isinstance(before, Part) or before.role not in _BEFORE[last]:
            break
        if len(source.users) > 1:
            why = f"the result of {before.shown} is read elsewhere too"
            break
        if before.in_place and not _writes_safely(source, modules):
            why = f"{before.shown} overwrites what others may read"
            break
        nodes.insert(0, source)
        found.insert(0, before)
    while found[0].role == "mask":  # its result is the very tensor it read, which somebody may overwrite
        del nodes[0], found[0]
    if part.role == "pool" and len(node.users) == 1:
        (user,) = node.users
        behind = parts.get(user)
        if isinstance(behind, Part) and behind.role == "act" and user not in taken:
            nodes.append(user)
            found.append(behind)
    return Chain(nodes, found, why)
