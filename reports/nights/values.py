"""What a run measured, as one value per key: what a night adds to the series of its kind."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from fixtures.core.measurement import Measurement
from fixtures.core.results import Result, Run
from reports.escape import inline
from reports.nights import policy
from reports.nights.series import Key, Worse

_SIDE = re.compile(r"\bat (?:least|most)\b ?")
_BY_BOUNDS: dict[frozenset[str], Worse] = {frozenset({"at_most"}): "up", frozenset({"at_least"}): "down"}


@dataclass(frozen=True)
class Value:
    """A quantity's value, and the kinds of bound that it is held against; none where it is only told."""

    value: float
    bounds: frozenset[str]


def values(run: Run) -> dict[Key, Value]:
    """Every quantity of a run.

    A value held against a bound on each side is one quantity with two bounds, whether the second goes by the same name
    or by one that only adds "at least" or "at most". Other values of one name are told apart by place: ``KL (2)``.
    """
    found: dict[Key, Value] = {}
    for result in run.results:
        target, check = _line(result.target_id), _line(f"{result.suite}: {result.check}")
        case = _line(result.case or result.modality or "")
        for quantity, unit, value in _measured(result):
            found[_free(Key(target, check, case, _line(quantity), _line(unit)), found)] = value
    return found


def worse(key: Key, bounds: frozenset[str]) -> Worse:
    """Which way a quantity is for the worse: toward its bound, either way with one on each side or an exact one.

    Without a bound it is the policy's say: tokens per second fall, milliseconds rise. A bound that only keeps a number
    from the absurd (peak memory is at least nothing) must not hide what the policy knows: then it is either way.
    """
    told = policy.worse_of(key.quantity, key.unit)
    if not bounds:
        return told
    bounded = _BY_BOUNDS.get(bounds, "either")
    return "either" if {bounded, told} == {"up", "down"} else bounded


def _measured(result: Result) -> Iterator[tuple[str, str, Value]]:
    """A result's quantities, twins made one, under the shorter of their names."""
    twins: defaultdict[tuple[str, str], list[Measurement]] = defaultdict(list)
    for measurement in result.measurements:
        twins[_without_side(measurement.quantity), measurement.unit].append(measurement)
    for (_, unit), alike in twins.items():
        while alike:
            first, *others = alike
            same = [m for m in others if _twins(first, m)]
            alike = [m for m in others if m not in same]
            name = min((m.quantity for m in (first, *same)), key=len)
            bounds = frozenset(m.bound.kind for m in (first, *same) if m.bound is not None)
            yield name, unit, Value(first.value, bounds)


def _without_side(quantity: str) -> str:
    return _SIDE.sub("", quantity).rstrip(", ")


def _twins(one: Measurement, other: Measurement) -> bool:
    """Whether both are one value, held against bounds of two kinds (or told once more)."""
    kinds = [m.bound.kind for m in (one, other) if m.bound is not None]
    same = one.value == other.value or (math.isnan(one.value) and math.isnan(other.value))
    return same and len(set(kinds)) == len(kinds)


@lru_cache(maxsize=1 << 16)  # every night says the same words
def _line(words: str) -> str:
    """Words as one line: anybody may have written them, and terminals will show them."""
    return inline(words)


def _free(key: Key, taken: dict[Key, Value]) -> Key:
    """The key, or where it is taken, the first that is not: ``KL``, ``KL (2)``."""
    free, place = key, 1
    while free in taken:
        place += 1
        free = replace(key, quantity=f"{key.quantity} ({place})")
    return free
