"""The engine's figures: operations as counted, and the notes' table as computed."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fixtures.adapters import ADAPTERS
from fixtures.adapters.view import HubView
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.pseudo_quantize import Scheme
from fixtures.core.recipe import Recipe
from fixtures.engines.loading import load_model
from fixtures.quantizers import Job
from fixtures.quantizers.activation_aware import cost, quantize_layers
from fixtures.quantizers.activation_aware.cost import H200, Shape, Step, floor, steps

VL = ADAPTERS["qwen2_5_vl"]
NOTES = Path(__file__).parents[2] / "docs" / "engine-notes.md"
BATCH, LENGTH = 4, 32


@pytest.fixture(scope="module")
def counted(tiny_reference: Checkpoint) -> int:
    """Operations of matrix products and attention while the shipped model's decoder is quantized."""
    model = load_model(tiny_reference, VL, torch.float32)
    job = Job(HubView(tiny_reference, VL), Recipe("awq"), ())
    (decoder,) = VL.decoders(tiny_reference.config)
    tokens = torch.randint(20, 200, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        feeds = [partial(model, input_ids=tokens, use_cache=False)]
        list(quantize_layers(model, job.reference, decoder, job.to_quantize, Scheme(), feeds))
    return counter.get_total_flops()


def predicted(tiny_reference: Checkpoint, **changed: float) -> float:
    """The same by the formulas."""
    shape = Shape.of(VL.text_config(tiny_reference.config))
    found = steps(shape, BATCH * LENGTH, LENGTH, judged=changed.get("judged", 1))
    return sum(step.operations + step.operations_32 for step in found)


def test_operations_are_those_counted(counted: int, tiny_reference: Checkpoint) -> None:
    """Capture, candidates, second moments and clip search take, to a per cent, the operations that torch counts."""
    assert predicted(tiny_reference) == pytest.approx(counted, rel=0.01)


def test_another_count_would_be_seen(counted: int, tiny_reference: Checkpoint) -> None:
    """One candidate of 21 more or less is another figure."""
    assert predicted(tiny_reference, judged=20 / 21) != pytest.approx(counted, rel=0.01)


def test_floor() -> None:
    """Steps follow each other; copies run beside them, and count only where they take longer."""
    computing, copying = Step("a", operations=H200.operations), Step("b", copied=3 * H200.copied)
    assert floor([computing, Step("c", bytes=H200.bytes)]) == pytest.approx(2)
    assert floor([computing, copying]) == pytest.approx(3)


def test_notes_have_the_table() -> None:
    """docs/engine-notes.md says what the formulas say."""
    assert cost.table() in NOTES.read_text(encoding="utf-8")
