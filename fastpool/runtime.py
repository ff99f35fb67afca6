"""fastpool in a process with PyTorch: threads and forks."""

from __future__ import annotations

import os

import torch

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


# OpenMP's threads do not survive a fork: libgomp hangs, and Numba ends the process, when they are asked for.
os.register_at_fork(after_in_child=_after_fork)


def threads() -> int:
    """How many threads this call may use: torch's own setting, asked anew each time; one in a forked child (a DataLoader's worker)."""
    if _forked:
        return 1
    count = torch.get_num_threads()
    if count > 1:
        _start(count)
    return count


_started = False


def _start(count: int) -> None:
    """Start the driver's threads once, and undo what that does to torch: both share one OpenMP, whose count Numba sets."""
    global _started
    if _started:
        return
    from .kernels import launch

    launch.start()
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)
    _started = True
