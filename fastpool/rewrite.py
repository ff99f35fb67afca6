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

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from . import conversion
from .measuring import medians
from .report import Report, Row
from .sites import (
    CALLER,
    POOLINGS,
    STOOD,
    Form,
    Part,
    Site,
    altered,
    described,
    forms,
    is_unfolded,
    law_of,
    part_of_module,
    passes,
    shallow,
    source_of,
)
from .tracing import (
    HOLDERS,
    Chain,
    Given,
    Inside,
    Mode,
    Optimized,
    UntraceableError,
    asks_for_mode,
    chains,
    cloned,
    guarded,
    is_torchs,
    placed,
    trace_of,
)
from .verdict import Ambient, Example, kept, once, undrawn, unfaithful, wrong

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

    ``example_input``: a tensor, or a tuple or list of positional arguments, or a dict of arguments by name.  With it the forms of each
    site are timed on what arrives there, and the one that stood there stays where none is quicker; outputs (and in training gradients)
    are held against the original's: no more than twice its distance from float64 and sixteen roundings of the largest number, or, of
    gradients, equal in float64; and both models are timed.  The original comes back, as a copy, where the new one is not right or not
    quicker.  Without it nothing is measured or checked: each site takes what is the best guess, fastpool's pooling with what stands
    beside it and torch's convolution with a batch-norm in its weights, and the report says no times.
    ``training``: for which mode; default: ``model.training``.  It is ``train(training)`` where that is another than the model's; layers
    in another mode than the model, as frozen batch-norms, else stay so.  Layers that evaluation fused stand apart again after
    ``train()``; a model whose own code asks for its mode raises RuntimeError in the other.
    ``progress`` is told how many sites are done, of how many.

    The result is a torch.fx.GraphModule with ``report``: a row a site, and why what was left alone was.  A model that cannot be traced is
    rewritten submodule by submodule, and the report says so: the result is of the model's class, as where nothing was rewritten.
    Parameters and buffers are shared with ``model``, which is not changed, under the same names.

    A trace is refused where it would not do what the code does: code that goes by values or types, draws random numbers, turns gradients
    or autocast on or off, changes its attributes, or computes with tensors that are no parameters or buffers.  An argument that is None,
    True, False or a word in the example, or by default, is taken to be so always: RuntimeError where it is another.  What a trace cannot
    tell: numbers and other attributes of modules, and globals, are those of the trace; prints and what else code does beside computing is
    not done; ``type(x)`` is not a tensor's.

    Left alone: what another layer reads too, poolings that return indices, modules with hooks, parametrizations or a forward of their own,
    layers that overwrite what others may read, batch-norm and dropout in training; batch-norms are not folded into weights of 16 bits,
    whose rounding made errors 1.2 to 1.7 times as large.  Hooks that are registered later, on layers that were fused, do not run.
    What was folded is folded anew when a parameter or statistic is another tensor, or is changed in place.  What is changed through
    ``.data`` raises no version: it is seen by the memory, and on a CPU by 32 numbers of each tensor; a change of other numbers alone, and
    on a GPU of any, is not.
    TypeError for what is no module, and for an example that its forward does not take.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{CALLER}: model must be a torch.nn.Module, got {type(model).__name__}")
    mode = model.training if training is None else training
    example = Example.of(example_input, model, mode)
    found = cloned(model)
    if mode != model.training:
        found.train(mode)
    work = _Work(cloned(found), example, Report(training=mode), progress)
    rewritten = work.rewritten(work.whole, "", example)
    if not work.report.changed:
        rewritten = found
    elif example is not None:
        rewritten = _judged(found, rewritten, example, work.report)
    rewritten.report = work.report  # type: ignore[assignment]
    return rewritten


def _free(module: nn.Module, name: str) -> str:
    while hasattr(module, name):
        name += "_"
    return name


