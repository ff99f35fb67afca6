"""Models as graphs of torch.fx: what a trace holds, where it would not do what the model does, and the chains of layers in it."""

from __future__ import annotations

import copy
import math
import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from dis import opmap
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import attributes, functional
from . import nn as fast
from .sites import CALLER, KNOWN, MASKS, Part, Site, altered, part_of_call, part_of_module, shallow, source_of
from .verdict import Ambient, Example, drawn, signature_of, undrawn

Tensor = torch.Tensor

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
                if isinstance(vars(found).get("forward"), Inside):
                    del found.__dict__["forward"]
        return memo[id(module)]

    found = clone(model)
    for module in list(found.modules()):
        for name, child in module._modules.items():
            if _is_ours(child):  # of a model that was rewritten before: they know modules that are not their children
                module._modules[name] = copy.deepcopy(child, dict(memo))
        if not _is_ours(module) and not isinstance(module, torch.jit.ScriptModule):
            attributes.adopt(module, memo)
    return found


def _is_ours(module: nn.Module | None) -> bool:
    return isinstance(module, (Site, Mode, Given))


# Traces


HOLDERS = (nn.ModuleList, nn.ModuleDict)


def is_torchs(module: nn.Module) -> bool:
    """Whether it is a layer of torch's or fastpool's, not a container."""
    if _is_ours(module) or isinstance(module, torch.jit.ScriptModule) or type(module).__module__ == fast.__name__:
        return True
    return fx.Tracer().is_leaf_module(module, "")


class UntraceableError(Exception):
    """Why a trace would not do what the model does."""


def _asking() -> FrameType:
    """The code that looks at a proxy; by isinstance with nn.Parameter it does so through a method of that."""
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__") == "torch.nn.parameter" and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _is_fx(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("torch.fx")


def _asks_the_type(frame: FrameType) -> bool:
    """Whether a frame's code may, and not just one of torch's functions that it calls, as they see what they are given."""
    code = frame.f_code
    return not {"isinstance", "issubclass", "__class__"}.isdisjoint(code.co_names) or opmap["MATCH_CLASS"] in code.co_code[::2]


_ATTRIBUTES = frozenset(name for kind in (Tensor, torch.Size, torch.return_types.max, list, dict, str, float, int) for name in dir(kind))
"""Of what a proxy may stand for."""


class _Proxy(fx.Proxy):
    """A value that is not there yet, and so can answer no question about it.

    torch.fx's answers some as if it were there, and a trace follows one branch of the code without a word.
    """

    tracer: _Tracer

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        frame = _asking()
        if not _is_fx(frame) and _asks_the_type(frame):
            by_module = frame.f_code.co_name == "__setattr__"
            self.tracer.refuse("its code sets an attribute of a module" if by_module else "its code goes by the type of a value")
        return type(self)

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        if k not in _ATTRIBUTES and not _is_fx(_asking()):
            self.tracer.refuse(f"its code asks for an attribute {k}")
        return _Attribute(self, k)

    def __setattr__(self, name: str, value: Any) -> None:
        if not _is_fx(_asking()):
            self.tracer.refuse(f"its code sets an attribute {name} of a tensor")
        super().__setattr__(name, value)


class _Attribute(_Proxy, fx.proxy.Attribute):
    pass


def _augmented(operation: Any) -> Any:
    """torch.fx takes x += y for x = x + y, which leaves the tensor as it was to those who know it by another name."""
    return lambda x, y: x.tracer.create_proxy("call_function", operation, (x, y), {})


for _operation in _AUGMENTED:
    setattr(_Proxy, f"__{_operation.__name__}__", _augmented(_operation))


class _Held(_Proxy):
    """Of a parameter or buffer: its shape is the model's, not the input's."""

    def __init__(self, node: fx.Node, tracer: _Tracer, shape: torch.Size) -> None:
        super().__init__(node, tracer)
        vars(self).update(shape=shape, ndim=len(shape))

    def size(self, dim: int | None = None) -> Any:
        return vars(self)["shape"] if dim is None else vars(self)["shape"][dim]

    def dim(self) -> int:
        return len(self.size())

    def numel(self) -> int:
        return math.prod(self.size())

    def __len__(self) -> int:
        return int(self.size(0))


