"""``fastpool bench``: one subcommand a benchmark."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click
import torch
from rich.console import Console

from fastpool import terminal

from . import (
    bar,
    block_bars,
    blocks,
    commute,
    commute_bars,
    commute_conv,
    conv,
    conv_bars,
    conv_layers,
    conv_peers,
    conv_report,
    cuda_model,
    gpu,
    libraries,
    pool,
    pool_bars,
    pool_peers,
    pool_report,
    report,
)
from .cases import ACTIVATIONS, NETWORKS, POOLINGS, QUICK_SITES, SITES
from .libraries import LAYOUTS, TITLES
from .machine import SAME, file_name, keep_pages, machine
from .photograph import MissingPhotographError, photograph
from .rows import Row, peers_of

FULL_BUDGET, QUICK_BUDGET = 0.4, 0.1
"""Seconds of timed rounds a row.  On 2 cores: 539 rows in 12 minutes beside other work, 196 quick ones in 40 seconds without."""

T = TypeVar("T")


class Case(Protocol):
    """What of a benchmark's cases a run needs."""

    @property
    def key(self) -> tuple[Any, ...]: ...

    @property
    def threads(self) -> int: ...


AnyCase = TypeVar("AnyCase", bound=Case)


@click.group(invoke_without_command=True)
@click.option("--device", type=click.Choice(["cuda"]), help="Without a command: on a GPU, what the command gpu measures.")
@click.pass_context
def bench(context: click.Context, device: str | None) -> None:
    """Benchmarks of fastpool against PyTorch, on this machine."""
    if context.invoked_subcommand and device:
        raise click.UsageError(f"--device goes without a command: fastpool bench --device {device}, or fastpool bench gpu with options")
    if device:
        context.invoke(gpu_command)
    elif not context.invoked_subcommand:
        click.echo(context.get_help())


def _writable(_: click.Context, __: click.Parameter, path: Path | None) -> Path | None:
    """Refuse at once what could not be written after minutes of measuring."""
    if path is not None and not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise click.BadParameter(f"{path} cannot be written")
    return path


_JSON = click.option(
    "--json",
    "path",
    type=click.Path(path_type=Path),
    callback=_writable,
    help="Keep each row in this file as soon as it is finished; in a folder, in the file of this machine.",
)
_RESUME = click.option("--resume", is_flag=True, help="Go on with that file: what it has of this machine is not measured again.")
_THREADS = click.option("--threads", type=click.IntRange(1), multiple=True, help="Threads for everybody; repeatable.  [default: 1 and 2]")
_LAYOUT = click.option("--layout", "layouts", type=click.Choice(list(LAYOUTS)), multiple=True, help="Only this one; repeatable.")


