"""``optimize``: a copy of a model with the layers around its poolings in the cheapest exact form.

The model is traced (torch.fx).  Around each pooling, and from each convolution, a *chain* is found: convolution, batch-norm in evaluation,
activation, pooling, activation, as far as nothing else reads, hooks or overwrites what stands between.  A *form* says how it runs: as it
stood; with the batch-norm folded into the convolution and activations in the pooling; with the activation in fastpool's convolution.  All
forms give the same results by construction: by the laws, or by evaluating as elements are read.  An example input decides between them by
time, and holds the whole against the original.

A batch-norm is folded when it is called, into weights that are kept until a parameter or a statistic changes; the model's own layers stay
where they were, and are read there.  So the state_dict, load_state_dict, further training and a change of mode are the original's.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from . import conversion
from .measuring import medians
from .report import Report, Row
from .sites import CALLER, POOLINGS, STOOD, Form, Part, Site, described, forms, is_hooked, law_of, part_of_module, passes, source_of
from .tracing import HOLDERS, Chain, Mode, Optimized, UntraceableError, asks_for_mode, chains, cloned, graph_of, is_torchs

Tensor = torch.Tensor

FASTER = 0.98
"""A form replaces what stood there where it takes at most this part of its time."""
WORSE = 1.0
"""The new model replaces the original where it takes at most this part of its time."""
SECONDS = 0.4
"""Of timing, a site and the whole model; but each form is called a few times at least."""


def optimize(
    model: nn.Module,
    example_input: Any = None,
    *,
    training: bool | None = None,
    progress: Callable[[int, int], None] = lambda done, sites: None,
) -> nn.Module:
    """A copy of ``model`` whose batch-norms in evaluation, activations and poolings that follow each other run in the cheapest exact form.

    ``example_input``: a tensor, or a tuple of what the model takes.  With it the forms of each site are timed on what arrives there, and
    the one that stood there stays where none is quicker; outputs (and in training gradients) are held against the original's: no more
    than twice its distance from float64 and sixteen roundings of the largest number, or, of gradients, equal in float64; and both models
    are timed.  The original comes back, as a copy, where the new one is not right or not quicker.
    ``training``: for which mode; default: ``model.training``.  Layers that evaluation fused stand apart again after ``train()``; a model
    whose own code asks for its mode raises RuntimeError in the other.
    ``progress`` is told how many sites are done, of how many.

    The result is a torch.fx.GraphModule with ``report``: a row a site, and why what was left alone was.  A model that cannot be traced is
    rewritten submodule by submodule, and the report says so: the result is of the model's class.  Parameters and buffers are shared with
    ``model``, which is not changed, under the same names.

    Left alone: what another layer reads too, poolings that return indices, modules with hooks or parametrizations, layers that overwrite
    what others may read, batch-norm and dropout in training.  Hooks that are registered later, on layers that were fused, do not run.
    TypeError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{CALLER}: model must be a torch.nn.Module, got {type(model).__name__}")
    mode = model.training if training is None else training
    inputs = example_input if isinstance(example_input, tuple) else () if example_input is None else (example_input,)
    found = cloned(model)
    if training is not None:
        found.train(training)
    work = _Work(cloned(found), inputs, Report(training=mode), progress)
    rewritten = work.rewritten(work.whole, "", inputs)
    if inputs and work.report.changed:
        rewritten = _judged(found, rewritten, inputs, work.report)
    rewritten.report = work.report  # type: ignore[assignment]
    return rewritten


def _free(module: nn.Module, name: str) -> str:
    while hasattr(module, name):
        name += "_"
    return name


