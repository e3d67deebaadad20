"""How often the judge errs, measured: false alarms on noise alone, and losses found within two nights.

``python -m reports.nights.simulation`` prints the table. Noise is drawn from what was recorded (``noise.json``, made by
``reports.nights.record_noise``), and from worse than that: heavy tails, nights that hang together, nights gone wrong.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from scipy import special

from reports.nights.baseline import Floats
from reports.nights.policy import Rule, rule_of
from reports.nights.shifts import RATE, Flags, Policy, baseline_of, direction, shifts

RECORDED = Path(__file__).with_name("noise.json")
ROUNDS = 6  # behind a recorded interval
BEFORE = 60  # nights of history before the first that is judged
TOGETHER = 10  # quantities of one regime, whose luck is half shared
THROUGHPUT = ("throughput of fp16", "tokens/s")
SHARE = ("reference's accuracy", "share of questions")
KL = ("mean token KL", "nats")

Noise = Callable[[Generator, int, int, int], Floats]
"""(rng, nights, histories, series) -> (night, history, series), in logarithms."""


@dataclass(frozen=True)
class Rate:
    """A share of nights, with its exact 95 % interval (Clopper and Pearson).

    Nights of one history share its baseline and are no independent ones: they count for as many as their spread over
    histories says, and without a single alarm, when nothing says it, each history counts once.
    """

    share: float
    low: float
    high: float
    nights: int

    def __str__(self) -> str:
        return f"{100 * self.share:.2f} % ({100 * self.low:.2f} to {100 * self.high:.2f} %) of {self.nights} nights"


@dataclass(frozen=True)
class Plant:
    """A change planted in the last nights: how much in logarithms, and in which series of every history."""

    change: float
    series: slice


def false_alarms(noise: Noise, series: int, *, nights: int = 10_000, accepted: int = 10, seed: int = 0) -> Rate:
    """How often a night without a change has any regression, over ``nights`` nights of ``series`` noisy quantities.

    Args:
        noise: what differs between nights.
        series: the family's size, of quantities that have noise; those that have none cannot alarm by chance.
        nights: judged, twenty of every history.
        accepted: the row of the history whose night was accepted; from its first night is the frozen baseline.
        seed: of the draws.
    """
    each, batch = 20, max(1, 60_000 // series)
    histories = max(nights // each, 1)
    alarms: list[Flags] = []
    rng = np.random.default_rng(seed)
    for start in range(0, histories, batch):
        count = min(batch, histories - start)
        values = noise(rng, BEFORE + each, count, series).reshape(BEFORE + each, -1)
        quantity = SHARE if noise is steps else THROUGHPUT
        alarms.append(np.asarray(_alarms(values, count, accepted, each, quantity).any(axis=2)))
    return _rate(np.concatenate(alarms, axis=1))


def found(
    noise: Noise,
    series: int,
    plant: Plant,
    *,
    histories: int = 400,
    quantity: tuple[str, str] = THROUGHPUT,
    seed: int = 0,
) -> Rate:
    """How often a planted change is found, on its first or on its second night, in any of the series that it is in."""
    rng = np.random.default_rng(seed)
    values = noise(rng, BEFORE + 2, histories, series)
    values[-2:, :, plant.series] += plant.change
    alarms = _alarms(values.reshape(BEFORE + 2, -1), histories, 10, 2, quantity)
    seen: Flags = np.asarray(alarms[:, :, plant.series].any(axis=(0, 2)))
    return _rate(seen[None])


def _alarms(values: Floats, histories: int, accepted: int, each: int, quantity: tuple[str, str]) -> Flags:
    """Which series regress on each of the last nights: (night, history, series), each history one family."""
    rule = rule_of(*quantity)
    policy = _policy(rule, values.shape[1])
    series = values.shape[1] // histories
    first = len(values) - each
    alarms = np.zeros((each, histories, series), bool)
    for night in range(each):
        tonight = first + night + 1
        if night % 5 == 0:  # a baseline that has learnt its nights stands: its noise alone is taken anew
            baselines = [baseline_of(values[: tonight - 1], row, policy) for row in (accepted, 0)]
        chances, family = [], 0
        for baseline in baselines:
            seen = shifts(values[:tonight], baseline, policy, direction(values[:tonight], baseline, policy))
            chances.append(seen.chances.min(0))
            family += seen.tested // histories
        alarms[night] = (np.minimum(*chances) <= RATE / max(family, 1)).reshape(histories, series)
    return alarms


def _policy(rule: Rule, series: int) -> Policy:
    sides = {"up": 1.0, "down": -1.0, "either": 0.0, "never": 0.0}
    row = (sides[rule.worse], rule.prior(0.97), rule.smallest(0.97), rule.largest())
    return Policy(*(np.full(series, number) for number in row))


def _rate(alarms: Flags) -> Rate:
    """The rate of alarms: (night, history)."""
    nights, hits = alarms.size, int(alarms.sum())
    share, each = hits / nights, alarms.shape[0]
    spread = float(alarms.mean(0).var()) * each
    design = min(max(spread / (share * (1 - share)), 1.0), each) if 0 < share < 1 else each
    count, seen = nights / design, hits / design
    low = float(special.betaincinv(seen, count - seen + 1, 0.025)) if hits else 0.0
    high = float(special.betaincinv(seen + 1, count - seen, 0.975)) if hits < nights else 1.0
    return Rate(share, low, high, nights)


@cache
def _recorded(file: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return data


def repeats(rng: Generator, nights: int, histories: int, series: int, file: Path = RECORDED, block: int = 1) -> Floats:
    """Recorded timings; a run's quantities stay together, and ``block`` runs that followed each other.

    The runs were 40 s apart and share their neighbours' load; nights are a day apart. Blocks of six are a stress.
    """
    kept = np.array(list(_recorded(file)["repeats"]["series"].values())) / 100  # (quantity, run)
    quantities, runs = kept.shape
    groups = -(-series // quantities)
    blocks = -(-nights // block)
    starts = rng.integers(0, runs, (blocks, 1, histories, groups))
    rows = ((starts + np.arange(block)[:, None, None]) % runs).reshape(-1, histories, groups)[:nights]
    drawn = kept[:, rows]  # (quantity, night, history, group)
    return np.ascontiguousarray(np.moveaxis(drawn, 0, -1)).reshape(nights, histories, -1)[:, :, :series]


def sigmas(file: Path = RECORDED, regime: str | None = None) -> Floats:
    """The standard deviations of a night's ratio, in logarithms, that the recorded intervals of six rounds tell."""
    student = float(special.stdtrit(ROUNDS - 1, 0.975))
    kept = [row for row in _recorded(file)["intervals"] if regime in (None, row["regime"])]
    return np.array([math.log(row["high"] / row["low"]) / 2 / student for row in kept])


