"""Rounds as a contest would have measured them, and what the checks of throughput say of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fixtures.core.measurement import Measurement
from fixtures.core.targets import Target
from fixtures.meters.bandwidth import Roofline
from fixtures.meters.load import Timing
from fixtures.meters.regimes import ONE_BY_ONE, SINGLE_STREAM, TOGETHER, Regime
from fixtures.meters.rounds import COUNTED, WARM_UP, Recorded, Round
from fixtures.options import Selection
from fixtures.throughput_under_test import ON, kernel_of
from suites import test_throughput
from suites.meta.answering import listener

CLAIM = Target("qwen2_5_vl", "7b", "rtn")  # where +32 % are claimed
FLOOR = Target("qwen2_5_vl", "own", "rtn")  # where no gain is expected
NAMES = ("fp16", "machete", "marlin")
KERNELS = {name: (name,) for name in NAMES}
# A decode step's least, of the 7B's bytes
LINES = {name: Roofline(size, 4.3e12) for name, size in zip(NAMES, (14 << 30, 5 << 30, 5 << 30), strict=True)}
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
    return Recorded(regime, tuple(steps), tuple(rounds), {name: (kernel_of(name),) for name in steps})


GOOD_STEPS = {"fp16": 5e-3, "machete": 4e-3, "marlin": 3.4e-3}  # the 7B's: 1.25 and 1.47


def good(regime: Regime = SINGLE_STREAM) -> Recorded:
    """What a 7B does where the claim holds."""
    return recorded(regime, GOOD_STEPS)


# On one GPU and on two
SCALED_STEPS = {"fp16 on 1": 5e-3, "marlin on 1": 3.4e-3, "fp16 on 2": 3.2e-3, "marlin on 2": 2.6e-3}
SCALED_GOOD = recorded(SINGLE_STREAM, SCALED_STEPS)


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
        names = what.conditions if any(ON in name for name in what.conditions) else NAMES
        cards = 1 if names == NAMES else 2
        expected = {name: (kernel_of(name),) for name in names}
        others: dict[str, int | None] = {}
        lines = LINES

        def __call__(self, regime: Regime, decided: Callable[[Recorded], bool] = lambda _: True) -> Recorded:
            return what

        def arrivals(self, name: str) -> Recorded:
            return what

        def weights_of(self, target: Target) -> str:
            return target.weights if self.cards == 1 else f"{target.weights}-tp{self.cards}"

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


# Arriving together


def arrivals(steps: tuple[float, float], waits: float) -> Recorded:
    """Sixteen requests, one by one and together, by their times per token."""
    draw = np.random.default_rng(0)
    rounds = [
        one_round(asked, asked.name, number, step * math.exp(draw.normal(0, 0.01)), waits=wait)
        for number in (WARM_UP, *range(COUNTED))
        for asked, step, wait in ((ONE_BY_ONE, steps[0], 33 * steps[0]), (TOGETHER, steps[1], waits))
    ]
    names = (ONE_BY_ONE.name, TOGETHER.name)
    return Recorded(TOGETHER, names, tuple(rounds), dict.fromkeys(names, (NAMES[1],)))
