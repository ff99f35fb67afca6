"""One pooling beside its peers: is it right, how long does it take, and how far is that from moving its bytes once?"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fastpool.kernels.pool import KINDS as ARITHMETIC

from . import measure, pool_peers
from .check import Result, WrongResultError, upstream
from .pool_peers import KINDS, LAYOUTS, PASSES, PEERS, WINDOWS, Case, Layer, Sizes, as_tensor, fits, shape_name

FULL_BUDGET, QUICK_BUDGET = 0.4, 0.1
"""Seconds of timed rounds a row."""

PATIENCE = 1.0
"""Seconds: a peer that took longer in its first call is not called again; that call is its time."""

CHECKED = 2**23
"""Elements: of larger maps some planes are compared, evenly from the first to the last, so that float64 fits."""

ROUNDING = 1e-5
"""Of the largest magnitude: float32 rounding of sums that are added in another order."""

SEED = 7
"""Of stochastic pooling's draws while a result is checked."""

TIMES = ("fastpool_ms", "copy_ms", *(f"{peer}_ms" for peer in PEERS))
NUMBERS = (
    "bytes",
    *TIMES,
    *(f"{peer}_ratio" for peer in PEERS),
    "roofline",
    "gb_s",
    "copy_gb_s",
    "fastpool_saved_bytes",
    "torch_saved_bytes",
    "first_s",
)
"""What a row holds: the fewest bytes a call must move; median ms; each peer's time over fastpool's; the copy's time over fastpool's;
GB/s of those bytes; bytes saved for backward an output (training only); seconds of fastpool's first call, compiling included."""


def cases(
    shapes: Iterable[Sizes],
    kinds: Iterable[str],
    windows: Iterable[str],
    layouts: Iterable[str],
    threads: Iterable[int],
) -> list[Case]:
    """Every combination that exists, map by map, so that a run cut short has whole maps."""
    threads = tuple(threads)
    every = product(shapes, windows, kinds, layouts, threads, PASSES)
    return [
        Case(shape, kind, name, layout, a_pass, count)
        for shape, name, kind, layout, count, a_pass in every
        if (name == "global") == kind.startswith("global") and fits(WINDOWS[name], shape)
    ]


def row(case: Case, peers: Sequence[str], budget: float) -> dict[str, Any]:
    """Flat: the case, ``correct``, ``error`` and NUMBERS, None where there is none; a provider whose result is wrong has no time.

    Sets PyTorch's number of threads.  ``budget``: seconds for the timed rounds.
    """
    torch.set_num_threads(case.threads)
    x = _inputs(case.shape).contiguous(memory_format=LAYOUTS[case.layout])
    found: dict[str, Any] = {
        "shape": shape_name(case.shape),
        "kind": case.kind,
        "window": case.window,
        "layout": case.layout,
        "pass": case.a_pass,
        "threads": case.threads,
        "correct": True,
        "error": None,
        **dict.fromkeys(NUMBERS),
        "bytes": fewest_bytes(case),
    }
    ours = pool_peers.layer(pool_peers.FASTPOOL, case)
    try:
        start = perf_counter()
        with torch.random.fork_rng([]):
            torch.manual_seed(SEED)
            result = _result(ours, case, x)
        found["first_s"] = perf_counter() - start
        _check(case, result)
    except WrongResultError as error:
        return found | {"correct": False, "error": f"fastpool: {error}"}
    calls, slow, errors = _competitors(case, x, peers)
    if case.a_pass == "training":
        found["fastpool_saved_bytes"] = saved_bytes(ours, x)
        if "torch_ms" in calls or "torch_ms" in slow:
            found["torch_saved_bytes"] = saved_bytes(pool_peers.layer(pool_peers.TORCH, case), x)
    calls = {"fastpool_ms": _call(ours, case, x), **calls, "copy_ms": _copy(found["bytes"])}
    # Where a peer is slow, so are the rounds, and few are enough.
    found |= slow | measure.medians(calls, budget)
    found |= {f"{peer}_ratio": found[f"{peer}_ms"] / found["fastpool_ms"] for peer in PEERS if found[f"{peer}_ms"]}
    return found | {
        "correct": not errors,
        "error": "; ".join(errors) or None,
        "roofline": found["copy_ms"] / found["fastpool_ms"],
        "gb_s": found["bytes"] / found["fastpool_ms"] / 1e6,
        "copy_gb_s": found["bytes"] / found["copy_ms"] / 1e6,
    }


