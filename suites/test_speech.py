"""Parity of speech: a quantized checkpoint says aloud what its FP16 reference does, in the same voice.

On a few held-out samples of every modality, greedily, through the model's own ``generate``, artifact and reference
computed in the same precision. The talker turns a reply into codec tokens ("codes"), the vocoder turns codes into
sound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from fixtures.core import metrics, sound
from fixtures.core.limits import Limits
from fixtures.core.showing import BUDGET, lasting, wav
from fixtures.core.speech import Speech, Speeches, paired
from fixtures.core.targets import Target
from fixtures.verifying import Verify

pytestmark = pytest.mark.speech

Pairs = Sequence[tuple[Speech, Speech]]

PLAYED = 2  # of the replies: those that sound most unlike the reference's


@pytest.fixture(scope="session")
def spoken_pairs(reference_speech: Speeches, quantized_speech: Speeches) -> Pairs:
    """Reference's and artifact's speech to the same held-out samples."""
    return list(paired(reference_speech, quantized_speech))


def test_codec_distribution(spoken_pairs: Pairs, target: Target, limits: Limits, verify: Verify) -> None:
    """The talker expects the same next code as the reference's at every step of the reference's own speech."""
    kl = torch.cat([metrics.token_kl(a.logits, b.logits) for a, b in spoken_pairs])
    agree = torch.cat([metrics.top1_agreement(a.logits, b.logits) for a, b in spoken_pairs])
    case = target.weights

    verify(
        "mean codec KL",
        metrics.mean(kl),
        "nats",
        at_most=limits("speech.mean_codec_kl", case),
        detail=worst_code(spoken_pairs, kl),
    )
    verify("median codec KL", metrics.quantile(kl, 0.5), "nats", at_most=limits("speech.median_codec_kl", case))
    verify("p99 codec KL", metrics.quantile(kl, 0.99), "nats", at_most=limits("speech.p99_codec_kl", case))
    verify("largest codec KL", metrics.largest(kl), "nats", at_most=limits("speech.largest_codec_kl", case))
    verify("codec top-1 agreement", metrics.mean(agree), "share of codes", at_least=limits("speech.codec_top1", case))
    verify.note("codes compared", kl.numel())
    explain(
        verify,
        ("mean codec KL", "how far its expectations of the next code are from the reference's, on average; 0: equal"),
        ("median codec KL", "the same at half of the codes: unlike the average, not decided by a few misheard words"),
        ("p99 codec KL", "the same at the worst code but one in a hundred"),
        ("largest codec KL", "the same at the worst code"),
        (
            "codec top-1 agreement",
            "share of codes where both find the same one likeliest: what greedy speech would say",
        ),
    )


def test_codec_tokens(spoken_pairs: Pairs, target: Target, limits: Limits, verify: Verify) -> None:
    """Left to itself, the checkpoint speaks the reference's codes for most of their length."""
    shares = torch.tensor([metrics.agreeing_prefix(a.codes, b.codes) for a, b in spoken_pairs])
    alike = torch.tensor([a.text == b.text and a.codes == b.codes for a, b in spoken_pairs])

    verify(
        "agreeing codec prefix",
        metrics.mean(shares),
        "share of the codes",
        at_least=limits("speech.codec_prefix", target.weights),
        detail=first_difference(spoken_pairs),
    )
    verify.note("replies spoken alike", metrics.mean(alike), "share of replies")
    explain(
        verify,
        ("agreeing codec prefix", "how much of the reference's speech comes out code for code before the first other"),
        ("replies spoken alike", "share of replies whose text and codes are the reference's to the end"),
    )


def test_end_of_speech(spoken_pairs: Pairs, verify: Verify) -> None:
    """Speech ends by itself where the reference's does."""
    ending = [(a, b) for a, b in spoken_pairs if a.ended]
    if spoken_pairs and not ending:
        pytest.skip("the reference ends none of its replies within the length allowed, so that nothing could be lost")
    endless = [f"{b.sample}: no end after {len(b.codes)} codes" for _, b in ending if not b.ended]

    verify.none_of("replies that do not end", endless, among=len(ending))
    explain(verify, ("replies that do not end", "replies that run on where the reference's end by themselves"))


