"""What lessons claim about the order of layers, each settled by a measurement: on feature maps of a photograph, float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as T
from torch import nn

import fastpool.functional as F
from fastpool import activations, laws

from . import measure
from .cases import SITES
from .photograph import feature_maps

BATCH = 8
BUDGET = 2.0
"""Seconds of timed rounds a claim."""


class Claim(NamedTuple):
    """A sentence of the lessons, and how it is settled."""

    said: str
    settle: Callable[[torch.Tensor], tuple[str, dict[str, float]]]
    """(maps) -> what is true, in words with the numbers; the numbers."""


def settled(maps: torch.Tensor | None = None) -> Iterator[dict[str, Any]]:
    """A row a claim.  ``maps``: (N, C, H, W); default: VGG-16's of 64 channels and 112 x 112, a photograph through one convolution."""
    if maps is None:
        site = next(s for s in SITES if (s.network, s.height) == ("VGG-16", 112))
        maps = feature_maps(site, BATCH)[:, :64].contiguous()
    with torch.no_grad():
        for claim in CLAIMS:
            found, numbers = claim.settle(maps)
            yield {"claim": claim.said, "found": found, "numbers": numbers, "shape": "x".join(map(str, maps.shape))}


def _pool(x: torch.Tensor) -> torch.Tensor:
    return T.max_pool2d(x, 2)


def _min(x: torch.Tensor) -> torch.Tensor:
    return -T.max_pool2d(-x, 2)


def _apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def _rising() -> dict[str, list[activations.Applied]]:
    """Activations that never fall, by whether their code keeps the order bit for bit."""
    names = [name for name, layer in laws.rows().items() if isinstance(layer, str) and name not in laws.FUNCTIONS]
    known = [activations.named("bench", name) for name in names if not name.startswith(("batch_norm", "dropout"))]
    return {kind: [a for a in known if a.shape.rises and a.shape.ordered == (kind == "exact")] for kind in ("exact", "rounding")}


def _monotone(x: torch.Tensor) -> tuple[str, dict[str, float]]:
    kinds = _rising()
    gaps = {
        kind: max(_apart(_pool(activations.on_torch(a, x)), activations.on_torch(a, _pool(x))) for a in of) for kind, of in kinds.items()
    }
    counts = {kind: len(of) for kind, of in kinds.items()}
    found = (
        f"True of max. The {counts['exact']} whose code keeps the order: {_said(gaps['exact'])} apart in PyTorch;"
        f" the {counts['rounding']} smooth ones: at most {_said(gaps['rounding'])}."
    )
    return found, {f"{kind}_gap": gap for kind, gap in gaps.items()}


def _average(x: torch.Tensor) -> tuple[str, dict[str, float]]:
    first, other = T.avg_pool2d(x.relu(), 2), T.avg_pool2d(x, 2).relu()
    gap, above = _apart(first, other), float((other > first + 1e-6).float().mean())
    share = float((first - other > 1e-6).float().mean())
    found = f"False: relu(avg) <= avg(relu) (above it in {above:.0%} of outputs); they differ in {share:.0%}, by up to {_said(gap)}."
    return found, {"gap": gap, "share": share, "above": above}


def _time(x: torch.Tensor) -> tuple[str, dict[str, float]]:
    weight = torch.randn(64, x.shape[1], 3, 3, generator=torch.Generator().manual_seed(0)) / 24
    calls: dict[str, Callable[[], object]] = {
        "torch_act_first": lambda: T.max_pool2d(x.relu(), 2),
        "torch_pool_first": lambda: T.max_pool2d(x, 2).relu(),
        "fastpool_act_first": lambda: F.max_pool2d(x.relu(), 2),
        "fastpool_pool_first": lambda: F.max_pool2d(x, 2).relu(),
        "conv_with_relu": lambda: F.max_pool2d(F.conv2d(x, weight, padding=1, after="relu"), 2),
        "conv_pool_first": lambda: F.max_pool2d(F.conv2d(x, weight, padding=1), 2).relu(),
    }
    ms = _medians(calls)
    after = {name: ms[f"{name}_pool_first"] / ms[f"{name}_act_first"] - 1 for name in ("torch", "fastpool")}
    fused = ms["conv_pool_first"] / ms["conv_with_relu"] - 1
    found = (
        f"ReLU and max 2x2 take {ms['torch_act_first']:.1f} ms in PyTorch, pool first {after['torch']:+.0%} time;"
        f" with fastpool's pooling {ms['fastpool_act_first']:.1f} ms, pool first {after['fastpool']:+.0%} time."
        f" Behind a convolution that ReLU is fused into, pool first {fused:+.1%} time."
    )
    return found, ms


