"""What CUDA kernels are compiled to, for every generation of GPUs: PTX and, by ptxas, machine code; and what they move when they run."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch
from cases import LAYOUTS, window
from fastpool.kernels.pool import KINDS

from fastpool import activations, backend
from fastpool.backend import Pooling
from fastpool.functional import _pooled

pytestmark = emulated.needs_toolchain

CAPABILITIES = (7, 5), (8, 0), (9, 0), (10, 0)
WINDOW = (1, 3, 3), (1, 2, 2), (1, 1, 1)
BUDGETS = {"max": (40, 360), "avg": (40, 340), "l2": (40, 380), "stochastic": (44, 340)}
"""Kind -> registers and instructions that its forward kernel may take, 3x3 with stride 2."""


def tool(name):
    """ptxas or nvdisasm of the wheels that compiled the PTX: another's may not know its version."""
    spec = importlib.util.find_spec("nvidia")
    for base in spec.submodule_search_locations if spec else ():
        for found in Path(base).glob(f"*/bin/{name}"):
            return str(found)
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not here: pip install 'fastpool[cuda]'")
    return found


def assembled(text, cc, folder):
    """(what ptxas says of it, the instructions' names)."""
    source, binary = folder / "kernel.ptx", folder / "kernel.cubin"
    source.write_text(text)
    said = subprocess.run(
        [tool("ptxas"), "-v", "-O3", f"-arch=sm_{cc[0]}{cc[1]}", str(source), "-o", str(binary)], capture_output=True, text=True, check=True
    )
    listing = subprocess.run([tool("nvdisasm"), "-c", str(binary)], capture_output=True, text=True, check=True).stdout
    return said.stderr, re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing, re.MULTILINE)


def kernels(kind, dtype="float32"):
    """The kernels of a pooling, forward and backward, of windows and whole maps."""
    from fastpool.kernels.cuda import whole_map, windows

    saved = kind.saved_dtype(9, dtype)
    found = {
        "forward": windows.forward(kind, dtype, saved or "uint8", bool(saved), False, *WINDOW, True, None),
        "backward": windows.backward(kind, dtype, saved, False, *WINDOW, True, None),
    }
    if kind.combine:
        found["global"] = whole_map.forward(kind, dtype, saved or "uint8", bool(saved), False)
        found["global backward"] = whole_map.backward(kind, dtype, saved, False)
    return found


@pytest.mark.parametrize("cc", CAPABILITIES, ids=lambda cc: f"sm_{cc[0]}{cc[1]}")
@pytest.mark.parametrize("name", BUDGETS)
def test_machine_code(name, cc, tmp_path):
    """Registers, no spills, no stack; one store an output and one of what is saved; as many loads as taps, twice where a survey goes first.

    What CALL there is is ptxas's own, of the rare cases of a division or a root: PTX has none.
    """
    kind = KINDS[name]
    for which, kernel in kernels(kind).items():
        said, instructions = assembled(kernel.ptx(cc), cc, tmp_path)
        assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", said), (which, said)
        names = [instruction.split(".")[0] for instruction in instructions]
        assert not {"LDL", "STL", "LD", "ST"}.intersection(names), which
        assert not any(re.match(r"D(ADD|MUL|FMA|SETP)", n) or ".F64" in i for n, i in zip(names, instructions, strict=True)), which
        registers = int(re.search(r"Used (\d+) registers", said)[1])
        if which == "forward":
            most, length = BUDGETS[name]
            assert registers <= most
            assert len(instructions) <= length
            assert names.count("LDG") == 9 * (2 if kind.selects and kind.survey else 1)
            assert names.count("STG") == 1 + bool(kind.saved_dtype(9, "float32"))


@pytest.mark.parametrize("cc", [(7, 5), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)], ids=lambda cc: f"sm_{cc[0]}{cc[1]}")
def test_the_drivers_side_assembles_for_the_device_it_finds(cc):
    from fastpool.kernels.cuda.compile import capability
    from fastpool.kernels.cuda.launch import entry, machine_code

    text = kernels(KINDS["max"])["forward"].ptx(capability(cc))
    assert entry(text).encode() in machine_code(text, cc).code


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", KINDS)
def test_no_double_precision_no_local_memory_no_call(name, dtype):
    """In PTX; libdevice's powers and exponentials included."""
    for which, kernel in kernels(KINDS[name], dtype).items():
        text = kernel.ptx((8, 0))
        assert ".target sm_80" in text
        found = re.findall(r"\.f64|\.local\b|\bcall\b|div\.s64|rem\.s64", text)
        assert not found, (which, found)


