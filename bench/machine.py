"""Where a number was measured: what every row of a benchmark carries."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastpool.doctor import cpu_model

ROOT = Path(__file__).parents[1]
"""The checkout, or the installed package."""


def machine() -> dict[str, Any]:
    """Flat: processor, cores, threads, load, versions, date (UTC), and the commit or None outside a checkout."""
    return {
        "cpu": cpu_model(),
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
