"""Odd images, videos, sounds and texts are processed or refused in one line, by reference and artifact alike."""

from __future__ import annotations

import struct
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import UserError
from fixtures.core.media import Hearing, Waveform, heard, prepared, read_image, read_wav, resample
from fixtures.core.samples import Sample
from fixtures.engines.hf import TransformersEngine
from fixtures.engines.loading import load_processor
from fixtures.options import Selection
from fixtures.quantizers import recipe_for
from fixtures.quantizers.cache import cached_artifact
from fixtures.subjects import shipped

FAMILIES = ("qwen2_5_vl", "qwen2_5_omni")
RATE = 16_000
HEARING = Hearing(RATE, shortest=321, longest=4 * RATE)
Part = dict[str, Any]


def image(*size: int, mode: str = "RGB") -> Part:
    """A grey picture, width and height in pixels."""
    return {"type": "image", "image": Image.new("RGB", size, (90, 120, 150)).convert(mode)}


def video(*shape: int) -> Part:
    """Noise [frames, height, width, 3]."""
    return {"type": "video", "video": np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)}


def tone(samples: int, rate: float = RATE, hertz: float = 440, volume: float = 0.3) -> Waveform:
    """A sine."""
    return (volume * np.sin(2 * np.pi * hertz / rate * np.arange(samples))).astype(np.float32)


def audio(sound: Any, rate: float | None = None) -> Part:
    """A sound, with its rate where one is given."""
    return {"type": "audio", "audio": sound} | ({} if rate is None else {"sampling_rate": rate})


