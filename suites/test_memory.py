"""Memory: what a checkpoint takes on a GPU is what its headers say, and quantization really saves it.

Each condition in a process of its own: the CUDA context alone, the model loaded by transformers, and the most that an
answer in each modality takes; then inside vLLM, at the same budget. Bytes of torch's allocator beside NVML's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pytest

from fixtures.adapters import Adapter
from fixtures.audit.pair import Pair
from fixtures.core.limits import Limits
from fixtures.memory_under_test import Served
from fixtures.meters.ledger import predicted
from fixtures.meters.memory import GIB, MIB, Measured, saved
from fixtures.options import Selection
from fixtures.verifying import Verify

pytestmark = [pytest.mark.gpu, pytest.mark.full_size]

GB = 1e9
COLUMNS = ("checkpoint", "in", "predicted GB", "allocator GB", "reserved GB", "NVML GB", "saved", "KV tokens")
SHARES = ("checkpoint", "GPU", "predicted GB", "weights GB", "NVML GB", "KV tokens")
# Published, without saying what was counted: (family, method) -> share of the memory saved.
CLAIMS = {("qwen2_5_vl", "awq"): 0.56, ("qwen2_5_omni", "bitsandbytes"): 0.52}


# -- transformers ------------------------------------------------------------------------------------------------------


def test_predicted_weights(memory: Mapping[str, Measured], limits: Limits, verify: Verify) -> None:
    """The bytes that the headers predict for the weights are those that the allocator hands out."""
    off = limits("memory.predicted_weights")
    for name, one in memory.items():
        ratio = one.weights / one.ledger.total if one.ledger.total else None
        verify(f"{name}: allocator, of predicted weights", ratio, at_most=1 + off, detail=str(one.ledger))
        verify(f"{name}: allocator, at least of predicted weights", ratio, at_least=1 - off)


def test_no_copy_beside_the_codes(memory: Mapping[str, Measured], limits: Limits, verify: Verify) -> None:
    """Loading asks for the weights and nothing else: not even one weight stays in 16 bits beside its codes."""
    limit = limits("memory.unexplained_mib")
    for name, one in memory.items():
        copy = 4 * one.ledger.smallest_coded / MIB
        smallest = f"; a 16-bit copy of the smallest coded weight takes {copy:.3g} MiB" if copy else ""
        beyond = f"{one.beyond_model / MIB:.3g} MiB of it belong to no tensor of the model"
        measured = one.unexplained / MIB if one.weights > 0 and one.record.in_model > 0 else None
        verify(f"{name}: asked for beyond the ledger", measured, "MiB", at_most=limit, detail=beyond + smallest)
        verify(f"{name}: asked for beyond the ledger, at least", measured, "MiB", at_least=-limit)


def test_allocator_within_the_card(memory: Mapping[str, Measured], limits: Limits, verify: Verify) -> None:
    """The allocator's bytes lie within those reserved, those within NVML's; the rest is the CUDA context."""
    for name, one in memory.items():
        context, loaded = one.record.context, one.record.loaded
        kept = loaded.allocated > 0
        unused = (loaded.reserved - loaded.allocated) / MIB if kept else None
        verify(f"{name}: reserved beyond allocated", unused, "MiB", at_least=0)
        verify(f"{name}: CUDA context", context.outside / MIB, "MiB", at_least=limits("memory.smallest_context_mib"))
        verify(f"{name}: CUDA context, at most", context.outside / MIB, "MiB", at_most=limits("memory.context_mib"))
        # NVML - reserved, with the context taken off: libraries and kernels that loading brought in
        rest = (loaded.outside - context.outside) / MIB if loaded.card > 0 else None
        verify(f"{name}: NVML beyond reserved and context", rest, "MiB", at_most=limits("memory.unaccounted_mib"))
        verify(f"{name}: NVML beyond reserved and context, at least", rest, "MiB", at_least=-limits("memory.grain_mib"))
        _note_the_card(name, one, limits, verify)


def test_reduction(
    memory: Mapping[str, Measured], pair: Pair, adapter: Adapter, limits: Limits, verify: Verify
) -> None:
    """Quantization saves the share of the weights' bytes that the ledger predicts."""
    reference, artifact = memory["reference"], memory["artifact"]
    ledger, measured = saved(reference, artifact)
    verify("share of the weights saved", measured, at_least=limits("memory.reduction"))
    verify("reduction off the predicted", abs(measured - ledger), at_most=limits("memory.reduction_off"))
    verify.table("Memory in transformers", COLUMNS, [row(reference), row(artifact, measured)])
    verify.table("Memory by tower", ("checkpoint", "tower", "kind", "GB"), [*by_tower(reference), *by_tower(artifact)])
    claim = CLAIMS.get((adapter.family, pair.layout.method))
    if claim is not None:
        verify.note("published claim", claim)
        verify.table("Claim, by what is quantized", ("quantized", "counted", "saved", "claim"), claims(pair, claim))


