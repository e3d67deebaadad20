"""A night held against the nights before: what newly fails, what is no longer checked, what became worse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from fixtures.core.results import Result, Run
from reports import verdict
from reports.compare import Comparison, Rebound, Shift
from reports.nights import kinds, marks
from reports.nights.history import History
from reports.nights.index import Entry
from reports.nights.judging import Judgement, judge
from reports.nights.marks import Judged
from reports.nights.series import Mark, Verdict

_RAN = ("passed", "failed", "xfailed", "xpassed")


@dataclass(frozen=True)
class Against:
    """A night that tonight is held against, and in which role."""

    role: str  # "accepted"
    night: Entry
    comparison: Comparison
    mark: Mark | None = None  # that made it a baseline


@dataclass(frozen=True)
class Report:
    """All that is to be said of a night."""

    night: Entry
    run: Run
    against: tuple[Against, ...]  # the baseline first; empty on the first night of a kind
    judgement: Judgement
    stranger: Against | None  # on the first night of a kind: the last one of another kind
    later: tuple[Entry, ...]  # nights of the kind that began later, which are not looked at
    notes: tuple[str, ...]  # what is wrong with the history

    @cached_property
    def failing(self) -> tuple[tuple[Shift, str], ...]:
        """Checks that fail and did not, each with the role of the first night that knew it otherwise."""
        found: dict[str, tuple[Shift, str]] = {}
        for other in self.against:
            for shift in other.comparison.shifts:
                if shift.newly_failing and not shift.by_bound:
                    found.setdefault(shift.after.id, (shift, other.role))
        for other in self.against[:1]:  # to list a failure as known excuses it in its run; a baseline moves by accept
            for shift in other.comparison.shifts:
                if (verdict.standing(shift.before), verdict.standing(shift.after)) == ("passed", "xfailed"):
                    found.setdefault(shift.after.id, (shift, other.role))
        for other in self.against[:1]:  # a new check that fails was never better; it fails its own run all the same
            for result in other.comparison.appeared:
                if verdict.standing(result) in ("failed", "error"):
                    found.setdefault(result.id, (Shift(_unseen(result), result), other.role))
        return tuple(found.values())

    @cached_property
    def by_bound(self) -> tuple[Shift, ...]:
        """Checks that fail by a bound that was moved, not by a number: said, and no regression."""
        failing = {shift.after.id for shift, _ in self.failing}
        shifts = [s for other in self.against[:1] for s in other.comparison.shifts if s.newly_failing and s.by_bound]
        return tuple(shift for shift in shifts if shift.after.id not in failing)

    @cached_property
    def lost(self) -> tuple[Result, ...]:
        """Checks that the baseline ran and tonight did not: who no longer looks finds nothing."""
        return _lost(self.against[0].comparison) if self.against else ()

    @cached_property
    def unheld(self) -> tuple[tuple[Result, str], ...]:
        """Quantities that the baseline held against a bound and that tonight's check, which ran, holds against none.

        Their bound is gone, or they are: who renames a quantity, or stops measuring it, starts its history anew.
        """
        if not self.against:
            return ()
        found = self.against[0].comparison
        unbound = [(r, b.quantity) for b in found.rebounds if b.after is None for r in b.results]
        gone = [(m.result, m.before.quantity) for m in found.moves if m.after is None and m.before and m.before.bound]
        return tuple((r, quantity) for r, quantity in (*unbound, *gone) if verdict.standing(r) == "passed")

    @cached_property
    def loosened(self) -> tuple[Rebound, ...]:
        """Bounds that allow more than the baseline's, or something else: said, and no regression of any number."""
        if not self.against:
            return ()
        return tuple(b for b in self.against[0].comparison.rebounds if b.way in ("looser", "another bound"))

    @cached_property
    def other_checkpoints(self) -> tuple[str, ...]:
        """Targets that are another checkpoint than the baseline's, whose numbers start anew."""
        return tuple(t for t, then, now in self._digests if kinds.identity(t, then) != kinds.identity(t, now))

    @cached_property
    def other_artifacts(self) -> tuple[str, ...]:
        """Targets whose artifact the suites now make of other bytes: its numbers are compared, and may say why."""
        changed = [t for t, then, now in self._digests if then.get("artifact") != now.get("artifact")]
        return tuple(target for target in changed if target not in self.other_checkpoints)

    @property
    def unlike_stranger(self) -> tuple[int, int]:
        """Checks that the last night, of another kind, ran and tonight did not; and those that newly fail.

        Its numbers are no measure for tonight's, but an upgrade is when checks go away.
        """
        if self.stranger is None:
            return 0, 0
        found = self.stranger.comparison
        return len(_lost(found)), sum(shift.newly_failing and not shift.by_bound for shift in found.shifts)

    @property
    def regressed(self) -> bool:
        """Whether the night is worse than what it is held against, in any way."""
        return bool(self.failing or self.lost or self.unheld or self.judgement.regressions)

    @property
    def word(self) -> Verdict:
        """What the night came to, for the history."""
        if self.night.failing:
            return "failing"
        if self.regressed:
            return "regressed"
        if not self.against:
            return "unjudged"
        return "improved" if self.judgement.improvements else "steady"

    @property
    def headline(self) -> str:
        """The night in one line."""
        counts = Counter(
            {
                "check newly failing": len(self.failing),
                "check no longer run": len(self.lost),
                "bound no longer held": len(self.unheld),
                "quantity worse": len(self.judgement.regressions),
            }
        )
        if self.regressed:
            said = [_counted(number, words) for words, number in counts.items() if number]
            return f"REGRESSED: {', '.join(said)}"
        if not self.against:
            return "no night of this kind before: nothing to compare with"
        better = len(self.judgement.improvements)
        return "no regression" + (f"; {_counted(better, 'quantity better')}" if better else "")

    def kept(self) -> Judged:
        """What the history keeps of it."""
        failing = f"{verdict.counted(self.night.failing, 'check')} failing; " if self.night.failing else ""
        regressed = tuple(finding.key for finding in self.judgement.regressions)
        return Judged(self.night.name, self.word, regressed, failing + self.headline)

    @property
    def _digests(self) -> list[tuple[str, dict[str, str], dict[str, str]]]:
        """Targets of both nights that tell their digests, with both."""
        if not self.against:
            return []
        then, now = self.against[0].night.subjects, self.night.subjects
        return [(target, dict(then[target]), dict(now[target])) for target in now if target in then]