def text(length: int) -> Part:
    """So many bytes of text."""
    return {"type": "text", "text": ("red7 and a heron " * (length // 17 + 1))[:length]}


def asking(part: Part, name: str = "odd") -> Sample:
    """A sample that asks about one part."""
    return Sample(name, part["type"], (part, {"type": "text", "text": "Read the digits."}), answer="red7")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family."""
    return str(request.param)


@pytest.fixture(scope="module")
def engines(family: str, selection: Selection) -> dict[str, TransformersEngine]:
    """Reference and artifact of a family, loaded."""
    reference = Checkpoint(shipped(f"{family}-tiny"))
    artifact = Checkpoint(cached_artifact(reference, recipe_for("rtn", None), (), selection.cache))
    both = {"reference": reference, "artifact": artifact}
    return {who: TransformersEngine(c, ADAPTERS[family], torch.float32) for who, c in both.items()}


def outcome(engine: TransformersEngine, sample: Sample) -> str:
    """``finite`` logits, or the one line that the sample is refused with."""
    try:
        ((_, logits, _),) = engine.taught([sample])
    except UserError as error:
        return str(error)
    assert logits.numel()
    return "finite" if bool(logits.isfinite().all()) else "NaN"


TOO_LONG = "tokens, media included, and the model takes 4096; shorten it"
ODD: dict[str, tuple[Callable[[], Part], str]] = {
    "image of 1x1": (lambda: image(1, 1), "finite"),
    "image of 1x200": (lambda: image(1, 200), "finite"),
    "image of 1x201": (
        lambda: image(1, 201),
        "1x201 pixels, and the longer side may be 200 times the shorter; crop it",
    ),
    "image without pixels": (lambda: image(0, 9), "0x9 pixels; it must have at least one"),
    "grey image": (lambda: image(30, 30, mode="L"), "finite"),
    "image with transparency": (lambda: image(30, 30, mode="RGBA"), "finite"),
    "image with palette": (lambda: image(30, 30, mode="P"), "finite"),
    "path for an image": (lambda: {"type": "image", "image": "a.png"}, "must be a PIL image, not str; open it first"),
    "video of one frame": (lambda: video(1, 56, 56), "finite"),
    "video of one pixel": (lambda: video(1, 1, 1), "finite"),
    "video of three frames": (lambda: video(3, 56, 56), "finite"),
    "video three pixels high": (lambda: video(4, 3, 60), "finite"),
    "video without frames": (lambda: video(0, 56, 56), "the video has no frames; give at least one"),
    "oblong video": (lambda: video(2, 1, 201), "201x1 pixels, and the longer side may be 200 times the shorter"),
    "video of floats": (
        lambda: {"type": "video", "video": np.zeros((2, 9, 9, 3))},
        "must be uint8 [frames, height, width, 3], not float64 [2, 9, 9, 3]; convert it",
    ),
    "list for a video": (lambda: {"type": "video", "video": []}, "[frames, height, width, 3], not list; convert it"),
    "empty text": (lambda: text(0), "finite"),
    "4 KB of text": (lambda: text(4 * 1024), "finite"),
    "100 KB of text": (lambda: text(100 * 1024), TOO_LONG),
    "audio without samples": (lambda: audio(tone(0)), "the audio is empty; leave it out, or give at least 0.0201 s"),
    "silence": (lambda: audio(tone(RATE, volume=0)), "finite"),
    "audio of 44.1 kHz": (lambda: audio(tone(44_100, 44_100), 44_100), "finite"),
    "audio of 8 kHz": (lambda: audio(tone(8000, 8000), 8000), "finite"),
    "shortest audio": (lambda: audio(tone(321)), "finite"),
    "audio too short": (lambda: audio(tone(320)), "lasts 0.02 s, too short to be heard; give at least 0.0201 s"),
    "longest audio": (lambda: audio(tone(4 * RATE)), "finite"),
    "audio too long": (lambda: audio(tone(5 * RATE)), "lasts 5 s, and all behind 4 s would be lost; cut it"),
    "stereo": (lambda: audio(np.zeros((2, 9), np.float32)), "one channel of floats in -1..1, not float32 [2, 9]"),
    "audio of integers": (lambda: audio(np.zeros(999, np.int16)), "floats in -1..1, not int16 [999]; convert it"),
    "audio with NaN": (lambda: audio(tone(999) * np.nan), "999 of the audio's 999 samples are NaN or infinite"),
    "audio of no rate": (lambda: audio(tone(999), 0), "a sampling rate of 0; it must be a positive number of hertz"),
    "audio of an odd rate": (lambda: audio(tone(999), float("nan")), "a sampling rate of nan; it must be"),
}
DEAF = "audio, which this model does not hear; choose one that does"


@pytest.mark.parametrize("name", ODD)
def test_odd_input(name: str, family: str, engines: dict[str, TransformersEngine]) -> None:
    """Each odd input is processed to finite logits or refused in one line, by reference and artifact alike."""
    make, expected = ODD[name]
    sample = asking(make())
    if sample.modality == "audio" and "audio" not in ADAPTERS[family].modalities:
        expected = DEAF
    said = {who: outcome(engine, sample) for who, engine in engines.items()}
    assert said["artifact"] == said["reference"]
    if expected == "finite":
        assert said["reference"] == "finite"
    else:
        assert expected in said["reference"]
        assert said["reference"].startswith("sample odd")
        assert "\n" not in said["reference"]


def test_huge_image(tiny_reference: Checkpoint, good_artifact: Path) -> None:
    """An image of 10 000 x 10 000 is scaled down to what the checkpoint's processor allows, the artifact's alike."""
    processor, other = (load_processor(c).image_processor for c in (tiny_reference, Checkpoint(good_artifact)))
    assert other.to_dict() == processor.to_dict()  # once is enough then: it takes seconds
    sample = asking(image(10_000, 10_000))
    inputs = ADAPTERS["qwen2_5_vl"].encode(load_processor(tiny_reference), sample, with_answer=True).inputs
    pixels = int(inputs["image_grid_thw"].prod()) * processor.patch_size**2
    assert processor.size["longest_edge"] / 2 < pixels <= processor.size["longest_edge"]
    assert inputs["pixel_values"].isfinite().all()


def test_video_keeps_its_own_size() -> None:
    """Omni's video processor keeps the size in its checkpoint, which transformers' class would override."""
    processor = load_processor(Checkpoint(shipped("qwen2_5_omni-tiny")))
    processor.tokenizer.init_kwargs.pop("size", None)  # where the shipped one says it once more
    inputs = ADAPTERS["qwen2_5_omni"].encode(processor, asking(video(4, 56, 56)), with_answer=True).inputs
    assert inputs["video_grid_thw"].tolist() == [[2, 4, 4]]
    assert inputs["video_second_per_grid"].tolist() == [1.0]  # two frames of two a second


def test_rate_does_not_matter() -> None:
    """The same sound at another rate is the same to the model, but for what that rate cannot carry."""
    processor = load_processor(Checkpoint(shipped("qwen2_5_omni-tiny")))

    def features(rate: int) -> torch.Tensor:
        sample = asking(audio(tone(rate, rate, hertz=700), rate))
        inputs = ADAPTERS["qwen2_5_omni"].encode(processor, sample, with_answer=True).inputs
        assert int(inputs["feature_attention_mask"].sum()) == 100
        loud: torch.Tensor = inputs["input_features"][0, :, 2:98]  # without the clip's ends
        return loud.amax(1)

    for rate in (8000, 22_050, 44_100, 48_000):
        assert torch.allclose(features(rate).max(), features(RATE).max(), atol=0.01)
        assert features(rate).argmax() == features(RATE).argmax()


@pytest.mark.parametrize("rate", [8000, 11_025, 22_050, 44_100, 44_099, 48_000, 96_000])
def test_resampling(rate: int) -> None:
    """A tone that both rates carry keeps pitch, phase and volume; one that the new rate cannot carry is gone."""
    kept = resample(tone(rate, rate, hertz=1000), rate, RATE)
    assert kept.dtype == np.float32
    assert len(kept) == RATE
    inside = slice(RATE // 20, -RATE // 20)
    assert np.abs(kept - tone(RATE, hertz=1000))[inside].max() < 1e-3
    if rate > 2 * 9000:
        assert np.abs(resample(tone(rate, rate, hertz=9000), rate, RATE)[inside]).max() < 1e-3
    assert np.abs(resample(np.ones(rate, np.float32), rate, RATE)[inside] - 1).max() < 1e-3


def test_same_rate_is_untouched() -> None:
    """A sound at the model's own rate is passed on to the last bit."""
    sound = tone(RATE)
    assert heard(sound, None, HEARING, "here") is sound
    assert np.array_equal(heard(sound, RATE, HEARING, "here"), sound)
    assert len(resample(tone(0), 8000, RATE)) == 0


def test_parts_are_named() -> None:
    """The part that cannot be used is named by its number, whatever stands before it."""
    sample = Sample("s", "mixed", (image(9, 9), {"type": "text", "text": "?"}, audio(tone(0))))
    with pytest.raises(UserError, match=r"^sample s, part 3: the audio is empty"):
        prepared(sample, HEARING)


# -- files -------------------------------------------------------------------------------------------------------------


def written(path: Path, sound: Waveform, width: int = 2, channels: int = 1, rate: int = RATE) -> Path:
    """A WAV file of PCM, the same in every channel."""
    codes = np.round(np.repeat(sound, channels).astype(np.float64) * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    if width == 1:
        codes += 128
    raw = b"".join(int(code).to_bytes(width, "little", signed=width > 1) for code in codes)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw)
    return path


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav(width: int, channels: int, tmp_path: Path) -> None:
    """PCM of every width is read to its own precision, channels mixed down."""
    sound = tone(500, volume=0.99)
    read = read_wav(written(tmp_path / "a.wav", sound, width, channels), RATE)
    assert read.shape == sound.shape
    assert read.dtype == np.float32
    assert np.abs(read - sound).max() < 1.6 / 2 ** (8 * width - 1) + 1e-7


def test_wav_of_another_rate(tmp_path: Path) -> None:
    """A file at another rate is resampled."""
    read = read_wav(written(tmp_path / "a.wav", tone(4410, 44_100), rate=44_100), RATE)
    assert np.abs(read - tone(1600))[100:-100].max() < 1e-3


def test_channels_are_mixed(tmp_path: Path) -> None:
    """What cancels between two channels is silence."""
    sound = tone(500)
    both = np.stack([sound, -sound], axis=1).reshape(-1)
    mono = written(tmp_path / "a.wav", both).read_bytes()
    stereo = bytearray(mono)
    stereo[22:24] = struct.pack("<H", 2)  # channels
    stereo[32:34] = struct.pack("<H", 4)  # bytes a frame
    (tmp_path / "b.wav").write_bytes(stereo)
    read = read_wav(tmp_path / "b.wav", RATE)
    assert read.shape == (500,)
    assert np.abs(read).max() < 1e-4


def _of_floats(good: bytes) -> bytes:
    return good[:20] + struct.pack("<H", 3) + good[22:]


WAVS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty file": (lambda _: b"", "not a WAV file of PCM samples (it ends within its header); save it as 16-bit PCM"),
    "no WAV file": (
        lambda _: b"ID3 this is a song " * 9,
        "not a WAV file of PCM samples (file does not start with RIFF",
    ),
    "of floats": (_of_floats, "unknown format: 3); save it as 16-bit PCM"),
    "no samples": (lambda good: good[:40] + bytes(4), "the audio is empty; record it again"),
    "truncated": (lambda good: good[:-100], "ends after 900 of 1000 bytes; copy it again"),
}


@pytest.mark.parametrize("name", WAVS)
def test_bad_wav(name: str, tmp_path: Path) -> None:
    """A sound file that cannot be read is refused in one line that names it."""
    damage, expected = WAVS[name]
    file = written(tmp_path / "a.wav", tone(500))
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError) as caught:
        read_wav(file, RATE)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_huge_image_file(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """A file of 10 000 x 10 000 pixels is opened without a warning."""
    file = tmp_path / "huge.png"
    Image.new("1", (10_000, 10_000)).save(file)
    assert read_image(file).size == (10_000, 10_000)
    assert not recwarn.list


IMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty file": (lambda _: b"", "not an image that Pillow knows; save it as PNG or JPEG"),
    "no image": (lambda _: b"hello", "not an image that Pillow knows"),
    "truncated": (lambda good: good[:-60], "the image is damaged ("),
    "damaged": (lambda good: good[:45] + bytes(20) + good[65:], "the image is damaged ("),
}


@pytest.mark.parametrize("name", IMAGES)
def test_bad_image_file(name: str, tmp_path: Path) -> None:
    """An image file that cannot be read is refused in one line that names it."""
    damage, expected = IMAGES[name]
    file = tmp_path / "a.png"
    Image.effect_noise((40, 40), 50).save(file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError) as caught:
        read_image(file)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_image_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image so large that Pillow suspects an attack is refused in one line."""
    file = tmp_path / "bomb.png"
    Image.new("1", (100, 100)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="more than 2000 pixels, which is refused; make the image smaller"):
        read_image(file)


@pytest.mark.parametrize("read", [read_image, lambda path: read_wav(path, RATE)], ids=["image", "sound"])
def test_missing_file(read: Callable[[Path], object], tmp_path: Path) -> None:
    """A file that is not there is named."""
    with pytest.raises(UserError, match=r"nowhere\.x: no such file$"):
        read(tmp_path / "nowhere.x")
    with pytest.raises(UserError):
        read(tmp_path)
