"""``fastpool warmup``: what it compiles, that later processes compile none of it, and its words for what it cannot do."""

import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from processes import command, run

from fastpool import terminal, warmup

MODEL = """
import torch
from torch import nn
from layers import Block

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.pool, self.block, self.kept = nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, 2, 1), Block(), nn.FractionalMaxPool2d(2, 3)

    def forward(self, x, scale=None):
        y = self.block(self.pool(self.stem(x)).relu_())
        return {"y": y if scale is None else y * scale, "shape": y.shape}

def build():
    return Net()

def number():
    return 3

def fails():
    raise OSError("no weights here")

net = Net()
"""
LAYERS = """
from torch import nn

class Block(nn.Sequential):
    def __init__(self):
        super().__init__(nn.BatchNorm2d(4), nn.AvgPool2d(2))
"""
COUNTS = re.compile(r"(\d+) kernels? compiled, (\d+) already there")


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model in a file that imports another one beside it; the path of imports is put back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "layers.py").write_text(LAYERS)
    (tmp_path / "net.py").write_text(MODEL)
    (tmp_path / "torn.py").write_text("def build(:\n")
    yield tmp_path / "net.py"
    sys.modules.pop("layers", None)


def counts(out):
    return tuple(map(int, COUNTS.search(out).groups()))


def warm(*arguments, **environment):
    status, out, error = command("warmup", *arguments, **environment)
    assert (status, error) == (0, ""), out + error
    return out


PROGRAM = """
import torch, fastpool.functional as F
from fastpool.kernels import compile
for shape in ((8, 64, 112, 112), (2, 8, 30, 40), (1, 24, 7, 7), (1, 400, 20, 20)):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.zeros(shape).to(memory_format=memory_format)
        for window in ((2, 2), (3, 2, 1), (3, 1, 1)):
            F.max_pool2d(x, *window)
            F.max_pool2d(x.requires_grad_(), *window).sum().backward()
            x = x.detach()
print(compile.compiled_here)
"""


def test_a_program_after_it_compiles_nothing(tmp_path):
    """On other sizes than it was warmed on: where kernels are made for sizes, warmup.MAPS has to have them."""
    cache = str(tmp_path / "cache")
    only = ("--only", "max_pool2d")
    compiled, loaded = counts(warm(*only, FASTPOOL_CACHE_DIR=cache))
    assert compiled > 10
    assert loaded == 0
    assert counts(warm(*only, FASTPOOL_CACHE_DIR=cache)) == (0, compiled)
    assert run(PROGRAM, FASTPOOL_CACHE_DIR=cache) == "[]"


def test_a_model(model, tmp_path):
    """Inference, then training in channels_last: the latter's kernels are others; nothing is compiled twice, nor by the program itself."""
    cache = {"FASTPOOL_CACHE_DIR": str(tmp_path / "cache"), "cwd": tmp_path.parent}
    arguments = ("--model", f"{model}:build", "--input", "2x3x40x40")
    out = warm(*arguments, **cache)
    assert "build has 2 pooling layers of fastpool, 2 of them swapped" in out
    assert "kept kept: FractionalMaxPool2d has no counterpart" in out
    first, _ = counts(out)
    assert first == 3  # max, avg, the driver
    assert counts(warm(*arguments, "--input", "1x3x40x40", **cache)) == (0, first)
    training = (*arguments, "--training", "--channels-last")
    second, _ = counts(warm(*training, **cache))
    assert second == 4  # forward and backward of either
    program = """
import torch, fastpool, net
from fastpool.kernels import compile
model = net.build()
fastpool.convert(model)
with torch.no_grad():
    model.eval()(torch.zeros(2, 3, 40, 40))
model.to(memory_format=torch.channels_last).train()
model(torch.zeros(2, 3, 40, 40).to(memory_format=torch.channels_last))["y"].sum().backward()
print(compile.compiled_here)
"""
    path = f"{model.parent}:{warmup.__file__.rpartition('/fastpool/')[0]}"
    assert run(program, FASTPOOL_CACHE_DIR=str(tmp_path / "cache"), PYTHONPATH=path) == "[]"


