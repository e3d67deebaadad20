"""Two runs side by side, of one quantity or many, for the tests of what changed between them."""

from __future__ import annotations

from typing import Any

from fixtures.core.measurement import Bound, Measurement
from fixtures.core.results import Outcome, Result, Run
from reports import changes
from reports.compare import Comparison

BOUND = Bound("at_most", 0.02)
GOOD = Measurement("mean token KL", 0.0124, "nats", BOUND)
BAD = Measurement("mean token KL", 0.314, "nats", BOUND)


def result(outcome: Outcome = "passed", *measurements: Measurement, name: str = "test_p", **more: Any) -> Result:
    """A result about the target ``f-tiny-awq``, or as ``more`` says."""
    quantizer = more.pop("quantizer", "awq")
    target = {"family": "f", "size": "tiny", "quantizer": quantizer}
    given: dict[str, Any] = {"id": f"suites/test_parity.py::{name}[f-tiny-{quantizer}]", "target": target}
    return Result(**{"outcome": outcome, "requirement": "", "measurements": measurements, **given, **more})


def valued(value: float, bound: Bound | None = BOUND, unit: str = "nats") -> Measurement:
    """The quantity ``mean token KL`` with that value."""
    return Measurement("mean token KL", value, unit, bound)


def compared(before: list[Result], after: list[Result], above: float = 0.01, **about: tuple[Any, Any]) -> Comparison:
    """Two runs side by side; of ``about``, the first is what the run before says."""
    old, new = ({key: pair[i] for key, pair in about.items()} for i in (0, 1))
    return Comparison(Run(old, before), Run(new, after), above)


def said(found: Comparison) -> dict[str, list[str]]:
    """The lines of the text under each of its titles, columns apart by one space; the first under no title."""
    head, *parts = changes.text(found).rstrip("\n").split("\n\n")
    listed = [part.splitlines() for part in parts]
    return {"": head.splitlines()} | {lines[0]: [" ".join(line.split()) for line in lines[1:]] for lines in listed}


def titles(found: Comparison) -> list[str]:
    return [table.title.split(" (")[0].split(" by more")[0] for table in changes.sections(found)]
