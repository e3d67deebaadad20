"""A night against its baseline: what is worse is found and named, what is noise is not, and a baseline stays put."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from reports.nights import baseline, evidence, judging, shifts
from reports.nights.changepoints import changes
from reports.nights.findings import Finding, Judgement
from reports.nights.judging import judge
from reports.nights.policy import Rule, rule_of, rules, worse_of
from reports.nights.series import Series
from suites.meta.nightly import kl, names, noisy, series

QUIET = [0.0124] * 40  # the same bits every night


def judged(*found: Series, accepted: int | None = 0, frozen: int | None = None, nights: int | None = None) -> Judgement:
    """The last night, the accepted and the frozen one by their place."""
    listed = names(nights or max(len(s.points) for s in found))
    pick = lambda place: None if place is None else listed[place]  # noqa: E731
    return judge(found, listed[-1], pick(accepted), pick(frozen))


def said(findings: Sequence[Finding]) -> list[str]:
    return [f"{f.key.quantity} {f.key.case}" for f in findings]


# Requirements on the judge, each a question with a right answer; below, faults planted in it change the answers.


def finds_a_loss_within_two_nights() -> bool:
    """5 % less throughput, two nights running, with nights gone wrong in the history."""
    values = noisy(62)
    values[[15, 22, 30, 38, 44, 52]] *= 0.7
    values[-2:] *= 0.95
    return said(judged(series(values)).regressions) == ["throughput by marlin batch_8"]


def says_nothing_of_small_changes() -> bool:
    """2 % more KL than ever before."""
    return not judged(kl([*QUIET, 0.01265])).regressions


def says_nothing_of_gains() -> bool:
    """10 % more throughput."""
    values = noisy(62)
    values[-2:] *= 1.1
    return not judged(series(values)).regressions


def stays_red() -> bool:
    """Fifty nights after a loss that nobody accepted."""
    values = noisy(90)
    values[12:] *= 0.95
    return bool(judged(series(values)).regressions)


def finds_a_drift() -> bool:
    """A tenth of a percent lost each night, for two months."""
    return bool(
        judged(series(noisy(100) * 0.999 ** np.maximum(np.arange(100) - 40, 0)), frozen=0, accepted=98).regressions
    )


def finds_what_is_first_seen_tonight() -> bool:
    """10 % more KL on a night, after six of the same bits."""
    return said(judged(kl([*QUIET[:6], 0.0124 * 1.1])).regressions) == ["mean token KL image"]


def believes_one_wild_night() -> bool:
    """A single night 30 % off."""
    values = noisy(62)
    values[-1] *= 0.7
    return not judged(series(values)).regressions


REQUIREMENTS = (
    finds_a_loss_within_two_nights,
    says_nothing_of_small_changes,
    says_nothing_of_gains,
    stays_red,
    finds_a_drift,
    finds_what_is_first_seen_tonight,
    believes_one_wild_night,
)
Plant = Callable[[pytest.MonkeyPatch], None]


def mean_and_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every night teaches the level and the noise, wild ones and lost ones too."""
    monkeypatch.setattr(baseline, "ADMITTED", math.inf)


def no_smallest_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any difference counts."""
    monkeypatch.setattr(Rule, "smallest", lambda self, level: 0.0)


def no_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any change is for the worse."""
    monkeypatch.setattr(
        judging, "direction", lambda values, base, policy: np.sign(np.nan_to_num(values[-1] - base.level)) + 0.0
    )


def rebaselined_on_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline is the night before, whatever that was found to be."""
    real = judging.baseline_of
    monkeypatch.setattr(judging, "baseline_of", lambda history, row, policy: real(history, len(history) - 1, policy))


def no_frozen_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last accepted night counts."""
    real = judging.judge
    monkeypatch.setitem(globals(), "judge", lambda found, night, accepted, frozen: real(found, night, accepted, None))


