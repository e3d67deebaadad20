"""What a quantity is when nothing is wrong: its level since it was accepted, and how far nights differ by chance."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NIGHTS = 60  # that a level is learnt from; then it stands until the next acceptance
RECENT = 60  # nights whose steps tell the noise while the level is young
ADMITTED = 3.0  # standard deviations from the level within which a night may teach it
FREEDOM = 20.0  # at most: noise has heavier tails than the normal, however long it was watched
PRIOR_FREEDOM = 4  # nights' worth of trust in the policy's noise
EFFICIENCY = 0.35  # degrees of freedom that a night adds by a quantile of steps, of the order of the median's 37 %
QUARTILE = 1.1503  # the upper quartile of a normal's absolute values; its median would not see a second mode
EARLIER = 3  # nights before the accepted one, and after it, that may overrule it
YOUNG = 12  # nights of a level, below which the steps tell the noise better
CONSTANT_FROM = 5  # nights that say one and the same
STILL = 0.02  # of the smallest effect: what moves less than that does not move
CORRELATION = (0.1, 0.8)  # of neighbouring nights, at least and at most: machines stay warm, or busy
USUAL = 0.3  # correlation, before a history tells
_BLOCKS = (0, 1, 3, 6, 12, 24, 40, NIGHTS)  # after each of them the level is taken anew


@dataclass(frozen=True)
class Baseline:
    """Of every series: where it stands, how noisy it is, and how well both are known. All (series,)."""

    level: Floats  # NaN where there is none
    nights: Floats  # that taught it
    noise: Floats  # standard deviation of a night
    freedom: Floats  # degrees of freedom of the noise
    constant: NDArray[np.bool_]  # it never moved: then there is no noise, and any change is real
    correlation: Floats  # of neighbouring nights

    @property
    def alike(self) -> Floats:
        """How many nights say as much as one independent one would."""
        return (1 + self.correlation) / (1 - self.correlation)

    @property
    def doubt(self) -> Floats:
        """The variance of the level, in units of the noise's: of a mean of nights that hang together."""
        return self.alike / np.maximum(self.nights, 1)


def take(baseline: Baseline, which: NDArray[np.bool_ | np.intp]) -> Baseline:
    """The baselines of some series."""
    return Baseline(*(getattr(baseline, field.name)[which] for field in fields(Baseline)))


def learn(history: Floats, accepted: int, prior: Floats, smallest: Floats) -> Baseline:
    """The baseline that ``history`` gives, from the accepted night on.

    A level is the mean of up to ``NIGHTS`` nights, the accepted one first. A night teaches it only while it is within
    ``ADMITTED`` standard deviations of what the ones before taught: what regressed never becomes what is expected. The
    noise of a level that is still young comes from the steps between neighbouring nights, which an accepted change of
    the level hardly touches; later from the nights that taught it. The policy's counts as if it were known from
    ``PRIOR_FREEDOM`` nights (moderated variances: Smyth 2004).

    Args:
        history: (night, series) on the policy's scale, oldest first, without tonight; NaN where there is no value.
        accepted: the row of the night whose level counts.
        prior: (series,) noise by the policy.
        smallest: (series,) changes that count.
    """
    noise, freedom = _by_steps(history[-RECENT:], prior)
    since = _packed(history[accepted:])[:NIGHTS]
    level = _first(history[:accepted], since)
    taught = np.isfinite(since)
    for start, end in pairwise(_BLOCKS):
        block = slice(start, min(end, len(since)))
        if start >= len(since):
            break
        count = taught[:start].sum(0)
        within = ADMITTED * noise * np.sqrt(1 + 1 / np.maximum(count, 1))
        taught[block] &= np.abs(since[block] - level) <= within + 1e-12 * np.abs(level)
        learnt = _mean(np.where(taught[: block.stop], since[: block.stop], np.nan))
        level = np.where(np.isnan(learnt), level, learnt)
    nights = taught.sum(0).astype(float)
    apart = np.where(taught, since - level, np.nan)
    high = np.where(taught, since, -np.inf).max(0, initial=-np.inf)
    low = np.where(taught, since, np.inf).min(0, initial=np.inf)
    constant = (nights >= CONSTANT_FROM) & (high - low <= STILL * smallest)
    grown = nights >= YOUNG
    variance = np.nansum(apart**2, axis=0) / np.maximum(nights - 1, 1)
    correlation = np.full(len(level), _correlation(apart[:, grown & ~constant]))
    own = nights / ((1 + correlation**2) / (1 - correlation**2))
    noise = np.where(grown, np.sqrt((PRIOR_FREEDOM * prior**2 + own * variance) / (PRIOR_FREEDOM + own)), noise)
    freedom = np.minimum(np.where(grown, PRIOR_FREEDOM + own, freedom), FREEDOM)
    return Baseline(level, nights, noise, freedom, constant, correlation)


