"""A table with a number per layer and linear, seen as a heat map: where in the model the error sits."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from fixtures.core.measurement import readable
from fixtures.core.results import Result, Table
from reports.charts import Chart, number, text

_NUMBERED = re.compile(r"(.*?)[.\s/]*(\d+)")
_FEW = 12  # layers; cells of a map this narrow have room for their number
_ALIKE = 0.05  # of the highest value: what differs by less has one colour
_PLACES = ("linear", "group")
_SAYS = {  # what a title measures, and what a reader should hold it against
    "Error per layer": "largest rounding error, in half steps of the grid: up to 1 is what rounding may cost",
    "Frobenius error per layer": "error of the weights as a whole, relative to them",
    "Clipped weights per layer": "share of the weights beyond their grid",
    "Search gain per layer": "output error relative to round-to-nearest: below 1 the search gained",
}
_Places = dict[tuple[str, str], float]  # (linear, layer) -> value


def heatmap(table: Table, result: Result) -> Chart | None:
    """``table`` as a heat map; None unless it has columns ``layer``, ``linear`` or ``group``, and one of numbers."""
    columns = [column.casefold() for column in table.columns]
    linear = next((columns.index(name) for name in _PLACES if name in columns), None)
    rows = [row for row in table.rows if len(row) == len(columns)]
    value = _value_column(columns, rows)
    if "layer" not in columns or linear is None or value is None:
        return None
    layer, tower = columns.index("layer"), columns.index("tower") if "tower" in columns else None

    towers: dict[str, _Places] = {}
    for row in rows:
        found = number(row[value])
        if found is None:
            continue
        prefix, index = _split(row[layer])
        places = towers.setdefault(prefix if tower is None else str(row[tower]), {})
        place = (str(row[linear]), index)
        places[place] = max(found, places.get(place, -math.inf))  # the worst, where a place is named twice
    if not towers:
        return None
    unit = table.columns[value]
    return Chart(
        name=table.title,
        title=f"{table.title}: {_SAYS.get(table.title, unit)}",
        finding=_finding(towers, unit),
        traces=tuple(_trace(at, name, places, unit) for at, (name, places) in enumerate(towers.items())),
        layout=_layout(towers, unit),
        sources=(result,),
        height=5 + 2 * sum(len(_linears(places)) + 2 for places in towers.values()),
        wide=True,
    )


def _finding(towers: dict[str, _Places], unit: str) -> str:
    worst, name, (linear, layer) = max((v, n, place) for n, places in towers.items() for place, v in places.items())
    values = sorted(v for places in towers.values() for v in places.values())
    if values[0] == worst:
        return f"All {len(values)} values are {readable(worst)} {unit}."
    middle = readable(values[len(values) // 2])
    where = " ".join(part for part in (name, "layer", layer, linear) if part)
    return f"The highest of {len(values)} values is {readable(worst)} {unit}, at {where}; the median is {middle}."


def _trace(at: int, tower: str, places: _Places, unit: str) -> dict[str, object]:
    layers, linears = _layers(places), _linears(places)
    few = {"texttemplate": "%{z:.3~g}"} if len(layers) <= _FEW else {}
    axis = str(at + 1) if at else ""
    return {
        "type": "heatmap",
        "name": text(tower or "model"),
        "x": [text(layer) for layer in layers],
        "y": [text(linear) for linear in linears],
        "z": [[places.get((linear, layer)) for layer in layers] for linear in linears],
        "meta": text(unit),
        "hovertemplate": "<b>%{fullData.name} layer %{x} %{y}</b><br>%{z:.4~g} %{meta}<extra></extra>",
        "hoverongaps": False,
        "coloraxis": "coloraxis",
        "xgap": 1 if len(layers) <= 100 else 0,
        "ygap": 1,
        "xaxis": f"x{axis}",
        "yaxis": f"y{axis}",
    } | few


def _layout(towers: dict[str, _Places], unit: str) -> dict[str, object]:
    """An axis of layers and one of linears per tower, one above the other, as high as they have linears."""
    sizes = [len(_linears(places)) + 2 for places in towers.values()]  # two for the axis's own text
    colours: dict[str, object] = {"colorbar": {"title": {"text": text(unit), "side": "right"}}}
    values = [value for places in towers.values() for value in places.values()]
    if max(values) - min(values) <= _ALIKE * abs(max(values)):  # else a thousandth would look like all the difference
        colours |= {"cmin": min(0.0, *values), "cmax": max(0.0, *values) or 1.0}
    layout: dict[str, object] = {"coloraxis": colours}
    top = 1.0
    for at, (name, size) in enumerate(zip(towers, sizes, strict=True)):
        axis, share = str(at + 1) if at else "", size / sum(sizes)
        bottom = top - share * (size - 2) / size
        layout[f"yaxis{axis}"] = {
            "domain": [max(bottom, 0.0), top],
            "type": "category",
            "autorange": "reversed",
            "anchor": f"x{axis}",
            "automargin": True,
        }
        layout[f"xaxis{axis}"] = {
            "type": "category",
            "anchor": f"y{axis}",
            "title": {"text": f"{text(name)} layer"},
            "nticks": 30,
            "tickangle": 0,
        }
        top -= share
    return layout


def _layers(places: _Places) -> list[str]:
    return sorted({layer for _, layer in places}, key=lambda word: (not word.isdigit(), word.zfill(9)))


def _linears(places: _Places) -> list[str]:
    return list(dict.fromkeys(linear for linear, _ in places))


def _value_column(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> int | None:
    """The first column of numbers that names no place."""
    candidates = [i for i, column in enumerate(columns) if column not in {"layer", "tower", *_PLACES}]
    return next((i for i in candidates if any(number(row[i]) is not None for row in rows)), None)


def _split(layer: object) -> tuple[str, str]:
    """``model.layers.12`` as its tower and its number."""
    match = _NUMBERED.fullmatch(str(layer))
    return (match[1], match[2]) if match else ("", str(layer))
