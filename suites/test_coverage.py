"""Coverage: every linear is accounted for, every other tensor and every setting is the reference's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from torch import Tensor

from fixtures.audit import engines_view
from fixtures.audit.comparing import TensorChange
from fixtures.audit.coverage import LinearState, folded_norms, sizes, tower_shares, unaccounted
from fixtures.audit.pair import Pair
from fixtures.audit.settings import differing_settings
from fixtures.audit.splitting import widest_split
from fixtures.core.limits import Limits
from fixtures.core.targets import Target
from fixtures.options import Selection, traits
from fixtures.verifying import Verify


def test_every_linear(linears: Sequence[LinearState], pair: Pair, verify: Verify) -> None:
    """Every linear of the architecture is either quantized, or kept for a reason, and never both or neither."""
    verify.none_of(
        "linears neither quantized nor kept for a reason",
        (f"{state.linear.name}: {state.fault}" for state in linears if state.fault),
        among=len(linears),
    )
    quantized = [state for state in linears if state.state == "quantized"]
    verify("quantized linears", len(quantized), f"of {len(linears)}", at_least=1)
    columns = (
        "tower",
        "linears",
        "quantized",
        "parameters",
        "quantized share",
        "bytes before",
        "bytes after",
        "scheme",
    )
    verify.table(
        "Towers",
        columns,
        (
            (
                s.tower,
                s.linears,
                s.quantized,
                s.parameters,
                s.quantized_parameters / s.parameters,
                s.bytes_reference,
                s.bytes_artifact,
                str(pair.scheme) if s.quantized else "kept",
            )
            for s in tower_shares(pair, linears)
        ),
    )
    verify.table(
        "Kept linears",
        ("linear", "inputs", "outputs", "why"),
        ((s.linear.name, s.linear.in_features, s.linear.out_features, s.reason) for s in linears if s.reason),
    )


def test_every_tensor(pair: Pair, tensor_changes: Sequence[TensorChange], verify: Verify) -> None:
    """Every tensor that is not quantized is the reference's, bit for bit; none is lost, none is added."""
    lost, strange = unaccounted(pair)
    count = len(pair.reference.stored)
    verify.none_of("tensors lost", lost, among=count)
    verify.none_of("tensors that belong to nothing", strange, among=len(pair.artifact.stored))
    verify.none_of(
        "tensors changed",
        (f"{t.name}: {t.elements} elements differ, {t.what}" for t in tensor_changes),
        among=count,
    )


def test_size(linears: Sequence[LinearState], pair: Pair, limits: Limits, verify: Verify) -> None:
    """An artifact is as small as its recipe promises: kept tensors as large as before, codes as the ledger counts."""
    stored, promised = sizes(pair)
    before = sum(pair.reference.info(name).bytes for name in pair.reference)
    verify(
        "bytes, of those promised",
        stored / promised if promised else None,
        at_most=limits("coverage.size"),
        detail=f"{stored} bytes stored, {promised} promised",
    )
    verify.note("bytes saved, of the reference's", 1 - stored / before if before else None)


@pytest.mark.folding
def test_folded_norms(
    pair: Pair, recorded_scales: Mapping[str, Tensor], target: Target, limits: Limits, verify: Verify
) -> None:
    """A norm in front of quantized linears is the reference's, divided by scales that are positive and as recorded."""
    norms = list(folded_norms(pair, recorded_scales))
    broken = [f"{norm.name}: {norm.broken} channels" for norm in norms if norm.broken]
    verify.none_of("norms that no positive scales explain", broken, among=len(norms))
    if not recorded_scales and "recorded" not in traits(target):
        return  # somebody else's, or nothing was folded: the round trip judges what the norms say
    most = max(norms, key=lambda norm: (norm.off_record != norm.off_record, norm.off_record), default=None)
    verify(
        "norm over reference, off the recorded scales",
        most and most.off_record,
        "relative",
        at_most=limits("coverage.off_record"),
        detail=most.name if most else "",
    )


def test_ties(pair: Pair, verify: Verify) -> None:
    """The head is tied to the embedding exactly where the reference's is."""
    tied = [pair.adapter.head_is_tied(c.config) for c in (pair.reference.checkpoint, pair.artifact.checkpoint)]
    verify("head tied to the embedding", tied[1], equal_to=tied[0], detail="1 is tied, 0 is not")
    if not tied[0]:
        verify("heads of its own", f"{pair.adapter.head}.weight" in pair.artifact, equal_to=1)


def test_skip_list_in_transformers(pair: Pair, verify: Verify) -> None:
    """Transformers makes quantized modules of exactly the linears that the artifact stores as codes."""
    wrong = engines_view.misjudged(pair, engines_view.transformers_converts(pair, engines_view.skip_list(pair)))
    verify.none_of("linears that transformers misjudges", wrong, among=len(pair.linears), advice=advice(pair))


def test_skip_list_in_vllm(pair: Pair, verify: Verify) -> None:
    """VLLM makes quantized modules of exactly those linears that the artifact stores as codes, and that it loads."""
    converts = engines_view.vllm_converts(pair, engines_view.skip_list(pair))
    wrong = engines_view.misjudged(pair, converts, engines_view.unserved(pair))
    verify.none_of("linears that vLLM misjudges", wrong, among=len(pair.linears), advice=advice(pair))


def test_splits_over_gpus(pair: Pair, selection: Selection, verify: Verify) -> None:
    """The quantized linears split over as many GPUs as are asked for (--tensor-parallel), groups and words whole."""
    most, why = widest_split(pair)
    verify("GPUs that the quantized linears split over", most, at_least=selection.tensor_parallel, detail=why)


def test_settings(pair: Pair, verify: Verify) -> None:
    """Config, tokenizer, processor, chat template and generation settings say what the reference's say."""
    for kind, differences in differing_settings(pair).items():
        verify.none_of(f"{kind}: settings that differ", differences, among=1)


def advice(pair: Pair) -> str:
    """What to do about a skip list that is read wrongly."""
    have = engines_view.skip_list(pair)
    good = list(pair.adapter.skip_list(pair.reference.checkpoint.config, pair.towers))
    name = "llm_int8_skip_modules" if pair.layout.method == "bitsandbytes" else "modules_to_not_convert"
    return f"{name} is {have}; set it to {good}, which both engines read rightly"
