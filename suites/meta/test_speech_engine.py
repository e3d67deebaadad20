"""The engine of speech: forcing changes nothing said anyway, the vocoder is generate's, feeds are what is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import CheckpointError
from fixtures.core.samples import Sample
from fixtures.core.speech import Speech, Speeches
from fixtures.engines.speech import (
    HEARD,
    LONGEST_SPEECH,
    LONGEST_TEXT,
    Reply,
    SpeechEngine,
    talker_feeds,
    talker_replies,
)
from fixtures.faults.editing import copied, edit_json
from fixtures.subjects import shipped
from fixtures.subjects.samples import draw
from fixtures.verifying import Verify

OMNI = ADAPTERS["qwen2_5_omni"]
SAMPLES = [draw(modality, "evaluation", 1)[0] for modality in OMNI.modalities]
TEXT = SAMPLES[0]
TEXTS = draw("text", "evaluation", 4)  # of one length, as are these:
PICTURES = draw("image", "evaluation", 3)  # in other grids, with replies of other lengths
every_modality = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.modality)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """The shipped reference that speaks."""
    return Checkpoint(shipped("qwen2_5_omni-tiny"))


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint) -> SpeechEngine:
    """The reference as an engine of speech."""
    return SpeechEngine.load(checkpoint, OMNI, torch.float32)


@pytest.fixture(scope="module")
def said(engine: SpeechEngine) -> dict[str, Speech]:
    """What the reference says by itself, by modality."""
    return {sample.modality: engine.speech(sample) for sample in SAMPLES}


@contextmanager
def listening(module: nn.Module) -> Iterator[list[Any]]:
    """The outputs of a module while the context lasts."""
    heard: list[Any] = []
    hook = module.register_forward_hook(lambda _module, _args, output: heard.append(output))
    try:
        yield heard
    finally:
        hook.remove()


@contextmanager
def mask_delivered(talker: nn.Module) -> Iterator[None]:
    """The talker hears a mask of ones at every step, as versions of transformers that do not lose it have it."""

    def deliver(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = kwargs["input_ids"] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        seen = kwargs["past_key_values"].get_seq_length()
        return args, kwargs | {"attention_mask": torch.ones(len(new), seen + new.shape[1], dtype=torch.long)}

    hook = talker.register_forward_pre_hook(deliver, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@every_modality
def test_forcing_what_is_said_anyway_changes_nothing(
    engine: SpeechEngine, said: dict[str, Speech], sample: Sample
) -> None:
    """A model that is forced to say what it says by itself has the same codes and logits."""
    free = said[sample.modality]
    steps = len(free.codes) + free.ended
    forced = engine.take(sample, free.text, free.codes, (len(free.text), steps))
    assert free.codes
    assert (forced.text, forced.codes, forced.ended) == (free.text, free.codes, free.ended)
    assert free.logits.shape == (steps, engine.codebook)
    assert torch.equal(forced.logits, free.logits)


@every_modality
def test_the_reference_agrees_with_itself(engine: SpeechEngine, said: dict[str, Speech], sample: Sample) -> None:
    """A model taught its own speech gives the same speech in every respect."""
    free, taught = said[sample.modality], engine.speech(sample, said[sample.modality])
    for name, value in vars(free).items():
        other = getattr(taught, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    assert (free.taught_text, free.taught_codes) == (free.text, free.codes)


def test_other_speech_is_forced(engine: SpeechEngine, said: dict[str, Speech]) -> None:
    """A model that says otherwise by itself is forced all the same, and its own words stay its own."""
    own, other = said["text"], said["image"]
    taught = engine.speech(TEXT, other)
    assert (taught.taught_text, taught.taught_codes) == (other.text, other.codes)
    assert taught.text == own.text[: len(taught.text)]
    assert taught.logits.shape == other.logits.shape
    assert torch.equal(taught.waveform, other.waveform)
    assert not torch.allclose(taught.logits, other.logits)


@every_modality
def test_recorded_is_what_generate_does(engine: SpeechEngine, said: dict[str, Speech], sample: Sample) -> None:
    """Codes, logits and sound are those of ``generate`` when nobody records or forces anything."""
    free, model = said[sample.modality], engine.model
    codes: list[list[int]] = []
    hook = model.token2wav.register_forward_pre_hook(lambda _, inputs: codes.append(inputs[0][0].tolist()))
    try:
        with listening(model.talker.codec_head) as logits, torch.random.fork_rng():
            sequences, wave = model.generate(
                **engine._inputs([engine.encoded(sample)]),
                thinker_max_new_tokens=len(free.text),
                talker_max_new_tokens=len(free.codes) + 1,
                talker_eos_token_id=engine.ends,
                talker_do_sample=False,
                talker_repetition_penalty=1.0,
            )
    finally:
        hook.remove()
    heard = torch.cat([step[0, -1:] for step in logits])[: len(free.logits)]
    heard[:, model.config.talker_config.tts_codec_start_token_id] = -torch.inf  # which generate suppresses
    assert tuple(sequences[0, -len(free.text) :].tolist()) == free.text
    assert tuple(codes[0][: len(free.codes)]) == free.codes
    assert torch.equal(heard, free.logits)
    assert wave.shape[0] == len(codes[0]) * engine.samples_per_code


def test_the_voice_is_that_of_generate(engine: SpeechEngine, said: dict[str, Speech]) -> None:
    """The waveform of taught codes is the one that ``generate`` ends with, from the same noise."""
    free, model = said["text"], engine.model
    with torch.random.fork_rng(), listening(model.token2wav) as waves:
        torch.manual_seed(0)
        _, wave = model.generate(
            **engine._inputs([engine.encoded(TEXT)]),
            thinker_max_new_tokens=len(free.text),
            talker_max_new_tokens=len(free.codes) + free.ended,
            talker_eos_token_id=engine.ends,
            talker_do_sample=False,
            talker_repetition_penalty=1.0,
        )
    assert len(waves) == 1
    assert torch.equal(wave, free.waveform)


def test_forced_codes_are_read(engine: SpeechEngine, said: dict[str, Speech]) -> None:
    """Another code is forced in place of the likeliest one, and all that follows hears it, nothing before does."""
    free = said["text"]
    other = (free.codes[1] + 1) % 100
    codes = (free.codes[0], other, *free.codes[2:])
    take = engine.take(TEXT, free.text, codes, (len(free.text), len(codes) + 1))
    assert take.codes[: len(codes)] == codes
    assert torch.equal(take.logits[:2], free.logits[:2])
    assert not torch.allclose(take.logits[2], free.logits[2])


def test_forced_text_is_heard(engine: SpeechEngine, said: dict[str, Speech]) -> None:
    """The talker speaks the text that the thinker was forced to say, not what the thinker would say by itself."""
    free, other = said["text"], said["image"].text
    take = engine.take(TEXT, other, free.codes, (len(other), 3))
    assert take.text == other
    assert not torch.allclose(take.logits[0], free.logits[0])


def test_endless_speech_is_cut(engine: SpeechEngine, said: dict[str, Speech]) -> None:
    """Speech that does not end in time is cut off, and known not to have ended."""
    take = engine.take(TEXT, longest=(len(said["text"].text), 3))
    assert take.codes == said["text"].codes[:3]
    assert not take.ended
    assert take.logits.shape[0] == 3


def test_a_mute_thinker_says_nothing(engine: SpeechEngine) -> None:
    """A thinker that ends its turn at once has no codes, and nothing crashes on the way."""
    end = engine.model.thinker.generation_config.eos_token_id
    first = end[0] if isinstance(end, list) else end
    take = engine.take(TEXT, (first,))
    assert take.text == (first,)
    assert (take.codes, take.ended, take.logits.shape) == ((), False, (0, engine.codebook))
    mute = Speech(TEXT.id, (first,), (), False, (first,), (), take.logits, torch.empty(0), 0)
    taught = engine.speech(TEXT, mute)
    assert (taught.taught_codes, taught.logits.shape[0], taught.waveform.numel()) == ((), 0, 0)


def test_a_mute_talker_says_nothing(engine: SpeechEngine, said: dict[str, Speech]) -> None:
    """A talker that ends at once has no codes, one step of logits, and no sound."""
    take = engine.take(TEXT, said["text"].text, (engine.ends[1],))
    assert (take.codes, take.ended, take.logits.shape[0]) == ((), True, 1)
    assert engine.waveform(take.codes).numel() == 0


@pytest.mark.parametrize("codes", [1, 2, 7])
def test_length_of_sound(engine: SpeechEngine, codes: int) -> None:
    """A code is as many samples as the vocoder's architecture says, however few codes there are."""
    wave = engine.waveform(list(range(codes)))
    assert wave.shape == (codes * engine.samples_per_code,)
    assert engine.samples_per_code == 2 * 240


