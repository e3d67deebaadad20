"""Limits made ten times as strict or as lax: what each of them is for shows in what then fails, or passes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from fixtures.core.limits import Limits

FACTORS = (10.0, 0.1)  # one of them is stricter and one laxer, by the kind of the bound


def names_used(check: Callable[..., None]) -> list[str]:
    """The limits that a check asks for, out of its source: ``roundtrip.clipped``."""
    return list(dict.fromkeys(re.findall(r'limits\(\s*"([\w.]+)"', inspect.getsource(check))))


def scaled(limits: Limits, name: str, factor: float) -> Limits:
    """The same limits, every number of one of them multiplied."""
    suite, _, quantity = name.partition(".")
    entry = limits.tables[suite][quantity]
    changed = {**entry, "limit": _times(entry["limit"], factor)}
    return Limits({**limits.tables, suite: {**limits.tables[suite], quantity: changed}})


def _times(node: Any, factor: float) -> Any:
    return {case: _times(one, factor) for case, one in node.items()} if isinstance(node, dict) else node * factor
