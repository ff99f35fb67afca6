"""Activation and pooling in both orders: how far apart the results are, and what each order costs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

from fastpool import commutes

from . import check, measure
from .cases import ACTIVATIONS, Site
from .check import Result, WrongResultError
from .peers import FASTPOOL, TORCH
from .photograph import feature_maps

Layer = Callable[[torch.Tensor], torch.Tensor]

ORDERS = ("act_pool", "pool_act")
PASSES = ("forward", "training")
PROVIDERS = ("torch", "compile", "unfused", "fused")
"""PyTorch eager; the same by torch.compile; PyTorch's activation and fastpool's pooling; both in fastpool's pooling."""
TIMES = tuple(f"{provider}_{order}_{a_pass}_ms" for provider in PROVIDERS for order in ORDERS for a_pass in PASSES)

SAVED = tuple(f"{provider}_{order}_saved_bytes" for provider in PROVIDERS for order in ORDERS)
"""Bytes that are saved for backward, an output."""

ROUNDING = 1e-5
"""A gap of at most this part of the largest magnitude is rounding."""

SEED = 7
"""Of the draws of stochastic pooling: a window draws the same number in both orders."""


class Pair(NamedTuple):
    """One row of the benchmark, to be measured."""

    site: Site
    pooling: str
    activation: str


def pairs(sites: Iterable[Site], poolings: Iterable[str], activations: Iterable[str]) -> list[Pair]:
    """Every combination, site by site, so that a run cut short has whole sites."""
    poolings, activations = tuple(poolings), tuple(activations)
    return [Pair(site, pooling, activation) for site in sites for pooling in poolings for activation in activations]


def row(pair: Pair, batch: int, budget: float, providers: Iterable[str] = PROVIDERS) -> dict[str, object]:
    """Flat: what was measured, ``correct``, ``error``, the law's class, gaps and scales, median ms under the names in TIMES and bytes
    under those in SAVED; None for other ``providers``.

    Without gaps and times if a result is wrong; ``error`` then says how.  ``budget``: seconds for the timed rounds.
    """
    site, pooling, activation = pair
    x = feature_maps(site, batch)
    found: dict[str, object] = {
        "site": str(site),
        "network": site.network,
        "shape": "x".join(map(str, x.shape)),
        "pooling": pooling,
        "window": "global" if pooling.startswith("global") else str(site.window),
        "activation": activation,
        "law": _law(pooling, activation),
        "correct": True,
        "error": None,
        **dict.fromkeys(("value_gap", "value_scale", "gradient_gap", "gradient_scale", "gradient_share", *TIMES, *SAVED)),
    }
    try:
        found |= _gaps(_checked(pair, x))
    except WrongResultError as error:
        return found | {"correct": False, "error": str(error)}
    layers = {(provider, order): _layer(pair, provider, order) for provider in providers for order in ORDERS}
    found |= {f"{provider}_{order}_saved_bytes": _saved_bytes(layer, x) for (provider, order), layer in layers.items()}
    calls = _calls(layers, x)
    for call in calls.values():
        call()  # may compile: the check asked for gradients, and forward alone may be another kernel
    return found | {name: timed.ms for name, timed in measure.medians(calls, budget).items()}


@functools.cache
def _law(pooling: str, activation: str) -> str:
    """The class of the law for the two, one of fastpool.laws.KINDS."""
    return commutes(activation, f"{pooling}_pool2d").kind


def _layer(pair: Pair, provider: str, order: str, generator: torch.Generator | None = None) -> Layer:
    """The activation and the pooling in an order, as a provider does them."""
    window = pair.site.window
    if provider == "fused":
        fused = FASTPOOL[pair.pooling]
        place = "before" if order == "act_pool" else "after"
        return lambda x: fused(x, window, generator, **{place: pair.activation})
    pool, activation = (FASTPOOL if provider == "unfused" else TORCH)[pair.pooling], ACTIVATIONS[pair.activation]

    def layer(x: torch.Tensor) -> torch.Tensor:
        return pool(activation(x), window, generator) if order == "act_pool" else activation(pool(x, window, generator))

    return torch.compile(layer) if provider == "compile" else layer


def _alone(pair: Pair) -> Layer:
    pool = FASTPOOL[pair.pooling]
    return lambda x: pool(x, pair.site.window, torch.Generator().manual_seed(SEED))


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


def _checked(pair: Pair, x: torch.Tensor) -> dict[str, Result]:
    """The result of each order, one step after the other, after the check that it is right, and that the fused one is."""

    def result(provider: str, order: str) -> Result:
        return _result(_layer(pair, provider, order, torch.Generator().manual_seed(SEED)), x)

    results = {order: result("unfused", order) for order in ORDERS}
    for order, actual in results.items():
        activated = ACTIVATIONS[pair.activation](x)
        pooled = activated if order == "act_pool" else x
        try:
            if pair.pooling == "stochastic":
                check.drawn(pooled, pair.site.window, _result(_alone(pair), pooled))
                expected = actual
            else:
                expected = result("torch", order)
                check.agree(expected, actual, float(pooled.abs().max()), pair.pooling in check.SELECTING)
            undecided = None
            if pair.pooling in check.SELECTING:
                # Of elements that the activation makes equal, but for rounding, the fused pooling may choose another.
                undecided = _undecided(pair, x) if order == "act_pool" else torch.zeros(x.shape[:2])
            check.agree(expected, result("fused", order), float(activated.abs().max()), False, undecided)
        except WrongResultError as error:
            raise WrongResultError(f"{order}: {error}") from None
    return results


def _undecided(pair: Pair, x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    activated = ACTIVATIONS[pair.activation](x)
    (slopes,) = torch.autograd.grad(activated.sum(), x)
    return check.undecided(pair.pooling, pair.site.window, activated.detach(), slopes)


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


def _calls(layers: Mapping[tuple[str, str], Layer], x: torch.Tensor) -> dict[str, Callable[[], object]]:
    calls: dict[str, Callable[[], object]] = {}
    for (provider, order), layer in layers.items():
        calls[f"{provider}_{order}_forward_ms"] = _forward(layer, x)
        calls[f"{provider}_{order}_training_ms"] = _training(layer, x)
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
