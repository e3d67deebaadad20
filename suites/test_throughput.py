"""Throughput: an artifact against its FP16 reference, in vLLM's OpenAI server, per load regime and kernel.

Servers of both are alive at once and take turns, round by round, after a warm-up round. A ratio is judged by the end of
its 95 % interval, never by the point; where six rounds leave the bound inside the interval, more are measured.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import pytest

from fixtures.core.limits import Limits
from fixtures.core.targets import Target
from fixtures.meters import rounds
from fixtures.meters.bandwidth import Roofline
from fixtures.meters.regimes import REGIMES, SCALED, SINGLE_STREAM, STREAMED, Regime
from fixtures.meters.rounds import COUNTED, Recorded
from fixtures.meters.settings import SETTINGS, Setting
from fixtures.settings_under_test import UnderSettings
from fixtures.throughput_under_test import Contest, kernel_of
from fixtures.verifying import Verify

pytestmark = [pytest.mark.gpu, pytest.mark.full_size]

BEST = "the best kernel"  # in names of quantities: which one that is may be another tonight
QUANTILES = (0.01, 0.05, *(round(0.1 * i, 1) for i in range(1, 10)), 0.95, 0.99, 0.999)
MANY = 46  # streams: an H200 computes on them as long as it reads 4-bit weights (790 TFLOP/s, 4.3 TB/s)
TTFT, ITL = rounds.median_of(rounds.ttft), rounds.median_of(rounds.itl)


@pytest.mark.parametrize("regime", REGIMES, ids=str)
def test_throughput(contest: Contest, target: Target, regime: Regime, limits: Limits, verify: Verify) -> None:
    """By its best kernel the artifact answers as many tokens per second, of FP16's, as is claimed of this regime."""
    least = limits("throughput.ratio", contest.weights_of(target), target.quantizer, regime.name)
    speed = rounds.tokens_per_second
    recorded = contest(regime, lambda found: found.ratio(found.best(speed), speed).beside(least))

    sound(recorded, contest.expected, limits, verify)
    faster(recorded, least, contest.lines, verify)
    if (strangers := contest.others.get(regime.name)) is not None:
        verify.note("memory that strangers hold on the card", strangers / 1e9, "GB")


@pytest.mark.parametrize("regime", STREAMED, ids=str)
def test_latency(contest: Contest, target: Target, regime: Regime, limits: Limits, verify: Verify) -> None:
    """Streamed, the artifact's first token and those after it keep nobody waiting much longer than FP16's do."""
    case = (contest.weights_of(target), target.quantizer, regime.name)
    most = {TTFT: limits("throughput.ttft", *case), ITL: limits("throughput.itl", *case)}

    def decided(found: Recorded) -> bool:
        best = found.best(ITL, lowest=True)
        return all(found.ratio(best, measure).beside(bound) for measure, bound in most.items())

    recorded = contest(regime, decided)

    sound(recorded, contest.expected, limits, verify)
    prompt(recorded, most[TTFT], most[ITL], verify)


def test_concurrent_serving(contest: Contest, target: Target, limits: Limits, verify: Verify) -> None:
    """Requests that arrive together are answered together: faster, and each begun sooner, than one after another."""
    name = contest.names[1]
    recorded = contest.arrivals(name)

    sound(recorded, dict.fromkeys(recorded.conditions, contest.expected[name]), limits, verify)
    together(
        recorded,
        limits("throughput.concurrent", target.weights),
        limits("throughput.concurrent_ttft", target.weights),
        verify,
    )


def test_step(contest: Contest, target: Target, limits: Limits, verify: Verify) -> None:
    """No decode step is faster than its weights can be read: what is measured is a decode step, and what limits it."""
    bounded(contest(SINGLE_STREAM), contest.lines, limits("throughput.of_roofline", target.weights), verify)


@pytest.mark.every_setting
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_vllm_settings(
    under: UnderSettings, contest: Contest, target: Target, setting: Setting, limits: Limits, verify: Verify
) -> None:
    """However vLLM compiles, replays and schedules a step, one stream has the share of FP16's speed that is stated."""
    least = limits("throughput.settings", contest.weights_of(target), target.quantizer, setting.name)
    speed = rounds.tokens_per_second
    with under(setting) as set_so:
        recorded = set_so(SINGLE_STREAM, lambda found: found.ratio(found.best(speed), speed).beside(least))

    sound(recorded, contest.expected, limits, verify)
    kept(recorded, setting, least, verify)


