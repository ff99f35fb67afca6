"""One pooling beside its peers: is it right, how long does it take, and how far is that from moving its bytes once?"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fastpool.kernels.pool import KINDS as ARITHMETIC

from . import machine, measure, pool_peers
from .check import Result, WrongResultError, said, upstream
from .libraries import LAYOUTS, as_tensor
from .pool_peers import (
    CALLS,
    GROWTH_KINDS,
    GROWTH_SHAPE,
    GROWTH_WINDOWS,
    KINDS,
    PASSES,
    PEERS,
    TINY,
    WINDOWS,
    Case,
    Layer,
    Sizes,
    Sliding,
    exists,
    shape_name,
)
from .rows import rounded

FULL_BUDGET, QUICK_BUDGET = 0.1, 0.05
"""Seconds of timed rounds a row, at most, once every competitor was sampled as often as ``measure.medians`` asks for."""

PATIENCE, MUCH_SLOWER = 0.1, 4
"""Seconds, and times fastpool's first call: a peer that took longer than both in its first call is not called again; that call is
its time."""

READ, PART = 2**31, 10
"""Elements: where the windows of a case read more, each one as often as it is read, peers are timed on one of so many parts of the
map's rows, and their time is taken that many times; so is fastpool's if it draws.  PyTorch's 13x13 on 1x16x3000x2000 alone would be
20 s a call."""

CHECKED = 2**21
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
    "fastpool_faults",
    "torch_faults",
    "part",
    "peers_part",
    "first_s",
)
"""What a row holds: the fewest bytes a call must move; median ms; each peer's time over fastpool's; the copy's time over fastpool's;
GB/s of those bytes; bytes saved for backward an output (training only); page faults a call; the part of the map that fastpool and the
copy, and that peers were timed on; seconds of fastpool's first call, compiling included.  Rows of the passes CALLS hold neither bytes
nor what follows from them."""


def cases(
    shapes: Iterable[Sizes],
    kinds: Iterable[str],
    windows: Iterable[str] | None,
    layouts: Iterable[str],
    threads: Iterable[int],
) -> list[Case]:
    """Every combination that exists, map by map, so that a run cut short has whole maps; in one map window by window, then kind by
    kind, so that inputs and truths are made once.  Without ``windows``: all, GROWTH_WINDOWS on their map alone."""
    kinds, layouts, threads = tuple(kinds), tuple(layouts), tuple(threads)
    found = []
    for shape in shapes:
        if shape_name(shape) == TINY:
            tiny = [pair for pair in pool_peers.TINY_CALLS if pair[0] in kinds and (windows is None or pair[1] in windows)]
            found += [Case(shape, *pair, "contiguous", a_pass, count) for pair, count, a_pass in product(tiny, threads, CALLS)]
            continue
        for name, kind, layout, count, a_pass in product(windows or WINDOWS, kinds, layouts, threads, PASSES):
            growing = name in GROWTH_WINDOWS and (kind not in GROWTH_KINDS or (windows is None and shape_name(shape) != GROWTH_SHAPE))
            if exists(kind, name, shape) and not growing:
                found.append(Case(shape, kind, name, layout, a_pass, count))
    return found


def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Which case a row is of: ``Case.key``."""
    return tuple(row[name] for name in ("shape", "kind", "window", "layout", "pass", "threads"))


def row(case: Case, peers: Sequence[str], budget: float) -> dict[str, Any]:
    """Flat: the case, ``correct``, ``error`` and NUMBERS, None where there is none; a provider whose result is wrong has no time.

    Sets PyTorch's number of threads.  ``budget``: seconds for the timed rounds.
    """
    torch.set_num_threads(case.threads)
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
    }
    try:
        found |= _tiny_row(case, peers, budget) if case.a_pass in CALLS else _row(case, peers, budget)
    except Exception as error:  # one case must not end a run of thousands
        return found | {"correct": False, "error": f"fastpool: {said(error)}"}
    ours = found["fastpool_ms"]
    found |= {f"{peer}_ratio": found[f"{peer}_ms"] / ours for peer in PEERS if found[f"{peer}_ms"]}
    if found["copy_ms"]:
        moved = found["bytes"] / 1e6
        found |= {"roofline": found["copy_ms"] / ours, "gb_s": moved / ours, "copy_gb_s": moved / found["copy_ms"]}
    return rounded(found)


