"""What several checks of one suite look at is read once per target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from torch import nn

from fixtures.adapters import Adapter
from fixtures.adapters.base import Decoder
from fixtures.audit.comparing import TensorChange
from fixtures.audit.coverage import LinearState, changed_tensors, linear_states
from fixtures.audit.pair import Pair
from fixtures.audit.roundtrip import LinearError, audit_linears
from fixtures.audit.search_gain import GroupLoss, replay_error
from fixtures.audit.search_gain import group_losses as measure_group_losses
from fixtures.audit.streaming import Stream
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.samples import Sample
from fixtures.engines.loading import compute_dtype, load_model, load_processor
from fixtures.options import Selection
from fixtures.quantizers import calibration
from fixtures.quantizers.activation_aware.capture import Feed
from fixtures.quantizers.layers import Progress

GAIN_SAMPLES = 16  # held-out samples per modality for the search's gain


@pytest.fixture(scope="session")
def stream(selection: Selection) -> Stream:
    """Reads both checkpoints to where they are judged (--device)."""
    return Stream(selection.device)


@pytest.fixture(scope="session")
def linear_errors(pair: Pair, progress: Progress, stream: Stream) -> list[LinearError]:
    """Every quantized linear of the decoder, held against its reference."""
    return list(audit_linears(pair, progress, stream))


@pytest.fixture(scope="session")
def tensor_changes(pair: Pair, progress: Progress, stream: Stream) -> list[TensorChange]:
    """Every other tensor that is not the reference's."""
    return list(changed_tensors(pair, progress, stream))


@pytest.fixture(scope="session")
def linears(pair: Pair) -> list[LinearState]:
    """What became of every linear of the reference, from headers alone."""
    return linear_states(pair)


@dataclass(frozen=True)
class Fed:
    """A decoder that was quantized, and what runs it on held-out samples of every modality."""

    model: nn.Module
    decoder: Decoder
    feeds: Sequence[Feed]
    alone: Sequence[Feed]  # the same samples one by one, in the order of the feeds' rows; the talker hears itself


@pytest.fixture(scope="session")
def fed(
    pair: Pair,
    reference: Checkpoint,
    adapter: Adapter,
    selection: Selection,
    evaluation_samples: Callable[[str], Sequence[Sample]],
) -> list[Fed]:
    """The reference's decoders that the target quantizes."""
    device = selection.device
    model = load_model(reference, adapter, compute_dtype(reference, device), device)
    samples = [s for modality in selection.modalities_of(adapter) for s in evaluation_samples(modality)[:GAIN_SAMPLES]]
    processor = load_processor(reference)
    return [
        Fed(
            model,
            decoder,
            calibration.feeds(adapter, model, processor, decoder, samples, device),
            [] if decoder.tower == "talker" else calibration.one_by_one(adapter, model, processor, samples, device),
        )
        for decoder in adapter.decoders(reference.config)
        if decoder.tower in pair.towers
    ]


@pytest.fixture(scope="session")
def replay_errors(fed: Sequence[Fed]) -> dict[str, float]:
    """By tower, how far layers run one by one on calibration's batches end from the model's own run of each sample."""
    if not any(one.alone for one in fed):
        pytest.skip("the talker alone was quantized: it is calibrated on what it hears itself say")
    return {one.decoder.tower: replay_error(one.model, one.decoder, one.feeds, one.alone) for one in fed if one.alone}


@pytest.fixture(scope="session")
def group_losses(pair: Pair, fed: Sequence[Fed]) -> list[GroupLoss]:
    """The output error of every scaling group, and RTN's."""
    return [loss for one in fed for loss in measure_group_losses(pair, one.model, one.decoder, one.feeds)]
