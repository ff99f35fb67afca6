"""New Python processes: for what happens once in a process, or between two."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def start(code, tree=ROOT, cwd=None, **environment):
    """A new process of ``code`` with ``tree`` as its checkout; an environment variable that is None is unset."""
    environment = {**os.environ, "PYTHONPATH": str(tree), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=cwd or tree,
        env={name: value for name, value in environment.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """The last line that it prints; an error if it fails, or hangs."""
    try:
        out, error = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, error
    return out.strip().splitlines()[-1]


def run(code, tree=ROOT, cwd=None, **environment):
    """The last line that a new process prints."""
    return finish(start(code, tree, cwd, **environment))


def command(*arguments, cwd=None, **environment):
    """(exit status, stdout, stderr) of ``fastpool`` as a user types it."""
    environment = {**os.environ, **environment}
    done = subprocess.run(
        [sys.executable, "-m", "fastpool", *map(str, arguments)],
        cwd=cwd,
        env={name: value for name, value in environment.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=600,
        encoding="utf-8",
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def _loads(layer):
    try:
        importlib.import_module(f"numba.np.ufunc.{layer}")
    except ImportError:
        return False
    return True


LAYERS = [name for name, module in {"omp": "omppool", "tbb": "tbbpool", "workqueue": "workqueue"}.items() if _loads(module)]
"""Numba's threading layers that this machine has."""
