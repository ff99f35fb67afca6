"""The ``fastpool`` command.  What it can do comes from the entry points of ``fastpool.commands``, so that others may add to it."""

from __future__ import annotations

from importlib.metadata import entry_points

import click

from .version import __version__


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *(e.name for e in entry_points(group="fastpool.commands"))})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        for entry in entry_points(group="fastpool.commands", name=name):
            return entry.load()
        return super().get_command(ctx, name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fastpool")
def main() -> None:
    """Pooling and convolution for PyTorch at the machine's limit: benchmarks and checks."""