@bench.command("commute")
@click.option("--quick", is_flag=True, help="One layer of each network and fewer rounds: about a minute on 2 cores once compiled.")
@click.option("--conv", "convolves", is_flag=True, help="With the convolution in front of both, whose output the network pools there.")
@_JSON
@_RESUME
@click.option("--threads", type=click.IntRange(1), multiple=True, help="For everybody; repeatable.  [default: PyTorch's setting]")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Images a batch.")
@click.option("--activation", "activations", type=click.Choice(list(ACTIVATIONS)), multiple=True, help="Only this one; repeatable.")
@click.option("--pooling", "poolings", type=click.Choice(POOLINGS), multiple=True, help="Only this one; repeatable.")
@click.option("--network", "networks", type=click.Choice(NETWORKS), multiple=True, help="Only its layers; repeatable.")
@click.option("--compile", "compiles", is_flag=True, help="Beside torch.compile too, which takes seconds to compile each pair.")
@click.option("--sites", "by_site", is_flag=True, help="Print a table for each layer too.")
@click.pass_context
def commute_command(
    context: click.Context,
    quick: bool,
    convolves: bool,
    path: Path | None,
    resume: bool,
    threads: tuple[int, ...],
    batch: int,
    activations: tuple[str, ...],
    poolings: tuple[str, ...],
    networks: tuple[str, ...],
    compiles: bool,
    by_site: bool,
) -> None:
    """Activate then pool, or pool then activate?

    Every activation with every pooling, on feature maps of a photograph in the shapes of LeNet-5, AlexNet, VGG-16 and ResNet's stem:
    which law holds, how far apart the two orders are, in values and input gradients, and what each costs in PyTorch, with fastpool's
    pooling, and with both in one pass ("fused"), forward and with backward ("training"), in time and in bytes saved for backward; and
    what the pooling alone costs.

    With --conv: max, avg and min pooling behind an activation behind each network's own convolution, step by step, with the activation in
    the convolution, and all in one call (F.conv_pool2d), forward and with the gradients of input, weight and bias.

    Ctrl-C ends early and keeps finished rows.  The exit status is 1 if a result was wrong, 130 after Ctrl-C.
    """
    sites = [site for site in (QUICK_SITES if quick else SITES) if site.network in (networks or NETWORKS)]
    possible = commute_conv.POOLINGS if convolves else POOLINGS
    if not set(poolings) <= set(possible):
        raise click.UsageError(f"--conv goes with {', '.join(possible)}")
    chosen = (poolings or possible, activations or ACTIVATIONS, (batch,), threads or (torch.get_num_threads(),))
    todo = commute.cases(sites, *(dict.fromkeys(axis) for axis in chosen))
    console, where = terminal.console(110), machine()
    if not convolves:
        try:
            photograph()
        except MissingPhotographError as error:
            raise click.ClickException(str(error)) from error
    path = _path(path, "commute_conv" if convolves else "commute", where)
    kept, left = _resumed(path, where, commute.key, todo) if resume else ([], todo)
    absent = libraries.missing(["compile"] if compiles else [])
    providers = [provider for provider in commute.PROVIDERS if provider != "compile" or (compiles and not absent)]
    row, budget = (commute_conv if convolves else commute).row, QUICK_BUDGET if quick else FULL_BUDGET
    with _threads_kept():
        _introduce(console, where, _malloc(keep_pages()), absent, kept, left, todo)
        found, interrupted = _measured(left, lambda case: {**where, **row(case, budget, providers)}, str, path, kept)
    rows = [*kept, *found]
    _print(console, rows, by_site, convolves)
    if interrupted:
        console.print("\nA pair's times are summed over the layers it finished.", highlight=False)
    _end(context, console, rows, f"{len(found)} of {len(left)}" if interrupted else None)


class _Shape(click.ParamType):
    """NxCxHxW -> four sizes."""

    name = "NxCxHxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", value):
            self.fail(f"{value!r} is not four sizes, as in {pool_peers.SHAPES[1]}", param, ctx)
        return pool_peers.sizes(value)


