"""``python -m fastpool``: the ``fastpool`` command."""

from .cli import main

main()
