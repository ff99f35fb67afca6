"""What CUDA kernels are compiled to, for every generation of GPUs: PTX and, by ptxas, machine code."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import emulated
import pytest
from fastpool.kernels.pool import KINDS

pytestmark = emulated.needs_toolchain

CAPABILITIES = (7, 5), (8, 0), (9, 0), (10, 0)
WINDOW = (1, 3, 3), (1, 2, 2), (1, 1, 1)
BUDGETS = {"max": (40, 300), "avg": (40, 320), "l2": (40, 360), "stochastic": (40, 380)}
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
    """Registers, no spills, no stack, no call; one store an output and one of what is saved; as many loads as taps, a survey's included."""
    kind = KINDS[name]
    for which, kernel in kernels(kind).items():
        said, instructions = assembled(kernel.ptx(cc), cc, tmp_path)
        assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", said), (which, said)
        names = [instruction.split(".")[0] for instruction in instructions]
        assert not {"LDL", "STL", "CALL", "LD", "ST"}.intersection(names), which
        assert not any(re.match(r"D(ADD|MUL|FMA|SETP)", n) or ".F64" in i for n, i in zip(names, instructions, strict=True)), which
        registers = int(re.search(r"Used (\d+) registers", said)[1])
        if which == "forward":
            most, length = BUDGETS[name]
            assert registers <= most
            assert len(instructions) <= length
            assert names.count("LDG") == 9
            assert names.count("STG") == 1 + bool(kind.saved_dtype(9, "float32"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", KINDS)
def test_no_double_precision_no_local_memory_no_call(name, dtype):
    """In PTX; libdevice's powers and exponentials included."""
    for which, kernel in kernels(KINDS[name], dtype).items():
        text = kernel.ptx((8, 0))
        assert ".target sm_80" in text
        found = re.findall(r"\.f64|\.local\b|\bcall\b|div\.s64|rem\.s64", text)
        assert not found, (which, found)
