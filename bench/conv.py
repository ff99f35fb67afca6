"""One convolution layer beside its peers: is it right, how long does it take, and how far is that from the machine's two limits?"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from time import perf_counter
from typing import Any, NamedTuple

import torch

from . import conv_peers, machine, measure
from .check import WrongResultError, said
from .conv_layers import Layer
from .conv_peers import PASSES, PEERS, Call, Case, operands
from .libraries import as_tensor
from .peak import peak
from .rows import rounded

FULL_BUDGET, QUICK_BUDGET = 0.2, 0.05
"""Seconds of timed rounds a row, at most, once every competitor was sampled as often as ``measure.medians`` asks for."""

PATIENCE, MUCH_SLOWER = 0.5, 4
"""Seconds, and times fastpool's first call: a peer that took longer than both in its first call is not called again; that call is
its time."""

ROUNDING = 1e-6
"""Of the largest magnitude: below, a result is right, even where PyTorch's is more than twice as exact."""

PEERS_ROUNDING = 1e-4
"""Of the largest magnitude: above, a peer computes something else.  They may round as they like."""

LAYER = ("in_channels", "height", "width", "out_channels", "kernel_size", "stride", "padding", "groups", "bias", "count")

TIMES = ("fastpool_ms", "functional_ms", "copy_ms", *(f"{peer}_ms" for peer in PEERS))
NUMBERS = (
    "flops",
    "bytes",
    *TIMES,
    "torch_layout",
    *(f"{peer}_ratio" for peer in PEERS),
    "gflop_s",
    "peak_gflop_s",
    "peak",
    "roofline",
    "bound",
    "fastpool_error",
    "torch_error",
    "im2col_bytes",
    "packed_bytes",
    "panel_bytes",
    "fastpool_faults",
    "torch_faults",
    "first_s",
)
"""What a row holds: the operations and the fewest bytes of a call; median ms, of the function that packs weights in each call too
(forward); the layout in which PyTorch was quicker; each peer's time over fastpool's; GFLOP/s, the most there can be, how that was
measured, and the part that was reached; the copy's time over fastpool's; which of the two limits is nearer, 'compute' or 'memory'; the
largest error against float64 over the largest magnitude; bytes beside operands and result (forward): of im2col for an image, of
fastpool's packed weights, of its panels on all threads; page faults a call; seconds of fastpool's first call, compiling included."""


