"""Every check of throughput fails on the fault it exists for; rounds are values, so that nothing is timed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest

from fixtures.meters.load import Timing
from fixtures.meters.regimes import BATCH_8, SINGLE_STREAM, Regime
from fixtures.meters.rounds import COUNTED, WARM_UP, Recorded, Round
from fixtures.options import Selection
from suites import test_throughput
from suites.meta.answering import listener
from suites.meta.contests import (
    CLAIM,
    FLOOR,
    GOOD_STEPS,
    KERNELS,
    LINES,
    NAMES,
    SCALED_GOOD,
    SCALED_STEPS,
    arrivals,
    broken,
    changed,
    contest_of,
    each,
    first,
    good,
    latency,
    lower_end,
    one_round,
    recorded,
    throughput,
)

# The good hold


def test_good_rounds_hold(selection: Selection) -> None:
    """Rounds as they should be pass every check, and the best kernel is the one that is fastest."""
    said = throughput(good(), selection)
    assert broken(said) == []
    assert "the best: marlin" in said["throughput by the best kernel, of FP16's, lower end"].detail
    assert said["throughput by marlin, of FP16's"].value == pytest.approx(1.47, rel=0.02)
    assert said["gain expected"].value == 1
    by_round = said["throughput by marlin"].detail.removeprefix("by round: ").split(", ")
    assert len(by_round) == COUNTED
    assert [float(one) for one in by_round] == pytest.approx(
        good().values("marlin", test_throughput.rounds.tokens_per_second), rel=1e-3
    )
    assert broken(latency(good(), selection)) == []


def test_no_gain_where_none_is_expected(selection: Selection) -> None:
    """Where no gain is expected as much as FP16's throughput holds, and the report says that none was expected."""
    said = throughput(recorded(SINGLE_STREAM, dict.fromkeys(NAMES, 3e-3)), selection, FLOOR)
    assert broken(said) == []
    assert said["gain expected"].value == 0
    assert "no, only" in said["gain expected"].detail


@pytest.mark.parametrize(
    ("check", "what"),
    [
        (test_throughput.test_throughput, good()),
        (test_throughput.test_latency, good()),
        (test_throughput.test_scaling, SCALED_GOOD),  # here uneven of FP16 alone: each kernel has a bound
    ],
    ids=["throughput", "latency", "scaling"],
)
@pytest.mark.parametrize("noisy", [False, True])
def test_checks_ask_for_rounds_until_their_bound_is_decided(
    check: Any, what: Recorded, noisy: bool, selection: Selection
) -> None:
    """A check asks for more rounds where its own bound lies inside an interval, and for none where it does not."""
    asked: list[bool] = []

    class Curious(type(contest_of(what))):  # type: ignore[misc]
        def __call__(self, regime: Regime, decided: Callable[[Recorded], bool] = lambda _: True) -> Recorded:
            asked.append(decided(uneven(what) if noisy else what))
            return what

    check(Curious(), CLAIM, SINGLE_STREAM, selection.limits, listener())
    assert asked == [not noisy]


def uneven(what: Recorded) -> Recorded:
    """Rounds of the quantized ones by turns four times as fast and as slow: any bound near 1 is inside the interval."""

    def stretched(one: Round) -> Round:
        by = 1.0 if one.condition == what.base else 4.0 if one.number % 2 else 0.25
        timings = (
            dataclasses.replace(
                timing,
                arrived=by * timing.arrived,
                sent=by * timing.sent,
                done=by * timing.done,
                chunks=tuple((by * time, tokens) for time, tokens in timing.chunks),
            )
            for timing in one.timings
        )
        return dataclasses.replace(one, timings=tuple(timings))

    return dataclasses.replace(what, rounds=tuple(map(stretched, what.rounds)))


def test_quantities_are_the_same_whichever_kernel_is_best(selection: Selection) -> None:
    """Nights in which another kernel is the best measure the same quantities: a loss cannot leave with its name."""
    lost = recorded(SINGLE_STREAM, GOOD_STEPS | {"marlin": 4.2e-3})
    nights = [[throughput(one, selection), latency(one, selection)] for one in (good(), lost)]
    assert [list(said) for said in nights[0]] == [list(said) for said in nights[1]]
    best = "throughput by the best kernel, of FP16's, lower end"
    assert [said[best].detail.partition("\n")[0] for said, _ in nights] == ["the best: marlin", "the best: machete"]
    before, after = (said["throughput by marlin"].value for said, _ in nights)
    assert after / before == pytest.approx(3.4 / 4.2, rel=0.02)


