"""Calibration: what the search for scales and ranges achieved, measured anew on held-out samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from fixtures.adapters import Adapter
from fixtures.audit.leaks import leaked
from fixtures.audit.search_gain import GroupLoss
from fixtures.core.limits import Limits
from fixtures.core.samples import Sample
from fixtures.core.targets import Target
from fixtures.options import Selection
from fixtures.verifying import Verify

pytestmark = pytest.mark.calibrated


def test_replay(replay_errors: Mapping[str, float], limits: Limits, verify: Verify) -> None:
    """Layers run one by one, as calibration runs them, end where the model's own run of the same prompts ends."""
    for tower, error in replay_errors.items():
        verify(f"{tower}: hidden states off the model's own", error, "relative", at_most=limits("calibration.replay"))


@pytest.mark.recorded
def test_held_out(
    calibration_samples: Sequence[Sample],
    evaluation_samples: Callable[[str], Sequence[Sample]],
    adapter: Adapter,
    selection: Selection,
    verify: Verify,
) -> None:
    """No question that answers are judged by was among those that the search was calibrated on."""
    asked = [sample for modality in selection.modalities_of(adapter) for sample in evaluation_samples(modality)]
    known = leaked(calibration_samples, asked)
    verify.none_of("questions that were calibrated on", known, among=min(len(asked), len(calibration_samples)))


def test_search_gain(group_losses: Sequence[GroupLoss], target: Target, limits: Limits, verify: Verify) -> None:
    """Every scaling group loses no more of its module's output on held-out samples than plain rounding loses."""
    worst = max(group_losses, key=lambda g: (math.isnan(g.ratio), g.ratio), default=None)
    logs = [math.log(g.ratio) if g.ratio > 0 else math.nan for g in group_losses]
    typical = math.exp(sum(logs) / len(logs)) if logs else None

    verify(
        "worst group's loss, of RTN's",
        worst and worst.ratio,
        at_most=limits("calibration.worst_group", target.weights),
        detail=worst.name if worst else "",
    )
    verify(
        "loss of all groups, of RTN's",
        typical,
        "geometric mean",
        at_most=limits("calibration.typical_group", target.weights),
    )
    verify.table(
        "Search gain per layer",
        ("tower", "layer", "group", "loss of RTN's"),
        ((g.tower, g.layer, g.group, g.ratio) for g in group_losses),
    )


@pytest.mark.recorded
def test_search_record(search_record: Sequence[dict[str, Any]], verify: Verify) -> None:
    """By its own record, the search never settled for a larger loss than it started from."""
    scaling = [
        (layer["tower"], layer["layer"], name, found["exponent"], found["loss"], found["loss rtn"])
        for layer in search_record
        for name, found in layer["scaling"].items()
    ]
    clipping = [
        (layer["tower"], layer["layer"], name, found["clipped"], found["loss"], found["loss unclipped"])
        for layer in search_record
        for name, found in layer["clipping"].items()
    ]
    for what, found in (("scaling group", scaling), ("clipped linear", clipping)):
        worse = [
            f"{tower} layer {layer}, {name}: {loss:.4g} from {start:.4g}"
            for tower, layer, name, _, loss, start in found
            if not loss <= start
        ]
        verify.none_of(f"{what}s that came out worse", worse, among=len(found))
    verify.table("Scale search", ("tower", "layer", "group", "exponent", "loss", "loss of RTN"), scaling)
    verify.table("Clip search", ("tower", "layer", "linear", "clipped share", "loss", "loss unclipped"), clipping)
