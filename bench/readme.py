"""README's benchmark section, from the rows in bench/results/: ``python -m fastpool.bench.readme``."""

from __future__ import annotations

import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from fastpool import laws as algebra

from . import (
    block_bars,
    blocks,
    commute,
    commute_bars,
    commute_conv,
    conv_bars,
    conv_peers,
    conv_report,
    laws,
    pool_bars,
    pool_report,
    report,
)
from .bar import Bar
from .cases import ACTIVATIONS, POOLINGS
from .libraries import LAYOUTS, TITLES
from .machine import ROOT, named
from .pool_peers import PASSES, WINDOWS
from .report import read
from .rows import SLOWER, Row, is_disturbed, markdown, number, peers_of, share, times

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


Compared = tuple[float, str, str]
"""Somebody's time over fastpool's; of what pass; who."""


def _beside_peers(row: Row) -> Iterator[Compared]:
    for peer in TITLES:
        if row[f"{peer}_ratio"]:
            yield row[f"{peer}_ratio"], _pass(row), TITLES[peer]


@dataclass(frozen=True)
class Benchmark(Section):
    """Of a benchmark beside peers."""

    start: str
    benchmark: str
    bars: Callable[[Sequence[Row]], Sequence[Bar]]
    named: Callable[[Row], str]
    parts: Callable[[Sequence[Row]], list[str]]
    """Tables between the bars and the rows that a peer wins."""
    command: str
    """Behind ``fastpool bench``."""
    compared: Callable[[Row], Iterable[Compared]] = _beside_peers
    rivals: str = "peer"
    """Whose times those are."""

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
    versions = f"torch {first['torch_version']}, numba {first['numba_version']}"
    days = sorted({row["date"][:10] for row in rows})
    commits = ", ".join(dict.fromkeys(f"`{row['commit']}`" for row in rows if row["commit"]))
    where = f"{named(first)}, {first['cores']} cores"
    measured = f"**{where}**; {versions}; {' to '.join(dict.fromkeys((days[0], days[-1])))}{f'; commit {commits}' if commits else ''}."
    disturbed = sum(map(_is_disturbed, rows))
    words = (
        f"{len(rows)} rows of `fastpool bench {section.command}`, float32, beside {', '.join(_present(rows))}; medians, everybody's memory"
        " reused."
    )
    if disturbed:
        words += f" In {disturbed} the copy was disturbed by other work; they are left out below."
    rows = [row for row in rows if not _is_disturbed(row)]
    wrong = [f"- {', '.join(filter(None, (section.named(row), _pass(row))))}: {row['error']}" for row in rows if not row["correct"]]
    parts = [f"{measured}\n{words}", _bars(section.bars(rows)), *section.parts(rows), _losing(section, rows)]
    if wrong:
        parts.insert(1, "\n".join(["Wrong, and not timed:", "", *wrong]))
    return "\n\n".join(parts)


def _present(rows: Sequence[Row]) -> list[str]:
    """Peers that have a time in one row at least, of whatever form and pass."""
    timed = {name for row in rows for name, value in row.items() if name.endswith("_ms") and value}
    return [title for peer, title in TITLES.items() if any(name.startswith(f"{peer}_") for name in timed)]


def _is_disturbed(row: Row) -> bool:
    """Where a copy tells."""
    return "roofline" in row and is_disturbed(row)


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


_IN_ORDER = {"torch": "PyTorch", "compile": "torch.compile", "unfused": "the unfused form"}
"""Who does both in an order beside the fused form."""


def _orders(row: Row) -> Iterator[Compared]:
    """Of both orders and passes."""
    for provider, who in _IN_ORDER.items():
        for order, words in commute_bars.WORDS.items():
            for a_pass in commute.PASSES:
                theirs, ours = (row[f"{name}_{order}_{a_pass}_ms"] for name in (provider, "fused"))
                if theirs and ours:
                    yield theirs / ours, f"{words}, {a_pass}", who