@bench.command("pool")
@click.option("--quick", is_flag=True, help="Two maps, three windows and fewer rounds, without torch.compile, unless asked for.")
@_JSON
@_RESUME
@_THREADS
@click.option("--shape", "shapes", type=_Shape(), multiple=True, help="Only this map, or another of yours; repeatable.")
@click.option("--kind", "kinds", type=click.Choice(list(pool_peers.KINDS)), multiple=True, help="Only this one; repeatable.")
@click.option("--window", "windows", type=click.Choice(list(pool_peers.WINDOWS)), multiple=True, help="Only this one; repeatable.")
@_LAYOUT
@click.option("--peer", "peers", type=click.Choice(list(pool_peers.PEERS)), multiple=True, help="Only beside this one; repeatable.")
@click.pass_context
def pool_command(
    context: click.Context,
    quick: bool,
    path: Path | None,
    resume: bool,
    threads: tuple[int, ...],
    shapes: tuple[tuple[int, int, int, int], ...],
    kinds: tuple[str, ...],
    windows: tuple[str, ...],
    layouts: tuple[str, ...],
    peers: tuple[str, ...],
) -> None:
    """How fast is each pooling, beside its peers and beside the machine's limit?

    Every kind, window and memory layout on maps from caches' to memory's size, forward and with backward ("training"), beside PyTorch,
    torch.compile, ONNX Runtime and OpenVINO, as far as these are here; and beside a copy that moves the fewest bytes the case must.
    The whole takes about 40 minutes on two cores, half of them the largest map: filters help.

    Ctrl-C ends early and keeps finished rows.  The exit status is 1 if a result was wrong, 130 after Ctrl-C.
    """
    shapes = shapes or tuple(map(pool_peers.sizes, pool_peers.QUICK_SHAPES if quick else pool_peers.SHAPES))
    windows = windows or (pool_peers.QUICK_WINDOWS if quick else ())
    chosen = (shapes, kinds or tuple(pool_peers.KINDS), windows or None, layouts or tuple(LAYOUTS), threads or (1, 2))
    todo = pool.cases(*(names and dict.fromkeys(names) for names in chosen))
    if not todo:
        raise click.UsageError("no such case: global and adaptive kinds have windows of their own, and a window must fit its map")
    wanted = peers or tuple(name for name in pool_peers.PEERS if not (quick and name == "compile"))
    console = terminal.console(120)
    where = machine()
    path = _path(path, "pool", where)
    kept, left = _resumed(path, where, pool.key, todo) if resume else ([], todo)
    absent = libraries.missing(wanted)
    present = [name for name in wanted if name not in absent]
    budget = pool.QUICK_BUDGET if quick else pool.FULL_BUDGET
    rules = _rules(keep_pages(), present, "compile" in peers)

    def row(case: pool_peers.Case) -> dict[str, Any]:
        return {**where, **pool.row(case, [p for p in present if pool_peers.takes_part(p, case, "compile" in peers)], budget)}

    with _threads_kept():
        _introduce(console, where, rules, absent, kept, left, todo)
        found, interrupted = _measured(left, row, str, path, kept)
    rows = [*kept, *found]
    if not rows:
        console.print("No row was finished.")
    else:
        columns = peers_of(rows)
        console.print(f"\n{pool_report.EXPLAINED}", highlight=False)
        for name in dict.fromkeys(row["shape"] for row in rows):
            of_map = [row for row in rows if row["shape"] == name]
            make = pool_report.calls if name == pool_peers.TINY else pool_report.table
            console.print(make(of_map, columns, name))
        console.print(pool_report.reading(rows), highlight=False, markup=False)
        console.print(f"\n{bar.summary(pool_bars.bars(rows))}", highlight=False, markup=False)
    _end(context, console, rows, f"{len(found)} of {len(left)}" if interrupted else None)


@bench.command("block")
@_JSON
@_RESUME
@_THREADS
@click.option("--network", "networks", type=click.Choice(blocks.NETWORKS), multiple=True, help="Only its blocks; repeatable.")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, help="Images a batch; repeatable.  [default: 1 and 8]")
@_LAYOUT
@click.option("--peer", "peers", type=click.Choice(blocks.PEERS), multiple=True, help="Only beside this one; repeatable.")
@click.pass_context
def block_command(
    context: click.Context,
    path: Path | None,
    resume: bool,
    threads: tuple[int, ...],
    networks: tuple[str, ...],
    batches: tuple[int, ...],
    layouts: tuple[str, ...],
    peers: tuple[str, ...],
) -> None:
    """Convolution, ReLU and max pooling in a row: in one launch or two, and beside PyTorch, ONNX Runtime and OpenVINO?

    The layers of CIFAR10Net, AlexNet and VGG-16 that a pooling follows, forward, float32. Weights are packed ahead but by PyTorch;
    ONNX Runtime and OpenVINO lay maps out as they like.

    Ctrl-C ends early and keeps finished rows.  The exit status is 1 if a result was wrong, 130 after Ctrl-C.
    """
    todo = blocks.cases(networks or blocks.NETWORKS, batches or blocks.BATCHES, layouts or tuple(LAYOUTS), threads or (1, 2))
    console, where = terminal.console(110), machine()
    path = _path(path, "block", where)
    kept, left = _resumed(path, where, blocks.key, todo) if resume else ([], todo)
    wanted = peers or blocks.PEERS
    absent = libraries.missing(wanted)
    present = [name for name in wanted if name not in absent]
    with _threads_kept():
        _introduce(console, where, _malloc(keep_pages()), absent, kept, left, todo)
        found, interrupted = _measured(left, lambda case: {**where, **blocks.row(case, present, blocks.BUDGET)}, str, path, kept)
    rows = [*kept, *found]
    if not rows:
        console.print("No row was finished.")
    else:
        console.print(blocks.table(rows))
        console.print(blocks.reading(rows), highlight=False, markup=False)
        console.print(f"\n{bar.summary(block_bars.bars(rows))}", highlight=False, markup=False)
    _end(context, console, rows, f"{len(found)} of {len(left)}" if interrupted else None)


