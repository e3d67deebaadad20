"""What a run says of the checks' own power: which faults they catch, how small, and where in the page that stands."""

from __future__ import annotations

import re
from collections.abc import Iterable

from fixtures.core.results import Result, Table

# Titles that meta tests give their tables, in the order of the page, with what a reader should know of each.
SHOWN = {
    "Kill matrix over all artifacts": "Every fault, in every artifact that can have it: how many each check catches.",
    "Smallest dose seen": "Faults in doses: the smallest that each check still sees, as a share.",
    "Smallest dose heard": "Answers that go wrong, in doses: of one token, of each prompt, of a share of the prompts.",
    "Doses heard in answers": "The same faults, heard in next-token distributions.",
    "Limits times ten": "Each limit ten times as strict, and ten times as lax.",
    "Surviving mutants": "Small changes of the checks' own code that no test noticed.",
    "Fuzzing": "Broken files, and what became of them.",
    "Failure catalogue": "What went wrong in the wild, and where it is planted here.",
}
_SHARE = re.compile(r"(\d+)/(\d+)")


def power(results: Iterable[Result]) -> list[tuple[Table, str]]:
    """The tables of the checks' power, each with its caption; tables of one title and the same columns become one."""
    pooled: dict[str, Table] = {}
    for result in results:
        for table in result.tables:
            known = pooled.get(table.title)
            if table.title not in SHOWN or not table.rows or (known and known.columns != table.columns):
                continue
            pooled[table.title] = Table(table.title, table.columns, ((*known.rows,) if known else ()) + table.rows)
    return [(pooled[title], caption) for title, caption in SHOWN.items() if title in pooled]


def shade(value: object) -> str:
    """How a cell such as ``13/15`` looks: all were caught, or only some; anything else as it is."""
    match = _SHARE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return ""
    caught, of = map(int, match.groups())
    return "passed" if caught == of else "xfailed" if caught else "none"
