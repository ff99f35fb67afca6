"""fastpool in a process with PyTorch: threads and forks."""

from __future__ import annotations

import functools
import os
import threading
from typing import NamedTuple

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
    if count > 1 and not _started:
        _start()
    return count


_started = False
_starting = threading.Lock()


def _start() -> None:
    """Start the driver's threads once, and undo what that does to torch: both share one OpenMP, whose count Numba sets."""
    global _started
    with _starting:
        if _started:
            return
        from .kernels import launch

        count = torch.get_num_threads()
        launch.start()
        if torch.get_num_threads() != count:
            torch.set_num_threads(count)
        _started = True


@functools.cache
def hand_over_streams() -> None:
    """CUDA kernels are launched on the stream that is torch's current one at each launch."""
    from .kernels.cuda import launch

    launch.stream_of = lambda device: torch.cuda.current_stream(device).cuda_stream


class ThreadingLayer(NamedTuple):
    """Whose threads run the kernels, by Numba's name."""

    name: str
    locked: bool
    """Calls from several Python threads wait for each other."""


def threading_layer() -> ThreadingLayer:
    """The one in use; it is started by this, as by the first pooling on several threads."""
    _start()
    import numba

    from .kernels import launch

    return ThreadingLayer(numba.threading_layer(), not launch.reentrant())