@bench.command("cuda-model")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), callback=_writable, help="Keep the rows in this file.")
@click.option("--pooling", "poolings", type=click.Choice(cuda_model.POOLINGS), multiple=True, help="Only this one; repeatable.")
@click.option("--layout", "layouts", type=click.Choice(LAYOUTS), multiple=True, help="Only this one; repeatable.")
@click.option("--convolution", "convolutions", type=click.Choice(list(cuda_model.CONVOLUTIONS)), multiple=True, help="Likewise.")
def cuda_model_command(path: Path | None, poolings: Sequence[str], layouts: Sequence[str], convolutions: Sequence[str]) -> None:
    """What do CUDA kernels move and execute, and what does that come to on a GPU?

    Their PTX is executed on this CPU, on small maps, and counted; times are of 8x64x112x112, of convolutions 8x64x56x56 with 64 channels
    out, in float32, by makers' numbers of bandwidth (m, a bound), of multiply-adds (p, a bound) or of instructions (i, an estimate:
    machine code merges some), whichever is larger. No GPU is needed, and nothing is measured on one.
    """
    try:
        import fastpool.kernels.cuda.pooling  # noqa: F401
    except ImportError as error:
        raise click.ClickException(f"CUDA kernels need numba-cuda: pip install 'fastpool[cuda]' ({error})") from None
    console = terminal.console(110)
    if not poolings and not convolutions:
        poolings, convolutions = cuda_model.POOLINGS, list(cuda_model.CONVOLUTIONS)
    layouts = layouts or list(LAYOUTS)
    cases = [functools.partial(cuda_model.counts, *of) for of in itertools.product(poolings, cuda_model.WINDOWS, layouts)]
    cases += [functools.partial(cuda_model.convolution_counts, *of) for of in itertools.product(convolutions, layouts)]
    found: list[cuda_model.Count] = []
    with terminal.progress() as progress:
        for case in progress.track(cases, description="kernels"):
            found += case()
            if path is not None:
                path.write_text(json.dumps(cuda_model.rows(found), indent=1))
    console.print(cuda_model.table(found))
    console.print(
        "us for 8x64x112x112, conv 8x64x56x56 to 64 channels; no measurements. m: by memory, p: by products, bounds; i: by PTX's "
        "instructions, an estimate.",
        style="dim",
    )


