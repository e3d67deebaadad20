"""Every check of memory fails on the fault it exists for, and on no good record."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from fixtures.adapters import ADAPTERS
from fixtures.core.pseudo_quantize import Scheme
from fixtures.memory_under_test import Served, budget_share
from fixtures.meters.held import Held, Ledger
from fixtures.meters.memory import GIB, MIB, Measured, OutOfMemoryError, Peak, Reading, Record, whole
from fixtures.options import Selection
from fixtures.subjects.published import published_config
from fixtures.verifying import Verify
from suites import test_memory
from suites.meta.answering import listener

CONTEXT = 620 * MIB
SMALLEST = MIB // 4  # bytes of the smallest codes: a 16-bit copy takes 1 MiB
Fault = Callable[[Measured], Measured]


def ledger(weights: int, codes: int = 0) -> Ledger:
    """Plain weights and codes of so many bytes."""
    held = [Held("model.embed_tokens.weight", "language_model", "16 bits", weights)]
    if codes:
        held += [
            Held("model.layers.0.mlp.up_proj.qweight", "language_model", "codes", codes - SMALLEST),
            Held("model.layers.0.self_attn.k_proj.qweight", "language_model", "codes", SMALLEST),
        ]
    return Ledger(tuple(held), {"language_model": 36864})


def reading(requested: int) -> Reading:
    """A process that asked the allocator for so many bytes, beside its context."""
    allocated = requested + requested // 500
    reserved = allocated + 20 * MIB
    return Reading(allocated, requested, reserved, reserved + CONTEXT + (40 * MIB if requested else 0))


def measured(name: str, of: Ledger) -> Measured:
    """A checkpoint that takes what its ledger says."""
    loaded = reading(of.total)
    above = 100 * MIB
    peak = Peak(loaded.allocated + above, loaded.reserved + above, loaded.card + 2 * above, 90, 16)
    record = Record(
        Reading(0, 0, 2 * MIB, CONTEXT + 2 * MIB), loaded, of.total, {"image": peak}, card_name="a card", free=80 * GIB
    )
    return Measured(name, of, record)


REFERENCE = measured("reference", ledger(7000 * MIB))
ARTIFACT = measured("artifact", ledger(1200 * MIB, 1500 * MIB))
GOOD = {"reference": REFERENCE, "artifact": ARTIFACT}


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


def not_held(heard: Mapping[str, Verify]) -> set[str]:
    """The checks that fail."""
    return {name for name, verify in heard.items() if verify.conclude()}


def judged_by(heard: Iterable[Mapping[str, Verify]]) -> set[str]:
    """All quantities that are held against a bound."""
    return {m.quantity for said in heard for verify in said.values() for m in verify.measurements if m.bound}


def failed_alone(heard: Iterable[Mapping[str, Verify]]) -> set[str]:
    """The quantities that were once all that failed of their check."""
    broken = [[m.quantity for m in v.measurements if m.holds is False] for said in heard for v in said.values()]
    return {quantities[0] for quantities in broken if len(quantities) == 1}


def test_every_check_is_asked(selection: Selection) -> None:
    """There is no check of memory that no fault is planted for."""
    servers = said_of_servers({"reference": SERVED, "artifact": QUANTIZED}, selection)
    asked = {*said(GOOD, selection), *servers, *said_of_each(SPREAD, selection)}
    checks = [name for name in vars(test_memory) if name.startswith("test_")]
    assert len(asked) == len(checks) == 9


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


# -- inside vLLM -------------------------------------------------------------------------------------------------------


def server(name: str, of: Ledger, kv_tokens: int) -> Served:
    """A server that takes what its ledger says, with that many tokens of KV cache."""
    card = of.total + kv_tokens * 36864 + 3 * GIB
    return Served(name, of, (of.total,), kv_tokens, ("marlin",), (card,), card)


SERVED = server("reference", REFERENCE.ledger, 500_000)
GAINED = (REFERENCE.ledger.total - ARTIFACT.ledger.total) // 36864
QUANTIZED = replace(server("artifact", ARTIFACT.ledger, 500_000 + GAINED), budget=SERVED.budget)
IN_VLLM, SERVER, KV = "weights in vLLM", "server", "KV tokens"
SERVED_FAULTS: dict[str, tuple[Callable[[Served], dict[str, Any]], set[str]]] = {
    "16-bit weights kept beside the codes": (
        lambda _: {"weights_by_gpu": (REFERENCE.weights,), "kv_tokens": SERVED.kv_tokens},
        {IN_VLLM, KV},
    ),
    "a layer in 16 bits": (lambda one: {"weights_by_gpu": (one.weights + 300 * MIB,)}, {IN_VLLM}),
    "a tower not loaded": (lambda one: {"weights_by_gpu": (one.weights - 300 * MIB,)}, {IN_VLLM}),
    "memory saved, but not given to the KV cache": (lambda one: {"kv_tokens": one.kv_tokens - GAINED}, {KV, SERVER}),
    "more KV cache than was saved": (lambda one: {"kv_tokens": one.kv_tokens + GAINED}, {KV, SERVER}),
    "NVML without a process of the server's": (lambda _: {"cards": (CONTEXT,)}, {SERVER}),
    "a leak beside the KV cache": (lambda one: {"cards": (one.budget + 8 * GIB,)}, {SERVER}),
    "more taken than the budget": (lambda one: {"budget": one.budget - 2 * GIB}, {SERVER, KV}),
    "no room for what is held": (lambda one: {"cards": (None,), "budget": one.weights}, {SERVER, KV}),
    "held of a budget that is not used": (lambda one: {"cards": (None,), "budget": one.budget + 8 * GIB}, {SERVER, KV}),
    "another budget": (lambda one: {"budget": one.budget + 9 * GIB}, {KV}),
    "nothing said of the weights": (lambda _: {"weights_by_gpu": (0,)}, {IN_VLLM, KV, SERVER}),
    "nothing said of the KV cache": (lambda _: {"kv_tokens": 0}, {KV, SERVER}),
    "NaN": (lambda _: {"weights_by_gpu": (NAN,), "kv_tokens": NAN}, {IN_VLLM, KV, SERVER}),
}


def said_of_servers(served: Mapping[str, Served], selection: Selection) -> dict[str, Verify]:
    """What each check says of two servers."""
    checks = {
        IN_VLLM: test_memory.test_weights_in_vllm,
        SERVER: test_memory.test_memory_of_the_server,
        KV: test_memory.test_kv_tokens,
    }
    heard = {name: listener() for name in checks}
    for name, check in checks.items():
        check(served, selection.limits, heard[name])
    return heard


def test_good_servers_hold(selection: Selection) -> None:
    """Servers that take what their ledgers say pass, whether or not NVML tells of processes."""
    for artifact in (QUANTIZED, replace(QUANTIZED, cards=(None,))):
        assert not_held(said_of_servers({"reference": SERVED, "artifact": artifact}, selection)) == set()


@pytest.mark.parametrize("fault", SERVED_FAULTS)
def test_fault_of_a_server_is_caught(fault: str, selection: Selection) -> None:
    """Every fault of a server's memory fails the checks it is meant for, and no others."""
    changes, expected = SERVED_FAULTS[fault]
    served = {"reference": SERVED, "artifact": replace(QUANTIZED, **changes(QUANTIZED))}
    assert not_held(said_of_servers(served, selection)) == expected


