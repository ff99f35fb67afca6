"""Compiled code in a second process and after an edit; where there is nowhere to keep it; what import costs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

USE = """
import torch, fastpool.functional as F
from fastpool.kernels import compile
x = torch.randn(1, 2, 40, 40, requires_grad=True)
{threads}
F.max_pool2d(x, 2).sum().backward()
F.avg_pool2d(x.detach(), 2)
F.l2_pool2d(x.detach(), 2)
print(sorted(compile.compiled_here))
"""


def run(code, tree=ROOT, **environment):
    """The last line that a new process prints, with ``tree`` as its checkout."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


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
    assert first.count("contiguous.forward") == 3
    assert first.count("contiguous.backward") == 1
    return cache


def test_a_second_process_compiles_nothing(checkout, filled):
    for threads in (1, 2):
        assert run(USE.format(threads=f"torch.set_num_threads({threads})"), checkout, FASTPOOL_CACHE_DIR=str(filled)) == "[]"


@pytest.mark.parametrize(
    ("source", "recompiled"),
    [
        ("kernels/pool/max.py", ["contiguous.backward", "contiguous.forward"]),
        ("kernels/pool/lp.py", ["contiguous.forward"]),
        ("kernels/simd.py", ["contiguous.backward", "contiguous.forward", "contiguous.forward", "contiguous.forward"]),
        ("kernels/cpu/contiguous.py", ["contiguous.backward", "contiguous.forward", "contiguous.forward", "contiguous.forward"]),
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
    tree = tmp_path / "tree"
    shutil.copytree(checkout, tree)
    source = tree / "kernels/pool/avg.py"
    source.write_text(source.read_text().replace("return total / count", "return total / count + count"))
    code = "import torch, fastpool.functional as F; print(F.avg_pool2d(torch.ones(1, 1, 2, 2), 2).item())"
    assert run(code, tree, FASTPOOL_CACHE_DIR=str(filled)) == "5.0"


def test_a_torn_file_is_compiled_anew(checkout, filled, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(filled, cache)
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert run(USE.format(threads="torch.set_num_threads(1)"), checkout, FASTPOOL_CACHE_DIR=str(cache)).count("forward") == 3


def test_without_a_place_for_a_cache(checkout):
    """No home directory, nothing writable: it compiles and runs all the same."""
    code = USE.format(threads="torch.set_num_threads(1)")
    environment = {"HOME": "/nonexistent", "XDG_CACHE_HOME": "/proc/nowhere", "FASTPOOL_CACHE_DIR": ""}
    assert run(code, checkout, **environment).count("forward") == 3


def test_import_brings_in_no_compiler():
    """Numba takes as long to import as the whole budget of 0.3 s: it comes with the first pooling."""
    code = "import sys, fastpool; print([m for m in ('numba', 'llvmlite', 'click', 'rich') if m in sys.modules])"
    assert run(code) == "[]"
