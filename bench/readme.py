"""README's benchmark section, from the rows in bench/results/: ``python -m fastpool.bench.readme``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import click

from .bar import Bar
from .libraries import LAYOUTS, TITLES
from .machine import ROOT
from .pool_bars import bars
from .pool_peers import PASSES, PEERS, WINDOWS
from .pool_report import named
from .report import read
from .rows import SLOWER, Row, is_disturbed, number, peers_of

README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results"

START, END = "<!-- made from bench/results/ by `make readme` -->", "<!-- end of what is made -->"


def section(files: Iterable[Path]) -> str:
    """Markdown between the markers: for each machine what was measured, the bars, the windows, and every row that a peer wins."""
    parts = [_machine(rows) for rows in map(read, files) if rows]
    return "\n\n".join(parts) or "Nothing is measured yet: `make results` does that."


def results() -> list[Path]:
    return sorted(RESULTS.glob("pool-*.jsonl"))


def between(text: str) -> str:
    """What the markers of a README hold."""
    return text.partition(START)[2].partition(END)[0].strip("\n")


def updated(text: str, made: str) -> str:
    """The README with another section; ValueError without its markers."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"no place for the results: {START} and {END} must be there")
    return f"{before}{START}\n\n{made}\n\n{END}{after}"


def _machine(rows: Sequence[Row]) -> str:
    first = rows[0]
    peers = [TITLES[peer] for peer in peers_of(rows)]
    versions = f"torch {first['torch_version']}, numba {first['numba_version']}"
    days = sorted({row["date"][:10] for row in rows})
    commits = ", ".join(dict.fromkeys(f"`{row['commit']}`" for row in rows if row["commit"]))
    where = f"{first['cpu']}, {first['simd']}, {first['cores']} cores"
    measured = f"**{where}**; {versions}; {' to '.join(dict.fromkeys((days[0], days[-1])))}{f'; commit {commits}' if commits else ''}."
    disturbed = sum(map(is_disturbed, rows))
    words = f"{len(rows)} rows of `fastpool bench pool`, float32, beside {', '.join(peers)}; medians, everybody's memory reused."
    if disturbed:
        words += f" In {disturbed} the copy was disturbed by other work; they are left out below."
    rows = [row for row in rows if not is_disturbed(row)]
    wrong = [f"- {named(row)}, {row['pass']}: {row['error']}" for row in rows if not row["correct"]]
    parts = [f"{measured}\n{words}", _bars(bars(rows)), _windows(rows), _losing(rows)]
    if wrong:
        parts.insert(1, "\n".join(["Wrong, and not timed:", "", *wrong]))
    return "\n\n".join(parts)


def _bars(found: Sequence[Bar]) -> str:
    lines = [[bar.asked, bar.verdict, f"{bar.passed} of {bar.of}", bar.worst] for bar in found if bar.of]
    return _markdown(["the bar", "", "cases", "worst"], lines)


def _windows(rows: Sequence[Row]) -> str:
    """A line a window and layout over all maps, kinds and threads: the median, and the worst in brackets."""
    peers = peers_of(rows)
    header = ["window", "layout", "roofline", *(TITLES[peer] for peer in peers), "roofline, training", "PyTorch, training"]
    lines = []
    for window in WINDOWS:
        for layout in LAYOUTS:
            of = [row for row in rows if (row["window"], row["layout"]) == (window, layout)]
            forward, training = ([row for row in of if row["pass"] == a_pass] for a_pass in PASSES)
            cells = [_middle(forward, "roofline", _percent), *(_middle(forward, f"{peer}_ratio", _factor) for peer in peers)]
            cells += [_middle(training, "roofline", _percent), _middle(training, "torch_ratio", _factor)]
            if forward or training:
                lines.append([window, layout, *cells])
    said = "Median (and worst) over maps, kinds and threads; forward unless it says training; factors are a peer's time over fastpool's."
    return f"{said}\n\n{_markdown(header, lines, numbers=True)}"


def _losing(rows: Sequence[Row]) -> str:
    """Every row in which a peer is ahead by more than noise, worst first."""
    lost = []
    for row in rows:
        ahead = {peer: row[f"{peer}_ratio"] for peer in PEERS if (row[f"{peer}_ratio"] or 1) < SLOWER}
        lost += [(ratio, named(row), row["pass"].replace("_", " with "), TITLES[peer]) for peer, ratio in ahead.items()]
    if not lost:
        return "No peer is ahead by more than noise in any row."
    lines = [[case, a_pass, f"{peer} {ratio:.2f}x"] for ratio, case, a_pass, peer in sorted(lost)]
    table = _markdown(["where a peer is ahead", "", ""], lines)
    said = f"{len(lines)} times a peer is ahead by more than {1 - SLOWER:.0%}, worst first"
    return f"<details><summary>{said}</summary>\n\n{table}\n\n</details>"


def _middle(rows: Iterable[Row], name: str, show: Callable[[float], str]) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    return f"{show(statistics.median(values))} ({show(min(values))})" if values else ""


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _factor(value: float) -> str:
    return f"{number(value)}x"


def _markdown(header: Sequence[str], lines: Iterable[Sequence[str]], numbers: bool = False) -> str:
    rule = ["---:" if numbers and i > 1 else "---" for i in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit with 1 if README is not what the rows give.")
def main(check: bool) -> None:
    """Put what bench/results/ holds into README.md."""
    text = README.read_text()
    new = updated(text, section(results()))
    if check and new != text:
        raise click.ClickException("README.md is older than bench/results/: make readme")
    if not check:
        README.write_text(new)


if __name__ == "__main__":
    main()
