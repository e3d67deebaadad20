"""Every relation of invariance fails on the fault it exists for, and on no good model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fixtures.adapters import ADAPTERS
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.targets import Target
from fixtures.engines import batching
from fixtures.engines.batching import Prompts
from fixtures.engines.loading import load_model, load_processor
from fixtures.faults.editing import copied, edit_tensor
from fixtures.options import Selection
from fixtures.subjects.samples import draw
from fixtures.verifying import Verify
from suites import test_invariance
from suites.meta.answering import listener
from suites.test_invariance import Asked, ask_every_way

VL = ADAPTERS["qwen2_5_vl"]
TARGET = Target("qwen2_5_vl", "tiny", "awq")
CHECKS = {
    "batched": test_invariance.test_batch_size,
    "padded": test_invariance.test_padding,
    "reordered": test_invariance.test_prompt_order,
}
LEAK = 0.01  # share of a neighbour in a row


@pytest.fixture(scope="module")
def prompts(tiny_reference: Checkpoint) -> Prompts:
    """Eight prompts with images, of two lengths."""
    processor = load_processor(tiny_reference)
    return Prompts.encode(VL, processor, batching.varied(VL, processor, draw("image", "evaluation", 24)))


@pytest.fixture(scope="module")
def good(tiny_reference: Checkpoint, prompts: Prompts) -> Asked:
    """What the reference says, in every way of asking."""
    return ask_every_way(load_model(tiny_reference, VL, torch.float32), prompts)


def said_of(relation: str, good: Asked, artifact: Asked, selection: Selection) -> Verify:
    """What a check says of a good reference and an artifact."""
    verify = listener()
    CHECKS[relation]({"reference": good, "artifact": artifact}, TARGET, selection.limits, verify)
    return verify


# -- faults, planted in a loaded model ---------------------------------------------------------------------------------


def mask_ignored(model: Any) -> None:
    """Tokens attend to padding."""

    def ignore(_: object, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")  # generate() leaves it out where it masks nothing
        return args, kwargs if mask is None else kwargs | {"attention_mask": torch.ones_like(mask)}

    model.register_forward_pre_hook(ignore, with_kwargs=True)


def positions_count_padding(model: Any) -> None:
    """The last tokens count their positions from the padding's beginning, those before from its end."""

    def shift(_: object, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attention_mask")
        if mask is None:
            return args, kwargs
        padding = (mask == 0).sum(1)
        positions = kwargs["position_ids"].clone()  # [axes, rows, tokens]
        positions[..., -4:] += padding[:, None]
        return args, kwargs | {"position_ids": positions}

    model.model.language_model.register_forward_pre_hook(shift, with_kwargs=True)


def rows_leak(model: Any, share: float = LEAK) -> None:
    """Each row of a batch takes up a little of the row before it."""

    def leak(_: object, __: object, output: Tensor) -> Tensor:
        return output + share * (output.roll(1, 0) - output)

    model.model.language_model.layers[1].register_forward_hook(leak)


def first_row_favoured(model: Any) -> None:
    """The first row of a batch is computed otherwise, as by a kernel that begins at a wrong address."""

    def favour(_: object, __: object, output: Tensor) -> Tensor:
        return torch.cat([output[:1] * (1 + LEAK * (len(output) > 1)), output[1:]])

    model.model.language_model.layers[1].mlp.register_forward_hook(favour)


def results_shuffled(model: Any) -> None:
    """A batch's results come back in another order, as from a server that sends what is ready first."""

    def shuffle(_: object, __: object, output: Any) -> Any:
        output.logits = output.logits.flip(0)
        return output

    model.register_forward_hook(shuffle)


FAULTS: dict[Callable[[Any], None], set[str]] = {
    mask_ignored: {"padded"},
    positions_count_padding: {"padded"},
    rows_leak: {"batched", "padded", "reordered"},
    first_row_favoured: {"batched", "padded", "reordered"},
    results_shuffled: {"batched", "padded"},
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_fault_is_caught(
    fault: Callable[[Any], None], good: Asked, prompts: Prompts, tiny_reference: Checkpoint, selection: Selection
) -> None:
    """A fault planted in the engine is caught by the relations that it breaks, and accuses no other."""
    model = load_model(tiny_reference, VL, torch.float32)
    fault(model)
    faulty = ask_every_way(model, prompts)
    for relation in CHECKS:
        told = {m.quantity: m.holds for m in said_of(relation, good, faulty, selection).measurements}
        assert told.pop("reference: largest token KL")
        assert told.pop("reference: greedy answers that change")
        if relation in FAULTS[fault]:
            assert told["artifact: largest token KL"] is False
        else:
            assert all(told.values())


def test_changed_answers_are_caught(
    good: Asked, prompts: Prompts, tiny_reference: Checkpoint, selection: Selection
) -> None:
    """Greedy answers that change are caught in every relation, and named."""
    model = load_model(tiny_reference, VL, torch.float32)
    rows_leak(model, share=0.5)
    faulty = ask_every_way(model, prompts)
    for relation in CHECKS:
        told = said_of(relation, good, faulty, selection).measurements[-1]
        assert told.holds is False
        assert set(told.detail.splitlines()) <= set(prompts.ids)


@pytest.mark.parametrize("relation", CHECKS)
def test_no_false_alarm(relation: str, good: Asked, selection: Selection) -> None:
    """A good model is not accused, and the relation was tried on something."""
    told = said_of(relation, good, good, selection).measurements
    assert all(m.holds for m in told)
    change = good.changes[relation]
    assert change.kl.numel() > 0
    assert change.compared >= 4


@pytest.mark.parametrize("relation", CHECKS)
def test_nothing_asked(relation: str, good: Asked, tiny_reference: Checkpoint, selection: Selection) -> None:
    """No samples, or none to which the relation makes a difference, hold in no check."""
    model = load_model(tiny_reference, VL, torch.float32)
    nothing = ask_every_way(model, Prompts((), (), (), 0))
    assert not any(m.holds for m in said_of(relation, nothing, nothing, selection).measurements)
    assert not said_of(relation, good, nothing, selection).comparable


@pytest.mark.parametrize("relation", CHECKS)
def test_one_sample_is_no_batch(
    relation: str, prompts: Prompts, tiny_reference: Checkpoint, selection: Selection
) -> None:
    """One prompt alone shares no batch with any: that holds in no check."""
    model = load_model(tiny_reference, VL, torch.float32)
    one = ask_every_way(model, Prompts(prompts.ids[:1], prompts.taught[:1], prompts.asked[:1], prompts.pad_token))
    assert not any(m.holds for m in said_of(relation, one, one, selection).measurements)


@pytest.mark.parametrize("relation", CHECKS)
def test_nan_is_caught(
    relation: str, good: Asked, prompts: Prompts, tiny_reference: Checkpoint, selection: Selection
) -> None:
    """A NaN that is the same in every batch does not hold."""
    model: Any = load_model(tiny_reference, VL, torch.float32)
    model.lm_head.register_forward_hook(lambda _, __, logits: logits.index_fill(-1, torch.tensor([3]), torch.nan))
    told = said_of(relation, good, ask_every_way(model, prompts), selection).measurements
    assert {m.quantity: m.holds for m in told}["artifact: largest token KL"] is False


# -- half precision ----------------------------------------------------------------------------------------------------


def halved(reference: Checkpoint, artifact: Checkpoint, prompts: Prompts, selection: Selection) -> Verify:
    """What the check of half precision says of two checkpoints."""

    def asked(checkpoint: Checkpoint, dtype: torch.dtype) -> Asked:
        return ask_every_way(load_model(checkpoint, VL, dtype), prompts, batches=False)

    both = {"reference": asked(reference, torch.float32), "artifact": asked(artifact, torch.float32)}
    verify = listener()
    test_invariance.test_half_precision(both, asked, reference, artifact, TARGET, selection.limits, verify)
    return verify


@pytest.fixture
def overflowing(tiny_reference: Checkpoint, tmp_path: Path) -> Checkpoint:
    """A reference that is the same in float32, to the last bit, and overflows in float16.

    One linear is scaled up by a power of two and the next one down, as a careless reparametrization would.
    """
    folder = copied(tiny_reference.path, tmp_path / "overflowing")
    edit_tensor(folder, "model.layers.1.mlp.up_proj.weight", lambda weight: weight * 2**14)
    edit_tensor(folder, "model.layers.1.mlp.down_proj.weight", lambda weight: weight / 2**14)
    return Checkpoint(folder)


def test_overflow_is_caught(
    overflowing: Checkpoint, tiny_reference: Checkpoint, prompts: Prompts, selection: Selection
) -> None:
    """A checkpoint that overflows in float16 only is caught, as reference and as artifact; a good one is not."""
    good = {m.quantity: m.holds for m in halved(tiny_reference, tiny_reference, prompts, selection).measurements}
    as_artifact = {m.quantity: m.holds for m in halved(tiny_reference, overflowing, prompts, selection).measurements}
    as_reference = {m.quantity: m.holds for m in halved(overflowing, tiny_reference, prompts, selection).measurements}
    of_reference, of_artifact = (f"{who}: p90 token KL in float16" for who in ("reference", "artifact"))
    assert (good[of_reference], good[of_artifact]) == (True, True)
    assert (as_artifact[of_reference], as_artifact[of_artifact]) == (True, False)
    assert (as_reference[of_reference], as_reference[of_artifact]) == (False, True)


def test_no_better_than_bfloat16(tiny_reference: Checkpoint, prompts: Prompts, selection: Selection) -> None:
    """An engine that computes in bfloat16 where float16 is asked for is caught."""

    def asked(checkpoint: Checkpoint, dtype: torch.dtype) -> Asked:
        return rounded if dtype == torch.float16 else exact if dtype == torch.float32 else rounded

    exact, rounded = (
        ask_every_way(load_model(tiny_reference, VL, dtype), prompts, batches=False)
        for dtype in (torch.float32, torch.bfloat16)
    )
    verify = listener()
    both = {"reference": exact, "artifact": exact}
    test_invariance.test_half_precision(both, asked, tiny_reference, tiny_reference, TARGET, selection.limits, verify)
    assert [m.holds for m in verify.measurements if m.bound] == [False, False]


def test_nothing_halved(tiny_reference: Checkpoint, selection: Selection) -> None:
    """Zero samples have no noise, and that does not hold."""
    verify = halved(tiny_reference, tiny_reference, Prompts((), (), (), 0), selection)
    assert [m.holds for m in verify.measurements if m.bound] == [False, False]


# -- batches -----------------------------------------------------------------------------------------------------------


def test_left_padding(prompts: Prompts) -> None:
    """Padding stands in front, masked, in everything that runs along the tokens; media are joined in order."""
    inputs = [prompts.taught[0].inputs, prompts.taught[-1].inputs]
    lengths = [one["input_ids"].shape[1] for one in inputs]
    assert lengths[0] < lengths[1]
    batch = batching.left_padded(inputs, 7)
    missing = lengths[1] - lengths[0]
    assert batch["input_ids"][0, :missing].tolist() == [7] * missing
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for row, one in enumerate(inputs):
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            assert torch.equal(batch[name][row, -lengths[row] :], one[name][0])
    assert torch.equal(batch["pixel_values"], torch.cat([one["pixel_values"] for one in inputs]))


def test_ways_to_batch(prompts: Prompts) -> None:
    """Every way asks every prompt exactly once."""
    for way in (batching.alone, batching.alike, batching.at_once, batching.backwards):
        assert sorted(number for numbers in way(prompts.taught) for number in numbers) == list(range(8))
    assert batching.in_company(prompts.taught, batching.alone(prompts.taught)) == []
    assert batching.padded(prompts.taught, batching.alike(prompts.taught)) == []
    assert batching.padded(prompts.taught, batching.at_once(prompts.taught)) == [0, 1, 2, 3]