def history_with_tonight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tonight is part of what it is held against."""

    def against(name: str, table: Any, row: int) -> Any:
        base = shifts.baseline_of(table.values, row, table.policy)
        way = shifts.direction(table.values, base, table.policy)
        found = [shifts.shifts(table.values, base, table.policy, side * way) for side in (1, -1)]
        return judging._Against(name, base, found[0], found[1], way)

    monkeypatch.setattr(baseline, "ADMITTED", math.inf)
    monkeypatch.setattr(judging, "_against", against)


def one_night_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tonight alone decides."""
    real = shifts.evidence.of_both
    monkeypatch.setattr(shifts.evidence, "of_both", lambda tonight, before, base: real(tonight, tonight, base))
    real_last = shifts._last
    monkeypatch.setattr(shifts, "_last", lambda values, count: np.repeat(real_last(values, count)[:1], count, axis=0))


FAULTS: list[tuple[Plant, Callable[[], bool]]] = [
    (mean_and_deviation, finds_a_loss_within_two_nights),
    (mean_and_deviation, stays_red),
    (no_smallest_effect, says_nothing_of_small_changes),
    (no_direction, says_nothing_of_gains),
    (rebaselined_on_failure, stays_red),
    (rebaselined_on_failure, finds_a_drift),
    (no_frozen_baseline, finds_a_drift),
    (history_with_tonight, finds_what_is_first_seen_tonight),
    (one_night_is_enough, believes_one_wild_night),
]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.__name__)
def test_judge(requirement: Callable[[], bool]) -> None:
    """The judge answers each question rightly, and for each there is a fault that would change the answer."""
    assert requirement()
    assert requirement in [asked for _, asked in FAULTS]