def cases(
    layers: Iterable[Layer], batches: Mapping[str, Iterable[int]], layouts: Iterable[str], passes: Iterable[str], threads: Iterable[int]
) -> list[Case]:
    """Every combination that exists, network by network and batch by batch, as the tables are; then pass by pass, so that a truth is
    made once.  ``batches``: images, of each network."""
    layers, layouts, passes, threads = tuple(layers), tuple(layouts), tuple(passes), tuple(threads)
    found = []
    for network in dict.fromkeys(layer.network for layer in layers):
        of = [layer for layer in layers if layer.network == network]
        for batch, layer, a_pass, layout, count in product(dict.fromkeys(batches[network]), of, passes, layouts, threads):
            if not (layer.first and a_pass == "grad_input"):
                found.append(Case(layer, batch, layout, a_pass, count))
    return found


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Which case a row is of: ``Case.key``."""
    return tuple(row[name] for name in ("network", "layer", "batch", "layout", "pass", "threads"))


def row(case: Case, peers: Sequence[str], budget: float) -> dict[str, Any]:
    """Flat: the case, ``correct``, ``error`` and NUMBERS, None where there is none; a provider whose result is wrong has no time.

    Sets PyTorch's number of threads.  ``budget``: seconds for the timed rounds.
    """
    torch.set_num_threads(case.threads)
    found: dict[str, Any] = {
        "network": case.layer.network,
        "layer": case.layer.name,
        "batch": case.batch,
        "layout": case.layout,
        "pass": case.a_pass,
        "threads": case.threads,
        "correct": True,
        "error": None,
        **{name: getattr(case.layer, name) for name in LAYER},
        **dict.fromkeys(NUMBERS),
        "flops": case.flops,
        "bytes": case.bytes,
    }
    try:
        _fill(found, case, peers, budget)
    except Exception as error:  # one case must not end a run of thousands
        found |= {"correct": False, "error": f"fastpool: {said(error)}"}
    return rounded(found)


def _fill(found: dict[str, Any], case: Case, peers: Sequence[str], budget: float) -> None:
    exact = _exact(case.layer, case.batch, case.a_pass)
    # By PyTorch on the same tensors and threads: its error changes with both, as the order of its sums does; 7 times seen.
    found["torch_error"] = _error(case, conv_peers.module_call(torch.nn.Conv2d, case)(), exact)
    allowed = max(2 * found["torch_error"], ROUNDING)
    if case.a_pass == "forward":
        found["im2col_bytes"] = conv_peers.im2col_bytes(case.layer)
        found["packed_bytes"], found["panel_bytes"] = conv_peers.memory(case)
    start = perf_counter()
    call = conv_peers.fastpool_call(case)
    result = call()
    found["first_s"] = perf_counter() - start
    found["fastpool_error"] = _error(case, result, exact)
    _allow(found["fastpool_error"], allowed)
    del result  # its memory is the peers' to use
    calls = {"fastpool_ms": call}
    if case.a_pass == "forward":
        calls["functional_ms"] = conv_peers.packing_call(case)
        _allow(_error(case, calls["functional_ms"](), exact), allowed)
    start = perf_counter()
    call()
    theirs, slow, errors = _competitors(case, peers, max(PATIENCE, MUCH_SLOWER * (perf_counter() - start)), exact)
    most = peak(case.threads)
    machine.reserve(2 * case.bytes)
    timed = measure.medians({**calls, **theirs, "copy_ms": measure.copying(case.bytes)}, budget)
    ms = {name: of.ms for name, of in timed.items()} | slow
    found |= {name: ms[name] for name in (*calls, "copy_ms")}
    for peer in peers:
        tried = {name: ms[name] for name in ms if name.startswith(f"{peer} ")}
        if tried:
            best = min(tried, key=lambda name: tried[name])
            found[f"{peer}_ms"] = tried[best]
            if peer == "torch":
                found["torch_layout"] = best.removeprefix("torch ")
                found["torch_faults"] = timed[best].faults if best in timed else None
    ours = found["fastpool_ms"]
    found |= {f"{peer}_ratio": found[f"{peer}_ms"] / ours for peer in PEERS if found[f"{peer}_ms"]}
    floor = case.flops / most / 1e6
    found |= {"gflop_s": case.flops / ours / 1e6, "peak_gflop_s": most, "peak": floor / ours}
    found |= {"roofline": found["copy_ms"] / ours, "bound": "compute" if floor >= found["copy_ms"] else "memory"}
    found |= {"fastpool_faults": timed["fastpool_ms"].faults, "correct": not errors, "error": "; ".join(errors) or None}


def _competitors(case: Case, peers: Sequence[str], patience: float, exact: _Exact) -> tuple[dict[str, Call], dict[str, float], list[str]]:
    """Peers' calls by 'peer layout', the ms of those that took over ``patience`` seconds, and what is wrong."""
    calls: dict[str, Call] = {}
    slow: dict[str, float] = {}
    errors = []
    for peer in peers:
        try:
            for layout, call in (PEERS[peer](case) or {}).items():
                if peer == "compile":
                    call()  # compiles
                start = perf_counter()
                result = call()
                seconds = perf_counter() - start
                _allow(_error(case, result, exact), PEERS_ROUNDING)
                del result
                if seconds > patience:
                    slow[f"{peer} {layout}"] = seconds * 1e3
                else:
                    calls[f"{peer} {layout}"] = call
        except Exception as error:  # each library has its own
            errors.append(f"{peer}: {said(error)}")
    return calls, slow, errors


class _Exact(NamedTuple):
    value: torch.Tensor
    """float64"""
    largest: float
    """Magnitude in it."""


@functools.lru_cache(maxsize=1)
def _exact(layer: Layer, batch: int, a_pass: str) -> _Exact:
    given = operands(layer, batch, "contiguous")
    x, weight, bias, gy = (t if t is None else t.double() for t in given)
    window = ([layer.stride] * 2, [layer.padding] * 2, [1, 1], False, [0, 0], layer.groups)
    with measure.every_core(), torch.no_grad():
        if a_pass == "forward":
            value = torch.ops.aten.convolution(x, weight, bias, *window)
        else:
            wanted = [a_pass == name for name in (*PASSES[1:], "grad_bias")]
            value = torch.ops.aten.convolution_backward(gy, x, weight, None, *window, wanted)[wanted.index(True)]
    return _Exact(value, float(value.abs().max()))


def _error(case: Case, result: Any, exact: _Exact) -> float:
    """The largest, over the largest magnitude; WrongResultError if the shape is another."""
    actual, name = as_tensor(result), case.a_pass.replace("_", " ")
    if tuple(actual.shape) != case.result_shape:
        raise WrongResultError(f"{name} of shape {tuple(actual.shape)}, not {case.result_shape}")
    if not actual.isfinite().all():
        raise WrongResultError(f"{name} is not finite")
    with torch.no_grad():
        return float((actual - exact.value).abs().max()) / exact.largest


def _allow(error: float, allowed: float) -> None:
    if error > allowed:
        raise WrongResultError(f"off by up to {error:.2g} of the largest magnitude, where {allowed:.2g} is rounding")
