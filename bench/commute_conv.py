"""The convolution in front of an activation and a pooling, as networks have them: what each way to compute the three costs."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as T
from fastpool.kernels.pool import KINDS
from rich import box
from rich.table import Table

import fastpool.functional as F
from fastpool import convolution
from fastpool.backend import Pooling
from fastpool.window import window as asked

from . import check, machine, measure
from .cases import ACTIVATIONS, Site
from .check import WrongResultError, said
from .commute import PASSES, PROVIDERS, Case, compiles_anew, of_case
from .conv_layers import LAYERS, Layer
from .peers import FASTPOOL, TORCH
from .report import named
from .rows import Row, milliseconds, number, rounded, times, wrong

POOLINGS = ("max", "avg", "min")
"""Of F.conv_pool2d."""

FORMS = {
    "torch_act_pool": "PyTorch's conv, act, pool",
    "torch_pool_act": "PyTorch's conv, pool, act",
    "compile_act_pool": "torch.compile's conv, act, pool",
    "compile_pool_act": "torch.compile's conv, pool, act",
    "unfused": "F.conv2d, PyTorch's activation, F's pooling",
    "activated": "F.conv2d(after=act), F's pooling",
    "conv_pool": "F.conv_pool2d",
}
"""F: fastpool.functional.  All but the two that pool first give the same."""
TIMES = tuple(f"{form}_{a_pass}_ms" for form in FORMS for a_pass in PASSES)
SAVED = tuple(f"{form}_saved_bytes" for form in FORMS)
"""Bytes that are saved for backward an output, beside the convolution's operands."""

ROUNDING = 1e-4
"""Of the largest magnitude: above, something else is computed."""

STEMS = {"ResNet": "ResNet-50"}
"""Networks whose layers conv_layers has by another name."""