class _Tracer(fx.Tracer):
    def __init__(self, assumed: Mapping[str, Any] | None = None) -> None:  # a graph that is unpickled is traced again, by no arguments
        super().__init__(autowrap_modules=(math, functional))  # type: ignore[arg-type]
        self.assumed, self.around, self.refused = assumed or {}, Ambient.now(), ""
        self.names: dict[int, str] = {}
        self.constants: list[str] = []
        """Names of tensors that the code makes."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with attributes.as_buffers(root):  # torch.fx sees who reads those
            tensors = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
            self.names = {id(t): name for name, t in reversed(tensors)}
            return super().trace(root, concrete_args)

    def refuse(self, why: str) -> NoReturn:
        self.refused = self.refused or why  # the code may catch what is raised
        raise UntraceableError(why)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        # Of a buffer torch.fx takes the numbers, which may become others.
        if not isinstance(attr_val, Tensor) or id(attr_val) not in self.names:
            return attr_val
        if (name := self.names[id(attr_val)]) not in parameter_proxy_cache:
            made = self.create_proxy("get_attr", name, (), {}, proxy_factory_fn=lambda node: _Held(node, self, attr_val.shape))
            parameter_proxy_cache[name] = made
        return parameter_proxy_cache[name]

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        function, args = super().create_args_for_root(root_fn, is_module)
        names = [str(node.target).lstrip("*") for node in self.graph.nodes]
        return function, [args[0], *(copy.copy(self.assumed.get(name, arg)) for name, arg in zip(names, args[1:], strict=True))]

    def create_node(self, *args: Any, **named: Any) -> fx.Node:
        if Ambient.now() != self.around:
            self.refuse("its code turns gradients or autocast on or off, which a trace would not")
        return super().create_node(*args, **named)

    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        # Through a container's call its hooks would be traced, and run no more.
        return is_torchs(m) or bool(altered(m))

    def to_bool(self, obj: fx.Proxy) -> bool:
        self.refuse("its code goes by a value: if, while, and, or, not")

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        self.refuse("its code goes through a value of unknown length")

    def get_fresh_qualname(self, prefix: str) -> str:
        self.constants.append(name := super().get_fresh_qualname(prefix))
        return name


class _Watch(TorchDispatchMode):
    """Sees what is computed while a trace is made, once for all: refuses it of tensors that may change, and draws."""

    def __init__(self, tracer: _Tracer) -> None:
        super().__init__()
        self.tracer, self.made = tracer, list[Tensor]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.tracer.refuse("its code draws random numbers, which a trace would hold for constants")
        known = set(map(id, self.made))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if func is not torch.ops.aten.lift_fresh.default and not known.issuperset(map(id, given)):
            self.tracer.refuse("its code computes with tensors that are no parameters or buffers")
        found = func(*args, **(kwargs or {}))
        self.made += [t for t in tree_leaves(found) if isinstance(t, Tensor)]
        return found


class Trace(NamedTuple):
    graph: fx.Graph
    constants: dict[str, Any]
    """Tensors that the code makes."""

    def like(self, other: Trace) -> bool:
        if self.graph.python_code("self").src != other.graph.python_code("self").src or self.constants.keys() != other.constants.keys():
            return False
        return all(
            a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b))
            for a, b in zip(self.constants.values(), other.constants.values(), strict=True)
        )


def _traced(model: nn.Module, assumed: Mapping[str, Any]) -> Trace:
    """From a clone, which the code may change."""
    clone = cloned(model)
    state = attributes.State(clone)
    tracer = _Tracer(assumed)
    with _Watch(tracer):
        graph = tracer.trace(clone)
    if tracer.refused:
        raise UntraceableError(tracer.refused)
    if name := state.changed(but=frozenset(tracer.constants)):
        raise UntraceableError(f"its code changes {name}")
    return Trace(graph, {name: getattr(clone, name) for name in tracer.constants})


_METHODS = [
    name
    for name, value in vars(nn.Module).items()
    if callable(value) and name not in ("forward", "extra_repr", "_get_name") and (name == "__call__" or not name.startswith("__"))
]


def trace_of(model: nn.Module, example: Example | None = None) -> Trace:
    """What the model's code does; Exceptions of every kind where it is no fixed list of operations.

    ``example``: what it is called with, of which ``assumed`` holds some for constants.
    """
    if "forward" in vars(model):
        raise UntraceableError("its forward is not its class's")
    # A graph is of another class, whose methods these would be.
    other = [name for name in _METHODS if getattr(type(model), name) is not getattr(nn.Module, name)]
    if other and not isinstance(model, fx.GraphModule):
        raise UntraceableError(f"its class has a method {other[0]} of its own")
    given = assumed(model, example)
    before = drawn()
    with undrawn():
        trace = _traced(model, given)
        with torch.set_grad_enabled(not torch.is_grad_enabled()):
            again = _traced(model, given)
        if drawn() != before:
            raise UntraceableError("its code draws random numbers, which a trace would hold for constants")
    if not trace.like(again):
        raise UntraceableError("its code does something else each time, or with gradients")
    return trace


def asks_for_mode(model: nn.Module, trace: Trace, example: Example | None) -> bool:
    other = cloned(model).train(not model.training)
    try:
        return not trace_of(other, example).like(trace)
    except Exception:  # as in ``rewritten``
        return True


# What a graph takes for granted


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(part)
    else:
        yield value


def _is_one(value: Any) -> bool:
    """Whether code may ask by ``is`` what it is, which no proxy hears of."""
    return value is None or isinstance(value, bool)


def assumed(model: nn.Module, example: Example | None) -> dict[str, Any]:
    """The parameters of forward that a trace takes for what they are in the example, or by default."""
    given, found = {} if example is None else example.bound(model), dict[str, Any]()
    for name, parameter in signature_of(model).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if given.get(name):
                raise UntraceableError(f"it is called with arguments by way of {parameter}")
            found[name] = () if parameter.kind is parameter.VAR_POSITIONAL else {}
            continue
        value = given.get(name, parameter.default)
        leaves = list(_leaves(value))
        if any(isinstance(leaf, Tensor) for leaf in leaves):
            if any(map(_is_one, leaves)):
                raise UntraceableError(f"{name} holds tensors and what is none")
        elif value is not parameter.empty and not all(isinstance(leaf, (int, float, complex)) and not _is_one(leaf) for leaf in leaves):
            found[name] = value
    return found


def placed(graph: fx.Graph, model: nn.Module, example: Example) -> list[Any]:
    """The example's arguments by the graph's placeholders; what was assumed of others is not read."""
    given, nodes = example.bound(model), [node for node in graph.nodes if node.op == "placeholder" and not str(node.target).startswith("*")]
    return [given.get(str(node.target), *node.args) for node in nodes]


class OtherwiseError(RuntimeError):
    """A graph is called with what it was not made for."""


class Given(nn.Module):
    """Stands at the start of a graph: what was assumed is so, and the rest is there."""

    def __init__(self, of: str, names: Sequence[str], assumed: Mapping[str, Any]) -> None:
        super().__init__()
        self.of, self.names, self.assumed = of, tuple(names), dict(assumed)

    def forward(self, *values: Any) -> None:
        for name, value in zip(self.names, values, strict=True):
            if name in self.assumed:
                if not _is_the_same(value, then := self.assumed[name]):
                    raise OtherwiseError(
                        f"{CALLER}: {self.of} was rewritten for {name}={then!r}: give optimize an example_input with another"
                    )
            elif type(value) is not Tensor and any(map(_is_one, _leaves(value))):
                raise OtherwiseError(
                    f"{CALLER}: {self.of} was rewritten for tensors in {name}: give optimize an example_input with {value!r}"
                )


def _is_the_same(value: Any, then: Any) -> bool:
    if isinstance(then, (tuple, dict)) and not then:  # as torch.fx gives *args and **kwargs
        return isinstance(value, (tuple, list, dict)) and not value
    return value is then or (type(value) is type(then) and bool(value == then))


def guarded(model: nn.Module, graph: fx.Graph, example: Example | None) -> tuple[list[fx.Node], dict[str, Any]]:
    """The placeholders that are to be looked at in each call, if any, and what was assumed of them."""
    nodes, found = [node for node in graph.nodes if node.op == "placeholder"], assumed(model, example)
    if len(nodes) == 1 and not found and not any(user.target is operator.getitem for user in nodes[0].users):
        return [], found  # a model of nothing but None is none
    return nodes, found


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

    _KEPT = tuple(attributes.OWN - {"training"})

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
        kept = {name: value for name, value in vars(self).items() if name in self._KEPT or isinstance(value, Tensor)}
        return _restored, (make, args, kept)


def _restored(make: Any, args: Any, kept: dict[str, Any]) -> Any:
    found = make(*args)
    found.__dict__.update(kept)
    return found


class Inside:
    """The forward of a module that was rewritten where it is: its own code runs where it is called with what was not assumed."""

    def __init__(self, module: nn.Module, found: Optimized) -> None:
        self.module, self.found = module, found

    def __call__(self, *args: Any, **named: Any) -> Any:
        try:
            return self.found.forward(*args, **named)
        except OtherwiseError:
            return type(self.module).forward(self.module, *args, **named)


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
        return type(module) in (nn.Linear, *KNOWN) and type(module) not in MASKS and not altered(module)
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
