"""Whether a night is worse than its baseline: a statement with its error rate, never a glance at two numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reports.nights.series import Key, Series


@dataclass(frozen=True)
class Finding:
    """One quantity of tonight's beside what its baseline lets expect."""

    key: Key
    value: float  # tonight's; NaN where there is none
    expected: float  # the baseline's level; NaN where there is none
    change: float  # as a share of ``expected``; infinite from zero, NaN where a share means nothing
    p: float  # how often noise alone does as much, before correction; 0 where there is no noise, NaN where none was asked
    why: str  # one line for a person: what moved, against which baseline, since when
    since: str = ""  # the first night of the change, where it is known


@dataclass(frozen=True)
class Judgement:
    """All that one night's numbers say, each tuple the most urgent first."""

    night: str
    regressions: tuple[Finding, ...] = ()  # any of these fails the night
    improvements: tuple[Finding, ...] = ()  # said, and move no baseline
    insufficient: tuple[Finding, ...] = ()  # too few nights to tell noise from change
    suspects: tuple[Finding, ...] = ()  # tonight would be worse if the next night says so, too
    gone: tuple[Finding, ...] = ()  # measured the night before, and not tonight
    new: tuple[Finding, ...] = ()  # never measured before


def judge(series: Sequence[Series], tonight: str, accepted: str | None, frozen: str | None) -> Judgement:
    """What is worse, better or not to be told in ``tonight``.

    Args:
        series: all of one kind of machine and versions; nights after ``tonight`` are ignored.
        tonight: the night's name, as in ``Point.night``.
        accepted: the night accepted last (of this kind), whose level counts; None: the first night of each series.
        frozen: the night pinned as the frozen baseline; None where there is none.
    """
    raise NotImplementedError