def test_waveform(spoken_pairs: Pairs, target: Target, limits: Limits, verify: Verify) -> None:
    """The same codes give the same sound: finite, as long as the codes ask for, and to an ear as the reference's."""
    sounded = [(a, b) for a, b in spoken_pairs if a.taught_codes]
    broken = [b.sample for _, b in sounded if not b.waveform.isfinite().all()]
    lengths = [
        f"{b.sample}: {b.waveform.numel()} samples of {len(b.taught_codes)} codes, not {b.expected_samples}"
        for _, b in sounded
        if b.waveform.numel() != b.expected_samples
    ]
    distance = {b.sample: heard(a, b) for a, b in sounded}
    frames = torch.cat([torch.empty(0), *distance.values()])
    case = target.weights

    verify.none_of("waveforms that are not finite", broken, among=len(sounded))
    verify.none_of("waveforms of another length", lengths, among=len(sounded))
    verify(
        "mel distance",
        metrics.mean(frames),
        "dB",
        at_most=limits("speech.mel_distance", case),
        detail=max(distance, key=lambda sample: loudest(distance[sample]), default="no waveforms"),
    )
    verify(
        "largest mel distance of a frame",
        metrics.largest(frames),
        "dB",
        at_most=limits("speech.largest_mel_distance", case),
    )
    verify.note("seconds of sound compared", sum(a.waveform.numel() for a, _ in sounded) / sound.SAMPLE_RATE)
    play(verify, sorted(sounded, key=lambda pair: loudest(distance[pair[0].sample]), reverse=True)[:PLAYED])
    explain(
        verify,
        ("waveforms that are not finite", "sound with NaN or infinity in it: a click, or nothing at all"),
        ("waveforms of another length", "speech cut off or drawn out: the vocoder gives a fixed time to each code"),
        ("mel distance", "mean difference in loudness over time and pitch for the same codes; 1 dB is barely heard"),
        ("largest mel distance of a frame", "the same in the worst hundredth of a second"),
    )


def heard(reference: Speech, quantized: Speech) -> torch.Tensor:
    """The distance of two waveforms in each frame [frames], dB; one NaN where their lengths differ."""
    if reference.waveform.shape != quantized.waveform.shape:
        return torch.tensor([math.nan])
    return sound.mel_distance(reference.waveform, quantized.waveform)


def play(verify: Verify, pairs: Pairs) -> None:
    """Put both sounds of each pair beside the measurements, by name in a table."""
    share = BUDGET // (2 * max(1, len(pairs)))
    rows = []
    for pair in pairs:
        names = [f"{speech.sample}, {who}" for speech, who in zip(pair, ("reference", "artifact"), strict=True)]
        for speech, name in zip(pair, names, strict=True):
            samples = speech.waveform.numpy()
            data, seconds = wav(samples, sound.SAMPLE_RATE, share)
            broken = int((~speech.waveform.isfinite()).sum())
            caption = lasting(seconds, len(samples) / sound.SAMPLE_RATE)
            caption += f"; {broken} samples are not finite: silent or clipped here" if broken else ""
            verify.medium(name, "audio/wav", data, caption=caption)
        rows.append((pair[0].sample, *names))
    verify.table("Waveforms", ("sample", "reference", "artifact"), rows)


def loudest(distance: torch.Tensor) -> float:
    """The mean distance, NaN as the worst."""
    mean = metrics.mean(distance)
    return math.inf if math.isnan(mean) else mean


def worst_code(pairs: Pairs, kl: torch.Tensor) -> str:
    """The code with the largest KL: ``sample text-3, code 5 (id 17): probability 0.81 -> 0.44``."""
    if not kl.numel():
        return "no codes"
    place = int(kl.nan_to_num(nan=torch.inf).argmax())
    for a, b in pairs:
        if place < len(a.logits):
            if place == len(a.taught_codes):
                return f"sample {a.sample}, the end after {place} codes"
            code = a.taught_codes[place]
            before, after = (float(x.logits[place].softmax(-1)[code]) for x in (a, b))
            return f"sample {a.sample}, code {place} (id {code}): probability {before:.3f} -> {after:.3f}"
        place -= len(a.logits)
    return ""


def first_difference(pairs: Pairs) -> str:
    """The first reply that is spoken otherwise, and where."""
    for a, b in pairs:
        if a.codes != b.codes:
            same = next((i for i, (x, y) in enumerate(zip(a.codes, b.codes, strict=False)) if x != y), None)
            where = f"from code {same} on" if same is not None else f"{len(b.codes)} codes for {len(a.codes)}"
            return f"sample {a.sample}: {where}{'' if a.text == b.text else ', of another text'}"
    return ""


def explain(verify: Verify, *meanings: tuple[str, str]) -> None:
    """Say beside the numbers what each means."""
    verify.table("What the numbers mean", ("number", "meaning"), meanings)
