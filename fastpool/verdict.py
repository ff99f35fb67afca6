"""What a model makes of an example, and whether another makes the same of it."""

from __future__ import annotations

import copy
import inspect
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from . import attributes
from .report import Report
from .sites import CALLER

Tensor = torch.Tensor


# How a model is called


_AUTOCAST = ("cpu", "cuda")


class Ambient(NamedTuple):
    """What torch's operations go by beside their arguments."""

    gradients: bool
    autocast: tuple[tuple[bool, torch.dtype], ...]
    """Of each of _AUTOCAST"""
    more: tuple[Any, ...]

    @classmethod
    def now(cls) -> Ambient:
        autocast = tuple((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _AUTOCAST)
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # as torch.utils.checkpoint sets them
        more = torch.is_inference_mode_enabled(), torch.get_default_dtype(), torch._C._len_torch_function_stack(), hooks is not None
        return cls(torch.is_grad_enabled(), autocast, more)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """With its gradients and autocast."""
        with ExitStack() as stack:
            for device, then, wanted in zip(_AUTOCAST, self.now().autocast, self.autocast, strict=True):
                if then != wanted:
                    stack.enter_context(torch.autocast(device, wanted[1], wanted[0]))
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            yield


def signature_of(model: nn.Module) -> inspect.Signature:
    try:
        return inspect.signature(model.forward)
    except ValueError:  # of TorchScript's there is none
        return inspect.signature(lambda *args, **named: None)


class Example(NamedTuple):
    """What a module is called with."""

    args: tuple[Any, ...]
    named: dict[str, Any]
    around: Ambient

    @classmethod
    def of(cls, given: Any, model: nn.Module, training: bool) -> Example | None:
        """From a user's ``example_input``; TypeError where the model does not take it."""
        if given is None:
            return None
        several = isinstance(given, (tuple, list)) and not hasattr(given, "_fields")
        args = tuple(given) if several else () if isinstance(given, Mapping) else (given,)
        found = cls(args, dict(given) if isinstance(given, Mapping) else {}, Ambient.now()._replace(gradients=training))
        try:
            found.bound(model)
        except TypeError as error:
            raise TypeError(
                f"{CALLER}: example_input does not fit {type(model).__name__}.forward{signature_of(model)}: {error}. It is a tensor, or a "
                "tuple or list of the positional arguments (a list that is one argument: ([...],)), or a dict of those by name"
            ) from error
        return found

    def bound(self, model: nn.Module) -> dict[str, Any]:
        """The arguments of its forward, by name."""
        return dict(signature_of(model).bind(*self.args, **self.named).arguments)

    def map(self, function: Callable[[Tensor], Any]) -> Example:
        args, named = tree_map(lambda t: function(t) if isinstance(t, Tensor) else t, (self.args, self.named))
        return self._replace(args=args, named=named)

    def fresh(self) -> Example:
        """Copies: a model may overwrite what it is given."""
        return self.map(torch.clone)

    def call(self, model: nn.Module) -> Any:
        return model(*self.args, **self.named)


@contextmanager
def kept(*models: nn.Module) -> Iterator[None]:
    """Models' buffers, and attributes, as they were, whatever runs."""
    modules = [module for model in models for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    modules = list(dict.fromkeys(modules))
    before = [(dict(vars(module)), dict(module._buffers)) for module in modules]
    values = [(buffer, buffer.clone()) for model in models for buffer in model.buffers()]
    for module in modules:
        attributes.separate(module)
    try:
        yield
    finally:
        for module, (then, buffers) in zip(modules, before, strict=True):
            packed = {name: value for name, value in vars(module).items() if name == "_kept"}  # of fastpool's convolutions
            module.__dict__.clear()
            module.__dict__.update(then | packed)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)


def drawn() -> tuple[Any, ...]:
    """The states of the generators that code may draw from unasked."""
    kind, words, *more = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), (kind, np.asarray(words).tobytes(), *more)


