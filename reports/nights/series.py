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
