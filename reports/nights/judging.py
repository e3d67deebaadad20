"""Whether a night is worse than its baseline: a statement with its error rate, never a glance at two numbers."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fixtures.core.measurement import readable
from reports.nights import evidence
from reports.nights.baseline import Baseline, Floats, take
from reports.nights.policy import rule_of
from reports.nights.series import Key, Series, day
from reports.nights.shifts import FEW, RATE, Flags, Policy, Shifts, baseline_of, direction, shifts


@dataclass(frozen=True)
class Finding:
    """One quantity of tonight's beside what its baseline lets expect."""

    key: Key
    value: float  # tonight's; NaN where there is none
    expected: float  # the baseline's level; NaN where there is none
    change: float  # as a share of ``expected``; infinite from zero, NaN where a share means nothing
    p: float  # how often noise alone does as much, uncorrected; 0 where there is no noise, NaN where nothing was tested
    why: str  # one line for a person: what moved, against which baseline, since when
    since: str = ""  # the first night of the change, where it is known


@dataclass(frozen=True)
class Judgement:
    """All that one night's numbers say, each tuple the most urgent first."""

    night: str
    regressions: tuple[Finding, ...] = ()  # any of these fails the night
    improvements: tuple[Finding, ...] = ()  # said, and move no baseline
    insufficient: tuple[Finding, ...] = ()  # too few nights to tell noise from change
    suspects: tuple[Finding, ...] = ()  # a regression if the next night says so, too
    gone: tuple[Finding, ...] = ()  # measured the night before, and not tonight
    new: tuple[Finding, ...] = ()  # never measured before


def judge(series: Sequence[Series], tonight: str, accepted: str | None, frozen: str | None) -> Judgement:
    """What is worse, better or not to be told in ``tonight``.

    Each quantity is held against its level since the accepted night, and since the frozen one, by the noise of its own
    history (``baseline``), as a change that its rule says matters (``policy``), and all of them together as one family
    of tests (``evidence.holm``): a night without a change has a false regression less than once in a hundred.

    Args:
        series: all of one kind of machine and versions; nights after ``tonight`` are ignored.
        tonight: the night's name, as in ``Point.night``.
        accepted: the night accepted last (of this kind), whose level counts; None: the first night of each series.
        frozen: the night pinned as the frozen baseline; None where there is none.
    """
    nights = sorted({night for one in series for night in _until(one, tonight)} | {tonight})
    judged = [one for one in series if one.worse != "never"]
    said = _Said(tonight)
    _count(series, nights, said)
    if len(nights) > 1 and judged:
        _compare(Table(judged, nights), accepted, frozen, said)
    return said.judgement()


@dataclass
class _Said:
    """What has been found so far."""

    night: str
    regressions: list[Finding] = field(default_factory=list)
    improvements: list[Finding] = field(default_factory=list)
    insufficient: list[Finding] = field(default_factory=list)
    suspects: list[Finding] = field(default_factory=list)
    gone: list[Finding] = field(default_factory=list)
    new: list[Finding] = field(default_factory=list)

    def judgement(self) -> Judgement:
        """All of it, in order."""
        return Judgement(
            self.night,
            tuple(sorted(self.regressions, key=_urgency)),
            tuple(sorted(self.improvements, key=_urgency)),
            *map(tuple, (self.insufficient, self.suspects, self.gone, self.new)),
        )


