"""What is made from the rows of ``fastpool bench pool``: the answers to its bars; and README's sections."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from fastpool.bench import bar as bars
from fastpool.bench import pool, pool_bars, pool_peers, readme, report

POOL, CONV, ORDER = readme.SECTIONS


def made_row(kind="max", window="2x2 s2", a_pass="forward", shape="8x256x56x56", layout="contiguous", threads=1, **numbers):
    """As ``pool.row`` makes them: twice as fast as PyTorch, at half the roofline."""
    row = {"cpu": "Z80", "microarchitecture": None, "simd": "NONE", "cores": 1, "date": "2026-01-02T03:04:05+00:00", "commit": "abc"}
    row |= {"correct": True, "error": None}
    row |= {"torch_version": "2", "numba_version": "0", "shape": shape, "kind": kind, "window": window, "layout": layout, "pass": a_pass}
    row |= {"threads": threads, **dict.fromkeys(pool.NUMBERS)}
    row |= {"bytes": 4096, "fastpool_ms": 1.0, "copy_ms": 0.5, "torch_ms": 2.0, "torch_ratio": 2.0, "roofline": 0.5, "gb_s": 1.0}
    return row | numbers


def bar(rows, words):
    (found,) = (bar for bar in pool_bars.bars(rows) if words in bar.asked)
    return found


@pytest.mark.parametrize(
    ("words", "rows", "verdict", "worst"),
    [
        ("maps of 28 and wider", [made_row(roofline=0.8), made_row("avg", roofline=0.79)], "not met", "79%, avg 2x2 s2"),
        ("maps of 28 and wider", [made_row(roofline=0.8), made_row("stochastic", roofline=0.1)], "met", "80%, max"),
        ("maps of 28 and wider", [made_row(roofline=0.1, window="2x2 s1"), made_row(roofline=0.1, a_pass="training")], "not measured", ""),
        ("maps of 14 and 7", [made_row(roofline=0.6, shape="64x512x7x7"), made_row(roofline=0.1)], "met", "60%"),
        ("ahead of PyTorch", [made_row(torch_ratio=0.99), made_row()], "not met", "0.99x"),
        ("ahead of OpenVINO", [made_row()], "not measured", ""),
        ("PyTorch not ahead", [made_row(torch_ratio=0.96, layout="channels_last")], "met", "0.96x"),
        ("90% of the roofline", [made_row(roofline=0.89, layout="channels_last"), made_row()], "not met", "89%"),
        ("10x PyTorch", [made_row(torch_ratio=9.0, a_pass="training"), made_row()], "not met", "9.00x"),
        ("training: 70%", [made_row(roofline=0.7, a_pass="training"), made_row()], "met", "70%"),
        ("1 byte an output", [made_row("l2", a_pass="training", fastpool_saved_bytes=4.0)], "not met", "4, l2"),
        ("1 byte an output", [made_row("global_max", "global", "training", fastpool_saved_bytes=2.0)], "not measured", ""),
        ("50x PyTorch", [made_row(window="13x13 s1 p6", torch_ratio=50.0)], "met", "50x"),
        (
            "2x of max",
            [made_row(), made_row("stochastic", fastpool_ms=2.1), made_row("stochastic_eval")],
            "not met",
            "2.10x, forward, stoc",
        ),
        ("without a gradient", [made_row(shape=pool_peers.TINY, a_pass="call", torch_ratio=0.4, roofline=None)], "not met", "2.50x"),
        ("with a gradient", [made_row(shape=pool_peers.TINY, a_pass="call_grad", torch_ratio=0.5, roofline=None)], "met", "2.00x"),
    ],
)
def test_bars(words, rows, verdict, worst):
    found = bar(rows, words)
    assert found.verdict == verdict
    assert found.worst.startswith(worst)
    assert bool(found.worst) == (verdict != "not measured")


def test_growth_is_over_the_smallest_window_of_the_same_case():
    windows = ("5x5 s1 p2", "13x13 s1 p6", "31x31 s1 p15")
    rows = [
        made_row(window=window, threads=n, fastpool_ms=n * ms) for n in (1, 2) for window, ms in zip(windows, (1, 1.1, 1.3), strict=True)
    ]
    rows += [made_row("stochastic", window, fastpool_ms=ms) for window, ms in zip(windows, (1, 9, 99), strict=True)]
    found = bar(rows, "forward, stride 1")
    assert (found.passed, found.of, found.verdict) == (2, 4, "not met")
    assert found.worst.startswith("1.30x, max 31x31 s1 p15 on 8x256x56x56 contiguous")


def test_a_disturbed_or_wrong_row_answers_no_bar():
    rows = [made_row(roofline=20.0), made_row(fastpool_ms=None, roofline=None, torch_ratio=None, correct=False)]
    assert {bar.verdict for bar in pool_bars.bars(rows)} == {"not measured"}


def test_the_summary_names_every_bar():
    found = pool_bars.bars([made_row()])
    said = bars.summary(found)
    assert all(bar.asked in said for bar in found)
    assert "not met:      forward, contiguous, 2x2 s2, 3x3 s2 p1, maps of 28 and wider" in said
    assert "0 of 1; worst 50%, max 2x2 s2 on 8x256x56x56 contiguous, 1 thr" in said
    assert max(map(len, said.splitlines())) <= 120


@pytest.mark.parametrize("section", readme.SECTIONS, ids=lambda section: section.benchmark)
def test_the_readme_is_what_the_rows_give(section):
    assert section.held(Path(readme.README).read_text()) == section.made(section.results())


def test_a_readme_section(tmp_path):
    rows = [made_row(), made_row(torch_ratio=0.5, a_pass="training"), made_row("avg", torch_ratio=0.7), made_row(roofline=9.0)]
    rows.append(made_row("min", correct=False, error="fastpool: values differ", fastpool_ms=None, roofline=None, torch_ratio=None))
    report.write(rows, tmp_path / "a.jsonl")
    made = POOL.made([tmp_path / "a.jsonl"])
    assert "**Z80, NONE, 1 cores**" in made
    assert "commit `abc`" in made
    assert "In 1 the copy was disturbed" in made
    assert "- min 2x2 s2 on 8x256x56x56 contiguous, 1 thr, forward: fastpool: values differ" in made
    assert "| 2x2 s2 | contiguous | 50% (50%) | 1.4x (0.70x) | 50% (50%) | 0.50x (0.50x) |" in made
    losing = made.partition("2 times a peer is ahead by more than 5%, worst first")[2]
    assert 0 < losing.index("| training | PyTorch 0.50x |") < losing.index("| forward | PyTorch 0.70x |")
    assert POOL.held(POOL.updated(f"before\n{POOL.start}\nold\n{readme.END}\nafter", made)) == made
    assert POOL.made([]) == "Nothing is measured yet: `make results` does that."
    with pytest.raises(ValueError, match="no place for the results"):
        POOL.updated("no markers", made)


def test_the_readme_command(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text(
        f"before\n{POOL.start}\n{readme.END}\nbetween\n{CONV.start}\nold\n{readme.END}\n{ORDER.start}\n{readme.END}\nafter\n"
    )
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    report.write([made_row()], tmp_path / "pool-z80.jsonl")
    stale = CliRunner().invoke(readme.main, ["--check"])
    assert stale.exit_code == 1
    assert "make readme" in stale.output
    assert CliRunner().invoke(readme.main).exit_code == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| 2x2 s2 | contiguous |" in POOL.held(text)
    assert CONV.held(text) == CONV.made([])
    assert f"{readme.END}\nbetween\n{CONV.start}" in text
    assert CliRunner().invoke(readme.main, ["--check"]).exit_code == 0
