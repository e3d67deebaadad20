"""What the trend page draws, compactly: a year of 1500 quantities in a few megabytes, and a line for each finding."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fixtures.core.measurement import readable
from reports.charts import number
from reports.escape import inline
from reports.nights.baseline import ADMITTED, Floats
from reports.nights.changepoints import changes
from reports.nights.judging import Judgement, Table, judge
from reports.nights.series import Key, Kind, Mark, Night, Series, day
from reports.nights.shifts import baseline_of
from reports.render import slug

_SPARK = (120, 24)  # points wide and high
_SPARKED = 60  # nights


@dataclass(frozen=True)
class History:
    """One kind of machine and versions: its series, nights and baselines."""

    kind: Kind
    series: Sequence[Series]
    nights: Sequence[Night]
    marks: Sequence[Mark]
    place: int

    @property
    def last(self) -> str:
        """The name of the last night."""
        return max([n.name for n in self.nights] + [s.nights[-1] for s in self.series if len(s.nights)], default="")

    @property
    def accepted(self) -> str | None:
        """The night accepted last."""
        return self.marks[-1].night if self.marks else None

    @property
    def frozen(self) -> str | None:
        """The night pinned last as the frozen baseline."""
        return next((mark.night for mark in reversed(self.marks) if mark.frozen), None)

    @cached_property
    def judgement(self) -> Judgement:
        """What the last night comes to."""
        return judge(self.series, self.last, self.accepted, self.frozen)

    @cached_property
    def names(self) -> list[str]:
        """The names of all nights, oldest first."""
        return sorted({*(n.name for n in self.nights), *(name for s in self.series for name in s.nights)})

    @cached_property
    def anchors(self) -> dict[Key, str]:
        """A fragment for every series, readable and unique on the page."""
        found: dict[Key, str] = {}
        taken: set[str] = set()
        for series in self.series:
            key = series.key
            words = slug("-".join(filter(None, (key.target, key.check, key.case, key.quantity)))) or "series"
            wanted = words if not self.place else f"{words}-on-{self.place + 1}"
            name, again = wanted, 1
            while name in taken:
                again += 1
                name = f"{wanted}-{again}"
            taken.add(name)
            found[key] = name
        return found

    def spark(self, key: Key) -> dict[str, Any] | None:
        """A line through the last nights of a series, for a table's cell: points, the last one, and the level."""
        series = next((s for s in self.series if s.key == key), None)
        if series is None:
            return None
        values = np.asarray(series.values, float)[-_SPARKED:]
        known = np.isfinite(values)
        if known.sum() < 2:
            return None
        wide, high = _SPARK
        low, top = float(values[known].min()), float(values[known].max())
        x = np.linspace(3, wide - 3, len(values))
        y = high - 3 - (values - low) / ((top - low) or 1) * (high - 6)
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b, k in zip(x, y, known, strict=True) if k)
        return {"points": points, "x": f"{x[known][-1]:.1f}", "y": f"{y[known][-1]:.1f}", "nights": int(known.sum())}

    def data(self) -> dict[str, Any]:
        """The history as the page's script reads it; ``trend.js`` says how."""
        words: dict[str, int] = {}

        def word(text: str) -> int:
            return words.setdefault(inline(text, 200), len(words))

        place = {name: row for row, name in enumerate(self.names)}
        raw = np.full((len(self.names), len(self.series)), np.nan)
        for column, series in enumerate(self.series):
            raw[[place[name] for name in series.nights], column] = series.values
        raw[~np.isfinite(raw)] = np.nan
        bands, breaks = self._bands(), self._breaks(raw)
        regressed: dict[Key, list[int]] = {}
        for night in self.nights:
            for key in night.regressed:
                regressed.setdefault(key, []).append(place[night.name])
        rows = []
        for column, series in enumerate(self.series):
            key = series.key
            rows.append(
                {
                    "k": [word(text) for text in (key.target, key.check, key.case, key.quantity, key.unit)],
                    "a": self.anchors[key],
                    "w": series.worse,
                    "v": packed(raw[:, column]),
                    "b": bands.get(key),
                    "c": breaks[column],
                    "r": regressed.get(key, []),
                }
            )
        return {
            "nights": [inline(day(name), 40) for name in self.names],
            "words": list(words),
            "series": rows,
            "marks": [
                {"n": place[m.night], "frozen": m.frozen, "why": inline(m.reason, 200)}
                for m in self.marks
                if m.night in place
            ],
        }

    def _bands(self) -> dict[Key, list[float | None]]:
        """Of every series that is judged: the accepted level, and where its noise band begins and ends."""
        judged = [s for s in self.series if s.worse != "never"]
        if not judged or len(self.names) < 2:
            return {}
        table = Table(judged, self.names)
        base = baseline_of(table.values[:-1], min(table.row(self.accepted), len(self.names) - 2), table.policy)
        found = {}
        for column, series in enumerate(judged):
            level, noise = float(base.level[column]), float(base.noise[column])
            if not math.isfinite(level):
                continue
            noise = 0.0 if base.constant[column] else noise
            told = table.rules[column].told
            found[series.key] = [number(told(level + side * noise)) for side in (0, -ADMITTED, ADMITTED)]
        return found

    def _breaks(self, raw: Floats) -> list[list[int]]:
        """The nights at which each series changed its level; sizes of one sign are compared by their logarithms."""
        with np.errstate(invalid="ignore", divide="ignore"):
            positive = np.where(np.isnan(raw), np.inf, raw).min(axis=0, initial=np.inf) > 0
            return changes(np.where(positive, np.log(np.where(raw > 0, raw, np.nan)), raw))


def packed(values: Floats) -> float | str | None:
    """A column of values: one number where all are the same, else little-endian float32 in base64."""
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    if len(known) == len(values) and (known == known[0]).all():
        return float(known[0])
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def name_of(key: Key) -> str:
    """A quantity with what tells it from others, in one line."""
    where = " ".join(filter(None, (key.target, key.check, f"({key.case})" if key.case else "")))
    return inline(f"{where}: {key.quantity}", 300)


def told(value: float, unit: str) -> str:
    """A value with its unit."""
    return f"{readable(value)} {unit}".rstrip()