def test_every_quantity_of_a_server_has_a_fault(selection: Selection) -> None:
    """Every quantity that is judged of a server, of either, is once all that fails of its check, on some fault."""
    good = {"reference": SERVED, "artifact": QUANTIZED}
    heard = [
        said_of_servers({**good, name: replace(good[name], **changes(good[name]))}, selection)
        for changes, _ in SERVED_FAULTS.values()
        for name in good
    ]
    assert len(judged_by(heard)) == 2 * (2 + 3) + 3
    assert judged_by(heard) - failed_alone(heard) == set()


# -- over several GPUs -------------------------------------------------------------------------------------------------

EACH = "each GPU"
SPREAD = {
    name: replace(one, weights_by_gpu=2 * one.weights_by_gpu, cards=2 * one.cards)
    for name, one in (("reference", SERVED), ("artifact", QUANTIZED))
}
TELL, OTHER = "GPUs that say what their weights take", "GPUs that hold other weights than predicted"
NOWHERE, APART = "GPUs that hold memory of the server", "the fullest card beyond the emptiest"
SPREAD_FAULTS: dict[str, tuple[Callable[[Served], dict[str, Any]], set[str]]] = {
    "a third GPU": (lambda one: {"weights_by_gpu": 3 * one.weights_by_gpu[:1]}, {TELL}),
    "nothing said of the weights": (lambda _: {"weights_by_gpu": ()}, {TELL, OTHER}),
    "a whole model on one of them": (lambda one: {"weights_by_gpu": (one.weights, 2 * one.weights)}, {OTHER}),
    "a tower that the other lacks": (lambda one: {"weights_by_gpu": (one.weights - 300 * MIB, one.weights)}, {OTHER}),
    "a whole model on the only one that tells": (lambda one: {"weights_by_gpu": (2 * one.weights,)}, {OTHER}),
    "NaN": (lambda one: {"weights_by_gpu": (one.weights, NAN)}, {OTHER}),
    "a ledger of nothing": (lambda _: {"ledger": Ledger((), {"language_model": 36864})}, {OTHER}),
    "a card without a process of the server's": (lambda one: {"cards": (one.card, None)}, {NOWHERE}),
    "a stray context on the second card": (lambda one: {"cards": (one.card, one.card + CONTEXT)}, {APART}),
    "a stray context on the first card": (lambda one: {"cards": (one.card + CONTEXT, one.card)}, {APART}),
}


