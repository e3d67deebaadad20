"""A night in a few lines that somebody understands who was woken by them, and the history as a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from fixtures.core.measurement import readable
from reports import verdict
from reports.compare import Rebound, Shift
from reports.escape import inline
from reports.nights import kinds
from reports.nights.history import History
from reports.nights.judging import Finding
from reports.nights.night import Against, Report
from reports.nights.series import Key, Kind

MOST = 8  # lines of one sort; the pages have them all


def night(report: Report) -> list[str]:
    """What a night came to, the worst first."""
    return [
        f"night {report.night.name}: {report.headline}",
        f"on {kinds.machine_words(report.night.kind)}; {kinds.version_words(report.night.kind)}",
        report.night.headline,
        *_against(report),
        *_listed("newly failing", (_failing(shift, role) for shift, role in report.failing)),
        *_listed("no longer run", (_check(r.target_id, f"{r.suite}: {r.check}", r.case) for r in report.lost)),
        *_listed(
            "no longer held against a bound",
            (f"{_check(r.target_id, f'{r.suite}: {r.check}', r.case)}, {quantity}" for r, quantity in report.unheld),
        ),
        *_listed("worse", map(_finding, report.judgement.regressions)),
        *_listed("better", map(_finding, report.judgement.improvements)),
        *_listed(
            "failing by a bound that was moved, not by a number",
            (_check(s.after.target_id, f"{s.after.suite}: {s.after.check}", s.after.case) for s in report.by_bound),
        ),
        *_listed("bounds that allow more", map(_loosened, report.loosened)),
        *_listed("not measured tonight", _gone(report)),
        *_checkpoints(report),
        *_unsure(report),
        *_later(report),
        *(f"note: {inline(note, 600)}" for note in report.notes),
    ]


def history(found: History) -> list[str]:
    """A row per night, oldest first, with the marks of the baselines; kinds of machine by number, named below."""
    nights = found.nights()
    numbers: dict[Kind, int] = {}
    for each in nights:
        numbers.setdefault(each.kind, len(numbers) + 1)
    roles = _roles(found)
    rows = [("night", "kind", "checks", "judged", "baseline")]
    for each in nights:
        outcomes = ", ".join(f"{number} {outcome}" for outcome, number in sorted(each.outcomes.items()))
        judged = found.judged.get(each.name)
        said = f"{judged.verdict}: {judged.note}" if judged else "not judged"
        rows.append((each.name, f"[{numbers[each.kind]}]", outcomes, inline(said, 90), roles.get(each.name, "")))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows] if nights else ["no night yet"]
    lines += [f"[{n}] {kinds.machine_words(kind)}; {kinds.version_words(kind)}" for kind, n in numbers.items()]
    return lines + [f"note: {inline(note, 600)}" for note in found.notes]


def _roles(found: History) -> dict[str, str]:
    """What baselines nights are or were, with the reason of the last move to them."""
    said = {}
    for mark in found.marks:
        now = [
            word
            for word, frozen in (("accepted", False), ("frozen", True))
            if next((m for m in reversed(found.marks) if m.kind == mark.kind and (m.frozen or not frozen)), 0) is mark
        ]
        words = " and ".join(now) or "accepted before"
        said[mark.night] = f"{words}, by {inline(mark.who, 40)}: {inline(mark.reason, 120)}"
    return said


def _against(report: Report) -> Iterator[str]:
    if not report.against:
        if report.stranger is not None:
            before = report.stranger.night
            changed = "; ".join(kinds.differences(before.kind, report.night.kind))
            yield f"the last night, {before.name}, was of another kind: {inline(changed, 400)}"
            lost, failing = report.unlike_stranger
            if lost or failing:
                yield (
                    f"of what it checked, {verdict.counted(lost, 'check')} no longer run and {failing} newly fail: "
                    f"python -m reports diff of runs/{before.name}.json and runs/{report.night.name}.json shows them"
                )
        yield "what later nights are held against is the first until you say otherwise: python -m reports accept"
        return
    yield f"held against {', '.join(map(_role, report.against))}"
    if all(other.mark is None for other in report.against):
        yield "no night of this kind was accepted yet: say which is good, and why, by python -m reports accept"


def _role(other: Against) -> str:
    if other.mark is None:
        return f"the {other.role} night {other.night.name}"
    return f"the {other.role} night {other.night.name} ({inline(other.mark.reason, 80)})"


def _listed(title: str, lines: Iterable[str]) -> Iterator[str]:
    said = list(lines)
    if said:
        yield f"{title}:"
        yield from (f"  {inline(line, 400)}" for line in said[:MOST])
        if len(said) > MOST:
            yield f"  and {len(said) - MOST} more"


def _failing(shift: Shift, role: str) -> str:
    after, before = shift.after, shift.before
    was = verdict.label(verdict.standing(before))
    why = verdict.why(after)
    where = _check(after.target_id, f"{after.suite}: {after.check}", after.case)
    return f"{where}: {was} in the {role} night" + (f"; now {why}" if why else "")


def _loosened(bound: Rebound) -> str:
    checks = verdict.counted(len(bound.results), "check")
    return f"{bound.check}, {bound.quantity}: {bound.before} -> {bound.after}, in {checks}"


def _check(target: str, check: str, case: str) -> str:
    return " ".join(part for part in (target, check, f"[{case}]" if case else "") if part)


def _finding(found: Finding) -> str:
    unit = f" {found.key.unit}" if found.key.unit else ""
    return f"{_key(found.key)}: {readable(found.value)}{unit}, expected {readable(found.expected)}: {found.why}"


def _gone(report: Report) -> Iterator[str]:
    """Quantities that are gone, but for those of checks that are no longer run, which are said already."""
    lost = {_check(r.target_id, f"{r.suite}: {r.check}", r.case) for r in report.lost}
    for key in (found.key for found in report.judgement.gone):
        if _check(key.target, key.check, key.case) not in lost:
            yield _key(key)


def _key(key: Key) -> str:
    return f"{_check(key.target, key.check, key.case)}, {key.quantity}"


def _checkpoints(report: Report) -> Iterator[str]:
    for target in _first(report.other_checkpoints):
        yield f"another checkpoint: {inline(target)}; its numbers are no longer those of the baseline and start anew"
    for target in _first(report.other_artifacts):
        yield f"other bytes: the artifact of {inline(target)} is not that of the baseline; its numbers are compared"


def _unsure(report: Report) -> Iterator[str]:
    found = report.judgement
    yield from _listed("worse, if the next night says so, too", map(_finding, found.suspects))
    if found.insufficient:
        yield f"{verdict.counted(len(found.insufficient), 'number')} had too few nights to tell noise from change"


def _later(report: Report) -> Iterator[str]:
    if report.later:
        others = verdict.counted(len(report.later), "night")
        yield f"{others} of this kind began later and were not looked at, the last {report.later[-1].name}"
        yield "if this is the newest night, a clock was wrong: this machine's now, or that night's then"


def _first(targets: Sequence[str]) -> Sequence[str]:
    return targets[:MOST]
