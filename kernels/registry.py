"""Families of one file a member: pool/, activation/."""

import importlib
import pkgutil
import sys


def by_name(package, kind):
    """Every ``kind`` in the modules of a package, which is being imported, by its ``name``."""
    found = {}
    for module in pkgutil.iter_modules(sys.modules[package].__path__, f"{package}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, kind):
                found[value.name] = value
    return found