def rounds(
    rng: Generator, nights: int, histories: int, series: int, *, sigma: Floats | None = None, freedom: float = 5
) -> Floats:
    """Nights as noisy as the recorded intervals of a GPU's throughput, half their luck shared, with Student's tails."""
    spread = sigmas() if sigma is None else np.asarray(sigma)
    mine = rng.choice(spread, (histories, series)) if sigma is None else np.resize(spread, (histories, series))
    groups = -(-series // TOGETHER)
    shared = rng.standard_normal((nights, histories, groups)).repeat(TOGETHER, axis=2)[:, :, :series]
    own = rng.standard_normal((nights, histories, series))
    tail = np.sqrt(rng.chisquare(freedom, (nights, histories, groups)) / (freedom - 2))
    return (shared + own) / math.sqrt(2) / tail.repeat(TOGETHER, axis=2)[:, :, :series] * mine


def correlated(rng: Generator, nights: int, histories: int, series: int, share: float = 0.5) -> Floats:
    """The same, each night with half of the luck of the night before: AR(1) 0.5."""
    values = rounds(rng, nights, histories, series, freedom=30)
    for night in range(1, nights):
        values[night] = share * values[night - 1] + math.sqrt(1 - share**2) * values[night]
    return values


def gone_wrong(rng: Generator, nights: int, histories: int, series: int, whole: bool = True) -> Floats:
    """The same, with one night in a hundred 30 % off: all of it, or else one value in ten."""
    values = rounds(rng, nights, histories, series)
    off = rng.random((nights, histories, 1)) < 0.01
    hit = off & (whole | (rng.random(values.shape) < 0.1))
    hit[10], hit[0] = False, False  # nobody accepts such a night
    return values + np.where(hit, math.log(0.7), 0)


def steps(rng: Generator, nights: int, histories: int, series: int, wrong: float = 0.03, asked: int = 64) -> Floats:
    """Values in few steps: a share of questions, drawn anew every night."""
    return 1 - rng.binomial(asked, wrong, (nights, histories, series)) / asked


NOISES: dict[str, Noise] = {
    "recorded timings (a busy CPU)": repeats,
    "recorded intervals of throughput (H200)": rounds,
    "the same, Student's t of 3": partial(rounds, freedom=3),
    "the same, AR(1) 0.5": correlated,
    "the same, 1 % of nights 30 % off": gone_wrong,
    "the same, a tenth of 1 % of nights 30 % off": partial(gone_wrong, whole=False),
    "recorded timings, in blocks of six runs": partial(repeats, block=6),
    "shares of 64 questions": steps,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nights", type=int, default=10_000)
    parser.add_argument("--series", type=int, nargs="+", default=[15, 150, 1500])
    parser.add_argument("--histories", type=int, default=400, help="in which a change is planted")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    print(
        f"false alarms: nights without a change that have a regression, of N noisy quantities ({asked.nights} nights)"
    )
    for name, noise in NOISES.items():
        for series in asked.series:
            print(f"  {name:<45} N = {series:<5} {false_alarms(noise, series, nights=asked.nights, seed=asked.seed)}")
    print("a loss of 5 % of throughput, found within two nights among 150 noisy quantities")
    kernel = np.concatenate([sigmas(regime=name)[:1] for name in dict.fromkeys(_regimes())])
    everywhere = partial(rounds, sigma=np.resize(kernel, 150))
    of_kernel = found(everywhere, 150, Plant(math.log(0.95), slice(0, len(kernel))), histories=asked.histories)
    print(f"  {'of a kernel, in all its regimes':<45} {of_kernel}")
    for name in dict.fromkeys(_regimes()):
        usual = float(np.median(sigmas(regime=name)))
        alone = partial(rounds, sigma=np.full(150, usual))
        told = f"in {name} alone (noise {100 * usual:.2f} %)"
        print(f"  {told:<45} {found(alone, 150, Plant(math.log(0.95), slice(0, 1)), histories=asked.histories)}")
    print("a rise of 10 % of KL, found within two nights among 150 quantities")
    for sigma in (0.0, 0.005, 0.01, 0.015, 0.02, 0.12):
        noise = partial(rounds, sigma=np.full(150, sigma))
        told = f"noise {100 * sigma:.1f} %"
        print(
            f"  {told:<45} {found(noise, 150, Plant(math.log(1.1), slice(0, 1)), quantity=KL, histories=asked.histories)}"
        )


def _regimes() -> list[str]:
    return [row["regime"] for row in _recorded(RECORDED)["intervals"]]


if __name__ == "__main__":
    main()
