"""What is made from benchmarks' rows: the answers to the bars of pool, commute and block; and README's sections."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from fastpool.bench import bar as bars
from fastpool.bench import block_bars, commute, commute_bars, commute_conv, pool, pool_bars, pool_peers, readme, report
from fastpool.bench.cases import ACTIVATIONS, SITES
from rich.console import Console

POOL, CONV, COMMUTE, COMMUTE_CONV, BLOCK, ORDER = readme.SECTIONS

WHERE = {"cpu": "Z80", "microarchitecture": None, "simd": "NONE", "cores": 1, "date": "2026-01-02T03:04:05+00:00", "commit": "abc"}
WHERE |= {"torch_version": "2", "numba_version": "0", "threads": 1}


def made_row(kind="max", window="2x2 s2", a_pass="forward", shape="8x256x56x56", layout="contiguous", threads=1, **numbers):
    """As ``pool.row`` makes them: twice as fast as PyTorch, at half the roofline."""
    row = WHERE | {"correct": True, "error": None, "shape": shape, "kind": kind, "window": window, "layout": layout, "pass": a_pass}
    row |= {"threads": threads, **dict.fromkeys(pool.NUMBERS)}
    row |= {"bytes": 4096, "fastpool_ms": 1.0, "copy_ms": 0.5, "torch_ms": 2.0, "torch_ratio": 2.0, "roofline": 0.5, "gb_s": 1.0}
    return row | numbers


def bar(rows, words, of=pool_bars.bars):
    (found,) = (bar for bar in of(rows) if words in bar.asked)
    return found


def paired(pooling="max", activation="relu", site=SITES[0], batch=1, threads=1, **numbers):
    """As ``commute.row`` makes them: PyTorch 4 ms, unfused 2, fused 1, as the pooling alone; PyTorch saves 24 bytes."""
    row = WHERE | commute.of_case(commute.Case(site, pooling, activation, batch, threads)) | {"shape": "1x1x1x1"}
    row |= {"value_gap": 0.0, "value_scale": 2.0, "gradient_gap": 0.0, "gradient_scale": 1.0, "gradient_share": 0.0}
    of = {"torch": (4.0, 24.0), "compile": (None, None), "unfused": (2.0, 8.0), "fused": (1.0, 1.0), commute.ALONE: (1.0, None)}
    row |= {name: of[name.partition("_")[0]][0] for name in commute.TIMES} | {name: of[name.partition("_")[0]][1] for name in commute.SAVED}
    return row | numbers


def behind(pooling="max", activation="relu", site=SITES[0], **numbers):
    """As ``commute_conv.row`` makes them: 2 ms, and F.conv_pool2d 1."""
    row = WHERE | commute.of_case(commute.Case(site, pooling, activation, 1, 1)) | {"layer": "a layer", "one_launch": True}
    row |= {name: None if name.startswith("compile") else 1.0 if "conv_pool" in name else 2.0 for name in commute_conv.TIMES}
    row |= {name: None if name.startswith("compile") else 1.0 if "conv_pool" in name else 24.0 for name in commute_conv.SAVED}
    return row | numbers


def block(layout="contiguous", threads=1, name="64x8x8 to 64, 1x1; 2x2 s2", **numbers):
    """As ``blocks.row`` makes them: the fused form in 1 ms, everybody else in 2, OpenVINO not here."""
    row = WHERE | {"network": "VGG-16", "block": name, "batch": 8, "layout": layout, "threads": threads, "correct": True, "error": None}
    row |= {"in_one": True, "fused_ms": 1.0, "openvino_ms": None, "openvino_ratio": None}
    row |= {f"{who}_{number}": 2.0 for who in ("unfused", "torch", "onnxruntime") for number in ("ms", "ratio")}
    return row | numbers


@pytest.mark.parametrize(
    ("words", "rows", "verdict", "worst"),
    [
        ("maps of 28 and wider", [made_row(roofline=0.8), made_row("avg", roofline=0.79)], "not met", "79%, avg 2x2 s2"),
        ("maps of 28 and wider", [made_row(roofline=0.8), made_row("stochastic", roofline=0.1)], "met", "80%, max"),
        ("maps of 28 and wider", [made_row(roofline=0.1, window="2x2 s1"), made_row(roofline=0.1, a_pass="training")], "not measured", ""),
        ("maps of 14 and 7", [made_row(roofline=0.6, shape="64x512x7x7"), made_row(roofline=0.1)], "met", "60%"),
        ("ahead of PyTorch", [made_row(torch_ratio=0.99), made_row()], "not met", "0.99x"),
        ("ahead of OpenVINO", [made_row()], "not measured", ""),
        ("PyTorch not ahead", [made_row(torch_ratio=0.96, layout="channels_last")], "met", "0.96x"),
        ("90% of the roofline", [made_row(roofline=0.89, layout="channels_last"), made_row()], "not met", "89%"),
        ("10x PyTorch", [made_row(torch_ratio=9.0, a_pass="training"), made_row()], "not met", "9.00x"),
        ("training: 70%", [made_row(roofline=0.7, a_pass="training"), made_row()], "met", "70%"),
        ("1 byte an output", [made_row("l2", a_pass="training", fastpool_saved_bytes=4.0)], "not met", "4, l2"),
        ("1 byte an output", [made_row("global_max", "global", "training", fastpool_saved_bytes=2.0)], "not measured", ""),
        ("50x PyTorch", [made_row(window="13x13 s1 p6", torch_ratio=50.0)], "met", "50x"),
        (
            "2x of max",
            [made_row(), made_row("stochastic", fastpool_ms=2.1), made_row("stochastic_eval")],
            "not met",
            "2.10x, forward, stoc",
        ),
        ("without a gradient", [made_row(shape=pool_peers.TINY, a_pass="call", torch_ratio=0.4, roofline=None)], "not met", "2.50x"),
        ("with a gradient", [made_row(shape=pool_peers.TINY, a_pass="call_grad", torch_ratio=0.5, roofline=None)], "met", "2.00x"),
    ],
)
def test_bars(words, rows, verdict, worst):
    found = bar(rows, words)
    assert found.verdict == verdict
    assert found.worst.startswith(worst)
    assert bool(found.worst) == (verdict != "not measured")


def test_growth_is_over_the_smallest_window_of_the_same_case():
    windows = ("5x5 s1 p2", "13x13 s1 p6", "31x31 s1 p15")
    rows = [
        made_row(window=window, threads=n, fastpool_ms=n * ms) for n in (1, 2) for window, ms in zip(windows, (1, 1.1, 1.3), strict=True)
    ]
    rows += [made_row("stochastic", window, fastpool_ms=ms) for window, ms in zip(windows, (1, 9, 99), strict=True)]
    found = bar(rows, "forward, stride 1")
    assert (found.passed, found.of, found.verdict) == (2, 4, "not met")
    assert found.worst.startswith("1.30x, max 31x31 s1 p15 on 8x256x56x56 contiguous")


def test_a_disturbed_or_wrong_row_answers_no_bar():
    rows = [made_row(roofline=20.0), made_row(fastpool_ms=None, roofline=None, torch_ratio=None, correct=False)]
    assert {bar.verdict for bar in pool_bars.bars(rows)} == {"not measured"}


def test_the_summary_names_every_bar():
    found = pool_bars.bars([made_row()])
    said = bars.summary(found)
    assert all(bar.asked in said for bar in found)
    assert "not met:      forward, contiguous, 2x2 s2, 3x3 s2 p1, maps of 28 and wider" in said
    assert "0 of 1; worst 50%, max 2x2 s2 on 8x256x56x56 contiguous, 1 thr" in said
    assert max(map(len, said.splitlines())) <= 120


CURVED = "sigmoid, tanh, gelu, silu and mish"


@pytest.mark.parametrize(
    ("words", "rows", "verdict", "worst"),
    [
        ("activate, pool, fused, forward: at most 1.1x", [paired(fused_act_pool_forward_ms=1.1), paired("avg")], "met", "1.10x, LeNet-5"),
        ("activate, pool, fused, forward: at most 1.1x", [paired(fused_act_pool_forward_ms=1.11)], "not met", "1.11x"),
        (
            "activate, pool, fused, forward: at most 1.1x",
            [paired(fused_pool_act_forward_ms=9.0), paired(activation="tanh")],
            "met",
            "1.00x",
        ),
        ("activate, pool, fused, training: at most 1.1x", [paired(activation="leaky_relu", alone_training_ms=0.5)], "not met", "2.00x"),
        ("pool, activate, fused, training: at most 1.1x", [paired(fused_pool_act_training_ms=1.2)], "not met", "1.20x"),
        (f"pool, activate, fused, forward: at most 1.5x the pooling alone with {CURVED}", [paired()], "not measured", ""),
        ("pool, activate, fused, forward: at most 1.5x", [paired(activation="mish", fused_pool_act_forward_ms=1.5)], "met", "1.50x"),
        ("activate, pool, fused, training: at most 1.5x", [paired(activation="gelu", fused_act_pool_training_ms=1.6)], "not met", "1.60x"),
        ("forward, either order: fused not behind", [paired(unfused_pool_act_forward_ms=0.96)], "met", "0.96x, pool, activate, LeNet-5"),
        (
            "training, either order: fused not behind",
            [paired(), paired(fused_act_pool_training_ms=2.2)],
            "not met",
            "0.91x, activate, pool",
        ),
        ("max 2x2 s2 with relu: 1 byte", [paired(), paired(activation="tanh", fused_act_pool_saved_bytes=5.0)], "met", "1, "),
        ("max 2x2 s2 with relu: 1 byte", [paired(fused_pool_act_saved_bytes=5.0)], "not met", "5, pool, activate, LeNet-5"),
        ("max 2x2 s2 with relu: 1 byte", [paired(site=SITES[2])], "not measured", ""),
        ('law "exact"', [paired(value_gap=1e-9), paired("min")], "not met", "5.0e-10, LeNet-5"),
        ('law "exact"', [paired("min", value_scale=0.0), paired("avg", value_gap=1.0)], "met", "0, LeNet-5"),
        ('law "rounding"', [paired(activation="tanh", value_gap=1e-5)], "met", "5.0e-06"),
        ('law "rounding"', [paired(activation="tanh", value_gap=1e-2)], "not met", "5.0e-03"),
        ('law "never"', [paired("avg", value_gap=1.0), paired("avg", site=SITES[1])], "met", "5.0e-01, avg with relu"),
        ('law "never"', [paired("avg"), paired("l2", value_gap=1.0)], "not met", "0, avg with relu"),
        ('law "never"', [paired("avg", correct=False)], "not measured", ""),
    ],
)
def test_the_bars_of_orders(words, rows, verdict, worst):
    found = bar(rows, words, commute_bars.bars)
    assert found.verdict == verdict
    assert found.worst.startswith(worst)
    assert bool(found.worst) == (verdict != "not measured")


@pytest.mark.parametrize(
    ("words", "rows", "verdict", "worst"),
    [
        ("forward: ahead of its own", [behind(), behind("avg", unfused_forward_ms=0.99)], "not met", "0.99x, LeNet-5 6x24x24, avg"),
        ("forward: its own unfused form not ahead", [behind(unfused_forward_ms=0.96)], "met", "0.96x"),
        ("training: its own unfused form not ahead", [behind(unfused_training_ms=0.94)], "not met", "0.94x"),
        ("forward: ahead of PyTorch", [behind(torch_act_pool_forward_ms=0.9), behind()], "not met", "0.90x"),
        ("training: ahead of PyTorch", [behind(torch_pool_act_training_ms=0.9)], "met", "2.00x"),
        ("1 byte an output", [behind(conv_pool_saved_bytes=17.0)], "not met", "17"),
        ("1 byte an output", [behind(activation="gelu"), behind(correct=False)], "not measured", ""),
    ],
)
def test_the_bars_behind_a_convolution(words, rows, verdict, worst):
    found = bar(rows, words, commute_bars.conv_bars)
    assert found.verdict == verdict
    assert found.worst.startswith(worst)


@pytest.mark.parametrize(
    ("words", "rows", "verdict", "worst"),
    [
        ("ONNX Runtime", [block(onnxruntime_ratio=4.0), block(onnxruntime_ratio=0.5)], "met", "1.41x, contiguous, 1 thr"),
        ("ONNX Runtime", [block(), block("channels_last", 2, onnxruntime_ratio=1.14)], "not met", "1.14x, channels_last, 2 thr"),
        ("ONNX Runtime", [block(), block(threads=2), block("channels_last")], "met", "2.00x"),
        ("OpenVINO", [block()], "not measured", ""),
        ("ahead of its own unfused form on every block (it is one launch in 1 of 2)", [block(), block(in_one=False)], "met", "2.00x"),
        (
            "ahead of its own",
            [block(), block("channels_last", unfused_ratio=0.99)],
            "not met",
            "0.99x, VGG-16 64x8x8 to 64, 1x1; 2x2 s2, batch 8 ch",
        ),
        ("its own unfused form nowhere ahead", [block(unfused_ratio=0.96)], "met", "0.96x"),
        ("its own unfused form nowhere ahead", [block(unfused_ratio=0.94), block()], "not met", "0.94x"),
        ("ahead of PyTorch", [block(torch_ratio=0.99)], "not met", "0.99x"),
        ("ahead of PyTorch", [block(fused_ms=None, unfused_ratio=None, torch_ratio=None)], "not measured", ""),
    ],
)
def test_the_bars_of_blocks(words, rows, verdict, worst):
    found = bar(rows, words, block_bars.bars)
    assert found.verdict == verdict
    assert found.worst.startswith(worst)


@pytest.mark.parametrize("section", readme.SECTIONS, ids=lambda section: section.benchmark)
def test_the_readme_is_what_the_rows_give(section):
    assert section.held(Path(readme.README).read_text()) == section.made(section.results())


def test_a_readme_section(tmp_path):
    rows = [made_row(), made_row(torch_ratio=0.5, a_pass="training"), made_row("avg", torch_ratio=0.7), made_row(roofline=9.0)]
    rows.append(made_row("min", correct=False, error="fastpool: values differ", fastpool_ms=None, roofline=None, torch_ratio=None))
    report.write(rows, tmp_path / "a.jsonl")
    made = POOL.made([tmp_path / "a.jsonl"])
    assert "**Z80, NONE, 1 cores**" in made
    assert "commit `abc`" in made
    assert "In 1 the copy was disturbed" in made
    assert "- min 2x2 s2 on 8x256x56x56 contiguous, 1 thr, forward: fastpool: values differ" in made
    assert "| 2x2 s2 | contiguous | 50% (50%) | 1.4x (0.70x) | 50% (50%) | 0.50x (0.50x) |" in made
    losing = made.partition("2 times a peer is ahead by more than 5%, worst first")[2]
    assert 0 < losing.index("| training | PyTorch 0.50x |") < losing.index("| forward | PyTorch 0.70x |")
    assert POOL.held(POOL.updated(f"before\n{POOL.start}\nold\n{readme.END}\nafter", made)) == made
    assert POOL.made([]) == "Nothing is measured yet: `make results` does that."
    with pytest.raises(ValueError, match="no place for the results"):
        POOL.updated("no markers", made)


@pytest.mark.parametrize("ms", [1e-4, 12345.678])
def test_tables_fit_110_columns_whatever_the_numbers(ms):
    orders = paired(
        "global_avg", "leaky_relu", value_gap=1e-12, **dict.fromkeys(commute.TIMES, ms), **dict.fromkeys(commute.SAVED, 50176.0)
    )
    produced = behind("max", "leaky_relu", **dict.fromkeys(commute_conv.TIMES, ms), **dict.fromkeys(commute_conv.SAVED, 50176.0))
    orders |= dict.fromkeys((f"fused_act_pool_{a_pass}_ms" for a_pass in commute.PASSES), ms / 3000)
    orders |= dict.fromkeys((f"{commute.ALONE}_{a_pass}_ms" for a_pass in commute.PASSES), ms / 3e8)
    produced |= dict.fromkeys((f"conv_pool_{a_pass}_ms" for a_pass in commute.PASSES), ms / 3000)
    for table in (report.table([orders]), commute_conv.table([produced])):
        with (console := Console(width=110)).capture() as said:
            console.print(table)
        assert "…" not in said.get()
        assert "comp." in said.get()


def test_the_section_of_orders(tmp_path):
    rows = [
        paired(),
        paired(site=SITES[1], fused_pool_act_forward_ms=3.0, unfused_pool_act_training_ms=0.9, fused_act_pool_saved_bytes=2.0),
        paired("avg", "tanh", value_gap=1.0),
    ]
    rows.append(paired("global_avg", correct=False, error="act_pool: values differ", **dict.fromkeys((*commute.TIMES, *commute.SAVED))))
    report.write(rows, tmp_path / "a.jsonl")
    made = COMMUTE.made([tmp_path / "a.jsonl"])
    assert "4 rows of `fastpool bench commute`, float32, beside PyTorch; medians" in made
    assert "- LeNet-5 6x24x24, global avg with relu, batch 1, 1 thr: act_pool: values differ" in made
    assert "|  | pass | max | avg |" in made
    assert "| relu | forward | 1.00x (3.00x) |  |\n| relu | training | 1.00x (1.00x) |  |" in made
    assert "| tanh | forward |  | 1.00x (1.00x) |" in made
    assert "| relu | 24, 2 |  |\n| tanh |  | 24, 1 |" in made
    assert "Fused is 3.3x forward and 4x training as fast as PyTorch; 1.7x forward and 1.8x training as fast as the unfused form" in made
    losing = made.partition("1 times a peer or unfused form is ahead by more than 5%, worst first")[2]  # a row's worst alone
    assert "| LeNet-5 16x8x8, max 2x2 s2 p0 with relu, batch 1, 1 thr | pool, activate, forward | the unfused form 0.67x |" in losing
    report.write([paired(activation=name) for name in ACTIVATIONS], tmp_path / "a.jsonl")
    assert "No peer or unfused form is ahead by more than noise in any row." in COMMUTE.made([tmp_path / "a.jsonl"])


def test_the_section_behind_a_convolution(tmp_path):
    rows = [
        behind(),
        behind(activation="tanh", one_launch=False, unfused_forward_ms=0.5, conv_pool_saved_bytes=5.0, torch_pool_act_forward_ms=0.1),
    ]
    report.write(rows, tmp_path / "a.jsonl")
    made = COMMUTE_CONV.made([tmp_path / "a.jsonl"])
    assert "2 rows of `fastpool bench commute --conv`" in made
    assert "| LeNet-5 | max | forward | 2x (2x) | 1.1x (0.10x) | 1.2x (0.50x) | 2x (2x) | 1 of 2 |  |" in made
    assert "| LeNet-5 | max | training | 2x (2x) | 2x (2x) | 2x (2x) | 2x (2x) |  | 24, 3 |" in made
    assert "1 times a peer or unfused form is ahead" in made  # what PyTorch does in the other order is another result


def test_the_section_of_blocks(tmp_path):
    rows = [block(), block(unfused_ratio=0.9, in_one=False), block("channels_last", onnxruntime_ratio=0.5)]
    rows.append(block(correct=False, error="torch: off", torch_ms=None, torch_ratio=None))
    report.write(rows, tmp_path / "a.jsonl")
    made = BLOCK.made([tmp_path / "a.jsonl"])
    assert "4 rows of `fastpool bench block`, float32, beside PyTorch, ONNX Runtime; medians" in made
    assert "- VGG-16 64x8x8 to 64, 1x1; 2x2 s2, batch 8 contiguous, 1 thr: torch: off" in made
    assert "| network | layout | one launch | unfused | PyTorch | ONNX Runtime |\n" in made
    assert "| VGG-16 | contiguous | 2 of 3 | 2.00x (0.90x) | 2.00x (2.00x) | 2.00x (2.00x) |" in made
    losing = made.partition("2 times a peer or unfused form is ahead by more than 5%, worst first")[2]
    assert 0 < losing.index("| forward | ONNX Runtime 0.50x |") < losing.index("| forward | its own unfused form 0.90x |")


def test_the_readme_command(tmp_path, monkeypatch):
    others = "".join(f"{section.start}\nold\n{readme.END}\n" for section in readme.SECTIONS[1:])
    (tmp_path / "README.md").write_text(f"before\n{POOL.start}\n{readme.END}\nbetween\n{others}after\n")
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    report.write([made_row()], tmp_path / "pool-z80.jsonl")
    stale = CliRunner().invoke(readme.main, ["--check"])
    assert stale.exit_code == 1
    assert "make readme" in stale.output
    assert CliRunner().invoke(readme.main).exit_code == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| 2x2 s2 | contiguous |" in POOL.held(text)
    assert {section.held(text) for section in (CONV, COMMUTE, COMMUTE_CONV, BLOCK)} == {CONV.made([])}
    assert f"{readme.END}\nbetween\n{CONV.start}" in text
    assert CliRunner().invoke(readme.main, ["--check"]).exit_code == 0