def _mish(x: torch.Tensor) -> tuple[str, dict[str, float]]:
    first = _pool(T.mish(x))
    naive, two = _apart(first, T.mish(_pool(x))), _apart(first, torch.maximum(T.mish(_pool(x)), T.mish(_min(x))))
    share = float(((first - T.mish(_pool(x))).abs() > 1e-6).float().mean())
    found = (
        f"Not exact: the plain swap is off in {share:.1%} of windows, by up to {_said(naive)}; at the function's two ends,"
        f" max(f(min), f(max)), it is {_said(two)} off."
    )
    return found, {"naive_gap": naive, "share": share, "two_point_gap": two}


def _batch_norm(x: torch.Tensor) -> tuple[str, dict[str, float]]:
    channels = x.shape[1]
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    shift = torch.linspace(-1, 1, channels)
    gaps = {}
    for name, sign in (("up", 1.0), ("down", -1.0)):
        scale = sign * torch.linspace(0.2, 2, channels)

        def norm(t: torch.Tensor, scale: torch.Tensor = scale) -> torch.Tensor:
            return T.batch_norm(t, mean, var, scale, shift)

        gaps[name] = _apart(_pool(norm(x)), norm(_pool(x)))
        gaps[f"{name}_exchanged"] = _apart(_pool(norm(x)), norm(_min(x)))
    training = [T.batch_norm(t, None, None, training=True) for t in (x, _pool(x))]
    trained = _apart(_pool(training[0]), training[1])
    typical = float((_pool(training[0]) - training[1]).abs().mean())
    up, down, exchanged = (_said(gaps[name]) for name in ("up", "down", "down_exchanged"))
    found = (
        f"In inference, scale > 0: {up} apart; scale < 0: {down}, but {exchanged} with min in max's place."
        f" In training the statistics differ: {typical:.2f} on average, up to {_said(trained)}, of values of deviation 1."
    )
    return found, {**gaps, "training_gap": trained, "training_mean": typical}


