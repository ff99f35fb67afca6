"""``fastpool bench commute``: its rows, its check, its table, and what Ctrl-C leaves."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("sklearn")
pytest.importorskip("PIL")

import torch.nn.functional as T
from fastpool.bench import check, command, commute, commute_conv, machine, measure, peers, photograph, report
from fastpool.bench.cases import ACTIVATIONS, POOLINGS, QUICK_SITES, SITES, Site, Window

TINY = Site("LeNet-5", 3, 9, 11, Window(3, 2, 1))


@pytest.fixture
def tiny(monkeypatch):
    """One small padded layer, no more rounds than the least, and the process's own malloc."""
    monkeypatch.setattr(command, "SITES", (TINY,))
    monkeypatch.setattr(command, "FULL_BUDGET", 0)
    monkeypatch.setattr(command, "keep_pages", lambda: False)
    monkeypatch.setattr(measure, "SAMPLE", 0)


def run(*arguments):
    return CliRunner().invoke(command.bench, ["commute", *map(str, arguments)])


def test_every_pair_is_measured(tiny, tmp_path):
    path = tmp_path / "rows.json"
    ended = run("--json", path, "--batch", 2)
    assert ended.exit_code == 0, ended.output
    rows = report.read(path)
    assert {(row["pooling"], row["activation"]) for row in rows} == {(p, a) for p in POOLINGS for a in ACTIVATIONS}
    assert len(rows) == 49
    for row in rows:
        assert row["shape"] == "2x3x9x11"
        assert row["correct"]
        assert row["batch"] == 2
        timed = [name for name in (*commute.TIMES, *commute.SAVED) if not name.startswith("compile")]
        assert all(row[name] > 0 for name in (*timed, "value_scale", "gradient_scale", "threads", "cores"))
        assert not any(row[name] for name in commute.TIMES if name not in timed)  # torch.compile takes part where it is asked for
        assert all(row[name] >= 0 for name in ("value_gap", "gradient_gap", "gradient_share"))
        assert all(row[name] for name in ("cpu", "date", "torch_version", "numba_version", "fastpool_version", "window"))
        assert not any(isinstance(value, (dict, list)) for value in row.values())
    gaps = {(row["pooling"], row["activation"]): (row["value_gap"], row["gradient_gap"]) for row in rows}
    for pooling in ("max", "min", "stochastic", "global_max"):
        assert gaps[pooling, "relu"] == (0, 0)
    assert min(gaps["avg", "relu"]) > 0.01
    assert min(gaps["max", "gelu"]) > 0.01
    assert max(len(line) for line in ended.stdout.splitlines()) <= 110
    assert "…" not in ended.stdout
    said = " ".join(ended.stdout.partition("The bars:")[2].split())
    assert "activate, pool, fused, forward: at most 1.1x the pooling alone with relu and leaky_relu" in said
    assert said.count("not measured: ") == 1  # of ReLU and max 2x2


def test_each_number_of_threads_has_rows_and_a_table_and_a_run_goes_on(tiny, tmp_path, monkeypatch):
    plain, threads = measure.medians, []
    monkeypatch.setattr(measure, "medians", lambda *of: (threads.append(torch.get_num_threads()), plain(*of))[1])
    only = ("--pooling", "max", "--json", tmp_path)
    ended = run(*only, "--activation", "relu", "--threads", 1)
    assert ended.exit_code == 0, ended.output
    path = tmp_path / machine.file_name("commute", machine.machine())
    first = report.read(path)
    assert "batch 1, 1 thread" not in ended.stdout
    ended = run(*only, "--activation", "relu", "--activation", "tanh", "--threads", 1, "--threads", 2, "--resume")
    assert ended.exit_code == 0, ended.output
    assert "1 rows are there already; 3 of 4 cases are left" in ended.stdout
    rows = report.read(path)
    assert rows[:1] == first
    assert [(row["activation"], row["threads"]) for row in rows] == [("relu", 1), ("tanh", 1), ("relu", 2), ("tanh", 2)]
    assert threads == [1, 1, 2, 2]
    assert "batch 1, 1 thread" in ended.stdout
    assert "batch 1, 2 threads" in ended.stdout
    assert ended.stdout.count("tanh       rounding") == 2  # a line in each table
    assert list(tmp_path.iterdir()) == [path]


