"""What counts as a change of each kind of quantity: which way is worse, how small is nothing, how noisy it is."""

from __future__ import annotations

import math
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from reports.nights.series import Worse

SHIPPED = Path(__file__).with_name("policy.toml")
Scale = Literal["ratio", "difference", "share"]


@dataclass(frozen=True)
class Rule:
    """How one kind of quantity is judged; ``policy.toml`` says what each word means."""

    name: str
    quantity: re.Pattern[str]
    unit: re.Pattern[str]
    worse: Worse
    scale: Scale
    effect: float
    noise: float
    huge: float
    why: str
    floor: float = 1e-12  # on a ratio's scale, what is smaller is taken for this
    questions: int = 100  # behind a share

    def seen(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values on the scale that differences are taken on; whatever is not finite becomes NaN."""
        finite = np.where(np.isfinite(values), values, np.nan)
        return np.log(np.maximum(finite, self.floor)) if self.scale == "ratio" else finite

    def told(self, level: float) -> float:
        """A level on that scale as a value again."""
        return math.exp(level) if self.scale == "ratio" else level

    def smallest(self, level: float) -> float:
        """The smallest change that counts, on that scale, of a quantity at ``level``."""
        if self.scale == "share":
            return max(self.effect, self._binomial(level))
        return math.log1p(self.effect) if self.scale == "ratio" else self.effect

    def largest(self) -> float:
        """The change that is believed on its first night, on that scale."""
        return math.log1p(self.huge) if self.scale == "ratio" else self.huge

    def prior(self, level: float) -> float:
        """The standard deviation of a night, on that scale, before any history."""
        return max(self.noise, self._binomial(level)) if self.scale == "share" else self.noise

    def _binomial(self, level: float) -> float:
        share = min(max(level, 0.0), 1.0)
        share = min(max(share, 1 / (self.questions + 2)), 1 - 1 / (self.questions + 2))  # none wrong yet is not never
        return math.sqrt(share * (1 - share) / self.questions)


@cache
def rules() -> tuple[Rule, ...]:
    """The shipped rules, in their order."""
    return tuple(map(_rule, tomllib.loads(SHIPPED.read_text(encoding="utf-8"))["rule"]))


@cache
def rule_of(quantity: str, unit: str) -> Rule:
    """The rule that a quantity falls under; the last of ``policy.toml`` takes any."""
    return next(rule for rule in rules() if rule.quantity.search(quantity) and rule.unit.search(unit))


def worse_of(quantity: str, unit: str) -> Worse:
    """Which way a quantity without a bound is for the worse, by its name and unit; ``never`` for a mere fact."""
    return rule_of(quantity, unit).worse


def _rule(table: dict[str, Any]) -> Rule:
    given: dict[str, Any] = table | {name: re.compile(table.get(name, "")) for name in ("quantity", "unit")}
    return Rule(**given)
