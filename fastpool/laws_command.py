"""``fastpool laws``: the table of what may change places with what."""

from __future__ import annotations

import json

import click
from rich.table import Table

from . import laws as algebra
from . import terminal

_SHORT = {"two-point": "2-point", "exchange": "exchange", "rounding": "round"}
_WIDTH = 120


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON: every pair with its reason, conditions, source and counterexample.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print the table as Markdown.")
@click.argument("pair", nargs=-1)
def laws(as_json: bool, as_markdown: bool, pair: tuple[str, ...]) -> None:
    """Which layers may change places with which, and by what law.

    FIRST SECOND, two names as in "gelu max_pool2d": that law alone, with its reason, conditions and, where there is none, an input on which
    the two orders differ.
    """
    if pair:
        if len(pair) != 2:
            raise click.UsageError(f"give two layers, as in: fastpool laws gelu max_pool2d; got {len(pair)}")
        try:
            law = algebra.commutes(*pair)
        except (TypeError, ValueError) as error:
            raise click.UsageError(str(error)) from error
        click.echo(json.dumps(law.as_dict(), indent=2) if as_json else str(law))
        return
    found = algebra.table()
    if as_json:
        click.echo(json.dumps([law.as_dict() | {"row": row, "column": column} for (row, column), law in found.items()], indent=2))
        return
    lines = cells(found)
    if as_markdown:
        click.echo(algebra.markdown(lines))
        return
    table = Table(*lines[0], box=None, pad_edge=False)
    for line in lines[1:]:
        table.add_row(*(_SHORT.get(cell, cell) for cell in line))
    console = terminal.console(_WIDTH)
    console.print(table, highlight=False)
    for kind, meaning in algebra.KINDS.items():
        console.print(f"{_SHORT.get(kind, kind):9} {meaning}", highlight=False, markup=False)


def cells(found: dict[tuple[str, str], algebra.Law]) -> list[list[str]]:
    """Lines of the table, the head first: a row a layer, a column a pooling, dropout and batch-norm."""
    rows = dict.fromkeys(row for row, _ in found)
    body = [[row, *(found[row, column].kind if (row, column) in found else "" for column in algebra.COLUMNS)] for row in rows]
    return [["", *algebra.COLUMNS], *body]