def _row(whole: Case, peers: Sequence[str], budget: float) -> dict[str, Any]:
    part = _part(whole)
    case = part if whole.kind == "stochastic" else whole  # a draw reads every element of its window, whoever draws
    x = _laid_out(case.shape, case.layout)
    ours = pool_peers.layer(pool_peers.FASTPOOL, case)
    start = perf_counter()
    with torch.random.fork_rng([]):
        torch.manual_seed(SEED)
        result, saved = saved_bytes(lambda: _result(ours, case, x), x)
    first = perf_counter() - start
    _check(case, result)
    del result  # its memory is the peers' to use
    call = _call(ours, case, x)
    start = perf_counter()
    call()
    calls, found = _competitors(part, peers, max(PATIENCE, MUCH_SLOWER * (perf_counter() - start)))
    found |= {"first_s": first, "fastpool_saved_bytes": saved}
    calls = {"fastpool_ms": call, **calls, "copy_ms": measure.copying(fewest_bytes(case))}
    machine.reserve(fewest_bytes(case._replace(a_pass="training")))  # twice what its call allocates
    found |= _timed(calls, budget)
    found |= {"bytes": fewest_bytes(whole), "part": _outputs(case) / _outputs(whole), "peers_part": _outputs(part) / _outputs(whole)}
    for name in TIMES:
        if name in found:
            found[name] /= found["part" if name in ("fastpool_ms", "copy_ms") else "peers_part"]
    if case.a_pass == "forward":
        found |= dict.fromkeys(("fastpool_saved_bytes", "torch_saved_bytes"))
    return found