def test_peak(memory: Mapping[str, Measured], modality: str, limits: Limits, verify: Verify) -> None:
    """Answering in each modality, the artifact's peak is lower by most of what its weights save."""
    reference, artifact = memory["reference"], memory["artifact"]
    peaks = [one.record.peaks.get(modality) for one in (reference, artifact)]
    before, after = peaks
    weights = reference.weights - artifact.weights
    gain = (before.allocated - after.allocated) / weights if before and after and weights > 0 else None
    verify(f"peak {modality}: lower by, of the weights saved", gain, at_least=limits("memory.peak_gain"))
    for name, one, peak in zip(memory, (reference, artifact), peaks, strict=True):
        above = (peak.allocated - one.record.loaded.allocated) / MIB if peak else None
        verify(f"{name}: peak {modality} above the weights", above, "MiB", at_least=0)
        verify(f"{name}: tokens answered to {modality}", peak and peak.new_tokens, at_least=1)
        if peak:
            tokens = f"{peak.prompt_tokens} tokens of prompt, {peak.new_tokens} new"
            verify.note(f"{name}: peak {modality}", peak.allocated / GIB, "GiB", detail=tokens)
            verify.note(f"{name}: NVML after {modality}", peak.card / GIB, "GiB")


# -- inside vLLM -------------------------------------------------------------------------------------------------------


def test_weights_in_vllm(served: Mapping[str, Served], limits: Limits, verify: Verify) -> None:
    """What vLLM says its weights take is what the headers predict of what it loads."""
    off = limits("memory.weights_in_vllm")
    for name, one in served.items():
        ratio = one.weights / one.ledger.total if one.ledger.total else None
        kernels = f"kernels {', '.join(one.kernels) or 'unknown'}\n{one.ledger}"
        verify(f"{name}: vLLM's weights, of predicted", ratio, at_most=1 + off, detail=kernels)
        verify(f"{name}: vLLM's weights, at least of predicted", ratio, at_least=1 - off)


def test_memory_of_the_server(served: Mapping[str, Served], limits: Limits, verify: Verify) -> None:
    """A server holds its weights and its KV cache, and little beyond its budget."""
    for name, one in served.items():
        known = one.weights + one.kv_tokens * one.kv_per_token
        if one.card is None:
            verify.note(f"{name}: NVML tells nothing of single processes here", None)
        rest = (one.card if one.card is not None else one.budget) - known if one.kv_tokens and one.weights else None
        beside = None if rest is None else rest / GIB
        verify(f"{name}: beside weights and KV cache", beside, "GiB", at_least=0)
        verify(f"{name}: beside weights and KV cache, at most", beside, "GiB", at_most=limits("memory.beside_kv_gib"))
        if one.card is not None:
            over = (one.card - one.budget) / GIB
            verify(f"{name}: beyond its budget", over, "GiB", at_most=limits("memory.over_budget_gib"))


def test_kv_tokens(served: Mapping[str, Served], limits: Limits, verify: Verify) -> None:
    """At the same budget, the bytes that quantization saves become KV cache."""
    reference, artifact = served["reference"], served["artifact"]
    saved_bytes = reference.weights - artifact.weights
    gained = artifact.kv_tokens - reference.kv_tokens
    known = saved_bytes > 0 and reference.kv_tokens > 0
    share = gained * artifact.kv_per_token / saved_bytes if known else None
    off = limits("memory.kv_tokens_off")
    detail = f"{reference.kv_tokens} tokens before, {artifact.kv_tokens} after; {artifact.kv_per_token} bytes each"
    verify("KV cache gained, of the bytes saved", share, at_least=1 - off, detail=detail)
    verify("KV cache gained, at most of the bytes saved", share, at_most=1 + off)
    verify("budgets that differ", abs(reference.budget - artifact.budget), "bytes", equal_to=0)
    verify.note("KV tokens gained", gained, detail=f"budget {reference.budget / GIB:.1f} GiB")
    part = saved_bytes / reference.weights if reference.weights else None
    verify.table("Memory inside vLLM", COLUMNS, [served_row(reference), served_row(artifact, part)])


