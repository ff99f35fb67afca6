"""``fastpool warmup``: compiling ahead what a program will use.

What the kernels specialise on is not repeated here.  The public functions are called on small maps, or a model is run, and choose their
kernels as they do in any program: by function, dtype, memory layout, window, and whether a gradient is asked for; by the width of a map
and its number of elements too, wherever a kernel is made for narrow or for large ones.  MAPS are therefore of several widths, the largest
also in a batch whose gradient is written past the caches; where a specialisation depends on sizes that only larger tensors have, run the
model itself (``--model``).
"""

from __future__ import annotations

import inspect
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any, NamedTuple

import click
import torch
from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress, TaskID
from torch import nn
from torch.utils._pytree import tree_leaves

from . import conversion, runtime, terminal, tiny
from . import functional as F
from .users_model import Factory, Place, Shapes, in_words, load

MAPS = (112, 56, 28, 14, 7)
"""Length of every axis of a map: more than the nest of small maps takes; more than a register of any dtype; what that nest still copies for
a stride; less than a register of float32 with AVX-512, and with AVX2."""
LARGE = 257
"""With this length a plane has more than 2**16 elements, and a global pooling saves 32 bits an output."""
CHANNELS, FEW, OTHERS = 64, 32, (3, 4, 8, 16, 32, 1024, 24, 40, 72)
"""At least one register of any dtype; on the smallest maps also few planes; and on those in channels_last less than a register, one, two,
as many as kernels for many take, and more than one, two and four that do not fill the last."""

