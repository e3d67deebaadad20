"""Histories for the tests of the statistics: names of nights, series with recorded or made-up noise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from reports.nights.series import Key, Kind, Points, Series, Worse

KIND = Kind((("gpu", "NVIDIA H200"),), (("torch", "2.11.0"), ("vllm", "0.25.1")))


@cache
def names(count: int) -> list[str]:
    """Names as stored runs have them, of nights that follow each other."""
    return [f"{np.datetime64('2026-01-01') + day}T01-00-00Z-{day:012x}" for day in range(count)]


def series(
    values: Sequence[float] | NDArray[np.float64],
    quantity: str = "throughput by marlin",
    unit: str = "tokens/s",
    worse: Worse = "down",
    case: str = "batch_8",
    start: int = 0,
    target: str = "f-tiny-awq",
) -> Series:
    """One quantity, its last value tonight's."""
    nights = names(start + len(values))[start:]
    return Series(Key(target, "parity: test_p", case, quantity, unit), worse, Points(nights, np.asarray(values, float)))


def noisy(count: int, level: float = 1000.0, sigma: float = 0.005, seed: int = 0) -> NDArray[np.float64]:
    """``count`` nights about a level, with normal noise in logarithms."""
    noise: NDArray[np.float64] = np.random.default_rng(seed).normal(0, sigma, count)
    return level * np.exp(noise)


def kl(values: Sequence[float] | NDArray[np.float64], case: str = "image") -> Series:
    """A mean token KL."""
    return series(values, "mean token KL", "nats", "up", case)