def report(history: History, name: str) -> Report:
    """Hold a stored night against the others of its kind of machine and versions.

    Checks are held against the night accepted last, or before any was accepted the first one, against the frozen
    baseline, and against the night before: each of them stays where it is however long a failure lasts, but for the
    last, which knows what was mended meanwhile.

    Raises:
        UserError: when the night cannot be read.
    """
    night = history.night(name)
    same = [each for each in history.nights() if each.kind == night.kind]
    alike, later = ([each for each in same if each.name < name], [each for each in same if each.name > name])
    run = history.run(name)
    accepted, frozen = (_baseline(history, night, alike, frozen=frozen) for frozen in (False, True))
    names = [None if mark is None else mark.night for mark in (accepted, frozen)]
    judgement = judge(history.series(night.kind, night), name, *names)
    strangers = [each for each in history.nights() if each.name < night.name and not alike]
    against = tuple(_against(history, run, alike, accepted, frozen))
    stranger = Against("last", strangers[-1], Comparison(history.run(strangers[-1].name), run)) if strangers else None
    return Report(night, run, against, judgement, stranger, tuple(later), tuple(history.notes))


def _baseline(history: History, night: Entry, alike: Sequence[Entry], *, frozen: bool) -> Mark | None:
    """The mark that made a baseline of an earlier night: none is held against itself, or against what came after it."""
    earlier = [mark for mark in history.marks if mark.night < night.name]
    mark = marks.baseline(earlier, night.kind, frozen=frozen)
    if mark is None or any(mark.night == each.name for each in alike):
        return mark
    history.notes.append(f"the {'frozen' if frozen else 'accepted'} night {mark.night} is not among the runs any more")
    return None


def _against(
    history: History, run: Run, alike: Sequence[Entry], accepted: Mark | None, frozen: Mark | None
) -> Iterator[Against]:
    """The nights that tonight is held against, the baseline first, each once."""
    if not alike:
        return
    roles: dict[str, tuple[str, Mark | None]] = {}
    for role, mark in (("accepted", accepted), ("frozen", frozen)):
        if mark is not None:
            roles.setdefault(mark.night, (role, mark))
    if accepted is None:
        roles.setdefault(alike[0].name, ("first", None))
    roles.setdefault(alike[-1].name, ("last", None))
    known = {each.name: each for each in alike}
    for name, (role, mark) in roles.items():
        yield Against(role, known[name], Comparison(history.run(name), run), mark)


def _lost(found: Comparison) -> tuple[Result, ...]:
    """Checks that ran before and do not now."""
    skipped = [s.after for s in found.shifts if verdict.standing(s.after) == "skipped" and s.before.outcome in _RAN]
    return (*(r for r in found.disappeared if r.outcome in _RAN), *skipped)


def _unseen(result: Result) -> Result:
    """A check as it was before it existed."""
    return Result(result.id, "skipped", result.requirement, result.target)


def _counted(number: int, words: str) -> str:
    """``2 checks newly failing``, ``1 quantity worse``."""
    noun, _, rest = words.partition(" ")
    plural = noun.removesuffix("y") + "ies" if noun.endswith("y") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural} {rest}"
