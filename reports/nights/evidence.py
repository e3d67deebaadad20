"""How often noise alone does as much: one night, two nights running, a week's mean; and Holm's correction."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import special

from reports.nights.baseline import Baseline, take

Floats = NDArray[np.float64]

WEEK = 7
_SURELY = 0.05  # chances above it are no evidence, and are not computed to the last digit


def of_one(change: Floats, baseline: Baseline) -> Floats:
    """The chance of a night at least ``change`` above the level (Student's t of a prediction, one-sided)."""
    return _tail(change / (baseline.noise * np.sqrt(1 + baseline.doubt)), baseline.freedom)


def of_both(tonight: Floats, before: Floats, baseline: Baseline) -> Floats:
    """The chance of two nights running that are both as far above the level as the nearer one of them.

    One wild night is no regression, however wild: the other must say so too. The two share the level's and the noise's
    error, and part of their luck, so that the chance is more than the square of one's.
    """
    nearer = np.minimum(tonight, before)
    chance = of_one(nearer, baseline)  # of one: no less than that of both
    found = np.flatnonzero(chance < _SURELY)
    if len(found):
        with np.errstate(divide="ignore"):
            far = nearer[found] / baseline.noise[found]
        chance[found] = np.minimum(chance[found], _joint(far, take(baseline, found)))
    return chance


def of_week(change: Floats, baseline: Baseline) -> Floats:
    """The chance of a week's mean at least ``change`` above the level: what finds a small shift, or a slow one."""
    doubt = baseline.alike / WEEK + baseline.doubt
    return _tail(change / (baseline.noise * np.sqrt(doubt)), baseline.freedom)


def holm(chances: Floats, rate: float, family: int) -> NDArray[np.bool_]:
    """Which of ``chances`` stand when any false one among ``family`` may come up at ``rate`` (Holm 1979).

    It holds however the quantities hang together: tokens per second and latency are one clock. Benjamini and Hochberg's
    would promise that most of what is found is true; here one false alarm spoils the night.
    """
    order = np.argsort(chances, kind="stable")
    steps = np.maximum(family - np.arange(len(chances)), 1)
    held = np.logical_and.accumulate(chances[order] <= rate / steps)
    stands = np.zeros(len(chances), bool)
    stands[order] = held
    return stands


def _tail(far: Floats, freedom: Floats) -> Floats:
    """P(T > far) of Student's t; of a distance that is NaN, 1."""
    return np.where(np.isnan(far), 1.0, special.stdtr(freedom, -far))


def _joint(far: Floats, baseline: Baseline) -> Floats:
    """P(both nights > far): over the noise's error (gamma) and what the two share (normal), by Gauss's quadrature."""
    nodes, weights = _normal_nodes()
    found = np.ones(len(far))
    whole = np.round(baseline.freedom)
    for freedom in np.unique(whole):
        which = whole == freedom
        scale, share = _scale_nodes(freedom)
        alike = baseline.correlation[which][:, None, None]
        reach = far[which][:, None, None] * scale[None, :, None]
        pull = np.sqrt(baseline.doubt[which][:, None, None] + alike) * nodes[None, None, :]
        one = special.ndtr(-(reach - pull) / np.sqrt(1 - alike))
        found[which] = np.einsum("fsu,s,u->f", one**2, share, weights)
    return found


@cache
def _normal_nodes() -> tuple[Floats, Floats]:
    nodes, weights = special.roots_hermitenorm(40)
    return nodes, weights / weights.sum()


@cache
def _scale_nodes(freedom: float) -> tuple[Floats, Floats]:
    """Nodes of sqrt(chi-square / freedom), and their weights."""
    nodes, weights = special.roots_genlaguerre(48, freedom / 2 - 1)
    return np.sqrt(2 * nodes / freedom), weights / weights.sum()
