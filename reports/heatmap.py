"""A table with a number per layer and linear, seen as grids: where in the model the error sits."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fixtures.core.measurement import readable
from fixtures.core.results import Table

SHADES = 10  # of the colour scale in report.css
_NUMBERED = re.compile(r"(.*?)[.\s/]*(\d+)")
_FEW = 12  # layers; cells of a grid this narrow have room for their number


@dataclass(frozen=True)
class Cell:
    """A coloured square: how dark, what hovering says, and its number where there is room."""

    shade: int
    title: str
    text: str


@dataclass(frozen=True)
class Grid:
    """One tower: a row per linear, a column per layer; None where a layer has no such linear."""

    tower: str
    layers: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


@dataclass(frozen=True)
class Heatmap:
    """Grids that share one scale of colours, from ``low`` to ``high``."""

    value: str
    low: str
    high: str
    grids: tuple[Grid, ...]


def heatmap(table: Table) -> Heatmap | None:
    """``table`` as a heat map; None unless it has columns ``layer``, ``linear`` and one of numbers."""
    columns = [column.casefold() for column in table.columns]
    if "layer" not in columns or "linear" not in columns:
        return None
    layer, linear = columns.index("layer"), columns.index("linear")
    tower = columns.index("tower") if "tower" in columns else None
    rows = [row for row in table.rows if len(row) == len(columns)]
    value = _value_column(columns, rows)
    if value is None:
        return None

    towers: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        number = _number(row[value])
        if number is None:
            continue
        prefix, index = _split(row[layer])
        name = prefix if tower is None else str(row[tower])
        cells = towers.setdefault(name, {})
        place = (str(row[linear]), index)
        cells[place] = max(number, cells.get(place, -math.inf))  # the worst, where a place is named twice
    found = [number for cells in towers.values() for number in cells.values()]
    if not found:
        return None
    low, high = min(found), max(found)
    grids = tuple(_grid(name, cells, low, high) for name, cells in towers.items())
    return Heatmap(table.columns[value], readable(low), readable(high), grids)


def _grid(tower: str, cells: dict[tuple[str, str], float], low: float, high: float) -> Grid:
    linears = list(dict.fromkeys(linear for linear, _ in cells))
    layers = sorted({layer for _, layer in cells}, key=lambda text: (not text.isdigit(), text.zfill(9)))

    def cell(linear: str, layer: str) -> Cell | None:
        number = cells.get((linear, layer))
        if number is None:
            return None
        share = (number - low) / (high - low) if high > low else 0.0
        text = f"{number:.2g}" if len(layers) <= _FEW else ""
        name = " ".join(filter(None, (tower, layer, linear)))
        return Cell(min(int(share * SHADES), SHADES - 1), f"{name}: {readable(number)}", text)

    return Grid(tower, tuple(layers), tuple((n, tuple(cell(n, layer) for layer in layers)) for n in linears))


def _value_column(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> int | None:
    """The first column of numbers that names no place."""
    places = {"layer", "linear", "tower"}
    candidates = [i for i, column in enumerate(columns) if column not in places]
    return next((i for i in candidates if any(_number(row[i]) is not None for row in rows)), None)


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _split(layer: object) -> tuple[str, str]:
    """``model.layers.12`` as its tower and its number."""
    match = _NUMBERED.fullmatch(str(layer))
    return match.groups() if match else ("", str(layer))  # type: ignore[return-value]
