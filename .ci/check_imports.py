"""Imports point one way: bench, tests -> fastpool -> kernels, and kernels never import torch.

ruff's banned-api and import-linter do not see that kernels/ is imported as fastpool.kernels, so this reads the imports itself.
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FORBIDDEN = {"kernels": ("torch", "fastpool", "bench", "tests"), "fastpool": ("bench", "tests")}
# kernels/ and bench/ are packages inside fastpool once installed.
INSIDE = {"kernels": ("fastpool", "kernels"), "bench": ("fastpool", "bench"), "fastpool": ("fastpool",)}


def imported(path: Path, tree: ast.AST):
    """(line, dotted name relative to the checkout) of every import, also those inside functions."""
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    package = (*INSIDE[folder], *rest)[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *filter(None, [node.module])))
            names = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            for inner in ("fastpool.kernels", "fastpool.bench"):
                if f"{name}.".startswith(f"{inner}."):
                    name = name.removeprefix("fastpool.")
            yield node.lineno, name


def main() -> int:
    wrong = 0
    for folder, forbidden in FORBIDDEN.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            for line, name in imported(path, ast.parse(path.read_text())):
                if name.split(".")[0] in forbidden:
                    print(f"{path.relative_to(ROOT)}:{line}: {folder} must not import {name}")
                    wrong += 1
    print("imports point one way" if not wrong else f"{wrong} imports point the wrong way")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
