"""Convolution, ReLU and max pooling as networks have them in a row: in one launch, one after the other, and beside PyTorch, ONNX Runtime
and OpenVINO."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
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

from . import conv_peers, measure
from .check import said
from .conv_layers import LAYERS, Layer
from .libraries import LAYOUTS, TITLES, as_tensor, onnx_chain, onnxruntime_call, openvino_call
from .rows import milliseconds, rounded, wrong

PEERS = ("torch", "onnxruntime", "openvino")
NETWORKS = ("CIFAR10Net", "AlexNet", "VGG-16")
BATCHES = (1, 8)
BUDGET = 0.6
"""Seconds of timed rounds a row."""

ROUNDING = 1e-4
"""Of the largest magnitude: above, something else is computed."""


class Case(NamedTuple):
    """One row of the benchmark, to be measured."""

    layer: Layer
    window: tuple[int, int]
    """The pooling's kernel_size and stride."""
    batch: int
    layout: str
    threads: int

    @property
    def key(self) -> tuple[Any, ...]:
        return self.layer.network, self.name, self.batch, self.layout, self.threads

    @property
    def name(self) -> str:
        return f"{self.layer.name}; {self.window[0]}x{self.window[0]} s{self.window[1]}"

    @property
    def convolved(self) -> conv_peers.Case:
        return conv_peers.Case(self.layer, self.batch, self.layout, "forward", self.threads)

    def __str__(self) -> str:
        return f"{self.layer.network} {self.name}, batch {self.batch}, {self.layout}"


def pooled_layers() -> list[tuple[Layer, tuple[int, int]]]:
    """The layers that a pooling follows: the next one's maps are smaller than theirs, or they are the last, but CIFAR10Net's."""
    found = []
    for network in NETWORKS:
        of = [layer for layer in LAYERS if layer.network == network]
        for layer, after in zip(of, [*of[1:], None], strict=True):
            if after.height < layer.output_size[0] if after else network != "CIFAR10Net":
                found.append((layer, (3, 2) if network == "AlexNet" else (2, 2)))
    return found


def cases(networks: Iterable[str], batches: Iterable[int], layouts: Iterable[str], threads: Iterable[int]) -> list[Case]:
    networks = tuple(networks)
    of = [pair for pair in pooled_layers() if pair[0].network in networks]
    return [Case(*pair, *rest) for rest in product(batches, layouts, threads) for pair in of]


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Which case a row is of: ``Case.key``."""
    return tuple(row[name] for name in ("network", "block", "batch", "layout", "threads"))


def named(row: Mapping[str, Any]) -> str:
    """'VGG-16 64x224x224 to 64, 3x3 p1; 2x2 s2, batch 8 contiguous, 1 thr'"""
    return f"{row['network']} {row['block']}, batch {row['batch']} {row['layout']}, {row['threads']} thr"


def row(case: Case, peers: Sequence[str], budget: float) -> dict[str, Any]:
    """Flat: the case, ``correct``, ``error``, ``in_one`` (whether the fused form is one launch), median ms and ratios of each provider's
    time to the fused one's.  A peer whose result is wrong has no time.  Sets PyTorch's number of threads."""
    torch.set_num_threads(case.threads)
    found: dict[str, Any] = {
        "network": case.layer.network,
        "block": case.name,
        "batch": case.batch,
        "layout": case.layout,
        "threads": case.threads,
        "correct": True,
        "error": None,
    }
    ours, in_one = _ours(case)
    expected = ours["unfused"]()
    calls, errors = {}, []
    makers = {name: functools.partial(ours.get, name) for name in ours} | {peer: functools.partial(_PEERS[peer], case) for peer in peers}
    for name, make in makers.items():
        try:
            call: Any = make()
            apart = float((as_tensor(call()) - expected).abs().max() / expected.abs().max())
            if not apart <= ROUNDING:
                raise ArithmeticError(f"off by {apart:.2g} of the largest magnitude")
            calls[name] = call
        except Exception as error:  # each library has its own
            errors.append(f"{name}: {said(error)}")
    # A copy goes first, for who comes after OpenVINO finds its threads still on the cores.
    timed = measure.medians({"copy": measure.copying(expected.numel() * 8), **calls}, budget)
    ms = {name: of.ms for name, of in timed.items()}
    found |= {"in_one": in_one, **{f"{name}_ms": ms.get(name) for name in ("fused", "unfused", *PEERS)}}
    found |= {f"{name}_ratio": ms[name] / ms["fused"] if name in ms and "fused" in ms else None for name in ("unfused", *PEERS)}
    return rounded(found | {"correct": not errors, "error": "; ".join(errors) or None})


def _ours(case: Case) -> tuple[dict[str, Callable[[], torch.Tensor]], bool]:
    """fastpool's two forms, with weights that are packed once; whether the fused one is one launch."""
    layer, given, kept, also = case.layer, conv_peers.operands(case.layer, case.batch, case.layout), convolution.Kept(), convolution.Kept()
    geometry = (layer.stride, layer.padding, 1, layer.groups)
    op = convolution.request("conv2d", 2, *geometry)
    relu = convolution.epilogue("conv2d", "relu")

    def fused() -> torch.Tensor:
        with torch.no_grad():
            return F.conv_pooled(given.x, given.weight, given.bias, geometry, None, "relu", ("max", *case.window, 0), kept)

    def unfused() -> torch.Tensor:
        with torch.no_grad():
            return F.max_pool2d(convolution.forward(given.x, given.weight, given.bias, op, relu, None, also), *case.window)

    window = Pooling("conv_pool2d", KINDS["max"], 2, asked("conv_pool2d", 2, *case.window, 0, 1, False))
    plan, _ = convolution.pooling_plan(convolution.called(op, given.x, given.weight), relu, window)
    return {"fused": fused, "unfused": unfused}, plan is not None


