"""Where a number was measured: what every row of a benchmark carries."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from llvmlite.binding import get_host_cpu_name

from fastpool.doctor import cpu_model

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

ROOT = Path(__file__).parents[1]
"""The checkout, or the installed package."""

SAME = ("cpu", "microarchitecture", "simd", "cores")
"""What makes two rows' machines one machine: versions and commits may differ.  A virtual machine's "AMD EPYC" may be Zen 4, which starts
one multiply-add of 512 bits a cycle, or Zen 5, which starts two."""


def machine() -> dict[str, Any]:
    """Flat: processor, its microarchitecture as LLVM calls it, its SIMD, cores, threads, load, versions, date (UTC), and the commit or
    None outside a checkout."""
    return {
        "cpu": cpu_model(),
        "microarchitecture": get_host_cpu_name(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": _load(),
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "numba_version": version("numba"),
        "fastpool_version": version("fastpool"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def file_name(benchmark: str, where: Mapping[str, Any]) -> str:
    """Where this machine's rows of a benchmark are kept: 'pool-amd-epyc-znver3-avx2-2-cores.jsonl'."""
    words = re.findall(r"[a-z0-9]+", f"{named(where)} {where['cores']} cores".lower())
    return f"{benchmark}-{'-'.join(words)}.jsonl"


def named(where: Mapping[str, Any]) -> str:
    """A machine in words: 'AMD EPYC, znver5, AVX512'; old rows do not say which microarchitecture."""
    return ", ".join(where[name] for name in SAME[:-1] if where[name])


def keep_pages() -> bool:
    """Let malloc keep what is freed, as a training loop's steady state does; False where malloc is not glibc's.

    Else glibc gives large outputs back to the system and faults their pages in again at every call: 8 MB took 8 ms instead of
    the 1 ms of writing them on a virtual machine where a fault costs 3 to 5 us, and whoever came first after another's free had
    none.  For the rest of the process.
    """
    if sys.platform != "linux":
        return False
    global _keeps
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    # Not M_MMAP_THRESHOLD: some releases refuse one above 32 MB.
    _keeps = bool(mallopt and mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
    return _keeps


_keeps = False
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Numbers in glibc's malloc.h: free memory at the heap's end that is given back (-1: none), and the most blocks of their own mapping."""


def settle() -> None:
    """Let freed blocks become whole again, between calls that are timed; nothing without ``keep_pages``.

    glibc makes a block for torch, which wants it aligned, from one that is 96 bytes longer, and frees the ends.  It sets the last few
    freed of a size aside for the next small block: where one of these lies beside a freed output, that is too short for the next such
    output, which takes new memory.  Training 2x2 s2 on 8x64x112x112 had 6272 faults a call, of 12 us each on a virtual machine,
    where the call is 5 ms; the heap was 3.0 GB after 120 rows instead of 1.6, and above 14 after 24 of 1x16x3000x2000 instead of 8.
    """
    if not _keeps:
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_size_t,), (ctypes.c_void_p,)
    for size in _SMALL:
        aside, others = ([libc.malloc(size) for _ in range(_ASIDE)] for _ in range(2))
        for block in (*others, *aside):  # others are set aside now, and what was joins its neighbours
            libc.free(block)


_SMALL, _ASIDE = range(24, 121, 16), 8
"""Bytes: what malloc makes 32 to 128 of; and as many as it sets aside of each, or more."""


def reserve(size: int) -> None:
    """Have so many bytes of free memory in one piece, written before; nothing without ``keep_pages``."""
    if _keeps:
        settle()
        torch.empty(size, dtype=torch.uint8).fill_(0)


def page_faults() -> int:
    """Of this process so far, those that needed no disk; 0 where the system does not count them."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else 0


def _load() -> float | None:
    """Processes that ran or waited to, over the last minute: times are too long where other work shares the cores."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _commit() -> str | None:
    if not (ROOT / ".git").exists():
        return None
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        # Without the optional lock: git would refresh the index of a checkout in which somebody may be working.
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"})
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