def test_noise_is_the_same_for_all(engine: SpeechEngine) -> None:
    """The vocoder's noise depends on no earlier draw, and leaves the random stream alone."""
    torch.manual_seed(1)
    first, drawn = engine.waveform([5, 6]), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    assert torch.equal(engine.waveform([5, 6]), first)


def test_greedy_speech_is_greedy(checkpoint: Checkpoint, said: dict[str, Speech], tmp_path: Path) -> None:
    """Speech ignores what the checkpoint's generation settings say of sampling and penalties."""
    penalizing = copied(checkpoint.path, tmp_path / "penalizing")
    settings = {"do_sample": True, "temperature": 2.0, "repetition_penalty": 5.0}
    edit_json(penalizing, "generation_config.json", lambda config: config.update(settings))
    speech = SpeechEngine.load(Checkpoint(penalizing), OMNI, torch.float32).speech(TEXT)
    assert (speech.text, speech.codes) == (said["text"].text, said["text"].codes)


@pytest.mark.parametrize("masked", [False, True], ids=["as installed", "with its mask"])
@pytest.mark.parametrize("sample", SAMPLES[:2], ids=lambda sample: sample.modality)
def test_talker_feeds_are_what_it_reads(engine: SpeechEngine, sample: Sample, masked: bool) -> None:
    """One pass over a feed gives the hidden states of prompt and codes that speaking step by step gave."""
    talker = engine.model.talker
    with listening(talker.model) as steps:
        if masked:
            with mask_delivered(talker):
                feeds = talker_feeds(engine.model, OMNI, engine.processor, [sample])
        else:
            feeds = talker_feeds(engine.model, OMNI, engine.processor, [sample])
    (feed,) = feeds
    with torch.no_grad():
        together: Any = feed()
    step_by_step = torch.cat([step.last_hidden_state for step in steps], dim=1)
    assert len(steps) > 2
    torch.testing.assert_close(together.last_hidden_state, step_by_step, rtol=1e-4, atol=1e-4)


