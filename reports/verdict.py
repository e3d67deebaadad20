"""What the checks of a target amount to: proved, disproved, or not enough to tell."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from fixtures.core.measurement import Measurement
from fixtures.core.results import Outcome, Result, Run

Word = Literal["proved", "known bad", "disproved", "incomplete"]

_ORDER = ("coverage", "roundtrip", "calibration", "parity", "sensitivity", "memory", "throughput", "serving")
_RATIOS = (0.5, 2.0)
_LABELS: dict[Outcome, str] = {  # the worst first
    "failed": "FAILED",
    "error": "ERROR",
    "xpassed": "no longer bad",
    "xfailed": "known bad",
    "skipped": "skipped",
    "passed": "ok",
}


@dataclass(frozen=True)
class Verdict:
    """The verdict on one target, and the results that it follows from."""

    target: str
    results: tuple[Result, ...]
    unheard: tuple[str, ...] = ()  # test modules that could not be collected, whose say is unknown

    @property
    def word(self) -> Word:
        """``disproved`` by any failure; ``proved`` only by bounds that hold, with nothing left out.

        ``known bad`` where the only failures are listed as known: no news, and no proof either.
        """
        if self.failures:
            return "disproved"
        if self.gaps:
            return "incomplete"
        return "known bad" if self._known_bad else "proved"

    def __str__(self) -> str:
        match self.word:
            case "disproved":
                return "DISPROVED"
            case "incomplete":
                return f"incomplete ({', '.join((*self.gaps, *self._known_bad))})"
            case "known bad":
                return f"known bad ({counted(self._xfailed, 'check')})"
            case "proved":
                return "proved"

    @cached_property
    def failures(self) -> tuple[Result, ...]:
        """What disproves the target: failed checks, and passed ones whose own numbers say otherwise.

        An error is no disproof: it tells of the run rather than of the checkpoint.
        """
        return tuple(r for r in self.results if r.outcome == "failed" or (r.outcome == "passed" and broken(r)))

    @cached_property
    def gaps(self) -> tuple[str, ...]:
        """What keeps the target from being proved although nothing disproves it."""
        tally = Counter(r.outcome for r in self.results)
        gaps = [f"{module} was not collected" for module in self.unheard]
        gaps += [counted(tally["error"], "error")] if tally["error"] else []
        gaps += [f"{tally['xpassed']} no longer bad"] if tally["xpassed"] else []
        gaps += [f"{tally['skipped']} skipped"] if tally["skipped"] else []
        if not self.held:
            judged = any(m.bound for r in self.results for m in r.measurements)
            gaps.append("no bound was held" if judged else "nothing was compared")
        return tuple(gaps)

    @cached_property
    def held(self) -> tuple[Measurement, ...]:
        """Measurements of passed checks that hold against a bound."""
        return tuple(m for _, m in self._holding)

    @property
    def sentence(self) -> str:
        """The verdict in one sentence, with the number that matters most."""
        checks = counted(len(self.results), "check")
        match self.word:
            case "disproved":
                first = self.failures[0]
                return f"is disproved: {len(self.failures)} of {checks} failed ({why(first) or first.check})."
            case "incomplete":
                return f"is neither proved nor disproved by {checks}: {', '.join(self.gaps)}."
            case "known bad":
                passed = counted(sum(r.outcome == "passed" for r in self.results), "other check")
                return (
                    f"is known bad: {self._xfailed} of {checks} fail as they are known to; {_held(len(self.held))} "
                    f"in {passed}."
                )
            case "proved":
                passed = counted(sum(r.outcome == "passed" for r in self.results), "check")
                return f"is proved: {_held(len(self.held))} in {passed}{self._tightest}."

    @cached_property
    def _holding(self) -> tuple[tuple[Result, Measurement], ...]:
        return tuple((r, m) for r in self.results if r.outcome == "passed" for m in r.measurements if m.holds)

    @property
    def _tightest(self) -> str:
        known = [(near, at) for at, (_, m) in enumerate(self._holding) if (near := nearness(m)) is not None]
        if not known:
            return ""
        result, tightest = self._holding[min(known)[1]]
        where = f" ({case})" if (case := result.case or result.modality) else ""
        return f"; the tightest, {tightest.quantity}{where}, by {percent(margin(tightest) or 0)}"

    @property
    def _known_bad(self) -> tuple[str, ...]:
        return (f"{self._xfailed} known bad",) if self._xfailed else ()

    @property
    def _xfailed(self) -> int:
        return sum(r.outcome == "xfailed" for r in self.results)


def verdicts(run: Run) -> list[Verdict]:
    """A verdict on each target of the run, in the order in which they appear."""
    unheard = tuple(r.id for r in run.results if r.outcome == "error" and "::" not in r.id)
    targets = dict.fromkeys(r.target_id for r in run.results if r.target_id)
    return [Verdict(target, tuple(r for r in run.results if r.target_id == target), unheard) for target in targets]


def headline(run: Run) -> str:
    """The run in one line: ``2 targets: 1 proved, 1 disproved``."""
    found, mine = verdicts(run), own(run.results)
    if not found:
        return f"The suite's own tests: {cell(mine)}" if mine else "No target was checked"
    counts = {word: sum(v.word == word for v in found) for word in get_args(Word)}
    said = [f"{count} {word}" for word, count in counts.items() if count]
    return f"{counted(len(found), 'target')}: {', '.join(said)}"


def unrun(results: Iterable[Result]) -> list[tuple[str, list[Result]]]:
    """Skipped checks by reason, the commonest first."""
    reasons: defaultdict[str, list[Result]] = defaultdict(list)
    for result in results:
        if result.outcome == "skipped":
            reasons[result.message or "no reason given"].append(result)
    return sorted(reasons.items(), key=lambda item: -len(item[1]))


def standing(result: Result) -> Outcome:
    """The outcome as its numbers have it: a check that passed beyond a bound has failed."""
    return "failed" if result.outcome == "passed" and broken(result) else result.outcome


def badness(outcome: Outcome) -> int:
    """The outcome's place among all, 0 for the worst."""
    return list(_LABELS).index(outcome)


