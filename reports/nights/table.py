"""Series side by side, on the scales that their rules compare them on."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np

from reports.nights.policy import rule_of
from reports.nights.series import Series
from reports.nights.shifts import Policy


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
            names = until(one, nights[-1])
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


def until(one: Series, tonight: str) -> Sequence[str]:
    """The nights of a series up to tonight."""
    nights = one.nights
    end = len(nights)
    while end and nights[end - 1] > tonight:
        end -= 1
    return nights if end == len(nights) else nights[:end]
