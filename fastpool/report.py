"""What ``optimize`` did with a model: a row a site."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from typing import Any

WIDTH = 110


@dataclass(frozen=True)
class Row:
    """A site of the model."""

    place: str
    """Its last layer's name."""
    stood: str
    """The layers that stood there, in their order."""
    stands: str = ""
    """What stands there now; "" where it was left alone."""
    law: str = "-"
    """The class of the law (fastpool.laws.KINDS) of its activation and pooling."""
    why: str = ""
    """Why it, or what stood before it, was left alone."""
    before_ms: float | None = None
    after_ms: float | None = None
    """Of the quickest new form; median, of what arrived from the example."""
    bytes_saved: int | None = None
    """Of maps that are no longer written and read again."""

    @property
    def changed(self) -> bool:
        return bool(self.stands)


@dataclass
class Report:
    """``print`` it."""

    training: bool
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is to be said of the whole."""
    before_ms: float | None = None
    after_ms: float | None = None
    """Of the whole model, if there was an example."""
    error: float | None = None
    torch_error: float | None = None
    """Largest differences of the new and of the original from float64: of outputs, and in training of gradients."""

    @property
    def changed(self) -> list[Row]:
        return [row for row in self.rows if row.changed]

    @property
    def speedup(self) -> float | None:
        """The original's time over the new one's."""
        return self.before_ms / self.after_ms if self.before_ms and self.after_ms else None

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "speedup": self.speedup}, indent=2)

    def __str__(self) -> str:
        from rich.console import Console  # 0.1 s that a program without a report need not wait

        text = io.StringIO()
        console = Console(file=text, width=WIDTH, highlight=False)
        if self.rows:
            console.print(self._table())
        done = len(self.changed)
        console.print(f"{done} of {len(self.rows)} sites rewritten, for {'training' if self.training else 'evaluation'}.", markup=False)
        if any(row.law == "never" for row in self.changed):
            console.print('Law "never": the two may not change places; the activation is evaluated as the pooling reads.', markup=False)
        if self.before_ms is not None and self.after_ms is not None:
            console.print(
                f"The whole: {_ms(self.before_ms)} ms before, {_ms(self.after_ms)} after, {self.speedup:.2f}x as fast.", markup=False
            )
        if self.error is not None:
            console.print(f"Largest error against float64: {self.error:.2g}; the original's {self.torch_error:.2g}.", markup=False)
        for note in self.notes:
            console.print(f"{note[:1].upper()}{note[1:]}.", markup=False)
        return text.getvalue().rstrip()

    def _table(self) -> Any:
        from rich import box
        from rich.table import Table

        made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for header in ("site", "what stood there", "what stands there, or why it was left", "law"):
            made.add_column(header, overflow="fold")
        for header in ("ms", "now", "MB saved"):
            made.add_column(header, justify="right", no_wrap=True)
        for row in self.rows:
            said = f"{row.stands}{'; ' + row.why if row.why else ''}" if row.changed else f"left: {row.why}"
            saved = "-" if row.bytes_saved is None else f"{row.bytes_saved / 1e6:.1f}"
            cells = (row.place, row.stood, said, row.law, _ms(row.before_ms), _ms(row.after_ms), saved)
            made.add_row(*(cell.replace("[", "\\[") for cell in cells))
        return made


def _ms(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}" if ms >= 0.1 else f"{ms:.3f}"