def fewest_bytes(case: Case) -> int:
    """Forward: input and output once.  Training: those and what is saved; then the output's gradient, what was saved, the input's
    gradient, and where the kind's gradient reads them input and output again."""
    w, kind = WINDOWS[case.window], ARITHMETIC[KINDS[case.kind]]
    x, y = 4 * math.prod(case.shape), 4 * math.prod(_output_shape(case))
    if case.a_pass == "forward":
        return x + y
    saved_dtype = kind.saved_dtype(w.taps if w else math.prod(case.shape[2:]), "float32")
    saved = getattr(torch, saved_dtype).itemsize * y // 4 if saved_dtype else 0
    again = 0 if kind.selects or kind.linear else x + y
    return (x + y + saved) + (y + saved + x + again)


def saved_bytes(layer: Layer, x: torch.Tensor) -> float:
    """Bytes an output that autograd keeps for backward: distinct storages, without the input's own."""
    leaf = x.detach().requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(leaf)  # alive until counted, and so is what it keeps: no two storages at one address
    kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values()) / y.numel()


@functools.lru_cache(maxsize=1)
def _inputs(shape: Sizes) -> torch.Tensor:
    """(N, C, H, W), contiguous: seeded normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@functools.lru_cache(maxsize=2)
def _upstream(shape: torch.Size, layout: str) -> torch.Tensor:
    return upstream(shape).contiguous(memory_format=LAYOUTS[layout])


def _call(layer: Layer, case: Case, x: torch.Tensor) -> Callable[[], Any]:
    """One call as it is timed: forward without a gradient, or forward and backward."""
    if case.a_pass == "forward":
        return lambda: _forward(layer, x)
    leaf = x.detach().requires_grad_()

    def train() -> Any:
        y = layer(leaf)
        return y, torch.autograd.grad(y, leaf, _upstream(y.shape, case.layout))[0]

    return train


@torch.no_grad()
def _forward(layer: Layer, x: torch.Tensor) -> Any:
    return layer(x)


def _copy(moved: int) -> Callable[[], object]:
    """A copy that moves as many bytes as the case: read one half, write the other; cached where the case is."""
    source = torch.zeros(max(1, moved // 8))
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def _competitors(case: Case, x: torch.Tensor, peers: Sequence[str]) -> tuple[dict[str, Callable[[], object]], dict[str, float], list[str]]:
    """Peers' calls, the ms of those that took too long to be called again, and what is wrong with others' results."""
    calls: dict[str, Callable[[], object]] = {}
    slow: dict[str, float] = {}
    errors = []
    for peer in peers:
        layer = PEERS[peer](case, x)
        if layer is None:
            continue
        call = _call(layer, case, x)
        if peer == "compile":
            call()  # compiles
        start = perf_counter()
        result = call()
        seconds = perf_counter() - start
        if peer != "torch":  # PyTorch says what is right
            try:
                _check(case, Result(as_tensor(result), torch.empty(0)))
            except WrongResultError as error:
                errors.append(f"{peer}: {error}")
                continue
        if seconds > PATIENCE:
            slow[f"{peer}_ms"] = seconds * 1e3
        else:
            calls[f"{peer}_ms"] = call
    return calls, slow, errors


class _Truth(NamedTuple):
    """Of the compared planes; ``exact`` is float64, None for poolings that copy an element."""

    value: torch.Tensor
    gradient: torch.Tensor
    exact: Result | None


def _planes(tensor: torch.Tensor, shape: Sizes) -> torch.Tensor:
    """(N, C, ...) -> (planes, 1, ...) of an input of ``shape`` or its output: all, or a few from the first to the last of a large one."""
    n, channels, height, width = shape
    count = n * channels
    if count * height * width > CHECKED:
        count = max(2, CHECKED // (height * width))
    chosen = torch.linspace(0, n * channels - 1, count, dtype=torch.float64).long()
    return tensor[chosen // channels, chosen % channels][:, None]


def _result(layer: Layer, case: Case, x: torch.Tensor) -> Result:
    """Without a gradient in the forward pass: an empty tensor stands for it."""
    result = _call(layer, case, x)()
    return Result(result, torch.empty(0)) if case.a_pass == "forward" else Result(result[0].detach(), result[1])


@functools.lru_cache(maxsize=1)
def _truth(shape: Sizes, kind: str, name: str) -> _Truth:
    """By PyTorch, in float32 and, of sums, float64; of stochastic pooling a draw of fastpool's, once it is found to be one."""
    case = Case(shape, kind, name, "contiguous", "training", 1)
    if kind == "stochastic":
        with torch.random.fork_rng([]):
            torch.manual_seed(SEED)
            drawn = _result(pool_peers.layer(pool_peers.FASTPOOL, case), case, _inputs(shape))
        _check_shapes(case, drawn)
        compared = Result(*(_planes(tensor, shape) for tensor in drawn))
        _drawn(case, compared)
        return _Truth(*compared, None)
    w = WINDOWS[name]
    gy = _planes(_upstream(torch.Size(_output_shape(case)), case.layout), shape)

    def pooled(dtype: torch.dtype) -> Result:
        leaf = _planes(_inputs(shape), shape).to(dtype).requires_grad_()
        y = pool_peers.TORCH[kind](leaf, w)
        return Result(y.detach(), torch.autograd.grad(y, leaf, gy.to(dtype))[0])

    return _Truth(*pooled(torch.float32), None if ARITHMETIC[KINDS[kind]].selects else pooled(torch.float64))


