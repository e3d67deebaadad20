"""Limits on answers, ten times as strict or as lax: the first accuse a good artifact, the second let a fault past."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fixtures.adapters import ADAPTERS
from fixtures.core.answers import Answer, paired
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.limits import Limits
from fixtures.core.targets import Target
from fixtures.options import Selection
from fixtures.subjects.samples import draw
from fixtures.verifying import Verify
from suites.meta.answering import CHECKS, Check, answers, ask
from suites.meta.scaled_limits import FACTORS, names_used, scaled

TARGET = Target("qwen2_5_vl", "tiny", "awq")
SAMPLES = 32
DOSES = (0.005, 0.01, 0.02, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 0.9)
Pairs = Sequence[tuple[Answer, Answer]]
SLACK = {
    "parity.accuracy_drop": "a good artifact loses no question; one of 64 is 0.016, three times a tenth of the limit",
    "parity.largest_token_kl": "an extreme among hundreds of tokens: 0.0034 to 0.0068, with as much from draw to draw",
}


@pytest.fixture(scope="module")
def good(tiny_reference: Checkpoint, good_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Reference and good artifact on held-out text."""
    samples = {"text": draw("text", "evaluation", SAMPLES)}
    adapter = ADAPTERS["qwen2_5_vl"]
    of_reference, of_artifact = (
        answers(checkpoint, adapter, samples, tmp_path_factory.mktemp(name))["text"]
        for name, checkpoint in (("reference", tiny_reference), ("artifact", Checkpoint(good_artifact)))
    )
    return list(paired(of_reference, of_artifact))


def timid(pairs: Pairs, dose: float) -> Pairs:
    """Distributions flattened by a share."""
    return [(a, dataclasses.replace(b, logits=b.logits * (1 - dose))) for a, b in pairs]


def one_token(pairs: Pairs, dose: float) -> Pairs:
    """One token of all flattened by a share."""
    (a, b), *rest = pairs
    logits = b.logits.clone()
    logits[0] *= 1 - dose
    return [(a, dataclasses.replace(b, logits=logits)), *rest]


def few_tokens(pairs: Pairs, dose: float) -> Pairs:
    """Every fortieth token flattened by a share."""

    def flattened(answer: Answer) -> Answer:
        logits = answer.logits.clone()
        logits[::40] *= 1 - dose
        return dataclasses.replace(answer, logits=logits)

    return [(a, flattened(b)) for a, b in pairs]


def torn(pairs: Pairs, dose: float) -> Pairs:
    """A share of the answers computed for another vocabulary."""
    cut = round(dose * len(pairs))
    return [
        (a, dataclasses.replace(b, logits=b.logits.roll(1, -1)) if n < cut else b) for n, (a, b) in enumerate(pairs)
    ]


def mute(pairs: Pairs, dose: float) -> Pairs:
    """A share of the questions left unanswered."""
    cut = round(dose * len(pairs))
    return [(a, dataclasses.replace(b, greedy=(), right=False) if n < cut else b) for n, (a, b) in enumerate(pairs)]


def wrong(pairs: Pairs, dose: float) -> Pairs:
    """A share of the questions answered wrongly by both."""
    cut = round(dose * len(pairs))
    return [
        (dataclasses.replace(a, right=False), dataclasses.replace(b, right=False)) if n < cut else (a, b)
        for n, (a, b) in enumerate(pairs)
    ]


def drifted(pairs: Pairs, dose: float) -> Pairs:
    """Hidden states longer by a share."""
    return [(a, b if b.hidden is None else dataclasses.replace(b, hidden=b.hidden * (1 + dose))) for a, b in pairs]


FAULTS: tuple[Callable[[Pairs, float], Pairs], ...] = (timid, one_token, few_tokens, torn, mute, wrong, drifted)


def broken(check: Check, pairs: Pairs, limits: Limits) -> set[str]:
    """The quantities of a check that these answers do not hold."""
    return {name for name, m in ask(check, pairs, TARGET, "text", limits).items() if m.holds is False}


def test_smallest_dose_heard(good: Pairs, selection: Selection, verify: Verify) -> None:
    """Every way in which answers go wrong is heard by some check, one prompt in ten at the latest."""
    rows, late = [], []
    for plant in FAULTS:
        heard: dict[str, float] = {}
        for dose in reversed(DOSES):
            for check in CHECKS:
                if broken(check, plant(good, dose), selection.limits):
                    heard[check.__name__] = dose
        what = (plant.__doc__ or "").rstrip(".")
        late += [] if heard and min(heard.values()) <= selection.limits("doses.heard", plant.__name__) else [what]
        rows += [(what, check, dose) for check, dose in sorted(heard.items(), key=lambda one: one[1])]
    verify.none_of("faults heard too late", late, among=len(FAULTS))
    verify.table("Smallest dose heard", ("fault", "check", "dose"), rows)


def test_limits_of_answers_matter(good: Pairs, selection: Selection, verify: Verify) -> None:
    """Each limit of parity, ten times as strict, accuses a good artifact; ten times as lax, it lets a fault past."""
    limits, rows, idle, loose = selection.limits, [], [], []
    faulty = [plant(good, dose) for plant in FAULTS for dose in DOSES]
    for check in CHECKS:
        assert not broken(check, good, limits)
        caught = [(pairs, by) for pairs in faulty if (by := broken(check, pairs, limits))]
        for name in names_used(check):
            changed = [scaled(limits, name, factor) for factor in FACTORS]
            strict = any(broken(check, good, other) for other in changed)
            past = sum(any(by - broken(check, pairs, other) for other in changed) for pairs, by in caught)
            loose += [] if strict or name in SLACK else [name]
            idle += [] if past else [name]
            rows.append((name, SLACK.get(name, "accuses a good artifact"), f"lets {past} faults past a check"))
    verify.none_of("limits that could be ten times as strict", loose, among=len(rows))
    verify.none_of("limits that could be ten times as lax", idle, among=len(rows))
    verify.table("Limits times ten", ("limit", "stricter", "laxer"), rows)