Form = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(input, weight, bias) -> the pooled map"""


class Operands(NamedTuple):
    x: torch.Tensor
    """(N, C, H, W)"""
    weight: torch.Tensor
    """(OC, C / groups, KH, KW)"""
    bias: torch.Tensor | None
    """(OC,)"""


def layer_of(site: Site) -> Layer:
    """The convolution whose output a network pools there: the last of those that give such maps.  LookupError for another site."""
    network, output = STEMS.get(site.network, site.network), site[1:4]
    found = [layer for layer in LAYERS if layer.network == network and (layer.out_channels, *layer.output_size) == output]
    if not found:
        raise LookupError(f"no layer of {network} gives {'x'.join(map(str, output))}")
    return found[-1]


@functools.lru_cache(maxsize=1)
def operands(layer: Layer, batch: int) -> Operands:
    """Small multiples of powers of two: every sum is exact in float32, in whatever order, so that all have the same map, with the same
    ties, choose the same elements of it, and have the same gradients but for rounding.

    The map's values have a standard deviation of about 1, so that activations meet their curved part.
    """
    generator = torch.Generator().manual_seed(0)

    def integers(shape: Sequence[int], most: int) -> torch.Tensor:
        return torch.randint(-most, most + 1, tuple(shape), generator=generator).float()

    taps = math.prod(layer.weight_shape[1:])
    deviation = (taps * 60 / 9 * 2 / 3) ** 0.5  # of taps products of -4 .. 4 and -1 .. 1
    unit = 2.0 ** -round(math.log2(deviation))
    x, weight = integers((batch, *layer[1:4]), 4), integers(layer.weight_shape, 1) * unit
    return Operands(x, weight, integers((layer.out_channels,), 4) * unit if layer.bias else None)


def row(case: Case, budget: float, providers: Iterable[str] = PROVIDERS) -> dict[str, Any]:
    """Flat: the case, the law's class, ``layer``, ``one_launch`` (whether F.conv_pool2d is one, forward), ``correct``, ``error``, median
    ms under the names in TIMES and bytes under those in SAVED; None for those of torch.compile,
    unless it is among the ``providers``.

    In training, gradients are by weight, bias and, but of a network's first layer, input.  Weights are packed in every call, by everybody.
    Without times if a result is wrong; ``error`` then says how.  Sets PyTorch's number of threads.
    """
    torch.set_num_threads(case.threads)
    if "compile" in providers:
        compiles_anew()
    layer = layer_of(case.site)
    given = operands(layer, case.batch)
    found = {**of_case(case), "layer": layer.name, "one_launch": None, **dict.fromkeys((*TIMES, *SAVED))}
    try:
        forms = [form for form in FORMS if "compile" in providers or not form.startswith("compile")]
        made = {form: _form(case, layer, form) for form in forms}
        _check(made, layer, given)
        saved = {f"{form}_saved_bytes": _saved_bytes(call, layer, given) for form, call in made.items()}
        calls: dict[str, Callable[[], object]] = {}
        for form, call in made.items():
            calls[f"{form}_forward_ms"] = _forward(call, given)
            calls[f"{form}_training_ms"] = _training(call, layer, given)
        for timed in calls.values():
            timed()  # may compile
        outputs = case.batch * layer.out_channels * math.prod(layer.output_size)
        machine.reserve(16 * outputs)
        ms = {name: of.ms for name, of in measure.medians(calls, budget).items()}
    except Exception as error:  # one case must not end a run of hundreds
        return found | {"correct": False, "error": said(error)}
    return rounded(found | {"one_launch": _is_one_launch(case, layer, given)} | saved | ms)


def _form(case: Case, layer: Layer, form: str) -> Form:
    window, geometry = case.site.window, (layer.stride, layer.padding, 1, layer.groups)
    if form == "conv_pool":
        kernel_size, stride, padding = window
        return lambda x, weight, bias: F.conv_pool2d(
            x,
            weight,
            bias,
            *geometry,
            activation=case.activation,
            pool=case.pooling,
            kernel_size=kernel_size,
            pool_stride=stride,
            pool_padding=padding,
        )
    pool, activation = (FASTPOOL if form in ("unfused", "activated") else TORCH)[case.pooling], ACTIVATIONS[case.activation]
    if form == "activated":
        return lambda x, weight, bias: pool(F.conv2d(x, weight, bias, *geometry, after=case.activation), window, None)
    convolve = F.conv2d if form == "unfused" else T.conv2d

    def steps(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = convolve(x, weight, bias, *geometry)
        return activation(pool(y, window, None)) if _order(form) == "pool_act" else pool(activation(y), window, None)

    return torch.compile(steps) if form.startswith("compile") else steps


def _is_one_launch(case: Case, layer: Layer, given: Operands) -> bool:
    op = convolution.request("conv2d", 2, layer.stride, layer.padding, 1, layer.groups)
    pooling = Pooling("conv_pool2d", KINDS[case.pooling], 2, asked("conv_pool2d", 2, *case.site.window, 1, False))
    activation = convolution.epilogue("conv2d", case.activation)
    return convolution.pooling_plan(convolution.called(op, given.x, given.weight), activation, pooling)[0] is not None


def _leaves(layer: Layer, given: Operands) -> Operands:
    """The operands; those whose gradients training wants ask for them."""
    x, weight, bias = given.x.detach(), given.weight.detach(), None if given.bias is None else given.bias.detach()
    for t in (weight, bias, None if layer.first else x):
        if t is not None:
            t.requires_grad_()
    return Operands(x, weight, bias)


def _wanted(leaves: Operands) -> list[torch.Tensor]:
    return [t for t in leaves if t is not None and t.requires_grad]


def _check(forms: Mapping[str, Form], layer: Layer, given: Operands) -> None:
    """Raise WrongResultError unless every form gives what PyTorch, which comes first, does in its order, with a gradient asked for and
    without, and that gradient."""
    expected: dict[str, list[torch.Tensor]] = {}
    leaves = _leaves(layer, given)
    named_leaves = zip(Operands._fields, leaves, strict=True)
    names = ["value", "value in training", *(f"gradient by {name}" for name, t in named_leaves if t is not None and t.requires_grad)]
    for form, call in forms.items():
        found = _results(call, leaves)
        for what, theirs, ours in zip(names, expected.setdefault(_order(form), found), found, strict=True):
            if ours.shape != theirs.shape:
                raise WrongResultError(f"{form}: {what} of shape {tuple(ours.shape)}, not {tuple(theirs.shape)}")
            apart = float((ours - theirs).abs().max()) / (float(theirs.abs().max()) or 1.0)
            if not apart <= ROUNDING:  # NaN is wrong
                raise WrongResultError(f"{form}: {what} off by {apart:.2g} of the largest magnitude")


def _order(form: str) -> str:
    return "pool_act" if form.endswith("pool_act") else "act_pool"


def _results(form: Form, leaves: Operands) -> list[torch.Tensor]:
    with torch.no_grad():
        value = form(*leaves)
    y = form(*leaves)
    return [value, y.detach(), *torch.autograd.grad(y, _wanted(leaves), check.upstream(y.shape))]


def _saved_bytes(form: Form, layer: Layer, given: Operands) -> float:
    """Distinct storages, without the operands', an output."""
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = form(*_leaves(layer, given))
    for t in given:
        if t is not None:
            kept.pop(t.untyped_storage().data_ptr(), None)
    return sum(kept.values()) / y.numel()


