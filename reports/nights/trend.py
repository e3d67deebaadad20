"""The history as one page: what changed tonight, and every quantity over the nights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reports.nights.series import Kind, Mark, Night, Series


def page(kinds: Mapping[Kind, Sequence[Series]], nights: Sequence[Night], marks: Sequence[Mark]) -> str:
    """The trend page, one HTML file without outside parts.

    Args:
        kinds: every kind of machine and versions with its series; the kind of the last night is shown first.
        nights: all nights, oldest first.
        marks: every move of a baseline, oldest first; the last of a kind counts.
    """
    raise NotImplementedError
