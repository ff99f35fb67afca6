"""``fastpool bench conv``: its layers, its rows, its check, its tables, its bars, its peers, and what Ctrl-C leaves."""

from __future__ import annotations

import math
import sys
from itertools import product

import pytest
import torch
from click.testing import CliRunner
from fastpool.bench import (
    bar,
    command,
    conv,
    conv_bars,
    conv_layers,
    conv_peers,
    conv_report,
    libraries,
    machine,
    measure,
    peak,
    readme,
    report,
)
from fastpool.bench.check import WrongResultError
from fastpool.bench.conv_layers import LAYERS, Layer
from fastpool.bench.rows import peers_of
from rich.console import Console

from fastpool import convolution

DENSE = Layer("LeNet-5", 3, 9, 11, 4, 3, 1, 1, first=True)
DEPTHWISE = Layer("MobileNetV2", 4, 7, 7, 4, 3, 2, 1, 4, bias=False)


@pytest.fixture
def tiny(monkeypatch):
    """Two small layers, a few images, no more rounds than the least, a peak that is not measured, and the process's own malloc."""
    monkeypatch.setattr(conv_layers, "LAYERS", (DENSE, DEPTHWISE))
    monkeypatch.setattr(conv_layers, "BATCHES", dict.fromkeys(conv_layers.NETWORKS, (2, 3)))
    monkeypatch.setattr(conv, "peak", lambda threads: 100.0 * threads)
    monkeypatch.setattr(conv, "FULL_BUDGET", 0)
    monkeypatch.setattr(measure, "SAMPLE", 0)
    monkeypatch.setattr(command, "keep_pages", lambda: False)


ONE = ("--network", "LeNet-5", "--batch", 2)
"""Four cases of the tiny run: two passes, as its input is the image, in two layouts."""


def run(*arguments, only=("--peer", "torch", "--threads", 1)):
    return CliRunner().invoke(command.bench, ["conv", *map(str, (*only, *arguments))])


def case(layer=DENSE, a_pass="forward", layout="contiguous", batch=2):
    return conv_peers.Case(layer, batch, layout, a_pass, 1)


