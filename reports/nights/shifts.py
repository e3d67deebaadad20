"""What moved: the tests of a night's numbers against a baseline, as arrays, of one night or of thousands simulated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reports.nights import evidence
from reports.nights.baseline import EARLIER, RECENT, Baseline, Floats, learn, take

RATE = 0.005  # of nights with any false alarm that the correction promises; real noise has more tails than its model
HUGE = 10.0  # standard deviations that a change must have, too, to be believed at once
WILDEST = 3.0  # standard deviations that a night counts for in its week, at most
FEW = 5  # nights that taught a baseline, below which no news is no proof
_TESTS = ("at once", "two nights", "week")

Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Policy:
    """What the rules say of every series, on their scales. All (series,)."""

    worse: Floats  # 1: up, -1: down, 0: either way
    prior: Floats  # noise
    smallest: Floats  # change that counts
    largest: Floats  # change that is believed at once


@dataclass(frozen=True)
class Shifts:
    """The chances of what was seen, were nothing wrong, one row per test; small ones speak for a change that way."""

    chances: Floats  # (test, series); 1 where a test cannot speak, 0 where there is no noise and a change
    change: Floats  # (series,) tonight's from the level, in the way that was asked
    tested: int  # hypotheses that noise could have fooled

    @property
    def test(self) -> list[str]:
        """Which test speaks the loudest, per series."""
        return [_TESTS[at] for at in self.chances.argmin(0)]


def shifts(values: Floats, baseline: Baseline, policy: Policy, way: Floats) -> Shifts:
    """What speaks for a change of the last night, that way, from its baseline.

    Three tests: a change that is huge, or of what has no noise, on its first night; two nights running; a week's
    mean. Each asks for the smallest change that counts, too.

    Args:
        values: (night, series) on the policy's scale, tonight last; NaN where there is no value.
        baseline: what the nights before tonight taught.
        policy: what counts.
        way: (series,) 1 for a change upward, -1 downward.
    """
    moved = (_last(values, evidence.WEEK) - baseline.level) * way  # (last nights, series), the newest first
    tonight, before = moved[0], moved[1]
    eps = 1e-9 * np.abs(baseline.level) + 1e-15

    def counts(change: Floats) -> Flags:
        return np.asarray(change > policy.smallest + eps)

    still = baseline.constant | (baseline.noise == 0)
    noisy = np.isfinite(tonight) & ~still & np.isfinite(baseline.level)

    with np.errstate(divide="ignore", invalid="ignore"):
        huge = noisy & (tonight >= policy.largest) & (tonight >= HUGE * baseline.noise)
        at_once = np.where((still & counts(tonight)) | (huge & counts(tonight)), 0.0, 1.0)
        both = np.ones_like(tonight)
        asked = noisy & counts(tonight) & counts(before)
        both[asked] = evidence.of_both(tonight[asked], before[asked], take(baseline, asked))
        most = WILDEST * baseline.noise  # a single wild night makes no week
        full = np.isfinite(moved).all(0) & (len(moved) == evidence.WEEK)
        mean = np.clip(np.where(full, moved, 0.0), -most, most).mean(0)
        week = np.ones_like(tonight)
        weekly = noisy & full & counts(mean) & (tonight > 0)
        week[weekly] = evidence.of_week(mean[weekly], take(baseline, weekly))
    return Shifts(np.stack([at_once, both, week]), tonight, int(2 * noisy.sum()))


def baseline_of(history: Floats, accepted: int, policy: Policy) -> Baseline:
    """The baseline that nights before tonight teach; see ``learn``."""
    start = max(min(accepted, len(history) - RECENT) - EARLIER, 0)
    return learn(history[start:], accepted - start, policy.prior, policy.smallest)


def direction(values: Floats, baseline: Baseline, policy: Policy) -> Floats:
    """The way that is for the worse, (series,): of what may move neither way, the one that it moved."""
    moved = np.sign(np.nan_to_num(values[-1] - baseline.level))
    return np.where(policy.worse == 0, np.where(moved == 0, 1.0, moved), policy.worse)


def _last(values: Floats, count: int) -> Floats:
    """The last values of each series, the newest first: tonight's, then the nights before it that have one."""
    recent = values[::-1][: 4 * count]
    older = recent[1:]
    packed = np.take_along_axis(older, np.argsort(np.isnan(older), axis=0, kind="stable"), axis=0)
    found = np.concatenate([recent[:1], packed[: count - 1]])
    if len(found) < 2:
        found = np.concatenate([found, np.full((2 - len(found), values.shape[1]), np.nan)])
    return found