class _Work:
    """A model's rewriting."""

    def __init__(self, whole: nn.Module, example: Example | None, report: Report, progress: Callable[[int, int], None]) -> None:
        self.whole, self.example, self.report, self.progress = whole, example, report, progress
        self.timed: dict[Any, dict[Form, float]] = {}
        """Sites alike are timed once."""
        self.done: set[nn.Module] = set()

    @functools.cached_property
    def arriving(self) -> dict[nn.Module, Example]:
        """What each module is called with, the first time."""
        seen: dict[nn.Module, Example] = {}
        if self.example is None:
            return seen

        def keep(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            if module not in seen:
                seen[module] = Example(args, named, Ambient.now()).map(Tensor.detach)

        handles = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in self.whole.modules()]
        try:
            with kept(self.whole), undrawn(), self.example.around.entered():
                self.example.fresh().call(self.whole)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def rewritten(self, model: nn.Module, name: str, example: Example | None) -> nn.Module:
        """A GraphModule, or the model itself with other children."""
        try:
            trace = trace_of(model, example)
            fixed = asks_for_mode(model, trace, example)
            root = shallow(model)
            root.__dict__.update(trace.constants)
            result = Optimized(root, trace.graph, type(model).__name__)
            result.keep(root)
            if example is not None and (why := unfaithful(result, model, example)):
                raise UntraceableError(f"a trace does something else: {why}")
        except Exception as error:  # a tracer runs the model's own code, which may raise anything
            if not isinstance(model, HOLDERS):
                said = f"{type(error).__name__}: " * (not isinstance(error, UntraceableError)) + (str(error).splitlines() or [""])[0]
                self.report.notes.append(f"{name or 'the model'} cannot be traced as a whole, and was rewritten by its parts: {said}")
            for child, module in model._modules.items():
                if module is not None:
                    self.inside(module, f"{name}.{child}".lstrip("."))
            return model
        return self.of_graph(model, result, fixed, name, example)

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
            found = self.rewritten(module, name, self.arriving.get(module))
            if isinstance(found, Optimized) and found is not module and len(self.report.changed) > before:
                module.__dict__["forward"] = Inside(module, found)

    def of_graph(self, model: nn.Module, result: Optimized, fixed: bool, name: str, example: Example | None) -> nn.Module:
        """``fixed``: to the mode of the trace."""
        graph, modules = result.graph, dict(model.named_modules())
        if fixed:
            self.report.notes.append(f"the code of {name or 'the model'} asks whether it is in training: the result is for this mode alone")
        order = {node: i for i, node in enumerate(graph.nodes)}
        sites = sorted(chains(graph, modules), key=lambda site: order[site.nodes[0]])
        forms_of = self.chosen(model, result, sites, name, example)
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
        looked_at, assumed = guarded(model, graph, example)
        if looked_at:
            given = Given(name or "the model", [str(node.target).lstrip("*") for node in looked_at], assumed)
            result.add_submodule(target := _free(result, "given"), given)
            with graph.inserting_after(looked_at[-1]):
                graph.call_module(target, tuple(looked_at))
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
            if module is not None and (why := altered(module)) and not is_torchs(module):
                self.report.notes.append(f"{name}{'.' * bool(name)}{target} has {why}, and was rewritten inside only")
                self.inside(module, f"{name}.{target}".lstrip("."))
        result.recompile()
        return result

    def chosen(self, model: nn.Module, result: Optimized, sites: Sequence[Chain], name: str, example: Example | None) -> list[Form]:
        """What is to stand at each site, by time where there is an example; and the rows that say so."""
        training = self.report.training and (example is None or example.around.gradients)
        at = {site.nodes[0]: i for i, site in enumerate(sites)}
        found: dict[int, tuple[Row, Form]] = {}

        def look(node: fx.Node, x: Tensor | None) -> None:
            site = sites[at[node]]
            last = site.nodes[-1]
            place = f"{name}.{last.target if last.op == 'call_module' else last.name}".lstrip(".")
            row, form = self.one(site, x, training)
            found[at[node]] = replace(row, place=place), form
            self.progress(len(found), len(sites))

        if example is not None:
            with kept(result), undrawn(), example.around.entered(), torch.no_grad():
                _Visitor(result, at, look).run(*placed(result.graph, model, example.fresh()))
        else:
            for node in at:
                look(node, None)
        self.report.rows += [found[i][0] for i in range(len(sites))]
        return [found[i][1] for i in range(len(sites))]

    def one(self, site: Chain, x: Tensor | None, training: bool) -> tuple[Row, Form]:
        parts = site.parts
        if not parts:
            return Row("", str(getattr(site.nodes[0].target, "__name__", site.nodes[0].target)), why=site.why), STOOD
        candidates = forms(parts, x is not None)
        unfolded = "16 bits: the batch-norm is not folded into weights" * is_unfolded(parts)
        site = site._replace(why="; ".join(filter(None, [unfolded, site.why])))
        row = Row("", described(parts, STOOD), law=law_of(parts), why=site.why)
        if not candidates:
            return replace(row, why=site.why or "there is nothing to fuse"), STOOD
        if x is None:
            return replace(row, stands=described(parts, candidates[0])), candidates[0]
        source = source_of(site.nodes[0])
        learns = training and not (source is not None and source.op == "placeholder")
        key = (
            tuple((p.shown, repr(p.module or p.call)) for p in parts),
            x.shape,
            x.stride(),
            x.dtype,
            Ambient.now().autocast,
            training,
            learns,
        )
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


def _judged(before: nn.Module, after: nn.Module, example: Example, report: Report) -> nn.Module:
    """``after`` if it is right and quicker, else ``before``."""
    with kept(before, after), undrawn():
        why = wrong(before, after, example, report)
        if not why:
            ms = medians({model: functools.partial(once, model, example, report.training) for model in (before, after)}, SECONDS)
            report.before_ms, report.after_ms = ms[before], ms[after]
            if ms[after] <= WORSE * ms[before]:
                return after
            why = "as a whole it is not quicker"
    report.notes.append(f"the model stays as it was: {why}")
    report.rows = [replace(row, stands="", bytes_saved=None, why=row.why or "with the whole model") for row in report.rows]
    return before
