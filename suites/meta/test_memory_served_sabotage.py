"""Every check of memory inside vLLM, on one GPU or several, fails on the fault it exists for, and on no good server."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from fixtures.memory_under_test import Served, budget_share
from fixtures.meters.held import Ledger
from fixtures.meters.memory import GIB, MIB
from fixtures.options import Selection
from fixtures.verifying import Verify
from suites import test_memory
from suites.meta.answering import listener
from suites.meta.memory_records import ARTIFACT, CONTEXT, REFERENCE, checks_of_memory, failed_alone, judged_by, not_held

NAN = math.nan


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


def test_every_check_is_asked(selection: Selection) -> None:
    """There is no check of memory inside vLLM that no fault is planted for."""
    asked = {
        **said_of_servers({"reference": SERVED, "artifact": QUANTIZED}, selection),
        **said_of_each(SPREAD, selection),
    }
    assert len(asked) == len(checks_of_memory(in_vllm=True)) == 4


def test_budgets_grow_with_the_weights() -> None:
    """A server gets a quarter of the card, or what its weights need, but never all of it."""
    assert budget_share(7 * GIB, 140 * GIB) == 0.25
    assert budget_share(16 * GIB, 40 * GIB) == 0.5
    assert budget_share(40 * GIB, 40 * GIB) == 0.9