def test_the_pooling_alone_is_timed_forward_and_in_training():
    x = photograph.feature_maps(TINY, 1)
    calls = commute._calls({commute.ALONE: commute._alone(commute.Case(TINY, "avg", "relu", 1, 1))}, x)
    assert list(calls) == ["alone_forward_ms", "alone_training_ms"]
    y, (gradient,) = (call() for call in calls.values())
    assert not y.requires_grad
    leaf = x.detach().requires_grad_()
    expected = T.avg_pool2d(leaf, *TINY.window)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf, check.upstream(y.shape))[0])


@pytest.mark.parametrize("measured", [commute, commute_conv])
def test_torch_compile_takes_part_if_asked_for_and_forgets_the_row_before(convolved, monkeypatch, measured):
    """It compiles no more than eight of a function, and all layers are one's."""
    resets, compiled = [], []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(True))
    monkeypatch.setattr(torch, "compile", lambda layer: (compiled.append(layer), layer)[1])
    row = measured.row(commute.Case(SITES[1], "max", "relu", 1, 1), 0)
    assert row["correct"], row["error"]
    assert len(compiled) == 2
    assert resets == [True]
    assert all(row[name] > 0 for name in (*measured.TIMES, *measured.SAVED))


def test_as_a_user_types_it(tmp_path):
    path = tmp_path / "rows.json"
    only = ["--quick", "--network", "LeNet-5", "--pooling", "max", "--pooling", "avg", "--activation", "relu", "--sites"]
    arguments = [sys.executable, "-m", "fastpool", "bench", "commute", *only, "--threads", "1", "--json", str(path)]
    ended = subprocess.run(arguments, capture_output=True, text=True, timeout=120, encoding="utf-8", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    exact, other = report.read(path)
    assert (exact["value_gap"], exact["gradient_gap"]) == (0, 0)
    assert exact["threads"] == 1
    assert min(other["value_gap"], other["gradient_gap"]) > 0
    words = " ".join(ended.stdout.split())
    assert "Both orders gave the same bits on these maps, values and input gradients: max with relu." in words
    assert "Not equal: avg with relu" in words
    assert sum(line.startswith(" max ") for line in ended.stdout.splitlines()) == 2  # in the table of all layers and of the one layer
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_control_c_keeps_finished_rows(tiny, tmp_path, monkeypatch):
    finished = commute.row
    left = iter(range(2))

    def row(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return finished(*arguments)

    monkeypatch.setattr(commute, "row", row)
    path = tmp_path / "rows.json"
    path.write_text("an older file")
    ended = run("--json", path, "--pooling", "max")
    assert ended.exit_code == 130, ended.output
    assert [row["activation"] for row in report.read(path)] == ["relu", "leaky_relu"]
    assert "Interrupted: 2 of 7 rows" in ended.stdout
    assert "leaky_relu" in ended.stdout


def test_control_c_before_the_first_row(tiny, tmp_path, monkeypatch):
    def row(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(commute, "row", row)
    path = tmp_path / "rows.json"
    ended = run("--json", path)
    assert ended.exit_code == 130, ended.output
    assert report.read(path) == []


@pytest.fixture
def convolved(monkeypatch):
    """LeNet-5's second layer, at no more rounds than the least."""
    monkeypatch.setattr(command, "SITES", tuple(site for site in SITES if site.network == "LeNet-5")[1:])
    monkeypatch.setattr(command, "FULL_BUDGET", 0)
    monkeypatch.setattr(command, "keep_pages", lambda: False)
    monkeypatch.setattr(measure, "SAMPLE", 0)


def test_behind_a_convolution(convolved, tmp_path):
    ended = run("--conv", "--json", tmp_path, "--activation", "relu", "--activation", "gelu", "--threads", 1)
    assert ended.exit_code == 0, ended.output
    (path,) = tmp_path.iterdir()
    assert path.name == machine.file_name("commute_conv", machine.machine())
    rows = report.read(path)
    assert [(row["pooling"], row["activation"]) for row in rows] == [(p, a) for p in ("max", "avg", "min") for a in ("relu", "gelu")]
    for row in rows:
        assert row["correct"], row["error"]
        assert row["layer"] == "6x12x12 to 16, 5x5"
        assert row["one_launch"] is False
        timed = [name for name in (*commute_conv.TIMES, *commute_conv.SAVED) if not name.startswith("compile")]
        assert all(row[name] > 0 for name in timed)
        assert row["compile_act_pool_forward_ms"] is None
    assert [rows[0][f"{form}_saved_bytes"] for form in ("torch_act_pool", "torch_pool_act", "unfused", "activated", "conv_pool")] == [
        24,  # the activated map's four floats, and an index of 8 bytes
        28,  # the map, the index, and what ReLU gives
        17,
        17,
        1,
    ]
    assert max(map(len, ended.stdout.splitlines())) <= 110
    assert "…" not in ended.stdout
    words = " ".join(ended.stdout.split())
    assert "F.conv_pool2d is one launch, forward: max 0 of 2, avg 0 of 2, min 0 of 2" in words
    assert "F.conv_pool2d, max 2x2 s2 with relu: 1 byte an output saved 1 of 1; worst 1, LeNet-5 16x8x8" in words
    assert "0 of 6 cases are left" in run("--conv", "--json", path, "--resume", "--threads", 1, *_of("relu", "gelu")).stdout
    assert report.read(path) == rows


def _of(*activations):
    return [word for name in activations for word in ("--activation", name)]


@pytest.mark.parametrize(
    ("garbage", "error"),
    [
        (lambda y: y * 1.001, "conv_pool: value off by"),
        (lambda y: y if not y.requires_grad else y * 1.001, "conv_pool: value in training off by"),
        (lambda y: y.detach() + 0.999 * (y - y.detach()), "conv_pool: gradient by x off by"),
        (lambda y: y[:, :, 1:], "conv_pool: value of shape (1, 16, 3, 4), not (1, 16, 4, 4)"),
    ],
    ids=["value", "training", "gradient", "shape"],
)
def test_a_wrong_form_behind_a_convolution_is_not_timed(convolved, tmp_path, monkeypatch, garbage, error):
    right = commute_conv.F.conv_pool2d
    monkeypatch.setattr(commute_conv.F, "conv_pool2d", lambda *of, **more: garbage(right(*of, **more)))
    path = tmp_path / "rows.json"
    ended = run("--conv", "--json", path, "--pooling", "max", "--activation", "relu")
    assert ended.exit_code == 1, ended.output
    (row,) = report.read(path)
    assert row["error"].startswith(error)
    assert all(row[name] is None for name in (*commute_conv.TIMES, *commute_conv.SAVED))
    assert "WRONG" in ended.stdout
    assert error.partition(" (")[0] in " ".join(ended.stdout.split())


def test_conv_pool2d_has_no_such_pooling():
    ended = run("--conv", "--pooling", "l2")
    assert ended.exit_code == 2
    assert "--conv goes with max, avg, min" in ended.output


def test_the_convolutions_in_front_of_the_poolings():
    assert [commute_conv.layer_of(site).name for site in SITES] == [
        "1x28x28 to 6, 5x5",
        "6x12x12 to 16, 5x5",
        "3x224x224 to 96, 11x11 s4 p2",
        "96x27x27 to 256, 5x5 p2",
        "384x13x13 to 256, 3x3 p1",
        "3x224x224 to 64, 7x7 s2 p3",
        "512x14x14 to 512, 3x3 p1",
        "512x28x28 to 512, 3x3 p1",
        "256x56x56 to 256, 3x3 p1",
        "128x112x112 to 128, 3x3 p1",
        "64x224x224 to 64, 3x3 p1",
    ]
    wanted = [[t is not None and t.requires_grad for t in _leaves_of(site)] for site in (SITES[0], SITES[1], SITES[5])]
    assert wanted == [[False, True, True], [True, True, True], [False, True, False]]  # an image's gradient nobody wants; no bias
    with pytest.raises(LookupError, match="no layer of LeNet-5 gives 3x9x11"):
        commute_conv.layer_of(TINY)


def _leaves_of(site):
    layer = commute_conv.layer_of(site)
    return commute_conv._leaves(layer, commute_conv.operands(layer, 1))


@pytest.mark.parametrize("site", [SITES[0], SITES[1], SITES[4], SITES[6]], ids=str)
def test_operands_whose_sums_are_exact(site):
    """So that whoever convolves finds the same ties; and whose values activations bend."""
    layer = commute_conv.layer_of(site)
    x, weight, bias = commute_conv.operands(layer, 1)
    y, exact = (
        T.conv2d(t, w, b, layer.stride, layer.padding) for t, w, b in ((x, weight, bias), (x.double(), weight.double(), bias.double()))
    )
    assert torch.equal(y.double(), exact)
    assert 0.5 < float(exact.std()) < 2
    assert 0.3 < float((exact < 0).double().mean()) < 0.7


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize(
    "garbage",
    [
        lambda y: y + 0.01 * y.abs().max(),
        lambda y: y.flip(-1) if y.shape[-1] > 1 else 2 * y,
        lambda y: y * torch.nan,
        lambda y: y.detach() + 0.9 * (y - y.detach()),
        lambda y: y.repeat(1, 1, 2, 2),
    ],
    ids=["shifted", "elsewhere", "nan", "gradient", "shape"],
)
def test_a_wrong_result_is_not_timed(tiny, tmp_path, monkeypatch, pooling, garbage):
    right = peers.FASTPOOL[pooling]
    monkeypatch.setitem(peers.FASTPOOL, pooling, lambda *arguments: garbage(right(*arguments)))
    path = tmp_path / "rows.json"
    ended = run("--json", path, "--pooling", pooling, "--activation", "relu")
    assert ended.exit_code == 1, ended.output
    (row,) = report.read(path)
    assert not row["correct"]
    assert row["error"].startswith("act_pool: ")
    assert all(row[name] is None for name in (*commute.TIMES, "value_gap", "gradient_gap"))
    assert "WRONG" in ended.stdout
    assert row["error"][:40] in " ".join(ended.stdout.split())


def test_one_last_bit_is_wrong_where_nothing_is_rounded():
    x = torch.randn(1, 2, 4, 4)
    largest = float(x.abs().max())
    right = check.Result(x, x)
    nearly = check.Result(x.nextafter(torch.tensor(torch.inf)), x)
    check.agree(right, nearly, largest, bit_equal=False)
    with pytest.raises(check.WrongResultError, match="must not differ"):
        check.agree(right, nearly, largest, bit_equal=True)


@pytest.mark.parametrize(("neighbour", "right"), [(-0.1 + 1e-8, True), (-0.0999, False)])
def test_only_an_element_equal_but_for_rounding_may_be_chosen_instead(neighbour, right):
    """Of min pooling after GELU, whose slopes on the two sides of its valley differ."""
    values, slopes = torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.3)
    values[..., ::2, ::2], slopes[..., ::2, ::2] = -0.1, -0.1
    values[..., 1, 1] = neighbour
    gy = check.upstream(torch.Size((1, 1, 2, 2)))
    chosen = torch.zeros(1, 1, 4, 4)
    chosen[..., ::2, ::2] = gy * -0.1
    other = chosen.clone()
    other[0, 0, 0, 0], other[0, 0, 1, 1] = 0, gy[0, 0, 0, 0] * 0.3
    allowed = check.undecided("min", Window(2, 2), values, slopes)
    assert allowed.item() == pytest.approx(0.4 * gy[0, 0, 0, 0].abs().item() if right else 0)
    y = torch.full((1, 1, 2, 2), -0.1)
    with contextlib.nullcontext() if right else pytest.raises(check.WrongResultError, match="sums of gradients differ"):
        check.agree(check.Result(y, chosen), check.Result(y, other), 1.0, False, allowed)


def test_pytorchs_own_stochastic_pooling_passes_the_check():
    x = photograph.feature_maps(TINY, 2).clone()
    x[0, 0] = -1  # no positive element: 0 and no gradient
    layer = lambda z: peers.TORCH["stochastic"](z, TINY.window, torch.Generator().manual_seed(0))
    pooled = commute._result(layer, x)
    check.drawn(x, TINY.window, pooled)
    assert not pooled.value[0, 0].any()


@pytest.mark.parametrize("site", dict.fromkeys((*QUICK_SITES, *SITES[:3])), ids=str)
def test_feature_maps(site):
    x = photograph.feature_maps(site, 2)
    assert x.shape == (2, site.channels, site.height, site.width)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert 0.3 < float((x < 0).float().mean()) < 0.7
    assert not torch.equal(x[0], x[1])
    torch.testing.assert_close(x.std((0, 2, 3)), torch.ones(site.channels))


@pytest.mark.parametrize(
    ("gaps", "word"),
    [((0, 0), "exact"), ((1e-6, 0), "rounding"), ((0, 1e-6), "rounding"), ((0, 1e-3), "values"), ((1e-3, 0), "no")],
)
def test_verdict(gaps, word):
    row = {"correct": True, "value_gap": gaps[0], "value_scale": 1.0, "gradient_gap": gaps[1], "gradient_scale": 1.0}
    assert report.verdict(row) == word


def turns(order):
    return [name for name, following in zip(order, [*order[1:], ""], strict=True) if name != following]


def test_medians_take_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measure.medians(calls, budget=0, least=2)
    assert list(times) == ["a", "b"]
    assert all(timed.ms > 0 and timed.faults >= 0 for timed in times.values())
    assert turns(order) == ["a", "b"] * 3  # the first round says how many calls make a sample


def test_a_first_round_of_single_calls_counts(monkeypatch):
    monkeypatch.setattr(measure, "SAMPLE", 0)
    monkeypatch.setattr(measure, "PRIMING", 0)
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    measure.medians(calls, budget=0, least=2)
    assert order == ["a", "a", "b", "b"] * 2  # before each sample a call that does not count
    monkeypatch.setattr(measure, "PRIMED", 0)
    order.clear()
    measure.medians(calls, budget=0, least=2)
    assert order == ["a", "b"] * 2


def test_what_is_timed_is_called_for_a_while_before(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(measure, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measure, "PRIMING", 5e-3)

    def call():
        calls.append(None)
        now[0] += 2e-3 if len(calls) < 5 else 1e-3

    # One says how long it takes, three more take 5 ms and do not count, one is the sample.
    assert measure.medians({"a": call}, budget=0, least=1)["a"].ms == pytest.approx(1)
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("samples", "steady"),
    [
        ([1.0] * 5, True),
        ([1.0, 1.0, 1.001, 1.001, 9.0], True),
        ([1.0, 1.1, 1.2, 1.3, 1.4], False),
        ([1.0, 1.1] * 50, True),
        ([1.0, 1.0], False),
    ],
)
def test_a_median_is_steady_where_more_samples_would_not_move_it(samples, steady):
    assert measure._steady(samples) == steady


def test_rows_are_kept_one_by_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    report.write([{"a": 1}], path)
    report.append({"a": None}, path)
    assert report.read(path) == [{"a": 1}, {"a": None}]
    path.write_text(path.read_text() + '{"a": 2')  # killed in writing
    assert report.read(path) == [{"a": 1}, {"a": None}]


def test_freed_memory_is_kept():
    """Not in this process: it could not be undone."""
    code = (
        "import torch; from fastpool.bench.machine import keep_pages, page_faults, settle\n"
        "kept = keep_pages(); x = torch.ones(2**24); faults = []\n"
        "for _ in range(11): settle(); before = page_faults(); y = x + 1; del y; faults.append(page_faults() - before)\n"
        "print(kept, sorted(faults)[5])"  # now and then a freed block is too short for the next (``settle``)
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    kept, faults = ended.stdout.split()
    assert (kept == "True") == (platform.libc_ver()[0] == "glibc")
    if kept == "True":
        assert int(faults) < 2**26 / 4096 / 100


def test_no_time_holds_page_faults():
    """Rows in which each call's gradient took new memory, however much was free."""
    code = (
        "from fastpool.bench import machine, pool\n"
        "kept, pool.PATIENCE = machine.keep_pages(), 60\n"  # on a loaded machine PyTorch would be called once
        "cases = pool.cases([(8, 64, 112, 112)], ['max'], ['2x2 s2'], ['contiguous', 'channels_last'], [1])\n"
        "rows = [pool.row(case, ['torch'], 0) for case in cases]\n"
        "print(kept, *(row[f'{name}_faults'] for row in rows for name in ('fastpool', 'torch')))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    kept, *faults = ended.stdout.split()
    assert len(faults) == 8
    if kept == "True":
        assert max(map(float, faults)) < 6272 / 100


def test_what_cannot_be_written_is_refused_at_once(tmp_path):
    ended = run("--json", tmp_path / "nowhere" / "rows.json")
    assert ended.exit_code == 2
    assert "cannot be written" in ended.output


def test_without_the_photograph(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    photograph.photograph.cache_clear()
    ended = run()
    assert ended.exit_code == 1
    assert "pip install 'fastpool[bench]'" in ended.output
