"""``fastpool laws``: the table in its three forms, and the lessons' claims, measured on small maps."""

import json

import pytest
import torch
from click.testing import CliRunner
from fastpool.bench import claims, report
from fastpool.bench import laws as command

from fastpool import laws


@pytest.fixture(scope="module")
def found():
    return laws.table()


@pytest.fixture(scope="module")
def turned():
    return laws.table(pool_first=True)


def printed(*arguments):
    result = CliRunner().invoke(command.laws, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_json_holds_every_law_in_both_orders(found, turned):
    said = json.loads(printed("--json"))
    assert said["claims"] == []
    for pool_first, table in ((False, found), (True, turned)):
        kinds = {(law["row"], law["column"]): law["kind"] for law in said["laws"] if law["pool_first"] == pool_first}
        assert kinds == {pair: law.kind for pair, law in table.items()}
    two, other = (law for law in said["laws"] if (law["row"], law["column"]) == ("mish", "max"))
    assert (two["form"], two["holds"]) == ("max(f(min(x)), f(max(x)))", True)
    assert (other["first"], other["second"], other["kind"]) == ("max_pool2d", "mish", "never")
    assert all(law["counterexample"] and law["gap"] for law in said["laws"] if law["kind"] == "never")


def test_the_terminal_table_fits_and_names_all(found):
    said = printed()
    assert max(map(len, said.splitlines())) <= 120
    lines = said.splitlines()
    for row in laws.rows():
        (line,) = (line for line in lines if line.startswith(f" {row} "))
        assert line.split()[-1] in laws.KINDS
    assert all(meaning in said for meaning in laws.KINDS.values())
    assert "l2: neg never." in " ".join(said.split())


def test_markdown(found, turned):
    said = printed("--markdown")
    assert said.count("\n| ") == len(laws.rows()) + 1
    assert "| gelu | falls, rises from -0.7518, f(0) = 0 | two-point | never 0.17 |" in said
    assert "| batch_norm, scale < 0 | falls | exchange | exchange | affine |" in said
    assert said.rstrip() == command.table_markdown(found, turned) == command.table_markdown(found)
    (sentence,) = (line for line in said.splitlines() if "f(pool(x))" in line)
    assert sentence.endswith("leaky_relu(-0.5) never, abs never, square never; l2: neg never.")
    apart = {pair for pair in found if found[pair].kind != turned[pair].kind}
    assert sentence.count(" never") == len(apart) == 10


def test_a_pair(found):
    said = printed("gelu", "max_pool2d")
    assert said.startswith("gelu, max_pool2d: two-point. ")
    assert "\n  max(f(min(x)), f(max(x)))\n" in said
    assert "gelu: never" in printed("max_pool2d", "gelu")
    told = json.loads(printed("dropout", "tanh", "--json"))
    assert (told["first"], told["second"], told["kind"], told["gap"]) == ("dropout", "tanh", "never", found["tanh", "dropout"].gap)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["gelu"], 2, "two layers, the first and the second, or none; got gelu"),
        (["relu", "max_pool2d", "relu"], 2, "got relu max_pool2d relu"),
        (["gelu", "max_pool2d", "--markdown"], 2, "--markdown is of the table"),
        (["gelu", "max_pool2d", "--claims"], 2, "--claims is of the table"),
        (["swish", "max_pool2d"], 1, "no layer is called 'swish'"),
        (["max_pool2d", "avg_pool2d"], 1, "one of two must be a function"),
    ],
)
def test_what_is_no_pair(arguments, code, words):
    result = CliRunner().invoke(command.laws, arguments)
    assert result.exit_code == code
    assert words in result.output


def test_what_does_not_go_together():
    for arguments, words in ((["--json", "--markdown"], "not both"), (["--keep", "x"], "what --claims measures")):
        result = CliRunner().invoke(command.laws, arguments)
        assert result.exit_code == 2
        assert words in result.output


@pytest.fixture(scope="module")
def numbers():
    """claim -> its numbers, and the sentence: of small maps, times of a round or two."""
    budget, claims.BUDGET = claims.BUDGET, 0.0
    try:
        maps = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(3))
        return {row["claim"]: (row["numbers"], row["found"]) for row in claims.settled(maps)}
    finally:
        claims.BUDGET = budget


def test_claims_about_values(numbers):
    monotone, average, _, mish, norm, dropout, norm_relu, shift, *_ = (of for of, _ in numbers.values())
    assert monotone["exact_gap"] == 0
    assert monotone["rounding_gap"] < 1e-6
    assert average["gap"] > 0.1
    assert average["above"] == 0
    assert mish["naive_gap"] > 1e-3
    assert mish["two_point_gap"] < 1e-6
    assert norm["up"] == norm["down_exchanged"] == 0
    assert min(norm["down"], norm["up_exchanged"], norm["training_gap"]) > 0.1
    assert dropout["relu_mask"] == dropout["tanh_mask"] == dropout["relu_scaled"] == 0
    assert dropout["tanh_scaled"] > 0.3
    assert norm_relu["gap"] > 0.1
    assert shift["max"] > shift["avg"]
    assert shift["strided_conv_zeros"] == shift["strided_conv_reflect"]


def test_claims_about_time(numbers):
    assert len(numbers) == len(claims.CLAIMS) == 10
    for claim in ("So pool first and save time", "L2 and stochastic pooling are rare, stochastic is expensive"):
        times, found = numbers[claim]
        assert min(times.values()) > 0
        assert "ms" in found


def test_claims_are_kept_and_shown(monkeypatch, tmp_path):
    monkeypatch.setattr(
        claims, "settled", lambda: iter([{"claim": "So they say", "found": "No: 1 apart.", "numbers": {}, "shape": "1x2x3x4"}])
    )
    monkeypatch.setattr(command, "keep_pages", lambda: True)
    assert '"So they say"\nNo: 1 apart.' in printed("--claims", "--keep", str(tmp_path))
    (kept,) = tmp_path.glob("laws-*.jsonl")
    (row,) = report.read(kept)
    assert row["threads"] == 1
    assert "| So they say | No: 1 apart. |" in command.claims_markdown([row])
    assert "Maps of 1x2x3x4" in printed("--claims", "--markdown")
