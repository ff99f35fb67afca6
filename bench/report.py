"""Rows of the order benchmark as a table, as words and as a file."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.table import Table

from .cases import ACTIVATIONS
from .commute import ROUNDING, TIMES

Row = Mapping[str, Any]

VERDICTS = ("exact", "rounding", "values", "no", "WRONG")
"""From equal to not: bit for bit; up to rounding; in values only (gradients differ); not; fastpool's result is wrong."""

SLOWER = 0.95
"""A speed-up below this is told in words; nearer to 1 the two are as fast as each other."""

_STYLES = {"exact": "green", "rounding": "green", "values": "yellow", "no": "red", "WRONG": "bold red"}


class Line(NamedTuple):
    """An activation and a pooling over some sites: the worst of the gaps, the sums of the times (ms; empty if a result is wrong)."""

    pooling: str
    activation: str
    verdict: str
    value_gap: float
    gradient_gap: float
    gradient_share: float
    times: dict[str, float]

    def saving(self, provider: str, a_pass: str) -> float:
        """Part of activate-then-pool's time that pool-then-activate saves; negative where it costs more."""
        return 1 - self.times[f"{provider}_pool_act_{a_pass}_ms"] / self.times[f"{provider}_act_pool_{a_pass}_ms"]

    def speedup(self, a_pass: str) -> float:
        """PyTorch's time over fastpool's, activate-then-pool both."""
        return self.times[f"torch_act_pool_{a_pass}_ms"] / self.times[f"fastpool_act_pool_{a_pass}_ms"]


def verdict(row: Row) -> str:
    """One of VERDICTS, from the gaps that were measured."""
    if not row["correct"]:
        return "WRONG"
    if row["value_gap"] > ROUNDING * row["value_scale"]:
        return "no"
    if row["gradient_gap"] > ROUNDING * row["gradient_scale"]:
        return "values"
    return "rounding" if row["value_gap"] or row["gradient_gap"] else "exact"


def lines(rows: Iterable[Row]) -> list[Line]:
    """One line a pair of activation and pooling, in the order of their first rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["pooling"], row["activation"]), []).append(row)
    return [_line(*pair, group) for pair, group in groups.items()]


def _line(pooling: str, activation: str, rows: Sequence[Row]) -> Line:
    worst = max((verdict(row) for row in rows), key=VERDICTS.index)
    largest = {name: max(row[name] or 0.0 for row in rows) for name in ("value_gap", "gradient_gap", "gradient_share")}
    times = {} if worst == "WRONG" else {name: sum(row[name] for row in rows) for name in TIMES}
    return Line(pooling, activation, worst, times=times, **largest)


def table(rows: Iterable[Row], title: str | None = None) -> Table:
    """At most 110 columns wide; a section a pooling.  A>P is activate-then-pool."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    for header in ("\npooling", "\nactivation", "orders\nequal?"):
        made.add_column(header, no_wrap=True)
    numbers = ("value\ngap", "grad.\ngap", "PyTorch\nA>P ms", "PyTorch\nP>A ms", "fastpool\nA>P ms", "fastpool\nP>A ms")
    for header in (*numbers, "P>A\nsaves", "in\ntrain.", "speed\n-up", "in\ntrain."):
        made.add_column(header, justify="right", no_wrap=True)
    previous = ""
    for line in lines(rows):
        if line.pooling != previous and previous:
            made.add_section()
        name = "" if line.pooling == previous else line.pooling.replace("_", " ")
        made.add_row(name, line.activation, f"[{_STYLES[line.verdict]}]{line.verdict}", *_numbers(line))
        previous = line.pooling
    return made


def _numbers(line: Line) -> list[str]:
    if not line.times:
        return ["-"] * 10
    times = [line.times[f"{provider}_{order}_forward_ms"] for provider in ("torch", "fastpool") for order in ("act_pool", "pool_act")]
    return [
        _gap(line.value_gap),
        _gap(line.gradient_gap),
        *map(_milliseconds, times),
        *(f"{line.saving('fastpool', a_pass):.0%}" for a_pass in ("forward", "training")),
        *(_factor(line.speedup(a_pass)) for a_pass in ("forward", "training")),
    ]


def _gap(gap: float) -> str:
    return f"{gap:.1e}" if gap else "0"


