"""Our AWQ engine: folding changes nothing, the search never does worse than rounding, nothing leaks between samples."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fixtures.adapters import ADAPTERS
from fixtures.adapters.view import HubView
from fixtures.audit.pair import Pair
from fixtures.audit.roundtrip import audit_linears
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.pseudo_quantize import Scheme, pseudo_quantize_tensor
from fixtures.core.recipe import Recipe
from fixtures.engines.loading import load_model, load_processor
from fixtures.faults.editing import copied
from fixtures.quantizers import Job, calibration, quantize
from fixtures.quantizers.activation_aware import clipping, scaling
from fixtures.quantizers.activation_aware.capture import decoder_calls, layer_features
from fixtures.quantizers.activation_aware.engine import fold, quantize_layers
from fixtures.subjects.samples import draw

VL = ADAPTERS["qwen2_5_vl"]
SCHEME = Scheme(4, 128)


@pytest.fixture(scope="module")
def model(tiny_reference: Checkpoint) -> nn.Module:
    """The shipped reference in float32; tests put back what they change."""
    return load_model(tiny_reference, VL, torch.float32)


@pytest.fixture(scope="module")
def batches(tiny_reference: Checkpoint) -> list[dict[str, torch.Tensor]]:
    """A few calibration samples of every modality and several lengths."""
    return calibration.batches(VL, load_processor(tiny_reference), calibration.built_in(VL, per_modality=6))


@torch.no_grad()
def test_folding_keeps_the_function(
    model: nn.Module, batches: list[dict[str, torch.Tensor]], tiny_reference: Any
) -> None:
    """Folding scales in every group of every layer leaves the logits as they were."""
    before = [model(**batch).logits for batch in batches]
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    (decoder,) = VL.decoders(tiny_reference.config)
    groups = decoder.groups
    try:
        for layer in decoder.modules(model):
            tensors = dict(layer.state_dict())
            widths = {group: tensors[f"{group.linears[0]}.weight"].shape[1] for group in groups}
            scales = {group: torch.rand(width, generator=generator) * 4 + 0.25 for group, width in widths.items()}
            layer.load_state_dict(fold(tensors, scales))
        after = [model(**batch).logits for batch in batches]
    finally:
        model.load_state_dict(kept)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_folding_one_side_only_is_noticed(
    model: nn.Module, batches: list[dict[str, torch.Tensor]], tiny_reference: Any
) -> None:
    """The comparison above can fail: scales in the linears alone change the logits."""
    (decoder,) = VL.decoders(tiny_reference.config)
    layer, group = decoder.modules(model)[0], decoder.groups[0]
    weight = layer.get_submodule(group.linears[2]).weight
    with torch.no_grad():
        before = model(**batches[0]).logits
        own = weight.data.clone()
        weight.data = own * 2
        after = model(**batches[0]).logits
        weight.data = own
    assert not torch.allclose(before, after, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def quantized(model: nn.Module, batches: list[dict[str, torch.Tensor]], tiny_reference: Checkpoint) -> list[Any]:
    """All decoder layers, by our engine."""
    job = Job(HubView(tiny_reference, VL), Recipe("awq", SCHEME), ())
    (decoder,) = VL.decoders(tiny_reference.config)
    feeds = [partial(model, **batch) for batch in batches]
    return list(quantize_layers(model, job.reference, decoder, job.to_quantize, SCHEME, feeds))


def test_search_never_loses_to_rtn(quantized: list[Any], model: nn.Module) -> None:
    """In every scaling group the loss found is at most plain rounding's; somewhere it is far below."""
    found = [group for layer in quantized for group in layer.record["scaling"].values()]
    assert len(found) == 3 * 4
    assert all(group["loss"] <= group["loss rtn"] for group in found)
    assert min(group["loss"] / group["loss rtn"] for group in found) < 0.5, "the outliers were not found"


