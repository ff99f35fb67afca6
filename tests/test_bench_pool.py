"""``fastpool bench pool``: its rows, its check, its tables, its peers, and what Ctrl-C leaves."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from fastpool.bench import command, measure, pool, pool_peers, pool_report
from fastpool.bench.check import Result, WrongResultError
from rich.console import Console

SHAPE = (2, 3, 9, 11)


@pytest.fixture
def tiny(monkeypatch):
    """One small map, two windows, one layout and thread, PyTorch alone, and no more rounds than the least."""
    monkeypatch.setattr(pool_peers, "SHAPES", ("2x3x9x11",))
    few = {name: pool_peers.WINDOWS[name] for name in ("2x2 s2", "3x2 s2", "13x13 s1 p6", "global")}
    for name in set(pool_peers.WINDOWS) - set(few):
        monkeypatch.delitem(pool_peers.WINDOWS, name)
    monkeypatch.setattr(pool, "FULL_BUDGET", 0)
    monkeypatch.setattr(measure, "SAMPLE", 0)


def run(*arguments, only=("--peer", "torch", "--threads", 1)):
    return CliRunner().invoke(command.bench, ["pool", *map(str, (*only, *arguments))])


def case(kind, window="3x2 s2", a_pass="training", layout="contiguous"):
    return pool_peers.Case(SHAPE, kind, "global" if kind.startswith("global") else window, layout, a_pass, 1)


def test_every_case_is_measured(tiny, tmp_path):
    path = tmp_path / "rows.json"
    ended = run("--json", path)
    assert ended.exit_code == 0, ended.output
    rows = json.loads(path.read_text())
    windowed = {(kind, window) for kind in list(pool_peers.KINDS)[:6] for window in ("2x2 s2", "3x2 s2", "13x13 s1 p6")}
    found = [(row["kind"], row["window"]) for row in rows]
    assert set(found) == windowed | {(kind, "global") for kind in list(pool_peers.KINDS)[6:]}
    assert len(rows) == 4 * len(set(found))
    for row in rows:
        assert row["correct"]
        assert row["error"] is None
        assert row["shape"] == "2x3x9x11"
        assert set(pool.NUMBERS) <= set(row)
        positive = ("bytes", "fastpool_ms", "copy_ms", "torch_ms", "torch_ratio", "roofline", "gb_s", "copy_gb_s", "first_s", "threads")
        assert all(row[name] > 0 for name in positive)
        assert all(row[name] for name in ("cpu", "date", "torch_version", "numba_version", "fastpool_version", "layout", "pass"))
        assert row["torch_ratio"] == row["torch_ms"] / row["fastpool_ms"]
        assert (row["fastpool_saved_bytes"] is None) == (row["torch_saved_bytes"] is None) == (row["pass"] == "forward")
        assert not any(isinstance(value, (dict, list)) for value in row.values())
    assert max(len(line) for line in ended.stdout.splitlines()) <= 120
    assert "…" not in ended.stdout
    assert "as fast as PyTorch, forward" in " ".join(ended.stdout.split())
    assert "Roofline, training: " in ended.stdout


def test_as_a_user_types_it(tmp_path):
    path = tmp_path / "rows.json"
    only = ["--quick", "--shape", "2x3x9x11", "--kind", "max", "--kind", "avg", "--window", "2x2 s2", "--layout", "channels_last"]
    arguments = [sys.executable, "-m", "fastpool", "bench", "pool", *only, "--threads", "1", "--peer", "torch", "--json", str(path)]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=120, encoding="utf-8", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    rows = json.loads(path.read_text())
    assert [(row["kind"], row["pass"]) for row in rows] == [(kind, a_pass) for kind in ("max", "avg") for a_pass in pool_peers.PASSES]
    assert all(row["threads"] == 1 and row["layout"] == "channels_last" for row in rows)
    assert "2x3x9x11" in ended.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_control_c_keeps_finished_rows(tiny, tmp_path, monkeypatch):
    finished = pool.row
    left = iter(range(2))

    def row(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return finished(*arguments)

    monkeypatch.setattr(pool, "row", row)
    path = tmp_path / "rows.json"
    ended = run("--json", path, "--kind", "max", "--window", "2x2 s2")
    assert ended.exit_code == 130, ended.output
    assert [row["pass"] for row in json.loads(path.read_text())] == ["forward", "training"]
    assert "Interrupted: 2 of 4 rows" in ended.stdout


@pytest.mark.parametrize("kind", pool_peers.KINDS)
@pytest.mark.parametrize(
    ("garbage", "passes"),
    [
        (lambda y: y + 0.01 * y.abs().max(), 2),
        (lambda y: y * torch.nan, 2),
        (lambda y: y.detach() + 0.9 * (y - y.detach()), 1),
        (lambda y: y.repeat(1, 1, 2, 2), 2),
    ],
    ids=["shifted", "nan", "gradient", "shape"],
)
def test_a_wrong_result_is_not_timed(tiny, tmp_path, monkeypatch, kind, garbage, passes):
    pool._truth.cache_clear()
    right = pool_peers.FASTPOOL[kind]
    monkeypatch.setitem(pool_peers.FASTPOOL, kind, lambda x, w: garbage(right(x, w)))
    path = tmp_path / "rows.json"
    ended = run("--json", path, "--kind", kind, "--layout", "contiguous", *(() if "global" in kind else ("--window", "3x2 s2")))
    pool._truth.cache_clear()  # of stochastic pooling it may be the garbage
    assert ended.exit_code == 1, ended.output
    forward, training = json.loads(path.read_text())
    # A check of stochastic pooling draws with a gradient first, whatever the pass.
    assert [forward["correct"], training["correct"]] == [passes == 1 and kind != "stochastic", False]
    assert training["error"].startswith("fastpool: ")
    assert all(training[name] is None for name in pool.TIMES)
    assert "WRONG" in ended.stdout
    assert training["error"][:40] in " ".join(ended.stdout.split())


def test_a_wrong_peer_has_no_time(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(pool_peers.PEERS, "compile", lambda case, _: lambda x: 2 * pool_peers.layer(pool_peers.TORCH, case)(x))
    monkeypatch.setattr(pool_peers, "missing", lambda names: {})
    path = tmp_path / "rows.json"
    ended = run("--json", path, "--kind", "max", "--window", "2x2 s2", "--layout", "contiguous", "--peer", "compile")
    assert ended.exit_code == 1, ended.output
    row = json.loads(path.read_text())[0]
    assert row["error"].startswith("compile: values differ")
    assert row["compile_ms"] is None
    assert row["fastpool_ms"] > 0
    assert row["torch_ms"] > 0


def test_a_slow_peer_is_called_once(tiny, monkeypatch):
    monkeypatch.setattr(pool, "PATIENCE", 0)
    found = pool.row(case("max", a_pass="forward"), ["torch"], 0)
    assert found["torch_ms"] > 0
    assert found["torch_ratio"] > 0


@pytest.mark.parametrize("layout", pool_peers.LAYOUTS)
def test_planes_of_a_large_map(monkeypatch, layout):
    monkeypatch.setattr(pool, "CHECKED", 100)
    x = torch.arange(math.prod(SHAPE)).reshape(SHAPE).contiguous(memory_format=pool_peers.LAYOUTS[layout])
    assert torch.equal(pool._planes(x, SHAPE), torch.stack([x[0, 0], x[1, 2]])[:, None])


def test_one_last_bit_is_wrong_where_nothing_is_rounded():
    for kind in ("max", "avg"):
        some = case(kind, a_pass="forward")
        y = pool_peers.layer(pool_peers.TORCH, some)(pool._inputs(SHAPE))
        nearly = Result(y.nextafter(torch.tensor(torch.inf)), torch.empty(0))
        if kind == "avg":
            pool._check(some, nearly)
        else:
            with pytest.raises(WrongResultError, match="must not differ"):
                pool._check(some, nearly)


def test_bytes():
    x, y = 4 * 2 * 3 * 9 * 11, 4 * 2 * 3 * 4 * 5
    assert pool.fewest_bytes(case("max", a_pass="forward")) == x + y
    assert pool.fewest_bytes(case("max")) == 2 * (x + y + y // 4)
    assert pool.fewest_bytes(case("avg")) == 2 * (x + y)
    assert pool.fewest_bytes(case("l2")) == 3 * (x + y)
    assert pool.fewest_bytes(case("global_max")) == 2 * (x + 4 * 6 + 6)


@pytest.mark.parametrize(("kind", "ours", "theirs"), [("max", 1, 8), ("avg", 0, 0)])
def test_saved_bytes(kind, ours, theirs):
    x = torch.randn(SHAPE)
    assert pool.saved_bytes(pool_peers.layer(pool_peers.FASTPOOL, case(kind)), x) == ours
    assert pool.saved_bytes(pool_peers.layer(pool_peers.TORCH, case(kind)), x) == theirs


@pytest.mark.parametrize("peer", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("window", [name for name in pool_peers.WINDOWS if name != "global"])
def test_peers_are_right(peer, window):
    for module in pool_peers._MODULES[peer]:
        pytest.importorskip(module)
    x = pool._inputs(SHAPE)
    some = 0
    for kind in pool_peers.KINDS:
        asked = case(kind, window, "forward")
        layer = pool_peers.PEERS[peer](asked, x) if pool_peers.fits(pool_peers.WINDOWS[asked.window], SHAPE) else None
        if layer is not None:
            some += 1
            pool._check(asked, Result(pool_peers.as_tensor(layer(x)), torch.empty(0)))
    assert some >= 5


def test_missing_peers_are_named(tiny, monkeypatch):
    for module in ("onnx", "onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, module, None)
    ended = run("--kind", "max", "--window", "2x2 s2", "--layout", "contiguous", "--peer", "onnxruntime", "--peer", "openvino")
    assert ended.exit_code == 0, ended.output
    words = " ".join(ended.stdout.split())
    assert "left out: ONNX Runtime" in words
    assert "pip install 'fastpool[peers]'" in words
    assert "torch.compile" not in words


def test_the_widest_table():
    """Every peer, and numbers of the most digits."""
    row = {"shape": "1x16x3000x2000", "kind": "stochastic_eval", "window": "13x13 s1 p6", "layout": "channels_last", "threads": 2}
    row |= {"correct": True, "error": None, **dict.fromkeys(pool.NUMBERS, 1234.4), "roofline": 1.2}
    rows = [row | {"pass": a_pass} for a_pass in pool_peers.PASSES]
    console = Console(width=120)
    with console.capture() as capture:
        console.print(pool_report.table(rows, list(pool_peers.PEERS), row["shape"]))
    assert "…" not in capture.get()
    assert max(map(len, capture.get().splitlines())) <= 120


def test_what_a_peer_is_ahead_in_is_said():
    rows = []
    for ratio in (0.5, 2.0):
        row = dict.fromkeys(pool.NUMBERS) | {"fastpool_ms": 1.0, "torch_ms": ratio, "torch_ratio": ratio, "roofline": 0.5}
        rows.append(row | {"shape": "1", "kind": "max", "window": "2x2 s2", "layout": "contiguous", "threads": 1, "pass": "forward"})
        rows[-1] |= {"correct": True}
    rows.append(rows[0] | {"roofline": 20.0, "torch_ratio": 700.0})  # the copy lost its core to other work: no part of a mean
    said = pool_report.reading(rows)
    assert "In 1 of 3 rows the copy took over 1.5 times as long" in said
    assert "fastpool is 1x as fast as PyTorch, forward (geometric mean of 2; 0.50x to 2x); PyTorch is ahead in 1: max 2x2 s2 on 1" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kind", "global_max", "--window", "2x2 s2"], "no such case"),
        (["--shape", "1x2x3"], "is not four sizes"),
        (["--json", "/nowhere/rows.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_is_refused_at_once(arguments, words):
    ended = run(*arguments)
    assert ended.exit_code == 2
    assert words in ended.output
