"""What modules hold beside parameters, buffers and children: copies of it for modules' clones, and whether code has changed it."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import fx, nn

OWN = frozenset(vars(nn.Module()))
"""What every module has."""
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, FunctionType, BuiltinFunctionType, type)
"""Of these there need be no copies."""
_OURS = {f"{__package__}.{name}" for name in ("nn", "sites", "tracing")}
_THEMSELVES = (torch.Tensor, nn.Module, np.ndarray, FunctionType, BuiltinFunctionType, type, ModuleType, fx.Graph)


class Frozen(NamedTuple):
    """A value as bytes, in which tensors, modules and functions stand for themselves."""

    text: bytes
    held: dict[int, Any]

    def thawed(self, others: Mapping[int, Any]) -> Any:
        """A copy, with ``others`` in the place of what it holds, by id."""
        unpickler = pickle.Unpickler(io.BytesIO(self.text))
        unpickler.persistent_load = lambda key: others.get(key, self.held[key])  # type: ignore[method-assign]
        return unpickler.load()


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.held: dict[int, Any] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, fx.Proxy) and not isinstance(obj, _THEMSELVES) and not _is_a_mark(obj):  # a proxy does not tell its type
            return None
        self.held[id(obj)] = obj
        return id(obj)

    def reducer_override(self, obj: Any) -> Any:
        return (MethodType, (obj.__func__, obj.__self__)) if isinstance(obj, MethodType) else NotImplemented


def _is_a_mark(obj: Any) -> bool:
    """Whether it holds nothing, and so is only asked for by ``is``."""
    kind: Any = type(obj)
    own = kind.__new__, kind.__reduce__, kind.__reduce_ex__
    return own == (object.__new__, object.__reduce__, object.__reduce_ex__) and not getattr(obj, "__dict__", None)


def frozen(value: Any) -> Frozen | None:
    """None of what cannot be so: a lock, a file."""
    pickler = _Pickler(file := io.BytesIO())
    try:
        pickler.dump(value)
    except Exception:  # a class may raise anything
        return None
    return Frozen(file.getvalue(), pickler.held)


def _of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    if type(module).__module__ in _OURS:
        return
    for name, value in list(vars(module).items()):
        if name not in OWN and not _is_plain(value):
            yield name, value


def _is_plain(value: Any) -> bool:
    if isinstance(value, fx.Proxy):
        return False
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def separate(module: nn.Module) -> None:
    """Have a module refer to copies, which code may change."""
    for name, value in _of(module):
        if (found := frozen(value)) is not None:
            module.__dict__[name] = found.thawed({})


def adopt(module: nn.Module, clones: Mapping[int, Any]) -> None:
    """Have a clone refer to clones where its attributes refer to modules that were cloned: lists of layers, bound methods."""
    for name, value in _of(module):
        found = frozen(value)
        if found is not None and not clones.keys().isdisjoint(found.held):
            module.__dict__[name] = found.thawed(clones)


@contextmanager
def as_buffers(model: nn.Module) -> Iterator[None]:
    """With tensors that are plain attributes among the buffers."""
    moved = [(module, name) for module in _copied(model).values() for name, value in _of(module) if isinstance(value, torch.Tensor)]
    for module, name in moved:
        module._buffers[name] = module.__dict__.pop(name)
    try:
        yield
    finally:
        for module, name in moved:
            if name in module._buffers:
                module.__dict__[name] = module._buffers.pop(name)


def _copied(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of a clone, of which TorchScript's are the original's."""
    return {path: module for path, module in model.named_modules() if not isinstance(module, torch.jit.ScriptModule)}


class State:
    """Of the modules of a clone, whose attributes become copies, so that code may change them."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = _copied(model)
        for module in self.modules.values():
            separate(module)
        self.then = self._now()

    def _now(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path, module in self.modules.items():
            others = dict(_of(module))
            for name, value in vars(module).items():
                if name in others and (text := frozen(value)) is not None:
                    value = text.text
                elif name in OWN and isinstance(value, dict):
                    value = {key: id(part) for key, part in value.items()}
                found[f"{path}.{name}".lstrip(".")] = value
        return found

    def changed(self, but: frozenset[str]) -> str:
        """The name of an attribute that is no longer what it was, or ""."""
        now = self._now()
        names = [name for name in {**self.then, **now} if name not in but]
        return next((name for name in names if not _same(self.then.get(name, State), now.get(name, State))), "")


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, (*_PLAIN, dict, tuple)) and bool(a == b))
