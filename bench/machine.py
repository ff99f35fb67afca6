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

from fastpool.doctor import cpu_model

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

ROOT = Path(__file__).parents[1]
"""The checkout, or the installed package."""

SAME = ("cpu", "simd", "cores")
"""What makes two rows' machines one machine: versions and commits may differ."""


def machine() -> dict[str, Any]:
    """Flat: processor, its SIMD, cores, threads, load, versions, date (UTC), and the commit or None outside a checkout."""
    return {
        "cpu": cpu_model(),
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


def file_name(where: Mapping[str, Any]) -> str:
    """Where this machine's rows of the pooling benchmark are kept: 'pool-amd-epyc-avx2-2-cores.jsonl'."""
    words = re.findall(r"[a-z0-9]+", f"{where['cpu']} {where['simd']} {where['cores']} cores".lower())
    return f"pool-{'-'.join(words)}.jsonl"


def keep_pages() -> bool:
    """Let malloc keep what is freed, as a training loop's steady state does; False where malloc is not glibc's.

    Else glibc gives large outputs back to the system and faults their pages in again at every call: 8 MB took 8 ms instead of
    the 1 ms of writing them on a virtual machine where a fault costs 3 to 5 us, and whoever came first after another's free had
    none.  For the rest of the process.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    # Not M_MMAP_THRESHOLD: some releases refuse one above 32 MB.
    return bool(mallopt and mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Numbers in glibc's malloc.h: free memory at the heap's end that is given back (-1: none), and the most blocks of their own mapping."""


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
