"""``fastpool doctor``: what it says is so, what it advises, and its exit status."""

import copy
import ctypes
import json
import types

import numba
import pytest
import torch
from click.testing import CliRunner
from fastpool.kernels import compile, simd
from processes import command

import fastpool
from fastpool import doctor, runtime

HEALTHY = {
    "smoke_test": {"passed": True, "error": None, "seconds": 0.1},
    "versions": {"fastpool": "1", "torch": "2", "numba": "3", "llvmlite": "4", "numpy": "5", "python": "6"},
    "cpu": {
        "model": "A CPU",
        "llvm_name": "a",
        "architecture": "x86_64",
        "features": ["avx512f"],
        "register_bytes": 64,
        "lanes": {"float32": 16},
        "huge_pages": {"mode": "always", "malloc_asks": False},
    },
    "threads": {"layer": "omp", "locked": False, "error": None, "torch": 4, "most": 4, "cores": 4},
    "cache": {
        "directory": "/cache",
        "writable": True,
        "present": {"files": 3, "bytes": 300},
        "superseded": {"files": 1, "bytes": 100},
    },
    "cuda": {"extra": None, "driver": None, "devices": [], "torch_built_for": None, "smoke_test": None},
}
FAILED = {"passed": False, "error": "NotImplementedError: no kernels", "seconds": 0.1}


def run(*arguments):
    return CliRunner().invoke(doctor.doctor, arguments)


def test_what_it_says_is_so():
    torch.set_num_threads(2)
    ended = run("--json")
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout)
    assert found["smoke_test"]["passed"]
    assert found["versions"]["fastpool"] == fastpool.__version__
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["numba"] == numba.__version__
    assert found["cpu"]["register_bytes"] == simd.register_bytes()
    for name, lanes in found["cpu"]["lanes"].items():
        assert lanes * torch.empty(0, dtype=getattr(torch, name)).element_size() == simd.register_bytes()
    assert found["threads"]["layer"] == numba.threading_layer()
    assert found["threads"]["locked"] == (numba.threading_layer() == "workqueue")
    assert found["threads"]["torch"] == torch.get_num_threads() == 2
    assert found["cache"]["directory"] == str(compile.directory())
    assert found["cache"]["writable"]
    assert list(found["advice"]) == list(doctor.advice(found))


def test_it_fits_eighty_columns():
    ended = run()
    assert ended.exit_code == 0, ended.output
    assert max(map(len, ended.stdout.splitlines())) <= 80
    assert "…" not in ended.stdout
    words = " ".join(ended.stdout.split())
    for word in (f"torch {torch.__version__}", f"{simd.register_bytes()} bytes", numba.threading_layer(), "huge pages", "CUDA extra"):
        assert word in words


def test_as_a_user_types_it(tmp_path):
    """In a new process with an empty cache: the only pooling it makes is its own, and PyTorch's thread count survives it."""
    cache = tmp_path / "cache"
    status, out, error = command("doctor", "--json", cwd=tmp_path, FASTPOOL_CACHE_DIR=str(cache), NUMBA_THREADING_LAYER="workqueue")
    assert (status, error) == (0, "")
    found = json.loads(out)
    assert found["cache"] == {
        "directory": str(cache),
        "writable": True,
        "present": {"files": 0, "bytes": 0},
        "superseded": {"files": 0, "bytes": 0},
    }
    assert found["threads"]["locked"]
    assert any(sentence.startswith("NUMBA_THREADING_LAYER asks for workqueue") for sentence in found["advice"])
    assert any("fastpool warmup" in sentence for sentence in found["advice"])
    kept = {path.name for path in cache.iterdir()}
    assert any(name.startswith("rows.") for name in kept)
    assert any("channels_last" in name for name in kept)


@pytest.mark.parametrize(
    "broken",
    [
        lambda pool: lambda *arguments: pool(*arguments) + 1e-6,
        lambda pool: lambda *arguments: pool(*arguments).detach() + 0 * arguments[0].sum(),
        lambda pool: lambda *arguments: pool(*arguments).missing,
    ],
    ids=["value", "gradient", "raises"],
)
def test_a_wrong_result_fails(broken, monkeypatch):
    monkeypatch.setattr(doctor.F, "max_pool2d", broken(doctor.F.max_pool2d))
    ended = run()
    assert ended.exit_code == 1
    assert "FAILED" in ended.stdout
    assert json.loads(run("--json").stdout)["smoke_test"]["error"]


