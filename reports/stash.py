"""Where fixtures leave what they have to say, for the report to find."""

from __future__ import annotations

from typing import Any

import pytest

from fixtures.core.measurement import Measurement
from fixtures.core.results import Medium, Table

MEASUREMENTS = pytest.StashKey[list[Measurement]]()
"""On an item: all that its test measured, in the order in which it did."""

TABLES = pytest.StashKey[list[Table]]()
"""On an item: rows that belong beside its measurements."""

MEDIA = pytest.StashKey[list[Medium]]()
"""On an item: pictures and sounds that belong beside them."""

ABOUT = pytest.StashKey[dict[str, Any]]()
"""On the config: the subjects of the run, such as ``{"qwen2_5_vl-tiny": {"path": ..., "digest": ...}}``.

JSON-able; there from ``pytest_configure`` on. xdist's workers each fill their own; the report merges them.
"""

SEEDS = pytest.StashKey[dict[str, int]]()
"""On the config: what was drawn by which seed, such as ``{"held-out samples": 0}``; merged like the subjects."""
