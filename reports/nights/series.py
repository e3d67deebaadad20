"""One quantity night after night: what the history hands to the statistics, and what these hand to the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

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


class Points(Sequence[Point]):
    """Points kept as two columns, as the index has them: a year of 1500 quantities is half a million points.

    A ``Point`` is made when it is asked for; who wants them all asks for the columns.
    """

    def __init__(self, nights: Sequence[str], values: NDArray[np.float64]) -> None:
        self.nights = nights  # sorted
        self.values = values  # (night,)

    def __len__(self) -> int:
        return len(self.nights)

    @overload
    def __getitem__(self, at: int) -> Point: ...
    @overload
    def __getitem__(self, at: slice) -> Points: ...
    def __getitem__(self, at: int | slice) -> Point | Points:
        if isinstance(at, slice):
            return Points(self.nights[at], self.values[at])
        return Point(self.nights[at], float(self.values[at]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]  # as of a list

    def __repr__(self) -> str:
        return f"Points({list(self)})"


@dataclass(frozen=True)
class Series:
    """One quantity of one kind of machine and versions, oldest night first; nights without it have no point."""

    key: Key
    worse: Worse
    points: Sequence[Point]

    @property
    def nights(self) -> Sequence[str]:
        """The nights that have a value, oldest first."""
        return self.points.nights if isinstance(self.points, Points) else [point.night for point in self.points]

    @property
    def values(self) -> NDArray[np.float64]:
        """Their values, (night,); NaN where a night's was no number."""
        if isinstance(self.points, Points):
            return self.points.values
        return np.array([point.value for point in self.points], dtype=np.float64)


def day(night: str) -> str:
    """A night's name as a person says it: its date, where the name begins with one."""
    return night[:10] if re.match(r"\d{4}-\d\d-\d\dT", night) else night


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