def test_every_case_is_measured(tiny, tmp_path):
    path = tmp_path / "rows.json"
    ended = run("--json", path)
    assert ended.exit_code == 0, ended.output
    rows = report.read(path)
    passes = [("LeNet-5", a_pass) for a_pass in ("forward", "grad_weight")] + [("MobileNetV2", a_pass) for a_pass in conv_peers.PASSES]
    expected = set(product(passes, (2, 3), libraries.LAYOUTS))
    assert {((row["network"], row["pass"]), row["batch"], row["layout"]) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert row["correct"]
        assert row["error"] is None
        assert set(conv.NUMBERS) | set(conv.LAYER) <= set(row)
        positive = (
            "fastpool_ms",
            "torch_ms",
            "torch_ratio",
            "copy_ms",
            "flops",
            "bytes",
            "gflop_s",
            "peak",
            "roofline",
            "first_s",
            "threads",
        )
        assert all(row[name] > 0 for name in positive)
        assert 0 < row["torch_error"] < 1e-5
        assert 0 < row["fastpool_error"] <= max(2 * row["torch_error"], conv.ROUNDING)
        assert all((row[name] is None) == (row["pass"] != "forward") for name in ("functional_ms", "im2col_bytes"))
        assert row["torch_layout"] in libraries.LAYOUTS
        assert row["peak_gflop_s"] == 100
        assert row["bound"] in ("compute", "memory")
        assert all(row[name] for name in (*machine.SAME, "date", "torch_version", "numba_version", "fastpool_version"))
        assert row["torch_ratio"] == pytest.approx(row["torch_ms"] / row["fastpool_ms"], rel=1.6e-3)
        assert not any(isinstance(value, (dict, list)) for value in row.values())
    assert max(len(line) for line in ended.stdout.splitlines()) <= 120
    assert "…" not in ended.stdout
    words = " ".join(ended.stdout.split())
    assert "as fast as PyTorch, grad input" in words
    assert "FMA peak, by a kernel in registers: 100 GFLOP/s on 1 thr" in words
    assert "forward, contiguous: ahead of PyTorch on every layer" in words.partition("The bars:")[2]


def test_a_row_by_a_clock_that_is_known(tiny, monkeypatch):
    times = {"fastpool_ms": 2.0, "functional_ms": 3.0, "torch contiguous": 4.0, "torch channels_last": 3.0, "copy_ms": 1.0}
    monkeypatch.setattr(conv_peers, "memory", lambda case: (512, 1024))

    def medians(calls, budget):
        assert set(calls) == set(times)
        return {name: measure.Timed(times[name], 7.0) for name in calls}

    monkeypatch.setattr(measure, "medians", medians)
    row = conv.row(case(), ["torch"], 0)
    assert row["correct"], row["error"]
    assert row["flops"] == 2 * 2 * 4 * 9 * 11 * 3 * 9
    assert row["bytes"] == 4 * (2 * 3 * 99 + 4 * 3 * 9 + 2 * 4 * 99)
    assert (row["fastpool_ms"], row["functional_ms"], row["torch_ms"], row["torch_layout"]) == (2, 3, 3, "channels_last")
    assert (row["torch_ratio"], row["roofline"], row["bound"]) == (1.5, 0.5, "memory")
    assert row["gflop_s"] == pytest.approx(row["flops"] / 2e6, rel=1e-3)
    assert row["peak"] == pytest.approx(row["flops"] / 2e6 / 100, rel=1e-3)
    assert row["im2col_bytes"] == 4 * 3 * 9 * 99
    assert (row["packed_bytes"], row["panel_bytes"]) == (512, 1024)
    assert (row["fastpool_faults"], row["torch_faults"]) == (7, 7)
    assert (row["kernel_size"], row["groups"], row["bias"], row["count"]) == (3, 1, True, 1)


def test_the_layers():
    """What the issue asks for, each geometry once; counted by the networks' weights and multiplications, as they are published."""
    assert len({layer.geometry for layer in LAYERS}) == len({(layer.network, layer.name) for layer in LAYERS}) == len(LAYERS)
    counts = {network: sum(layer.network == network for layer in LAYERS) for network in conv_layers.NETWORKS}
    assert counts == {"LeNet-5": 2, "CIFAR10Net": 6, "AlexNet": 5, "VGG-16": 9, "ResNet-50": 23, "MobileNetV2": 29}
    weights, products = dict.fromkeys(counts, 0), dict.fromkeys(counts, 0)
    for layer in LAYERS:
        weights[layer.network] += layer.count * (math.prod(layer.weight_shape) + layer.bias * layer.out_channels)
        products[layer.network] += layer.count * case(layer, batch=1).flops // 2
    assert weights["LeNet-5"] == 156 + 2416
    assert weights["CIFAR10Net"] == 4_507_722 - 3456 - 5130  # without batch-norm and linear layer, as the following
    assert weights["AlexNet"] == 62_378_344 - 58_631_144
    assert weights["VGG-16"] == 138_357_544 - 123_642_856
    assert weights["ResNet-50"] == 25_557_032 - 53_120 - 2_049_000
    assert weights["MobileNetV2"] == 3_504_872 - 34_112 - 1_281_000 - 864  # and without the stem
    assert (products["VGG-16"], products["ResNet-50"]) == (15_346_630_656, 4_087_136_256)
    assert sum(layer.first for layer in LAYERS) == 5
    assert {layer.name for layer in LAYERS if layer.first} >= {"1x28x28 to 6, 5x5", "3x224x224 to 64, 7x7 s2 p3"}
    quick = [layer for layer in LAYERS if layer.name in conv_layers.QUICK]
    assert len(quick) == len(conv_layers.QUICK)
    assert {layer.network for layer in quick} == set(conv_layers.NETWORKS)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_output_sizes_are_torchs(layer):
    x, weight = torch.empty(1, *layer[1:4], device="meta"), torch.empty(layer.weight_shape, device="meta")
    y = torch.nn.functional.conv2d(x, weight, None, layer.stride, layer.padding, 1, layer.groups)
    assert tuple(y.shape) == case(layer, batch=1).output_shape


def test_the_case_list():
    found = conv.cases(LAYERS, conv_layers.BATCHES, libraries.LAYOUTS, conv_peers.PASSES, (1, 2))
    small = sum(layer.network in ("LeNet-5", "CIFAR10Net") for layer in LAYERS)
    images = small + 2 * (len(LAYERS) - small)
    assert len(found) == 2 * 2 * (3 * images - 2 - 3 * 2)  # without the gradients of images
    assert len({case.key for case in found}) == len(found)
    assert {case.batch for case in found if case.layer.network == "LeNet-5"} == {32}
    assert {case.batch for case in found if case.layer.network == "VGG-16"} == {1, 8}
    places = [(case.layer.network, case.batch) for case in found]
    assert places == sorted(places, key=list(dict.fromkeys(places)).index)


def test_quick_is_one_tiny_layer(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "keep_pages", lambda: False)
    path = tmp_path / "rows.json"
    ended = run("--quick", "--layer", "6x12x12 to", "--pass", "forward", "--json", path, "--layout", "channels_last")
    assert ended.exit_code == 0, ended.output
    (row,) = report.read(path)
    assert (row["network"], row["layer"], row["batch"], row["pass"]) == ("LeNet-5", "6x12x12 to 16, 5x5", 32, "forward")
    assert "LeNet-5, batch 32, 1 thread: forward" in ended.stdout


def test_quick_takes_one_batch_of_its_layers(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(conv_layers, "QUICK", (DEPTHWISE.name,))
    run("--quick", "--json", tmp_path / "rows.json", "--pass", "grad_input")
    assert {(row["layer"], row["batch"]) for row in report.read(tmp_path / "rows.json")} == {(DEPTHWISE.name, 2)}


def test_control_c_keeps_finished_rows(tiny, tmp_path, monkeypatch):
    finished = conv.row
    left = iter(range(2))

    def row(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return finished(*arguments)

    monkeypatch.setattr(conv, "row", row)
    path = tmp_path / "rows.json"
    ended = run("--json", path, *ONE)
    assert ended.exit_code == 130, ended.output
    assert [row["layout"] for row in report.read(path)] == list(libraries.LAYOUTS)
    assert "Interrupted: 2 of 4 rows" in ended.stdout
    monkeypatch.setattr(conv, "row", finished)
    ended = run("--json", path, "--resume", *ONE)
    assert ended.exit_code == 0, ended.output
    assert "2 rows are there already; 2 of 4 cases are left" in ended.stdout
    assert [(row["pass"], row["layout"]) for row in report.read(path)] == list(product(("forward", "grad_weight"), libraries.LAYOUTS))
    before = path.read_text()
    assert run("--json", path, "--resume", *ONE).exit_code == 0
    assert path.read_text() == before


def test_a_folder_gets_a_file_of_this_machine(tiny, tmp_path):
    run("--json", tmp_path, *ONE)
    (path,) = tmp_path.iterdir()
    assert path.name == machine.file_name("conv", report.read(path)[0])
    assert path.name.startswith("conv-")


@pytest.mark.parametrize(
    ("garbage", "words"),
    [
        (lambda y: y + 0.01 * y.abs().max(), "off by up to 0.01"),
        (lambda y: y * torch.nan, "is not finite"),
        (lambda y: y[..., 1:], "of shape"),
    ],
    ids=["shifted", "nan", "shape"],
)
@pytest.mark.parametrize("a_pass", conv_peers.PASSES)
def test_a_wrong_result_is_not_timed(tiny, tmp_path, monkeypatch, a_pass, garbage, words):
    right = conv_peers.fastpool_call
    monkeypatch.setattr(conv_peers, "fastpool_call", lambda case: lambda: garbage(right(case)()))
    path = tmp_path / "rows.json"
    ended = run("--json", path, "--pass", a_pass, "--network", "MobileNetV2", "--batch", 2)
    assert ended.exit_code == 1, ended.output
    for row in report.read(path):
        assert not row["correct"]
        assert row["error"].startswith("fastpool: ")
        assert words in row["error"]
        assert all(row[name] is None for name in conv.TIMES)
        assert row["torch_error"] > 0
    assert "WRONG" in ended.stdout
    assert words in " ".join(ended.stdout.split())


def test_packing_is_checked_too(tiny, monkeypatch):
    right = conv_peers.packing_call
    monkeypatch.setattr(conv_peers, "packing_call", lambda case: lambda: 2 * right(case)())
    row = conv.row(case(), ["torch"], 0)
    assert not row["correct"]
    assert row["fastpool_ms"] is None


def test_a_wrong_peer_has_no_time(tiny, monkeypatch):
    broken = {"onnxruntime": lambda case: {"contiguous": lambda: torch.zeros(case.output_shape)}, "openvino": lambda case: {}[case]}
    monkeypatch.setattr(conv_peers, "PEERS", {**conv_peers.PEERS, **broken})
    monkeypatch.setattr(conv, "PEERS", conv_peers.PEERS)
    row = conv.row(case(), ["torch", "onnxruntime", "openvino"], 0)
    assert not row["correct"]
    assert row["error"].startswith("onnxruntime: off by up to 1 of the largest magnitude")
    assert "openvino: KeyError" in row["error"]
    assert row["onnxruntime_ms"] is None
    assert row["fastpool_ms"] > 0
    assert row["torch_ms"] > 0


def test_a_slow_peer_is_called_once(tiny, monkeypatch):
    monkeypatch.setattr(conv, "PATIENCE", 0)
    monkeypatch.setattr(conv, "MUCH_SLOWER", 0)
    row = conv.row(case(), ["torch"], 0)
    assert row["torch_ms"] > 0
    assert row["torch_ratio"] > 0
    assert row["torch_faults"] is None


@pytest.mark.parametrize("layout", libraries.LAYOUTS)
@pytest.mark.parametrize("a_pass", conv_peers.PASSES)
@pytest.mark.parametrize("layer", [DENSE._replace(first=False), DEPTHWISE], ids=["dense", "depthwise"])
def test_a_pass_computes_what_it_says(layer, a_pass, layout):
    """By autograd in float64, apart from the benchmark's own truth."""
    some = case(layer, a_pass, layout)
    given = conv_peers.operands(layer, some.batch, layout)
    x, weight = (t.double().requires_grad_() for t in given[:2])
    bias = None if given.bias is None else given.bias.double()
    y = torch.nn.functional.conv2d(x, weight, bias, layer.stride, layer.padding, 1, layer.groups)
    wanted = dict(zip(conv_peers.PASSES, (y, *torch.autograd.grad(y, (x, weight), given.gy.double())), strict=True))[a_pass]
    for call in (conv_peers.module_call(torch.nn.Conv2d, some), conv_peers.fastpool_call(some)):
        found = call()
        assert not found.requires_grad
        torch.testing.assert_close(found.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(conv._exact(layer, some.batch, a_pass).value, wanted.detach())
    assert given.x.is_contiguous(memory_format=libraries.LAYOUTS[layout])


@pytest.mark.parametrize("peer", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("layer", [DENSE, DEPTHWISE, DENSE._replace(bias=False, stride=2, padding=0)])
def test_peers_are_right(peer, layer):
    for module in libraries.MODULES[peer]:
        pytest.importorskip(module)
    some = case(layer)
    ((layout, call),) = conv_peers.PEERS[peer](some).items()
    assert layout == "contiguous"
    assert conv._error(some, call(), conv._exact(layer, 2, "forward")) < 1e-6
    assert conv_peers.PEERS[peer](case(layer, "grad_weight")) is None


def test_missing_peers_are_named(tiny, monkeypatch):
    for module in ("onnx", "onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, module, None)
    ended = run(*ONE, only=("--threads", 1))
    assert ended.exit_code == 0, ended.output
    words = " ".join(ended.stdout.split())
    assert "left out: ONNX Runtime" in words
    assert "torch.compile" not in words.partition("The bars:")[0]


def test_the_peak_is_the_best_of_some_and_measured_once(monkeypatch):
    peak.peak.cache_clear()
    tried = iter((3.0, 5.0, 4.0, 1.0, 2.0))
    monkeypatch.setattr(peak, "gflops", lambda threads: threads * next(tried))
    assert (peak.peak(2), peak.peak(2)) == (10, 10)
    peak.peak.cache_clear()


def test_memory_is_that_of_the_case(monkeypatch):
    asked = []
    monkeypatch.setattr(convolution, "memory", lambda *sizes: asked.append(sizes) or (5, 7))
    assert conv_peers.memory(case(DEPTHWISE)) == (5, 7)
    assert asked == [((2, 4, 7, 7), (4, 1, 3, 3), (2, 2), (1, 1), (1, 1), 4, 1)]


def test_im2col_bytes():
    assert conv_peers.im2col_bytes(DENSE) == 4 * 3 * 9 * 9 * 11
    assert conv_peers.im2col_bytes(DENSE._replace(kernel_size=1, padding=0)) == 0
    assert conv_peers.im2col_bytes(DENSE._replace(kernel_size=1, padding=0, stride=2)) == 4 * 3 * 5 * 6


def test_an_error_of_another_shape_or_of_nan_is_no_number():
    exact = conv._exact(DENSE, 2, "forward")
    with pytest.raises(WrongResultError, match="of shape"):
        conv._error(case(), exact.value[:1], exact)
    with pytest.raises(WrongResultError, match="not finite"):
        conv._error(case(), exact.value * torch.inf, exact)
    assert conv._error(case(), exact.value, exact) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layer", "no such"], "no such case"),
        (["--network", "LeNet-5", "--layer", "1x28x28", "--pass", "grad_input"], "no such case"),
        (["--json", "/nowhere/rows.json"], "cannot be written"),
        (["--resume"], "goes on with the file that --json names"),
    ],
)
def test_what_cannot_be_is_refused_at_once(arguments, words):
    ended = run(*arguments)
    assert ended.exit_code == 2
    assert words in ended.output


def made_row(layer="64x56x56 to 64, 3x3 p1", a_pass="forward", layout="contiguous", threads=1, **numbers):
    """As ``conv.row`` makes them: 1.5 times as fast as PyTorch, at half the peak."""
    row = {"cpu": "Z80", "microarchitecture": None, "simd": "NONE", "cores": 1, "date": "2026-01-02T03:04:05+00:00", "commit": "abc"}
    row |= {"correct": True, "error": None}
    row |= {
        "torch_version": "2",
        "numba_version": "0",
        "network": "ResNet-50",
        "layer": layer,
        "batch": 1,
        "layout": layout,
        "pass": a_pass,
    }
    row |= {"threads": threads, **dict.fromkeys(conv.NUMBERS), "kernel_size": 3, "groups": 1, "in_channels": 64, "out_channels": 64}
    row |= {"fastpool_ms": 1.0, "torch_ms": 1.5, "torch_ratio": 1.5, "torch_layout": "contiguous", "peak": 0.5, "roofline": 0.1}
    row |= {"gflop_s": 50.0, "peak_gflop_s": 100.0, "bound": "compute", "fastpool_error": 1e-6, "torch_error": 1e-6}
    return row | numbers


def wrong_row(**numbers):
    gone = dict.fromkeys(("fastpool_ms", "torch_ms", "torch_ratio", "torch_layout", "peak", "roofline", "gflop_s", "peak_gflop_s", "bound"))
    return made_row(correct=False, error="fastpool: off", fastpool_error=3e-6, **gone, **numbers)


@pytest.mark.parametrize(
    ("words", "rows", "verdict", "passed", "worst"),
    [
        ("forward, contiguous: ahead", [made_row(), made_row(torch_ratio=0.99)], "not met", 1, "0.99x, ResNet-50 64x56x56 to 64"),
        ("forward, channels_last: ahead", [made_row()], "not measured", 0, ""),
        ("1.15x PyTorch", [made_row(torch_ratio=1.0), made_row(torch_ratio=1.44)], "met", 1, "1.20x, contiguous, 1 thr"),
        ("1.15x PyTorch", [made_row(), made_row(torch_ratio=1.1, threads=2)], "not met", 1, "1.10x, contiguous, 2 thr"),
        ("1.15x OpenVINO", [made_row()], "not measured", 0, ""),
        ("10% behind", [made_row(onnxruntime_ratio=0.91)], "met", 1, "0.91x, ONNX Runtime, ResNet-50"),
        ("10% behind", [made_row(), made_row(openvino_ratio=0.90)], "not met", 1, "0.90x, OpenVINO"),
        ("10% behind", [made_row(a_pass="grad_input", torch_ratio=0.1)], "not measured", 0, ""),
        ("85% of the FMA peak on", [made_row(peak=0.85), made_row(peak=0.84)], "not met", 1, "84%"),
        ("85% of the FMA peak on", [made_row(in_channels=3), made_row(groups=64), made_row(kernel_size=1)], "not measured", 0, ""),
        ("grad input: ahead", [made_row(a_pass="grad_input", torch_ratio=0.5)], "not met", 0, "0.50x"),
        ("grad weight: ahead", [made_row(a_pass="grad_weight")], "met", 1, "1.50x"),
        ("1.8x as fast on 2", [made_row(), made_row(threads=2, fastpool_ms=0.6)], "not met", 0, "1.67x, forward, ResNet-50"),
        ("1.8x as fast on 2", [made_row(bound="memory"), made_row(threads=2)], "not measured", 0, ""),
        ("error at most", [made_row(fastpool_error=2e-6), made_row()], "met", 2, "2.00x, forward, ResNet-50"),
        ("error at most", [wrong_row(), made_row()], "not met", 1, "3.00x"),
    ],
)
def test_bars(words, rows, verdict, passed, worst):
    (found,) = (bar for bar in conv_bars.bars(rows) if words in bar.asked)
    assert (found.verdict, found.passed) == (verdict, passed)
    assert found.worst.startswith(worst)
    assert bool(found.worst) == (verdict != "not measured")


def test_a_disturbed_row_answers_no_bar():
    assert {bar.verdict for bar in conv_bars.bars([made_row(roofline=20.0)])} == {"not measured"}


def test_the_summary_fits():
    said = bar.summary(conv_bars.bars([made_row(peak=0.8), wrong_row()]))
    assert "not met:      forward: 85% of the FMA peak" in said
    assert max(map(len, said.splitlines())) <= 120


def test_the_widest_tables():
    """Every peer, and numbers of the most digits."""
    large = max((layer.name for layer in LAYERS), key=len)
    numbers = {name: 1234.4 for name in conv.NUMBERS if name not in ("torch_layout", "bound")}
    numbers |= {"peak": 1.2, "roofline": 1.2, "torch_layout": "channels_last", "fastpool_error": 1e-6, "torch_error": 1e-6}
    numbers |= {"im2col_bytes": 115605504, "packed_bytes": 9437184, "panel_bytes": 2097152, "torch_ratio": 0.5, "openvino_ratio": 0.5}
    rows = [made_row(large, a_pass, layout, **numbers) for a_pass in conv_peers.PASSES for layout in libraries.LAYOUTS]
    assert peers_of(rows) == list(conv_peers.PEERS)
    console = Console(width=120)
    with console.capture() as capture:
        for table in conv_report.tables([*rows, wrong_row()]):
            console.print(table)
    said = capture.get()
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= 120
    assert "WRONG" in said
    assert "0.50l" in said
    assert "ResNet-50, batch 1, 1 thread: backward" in said


def test_what_the_tables_say():
    rows = [made_row(im2col_bytes=28901376, packed_bytes=147456, panel_bytes=65536), made_row("256x56x56 to 64, 1x1", torch_ratio=0.7)]
    rows += [made_row("144x56x56 dw, 3x3 s2 p1", bound="memory", roofline=0.7, peak=0.01), made_row(roofline=9.0), wrong_row()]
    said = conv_report.reading(rows)
    assert "Wrong, and not timed: ResNet-50 64x56x56 to 64, 3x3 p1, batch 1 contiguous, 1 thr: fastpool: off." in said
    assert "In 1 of 5 rows the copy took over 1.5 times as long" in said
    assert "FMA peak, by a kernel in registers: 100 GFLOP/s on 1 thr" in said
    assert "PyTorch is ahead in 1: ResNet-50 256x56x56 to 64, 1x1, batch 1 contiguous, 1 thr (0.70x)" in said
    assert "Forward, bound by memory: 70% of the copy in the median; furthest from it ResNet-50 144x56x56 dw, 3x3 s2 p1" in said
    assert "Forward, bound by compute: 50% of the FMA peak in the median" in said
    assert "at most 64 KB of panels a thread (ResNet-50 64x56x56 to 64" in said
    assert "packed weights of at most 0.15 MB, where im2col's matrix takes up to 29 MB an image" in said


def test_a_readme_section(tmp_path):
    section = readme.SECTIONS[1]
    rows = [made_row(), made_row(torch_ratio=0.5, a_pass="grad_input", peak=0.4), made_row(torch_ratio=0.7), wrong_row()]
    rows.append(made_row("64x7x7 dw, 3x3 p1", groups=64, roofline=0.9))
    report.write(rows, tmp_path / "conv-z80.jsonl")
    made = section.made([tmp_path / "conv-z80.jsonl"])
    assert "5 rows of `fastpool bench conv`, float32, beside PyTorch;" in made
    assert "- ResNet-50 64x56x56 to 64, 3x3 p1, batch 1 contiguous, 1 thr, forward: fastpool: off" in made
    assert "| forward, contiguous: ahead of PyTorch on every layer | not met | 2 of 3 |" in made
    assert "| ResNet-50 | forward | 50% (50%) | 10% (10%) | 1.1x (0.70x) |" in made
    assert "| ResNet-50 | grad input | 40% (40%) | 10% (10%) | 0.50x (0.50x) |" in made
    assert "| ResNet-50, depthwise | forward | 50% (50%) | 90% (90%) | 1.5x (1.5x) |" in made
    losing = made.partition("2 times a peer is ahead by more than 5%, worst first")[2]
    assert 0 < losing.index("| grad input | PyTorch 0.50x |") < losing.index("| forward | PyTorch 0.70x |")
