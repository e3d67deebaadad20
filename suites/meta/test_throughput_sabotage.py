"""Every quantity of every check of throughput fails on the fault planted for it, and on no other."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from fixtures.core.targets import Target
from fixtures.meters.bandwidth import Roofline
from fixtures.meters.load import Timing
from fixtures.meters.regimes import (
    BATCH_8,
    IMAGE_PREFILL,
    LONG_PROMPT,
    SATURATED_64,
    SATURATED_256,
    SINGLE_STREAM,
    Regime,
)
from fixtures.meters.rounds import Recorded
from fixtures.meters.settings import SETTINGS
from fixtures.options import Selection
from suites import test_throughput
from suites.meta.answering import listener
from suites.meta.contests import (
    CLAIM,
    FLOOR,
    GOOD_STEPS,
    KERNELS,
    NAMES,
    SCALED_GOOD,
    SCALED_STEPS,
    arrivals,
    changed,
    contest_of,
    each,
    first,
    good,
    recorded,
)


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


def scaled(**times: float) -> Recorded:
    """Good rounds on one GPU and on two, but for the times per token of some conditions."""
    return recorded(SINGLE_STREAM, {**SCALED_STEPS, **times})


SOUND = (
    ("rounds counted, fewest of a condition", fewer),
    ("requests that are no measurement", lost),
    ("load generator, busiest", busy),
)
SLOW = {"machete": 9e-3, "marlin": 9e-3}
ANOTHER_KERNEL = dataclasses.replace(good(), kernels={**KERNELS, "machete": ("marlin",)})
APART = {"throughput together, of one by one, lower end", "time to first token together, of one by one, upper end"}
TOGETHER_GOOD = arrivals((3e-3, 4e-3), 0)
ON_TWO = "throughput of {} on 2 GPUs, of 1 GPU's, lower end"
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
    (
        test_throughput.test_concurrent_serving,
        dataclasses.replace(TOGETHER_GOOD, kernels=dict.fromkeys(TOGETHER_GOOD.conditions, ("marlin",))),
        {"conditions on another kernel"},
    ),
    (test_throughput.test_concurrent_serving, arrivals((3e-3, 30e-3), 0), {min(APART)}),
    (test_throughput.test_concurrent_serving, arrivals((3e-3, 1e-3), 33e-3), {max(APART)}),
    *((test_throughput.test_vllm_settings, fault(good()), {quantity}) for quantity, fault in SOUND),
    (test_throughput.test_vllm_settings, ANOTHER_KERNEL, {"conditions on another kernel"}),
    (test_throughput.test_vllm_settings, steps(**SLOW), {"throughput low_latency, of FP16's, lower end"}),
    *((test_throughput.test_scaling, fault(SCALED_GOOD), {quantity}) for quantity, fault in SOUND if fault is not lost),
    # what a kernel loses on two leaves it no ratio
    (test_throughput.test_scaling, lost(SCALED_GOOD), {SOUND[1][0], ON_TWO.format("marlin")}),
    (
        test_throughput.test_scaling,
        dataclasses.replace(SCALED_GOOD, kernels={**SCALED_GOOD.kernels, "marlin on 2": ("machete",)}),
        {"conditions on another kernel"},
    ),
    # by a twentieth too little of what the 7B is to gain: 1.2 and 1.0
    (test_throughput.test_scaling, scaled(**{"fp16 on 2": 5e-3 / 1.14}), {ON_TWO.format("fp16")}),
    (test_throughput.test_scaling, scaled(**{"marlin on 2": 3.4e-3 / 0.95}), {ON_TWO.format("marlin")}),
    *(
        (test_throughput.test_step, steps(**{name: 5e-4 if name != "fp16" else 2e-3}), {OF_A_STEP.format(name)})
        for name in NAMES
    ),
]


OTHERS = {
    test_throughput.test_concurrent_serving: TOGETHER_GOOD,
    test_throughput.test_scaling: SCALED_GOOD,
}  # good rounds of another kind


def heard(check: Callable[..., None], what: Recorded, selection: Selection) -> dict[str, bool]:
    """Whether what a check judges holds, by quantity, without saying that it is the best kernel's."""
    verify = listener()
    target = CLAIM if check is test_throughput.test_scaling else FLOOR
    given: dict[str, Any] = {"contest": contest_of(what), "target": target, "regime": what.regime, "verify": verify}
    given |= {"limits": selection.limits, "scaled": contest_of(what)}
    given |= {"setting": SETTINGS[1], "under": lambda _: nullcontext(contest_of(what))}
    check(**{name: given[name] for name in check.__code__.co_varnames[: check.__code__.co_argcount]})
    judged = [m for m in verify.measurements if m.bound]
    return {re.sub(r" by the best kernel, of FP16's", ", of FP16's", m.quantity): bool(m.holds) for m in judged}