def test_settling_never_loses_to_what_awq_writes(quantized: list[Any]) -> None:
    """In every group what is written errs no more than the best scales with AWQ's clipping; in attention far less."""
    found = {
        (layer.record["layer"], name): group["loss"] / group["loss usual"]
        for layer in quantized
        for name, group in layer.record["settling"].items()
    }
    assert len(found) == 3 * 4
    assert max(found.values()) <= 1
    assert min(ratio for (_, name), ratio in found.items() if name == "qkv") < 0.9


def test_recorded_loss_is_the_real_one(
    quantized: list[Any], model: nn.Module, batches: list[dict[str, torch.Tensor]]
) -> None:
    """The loss that the search records is what a second, plain computation of it gives."""
    layer = model.get_submodule("model.language_model.layers.0")
    calls = decoder_calls(layer, [partial(model, **batch) for batch in batches])
    heard = layer_features(layer, calls, {"mlp"}).calls["mlp"]
    scales = quantized[0].scales["model.layers.0.gate_up"]
    gate, up, down = (layer.get_submodule(f"mlp.{name}_proj").weight.data for name in ("gate", "up", "down"))
    rounded = [
        pseudo_quantize_tensor(w * scales, SCHEME, scale_dtype=torch.float16).weight / scales for w in (gate, up)
    ]
    total, count = 0.0, 0
    for call in heard:
        x = call.hidden.double()

        def mlp(g: torch.Tensor, u: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
            return (nn.functional.silu(x @ g.double().t()) * (x @ u.double().t())) @ down.double().t()

        error = mlp(*rounded) - mlp(gate, up)
        total, count = total + float(error.square().sum()), count + error.numel()
    assert quantized[0].record["scaling"]["gate_up"]["loss"] == pytest.approx(total / count, rel=1e-3)


def test_model_comes_out_as_it_went_in(
    quantized: list[Any], model: nn.Module, tiny_reference: Checkpoint, batches: list[dict[str, torch.Tensor]]
) -> None:
    """Quantizing changes nothing in the model it looks at."""
    fresh = load_model(tiny_reference, VL, torch.float32).state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in model.state_dict().items())


