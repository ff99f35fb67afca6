"""``fastpool bench gpu``, on the CPU: what it measures is right, told and kept; by a clock that only calls."""

import json

import pytest
import torch
from click.testing import CliRunner
from fastpool.bench import gpu, peers
from fastpool.bench.command import bench

from fastpool import terminal


class Calls:
    """In the place of a GPU's clock."""

    def __call__(self, call):
        call()
        return 2.0

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
    assert all(row["fastpool_ms"] == row["torch_ms"] == 2 and row["launch_us"] == 5 and row["error"] is None for row in rows)
    assert max(map(len, ended.output.splitlines())) <= 110
    assert "1.00x" in ended.output
    assert "100%" in ended.output


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
