"""Dose response: how small a fault the checks of bytes still see, per check; and from where on answers show it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from fixtures.adapters import adapter_for
from fixtures.core import metrics
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.targets import Target
from fixtures.engines.hf import TransformersEngine
from fixtures.faults import awq_codes, tensors
from fixtures.faults.catalogue import Plant
from fixtures.faults.editing import copied
from fixtures.faults.graded import DOSES, GRADED
from fixtures.options import Selection
from fixtures.quantizers.layers import Progress
from fixtures.subjects.samples import draw
from fixtures.verifying import Verify
from suites.meta.kill_matrix import Subject, differing, judged
from suites.meta.test_faults import made

VICTIMS = [Target("qwen2_5_vl", "tiny", quantizer) for quantizer in ("rtn", "awq", "autoawq", "bnb-nf4", "bnb-int8")]
VICTIMS += [Target("qwen2_5_vl", "tiny", "bnb-nf4-dq"), Target("qwen2_5_omni", "tiny", "awq")]


def seen_by(subject: Subject, plant: Plant, selection: Selection, folder: Path) -> set[str] | None:
    """The checks that see a fault in a dose; None where the number format cannot even hold it."""
    damaged = copied(subject.artifact, folder)
    plant(damaged)
    if not (changed := differing(subject, damaged)):
        return None
    outcome = judged(subject, 0, damaged, selection.limits, changed)
    assert not outcome.crashed, outcome.crashed
    return outcome.by


@pytest.mark.parametrize("victim", VICTIMS, ids=str)
def test_smallest_dose(
    victim: Target, selection: Selection, progress: Progress, tmp_path: Path, verify: Verify
) -> None:
    """Each graded fault is seen from a small dose on, by the dose that theory allows to be seen at the latest."""
    subject = made(victim, selection)
    graded = [fault for fault in GRADED if fault.where(subject.setting)]
    rows = []
    for number, fault in enumerate(graded):
        progress(f"doses of {victim}", number, len(graded))
        smallest: dict[str, float] = {}
        for place, dose in enumerate(DOSES):
            seen = seen_by(subject, fault.plant(dose), selection, tmp_path / f"{number}-{place}")
            if seen is None:
                break
            for check in seen:
                smallest[check] = dose
            if not seen:
                break  # smaller ones are no easier to see
        first = min(smallest.values(), default=None)
        verify(
            f"{fault.name}: smallest dose seen",
            first,
            at_most=selection.limits(f"doses.{fault.limit}", victim.quantizer),
            detail=", ".join(f"{check} from {dose:g}" for check, dose in sorted(smallest.items(), key=lambda x: x[1])),
        )
        rows += [(str(victim), fault.name, check, dose) for check, dose in sorted(smallest.items(), key=lambda x: x[1])]
    verify.table("Smallest dose seen", ("artifact", "fault", "check", "dose"), rows)


HEARD = DOSES[:8]
SAMPLES = 24


def taught(folder: Path, samples: Sequence[object]) -> torch.Tensor:
    """The logits of an artifact on samples, teacher-forced [tokens, vocabulary]."""
    checkpoint = Checkpoint(folder)
    engine = TransformersEngine(checkpoint, adapter_for(checkpoint), torch.float32)
    return torch.cat([logits for _, logits, _ in engine.taught(samples)])  # type: ignore[arg-type]


def test_answers_show_it_late(selection: Selection, progress: Progress, tmp_path: Path, verify: Verify) -> None:
    """Bytes show a fault long before answers do: KL alone sees none of these doses that the round trip sees."""
    subject = made(Target("qwen2_5_vl", "tiny", "awq"), selection)
    samples = draw("text", "evaluation", SAMPLES)
    reference = taught(subject.reference, samples)
    limit = selection.limits("parity.mean_token_kl", "qwen2_5_vl-tiny", "awq", "text")
    rows, late = [], []
    faults = (
        ("one scale of one group too large", awq_codes.scale_off),
        ("all scales of one linear too large", awq_codes.all_scales_off),
        ("one element of one bias too large", tensors.bias_off),
    )
    for place, (name, plant) in enumerate(faults):
        heard: float | None = None
        seen = [
            dose for n, dose in enumerate(HEARD) if seen_by(subject, plant(dose), selection, tmp_path / f"b{place}-{n}")
        ]
        for number, dose in enumerate(HEARD):
            progress(f"answers: {name}", number, len(HEARD))
            damaged = copied(subject.artifact, tmp_path / f"{place}-{number}")
            plant(dose)(damaged)
            kl = metrics.mean(metrics.token_kl(reference, taught(damaged, samples)))
            rows.append((name, dose, kl, "seen" if kl > limit else "not seen"))
            if not kl > limit:
                break
            heard = dose
        late.append(bool(seen) and (heard is None or heard > min(seen)))
        rows.append((name, min(seen, default=None), None, "seen in the bytes"))
    verify("faults that answers show later than bytes", sum(late), f"of {len(faults)}", at_least=len(faults))
    verify.table("Doses heard in answers", ("fault", "dose", "mean token KL", "by parity"), rows)
