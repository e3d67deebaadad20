"""Every check of memory in transformers fails on the fault it exists for, and on no good record."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fixtures.adapters import ADAPTERS
from fixtures.core.pseudo_quantize import Scheme
from fixtures.meters.held import Ledger
from fixtures.meters.memory import GIB, MIB, Measured, OutOfMemoryError, Reading, whole
from fixtures.options import Selection
from fixtures.subjects.published import published_config
from fixtures.verifying import Verify
from suites import test_memory
from suites.meta.answering import listener
from suites.meta.memory_records import ARTIFACT, GOOD, REFERENCE, checks_of_memory, failed_alone, judged_by, not_held

Fault = Callable[[Measured], Measured]


def heavier(by: int, *, known: int = 0) -> Fault:
    """So many bytes more than the ledger says, from loading on; ``known`` of them are tensors of the model."""

    def fault(one: Measured) -> Measured:
        at, peaks = one.record.loaded, one.record.peaks
        loaded = Reading(at.allocated + by, at.requested + by, at.reserved + by, at.card + by)
        more = {m: replace(p, allocated=p.allocated + by, card=p.card + by) for m, p in peaks.items()}
        return replace(one, record=replace(one.record, loaded=loaded, peaks=more, in_model=one.record.in_model + known))

    return fault


def loaded(**changes: Callable[[Reading], Any]) -> Fault:
    """Another reading after loading."""

    def fault(one: Measured) -> Measured:
        at = one.record.loaded
        return replace(one, record=replace(one.record, loaded=replace(at, **{k: f(at) for k, f in changes.items()})))

    return fault


def recorded(**changes: Any) -> Fault:
    """Another record."""
    return lambda one: replace(one, record=replace(one.record, **changes))


def peak(**changes: Any) -> Fault:
    """Another peak."""

    def fault(one: Measured) -> Measured:
        return replace(one, record=replace(one.record, peaks={"image": replace(one.record.peaks["image"], **changes)}))

    return fault


def float32(one: Measured) -> Measured:
    """Loaded in 32 bits: all that the ledger has in 16 takes twice as much."""
    plain = sum(held.bytes for held in one.ledger.held if held.kind == "16 bits")
    return heavier(plain, known=plain)(one)


NAN = math.nan
WEIGHTS, COPIES, CARD, REDUCTION, PEAK = "weights", "copies", "card", "reduction", "peak"
# planted in the artifact unless its name says otherwise -> the checks that must not hold
FAULTS: dict[str, tuple[Fault, set[str]]] = {
    "16-bit weights kept beside all codes": (heavier(5800 * MIB), {WEIGHTS, COPIES, REDUCTION, PEAK}),
    "one 16-bit weight kept beside its codes": (heavier(MIB), {COPIES}),
    "a copy that the model knows of": (heavier(MIB, known=MIB), {COPIES}),
    "one layer left in 16 bits": (heavier(110 * MIB, known=110 * MIB), {WEIGHTS, COPIES, REDUCTION}),
    "loaded in 32 bits": (float32, {WEIGHTS, COPIES, REDUCTION}),
    "a tower not loaded": (heavier(-300 * MIB, known=-300 * MIB), {WEIGHTS, COPIES, REDUCTION}),
    "context not accounted for": (loaded(card=lambda at: at.reserved), {CARD}),
    "NVML without the process": (loaded(card=lambda at: 0), {CARD}),
    "a copy past the allocator": (loaded(card=lambda at: at.card + 5800 * MIB), {CARD}),
    "reserved less than allocated": (loaded(reserved=lambda at: at.allocated - 1), {CARD}),
    "no bytes at all": (
        recorded(loaded=Reading(0, 0, 0, 0), in_model=0),
        {WEIGHTS, COPIES, CARD, REDUCTION, PEAK},
    ),
    "NaN bytes": (
        recorded(loaded=Reading(NAN, NAN, NAN, NAN)),  # type: ignore[arg-type]
        {WEIGHTS, COPIES, CARD, REDUCTION, PEAK},
    ),
    "no context": (recorded(context=Reading(0, 0, 0, 0)), {CARD}),
    "a context of others' bytes": (recorded(context=Reading(0, 0, 0, 4 * GIB)), {CARD}),
    "a context that NVML does not count": (
        lambda one: replace(
            one,
            record=replace(
                one.record,
                context=replace(one.record.context, card=one.record.context.reserved),
                loaded=replace(one.record.loaded, card=one.record.loaded.reserved),
            ),
        ),
        {CARD},
    ),
    "others' bytes taken for ours all along": (
        lambda one: replace(
            one,
            record=replace(
                one.record,
                context=replace(one.record.context, card=one.record.context.card + 4 * GIB),
                loaded=replace(one.record.loaded, card=one.record.loaded.card + 4 * GIB),
            ),
        ),
        {CARD},
    ),
    "others came, and only the card is known": (recorded(per_process=False, drift=2 * GIB), {CARD}),
    "others went, and only the card is known": (recorded(per_process=False, drift=-2 * GIB), {CARD}),
    "weights come back while answering": (peak(allocated=REFERENCE.record.peaks["image"].allocated), {PEAK}),
    "a peak below the weights": (lambda one: peak(allocated=one.record.loaded.allocated - MIB)(one), {PEAK}),
    "nothing answered": (peak(new_tokens=0), {PEAK}),
    "not asked in the modality": (recorded(peaks={}), {PEAK}),
    "nothing quantized": (lambda _: replace(REFERENCE, name="artifact"), {REDUCTION, PEAK}),
    "an empty ledger": (lambda one: replace(one, ledger=Ledger((), {})), {WEIGHTS, COPIES, REDUCTION}),
}


def said(memory: Mapping[str, Measured], selection: Selection) -> dict[str, Verify]:
    """What each check says."""
    limits = selection.limits
    checks: dict[str, Callable[[Verify], None]] = {
        WEIGHTS: lambda verify: test_memory.test_predicted_weights(memory, limits, verify),
        COPIES: lambda verify: test_memory.test_no_copy_beside_the_codes(memory, limits, verify),
        CARD: lambda verify: test_memory.test_allocator_within_the_card(memory, limits, verify),
        REDUCTION: lambda verify: test_memory.test_reduction(
            memory,
            SimpleNamespace(layout=SimpleNamespace(method="awq")),  # type: ignore[arg-type]
            SimpleNamespace(family="nobody's"),  # type: ignore[arg-type]
            limits,
            verify,
        ),
        PEAK: lambda verify: test_memory.test_peak(memory, "image", limits, verify),
    }
    heard = {name: listener() for name in checks}
    for name, check in checks.items():
        check(heard[name])
    return heard


def test_every_check_is_asked(selection: Selection) -> None:
    """There is no check of memory in transformers that no fault is planted for."""
    assert len(said(GOOD, selection)) == len(checks_of_memory(in_vllm=False)) == 5


def test_good_records_hold(selection: Selection) -> None:
    """Checkpoints that take what their ledgers say pass every check."""
    assert {name: verify.conclude() for name, verify in said(GOOD, selection).items() if verify.conclude()} == {}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_caught(fault: str, selection: Selection) -> None:
    """Every fault of an artifact's memory fails the checks it is meant for, and no others."""
    plant, expected = FAULTS[fault]
    assert not_held(said({**GOOD, "artifact": plant(ARTIFACT)}, selection)) == expected


