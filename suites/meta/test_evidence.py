"""What a page shows beside the numbers is what was measured: how values spread, worst tokens, pictures, sounds."""

from __future__ import annotations

import dataclasses
import io
import math
import wave
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures.adapters import ADAPTERS
from fixtures.core import showing
from fixtures.core.answers import Answer
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.histogram import log_histogram
from fixtures.core.limits import load_limits
from fixtures.core.results import Medium
from fixtures.core.samples import Sample
from fixtures.core.speech import Speech
from fixtures.core.targets import Target
from fixtures.core.worst import worst_tokens
from fixtures.engines.exhibits import COLUMNS, Exhibits
from fixtures.engines.loading import load_processor
from fixtures.subjects import shipped
from fixtures.subjects.samples import draw
from suites import test_parity, test_speech
from suites.meta.answering import listener

CASES = [(family, modality) for family, adapter in ADAPTERS.items() for modality in adapter.modalities]
VOCABULARY = 640  # of the shipped checkpoints


@pytest.fixture(scope="module", params=ADAPTERS)
def family(request: pytest.FixtureRequest) -> str:
    """Either family."""
    return str(request.param)


@pytest.fixture(scope="module")
def processor(family: str) -> Any:
    """Of its shipped checkpoint."""
    return load_processor(Checkpoint(shipped(f"{family}-tiny")))


def certain(tokens: list[int], probability: float = 0.9) -> torch.Tensor:
    """Logits [tokens, vocabulary] of a model that gives these tokens a probability, and all others the same."""
    rest = (1 - probability) / (VOCABULARY - 1)
    return torch.full((len(tokens), VOCABULARY), rest).scatter(1, torch.tensor(tokens)[:, None], probability).log()


def answer(sample: str, tokens: list[int], says: list[int], probability: float = 0.9) -> Answer:
    """A taught answer, and what the model expected at each of its tokens."""
    return Answer(sample, torch.tensor(tokens), certain(says, probability), (), "", None)


# -- how KL is spread ------------------------------------------------------------------------------------------


def test_every_value_is_in_one_bin() -> None:
    """A value lies in the bin that its edges name, the lower one included, from exact 0 to beyond the last."""
    values = [0.0, 1e-12, 1e-9, 5e-4, 0.5, 1.0, 9.9, 10.0, math.inf]
    bins = log_histogram(torch.tensor(values, dtype=torch.float64))
    found = [(low, high, count) for low, high, count in bins if count]
    halves = {half: pytest.approx(10**half) for half in (-8.5, -3.5, -0.5, 0.5)}
    assert found == [
        (0.0, 1e-9, 2),
        (1e-9, halves[-8.5], 1),
        (halves[-3.5], 1e-3, 1),
        (halves[-0.5], 1.0, 1),
        (1.0, halves[0.5], 1),
        (halves[0.5], 10.0, 1),
        (10.0, None, 2),
    ]
    assert all(a[1] == b[0] for a, b in pairwise(bins))  # no gaps


def test_nan_has_a_bin_of_its_own() -> None:
    """NaN is counted apart instead of lost, and is not there where there is none."""
    values = torch.tensor([math.nan, 1e-3, math.nan])
    bins = log_histogram(values)
    assert bins[-1] == (None, None, 2)
    assert sum(count for *_, count in bins) == 3
    assert all(low is not None for low, *_ in log_histogram(values[1:2]))


@pytest.mark.parametrize("count", [0, 1, 10_000])
def test_counts_add_up(count: int) -> None:
    """There are as many in the bins as there were values, over any range."""
    values = 10 ** (torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 16 - 13)
    assert sum(n for *_, n in log_histogram(values)) == count


def test_negative_values_are_refused() -> None:
    """A KL below 0 is none, and is refused instead of counted somewhere."""
    with pytest.raises(ValueError, match=r"no bin for -0\.5"):
        log_histogram(torch.tensor([0.1, -0.5]))


# -- the worst tokens ------------------------------------------------------------------------------------------


def test_worst_tokens_are_found_where_they_are() -> None:
    """The worst tokens come first, each with its sample, place, the answer before it and what both models say."""
    pairs = [
        (answer("a", [5, 6, 7], [5, 6, 7]), answer("a", [5, 6, 7], [5, 9, 7], 0.6)),
        (answer("b", [8], [8]), answer("b", [8], [8], 0.8)),
    ]
    worst = worst_tokens(pairs, torch.tensor([0.0, 3.0, 0.1, 0.2]), 2)
    assert [(w.sample, w.place, w.nats, w.before) for w in worst] == [
        ("a", 1, 3.0, (5,)),
        ("b", 0, pytest.approx(0.2), ()),
    ]
    first = worst[0]
    assert (first.reference.token, first.artifact.token) == (6, 9)
    assert (first.reference.probability, first.artifact.probability) == (pytest.approx(0.9), pytest.approx(0.6))