def test_tables_hold_every_kernel(selection: Selection) -> None:
    """The tables have a row for every kernel, FP16's among them, and no NaN, which JSON has not."""
    verify = listener()
    what = changed(lambda one: None)
    for check in (test_throughput.test_throughput, test_throughput.test_latency):
        for rounds in (good(), what):
            check(contest_of(rounds), CLAIM, SINGLE_STREAM, selection.limits, verify)
    for table in verify.tables:
        assert list(dict.fromkeys(row[1] for row in table.rows)) == list(NAMES)
        assert {len(row) for row in table.rows} == {len(table.columns)}
        assert not [cell for row in table.rows for cell in row if isinstance(cell, float) and math.isnan(cell)]


# Throughput


def test_scaling_holds_each_kernel_against_itself(selection: Selection) -> None:
    """The table of scaling has a line a kernel: its tokens per second on one GPU and on two, and their ratio."""
    verify = listener()
    test_throughput.test_scaling(contest_of(SCALED_GOOD), CLAIM, SINGLE_STREAM, selection.limits, verify)
    (table,) = verify.tables
    assert [row[:3] for row in table.rows] == [("single_stream", "fp16", 2), ("single_stream", "marlin", 2)]
    for row, gain in zip(table.rows, (5 / 3.2, 3.4 / 2.6), strict=True):
        one, two, ratio, low, high = row[3:]
        assert two / one == pytest.approx(gain, rel=0.03)  # type: ignore[operator]
        assert low < ratio < high  # type: ignore[operator]
        assert ratio == pytest.approx(gain, rel=0.02)
    assert [str(regime) for regime in test_throughput.SCALED] == ["single_stream", "saturated_64"]


def test_a_gain_by_several_gpus_is_judged_by_its_interval(selection: Selection) -> None:
    """A gain on two GPUs that its rounds are too noisy to tell is none."""
    verify = listener()
    noisy = recorded(SINGLE_STREAM, {**SCALED_STEPS, "fp16 on 2": 5e-3 / 1.3}, noise=0.1)
    test_throughput.test_scaling(contest_of(noisy), CLAIM, SINGLE_STREAM, selection.limits, verify)
    said = {m.quantity: m for m in verify.measurements}
    assert broken(said) == ["throughput of fp16 on 2 GPUs, of 1 GPU's, lower end"]
    assert verify.tables[0].rows[0][5] > 1.2  # type: ignore[operator]


def test_slower_kernels_are_caught(selection: Selection) -> None:
    """Kernels that are slower than FP16 miss the claim, and the floor."""
    slow = recorded(SINGLE_STREAM, {"fp16": 3e-3, "machete": 5e-3, "marlin": 6e-3})
    for target in (CLAIM, FLOOR):
        assert broken(throughput(slow, selection, target)) == ["throughput by the best kernel, of FP16's, lower end"]


def test_a_gain_less_than_the_claim_is_caught(selection: Selection) -> None:
    """A quarter faster is not a third faster."""
    said = throughput(recorded(SINGLE_STREAM, {"fp16": 5e-3, "machete": 4e-3}), selection)
    assert lower_end(said).holds is False


def test_noise_is_no_gain(selection: Selection) -> None:
    """Where noise is so large that the interval holds 1, a point beyond the claim does not hold it."""
    noisy = changed(
        lambda one: one_round(SINGLE_STREAM, "marlin", one.number, (2e-3, 5.5e-3)[one.number % 2]),
        recorded(SINGLE_STREAM, {"fp16": 5e-3, "marlin": 3.4e-3}),
    )
    said = throughput(noisy, selection)
    assert said["throughput by marlin, of FP16's"].value > 1.32
    assert lower_end(said).value < 1
    assert lower_end(said).holds is False


