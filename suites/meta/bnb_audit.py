"""Artifacts of bitsandbytes, and what our decoders say of all their linears."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.recipe import Recipe
from fixtures.core.rounding import Rounding
from fixtures.formats import format_of
from fixtures.quantizers import bits_and_bytes

VL, OMNI = ADAPTERS["qwen2_5_vl"], ADAPTERS["qwen2_5_omni"]
NEEDED = pytest.mark.skipif(
    bits_and_bytes.find_spec("bitsandbytes") is None,
    reason='bitsandbytes is not installed: pip install "quantproof[bnb]"',
)
SHARD_BYTES = 500_000  # several shards


def skip_list(reference: Checkpoint) -> tuple[str, ...]:
    """What is not converted where the decoder is quantized."""
    return VL.skip_list(reference.config, VL.quantizable(reference.config))


def made_once(reference: Checkpoint, folder: Path, kind: str) -> Path:
    """An artifact of a kind, made where there is none yet."""
    if not (folder / kind).exists():
        skip = skip_list(reference)
        bits_and_bytes.write(reference, VL, Recipe(kind), folder / kind, skip=skip, shard_bytes=SHARD_BYTES)
    return folder / kind


@dataclass
class Audit:
    """What our decoders say of an artifact: the worst of its linears in every respect."""

    contradictions: list[str] = field(default_factory=list)
    flaws: list[str] = field(default_factory=list)
    largest_error: float = 0.0
    end_error: float = 0.0
    coarsest: float = 0.0
    finest: float = math.inf
    frobenius: float = 0.0  # over what theory expects
    recoded: int = 0
    broken_scales: int = 0
    clipped: int = 0
    misshapen: list[str] = field(default_factory=list)
    quantized: set[str] = field(default_factory=set)

    def add(self, rounding: Rounding, squared_error: float) -> None:
        """Take one linear; NaN is worse than any number."""
        self.largest_error = worse(self.largest_error, rounding.error.amax())
        self.end_error = worse(self.end_error, rounding.end_error.amax())
        self.coarsest = worse(self.coarsest, rounding.scale_ratio.amax())
        self.finest = -worse(-self.finest, (-rounding.scale_ratio).amax())
        self.frobenius = worse(self.frobenius, math.sqrt(squared_error / float(rounding.expected)))
        self.recoded += rounding.recoded
        self.broken_scales += rounding.broken_scales
        self.clipped += int(rounding.clipped.sum())


def worse(known: float, found: float | torch.Tensor) -> float:
    """The larger, NaN before all others."""
    return float(torch.tensor([known, float(found)]).amax())


def audit(reference: Checkpoint, folder: Path) -> Audit:
    """Every quantized linear of an artifact, held against its reference."""
    artifact, found = Checkpoint(folder), Audit()
    layout = format_of(artifact)
    scheme = layout.scheme_of(artifact.quantization or {})
    for module in sorted(layout.quantized(artifact.tensors)):
        found.quantized.add(module)
        found.flaws += layout.flaws(artifact, module)
        if problem := layout.contradiction(artifact, module, scheme):
            found.contradictions.append(problem)
            continue
        wanted = reference.load(f"{module}.weight").float()
        if layout.shape(artifact, module) != wanted.shape:
            found.misshapen.append(module)
            continue
        loaded = layout.load(artifact, module, scheme)
        found.add(loaded.rounding(wanted), float((loaded.weight - wanted).double().square().sum()))
    return found


def differing(first: Checkpoint, second: Checkpoint) -> list[str]:
    """Tensors that are not bit for bit the same in both, by the names they have in either."""
    return [
        name
        for name in sorted({*first.tensors, *second.tensors})
        if name not in first.tensors
        or name not in second.tensors
        or first.tensors[name].dtype != second.tensors[name].dtype
        or not torch.equal(first.load(name), second.load(name))
    ]


# Faults

LINEAR = "model.layers.1.mlp.gate_proj"
