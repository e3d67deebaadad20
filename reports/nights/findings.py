"""What a night's numbers say, as values."""

from __future__ import annotations

from dataclasses import dataclass

from reports.nights.series import Key


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
