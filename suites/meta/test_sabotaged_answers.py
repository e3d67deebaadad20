"""Every check of answers fails on the fault it exists for: NaN, missing prompts, damaged weights, a harmful search."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from fixtures.adapters import ADAPTERS
from fixtures.audit.leaks import leaked
from fixtures.audit.pair import Pair
from fixtures.audit.search_gain import GroupLoss, group_losses, replay_error
from fixtures.core.answers import Answer, Answers, paired
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.limits import load_limits
from fixtures.core.samples import Sample
from fixtures.core.targets import Target
from fixtures.engines.loading import load_model, load_processor
from fixtures.faults import awq_codes
from fixtures.faults.editing import copied, edit_json
from fixtures.options import Selection
from fixtures.quantizers import calibration
from fixtures.subjects.samples import draw
from suites import test_calibration, test_parity
from suites.meta.answering import CHECKS, Check, answers, ask, listener

VL = ADAPTERS["qwen2_5_vl"]
TARGET = Target("qwen2_5_vl", "tiny", "awq")
SAMPLES = {modality: draw(modality, "evaluation", 24) for modality in ("text", "image")}
Pairs = list[tuple[Answer, Answer]]


@pytest.fixture(scope="module")
def of_reference(tiny_reference: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answers]:
    """The reference's answers to a few held-out samples."""
    return answers(tiny_reference, VL, SAMPLES, tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="module")