class _Work:
    """A model's rewriting."""

    def __init__(self, whole: nn.Module, inputs: tuple[Any, ...], report: Report, progress: Callable[[int, int], None]) -> None:
        self.whole, self.inputs, self.report, self.progress = whole, inputs, report, progress
        self.timed: dict[Any, dict[Form, float]] = {}
        """Sites alike are timed once."""
        self.done: set[nn.Module] = set()

    @functools.cached_property
    def arriving(self) -> dict[nn.Module, tuple[Any, ...]]:
        """What each module is called with, the first time."""
        seen: dict[nn.Module, tuple[Any, ...]] = {}
        if not self.inputs:
            return seen

        def keep(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = inspect.signature(module.forward).bind(*args, **named)
            if not given.kwargs:
                seen.setdefault(module, given.args)

        handles = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in self.whole.modules()]
        try:
            with torch.no_grad(), torch.random.fork_rng(), _kept_buffers(self.whole):
                self.whole(*self.inputs)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def rewritten(self, model: nn.Module, name: str, inputs: tuple[Any, ...]) -> nn.Module:
        """A GraphModule, or the model itself with other children."""
        try:
            graph = graph_of(model)
        except Exception as error:  # a tracer runs the model's own code, which may raise anything
            if not isinstance(model, HOLDERS):
                said = f"{type(error).__name__}: " * (not isinstance(error, UntraceableError)) + (str(error).splitlines() or [""])[0]
                self.report.notes.append(f"{name or 'the model'} cannot be traced as a whole, and was rewritten by its parts: {said}")
            for child, module in model._modules.items():
                if module is not None:
                    self.inside(module, f"{name}.{child}".lstrip("."))
            return model
        return self.of_graph(model, graph, name, inputs)

    def inside(self, module: nn.Module, name: str) -> None:
        """Rewrite a module where it is, which its parent's code calls: with all it has, its hooks too."""
        if module in self.done:
            return
        self.done.add(module)
        if type(module) in POOLINGS:
            part, shown = part_of_module(module), type(module).__name__
            if isinstance(part, str):
                self.report.rows.append(Row(name, shown, why=part))
            elif type(module) in conversion._POOLINGS:
                self.report.rows.append(Row(name, shown, f"fastpool {shown}"))
                module.__class__ = POOLINGS[type(module)]
        elif isinstance(module, HOLDERS) or not is_torchs(module):
            before = len(self.report.changed)
            found = self.rewritten(module, name, self.arriving.get(module, ()))
            if found is not module and len(self.report.changed) > before:
                module.__dict__["forward"] = found.forward

    def of_graph(self, model: nn.Module, graph: fx.Graph, name: str, inputs: tuple[Any, ...]) -> nn.Module:
        modules = dict(model.named_modules())
        fixed = asks_for_mode(model, graph)
        if fixed:
            self.report.notes.append(f"the code of {name or 'the model'} asks whether it is in training: the result is for this mode alone")
        order = {node: i for i, node in enumerate(graph.nodes)}
        sites = sorted(chains(graph, modules), key=lambda site: order[site.nodes[0]])
        result = Optimized(model, graph, type(model).__name__)
        result.keep(model)
        forms_of = self.chosen(result, sites, name, inputs)
        for i, (site, form) in enumerate(zip(sites, forms_of, strict=True)):
            if form is STOOD:
                continue
            result.add_submodule(target := _free(result, f"fused_{i}"), Site(site.parts, form))
            # At the place of the first: what it reads may be overwritten before the last.
            with graph.inserting_before(site.nodes[0]):
                new = graph.call_module(target, (source_of(site.nodes[0]),))
            site.nodes[-1].replace_all_uses_with(new)
            for node in reversed(site.nodes):
                graph.erase_node(node)
        if fixed:
            asking: list[Any] = [m for path, m in modules.items() if not path or not is_torchs(m)]
            modes = [m.training for m in asking]
            if model is self.whole:
                asking[0] = None
            result.add_submodule(target := _free(result, "mode"), Mode(name or "the model", asking, modes, model.training))
            with graph.inserting_before(next(iter(graph.nodes))):
                graph.call_module(target)
        for target in dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module"):
            module = modules.get(target)
            if module is not None and is_hooked(module) and not is_torchs(module):
                self.report.notes.append(f"{name}{'.' * bool(name)}{target} has a hook, and was rewritten inside only")
                self.inside(module, f"{name}.{target}".lstrip("."))
        result.recompile()
        return result

    def chosen(self, result: Optimized, sites: Sequence[Chain], name: str, inputs: tuple[Any, ...]) -> list[Form]:
        """What is to stand at each site, by time where there are inputs; and the rows that say so."""
        at = {site.nodes[0]: i for i, site in enumerate(sites)}
        found: dict[int, tuple[Row, Form]] = {}

        def look(node: fx.Node, x: Tensor | None) -> None:
            site = sites[at[node]]
            last = site.nodes[-1]
            place = f"{name}.{last.target if last.op == 'call_module' else last.name}".lstrip(".")
            row, form = self.one(site, x)
            found[at[node]] = replace(row, place=place), form
            self.progress(len(found), len(sites))

        if inputs:
            with torch.no_grad(), torch.random.fork_rng(), _kept_buffers(result):
                _Visitor(result, at, look).run(*_fresh(inputs))
        else:
            for node in at:
                look(node, None)
        self.report.rows += [found[i][0] for i in range(len(sites))]
        return [found[i][1] for i in range(len(sites))]

    def one(self, site: Chain, x: Tensor | None) -> tuple[Row, Form]:
        parts, training = site.parts, self.report.training
        if not parts:
            return Row("", str(getattr(site.nodes[0].target, "__name__", site.nodes[0].target)), why=site.why), STOOD
        candidates = forms(parts, x is not None)
        row = Row("", described(parts, STOOD), law=law_of(parts), why=site.why)
        if not candidates:
            return replace(row, why=site.why or "there is nothing to fuse"), STOOD
        if x is None:
            return replace(row, stands=described(parts, candidates[0])), candidates[0]
        source = source_of(site.nodes[0])
        learns = training and not (source is not None and source.op == "placeholder")
        key = (tuple((p.shown, repr(p.module or p.call)) for p in parts), x.shape, x.stride(), x.dtype, learns)
        ms = self.timed.get(key)
        if ms is None:
            calls = {form: _call(Site(parts, form), parts, x, training, learns) for form in (STOOD, *candidates)}
            refused = [form for form in candidates if _refuses(calls[form])]
            ms = self.timed[key] = medians({form: call for form, call in calls.items() if form not in refused}, SECONDS)
        candidates = [form for form in candidates if form in ms]
        if not candidates:
            return replace(row, why="fastpool has no kernel for it"), STOOD
        best = min(candidates, key=ms.__getitem__)
        row = replace(row, before_ms=ms[STOOD], after_ms=ms[best])
        if ms[best] > FASTER * ms[STOOD]:
            return replace(row, why="; ".join(filter(None, [f"{described(parts, best)} is not quicker", site.why]))), STOOD
        return replace(row, stands=described(parts, best), bytes_saved=_moved(parts, best, x)), best