def said_of_each(served: Mapping[str, Served], selection: Selection) -> dict[str, Verify]:
    """What the check of each GPU says of two servers."""
    verify = listener()
    test_memory.test_share_of_each_gpu(served, replace(selection, tensor_parallel=2), selection.limits, verify)
    return {EACH: verify}


def test_good_shares_hold(selection: Selection) -> None:
    """Two GPUs that hold their shares pass, and have a line each."""
    verify = said_of_each(SPREAD, selection)[EACH]
    assert not verify.conclude()
    (table,) = verify.tables
    assert table.rows == (
        ("reference", 0, 7.34, 7.34, 28.993, 500_000),
        ("reference", 1, 7.34, 7.34, 28.993, 500_000),
        ("artifact", 0, 2.831, 2.831, 28.993, 500_000 + GAINED),
        ("artifact", 1, 2.831, 2.831, 28.993, 500_000 + GAINED),
    )


def test_the_fullest_of_several_gpus_counts() -> None:
    """Of several GPUs a server's weights and its card's bytes are those of the fullest, wherever it stands."""
    for order in (1, -1):
        one = replace(SERVED, weights_by_gpu=(700, 690, 680)[::order], cards=(1340, 1330, None)[::order])
        assert (one.weights, one.card) == (700, 1340)
    assert [row[1] for row in test_memory.shares([SERVED], 3)] == [0, 1, 2]


def test_shares_that_nobody_tells(selection: Selection) -> None:
    """Where the log tells of one GPU alone, or NVML of no process, the report says so, and what is known is judged."""
    silent = {name: replace(one, cards=(None, None), weights_by_gpu=(one.weights,)) for name, one in SPREAD.items()}
    verify = said_of_each(silent, selection)[EACH]
    assert not verify.conclude()
    notes = [m.quantity for m in verify.measurements if not m.bound]
    assert notes == [
        f"{name}: {what}"
        for name in SPREAD
        for what in ("vLLM's log tells of its first GPU alone", "NVML tells nothing of single processes here")
    ]
    assert [m.quantity for m in verify.measurements if m.bound] == [f"{name}: {OTHER}" for name in SPREAD]
    assert verify.tables[0].rows[1] == ("reference", 1, 7.34, None, None, 500_000)


@pytest.mark.parametrize("name", SPREAD)
@pytest.mark.parametrize("fault", SPREAD_FAULTS)
def test_fault_of_one_gpu_is_caught(fault: str, name: str, selection: Selection) -> None:
    """Every fault of one GPU's share fails the quantities that it is meant for, and no others."""
    changes, expected = SPREAD_FAULTS[fault]
    verify = said_of_each({**SPREAD, name: replace(SPREAD[name], **changes(SPREAD[name]))}, selection)[EACH]
    failed = {m.quantity for m in verify.measurements if m.holds is False}
    assert failed == {f"{name}: {quantity}" for quantity in expected}


def test_every_quantity_of_a_gpu_has_a_fault(selection: Selection) -> None:
    """Every quantity that is judged of each GPU, of either server, is once all that fails, on some fault."""
    heard = [
        said_of_each({**SPREAD, name: replace(SPREAD[name], **changes(SPREAD[name]))}, selection)
        for changes, _ in SPREAD_FAULTS.values()
        for name in SPREAD
    ]
    assert judged_by(heard) == {f"{name}: {what}" for name in SPREAD for what in (TELL, OTHER, NOWHERE, APART)}
    assert judged_by(heard) - failed_alone(heard) == set()


def test_budgets_grow_with_the_weights() -> None:
    """A server gets a quarter of the card, or what its weights need, but never all of it."""
    assert budget_share(7 * GIB, 140 * GIB) == 0.25
    assert budget_share(16 * GIB, 40 * GIB) == 0.5
    assert budget_share(40 * GIB, 40 * GIB) == 0.9


# -- claims ------------------------------------------------------------------------------------------------------------


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
