"""``fastpool laws`` as a user types it, and README's table, which it prints."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastpool import laws
from fastpool.cli import main

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- laws: made by `fastpool laws --markdown` -->\n\n", "\n\n<!-- end of laws -->"


def run(*arguments):
    return CliRunner().invoke(main, ["laws", *arguments])


def test_the_table_fits_a_terminal():
    found = run()
    assert found.exit_code == 0
    lines = found.output.splitlines()
    assert max(map(len, lines)) <= 120
    assert any(line.startswith("relu ") and "exact" in line and "never" in line for line in lines)
    for kind in laws.KINDS.values():
        assert kind.split(":")[0][:40] in found.output


def test_json_tells_every_pair():
    found = json.loads(run("--json").output)
    assert {(law["row"], law["column"]) for law in found} == set(laws.table())
    for law in found:
        assert law["kind"] in laws.KINDS
        assert (law["counterexample"] is not None) == (law["kind"] == "never")


def test_one_pair():
    assert "two-point" in run("gelu", "max_pool2d").output
    told = json.loads(run("relu", "avg_pool2d", "--json").output)
    assert told["kind"] == "never"
    assert told["gap"] > 0


@pytest.mark.parametrize("arguments", [("gelu",), ("gelu", "max_pool2d", "relu"), ("no such layer", "max_pool2d")])
def test_what_is_no_pair_is_refused(arguments):
    found = run(*arguments)
    assert found.exit_code == 2
    assert "Error" in found.output


def test_readme_shows_this_table():
    text = README.read_text()
    assert text.count(START) == text.count(END) == 1
    assert text.split(START)[1].split(END)[0] == run("--markdown").output.strip()
