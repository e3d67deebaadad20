"""Intervals of paired ratios: they hold the true ratio as often as they say, and refuse what says nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fixtures.core.intervals import Interval, paired_ratio, ratio_or_unknown, student

SIMULATED = 500


@pytest.mark.parametrize("rounds", [3, 5, 6, 10])
def test_coverage(rounds: int) -> None:
    """The interval holds the true ratio in 95 of 100 experiments, give or take what 500 simulated ones can say."""
    draw = np.random.default_rng(rounds)
    true, held = 1.32, 0
    for number in range(SIMULATED):
        shared = draw.normal(0, 0.3, rounds)  # a round's luck, which both of its halves share
        before = np.exp(shared + draw.normal(0, 0.02, rounds))
        after = true * np.exp(shared + draw.normal(0, 0.02, rounds))
        found = paired_ratio(before.tolist(), after.tolist(), seed=number)
        held += found.low <= true <= found.high
    five_sigma = 5 * math.sqrt(0.95 * 0.05 / SIMULATED)
    assert held / SIMULATED == pytest.approx(0.95, abs=five_sigma)


@pytest.mark.parametrize("rounds", [5, 6])
def test_it_is_not_needlessly_wide(rounds: int) -> None:
    """The interval is about as wide as Student's t would have it: one that holds everything says nothing."""
    draw = np.random.default_rng(7)
    ours, students = [], []
    for _ in range(200):
        logs = draw.normal(0, 0.02, rounds)
        found = paired_ratio([1.0] * rounds, np.exp(logs).tolist())
        ours.append(math.log(found.high / found.low))
        students.append(2 * student(0.975, rounds - 1) * logs.std(ddof=1) / math.sqrt(rounds))
    assert np.mean(ours) == pytest.approx(np.mean(students), rel=0.1)


def test_exact() -> None:
    """Rounds that all agree leave no doubt, however much the rounds themselves differ."""
    found = paired_ratio([100, 50, 10, 200], [150, 75, 15, 300])
    assert (found.low, found.point, found.high) == pytest.approx((1.5, 1.5, 1.5))
    assert found.tells


def test_geometric_mean() -> None:
    """Twice as fast and half as fast cancel: the mean of ratios is geometric."""
    found = paired_ratio([1, 1, 1, 1], [2, 0.5, 2, 0.5])
    assert found.point == pytest.approx(1)
    assert found.low < 0.7
    assert found.high > 1.4
    assert not found.tells


def test_turned_around() -> None:
    """Before over after is the inverse of after over before, ends included."""
    before, after = [1.0, 1.1, 0.9, 1.05, 1.0], [1.3, 1.2, 1.4, 1.3, 1.25]
    there, back = paired_ratio(before, after), paired_ratio(after, before)
    assert (1 / back.high, 1 / back.point, 1 / back.low) == pytest.approx((there.low, there.point, there.high))


def test_same_seed_same_interval() -> None:
    """The same rounds give the same interval, in every run."""
    before, after = [1.0, 1.1, 0.9], [1.3, 1.2, 1.4]
    assert paired_ratio(before, after) == paired_ratio(before, after)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_no_number_no_interval(bad: float) -> None:
    """One round that is no speed makes the interval NaN, which no bound holds, whichever side it is on."""
    good = [1.0, 1.1, 1.2]
    for found in (paired_ratio([*good, bad], [*good, 1.0]), paired_ratio([*good, 1.0], [*good, bad])):
        assert all(math.isnan(end) for end in (found.low, found.point, found.high))
        assert not found.tells


@pytest.mark.parametrize("rounds", [0, 1, 2])
def test_too_few_rounds(rounds: int) -> None:
    """Fewer than three rounds are refused, and give a check NaN."""
    with pytest.raises(ValueError, match="at least 3"):
        paired_ratio([1.0] * rounds, [1.0] * rounds)
    assert math.isnan(ratio_or_unknown([1.0] * rounds, [1.0] * rounds).low)


def test_rounds_that_are_no_pairs() -> None:
    """A round without its other half is refused, never cut off."""
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_ratio([1.0] * 5, [1.0] * 4)
    assert math.isnan(ratio_or_unknown([1.0] * 5, [1.0] * 4).low)


@pytest.mark.parametrize(
    ("freedom", "published", "within"), [(2, 4.3027, 0.04), (4, 2.7764, 0.01), (5, 2.5706, 0.002), (30, 2.0423, 1e-4)]
)
def test_student(freedom: int, published: float, within: float) -> None:
    """Student's quantile is the published one, as near as the docstring says."""
    assert student(0.975, freedom) == pytest.approx(published, rel=within)


def test_words() -> None:
    """An interval reads as a person would say it."""
    assert str(Interval(0.9, 1.0, 1.1)) == "1.000 (0.900 to 1.100)"