def test_warm_up_does_not_count(selection: Selection) -> None:
    """A slow warm-up changes nothing; the same round counted would."""

    def slow(number: int) -> Recorded:
        return changed(
            lambda one: one_round(SINGLE_STREAM, "marlin", number, 0.5) if one.number == number else one, good()
        )

    assert throughput(slow(WARM_UP), selection) == throughput(good(), selection)
    assert lower_end(throughput(slow(0), selection)).holds is False


@pytest.mark.parametrize("kept", [0, 1, 2, COUNTED - 1])
def test_missing_rounds_are_caught(kept: int, selection: Selection) -> None:
    """Too few rounds never hold, none at all included, whether of one condition or of all."""
    few = changed(lambda one: one if one.number < kept else None)
    for condition in NAMES:
        few = changed(lambda one: one if one.number < kept else None, few, condition)
        assert "rounds counted, fewest of a condition" in broken(throughput(few, selection))
    nothing = dataclasses.replace(good(), rounds=())
    assert {
        "rounds counted, fewest of a condition",
        "requests that are no measurement",
        "throughput by the best kernel, of FP16's, lower end",
        "load generator, busiest",
    } == set(broken(throughput(nothing, selection)))


def test_a_round_twice_is_caught(selection: Selection) -> None:
    """A round that was recorded twice under one number is no round more."""
    what = good()
    twice = dataclasses.replace(what, rounds=(*what.rounds, *(one for one in what.rounds if one.number == 0)))
    assert lower_end(throughput(twice, selection)).holds is False


def test_rounds_that_are_no_pairs_are_caught(selection: Selection) -> None:
    """Rounds of other numbers cannot be compared, as many as they may be."""
    shifted = changed(lambda one: dataclasses.replace(one, number=one.number + 10) if one.number >= 0 else one)
    found = shifted.ratio("marlin", test_throughput.ITL)
    assert math.isnan(found.low)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param(lambda t: dataclasses.replace(t, error="HTTP 500: oops"), "HTTP 500", id="failed"),
        pytest.param(lambda t: dataclasses.replace(t, completion_tokens=5), "5 tokens came of 128", id="short"),
        pytest.param(
            lambda t: dataclasses.replace(t, chunks=t.chunks[:-1]), "127 tokens were streamed", id="chunk lost"
        ),
        pytest.param(lambda t: dataclasses.replace(t, cached_tokens=112), "came from a cache", id="cache hit"),
        pytest.param(lambda t: dataclasses.replace(t, prompt_tokens=5), "a prompt of 5 tokens", id="short prompt"),
        pytest.param(
            lambda t: dataclasses.replace(t, asked_tokens=1, completion_tokens=1, chunks=t.chunks[:1]),
            "1 tokens were asked",
            id="asked for less",
        ),
    ],
)
@pytest.mark.parametrize("condition", NAMES)
def test_a_broken_request_is_caught(
    change: Callable[[Timing], Timing], said: str, condition: str, selection: Selection
) -> None:
    """One request of one round that failed, fell short or came from a cache is caught, whoever it helped."""
    what = changed(first(change), condition=condition)
    found = throughput(what, selection)["requests that are no measurement"]
    assert (found.holds, found.value) == (False, 1)
    assert said in found.detail
    assert condition in found.detail
    assert "requests that are no measurement" in broken(latency(what, selection))


def test_a_dropped_request_is_caught(selection: Selection) -> None:
    """A failed request that was silently left out of its round is missed."""
    what = changed(lambda one: dataclasses.replace(one, timings=one.timings[:-1]) if one.number == 3 else one)
    assert "2 requests of 3" in throughput(what, selection)["requests that are no measurement"].detail


def test_nan_is_caught(selection: Selection) -> None:
    """A time that is no number never holds, in any check."""
    what = changed(each(lambda t: dataclasses.replace(t, done=math.nan, chunks=((math.nan, 1), *t.chunks[1:]))))
    only = dataclasses.replace(what, conditions=("fp16", "marlin"))
    assert lower_end(throughput(only, selection)).holds is False
    assert [m.holds for q, m in latency(only, selection).items() if q.endswith("upper end")].count(False) >= 1


