"""``fastpool doctor``: what fastpool finds in this process, whether it works, and what would make it better."""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import torch
from rich import box
from rich.filesize import decimal
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from . import functional as F
from . import runtime, terminal
from .version import __version__

Report = dict[str, dict[str, Any]]

FEATURES = (
    *("sse4.2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx512bf16", "avx512fp16"),
    *("amx-tile", "amx-bf16", "amx-int8", "neon", "dotprod", "fullfp16", "bf16", "sve", "sve2"),
)
"""Of all that LLVM knows of a CPU, what pooling, convolution or their 16-bit forms can use."""

LANES = ("float32", "float64", "int8", "int16", "int32", "int64")
SUPERSEDED = 2**26
"""Bytes of other sources' machine code from which a word about them is due."""


def cpu_model() -> str:
    """The processor's name; platform.processor() is empty or only the architecture on Linux."""
    lines = (_text("/proc/cpuinfo") or "").splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def cores() -> int:
    """How many this process may use: a container's share of a large machine is what counts."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = (_text("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    return min(count, math.ceil(int(quota) / int(period))) if quota.isdecimal() else count


def examine() -> Report:
    """Everything ``fastpool doctor`` knows: numbers, names and None, ready for JSON."""
    cache = _cache()  # before anything is compiled
    return {
        "smoke_test": _smoke_test(torch.device("cpu")),
        "versions": _versions(),
        "cpu": _cpu(),
        "threads": _threads(),
        "cache": cache,
        "cuda": _cuda(),
    }


def _cache() -> dict[str, Any]:
    from .kernels import compile

    directory, (present, superseded) = compile.directory(), compile.kept()
    return {
        "directory": str(directory) if directory else None,
        "writable": bool(directory and os.access(directory, os.W_OK)),
        "present": present._asdict(),
        "superseded": superseded._asdict(),
    }


def _smoke_test(device: torch.device) -> dict[str, Any]:
    """max_pool2d, forward and backward, in both layouts, against torch: equal bit for bit."""
    begin, error = perf_counter(), None
    try:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.linspace(-1, 1, 2 * 16 * 64 * 64, device=device).sin().reshape(2, 16, 64, 64).to(memory_format=memory_format)
            ours, theirs = (x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
            y, z = F.max_pool2d(ours, 3, 2, 1), torch.nn.functional.max_pool2d(theirs, 3, 2, 1)
            gy = torch.arange(z.numel(), device=device).reshape(z.shape) % 8.0  # whole numbers: their sums do not depend on the order
            y.backward(gy)
            z.backward(gy)
            if not torch.equal(y, z) or not torch.equal(ours.grad, theirs.grad):  # type: ignore[arg-type]
                raise ArithmeticError(f"max_pool2d, {str(memory_format).removeprefix('torch.')}, differs from torch's")
    except Exception as caught:  # whatever it is, it is what the user came to hear
        error = f"{type(caught).__name__}: {str(caught).strip().partition(chr(10))[0]}"
    return {"passed": error is None, "error": error, "seconds": round(perf_counter() - begin, 3)}


def _versions() -> dict[str, str]:
    return {
        "fastpool": __version__,
        **{name: version(name) for name in ("torch", "numba", "llvmlite", "numpy")},
        "python": platform.python_version(),
    }


def _cpu() -> dict[str, Any]:
    import numba
    from llvmlite import binding

    from .kernels import simd

    found = binding.get_host_cpu_features()
    return {
        "model": cpu_model(),
        "llvm_name": binding.get_host_cpu_name(),
        "architecture": platform.machine(),
        "features": [name for name in FEATURES if found.get(name)],
        "register_bytes": simd.register_bytes(),
        "lanes": {name: simd.native_lanes(getattr(numba, name)) for name in LANES},
        "huge_pages": _huge_pages(),
    }


def _huge_pages() -> dict[str, Any]:
    """The kernel's mode ("always", "madvise", "never"; None: not Linux) and whether malloc asks for them (None: it cannot be told to)."""
    _, _, rest = (_text("/sys/kernel/mm/transparent_hugepage/enabled") or "").partition("[")
    name, number = platform.libc_ver()
    malloc = None
    if name == "glibc" and tuple(map(int, number.split(".")[:2])) >= (2, 35):
        malloc = "glibc.malloc.hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "").split(":")
    return {"mode": rest.partition("]")[0] or None, "malloc_asks": malloc}


