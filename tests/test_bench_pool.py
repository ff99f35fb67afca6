"""``fastpool bench pool``: its rows, its check, its tables, its peers, and what Ctrl-C leaves."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import product

import pytest
import torch
from click.testing import CliRunner
from fastpool.bench import command, libraries, machine, measure, pool, pool_peers, pool_report, report
from fastpool.bench.check import Result, WrongResultError
from rich.console import Console

SHAPE = (2, 3, 9, 11)
WINDOWED = ("max", "min", "avg", "l2", "stochastic", "stochastic_eval")


@pytest.fixture
def tiny(monkeypatch):
    """One small map, few windows, one thread, PyTorch alone, no more rounds than the least, and the process's own malloc."""
    monkeypatch.setattr(pool_peers, "SHAPES", ("2x3x9x11",))
    few = {name: pool_peers.WINDOWS[name] for name in ("2x2 s2", "3x2 s2", "13x13 s1 p6", "global", "to 7x7", "to 1x1")}
    monkeypatch.setattr(command, "keep_pages", lambda: False)
    every = dict(pool_peers.WINDOWS)
    for name in set(every) - set(few):
        del pool_peers.WINDOWS[name]
    monkeypatch.setattr(pool, "FULL_BUDGET", 0)
    monkeypatch.setattr(measure, "SAMPLE", 0)
    yield
    pool_peers.WINDOWS.clear()
    pool_peers.WINDOWS.update(every)  # in their order, in which README's table has them


ONE = ("--kind", "max", "--window", "2x2 s2")
"""Four cases of the tiny run."""


def run(*arguments, only=("--peer", "torch", "--threads", 1)):
    return CliRunner().invoke(command.bench, ["pool", *map(str, (*only, *arguments))])


def case(kind, window="3x2 s2", a_pass="training", layout="contiguous"):
    window = {"global": "global", "adaptive": "to 7x7"}.get(kind.partition("_")[0], window)
    return pool_peers.Case(SHAPE, kind, window, layout, a_pass, 1)


def test_every_case_is_measured(tiny, tmp_path):
    path = tmp_path / "rows.json"
    ended = run("--json", path, "--shape", pool_peers.TINY, "--shape", "2x3x9x11")
    assert ended.exit_code == 0, ended.output
    rows = report.read(path)
    tiny_rows, rows = ([row for row in rows if (row["shape"] == pool_peers.TINY) == is_tiny] for is_tiny in (True, False))
    expected = {(kind, window) for kind in WINDOWED for window in ("2x2 s2", "3x2 s2", "13x13 s1 p6")}
    expected |= {(f"global_{kind}", "global") for kind in ("max", "min", "avg", "l2")}
    expected |= {(f"adaptive_{kind}", window) for kind in ("max", "min", "avg") for window in ("to 7x7", "to 1x1")}
    found = [(row["kind"], row["window"]) for row in rows]
    assert set(found) == expected
    assert len(rows) == 4 * len(expected)
    assert {(row["kind"], row["pass"]) for row in tiny_rows} == set(product(("max", "avg", "global_max", "global_avg"), pool_peers.CALLS))
    for row in rows:
        assert row["shape"] == "2x3x9x11"
        positive = ("bytes", "copy_ms", "roofline", "gb_s", "copy_gb_s")
        assert all(row[name] > 0 for name in positive)
        assert (row["fastpool_saved_bytes"] is None) == (row["torch_saved_bytes"] is None) == (row["pass"] == "forward")
    for row in (*tiny_rows, *rows):
        assert row["correct"]
        assert row["error"] is None
        assert set(pool.NUMBERS) <= set(row)
        assert all(row[name] > 0 for name in ("fastpool_ms", "torch_ms", "torch_ratio", "first_s", "threads"))
        assert all(row[name] >= 0 for name in ("fastpool_faults", "torch_faults"))
        assert all(row[name] for name in (*machine.SAME, "date", "torch_version", "numba_version", "fastpool_version", "layout", "pass"))
        assert row["torch_ratio"] == pytest.approx(row["torch_ms"] / row["fastpool_ms"], rel=1.6e-3)  # three numbers of 4 digits
        assert not any(isinstance(value, (dict, list)) for value in row.values())
    assert max(len(line) for line in ended.stdout.splitlines()) <= 120
    assert "…" not in ended.stdout
    assert "as fast as PyTorch, forward" in " ".join(ended.stdout.split())
    assert "Roofline, training: " in ended.stdout
    assert "malloc is not glibc's" in ended.stdout
    assert "a call on 1x8x8x8 with a gradient: at most 2x PyTorch's" in ended.stdout.partition("The bars:")[2]