def _milliseconds(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def _factor(factor: float) -> str:
    return f"{factor:.0f}x" if factor >= 10 else f"{factor:.1f}x"


def reading(rows: Sequence[Row]) -> str:
    """What the table says, in sentences made from its numbers, one a line."""
    found = lines(rows)
    by_verdict = {name: [line for line in found if line.verdict == name] for name in VERDICTS}
    said = []
    if by_verdict["WRONG"]:
        errors = dict.fromkeys(f"{row['pooling']} with {row['activation']}, {row['error']}" for row in rows if not row["correct"])
        said.append(f"fastpool's result is wrong, and nothing timed: {'; '.join(errors)}.")
    if by_verdict["exact"]:
        said.append(f"Both orders gave the same bits on these maps, values and input gradients: {_named(by_verdict['exact'])}.")
    if by_verdict["rounding"]:
        said.append(f"Equal up to rounding: {_named(by_verdict['rounding'])}.")
    if by_verdict["values"]:
        share = max(line.gradient_share for line in by_verdict["values"])
        said.append(
            f"Equal in values, while gradients differ, in at most {share:.2g} of the elements (where the activation rounds two"
            f" elements of a window to one value, the first of them gets the gradient): {_named(by_verdict['values'])}."
        )
    if by_verdict["no"]:
        worst = max(by_verdict["no"], key=lambda line: line.value_gap)
        pair = f"{worst.pooling.replace('_', ' ')} with {worst.activation}"
        said.append(f"Not equal: {_named(by_verdict['no'])}; furthest apart {pair}, by {worst.value_gap:.2g}.")
    equal = [line for name in ("exact", "rounding", "values") for line in by_verdict[name]]
    if equal:
        said.append(
            f"Where values are equal, pooling first saves {_savings(equal, 'forward')} forward and {_savings(equal, 'training')} in"
            " training, with fastpool's pooling (median; least to most)."
        )
    timed = [line for line in found if line.times]
    if timed:
        said.append(
            f"Activate-then-pool with fastpool's pooling is {_speedups(timed, 'forward')} as fast as with PyTorch's forward,"
            f" {_speedups(timed, 'training')} in training (geometric mean; least to most)."
        )
    slower = [line for line in timed if min(line.speedup("forward"), line.speedup("training")) < SLOWER]
    if slower:
        said.append(f"PyTorch's is more than {1 - SLOWER:.0%} faster, forward or in training: {_named(slower)}.")
    return "\n".join(said)


def _named(found: Iterable[Line]) -> str:
    """'max, min with relu, tanh; avg with every activation': poolings that have the same activations are named together."""
    activations: dict[str, list[str]] = {}
    for line in found:
        activations.setdefault(line.pooling.replace("_", " "), []).append(line.activation)
    poolings: dict[str, list[str]] = {}
    for pooling, names in activations.items():
        with_ = "every activation" if len(names) == len(ACTIVATIONS) else ", ".join(names)
        poolings.setdefault(with_, []).append(pooling)
    return "; ".join(f"{', '.join(names)} with {with_}" for with_, names in poolings.items())


def _savings(found: Iterable[Line], a_pass: str) -> str:
    savings = [line.saving("fastpool", a_pass) for line in found]
    return f"{statistics.median(savings):.0%} ({min(savings):.0%} to {max(savings):.0%})"


def _speedups(found: Iterable[Line], a_pass: str) -> str:
    speedups = [line.speedup(a_pass) for line in found]
    return f"{_factor(statistics.geometric_mean(speedups))} ({_factor(min(speedups))} to {_factor(max(speedups))})"


def write(rows: Iterable[Row], path: Path) -> None:
    """JSON lines: one object a row.  A file already there is replaced at once or not at all."""
    text = "".join(map(_line_of, rows))
    path = path.resolve()
    if path.exists() and not path.is_file():  # a pipe or /dev/stdout can only be written to
        path.write_text(text)
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)


def append(row: Row, path: Path) -> None:
    """Keep one more row, whatever happens to the next."""
    with path.open("a") as file:
        file.write(_line_of(row))


def read(path: Path) -> list[dict[str, Any]]:
    """Rows that ``write`` and ``append`` kept.  A last line without its end was cut off in writing, and is no row."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _line_of(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
