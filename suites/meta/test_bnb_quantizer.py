"""bitsandbytes through transformers: artifacts come through whole, and what cannot be done is refused.

Bytes are judged by our own decoders. Whether those read bytes as bitsandbytes does: test_bnb_formats.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.adapters.view import HubView
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import CheckpointError, UserError
from fixtures.core.recipe import Recipe
from fixtures.engines.loading import load_model, quiet_transformers
from fixtures.faults import bnb as faults
from fixtures.faults.editing import copied, edit_tensor
from fixtures.formats import format_of
from fixtures.quantizers import bits_and_bytes
from fixtures.quantizers.artifact import side_files
from fixtures.quantizers.bits_and_bytes import KINDS
from suites.meta.bnb_audit import LINEAR, NEEDED, OMNI, VL, audit, differing, skip_list

pytestmark = NEEDED

# A good artifact


@pytest.mark.parametrize("kind", KINDS)
def test_within_theory(kind: str, bnb_artifacts: Callable[[str], Path], tiny_reference: Checkpoint) -> None:
    """Every linear of the decoder is quantized, within the bounds that theory gives in every respect."""
    found = audit(tiny_reference, bnb_artifacts(kind))

    assert found.quantized == {
        linear.name for linear in HubView(tiny_reference, VL).linears if linear.name.startswith("model.layers.")
    }
    assert (found.contradictions, found.flaws, found.misshapen) == ([], [], [])
    assert found.largest_error <= 1.001
    assert found.end_error <= 1.001
    assert found.coarsest == pytest.approx(1, abs=1e-6)
    assert found.finest == pytest.approx(1, abs=1e-6)
    assert found.frobenius <= 1.01
    assert (found.recoded, found.broken_scales, found.clipped) == (0, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_rest_is_the_reference_s(kind: str, bnb_artifacts: Callable[[str], Path], tiny_reference: Checkpoint) -> None:
    """What was not quantized is the reference's, bit for bit and under the hub's names; nothing is lost or added."""
    artifact = Checkpoint(bnb_artifacts(kind))
    layout = format_of(artifact)
    coded = layout.quantized(artifact.tensors)
    kept = {name for name in tiny_reference.tensors if name.removesuffix(".weight") not in coded}

    assert set(artifact.tensors) == kept | {part for m in coded for part in layout.parts(m, artifact.tensors)}
    for name in kept:
        assert artifact.tensors[name].dtype == tiny_reference.tensors[name].dtype
        assert torch.equal(artifact.load(name), tiny_reference.load(name))
    assert len({info.shard for info in artifact.tensors.values()}) > 3


@pytest.mark.parametrize("kind", KINDS)
def test_files(kind: str, bnb_artifacts: Callable[[str], Path], tiny_reference: Checkpoint) -> None:
    """Side files are the reference's, config.json is but for its quantization, and a record says what was done."""
    folder = bnb_artifacts(kind)
    config = json.loads((folder / "config.json").read_text())
    quantization = config.pop("quantization_config")

    assert config == tiny_reference.config
    assert [file.name for file in side_files(folder)] == [file.name for file in side_files(tiny_reference.path)]
    for file in side_files(tiny_reference.path):
        assert (folder / file.name).read_bytes() == file.read_bytes()
    assert json.loads((folder / "quantproof" / "recipe.json").read_text())["recipe"]["quantizer"] == kind
    assert quantization["quant_method"] == "bitsandbytes"
    assert {name: quantization[name] for name in KINDS[kind]} == KINDS[kind]
    assert quantization["llm_int8_skip_modules"] == list(skip_list(tiny_reference))
    assert quantization["bnb_4bit_compute_dtype"] == "bfloat16"
    assert not (folder / bits_and_bytes.SAVED).exists()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_by_the_library_alone(
    kind: str, bnb_artifacts: Callable[[str], Path], tiny_reference: Checkpoint, tmp_path: Path
) -> None:
    """Users who load and save by themselves have the same tensors, bit for bit."""
    bits_and_bytes.quantize_and_save(tiny_reference, VL, KINDS[kind], tmp_path, skip=skip_list(tiny_reference))

    assert differing(Checkpoint(bnb_artifacts(kind)), Checkpoint(tmp_path)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_reloads(kind: str, bnb_artifacts: Callable[[str], Path]) -> None:
    """Transformers loads the artifact and computes what our decoder says its weights are.

    With the CPU's own 4-bit kernels, which round absmax to bfloat16, and with int8's rounded activations nearly so;
    without them to the last bit.
    """
    artifact = Checkpoint(bnb_artifacts(kind))
    prompt = {"input_ids": torch.arange(1, 60)[None]}
    ours = log_probabilities(load_model(artifact, VL, torch.bfloat16), prompt)
    quiet_transformers()
    for repacks, allowed in ((True, 0.005), (False, 0.0)):
        model = VL.model_class().from_pretrained(artifact.path, dtype=torch.bfloat16, device_map={"": "cpu"})
        for module in model.modules():
            if not repacks and hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        theirs = log_probabilities(model, prompt)
        divergence = (ours.exp() * (ours - theirs)).sum(-1).mean()
        assert abs(float(divergence)) <= (0.005 if kind == "bnb-int8" else allowed)
        assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def log_probabilities(model: Any, prompt: dict[str, Any]) -> torch.Tensor:
    """Of every next token [1, tokens, vocabulary]."""
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**prompt).logits.float()
    return logits.log_softmax(-1)