def _threads() -> dict[str, Any]:
    import numba

    layer: dict[str, Any] = {"layer": None, "locked": None, "error": None}
    try:
        name, locked = runtime.threading_layer()
        layer.update(layer=name, locked=locked)
    except Exception as caught:  # Numba raises a bare ValueError, or what a library that does not load gives
        layer["error"] = str(caught).strip().partition("\n")[0]
    return {**layer, "torch": torch.get_num_threads(), "most": numba.config.NUMBA_NUM_THREADS, "cores": cores()}


def _cuda() -> dict[str, Any]:
    extra, works = None, None
    driver: str | None = None
    devices: list[str] = []
    with suppress(PackageNotFoundError):
        extra = version("numba-cuda")
    with suppress(OSError):
        library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        driver, devices = _driver(library)
    if devices and torch.cuda.is_available():
        works = _smoke_test(torch.device("cuda"))
    return {"extra": extra, "driver": driver, "devices": devices, "torch_built_for": torch.version.cuda, "smoke_test": works}


def _driver(library: Any) -> tuple[str | None, list[str]]:
    """The CUDA version that a driver knows, and its devices' names; asked of it directly, as torch or numba-cuda may be missing."""
    number, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    known = library.cuDriverGetVersion(ctypes.byref(number)) == 0
    driver = f"{number.value // 1000}.{number.value % 1000 // 10}" if known else None
    if library.cuInit(0) != 0 or library.cuDeviceGetCount(ctypes.byref(number)) != 0:
        return driver, []
    # A device's handle is its number.
    return driver, [name.value.decode() for index in range(number.value) if library.cuDeviceGetName(name, len(name), index) == 0]


def advice(report: Report, environment: Mapping[str, str] = os.environ) -> Iterator[str]:
    """What would make it better, a sentence or two each."""
    cpu, threads, cache, cuda = (report[name] for name in ("cpu", "threads", "cache", "cuda"))
    if environment.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        yield "NUMBA_DISABLE_JIT is set: nothing can be compiled. Unset it."
    if cache["directory"] is None:
        yield "There is no place to keep machine code: every process compiles anew. Set FASTPOOL_CACHE_DIR to a folder that can be written."
    elif not cache["writable"]:
        yield (
            f"{cache['directory']} can only be read: what it lacks is compiled in every process."
            " Set FASTPOOL_CACHE_DIR to a folder that can be written."
        )
    elif cache["present"]["files"] == 0:
        yield "Nothing is compiled yet: `fastpool warmup` does it ahead of the first call."
    if cache["superseded"]["bytes"] > SUPERSEDED and cache["writable"]:
        yield (
            f"{cache['superseded']['bytes'] / 1e6:.0f} MB of the cache are of other sources, compilers or CPUs. What no process uses goes"
            " after 30 days; `fastpool warmup --prune` deletes it all now."
        )
    if threads["error"]:
        yield f"Numba's threads do not start ({threads['error']}). Unset NUMBA_THREADING_LAYER, or install what it names."
    elif threads["locked"] and environment.get("NUMBA_THREADING_LAYER") == threads["layer"]:
        yield f"NUMBA_THREADING_LAYER asks for {threads['layer']}, which lets one Python thread in at a time. Unset it."
    elif threads["locked"]:
        yield (
            f"Of Numba's threading layers only {threads['layer']} is here, which lets one Python thread in at a time."
            " pip install tbb, or a Numba built with OpenMP."
        )
    if threads["torch"] > threads["cores"]:
        yield (
            f"torch is set to {threads['torch']} threads on {threads['cores']} cores, and fastpool uses as many: they wait for each other."
            f" torch.set_num_threads({threads['cores']}), or OMP_NUM_THREADS={threads['cores']}."
        )
    elif threads["torch"] > threads["most"]:
        yield f"torch is set to {threads['torch']} threads, Numba to no more than {threads['most']}: NUMBA_NUM_THREADS says how many."
    if environment.get("FASTPOOL_REGISTER_BYTES"):
        yield f"FASTPOOL_REGISTER_BYTES sets registers to {cpu['register_bytes']} bytes, for tests. Unset it."
    elif cpu["register_bytes"] == 32:
        yield "This CPU has AVX2 without AVX-512: a register holds half the lanes. Nothing to mend."
    elif cpu["register_bytes"] == 16 and "neon" not in cpu["features"]:
        yield "This CPU has no AVX2: a register holds a quarter of AVX-512's lanes. Nothing to mend."
    yield from _memory_advice(**cpu["huge_pages"])
    yield from _cuda_advice(cuda)


