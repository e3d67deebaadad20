"""What counts as a change of each kind of quantity: which way is worse, how small is nothing, how noisy it is."""

from __future__ import annotations

from reports.nights.series import Worse


def worse_of(quantity: str, unit: str) -> Worse:
    """Which way a quantity without a bound is for the worse, by its name and unit; ``never`` for a mere fact."""
    raise NotImplementedError