@pytest.mark.several_gpus
@pytest.mark.parametrize("regime", SCALED, ids=str)
def test_scaling(scaled: Contest, target: Target, regime: Regime, limits: Limits, verify: Verify) -> None:
    """Over several GPUs, FP16 and the artifact answer as many times the tokens per second of one GPU as is stated."""
    bounds = {
        (one, many): limits("throughput.scaling", scaled.weights_of(target), kernel_of(one), regime.name)
        for one, many in pairs(scaled.names)
    }
    speed = rounds.tokens_per_second
    recorded = scaled(
        regime,
        lambda found: all(between(found, *pair).ratio(pair[1], speed).beside(least) for pair, least in bounds.items()),
    )

    sound(recorded, scaled.expected, limits, verify)
    scaling(recorded, bounds, scaled.cards, verify)


# -- judgements, of rounds as values -----------------------------------------------------------------------------


def sound(recorded: Recorded, expected: Mapping[str, Collection[str]], limits: Limits, verify: Verify) -> None:
    """The rounds are measurements: all there, no request lost or short, the kernels those that are named."""
    verify("rounds counted, fewest of a condition", recorded.fewest_rounds, at_least=COUNTED)
    verify.none_of("requests that are no measurement", recorded.flaws, among=recorded.requests)
    verify.none_of("conditions on another kernel", recorded.fallbacks(expected), among=len(recorded.conditions))
    verify.note("requests per round", recorded.regime.requests, detail=recorded.regime.words)
    verify(
        "load generator, busiest",
        recorded.busiest,
        "of a core",
        at_most=limits("throughput.generator", recorded.regime.name),
    )


def faster(recorded: Recorded, least: float, lines: Mapping[str, Roofline], verify: Verify) -> None:
    """The best kernel's throughput is at least ``least`` of the base's, by the lower end of its interval."""
    speed = rounds.tokens_per_second
    best = recorded.best(speed)
    found = recorded.ratio(best, speed)
    verify(
        f"throughput by {BEST}, of FP16's, lower end",
        found.low,
        at_least=least,
        detail="\n".join(
            [f"the best: {best}", *(f"{one}: {recorded.ratio(one, speed)} of FP16's" for one in recorded.others)]
        ),
    )
    verify.note(
        f"throughput of {recorded.base}",
        recorded.typical(recorded.base, speed),
        "tokens/s",
        detail=by_round(recorded, recorded.base),
    )
    for one in recorded.others:  # each by its name, whichever is the best tonight: a history must not change its kernel
        ratio = recorded.ratio(one, speed)
        verify.note(f"throughput by {one}, of FP16's", ratio.point, detail=str(ratio))
        verify.note(f"throughput by {one}", recorded.typical(one, speed), "tokens/s", detail=by_round(recorded, one))
    gain = by_bytes_alone(recorded, best, lines)
    verify.note("gain expected", least >= 1, detail=expectation(recorded, best, least, gain))
    verify.table(
        "Throughput",
        ("regime", "kernel", "tokens/s", "prompt tokens/s", "requests/s", "of FP16's", "low", "high"),
        [
            (
                recorded.regime.name,
                condition,
                number(recorded.typical(condition, speed)),
                number(recorded.typical(condition, rounds.prompt_tokens_per_second)),
                number(recorded.typical(condition, rounds.requests_per_second)),
                *ends(recorded, condition, speed),
            )
            for condition in recorded.conditions
        ],
    )


def by_round(recorded: Recorded, condition: str) -> str:
    """A condition's throughput, round by round: whether it drifts, or has two speeds."""
    values = recorded.values(condition, rounds.tokens_per_second)
    return f"by round: {', '.join(f'{value:.4g}' for value in values)}"


def by_bytes_alone(recorded: Recorded, condition: str, lines: Mapping[str, Roofline]) -> float | None:
    """The throughput of FP16's that fewer bytes would give, were reading them all that changed; None where unknown.

    Of decoding: of the time that a step of all streams takes, what is not reading weights stays as it is.
    """
    if recorded.regime.prefill or not lines:
        return None
    streamed = recorded.typical(recorded.base, ITL)
    together = recorded.regime.concurrency / recorded.typical(recorded.base, rounds.tokens_per_second)
    return of_fewer_bytes(together if math.isnan(streamed) else streamed, lines[recorded.base], lines[condition])


