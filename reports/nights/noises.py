"""What differs between nights without a change: as runs recorded it (``noise.json``), and worse than that."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from scipy import special

from reports.nights.baseline import Floats

RECORDED = Path(__file__).with_name("noise.json")
TOGETHER = 10  # quantities of one regime, whose luck is half shared

Noise = Callable[[Generator, int, int, int], Floats]
"""(rng, nights, histories, series) -> (night, history, series), in logarithms."""


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
    """The standard deviations of a night's ratio, in logarithms, that the recorded intervals of so many rounds tell."""
    kept = [row for row in _recorded(file)["intervals"] if regime in (None, row["regime"])]
    return np.array([math.log(row["high"] / row["low"]) / 2 / _student(row["rounds"] - 1) for row in kept])


def _student(freedom: int) -> float:
    return float(special.stdtrit(freedom, 0.975))


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


def regimes(file: Path = RECORDED) -> list[str]:
    """The regimes of the recorded intervals, each once."""
    return list(dict.fromkeys(row["regime"] for row in _recorded(file)["intervals"]))
