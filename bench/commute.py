"""Activation and pooling in both orders: how far apart the results are, and what each order costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from . import check, measure
from .cases import ACTIVATIONS, Site
from .check import Result, WrongResultError
from .peers import PROVIDERS
from .photograph import feature_maps

Layer = Callable[[torch.Tensor], torch.Tensor]

ORDERS = ("act_pool", "pool_act")
PASSES = ("forward", "training")
TIMES = tuple(f"{provider}_{order}_{a_pass}_ms" for provider in PROVIDERS for order in ORDERS for a_pass in PASSES)

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


def row(pair: Pair, batch: int, budget: float) -> dict[str, object]:
    """Flat: what was measured, ``correct``, ``error``, gaps and scales, and median ms under the names in TIMES.

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
        "correct": True,
        "error": None,
        **dict.fromkeys(("value_gap", "value_scale", "gradient_gap", "gradient_scale", "gradient_share", *TIMES)),
    }
    try:
        found |= _gaps(_checked(pair, x))
    except WrongResultError as error:
        return found | {"correct": False, "error": str(error)}
    calls = _calls(pair, x)
    for call in calls.values():
        call()  # may compile: the check asked for gradients, and forward alone may be another kernel
    return found | {name: timed.ms for name, timed in measure.medians(calls, budget).items()}


def _pool(pair: Pair, provider: str, generator: torch.Generator | None = None) -> Layer:
    pool = PROVIDERS[provider][pair.pooling]
    return lambda x: pool(x, pair.site.window, generator)


def _ordered(order: str, activation: Layer, pool: Layer) -> Layer:
    if order == "act_pool":
        return lambda x: pool(activation(x))
    return lambda x: activation(pool(x))


def _result(layer: Layer, x: torch.Tensor) -> Result:
    x = x.detach().requires_grad_()
    y = layer(x)
    (gradient,) = torch.autograd.grad(y, x, check.upstream(y.shape))
    return Result(y.detach(), gradient)


def _checked(pair: Pair, x: torch.Tensor) -> dict[str, Result]:
    """fastpool's result in each order, after the check that it is right."""
    activation = ACTIVATIONS[pair.activation]

    def result(provider: str, order: str) -> Result:
        return _result(_ordered(order, activation, _pool(pair, provider, torch.Generator().manual_seed(SEED))), x)

    results = {order: result("fastpool", order) for order in ORDERS}
    for order, actual in results.items():
        pooled = activation(x) if order == "act_pool" else x
        try:
            if pair.pooling == "stochastic":
                check.drawn(pooled, pair.site.window, _result(_pool(pair, "fastpool", torch.Generator().manual_seed(SEED)), pooled))
            else:
                check.agree(result("torch", order), actual, float(pooled.abs().max()), pair.pooling in check.SELECTING)
        except WrongResultError as error:
            raise WrongResultError(f"{order}: {error}") from None
    return results


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


def _calls(pair: Pair, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    calls: dict[str, Callable[[], object]] = {}
    for provider in PROVIDERS:
        for order in ORDERS:
            layer = _ordered(order, ACTIVATIONS[pair.activation], _pool(pair, provider))
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
