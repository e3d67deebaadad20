"""Long tables of a page: their first rows are HTML, the others data that a script makes rows of on demand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fixtures.core.measurement import readable
from fixtures.core.results import Table
from reports.charts import number

FIRST = 20  # rows that need no script


@dataclass
class LaterRows:
    """The rows that a page's tables have beyond what is HTML, by the key that the table's element names."""

    most: int  # rows of one table
    data: dict[str, list[list[object]]] = field(default_factory=dict)

    def add(self, table: Table) -> str:
        """Take the rows of ``table`` beyond the first; the key that they are found by, empty where there are none."""
        rows = [row for row in table.rows[FIRST : self.most] if len(row) == len(table.columns)]
        if not rows:
            return ""
        key = f"r{len(self.data)}"
        self.data[key] = [_column(cells) for cells in zip(*rows, strict=True)]
        return key


def _column(cells: Sequence[object]) -> list[object]:
    """A column: ``[[value, ...]]``, or where texts are among them ``[[place, ...], [text, ...]]``, each text once."""
    if all(cell is None or number(cell) is not None for cell in cells):
        return [[None if cell is None else _plain(cell) for cell in cells]]
    shown = list(map(_shown, cells))
    texts = {text: at for at, text in enumerate(dict.fromkeys(shown))}
    return [[texts[text] for text in shown], list(texts)]


def _plain(value: Any) -> float | int:
    """As many digits as are shown."""
    short = float(readable(value))
    return int(short) if short.is_integer() else short


def _shown(cell: object) -> str:
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return "-" if cell is None else readable(cell) if isinstance(cell, int | float) else str(cell)
