"""README's benchmark section, from the rows in bench/results/: ``python -m fastpool.bench.readme``."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from fastpool import laws as algebra

from . import conv_bars, conv_peers, conv_report, laws, pool_bars, pool_report
from .bar import Bar
from .libraries import LAYOUTS, TITLES
from .machine import ROOT, named
from .pool_peers import PASSES, WINDOWS
from .report import read
from .rows import SLOWER, Row, is_disturbed, markdown, number, peers_of, share

README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results"

END = "<!-- end of what is made -->"


class Section(ABC):
    """A part of README that is made from one benchmark's rows, and where it stands."""

    start: str
    """The marker before it; END is behind it."""
    benchmark: str
    """The first word of its rows' files."""

    @abstractmethod
    def made(self, files: Iterable[Path]) -> str:
        """Markdown."""

    def results(self) -> list[Path]:
        return sorted(RESULTS.glob(f"{self.benchmark}-*.jsonl"))

    def held(self, text: str) -> str:
        """What its markers in a README hold."""
        return text.partition(self.start)[2].partition(END)[0].strip("\n")

    def updated(self, text: str, made: str) -> str:
        """The README with another section; ValueError without its markers."""
        before, start, rest = text.partition(self.start)
        _, end, after = rest.partition(END)
        if not start or not end:
            raise ValueError(f"no place for the results: {self.start} and {END} must be there")
        return f"{before}{start}\n\n{made}\n\n{END}{after}"


@dataclass(frozen=True)
class Benchmark(Section):
    """Of a benchmark beside peers, ``fastpool bench`` its name."""

    start: str
    benchmark: str
    bars: Callable[[Sequence[Row]], Sequence[Bar]]
    named: Callable[[Row], str]
    parts: Callable[[Sequence[Row]], list[str]]
    """Tables between the bars and the rows that a peer wins."""

    def made(self, files: Iterable[Path]) -> str:
        """Markdown: for each machine what was measured, the bars, the tables, and every row that a peer wins."""
        found = [_machine(self, rows) for rows in map(read, files) if rows]
        return "\n\n".join(found) or "Nothing is measured yet: `make results` does that."


@dataclass(frozen=True)
class Order(Section):
    """Which layers may change places, derived anew; and the claims, as ``fastpool laws --claims`` measured them."""

    start: str = "<!-- order: made from the laws and bench/results/ by `make readme` -->"
    benchmark: str = "laws"

    def made(self, files: Iterable[Path]) -> str:
        parts = [laws.table_markdown(algebra.table())]
        parts += [laws.claims_markdown(rows) for rows in map(read, files) if rows]
        return "\n\n".join(parts)


def _machine(section: Benchmark, rows: Sequence[Row]) -> str:
    first = rows[0]
    peers = [TITLES[peer] for peer in peers_of(rows)]
    versions = f"torch {first['torch_version']}, numba {first['numba_version']}"
    days = sorted({row["date"][:10] for row in rows})
    commits = ", ".join(dict.fromkeys(f"`{row['commit']}`" for row in rows if row["commit"]))
    where = f"{named(first)}, {first['cores']} cores"
    measured = f"**{where}**; {versions}; {' to '.join(dict.fromkeys((days[0], days[-1])))}{f'; commit {commits}' if commits else ''}."
    disturbed = sum(map(is_disturbed, rows))
    words = (
        f"{len(rows)} rows of `fastpool bench {section.benchmark}`, float32, beside {', '.join(peers)}; medians, everybody's memory reused."
    )
    if disturbed:
        words += f" In {disturbed} the copy was disturbed by other work; they are left out below."
    rows = [row for row in rows if not is_disturbed(row)]
    wrong = [f"- {section.named(row)}, {_pass(row)}: {row['error']}" for row in rows if not row["correct"]]
    parts = [f"{measured}\n{words}", _bars(section.bars(rows)), *section.parts(rows), _losing(rows, section.named)]
    if wrong:
        parts.insert(1, "\n".join(["Wrong, and not timed:", "", *wrong]))
    return "\n\n".join(parts)


def _bars(found: Sequence[Bar]) -> str:
    lines = [[bar.asked, bar.verdict, f"{bar.passed} of {bar.of}", bar.worst] for bar in found if bar.of]
    return markdown(["the bar", "", "cases", "worst"], lines)