def _first(before: Floats, since: Floats) -> Floats:
    """Where a level starts: at the accepted night, unless the nights before it and after it agree on something else.

    Of the accepted night, the median of the three after it and that of the three before it, the middle one. A change
    that was accepted stands with the nights after it, what regressed after that with the nights before: only a night
    that is unlike both, a fluke that somebody accepted, is overruled. Of the very first nights it is
    the middle of three.
    """
    if not len(since):
        return np.full(since.shape[1], np.nan)
    after = _median(since[1 : 1 + EARLIER])
    earlier = _median(_packed(before[::-1])[:EARLIER]) if len(before) else np.full(since.shape[1], np.nan)
    three = np.stack([since[0], after, earlier])
    agreed = np.where(np.isnan(earlier), _median(since[:3]), _median(three))
    return np.where(np.isnan(after), since[0], agreed)


def _by_steps(recent: Floats, prior: Floats) -> tuple[Floats, Floats]:
    """The standard deviation of a night, from the steps between nights and the policy; and its degrees of freedom."""
    steps = np.abs(np.diff(_packed(recent), axis=0))
    count = np.isfinite(steps).sum(0)
    wide = _quantile(steps, 0.75) / QUARTILE
    own = np.where(count > 0, wide, 0.0) / math.sqrt(2 * (1 - USUAL))
    freedom = EFFICIENCY * count
    noise = np.sqrt((PRIOR_FREEDOM * prior**2 + freedom * own**2) / (PRIOR_FREEDOM + freedom))
    return noise, PRIOR_FREEDOM + freedom


def _correlation(apart: Floats) -> float:
    """How much neighbouring nights are alike, over all series together: a machine's habit rather than a quantity's."""
    if len(apart) < 2 or not apart.size:
        return USUAL
    sizes = np.nanmean(apart**2, axis=0)
    pairs = np.nanmean(apart[1:] * apart[:-1], axis=0)[sizes > 0] / sizes[sizes > 0]
    known = pairs[np.isfinite(pairs)]
    return float(np.clip(known.mean(), *CORRELATION)) if len(known) else USUAL


def _packed(values: Floats) -> Floats:
    """The values of each series moved up over its gaps, so that the first rows are its first values."""
    gaps = np.isnan(values)
    if not gaps.any():
        return values
    return np.take_along_axis(values, np.argsort(gaps, axis=0, kind="stable"), axis=0)


def _mean(values: Floats) -> Floats:
    """The mean of each column over what is not NaN; NaN of none. Of noise with two modes a median would jump."""
    known = np.isfinite(values)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, values, 0.0).sum(0) / np.maximum(count, 1), np.nan)


def _median(values: Floats) -> Floats:
    """The median of each column over what is not NaN; NaN of none."""
    return _quantile(values, 0.5)


def _quantile(values: Floats, share: float) -> Floats:
    """A quantile of each column over what is not NaN; NaN of none. numpy's own takes ten times as long."""
    if not len(values):
        return np.full(values.shape[1], np.nan)
    ordered = np.sort(values, axis=0)  # NaN last
    count = np.isfinite(ordered).sum(0)
    place = share * np.maximum(count - 1, 0)
    low = place.astype(int)

    def at(row: NDArray[np.intp]) -> Floats:
        found: Floats = np.take_along_axis(ordered, np.minimum(row, len(ordered) - 1)[None], axis=0)[0]
        return found

    above = np.where(low + 1 < count, at(low + 1), at(low))
    return np.where(count > 0, at(low) + (place - low) * (above - at(low)), np.nan)