def label(outcome: Outcome) -> str:
    """The outcome in the words of the verdict table."""
    return _LABELS[outcome]


def suites(results: Iterable[Result]) -> list[str]:
    """The suites of ``results``: from what a checkpoint is to how it serves, then the others as they come."""
    names = list(dict.fromkeys(r.suite for r in results))
    return sorted(names, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))


def cell(results: Iterable[Result]) -> str:
    """Results counted, the worst first: ``1 FAILED, 11 ok``; a dash where there are none."""
    tally = Counter(r.outcome for r in results)
    return ", ".join(f"{tally[o]} {label}" for o, label in _LABELS.items() if tally[o]) or "-"


def worst(results: Iterable[Result]) -> Outcome | None:
    """The worst outcome among ``results``."""
    outcomes = {r.outcome for r in results}
    return next((o for o in _LABELS if o in outcomes), None)


def broken(result: Result) -> list[Measurement]:
    """The measurements whose bound does not hold."""
    return [m for m in result.measurements if m.holds is False]


def why(result: Result) -> str:
    """Why a check came out as it did: the first number beyond its bound, else the first line of its message."""
    return next((str(m) for m in broken(result)), first_line(result.message))


def margin(measurement: Measurement) -> float | None:
    """How far inside its bound a value is, as a share of the bound; negative when beyond it.

    None where there is no bound, or none that a share can be taken of (zero, infinite), or no value.
    """
    bound, value = measurement.bound, measurement.value
    if bound is None or not math.isfinite(value) or not math.isfinite(bound.limit) or bound.limit == 0:
        return None
    inside = {
        "at_most": bound.limit - value,
        "at_least": value - bound.limit,
        "equal_to": -abs(value - bound.limit),
    }[bound.kind]
    return inside / abs(bound.limit)


def nearness(measurement: Measurement) -> float | None:
    """How near to its bound a value is, as a share of the room that the bound leaves; negative when beyond it.

    The room is all of the limit, or, of a limit about one (``_RATIOS``), which is of all, or of as much as something
    else, how far it is from one: 1.01 is half way to 1.02, though 1 % away. None where no share says anything: for a
    limit of one or zero, and for a count that is just what was asked for.
    """
    bound, share = measurement.bound, margin(measurement)
    if bound is None or share is None or bound.kind == "equal_to":
        return None
    if measurement.value == bound.limit and float(measurement.value).is_integer():
        return None
    limit = abs(bound.limit)
    if not _RATIOS[0] <= limit <= _RATIOS[1]:
        return share
    return share * limit / abs(limit - 1) if limit != 1 else None


def percent(share: float) -> str:
    """A share as a person reads it, without its sign."""
    amount = abs(share) * 100
    if 0 < amount < 0.1:
        return "< 0.1 %"
    return f"{amount:.0f} %" if amount >= 9.95 or amount == 0 else f"{amount:.1f} %"


def counted(number: int, noun: str) -> str:
    """``1 check``, ``2 checks``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def own(results: Sequence[Result]) -> list[Result]:
    """Results about no target: the suite's own tests."""
    return [r for r in results if not r.target_id]


def _held(number: int) -> str:
    return "the one bound holds" if number == 1 else f"all {number} bounds hold"


def first_line(text: str) -> str:
    """The first line of ``text``, cut where it is too long for a table."""
    line = text.strip().partition("\n")[0]
    return line if len(line) <= 120 else f"{line[:117]}..."
