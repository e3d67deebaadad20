"""The engine is the same on a GPU: the same choices in float32, nearly the same in 16 bits, artifacts that hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from fixtures.adapters import ADAPTERS
from fixtures.adapters.view import HubView
from fixtures.audit import fused, fused_check
from fixtures.audit.coverage import changed_tensors
from fixtures.audit.pair import Pair
from fixtures.audit.roundtrip import audit_linears
from fixtures.audit.streaming import Stream
from fixtures.bench.inputs import texts_of
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.pseudo_quantize import Scheme
from fixtures.core.recipe import Recipe
from fixtures.engines.loading import load_model, load_processor
from fixtures.options import Selection
from fixtures.quantizers import Job, calibration, quantize, recipe_for
from fixtures.quantizers.activation_aware import engine, load_outline, quantize_layers
from fixtures.quantizers.activation_aware.pausing import Pausing, in_turn
from fixtures.quantizers.activation_aware.scaling import Scaling
from fixtures.quantizers.cache import cached_artifact
from fixtures.subjects.full_size import full_size
from suites.meta import plain_awq

pytestmark = pytest.mark.gpu
VL = ADAPTERS["qwen2_5_vl"]
Losses = list[tuple[float | None, float]]


def searched(reference: Checkpoint, dtype: torch.dtype, device: str) -> Losses:
    """(exponent, loss) of every scaling group, searched on a device."""
    samples = calibration.built_in(VL, per_modality=8)
    model = load_model(reference, VL, dtype, device)
    job = Job(HubView(reference, VL), Recipe("awq"), samples, device)
    (decoder,) = VL.decoders(reference.config)
    feeds = calibration.feeds(VL, model, load_processor(reference), decoder, samples, device)
    layers = quantize_layers(model, job.reference, decoder, job.to_quantize, Scheme(), feeds)
    return [(g["exponent"], g["loss"]) for layer in layers for g in layer.record["scaling"].values()]


def test_same_search_in_float32(tiny_reference: Checkpoint) -> None:
    """In float32 the search on a GPU finds the CPU's exponents and losses."""
    on_cpu, on_gpu = (searched(tiny_reference, torch.float32, device) for device in ("cpu", "cuda"))
    assert [exponent for exponent, _ in on_gpu] == [exponent for exponent, _ in on_cpu]
    assert [loss for _, loss in on_gpu] == pytest.approx([loss for _, loss in on_cpu], rel=1e-2)


def test_search_in_bfloat16(tiny_reference: Checkpoint) -> None:
    """In bfloat16 the search's losses stay within a fifth of float32's."""
    exact, rounded = (searched(tiny_reference, dtype, "cuda") for dtype in (torch.float32, torch.bfloat16))
    assert [loss for _, loss in rounded] == pytest.approx([loss for _, loss in exact], rel=0.2)


def test_fetched_layers_are_the_loaded_ones(tiny_reference: Checkpoint) -> None:
    """Layers copied on a stream of their own while others are searched give the artifact of a model loaded whole."""
    samples = calibration.built_in(VL, per_modality=8)
    reference = HubView(tiny_reference, VL)
    to_quantize = Job(reference, Recipe("awq"), samples, "cuda").to_quantize
    (decoder,) = VL.decoders(tiny_reference.config)
    found = []
    for model in (
        load_model(tiny_reference, VL, torch.float32, "cuda"),
        load_outline(reference, torch.float32, "cuda"),
    ):
        feeds = calibration.feeds(VL, model, load_processor(tiny_reference), decoder, samples, "cuda")
        found.append(list(quantize_layers(model, reference, decoder, to_quantize, Scheme(), feeds)))
    for loaded, fetched in zip(*found, strict=True):
        for name, quantized in loaded.quantized.items():
            assert torch.equal(quantized.codes, fetched.quantized[name].codes), name


