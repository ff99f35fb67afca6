"""Compiled code in a second process and after an edit; where there is nowhere to keep it; what import costs."""

import os
import shutil
import time

import pytest
from fastpool.kernels import compile
from processes import ROOT, finish, run, start

USE = """
import torch, fastpool.functional as F
from fastpool.kernels import compile
x = torch.randn(1, 4, 80, 80, requires_grad=True)
{threads}
F.max_pool2d(x, 2).sum().backward()
F.avg_pool2d(x.detach(), 2)
F.l2_pool2d(x.detach(), 2)
print(sorted(compile.compiled_here))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, to edit."""
    tree = tmp_path_factory.mktemp("checkout")
    for folder in ("fastpool", "kernels"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tree


@pytest.fixture(scope="module")
def filled(checkout, tmp_path_factory):
    """A cache that one process has filled from that copy."""
    cache = tmp_path_factory.mktemp("cache")
    first = run(USE.format(threads="torch.set_num_threads(2)"), checkout, FASTPOOL_CACHE_DIR=str(cache))
    assert first.count("rows.forward_apart") == 3
    assert first.count("rows.backward_apart") == 1
    return cache


def test_a_second_process_compiles_nothing(checkout, filled):
    for threads in (1, 2):
        assert run(USE.format(threads=f"torch.set_num_threads({threads})"), checkout, FASTPOOL_CACHE_DIR=str(filled)) == "[]"


@pytest.mark.parametrize(
    ("source", "recompiled"),
    [
        ("kernels/pool/max.py", ["rows.backward_apart", "rows.forward_apart"]),
        ("kernels/pool/lp.py", ["rows.forward_apart"]),
        ("kernels/simd.py", ["rows.backward_apart", "rows.forward_apart", "rows.forward_apart", "rows.forward_apart"]),
        ("kernels/cpu/rows.py", ["rows.backward_apart", "rows.forward_apart", "rows.forward_apart", "rows.forward_apart"]),
        # rows.py copies rows as it does.
        ("kernels/cpu/small.py", ["rows.backward_apart", "rows.forward_apart", "rows.forward_apart", "rows.forward_apart"]),
        ("kernels/cpu/contiguous.py", []),
    ],
)
def test_an_edit_recompiles_what_depends_on_it(source, recompiled, checkout, filled, tmp_path):
    tree, cache = tmp_path / "tree", tmp_path / "cache"
    shutil.copytree(checkout, tree)
    shutil.copytree(filled, cache)
    (tree / source).write_text((tree / source).read_text() + "\n# edited\n")
    assert run(USE.format(threads="torch.set_num_threads(1)"), tree, FASTPOOL_CACHE_DIR=str(cache)) == str(recompiled)


def test_an_edit_changes_the_result(checkout, filled, tmp_path):
    """What is run after an edit is the edited arithmetic."""
    tree, cache = tmp_path / "tree", tmp_path / "cache"
    shutil.copytree(checkout, tree)
    shutil.copytree(filled, cache)
    source = tree / "kernels/pool/avg.py"
    source.write_text(source.read_text().replace("return quotient(total, count)", "return quotient(total, count) + count"))
    code = "import torch, fastpool.functional as F; print(F.avg_pool2d(torch.ones(1, 1, 64, 64), 2)[0, 0, 0, 0].item())"
    assert run(code, tree, FASTPOOL_CACHE_DIR=str(cache)) == "5.0"


def test_a_torn_file_is_compiled_anew(checkout, filled, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(filled, cache)
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert run(USE.format(threads="torch.set_num_threads(1)"), checkout, FASTPOOL_CACHE_DIR=str(cache)).count("forward") == 3


HOMELESS = """
import pwd
def getpwuid(uid):
    raise KeyError(uid)
pwd.getpwuid = getpwuid
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"HOME": "/nonexistent", "XDG_CACHE_HOME": "/proc/nowhere", "FASTPOOL_CACHE_DIR": ""},
        {"HOME": None, "XDG_CACHE_HOME": None, "FASTPOOL_CACHE_DIR": None},
        {"HOME": None, "XDG_CACHE_HOME": None, "FASTPOOL_CACHE_DIR": "~/kernels"},
        {"HOME": "/proc", "XDG_CACHE_HOME": None, "FASTPOOL_CACHE_DIR": None},
    ],
    ids=["unwritable", "unset", "unset-tilde", "unwritable-home"],
)
def test_no_place_for_a_cache(environment, tmp_path):
    code = f"{HOMELESS}from fastpool.kernels import compile; print(compile.directory())"
    assert run(code, cwd=tmp_path, **environment) == "None"
    assert list(tmp_path.iterdir()) == []


def test_without_a_place_for_a_cache(checkout, tmp_path):
    """A read-only install, a user without a home directory: it compiles and runs all the same, and writes nothing anywhere near."""
    here, install = tmp_path / "here", tmp_path / "install"
    here.mkdir(mode=0o555)
    shutil.copytree(checkout, install)
    for path in (*install.rglob("*"), install):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(install.rglob("*"))
    code = HOMELESS + USE.format(threads="torch.set_num_threads(2)") + "print(compile.directory(), len(compile.compiled_here))"
    environment = {"HOME": None, "XDG_CACHE_HOME": None, "FASTPOOL_CACHE_DIR": None, "PYTHONDONTWRITEBYTECODE": "1"}
    assert run(code, install, cwd=here, **environment) == "None 5"
    assert list(here.iterdir()) == []  # not even by root, who may
    assert sorted(install.rglob("*")) == before


def test_in_a_home_that_may_not_be_entered(monkeypatch):
    """HOME=/root for another user, as in many a container."""
    plain = os.stat

    def stat(path, *more, **options):
        if str(path).startswith("/locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *more, **options)

    monkeypatch.setenv("FASTPOOL_CACHE_DIR", "/locked/kernels")
    monkeypatch.setattr(os, "mkdir", stat)
    monkeypatch.setattr(os, "stat", stat)
    assert compile.directory.__wrapped__() is None


def test_a_relative_directory_is_that_of_the_start(tmp_path):
    code = "from fastpool.kernels import compile; import os; print(compile.directory()); os.chdir('/'); print(compile.directory())"
    assert run(code, cwd=tmp_path, FASTPOOL_CACHE_DIR="kernels") == str(tmp_path / "kernels")


def test_what_no_process_uses_is_deleted(checkout, filled, tmp_path):
    """After 30 days, when a process next compiles; what a process loads is in use."""
    cache = tmp_path / "cache"
    shutil.copytree(filled, cache)
    now = time.time()
    used = sorted(cache.iterdir())
    for path in used:
        os.utime(path, (now, now - 29 * 24 * 3600))
    leavings = [cache / name for name in ("cpu.old-0123456789abcdef01234567.bin", "cpu.old-01234567-0123456789abcdef-x_9.tmp")]
    others = [cache / name for name in ("notes.txt", "weights-01234567.bin.txt", "-01234567.bin")]
    for path in (*leavings, *others):
        path.write_bytes(b"")
        os.utime(path, (now, now - 31 * 24 * 3600))
    assert run(USE.format(threads="torch.set_num_threads(2)"), checkout, FASTPOOL_CACHE_DIR=str(cache)) == "[]"
    assert all(path.stat().st_mtime > now - 60 for path in used)
    assert all(path.exists() for path in leavings)  # nothing was compiled
    code = "import torch, fastpool.functional as F; print(F.min_pool2d(torch.zeros(1, 1, 4, 4), 2).sum().item())"
    assert run(code, checkout, FASTPOOL_CACHE_DIR=str(cache)) == "0.0"
    assert not any(path.exists() for path in leavings)
    assert all(path.exists() for path in (*used, *others))


def test_pruning_beside_other_processes(checkout, tmp_path):
    """Two versions of the sources share a cache, each deletes the other's files all the time: both compile, and finish right."""
    other = tmp_path / "other"
    shutil.copytree(checkout, other)
    (other / "kernels/simd.py").write_text((other / "kernels/simd.py").read_text() + "\n# edited\n")
    code = """
import sys, threading, torch, torch.nn.functional as T, fastpool.functional as F
from fastpool.kernels import compile
torch.set_num_threads(1)
done = threading.Event()
def prune():
    while not done.wait(0.01):
        compile.prune(superseded=True)
pruning = threading.Thread(target=prune)
pruning.start()
x = torch.randn(1, 2, 40, 40)
same = [torch.equal(F.max_pool2d(x, k, 2), T.max_pool2d(x, k, 2)) for k in (1, 2, 3)]
done.set()
pruning.join()
print(same, len(compile.compiled_here))
"""
    both = [start(code, tree, FASTPOOL_CACHE_DIR=str(tmp_path / "cache")) for tree in (checkout, other)]
    assert [finish(process) for process in both] == ["[True, True, True] 3"] * 2


def test_import_brings_in_no_compiler():
    """Numba takes as long to import as the whole budget of 0.3 s: it comes with the first pooling."""
    code = "import sys, fastpool; print([m for m in ('numba', 'llvmlite', 'click', 'rich') if m in sys.modules])"
    assert run(code) == "[]"
