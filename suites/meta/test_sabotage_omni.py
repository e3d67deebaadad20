"""What only Omni can lose: its talker, its voices, its heads and vocoder to a library's defaults, one of its towers."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fixtures.adapters import ADAPTERS
from fixtures.audit.coverage import linear_states
from fixtures.audit.pair import Pair
from fixtures.core.checkpoint import Checkpoint
from fixtures.core.errors import UserError
from fixtures.core.targets import Target
from fixtures.engines.loading import load_model
from fixtures.faults import settings
from fixtures.faults.editing import copied, edit_shard
from fixtures.formats import AWQ_GEMM
from fixtures.options import Selection
from fixtures.quantizers import quantize, recipe_for
from fixtures.quantizers.artifact import copy_side_files
from fixtures.quantizers.cache import cached_artifact
from fixtures.subjects import shipped
from fixtures.verifying import Verify
from suites import test_coverage
from suites.meta.answering import BYTE_CHECKS

OMNI = ADAPTERS["qwen2_5_omni"]
TARGET = Target("qwen2_5_omni", "tiny", "rtn")
Audit = Callable[..., Verify]


@pytest.fixture(scope="module")
def omni() -> Checkpoint:
    """The shipped Omni."""
    return Checkpoint(shipped("qwen2_5_omni-tiny"))


@pytest.fixture(scope="module")
def good(omni: Checkpoint, selection: Selection) -> Path:
    """A good artifact of it, thinker and talker rounded; never to be changed, only copied."""
    return cached_artifact(omni, recipe_for("rtn", None), (), selection.cache)


@pytest.mark.parametrize("check", BYTE_CHECKS, ids=lambda check: check.__name__)
def test_no_false_alarm(check: Callable[..., None], good: Path, omni: Checkpoint, audit: Audit) -> None:
    """A good artifact of Omni is not accused."""
    assert audit(check, good, TARGET, omni).conclude() == ""


@pytest.mark.parametrize(
    ("fault", "check", "quantity"),
    [
        (settings.no_voices, test_coverage.test_settings, "side files: settings that differ"),
        (settings.other_voices, test_coverage.test_settings, "side files: settings that differ"),
        (
            settings.skip_list("visual", "talker", "token2wav", "lm_head"),
            test_coverage.test_skip_list_in_transformers,
            "linears that transformers misjudges",
        ),
        (
            settings.skip_list("thinker.model.visual", "thinker.model.audio_tower", "lm_head"),
            test_coverage.test_skip_list_in_vllm,
            "linears that vLLM misjudges",
        ),
    ],
    ids=["no voices", "other voices", "skip list of AutoAWQ's kind", "skip list of in-memory names"],
)
def test_fault_is_caught(
    fault: Callable[[Path], None],
    check: Callable[..., None],
    quantity: str,
    good: Path,
    omni: Checkpoint,
    audit: Audit,
    tmp_path: Path,
) -> None:
    """A planted fault is caught by the check that exists for it, in the quantity that names it."""
    damaged = copied(good, tmp_path / "damaged")
    fault(damaged)
    measured = {m.quantity: m for m in audit(check, damaged, TARGET, omni).measurements}
    assert measured[quantity].holds is False


def test_talker_layer_left_out(good: Path, omni: Checkpoint, audit: Audit, tmp_path: Path) -> None:
    """A talker linear left in full precision, though the rest of the talker is quantized, is caught."""
    damaged, linear = copied(good, tmp_path / "damaged"), "talker.model.layers.1.mlp.up_proj"

    def change(tensors: dict[str, Any]) -> None:
        for part in AWQ_GEMM.marks:
            del tensors[f"{linear}.{part}"]
        tensors[f"{linear}.weight"] = omni.load(f"{linear}.weight")

    edit_shard(damaged, f"{linear}.qweight", change)
    verdict = audit(test_coverage.test_every_linear, damaged, TARGET, omni).conclude()
    assert f"{linear}: kept in full precision without a reason" in verdict


@pytest.mark.parametrize("tower", ["language_model", "talker"])
def test_one_tower_alone(tower: str, omni: Checkpoint, audit: Audit, tmp_path: Path) -> None:
    """An artifact of thinker or talker alone is as good as its recipe, and no good where both were asked for."""
    quantize(omni, recipe_for("rtn", None, (tower,)), (), tmp_path / "alone")
    for check in BYTE_CHECKS:
        assert audit(check, tmp_path / "alone", TARGET, omni).conclude() == ""
    pair = Pair(omni, Checkpoint(tmp_path / "alone"), ("language_model", "talker"))
    assert {name.split(".")[0] for name in pair.quantized} == {"talker" if tower == "talker" else "thinker"}
    wrong = [s.linear.tower for s in linear_states(pair) if s.fault]
    assert set(wrong) == {"language_model", "talker"} - {tower}


def test_voices_are_not_unpickled(good: Path, tmp_path: Path) -> None:
    """Voices that are no table of tensors are refused with one line; nothing in them is executed."""
    import pickle

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    damaged = copied(good, tmp_path / "damaged")
    (damaged / "spk_dict.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    import torch

    with pytest.raises(UserError, match="cannot be read as speakers' voices") as refused:
        load_model(Checkpoint(damaged), OMNI, torch.float32)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason='bitsandbytes is absent: pip install "quantproof[bnb]"')
def test_defaults_of_bitsandbytes(omni: Checkpoint, audit: Audit, tmp_path: Path) -> None:
    """Bitsandbytes' defaults convert Omni's heads, towers and vocoder, too, and coverage names them."""
    import torch
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = OMNI.model_class().from_pretrained(omni.path, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    copy_side_files(omni.path, tmp_path / "theirs")
    verdict = audit(test_coverage.test_every_linear, tmp_path / "theirs", TARGET, omni)
    offenders = [s for s in linear_states(Pair(omni, Checkpoint(tmp_path / "theirs"))) if s.fault]
    assert verdict.conclude()
    assert {s.linear.tower for s in offenders} >= {"visual", "audio_tower", "lm_head", "talker", "token2wav"}
    assert {"thinker.lm_head", "talker.codec_head"} <= {s.linear.name for s in offenders}