@pytest.mark.parametrize(("plant", "requirement"), FAULTS)
def test_faults_are_caught(plant: Plant, requirement: Callable[[], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge with a planted fault fails the requirement that names it."""
    plant(monkeypatch)
    assert not requirement()


def test_finding() -> None:
    """A finding says what moved, how far, against what and since when."""
    values = noisy(62)
    values[-2:] = 900.0
    (found,) = judged(series(values)).regressions
    assert found.value == 900.0
    assert found.expected == pytest.approx(1000, rel=0.01)
    assert found.change == pytest.approx(-0.1, abs=0.01)
    assert found.since == names(62)[-2]
    assert 0 < found.p < 1e-6
    assert "two nights running, since 2026-03-02" in found.why
    assert "accepted level" in found.why


def test_gains_are_said() -> None:
    """What became better is said, and fails no night; what may move neither way has no better."""
    values = noisy(62)
    values[-2:] *= 1.1
    found = judged(series(values), series([3.0] * 61 + [4.0], "tensors", "of 9", "either"))
    assert said(found.improvements) == ["throughput by marlin batch_8"]
    assert said(found.regressions) == ["tensors batch_8"]


def test_reference_that_falls_too() -> None:
    """A ratio that stays while both of its sides fall hides nothing: the reference's own figure is a series."""
    base, ours = noisy(62, 2400, seed=1), noisy(62, 2600, seed=2)
    ratio = ours / base
    base[-2:] *= 0.93
    ours[-2:] *= 0.93
    found = judged(
        series(base, "throughput of fp16"),
        series(ours, "throughput by marlin"),
        series(ratio, "throughput by marlin, of FP16's", ""),
    )
    assert sorted(said(found.regressions)) == ["throughput by marlin batch_8", "throughput of fp16 batch_8"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number(value: float) -> None:
    """What was a number and is none regressed; what never was one is no news."""
    never = series([math.nan] * 20, case="never")
    found = judged(series([*noisy(19), value]), never)
    assert said(found.regressions) == ["throughput by marlin batch_8"]
    assert "no number tonight" in found.regressions[0].why
    assert not judged(series([*noisy(18), math.nan, 1000.0])).regressions


def test_new_and_gone() -> None:
    """A quantity that is measured for the first time, or no longer, is said, and is no regression."""
    found = judged(series(noisy(20)), series(noisy(1), case="new", start=19), series(noisy(19), case="gone"))
    assert said(found.new) == ["throughput by marlin new"]
    assert said(found.gone) == ["throughput by marlin gone"]
    assert not found.regressions


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_few_nights(count: int) -> None:
    """Of one to four nights nothing subtle is claimed, which is said, and a collapse is found all the same."""
    values = noisy(count, sigma=0.01)
    values[-1] *= 0.95
    found = judged(series(values))
    assert (found.regressions, said(found.insufficient)) == ((), ["throughput by marlin batch_8"])
    values[-1] = 450.0
    assert said(judged(series(values)).regressions) == ["throughput by marlin batch_8"]


@pytest.mark.parametrize("found", [[], [series([1000.0])], [series([])]], ids=["none", "first night", "empty"])
def test_nothing_to_compare(found: list[Series]) -> None:
    """Without a history nothing is worse."""
    result = judge(found, names(1)[0], None, None)
    assert (result.regressions, result.improvements, result.suspects) == ((), (), ())


def test_tonight_is_the_accepted_night() -> None:
    """A night that is its own baseline is held against nothing, and nights after it are not looked at."""
    values = noisy(62)
    values[40:] *= 0.5
    found = series(values)
    listed = names(62)
    assert not judge([found], listed[40], listed[40], None).regressions
    assert not judge([found], listed[39], listed[0], None).regressions
    assert judge([found], listed[41], listed[0], None).regressions


def test_accepted_change() -> None:
    """A loss that was accepted is what is expected from then on; the frozen baseline still names it."""
    values = noisy(62)
    values[30:] *= 0.9
    assert not judged(series(values), accepted=30).regressions
    (found,) = judged(series(values), accepted=30, frozen=0).regressions
    assert "frozen baseline" in found.why


def test_accepted_fluke() -> None:
    """A wild night that somebody accepted is no level: the nights before and after it agree on another."""
    values = noisy(62)
    values[30] *= 1.3
    assert not judged(series(values), accepted=30).regressions


def test_huge_change_on_its_first_night() -> None:
    """A collapse is believed at once, and a doubtful night is said to be one."""
    values = noisy(62)
    values[-1] *= 0.4
    assert "more than any noise does" in judged(series(values)).regressions[0].why
    values = noisy(62)
    values[-1] *= 0.95
    found = judged(series(values))
    assert (found.regressions, said(found.suspects)) == ((), ["throughput by marlin batch_8"])


def test_reference_whose_peak_grows() -> None:
    """A reference that takes more memory than it did is found, though what the artifact saves of it only grows."""
    worse = worse_of("reference: peak image", "GiB")
    found = judged(
        series([*[7.071] * 40, 7.9], "reference: peak image", "GiB", worse, "image"),
        series([*[0.99] * 40, 1.2], "peak image: lower by, of the weights saved", "", "down", "image"),
    )
    assert said(found.regressions) == ["reference: peak image image"]


def test_facts_are_not_judged() -> None:
    """What is for the worse neither way and never is not judged."""
    assert not judged(series([*[1.0] * 40, 9.0], "published claim", "", "never")).regressions


def test_differences_about_zero() -> None:
    """What hovers about zero is compared by its difference: a share of next to nothing is no news."""
    hovering = [0.0, 2.0, -2.0, 0.0, 4.0] * 8
    lost = lambda *tonight: series([*hovering, *tonight], "memory lost", "MiB", "up")  # noqa: E731
    assert not judged(lost(12.0, 14.0)).regressions
    assert judged(lost(100.0, 100.0)).regressions
    rounding = series([*[0.0] * 40, 3e-8], "weight off most, of the largest", "", "up")
    assert not judged(rounding).regressions


def test_gaps() -> None:
    """Nights without a value are passed over: the one before counts as the night before."""
    listed = names(62)
    values = noisy(62)
    values[[58, 61]] *= 0.9
    keep = [*range(59), 61]
    whole = series(values)
    found = Series(whole.key, "down", tuple(whole.points[i] for i in keep))
    assert said(judge([found, series(noisy(62), case="other")], listed[-1], listed[0], None).regressions) == [
        "throughput by marlin batch_8"
    ]


def test_rules() -> None:
    """Every rule says why; quantities of the suites fall under the rule that is meant for them."""
    assert all(rule.why and rule.name for rule in rules())
    expected = {
        ("throughput of fp16", "tokens/s"): ("throughput", "down"),
        ("throughput by marlin, of FP16's", ""): ("throughput", "down"),
        ("throughput by marlin, of FP16's, were reading fewer bytes all that changed", ""): (
            "facts about the run",
            "never",
        ),
        ("tokens per second", ""): ("throughput", "down"),
        ("coded bytes per second", "GB/s"): ("throughput", "down"),
        ("median time", "ms"): ("latency", "up"),
        ("median time to first token by marlin, of FP16's, upper end", ""): ("latency", "up"),
        ("mean token KL", "nats"): ("KL divergence", "up"),
        ("reference's perplexity", ""): ("KL divergence", "up"),
        ("reference's accuracy", "share of questions"): ("accuracy", "down"),
        ("codes that are not in their place", "of 2097152"): ("counts", "either"),
        ("reference: held by others", "MiB"): ("facts about the run", "never"),
        ("published claim", ""): ("facts about the run", "never"),
        ("KL of graphs to eager, of the noise floor", ""): ("in units of the noise floor", "up"),
        ("memory lost", "MiB"): ("mebibytes", "up"),
        ("reference: peak image", "GiB"): ("peak memory", "up"),
        ("artifact: peak text", "GiB"): ("peak memory", "up"),
        ("artifact: peak text above the weights", "MiB"): ("mebibytes", "up"),
        ("peak text: lower by, of the weights saved", ""): ("bytes", "never"),
        ("reference: NVML after image", "GiB"): ("bytes", "never"),
        ("largest drift of a layer", ""): ("KL divergence", "up"),
        ("something else", ""): ("anything else", "never"),
    }
    assert {key: (rule_of(*key).name, worse_of(*key)) for key in expected} == expected


def test_chances() -> None:
    """The chance that two nights are both so far off is what a million drawn pairs say."""
    rng = np.random.default_rng(0)
    count = 1_000_000
    for freedom, nights, alike, fars in ((5.0, 2, 0.1, (4.0, 5.0)), (20.0, 40, 0.5, (2.5, 3.0))):
        base = baseline.Baseline(*(np.array([x]) for x in (0.0, nights, 1.0, freedom, False, alike)))
        shared = rng.normal(size=count) * np.sqrt(base.doubt + alike)
        pair = shared + math.sqrt(1 - alike) * rng.normal(size=(2, count))
        least = pair.min(0) / np.sqrt(rng.chisquare(freedom, count) / freedom)
        for far in fars:
            asked = np.array([far])
            assert evidence.of_both(asked, asked + 1, base)[0] == pytest.approx((least > far).mean(), rel=0.05)


def test_correction() -> None:
    """Holm's correction: of 100 chances of which one is a thousandth, none stands at 1 in 200, and one of 1e-5 does."""
    chances = np.full(100, 0.5)
    chances[7] = 1e-3
    assert not evidence.holm(chances, 0.005, 100).any()
    chances[[7, 9]] = 1e-5, 5.04e-5  # the second is held against 99 others, the first against 100
    assert np.flatnonzero(evidence.holm(chances, 0.005, 100)).tolist() == [7, 9]


def test_change_points() -> None:
    """Levels that changed are dated; of noise, wild nights and constants nothing is."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((365, 100))
    assert np.mean([bool(rows) for rows in changes(noise)]) <= 0.02
    noise[200:] += 3
    noise[300:] -= 6
    noise[50] += 30
    found = changes(noise)
    assert np.mean([len(rows) == 2 for rows in found]) >= 0.9
    assert all(abs(rows[0] - 200) <= 3 for rows in found if len(rows) == 2)
    assert changes(np.ones((40, 1))) == [[]]
    step = np.r_[np.ones(20), np.full(20, 2.0)][:, None]
    assert changes(step) == [[20]]
    assert changes(np.full((40, 1), np.nan)) == [[]]
    assert changes(np.ones((3, 2))) == [[], []]


def test_speed() -> None:
    """A year of 1500 quantities is judged within seconds."""
    found = [series(noisy(365, seed=i), case=str(i)) for i in range(1500)]
    start = time.perf_counter()
    judged(*found, frozen=0, accepted=200)
    assert time.perf_counter() - start < 10