def of_fewer_bytes(step: float, base: Roofline, other: Roofline) -> float | None:
    """How many times as fast as a ``step`` of the base's one would be that reads the other's bytes; None: unknown."""
    spared = base.seconds - other.seconds
    return step / (step - spared) if step > spared else None


def expectation(recorded: Recorded, best: str, least: float, by_bytes: float | None) -> str:
    """Whether fewer bytes are expected to show in this regime, and what was found."""
    found = recorded.ratio(best, rounds.tokens_per_second)
    outcome = (
        f"{best} is faster" if found.low > 1 else f"{best} is slower" if found.high < 1 else "it makes no difference"
    )
    bytes_alone = "" if by_bytes is None else f", where fewer bytes alone would make it {by_bytes:.2f}"
    if least >= 1:
        return f"yes, {least:g} at least{bytes_alone}; {outcome}"
    why = why_no_gain(recorded.regime, best)
    return f"no, only that no more than a share is lost{bytes_alone}: {why}; {outcome}"


def why_no_gain(regime: Regime, kernel: str) -> str:
    """What may cost a kernel the gain of its fewer bytes in this regime, or that nothing is stated of it."""
    if kernel_of(kernel) == "bitsandbytes":
        return "bitsandbytes decodes every weight to 16 bits again, in every step"
    if regime.prefill:
        return "prompts are read by large matrix products, which compute, not bytes, limit"
    if regime.concurrency >= MANY:
        return "so many streams share a reading of the weights that computing, of which 4 bits spare none, takes longer"
    return "no gain is stated of these weights: launches, activations and the KV cache are not fewer"


def prompt(recorded: Recorded, most_ttft: float, most_itl: float, verify: Verify) -> None:
    """First token and later ones come within these multiples of the base's medians, by the intervals' upper ends."""
    best = recorded.best(ITL, lowest=True)
    for what, measure, most in (("time to first token", TTFT, most_ttft), ("inter-token latency", ITL, most_itl)):
        found = recorded.ratio(best, measure)
        verify(f"median {what} by {BEST}, of FP16's, upper end", found.high, at_most=most, detail=f"{best}: {found}")
    verify.table(
        "Latency",
        ("regime", "kernel", *(f"{what} {q} ms" for what in ("TTFT", "TPOT", "ITL", "pause") for q in ("p50", "p99"))),
        [
            (
                recorded.regime.name,
                condition,
                *(
                    number(1e3 * rounds.quantile(latency(recorded.timings(condition)), q))
                    for latency in (rounds.ttft, rounds.tpot, rounds.itl, rounds.gaps)
                    for q in (0.5, 0.99)
                ),
            )
            for condition in recorded.conditions
        ],
    )
    verify.table(
        "Latency distribution",
        ("regime", "kernel", "latency", "quantile", "ms"),
        [
            (recorded.regime.name, condition, name, q, number(1e3 * rounds.quantile(values, q)))
            for condition in recorded.conditions
            for name, latency in (("TTFT", rounds.ttft), ("ITL", rounds.itl))
            for values in (latency(recorded.timings(condition)),)
            for q in QUANTILES
        ],
    )


def together(recorded: Recorded, least: float, most_ttft: float, verify: Verify) -> None:
    """All at once is ``least`` times as fast as one by one, and the mean first token comes in ``most_ttft`` of it."""
    (concurrent,) = recorded.others
    speed, first = rounds.tokens_per_second, rounds.mean_of(rounds.ttft)
    gain, wait = recorded.ratio(concurrent, speed), recorded.ratio(concurrent, first)

    verify("throughput together, of one by one, lower end", gain.low, at_least=least, detail=str(gain))
    verify("time to first token together, of one by one, upper end", wait.high, at_most=most_ttft, detail=str(wait))
    verify.table(
        "Sequential against concurrent",
        ("answered", "tokens/s", "mean TTFT ms", "of tokens/s", "low", "high"),
        [
            (
                condition,
                number(recorded.typical(condition, speed)),
                number(1e3 * recorded.typical(condition, first)),
                *ends(recorded, condition, speed),
            )
            for condition in recorded.conditions
        ],
    )


