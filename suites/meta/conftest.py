"""A good artifact to damage, and a way to hear what a check says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fixtures.adapters import ADAPTERS
from fixtures.audit.coverage import linear_states
from fixtures.audit.pair import Pair
from fixtures.audit.roundtrip import audit_linears
from fixtures.checkpoints import read_scales, read_search
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.targets import Target
from fixtures.options import Selection
from fixtures.quantizers import calibration, recipe_for
from fixtures.quantizers.cache import cached_artifact
from fixtures.subjects import shipped
from fixtures.verifying import Verify
from suites.meta.answering import listener

SUBJECT = "qwen2_5_vl-tiny"
TARGET = Target("qwen2_5_vl", "tiny", "awq")


@pytest.fixture(scope="session")
def tiny_reference() -> Checkpoint:
    """The shipped reference."""
    return Checkpoint(shipped(SUBJECT))


@pytest.fixture(scope="session")
def good_artifact(tiny_reference: Checkpoint, selection: Selection) -> Path:
    """A good artifact of the shipped reference, by our AWQ; never to be changed, only copied."""
    samples = calibration.built_in(ADAPTERS["qwen2_5_vl"])
    recipe = recipe_for("awq", None, calibration=calibration.digest(samples))
    return cached_artifact(tiny_reference, recipe, samples, selection.cache)


@pytest.fixture(scope="session")
def audit(tiny_reference: Checkpoint, selection: Selection) -> Callable[..., Verify]:
    """Run one check of the suites on an artifact folder, and return what it said."""

    def run(
        check: Callable[..., None], folder: Path, target: Target = TARGET, reference: Checkpoint = tiny_reference
    ) -> Verify:
        artifact = Checkpoint(folder)
        pair = Pair(reference, artifact)
        available: dict[str, Callable[[], Any]] = {
            "pair": lambda: pair,
            "linears": lambda: linear_states(pair),
            "linear_errors": lambda: list(audit_linears(pair)),
            "recorded_scales": lambda: read_scales(artifact),
            "search_record": lambda: read_search(artifact),
            "limits": lambda: selection.limits,
            "selection": lambda: selection,
            "target": lambda: target,
        }
        verify = listener()
        wanted = check.__code__.co_varnames[: check.__code__.co_argcount]
        check(**{name: verify if name == "verify" else available[name]() for name in wanted})
        return verify

    return run