def listened(engine: SpeechEngine, samples: Sequence[Sample], longest: tuple[int, int]) -> list[Reply]:
    """Replies to samples of one length, begun together."""
    return engine.listen([engine.encoded(sample) for sample in samples], longest)


@pytest.fixture(scope="module")
def batching(engine: SpeechEngine) -> SpeechEngine:
    """The engine, where transformers can speak to several at once."""
    try:
        listened(engine, TEXTS[:2], HEARD)
    except NotImplementedError:
        pytest.skip(f"transformers {transformers.__version__} speaks to one at a time")
    return engine


def alike(one: Sequence[Reply], other: Sequence[Reply]) -> None:
    """Assert that two lists of replies are the same but for what another order of adding moves."""
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.prompt == b.prompt
        torch.testing.assert_close(a.embeddings, b.embeddings, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.positions, b.positions, rtol=0, atol=0)


@pytest.mark.parametrize("masked", [False, True], ids=["as installed", "with its mask"])
def test_replies_begun_together(batching: SpeechEngine, masked: bool) -> None:
    """Samples that are spoken to together are replied to as each by itself, however early one of them ends."""
    longest = LONGEST_TEXT, LONGEST_SPEECH
    with mask_delivered(batching.model.talker) if masked else nullcontext():
        apart = [reply for sample in PICTURES for reply in listened(batching, [sample], longest)]
        alike(listened(batching, PICTURES, longest), apart)
    assert len({reply.embeddings.shape[1] for reply in apart}) > 1
    at = [None if reply.positions is None else reply.positions[..., : reply.prompt].tolist() for reply in apart]
    assert at == [None] * 3 or at[0] != at[2]