class Table:
    """Series side by side: (night, series) on their rules' scales, tonight last."""

    def __init__(self, series: Sequence[Series], nights: Sequence[str]) -> None:
        self.series = series
        self.nights = nights
        self.rules = [rule_of(one.key.quantity, one.key.unit) for one in series]
        place = {night: row for row, night in enumerate(nights)}
        self.raw = np.full((len(nights), len(series)), np.nan)
        self.there = np.zeros(self.raw.shape, bool)
        for column, one in enumerate(series):
            names = _until(one, nights[-1])
            rows = [place[night] for night in names]
            self.raw[rows, column] = one.values[: len(names)]
            self.there[rows, column] = True
        self.values = np.full(self.raw.shape, np.nan)
        for rule in set(self.rules):
            which = [i for i, r in enumerate(self.rules) if r is rule]
            self.values[:, which] = rule.seen(self.raw[:, which])
        self.policy = self._policy()

    def _policy(self) -> Policy:
        rough = np.zeros(len(self.series))  # where a share stands, for its binomial error
        for column, rule in enumerate(self.rules):
            known = self.values[:-1, column][np.isfinite(self.values[:-1, column])]
            rough[column] = float(np.median(known)) if rule.scale == "share" and len(known) else 0.0
        sides = {"up": 1.0, "down": -1.0, "either": 0.0}
        return Policy(
            np.array([sides[one.worse] for one in self.series]),
            np.array([rule.prior(at) for rule, at in zip(self.rules, rough, strict=True)]),
            np.array([rule.smallest(at) for rule, at in zip(self.rules, rough, strict=True)]),
            np.array([rule.largest() for rule in self.rules]),
        )

    def row(self, night: str | None) -> int:
        """The row of a night; of one that is not there, the next one's; of none, the first."""
        return 0 if night is None else bisect_left(self.nights, night)


@dataclass(frozen=True)
class _Against:
    """A comparison with one baseline."""

    name: str  # "the accepted level"
    baseline: Baseline
    worse: Shifts
    better: Shifts
    way: Floats


def _compare(table: Table, accepted: str | None, frozen: str | None, said: _Said) -> None:
    rows = {"the accepted level" if accepted else "the first nights": table.row(accepted)}
    if frozen is not None and frozen != accepted:
        rows["the frozen baseline"] = table.row(frozen)
    against = [_against(name, table, row) for name, row in rows.items() if row < len(table.nights) - 1]
    if not against:
        return
    first = against[0]
    worse, better = ([(one.worse, one.better)[side] for one in against] for side in (0, 1))
    for found, listed in ((worse, said.regressions), (better, said.improvements)):
        stands, chance, which, test = _standing(found)
        if found is better:
            stands = stands & (table.policy.worse != 0)
        for column in map(int, np.flatnonzero(stands)):
            one = against[which[column]]
            listed.append(_finding(table, column, one, chance[column], test[column], found is worse))
    named = {one.key for one in (*said.regressions, *said.improvements)}
    for column, series in enumerate(table.series):
        if series.key not in named:
            _rest(table, column, first, said)


def _against(name: str, table: Table, row: int) -> _Against:
    baseline = baseline_of(table.values[:-1], row, table.policy)
    way = direction(table.values, baseline, table.policy)
    found = [shifts(table.values, baseline, table.policy, side * way) for side in (1, -1)]
    return _Against(name, baseline, found[0], found[1], way)


def _standing(found: Sequence[Shifts]) -> tuple[Flags, Floats, NDArray[np.intp], list[str]]:
    """Per series: whether a change stands, the smallest chance of it, in which comparison, and by which test."""
    chances = np.stack([one.chances for one in found])  # (comparison, test, series)
    family = max(sum(one.tested for one in found), 1)
    held = evidence.holm(chances.ravel(), RATE, family).reshape(chances.shape)
    stands: Flags = np.asarray(held.any(axis=(0, 1)))
    per = chances.min(1)
    which: NDArray[np.intp] = np.asarray(per.argmin(0))
    tests = [one.test for one in found]
    return stands, per.min(0), which, [tests[w][column] for column, w in enumerate(which)]


