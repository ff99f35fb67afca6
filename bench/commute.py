"""Activation and pooling in both orders: how far apart the results are, what each order costs, and what the pooling alone does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import Any, NamedTuple

import torch

from fastpool import commutes

from . import check, machine, measure
from .cases import ACTIVATIONS, Site
from .check import Result, WrongResultError, said
from .peers import FASTPOOL, TORCH
from .photograph import feature_maps
from .rows import rounded

Layer = Callable[[torch.Tensor], torch.Tensor]

ORDERS = ("act_pool", "pool_act")
PASSES = ("forward", "training")
PROVIDERS = ("torch", "compile", "unfused", "fused")
"""PyTorch eager; the same by torch.compile; PyTorch's activation and fastpool's pooling; both in fastpool's pooling."""
ALONE = "alone"
"""fastpool's pooling of the same map without an activation."""
TIMES = tuple(f"{name}_{a_pass}_ms" for name in (*map("_".join, product(PROVIDERS, ORDERS)), ALONE) for a_pass in PASSES)

SAVED = tuple(f"{provider}_{order}_saved_bytes" for provider in PROVIDERS for order in ORDERS)
"""Bytes that are saved for backward, an output."""

ROUNDING = 1e-5
"""A gap of at most this part of the largest magnitude is rounding."""

SEED = 7
"""Of the draws of stochastic pooling: a window draws the same number in both orders."""


class Case(NamedTuple):
    """One row of the benchmark, to be measured."""

    site: Site
    pooling: str
    activation: str
    batch: int
    threads: int

    @property
    def key(self) -> tuple[Any, ...]:
        return str(self.site), *self[1:]

    def __str__(self) -> str:
        return f"{self.site}, {self.pooling}, {self.activation}, {self.threads} thr"


def cases(
    sites: Iterable[Site], poolings: Iterable[str], activations: Iterable[str], batches: Iterable[int], threads: Iterable[int]
) -> list[Case]:
    """Every combination, site by site, so that a run cut short has whole sites."""
    return [
        Case(site, pooling, activation, batch, count)
        for site, batch, count, pooling, activation in product(sites, batches, threads, poolings, activations)
    ]


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Which case a row is of: ``Case.key``."""
    return tuple(row[name] for name in ("site", "pooling", "activation", "batch", "threads"))


def of_case(case: Case) -> dict[str, Any]:
    """What a row says of its case."""
    return {
        "site": str(case.site),
        "network": case.site.network,
        "pooling": case.pooling,
        "window": "global" if case.pooling.startswith("global") else str(case.site.window),
        "activation": case.activation,
        "law": _law(case.pooling, case.activation),
        "batch": case.batch,
        "threads": case.threads,
        "correct": True,
        "error": None,
    }


def row(case: Case, budget: float, providers: Iterable[str] = PROVIDERS) -> dict[str, Any]:
    """Flat: the case, the law's class, ``correct``, ``error``, gaps and scales, median ms under the names in TIMES and bytes under those
    in SAVED; None for other ``providers``.

    Without gaps and times if a result is wrong; ``error`` then says how.  Sets PyTorch's number of threads.  ``budget``: seconds for the
    timed rounds.
    """
    torch.set_num_threads(case.threads)
    if "compile" in providers:
        compiles_anew()
    x = feature_maps(case.site, case.batch)
    nothing = dict.fromkeys(("value_gap", "value_scale", "gradient_gap", "gradient_scale", "gradient_share", *TIMES, *SAVED))
    found = {**of_case(case), "shape": "x".join(map(str, x.shape)), **nothing}
    try:
        gaps = _gaps(_checked(case, x))
        layers = {f"{provider}_{order}": _layer(case, provider, order) for provider in providers for order in ORDERS}
        saved = {f"{name}_saved_bytes": _saved_bytes(layer, x) for name, layer in layers.items()}
        calls = _calls({**layers, ALONE: _alone(case)}, x)
        for call in calls.values():
            call()  # may compile: the check asked for gradients, and forward alone may be another kernel
        machine.reserve(4 * x.nbytes)
        times = {name: timed.ms for name, timed in measure.medians(calls, budget).items()}
    except Exception as error:  # one case must not end a run of hundreds
        return found | {"correct": False, "error": said(error)}
    return rounded(found | gaps | saved | times)


def compiles_anew() -> None:
    """Forget what torch.compile made: all layers are one function's, and the ninth of them would run eagerly."""
    torch._dynamo.reset()