@bench.command("gpu")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), callback=_writable, help="Keep the rows in this file.")
@click.option("--operation", "operations", type=click.Choice((*gpu.POOLINGS, "conv")), multiple=True, help="Only this one; repeatable.")
@click.option("--layout", "layouts", type=click.Choice(LAYOUTS), multiple=True, help="Only this one; repeatable.")
@click.pass_context
def gpu_command(context: click.Context, path: Path | None, operations: Sequence[str], layouts: Sequence[str]) -> None:
    """How quick are fastpool's kernels on this GPU, beside PyTorch's?

    By the GPU's own events, with cold caches, float32, 8x64x112x112 and, of convolutions, 8x64x56x56; forward also as a part of what a copy
    of as many bytes takes; and what a call costs the caller, apart. Nobody has run this command on a GPU so far.

    Ctrl-C ends early and keeps finished rows. The exit status is 1 if a result was wrong, 130 after Ctrl-C.
    """
    if not torch.cuda.is_available():
        raise click.ClickException(
            "PyTorch sees no GPU here, and nothing can be measured; fastpool doctor says more, fastpool bench cuda-model counts"
        )
    found: list[gpu.Row] = []
    todo, interrupted = gpu.cases(operations or (*gpu.POOLINGS, "conv"), layouts or list(LAYOUTS)), False
    try:
        with terminal.progress() as progress:
            for row in progress.track(gpu.measured(todo, torch.device("cuda")), total=len(todo), description="cases"):
                found.append(row)
                if path is not None:
                    path.write_text(json.dumps(gpu.rows(found), indent=1))
    except KeyboardInterrupt:
        interrupted = True
    console = terminal.console(110)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}", style="dim")
    console.print(gpu.table(found))
    for row in found:
        if row.error:
            console.print(f"{row.operation} {row.what} {row.layout} {row.run}: {row.error}")
    context.exit(terminal.INTERRUPTED if interrupted else 1 if any(row.error for row in found) else 0)


@bench.command("conv")
@click.option(
    "--quick", is_flag=True, help="A few layers of every network, in the smaller batch, and fewer rounds: under a minute once compiled."
)
@_JSON
@_RESUME
@_THREADS
@click.option("--network", "networks", type=click.Choice(conv_layers.NETWORKS), multiple=True, help="Only its layers; repeatable.")
@click.option("--layer", "names", multiple=True, help="Only layers whose name, as in '64x56x56 to 256, 1x1', holds this; repeatable.")
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, help="Images a batch; repeatable.  [default: 1 and 8, or 32]")
@click.option("--pass", "passes", type=click.Choice(conv_peers.PASSES), multiple=True, help="Only this one; repeatable.")
@_LAYOUT
@click.option("--peer", "peers", type=click.Choice(list(conv_peers.PEERS)), multiple=True, help="Only beside this one; repeatable.")
@click.pass_context
def conv_command(
    context: click.Context,
    quick: bool,
    path: Path | None,
    resume: bool,
    threads: tuple[int, ...],
    networks: tuple[str, ...],
    names: tuple[str, ...],
    batches: tuple[int, ...],
    passes: tuple[str, ...],
    layouts: tuple[str, ...],
    peers: tuple[str, ...],
) -> None:
    """How fast is each convolution layer, beside its peers and beside the machine's limits?

    Every distinct layer of LeNet-5, CIFAR10Net, AlexNet, VGG-16, ResNet-50 and, depthwise and pointwise, MobileNetV2: forward, and the
    gradients of input and weight by themselves; beside PyTorch, ONNX Runtime and OpenVINO, as far as these are here, torch.compile if
    asked for; beside the cores' FMA peak, and a copy that moves the fewest bytes.

    Ctrl-C ends early and keeps finished rows.  The exit status is 1 if a result was wrong, 130 after Ctrl-C.
    """
    of_networks = [layer for layer in conv_layers.LAYERS if layer.network in (networks or conv_layers.NETWORKS)]
    named = [layer for layer in of_networks if any(name in layer.name for name in names)] if names else of_networks
    layers = [layer for layer in named if layer.name in conv_layers.QUICK] if quick and not names else named
    images = {network: batches or (of[:1] if quick else of) for network, of in conv_layers.BATCHES.items()}
    chosen = (layouts or tuple(LAYOUTS), passes or conv_peers.PASSES, threads or (1, 2))
    todo = conv.cases(layers, images, *(dict.fromkeys(axis) for axis in chosen))
    if not todo:
        raise click.UsageError("no such case: a network has no such layer, or it is its first, whose input's gradient nobody wants")
    wanted = peers or tuple(name for name in conv_peers.PEERS if name != "compile")
    console = terminal.console(120)
    where = machine()
    path = _path(path, "conv", where)
    kept, left = _resumed(path, where, conv.key, todo) if resume else ([], todo)
    absent = libraries.missing(wanted)
    present = [name for name in wanted if name not in absent]
    budget = conv.QUICK_BUDGET if quick else conv.FULL_BUDGET
    slow = f"A peer over {conv.PATIENCE} s and {conv.MUCH_SLOWER} times fastpool's time is called once; that call is its time."
    weights = "fastpool's layer, ONNX Runtime and OpenVINO pack weights ahead; PyTorch's layer does so in each call."
    with _threads_kept():
        _introduce(console, where, "\n".join([slow, weights, _malloc(keep_pages())]), absent, kept, left, todo)
        found, interrupted = _measured(left, lambda case: {**where, **conv.row(case, present, budget)}, str, path, kept)
    rows = [*kept, *found]
    if not rows:
        console.print("No row was finished.")
    else:
        console.print(f"\n{conv_report.EXPLAINED}", highlight=False)
        for table in conv_report.tables(rows):
            console.print(table)
        console.print(conv_report.reading(rows), highlight=False, markup=False)
        console.print(f"\n{bar.summary(conv_bars.bars(rows))}", highlight=False, markup=False)
    _end(context, console, rows, f"{len(found)} of {len(left)}" if interrupted else None)


