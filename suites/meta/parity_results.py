"""Results of one check of parity, good or bad, for the tests of the report."""

from __future__ import annotations

from typing import Any

from fixtures.core.measurement import Bound, Measurement
from fixtures.core.results import Outcome, Result

GOOD = Measurement("mean token KL", 0.0124, "nats", Bound("at_most", 0.02))
BAD = Measurement("mean token KL", 0.314, "nats", Bound("at_most", 0.02), "rain.wav, token 17")
FLOOR = Measurement("noise floor", 1.5e-6, "nats")


def result(outcome: Outcome = "passed", *measurements: Measurement, **more: Any) -> Result:
    """A result about the target ``qwen2_5_vl-tiny-awq``, or as ``more`` says."""
    target = {"family": "qwen2_5_vl", "size": "tiny", "quantizer": more.pop("quantizer", "awq")}
    given: dict[str, Any] = {
        "id": "suites/test_parity.py::test_parity[qwen2_5_vl-tiny-awq]",
        "target": target,
    }
    return Result(**{"outcome": outcome, "requirement": "", "measurements": measurements, **given, **more})