def test_mute_among_others(batching: SpeechEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample to which the thinker says nothing is left out of those that are spoken to together, as by itself."""
    first = [batching.take(sample, longest=(2, 2)).text[0] for sample in TEXTS]
    mute = [token == first[0] for token in first]
    assert 0 < sum(mute) < len(TEXTS)
    monkeypatch.setattr(batching.model.thinker.generation_config, "eos_token_id", [first[0]])
    monkeypatch.setattr(batching, "turn_ends", [first[0]])
    apart = [listened(batching, [sample], HEARD) for sample in TEXTS]
    assert [not replies for replies in apart] == mute
    alike(listened(batching, TEXTS, HEARD), [reply for replies in apart for reply in replies])


def test_all_mute(batching: SpeechEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the thinker says nothing to any of several samples, no reply comes, and nothing crashes."""
    monkeypatch.setattr(batching.model.thinker.generation_config, "eos_token_id", list(range(1000)))
    assert listened(batching, TEXTS, HEARD) == []


@pytest.mark.parametrize(
    "refusal",
    [NotImplementedError("no batched inference"), torch.OutOfMemoryError("out of memory")],
    ids=["old", "full"],
)
def test_replies_that_cannot_be_begun_together(
    engine: SpeechEngine, refusal: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where transformers refuses several samples, or there is no room for them, each is spoken to by itself."""
    apart = [reply for sample in TEXTS for reply in listened(engine, [sample], HEARD)]
    own, refused = engine.model.thinker.generate, []

    def generate(**kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) > 1:
            refused.append(len(kwargs["input_ids"]))
            raise refusal
        return own(**kwargs)

    monkeypatch.setattr(engine.model.thinker, "generate", generate)
    alike(list(talker_replies(engine, TEXTS)), apart)
    assert refused == [len(TEXTS)]


def test_no_room_for_one(engine: SpeechEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out over a single sample is no silence: it is said."""

    def generate(**_kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(engine.model.thinker, "generate", generate)
    with pytest.raises(torch.OutOfMemoryError):
        list(talker_replies(engine, [TEXT]))


def test_feeds_need_speech(engine: SpeechEngine) -> None:
    """A talker that never speaks cannot be calibrated, which is said in one line."""
    with pytest.raises(CheckpointError, match="speaks to none"):
        talker_feeds(engine.model, OMNI, engine.processor, [])


def hearing(engine: SpeechEngine) -> tuple[list[bool], list[bool]]:
    """Whether each call of the talker in a real generate gets its mask, and each prompt ends with the codec's start."""
    talker = engine.model.talker
    masked: list[bool] = []
    given: list[torch.Tensor] = []  # the last embedding of each prompt, before the talker adds to it
    read: list[torch.Tensor] = []  # the last embedding of each step, after that

    def look(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        masked.append(kwargs.get("attention_mask") is not None)
        if kwargs.get("inputs_embeds") is not None:
            given.append(kwargs["inputs_embeds"][0, -1].clone())

    hooks = [
        talker.register_forward_pre_hook(look, with_kwargs=True),
        talker.thinker_to_talker_proj.register_forward_pre_hook(lambda _, args: read.append(args[0][0, -1].clone())),
    ]
    try:
        engine.take(TEXT)
    finally:
        for hook in hooks:
            hook.remove()
    start = talker.get_input_embeddings().weight[talker.codec_bos_token]
    prompts = read[: len(given)]  # a generate has one, and it comes first
    return masked, [torch.allclose(b - a, start, atol=1e-4) for a, b in zip(given, prompts, strict=True)]


def test_talker_hears_its_mask(engine: SpeechEngine, verify: Verify) -> None:
    """The talker hears its attention mask at every step of a real generate, and begins with the codec's start."""
    masked, begun = hearing(engine)
    maskless, startless = masked.count(False), begun.count(False)
    verify("talker forwards without a mask", maskless if masked else None, f"of {len(masked)}", equal_to=0)
    verify("prompts without the codec's start", startless if begun else None, f"of {len(begun)}", equal_to=0)


def test_mask_check_can_pass(engine: SpeechEngine) -> None:
    """Where the mask is delivered, the talker is seen to hear it and to begin with the codec's start."""
    with mask_delivered(engine.model.talker):
        masked, begun = hearing(engine)
    assert len(masked) > 2
    assert all(masked)
    assert begun == [True]


def test_recordings_come_back(said: dict[str, Speech], tmp_path: Path) -> None:
    """Speech written to disk is read back as it was."""
    recorded = Speeches.record(tmp_path / "speech", said.values())
    assert len(recorded) == len(said)
    for before, after in zip(said.values(), recorded, strict=True):
        plain = {name: value for name, value in vars(before).items() if not isinstance(value, torch.Tensor)}
        assert {name: vars(after)[name] for name in plain} == plain
        assert torch.equal(after.logits, before.logits)
        assert torch.equal(after.waveform, before.waveform)
