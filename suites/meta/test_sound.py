"""The mel distance: known by hand where it can be, and held against transformers' own spectrogram."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fixtures.core import metrics
from fixtures.core.sound import (
    BANDS,
    FLOOR_DB,
    HOP,
    SAMPLE_RATE,
    WINDOW,
    log_mel,
    mel_distance,
    mel_filters,
)


def noise(samples: int = 4800, seed: int = 0) -> torch.Tensor:
    """White noise well above the floor."""
    return 0.3 * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def sine(hertz: float, samples: int = 12_000) -> torch.Tensor:
    """A full-scale sine."""
    return torch.sin(2 * math.pi * hertz * torch.arange(samples, dtype=torch.float64) / SAMPLE_RATE)


@pytest.mark.parametrize("gain", [2.0, 0.5, 10.0])
def test_gain_is_its_decibels(gain: float) -> None:
    """A gain on everything is a distance of 20 log10(gain) in every frame."""
    distance = mel_distance(noise(), noise() * gain)
    assert distance.shape == (1 + 4800 // HOP,)
    torch.testing.assert_close(distance, torch.full_like(distance, abs(20 * math.log10(gain))), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hertz", [200.0, 1000.0, 4000.0, 9000.0])
def test_sine_lies_in_its_band(hertz: float) -> None:
    """A sine is loudest in the band whose triangle counts its frequency most, near 0 dB, and faint far from it."""
    frame = log_mel(sine(hertz))[20]  # far from the silence at either end
    expected = int(mel_filters()[:, round(hertz / (SAMPLE_RATE / WINDOW))].argmax())
    assert abs(int(frame.argmax()) - expected) <= 1
    assert abs(frame.max()) < 3
    assert frame[(expected + BANDS // 2) % BANDS] < -50


def test_silence_is_the_floor() -> None:
    """Silence is at the floor, and so as far from a sound as the sound is loud."""
    quiet = torch.zeros(4800)
    assert torch.equal(log_mel(quiet), torch.full((21, BANDS), FLOOR_DB, dtype=torch.float64))
    torch.testing.assert_close(mel_distance(noise(), quiet), (log_mel(noise()) - FLOOR_DB).mean(-1))


def test_same_sound_is_no_distance() -> None:
    """A sound is at distance 0 from itself, in every frame."""
    assert torch.count_nonzero(mel_distance(noise(), noise())) == 0


def test_other_sounds_are_far() -> None:
    """Two draws of noise of one loudness are dB apart, though a global measure would call them alike."""
    assert 1 < metrics.mean(mel_distance(noise(seed=1), noise(seed=2))) < 6


def test_nan_stays_nan() -> None:
    """One NaN or infinite sample makes the mean distance NaN."""
    for bad in (math.nan, math.inf):
        broken = noise()
        broken[1000] = bad
        assert math.isnan(metrics.mean(mel_distance(noise(), broken)))
        assert math.isnan(metrics.largest(mel_distance(broken, noise())))


def test_nothing_is_nan() -> None:
    """Waveforms of no samples have no frames, whose mean is NaN."""
    assert mel_distance(torch.empty(0), torch.empty(0)).shape == (0,)
    assert math.isnan(metrics.mean(mel_distance(torch.empty(0), torch.empty(0))))


def test_shorter_than_a_window() -> None:
    """A waveform shorter than a window is one frame between silences."""
    assert log_mel(noise(100)).shape == (1, BANDS)


def test_lengths_must_agree() -> None:
    """Waveforms of different lengths are refused, not cut to fit; so is what is no waveform."""
    with pytest.raises(ValueError, match="cannot compare"):
        mel_distance(noise(4800), noise(4799))
    with pytest.raises(ValueError, match="one row"):
        log_mel(noise().reshape(2, -1))


def test_every_band_hears() -> None:
    """Every band counts some frequency, and between the outermost centres every frequency is counted once."""
    filters = mel_filters()
    assert (filters.amax(1) > 0).all()
    first, last = int(filters[0].argmax()), int(filters[-1].argmax())
    torch.testing.assert_close(filters.sum(0)[first + 1 : last], torch.ones(last - first - 1, dtype=torch.float64))


def test_against_transformers() -> None:
    """Filters and spectrogram are those of an independent implementation."""
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    theirs = mel_filter_bank(WINDOW // 2 + 1, BANDS, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm=None, mel_scale="htk")
    np.testing.assert_allclose(mel_filters().T.numpy(), theirs, atol=1e-9)
    window = window_function(WINDOW, "hann", periodic=True)
    power = spectrogram(
        noise().numpy().astype(np.float64),
        window,
        WINDOW,
        HOP,
        power=2.0,
        pad_mode="constant",
        mel_filters=theirs,
        mel_floor=0.0,
        dtype=np.float64,
    )
    decibels = 10 * np.log10(power.T / (window.sum() / 2) ** 2)
    np.testing.assert_allclose(log_mel(noise()).numpy(), decibels, atol=1e-4)
