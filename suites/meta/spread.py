"""How far the figures of a good artifact spread: ``python -m suites.meta.spread awq --seeds 5``.

Quantizes a shipped reference anew with another calibration set and asks other held-out samples for every seed, and
prints mean, standard deviation and mean + 6 sigma of every judged quantity: what ``limits.toml`` is made from.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fixtures.adapters import Adapter, adapter_for
from fixtures.audit.pair import Pair
from fixtures.audit.roundtrip import audit_linears
from fixtures.audit.search_gain import group_losses
from fixtures.core.answers import paired
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.limits import Limits, load_limits
from fixtures.core.samples import Sample
from fixtures.core.targets import Target
from fixtures.engines.loading import load_model, load_processor
from fixtures.engines.speech import SpeechEngine
from fixtures.quantizers import calibration, quantize, quantizer_named, recipe_for
from fixtures.quantizers.layers import silent
from fixtures.sensitivity_under_test import ASKED, SPOKEN_TO, costs
from fixtures.speech_under_test import SPOKEN
from fixtures.subjects import shipped
from fixtures.subjects.samples import draw
from fixtures.verifying import Verify
from suites import test_calibration, test_roundtrip, test_sensitivity, test_speech
from suites.meta.answering import CHECKS, answers, ask, listener

SAMPLES = 64


def main() -> None:
    """Print the spread of one quantizer's figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("quantizer")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--subject", default="qwen2_5_vl-tiny")
    options = parser.parse_args()
    reference = Checkpoint(shipped(options.subject))
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            for key, value in figures(reference, options.quantizer, seed, Path(folder)).items():
                found[key].append(value)
        print(f"seed {seed} done", flush=True)
    for (modality, quantity), values in found.items():
        mean, sigma = statistics.fmean(values), statistics.stdev(values)
        low, high = mean - 6 * sigma, mean + 6 * sigma
        print(f"{modality:<6} {quantity:<32} {mean:.5g} +- {sigma:.2g}   6 sigma: {low:.5g} .. {high:.5g}")


def figures(reference: Checkpoint, quantizer: str, seed: int, folder: Path) -> dict[tuple[str, str], float]:
    """Every judged quantity of one artifact, by modality and quantity."""
    adapter, limits = adapter_for(reference), load_limits()
    calibrated = quantizer_named(quantizer).calibrated
    calibrating = calibration.built_in(adapter, seed=seed) if calibrated else []
    quantize(reference, recipe_for(quantizer, None), calibrating, folder / "artifact")
    artifact = Checkpoint(folder / "artifact")
    samples = {modality: draw(modality, "evaluation", SAMPLES, seed) for modality in adapter.modalities}
    ours = answers(artifact, adapter, samples, folder / "artifact-answers")
    theirs = answers(reference, adapter, samples, folder / "reference-answers")
    target = Target(adapter.family, "tiny", quantizer)
    found: dict[tuple[str, str], float] = {}
    for modality in samples:
        both = list(paired(theirs[modality], ours[modality]))
        for check in CHECKS:
            for quantity, measured in ask(check, both, target, modality, limits).items():
                if measured.bound is not None:
                    found[modality, quantity] = measured.value
    verify = listener()
    pair = Pair(reference, artifact)
    test_roundtrip.test_clipping(list(audit_linears(pair)), target, limits, verify)
    if calibrated:
        model, processor = load_model(reference, adapter, torch.float32), load_processor(reference)
        heard = [s for m in samples.values() for s in m[:16]]
        losses = [
            loss
            for decoder in adapter.decoders(reference.config)
            for loss in group_losses(pair, model, decoder, calibration.feeds(adapter, model, processor, decoder, heard))
        ]
        test_calibration.test_search_gain(losses, target, limits, verify)
    weigh(pair, samples, target, limits, verify)
    if adapter.speaks:
        hear(reference, artifact, adapter, [s for m in samples.values() for s in m[:SPOKEN]], target, limits, verify)
    return found | {("", m.quantity): m.value for m in verify.measurements if m.bound is not None}


def weigh(pair: Pair, samples: Mapping[str, Sequence[Sample]], target: Target, limits: Limits, verify: Verify) -> None:
    """Every judged quantity of what an artifact's layers cost."""
    written = [sample for asked in samples.values() for sample in asked[:ASKED]]
    spoken = [sample for asked in samples.values() for sample in asked[:SPOKEN_TO]]
    layers = costs(pair, load_processor(pair.reference.checkpoint), written, spoken, "cpu", {}, silent)
    test_sensitivity.test_each_layer_alone(layers, target, limits, verify)
    test_sensitivity.test_mixed_precision(layers, target, limits, verify)


def hear(
    reference: Checkpoint,
    artifact: Checkpoint,
    adapter: Adapter,
    samples: Sequence[Sample],
    target: Target,
    limits: Limits,
    verify: Verify,
) -> None:
    """Every judged quantity of an artifact's speech."""
    ours, theirs = (SpeechEngine.load(one, adapter, torch.float32) for one in (artifact, reference))
    spoken = [(said := theirs.speech(sample), ours.speech(sample, said)) for sample in samples]
    test_speech.test_codec_distribution(spoken, target, limits, verify)
    test_speech.test_codec_tokens(spoken, target, limits, verify)
    test_speech.test_waveform(spoken, target, limits, verify)


if __name__ == "__main__":
    main()
