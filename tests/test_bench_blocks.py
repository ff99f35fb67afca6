"""``fastpool bench block``."""

import pytest
from click.testing import CliRunner

pytest.importorskip("sklearn")

from fastpool.bench import blocks, command, measure, report


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(blocks, "BUDGET", 0)
    monkeypatch.setattr(measure, "SAMPLE", 0)


def run(*arguments):
    only = ("--network", "CIFAR10Net", "--batch", "1", "--layout", "contiguous", "--threads", "1", "--peer", "torch")
    return CliRunner().invoke(command.bench, ["block", *only, *map(str, arguments)])


def test_the_blocks_are_those_before_a_pooling():
    found = [(layer.network, *layer[1:5]) for layer, _ in blocks.pooled_layers()]
    assert found == [
        ("CIFAR10Net", 3, 32, 32, 64),
        ("CIFAR10Net", 64, 16, 16, 128),
        ("CIFAR10Net", 256, 8, 8, 256),
        ("AlexNet", 3, 224, 224, 96),
        ("AlexNet", 96, 27, 27, 256),
        ("AlexNet", 384, 13, 13, 256),
        ("VGG-16", 64, 224, 224, 64),
        ("VGG-16", 128, 112, 112, 128),
        ("VGG-16", 256, 56, 56, 256),
        ("VGG-16", 512, 28, 28, 512),
        ("VGG-16", 512, 14, 14, 512),
    ]


def test_rows_and_resuming(tmp_path):
    path = tmp_path / "rows.jsonl"
    ended = run("--json", path)
    assert ended.exit_code == 0, ended.output
    rows = report.read(path)
    assert [row["block"] for row in rows] == [case.name for case in blocks.cases(["CIFAR10Net"], [1], ["contiguous"], [1])]
    for row in rows:
        assert row["correct"]
        assert min(row[name] for name in ("fused_ms", "unfused_ms", "torch_ms", "unfused_ratio", "torch_ratio")) > 0
        assert row["onnxruntime_ms"] is None
        assert row["in_one"] is False
    assert max(map(len, ended.stdout.splitlines())) <= 110
    assert "…" not in ended.stdout
    said = " ".join(ended.stdout.partition("The bars:")[2].split())
    assert "not measured: 1.15x ONNX Runtime, the geometric mean over blocks and batches not measured: 1.15x OpenVINO" in said
    assert "ahead of its own unfused form on every block (it is one launch in 0 of 3)" in said
    assert run("--json", path, "--resume").exit_code == 0
    assert report.read(path) == rows


def test_a_wrong_peer_has_no_time(monkeypatch):
    plain = blocks._torch
    monkeypatch.setitem(blocks._PEERS, "torch", lambda case: lambda: plain(case)() * 1.01)
    ended = run()
    assert ended.exit_code == 1
    assert "torch: ArithmeticError: off by" in " ".join(ended.stdout.split())