WINDOWS = ((2, 2, 0, 1), (3, 2, 1, 1), (3, 1, 1, 1), (2, 1, 0, 1), (3, 2, 0, 1), (5, 1, 2, 1), (9, 1, 4, 1), (13, 1, 6, 1))
"""(kernel_size, stride, padding, dilation) of the usual networks, on every axis."""
ALL_WINDOWS = (*WINDOWS, *((k, s, k // 2, d) for k, s, d in product((*range(1, 10), 13, 17), range(1, 6), (1, 2))))
OUTPUTS = (1, 6, 7)
"""Of adaptive pooling, on every axis: the whole map, bins that overlap on MAPS, and bins that divide them."""
NORMS, ALL_NORMS = (2,), (1, 2, 3, -1, float("inf"))

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
        *(torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool),
    )
}


class Case(NamedTuple):
    """One function on one map; ``arguments`` by name."""

    name: str
    arguments: dict[str, Any]
    size: int
    channels: int
    channels_last: bool
    dtype: torch.dtype
    images: int = 1

    def __str__(self) -> str:
        said = ", ".join(f"{name}={value}" for name, value in self.arguments.items() if name in ("kernel_size", "stride", "output_size"))
        return f"{self.name}({said}) {'channels_last' if self.channels_last else 'contiguous'} {str(self.dtype).removeprefix('torch.')}"


def functions() -> list[str]:
    """The names of fastpool's pooling functions."""
    return sorted(name for name in {*F.__all__, *dir(F)} if re.fullmatch(r"[a-z]\w*pool\dd", name) and not name.startswith("conv_"))


def _arguments(parameters: Iterable[str], thorough: bool) -> Iterator[dict[str, Any]]:
    """What a function of these parameters is called with, besides its input."""
    forms: list[dict[str, Any]] = [{}]
    if "output_size" in parameters:
        forms = [{"output_size": size} for size in OUTPUTS]
    elif "kernel_size" in parameters:
        windows = ALL_WINDOWS if thorough else WINDOWS
        forms = [dict(zip(("kernel_size", "stride", "padding", "dilation"), window, strict=True)) for window in windows]
        if "dilation" not in parameters:
            forms = [{name: value for name, value in form.items() if name != "dilation"} for form in forms if form["dilation"] == 1]
        if "padding" not in parameters:
            forms = [{name: value for name, value in form.items() if name != "padding"} for form in forms]
    choices = {"norm_type": ALL_NORMS if thorough else NORMS, "training": (True, False)}
    if thorough:
        choices["return_indices"] = (False, True)
    for name, values in choices.items():
        if name in parameters:
            forms = [{**form, name: value} for form in forms for value in values]
    yield from forms


def cases(names: Iterable[str], dtypes: Iterable[torch.dtype], thorough: bool) -> list[Case]:
    """Calls that choose the usual kernels, or with ``thorough`` all of them."""
    from .kernels.cpu.choice import PAST

    found = []
    for name, dtype in product(names, dtypes):
        parameters, dimensions = inspect.signature(getattr(F, name)).parameters, int(name[-2])
        maps = MAPS if dimensions < 3 else MAPS[-2:]
        if thorough and dimensions == 2 and not {"kernel_size", "output_size"} & set(parameters):
            maps = (*maps, LARGE)
        places = [(size, CHANNELS, last, 1) for size in maps for last in (False, True)]
        places += [(min(maps), count, True, 1) for count in OTHERS] + [(min(maps), FEW, False, 1)]
        images = math.ceil(PAST / (CHANNELS * MAPS[0] ** dimensions * dtype.itemsize))
        places += [(MAPS[0], CHANNELS, last, images) for last in (False, True)] if dimensions < 3 else []
        for arguments, (size, channels, last, images) in product(_arguments(parameters, thorough), places):
            spanned = arguments.get("dilation", 1) * (arguments.get("kernel_size", 1) - 1) + 1
            if spanned <= size + 2 * arguments.get("padding", 0):
                found.append(Case(name, arguments, size, channels, last, dtype, images))
    return found


@tiny.kernels_only()
def call(case: Case, device: str = "cpu") -> None:
    """Run a case without a gradient, and forward and backward with one; NotImplementedError if its dtype has no kernels."""
    function, dimensions = getattr(F, case.name), int(case.name[-2])
    x, more = torch.zeros((case.images, case.channels, *[case.size] * dimensions), dtype=case.dtype, device=device), {}
    if case.channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    parameters = inspect.signature(function).parameters
    if "indices" in parameters:
        x, more["indices"] = getattr(F, f"max_pool{dimensions}d")(x, **case.arguments, return_indices=True)
    with torch.no_grad():
        function(x, **more, **case.arguments)
    if not case.dtype.is_floating_point:
        return
    # A parameter that a gradient can be asked of has kernels for that too.
    defaults = {name: p.default for name, p in parameters.items() if type(p.default) is float}
    trained = [{}, *({name: torch.tensor(value, device=device, requires_grad=True)} for name, value in defaults.items())]
    for parameter in trained:
        with suppress(NotImplementedError):
            y = function(x.detach().requires_grad_(), **more, **case.arguments, **parameter)
            (y[0] if isinstance(y, tuple) else y).sum().backward()


@tiny.kernels_only()
def _run_model(
    model: nn.Module, *, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, channels_last: bool, training: bool, device: str
) -> None:
    """Once on zeros: what it pools, it compiles."""
    inputs = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
    model.to(device, dtype).train(training)
    if channels_last:
        memory_format = torch.channels_last_3d if inputs[0].dim() == 5 else torch.channels_last
        model.to(memory_format=memory_format)  # type: ignore[call-overload]
        inputs = [x.to(memory_format=memory_format) if x.dim() in (4, 5) else x for x in inputs]
    with torch.set_grad_enabled(training):
        outputs = [y for y in tree_leaves(model(*inputs)) if isinstance(y, torch.Tensor) and y.requires_grad]
        if outputs:
            torch.stack([y.sum() for y in outputs]).sum().backward()


_interrupted = False


def _interrupt(*_: Any) -> None:
    """Ctrl-C: at once, and at the end of a case where Python drops the exception, as it does in a callback or a destructor of LLVM's."""
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


@contextmanager
def _listening() -> Iterator[None]:
    global _interrupted
    _interrupted = False
    before, told = signal.signal(signal.SIGINT, _interrupt), sys.unraisablehook

    def tell(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            told(dropped)

    sys.unraisablehook = tell
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        sys.unraisablehook = told


class _Bar:
    """The progress bar of a list of tasks, or of a model's pooling layers."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._task = progress, TaskID(progress.add_task("", total=total))

    def says(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def advance(self) -> None:
        self._progress.advance(self._task)
        if _interrupted:
            raise KeyboardInterrupt


def _warm_functions(todo: list[Case], device: str) -> None:
    refused = set()
    with terminal.progress() as progress:
        bar = _Bar(progress, len(todo))
        for case in todo:
            if (case.name, case.dtype) not in refused:
                bar.says(str(case))
                try:
                    call(case, device)
                except NotImplementedError:
                    refused.add((case.name, case.dtype))
            bar.advance()


def _warm_model(place: Place, console: Console, runs: Sequence[Callable[[nn.Module], None]]) -> None:
    model = load(place)
    conversion_done = conversion.convert(model)
    layers = {name: module for name, module in model.named_modules() if type(module).__module__ == "fastpool.nn"}
    console.print(f"{place.name} has {len(layers)} pooling layers of fastpool, {len(conversion_done.swapped)} of them swapped for torch's.")
    for name, why in conversion_done.kept.items():
        console.print(f"kept {name or '(the model)'}: {why}")
    with terminal.progress() as progress:
        bar = _Bar(progress, len(layers) * len(runs))
        for name, module in layers.items():
            module.register_forward_pre_hook(lambda module, _, name=name: bar.says(f"{name} {type(module).__name__}"))
            module.register_forward_hook(lambda *_: bar.advance())
        for run in runs:
            try:
                run(model)
            except Exception as error:
                raise in_words(place, f"running {place.name}", error) from error


def _summary(seconds: float, before: tuple[int, int]) -> str:
    from .kernels import compile

    compiled, loaded = len(compile.compiled_here) - before[0], len(compile.loaded_here) - before[1]
    said = f"{compiled} kernel{'' if compiled == 1 else 's'} compiled, {loaded} already there, in {seconds:.1f} s"
    present, _ = compile.kept()
    return f"{said}; {compile.directory()} holds {present.files} of these sources, {decimal(present.bytes)}."


@click.command()
@click.option("--all", "thorough", is_flag=True, help="Every function, dtype and window that has a kernel of its own: hours.")
@click.option("--model", "place", type=Factory(), help="What this model pools: a module, its class or a function, of a Python file.")
@click.option("--input", "inputs", type=Shapes(), multiple=True, help="The model's input, as 8x3x224x224; several by commas; repeatable.")
@click.option("--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, help="Repeatable.  [default: float32; --all: all]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="What the kernels are for.")
@click.option("--channels-last", is_flag=True, help="Run the model in channels_last.  [default: contiguous; without --model: both]")
@click.option("--training", is_flag=True, help="Run the model forward and backward.  [default: forward alone; without --model: both]")
@click.option("--only", multiple=True, metavar="NAME", help="Only this function, as max_pool2d; repeatable.")
@click.option("--prune", is_flag=True, help="First delete the kernels of other sources, compilers and CPUs.")
@click.pass_context
def warmup(
    context: click.Context,
    thorough: bool,
    place: Place | None,
    inputs: tuple[tuple[tuple[int, ...], ...], ...],
    dtypes: tuple[str, ...],
    device: str,
    channels_last: bool,
    training: bool,
    only: tuple[str, ...],
    prune: bool,
) -> None:
    """Compile ahead, so that no first call waits.

    Without options: every pooling in two dimensions, float32, the usual windows, both memory layouts, forward and backward.
    With --model: what that model pools, its torch.nn pooling layers swapped for fastpool's, found by running it once on zeros. A kernel
    may be one for narrow or for large maps: give --model the sizes it will see.

    Ctrl-C keeps what is compiled; the exit status is 130 then.
    """
    _check(thorough, place, inputs, channels_last, training, only)
    from .kernels import compile

    if device == "cuda" and not torch.cuda.is_available():
        raise click.ClickException(
            "--device cuda: PyTorch sees no GPU here, on which kernels are found by calling them; see fastpool doctor"
        )
    if compile.directory() is None or not os.access(compile.directory(), os.W_OK):
        where = f"{compile.directory()} cannot be written" if compile.directory() else "there is no cache directory"
        raise click.ClickException(f"{where}: nothing would be kept. Set FASTPOOL_CACHE_DIR to a folder that can be.")
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if prune:
        gone = compile.prune(superseded=True)
        console.print(f"Deleted {gone.files} kernels, {decimal(gone.bytes)}.")
    kinds = [DTYPES[name] for name in dtypes] or (list(DTYPES.values()) if thorough else [torch.float32])
    before, begin = (len(compile.compiled_here), len(compile.loaded_here)), perf_counter()
    interrupted = False
    try:
        with _listening():
            runtime.threading_layer()  # the driver of the threads is a kernel too
            if place:
                run = partial(_run_model, channels_last=channels_last, training=training, device=device)
                _warm_model(place, console, [partial(run, shapes=shapes, dtype=dtype) for dtype, shapes in product(kinds, inputs)])
            else:
                names = only or [name for name in functions() if thorough or name.endswith("2d")]
                _warm_functions(cases(names, kinds, thorough), device)
    except KeyboardInterrupt:
        interrupted = True
        console.print("Interrupted.")
    console.print(_summary(perf_counter() - begin, before))
    context.exit(terminal.INTERRUPTED if interrupted else 0)


def _check(thorough: bool, place: Place | None, inputs: Any, channels_last: bool, training: bool, only: tuple[str, ...]) -> None:
    """Raise click.UsageError for options that do not go together, or a function that is none."""
    if place and not inputs:
        raise click.UsageError("--model needs --input: the shape of what the model takes, as in --input 8x3x224x224")
    if place and (thorough or only):
        raise click.UsageError("--model compiles what the model uses: --all and --only do not go with it")
    if not place and (inputs or channels_last or training):
        raise click.UsageError("--input, --channels-last and --training are of a model: --model FILE:FACTORY")
    for name in only:
        if name not in functions():
            raise click.UsageError(f"--only: there is no function {name!r}; there are {', '.join(functions())}")