@functools.cache
def _law(pooling: str, activation: str) -> str:
    """The class of the law for the two, one of fastpool.laws.KINDS."""
    return commutes(activation, f"{pooling}_pool2d").kind


def _layer(case: Case, provider: str, order: str, generator: torch.Generator | None = None) -> Layer:
    """The activation and the pooling in an order, as a provider does them."""
    window = case.site.window
    if provider == "fused":
        fused = FASTPOOL[case.pooling]
        place = "before" if order == "act_pool" else "after"
        return lambda x: fused(x, window, generator, **{place: case.activation})
    pool, activation = (FASTPOOL if provider == "unfused" else TORCH)[case.pooling], ACTIVATIONS[case.activation]

    def layer(x: torch.Tensor) -> torch.Tensor:
        return pool(activation(x), window, generator) if order == "act_pool" else activation(pool(x, window, generator))

    return torch.compile(layer) if provider == "compile" else layer


def _alone(case: Case, seed: int | None = None) -> Layer:
    """The pooling; every call of it draws the same numbers, where there is a seed."""
    pool = FASTPOOL[case.pooling]
    return lambda x: pool(x, case.site.window, None if seed is None else torch.Generator().manual_seed(seed))


def _saved_bytes(layer: Layer, x: torch.Tensor) -> float:
    """Bytes saved for backward an output; a tensor that is saved twice counts once."""
    saved: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(x.detach().requires_grad_())
    return sum(saved.values()) / y.numel()


def _result(layer: Layer, x: torch.Tensor) -> Result:
    x = x.detach().requires_grad_()
    y = layer(x)
    (gradient,) = torch.autograd.grad(y, x, check.upstream(y.shape))
    return Result(y.detach(), gradient)


def _checked(case: Case, x: torch.Tensor) -> dict[str, Result]:
    """The result of each order, one step after the other, after the check that it is right, and that the fused one is."""

    def result(provider: str, order: str) -> Result:
        return _result(_layer(case, provider, order, torch.Generator().manual_seed(SEED)), x)

    results = {order: result("unfused", order) for order in ORDERS}
    for order, actual in results.items():
        activated = ACTIVATIONS[case.activation](x)
        pooled = activated if order == "act_pool" else x
        try:
            if case.pooling == "stochastic":
                check.drawn(pooled, case.site.window, _result(_alone(case, SEED), pooled))
                expected = actual
            else:
                expected = result("torch", order)
                check.agree(expected, actual, float(pooled.abs().max()), case.pooling in check.SELECTING)
            undecided = None
            if case.pooling in check.SELECTING:
                # Of elements that the activation makes equal, but for rounding, the fused pooling may choose another.
                undecided = _undecided(case, x) if order == "act_pool" else torch.zeros(x.shape[:2])
            check.agree(expected, result("fused", order), float(activated.abs().max()), False, undecided)
        except WrongResultError as error:
            raise WrongResultError(f"{order}: {error}") from None
    return results


def _undecided(case: Case, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    activated = ACTIVATIONS[case.activation](x)
    (slopes,) = torch.autograd.grad(activated.sum(), x)
    return check.undecided(case.pooling, case.site.window, activated.detach(), slopes)


def _gaps(results: dict[str, Result]) -> dict[str, float]:
    """Largest differences between the orders and largest magnitudes; ``gradient_share``: elements whose gradient differs, of all."""
    one, other = results.values()
    value_gap = (one.value - other.value).abs().max()
    apart = (one.gradient - other.gradient).abs()
    scale = max(one.gradient.abs().max(), other.gradient.abs().max())
    return {
        "value_gap": float(value_gap),
        "value_scale": float(max(one.value.abs().max(), other.value.abs().max())),
        "gradient_gap": float(apart.max()),
        "gradient_scale": float(scale),
        "gradient_share": float((apart > ROUNDING * scale).double().mean()),
    }


def _calls(layers: Mapping[str, Layer], x: torch.Tensor) -> dict[str, Callable[[], object]]:
    calls: dict[str, Callable[[], object]] = {}
    for name, layer in layers.items():
        calls[f"{name}_forward_ms"] = _forward(layer, x)
        calls[f"{name}_training_ms"] = _training(layer, x)
    return calls


def _forward(layer: Layer, x: torch.Tensor) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return layer(x)

    return call


def _training(layer: Layer, x: torch.Tensor) -> Callable[[], object]:
    leaf = x.detach().requires_grad_()
    with torch.no_grad():
        gy = check.upstream(layer(x).shape)
    return lambda: torch.autograd.grad(layer(leaf), leaf, gy)