def good(of_reference: dict[str, Answers], good_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Reference and good artifact, on text."""
    of_artifact = answers(Checkpoint(good_artifact), VL, SAMPLES, tmp_path_factory.mktemp("artifact"))
    return list(paired(of_reference["text"], of_artifact["text"]))


def changed(pairs: Pairs, **changes: Callable[[Answer], object]) -> Pairs:
    """The same pairs, with fields of the artifact's answers computed anew."""
    return [
        (a, dataclasses.replace(b, **{name: change(b) for name, change in changes.items()}))  # type: ignore[arg-type]
        for a, b in pairs
    ]


def with_nan(answer: Answer) -> torch.Tensor:
    """The answer's logits, one of them NaN."""
    logits = answer.logits.clone()
    logits[0, 0] = math.nan
    return logits


ONE_NAN: dict[str, Callable[[Answer], object]] = {"logits": with_nan}
TORN: dict[str, Callable[[Answer], object]] = {"logits": lambda a: a.logits.roll(1, dims=-1)}
TIMID: dict[str, Callable[[Answer], object]] = {"logits": lambda a: a.logits * 0.7}
MUTE: dict[str, Callable[[Answer], object]] = {"greedy": lambda _: (), "text": lambda _: "", "right": lambda _: False}
BABBLING: dict[str, Callable[[Answer], object]] = {"greedy": lambda a: (0, *a.greedy), "right": lambda _: False}
UNGRADED: dict[str, Callable[[Answer], object]] = {"right": lambda _: None}
DRIFTED: dict[str, Callable[[Answer], object]] = {"hidden": lambda a: None if a.hidden is None else a.hidden * 1.5}
NO_HIDDEN: dict[str, Callable[[Answer], object]] = {"hidden": lambda _: None}
HIDDEN_NAN: dict[str, Callable[[Answer], object]] = {
    "hidden": lambda a: None if a.hidden is None else a.hidden * math.nan
}

PLANTED = [
    (test_parity.test_next_token_distribution, "mean token KL", ONE_NAN),
    (test_parity.test_next_token_distribution, "p99 token KL", ONE_NAN),
    (test_parity.test_next_token_distribution, "largest token KL", ONE_NAN),
    (test_parity.test_next_token_distribution, "mean token KL", TORN),
    (test_parity.test_next_token_distribution, "p99 token KL", TORN),
    (test_parity.test_next_token_distribution, "largest token KL", TORN),
    (test_parity.test_next_token_distribution, "mean token KL", TIMID),
    (test_parity.test_top1, "top-1 agreement", ONE_NAN),
    (test_parity.test_top1, "top-1 agreement", TORN),
    (test_parity.test_perplexity, "perplexity ratio", ONE_NAN),
    (test_parity.test_perplexity, "perplexity ratio", TORN),
    (test_parity.test_perplexity, "perplexity ratio", TIMID),
    (test_parity.test_task_accuracy, "task accuracy drop", MUTE),
    (test_parity.test_task_accuracy, "task accuracy drop", BABBLING),
    (test_parity.test_task_accuracy, "task accuracy drop", UNGRADED),
    (test_parity.test_task_accuracy, "reference's accuracy", UNGRADED),
    (test_parity.test_greedy_prefix, "agreeing greedy prefix", MUTE),
    (test_parity.test_greedy_prefix, "agreeing greedy prefix", BABBLING),
    (test_parity.test_hidden_state_drift, "largest drift of a layer", DRIFTED),
    (test_parity.test_hidden_state_drift, "largest drift of a layer", NO_HIDDEN),
    (test_parity.test_hidden_state_drift, "largest drift of a layer", HIDDEN_NAN),
]
NAMES = {
    id(fault): name
    for name, fault in globals().items()
    if name.isupper() and isinstance(fault, dict) and name not in ("SAMPLES", "NAMES")
}


@pytest.mark.parametrize(
    ("check", "quantity", "fault"),
    PLANTED,
    ids=[f"{check.__name__}-{quantity}-{NAMES[id(fault)]}" for check, quantity, fault in PLANTED],
)
def test_fault_is_caught(
    check: Check, quantity: str, fault: dict[str, Callable[[Answer], object]], good: Pairs, selection: Selection
) -> None:
    """A fault planted in the answers is caught by the check that exists for it."""
    measured = ask(check, changed(good, **fault), TARGET, "text", selection.limits)
    assert measured[quantity].holds is False


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_no_false_alarm(check: Check, good: Pairs, selection: Selection) -> None:
    """The answers of a good artifact are not accused, and every judged quantity has a planted fault."""
    judged = {q: m for q, m in ask(check, good, TARGET, "text", selection.limits).items() if m.bound is not None}
    assert all(m.holds for m in judged.values())
    assert judged.keys() == {quantity for planted, quantity, _ in PLANTED if planted is check}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_no_prompts(check: Check, selection: Selection) -> None:
    """Zero prompts hold in no check."""
    try:
        measured = ask(check, [], TARGET, "text", selection.limits)
    except (RuntimeError, ValueError):
        return  # refused, which fails the test that asks
    assert any(m.holds is False for m in measured.values())


def test_answers_to_other_samples_are_not_compared(good: Pairs, of_reference: dict[str, Answers]) -> None:
    """Answers to different samples, or to fewer, are refused instead of cut to fit."""
    with pytest.raises(ValueError, match="was answered as"):
        list(paired(of_reference["text"], of_reference["image"]))
    with pytest.raises(ValueError, match="24 reference answers, 23 quantized"):
        list(paired(of_reference["text"], [b for _, b in good][:23]))  # type: ignore[arg-type]


def test_no_samples_are_not_recorded(tmp_path: Path) -> None:
    """A model that was asked nothing leaves no recording."""
    with pytest.raises(ValueError, match="no answers were recorded"):
        Answers.record(tmp_path / "none", [])


@pytest.mark.parametrize("fault", [awq_codes.wrong_nibble_order, awq_codes.all_zero_weights], ids=lambda f: f.__name__)
def test_damaged_weights_are_heard(
    fault: Callable[[Path], None],
    good_artifact: Path,
    of_reference: dict[str, Answers],
    selection: Selection,
    tmp_path: Path,
) -> None:
    """An artifact with one damaged linear answers differently enough to be caught, in text and in images."""
    damaged = copied(good_artifact, tmp_path / "damaged")
    fault(damaged)
    of_damaged = answers(Checkpoint(damaged), VL, SAMPLES, tmp_path / "answers")
    for modality in SAMPLES:
        pairs = list(paired(of_reference[modality], of_damaged[modality]))
        measured = ask(test_parity.test_next_token_distribution, pairs, TARGET, modality, selection.limits)
        assert measured["mean token KL"].holds is False


def test_greedy_is_greedy(of_reference: dict[str, Answers], tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """Greedy answers ignore what the checkpoint's generation settings say of sampling and penalties."""
    penalizing = copied(tiny_reference.path, tmp_path / "penalizing")
    settings = {"do_sample": True, "temperature": 2.0, "repetition_penalty": 5.0}
    edit_json(penalizing, "generation_config.json", lambda config: config.update(settings))
    said = answers(Checkpoint(penalizing), VL, {"text": SAMPLES["text"]}, tmp_path / "answers")
    assert [a.greedy for a in said["text"]] == [a.greedy for a in of_reference["text"]]


def test_nothing_right_is_not_no_drop(good: Pairs, selection: Selection) -> None:
    """A reference that answers nothing rightly fails where it is known to; where it is not, nothing could be lost."""
    clueless = [(dataclasses.replace(a, right=False), b) for a, b in changed(good, right=lambda _: False)]
    measured = ask(test_parity.test_task_accuracy, clueless, TARGET, "text", selection.limits)
    assert measured["reference's accuracy"].holds is False
    own = Target("qwen2_5_vl", "own", "awq")
    with pytest.raises(pytest.skip.Exception, match="answers none of these questions rightly"):
        ask(test_parity.test_task_accuracy, clueless, own, "text", selection.limits)
    some = [(dataclasses.replace(a, right=n == 0), b) for n, (a, b) in enumerate(clueless)]
    measured = ask(test_parity.test_task_accuracy, some, own, "text", selection.limits)
    assert measured["reference's accuracy"].bound is None  # of somebody's own reference nothing is known


@pytest.fixture(scope="module")
def losses_of(tiny_reference: Checkpoint) -> Callable[[Path], list[GroupLoss]]:
    """The search gain of an artifact folder, on a few held-out samples."""
    model = load_model(tiny_reference, VL, torch.float32)
    samples = [sample for asked in SAMPLES.values() for sample in asked[:8]]
    (decoder,) = VL.decoders(tiny_reference.config)
    feeds = calibration.feeds(VL, model, load_processor(tiny_reference), decoder, samples)
    return lambda folder: list(group_losses(Pair(tiny_reference, Checkpoint(folder)), model, decoder, feeds))


def test_lost_positions_are_caught(tiny_reference: Checkpoint) -> None:
    """Calibration that loses the positions' axes, or mixes up a batch's rows, is caught; as it is, it holds (F14)."""
    model = load_model(tiny_reference, VL, torch.float32)
    (decoder,) = VL.decoders(tiny_reference.config)
    samples = [sample for asked in SAMPLES.values() for sample in asked[:8]]
    processor = load_processor(tiny_reference)
    feeds: list[partial[object]] = calibration.feeds(VL, model, processor, decoder, samples)  # type: ignore[assignment]
    alone = calibration.one_by_one(VL, model, processor, samples)

    def replayed(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> bool:
        changed = [partial(feed.func, **change(dict(feed.keywords))) for feed in feeds]
        verify = listener()
        error = replay_error(model, decoder, changed, alone)
        test_calibration.test_replay({"language_model": error}, load_limits(), verify)
        return verify.conclude() == ""

    def plain_positions(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows, tokens = inputs["input_ids"].shape
        return {**inputs, "position_ids": torch.arange(tokens).expand(3, rows, tokens)}

    assert replayed(lambda inputs: inputs)
    assert not replayed(plain_positions)
    assert not replayed(lambda inputs: {**inputs, "input_ids": inputs["input_ids"].roll(1, dims=0)})
    verify = listener()
    test_calibration.test_replay({}, load_limits(), verify)
    assert verify.conclude()  # no decoder was replayed: nothing holds


def test_leaked_questions_are_caught(selection: Selection) -> None:
    """One question among the calibration samples is caught, whatever it is called; a held-out set is not (F30)."""
    good = calibration.built_in(VL)
    asked = {modality: draw(modality, "evaluation", 64) for modality in VL.modalities}

    def held(calibrated: Sequence[Sample]) -> bool:
        verify = listener()
        test_calibration.test_held_out(calibrated, asked.__getitem__, VL, selection, verify)
        return verify.conclude() == ""

    assert held(good)
    for modality in VL.modalities:
        stolen = dataclasses.replace(asked[modality][7], id="calibration-1", answer="")
        assert not held([*good, stolen]), modality
    respelled = [{**part, "text": part["text"].upper().rstrip(".?")} for part in asked["text"][7].content]
    assert not held([*good, dataclasses.replace(asked["text"][7], content=tuple(respelled), answer="")])
    assert not held([])  # nothing was compared
    longer = Sample("c", "text", ({"type": "text", "text": "What is 1 + 12?"},), answer="13")
    shorter = Sample("q", "text", ({"type": "text", "text": "What is 1 + 1?"},))
    assert leaked([longer], [shorter, dataclasses.replace(shorter, content=({"type": "text", "text": " "},))]) == []


def test_a_reference_that_regressed_is_caught(good: Pairs, selection: Selection) -> None:
    """A library that makes the reference as wrong as the artifact leaves every ratio as it was, and is caught (F18)."""
    wrong = [
        (dataclasses.replace(a, right=a.right and n % 4 > 0), dataclasses.replace(b, right=b.right and n % 4 > 0))
        for n, (a, b) in enumerate(good)
    ]
    measured = ask(test_parity.test_task_accuracy, wrong, TARGET, "text", selection.limits)
    assert measured["task accuracy drop"].holds
    assert measured["reference's accuracy"].holds is False


def gain(losses: Sequence[GroupLoss], selection: Selection) -> dict[str, bool | None]:
    """What the check of the search's gain says, by quantity."""
    verify = listener()
    test_calibration.test_search_gain(losses, TARGET, selection.limits, verify)
    return {m.quantity: m.holds for m in verify.measurements}


def test_search_that_harms_is_caught(
    losses_of: Callable[[Path], list[GroupLoss]], good_artifact: Path, selection: Selection, tmp_path: Path
) -> None:
    """An artifact whose search did harm fails, a good one does not, and neither does one that never searched pass."""
    assert all(gain(losses_of(good_artifact), selection).values())
    damaged = copied(good_artifact, tmp_path / "damaged")
    awq_codes.zero_off_by_one(damaged)
    assert gain(losses_of(damaged), selection)["worst group's loss, of RTN's"] is False
    assert not any(gain([], selection).values())
    unsearched = [GroupLoss("language_model", 0, "qkv", loss=1.0, loss_rtn=1.0)] * 3
    assert gain(unsearched, selection)["loss of all groups, of RTN's"] is False


def test_rounding_does_not_beat_itself(good: Pairs, selection: Selection) -> None:
    """A quantizer that is only as good as plain rounding is caught where it should be better."""
    verify = listener()

    def said(_: str) -> list[Answer]:
        return [b for _, b in good]

    test_parity.test_better_than_rounding(
        lambda _: [a for a, _ in good],  # type: ignore[arg-type,return-value]
        said,  # type: ignore[arg-type]
        said,  # type: ignore[arg-type]
        TARGET,
        "text",
        selection.limits,
        verify,
    )
    assert verify.measurements[0].holds is False
