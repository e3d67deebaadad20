"""Every check of throughput fails on the fault it exists for; rounds are values, so that nothing is timed."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from fixtures.core.measurement import Measurement
from fixtures.core.targets import Target
from fixtures.meters.bandwidth import Roofline
from fixtures.meters.load import Timing
from fixtures.meters.regimes import BATCH_8, LONG_PROMPT, ONE_BY_ONE, SINGLE_STREAM, TOGETHER, Regime
from fixtures.meters.rounds import COUNTED, WARM_UP, Recorded, Round
from fixtures.options import Selection
from suites import test_throughput
from suites.meta.answering import listener

CLAIM = Target("qwen2_5_vl", "7b", "rtn")  # where +32 % are claimed
FLOOR = Target("qwen2_5_vl", "own", "rtn")  # where no gain is expected
NAMES = ("fp16", "machete", "marlin")
KERNELS = {name: (name,) for name in NAMES}
Change = Callable[[Round], Round | None]


def one_round(regime: Regime, condition: str, number: int, step: float, *, waits: float = 0.0) -> Round:
    """A round in which tokens come every ``step`` seconds, and the first after two steps and ``waits``."""

    def timing(place: int) -> Timing:
        begin = place * waits
        times = tuple((begin + step * (2 + token), 1) for token in range(regime.new_tokens))
        count = regime.new_tokens
        return Timing(0.0, begin, times[-1][0], count, times, regime.least_prompt_tokens, count)

    return Round(condition, number, tuple(timing(place) for place in range(regime.requests)), busy=0.3)


def recorded(regime: Regime, steps: Mapping[str, float], noise: float = 0.01, seed: int = 0) -> Recorded:
    """Rounds of conditions by their time per token, disturbed by a share of ``noise``."""
    draw = np.random.default_rng(seed)
    rounds = [
        one_round(regime, name, number, step * math.exp(draw.normal(0, noise)))
        for number in (WARM_UP, *range(COUNTED))
        for name, step in steps.items()
    ]
    return Recorded(regime, tuple(steps), tuple(rounds), {name: KERNELS.get(name, (name,)) for name in steps})


GOOD_STEPS = {"fp16": 5e-3, "machete": 4e-3, "marlin": 3.4e-3}  # the 7B's: 1.25 and 1.47


def good(regime: Regime = SINGLE_STREAM) -> Recorded:
    """What a 7B does where the claim holds."""
    return recorded(regime, GOOD_STEPS)


def changed(change: Change, what: Recorded | None = None, condition: str = "marlin") -> Recorded:
    """Rounds with one condition's changed, or left out where ``change`` gives None."""
    what = what or good()
    rounds = [change(one) if one.condition == condition else one for one in what.rounds]
    return dataclasses.replace(what, rounds=tuple(one for one in rounds if one is not None))


def each(change: Callable[[Timing], Timing]) -> Change:
    """Change every request of a round."""
    return lambda one: dataclasses.replace(one, timings=tuple(map(change, one.timings)))


def first(change: Callable[[Timing], Timing], number: int = 2) -> Change:
    """Change one request of one round."""

    def apply(one: Round) -> Round:
        if one.number != number:
            return one
        return dataclasses.replace(one, timings=(change(one.timings[0]), *one.timings[1:]))

    return apply


def contest_of(what: Recorded) -> Any:
    """A contest that has measured ``what``, whatever it is asked for."""

    class Measured:
        names = NAMES
        cards = 1
        expected = KERNELS
        others: dict[str, int | None] = {}

        def __call__(self, regime: Regime, decided: Callable[[Recorded], bool] = lambda _: True) -> Recorded:
            return what

        def arrivals(self, name: str) -> Recorded:
            return what

        def weights_of(self, target: Target) -> str:
            return target.weights

    return Measured()


def throughput(what: Recorded, selection: Selection, target: Target = CLAIM) -> dict[str, Measurement]:
    """What the check of throughput says."""
    verify = listener()
    test_throughput.test_throughput(contest_of(what), target, what.regime, selection.limits, verify)
    return {m.quantity: m for m in verify.measurements}


def latency(what: Recorded, selection: Selection, target: Target = CLAIM) -> dict[str, Measurement]:
    """What the check of latency says."""
    verify = listener()
    test_throughput.test_latency(contest_of(what), target, what.regime, selection.limits, verify)
    return {m.quantity: m for m in verify.measurements}


def broken(said: Mapping[str, Measurement]) -> list[str]:
    """The quantities that do not hold."""
    return [quantity for quantity, m in said.items() if m.holds is False]


def lower_end(said: Mapping[str, Measurement]) -> Measurement:
    """The one that decides."""
    return next(m for quantity, m in said.items() if quantity.endswith("lower end"))


# The good hold


def test_good_rounds_hold(selection: Selection) -> None:
    """Rounds as they should be pass every check, and the best kernel is the one that is fastest."""
    said = throughput(good(), selection)
    assert broken(said) == []
    assert "the best: marlin" in said["throughput by the best kernel, of FP16's, lower end"].detail
    assert said["throughput by marlin, of FP16's"].value == pytest.approx(1.47, rel=0.02)
    assert said["gain expected"].value == 1
    assert broken(latency(good(), selection)) == []


