"""``fastpool laws``: which layers may change places, and what is true of what lessons say of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.table import Table
from rich.text import Text

from fastpool import laws as algebra
from fastpool import terminal

from . import claims, report
from .machine import file_name, keep_pages, machine, named
from .photograph import MissingPhotographError, photograph
from .rows import markdown

STYLES = dict.fromkeys(("exact", "rounding", "affine", "scaling", "mask"), "green") | {"exchange": "cyan", "two-point": "cyan"}
STYLES |= {"never": "red", "probed": "yellow"}


def cell(law: algebra.Law | None, gap: bool = True) -> str:
    """A class; of "never" with the gap that its counterexample shows."""
    if law is None:
        return ""
    return f"{law.kind} {law.gap:.2g}" if gap and law.gap is not None else law.kind


def terminal_table(found: Mapping[tuple[str, str], algebra.Law]) -> Table:
    """A row a layer, a column a pooling, dropout or batch-norm."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for column in algebra.COLUMNS:
        table.add_column(column, no_wrap=True)
    for row in algebra.rows():
        cells = [found.get((row, column)) for column in algebra.COLUMNS]
        table.add_row(row, *(Text(cell(law, False), STYLES.get(law.kind, "") if law else "") for law in cells))
    return table


def turned(found: Mapping[tuple[str, str], algebra.Law], other: Mapping[tuple[str, str], algebra.Law]) -> str:
    """A sentence: what differs where the pooling comes first."""
    apart = "; ".join(f"{column}: {', '.join(rows)}" for column, rows in algebra.otherwise(found, other).items())
    return f"A layer, then a column's: pool(f(x)). Of f(pool(x)) the classes are the same, but for {apart}."


def table_markdown(found: Mapping[tuple[str, str], algebra.Law], other: Mapping[tuple[str, str], algebra.Law] | None = None) -> str:
    """The table, the other order, and what its words mean."""
    head = ["", "shape", *algebra.COLUMNS]
    lines = [[row, algebra.described(row), *(cell(found.get((row, column))) for column in algebra.COLUMNS)] for row in algebra.rows()]
    words = "\n".join(f"- *{kind}*: {meaning}" for kind, meaning in algebra.KINDS.items())
    return f"{markdown(head, lines)}\n\n{turned(found, other or algebra.table(pool_first=True))}\n\n{words}"


def claims_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line a claim, and where it was measured."""
    first = rows[0]
    where = f"**{named(first)}**, {first['threads']} thread; torch {first['torch_version']}; {first['date'][:10]}."
    said = f"Maps of {first['shape']}, a photograph through a convolution, float32; times are medians. {where}"
    return f"{said}\n\n{markdown(['claim', 'measured'], ([row['claim'], row['found']] for row in rows))}"


@click.command()
@click.argument("layers", nargs=-1, metavar="[FIRST SECOND]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: every law with its conditions, reason, source and counterexample.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print Markdown.")
@click.option("--claims", "settle", is_flag=True, help="Measure what lessons claim, too: about half a minute.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    help="With --claims: keep the measurements here, JSON lines; in a folder, by the machine's name.",
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of the measurements.")
def laws(layers: tuple[str, ...], as_json: bool, as_markdown: bool, settle: bool, keep: Path | None, threads: int) -> None:
    """Which layers may change places with which pooling, dropout or batch-norm?

    A row a layer, a class a cell: exact, rounding, exchange (max becomes min), two-point (f of the window's smallest and largest element),
    affine, scaling, mask, never, probed.

    Of two layers by name, in their order, ``fastpool laws gelu max_pool2d``: their law, with its conditions or a counterexample, as
    ``fastpool.commutes`` tells it of modules and functions too.
    """
    if layers:
        if len(layers) != 2:
            raise click.UsageError(f"two layers, the first and the second, or none; got {' '.join(layers)}")
        if as_markdown or settle:
            raise click.UsageError(f"{'--markdown' if as_markdown else '--claims'} is of the table, not of two layers")
        return _of_two(*layers, as_json)
    if as_json and as_markdown:
        raise click.UsageError("--json or --markdown, not both")
    if keep and not settle:
        raise click.UsageError("--keep keeps what --claims measures")
    found, other = algebra.table(), algebra.table(pool_first=True)
    rows = _settled(threads, keep) if settle else []
    if as_json:
        both = ((False, found), (True, other))
        named = [
            {"row": row, "column": column, "pool_first": first, **law.as_dict()} for first, of in both for (row, column), law in of.items()
        ]
        click.echo(json.dumps({"laws": named, "claims": rows}, indent=2))
    elif as_markdown:
        click.echo("\n\n".join([table_markdown(found, other), *([claims_markdown(rows)] if rows else [])]))
    else:
        console = terminal.console(120)
        console.print(terminal_table(found))
        console.print(Text(turned(found, other)))
        for kind, meaning in algebra.KINDS.items():
            console.print(Text(f"{kind:>10}  {meaning}"))
        for row in rows:
            console.print(Text(f'\n"{row["claim"]}"', style="bold"))
            console.print(Text(row["found"]))


def _of_two(first: str, second: str, as_json: bool) -> None:
    try:
        law = algebra.commutes(first, second)
    except (TypeError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(law.as_dict(), indent=2))
    else:
        terminal.console(120).print(Text(str(law)))


def _settled(threads: int, keep: Path | None) -> list[dict[str, Any]]:
    try:
        photograph()
    except MissingPhotographError as error:
        raise click.ClickException(str(error)) from error
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    keep_pages()
    try:
        where = machine()
        with terminal.progress() as bar:
            todo = bar.track(claims.settled(), total=len(claims.CLAIMS), description="claims")
            rows = [{**row, **where} for row in todo]
    finally:
        torch.set_num_threads(before)
    if keep is not None:
        report.write(rows, keep / file_name("laws", where) if keep.is_dir() else keep)
    return rows
