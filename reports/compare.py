"""What changed between two runs, as values: checks, outcomes, numbers, bounds, and what they ran on."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fixtures.core.measurement import Bound, Measurement
from fixtures.core.results import Result, Run
from reports import verdict

# not when, for how long and into what folder
_FACTS = ("machine", "versions", "git", "seeds", "deselected", "subjects")
_FAILING = ("failed", "error")


@dataclass(frozen=True)
class Shift:
    """A check with another outcome than before."""

    before: Result
    after: Result

    @property
    def newly_failing(self) -> bool:
        """Whether it fails or errs now and did not."""
        return verdict.standing(self.after) in _FAILING and verdict.standing(self.before) not in _FAILING

    @property
    def by_bound(self) -> bool:
        """Whether other bounds explain it: by the bounds before, today's numbers would be judged as they were."""
        old = {key: m.bound for key, m in _measured(self.before).items()}
        now = _measured(self.after)
        states = {verdict.standing(self.before), verdict.standing(self.after)}
        if not states <= {"passed", "failed", "xfailed", "xpassed"}:
            return False
        changed = [key for key in now if key in old and old[key] != now[key].bound]
        judged = {key: _beyond(m, old[key] if key in changed else m.bound) for key, m in now.items()}
        then = any(m.holds is False for m in self.before.measurements)
        today = any(m.holds is False for m in now.values())
        return bool(changed) and today != then and any(judged.values()) == then


@dataclass(frozen=True)
class Move:
    """A number that changed, appeared in its check, or went from it."""

    result: Result
    before: Measurement | None
    after: Measurement | None

    @property
    def change(self) -> float | None:
        """The change as a share of the value before; infinite from zero, None where there is no share."""
        if self.before is None or self.after is None or self.before.unit != self.after.unit:
            return None
        old, new = self.before.value, self.after.value
        if old == new:
            return 0.0
        if not math.isfinite(old) or not math.isfinite(new):
            return None
        return (new - old) / abs(old) if old else math.copysign(math.inf, new)

    @property
    def toward(self) -> str:
        """``worse`` nearer to (or further beyond) the bound that judges it, ``better`` away from it; else nothing."""
        if self.before is None or self.after is None or self.after.bound is None:
            return ""
        old, new, bound = self.before.value, self.after.value, self.after.bound
        if math.isnan(new) or math.isnan(old):
            return "worse" if math.isnan(new) else "better"
        gain = {
            "at_most": old - new,
            "at_least": new - old,
            "equal_to": abs(old - bound.limit) - abs(new - bound.limit),
        }[bound.kind]
        return "" if gain == 0 or math.isnan(gain) else "better" if gain > 0 else "worse"


@dataclass(frozen=True)
class Rebound:
    """A bound that changed, with the checks that it changed for."""

    check: str
    quantity: str
    before: Bound | None
    after: Bound | None
    results: tuple[Result, ...]

    @property
    def way(self) -> str:
        """What became of the bound: added, removed, tighter, looser, or another kind."""
        if self.before is None or self.after is None:
            return "added" if self.before is None else "removed"
        if self.before.kind != self.after.kind or self.after.kind == "equal_to":
            return "another bound"
        tighter = self.after.limit < self.before.limit
        return "tighter" if tighter == (self.after.kind == "at_most") else "looser"