def _part(case: Case) -> Case:
    """The case itself, or that of fewer of its map's rows."""
    n, channels, height, width = case.shape
    if not isinstance(WINDOWS[case.window], Sliding) or case.taps * _outputs(case) < READ:
        return case
    return case._replace(shape=(n, channels, height // PART, width))


def _outputs(case: Case) -> int:
    return math.prod(case.output_shape)


def _tiny_row(case: Case, peers: Sequence[str], budget: float) -> dict[str, Any]:
    """What a call costs where there is next to nothing to pool: the public functions beside PyTorch's, as they are called."""
    x = _laid_out(case.shape, case.layout).detach().requires_grad_(case.a_pass == "call_grad")
    makers = pool_peers.TINY_CALLS[case.kind, case.window]
    calls = {f"{name}_ms": makers[name](x) for name in ("fastpool", *peers) if name in makers}
    start = perf_counter()
    result = calls["fastpool_ms"]()
    first = perf_counter() - start
    _check(case, Result(result.detach(), torch.empty(0)))
    for call in calls.values():
        call()
    return {"first_s": first, **_timed(calls, budget)}


def _timed(calls: dict[str, Callable[[], object]], budget: float) -> dict[str, float]:
    timed = measure.medians(calls, budget)
    faults = {f"{name}_faults": timed[f"{name}_ms"].faults for name in ("fastpool", "torch") if f"{name}_ms" in timed}
    return {name: of.ms for name, of in timed.items()} | faults


def fewest_bytes(case: Case) -> int:
    """Forward: input and output once.  Training: those and what is saved; then the output's gradient, what was saved, the input's
    gradient, and where the kind's gradient reads them input and output again."""
    kind = ARITHMETIC[KINDS[case.kind]]
    x, y = 4 * math.prod(case.shape), 4 * math.prod(case.output_shape)
    if case.a_pass == "forward":
        return x + y
    saved_dtype = kind.saved_dtype(case.taps, "float32")
    saved = getattr(torch, saved_dtype).itemsize * y // 4 if saved_dtype else 0
    again = 0 if kind.selects or kind.linear else x + y
    return (x + y + saved) + (y + saved + x + again)


def saved_bytes(call: Callable[[], Result], x: torch.Tensor) -> tuple[Result, float]:
    """What the call returns, and the bytes an output that autograd kept for backward meanwhile: distinct storages, without the input's."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    # Kept until backward has begun, and nothing is kept after that: no two storages at one address.
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    kept.pop(x.untyped_storage().data_ptr(), None)
    return result, sum(kept.values()) / result.value.numel()


@functools.lru_cache(maxsize=2)
def _inputs(shape: Sizes) -> torch.Tensor:
    """(N, C, H, W), contiguous: seeded normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@functools.lru_cache(maxsize=2 * len(LAYOUTS))
def _laid_out(shape: Sizes, layout: str) -> torch.Tensor:
    return _inputs(shape).contiguous(memory_format=LAYOUTS[layout])


@functools.lru_cache(maxsize=2 * len(LAYOUTS))
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


def _competitors(case: Case, peers: Sequence[str], patience: float) -> tuple[dict[str, Callable[[], object]], dict[str, Any]]:
    """Peers' calls; and of the row the ms of those that took over ``patience`` seconds, the bytes PyTorch saves, and what is wrong."""
    x = _laid_out(case.shape, case.layout)
    calls: dict[str, Callable[[], object]] = {}
    found: dict[str, Any] = {}
    errors = []
    for peer in peers:
        try:
            layer = PEERS[peer](case, x)
            if layer is None:
                continue
            call = _call(layer, case, x)
            if peer == "compile":
                call()  # compiles
            start = perf_counter()
            result, saved = saved_bytes(lambda layer=layer: _result(layer, case, x), x)
            seconds = perf_counter() - start
            if peer == "torch":  # PyTorch says what is right
                found["torch_saved_bytes"] = saved
            else:
                _check(case, result)
        except Exception as error:  # each library has its own
            errors.append(f"{peer}: {said(error)}")
            continue
        del result
        if seconds > patience:
            found[f"{peer}_ms"] = seconds * 1e3
        else:
            calls[f"{peer}_ms"] = call
    return calls, found | {"correct": not errors, "error": "; ".join(errors) or None}


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
    return Result(as_tensor(result), torch.empty(0)) if case.a_pass == "forward" else Result(result[0].detach(), result[1])


@functools.lru_cache(maxsize=2)
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
    gy = _planes(_upstream(torch.Size(case.output_shape), case.layout), shape)

    def pooled(dtype: torch.dtype) -> Result:
        leaf = _planes(_inputs(shape), shape).to(dtype).requires_grad_()
        y = pool_peers.TORCH[kind](leaf, w)
        return Result(y.detach(), torch.autograd.grad(y, leaf, gy.to(dtype))[0])

    with measure.every_core():
        return _Truth(*pooled(torch.float32), None if ARITHMETIC[KINDS[kind]].selects else pooled(torch.float64))


def _check(case: Case, result: Result) -> None:
    """Raise WrongResultError unless this is the pooling: bit for bit where it copies an element; else in float32's rounding."""
    _check_shapes(case, result)
    truth = _truth(case.shape, case.kind, case.window)
    for name, actual in zip(Result._fields, result, strict=True):
        if name == "gradient" and case.a_pass != "training":
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
    for name, actual, expected in zip(Result._fields, result, (case.output_shape, case.shape), strict=True):
        if tuple(actual.shape) != expected and not (name == "gradient" and case.a_pass != "training"):
            raise WrongResultError(f"{name} of shape {tuple(actual.shape)}, not {expected}")


def _drawn(case: Case, pooled: Result) -> None:
    """Raise WrongResultError unless these planes can be stochastic pooling: of each window a positive element, or 0 where there is none;
    the gradients of the outputs that are not 0 arrive somewhere in their plane."""
    w = WINDOWS[case.window]
    assert isinstance(w, Sliding)
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
    gy = _planes(_upstream(torch.Size(case.output_shape), case.layout), case.shape).where(y > 0, 0).double()
    apart = (gy.sum((2, 3)) - pooled.gradient.double().sum((2, 3))).abs()
    if not (apart <= ROUNDING * gy.abs().sum((2, 3))).all():
        raise WrongResultError(f"a plane's gradients sum to {apart.max():.2g} more or less than they were given")