@pytest.mark.full_size
def test_losses_at_full_width(selection: Selection, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16, at VL-3B's width, no group's race ends at scales that err 0.1 % more than the best of all."""
    reference = HubView(Checkpoint(full_size("qwen2_5_vl-3b-2-layers", selection.cache)), VL)
    processor = load_processor(reference.checkpoint)
    samples = texts_of(VL, processor, 128, 512)
    to_quantize = Job(reference, Recipe("awq"), samples, "cuda").to_quantize
    (decoder,) = VL.decoders(reference.checkpoint.config)
    raced: list[Mapping[str, Scaling]] = []  # by layer; what is written may be a runner-up, as settling sees fit

    def listening(searches: Mapping[str, Pausing[Scaling]]) -> Mapping[str, Scaling]:
        raced.append(in_turn(searches))
        return dict(raced[-1])

    monkeypatch.setattr(engine, "in_turn", listening)
    whole = load_model(reference.checkpoint, VL, torch.float16, "cuda")
    feeds = calibration.feeds(VL, whole, processor, decoder, samples, "cuda")
    with torch.device("cuda"):  # the oracle knows no devices
        plain = list(plain_awq.quantize_layers(whole, reference, decoder, to_quantize, Scheme(), feeds))
    outline = load_outline(reference, torch.float16, "cuda")
    feeds = calibration.feeds(VL, outline, processor, decoder, samples, "cuda")
    assert len(list(quantize_layers(outline, reference, decoder, to_quantize, Scheme(), feeds))) == len(plain) == 2

    behind = {}
    for layer, found in zip(plain, raced, strict=True):
        for name, group in layer.record["scaling"].items():
            losses = group["losses"]  # of no scaling, then of every exponent
            exponent = found[name].exponent
            own = losses[0 if exponent is None else 1 + plain_awq.EXPONENTS.index(exponent)]
            assert found[name].loss == pytest.approx(own, rel=0.05)
            behind[layer.record["layer"], name] = own / min(losses) - 1
    assert len(behind) == 6
    assert max(behind.values()) <= 1e-3, behind


def test_artifact_holds(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """An artifact quantized on a GPU is within theory's bound, as one quantized on a CPU is."""
    samples = calibration.built_in(VL, per_modality=8)
    quantize(tiny_reference, Recipe("awq"), samples, tmp_path / "artifact", device="cuda")
    errors = list(audit_linears(Pair(tiny_reference, Checkpoint(tmp_path / "artifact"))))
    assert len(errors) == 28
    assert max(error.largest_error for error in errors) <= 1.001


@pytest.mark.parametrize("kind", ["rtn", "bnb-nf4", "bnb-nf4-dq", "bnb-int8"])
def test_audit_says_the_same(kind: str, tiny_reference: Checkpoint, selection: Selection) -> None:
    """Round trip and coverage say on a GPU what they say on a CPU: counts alike, the rest to float32's precision."""
    if kind != "rtn":
        pytest.importorskip("bitsandbytes", reason='bitsandbytes is absent: pip install "quantproof[bnb]"')
    artifact = cached_artifact(tiny_reference, recipe_for(kind, None), (), selection.cache)
    pair = Pair(tiny_reference, Checkpoint(artifact))
    on_cpu, on_gpu = (list(audit_linears(pair, stream=Stream(device))) for device in ("cpu", "cuda"))
    for one, other in zip(on_cpu, on_gpu, strict=True):
        wanted, found = asdict(one), asdict(other)
        assert wanted.pop("place") == found.pop("place")
        assert found == pytest.approx(wanted, rel=1e-5)
    assert [list(changed_tensors(pair, stream=Stream(device))) for device in ("cpu", "cuda")] == [[], []]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", fused.SIZES)
def test_audit_kernels_are_the_definition(size: int, dtype: torch.dtype) -> None:
    """The audit's kernels, compiled, say what the definition says on a CPU, and are trusted for it."""
    device = torch.device("cuda", torch.cuda.current_device())
    assert fused_check.disagreement(device, size, size, dtype) == ""
    assert fused.works(device)


def test_audit_of_folded_scales_says_the_same(tiny_reference: Checkpoint, good_artifact: Path) -> None:
    """Of an artifact with folded scales, extremes and counts are the CPU's bit for bit."""
    pair = Pair(tiny_reference, Checkpoint(good_artifact))
    for one, other in zip(audit_linears(pair), audit_linears(pair, stream=Stream("cuda")), strict=True):
        wanted, found = asdict(one), asdict(other)
        assert [found.pop(sum_) for sum_ in ("frobenius", "frobenius_expected")] == pytest.approx(
            [wanted.pop(sum_) for sum_ in ("frobenius", "frobenius_expected")], rel=1e-6
        )
        assert found == wanted
