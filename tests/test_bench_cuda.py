"""``fastpool bench cuda-model``."""

import json
import sys

import emulated
import pytest
from click.testing import CliRunner
from fastpool.bench import cuda_model
from fastpool.bench.command import bench

pytestmark = emulated.needs_toolchain


def test_table_and_rows(tmp_path):
    path = tmp_path / "rows.json"
    result = CliRunner().invoke(bench, ["cuda-model", "--pooling", "max", "--layout", "contiguous", "--json", str(path)])
    assert result.exit_code == 0, result.output
    assert "H100" in result.output
    assert max(map(len, result.output.splitlines())) <= 110
    rows = {(row["window"], row["run"]): row for row in json.loads(path.read_text())}
    assert set(rows) == {(window, run) for window in cuda_model.WINDOWS for run in ("forward", "backward")}
    row = rows["2x2 s2", "forward"]
    assert row["bytes"] == row["outputs"] * (4 * 4 + 4 + 1)
    elements = 8 * 64 * 112 * 112
    assert row["microseconds"]["T4"] == pytest.approx(elements / 4 * 21 / 320e9 * 1e6)
    assert row["limit"]["T4"] == "memory"


def test_convolution(tmp_path):
    path = tmp_path / "rows.json"
    result = CliRunner().invoke(bench, ["cuda-model", "--convolution", "1x1", "--layout", "channels_last", "--json", str(path)])
    assert result.exit_code == 0, result.output
    rows = {row["run"]: row for row in json.loads(path.read_text())}
    assert set(rows) == {"forward", "gradient", "weights"}
    outputs, weights = 64 * 16 * 16, 64 * 64
    assert rows["forward"]["bytes"] == 4 * (2 * outputs + weights + 64)
    assert all(row["products"] == outputs * 64 / 32 for row in rows.values())
    layer = 8 * 64 * 56 * 56
    assert rows["forward"]["microseconds"]["A100"] == pytest.approx(layer * 64 / 32 / (108 * 2 * 1.41e9) * 1e6)
    assert rows["forward"]["limit"]["A100"] == "products"


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastpool.kernels.cuda.pooling", None)
    result = CliRunner().invoke(bench, ["cuda-model"])
    assert result.exit_code == 1
    assert "pip install 'fastpool[cuda]'" in result.output
