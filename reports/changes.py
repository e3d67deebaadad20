"""A comparison of two runs to read: as text, as Markdown, or as a page; all three say the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fixtures.core.measurement import Bound, Measurement, readable
from fixtures.core.results import Result, Run, Table
from reports import step_summary, verdict
from reports.compare import Comparison, Move, Shift
from reports.escape import inline, printable
from reports.escape import markdown as escaped
from reports.render import environment, margin_text, moment, shown

_NOTHING = "nothing changed"
_ROWS = 2000  # of a table on a page
_WIDEST = 72  # characters of a column of text


def headline(found: Comparison) -> str:
    """What changed in one line, the worst first; ``nothing changed`` where nothing did."""
    failing = [s for s in found.shifts if s.newly_failing]
    by_bound = sum(s.by_bound for s in failing)
    counts = [
        (len(failing) - by_bound, "newly failing"),
        (by_bound, "newly failing by a changed bound"),
        (len(found.shifts) - len(failing), "with another outcome"),
        (len(found.disappeared), "gone"),
        (len(found.appeared), "new"),
    ]
    said = [f"{verdict.counted(number, 'check')} {words}" for number, words in counts if number]
    for number, noun in (
        (len(found.moves), "number"),
        (len(found.rebounds), "bound"),
        (len(found.facts), "fact"),
    ):
        said += [f"{verdict.counted(number, noun)} changed"] if number else []
    return ", ".join(said) or _NOTHING


def sections(found: Comparison) -> list[Table]:
    """Every kind of change that there is, as a table each, the most urgent first."""
    listed = [
        Table("Verdicts", ("target", "before", "after"), found.verdicts),
        Table("Outcomes", ("", *_CHECK, "before", "after", "why"), tuple(map(_shift, found.shifts))),
        Table(
            f"Numbers that changed by more than {100 * found.above:.4g} %",
            (*_CHECK, "quantity", "before", "after", "change", "bound", "margin before", "margin after"),
            tuple(map(_move, found.moves)),
        ),
        Table(
            "Bounds that changed (the limits, not what was measured)",
            ("", "check", "quantity", "before", "after", "for"),
            tuple(
                (
                    b.way,
                    b.check,
                    b.quantity,
                    _bound(b.before),
                    _bound(b.after),
                    verdict.counted(len(b.results), "check"),
                )
                for b in found.rebounds
            ),
        ),
        Table("Checks that are gone", (*_CHECK, "was"), tuple(_lone(found.disappeared, found.after))),
        Table("New checks", (*_CHECK, "is"), tuple(_lone(found.appeared, found.before))),
        Table(
            "What differs in machine, versions, commit and subjects",
            ("what", "before", "after"),
            tuple((fact.name, _said(fact.before), _said(fact.after)) for fact in found.facts),
        ),
    ]
    return [table for table in listed if table.rows]


def text(found: Comparison) -> str:
    """The comparison for a terminal."""
    lines = [headline(found), *_notes(found)]
    for table in sections(found):
        rows = [[inline(cell, _WIDEST) for cell in row] for row in (table.columns, *table.rows)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["", printable(table.title)]
        lines += [f"  {'  '.join(map(str.ljust, row, widths))}".rstrip() for row in rows]
    return "\n".join(lines) + "\n"


def markdown(found: Comparison) -> str:
    """The comparison for the summary of a CI step, or a comment on a change."""
    head = f"# quantproof: {escaped(headline(found))}\n"
    notes = [f"{escaped(note)}\n" for note in _notes(found)]
    tables = [f"## {escaped(t.title)}\n\n{step_summary.table(t.columns, t.rows)}" for t in sections(found)]
    return step_summary.fitting(first=[head, *notes], middle=tables, last=[])


def page(found: Comparison) -> str:
    """The comparison as one HTML page without outside parts and without a script."""
    context: dict[str, Any] = {
        "headline": headline(found),
        "notes": list(_notes(found)),
        "tables": sections(found),
        "rows": _ROWS,
        "alarming": ("newly failing", "DISPROVED", verdict.label("failed"), verdict.label("error")),
    }
    return environment().get_template("diff.html").render(context).lstrip()


_CHECK = ("target", "check")


def _check(result: Result) -> tuple[str, str]:
    case = result.case or result.modality or ""
    return result.target_id or "-", f"{result.suite}: {result.check}{f' ({case})' if case else ''}"


def _shift(shift: Shift) -> tuple[str, ...]:
    before, after = verdict.standing(shift.before), verdict.standing(shift.after)
    if shift.by_bound:
        kind = "by a changed bound"
    elif shift.newly_failing:
        kind = "newly failing"
    elif before in ("failed", "error") and after == "passed":
        kind = "no longer failing"
    else:
        kind = "changed"
    return (kind, *_check(shift.after), verdict.label(before), verdict.label(after), verdict.why(shift.after))


def _move(move: Move) -> tuple[str, ...]:
    old, new = move.before, move.after
    named = new or old
    bounds = [_bound(m.bound) for m in (old, new) if m is not None]
    return (
        *_check(move.result),
        named.quantity if named else "",
        *_values(old, new),
        _change(move),
        " -> ".join(dict.fromkeys(bounds)),
        margin_text(old) if old else "",
        margin_text(new) if new else "",
    )


def _values(old: Measurement | None, new: Measurement | None) -> tuple[str, str]:
    """Both values, with digits enough to tell them apart."""
    said = ["not measured" if m is None else f"{shown(m.value)} {m.unit}".rstrip() for m in (old, new)]
    if old and new and said[0] == said[1]:
        said = [f"{m.value!r} {m.unit}".rstrip() for m in (old, new)]
    return said[0], said[1]


def _change(move: Move) -> str:
    if move.change is None:
        return "new" if move.before is None else "gone" if move.after is None else move.toward
    sign = "+" if move.change > 0 else "-"
    amount = "from zero" if math.isinf(move.change) else f"{sign}{verdict.percent(move.change)}"
    return f"{amount} {move.toward}".rstrip()


def _bound(bound: Bound | None) -> str:
    return "none" if bound is None else f"{bound.words} {readable(bound.limit)}"


def _lone(results: Sequence[Result], other: Run) -> Iterator[tuple[str, ...]]:
    """Checks that one run lacks; those of a target that it lacks as a whole in one row."""
    known = {r.target_id for r in other.results}
    strange = dict.fromkeys(r.target_id for r in results if r.target_id and r.target_id not in known)
    for target in strange:
        yield target, "all of this target", _tally(r for r in results if r.target_id == target)
    for result in results:
        if result.target_id not in strange:
            why = verdict.why(result)
            outcome = verdict.label(verdict.standing(result))
            yield *_check(result), f"{outcome}: {why}" if why else outcome


def _tally(results: Iterable[Result]) -> str:
    tally = Counter(verdict.standing(r) for r in results)
    return ", ".join(f"{tally[o]} {verdict.label(o)}" for o in sorted(tally, key=verdict.badness))


def _said(fact: object) -> str:
    return "not said" if fact is None else shown(fact)


def _notes(found: Comparison) -> Iterator[str]:
    """Which runs these are, and what makes them hard to compare."""
    for name, run in (("before", found.before), ("after", found.after)):
        about = run.about
        started = moment(about["started"]) if about.get("started") else "at an unknown time"
        status = about.get("exit_status", 0)
        ended = "" if status in (0, 1) else f"; it did not end as it should (pytest's exit status {inline(status)})"
        yield f"{name}: {inline(started)}, {verdict.headline(run)}{ended}"
    if found.strangers:
        yield "The two runs have no check in common."
