"""Since when a quantity is what it is: the nights at which its level changed, over a whole history at once."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SHORTEST = 3  # nights of a level
NEWEST = 2  # of the one that goes on
PENALTY = 4.0  # times log(nights), in squared standard deviations; see ``changes``
_WILD = 3.0  # standard deviations from its neighbours' median that a night counts for
_QUARTILE = 1.1503 * math.sqrt(2)  # the upper quartile of a normal's absolute steps


def changes(values: Floats) -> list[list[int]]:
    """The rows at which the level of each series changes, by optimal partitioning (Jackson et al. 2005).

    The levels are those that leave the least squared distance, each change costing ``PENALTY`` x log(nights) squared
    standard deviations. Schwarz's criterion asks for 2 (Yao 1988: then the number of changes is found consistently in
    normal noise); twice that, because nights hang together and have tails. The noise is taken from the steps between
    nights, which changes of level hardly touch, and a wild night counts for three standard deviations.

    Args:
        values: (night, series); NaN where a night has no value, which is passed over.
    """
    found: list[list[int]] = [[] for _ in range(values.shape[1])]
    if len(values) < 2 * SHORTEST:
        return found
    filled = _filled(values)
    moving = np.flatnonzero(np.ptp(filled, axis=0) > 1e-12 * np.abs(filled).max(0))
    if not len(moving):
        return found
    for column, rows in zip(moving, _partitions(_standard(filled[:, moving])), strict=True):
        found[column] = [int(row) for row in rows]
    return found


def _partitions(values: Floats) -> list[list[int]]:
    nights, series = values.shape
    zero = np.zeros((1, series))
    sums = np.concatenate([zero, values.cumsum(0)])
    squares = np.concatenate([zero, (values**2).cumsum(0)])
    best = np.full((nights + 1, series), np.inf)
    best[0] = 0.0
    came = np.zeros((nights + 1, series), int)
    for end in range(SHORTEST, nights + 1):
        shortest = SHORTEST if end < nights else NEWEST
        starts = np.r_[0, np.arange(SHORTEST, end - shortest + 1)]
        length = (end - starts)[:, None]
        cost = best[starts] + squares[end] - squares[starts] - (sums[end] - sums[starts]) ** 2 / length
        least = cost.argmin(0)
        best[end] = cost[least, np.arange(series)] + PENALTY * math.log(nights)
        came[end] = starts[least]
    return [_traced(came[:, column]) for column in range(series)]


def _traced(came: NDArray[np.int_]) -> list[int]:
    rows, end = [], len(came) - 1
    while (end := int(came[end])) > 0:
        rows.append(end)
    return rows[::-1]


def _standard(values: Floats) -> Floats:
    """Values in standard deviations, those far from their neighbours drawn in."""
    steps = np.quantile(np.abs(np.diff(values, axis=0)), 0.75, axis=0) / _QUARTILE
    floor = np.ptp(values, axis=0) * 1e-3  # a level that never moved but once has no noise of its own
    scaled = values / np.maximum(steps, floor)
    padded = np.pad(scaled, ((2, 2), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 5, axis=0)
    middle = np.median(windows, axis=-1)
    drawn: Floats = np.clip(scaled, middle - _WILD, middle + _WILD)
    centred: Floats = drawn - drawn.mean(0)
    return centred


def _filled(values: Floats) -> Floats:
    """Gaps filled with the value before them; at the start, with the first."""
    known = np.isfinite(values)
    rows = np.where(known, np.arange(len(values))[:, None], -1)
    last = np.maximum.accumulate(rows, axis=0)
    first = np.where(known.any(0), known.argmax(0), 0)
    filled = np.take_along_axis(values, np.where(last < 0, first, last), axis=0)
    return np.nan_to_num(filled)