def _end(context: click.Context, console: Console, rows: Sequence[Row], interrupted: str | None) -> None:
    """Exit; ``interrupted``: how many rows of how many were finished."""
    if interrupted:
        console.print(f"\nInterrupted: {interrupted} rows.", highlight=False)
        context.exit(terminal.INTERRUPTED)
    context.exit(0 if all(row["correct"] for row in rows) else 1)


def _introduce(
    console: Console,
    where: dict[str, Any],
    rules: str,
    absent: dict[str, str],
    kept: Sequence[Row],
    left: Sequence[Case],
    todo: Sequence[Case],
) -> None:
    """Say where and how is measured, who is not here, and what is there already."""
    used = dict.fromkeys((*(case.threads for case in left), *(row["threads"] for row in kept)))
    console.print(_header({**where, "threads": " and ".join(map(str, used))}), highlight=False)
    console.print(rules, highlight=False, markup=False)
    if absent:
        why = "; ".join(f"{TITLES[name]} ({reason})" for name, reason in absent.items())
        console.print(f"Not here, and left out: {why}.", highlight=False, markup=False)
    if kept:
        console.print(f"{len(kept)} rows are there already; {len(left)} of {len(todo)} cases are left.", highlight=False)


def _path(path: Path | None, benchmark: str, where: dict[str, Any]) -> Path | None:
    """A file, in a folder the machine's."""
    return path / file_name(benchmark, where) if path is not None and path.is_dir() else path


def _resumed(
    path: Path | None, where: dict[str, Any], key: Callable[[Row], Any], todo: Sequence[AnyCase]
) -> tuple[list[dict[str, Any]], list[AnyCase]]:
    """The rows of an earlier run that stay, and the cases that are left: those without a row, or with a wrong one."""
    kept = _kept(path, where, key)
    done = {key(row) for row in kept if row["correct"]}
    left = [case for case in todo if case.key not in done]
    again = {case.key for case in left}
    return [row for row in kept if key(row) not in again], left


def _kept(path: Path | None, where: dict[str, Any], key: Callable[[Row], Any]) -> list[dict[str, Any]]:
    """The rows of an earlier run, the newest of each case; an error if the file is another machine's."""
    if path is None:
        raise click.UsageError("--resume goes on with the file that --json names")
    rows = report.read(path) if path.exists() else []
    for row in rows:
        for name in SAME:
            if row.get(name) != where[name]:
                raise click.ClickException(f"{path} holds rows of another machine: {name} {row.get(name)}, here {where[name]}")
    return list({key(row): row for row in rows}.values())