@pytest.mark.several_gpus
def test_share_of_each_gpu(served: Mapping[str, Served], selection: Selection, limits: Limits, verify: Verify) -> None:
    """Over several GPUs each holds the share of the weights that is predicted, and no card more than another."""
    off, gpus = limits("memory.weights_in_vllm"), selection.tensor_parallel
    for name, one in served.items():
        weights, cards = one.weights_by_gpu, [card for card in one.cards if card is not None]
        if len(weights) == 1:
            verify.note(f"{name}: vLLM's log tells of its first GPU alone", None)
        else:
            verify(f"{name}: GPUs that say what their weights take", len(weights), equal_to=gpus)
        verify.none_of(
            f"{name}: GPUs that hold other weights than predicted",
            [
                f"GPU {gpu}: {size / GB:.3f} GB, predicted {one.ledger.total / GB:.3f}"
                for gpu, size in enumerate(weights)
                if not one.ledger.total or not abs(size / one.ledger.total - 1) <= off
            ],
            among=len(weights),
        )
        if not cards:
            verify.note(f"{name}: NVML tells nothing of single processes here", None)
            continue
        verify(f"{name}: GPUs that hold memory of the server", len(cards), equal_to=gpus)
        apart = (max(cards) - min(cards)) / MIB
        most = limits("memory.cards_apart_mib")
        verify(f"{name}: the fullest card beyond the emptiest", apart, "MiB", at_most=most)
    verify.table("Memory of each GPU inside vLLM", SHARES, shares(served.values(), gpus))


# -- words -------------------------------------------------------------------------------------------------------------


def _note_the_card(name: str, one: Measured, limits: Limits, verify: Verify) -> None:
    """Who else was on the card. Where NVML tells of no single process, others' bytes would be taken for ours."""
    record = one.record
    verify.note(f"{name}: held by others", record.others / MIB, "MiB", detail=f"measured by {record.source}")
    moved = abs(record.drift) / MIB
    if record.per_process:
        verify.note(f"{name}: others' change meanwhile", moved, "MiB")
    else:
        verify(f"{name}: others' change meanwhile", moved, "MiB", at_most=limits("memory.drift_mib"))


def row(one: Measured, share: float | None = None) -> tuple[str | float | None, ...]:
    """A line of the memory table: a checkpoint in transformers, loaded."""
    loaded = one.record.loaded
    bytes_ = (one.ledger.total, one.weights, loaded.reserved, loaded.card)
    return (one.name, "transformers", *(round(size / GB, 3) for size in bytes_), _percent(share), None)


def by_tower(one: Measured) -> list[tuple[str, str, str, float]]:
    """What the ledger predicts of a checkpoint, by tower and kind: 16 bits, codes, scales, ..."""
    towers = one.ledger.by_tower()
    return [(one.name, tower, kind, size / GB) for tower, kinds in towers.items() for kind, size in kinds.items()]


def served_row(one: Served, share: float | None = None) -> tuple[str | float | None, ...]:
    """A line of the memory table: a checkpoint inside vLLM; its budget is all reserved."""
    card = None if one.card is None else round(one.card / GB, 3)
    sizes = (round(one.ledger.total / GB, 3), round(one.weights / GB, 3), round(one.budget / GB, 3), card)
    return (one.name, f"vLLM ({', '.join(one.kernels) or '?'})", *sizes, _percent(share), one.kv_tokens)


def shares(served: Iterable[Served], gpus: int) -> list[tuple[str | float | None, ...]]:
    """A line for every GPU of every server; what nobody tells is left open."""

    def of(values: Sequence[int | None], gpu: int) -> float | None:
        size = values[gpu] if gpu < len(values) else None
        return None if size is None else round(size / GB, 3)

    return [
        (one.name, gpu, round(one.ledger.total / GB, 3), of(one.weights_by_gpu, gpu), of(one.cards, gpu), one.kv_tokens)
        for one in served
        for gpu in range(gpus)
    ]


def claims(pair: Pair, claim: float) -> list[tuple[str, str, str, str]]:
    """What the ledger says is saved when ever more towers are quantized, of ever more that is counted."""
    adapter, config = pair.adapter, pair.reference.checkpoint.config
    decoders = adapter.quantizable(config)
    senses = tuple(tower for tower in ("visual", "audio_tower") if tower in adapter.towers.values())
    quantized = dict.fromkeys([("language_model",), decoders, ("language_model", *senses), (*decoders, *senses)])
    rows = []
    for towers in quantized:
        found = predicted(adapter, config, pair.scheme, towers)
        for counted in dict.fromkeys(["all weights", "thinker" if adapter.speaks else "all weights"]):
            kept = [one for one in found if counted != "thinker" or one.tower not in ("talker", "token2wav")]
            share = 1 - sum(one.after for one in kept) / sum(one.before for one in kept)
            rows.append((" + ".join(towers), counted, _percent(share) or "", f"-{claim:.0%}"))
    return rows


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{-share:+.1%}"
