"""``fastpool bench gpu``, on the CPU: what it measures is right, told and kept; by a clock that only calls."""

import contextlib
import json
import types

import pytest
import torch
from click.testing import CliRunner
from fastpool.bench import gpu, peers
from fastpool.bench.command import bench

from fastpool import terminal


class Calls:
    """In the place of a GPU's clock; a product of TF32 takes half as long."""

    def __call__(self, call):
        call()
        return 1.0 if torch.backends.cudnn.allow_tf32 else 2.0

    def launching(self, call):
        call()
        return 5.0


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "no GPU")
    monkeypatch.setattr(gpu, "Events", lambda device: Calls())
    measured = gpu.measured
    monkeypatch.setattr(gpu, "measured", lambda todo, device: measured(todo, torch.device("cpu")))
    plain = gpu.row
    monkeypatch.setattr(gpu, "row", lambda case, device, clock: plain(case, device, clock, scale=4))


def test_table_and_rows(on_the_cpu, tmp_path):
    path = tmp_path / "rows.json"
    ended = CliRunner().invoke(
        bench, ["gpu", "--operation", "max", "--operation", "global_avg", "--operation", "conv", "--json", str(path)]
    )
    assert ended.exit_code == 0, ended.output
    rows = json.loads(path.read_text())
    assert len(rows) == 2 * 2 * (3 + 1 + 3)
    assert all(row["fastpool_ms"] == row["torch_ms"] == row["copy_ms"] == 2 for row in rows)
    assert all(row["launch_us"] == 5 and row["error"] is None for row in rows)
    assert all(row["torch_tf32_ms"] == (1 if row["operation"] == "conv" else None) for row in rows)
    assert max(map(len, ended.output.splitlines())) <= 110
    assert "1.00x" in ended.output
    assert "100%" in ended.output


def test_bandwidth(on_the_cpu, monkeypatch):
    """Of every tensor once, and in training of its gradient too: 8x64x28x28 to a quarter; weights of 3x3 as well."""
    copied = []
    monkeypatch.setattr(gpu.measure, "copying", lambda moved, device: copied.append(moved) or (lambda: None))
    map_, quarter, layer, weights = 8 * 64 * 28 * 28, 8 * 64 * 14 * 14, 8 * 64 * 14 * 14, 64 * 64 * 9
    for case, numbers in {
        gpu.Case("max", "2x2 s2", "contiguous", "forward"): map_ + quarter,
        gpu.Case("avg", "2x2 s2", "channels_last", "training"): 2 * (map_ + quarter),
        gpu.Case("global_max", "global", "contiguous", "forward"): map_ + 8 * 64,
        gpu.Case("conv", "3x3", "contiguous", "training"): 2 * (2 * layer + weights),
    }.items():
        found = gpu.row(case, torch.device("cpu"), Calls())
        assert found.moved == copied[-1] == 4 * numbers, case
        *_, line = gpu.table([found]).columns[8].cells
        assert line == f"{4 * numbers / 2e-3 / 1e9:.0f}"


def test_tf32_is_as_it_was(on_the_cpu):
    """Whatever a user has set, also after an error."""
    for before in (False, True):
        with gpu.tf32(before):
            with contextlib.suppress(ZeroDivisionError), gpu.tf32(not before):
                assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is not before
                1 / 0  # noqa: B018
            gpu.row(gpu.Case("conv", "1x1", "contiguous", "forward"), torch.device("cpu"), Calls())
            assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is before


def test_what_the_clock_times(monkeypatch):
    """Not the writes that flush, nor the caller: its launches are on their way before the device comes to them."""
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            said.append("event")

        def synchronize(self):
            said.append("wait")

        def elapsed_time(self, other):
            return float(len(said))

    monkeypatch.setattr(gpu, "SAMPLES", 3)
    monkeypatch.setattr(gpu, "FLUSHED", 8)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: said.append("sleep"), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("wait"))
    clock = gpu.Events(torch.device("cpu"))
    monkeypatch.setattr(clock, "_flushed", types.SimpleNamespace(zero_=lambda: said.append("flush")))
    sample = ["flush", "sleep", "event", "call", "event", "wait"]
    assert clock(lambda: said.append("call")) == 1 + 2 * len(sample)
    assert said == ["call", *sample * 3]
    said.clear()
    times = iter([1.0, 1.3])
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: (said.append("read"), next(times))[1])
    assert clock.launching(lambda: said.append("call")) == pytest.approx(1e5)
    assert said == ["call", "wait", "read", "call", "call", "call", "read", "wait"]


@pytest.mark.parametrize("error", [ImportError("pip install 'fastpool[cuda]'"), RuntimeError("out of memory")], ids=str)
def test_an_error_is_a_rows(on_the_cpu, monkeypatch, error):
    def fail(*arguments):
        raise error

    monkeypatch.setitem(peers.FASTPOOL, "max", fail)
    found = gpu.row(gpu.Case("max", "2x2 s2", "contiguous", "forward"), torch.device("cpu"), Calls())
    assert str(error) in found.error


def test_a_wrong_result_is_not_timed(on_the_cpu, monkeypatch):
    right = peers.FASTPOOL["max"]
    monkeypatch.setitem(peers.FASTPOOL, "max", lambda *arguments: right(*arguments) + 1)
    ended = CliRunner().invoke(bench, ["gpu", "--operation", "max", "--layout", "contiguous"])
    assert ended.exit_code == 1
    assert "not timed" in ended.output
    assert "values differ by up to 1" in ended.output


def test_gradients_are_compared_before_training_is_timed(on_the_cpu, monkeypatch):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, gy):
            return 2 * gy

    right = peers.FASTPOOL["max"]
    monkeypatch.setitem(peers.FASTPOOL, "max", lambda *arguments: Doubled.apply(right(*arguments)))
    ended = CliRunner().invoke(bench, ["gpu", "--operation", "max", "--layout", "contiguous"])
    assert ended.exit_code == 1
    assert ended.output.count("gradients by the map differ by up to") == ended.output.count("not timed") == 3


def test_control_c_keeps_finished_rows(on_the_cpu, monkeypatch, tmp_path):
    plain = gpu.measured

    def measured(todo, device):
        yield from plain(todo[:2], device)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "measured", measured)
    path = tmp_path / "rows.json"
    ended = CliRunner().invoke(bench, ["gpu", "--operation", "avg", "--json", str(path)])
    assert ended.exit_code == terminal.INTERRUPTED
    assert len(json.loads(path.read_text())) == 2


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in (["gpu"], ["--device", "cuda"]):
        ended = CliRunner().invoke(bench, arguments)
        assert ended.exit_code == 1
        assert "PyTorch sees no GPU here" in ended.output


def test_a_device_goes_without_a_command():
    ended = CliRunner().invoke(bench, ["--device", "cuda", "pool"])
    assert ended.exit_code == 2
    assert "--device goes without a command" in ended.output
    alone = CliRunner().invoke(bench, [])
    assert alone.exit_code == 0
    assert "commute" in alone.output