def test_one_sample_does_not_leak_into_the_next(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> None:
    """What the decoder reads of a batch is the same whether other batches came before or not."""
    first = model.get_submodule("model.language_model.layers.0")
    together = decoder_calls(first, [partial(model, **batch) for batch in batches])
    for number in (0, len(batches) // 2, len(batches) - 1):
        (alone,) = decoder_calls(first, [partial(model, **batches[number])])
        torch.testing.assert_close(alone.run(first), together[number].run(first), rtol=0, atol=0)
    assert len({call.hidden.shape[1] for call in together}) > 1, (
        "all samples had one length: nothing was put to the test"
    )


def test_foldable_scales_are_exact() -> None:
    """A norm divided by foldable scales, rounded to 16 bits and multiplied back is the norm, exactly."""
    generator = torch.Generator().manual_seed(1)
    norm = (torch.rand(4096, generator=generator) * 2 + 0.1).to(torch.bfloat16)
    wanted = torch.rand(4096, generator=generator) * 4 + 0.1
    scales = scaling.foldable(wanted, norm)
    stored = (norm.float() / scales).to(torch.bfloat16)
    assert torch.equal((stored.float() * scales).to(torch.bfloat16), norm)
    assert float(((stored.float() * scales - norm.float()) / norm.float()).abs().max()) < 1e-6
    assert float((scales / wanted - 1).abs().max()) < 2**-8, "moved by more than the norm's own rounding"


def test_norm_of_zero_passes_no_scale() -> None:
    """A channel whose norm weight is 0 keeps a scale of 1: dividing it would say nothing."""
    scales = scaling.foldable(torch.tensor([3.0, 3.0]), torch.tensor([0.0, 1.0]))
    assert scales.tolist() == [1.0, 3.0]


def test_gram_loss_is_the_output_error() -> None:
    """The clip search's loss through second moments equals the error of each group's output, computed plainly."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(8, 256, generator=generator)
    inputs = torch.randn(50, 256, generator=generator) * torch.linspace(0.1, 5, 256)
    found = clipping.search(weight, clipping.group_grams(inputs, 128), SCHEME)
    rounded = pseudo_quantize_tensor(weight, SCHEME, limit=found.limit, scale_dtype=torch.float16).weight
    error = (rounded - weight).reshape(8, 2, 128)
    plain = torch.einsum("ogi,tgi->otg", error, inputs.reshape(50, 2, 128)).square().mean(1).sum() / 8
    assert found.loss == pytest.approx(float(plain), rel=1e-4)
    assert found.loss < found.loss_unclipped


def test_clip_search_keeps_what_matters() -> None:
    """An outlier that the inputs excite is kept, the same outlier behind silent inputs is clipped."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, 128, generator=generator) * 0.1
    weight[:, 5] = 2.0
    loud, quiet = (torch.randn(200, 128, generator=generator) for _ in range(2))
    loud[:, 5] *= 20
    quiet[:, 5] *= 1e-3
    kept, cut = (clipping.search(weight, clipping.group_grams(x, 128), SCHEME) for x in (loud, quiet))
    assert float(kept.limit.min()) >= 2.0 * (1 - 1 / 20) - 1e-6
    assert float(cut.limit.max()) == pytest.approx(2.0 * (0.5 + 1 / 20), rel=1e-5)


def test_calibration_reads_every_modality(tiny_reference: Checkpoint) -> None:
    """The built-in calibration set holds text, images and videos, and none is padded."""
    batches = calibration.batches(VL, load_processor(tiny_reference), calibration.built_in(VL, per_modality=4))
    assert {"pixel_values", "pixel_values_videos"} <= {name for batch in batches for name in batch}
    assert any("pixel_values" not in batch and "pixel_values_videos" not in batch for batch in batches)
    assert all(bool((batch["attention_mask"] == 1).all()) for batch in batches)


def test_splits_differ() -> None:
    """Calibration and evaluation samples are never the same."""
    for modality in VL.modalities:
        seen = {calibration.digest([s]) for s in draw(modality, "calibration", 32)}
        assert not seen & {calibration.digest([s]) for s in draw(modality, "evaluation", 64)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("quantizer", ["rtn", "awq"])
def test_references_of_other_dtypes(
    quantizer: str, dtype: torch.dtype, tiny_reference: Checkpoint, tmp_path: Path
) -> None:
    """A reference in float16 or float32 is quantized as one in bfloat16 is: within theory's bound, dtypes kept."""
    mine = copied(tiny_reference.path, tmp_path / "mine")
    for shard in mine.glob("*.safetensors"):
        save_file({name: t.to(dtype) for name, t in load_file(shard).items()}, shard, metadata={"format": "pt"})
    reference = Checkpoint(mine)
    samples = calibration.built_in(VL, per_modality=4) if quantizer == "awq" else []
    quantize(reference, Recipe(quantizer), samples, tmp_path / "artifact")
    artifact = Checkpoint(tmp_path / "artifact")
    errors = list(audit_linears(Pair(reference, artifact)))
    assert len(errors) == 28
    assert max(error.largest_error for error in errors) <= 1.001
    kept = [name for name in artifact.tensors if name in reference.tensors]
    assert {artifact.tensors[name].torch_dtype for name in kept} == {dtype}


def test_kept_tensors_keep_their_dtype(good_artifact: Path, tiny_reference: Checkpoint) -> None:
    """Norms that scales were folded into, and all else that is kept, stay in the reference's dtype."""
    artifact = Checkpoint(good_artifact)
    shared = artifact.tensors.keys() & tiny_reference.tensors.keys()
    changed = [name for name in shared if artifact.tensors[name].dtype != tiny_reference.tensors[name].dtype]
    assert changed == []
    assert sum("layernorm" in name for name in shared) == 2 * 4


def test_record_travels(good_artifact: Path) -> None:
    """Beside an artifact of ours lie its recipe, its search record and its scales, away from what engines load."""
    found = {file.name for file in (good_artifact / "quantproof").iterdir()}
    assert found == {"recipe.json", "search.json", "scales.safetensors"}
    assert not [file for file in good_artifact.glob("*.safetensors") if not file.name.startswith("model-")]