def _windows(rows: Sequence[Row]) -> list[str]:
    """A line a window and layout over all maps, kinds and threads: the median, and the worst in brackets."""
    peers = peers_of(rows)
    header = ["window", "layout", "roofline", *(TITLES[peer] for peer in peers), "roofline, training", "PyTorch, training"]
    lines = []
    for window in WINDOWS:
        for layout in LAYOUTS:
            of = [row for row in rows if (row["window"], row["layout"]) == (window, layout)]
            forward, training = ([row for row in of if row["pass"] == a_pass] for a_pass in PASSES)
            cells = [_middle(forward, "roofline", share), *(_middle(forward, f"{peer}_ratio", _factor) for peer in peers)]
            cells += [_middle(training, "roofline", share), _middle(training, "torch_ratio", _factor)]
            if forward or training:
                lines.append([window, layout, *cells])
    said = "Median (and worst) over maps, kinds and threads; forward unless it says training; factors are a peer's time over fastpool's."
    return [said, markdown(header, lines, numbers=2)]


def _networks(rows: Sequence[Row]) -> list[str]:
    """A line a network and pass over all layers, batches, layouts and threads, and one of the depthwise layers."""
    peers = peers_of(rows)
    lines = []
    kinds = dict.fromkeys((row["network"], row["groups"] > 1) for row in rows)
    for network, depthwise in kinds:
        for a_pass in conv_peers.PASSES:
            of = [row for row in rows if (row["network"], row["groups"] > 1, row["pass"]) == (network, depthwise, a_pass)]
            cells = [_middle(of, name, share) for name in ("peak", "roofline")] + [_middle(of, f"{peer}_ratio", _factor) for peer in peers]
            if of:
                lines.append([f"{network}, depthwise" if depthwise else network, a_pass.replace("_", " "), *cells])
    said = (
        "Median (and worst) over layers, batches, layouts and threads; factors are a peer's time over fastpool's, PyTorch's in its better"
    )
    return [
        f"{said} layout.",
        markdown(["network", "pass", "FMA peak", "copy roofline", *(TITLES[peer] for peer in peers)], lines, numbers=2),
    ]


def _losing(rows: Sequence[Row], named: Callable[[Row], str]) -> str:
    """Every row in which a peer is ahead by more than noise, worst first."""
    lost = []
    for row in rows:
        ahead = {peer: row[f"{peer}_ratio"] for peer in TITLES if (row[f"{peer}_ratio"] or 1) < SLOWER}
        lost += [(ratio, named(row), _pass(row), TITLES[peer]) for peer, ratio in ahead.items()]
    if not lost:
        return "No peer is ahead by more than noise in any row."
    lines = [[case, a_pass, f"{peer} {ratio:.2f}x"] for ratio, case, a_pass, peer in sorted(lost)]
    table = markdown(["where a peer is ahead", "", ""], lines)
    said = f"{len(lines)} times a peer is ahead by more than {1 - SLOWER:.0%}, worst first"
    return f"<details><summary>{said}</summary>\n\n{table}\n\n</details>"


def _middle(rows: Iterable[Row], name: str, show: Callable[[float], str]) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    return f"{show(statistics.median(values))} ({show(min(values))})" if values else ""


def _pass(row: Row) -> str:
    return row["pass"].replace("call_", "call with ").replace("_", " ")


def _factor(value: float) -> str:
    return f"{number(value)}x"


SECTIONS = (
    Benchmark("<!-- made from bench/results/ by `make readme` -->", "pool", pool_bars.bars, pool_report.named, _windows),
    Benchmark("<!-- convolution: made from bench/results/ by `make readme` -->", "conv", conv_bars.bars, conv_report.named, _networks),
    Order(),
)


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 if README is not what the rows give.")
def main(check: bool) -> None:
    """Put what bench/results/ holds into README.md."""
    text = README.read_text()
    new = text
    for section in SECTIONS:
        new = section.updated(new, section.made(section.results()))
    if check and new != text:
        raise click.ClickException("README.md is older than bench/results/: make readme")
    if not check:
        README.write_text(new)


if __name__ == "__main__":
    main()
