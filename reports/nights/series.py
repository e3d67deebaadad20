"""One quantity night after night: what the history hands to the statistics, and what these hand to the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Worse = Literal["up", "down", "either", "never"]
"""Which way is for the worse: a KL up, tokens per second down, a count either way; a mere fact never."""


@dataclass(frozen=True, order=True)
class Key:
    """What tells a quantity from all others of a run."""

    target: str  # "qwen2_5_vl-tiny-awq"; empty for a check about no target
    check: str  # "parity: test_top1"
    case: str  # "image", "batch_8"; may be empty
    quantity: str
    unit: str


@dataclass(frozen=True)
class Kind:
    """What must be the same for two nights to be comparable: the machine's kind, and the versions that matter."""

    machine: tuple[tuple[str, str], ...]
    versions: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Point:
    """A night's value; NaN where it was no number."""

    night: str  # the stored run's name, which sorts by time
    value: float


@dataclass(frozen=True)
class Series:
    """One quantity of one kind of machine and versions, oldest night first; nights without it have no point."""

    key: Key
    worse: Worse
    points: tuple[Point, ...]


Verdict = Literal["steady", "improved", "regressed", "failing", "unjudged"]
"""What a night came to: ``failing`` where checks fail or err, whatever the numbers; ``unjudged`` where nothing was."""


@dataclass(frozen=True)
class Night:
    """One night of the history, as the trend page shows it."""

    name: str  # the stored run's name, as in ``Point.night``
    kind: Kind
    started: str  # ISO 8601, UTC
    verdict: Verdict
    regressed: tuple[Key, ...] = ()  # what was found to be worse that night
    note: str = ""  # one line, such as "2 checks failed, 1 quantity regressed"
    page: str = ""  # the address of the run's own page, relative to the trend page; empty where there is none


@dataclass(frozen=True)
class Mark:
    """A move of a baseline: somebody accepted a night, or pinned it as the frozen baseline too."""

    night: str
    kind: Kind
    reason: str
    when: str = ""  # ISO 8601, UTC
    who: str = ""
    frozen: bool = False