def test_no_gain_where_none_is_expected(selection: Selection) -> None:
    """Where no gain is expected as much as FP16's throughput holds, and the report says that none was expected."""
    said = throughput(recorded(SINGLE_STREAM, dict.fromkeys(NAMES, 3e-3)), selection, FLOOR)
    assert broken(said) == []
    assert said["gain expected"].value == 0
    assert "no, only" in said["gain expected"].detail


@pytest.mark.parametrize("check", [test_throughput.test_throughput, test_throughput.test_latency])
@pytest.mark.parametrize("noisy", [False, True])
def test_checks_ask_for_rounds_until_their_bound_is_decided(check: Any, noisy: bool, selection: Selection) -> None:
    """A check asks for more rounds where its own bound lies inside an interval, and for none where it does not."""
    what = good()
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


# Arriving together


def arrivals(steps: tuple[float, float], waits: float) -> Recorded:
    """Sixteen requests, one by one and together, by their times per token."""
    draw = np.random.default_rng(0)
    rounds = [
        one_round(asked, asked.name, number, step * math.exp(draw.normal(0, 0.01)), waits=wait)
        for number in (WARM_UP, *range(COUNTED))
        for asked, step, wait in ((ONE_BY_ONE, steps[0], 33 * steps[0]), (TOGETHER, steps[1], waits))
    ]
    return Recorded(TOGETHER, (ONE_BY_ONE.name, TOGETHER.name), tuple(rounds), {})


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
    lines = {name: Roofline(size, 4.3e12) for name, size in zip(NAMES, (14 << 30, 5 << 30, 5 << 30), strict=True)}
    most = selection.limits("throughput.of_roofline", CLAIM.weights)
    verify = listener()
    test_throughput.bounded(good(), lines, most, verify)
    assert [m.holds for m in verify.measurements if m.bound] == [True] * 3
    assert "TB/s" in verify.measurements[0].detail

    verify = listener()
    test_throughput.bounded(recorded(SINGLE_STREAM, {**GOOD_STEPS, "marlin": 5e-4}), lines, most, verify)
    assert [m.holds for m in verify.measurements if m.bound] == [True, True, False]


# Every quantity of every check


def fewer(what: Recorded) -> Recorded:
    """Without the last round of every condition."""
    last = max(one.number for one in what.rounds)
    return dataclasses.replace(what, rounds=tuple(one for one in what.rounds if one.number != last))


def lost(what: Recorded) -> Recorded:
    """With a request of one round of the last condition that failed."""
    return changed(first(lambda t: dataclasses.replace(t, error="HTTP 500: oops")), what, what.conditions[-1])


def busy(what: Recorded) -> Recorded:
    """With one round in which the generator's core was never idle."""
    return changed(lambda one: dataclasses.replace(one, busy=0.99) if one.number == 2 else one, what, what.base)


def late(what: Recorded) -> Recorded:
    """With quantized first tokens that come much later after the same arrival, and all others as they did."""

    def wait(timing: Timing) -> Timing:
        return dataclasses.replace(timing, arrived=timing.arrived - 0.02)

    for condition in what.others:
        what = changed(each(wait), what, condition)
    return what


def steps(**times: float) -> Recorded:
    """Good rounds, but for the times per token of some conditions."""
    return recorded(SINGLE_STREAM, {**GOOD_STEPS, **times})


SOUND = (
    ("rounds counted, fewest of a condition", fewer),
    ("requests that are no measurement", lost),
    ("load generator, busiest", busy),
)
SLOW = {"machete": 9e-3, "marlin": 9e-3}
ANOTHER_KERNEL = dataclasses.replace(good(), kernels={**KERNELS, "machete": ("marlin",)})
APART = {"throughput together, of one by one, lower end", "time to first token together, of one by one, upper end"}
TOGETHER_GOOD = arrivals((3e-3, 4e-3), 0)
OF_A_STEP = "of a decode step by {}, the time to read its weights"
# check, what it is asked of, and exactly what must not hold, by whichever kernel
PLANTED: list[tuple[Callable[..., None], Recorded, set[str]]] = [
    *((test_throughput.test_throughput, fault(good()), {quantity}) for quantity, fault in SOUND),
    (test_throughput.test_throughput, ANOTHER_KERNEL, {"conditions on another kernel"}),
    (test_throughput.test_throughput, steps(**SLOW), {"throughput, of FP16's, lower end"}),
    *((test_throughput.test_latency, fault(good()), {quantity}) for quantity, fault in SOUND),
    (test_throughput.test_latency, ANOTHER_KERNEL, {"conditions on another kernel"}),
    (test_throughput.test_latency, late(good()), {"median time to first token, of FP16's, upper end"}),
    (
        test_throughput.test_latency,
        changed(each(lambda t: dataclasses.replace(t, arrived=-0.05)), steps(**SLOW), "fp16"),
        {"median inter-token latency, of FP16's, upper end"},
    ),
    (test_throughput.test_concurrent_serving, fewer(TOGETHER_GOOD), {SOUND[0][0]}),
    # whatever is lost here leaves no ratio, for there is but one condition beside the base
    (test_throughput.test_concurrent_serving, lost(TOGETHER_GOOD), {SOUND[1][0], *APART}),
    (test_throughput.test_concurrent_serving, busy(TOGETHER_GOOD), {SOUND[2][0]}),
    (test_throughput.test_concurrent_serving, arrivals((3e-3, 30e-3), 0), {min(APART)}),
    (test_throughput.test_concurrent_serving, arrivals((3e-3, 1e-3), 33e-3), {max(APART)}),
    *(
        (test_throughput.test_step, steps(**{name: 5e-4 if name != "fp16" else 2e-3}), {OF_A_STEP.format(name)})
        for name in NAMES
    ),
]