def test_tied_head(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """A head tied to the embedding is kept, even where the skip list does not name it, and named there then."""
    skip = [entry for entry in skip_list(tiny_reference) if entry != "lm_head"]
    bits_and_bytes.write(tiny_reference, VL, Recipe("bnb-nf4"), tmp_path / "artifact", skip=skip)
    artifact = Checkpoint(tmp_path / "artifact")

    assert "lm_head" not in format_of(artifact).quantized(artifact.tensors)
    assert not [name for name in artifact.tensors if name.startswith("lm_head")]
    assert "lm_head" in (artifact.quantization or {})["llm_int8_skip_modules"]
    assert torch.equal(artifact.load(f"{VL.embedding}.weight"), tiny_reference.load(f"{VL.embedding}.weight"))


def test_progress(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """Progress is told at the start and at the end."""
    heard: list[tuple[int, int]] = []
    bits_and_bytes.write(
        tiny_reference,
        VL,
        Recipe("bnb-nf4"),
        tmp_path / "artifact",
        skip=skip_list(tiny_reference),
        progress=lambda _, done, total: heard.append((done, total)),
    )
    assert heard == [(0, 1), (1, 1)]


# Omni


class Words(defaultdict[str, int]):
    """A tokenizer as far as a config asks one: every word is token 5 of 64."""

    def __init__(self) -> None:
        super().__init__(lambda: 5)

    def __len__(self) -> int:
        return 64

    def get_vocab(self) -> Words:
        """Itself."""
        return self


@pytest.fixture(scope="module")
def omni(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A random Omni in bfloat16, with token2wav in float32 and a speaker beside it, as on the hub."""
    from fixtures.subjects.omni.architecture import build_config

    folder = tmp_path_factory.mktemp("omni") / "reference"
    torch.manual_seed(0)
    model = OMNI.model_class()(build_config(Words())).bfloat16()  # type: ignore[arg-type]
    model.token2wav.float()
    quiet_transformers()
    model.save_pretrained(folder)
    voice = {"bos_token": 5, "cond": torch.zeros(1, 16), "ref_mel": torch.zeros(1, 20, 80)}
    torch.save({"Chelsie": voice}, folder / "spk_dict.pt")
    return Checkpoint(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_omni(kind: str, omni: Checkpoint, tmp_path: Path) -> None:
    """Thinker and talker are quantized; all else stays as it is, token2wav in float32; speakers come along."""
    skip = OMNI.skip_list(omni.config, OMNI.quantizable(omni.config))
    bits_and_bytes.write(omni, OMNI, Recipe(kind), tmp_path / "artifact", skip=skip)
    artifact = Checkpoint(tmp_path / "artifact")

    found = audit(omni, artifact.path)
    layers = OMNI.decoder_layers(omni.config)
    assert found.quantized == {
        linear.name for linear in HubView(omni, OMNI).linears if any(layer.holds(linear.name) for layer in layers)
    }
    assert (found.contradictions, found.flaws, found.misshapen) == ([], [], [])
    assert found.largest_error <= 1.001
    kept = [name for name in omni.tensors if name.removesuffix(".weight") not in found.quantized]
    assert {omni.tensors[name].dtype for name in kept} == {"BF16", "F32"}
    assert [name for name in kept if not torch.equal(omni.load(name), artifact.load(name))] == []
    assert (artifact.path / "spk_dict.pt").read_bytes() == (omni.path / "spk_dict.pt").read_bytes()
    assert OMNI.model_class().from_pretrained(artifact.path, device_map={"": "cpu"}).has_talker


# What cannot be done


def wanted_refusal(reference: Checkpoint, kind: str, out: Path) -> str:
    """The one line in which quantizing is refused; nothing is left behind."""
    with pytest.raises(UserError) as caught:
        bits_and_bytes.write(reference, VL, Recipe(kind), out, skip=skip_list(reference))
    assert not out.exists()
    assert not list(out.parent.glob(f".{out.name}*"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_such_kind(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """A kind that bitsandbytes does not have is refused, naming those it has."""
    said = wanted_refusal(tiny_reference, "bnb-int3", tmp_path / "artifact")
    assert said == "'bnb-int3' is no data type of bitsandbytes; there are bnb-nf4, bnb-nf4-dq, bnb-fp4, bnb-int8"


def test_without_bitsandbytes(tiny_reference: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bitsandbytes the command that installs it is named."""
    monkeypatch.setattr(bits_and_bytes, "find_spec", lambda name: None)
    said = wanted_refusal(tiny_reference, "bnb-nf4", tmp_path / "artifact")
    assert said == 'bnb-nf4 needs bitsandbytes, which is not installed: pip install "quantproof[bnb]"'


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("bnb-nf4", math.nan), ("bnb-nf4", math.inf), ("bnb-nf4-dq", math.nan), ("bnb-nf4-dq", -math.inf),
        ("bnb-fp4", math.inf), ("bnb-int8", math.nan), ("bnb-int8", math.inf), ("bnb-int8", 1e5),
    ],
)  # fmt: skip
def test_weights_that_cannot_be_quantized(kind: str, value: float, tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """A weight that is not finite, or for int8 not finite in float16, is refused, naming its linear."""
    damaged = copied(tiny_reference.path, tmp_path / "reference")
    edit_tensor(
        damaged,
        f"{LINEAR}.weight",
        lambda weight: weight.index_put((torch.tensor(3),), torch.tensor(value).to(weight)),
    )

    said = wanted_refusal(Checkpoint(damaged), kind, tmp_path / "artifact")
    assert f"{LINEAR}: bitsandbytes cannot quantize it" in said
    assert ("65504" in said) == (kind == "bnb-int8")


def test_huge_weights_in_4_bits(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """A weight beyond float16's range is no trouble in 4 bits: absmax is a float32."""
    large = copied(tiny_reference.path, tmp_path / "reference")
    edit_tensor(large, f"{LINEAR}.weight", lambda weight: weight * 1e30)
    reference = Checkpoint(large)
    bits_and_bytes.write(reference, VL, Recipe("bnb-nf4"), tmp_path / "artifact", skip=skip_list(reference))

    assert audit(reference, tmp_path / "artifact").largest_error <= 1.001


def test_missing_weight(tiny_reference: Checkpoint, tmp_path: Path) -> None:
    """A linear that the reference lacks is not made up."""
    damaged = copied(tiny_reference.path, tmp_path / "reference")
    faults.dropped("weight")(damaged)

    said = wanted_refusal(Checkpoint(damaged), "bnb-nf4", tmp_path / "artifact")
    assert said.endswith(f"lacks {LINEAR}.weight, which transformers makes up; copy it again")


def test_reference_that_does_not_load(omni: Checkpoint, tmp_path: Path) -> None:
    """What transformers says of a reference that it cannot load is passed on in one line."""
    damaged = copied(omni.path, tmp_path / "reference")
    (damaged / "spk_dict.pt").unlink()
    with pytest.raises(CheckpointError) as caught:
        bits_and_bytes.write(Checkpoint(damaged), OMNI, Recipe("bnb-nf4"), tmp_path / "artifact", skip=["token2wav"])
    assert "reference cannot be loaded by transformers" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "artifact").exists()