def _refuses(call: Callable[[], object]) -> bool:
    """Whether fastpool has no kernel for it: a dtype, a device."""
    try:
        call()
    except NotImplementedError:
        return True
    return False


class _Visitor(fx.Interpreter):
    """Shows what the first node of each site reads."""

    def __init__(self, module: fx.GraphModule, wanted: dict[fx.Node, int], look: Callable[[fx.Node, Tensor], None]) -> None:
        super().__init__(module)
        self.wanted, self.look = wanted, look

    def run_node(self, n: fx.Node) -> Any:
        if n in self.wanted:
            args, named = self.fetch_args_kwargs_from_env(n)
            self.look(n, args[0] if args else named["input"])
        return super().run_node(n)


@contextmanager
def _kept_buffers(*models: nn.Module) -> Iterator[None]:
    """Models' buffers as they were, whatever runs."""
    buffers = [buffer for model in models for buffer in model.buffers()]
    values = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)


def _moved(parts: Sequence[Part], form: Form, x: Tensor) -> int:
    """Bytes of maps that are no longer written and read again: all but the last of each pass."""
    sizes: dict[Part, int] = {}
    with torch.no_grad():
        x = x.clone()
        for part in parts:
            x = part.call(x)
            sizes[part] = 0 if part.role == "mask" else x.numel() * x.element_size()
    return sum(2 * sizes[part] for group in passes(parts, form) for part in group[:-1])


def _call(site: Site, parts: Sequence[Part], x: Tensor, training: bool, learns: bool) -> Callable[[], object]:
    """The site, forward, or in training forward and backward; ``learns``: what it reads gets a gradient."""
    x = x.detach().clone() if parts[0].in_place else x.detach()
    if not training:

        def forward() -> object:
            with torch.no_grad():
                return site(x)

        return forward
    weights = [p for part in parts if part.module is not None for p in part.module.parameters() if p.requires_grad]
    wanted = ([x.requires_grad_()] if learns and x.is_floating_point() else []) + weights
    if not wanted:
        return lambda: site(x)
    gy: list[Tensor] = []

    def both() -> object:
        with torch.enable_grad():
            # Of a layer that overwrites its input a copy: every form pays it.
            y = site(x.clone() if parts[0].in_place else x)
            gy.extend([] if gy else [torch.ones_like(y)])
            return torch.autograd.grad(y, wanted, gy, allow_unused=True)

    return both


# The verdict


def _judged(before: nn.Module, after: nn.Module, inputs: tuple[Any, ...], report: Report) -> nn.Module:
    """``after`` if it is right and quicker, else ``before``, as a graph where it can be one."""
    with _kept_buffers(before, after):
        why = _wrong(before, after, inputs, report)
        if not why:
            calls = {model: functools.partial(_once, model, inputs, report.training) for model in (before, after)}
            ms = medians(calls, SECONDS)
            report.before_ms, report.after_ms = ms[before], ms[after]
            if ms[after] <= WORSE * ms[before]:
                return after
            why = "as a whole it is not quicker"
    report.notes.append(f"the model stays as it was: {why}")
    report.rows = [replace(row, stands="", bytes_saved=None, why=row.why or "with the whole model") for row in report.rows]
    try:
        result = Optimized(before, graph_of(before), type(before).__name__)
    except Exception:  # as in ``rewritten``
        return before
    result.keep(before)
    return result