def heard(
    check: Callable[..., None], what: Recorded, selection: Selection, monkeypatch: pytest.MonkeyPatch
) -> dict[str, bool]:
    """Whether what a check judges holds, by quantity, without saying that it is the best kernel's."""
    monkeypatch.setattr(test_throughput, "decode_bytes", lambda checkpoint, _: checkpoint)
    verify = listener()
    given: dict[str, Any] = {"contest": contest_of(what), "target": FLOOR, "regime": what.regime, "verify": verify}
    given |= {"limits": selection.limits, "reference": 14 << 30, "artifact": 5 << 30, "adapter": None}
    given |= {"bandwidth": 4.3e12}
    check(**{name: given[name] for name in check.__code__.co_varnames[: check.__code__.co_argcount]})
    judged = [m for m in verify.measurements if m.bound]
    return {re.sub(r" by the best kernel, of FP16's", ", of FP16's", m.quantity): bool(m.holds) for m in judged}


@pytest.mark.parametrize(
    "planted", PLANTED, ids=lambda planted: f"{planted[0].__name__}: {' and '.join(sorted(planted[2]))}"
)
def test_fault_fails_what_it_is_for(
    planted: tuple[Callable[..., None], Recorded, set[str]], selection: Selection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every planted fault fails the quantity that it is for, and no other of its check."""
    check, what, expected = planted
    assert {quantity for quantity, holds in heard(check, what, selection, monkeypatch).items() if not holds} == expected


def test_every_quantity_has_a_fault(selection: Selection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Good rounds hold in every check there is, and every quantity that is judged of them has a planted fault."""
    checks = {check for name, check in vars(test_throughput).items() if name.startswith("test_")}
    assert checks == {check for check, _, _ in PLANTED}
    for check in checks:
        what = TOGETHER_GOOD if check is test_throughput.test_concurrent_serving else good()
        judged = heard(check, what, selection, monkeypatch)
        assert [quantity for quantity, holds in judged.items() if not holds] == []
        assert judged.keys() == {quantity for of, _, expected in PLANTED if of is check for quantity in expected}


def test_limits_are_there_for_every_case(selection: Selection) -> None:
    """Every target and regime has its limits, a checkpoint of somebody's own included; the claim stands at the 7B."""
    for size in ("3b", "7b", "own"):
        for family in ("qwen2_5_vl", "qwen2_5_omni"):
            for quantizer in ("rtn", "awq", "bnb-nf4", "bnb-int8", "awq_artifact", "bitsandbytes_artifact"):
                for regime in (*test_throughput.REGIMES, *test_throughput.STREAMED):
                    case = (Target(family, size, quantizer).weights, quantizer, regime.name)
                    ratio, ttft, itl = (
                        selection.limits(f"throughput.{name}", *case) for name in ("ratio", "ttft", "itl")
                    )
                    assert 0 < ratio < 3
                    assert ttft > 0
                    assert itl > 0
    assert selection.limits("throughput.ratio", CLAIM.weights, "rtn", "single_stream") >= 1.32
    assert selection.limits("throughput.concurrent", CLAIM.weights) == 1.72
    assert selection.limits("throughput.concurrent_ttft", CLAIM.weights) == 0.17


def test_expectation_names_the_reason() -> None:
    """Where no gain is expected the reason fits the regime: computing for prompts, launches for decoding."""
    reading = test_throughput.expectation(recorded(LONG_PROMPT, dict.fromkeys(NAMES, 1e-3)), "marlin", 0.8)
    decoding = test_throughput.expectation(recorded(SINGLE_STREAM, dict.fromkeys(NAMES, 1e-3)), "marlin", 0.8)
    assert "matrix products" in reading
    assert "launches" in decoding
    assert test_throughput.expectation(good(), "marlin", 1.32).startswith("yes, 1.32 at least; marlin is faster")


def test_parameters_of_the_checks() -> None:
    """The checks are about a target and a regime, which their ids name."""
    for check in (test_throughput.test_throughput, test_throughput.test_latency):
        (mark,) = (mark for mark in check.pytestmark if mark.name == "parametrize")  # type: ignore[attr-defined]
        assert mark.args[0] == "regime"
        assert [str(regime) for regime in mark.args[1]] == [regime.name for regime in mark.args[1]]
