"""The shipped Qwen2.5-Omni subject has learnt to hear and to speak: it is nearly always right, and never certain."""

from __future__ import annotations

import hashlib
import json
import random

import pytest
import torch
from torch import Tensor
from transformers import Qwen2_5OmniForConditionalGeneration

from fixtures.subjects import batches, shipped
from fixtures.subjects.omni import speech
from fixtures.subjects.omni.speaking import Spoken, of_one_length, reply_tokens, speak
from fixtures.subjects.omni.train import code_nll
from fixtures.subjects.samples import OMNI_MODALITIES, answer_entropy, draw
from suites.meta.omni_subject import NAME, load, load_processor

HELD_OUT = 64  # samples per modality: three standard deviations of a share of 0.98 are 0.053
SOUND_DIGEST = "1e7f285656be60c6"  # of the first clip of seed 3
SAMPLES_PER_CODE = 480  # of the waveform: two frames of the spectrogram of 240 each
HASTY = {"token2wav_num_steps": 2}  # where only the codes are looked at


@pytest.fixture(scope="module")
def model() -> Qwen2_5OmniForConditionalGeneration:
    return load()


@pytest.fixture(scope="module")
def processor() -> object:
    return load_processor()


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads((shipped(NAME) / "training" / "record.json").read_text())


@pytest.fixture(scope="module")
def spoken(model: Qwen2_5OmniForConditionalGeneration, processor: object) -> list[Spoken]:
    """Answers to held-out sums, with their stories; all prompts are equally long."""
    return speak(model, processor, draw("text", "evaluation", 16), **HASTY)


# What it is asked


def test_sound_is_reproducible() -> None:
    """A clip is the same, to the last bit, on every machine and Python version."""
    clip = draw("audio", "evaluation", 1, seed=3)[0].media("audio")[0]

    assert clip.dtype == "float32"
    assert hashlib.sha256(clip.astype("<f4").tobytes()).hexdigest()[:16] == SOUND_DIGEST


# What it knows


@pytest.mark.parametrize("modality", OMNI_MODALITIES)
def test_accuracy(modality: str, model: Qwen2_5OmniForConditionalGeneration, processor: object) -> None:
    """Greedy answers to held-out questions are nearly all right."""
    assert batches.accuracy(model.thinker, processor, draw(modality, "evaluation", HELD_OUT)) >= 0.92


@pytest.mark.parametrize("modality", OMNI_MODALITIES)
def test_record(modality: str, record: dict) -> None:
    """The training record says that each modality was learnt well, short of saturation, on many samples."""
    marks = record["held_out"][modality]

    assert 0.96 <= marks["accuracy"] < 1
    assert abs(marks["nll_nats_per_token"] - marks["entropy_nats_per_token"]) < 0.1


@pytest.mark.parametrize(
    ("modality", "entropy"), [("text", 1.0), ("image", 0.3), ("video", 0.3), ("audio", 0.3), ("mixed", 0.3)]
)
def test_entropy(modality: str, entropy: float, model: Qwen2_5OmniForConditionalGeneration, processor: object) -> None:
    """Answers keep real entropy, of text at least 1 nat/token: the generator's, and as the model sees it."""
    drawn = draw(modality, "evaluation", 32)
    losses = batches.answer_nll(model.thinker, processor, drawn)

    assert sum(map(answer_entropy, drawn)) / losses.numel() >= entropy
    assert losses.mean() >= entropy


# What it says


@pytest.mark.parametrize("modality", OMNI_MODALITIES)
def test_record_of_speech(modality: str, record: dict) -> None:
    """The training record says that answers of each modality are spoken rightly, alone and in padded batches."""
    marks = record["held_out"][modality]["speech"]

    for case in ("", "_padded"):
        assert marks[f"codes_right{case}"] >= 0.96
        assert abs(marks[f"nll_nats_per_code{case}"] - marks["entropy_nats_per_code"]) < 0.1