def test_as_a_user_types_it(tmp_path):
    path = tmp_path / "rows.json"
    only = ["--quick", "--shape", "2x3x9x11", "--kind", "max", "--kind", "avg", "--window", "2x2 s2", "--layout", "channels_last"]
    arguments = [sys.executable, "-m", "fastpool", "bench", "pool", *only, "--threads", "1", "--peer", "torch", "--json", str(path)]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=120, encoding="utf-8", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    rows = report.read(path)
    assert [(row["kind"], row["pass"]) for row in rows] == [(kind, a_pass) for kind in ("max", "avg") for a_pass in pool_peers.PASSES]
    assert all(row["threads"] == 1 and row["layout"] == "channels_last" for row in rows)
    assert "2x3x9x11" in ended.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_the_case_list():
    """What issue and DESIGN.md ask for, counted: a kind or window lost in an edit would shrink every table in silence."""
    shapes = tuple(map(pool_peers.sizes, pool_peers.SHAPES))
    found = pool.cases(shapes, pool_peers.KINDS, None, libraries.LAYOUTS, (1, 2))
    maps = [case for case in found if case.a_pass in pool_peers.PASSES and case.window not in pool_peers.GROWTH_WINDOWS]
    assert len({case.shape for case in maps}) == 7
    assert len(maps) == 7 * 2 * 2 * 2 * (6 * 8 + 4 + 3 * 2)
    assert len(set(found)) == len(found)
    growth = [case for case in found if case.window in pool_peers.GROWTH_WINDOWS]
    assert {case.key[0] for case in growth} == {"8x256x56x56"}
    assert len(growth) == 2 * 2 * 2 * 2 * 5
    assert len(found) - len(maps) - len(growth) == 4 * 2 * 2
    assert [case.shape for case in found] == sorted((case.shape for case in found), key=shapes.index)
    asked = pool.cases((SHAPE,), ("max", "stochastic"), ("21x21 s1 p10",), ("contiguous",), (1,))
    assert {case.kind for case in asked} == {"max"}


