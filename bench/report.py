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
from .commute import ALONE, PASSES, ROUNDING, SAVED, TIMES

Row = Mapping[str, Any]

VERDICTS = ("exact", "rounding", "values", "no", "WRONG")
"""From equal to not: bit for bit; up to rounding; in values only (gradients differ); not; fastpool's result is wrong."""

SLOWER = 0.95
"""A speed-up below this is told in words; nearer to 1 the two are as fast as each other."""

_STYLES = {"exact": "green", "rounding": "green", "values": "yellow", "no": "red", "WRONG": "bold red"}


class Line(NamedTuple):
    """An activation and a pooling over some sites: the worst of the gaps, the sums of the times (ms) and the means of the bytes saved, of
    providers that have them everywhere; none if a result is wrong."""

    pooling: str
    activation: str
    law: str
    verdict: str
    value_gap: float
    gradient_gap: float
    gradient_share: float
    times: dict[str, float]
    saved: dict[str, float]

    def saving(self, provider: str, a_pass: str) -> float:
        """Part of activate-then-pool's time that pool-then-activate saves; negative where it costs more."""
        return 1 - self.times[f"{provider}_pool_act_{a_pass}_ms"] / self.times[f"{provider}_act_pool_{a_pass}_ms"]

    def speedup(self, a_pass: str, over: str = "torch") -> float:
        """Another's time over fastpool's, fused; activate-then-pool both."""
        return self.times[f"{over}_act_pool_{a_pass}_ms"] / self.times[f"fused_act_pool_{a_pass}_ms"]

    def over_alone(self, a_pass: str) -> float:
        """fastpool's time, fused, activate-then-pool, over that of the pooling alone."""
        return self.times[f"fused_act_pool_{a_pass}_ms"] / self.times[f"{ALONE}_{a_pass}_ms"]


def verdict(row: Row) -> str:
    """One of VERDICTS, from the gaps that were measured."""
    if not row["correct"]:
        return "WRONG"
    if row["value_gap"] > ROUNDING * row["value_scale"]:
        return "no"
    if row["gradient_gap"] > ROUNDING * row["gradient_scale"]:
        return "values"
    return "rounding" if row["value_gap"] or row["gradient_gap"] else "exact"


def named(row: Row) -> str:
    """'VGG-16 64x224x224, max 2x2 s2 p0 with relu, batch 1, 1 thr'"""
    pooling = row["pooling"].replace("_", " ")
    window = "" if row["window"] == "global" else f" {row['window']}"
    return f"{row['site']}, {pooling}{window} with {row['activation']}, batch {row['batch']}, {row['threads']} thr"


def titled(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each batch and number of threads, whose times cannot be summed up, by what they have in common."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"batch {row['batch']}, {row['threads']} thread{'s' if row['threads'] > 1 else ''}", []).append(row)
    return groups


def lines(rows: Iterable[Row]) -> list[Line]:
    """One line a pair of activation and pooling, in the order of their first rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["pooling"], row["activation"]), []).append(row)
    return [_line(*pair, group) for pair, group in groups.items()]


def _line(pooling: str, activation: str, rows: Sequence[Row]) -> Line:
    worst = max((verdict(row) for row in rows), key=VERDICTS.index)
    largest = {name: max(row[name] or 0.0 for row in rows) for name in ("value_gap", "gradient_gap", "gradient_share")}
    known = [name for name in (*TIMES, *SAVED) if worst != "WRONG" and all(row[name] is not None for row in rows)]
    times = {name: sum(row[name] for row in rows) for name in TIMES if name in known}
    saved = {name: statistics.mean(row[name] for row in rows) for name in SAVED if name in known}
    return Line(pooling, activation, rows[0]["law"], worst, times=times, saved=saved, **largest)


_TIMED = {"torch": "torch\nms", "compile": "comp.\nms", "unfused": "un-\nfused", "fused": "fused\nms"}
"""Providers and their headers."""


def table(rows: Iterable[Row], title: str | None = None) -> Table:
    """At most 110 columns wide; a section a pooling.  Times are of activate-then-pool, forward."""
    found = lines(rows)
    timed = [provider for provider in _TIMED if any(f"{provider}_act_pool_forward_ms" in line.times for line in found)]
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=0)
    for header in ("\npooling", "\nactivation", "\nlaw", "orders\nequal?"):
        made.add_column(header, no_wrap=True)
    saved = ("saved\ntorch", "saved\nfused") if timed else ()
    for header in ("value\ngap", *(_TIMED[p] for p in timed), "speed\n-up", "in\ntrain.", "over\npool", "in\ntrain.", *saved):
        made.add_column(header, justify="right", no_wrap=True)
    previous = ""
    for line in found:
        if line.pooling != previous and previous:
            made.add_section()
        name = "" if line.pooling == previous else line.pooling.replace("_", " ")
        made.add_row(name, line.activation, line.law, f"[{_STYLES[line.verdict]}]{line.verdict}", *_numbers(line, timed))
        previous = line.pooling
    return made


def _numbers(line: Line, timed: Sequence[str]) -> list[str]:
    if not line.times:
        return ["-"] * (len(timed) + 7 if timed else 5)
    times = [line.times.get(f"{provider}_act_pool_forward_ms") for provider in timed]
    return [
        _gap(line.value_gap),
        *("-" if ms is None else _milliseconds(ms) for ms in times),
        *(_factor(line.speedup(a_pass)) for a_pass in PASSES),
        *(f"{over:.2f}" if (over := line.over_alone(a_pass)) < 10 else f"{over:.0f}" for a_pass in PASSES),
        *(f"{line.saved[f'{provider}_act_pool_saved_bytes']:.0f}" for provider in ("torch", "fused")),
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
            f"Where values are equal, pooling first saves {_savings(equal, 'unfused')}, one step after the other; fused,"
            f" {_savings(equal, 'fused')} (median; least to most)."
        )
    timed = [line for line in found if line.times]
    if timed:
        said += [
            f"Activate-then-pool, fused, is {_speedups(timed, 'forward', over)} as fast as {name}, {_speedups(timed, 'training', over)} in"
            " training (geometric mean; least to most)."
            for over, name in (
                ("torch", "PyTorch"),
                ("compile", "torch.compile"),
                ("unfused", "fastpool's pooling after PyTorch's activation"),
            )
            if all(f"{over}_act_pool_forward_ms" in line.times for line in timed)
        ]
        least = min(timed, key=lambda line: line.saved["fused_act_pool_saved_bytes"])
        bytes_of = lambda line: [line.saved[f"{provider}_act_pool_saved_bytes"] for provider in ("torch", "fused")]
        theirs, ours = (statistics.mean(values) for values in zip(*map(bytes_of, timed), strict=True))
        least = min(timed, key=lambda line: bytes_of(line)[::-1])
        said.append(
            f"Saved for backward an output: {theirs:.3g} bytes by PyTorch, {ours:.3g} fused, on average;"
            f" {least.pooling.replace('_', ' ')} with {least.activation} " + "{:.3g} and {:.3g}.".format(*bytes_of(least))
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


def _savings(found: Sequence[Line], provider: str) -> str:
    savings = {a_pass: [line.saving(provider, a_pass) for line in found] for a_pass in PASSES}
    said = [f"{statistics.median(of):.0%} {a_pass} ({min(of):.0%} to {max(of):.0%})" for a_pass, of in savings.items()]
    return " and ".join(said)


def _speedups(found: Iterable[Line], a_pass: str, over: str) -> str:
    speedups = [line.speedup(a_pass, over) for line in found]
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
