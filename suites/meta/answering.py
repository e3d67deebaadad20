"""Asking the parity checks outside a run: for sabotage, and to measure how far their figures spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from fixtures.adapters import Adapter
from fixtures.core.answers import Answer, Answers
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.limits import Limits
from fixtures.core.samples import Sample
from fixtures.core.targets import Target
from fixtures.engines.exhibits import Exhibits
from fixtures.engines.hf import TransformersEngine
from fixtures.engines.loading import load_processor
from fixtures.subjects import shipped
from fixtures.verifying import Verify
from suites import test_coverage, test_parity, test_roundtrip

Check = Callable[..., None]
CHECKS: tuple[Check, ...] = (
    test_parity.test_next_token_distribution,
    test_parity.test_top1,
    test_parity.test_perplexity,
    test_parity.test_task_accuracy,
    test_parity.test_greedy_prefix,
    test_parity.test_hidden_state_drift,
)

# What every format's artifacts are held against, from their bytes alone.
BYTE_CHECKS: tuple[Check, ...] = (
    test_roundtrip.test_rounding,
    test_roundtrip.test_frobenius,
    test_roundtrip.test_resolution,
    test_roundtrip.test_clipping,
    test_roundtrip.test_codes,
    test_coverage.test_every_linear,
    test_coverage.test_every_tensor,
    test_coverage.test_size,
    test_coverage.test_ties,
    test_coverage.test_skip_list_in_transformers,
    test_coverage.test_skip_list_in_vllm,
    test_coverage.test_settings,
)


def listener() -> Verify:
    """A ``verify`` that belongs to no running test."""
    return Verify(SimpleNamespace(stash={}), [])  # type: ignore[arg-type]


def answers(
    checkpoint: Checkpoint,
    adapter: Adapter,
    samples: Mapping[str, Sequence[Sample]],
    folder: Path,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Answers]:
    """What a checkpoint answers to samples by modality, recorded under ``folder``."""
    engine = TransformersEngine(checkpoint, adapter, dtype)
    return {modality: Answers.record(folder / modality, engine.answers(asked)) for modality, asked in samples.items()}


@lru_cache
def spelled(family: str) -> Exhibits:
    """Tokens as the shipped checkpoint of a family spells them; of samples no more than the answers."""
    return Exhibits(load_processor(Checkpoint(shipped(f"{family}-tiny"))), ())


def ask(
    check: Check, pairs: Sequence[tuple[Answer, Answer]], target: Target, modality: str, limits: Limits
) -> dict[str, Any]:
    """What a parity check says of pairs of answers: measurements by quantity."""
    verify = listener()
    available = {
        "pairs": pairs,
        "shown": spelled(target.family),
        "reference_answers": lambda _: [a for a, _ in pairs],
        "rounded_answers": lambda _: [a for a, _ in pairs],
        "target": target,
        "modality": modality,
        "limits": limits,
        "verify": verify,
    }
    wanted = check.__code__.co_varnames[: check.__code__.co_argcount]
    check(**{name: available[name] for name in wanted})
    return {m.quantity: m for m in verify.measurements}
