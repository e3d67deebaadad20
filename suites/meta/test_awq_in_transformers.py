"""AWQ artifacts by transformers' own loader (GPTQModel): it converts what is coded, and computes what we do."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from fixtures.adapters import adapter_for
from fixtures.adapters.view import HubView
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import CheckpointError
from fixtures.engines.hf import TransformersEngine
from fixtures.engines.loading import load_by_transformers
from fixtures.engines.ways import library_modules, way_to_run
from fixtures.faults.awq_codes import neighbours_scales, zero_off_by_one
from fixtures.faults.editing import copied, edit_json
from fixtures.formats import format_of
from fixtures.options import Selection
from fixtures.quantizers import calibration, recipe_for
from fixtures.quantizers.cache import cached_artifact
from fixtures.subjects import shipped
from fixtures.subjects.samples import draw
from suites import test_loading
from suites.meta.answering import listener

if find_spec("gptqmodel") is None:
    # the newest needs a newer torch than vLLM does, so it is in none of our extras
    pytest.skip("GPTQModel is absent: pip install gptqmodel", allow_module_level=True)

SAMPLES = 4  # per modality
FAMILIES = ("qwen2_5_vl", "qwen2_5_omni")
Logits = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(selection: Selection) -> Callable[[str, str], Checkpoint]:
    """The artifact of a shipped family by one of our quantizers of AWQ's format."""

    def make(family: str, quantizer: str) -> Checkpoint:
        reference = Checkpoint(shipped(f"{family}-tiny"))
        samples = calibration.built_in(adapter_for(reference)) if quantizer == "awq" else []
        recipe = recipe_for(quantizer, None, calibration=calibration.digest(samples) if samples else "")
        return Checkpoint(cached_artifact(reference, recipe, samples, selection.cache))

    return make


def logits(artifact: Checkpoint, dtype: torch.dtype, *, kernels: bool) -> Logits:
    """Of every taught token, by modality."""
    adapter = adapter_for(artifact)
    engine = TransformersEngine(artifact, adapter, dtype, kernels=kernels)
    return {
        modality: torch.cat([one for _, one, _ in engine.taught(draw(modality, "evaluation", SAMPLES))])
        for modality in adapter.modalities
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantizer", ["rtn", "awq"])
def test_computes_what_is_stored(
    family: str, quantizer: str, made: Callable[[str, str], Checkpoint], selection: Selection
) -> None:
    """GPTQModel's kernels compute what our reference dequantization says that the bytes mean, in every modality."""
    artifact = made(family, quantizer)
    dtype = test_loading.library_dtype(artifact)
    verify = listener()
    test_loading.test_library_computes_what_is_stored(
        logits(artifact, torch.float32, kernels=False),
        logits(artifact, dtype, kernels=False),
        logits(artifact, dtype, kernels=True),
        selection.limits,
        verify,
    )
    assert verify.conclude() == ""


@pytest.mark.parametrize("fault", [zero_off_by_one, neighbours_scales], ids=lambda fault: fault.__name__)
def test_misread_codes_are_noticed(
    fault: Callable[[Path], None], made: Callable[[str, str], Checkpoint], selection: Selection, tmp_path: Path
) -> None:
    """A library that took zero points for GPTQ's, or a group's scales for its neighbour's, in one linear, is caught."""
    artifact = made("qwen2_5_vl", "awq")
    fault(misread := copied(artifact.path, tmp_path / "misread"))
    verify = listener()
    test_loading.test_library_computes_what_is_stored(
        logits(artifact, torch.float32, kernels=False),
        logits(artifact, torch.float16, kernels=False),
        logits(Checkpoint(misread), torch.float16, kernels=True),
        selection.limits,
        verify,
    )
    assert verify.conclude()


@pytest.mark.parametrize("family", FAMILIES)
def test_converts_what_is_coded(family: str, made: Callable[[str, str], Checkpoint]) -> None:
    """Transformers reads our skip list as we mean it: it converts the linears that are coded, and no other."""
    artifact = made(family, "rtn")
    adapter = adapter_for(artifact)
    model = load_by_transformers(artifact, adapter, torch.float32)
    converted = {
        adapter.hub_name(name)
        for name, module in model.named_modules()
        if type(module).__module__.startswith("gptqmodel.nn_modules")
    }
    assert converted == format_of(artifact).quantized(HubView(artifact, adapter))
    assert converted
    assert library_modules(model)
    assert way_to_run(artifact, "cpu").load is load_by_transformers


def test_short_skip_list_is_refused(made: Callable[[str, str], Checkpoint], tmp_path: Path) -> None:
    """The skip list that AutoAWQ writes makes transformers convert the vision tower, and fail in one line."""
    broken = copied(made("qwen2_5_vl", "rtn").path, tmp_path / "broken")
    edit_json(broken, "config.json", lambda c: c["quantization_config"].update(modules_to_not_convert=["visual"]))
    artifact = Checkpoint(broken)
    with pytest.raises(CheckpointError, match="does not load in transformers") as error:
        load_by_transformers(artifact, adapter_for(artifact), torch.float32)
    assert "\n" not in str(error.value)
