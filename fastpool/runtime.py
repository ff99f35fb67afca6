"""fastpool in a process with PyTorch: threads."""

from __future__ import annotations

import torch


def threads() -> int:
    """How many threads this call may use: torch's own setting, asked anew each time."""
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