@contextmanager
def undrawn() -> Iterator[None]:
    """Generators as they were, whatever draws."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def seeded() -> Iterator[None]:
    with undrawn():
        torch.manual_seed(0)
        yield


# What it then does


class Results(NamedTuple):
    outputs: list[Any]
    """The leaves of what it returns"""
    form: Any
    """and their places."""
    gradients: list[Tensor | None]
    """In training, of inputs and parameters."""

    @property
    def numbers(self) -> list[Tensor]:
        return [*_floats(self.outputs), *_floats(self.gradients)]

    def unlike(self, other: Results) -> str:
        """What of these is not comparable with the others, or ""."""
        if self.form != other.form:
            return "what is returned is nested in another way"
        for ours, theirs in zip(self.outputs, other.outputs, strict=True):
            if (a := _kind(ours)) != (b := _kind(theirs)):
                return f"an output is {a}, its own {b}"
        if len(self.gradients) != len(other.gradients):
            return "gradients of other tensors"
        for i, (ours, theirs) in enumerate(zip(self.gradients, other.gradients, strict=True)):
            if (ours is None) != (theirs is None):
                return f"gradients reach another set of inputs and parameters: number {i}"
        return ""


def _kind(found: Any) -> str:
    if not isinstance(found, Tensor):
        return repr(found)
    return f"{str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}" + ", with a gradient" * found.requires_grad


def _floats(found: Sequence[Any]) -> list[Tensor]:
    tensors = [t for t in found if isinstance(t, Tensor)]
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors if t.is_complex() or t.is_floating_point()]


def _integers(found: Results) -> list[Tensor]:
    return [t for t in found.outputs if isinstance(t, Tensor) and not _floats([t])]


def results(model: nn.Module, example: Example, training: bool) -> Results:
    """With the same draws each time; gradients by fixed random ones, as the sum alone has none behind a batch-norm."""
    with seeded(), example.around.entered():
        leaf = example.map(lambda t: t.detach().clone().requires_grad_(training and t.is_floating_point()))
        outputs, form = tree_flatten(leaf.fresh().call(model))
        if not training:
            return Results(outputs, form, [])
        learned = [*_floats(tree_flatten(leaf[:2])[0]), *(p for p in model.parameters() if p.requires_grad)]
        reached = [t for t in _floats(outputs) if t.requires_grad]
        found: tuple[Tensor | None, ...] = ()
        if reached and learned:
            given = [torch.randn(t.shape).to(t) / t.numel() for t in reached]  # float32's, whatever the model's dtype
            found = torch.autograd.grad(reached, learned, given, allow_unused=True)
    return Results(outputs, form, list(found))


def once(model: nn.Module, example: Example, training: bool) -> object:
    """A call, in training with its gradients, for its time."""
    with example.around.entered():
        outputs = _floats(tree_flatten(example.call(model))[0])
        reached, learned = [t for t in outputs if t.requires_grad], [p for p in model.parameters() if p.requires_grad]
        if not (training and reached and learned):
            return outputs
        return torch.autograd.grad([t.sum() for t in reached], learned, allow_unused=True)


# Whether two do the same


def unfaithful(graph: nn.Module, model: nn.Module, example: Example) -> str:
    """In which way a trace gives other results than the model, or "": it makes the same calls, so the same bits; unless the model itself
    does not the second time."""
    with kept(model, graph):
        theirs, ours = (results(each, example, False) for each in (model, graph))
        if why := ours.unlike(theirs):
            return why
        pairs = [(a, b) for a, b in zip(ours.outputs, theirs.outputs, strict=True) if isinstance(a, Tensor)]
        if all(map(_equal, *zip(*pairs, strict=True))) if pairs else True:
            return ""
        again = results(model, example, False)
    apart, own = furthest(ours.numbers, theirs.numbers), furthest(again.numbers, theirs.numbers)
    return "" if apart <= 2 * own else f"outputs are apart by {apart:.2g}"


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def wrong(before: nn.Module, after: nn.Module, example: Example, report: Report) -> str:
    """In which way ``after`` gives other results than ``before``, or "".

    Where rounding moves a number over a kink (ReLU's, at 0; two nearly equal elements of a window), gradients of both are right and far
    apart: AlexNet's in training, by one of 130,000 units of its fourth convolution; and so are integers, as of argmax.  In float64 that is
    no more to be met.
    """
    exactly, training = example.map(_double), report.training
    theirs, ours = (results(model, example, training) for model in (before, after))
    if why := ours.unlike(theirs):
        return why
    try:
        truth = results(copy.deepcopy(before).double(), exactly, training)
        furthest(theirs.numbers, truth.numbers)
    except Exception:  # of a user's code, which may name a dtype
        report.notes.append("the model does not run in float64: results were held against its own")
        truth = theirs
    report.error, report.torch_error = (furthest(found.numbers, truth.numbers) for found in (ours, theirs))
    if why := _apart_from(truth, ours, theirs, "outputs"):
        return why
    doubts = _apart_from(truth, ours, theirs, "gradients")
    if not doubts and all(_equal(a, b) for a, b in zip(*map(_integers, (ours, theirs)), strict=True)):
        return ""
    doubts = doubts or "integers differ"
    if truth is theirs:
        return doubts
    again = results(copy.deepcopy(after).double(), exactly, training)
    if again.unlike(truth) or not all(_equal(a, b) for a, b in zip(*map(_integers, (again, truth)), strict=True)):
        return doubts
    if furthest(_floats(again.gradients), _floats(truth.gradients)) > 1e-9 * _largest(_floats(truth.gradients)):
        return doubts
    report.notes.append("rounding moved numbers over a kink: results were compared in float64, where they are equal")
    return ""


def _apart_from(truth: Results, ours: Results, theirs: Results, what: str) -> str:
    found, own, of = (_floats(getattr(results, what)) for results in (ours, theirs, truth))
    if _are_right(found, own, of):
        return ""
    return f"{what} differ from float64 by {furthest(found, of):.2g}, its own by {furthest(own, of):.2g}"


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _are_right(ours: Sequence[Tensor], theirs: Sequence[Tensor], truth: Sequence[Tensor]) -> bool:
    """Within twice the original's distance from float64, and sixteen roundings of the largest number: what summing in another order may
    do to a few numbers that torch had by luck; the largest of all, as a bias before a batch-norm has a gradient of rounding alone."""
    largest = _largest(truth)
    slack = [8 * torch.finfo(t.dtype).eps * largest for t in theirs]
    return all(_apart(a, t) <= 2 * _apart(b, t) + more for a, b, t, more in zip(ours, theirs, truth, slack, strict=True))


def _largest(tensors: Sequence[Tensor]) -> float:
    return max((float(t.detach().nan_to_num(0, 0, 0).abs().max()) for t in tensors if t.numel()), default=0.0)


def furthest(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max((_apart(a, b) for a, b in zip(some, others, strict=True)), default=0.0)


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinities and NaN must be where they are in the other."""
    a, b = a.detach().double(), b.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf).max()) if a.numel() else 0.0
