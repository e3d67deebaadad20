"""Invariance: company in a batch, padding, order and half precision do not matter to what a model says.

Metamorphic: no right answer is needed, only two ways of asking for the same one. In float32, so that nothing but the
last bits may differ, on eight held-out samples: four as they are, and four longer ones that ask the same twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.adapters import Adapter
from fixtures.core import metrics
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.limits import Limits
from fixtures.core.samples import Sample
from fixtures.core.targets import Target
from fixtures.engines import batching
from fixtures.engines.batching import Change, Prompts
from fixtures.engines_under_test import Recordings
from fixtures.options import Selection
from fixtures.verifying import Verify


@dataclass(frozen=True)
class Asked:
    """What one checkpoint says in one precision."""

    logits: tuple[Tensor, ...]  # of every sample alone, teacher-forced: [tokens, vocabulary]
    changes: dict[str, Change]  # what other batches change, by relation; float32 only
    device: str = "cpu"  # kernels of a GPU add up in an order that depends on the batch


AskedOf = Callable[[Checkpoint, torch.dtype], Asked]


@pytest.fixture(scope="session")
def all_asked() -> dict[tuple[str, str, torch.dtype], Asked]:
    """Everything asked in this run, by checkpoint, modality and precision: the reference is common to many targets."""
    return {}


@pytest.fixture
def asked(
    all_asked: dict[tuple[str, str, torch.dtype], Asked],
    recordings: Recordings,
    evaluation_samples: Callable[[str], Sequence[Sample]],
    selection: Selection,
    adapter: Adapter,
    modality: str,
) -> AskedOf:
    """What a checkpoint says in a precision; all modalities are asked while the one model is loaded."""

    def ask(checkpoint: Checkpoint, dtype: torch.dtype) -> Asked:
        if (checkpoint.digest, modality, dtype) not in all_asked:
            engine = recordings.engine(checkpoint, adapter, dtype)
            for each in selection.modalities_of(adapter):
                samples = batching.varied(adapter, engine.processor, evaluation_samples(each))
                prompts = Prompts.encode(adapter, engine.processor, samples)
                said = ask_every_way(engine.answering, prompts, batches=dtype == torch.float32)
                all_asked[checkpoint.digest, each, dtype] = replace(said, device=selection.device.split(":")[0])
        return all_asked[checkpoint.digest, modality, dtype]

    return ask


def ask_every_way(answering: Any, prompts: Prompts, *, batches: bool = True) -> Asked:
    """Ask a model in all ways that should not matter, or, without ``batches``, only each sample alone."""
    if not batches:
        return Asked(batching.taught_logits(answering, prompts, batching.alone), {})
    said = batching.say_every_way(answering, prompts)
    return Asked(said[batching.alone].logits, batching.changes(prompts, said))


@pytest.fixture
def of_both(asked: AskedOf, reference: Checkpoint, artifact: Checkpoint) -> dict[str, Asked]:
    """What reference and artifact say in float32."""
    return {
        who: asked(checkpoint, torch.float32) for who, checkpoint in (("reference", reference), ("artifact", artifact))
    }


def test_batch_size(of_both: dict[str, Asked], target: Target, limits: Limits, verify: Verify) -> None:
    """A prompt alone and the same prompt among others of its length are answered alike."""
    hold("batched", of_both, target, limits, verify)


def test_padding(of_both: dict[str, Asked], target: Target, limits: Limits, verify: Verify) -> None:
    """A prompt alone and the same prompt padded to the length of a longer one are answered alike."""
    hold("padded", of_both, target, limits, verify)


def test_prompt_order(of_both: dict[str, Asked], target: Target, limits: Limits, verify: Verify) -> None:
    """The prompts of a batch are answered alike in either order."""
    hold("reordered", of_both, target, limits, verify)


def test_half_precision(
    of_both: dict[str, Asked],
    asked: AskedOf,
    reference: Checkpoint,
    artifact: Checkpoint,
    target: Target,
    limits: Limits,
    verify: Verify,
) -> None:
    """Float16 differs from float32 by no more than a share of the noise floor, which is what bfloat16 does."""
    for who, checkpoint in (("reference", reference), ("artifact", artifact)):
        half, floor = (noise(of_both[who], asked(checkpoint, dtype)) for dtype in (torch.float16, torch.bfloat16))
        verify(
            f"{who}: p90 token KL in float16",
            half / floor if floor else None,
            "of the noise floor",
            at_most=limits("invariance.half_precision", target.weights),
            detail=f"{half:.3g} nats, and in bfloat16 {floor:.3g}",
        )
        verify.note(f"{who}: noise floor in bfloat16", floor, "nats")


def hold(relation: str, of_both: dict[str, Asked], target: Target, limits: Limits, verify: Verify) -> None:
    """Hold what one relation changes against its bounds, for reference and artifact."""
    for who, asked in of_both.items():
        change = asked.changes[relation]
        verify(
            f"{who}: largest token KL",
            metrics.largest(change.kl),
            "nats",
            at_most=limits("invariance.largest_token_kl", target.weights, asked.device),
            detail=change.worst,
        )
        verify(
            f"{who}: greedy answers that change",
            len(change.otherwise) / change.compared if change.compared else None,
            f"of {change.compared}",
            at_most=limits("invariance.changed_answers", target.weights),
            detail="\n".join(change.otherwise),
        )


def noise(exact: Asked, rounded: Asked) -> float:
    """What rounding changes: p90 token KL, nats. A mean would be that of the one token whose answer is a near-tie."""
    kl = [metrics.token_kl(a, b) for a, b in zip(exact.logits, rounded.logits, strict=True)]
    return metrics.quantile(torch.cat([torch.empty(0), *kl]), 0.9)