def _rest(table: Table, column: int, against: _Against, said: _Said) -> None:
    """What is to be said of a series that neither regressed nor improved."""
    series, raw = table.series[column], table.raw[:, column]
    level = float(against.baseline.level[column])
    if not table.there[-1, column]:
        return
    expected = table.rules[column].told(level) if math.isfinite(level) else math.nan
    if not math.isfinite(raw[-1]):
        if math.isfinite(level):
            why = f"is no number tonight; {readable(expected)} by {against.name}"
            said.regressions.append(Finding(series.key, math.nan, expected, math.nan, 0.0, why, table.nights[-1]))
        return
    change = _share(raw[-1], expected)
    nights = int(against.baseline.nights[column])
    if nights < FEW and against.baseline.noise[column] > 0 and table.there[:-1, column].any():
        why = f"only {nights} night{'s' * (nights != 1)} to compare with; {FEW} are needed to tell noise from change"
        said.insufficient.append(Finding(series.key, float(raw[-1]), expected, change, math.nan, why))
    moved = float(against.worse.change[column])
    if not math.isfinite(moved) or moved <= table.policy.smallest[column]:
        return
    one = np.array([column])
    alone = evidence.of_one(np.array([moved]), take(against.baseline, one))[0]
    if alone < 1e-3:
        why = f"{_change(change)} tonight alone; a regression if the next night says so, too"
        said.suspects.append(Finding(series.key, float(raw[-1]), expected, change, float(alone), why))


def _finding(table: Table, column: int, one: _Against, chance: float, test: str, worse: bool) -> Finding:
    rule, raw = table.rules[column], float(table.raw[-1, column])
    level = float(one.baseline.level[column])
    expected = rule.told(level)
    change = _share(raw, expected)
    since = _since(table, column, level, float(one.way[column]) * (1 if worse else -1))
    seen = {
        "at once": "and it has not moved before" if one.baseline.constant[column] else "more than any noise does",
        "two nights": "two nights running",
        "week": "by the mean of a week",
    }[test]
    night = "tonight" if since == table.nights[-1] else f"since {day(since)}"
    why = f"{_change(change) or 'changed'} against {one.name} ({readable(expected)}), {seen}, {night}"
    return Finding(table.series[column].key, raw, expected, change, float(chance), why, since)


def _since(table: Table, column: int, level: float, way: float) -> str:
    """The first of the nights up to tonight that all lie beyond half the smallest change that counts."""
    values = table.values[:, column]
    first = len(values) - 1
    for row in range(len(values) - 1, -1, -1):
        if not math.isfinite(values[row]):
            continue
        if (values[row] - level) * way <= float(table.policy.smallest[column]) / 2:
            break
        first = row
    return table.nights[first]


def _count(series: Iterable[Series], nights: Sequence[str], said: _Said) -> None:
    """Say what is new tonight, and what went away since the night before."""
    for one in series:
        names = _until(one, nights[-1])
        if not names or len(nights) < 2:
            continue
        last = float(one.values[len(names) - 1])
        if names[-1] != nights[-1]:
            if names[-1] == nights[-2]:
                why = f"not measured tonight; {readable(last)} the night before"
                said.gone.append(Finding(one.key, math.nan, last, math.nan, math.nan, why))
        elif len(names) == 1:
            said.new.append(Finding(one.key, last, math.nan, math.nan, math.nan, "measured for the first time"))


def _until(one: Series, tonight: str) -> Sequence[str]:
    """The nights of a series up to tonight."""
    nights = one.nights
    end = len(nights)
    while end and nights[end - 1] > tonight:
        end -= 1
    return nights if end == len(nights) else nights[:end]


def _share(value: float, expected: float) -> float:
    if value == expected:
        return 0.0
    if not math.isfinite(expected):
        return math.nan
    return (value - expected) / abs(expected) if expected else math.copysign(math.inf, value)


def _change(change: float) -> str:
    """A change as a person says it."""
    if math.isnan(change):
        return ""
    if math.isinf(change):
        return "from zero"
    if change > 10:
        return f"{readable(round(change + 1, 1))} times as much"
    return f"{100 * change:+.1f} %"


def _urgency(one: Finding) -> tuple[float, float]:
    """What has no noise or no number first, then by how much it moved."""
    size = abs(one.change) if math.isfinite(one.change) else math.inf
    return (0 if one.p == 0 else 1, -size)