def test_threads_that_do_not_start(monkeypatch):
    def missing():
        raise ValueError("No threading layer could be loaded.\nHINT: ...")

    monkeypatch.setattr(runtime, "threading_layer", missing)
    ended = run()
    assert "none: No threading layer could be loaded." in ended.stdout
    assert "Unset NUMBA_THREADING_LAYER" in " ".join(ended.stdout.split())


def test_nothing_to_advise():
    assert list(doctor.advice(HEALTHY, {})) == []


@pytest.mark.parametrize(
    ("where", "values", "environment", "words"),
    [
        ("cache", {"directory": None, "writable": False}, {}, "Set FASTPOOL_CACHE_DIR"),
        ("cache", {"writable": False}, {}, "/cache can only be read"),
        ("cache", {"present": {"files": 0, "bytes": 0}}, {}, "fastpool warmup"),
        ("cache", {"superseded": {"files": 900, "bytes": 90_000_000}}, {}, "90 MB of the cache"),
        ("threads", {"layer": "workqueue", "locked": True}, {}, "pip install tbb"),
        ("threads", {"layer": "workqueue", "locked": True}, {"NUMBA_THREADING_LAYER": "workqueue"}, "Unset it"),
        ("threads", {"torch": 64}, {}, "torch.set_num_threads(4)"),
        ("threads", {"most": 2}, {}, "NUMBA_NUM_THREADS"),
        ("cpu", {"register_bytes": 32}, {}, "AVX2 without AVX-512"),
        ("cpu", {"register_bytes": 16}, {}, "no AVX2"),
        ("cpu", {"register_bytes": 16}, {"FASTPOOL_REGISTER_BYTES": "16"}, "Unset it"),
        ("cpu", {"huge_pages": {"mode": "madvise", "malloc_asks": False}}, {}, "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"),
        ("cpu", {"huge_pages": {"mode": "never", "malloc_asks": None}}, {}, "huge pages are off"),
        ("cpu", {}, {"NUMBA_DISABLE_JIT": "1"}, "NUMBA_DISABLE_JIT"),
        ("cuda", {"devices": ["GPU"]}, {}, "built without CUDA"),
        ("cuda", {"devices": ["GPU"], "driver": "11.0", "torch_built_for": "13.0"}, {}, "A newer driver"),
        ("cuda", {"devices": ["GPU"], "torch_built_for": "13.0", "extra": "0.30", "smoke_test": FAILED}, {}, "no kernels"),
    ],
)
def test_advice(where, values, environment, words):
    report = copy.deepcopy(HEALTHY)
    report[where].update(values)
    (sentence,) = doctor.advice(report, environment)
    assert words in sentence


@pytest.mark.parametrize(
    ("mode", "asks"), [("madvise", True), ("madvise", None), ("always", False), (None, None)], ids=["asked", "not-glibc", "always", "mac"]
)
def test_no_advice_on_memory(mode, asks):
    report = copy.deepcopy(HEALTHY)
    report["cpu"]["huge_pages"] = {"mode": mode, "malloc_asks": asks}
    assert list(doctor.advice(report, {})) == []


def test_neon_is_no_cpu_without_avx2():
    report = copy.deepcopy(HEALTHY)
    report["cpu"].update(register_bytes=16, features=["neon"])
    assert list(doctor.advice(report, {})) == []


def test_a_containers_cores(monkeypatch):
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    for text, expected in (("max 100000\n", 64), ("250000 100000\n", 3), ("9900000 100000\n", 64), (None, 64)):
        monkeypatch.setattr(doctor, "_text", lambda _, text=text: text)
        assert doctor.cores() == expected


class _Library:
    """As much of a driver of CUDA 13.1 with two devices as is asked for."""

    def __init__(self, initialises):
        self.initialises = initialises

    def cuDriverGetVersion(self, number):  # noqa: N802
        number._obj.value = 13010
        return 0

    def cuInit(self, flags):  # noqa: N802
        return 0 if self.initialises else 100

    def cuDeviceGetCount(self, number):  # noqa: N802
        number._obj.value = 2
        return 0

    def cuDeviceGetName(self, name, size, device):  # noqa: N802
        name.value = f"GPU {device}".encode()
        return 0


@pytest.mark.parametrize(("initialises", "devices"), [(True, ["GPU 0", "GPU 1"]), (False, [])])
def test_a_driver(initialises, devices, monkeypatch):
    monkeypatch.setattr(doctor, "ctypes", types.SimpleNamespace(**{**vars(ctypes), "CDLL": lambda name: _Library(initialises)}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = doctor._cuda()
    assert (found["driver"], found["devices"]) == ("13.1", devices)