def _dropout(x: torch.Tensor) -> tuple[str, dict[str, float]]:
    mask = (torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    gaps = {}
    for name, f in (("relu", torch.relu), ("tanh", torch.tanh)):
        gaps[f"{name}_mask"] = _apart(f(x * mask), f(x) * mask)
        gaps[f"{name}_scaled"] = _apart(f(x * mask * 2), f(x) * mask * 2)
    found = (
        f"The mask passes: ReLU {_said(gaps['relu_mask'])}, tanh {_said(gaps['tanh_mask'])} apart. With inverted dropout's factor, p = 0.5:"
        f" ReLU {_said(gaps['relu_scaled'])}, tanh up to {_said(gaps['tanh_scaled'])}."
    )
    return found, gaps


def _norm_and_relu(x: torch.Tensor) -> tuple[str, dict[str, float]]:
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    bias = torch.linspace(-1, 1, x.shape[1])
    first, other = T.batch_norm(x, mean, var, None, bias).relu(), T.batch_norm(x.relu(), mean, var, None, bias)
    gap, share = _apart(first, other), float(((first - other).abs() > 1e-6).float().mean())
    return f"Right: they differ in {share:.0%} of elements, by up to {_said(gap)}.", {"gap": gap, "share": share}


def _shift(x: torch.Tensor) -> tuple[str, dict[str, float]]:
    x = x.relu()
    moved = x.roll(1, -1)
    weight = torch.randn(x.shape[1], 1, 3, 3, generator=torch.Generator().manual_seed(0)) / 3
    inner = (..., slice(1, -1), slice(2, -1))

    def kept(layer: Callable[[torch.Tensor], torch.Tensor]) -> float:
        before, after = layer(x)[inner], layer(moved)[inner]
        return float(((before - after).abs() <= 1e-6 * before.abs().max()).float().mean())

    def padded(mode: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda t: T.conv2d(T.pad(t, (1, 1, 1, 1), mode=mode), weight, stride=2, groups=x.shape[1])

    shares = {
        "max": kept(_pool),
        "avg": kept(lambda t: T.avg_pool2d(t, 2)),
        "max_3x3": kept(lambda t: T.max_pool2d(t, 3, 2, 1)),
        "strided_conv_zeros": kept(padded("constant")),
        "strided_conv_reflect": kept(padded("reflect")),
    }
    found = (
        f"Outputs unchanged by a shift of one pixel, inside: max 2x2 {shares['max']:.1%}, max 3x3 s2 {shares['max_3x3']:.1%},"
        f" avg 2x2 {shares['avg']:.1%}, 3x3 convolution s2 {shares['strided_conv_zeros']:.1%} with zeros around,"
        f" {shares['strided_conv_reflect']:.1%} with reflection: padding changes nothing inside."
    )
    return found, shares


def _cost(x: torch.Tensor) -> tuple[str, dict[str, float]]:
    ms = _medians(
        {
            "max": lambda: F.max_pool2d(x, 2),
            "avg": lambda: F.avg_pool2d(x, 2),
            "l2": lambda: F.l2_pool2d(x, 2),
            "stochastic": lambda: F.stochastic_pool2d(x, 2),
            "stochastic_eval": lambda: F.stochastic_pool2d(x, 2, training=False),
            "torch_max": lambda: T.max_pool2d(x, 2),
            "torch_l2": lambda: T.lp_pool2d(x, 2, 2),
        }
    )
    beside = {name: ms[name] / ms["max"] for name in ("l2", "stochastic", "stochastic_eval")}
    found = (
        f"fastpool, 2x2: L2 takes {beside['l2']:.2f}x max's {ms['max']:.1f} ms, a stochastic draw {beside['stochastic']:.2f}x,"
        f" its expectation {beside['stochastic_eval']:.2f}x; PyTorch's L2 {ms['torch_l2'] / ms['torch_max']:.2f}x its own max's"
        f" {ms['torch_max']:.0f} ms."
    )
    return found, ms


def _convolutions(x: torch.Tensor) -> tuple[str, dict[str, float]]:
    x = x[:1]
    make = torch.Generator().manual_seed(0)
    channels = x.shape[1]
    layers = {size: nn.Conv2d(channels, channels, size, padding=size // 2, bias=False) for size in (3, 5)}
    for layer in layers.values():
        layer.weight.data.normal_(0, 0.02, generator=make)
    small, large = layers[3].weight, layers[5].weight
    ms = _medians(
        {
            "torch_two_3x3": lambda: T.conv2d(T.conv2d(x, small, padding=1), small, padding=1),
            "torch_one_5x5": lambda: T.conv2d(x, large, padding=2),
            "fastpool_two_3x3": lambda: F.conv2d(F.conv2d(x, small, padding=1), small, padding=1),
            "fastpool_one_5x5": lambda: F.conv2d(x, large, padding=2),
        }
    )
    found = (
        f"18 weights against 25 a pair of channels, 28% fewer; time, {channels} channels, one image: {ms['torch_two_3x3']:.1f} against"
        f" {ms['torch_one_5x5']:.1f} ms in PyTorch, {ms['fastpool_two_3x3']:.1f} against {ms['fastpool_one_5x5']:.1f} with fastpool."
    )
    return found, ms


def _medians(calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    for call in calls.values():
        call()  # compiles, or grows
    return {name: timed.ms for name, timed in measure.medians(calls, BUDGET).items()}


def _said(gap: float) -> str:
    return "nothing" if gap == 0 else f"{gap:.2g}"


CLAIMS = (
    Claim("Monotonic activations commute with max pooling", _monotone),
    Claim("... or average pooling", _average),
    Claim("So pool first and save time", _time),
    Claim("Mish is close to monotonic, so the swap could still work", _mish),
    Claim("BN before or after max pooling makes very little difference, but affects speed", _batch_norm),
    Claim("Dropout commutes with any f with f(0) = 0, such as ReLU and tanh", _dropout),
    Claim("BN and ReLU do not commute", _norm_and_relu),
    Claim("Pooling gives shift robustness, padding choice does not", _shift),
    Claim("L2 and stochastic pooling are rare, stochastic is expensive", _cost),
    Claim("Two 3x3 convs see what one 5x5 sees with fewer weights", _convolutions),
)