def _wrong(before: nn.Module, after: nn.Module, inputs: tuple[Any, ...], report: Report) -> str:
    """In which way ``after`` gives other results than ``before``, or "".

    Where rounding moves a number over a kink (ReLU's, at 0; two nearly equal elements of a window), gradients of both are right and far
    apart: AlexNet's in training, by one of 130,000 units of its fourth convolution.  In float64 that is no more to be met.
    """
    exactly, training = tree_map(_double, inputs), report.training
    truth = _results(copy.deepcopy(before).double(), exactly, training)
    theirs, ours = (_results(model, inputs, training) for model in (before, after))
    report.error, report.torch_error = _furthest(ours.all, truth.all), _furthest(theirs.all, truth.all)
    for what, found, own, of in zip(("outputs", "gradients"), ours, theirs, truth, strict=True):
        if _are_right(found, own, of):
            continue
        apart = f"{what} differ from float64 by {_furthest(found, of):.2g}, its own by {_furthest(own, of):.2g}"
        if what == "outputs":
            return apart
        again = _results(copy.deepcopy(after).double(), exactly, training).gradients
        if len(again) != len(of) or _furthest(again, of) > 1e-9 * _largest(of):
            return apart
        report.notes.append("rounding moved numbers over a kink: gradients were compared in float64, where they are equal")
    return ""


def _is_tensor(t: Any) -> bool:
    return isinstance(t, Tensor)


def _double(t: Any) -> Any:
    return t.double() if _is_tensor(t) and t.is_floating_point() else t


def _tensors(found: Any) -> list[Tensor]:
    return [t for t in tree_leaves(found) if isinstance(t, Tensor) and t.is_floating_point()]


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class _Results(NamedTuple):
    outputs: list[Tensor]
    gradients: list[Tensor]
    """In training, of inputs and parameters."""

    @property
    def all(self) -> list[Tensor]:
        return [*self.outputs, *self.gradients]


def _results(model: nn.Module, inputs: tuple[Any, ...], training: bool) -> _Results:
    """With the same draws each time; gradients by fixed random ones, as the sum alone has none behind a batch-norm."""
    with _seeded(), torch.set_grad_enabled(training):
        leaves = tree_map(lambda t: t.detach().clone().requires_grad_(training and t.is_floating_point()) if _is_tensor(t) else t, inputs)
        outputs = _tensors(model(*_fresh(leaves)))
        learned = [*_tensors(leaves), *(p for p in model.parameters() if p.requires_grad)]
        reached = [t for t in outputs if t.requires_grad]
        found: tuple[Any, ...] = ()
        if training and reached and learned:
            given = [torch.randn(t.shape).to(t.dtype) / t.numel() for t in reached]  # float32's, whatever the model's dtype
            found = torch.autograd.grad(reached, learned, given, allow_unused=True)
    return _Results([t.detach() for t in outputs], [t for t in found if t is not None])


def _fresh(inputs: tuple[Any, ...]) -> Any:
    """Copies: a model may overwrite what it is given."""
    return tree_map(lambda t: t.clone() if _is_tensor(t) else t, inputs)


def _once(model: nn.Module, inputs: tuple[Any, ...], training: bool) -> object:
    with torch.set_grad_enabled(training):
        outputs = _tensors(model(*inputs))
        reached, learned = [t for t in outputs if t.requires_grad], [p for p in model.parameters() if p.requires_grad]
        if not (training and reached and learned):
            return outputs
        return torch.autograd.grad([t.sum() for t in reached], learned, allow_unused=True)


def _are_right(ours: Sequence[Tensor], theirs: Sequence[Tensor], truth: Sequence[Tensor]) -> bool:
    """Within twice the original's distance from float64, and sixteen roundings of the largest number: what summing in another order may
    do to a few numbers that torch had by luck; the largest of all, as a bias before a batch-norm has a gradient of rounding alone."""
    if len(ours) != len(theirs):
        return False
    largest = _largest(truth)
    slack = [8 * torch.finfo(t.dtype).eps * largest for t in theirs]
    return all(_apart(a, t) <= 2 * _apart(b, t) + more for a, b, t, more in zip(ours, theirs, truth, slack, strict=True))


def _largest(tensors: Sequence[Tensor]) -> float:
    return max((float(t.nan_to_num(0, 0, 0).abs().max()) for t in tensors if t.numel()), default=0.0)


def _furthest(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max(map(_apart, some, others), default=0.0)


def _apart(a: Tensor, b: Tensor) -> float:
    """The largest difference; infinities and NaN must be where they are in the other."""
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs()).nan_to_num(math.inf, math.inf).max()) if a.numel() else 0.0