def _forward(form: Form, given: Operands) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return form(*given)

    return call


def _training(form: Form, layer: Layer, given: Operands) -> Callable[[], object]:
    leaves = _leaves(layer, given)
    with torch.no_grad():
        gy = check.upstream(form(*given).shape)
    return lambda: torch.autograd.grad(form(*leaves), _wanted(leaves), gy)


EXPLAINED = """\
Convolution, activation, pooling.  ms: forward, the sum over {0}.  a-p: activate, then pool; p-a: pool,
then activate; unfused: F.conv2d, PyTorch's activation, F's pooling; after: F.conv2d(after=activation), F's
pooling; one: F.conv_pool2d.  x: another's time (torch: a-p) over one's; train.: forward and backward.
Saved: for backward, bytes an output, beside input and weights."""

_FORWARD = {"torch_act_pool": "torch\na-p", "torch_pool_act": "torch\np-a", "compile_act_pool": "comp.\na-p"}
_FORWARD |= {"unfused": "un-\nfused", "activated": "after", "conv_pool": "one"}
"""Forms that have a column, and its header."""


def table(rows: Sequence[Row], title: str | None = None) -> Table:
    """At most 110 columns wide: a line a pooling and activation."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["pooling"], row["activation"]), []).append(row)
    forms = [form for form in _FORWARD if any(row[f"{form}_forward_ms"] for row in rows)]
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    for header in ("\npooling", "\nactivation", "\nlaw"):
        made.add_column(header, no_wrap=True)
    factors = ("x\ntorch", "x un-\nfused")
    for header in (*(_FORWARD[form] for form in forms), *factors, "train.\none", *factors, "saved\ntorch", "\none"):
        made.add_column(header, justify="right", no_wrap=True)
    previous = ""
    for (pooling, activation), of in groups.items():
        if pooling != previous and previous:
            made.add_section()
        law = of[0]["law"] if all(row["correct"] for row in of) else "[bold red]WRONG"
        made.add_row("" if pooling == previous else pooling, activation, law, *_numbers(of, forms))
        previous = pooling
    return made


def _numbers(rows: Sequence[Row], forms: Sequence[str]) -> list[str]:
    """Dashes where a row has no such number."""

    def total(name: str) -> float:
        return sum(math.nan if row[name] is None else row[name] for row in rows)

    def factors(a_pass: str) -> list[float]:
        return [total(f"{form}_{a_pass}_ms") / total(f"conv_pool_{a_pass}_ms") for form in ("torch_act_pool", "unfused")]

    ms, train = [total(f"{form}_forward_ms") for form in forms], total("conv_pool_training_ms")
    saved = [total(f"{form}_saved_bytes") / len(rows) for form in ("torch_act_pool", "conv_pool")]
    shown: list[tuple[Callable[[float], str], list[float]]]
    shown = [(milliseconds, ms), (_factor, factors("forward")), (milliseconds, [train]), (_factor, factors("training")), (number, saved)]
    return ["-" if math.isnan(value) else show(value) for show, values in shown for value in values]


def _factor(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def reading(rows: Sequence[Row]) -> str:
    """What the table says, in sentences made from its numbers, one a line."""
    said_of = wrong(rows, named)
    rows = [row for row in rows if row["correct"]]
    if rows:
        launches = {pooling: [row["one_launch"] for row in rows if row["pooling"] == pooling] for pooling in POOLINGS}
        words = ", ".join(f"{pooling} {sum(of)} of {len(of)}" for pooling, of in launches.items() if of)
        said_of.append(f"F.conv_pool2d is one launch, forward: {words}; in training it is F.conv2d, then one pass.")
    for form, title in FORMS.items():
        timed = [row for row in rows if row[f"{form}_forward_ms"]]
        if timed and form != "conv_pool":
            forward, training = (_speedups(timed, form, a_pass) for a_pass in PASSES)
            said_of.append(f"F.conv_pool2d is {forward} as fast as {title}, {training} in training (geometric mean; least to most).")
    return "\n".join(said_of)


def _speedups(rows: Iterable[Row], form: str, a_pass: str) -> str:
    ratios = [row[f"{form}_{a_pass}_ms"] / row[f"conv_pool_{a_pass}_ms"] for row in rows]
    return f"{times(statistics.geometric_mean(ratios))} ({times(min(ratios))} to {times(max(ratios))})"