def test_nan_is_the_worst_token() -> None:
    """A token whose KL is NaN is worse than any number, infinity included."""
    pairs = [(answer("a", [1, 2, 3], [1, 2, 3]),) * 2]
    worst = worst_tokens(pairs, torch.tensor([math.inf, 5.0, math.nan]))
    assert [w.place for w in worst] == [2, 0, 1]


def test_another_number_of_distances_is_refused() -> None:
    """Distances that are not of these tokens are refused: places would be others."""
    with pytest.raises(ValueError, match="2 KLs for 3 tokens"):
        worst_tokens([(answer("a", [1, 2, 3], [1, 2, 3]),) * 2], torch.zeros(2))


def test_tokens_read_as_text(processor: Any) -> None:
    """A token is shown in quotes with its space, a special one by name, and one that does not exist says so."""
    exhibits = Exhibits(processor, ())
    tokenizer = processor.tokenizer
    ids = tokenizer("a heron", add_special_tokens=False)["input_ids"]
    assert "".join(exhibits.token(number)[1:-1] for number in ids) == "a heron"
    assert exhibits.token(tokenizer.convert_tokens_to_ids("Ġ")) == "' '"
    assert exhibits.token(tokenizer.convert_tokens_to_ids("<|im_end|>")) == "'<|im_end|>'"
    assert exhibits.token(10**6) == "<no token 1000000>"


def test_context_is_the_prompt_and_the_answer(processor: Any, family: str) -> None:
    """Before a token stand the end of the prompt and the answer so far, sixty characters of them, on one line."""
    (sample,) = draw("image", "evaluation", 1)
    tokens = processor.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
    before = Exhibits(processor, [sample]).before(sample.id, tokens[:1])
    assert before.endswith("<|im_start|>assistant↵" + processor.tokenizer.decode(tokens[:1]))
    assert len(before) == 60
    assert "\n" not in before
    assert Exhibits(processor, ()).before(sample.id, tokens) == sample.answer[-60:]


@pytest.mark.parametrize(("family", "modality"), CASES, indirect=["family"])
def test_parity_shows_its_worst_tokens(modality: str, family: str, processor: Any) -> None:
    """The check of distributions records how KL is spread, and its three worst tokens with what the prompt showed."""
    samples = draw(modality, "evaluation", 8)
    pairs = []
    for number, sample in enumerate(samples):
        tokens = processor.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
        says = [tokens[0] + 1, *tokens[1:]] if number < 3 else tokens
        pairs.append((answer(sample.id, tokens, tokens), answer(sample.id, tokens, says, 0.8)))
    verify = listener()
    test_parity.test_next_token_distribution(
        pairs,
        Exhibits(processor, samples),
        lambda _: [a for a, _ in pairs],  # type: ignore[arg-type,return-value]
        lambda _: [a for a, _ in pairs],  # type: ignore[arg-type,return-value]
        Target(family, "tiny", "awq"),
        modality,
        load_limits(),
        verify,
    )
    spread, worst = verify.tables
    assert (spread.title, spread.columns) == ("KL distribution", ("from nats", "to nats", "tokens"))
    assert sum(int(row[2] or 0) for row in spread.rows) == sum(len(a.tokens) for a, _ in pairs)
    assert (worst.title, worst.columns) == ("Worst tokens", COLUMNS)
    rows = [dict(zip(worst.columns, row, strict=True)) for row in worst.rows]
    assert {row["sample"] for row in rows} == {sample.id for sample in samples[:3]}
    named = [name for row in rows for name in str(row["media"]).splitlines()]
    assert sorted(named) == sorted(medium.name for medium in verify.media)
    kinds = {"text": 0, "image": 1, "video": 1, "audio": 1, "mixed": 2}
    assert len(verify.media) == 3 * kinds[modality]
    first = rows[0]
    said = f"{first['reference says']} 0.90 -> {first['artifact says']} 0.80"
    assert verify.measurements[0].detail == f"prompt {first['sample']}, token 0: {said}"


# -- pictures and sounds ---------------------------------------------------------------------------------------


def sample(*content: dict[str, Any], name: str = "s") -> Sample:
    """A sample that shows something."""
    return Sample(name, "mixed", content)


def opened(medium: Medium) -> Image.Image:
    """A medium's picture."""
    return Image.open(io.BytesIO(medium.data))


def played(medium: Medium) -> tuple[int, np.ndarray[Any, Any]]:
    """A medium's rate and samples."""
    with wave.open(io.BytesIO(medium.data)) as file:
        assert file.getparams()[:2] == (1, 2)
        return file.getframerate(), np.frombuffer(file.readframes(file.getnframes()), "<i2")


