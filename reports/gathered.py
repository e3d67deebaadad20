"""Tables that no check records: many checks' measurements, a row of each or of the worst of them.

A README names one as it names a recorded table. They read what a ``results.json`` keeps, quantity and detail, and
nothing else, so that a run of any date can be shown.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from fixtures.core.measurement import Bound, Measurement
from fixtures.core.results import Result, Table

Row = tuple[str | float | int | None, ...]

_OF_FLOOR = re.compile(r"KL of (?P<compared>.+), of the noise floor")
_NATS = re.compile(r"(?P<moved>\S+) nats, noise (?P<floor>\S+) nats")
_KERNELS = re.compile(r"kernels \((?P<one>.*?)\), \((?P<other>.*?)\)")
_INTERVAL = re.compile(r"(?P<point>\S+) \((?P<low>\S+) to (?P<high>\S+)\)")
_TOGETHER = re.compile(r"(?P<what>.+) together, of one by one, .*end")
_PEAK = re.compile(r"(?P<prompt>\d+) tokens of prompt, (?P<new>\d+) new")
_REGIME = re.compile(r"\d+ requests of (?P<asked>.+), (?P<new>\d+) new, (?P<at_once>\d+) at a time, (?P<way>\w+)")


def of_noise_floor(results: Sequence[Result]) -> list[Row]:
    """KLs in units of the noise floor: of each check and what it compares the worst case, NaN the worst of all."""
    cases: defaultdict[Row, list[tuple[float, str, float | None, float | None]]] = defaultdict(list)
    for result, one, bound, said in _judged(results, _OF_FLOOR):
        nats = _NATS.match(one.detail)
        told = (float(nats["moved"]), float(nats["floor"])) if nats else (None, None)
        key = (result.target_id, result.check, said["compared"], _kernels(one.detail), bound.limit)
        cases[key].append((one.value, result.modality or "", *told))
    rows: list[Row] = []
    for (target, check, compared, kernels, limit), found in cases.items():
        value, modality, moved, floor = max(found, key=lambda case: (math.isnan(case[0]), case[0]))
        rows.append((target, check, compared, kernels, len(found), modality, moved, floor, value, limit))
    return _by_target(rows, 1, 2)


def together(results: Sequence[Result]) -> list[Row]:
    """Requests answered together, of one by one: each ratio with its interval, beside what its end is held against."""
    rows: list[Row] = []
    for result, one, bound, said in _judged(results, _TOGETHER):
        interval = _INTERVAL.match(one.detail)
        ends = [float(interval[end]) for end in ("point", "low", "high")] if interval else [None] * 3
        rows.append((result.target_id, said["what"], *ends, str(bound)))
    return rows


def peaks(results: Sequence[Result]) -> list[Row]:
    """The most memory that an answer takes, by modality, of the reference and of the artifact."""
    rows: list[Row] = []
    for result in results:
        told = {one.quantity: one for one in result.measurements}
        one, other = (told.get(f"{whose}: peak {result.modality}") for whose in ("reference", "artifact"))
        gain = told.get(f"peak {result.modality}: lower by, of the weights saved")
        if one and other and gain and gain.bound:
            tokens = _PEAK.match(one.detail)
            counted = (int(tokens["prompt"]), int(tokens["new"])) if tokens else (None, None)
            sizes = (one.value, other.value, gain.value, gain.bound.limit)
            rows.append((result.target_id, result.modality, *counted, *sizes))
    return _by_target(rows, 2)


def regimes(results: Sequence[Result]) -> list[Row]:
    """The loads that throughput and latency were measured under, as each check said them."""
    rows: list[Row] = []
    for result in results:
        for one in result.measurements:
            if one.quantity == "requests per round" and (said := _REGIME.fullmatch(one.detail)):
                name = result.case or "together"  # of what has no other
                load = (int(one.value), said["asked"], int(said["new"]), int(said["at_once"]), said["way"])
                rows.append((result.target_id, name, *load))
    return rows


_TABLES: dict[str, tuple[tuple[str, ...], Callable[[Sequence[Result]], list[Row]]]] = {
    "KL of the noise floor": (
        ("check", "compared", "kernels", "cases", "worst in", "KL, nats", "floor, nats", "of the floor", "at most"),
        of_noise_floor,
    ),
    "Together, of one by one": (("measured", "of one by one", "low", "high", "its end must be"), together),
    "Peaks by modality": (
        (
            "answering",
            "prompt tokens",
            "new tokens",
            "reference GiB",
            "artifact GiB",
            "lower by, of the weights saved",
            "at least",
        ),
        peaks,
    ),
    "Load regimes": (("regime", "requests a round", "each of", "new tokens", "at a time", "answered"), regimes),
}


def gathered(title: str, results: Sequence[Result]) -> Table | None:
    """The table of that title, its target in front, equal rows once; None where there is none, or nothing for it."""
    if title not in _TABLES:
        return None
    columns, rows_of = _TABLES[title]
    rows = tuple(dict.fromkeys(rows_of(results)))
    return Table(title, ("target", *columns), rows) if rows else None


def _judged(
    results: Sequence[Result], quantity: re.Pattern[str]
) -> Iterator[tuple[Result, Measurement, Bound, re.Match[str]]]:
    for result in results:
        for one in result.measurements:
            if one.bound is not None and (said := quantity.fullmatch(one.quantity)):
                yield result, one, one.bound, said


def _by_target(rows: list[Row], *places: int) -> list[Row]:
    """Targets in the run's order, the rows of each by their cells in ``places``; workers finish in any order."""
    targets = {target: at for at, target in enumerate(dict.fromkeys(row[0] for row in rows))}
    return sorted(rows, key=lambda row: (targets[row[0]], *((row[at] is None, row[at]) for at in places)))


def _kernels(detail: str) -> str:
    """Both sides' kernels, the one that is compared first."""
    if not (found := _KERNELS.search(detail)):
        return ""
    return " / ".join(", ".join(re.findall(r"'(.*?)'", side)) for side in (found["one"], found["other"]))