def test_speech_says_the_text(spoken: list[Spoken]) -> None:
    """Greedy codes say the reply that they were spoken for, and end where it ends."""
    assert sum(reply.share_right for reply in spoken) / len(spoken) >= 0.95


def test_speech_depends_on_the_text(spoken: list[Spoken]) -> None:
    """Held against the reply's words in another order, few codes are right."""
    rng = random.Random(0)
    wrong = [speech.share_right(reply.codes, rng.sample(reply.tokens, len(reply.tokens))) for reply in spoken]

    assert sum(wrong) / len(wrong) < 0.3


def test_speech_alone_and_padded(model: Qwen2_5OmniForConditionalGeneration, processor: object) -> None:
    """Answers are spoken rightly with padding in the batch and without, which the talker is handed differently."""
    samples = draw("mixed", "evaluation", 4) + draw("mixed", "evaluation", 4, seed=1)
    image = draw("image", "evaluation", 8)
    alone = [speak(model, processor, part, **HASTY) for part in of_one_length(processor, samples)]
    padded = speak(model, processor, image, **HASTY)

    assert len(of_one_length(processor, image)) > 1
    assert sum(reply.share_right for replies in alone for reply in replies) / 8 >= 0.9
    assert sum(reply.share_right for reply in padded) / 8 >= 0.9


@pytest.mark.parametrize("masked", [False, True])
def test_speech_keeps_entropy(masked: bool, model: Qwen2_5OmniForConditionalGeneration, processor: object) -> None:
    """The talker is as uncertain of a code as the codec leaves it: more than 0.8 nats."""
    drawn = draw("text", "evaluation", 32)
    losses = code_nll(model, processor, drawn, masked=masked)
    entropy = sum(speech.entropy(reply_tokens(processor, sample.answer)) for sample in drawn) / losses.numel()

    assert entropy > 0.8
    assert abs(losses.mean() - entropy) < 0.1


def test_codec() -> None:
    """A token has three codes, which the token before decides on; saying too little or too much is wrong."""
    tokens = ["2", "5", "Ġfox"]
    codes = speech.pronounce(random.Random(0), tokens)

    assert [len(triple) for triple in speech.triples(tokens)] == [3, 3, 3]
    assert speech.variants("Ġfox", "5") != speech.variants("Ġfox", "55")
    assert max(speech.variants(token, before).stop for token in map(chr, range(300)) for before in ("", "a", "ab")) <= (
        speech.CODES
    )
    assert speech.share_right(codes, tokens) == 1
    assert speech.share_right(codes[:2], tokens) == pytest.approx(2 / 3)
    assert speech.share_right([*codes, 0], tokens) == 3 / 4


def test_waveform(model: Qwen2_5OmniForConditionalGeneration) -> None:
    """From the same noise, codes give a finite waveform of their length; other codes or voices, another one."""
    codes = torch.arange(12)[None]

    def play(codes: Tensor, speaker: str) -> Tensor:
        torch.manual_seed(0)
        voice = model.speaker_map[speaker]
        with torch.no_grad():
            return model.token2wav(codes, conditioning=voice["cond"], reference_mel=voice["ref_mel"])

    wave, *others = play(codes, "Chelsie"), play(codes + 60, "Chelsie"), play(codes, "Ethan")

    assert wave.shape == (12 * SAMPLES_PER_CODE,)
    assert wave.isfinite().all()
    assert 0.02 < wave.std() < 0.5
    for other in others:
        assert (wave - other).std() > 0.1 * wave.std()
    assert torch.equal(play(codes, "Chelsie"), wave)


def test_waveform_of_an_answer(spoken: list[Spoken]) -> None:
    """A spoken answer has a waveform as long as its codes."""
    for reply in spoken:
        assert reply.wave.shape == (SAMPLES_PER_CODE * len(reply.codes),)
        assert reply.wave.isfinite().all()