def _rules(pages_kept: bool, peers: Sequence[str], compile_asked: bool) -> str:
    """How times are taken, as far as a reader would wonder."""
    slow = f"A peer over {pool.PATIENCE} s and {pool.MUCH_SLOWER} times fastpool's time is called once; that call is its time."
    said = [slow]
    said.append(f"Where windows read over {pool.READ:.1g} elements, peers, and all who draw, get a {pool.PART}th of the map's rows.")
    said.append(_malloc(pages_kept))
    growth = " and ".join(name.split()[0] for name in pool_peers.GROWTH_WINDOWS)
    said.append(f"{growth} windows only show whether time grows with the window: one map, no peers.")
    if "compile" in peers:
        chosen = pool_peers.COMPILED
        where = f"on {' and '.join(chosen['shapes'])}, {', '.join(chosen['windows'])}, kinds {', '.join(chosen['kinds'])}"
        where = "wherever it compiles" if compile_asked else f"{where}: it compiles for seconds a case"
        said.append(f"torch.compile takes part {where}; over {pool_peers.INLINED} taps it calls PyTorch's kernels.")
    return "\n".join(said)


def _malloc(pages_kept: bool) -> str:
    if pages_kept:
        return "malloc keeps what is freed (mallopt), as in a training loop: no time holds page faults of fresh memory."
    return "malloc is not glibc's: times may hold page faults of fresh memory."


@contextmanager
def _threads_kept() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measured(
    todo: Sequence[T],
    row: Callable[[T], dict[str, Any]],
    name: Callable[[T], str],
    path: Path | None,
    kept: Sequence[dict[str, Any]] = (),
) -> tuple[list[dict[str, Any]], bool]:
    """The finished rows, and whether Ctrl-C ended them.  ``name``: what the progress bar says.

    ``path`` gets ``kept``, then each row when it is finished: nothing that ends the process takes more than the row at hand.
    """
    rows: list[dict[str, Any]] = []
    if path is not None:
        report.write(kept, path)
    try:
        with terminal.progress() as bar:
            task = bar.add_task("", total=len(todo))
            for case in todo:
                bar.update(task, description=name(case))
                rows.append(row(case))
                if path is not None:
                    report.append(rows[-1], path)
                bar.advance(task)
    except KeyboardInterrupt:
        return rows, True
    return rows, False


def _header(where: dict[str, Any]) -> str:
    versions = f"torch {where['torch_version']}, numba {where['numba_version']}, fastpool {where['fastpool_version']}"
    commit = f", commit {where['commit']}" if where["commit"] else ""
    load = f"; load {where['load']:.1f} when started" if where["load"] is not None else ""
    if (where["load"] or 0) > (where["cores"] or 1) / 2:
        # Seen: threads that wait for each other lose a scheduler's slice each, and PyTorch's 8 us become 16 ms.
        load += "\nIf that load is other work, times will be too long, and ratios wrong."
    return f"{where['cpu']}, {where['cores']} cores, threads: {where['threads']}{load}\n{versions}{commit}; {where['date']}\n"


_EXPLAINED = """\
Activate, then pool.  Gap: from pool, then activate, the largest over {0}.  ms: forward, the sum; unfused:
PyTorch's activation, fastpool's pooling.  Speed-up: fused over PyTorch; in train.: forward and backward
together.  Over pool: times fastpool's pooling alone, fused.  Saved: for backward, bytes an output."""


def _print(console: Console, rows: list[dict[str, Any]], by_site: bool, convolves: bool) -> None:
    """Tables, what they say, and the bars; of ``commute --conv`` or without."""
    if not rows:
        console.print("No row was finished.")
        return
    explained, table, reading, bars = (
        (commute_conv.EXPLAINED, commute_conv.table, commute_conv.reading, commute_bars.conv_bars)
        if convolves
        else (_EXPLAINED, report.table, report.reading, commute_bars.bars)
    )
    names = list(dict.fromkeys(row["site"] for row in rows))
    console.print(explained.format(f"{len(names)} layer{'s' if len(names) > 1 else ''}"), highlight=False)
    groups = report.titled(rows)
    for title, of in groups.items():
        if len(groups) > 1:
            console.print(f"\n[bold]{title}")
        console.print(table(of))
        for name in names if by_site else ():
            console.print(table([row for row in of if row["site"] == name], name))
        console.print(reading(of), highlight=False, markup=False)
    console.print(f"\n{bar.summary(bars(rows))}", highlight=False, markup=False)