def test_control_c_keeps_finished_rows(tiny, tmp_path, monkeypatch):
    finished = pool.row
    left = iter(range(2))

    def row(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return finished(*arguments)

    monkeypatch.setattr(pool, "row", row)
    path = tmp_path / "rows.json"
    ended = run("--json", path, *ONE)
    assert ended.exit_code == 130, ended.output
    assert [row["pass"] for row in report.read(path)] == ["forward", "training"]
    assert "Interrupted: 2 of 4 rows" in ended.stdout
    monkeypatch.setattr(pool, "row", finished)
    path.write_text(path.read_text() + '{"shape": "2x3')  # and once killed in writing
    ended = run("--json", path, "--resume", *ONE)
    assert ended.exit_code == 0, ended.output
    assert "2 rows are there already; 2 of 4 cases are left" in ended.stdout
    rows = report.read(path)
    assert [(row["layout"], row["pass"]) for row in rows] == list(product(libraries.LAYOUTS, pool_peers.PASSES))
    before = path.read_text()
    assert run("--json", path, "--resume", *ONE).exit_code == 0
    assert path.read_text() == before


def test_rows_are_in_the_file_before_the_next_is_begun(tiny, tmp_path, monkeypatch):
    path, finished, seen = tmp_path / "rows.json", pool.row, []

    def row(*arguments):
        seen.append(len(report.read(path)))
        return finished(*arguments)

    monkeypatch.setattr(pool, "row", row)
    assert run("--json", path, *ONE).exit_code == 0
    assert seen == [0, 1, 2, 3]


def test_resume_measures_a_wrong_row_again(tiny, tmp_path):
    path = tmp_path / "rows.json"
    run("--json", path, *ONE)
    rows = report.read(path)
    report.write([row | {"correct": row is not rows[1]} for row in rows], path)
    ended = run("--json", path, "--resume", *ONE)
    assert ended.exit_code == 0, ended.output
    assert len(report.read(path)) == 4
    assert all(row["correct"] for row in report.read(path))


def test_resume_refuses_the_rows_of_another_machine(tiny, tmp_path):
    path = tmp_path / "rows.json"
    run("--json", path, *ONE)
    rows = report.read(path)
    for name in ("cpu", "microarchitecture"):
        report.write([row | {name: "Z80"} for row in rows], path)
        before = path.read_text()
        ended = run("--json", path, "--resume", *ONE)
        assert ended.exit_code == 1
        assert f"rows of another machine: {name} Z80" in ended.output
        assert path.read_text() == before


def test_a_folder_gets_a_file_of_this_machine(tiny, tmp_path):
    run("--json", tmp_path, *ONE)
    (path,) = tmp_path.iterdir()
    assert path.name == machine.file_name("pool", report.read(path)[0])
    where = {"cpu": "AMD EPYC(tm) 9", "microarchitecture": "znver5", "simd": "AVX2", "cores": 2}
    assert machine.file_name("pool", where) == "pool-amd-epyc-tm-9-znver5-avx2-2-cores.jsonl"
    assert machine.file_name("pool", where | {"microarchitecture": None}) == "pool-amd-epyc-tm-9-avx2-2-cores.jsonl"


@pytest.mark.parametrize("peer", ["fastpool", "onnxruntime"])
def test_what_raises_is_a_wrong_row(tiny, tmp_path, monkeypatch, peer):
    def broken(*_):
        raise NotImplementedError("no such\nthing")

    monkeypatch.setitem(pool_peers.FASTPOOL, "max", broken if peer == "fastpool" else pool_peers.FASTPOOL["max"])
    monkeypatch.setitem(pool_peers.PEERS, "onnxruntime", broken)
    monkeypatch.setattr(libraries, "missing", lambda names: {})
    path = tmp_path / "rows.json"
    ended = run("--json", path, *ONE, "--peer", "onnxruntime")
    assert ended.exit_code == 1, ended.output
    rows = report.read(path)
    assert len(rows) == 4
    assert {row["error"] for row in rows} == {f"{peer}: NotImplementedError: no such thing"}
    assert all((row["fastpool_ms"] is None) == (peer == "fastpool") for row in rows)


def test_a_tiny_call_is_checked(tiny, tmp_path, monkeypatch):
    wrong = {"torch": lambda x: lambda: x, "fastpool": lambda x: lambda: 2 * x[..., ::2, ::2]}
    monkeypatch.setitem(pool_peers.TINY_CALLS, ("max", "2x2 s2"), wrong)
    path = tmp_path / "rows.json"
    ended = run("--json", path, "--shape", pool_peers.TINY, "--kind", "max")
    assert ended.exit_code == 1, ended.output
    assert [row["error"][:23] for row in report.read(path)] == ["fastpool: values differ"] * 2


def test_torch_compile_takes_part_where_the_header_says():
    shapes = tuple(map(pool_peers.sizes, pool_peers.SHAPES))
    found = pool.cases(shapes, pool_peers.KINDS, None, libraries.LAYOUTS, (1,))
    taking = [case for case in found if case.a_pass == "forward" and pool_peers.takes_part("compile", case, False)]
    assert len(taking) == 2 * 2 * (2 * 2 + 2)
    assert all(pool_peers.takes_part(peer, case, peer == "compile") for peer in pool_peers.PEERS for case in found[::97])
    words = command._rules(True, ["compile"], False)
    assert all(name in words for names in pool_peers.COMPILED.values() for name in names)
    assert "malloc keeps what is freed" in words


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
    ended = run("--json", path, "--kind", kind, "--layout", "contiguous", "--window", case(kind).window)
    pool._truth.cache_clear()  # of stochastic pooling it may be the garbage
    assert ended.exit_code == 1, ended.output
    forward, training = report.read(path)
    # A check of stochastic pooling draws with a gradient first, whatever the pass.
    assert [forward["correct"], training["correct"]] == [passes == 1 and kind != "stochastic", False]
    assert training["error"].startswith("fastpool: ")
    assert all(training[name] is None for name in pool.TIMES)
    assert "WRONG" in ended.stdout
    assert training["error"][:40] in " ".join(ended.stdout.split())


def test_a_wrong_peer_has_no_time(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(pool_peers.PEERS, "compile", lambda case, _: lambda x: 2 * pool_peers.layer(pool_peers.TORCH, case)(x))
    monkeypatch.setattr(libraries, "missing", lambda names: {})
    path = tmp_path / "rows.json"
    ended = run("--json", path, "--kind", "max", "--window", "2x2 s2", "--layout", "contiguous", "--peer", "compile")
    assert ended.exit_code == 1, ended.output
    row = report.read(path)[0]
    assert row["error"].startswith("compile: values differ")
    assert row["compile_ms"] is None
    assert row["fastpool_ms"] > 0
    assert row["torch_ms"] > 0


def test_a_slow_peer_is_called_once(tiny, monkeypatch):
    monkeypatch.setattr(pool, "PATIENCE", 0)
    found = pool.row(case("max", a_pass="forward"), ["torch"], 0)
    assert found["torch_ms"] > 0
    assert found["torch_ratio"] > 0


def test_peers_are_timed_on_a_part_of_what_takes_them_minutes(monkeypatch):
    large = pool_peers.Case((1, 16, 3000, 2000), "max", "13x13 s1 p6", "contiguous", "forward", 1)
    assert pool._part(large).shape == (1, 16, 300, 2000)
    assert pool._part(large._replace(window="3x3 s1 p1")).shape == large.shape
    assert pool._part(large._replace(kind="global_max", window="global")).shape == large.shape
    monkeypatch.setattr(pool, "READ", 0)
    monkeypatch.setattr(pool, "PART", 3)
    some = case("max", window="13x13 s1 p6", a_pass="forward")
    seen = []
    monkeypatch.setitem(pool_peers.PEERS, "torch", lambda of, x: seen.append((of.shape, x.shape)) or pool_peers.layer(pool_peers.TORCH, of))
    monkeypatch.setattr(pool, "_timed", lambda calls, _: dict.fromkeys(calls, 1.0))
    row = pool.row(some, ["torch"], 0)
    assert seen == [((2, 3, 3, 11), (2, 3, 3, 11))]
    assert (row["fastpool_ms"], row["copy_ms"], row["torch_ms"], row["torch_ratio"]) == (1, 1, 3, 3)
    assert row["peers_part"] == pytest.approx(1 / 3, rel=1e-3)
    row = pool.row(some._replace(kind="stochastic"), ["torch"], 0)
    assert seen == [((2, 3, 3, 11), (2, 3, 3, 11))] * 2
    assert (row["fastpool_ms"], row["copy_ms"], row["torch_ms"], row["torch_ratio"]) == (3, 3, 3, 1)
    assert row["bytes"] == pool.fewest_bytes(some)
    assert row["part"] == row["peers_part"] == pytest.approx(1 / 3, rel=1e-3)


@pytest.mark.parametrize("layout", libraries.LAYOUTS)
def test_planes_of_a_large_map(monkeypatch, layout):
    monkeypatch.setattr(pool, "CHECKED", 100)
    x = torch.arange(math.prod(SHAPE)).reshape(SHAPE).contiguous(memory_format=libraries.LAYOUTS[layout])
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
    for forms, expected in ((pool_peers.FASTPOOL, ours), (pool_peers.TORCH, theirs)):
        result, saved = pool.saved_bytes(lambda forms=forms: pool._result(pool_peers.layer(forms, case(kind)), case(kind), x), x)
        assert result.gradient.shape == x.shape
        assert saved == expected


@pytest.mark.parametrize("peer", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("window", [name for name, w in pool_peers.WINDOWS.items() if isinstance(w, pool_peers.Sliding)])
def test_peers_are_right(peer, window):
    for module in libraries.MODULES[peer]:
        pytest.importorskip(module)
    x = pool._inputs(SHAPE)
    some = 0
    for kind in pool_peers.KINDS:
        asked = case(kind, window, "forward")
        layer = pool_peers.PEERS[peer](asked, x) if pool_peers.exists(kind, asked.window, SHAPE) else None
        if layer is not None:
            some += 1
            pool._check(asked, Result(libraries.as_tensor(layer(x)), torch.empty(0)))
    assert some >= 5


def test_missing_peers_are_named(tiny, monkeypatch):
    for module in ("onnx", "onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, module, None)
    ended = run("--kind", "max", "--window", "2x2 s2", "--layout", "contiguous", "--peer", "onnxruntime", "--peer", "openvino")
    assert ended.exit_code == 0, ended.output
    words = " ".join(ended.stdout.split())
    assert "left out: ONNX Runtime" in words
    assert "pip install 'fastpool[peers]'" in words
    assert "torch.compile" not in words.partition("The bars:")[0]


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
    rows[1] |= {"bytes": 8192, "torch_faults": 2.0}
    rows.append(rows[0] | {"roofline": 20.0, "torch_ratio": 700.0})  # the copy lost its core to other work: no part of a mean
    said = pool_report.reading(rows)
    assert "In 1 of 3 rows calls faulted pages in, most max 2x2 s2 on 1" in said
    assert "In 1 of 3 rows the copy took over 1.5 times as long" in said
    assert "fastpool is 1x as fast as PyTorch, forward (geometric mean of 2; 0.50x to 2x); PyTorch is ahead in 1: max 2x2 s2 on 1" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kind", "global_max", "--window", "2x2 s2"], "no such case"),
        (["--shape", "1x2x3"], "is not four sizes"),
        (["--json", "/nowhere/rows.json"], "cannot be written"),
        (["--resume"], "goes on with the file that --json names"),
    ],
)
def test_what_cannot_be_is_refused_at_once(arguments, words):
    ended = run(*arguments)
    assert ended.exit_code == 2
    assert words in ended.output


def test_bins():
    adaptive = pool_peers.Adaptive((7, 7))
    assert adaptive.output_size(32, 14) == (7, 7)
    assert adaptive.taps(32, 14) == 6 * 2  # 32 / 7: bins 0:5, 4:10, ...
    assert pool_peers.Adaptive((1, 1)).taps(9, 11) == 99
