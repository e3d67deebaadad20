"""Records of memory as good checkpoints leave them, and what is heard of checks on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import signature

from fixtures.meters.held import Held, Ledger
from fixtures.meters.memory import GIB, MIB, Measured, Peak, Reading, Record
from fixtures.verifying import Verify
from suites import test_memory

CONTEXT = 620 * MIB
SMALLEST = MIB // 4  # bytes of the smallest codes: a 16-bit copy takes 1 MiB


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


def checks_of_memory(*, in_vllm: bool) -> list[str]:
    """The checks of memory that look at servers, or those that do not."""
    functions = {name: check for name, check in vars(test_memory).items() if name.startswith("test_")}
    return [name for name, check in functions.items() if ("served" in signature(check).parameters) == in_vllm]


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