def _least(row: Row) -> Iterator[Compared]:
    """Of those four the one in which each is furthest ahead."""
    found = list(_orders(row))
    for who in dict.fromkeys(title for _, _, title in found):
        yield min(compared for compared in found if compared[2] == who)


def _forms(row: Row) -> Iterator[Compared]:
    """Of the ways to convolve, activate and pool that give the same."""
    for form, who in commute_conv.FORMS.items():
        for a_pass in commute.PASSES:
            theirs, ours = (row[f"{name}_{a_pass}_ms"] for name in (form, "conv_pool"))
            if theirs and ours and form != "conv_pool" and not form.endswith("pool_act"):
                yield theirs / ours, a_pass, who


def _in_one(row: Row) -> Iterator[Compared]:
    for name, who in {"unfused": "its own unfused form", **TITLES}.items():
        if row.get(f"{name}_ratio"):
            yield row[f"{name}_ratio"], "forward", who


def _pairs(rows: Sequence[Row]) -> list[str]:
    """A line an activation and pass, a column a pooling: fused over the pooling alone; and what is saved beside PyTorch."""
    rows = [row for row in rows if row["correct"]]
    poolings = [name for name in POOLINGS if any(row["pooling"] == name for row in rows)]
    spoken = [name.replace("_", " ") for name in poolings]
    lines, saved = [], []
    for activation in ACTIVATIONS:
        of = {name: [row for row in rows if (row["activation"], row["pooling"]) == (activation, name)] for name in poolings}
        if any(of.values()):
            lines += [[activation, a_pass, *(_over_alone(found, a_pass) for found in of.values())] for a_pass in commute.PASSES]
            saved.append([activation, *map(_saved, of.values())])
    over = "Fused, over the time of the pooling alone: median (and worst) over layers, orders, batches and threads."
    bytes_of = "Bytes an output saved for backward, activate, then pool, by PyTorch and fused: means over layers."
    return [
        over,
        markdown(["", "pass", *spoken], lines, numbers=2),
        bytes_of,
        markdown(["", *spoken], saved, numbers=1),
        *_over_others(rows),
    ]


def _over_alone(rows: Sequence[Row], a_pass: str) -> str:
    found = [row[f"fused_{order}_{a_pass}_ms"] / row[f"{commute.ALONE}_{a_pass}_ms"] for row in rows for order in commute.ORDERS]
    return f"{times(statistics.median(found))} ({times(max(found))})" if found else ""


def _saved(rows: Sequence[Row]) -> str:
    means = (statistics.mean(row[f"{name}_act_pool_saved_bytes"] for row in rows) for name in ("torch", "fused") if rows)
    return ", ".join(f"{mean:.0f}" for mean in means)


def _over_others(rows: Sequence[Row]) -> list[str]:
    """Fused beside each other form, in sentences."""
    said = []
    for who in _IN_ORDER.values():
        means = []
        for a_pass in commute.PASSES:
            found = [ratio for row in rows for ratio, of, title in _orders(row) if title == who and of.endswith(a_pass)]
            means += [f"{_factor(statistics.geometric_mean(found))} {a_pass}"] if found else []
        if means:
            said.append(f"{' and '.join(means)} as fast as {who}")
    return [f"Fused is {'; '.join(said)} (geometric means over both orders)."] if said else []


