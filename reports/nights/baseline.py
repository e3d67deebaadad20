"""What a quantity is when nothing is wrong: its level since it was accepted, and how far nights differ by chance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NIGHTS = 40  # that a level is learnt from; then it stands until the next acceptance
RECENT = 60  # nights whose steps tell the noise
ADMITTED = 3.0  # standard deviations from the level within which a night may teach it
PRIOR_FREEDOM = 4  # nights' worth of trust in the policy's noise
EFFICIENCY = 0.35  # degrees of freedom that a night adds, by the median of absolute steps (Rousseeuw & Croux 1993)
CONSTANT_FROM = 5  # nights that say one and the same
STILL = 0.02  # of the smallest effect: what moves less than that does not move
CORRELATION = 0.3  # of neighbouring nights, as of machines that stay warm or busy
_BLOCKS = (0, 1, 3, 6, 12, 24, NIGHTS)  # after each of them the level is taken anew


@dataclass(frozen=True)
class Baseline:
    """Of every series: where it stands, how noisy it is, and how well both are known. All (series,)."""

    level: Floats  # NaN where there is none
    nights: Floats  # that taught it
    noise: Floats  # standard deviation of a night
    freedom: Floats  # degrees of freedom of the noise
    constant: NDArray[np.bool_]  # it never moved: then there is no noise, and any change is real

    @property
    def doubt(self) -> Floats:
        """The variance of the level, in units of the noise's: of a median of neighbouring nights that are alike."""
        return math.pi / 2 * ALIKE / np.maximum(self.nights, 1)


ALIKE = (1 + CORRELATION) / (1 - CORRELATION)  # what correlation costs: so many nights say as much as one


def learn(history: Floats, accepted: int, prior: Floats, smallest: Floats) -> Baseline:
    """The baseline that ``history`` gives, from the accepted night on.

    A level is the median of up to ``NIGHTS`` nights, the accepted one first. A night teaches it only while it is within
    ``ADMITTED`` standard deviations of what the ones before taught: what regressed never becomes what is expected. The
    noise comes from the steps between neighbouring nights, which a shift of the level or a single bad night hardly
    touches, and from the policy's, as if that were known from ``PRIOR_FREEDOM`` nights (moderated variances: Smyth
    2004).

    Args:
        history: (night, series) on the policy's scale, oldest first, without tonight; NaN where there is no value.
        accepted: the row of the night whose level counts.
        prior: (series,) noise by the policy.
        smallest: (series,) changes that count.
    """
    noise, freedom = _noise(history[-RECENT:], prior)
    since = _packed(history[accepted:])[:NIGHTS]
    level = since[0].copy() if len(since) else np.full(history.shape[1], np.nan)
    taught = np.isfinite(since)
    for start, end in pairwise(_BLOCKS[1:]):
        block = slice(start, min(end, len(since)))
        if start >= len(since):
            break
        count = taught[:start].sum(0)
        within = ADMITTED * noise * np.sqrt(1 + math.pi / 2 / np.maximum(count, 1))
        taught[block] &= np.abs(since[block] - level) <= within + 1e-12 * np.abs(level)
        level = _median(np.where(taught[: block.stop], since[: block.stop], np.nan))
    nights = taught.sum(0).astype(float)
    high = np.where(taught, since, -np.inf).max(0, initial=-np.inf)
    low = np.where(taught, since, np.inf).min(0, initial=np.inf)
    constant = (nights >= CONSTANT_FROM) & (high - low <= STILL * smallest)
    return Baseline(level, nights, noise, freedom, constant)


def _noise(recent: Floats, prior: Floats) -> tuple[Floats, Floats]:
    """The standard deviation of a night, from the steps between nights and the policy; and its degrees of freedom."""
    steps = np.abs(np.diff(_packed(recent), axis=0))
    count = np.isfinite(steps).sum(0)
    median = _median(steps) if len(steps) else np.zeros(recent.shape[1])
    own = np.where(count > 0, median, 0.0) * 1.4826 / math.sqrt(2 * (1 - CORRELATION))
    freedom = EFFICIENCY * count
    noise = np.sqrt((PRIOR_FREEDOM * prior**2 + freedom * own**2) / (PRIOR_FREEDOM + freedom))
    return noise, PRIOR_FREEDOM + freedom


def _packed(values: Floats) -> Floats:
    """The values of each series moved up over its gaps, so that the first rows are its first values."""
    gaps = np.isnan(values)
    if not gaps.any():
        return values
    return np.take_along_axis(values, np.argsort(gaps, axis=0, kind="stable"), axis=0)


def _median(values: Floats) -> Floats:
    """The median of each column over what is not NaN; NaN of none. numpy's own takes ten times as long."""
    ordered = np.sort(values, axis=0)  # NaN last
    count = np.isfinite(ordered).sum(0)
    low, high = np.maximum(count - 1, 0) // 2, count // 2

    def at(row: NDArray[np.intp]) -> Floats:
        found: Floats = np.take_along_axis(ordered, np.minimum(row, len(ordered) - 1)[None], axis=0)[0]
        return found

    return np.where(count > 0, (at(low) + at(high)) / 2, np.nan)
