"""What CUDA kernels are compiled to, for every generation of GPUs: PTX and, by ptxas, machine code; and what they move when they run."""

import importlib.util
import itertools
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

import fastpool.functional as F
from fastpool import activations, backend
from fastpool.backend import Pooling
from fastpool.functional import _pooled

pytestmark = emulated.needs_toolchain

CAPABILITIES = (7, 5), (8, 0), (9, 0), (10, 0)
WINDOW = (1, 3, 3), (1, 2, 2), (1, 1, 1)
BUDGETS = {"max": (40, 360), "avg": (40, 340), "l2": (40, 380), "stochastic": (44, 340)}
"""Kind -> registers and instructions that its forward kernel may take, 3x3 with stride 2."""
WIDE_LOADS = {"wide": (3, 3), "wide channels_last": (9, 0)}
"""Loads of 128 bits and of 32 of those 4 elements at a time: 2 outputs of a row read 5 elements of it; a channels_last tap is one load."""


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
    return said.stderr, disassembled(binary.read_bytes(), folder)


def disassembled(code, folder):
    """The names of a cubin's instructions."""
    binary = folder / "code.cubin"
    binary.write_bytes(code)
    listing = subprocess.run([tool("nvdisasm"), "-c", str(binary)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", listing, re.MULTILINE)


def kernels(kind, dtype="float32"):
    """The kernels of a pooling, forward and backward, of windows and whole maps."""
    from fastpool.kernels.cuda import whole_map, wide, windows

    saved = kind.saved_dtype(9, dtype)
    found = {
        "forward": windows.forward(kind, dtype, saved or "uint8", bool(saved), False, *WINDOW, True, None),
        "backward": windows.backward(kind, dtype, saved, False, *WINDOW, True, None),
    }
    for last, where in ((False, "wide"), (True, "wide channels_last")):
        found[where] = wide.forward(kind, dtype, saved or "uint8", bool(saved), last, *WINDOW, 1, True, None)
        if wide.gathers(kind, *WINDOW, last):
            found[f"{where} backward"] = wide.backward(kind, dtype, saved, last, *WINDOW, 1, True, None)
    if kind.combine:
        found["global"] = whole_map.forward(kind, dtype, saved or "uint8", bool(saved), False, True)
        found["global backward"] = whole_map.backward(kind, dtype, saved, False)
    return found


def for_every_generation(kernels, folder):
    """(name, capability, what ptxas says, instructions) of each; those of a kernel one behind the other, as they share its front end."""
    for which, kernel in kernels.items():
        for cc in CAPABILITIES:
            yield which, cc, *assembled(kernel.ptx(cc), cc, folder)


@pytest.mark.parametrize("name", BUDGETS)
def test_machine_code(name, tmp_path):
    """Registers, no spills, no stack; one store an output and one of what is saved; as many loads as taps, twice where a survey goes first.

    What CALL there is is ptxas's own, of the rare cases of a division or a root: PTX has none.
    """
    kind = KINDS[name]
    for which, cc, said, instructions in for_every_generation(kernels(kind), tmp_path):
        assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", said), (which, cc, said)
        names = [instruction.split(".")[0] for instruction in instructions]
        assert not {"LDL", "STL", "LD", "ST"}.intersection(names), (which, cc)
        assert not any(re.match(r"D(ADD|MUL|FMA|SETP)", n) or ".F64" in i for n, i in zip(names, instructions, strict=True)), (which, cc)
        registers = int(re.search(r"Used (\d+) registers", said)[1])
        if which == "forward":
            most, length = BUDGETS[name]
            assert registers <= most, (which, cc)
            assert len(instructions) <= length, (which, cc)
            assert names.count("LDG") == 9 * (2 if kind.selects and kind.survey else 1)
            assert names.count("STG") == 1 + bool(kind.saved_dtype(9, "float32"))
        if which in WIDE_LOADS:
            turns = 2 if kind.selects and kind.survey else 1
            loads = tuple(sum(i.startswith("LDG") and (".128" in i) == whole for i in instructions) for whole in (True, False))
            # Of two turns the compiler may keep what it has loaded.
            assert all(count <= found <= turns * count for count, found in zip(WIDE_LOADS[which], loads, strict=True))
            assert names.count("STG") == 1 + bool(kind.saved_dtype(9, "float32"))
            assert registers <= 64, (which, cc)


def convolving(dtype="float32"):
    """The kernels of a convolution: name -> (kernel, its tile or None)."""
    from fastpool.kernels.cuda import convolution, correlate, depthwise, weight_gradient

    found = {"pack": (correlate.pack(dtype, True, True), None), "ordered": (weight_gradient.ordered(dtype), None)}
    for last, layout in ((False, "contiguous"), (True, "channels_last")):
        for tile in (convolution.WIDE, convolution.NARROW, convolution.SMALL) if dtype != "float64" else (convolution.SMALL,):
            kernel = correlate.forward(dtype, last, tile, None, None, (1, 1, 1), 1, last, True)
            found[f"forward {layout} {tile.pixels} x {tile.channels}"] = kernel, tile
        for tile in (convolution.WIDE, convolution.SQUARE, convolution.SMALL) if dtype != "float64" else (convolution.SMALL,):
            found[f"weights {layout} {tile.pixels} x {tile.channels}"] = weight_gradient.partial(dtype, last, tile), tile
        found[f"depthwise {layout}"] = depthwise.forward(dtype, last, None, (1, 3, 3)), None
        found[f"depthwise weights {layout}"] = depthwise.weights(dtype, last, (1, 3, 3)), None
    return found


@pytest.mark.parametrize("parts", ["pack ordered", "forward", "weights", "depthwise"])
def test_machine_code_of_convolution(parts, tmp_path):
    """Nothing spilled, two blocks of 256 threads in a multiprocessor's registers, and a step that is its products and, for each of its
    rows, loads of 128 bits."""
    found = {name: made for name, made in convolving().items() if name.split()[0] in parts.split()}
    for which, cc, said, instructions in for_every_generation({name: kernel for name, (kernel, _) in found.items()}, tmp_path):
        _, tile = found[which]
        assert re.search(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", said), (which, cc, said)
        names = [instruction.split(".")[0] for instruction in instructions]
        assert not {"LDL", "STL", "LD", "ST"}.intersection(names), (which, cc)
        assert not any(".F64" in i or n in ("DADD", "DMUL", "DFMA") for n, i in zip(names, instructions, strict=True)), (which, cc)
        assert int(re.search(r"Used (\d+) registers", said)[1]) <= 128, (which, cc)
        if tile:
            assert names.count("FFMA") == tile.rows * tile.columns * tile.depth, (which, cc)
            loads = [i.replace(".U.", ".") for i in instructions if i.startswith("LDS")]
            assert loads == ["LDS.128"] * (tile.depth * (tile.rows // 4 + 1)), (which, cc)
        if which.startswith("forward"):
            assert [i[:9] for i in instructions if i.startswith("STG")] == ["STG.E.128"] * (tile.rows * tile.columns // 4), (which, cc)


CONVOLVED = {  # name -> (x, weight, arguments): the products are tiles without a rest
    "3x3": ((2, 16, 8, 16), (64, 16, 3, 3), {"padding": 1}),
    "1x1": ((1, 32, 16, 8), (64, 32, 1, 1), {}),
}
PRODUCTS_SHARE = {"3x3": 0.43, "1x1": 0.32}
"""Of the forward kernel's warp instructions in PTX, at least: of maps so small, a third or more finds out where a thread is."""


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CONVOLVED)
def test_convolution_moves_what_it_must(name, layout):
    """Shared memory has no bank conflicts; DRAM gives x, packed weights and gy once, and gets each result once."""
    shape, weight, more = CONVOLVED[name]
    x, w = LAYOUTS[layout](torch.randn(shape)).requires_grad_(), torch.randn(weight, requires_grad=True)
    with emulated.device() as emulator:
        y = F.conv2d(x, w, **more)
        y.backward(torch.ones_like(y))
    assert sum(counters.bank_conflicts for _, counters in emulator.launches) == 0
    found = [(kernel.name, counters) for kernel, counters in emulator.launches]
    assert [kernel for kernel, _ in found] == [
        "correlate.pack", "correlate.forward", "correlate.pack", "correlate.forward", "weight_gradient.partial", "weight_gradient.ordered"
    ]  # fmt: skip
    (_, packing), (_, forward), _, (_, input_gradient), (_, partial), (_, ordered) = found
    packed = 4 * (w.numel() + weight[0])
    assert forward.sectors_loaded * 32 == 4 * x.numel() + packed
    assert forward.sectors_stored * 32 == 4 * y.numel()
    assert (packing.sectors_loaded * 32, packing.sectors_stored * 32) == (4 * w.numel(), packed)
    assert input_gradient.sectors_stored * 32 == 4 * x.numel()
    assert partial.sectors_loaded * 32 == 4 * (x.numel() + y.numel())
    assert ordered.sectors_stored * 32 == 4 * w.numel()
    for access in forward.accesses.values():
        assert access.sectors <= 1.25 * access.lanes * access.bytes / 32
    products = sum(count for opcode, count in forward.by_opcode.items() if opcode.startswith("fma"))
    assert products == y.numel() * w[0].numel() / 32
    assert products >= PRODUCTS_SHARE[name] * forward.warp_instructions


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_convolution_has_no_double_precision_no_local_memory_no_call(dtype):
    for which, (kernel, _) in convolving(dtype).items():
        assert not emulated.costly(kernel, (8, 0)), which


def test_one_front_end_serves_every_capability(monkeypatch):
    from fastpool.kernels.cuda import compile

    monkeypatch.setattr(compile, "directory", lambda: None)
    kernel, before = kernels(KINDS["max"])["backward"], compile.library.cache_info().misses
    kernel = compile.Kernel(kernel._factory, kernel.constants)  # another may have been asked before
    assert len({re.search(r"\.target (sm_\d+)", kernel.ptx(cc))[1] for cc in CAPABILITIES}) == len(CAPABILITIES)
    assert compile.library.cache_info().misses == before + 1


def test_machine_code_by_link_time_optimisation(tmp_path):
    """The other way from Python to machine code, which numba-cuda takes by default: the same loads and products."""
    from cuda.core import Linker, LinkerOptions, ObjectCode
    from fastpool.kernels.cuda import convolution, correlate
    from fastpool.kernels.cuda.compile import compiling, library

    def linked(kernel, cc):
        options = LinkerOptions(arch=f"sm_{cc[0]}{cc[1]}", link_time_optimization=True)
        with compiling():
            code = library(kernel).get_ltoir(cc)
        found = disassembled(Linker(ObjectCode.from_ltoir(code), options=options).link("cubin").code, tmp_path)
        assert not any(re.match(r"LDL|STL|LD\b|ST\b|D(ADD|MUL|FMA)", i) or ".F64" in i for i in found), (kernel.name, cc)
        return found

    pooling, tile = kernels(KINDS["max"]), convolution.WIDE
    convolve = correlate.forward("float32", False, tile, None, None, (1, 1, 1), 1, False, True)
    for cc in CAPABILITIES:
        assert sum(i.startswith("LDG") for i in linked(pooling["forward"], cc)) == 9
    for cc in CAPABILITIES:
        loads = [i for i in linked(pooling["wide"], cc) if i.startswith("LDG")]
        assert sum(".128" in i for i in loads) == sum(".128" not in i for i in loads) == 3
    for cc in CAPABILITIES:
        found = linked(convolve, cc)
        assert sum(i.startswith("FFMA") for i in found) == tile.rows * tile.columns * tile.depth
        assert sum(i.startswith("LDS") for i in found) == sum(i.startswith("LDS") and ".128" in i for i in found) == 24


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
        assert ".target sm_80" in kernel.ptx((8, 0))
        assert not emulated.costly(kernel, (8, 0)), (which, emulated.costly(kernel, (8, 0)))


def test_no_kernel_of_floats_holds_double_precision_calls_or_divisions_of_64_bits():
    """Every launch on the emulator looks for them, in the PTX of whatever a test launches: here in kernels that have one each."""
    from fastpool.kernels.cuda.compile import specialised
    from numba import cuda, types

    bodies = {
        "nothing": lambda x, at: x[at] * types.float32(0.1),
        ".f64": lambda x, at: x[at] * 0.1,
        "div.s64": lambda x, at: x[at // types.int64(x[0])],
    }

    @specialised
    def doubled(dtype, what):
        body = cuda.jit(device=True)(bodies[what])

        def kernel(x):
            at = cuda.grid(1)
            x[at] = body(x, at)

        return kernel, (types.CPointer(getattr(types, dtype)),)

    assert {what: emulated.costly(doubled("float32", what), (8, 0)) for what in bodies} == {
        "nothing": set(), ".f64": {".f64"}, "div.s64": {"div.s64"}
    }  # fmt: skip
    assert emulated.costly(doubled("float64", ".f64"), (8, 0)) == set()
    with emulated.device() as emulator, pytest.raises(AssertionError, match="doubled"):
        emulator.launch(doubled("float32", ".f64"), 1, 32, [0], 0)


COUNTED = {  # name -> (shape, kernel_size, stride, padding)
    "2x2s2": ((2, 3, 64, 128), (2, 2), (2, 2), (0, 0)),
    "3x3s2p1": ((2, 3, 64, 128), (3, 3), (2, 2), (1, 1)),
    "3x3s1p1": ((1, 2, 32, 128), (3, 3), (1, 1), (1, 1)),
}
WARP_INSTRUCTIONS = {"2x2s2": (2.8, 3.6), "3x3s2p1": (4.2, 6.3), "3x3s1p1": (3.1, 3.5)}
"""An output, at most, of PTX, forward and backward: a warp's instructions are those of 32 threads."""


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
    for counters, most in zip((forward, backward), WARP_INSTRUCTIONS[name], strict=True):
        assert counters.warp_instructions / outs <= most


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


def test_operators_have_kernels_for_it():
    """``torch.compile``'s, which take those of the tensors' device."""
    from fastpool import library

    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastpool::")]
    assert len(names) >= 8
    for name, key in itertools.product(names, ("CPU", "CUDA")):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), (name, key)
    assert library.DEVICES == ("cpu", "cuda")


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastpool.kernels.cuda.pooling", None)
    with pytest.raises(ImportError, match=r"max_pool2d: CUDA kernels need numba-cuda: pip install 'fastpool\[cuda\]'"):
        backend.kernels_for(torch.device("cuda:0"), torch.float32, "max_pool2d", ("float32",))


def test_a_device_that_is_too_old_is_refused():
    from fastpool.kernels.cuda.compile import capability

    assert [capability(cc) for cc in ((7, 5), (8, 9), (9, 0), (12, 0))] == [(7, 5), (8, 0), (9, 0), (10, 0)]
    with pytest.raises(RuntimeError, match=r"need compute capability \(7, 5\) or later, the device has \(7, 0\)"):
        capability((7, 0))
