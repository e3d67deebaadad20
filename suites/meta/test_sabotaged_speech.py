"""Every check of speech fails on the fault it exists for, from NaN to a coarse vocoder, and on no good artifact."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.pseudo_quantize import Scheme, pseudo_quantize_tensor
from fixtures.core.recipe import Recipe
from fixtures.core.speech import Speech, Speeches, paired
from fixtures.core.targets import Target
from fixtures.engines.speech import SpeechEngine
from fixtures.options import Selection
from fixtures.quantizers import calibration
from fixtures.quantizers.cache import cached_artifact
from fixtures.subjects import shipped
from fixtures.subjects.samples import draw
from suites import test_speech
from suites.meta.answering import listener

OMNI = ADAPTERS["qwen2_5_omni"]
TARGET = Target("qwen2_5_omni", "tiny", "awq")
SAMPLES = [sample for modality in ("text", "image") for sample in draw(modality, "evaluation", 4)]
CHECKS: tuple[Callable[..., None], ...] = (
    test_speech.test_codec_distribution,
    test_speech.test_codec_tokens,
    test_speech.test_end_of_speech,
    test_speech.test_waveform,
)
Pairs = Sequence[tuple[Speech, Speech]]
Change = Callable[[Speech], object]


def ask(check: Callable[..., None], pairs: Pairs, selection: Selection) -> dict[str, Any]:
    """What a check of speech says of pairs: measurements by quantity."""
    verify = listener()
    available = {"spoken_pairs": pairs, "target": TARGET, "limits": selection.limits, "verify": verify}
    wanted = check.__code__.co_varnames[: check.__code__.co_argcount]
    check(**{name: available[name] for name in wanted})
    return {m.quantity: m for m in verify.measurements}


@pytest.fixture(scope="module")
def reference() -> Checkpoint:
    """The shipped reference that speaks."""
    return Checkpoint(shipped("qwen2_5_omni-tiny"))


@pytest.fixture(scope="module")
def artifact(reference: Checkpoint, selection: Selection) -> Checkpoint:
    """A good artifact of it, by our AWQ."""
    samples = calibration.built_in(OMNI)
    recipe = Recipe("awq", Scheme(), calibration.digest(samples))
    return Checkpoint(cached_artifact(reference, recipe, samples, selection.cache))


@pytest.fixture(scope="module")
def of_reference(reference: Checkpoint) -> list[Speech]:
    """What the reference says."""
    engine = SpeechEngine.load(reference, OMNI, torch.float32)
    return [engine.speech(sample) for sample in SAMPLES]


@pytest.fixture
def engine(artifact: Checkpoint) -> SpeechEngine:
    """The artifact as an engine of speech, to be damaged."""
    return SpeechEngine.load(artifact, OMNI, torch.float32)


@pytest.fixture(scope="module")
def good(artifact: Checkpoint, of_reference: list[Speech]) -> Pairs:
    """Reference and good artifact."""
    return answered(SpeechEngine.load(artifact, OMNI, torch.float32), of_reference)


def answered(engine: SpeechEngine, of_reference: list[Speech]) -> Pairs:
    """What the reference says, and what an engine says to the same."""
    return [(said, engine.speech(sample, said)) for sample, said in zip(SAMPLES, of_reference, strict=True)]


def one_nan(tensor: Tensor) -> Tensor:
    """A tensor with its first number NaN."""
    broken = tensor.clone()
    broken.view(-1)[0] = math.nan
    return broken


def one_code_changed(speech: Speech) -> tuple[int, ...]:
    """Other codes from the second one on."""
    return (speech.codes[0], speech.codes[1] + 1, *speech.codes[2:])


LOGITS_NAN: dict[str, Change] = {"logits": lambda s: one_nan(s.logits)}
ROLLED: dict[str, Change] = {"logits": lambda s: s.logits.roll(1, dims=-1)}
TIMID: dict[str, Change] = {"logits": lambda s: s.logits * 0.7}
MUTE: dict[str, Change] = {"codes": lambda _: (), "ended": lambda _: True}
BABBLING: dict[str, Change] = {"codes": lambda s: (0, *s.codes)}
ONE_CODE_CHANGED: dict[str, Change] = {"codes": one_code_changed}
ENDLESS: dict[str, Change] = {"codes": lambda s: s.codes * 2, "ended": lambda _: False}
SILENT: dict[str, Change] = {"waveform": lambda s: torch.zeros_like(s.waveform)}
SOUND_NAN: dict[str, Change] = {"waveform": lambda s: one_nan(s.waveform)}
SOUND_INFINITE: dict[str, Change] = {"waveform": lambda s: s.waveform / torch.zeros_like(s.waveform)}
CLIPPED: dict[str, Change] = {"waveform": lambda s: (20 * s.waveform).clamp(-1, 1)}
SHIFTED: dict[str, Change] = {"waveform": lambda s: s.waveform.roll(480)}  # by one code
CUT: dict[str, Change] = {"waveform": lambda s: s.waveform[:-1]}
DRAWN_OUT: dict[str, Change] = {"waveform": lambda s: s.waveform.repeat_interleave(2)}
LOUDER: dict[str, Change] = {"waveform": lambda s: s.waveform * 1.5}
HOARSE: dict[str, Change] = {"waveform": lambda s: (s.waveform * 16).round() / 16}
CLICK: dict[str, Change] = {"waveform": lambda s: torch.cat([torch.ones(1), s.waveform[1:]])}
NO_SOUND: dict[str, Change] = {"waveform": lambda _: torch.empty(0)}

DISTRIBUTION, TOKENS, END, WAVEFORM = CHECKS
PLANTED = [
    *[
        (DISTRIBUTION, quantity, fault)
        for quantity in (
            "mean codec KL",
            "median codec KL",
            "p99 codec KL",
            "largest codec KL",
            "codec top-1 agreement",
        )
        for fault in (LOGITS_NAN, ROLLED)
    ],
    (DISTRIBUTION, "median codec KL", TIMID),
    *[(TOKENS, "agreeing codec prefix", fault) for fault in (MUTE, BABBLING, ONE_CODE_CHANGED)],
    (END, "replies that do not end", ENDLESS),
    *[(WAVEFORM, "waveforms that are not finite", fault) for fault in (SOUND_NAN, SOUND_INFINITE)],
    *[(WAVEFORM, "waveforms of another length", fault) for fault in (CUT, DRAWN_OUT, NO_SOUND)],
    *[
        (WAVEFORM, "mel distance", fault)
        for fault in (SILENT, SOUND_NAN, SOUND_INFINITE, CLIPPED, SHIFTED, CUT, DRAWN_OUT, LOUDER, HOARSE, NO_SOUND)
    ],
    *[(WAVEFORM, "largest mel distance of a frame", fault) for fault in (SILENT, SOUND_NAN, CUT, LOUDER, CLICK)],
]
NAMES = {id(fault): name for name, fault in globals().items() if name.isupper() and isinstance(fault, dict)}


@pytest.mark.parametrize(
    ("check", "quantity", "fault"),
    PLANTED,
    ids=[f"{check.__name__}-{quantity}-{NAMES[id(fault)]}" for check, quantity, fault in PLANTED],
)
def test_fault_is_caught(
    check: Callable[..., None], quantity: str, fault: dict[str, Change], good: Pairs, selection: Selection
) -> None:
    """A fault planted in what the artifact says is caught by the check that exists for it."""
    planted = [
        (a, dataclasses.replace(b, **{name: change(b) for name, change in fault.items()}))  # type: ignore[arg-type]
        for a, b in good
    ]
    assert ask(check, planted, selection)[quantity].holds is False


@pytest.mark.parametrize("fault", [SOUND_NAN, CUT, CLICK, ENDLESS], ids=lambda fault: NAMES[id(fault)])
def test_one_faulty_reply_is_enough(fault: dict[str, Change], good: Pairs, selection: Selection) -> None:
    """A click, a NaN, a cut or no end in a single reply is not averaged away."""
    (a, b), *others = good
    spoilt = dataclasses.replace(b, **{name: change(b) for name, change in fault.items()})  # type: ignore[arg-type]
    check = END if fault is ENDLESS else WAVEFORM
    assert not all(m.holds for m in ask(check, [(a, spoilt), *others], selection).values() if m.bound is not None)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_no_false_alarm(check: Callable[..., None], good: Pairs, selection: Selection) -> None:
    """The speech of a good artifact is not accused, and every judged quantity has a planted fault."""
    judged = {q: m for q, m in ask(check, good, selection).items() if m.bound is not None}
    assert [str(m) for m in judged.values() if not m.holds] == []
    assert judged.keys() == {quantity for planted, quantity, _ in PLANTED if planted is check}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_no_samples(check: Callable[..., None], selection: Selection) -> None:
    """Zero samples hold in no check."""
    try:
        measured = ask(check, [], selection)
    except (RuntimeError, ValueError):
        return  # refused, which fails the test that asks
    assert all(m.holds is False for m in measured.values() if m.bound is not None)


@pytest.mark.parametrize("check", [DISTRIBUTION, TOKENS, WAVEFORM], ids=lambda check: check.__name__)
def test_a_mute_reference_proves_nothing(check: Callable[..., None], good: Pairs, selection: Selection) -> None:
    """Where the reference says nothing, nothing was compared, and nothing holds."""
    nothing: dict[str, Any] = {
        "codes": (),
        "taught_codes": (),
        "logits": good[0][0].logits[:0],
        "waveform": torch.empty(0),
        "expected_samples": 0,
    }
    mute = [(dataclasses.replace(a, **nothing), dataclasses.replace(b, **nothing)) for a, b in good]
    measured = ask(check, mute, selection)
    assert any(m.holds is False for m in measured.values())


def test_an_endless_reference_has_no_end_to_lose(good: Pairs, selection: Selection) -> None:
    """A reference that never ends within the length allowed skips the check of the end, which does not pass."""
    endless = [(dataclasses.replace(a, ended=False), b) for a, b in good]
    with pytest.raises(pytest.skip.Exception, match="ends none of its replies"):
        ask(END, endless, selection)


def test_swapped_samples_are_not_compared(good: Pairs, tmp_path: Path) -> None:
    """Speech to other samples, to fewer, or taught otherwise is refused instead of cut to fit."""
    ours, theirs = [a for a, _ in good], [b for _, b in good]
    reference = Speeches.record(tmp_path / "reference", ours)
    swapped = Speeches.record(tmp_path / "swapped", [theirs[1], theirs[0], *theirs[2:]])
    fewer = Speeches.record(tmp_path / "fewer", theirs[:-1])
    misled = dataclasses.replace(theirs[0], taught_codes=one_code_changed(theirs[0]))
    otherwise = Speeches.record(tmp_path / "otherwise", [misled, *theirs[1:]])
    with pytest.raises(ValueError, match="was answered as"):
        list(paired(reference, swapped))
    with pytest.raises(ValueError, match="8 spoken replies of the reference, 7 of the artifact"):
        list(paired(reference, fewer))
    with pytest.raises(ValueError, match="taught otherwise"):
        list(paired(reference, otherwise))


def test_no_samples_are_not_recorded(tmp_path: Path) -> None:
    """A model that was asked nothing leaves no recording, and half a recording is none."""
    with pytest.raises(ValueError, match="no speech was recorded"):
        Speeches.record(tmp_path / "none", [])
    with pytest.raises(FileNotFoundError):
        Speeches(tmp_path / "none")


@pytest.mark.parametrize("linear", ["mlp.down_proj", "self_attn.v_proj"])
def test_damaged_talker_is_heard(
    linear: str, engine: SpeechEngine, of_reference: list[Speech], selection: Selection
) -> None:
    """One all-zero linear of the talker moves the codec's distributions too far, and leaves the voice alone."""
    with torch.no_grad():
        engine.model.talker.model.layers[0].get_submodule(linear).weight.zero_()
    pairs = answered(engine, of_reference)
    assert ask(DISTRIBUTION, pairs, selection)["median codec KL"].holds is False
    assert all(m.holds for m in ask(WAVEFORM, pairs, selection).values() if m.bound is not None)


def test_damaged_thinker_is_heard(engine: SpeechEngine, of_reference: list[Speech], selection: Selection) -> None:
    """An all-zero linear of the thinker is heard in the talker, even where the text is forced."""
    with torch.no_grad():
        engine.model.thinker.model.language_model.layers[-1].mlp.down_proj.weight.zero_()
    measured = ask(DISTRIBUTION, answered(engine, of_reference), selection)
    assert measured["mean codec KL"].holds is False
    assert measured["median codec KL"].holds is False


def test_coarse_vocoder_is_heard(engine: SpeechEngine, of_reference: list[Speech], selection: Selection) -> None:
    """A vocoder converted to 3 bits sounds otherwise for the same codes, which the codes themselves do not show."""
    scheme = Scheme(3, -1)
    for module in engine.model.token2wav.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = pseudo_quantize_tensor(module.weight.data, scheme).weight
    pairs = answered(engine, of_reference)
    assert ask(WAVEFORM, pairs, selection)["mel distance"].holds is False
    assert all(m.holds for m in ask(DISTRIBUTION, pairs, selection).values() if m.bound is not None)