@pytest.mark.parametrize(
    "planted", PLANTED, ids=lambda planted: f"{planted[0].__name__}: {' and '.join(sorted(planted[2]))}"
)
def test_fault_fails_what_it_is_for(
    planted: tuple[Callable[..., None], Recorded, set[str]], selection: Selection
) -> None:
    """Every planted fault fails the quantity that it is for, and no other of its check."""
    check, what, expected = planted
    assert {quantity for quantity, holds in heard(check, what, selection).items() if not holds} == expected


def test_every_quantity_has_a_fault(selection: Selection) -> None:
    """Good rounds hold in every check there is, and every quantity that is judged of them has a planted fault."""
    checks = {check for name, check in vars(test_throughput).items() if name.startswith("test_")}
    assert checks == {check for check, _, _ in PLANTED}
    for check in checks:
        what = OTHERS.get(check, good())
        judged = heard(check, what, selection)
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
                    assert 0 < selection.limits("throughput.scaling", case[0], "marlin", regime.name) < 2
    assert selection.limits("throughput.ratio", CLAIM.weights, "rtn", "single_stream") >= 1.32
    assert selection.limits("throughput.concurrent", CLAIM.weights) == 1.72
    assert selection.limits("throughput.concurrent_ttft", CLAIM.weights) == 0.17


def test_expectation_names_the_reason() -> None:
    """Where no gain is expected the reason fits regime and kernel, and says what fewer bytes alone would give."""

    def reason(regime: Regime, kernel: str = "marlin") -> str:
        steps = {"fp16": 5e-3, kernel: 5e-3}
        lines = {"fp16": Roofline(14 << 30, 4.3e12), kernel: Roofline(5 << 30, 4.3e12)}
        what = recorded(regime, steps)
        return test_throughput.expectation(what, kernel, 0.8, test_throughput.by_bytes_alone(what, kernel, lines))

    for regime in (LONG_PROMPT, IMAGE_PREFILL):
        assert "matrix products" in reason(regime)
        assert "bytes alone" not in reason(regime)
    for regime in (SATURATED_64, SATURATED_256):
        assert "many streams" in reason(regime)
    for regime in (SINGLE_STREAM, BATCH_8):
        assert "launches" in reason(regime)
        assert "bitsandbytes decodes" in reason(regime, "bitsandbytes")
    # 5 ms a step, of which 14 GiB are read in 3.5 ms and 5 GiB in 1.25: 5 / (5 - 2.25)
    assert "where fewer bytes alone would make it 1.8" in reason(SINGLE_STREAM)
    assert test_throughput.expectation(good(), "marlin", 1.32, None).startswith("yes, 1.32 at least; marlin is faster")


def test_bytes_alone_are_unknown_without_rounds_or_lines() -> None:
    """What fewer bytes alone would give is no number where nothing was measured, or a step is shorter than reading."""
    lines = {"fp16": Roofline(14 << 30, 4.3e12), "marlin": Roofline(5 << 30, 4.3e12)}
    assert test_throughput.by_bytes_alone(dataclasses.replace(good(), rounds=()), "marlin", lines) is None
    assert test_throughput.by_bytes_alone(good(), "marlin", {}) is None
    assert test_throughput.by_bytes_alone(steps(fp16=1e-3), "marlin", lines) is None
    whole = changed(each(lambda t: dataclasses.replace(t, chunks=())), recorded(SATURATED_64, GOOD_STEPS), "fp16")
    assert test_throughput.by_bytes_alone(whole, "marlin", lines) == pytest.approx(5 / (5 - 2.25), rel=0.1)


def test_parameters_of_the_checks() -> None:
    """The checks are about a target and a regime, which their ids name."""
    for check in (test_throughput.test_throughput, test_throughput.test_latency):
        (mark,) = (mark for mark in check.pytestmark if mark.name == "parametrize")  # type: ignore[attr-defined]
        assert mark.args[0] == "regime"
        assert [str(regime) for regime in mark.args[1]] == [regime.name for regime in mark.args[1]]