def _memory_advice(mode: str | None, malloc_asks: bool | None) -> Iterator[str]:
    # Seen on Zen 3, glibc 2.36, one thread, 1x16x2000x2000 float32 (256 MB): clone 162 ms in pages of 4 KiB and 36 in huge ones, max
    # 2x2 s2 64 and 29, 3x3 s1 196 and 69.  glibc gives back what it allocates above 32 MiB, so every call faults it in anew; below, no
    # difference.  torch's THP_MEM_ALLOC_ENABLE=1 does the same for large tensors, but doubled the times of 8x64x112x112.
    if mode == "madvise" and malloc_asks is False:
        yield (
            "New tensors of more than 32 MiB come in pages of 4 KiB, and asking for these takes longer than pooling."
            " Start Python with GLIBC_TUNABLES=glibc.malloc.hugetlb=1."
        )
    elif mode == "never":
        yield (
            "Transparent huge pages are off (/sys/kernel/mm/transparent_hugepage/enabled): new tensors of more than 32 MiB cost more time"
            " than pooling them. An administrator can set it to madvise."
        )


def _cuda_advice(cuda: Mapping[str, Any]) -> Iterator[str]:
    if not cuda["devices"]:
        return
    if cuda["torch_built_for"] is None:
        yield f"This torch is built without CUDA and cannot use {cuda['devices'][0]}."
    elif cuda["smoke_test"] is None:
        yield (
            f"torch, built for CUDA {cuda['torch_built_for']}, does not find {cuda['devices'][0]}; the driver knows CUDA {cuda['driver']}."
            " A newer driver, or a torch for an older CUDA."
        )
    elif not cuda["smoke_test"]["passed"]:
        yield f"Pooling on {cuda['devices'][0]} does not work: {cuda['smoke_test']['error']}."
        if cuda["extra"] is None:
            yield "CUDA kernels need an extra: pip install 'fastpool[cuda]'."


def _files(kept: Mapping[str, int], whose: str) -> str:
    return f"{kept['files']} kernels of {whose} sources, {decimal(kept['bytes'])}"


def _table(report: Report) -> Table:
    smoke, versions, cpu, threads, cache, cuda = report.values()
    layer = f"{threads['layer']}; {'one Python thread at a time' if threads['locked'] else 'several Python threads at once'}"
    state = "can be written" if cache["writable"] else "can only be read"
    pages = cpu["huge_pages"]
    rows = {
        "smoke test": f"passed in {smoke['seconds']:.2f} s" if smoke["passed"] else f"FAILED: {smoke['error']}",
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "CPU": f"{cpu['model']} ({cpu['llvm_name']}), {cpu['architecture']}",
        "features": " ".join(cpu["features"]) or "none of interest",
        "registers": f"{cpu['register_bytes']} bytes: " + ", ".join(f"{count} {name}" for name, count in cpu["lanes"].items()),
        "huge pages": f"{pages['mode'] or 'unknown'}{'; malloc asks for them' if pages['malloc_asks'] else ''}",
        "threads": f"{threads['torch']}, as torch is set; {threads['cores']} cores; Numba's limit {threads['most']}",
        "threading layer": layer if threads["layer"] else f"none: {threads['error']}",
        "cache": f"{cache['directory']}, {state}" if cache["directory"] else "no place for one",
        "cached": f"{_files(cache['present'], 'these')}; {_files(cache['superseded'], 'other')}",
        "CUDA": f"driver {'for ' + cuda['driver'] if cuda['driver'] else 'none'}; devices: {', '.join(cuda['devices']) or 'none'}",
        "CUDA extra": f"numba-cuda {cuda['extra']}" if cuda["extra"] else "not installed",
    }
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows.items():
        table.add_row(*row)
    return table


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def doctor(context: click.Context, as_json: bool) -> None:
    """What fastpool finds here, whether it works, and what would make it better.

    Versions, SIMD registers, threads, where machine code is kept, CUDA; and a small pooling, forward and backward on the CPU, against
    PyTorch's.  The exit status is 1 if that one fails.
    """
    report = examine()
    sentences = list(advice(report))
    if as_json:
        click.echo(json.dumps({**report, "advice": sentences}, indent=2))
    else:
        console = terminal.console(80)
        console.print(_table(report), highlight=False, markup=False)
        for sentence in sentences:
            console.print(Padding(Text(sentence), (0, 2, 1, 2)))
    context.exit(0 if report["smoke_test"]["passed"] else 1)