@pytest.mark.parametrize("name", ["Net", "build", "net"])
@pytest.mark.parametrize("shape", ["2x3x20x20", "2x3x20x20,1"])
def test_a_class_a_function_a_module(name, shape, model):
    """Of one input, or two."""
    ended = CliRunner().invoke(warmup.warmup, ["--model", f"{model}:{name}", "--input", shape, "--dtype", "float32", "--dtype", "float64"])
    assert ended.exit_code == 0, ended.output
    assert COUNTS.search(ended.output)


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--model", "{folder}/none.py:build", "--input", "1x3"], 2, "there is no file"),
        (["--model", "{folder}/net.py", "--input", "1x3"], 2, "names no model"),
        (["--model", "{folder}/net.py:", "--input", "1x3"], 2, "names no model"),
        (["--model", "{folder}/net.py:build", "--input", "1xthree"], 2, "'1xthree' is no shape"),
        (["--model", "{folder}/net.py:build", "--input", "0x3"], 2, "'0x3' is no shape"),
        (["--model", "{folder}/net.py:build"], 2, "--model needs --input"),
        (["--model", "{folder}/net.py:build", "--input", "1x3", "--all"], 2, "--all and --only do not go with it"),
        (["--input", "1x3"], 2, "--model FILE:FACTORY"),
        (["--device", "cuda"], 1, "--device cuda: PyTorch sees no GPU here"),
        (["--only", "max_pool9d"], 2, "there is no function 'max_pool9d'; there are adaptive_avg_pool1d"),
        (["--model", "{folder}/net.py:builds", "--input", "1x3"], 1, "net.py has no builds; it has Net, build, number, fails"),
        (["--model", "{folder}/net.py:number", "--input", "1x3"], 1, "number of net.py is of type int, not a torch.nn.Module"),
        (["--model", "{folder}/net.py:fails", "--input", "1x3"], 1, "fails() failed: OSError: no weights here (net.py, line 22)"),
        (["--model", "{folder}/torn.py:build", "--input", "1x3"], 1, "importing torn.py failed: SyntaxError"),
        (["--model", "{folder}/net.py:build", "--input", "1x5x9x9"], 1, "running build failed: RuntimeError"),
        (["--model", "{folder}/net.py:build", "--input", "1x3x9x9", "--dtype", "int8"], 1, "running build failed: TypeError"),
    ],
)
def test_a_sentence_for_what_cannot_be(arguments, status, words, model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ended = CliRunner().invoke(warmup.warmup, [a.format(folder=model.parent) for a in arguments])
    assert ended.exit_code == status, ended.output
    assert words in " ".join(ended.output.split())
    assert "Traceback" not in ended.output


@pytest.mark.parametrize("directory", ["/proc/kernels", ""])
def test_nowhere_to_keep_it(directory, tmp_path):
    status, out, error = command("warmup", FASTPOOL_CACHE_DIR=directory, XDG_CACHE_HOME="/proc/nowhere", cwd=tmp_path)
    assert (status, out) == (1, "")
    assert error == "Error: there is no cache directory: nothing would be kept. Set FASTPOOL_CACHE_DIR to a folder that can be.\n"


def test_prune(tmp_path):
    leaving, other = tmp_path / "cpu.forward-01234567-0123456789abcdef.bin", tmp_path / "notes.txt"
    leaving.write_bytes(bytes(1000))
    other.write_text("mine")
    out = warm("--only", "global_avg_pool2d", "--prune", FASTPOOL_CACHE_DIR=str(tmp_path))
    assert out.startswith("Deleted 1 kernels, 1.0 kB.\n")
    assert not leaving.exists()
    assert other.exists()
    assert counts(out)[0] > 0
    assert warm("--only", "global_avg_pool2d", "--prune", FASTPOOL_CACHE_DIR=str(tmp_path)).startswith("Deleted 0 kernels")


def test_control_c(monkeypatch):
    done = []

    def call(case, device):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(case)

    monkeypatch.setattr(warmup, "call", call)
    ended = CliRunner().invoke(warmup.warmup, ["--only", "avg_pool2d"])
    assert ended.exit_code == terminal.INTERRUPTED
    assert ended.output.startswith("Interrupted.\n")
    assert COUNTS.search(ended.output)


def test_control_c_as_a_user_types_it(tmp_path):
    """In the middle of a compilation: what is done stays, and no torn file."""
    arguments = [sys.executable, "-m", "fastpool", "warmup"]
    environment = {**warmup.os.environ, "FASTPOOL_CACHE_DIR": str(tmp_path)}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while len(list(tmp_path.glob("*.bin"))) < 3 and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=300)
    assert (process.returncode, error) == (terminal.INTERRUPTED, "")
    assert counts(out)[0] == len(list(tmp_path.iterdir())) >= 3


def test_every_function_is_warmed():
    """The usual cases of each, in both layouts, some on maps narrower than a register; all of them among those of --all."""
    for name in warmup.functions():
        usual = warmup.cases([name], [torch.float32], thorough=False)
        assert {case.channels_last for case in usual} == {True, False}
        assert {case.size for case in usual} >= {7, 14}
        thorough = [str(case) for case in warmup.cases([name], [torch.float32], thorough=True)]
        assert {str(case) for case in usual} <= set(thorough)


@pytest.mark.parametrize("name", ["global_max_pool2d", "lp_pool2d"])
def test_a_case_is_called_with_and_without_a_gradient(name, monkeypatch):
    (case, *_) = warmup.cases([name], [torch.float64], thorough=True)
    asked, plain = [], getattr(warmup.F, name)

    def function(input, *arguments, **named):
        asked.append((torch.is_grad_enabled() and input.requires_grad, input.dtype))
        return plain(input, *arguments, **named)

    function.__signature__ = warmup.inspect.signature(plain)
    monkeypatch.setattr(warmup.F, name, function)
    warmup.call(case)
    assert asked == [(False, torch.float64), (True, torch.float64)]


def test_a_dtype_without_kernels_is_left_out(monkeypatch):
    asked = []

    def call(case, device):
        asked.append(case.dtype)
        if case.dtype is torch.bool:
            raise NotImplementedError

    monkeypatch.setattr(warmup, "call", call)
    todo = warmup.cases(["avg_pool2d"], [torch.bool, torch.float32], thorough=False)
    warmup._warm_functions(todo, "cpu")
    assert asked.count(torch.bool) == 1
    assert asked.count(torch.float32) == len(todo) / 2