COUNTED = {  # name -> (shape, kernel_size, stride, padding)
    "2x2s2": ((2, 3, 64, 128), (2, 2), (2, 2), (0, 0)),
    "3x3s2p1": ((2, 3, 64, 128), (3, 3), (2, 2), (1, 1)),
    "3x3s1p1": ((1, 2, 32, 128), (3, 3), (1, 1), (1, 1)),
}
WARP_INSTRUCTIONS = {"2x2s2": 5.8, "3x3s2p1": 10.5, "3x3s1p1": 10}
"""An output, at most, of PTX, one in ten of which only loads a parameter: a warp's instructions are those of 32 outputs."""


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", COUNTED)
def test_bytes_and_instructions(name, layout):
    """Memory moves what must be moved and nothing twice; of a request's sectors all are of use but where the stride leaves gaps."""
    shape, kernel, stride, padding = COUNTED[name]
    x = LAYOUTS[layout](torch.randn(shape if layout == "contiguous" else (shape[0], 32, 16, 24)))
    with emulated.device() as emulator:
        y = _pooled(x.requires_grad_(), Pooling("test", KINDS["max"], 2, window(kernel, stride, padding)))
        y.sum().backward()
    (_, forward), (_, backward) = emulator.launches
    size, outs = x.numel() * 4, y.numel()
    assert forward.sectors_loaded * 32 == size
    assert forward.sectors_stored * 32 == 4 * outs + outs  # values, and the offset byte
    assert backward.sectors_loaded * 32 == 4 * outs + outs
    assert backward.sectors_stored * 32 == size
    for access in forward.accesses.values():
        if access.kind == "st" or layout == "channels_last":
            assert access.sectors <= 1.25 * access.lanes * access.bytes / 32
    assert forward.warp_instructions / outs <= WARP_INSTRUCTIONS[name]


def test_parts_of_a_batch(monkeypatch):
    """More elements than one launch counts: several, whose images are numbered on."""
    from fastpool.kernels.cuda import elementwise, pooling

    x = torch.randn(5, 3, 12, 14)
    whole = [_pooled(x, Pooling("test", KINDS[kind], 2, window((2, 3), (2, 2), (1, 1))), 7) for kind in ("max", "stochastic")]
    monkeypatch.setattr(pooling, "MOST", 2 * 3 * 12 * 14)
    monkeypatch.setattr(elementwise, "MOST", 100)
    pooling.on.cache_clear()
    elementwise.on.cache_clear()
    for kind, expected in zip(("max", "stochastic"), whole, strict=True):
        a = x.clone().requires_grad_()
        with emulated.device() as emulator:
            y = _pooled(a, Pooling("test", KINDS[kind], 2, window((2, 3), (2, 2), (1, 1))), 7)
            y.sum().backward()
        assert torch.equal(y, expected)
        assert len(emulator.launches) == 6
    with emulated.device() as emulator:
        assert torch.equal(backend.activated(x, activations.named("test", "relu")), x.relu())
    assert len(emulator.launches) == -(-x.numel() // 100)
    pooling.on.cache_clear()
    elementwise.on.cache_clear()


def test_an_import_of_fastpool_touches_no_cuda():
    """torch imports NVIDIA's bindings by itself."""
    asked = "m.startswith(('numba.cuda', 'numba_cuda', 'fastpool.kernels.cuda'))"
    code = f"import sys, fastpool.functional; print([m for m in sys.modules if {asked}])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastpool.kernels.cuda.pooling", None)
    with pytest.raises(ImportError, match=r"max_pool2d: CUDA kernels need numba-cuda: pip install 'fastpool\[cuda\]'"):
        backend.kernels_for(torch.device("cuda:0"), torch.float32, "max_pool2d", ("float32",))


def test_a_device_that_is_too_old_is_refused():
    from fastpool.kernels.cuda.compile import capability

    assert [capability(cc) for cc in ((7, 5), (8, 9), (9, 0), (12, 0))] == [(7, 5), (8, 0), (9, 0), (10, 0)]
    with pytest.raises(RuntimeError, match=r"need compute capability \(7, 5\) or later, the device has \(7, 0\)"):
        capability((7, 0))