def bounded(recorded: Recorded, lines: Mapping[str, Roofline], most: float, verify: Verify) -> None:
    """Reading the weights takes at most ``most`` of a measured step: a step in less time was none."""
    steps = {condition: recorded.typical(condition, ITL) for condition in recorded.conditions}
    shares = {condition: lines[condition].seconds / steps[condition] for condition in recorded.conditions}
    for condition in recorded.conditions:
        verify(
            f"of a decode step by {condition}, the time to read its weights",
            shares[condition],
            at_most=most,
            detail=lines[condition].words(steps[condition]),
        )
    base = recorded.base
    for condition in recorded.others:
        verify.note(
            f"throughput by {condition}, of FP16's, were reading fewer bytes all that changed",
            of_fewer_bytes(steps[base], lines[base], lines[condition]),
            detail=f"measured {steps[base] / steps[condition]:.2f}: the rest goes into decoding weights and launches",
        )
    verify.table(
        "Decode step of one request",
        ("kernel", "weights read, GB", "read in ms", "step ms", "share"),
        [
            (
                condition,
                lines[condition].weight_bytes / 1e9,
                1e3 * lines[condition].seconds,
                number(1e3 * steps[condition]),
                number(shares[condition]),
            )
            for condition in recorded.conditions
        ],
    )


def kept(recorded: Recorded, setting: Setting, least: float, verify: Verify) -> None:
    """Under a setting the best kernel's throughput is at least ``least`` of the base's under the same."""
    speed = rounds.tokens_per_second
    best = recorded.best(speed)
    found = recorded.ratio(best, speed)
    verify(
        f"throughput {setting} by {BEST}, of FP16's, lower end",
        found.low,
        at_least=least,
        detail="\n".join(
            [f"the best: {best}, {found}", *(f"{one}, {by_round(recorded, one)}" for one in recorded.conditions)]
        ),
    )
    verify.table(
        "Settings of vLLM, one stream",
        ("setting", "flags", "kernel", "tokens/s", "of FP16's", "low", "high"),
        [
            (
                setting.name,
                " ".join(setting.flags),
                condition,
                number(recorded.typical(condition, speed)),
                *ends(recorded, condition, speed),
            )
            for condition in recorded.conditions
        ],
    )


def pairs(conditions: Sequence[str]) -> list[tuple[str, str]]:
    """Each kernel's condition on one GPU, and the one on all: the former come first, in the same order."""
    half = len(conditions) // 2
    return list(zip(conditions[:half], conditions[half:], strict=True))


def between(recorded: Recorded, base: str, other: str) -> Recorded:
    """The same rounds, of two conditions alone."""
    return replace(recorded, conditions=(base, other))


def scaling(recorded: Recorded, bounds: Mapping[tuple[str, str], float], gpus: int, verify: Verify) -> None:
    """On all GPUs each kernel's throughput is at least its bound, of one GPU's, by the lower end of its interval."""
    speed = rounds.tokens_per_second
    rows = []
    for (one, many), least in bounds.items():
        pair, kernel = between(recorded, one, many), kernel_of(one)
        found = pair.ratio(many, speed)
        verify(
            f"throughput of {kernel} on {gpus} GPUs, of 1 GPU's, lower end",
            found.low,
            at_least=least,
            detail=f"{found}\n{one}, {by_round(recorded, one)}\n{many}, {by_round(recorded, many)}",
        )
        per_second = (number(recorded.typical(condition, speed)) for condition in (one, many))
        rows.append((recorded.regime.name, kernel, gpus, *per_second, *ends(pair, many, speed)))
    verify.table(
        "Scaling over GPUs",
        ("regime", "kernel", "GPUs", "tokens/s on 1", "tokens/s on all", "of 1 GPU's", "low", "high"),
        rows,
    )


def ends(recorded: Recorded, condition: str, measure: rounds.Measure) -> tuple[float | None, ...]:
    """Ratio to the base and its interval; of the base itself there is none."""
    if condition == recorded.base:
        return 1.0, None, None
    found = recorded.ratio(condition, measure)
    return number(found.point), number(found.low), number(found.high)


def number(value: float) -> float | None:
    """A number for a table; None where nothing was measured."""
    return None if math.isnan(value) else value
