"""The verdicts as lines of text: a row per target, a column per suite."""

from __future__ import annotations

from collections.abc import Sequence

from fixtures.core.results import Run
from reports.verdict import Verdict, cell, own, suites, verdicts

Line = tuple[str, Verdict | None]


def lines(run: Run, width: int | None = None) -> list[Line]:
    """The verdict table, each row with its verdict; a list per target where ``width`` has no room for it."""
    found = verdicts(run)
    table = _table(found)
    if width is not None and any(len(text) > width for text, _ in table):
        table = _list(found)
    if not found:
        table = [("No target was checked.", None)]
    mine = own(run.results)
    return table + ([(f"about no target: {cell(mine)}", None)] if mine else [])


def text(run: Run, width: int | None = None) -> str:
    """``lines`` as one string."""
    return "\n".join(line for line, _ in lines(run, width))


def _table(found: Sequence[Verdict]) -> list[Line]:
    columns = suites(r for verdict in found for r in verdict.results)
    rows = [["target", *columns, "verdict"]]
    rows += [[v.target, *(_cell(v, suite) for suite in columns), str(v)] for v in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return [(padded[0], None), *zip(padded[1:], found, strict=True)]


def _list(found: Sequence[Verdict]) -> list[Line]:
    listed: list[Line] = []
    for verdict in found:
        listed.append((f"{verdict.target}: {verdict}", verdict))
        listed += [(f"  {suite}: {_cell(verdict, suite)}", None) for suite in suites(verdict.results)]
    return listed


def _cell(verdict: Verdict, suite: str) -> str:
    return cell(r for r in verdict.results if r.suite == suite)
