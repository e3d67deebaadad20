"""Tables of a run as Markdown, and a README whose tables are those of a measured run.

A README says where a table comes from, between two comments, and ``python -m reports readme README.md`` fills it in::

    <!-- table: reports/measured/h200.json: memory: what | bytes -->
    <!-- end of table -->

Of several tables of that title (one per target) it shows all rows; of the columns those that are named, or all. Several
runs, joined by `` + ``, are shown as one. A title may be one of ``reports.gathered``, made of measurements.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fixtures.core.errors import UserError
from fixtures.core.measurement import readable
from fixtures.core.results import Run, Table
from reports import store
from reports.gathered import gathered

_CACHED = re.compile(r"-[0-9a-f]{16}\b")  # what tells artifacts of one recipe apart in the cache
_PLACE = re.compile(
    r"(?P<begin><!-- table: (?P<files>\S+\.json(?: \+ \S+\.json)*): "
    r"(?P<title>[^\n:]+?)(?:: (?P<columns>[^\n:]+?))? -->\n)"
    r"(?P<table>.*?)(?P<end><!-- end of table -->)",
    re.DOTALL,
)


def merged(run: Run, title: str) -> Table:
    """All tables of that title in one, in the run's order, each row under its target; equal rows once.

    Raises:
        UserError: when there is none, or their columns differ.
    """
    if (made := gathered(title, run.results)) is not None:
        return made
    found = [(result.target_id, table) for result in run.results for table in result.tables if table.title == title]
    if not found:
        titles = sorted({table.title for result in run.results for table in result.tables})
        raise UserError(f"the run has no table {title!r}; it has {', '.join(titles) or 'none'}")
    columns = found[0][1].columns
    if any(table.columns != columns for _, table in found):
        raise UserError(f"the tables {title!r} of the run have different columns")
    rows = dict.fromkeys((target, *row) for target, table in found for row in table.rows)
    return Table(title, ("target", *columns), tuple(rows))


def narrowed(table: Table, columns: Sequence[str]) -> Table:
    """The table with only some columns, in their order; rows that are then equal once.

    Raises:
        UserError: when it has no such column.
    """
    if unknown := [column for column in columns if column not in table.columns]:
        raise UserError(f"{table.title!r} has no column {unknown[0]!r}; it has {', '.join(table.columns)}")
    places = [table.columns.index(column) for column in columns]
    rows = dict.fromkeys(tuple(row[place] for place in places) for row in table.rows)
    return Table(table.title, tuple(columns), tuple(rows))


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown; numbers as a person reads them, nothing for what was not measured."""
    lines = [table.columns, ["---"] * len(table.columns), *([_cell(cell) for cell in row] for row in table.rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def filled(text: str, folder: Path) -> str:
    """``text`` with every table that it names taken from the run it names, its path relative to ``folder``.

    Raises:
        UserError: when a run cannot be read, lacks a table, or a place has no end.
    """
    if text.count("<!-- table:") != len(_PLACE.findall(text)):
        raise UserError("a <!-- table: FILE.json: TITLE --> has no <!-- end of table --> after it")

    def fill(place: re.Match[str]) -> str:
        runs = [store.load(folder / file) for file in place["files"].split(" + ")]
        table = merged(replace(runs[0], results=[result for run in runs for result in run.results]), place["title"])
        if place["columns"]:
            table = narrowed(table, [column.strip() for column in place["columns"].split("|")])
        return f"{place['begin']}\n{markdown(table)}\n{place['end']}"

    return _PLACE.sub(fill, text)


def _cell(value: str | float | int | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return _CACHED.sub("", value).replace("|", "\\|").replace("\n", " ")
    return f"{value:.0f}" if abs(value) >= 1000 else readable(float(value))