def _check(case: Case, result: Result) -> None:
    """Raise WrongResultError unless this is the pooling: bit for bit where it copies an element; else in float32's rounding."""
    _check_shapes(case, result)
    truth = _truth(case.shape, case.kind, case.window)
    for name, actual in zip(Result._fields, result, strict=True):
        if name == "gradient" and case.a_pass == "forward":
            continue
        theirs = getattr(truth, name)
        actual = _planes(actual, case.shape)
        if name == "value" and truth.exact is None:
            if not torch.equal(actual, theirs):
                raise WrongResultError(f"values differ by up to {(actual - theirs).abs().max():.2g}, and must not differ at all")
            continue
        exact = getattr(truth.exact, name) if truth.exact else theirs.double()
        error, allowed = ((tensor - exact).abs().max() for tensor in (actual, theirs))
        # Not "error > ...": NaN is wrong.
        if not error <= max(2 * allowed, ROUNDING * exact.abs().max()):
            raise WrongResultError(f"{name} off by up to {error:.2g}, PyTorch by {allowed:.2g}")


def _check_shapes(case: Case, result: Result) -> None:
    for name, actual, expected in zip(Result._fields, result, (_output_shape(case), case.shape), strict=True):
        if tuple(actual.shape) != expected and not (name == "gradient" and case.a_pass == "forward"):
            raise WrongResultError(f"{name} of shape {tuple(actual.shape)}, not {expected}")


def _output_shape(case: Case) -> Sizes:
    w = WINDOWS[case.window]
    return (*case.shape[:2], *(w.output_size(*case.shape[2:]) if w else (1, 1)))


def _drawn(case: Case, pooled: Result) -> None:
    """Raise WrongResultError unless these planes can be stochastic pooling: of each window a positive element, or 0 where there is none;
    the gradients of the outputs that are not 0 arrive somewhere in their plane."""
    w = WINDOWS[case.window]
    assert w is not None
    (above, left), (step_h, step_w), (out_h, out_w) = w.padding, w.stride, w.output_size(*case.shape[2:])
    y = pooled.value
    weights = F.pad(_planes(_inputs(case.shape), case.shape).relu(), (left, left, above, above))
    found, largest = torch.zeros(y.shape, dtype=torch.bool), torch.zeros_like(y)
    for i, j in product(*map(range, w.kernel_size)):
        tap = weights[:, :, i : i + (out_h - 1) * step_h + 1 : step_h, j : j + (out_w - 1) * step_w + 1 : step_w]
        found |= tap == y
        largest = torch.maximum(largest, tap)
    if not found.all():
        raise WrongResultError("an output is no element of its window")
    if not torch.equal(y > 0, largest > 0):
        raise WrongResultError("an output is 0 although its window has positive elements")
    gy = _planes(_upstream(torch.Size(_output_shape(case)), case.layout), case.shape).where(y > 0, 0).double()
    apart = (gy.sum((2, 3)) - pooled.gradient.double().sum((2, 3))).abs()
    if not (apart <= ROUNDING * gy.abs().sum((2, 3))).all():
        raise WrongResultError(f"a plane's gradients sum to {apart.max():.2g} more or less than they were given")