@dataclass(frozen=True)
class Fact:
    """Something that the two runs ran on or with and that differs; None where a run does not say."""

    name: str
    before: Any
    after: Any


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side; numbers that changed by at most ``above`` (a share) count as equal."""

    before: Run
    after: Run
    above: float = 0.01

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        """What differs in machine, versions, commit, seed, choice of tests and subjects."""
        runs = (self.before, self.after)
        targets = {r.target_id for run in runs for r in run.results}
        told = [about if isinstance(about := run.about.get("subjects"), Mapping) else {} for run in runs]
        lone = (told[0].keys() ^ told[1].keys()) & targets  # all of these targets is listed already
        old, new = (_flat(run.about, lone) for run in runs)
        names = dict.fromkeys((*old, *new))
        return tuple(Fact(n, old.get(n), new.get(n)) for n in names if old.get(n) != new.get(n))

    @cached_property
    def verdicts(self) -> tuple[tuple[str, str, str], ...]:
        """Targets whose verdict is another, with both; a dash where a run has no such target."""
        old, new = ({v.target: str(v) for v in verdict.verdicts(run)} for run in (self.before, self.after))
        targets = dict.fromkeys((*old, *new))
        return tuple((t, old.get(t, "-"), new.get(t, "-")) for t in targets if old.get(t) != new.get(t))

    @cached_property
    def appeared(self) -> tuple[Result, ...]:
        """Checks that only the run after has, the worst first."""
        return self._only(self.after, self.before)

    @cached_property
    def disappeared(self) -> tuple[Result, ...]:
        """Checks that only the run before has, the worst first."""
        return self._only(self.before, self.after)

    @cached_property
    def shifts(self) -> tuple[Shift, ...]:
        """Checks with another outcome: what newly fails first, then by how bad they are now."""
        found = [Shift(a, b) for a, b in self._common if verdict.standing(a) != verdict.standing(b)]
        return tuple(
            sorted(
                found,
                key=lambda s: (not s.newly_failing, s.by_bound, verdict.badness(verdict.standing(s.after))),
            )
        )

    @cached_property
    def moves(self) -> tuple[Move, ...]:
        """Numbers that changed by more than ``above``, or across their bound: those beyond it first, then the worse."""
        found = [move for a, b in self._common for move in _moves(a, b) if self._counts(move)]
        return tuple(sorted(found, key=_by_concern))

    @cached_property
    def rebounds(self) -> tuple[Rebound, ...]:
        """Bounds that changed, each once for all its checks."""
        found: defaultdict[tuple[str, str, Bound | None, Bound | None], list[Result]] = defaultdict(list)
        for a, b in self._common:
            old, new = _measured(a), _measured(b)
            for key in old.keys() & new.keys():
                if old[key].bound != new[key].bound:
                    found[f"{b.suite}: {b.check}", key[0], old[key].bound, new[key].bound].append(b)
        order = sorted(found, key=lambda key: key[:2])
        return tuple(Rebound(*key, results=tuple(found[key])) for key in order)

    @property
    def same(self) -> bool:
        """Whether nothing changed."""
        parts = (self.facts, self.verdicts, self.appeared, self.disappeared, self.shifts, self.moves, self.rebounds)
        return not any(parts)

    @cached_property
    def strangers(self) -> bool:
        """Whether both runs have checks, and none in common."""
        return bool(self.before.results and self.after.results and not self._common)

    @cached_property
    def _common(self) -> tuple[tuple[Result, Result], ...]:
        old = {r.id: r for r in self.before.results}
        return tuple((old[r.id], r) for r in self.after.results if r.id in old)

    @staticmethod
    def _only(run: Run, other: Run) -> tuple[Result, ...]:
        known = {r.id for r in other.results}
        found = [r for r in run.results if r.id not in known]
        return tuple(sorted(found, key=lambda r: verdict.badness(verdict.standing(r))))

    def _counts(self, move: Move) -> bool:
        if move.before is None or move.after is None or move.before.unit != move.after.unit:
            return True
        if math.isnan(move.before.value) and math.isnan(move.after.value):
            return False
        crossed = move.before.bound == move.after.bound and move.before.holds != move.after.holds
        return crossed or move.change is None or abs(move.change) > self.above


Key = tuple[str, int]


def _measured(result: Result) -> dict[Key, Measurement]:
    """Measurements by quantity, and by place among those of one quantity."""
    seen: Counter[str] = Counter()
    found = {}
    for measurement in result.measurements:
        found[measurement.quantity, seen[measurement.quantity]] = measurement
        seen[measurement.quantity] += 1
    return found


def _moves(before: Result, after: Result) -> Iterator[Move]:
    old, new = _measured(before), _measured(after)
    if before.outcome != after.outcome and not (old and new):
        return  # it did not come to measuring, which its outcome says already
    for key in dict.fromkeys((*old, *new)):
        yield Move(after, old.get(key), new.get(key))


def _by_concern(move: Move) -> tuple[int, float]:
    beyond = move.after is not None and move.after.holds is False
    share = math.inf if move.change is None else abs(move.change)
    return (0 if beyond else {"worse": 1, "": 2, "better": 3}[move.toward], -share)


def _beyond(measurement: Measurement, bound: Bound | None) -> bool:
    return bound is not None and not bound.holds(measurement.value)


def _flat(about: Mapping[str, Any], lone: AbstractSet[str]) -> dict[str, Any]:
    """Facts by name, without the subjects in ``lone``; saying nothing of one and saying null are alike."""
    facts = {name: about.get(name) for name in _FACTS}
    if isinstance(subjects := facts["subjects"], Mapping):
        facts["subjects"] = {name: said for name, said in subjects.items() if name not in lone}
    return dict(_leaves(facts))


def _leaves(mapping: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        name = f"{within}: {key}" if within else str(key)
        if isinstance(value, Mapping):
            yield from _leaves(value, name)
        else:
            yield name, value
