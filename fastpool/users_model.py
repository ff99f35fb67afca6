"""What the subcommands of ``fastpool`` take of a user's model: the file and name that make it, and the shapes of its input."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import click
from torch import nn


class Shapes(click.ParamType):  # type: ignore[type-arg]
    """8x3x224x224, or several of a model with several inputs, by commas -> tuples of sizes."""

    name = "SHAPE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[tuple[int, ...], ...]:
        if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*(,[1-9]\d*(x[1-9]\d*)*)*", value):
            self.fail(f"{value!r} is no shape: sizes from 1 with x between them, as in 8x3x224x224", param, ctx)
        return tuple(tuple(map(int, shape.split("x"))) for shape in value.split(","))


class Place(NamedTuple):
    """A module of a Python file, or what makes one."""

    file: Path
    name: str
    module: str | None = None
    """By which the file is imported, if that was asked for."""


class Factory(click.ParamType):  # type: ignore[type-arg]
    """FILE:FACTORY, or MODULE:FACTORY of a module that can be imported from here."""

    name = "FILE:FACTORY"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Place:
        file, _, name = value.rpartition(":")
        if not file or not name.isidentifier():
            self.fail(f"{value!r} names no model: a file, a colon, and a module, its class or a function, as in model.py:build", param, ctx)
        if Path(file).is_file():
            return Place(Path(file).absolute(), name)
        found = _file_of(file)
        if found is None:
            self.fail(f"there is no file {file}, nor a module of that name", param, ctx)
        return Place(Path(found), name, file)


def _file_of(module: str) -> str | None:
    """Where a module lies that a program started here could import."""
    sys.path.insert(0, os.getcwd())
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # of a package that is none, or no name at all
        return None
    finally:
        sys.path.remove(os.getcwd())
    return spec.origin if spec and spec.origin and spec.origin.endswith(".py") else None


def in_words(place: Place, what: str, error: BaseException) -> click.ClickException:
    """A sentence on an exception of the user's code, with the line of the user's file that led to it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(place.file)]
    line = f", line {lines[-1]}" if lines else ""
    if isinstance(error, SyntaxError) and error.filename == str(place.file):
        line = f", line {error.lineno}"
    return click.ClickException(f"{what} failed: {type(error).__name__}: {error} ({place.file.name}{line})")


def _imported(place: Place) -> Any:
    """The file as a module, as ``python FILE`` or ``python -m MODULE`` would, but for its ``if __name__ == "__main__"``."""
    if place.module:
        sys.path.insert(0, os.getcwd())
        return importlib.import_module(place.module)
    # A name that shadows nothing: the file may be called types.py.
    spec = importlib.util.spec_from_file_location("fastpool_users_model", place.file)
    if spec is None or spec.loader is None:
        raise click.ClickException(f"{place.file.name} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path[:0] = [str(place.file.parent), os.getcwd()]  # its own imports: files beside it, packages of where the user stands
    spec.loader.exec_module(module)
    return module


def load(place: Place) -> nn.Module:
    """What the user's file makes."""
    try:
        module = _imported(place)
    except click.ClickException:
        raise
    except Exception as error:  # of the user's code
        raise in_words(place, f"importing {place.file.name}", error) from error
    made = getattr(module, place.name, None)
    if made is None:
        known = [
            name for name, value in vars(module).items() if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
        ]
        raise click.ClickException(f"{place.file.name} has no {place.name}; it has {', '.join(known) or 'nothing of the kind'}")
    if not isinstance(made, nn.Module) and callable(made):
        try:
            made = made()
        except Exception as error:  # likewise
            raise in_words(place, f"{place.name}()", error) from error
    if not isinstance(made, nn.Module):
        raise click.ClickException(f"{place.name} of {place.file.name} is of type {type(made).__name__}, not a torch.nn.Module")
    return made