@pytest.mark.parametrize(
    "kernels", [("awq",), ("machete", "marlin"), ("machete",), (), ("fp16",)], ids=lambda k: "+".join(k) or "none"
)
def test_fallback_kernels_are_caught(kernels: tuple[str, ...], selection: Selection) -> None:
    """A condition whose server names another kernel than its own, one beside it, or none, is caught and said."""
    what = dataclasses.replace(good(), kernels={**KERNELS, "marlin": kernels})
    found = throughput(what, selection)["conditions on another kernel"]
    assert found.holds is False
    assert "marlin: expected marlin" in found.detail


def test_a_quantized_base_is_caught(selection: Selection) -> None:
    """Quantized against quantized is no comparison."""
    what = dataclasses.replace(good(), kernels={**KERNELS, "fp16": ("marlin",)})
    assert broken(throughput(what, selection)) == ["conditions on another kernel"]


@pytest.mark.parametrize("busy", [0.97, 1.4, math.nan])
def test_a_busy_generator_is_caught(busy: float, selection: Selection) -> None:
    """A load generator that cannot keep up measures itself."""
    what = changed(lambda one: dataclasses.replace(one, busy=busy))
    what = changed(lambda one: dataclasses.replace(one, busy=busy), what, "fp16")
    what = changed(lambda one: dataclasses.replace(one, busy=busy), what, "machete")
    assert broken(throughput(what, selection)) == ["load generator, busiest"]


# Latency


def test_slow_tokens_are_caught(selection: Selection) -> None:
    """Tokens that come as slowly as FP16's miss what is claimed of the 7B."""
    said = latency(recorded(SINGLE_STREAM, dict.fromkeys(NAMES, 5e-3)), selection)
    assert [quantity.split(" by ")[0] for quantity in broken(said)] == ["median inter-token latency"]


def test_a_slow_first_token_is_caught(selection: Selection) -> None:
    """A first token that comes twice as late is caught, though all later ones come sooner."""

    def late(timing: Timing) -> Timing:
        return dataclasses.replace(timing, chunks=((timing.chunks[0][0] + 0.0, 1), *timing.chunks[1:]), arrived=-0.02)

    what = good(BATCH_8)
    for condition in ("machete", "marlin"):
        what = changed(each(late), what, condition)
    said = latency(what, selection)
    assert [quantity.split(" by ")[0] for quantity in broken(said)] == ["median time to first token"]


def test_tokens_that_were_not_streamed_are_caught(selection: Selection) -> None:
    """Without a stream there is no latency, and nothing that holds."""
    what = good()
    for condition in NAMES:
        what = changed(each(lambda t: dataclasses.replace(t, chunks=())), what, condition)
    assert len([q for q in broken(latency(what, selection)) if q.endswith("upper end")]) == 2


@pytest.mark.parametrize(
    ("what", "caught"),
    [
        pytest.param(arrivals((3e-3, 4e-3), 0), [], id="served together"),
        pytest.param(arrivals((3e-3, 3e-3), 33 * 3e-3), ["throughput", "time"], id="one after another all the same"),
        pytest.param(arrivals((3e-3, 30e-3), 0), ["throughput"], id="together, but slowly"),
    ],
)
def test_concurrent_serving(what: Recorded, caught: list[str], selection: Selection) -> None:
    """A server that answers one after another, or all at a crawl, is caught against the claim."""
    verify = listener()
    test_throughput.test_concurrent_serving(contest_of(what), CLAIM, selection.limits, verify)
    assert [m.quantity.split()[0] for m in verify.measurements if m.holds is False] == caught


# What limits a step


def test_an_impossible_step_is_caught(selection: Selection) -> None:
    """A decode step in less time than its weights can be read was none: a cache answered, or nobody computed."""
    most = selection.limits("throughput.of_roofline", CLAIM.weights)
    verify = listener()
    test_throughput.bounded(good(), LINES, most, verify)
    assert [m.holds for m in verify.measurements if m.bound] == [True] * 3
    assert "TB/s" in verify.measurements[0].detail

    verify = listener()
    test_throughput.bounded(recorded(SINGLE_STREAM, {**GOOD_STEPS, "marlin": 5e-4}), LINES, most, verify)
    assert [m.holds for m in verify.measurements if m.bound] == [True, True, False]