def _torch(case: Case) -> Callable[[], torch.Tensor]:
    made, given = conv_peers.module(torch.nn.Conv2d, case.convolved), conv_peers.operands(case.layer, case.batch, case.layout)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return T.max_pool2d(torch.relu_(made(given.x)), *case.window)

    return call


def _model(case: Case) -> tuple[bytes, torch.Tensor]:
    layer, given = case.layer, conv_peers.operands(case.layer, case.batch, "contiguous")
    constants = {"w": given.weight} | ({} if given.bias is None else {"b": given.bias})
    size, stride = case.window
    nodes: list[tuple[str, Mapping[str, Any], Mapping[str, torch.Tensor]]] = [
        ("Conv", {"strides": [layer.stride] * 2, "pads": [layer.padding] * 4, "kernel_shape": [layer.kernel_size] * 2}, constants),
        ("Relu", {}, {}),
        ("MaxPool", {"kernel_shape": [size] * 2, "strides": [stride] * 2}, {}),
    ]
    out = [(n - size) // stride + 1 for n in layer.output_size]
    return onnx_chain(nodes, tuple(given.x.shape), (case.batch, layer.out_channels, *out)), given.x


def _onnxruntime(case: Case) -> Callable[[], Any]:
    model, x = _model(case)
    return onnxruntime_call(model, case.threads, x)


def _openvino(case: Case) -> Callable[[], Any]:
    model, x = _model(case)
    return openvino_call(model, case.threads, x)


_PEERS = {"torch": _torch, "onnxruntime": _onnxruntime, "openvino": _openvino}


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """At most 110 columns wide.  x: another's time over the fused one's; apart: fastpool's own two launches."""
    made = Table(box=box.SIMPLE_HEAD, padding=0)
    for header in ("\nblock", "lay-\nout"):
        made.add_column(header, no_wrap=True)
    for header in ("N", "fused\nms", "apart\nms", "apart\nx", "torch\nx", "onnxr.\nx", "openv.\nx", "in\none"):
        made.add_column(header, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        ratios = (row[f"{name}_ratio"] for name in ("unfused", *PEERS))
        ms = (row[f"{name}_ms"] for name in ("fused", "unfused"))
        if row["network"] != previous:
            made.add_section()
            made.add_row(f"[bold]{row['network']}")
            previous = row["network"]
        cells = [*("-" if value is None else milliseconds(value) for value in ms), *("-" if r is None else f"{r:.2f}" for r in ratios)]
        made.add_row(
            row["block"],
            "last" if row["layout"] == "channels_last" else "cont.",
            str(row["batch"]),
            *cells,
            "yes" if row["in_one"] else "no",
        )
    return made


def reading(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the table says."""
    said_of = []
    for name, title in (("unfused", "fastpool's own two launches"), *((peer, TITLES[peer]) for peer in PEERS)):
        for layout in LAYOUTS:
            ratios = [row[f"{name}_ratio"] for row in rows if row[f"{name}_ratio"] and row["layout"] == layout]
            if ratios:
                mean, ahead = statistics.geometric_mean(ratios), sum(r >= 1 for r in ratios)
                spread = f"{min(ratios):.2f}x to {max(ratios):.2f}x, ahead in {ahead} of {len(ratios)}"
                said_of.append(f"{layout}: {mean:.2f}x as fast as {title} in the geometric mean ({spread}).")
    return "\n".join([*said_of, *wrong(rows, named)])
