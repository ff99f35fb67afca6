"""What the subcommands of ``fastpool`` share."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

INTERRUPTED = 128 + 2
"""The exit status of a command that SIGINT ended."""


def console(width: int) -> Console:
    """The terminal, or ``width`` columns of a file or pipe."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=width)


def progress() -> Progress:
    """A bar with counts and times on stderr, gone when done; none where stderr is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    terminal = Console(stderr=True)
    return Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal)