@pytest.mark.parametrize("fault", ["a tower not loaded", "context not accounted for", "NaN bytes", "no bytes at all"])
def test_fault_of_the_reference_is_caught(fault: str, selection: Selection) -> None:
    """A reference that was measured wrongly fails, too: it is half of every ratio."""
    plant, _ = FAULTS[fault]
    assert not_held(said({**GOOD, "reference": plant(REFERENCE)}, selection))


def test_every_quantity_has_a_fault(selection: Selection) -> None:
    """Every quantity that is judged, of either half, is once all that fails of its check, on some planted fault."""
    heard = [said({**GOOD, name: plant(GOOD[name])}, selection) for plant, _ in FAULTS.values() for name in GOOD]
    assert len(judged_by(heard)) == 2 * (2 + 2 + 6 + 2) + 3
    assert judged_by(heard) - failed_alone(heard) == set()


def test_report_keeps_the_table(selection: Selection) -> None:
    """The memory table has a line for each checkpoint, with numbers for predicted, allocator, reserved and NVML."""
    table, towers = said(GOOD, selection)[REDUCTION].tables
    assert [line[0] for line in table.rows] == ["reference", "artifact"]
    assert table.rows[1][2:7] == (2.831, 2.837, 2.858, 3.55, "-61.4%")
    assert towers.rows[0] == ("reference", "language_model", "16 bits", 7000 * MIB / 1e9)
    assert sum(size for name, _, _, size in towers.rows if name == "artifact") * 1e9 == pytest.approx(2700 * MIB)


def test_out_of_memory_says_what_would_fit() -> None:
    """Memory that ran out is told with the ledger, what was free, and what would fit; never as a traceback."""
    record = replace(ARTIFACT.record, failed="out of memory while loading", free=GIB, others=2 * GIB)
    with pytest.raises(OutOfMemoryError) as error:
        whole(replace(ARTIFACT, record=record), "fits: awq")
    message = str(error.value)
    assert "artifact: out of memory while loading: 1.00 GiB were free of a card (2.00 GiB held by others)" in message
    assert "its weights alone need 2.64 GiB" in message
    assert "language_model    2.831 GB: 16 bits 1.258, codes 1.573" in message
    assert message.splitlines()[-1] == "fits: awq", "the ledger's lines are lines"
    assert whole(ARTIFACT) is ARTIFACT


def test_claims_say_what_they_hold_for() -> None:
    """The published reductions are told beside what the ledger gives for each choice of towers."""
    omni, config = ADAPTERS["qwen2_5_omni"], published_config("qwen2_5_omni-3b")
    pair = SimpleNamespace(
        adapter=omni, scheme=Scheme(), reference=SimpleNamespace(checkpoint=SimpleNamespace(config=config))
    )
    rows = test_memory.claims(pair, 0.52)  # type: ignore[arg-type]
    assert {row[1] for row in rows} == {"all weights", "thinker"}
    assert {row[0] for row in rows} >= {"language_model", "language_model + talker"}
    assert {row[3] for row in rows} == {"-52%"}