def _produced(rows: Sequence[Row]) -> list[str]:
    """A line a network, pooling and pass: F.conv_pool2d beside every other form, over layers and activations."""
    rows = [row for row in rows if row["correct"]]
    forms = [form for form in commute_conv.FORMS if form != "conv_pool" and any(row[f"{form}_forward_ms"] for row in rows)]
    lines = []
    for network, pooling in dict.fromkeys((row["network"], row["pooling"]) for row in rows):
        of = [row for row in rows if (row["network"], row["pooling"]) == (network, pooling)]
        for a_pass in commute.PASSES:
            cells = []
            for form in forms:
                ratios = [row[f"{form}_{a_pass}_ms"] / row[f"conv_pool_{a_pass}_ms"] for row in of if row[f"{form}_{a_pass}_ms"]]
                cells.append(f"{_factor(statistics.median(ratios))} ({_factor(min(ratios))})" if ratios else "")
            saved = [statistics.mean(row[f"{form}_saved_bytes"] for row in of) for form in ("torch_act_pool", "conv_pool")]
            bytes_of = "{:.0f}, {:.0f}".format(*saved) if a_pass == "training" else ""
            launches = f"{sum(row['one_launch'] for row in of)} of {len(of)}" if a_pass == "forward" else ""
            lines.append([network, pooling, a_pass, *cells, launches, bytes_of])
    said = "Median (and worst) over layers, activations, batches and threads; factors are a form's time over `F.conv_pool2d`'s."
    header = [
        "network",
        "pooling",
        "pass",
        *(commute_conv.FORMS[form] for form in forms),
        "one launch",
        "saved bytes, PyTorch and fastpool",
    ]
    return [said, markdown(header, lines, numbers=3)]


def _blocks(rows: Sequence[Row]) -> list[str]:
    """A line a network and layout over all blocks, batches and threads."""
    names = {"unfused": "unfused", **{peer: TITLES[peer] for peer in blocks.PEERS if any(row[f"{peer}_ms"] for row in rows)}}
    lines = []
    for network, layout in dict.fromkeys((row["network"], row["layout"]) for row in rows):
        of = [row for row in rows if (row["network"], row["layout"]) == (network, layout)]
        launches = f"{sum(bool(row['in_one']) for row in of)} of {len(of)}"
        lines.append([network, layout, launches, *(_middle(of, f"{name}_ratio", times) for name in names)])
    said = "Median (and worst) over blocks, batches and threads; factors are another's time over the fused form's."
    return [said, markdown(["network", "layout", "one launch", *names.values()], lines, numbers=2)]


def _losing(section: Benchmark, rows: Sequence[Row]) -> str:
    """Every row in which another is ahead by more than noise, worst first."""
    lost = [(ratio, section.named(row), a_pass, who) for row in rows for ratio, a_pass, who in section.compared(row) if ratio < SLOWER]
    if not lost:
        return f"No {section.rivals} is ahead by more than noise in any row."
    lines = [[case, a_pass, f"{who} {ratio:.2f}x"] for ratio, case, a_pass, who in sorted(lost)]
    table = markdown([f"where a {section.rivals} is ahead", "", ""], lines)
    said = f"{len(lines)} times a {section.rivals} is ahead by more than {1 - SLOWER:.0%}, worst first"
    return f"<details><summary>{said}</summary>\n\n{table}\n\n</details>"


def _middle(rows: Iterable[Row], name: str, show: Callable[[float], str]) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    return f"{show(statistics.median(values))} ({show(min(values))})" if values else ""


def _pass(row: Row) -> str:
    return row.get("pass", "").replace("call_", "call with ").replace("_", " ")


def _factor(value: float) -> str:
    return f"{number(value)}x"


SECTIONS = (
    Benchmark("<!-- made from bench/results/ by `make readme` -->", "pool", pool_bars.bars, pool_report.named, _windows, "pool"),
    Benchmark(
        "<!-- convolution: made from bench/results/ by `make readme` -->", "conv", conv_bars.bars, conv_report.named, _networks, "conv"
    ),
    Benchmark(
        "<!-- activation and pooling: made from bench/results/ by `make readme` -->",
        "commute",
        commute_bars.bars,
        report.named,
        _pairs,
        "commute",
        _least,
        "peer or unfused form",
    ),
    Benchmark(
        "<!-- behind a convolution: made from bench/results/ by `make readme` -->",
        "commute_conv",
        commute_bars.conv_bars,
        report.named,
        _produced,
        "commute --conv",
        _forms,
        "peer or unfused form",
    ),
    Benchmark(
        "<!-- blocks: made from bench/results/ by `make readme` -->",
        "block",
        block_bars.bars,
        blocks.named,
        _blocks,
        "block",
        _in_one,
        "peer or unfused form",
    ),
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