def test_small_pictures_keep_their_pixels() -> None:
    """A picture no larger than a page wants is shown pixel by pixel, and those of one sample in their order."""
    pixels = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    red = Image.new("RGB", (8, 8), "red")
    first, second = showing.shown(
        [sample({"type": "image", "image": Image.fromarray(pixels)}, {"type": "image", "image": red})]
    )["s"]
    assert (np.asarray(opened(first)) == pixels).all()
    assert opened(second).getpixel((0, 0)) == (255, 0, 0)
    assert (first.type, first.name, second.name) == ("image/png", "s, image 1", "s, image 2")


def test_large_media_fit_the_budget() -> None:
    """A user's photographs, films and recordings are scaled down or cut until a result's media take what they may."""
    noise = np.random.default_rng(0).integers(0, 256, (1000, 3000, 3), dtype=np.uint8)
    film = np.random.default_rng(0).integers(0, 256, (40, 480, 640, 3), dtype=np.uint8)
    sound = np.ones(60 * 48_000, np.float32) / 2
    samples = [
        sample(
            {"type": "image", "image": Image.fromarray(noise)},
            {"type": "video", "video": film},
            {"type": "audio", "audio": sound, "sampling_rate": 48_000},
            name=name,
        )
        for name in ("a", "b", "c")
    ]
    media = [medium for found in showing.shown(samples).values() for medium in found]
    assert len(media) == 9
    assert sum(len(medium.data) for medium in media) <= showing.BUDGET
    picture, strip, recording = media[:3]
    assert opened(picture).width <= showing.LARGEST_SIDE
    assert opened(picture).width == pytest.approx(3 * opened(picture).height, rel=0.05)
    assert "of 40" in strip.caption
    rate, heard = played(recording)
    assert (rate, recording.caption[:9]) == (16_000, "the first")
    assert abs(int(heard[2000]) - 16384) < 200


def test_a_sound_is_at_most_ten_seconds() -> None:
    """However much room there is, no more than ten seconds of a sound are shown, and it is said that it was longer."""
    data, seconds = showing.wav(np.zeros(11 * 16_000, np.float32), 16_000, 10**6)
    assert (seconds, len(data)) == (10, 44 + 2 * 160_000)
    assert showing.lasting(10, 11) == "the first 10 s of 11 s"


def test_a_film_is_a_strip_of_its_frames() -> None:
    """A video is shown as its frames from left to right, the first and the last among them."""
    video = np.zeros((20, 28, 28, 3), np.uint8)
    video[0], video[-1] = (255, 0, 0), (0, 0, 255)
    (strip,) = showing.shown([sample({"type": "video", "video": video})])["s"]
    picture = opened(strip)
    assert picture.size == (8 * 30 - 2, 28)
    assert (picture.getpixel((0, 0)), picture.getpixel((picture.width - 1, 0))) == ((255, 0, 0), (0, 0, 255))


def test_a_broken_sound_can_be_played() -> None:
    """NaN is silence and what is beyond full scale is clipped: the sound is there to be heard all the same."""
    data, _ = showing.wav(np.array([math.nan, 2.0, -math.inf, 0.5], np.float32), 16_000, 1000)
    assert played(Medium("", "", data))[1].tolist() == [0, 32767, -32767, 16384]


def spoken(name: str, waveform: torch.Tensor) -> Speech:
    """A reply of one code."""
    return Speech(name, (1,), (1,), True, (1,), (1,), torch.zeros(1, 4), waveform, waveform.numel())


def test_speech_that_differs_most_can_be_heard() -> None:
    """The two replies that sound most unlike the reference's are there to play, both sounds of each."""
    tone = torch.sin(torch.arange(4800) / 10) / 2
    gains = {"same": 1.0, "louder": 2.0, "soft": 0.7, "broken": math.nan}
    pairs = [(spoken(name, tone), spoken(name, tone * gain)) for name, gain in gains.items()]
    verify = listener()
    test_speech.test_waveform(pairs, Target("qwen2_5_omni", "tiny", "awq"), load_limits(), verify)
    table = next(t for t in verify.tables if t.title == "Waveforms")
    assert table.columns == ("sample", "reference", "artifact")
    assert [row[0] for row in table.rows] == ["broken", "louder"]
    media = {medium.name: medium for medium in verify.media}
    assert [*media] == [name for row in table.rows for name in row[1:]]
    assert "4800 samples are not finite" in media["broken, artifact"].caption
    rate, loud = played(media["louder, artifact"])
    assert rate == 24_000
    assert abs(int(loud.max()) - 32767) < 10
    assert sum(len(m.data) for m in verify.media) <= showing.BUDGET


def test_nothing_spoken_is_nothing_to_hear() -> None:
    """Without replies there is an empty table and no sound."""
    verify = listener()
    test_speech.test_waveform([], Target("qwen2_5_omni", "tiny", "awq"), load_limits(), verify)
    assert verify.media == []
    assert dataclasses.asdict(next(t for t in verify.tables if t.title == "Waveforms"))["rows"] == ()
